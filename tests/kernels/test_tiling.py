"""Tables of tiles, the rule for shapes that are in none, the tuner's choice, and what the compiler says."""

import json
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton
from click.testing import CliRunner
from triton.runtime.errors import OutOfResources

from spnet.kernels import check, tiling, tune, workload
from spnet.kernels.library import Launch
from spnet.kernels.tiling import Shape, Tile

META = torch.device("meta")


def test_a_measured_tile_comes_before_the_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "TABLES", tmp_path)
    tiling.table.cache_clear()
    shape = Shape.of(torch.float16, False, 3, 64, 64, 3000)
    assert shape == ("float16", 3, 64, 64, False, 4096)
    measured = Tile(256, 64, 32, 4, 8, 5, 1)
    entry = dict(tile=list(measured), microseconds=1.0, by_rule=2.0)
    (tmp_path / "sm_90.json").write_text(json.dumps(dict(device="a GPU", tiles={shape.key: entry})))
    assert tiling.choose("sm_90", shape) == measured
    assert tiling.choose("sm_90", shape._replace(dtype="bfloat16")) == measured
    shortcut = shape._replace(shortcut=True)
    assert tiling.choose("sm_90", shortcut) == measured
    (tmp_path / "sm_90.json").write_text(json.dumps(dict(device="a GPU", tiles={shortcut.key: entry})))
    tiling.table.cache_clear()
    assert tiling.choose("sm_90", shortcut) == measured
    assert tiling.choose("sm_90", shape) == tiling.rule("sm_90", shape)  # a body's registers may not suffice
    (tmp_path / "sm_90.json").write_text(json.dumps(dict(device="a GPU", tiles={shape.key: entry})))
    tiling.table.cache_clear()
    assert tiling.choose("sm_80", shape) == tiling.rule("sm_80", shape)
    assert tiling.choose("sm_90", shape._replace(cin=128)) == tiling.rule("sm_90", shape._replace(cin=128))
    tiling.table.cache_clear()


@pytest.mark.parametrize("dtype", workload.DTYPES)
@pytest.mark.parametrize("architecture", [*tiling.SHARED_BYTES, "sm_75"])
@pytest.mark.parametrize("batch", [1, 32, 1024])
def test_the_rule_gives_tiles_that_fit(dtype, batch, architecture):
    for network in workload.NETWORKS:
        for conv in workload.convolutions(network):
            tile = tiling.rule(architecture, conv.shape(dtype, batch))
            assert all(n & (n - 1) == 0 for n in (tile.block_m, tile.block_n, tile.block_k, tile.warps))
            assert min(tile.block_m, tile.block_n, tile.block_k) >= 16
            itemsize = workload.torch_dtype(dtype).itemsize
            stages = (tile.block_m + tile.block_n) * tile.block_k * itemsize * tile.stages
            assert stages * tile.programs_per_sm <= tiling.SHARED_BYTES.get(architecture, 99 << 10)


@pytest.mark.parametrize("dtype", ["float16", "tf32"])
def test_every_measured_tile_is_compiled(tmp_path, monkeypatch, dtype):
    """Also those of batch sizes at which the check compiles no other."""
    monkeypatch.setattr(tiling, "TABLES", tmp_path)
    caches = tiling.table, check.cases
    for each in caches:
        each.cache_clear()
    before = len(check.cases("sm_80"))
    for each in caches:
        each.cache_clear()
    conv = workload.Conv(3, 1, 28, 128, 128, "inner")
    tiles = {batch: Tile(64, 16, 32, 4, 8, stages, 1) for batch, stages in ((8, 2), (64, 3), (256, 5))}
    entries = {conv.shape(dtype, batch).key: dict(tile=list(tile)) for batch, tile in tiles.items()}
    (tmp_path / "sm_80.json").write_text(json.dumps(dict(tiles=entries)))
    cases = check.cases("sm_80")
    for each in caches:
        each.cache_clear()
    for tile in tiles.values():
        found = [launch for name, launch in cases.items() if name.endswith(f" 128->128 {tuple(tile)}")]
        assert found
        assert all(launch.stages == tile.stages for launch in found)
    assert len(cases) >= before


def test_convolutions_of_resnet50():
    found = workload.convolutions("resnet50")
    assert len(found) == 1 + 5 + 3 * 6 + 1
    assert found[0] == (7, 2, 224, 3, 64, "stem", 1)
    assert (3, 2, 28, 256, 256, "inner", 1) in found
    assert found[-2:] == [(3, 1, 7, 512, 512, "inner", 1), (1, 1, 1, 2048, 1000, "head", 1)]
    assert (3, 2, 28, 512, 512, "inner", 32) in workload.convolutions("resnext50")


