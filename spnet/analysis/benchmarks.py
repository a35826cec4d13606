"""What `pytest bench/` measured, as a table, as figures, and beside an earlier measurement.

A result file is JSON: ``machine`` (what it was measured on), ``date``, ``command``, and ``cells``, each the
``extra_info`` of one benchmark together with its ``name`` and ``group``.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from spnet.analysis.macs import align
from spnet.analysis.pictures import BLUE, DPI, GREY, RED, WIDTH

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_LEGEND = "ms of `fast_forward`, of the best dense rival, and their ratio"
_MACHINE = ["cpu", "device", "driver", "cuda_version", "cpu_level", "threads", "torch", "triton", "compiler"]


def collect(benchmark_json: str | Path, command: str) -> dict:
    """The result file's content from what ``pytest --benchmark-json`` wrote.

    Raises:
        ValueError: a file that is something else.
    """
    try:
        raw = json.loads(Path(benchmark_json).read_text())
        info = raw["machine_info"]
        machine = {**info, "cpu": info["cpu"].get("brand_raw", info["processor"])}
        cells = [{"name": b["name"], "group": b["group"], **b["extra_info"]} for b in raw["benchmarks"]]
        return {
            "machine": {key: machine[key] for key in _MACHINE if machine.get(key) is not None},
            "date": raw["datetime"][:10],
            "command": command,
            "cells": sorted(cells, key=lambda cell: cell["group"]),
        }
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{benchmark_json}: not what pytest --benchmark-json writes ({e!r})") from e


def merge(runs: list[dict]) -> dict:
    """One result of several from machines of one kind. A cell that several have is the last one's.

    Raises:
        ValueError: machines of several kinds, or CPUs of which other numbers of threads were measured.
    """
    kinds = dict.fromkeys(map(_kind, runs))
    if len(kinds) != 1:
        raise ValueError(f"merge: expected results of one kind of machine, got {' and '.join(kinds) or 'none'}")
    names = dict.fromkeys(name for run in runs for name in run["machine"])
    cells = {(cell["name"], cell["group"]): cell for run in runs for cell in run["cells"]}
    return {
        "machine": {name: _joined(r["machine"][name] for r in runs if name in r["machine"]) for name in names},
        "date": max(run["date"] for run in runs),
        "command": _joined(run["command"] for run in runs),
        "cells": sorted(cells.values(), key=lambda cell: cell["group"]),
    }


def _kind(results: dict) -> str:
    """The machine, with the threads where it is they that compute: no table says of a cell how many there were."""
    machine = results["machine"]
    threads = [] if "device" in machine or "threads" not in machine else [f"{machine['threads']} threads"]
    return ", ".join([_machine(results), *threads])


def _joined(values: Iterable) -> str | int:
    first, *others = dict.fromkeys(values)
    return " and ".join(map(str, (first, *others))) if others else first


def default_name(results: dict) -> str:
    """``device-date``, for file names."""
    device = results["machine"].get("device", results["machine"]["cpu"])
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {results['date']}".lower()).strip("-")


def load(path: str | Path) -> dict:
    """Read a result file.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no result file.
    """
    try:
        results = json.loads(Path(path).read_text())
        if not {"machine", "date", "cells"} <= results.keys():
            raise ValueError("it lacks machine, date or cells")
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{path}: no result file of spnet bench ({e})") from e
    return results


def _forward(results: dict) -> list[dict]:
    cells = [cell for cell in results["cells"] if cell["group"].startswith("forward, ")]
    return sorted(cells, key=lambda c: (*_setting(c), c["executed"]))


def _ours(cell: dict) -> float:
    return cell["minimum_ms"]["fast_forward"]


def _best(cell: dict, *kinds: str) -> tuple[str, float] | None:
    """The fastest rival of these kinds and its ms."""
    own = ("fast_forward", "plan")
    found = [
        (ms, rival) for rival, ms in cell["minimum_ms"].items() if cell["kinds"][rival] in kinds and rival not in own
    ]
    return min(found)[::-1] if found else None


def _dense(cell: dict) -> tuple[str, float]:
    """The best dense rival, which every cell has, and its ms."""
    return _best(cell, "masked", "dense")


def _speed_up(cell: dict) -> float:
    return _dense(cell)[1] / _ours(cell)


def _setting(cell: dict) -> tuple[str, str, int]:
    return cell["network"], cell["dtype"], cell["batch"]


def _describe(cell: dict) -> str:
    return f"{cell['network']}, {cell['dtype']}, batch {cell['batch']}, {cell['executed']:.0%} executed"


def _percent(share: float | None) -> str:
    return "not known" if share is None else f"{share:.2%}"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def markdown(results: dict) -> str:
    """Everything measured as Markdown: cells against their rivals, where spnet loses, real paths, operators."""
    lines = [_head(results), "", *_forward_table(_forward(results)), *_losses_line(results)]
    real = [c for c in results["cells"] if c["group"].startswith("real paths")]
    if real:
        impls = list(real[0]["minimum_ms"])
        head = ["real images, real paths: batch", *(f"`{impl}`, us per image" for impl in impls), "speed-up"]
        rows = []
        for cell in sorted(real, key=lambda c: c["batch"]):
            per_image = [cell["minimum_ms"][impl] * 1e3 / cell["batch"] for impl in impls]
            ratio = cell["minimum_ms"]["masked"] / cell["minimum_ms"][cell["auto"]]
            rows.append([str(cell["batch"]), *(f"{us:.0f}" for us in per_image), f"{ratio:.2f}x"])
        lines += table(head, rows)
    lines += _thresholds_table({"us per image": results})
    others = []
    for cell in results["cells"]:
        for key, unit in (("gbytes", "GB/s"), ("gflops", "GFLOP/s")):
            if key in cell:
                rate, limit = cell[key]["native"], cell[key]["limit"]
                others.append([cell["name"], f"{rate:.4g} {unit}", f"{limit:.4g}", f"{rate / limit:.0%}"])
    if others:
        lines += table(["operator", "reaches", "limit of the same run", "share"], others)
    for cell in results["cells"]:
        if cell["group"].startswith(("training", "linearity", "threads")):
            listed = ", ".join(f"{name}: {ms:.3g} ms" for name, ms in cell["minimum_ms"].items())
            more = "".join(f"; {key} {cell[key]:.4g}" for key in ("r2", "ratio") if key in cell)
            lines += [f"- {cell['group']}: {listed}{more}"]
    return "\n".join(lines).rstrip() + "\n"


def summary(runs: dict[str, dict]) -> str:
    """What the README shows: half of the block executions on CPUs, side by side; all fractions on each GPU; accuracy
    against time.

    Args:
        runs: result files, by the link to everything in them.
    """
    machines = {_machine(results): results for results in runs.values()}
    lines = [
        f"- **{_machine(results)}** ([all of it]({link})): {_head(results)} {' '.join(_losses_line(results))}".rstrip()
        for link, results in runs.items()
    ]
    lines += [""]
    cpus = {name: r for name, r in machines.items() if "device" not in r["machine"]}
    half = {name: [c for c in _forward(r) if c["executed"] == 0.5] for name, r in cpus.items()}
    if any(half.values()):
        lines += [f"Half of the block executions: {_LEGEND}.", "", *_against_dense(half)]
    for name, results in machines.items():
        cells = _forward(results)
        if cells and name not in cpus:
            fractions = sorted({c["executed"] for c in cells})
            lines += [f"{name}, by the share of block executions: {_LEGEND}.", ""]
            lines += _against_dense({f"{f:.0%} executed": [c for c in cells if c["executed"] == f] for f in fractions})
    return "\n".join(lines + _thresholds_table({f"{name}, us per image": r for name, r in machines.items()}))


def _against_dense(columns: dict[str, list[dict]]) -> list[str]:
    """A row for each network, dtype and batch; a column has one cell of each at most."""
    found = [{_setting(cell): cell for cell in cells} for cells in columns.values()]
    rows = []
    for setting in sorted(set().union(*found)):
        network, dtype, batch = setting
        row = [f"{network}, {dtype}, batch {batch}"]
        for cells in found:
            if cell := cells.get(setting):
                name, ms = _dense(cell)
                row.append(f"{_ours(cell):.3g}; {ms:.3g} ({name}): **{_speed_up(cell):.2f}x**")
            else:
                row.append("")
        rows.append(row)
    return table(["network, dtype, batch", *columns], rows)


def _machine(results: dict) -> str:
    """The kind of a machine: what differs where results are no longer of the same."""
    machine = results["machine"]
    return machine.get("device") or ", ".join(machine[key] for key in ("cpu", "cpu_level") if key in machine)


def _head(results: dict) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return f"{machine}; {results['date']}; `{results['command']}`."


def _forward_table(cells: list[dict]) -> list[str]:
    if not cells:
        return []
    head = ["network, dtype, batch, executed", "by", "fast_forward", "plan", "best dense", "speed-up", "efficiency"]
    head += ["best skipping rival", "static network of half the cost"]
    rows = []
    for cell in cells:
        name, ms = _dense(cell)
        rivals = [_best(cell, kind) for kind in ("skips", "static")]
        rows.append(
            [
                _describe(cell),
                f"`{cell['impl']}`",
                f"{_ours(cell):.3g}",
                f"{cell['minimum_ms']['plan']:.3g}" if "plan" in cell["minimum_ms"] else "",
                f"{ms:.3g} ({name})",
                f"{_speed_up(cell):.2f}x",
                f"{ms * cell['executed_macs'] / cell['dense_macs'] / _ours(cell):.0%}",
                *(f"{r[1]:.3g} ({r[0]})" if r else "" for r in rivals),
            ]
        )
    legend = "Minimum in ms; ratios are of one run. Efficiency is best dense time x executed MACs / time."
    return [legend, "", *table(head, rows)]


def _losses_line(results: dict) -> list[str]:
    if not _forward(results):
        return []
    return ["**Where spnet loses:** " + ("; ".join(losses(results)) or "in no cell of this run") + ".", ""]


def _thresholds_table(runs: dict[str, dict]) -> list[str]:
    """Accuracy and cost at every threshold, and the time of every run."""
    cells = {name: c for name, results in runs.items() for c in results["cells"] if "points" in c}
    if not cells:
        return []
    first, rows = next(iter(cells.values())), []
    for name in first["points"]:
        points = [cell["points"].get(name) for cell in cells.values()]
        accuracy = dict.fromkeys(_percent(p["accuracy"]) for p in points if p)
        share = dict.fromkeys(f"{p['executed_share']:.0%}" for p in points if p)
        us = [f"{p['us_per_image']:.0f}" if p else "" for p in points]
        rows.append([_static(first) if name == "static" else name, " / ".join(accuracy), " / ".join(share), *us])
    images = " / ".join(dict.fromkeys(str(cell["images"]) for cell in cells.values()))
    return table([f"threshold ({images} test images)", "accuracy", "executed MACs", *cells], rows)


def _static(cell: dict) -> str:
    return f"static network after {cell['static_epochs']} epochs"


def losses(results: dict) -> list[str]:
    """Cells in which a rival that gives the same answers is faster than ``fast_forward``."""
    found = []
    for cell in _forward(results):
        name, ms = _best(cell, "masked", "dense", "skips")
        if ms < _ours(cell):
            found.append(f"{_describe(cell)}: {name} {ms:.3g} ms, fast_forward {_ours(cell):.3g} ms")
    return found


def compare(before: dict, after: dict, tolerance: float = 0.1) -> str:
    """Cells that both runs have: the speed-up over the best dense rival of each, and what became slower.

    Args:
        tolerance: a loss of more than this share of the speed-up is a regression.
    """
    earlier = {_describe(cell): cell for cell in _forward(before)}
    rows, worse = [("cell", "before", "after", "change", "")], 0
    for cell in _forward(after):
        name = _describe(cell)
        if name not in earlier:
            continue
        a, b = _speed_up(earlier[name]), _speed_up(cell)
        slower = b < a * (1 - tolerance)
        worse += slower
        rows.append((name, f"{a:.2f}x", f"{b:.2f}x", f"{b / a - 1:+.0%}", "slower" if slower else ""))
    if len(rows) == 1:
        return "no cell is in both files"
    return "\n".join([*align(rows), "", f"{worse} of {len(rows) - 1} cells became slower by more than {tolerance:.0%}"])


def break_even(cells: list[dict]) -> float | None:
    """The executed fraction at which ``fast_forward`` takes as long as the best dense rival.

    Args:
        cells: of one network, dtype and batch, at two fractions or more.

    Returns:
        The fraction, which is above 1 where even executing everything is faster; None for fewer cells.
    """
    if len({cell["executed"] for cell in cells}) < 2:
        return None
    slope, intercept = statistics.linear_regression([c["executed"] for c in cells], [_ours(c) for c in cells])
    return (min(_dense(c)[1] for c in cells) - intercept) / slope


def figures(results: dict, folder: str | Path) -> list[Path]:
    """Write every figure that the cells allow as PNG; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    series: dict[tuple[str, str], dict[int, list[dict]]] = {}
    for cell in _forward(results):
        series.setdefault((cell["network"], cell["dtype"]), {}).setdefault(cell["batch"], []).append(cell)
    made = {}
    for (network, dtype), batches in series.items():
        if any(len(cells) > 1 for cells in batches.values()):
            made[f"time-{network}-{dtype}"] = _time_figure(network, dtype, batches)
    if any(sum(c["executed"] == 0.5 for cells in batches.values() for c in cells) > 1 for batches in series.values()):
        made["speed-up"] = _speed_up_figure(series)
    even = {f"{n}\n{d}, B={b}": break_even(cells) for (n, d), batches in series.items() for b, cells in batches.items()}
    if any(even.values()):
        made["break-even"] = _break_even_figure({name: x for name, x in even.items() if x is not None})
    for cell in results["cells"]:
        if "points" in cell:
            made["accuracy"] = _accuracy_figure(cell)
        if "block_us" in cell:
            made["blocks"] = _blocks_figure(cell)
    paths = []
    for name, figure in made.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def _time_figure(network: str, dtype: str, batches: dict[int, list[dict]]) -> Figure:
    """Time against executed fraction with the ideal line, one panel per batch."""
    fig = Figure((WIDTH, 3.2), DPI, layout="constrained")
    for ax, (batch, cells) in zip(fig.subplots(1, len(batches), squeeze=False)[0], batches.items(), strict=True):
        cells = sorted(cells, key=lambda c: c["executed"])
        x = [c["executed"] for c in cells]
        ax.plot(x, [_ours(c) for c in cells], "o-", color=BLUE, label="fast_forward")
        ax.plot(x, [_dense(c)[1] for c in cells], "--", color=RED, label="best dense rival")
        ax.plot(x, [c["ideal_ms"] for c in cells], ":", color=GREY, label="ideal: dense x executed MACs")
        ax.set(title=f"batch {batch}", xlabel="executed fraction", xlim=(-0.05, 1.05), ylim=0)
    fig.axes[0].set_ylabel("ms")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    fig.suptitle(f"{network}, {dtype}", size=10)
    return fig


