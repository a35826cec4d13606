"""Tables, figures and comparisons of result files, from cells whose figures are worked out by hand."""

import copy
import json

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from test_pictures import assert_readable

from spnet.analysis import benchmarks
from spnet.cli import main


def forward(executed: float, ours: float, dense: float, batch: int = 16) -> dict:
    return {
        "name": f"test_forward[{executed}]",
        "group": f"forward, net, float32, batch {batch}, {executed:.0%} executed",
        "network": "net",
        "dtype": "float32",
        "batch": batch,
        "executed": executed,
        "impl": "walk",
        "minimum_ms": {"fast_forward": ours, "plan": ours / 2, "engine": dense, "naive": 3 * dense, "half": 1.0},
        "kinds": {"fast_forward": "skips", "plan": "skips", "engine": "dense", "naive": "skips", "half": "static"},
        "executed_macs": 100 * executed,
        "dense_macs": 100,
        "ideal_ms": dense * executed,
    }


@pytest.fixture
def results() -> dict:
    return {
        "machine": {"cpu": "A Processor", "threads": 2},
        "date": "2026-01-02",
        "command": "spnet bench --quick",
        "cells": [
            forward(0.0, 1.0, 10.0),
            forward(0.5, 4.0, 10.0),
            forward(1.0, 7.0, 10.0),
            forward(0.5, 8.0, 6.0, batch=1),
            {
                "name": "test_real_paths[B1]",
                "group": "real paths, net",
                "batch": 2,
                "minimum_ms": {"masked": 6.0, "walk": 1.5},
                "auto": "walk",
            },
            {
                "name": "test_thresholds",
                "group": "accuracy against time",
                "images": 7,
                "static_epochs": 3,
                "points": {
                    "static": {"us_per_image": 50.0, "accuracy": None, "executed_share": 1.0},
                    "0.0": {"us_per_image": 25.0, "accuracy": 0.5, "executed_share": 0.4},
                },
            },
            {"name": "c", "group": "walk, convolution", "gflops": {"native": 90.0, "limit": 100.0}},
            {"name": "g", "group": "rows", "gbytes": {"native": 5.0, "plain": 1.0, "limit": 20.0}},
            {"name": "t", "group": "training step", "minimum_ms": {"static": 1.0, "SP-Net": 2.0}},
            {"name": "b", "group": "blocks", "blocks": ["1.0", "1.1"], "block_us": [3.0, 4.0], "rates": [0.5, 1.0]},
        ],
    }


def test_table(results):
    text = benchmarks.markdown(results)
    # 10 ms x 50 of 100 MACs / 4 ms = 125 %
    row = (
        "| net, float32, batch 16, 50% executed | `walk` | 4 | 2 | 10 (engine) | 2.50x | 125% | 30 (naive) | 1 (half) |"
    )
    assert row in text
    assert "cpu A Processor, threads 2; 2026-01-02; `spnet bench --quick`." in text
    assert "| 2 | 3000 | 750 | 4.00x |" in text
    assert "| static network after 3 epochs | not known | 100% | 50 |" in text
    assert "| 0.0 | 50.00% | 40% | 25 |" in text
    assert "| c | 90 GFLOP/s | 100 | 90% |" in text
    assert "| g | 5 GB/s | 20 | 25% |" in text
    assert "- training step: static: 1 ms, SP-Net: 2 ms" in text


def test_losing_cells_are_named(results):
    assert benchmarks.losses(results) == ["net, float32, batch 1, 50% executed: engine 6 ms, fast_forward 8 ms"]
    assert "**Where spnet loses:** net, float32, batch 1" in benchmarks.markdown(results)
    results["cells"] = results["cells"][:3]
    assert "**Where spnet loses:** in no cell of this run." in benchmarks.markdown(results)