def test_the_tuner_takes_the_fastest_tile_of_each_shape():
    asked, prepared, in_other_roles = [], [], []

    def time(launch):
        first = launch.arguments["GATHER"] or launch.arguments["KERNEL_H"] == 7
        (asked if first else in_other_roles).append(launch)
        if launch.arguments["BLOCK_M"] == 256 or (launch.arguments["ADD"] and launch.stages == 4):
            return float("inf")  # no room
        return 100 - launch.arguments["BLOCK_M"] / 2 - launch.stages

    convolutions = workload.convolutions("resnet18")[:3]  # the stem and two of one shape
    table = dict(tune.tune(convolutions, ["float16"], [8], "sm_90", META, (), prepared.extend, time))
    assert list(table) == ["float16-7-32-64-131072", "float16-3-64-64-32768"]
    for (key, entry), stages in zip(table.items(), (4, 3), strict=True):
        tile = Tile(*entry["tile"])
        assert (tile.block_m, tile.stages) == (128, stages)  # with four no residual could be added
        assert entry["microseconds"] == 36 - stages
        conv = convolutions[list(table).index(key)]
        default = tiling.rule("sm_90", conv.shape("float16", 8))
        assert entry["by_rule"] == 100 - default.block_m / 2 - default.stages
    assert len(asked) < 200
    assert in_other_roles
    assert len(in_other_roles) < 20

    def kernel(launch):
        shapes = {name: value for name, value in launch.arguments.items() if not isinstance(value, torch.Tensor)}
        return *shapes.items(), launch.warps, launch.stages

    asked += in_other_roles
    assert len(prepared) == len(set(map(kernel, prepared))) < len(asked)
    assert set(map(kernel, asked)) == set(map(kernel, prepared))


def test_the_tuner_takes_no_tile_that_spills_or_does_not_fit(monkeypatch):
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", lambda run, **options: 0.25)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Kernel:
        """In place of one that was compiled and launched on a GPU."""

        def __getitem__(self, grid):
            def run(n_spills, **options):
                if n_spills is None:
                    raise OutOfResources(300_000, 232_448, "shared memory")
                return SimpleNamespace(n_spills=n_spills)

            return run

    for n_spills, expected in ((0, 250), (4, float("inf")), (None, float("inf"))):
        assert tune.microseconds(Launch(Kernel(), 1, dict(n_spills=n_spills), warps=4, stages=3)) == expected


def test_a_tuner_that_was_stopped_goes_on(tmp_path):
    path, convolutions = tmp_path / "tiles" / "sm_90.json", workload.convolutions("resnet50")[:4]
    asked = []

    def time(launch):
        asked.append(tuple(launch.arguments[name] for name in ("KERNEL_H", "CIN", "COUT")))
        if len(set(asked)) == 3:
            raise KeyboardInterrupt
        return 1.0

    entries = partial(tune.tune, convolutions, ["float16"], [8], "sm_90", META, prepare=list, time=time)
    with pytest.raises(KeyboardInterrupt):
        tune.fill(path, {"device": "a GPU"}, entries)
    before = json.loads(path.read_text())["tiles"]
    assert len(before) == 2
    asked.clear()
    assert tune.fill(path, {"device": "a GPU"}, entries) == 4
    assert len(set(asked)) == 2
    table = json.loads(path.read_text())
    assert table["device"] == "a GPU"
    assert before.items() <= table["tiles"].items()


def test_the_tuner_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "spnet.kernels.tune"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no GPU" in done.stderr


@pytest.mark.parametrize(
    ("name", "report", "text"),
    [
        ("conv float16", check.Report(255, 8, 0, ("wgmma.mma_async",)), "spills 8 bytes"),
        ("conv tf32", check.Report(255, 0, 300_000, ("mma.sync",)), "300000 bytes of shared memory"),
        ("conv bfloat16", check.Report(255, 0, 0, ("mma.sync",)), "has no wgmma"),
    ],
)
def test_complaints(name, report, text):
    (found,) = check.complaints(name, report, "sm_90")
    assert text in found
    assert not check.complaints(name, check.Report(100, 0, 1000, ("wgmma.mma_async",)), "sm_90")


@pytest.mark.parametrize("spilled", [0, 8])
def test_the_check_fails_where_a_kernel_spills(monkeypatch, spilled):
    class Compiler:
        """In place of processes that compile: all kernels are well but the last."""

        def __init__(self, *options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, work, chunksize):
            report = check.Report(100, 0, 1000, ("wgmma.mma_async",))
            return [report] * (len(work) - 1) + [report._replace(spilled_bytes=spilled)]

    monkeypatch.setattr(check, "ProcessPoolExecutor", Compiler)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    done = CliRunner().invoke(check.main, ["--arch", "sm_90"])
    assert done.exit_code == bool(spilled), done.output
    assert done.output.endswith(f"{len(check.cases('sm_90'))} kernels, {int(bool(spilled))} failed\n")
    assert done.output.count("100 registers, 8 spilled,   1000 shared") == bool(spilled)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 64, 256])
@pytest.mark.parametrize("conv", workload.convolutions("resnet50"), ids=str)
def test_measured_tiles_differ_in_roundings_alone(conv, batch):
    """From a plain one, on three samples."""
    device = torch.device("cuda")
    measured = tiling.choose(tiling.architecture(device), conv.shape("float16", batch))

    def run(tile):
        torch.manual_seed(1)
        launch = conv.launch("float16", 3, tile, device)
        launch.run()
        return launch.arguments["out_ptr"]

    found, expected = run(measured), run(Tile(64, 32, 32, 8, 4, 2, 1))
    halves = found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=2**-9 if halves else 1e-4, atol=1e-2 if halves else 1e-3)


def test_the_check_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    done = CliRunner().invoke(check.main, [])
    assert done.exit_code == 1
    assert "TRITON_INTERPRET=1 is set: there is nothing to compile" in done.output