def _speed_up_figure(series: dict[tuple[str, str], dict[int, list[dict]]]) -> Figure:
    """Speed-up over the best dense rival against batch, half of the block executions."""
    fig = Figure((WIDTH, 3.2), DPI, layout="constrained")
    ax = fig.subplots()
    # Hollow and of several shapes: two that lie on one another are both seen.
    for ((network, dtype), batches), marker in zip(series.items(), cycle("osD^v*"), strict=False):
        half = sorted((b, c) for b, cells in batches.items() for c in cells if c["executed"] == 0.5)
        if half:
            x, y = [b for b, _ in half], [_speed_up(c) for _, c in half]
            ax.plot(x, y, marker=marker, ms=7, fillstyle="none", label=f"{network}, {dtype}")
    ax.axhline(1, color=GREY, lw=1, ls=":")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="batch", ylabel="speed-up over the best dense rival", ylim=0)
    ax.set_title("half of the block executions", size=10)
    ax.legend(fontsize=8, frameon=False)
    return fig


def _break_even_figure(fractions: dict[str, float]) -> Figure:
    """Executed fraction below which skipping pays, per network."""
    fig = Figure((WIDTH, 1 + 0.42 * len(fractions)), DPI, layout="constrained")
    ax = fig.subplots()
    ax.barh(list(fractions), list(fractions.values()), color=BLUE)
    ax.axvline(1, color=GREY, lw=1, ls=":")
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=8)
    ax.set_xlabel("executed fraction at which time equals that of the best dense rival")
    return fig