def test_break_even(results):
    # Time is 1 + 6 x executed: 10 ms are reached at 1.5.
    assert benchmarks.break_even(results["cells"][:3]) == pytest.approx(1.5)
    assert benchmarks.break_even(results["cells"][:1]) is None


def test_comparison(results):
    after = copy.deepcopy(results)
    after["cells"][1]["minimum_ms"]["fast_forward"] = 5.0
    text = benchmarks.compare(results, after)
    assert "1 of 4 cells became slower by more than 10%" in text
    line = next(line for line in text.splitlines() if "batch 16, 50%" in line)
    assert line.split()[-4:] == ["2.50x", "2.00x", "-20%", "slower"]
    # A machine that is slower for everyone is no regression.
    twice = copy.deepcopy(results)
    for cell in twice["cells"][:4]:
        cell["minimum_ms"] = {name: 2 * ms for name, ms in cell["minimum_ms"].items()}
    assert "0 of 4 cells" in benchmarks.compare(results, twice)
    assert benchmarks.compare(results, {**results, "cells": []}) == "no cell is in both files"


def test_files(results, tmp_path):
    paths = benchmarks.write(results, tmp_path, benchmarks.default_name(results))
    names = [p.relative_to(tmp_path).as_posix() for p in paths]
    figures = ["time-net-float32", "speed-up", "break-even", "accuracy", "blocks"]
    stem = "a-processor-2026-01-02"
    assert names == [f"{stem}.json", f"{stem}.md", *(f"{stem}/{name}.png" for name in figures)]
    assert all(p.stat().st_size > 1000 for p in paths)
    assert benchmarks.markdown(benchmarks.load(paths[0])) == paths[1].read_text()


def figure_of(results, tmp_path, monkeypatch, name):
    saved = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.update({path.stem: figure}))
    benchmarks.figures(results, tmp_path)
    return saved[name]


def test_the_legend_of_times_hides_none(results, tmp_path, monkeypatch):
    figure = figure_of(results, tmp_path, monkeypatch, "time-net-float32")
    assert_readable(figure)
    (legend,) = figure.findobj(Legend)
    assert len(legend.get_texts()) == 3
    assert not any(legend.get_window_extent().overlaps(ax.bbox) for ax in figure.axes)


def test_networks_of_one_speed_up_are_both_seen(results, tmp_path, monkeypatch):
    results["cells"] += [{**cell, "network": "twin"} for cell in results["cells"][:4]]
    results["cells"].append({**results["cells"][2], "network": "dense only"})
    ax = figure_of(results, tmp_path, monkeypatch, "speed-up").axes[0]
    net, twin = ax.get_lines()[:2]
    assert net.get_ydata().tolist() == twin.get_ydata().tolist()
    assert net.get_marker() != twin.get_marker()
    assert net.get_fillstyle() == twin.get_fillstyle() == "none"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["net, float32", "twin, float32"]


def test_accuracy_of_close_thresholds_and_of_a_better_static_network(results, tmp_path, monkeypatch):
    points = results["cells"][5]["points"]
    points["static"]["accuracy"] = 0.6
    points |= {"0.5": {**points["0.0"], "us_per_image": 24.5}, "1.0": {**points["0.0"], "us_per_image": 20.0}}
    figure = figure_of(results, tmp_path, monkeypatch, "accuracy")
    assert_readable(figure)
    low, high = figure.axes[0].get_ylim()
    assert low < 0.6 < high


def test_collect(tmp_path):
    raw = {
        "machine_info": {"cpu": {"brand_raw": "A"}, "processor": "x86", "threads": 2, "torch": "2", "node": "secret"},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"name": "n", "group": "g", "extra_info": {"x": 1}, "stats": {"min": 0}}],
    }
    file = tmp_path / "raw.json"
    file.write_text(json.dumps(raw))
    got = benchmarks.collect(file, "c")
    assert got["machine"] == {"cpu": "A", "threads": 2, "torch": "2"}
    assert (got["date"], got["cells"]) == ("2026-01-02", [{"name": "n", "group": "g", "x": 1}])
    file.write_text("{}")
    with pytest.raises(ValueError, match="not what pytest --benchmark-json writes"):
        benchmarks.collect(file, "c")
    with pytest.raises(ValueError, match="no result file"):
        benchmarks.load(file)


def test_readme(results, tmp_path):
    folder = tmp_path / "results"
    benchmarks.write(results, folder, "old")
    benchmarks.write({**results, "date": "2026-01-03"}, folder, "new")
    another = copy.deepcopy({**results, "machine": {"cpu": "Another", "cpu_level": "v2"}, "date": "2026-01-01"})
    del another["cells"][1]
    another["cells"][4]["images"] = 5
    another["cells"][4]["points"]["0.0"] = {"us_per_image": 75.0, "accuracy": 0.25, "executed_share": 0.4}
    benchmarks.write(another, folder, "another")
    text = f"before\n{benchmarks.BEGIN}\nstale\n{benchmarks.END}\nafter\n"
    got = benchmarks.update_readme(text, folder, "bench/results")
    assert got.startswith(f"before\n{benchmarks.BEGIN}\n- **A Processor** ([all of it](bench/results/new.md)): cpu A")
    assert got.endswith(f"{benchmarks.END}\nafter\n")
    assert "stale" not in got
    assert "2026-01-03" in got
    # Of each kind of machine the newest, side by side, and every loss.
    assert "bench/results/old" not in got
    assert got.count("**Where spnet loses:** net, float32, batch 1, 50% executed: engine 6 ms") == 2
    # Half of the block executions only.
    lines = got.splitlines()
    begin = lines.index("| network, dtype, batch | A Processor | Another, v2 |")
    assert lines[begin + 2 : begin + 5] == [
        "| net, float32, batch 1 | 8; 6 (engine): **0.75x** | 8; 6 (engine): **0.75x** |",
        "| net, float32, batch 16 | 4; 10 (engine): **2.50x** |  |",
        "",
    ]
    assert "| 0.0 | 50.00% / 25.00% | 40% | 25 | 75 |" in lines
    assert "| threshold (7 / 5 test images) | accuracy | executed MACs | A Processor, us per image | " in got
    assert "A Processor, us per image | Another, v2, us per image |" in got
    picture = lines.index("![speed-up](bench/results/new/speed-up.png)")
    assert lines[picture - 1] == ""  # or it would be a row of the table
    assert benchmarks.update_readme(got, folder, "bench/results") == got
    with pytest.raises(ValueError, match="README: expected"):
        benchmarks.update_readme("", folder, "bench/results")


def raw_of_a_gpu(*cells: dict, **machine) -> dict:
    """What pytest-benchmark and bench/conftest.py write there."""
    info = {"device": "A GPU", "driver": "580.1", "cuda_version": "13.0", "cuda": ["sm_90"], "torch": "2", **machine}
    halves = [{**cell, "dtype": "float16", "network": "big"} for cell in cells]
    return {
        "machine_info": {"cpu": {"brand_raw": "A"}, "processor": "x86", "threads": 16, "triton": "3", **info},
        "datetime": "2026-01-04T03:04:05",
        "benchmarks": [
            {"name": cell["name"], "group": cell["group"], "stats": {"min": 0}, "extra_info": cell} for cell in halves
        ],
    }