def _accuracy_figure(cell: dict) -> Figure:
    """Accuracy against measured time at several router thresholds, next to the static network."""
    fig = Figure((WIDTH, 3.6), DPI, layout="constrained")
    ax = fig.subplots()
    routed = {name: p for name, p in cell["points"].items() if name != "static"}
    ax.plot([p["us_per_image"] for p in routed.values()], [p["accuracy"] for p in routed.values()], "o-", color=BLUE)
    # By turns below and above the line: neighbours may be closer than their names are wide.
    for (name, p), spot in zip(routed.items(), cycle([(4, -11), (-3, 4)]), strict=False):
        ha = "right" if spot[0] < 0 else "left"
        ax.annotate(name, (p["us_per_image"], p["accuracy"]), spot, textcoords="offset points", size=8, ha=ha)
    static = cell["points"]["static"]
    if static["accuracy"] is not None:
        ax.plot(static["us_per_image"], static["accuracy"], "s", color=RED, label=_static(cell))
        ax.legend(frameon=False, fontsize=8)
    # Thresholds that execute next to nothing would press all others into one line.
    best = max(p["accuracy"] for p in routed.values())
    ax.set_ylim(best - 0.1, max(best, static["accuracy"] or 0) + 0.02)
    ax.set(xlabel="us per image", ylabel=f"accuracy, {cell['images']} test images")
    ax.set_title("one network at several router thresholds", size=10)
    return fig


def _blocks_figure(cell: dict) -> Figure:
    """Time of every block and how often real images execute it, side by side."""
    fig = Figure((WIDTH, 3.4), DPI, layout="constrained")
    left, right = fig.subplots(1, 2)
    x = range(len(cell["blocks"]))
    left.bar(x, cell["block_us"], color=BLUE)
    left.set(title="us per image where executed", xlabel="block")
    right.bar(x, cell["rates"], color=RED)
    right.set(title="execution rate", xlabel="block", ylim=(0, 1))
    for ax in (left, right):
        ax.title.set_size(10)
        ax.set_xticks(list(x), cell["blocks"], rotation=90, size=8)
    return fig


def write(results: dict, folder: str | Path, name: str) -> list[Path]:
    """Write ``name.json``, ``name.md`` and the figures in ``name/``; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    data.write_text(json.dumps(results, indent=1) + "\n")
    page.write_text(markdown(results))
    return [data, page, *figures(results, folder / name)]


def update_readme(text: str, results_folder: str | Path, link: str) -> str:
    """``text`` with the part between its two marks generated from the newest result file of each kind of machine.

    Args:
        text: of the README, with ``<!-- measured: begin -->`` and ``<!-- measured: end -->``.
        results_folder: holds the result files.
        link: how the README names that folder.

    Raises:
        ValueError: a mark is missing, or there is no result file.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README: expected {BEGIN} and {END}, once each")
    runs = {file: load(file) for file in Path(results_folder).glob("*.json")}
    if not runs:
        raise ValueError(f"{results_folder}: no result files")
    newest: dict[str, Path] = {}  # of each kind of machine
    for file in sorted(runs, key=lambda f: (runs[f]["date"], f.name), reverse=True):
        newest.setdefault(_machine(runs[file]), file)
    section = summary({f"{link}/{file.stem}.md": runs[file] for file in newest.values()})
    for name in ("speed-up", "accuracy"):
        shown: dict[bool, str] = {}  # of the newest CPU and of the newest GPU
        for file in newest.values():
            if (file.with_suffix("") / f"{name}.png").exists():
                shown.setdefault("device" in runs[file]["machine"], file.stem)
        section += "".join(f"\n![{name}]({link}/{stem}/{name}.png)\n" for stem in shown.values())
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n" + section + text[text.index(END) :]