def test_a_gpu_in_the_readme(results, tmp_path):
    folder, raw, runs = tmp_path / "results", tmp_path / "raw.json", []
    half = [forward(0.5, 1.0, 3.0, batch=1), forward(0.5, 2.0, 4.0, batch=2)]
    for i, cells in enumerate([[forward(0.25, 2.0, 10.0), forward(1.0, 8.0, 10.0)], half]):
        raw.write_text(json.dumps(raw_of_a_gpu(*cells)))
        runs += benchmarks.write(benchmarks.collect(raw, f"bench/gpu.sh {i}"), tmp_path, str(i))[:1]
    merged = ["bench", *(word for run in runs for word in ("--merge", str(run))), "--out", str(folder)]
    assert CliRunner().invoke(main, merged).exit_code == 0
    benchmarks.write(results, folder, "a-cpu")
    got = benchmarks.update_readme(f"{benchmarks.BEGIN}\n{benchmarks.END}", folder, "results")
    lines = got.splitlines()
    assert lines[1].startswith("- **A GPU** ([all of it](results/a-gpu-2026-01-04.md)): cpu A, device A GPU, ")
    assert ", driver 580.1, cuda_version 13.0, threads 16, torch 2, triton 3; 2026-01-04; `bench/gpu.sh 0 and " in got
    # Not beside the CPU, which has other cells.
    assert "| network, dtype, batch | A Processor |" in lines
    begin = lines.index("| network, dtype, batch | 25% executed | 50% executed | 100% executed |")
    assert lines[begin - 2].startswith("A GPU, by the share of block executions: ms of")
    assert lines[begin + 2 : begin + 6] == [
        "| big, float16, batch 1 |  | 1; 3 (engine): **3.00x** |  |",
        "| big, float16, batch 2 |  | 2; 4 (engine): **2.00x** |  |",
        "| big, float16, batch 16 | 2; 10 (engine): **5.00x** |  | 8; 10 (engine): **1.25x** |",
        "",
    ]
    # Figures of the newest CPU and the newest GPU, where there are some.
    pictures = [line for line in lines if line.startswith("![")]
    assert pictures == [
        "![speed-up](results/a-gpu-2026-01-04/speed-up.png)",
        "![speed-up](results/a-cpu/speed-up.png)",
        "![accuracy](results/a-cpu/accuracy.png)",
    ]


def test_merged_results(results, tmp_path):
    raw, runs = tmp_path / "raw.json", []
    for ours, machine in ((2.0, {}), (1.0, {"threads": 8})):
        raw.write_text(json.dumps(raw_of_a_gpu(forward(0.5, ours, 10.0), **machine)))
        runs.append(benchmarks.collect(raw, "c"))
    got = benchmarks.merge(runs)
    assert got["machine"] == {**runs[0]["machine"], "threads": "16 and 8"}
    assert got["command"] == "c"
    assert got["cells"] == runs[1]["cells"]
    with pytest.raises(ValueError, match="merge: expected results of one kind of machine, got A GPU and A Processor"):
        benchmarks.merge([*runs, results])
    # The threads of a CPU are what was measured.
    more = {**results, "machine": {"cpu": "A Processor", "threads": 16}}
    with pytest.raises(ValueError, match="got A Processor, 2 threads and A Processor, 16 threads$"):
        benchmarks.merge([results, more])
    assert benchmarks.merge([results, results])["machine"] == results["machine"]


def test_commands(results, tmp_path):
    file = benchmarks.write(results, tmp_path / "results", "a")[0]
    readme = tmp_path / "README.md"
    readme.write_text(f"{benchmarks.BEGIN}{benchmarks.END}")
    run = CliRunner().invoke(main, ["bench", "--compare", str(file), str(file)])
    assert "0 of 4 cells" in run.output
    run = CliRunner().invoke(main, ["bench", "--readme", str(readme), "--out", str(file.parent)])
    assert run.exit_code == 0, run.output
    assert "![accuracy](results/a/accuracy.png)" in readme.read_text()
    elsewhere = tmp_path / "elsewhere" / "README.md"
    elsewhere.parent.mkdir()
    elsewhere.write_text(f"{benchmarks.BEGIN}{benchmarks.END}")
    run = CliRunner().invoke(main, ["bench", "--readme", str(elsewhere), "--out", str(file.parent)])
    assert run.exit_code == 0, run.output
    assert "![accuracy](../results/a/accuracy.png)" in elsewhere.read_text()
