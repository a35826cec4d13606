"""One page about a training run: what it learned, how its routing settled, and what its paths look like."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Iterator
from html import escape
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from spnet.analysis.curves import accuracy_curves, churn_curve, loss_curves, rates_over_epochs, whole_epochs
from spnet.analysis.paths import PathStatistics, paths
from spnet.analysis.pictures import cost_histogram, easiest_hardest, rate_heat_map
from spnet.analysis.stability import evolution_alignment
from spnet.models.files import load_model
from spnet.routing import routed_blocks
from spnet.training.config import TrainConfig
from spnet.training.data import FolderLoader, Loader, check_data, make_loader
from spnet.training.distributed import usable_device

PICTURED = 12  # easiest images, and as many hardest

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd }}
img {{ display: block; width: 100%; height: auto; margin: 1rem 0 }}
table {{ border-collapse: collapse }}
td {{ padding: .15rem 1.5rem .15rem 0; vertical-align: top; overflow-wrap: anywhere }}
td:first-child {{ color: #666 }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    loader: Loader | FolderLoader | None = None,
    data_root: str | Path | None = None,
    limit: int | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Write one HTML page, with its pictures inside, about a run of :class:`spnet.training.Trainer`.

    The curves come from the run's log; the paths are those that the test images take through its checkpoint ``best``.

    Args:
        run: the run's folder.
        out: the file; default ``report.html`` in the folder.
        loader: of the test images, in the same order on every iteration; default: what the run's settings name.
        data_root: folder of the data set, where it is another than the settings say.
        limit: only so many test images.
        device: where the checkpoint runs.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: no run there, or its data set is not where it was.
        ValueError: a damaged file, a log without a whole epoch, a device that is not there, or test images of other
            classes, or normalised otherwise, than in training.
    """
    run = Path(run)
    if not (run / "log.jsonl").exists():
        raise FileNotFoundError(f"run: no training run at {run}, as there is no log.jsonl")
    config, log = TrainConfig.load(run / "config.json"), read_log(run / "log.jsonl")
    epochs = whole_epochs(log)
    model = load_model(run / "best").to(usable_device(device))
    if loader is None:
        root = data_root if data_root is not None else config.data_root
        loader = make_loader(
            config.data,
            "test",
            root=root,
            batch_size=config.batch_size,
            device=device,
            workers=config.workers,
            image_size=config.image_size,
            bad_shards=config.bad_shards,
        )
    check_data(model, loader, config.data)
    blocks = tuple(routed_blocks(model))
    alignment = evolution_alignment(model, FirstImages(loader, limit), device)
    parts = [
        _table(_summary(config, epochs, alignment)),
        "<h2>Training</h2>",
        _picture(loss_curves(log), "terms of the objective over steps"),
        _picture(accuracy_curves(log), "accuracy and cost over epochs"),
    ]
    if blocks:
        parts.append(_picture(rates_over_epochs(log, blocks), "execution rate of every block over epochs"))
        if len(epochs) > 1:
            parts.append(_picture(churn_curve(log), "path churn over epochs"))
        stats = paths(model, FirstImages(loader, limit))
        ends = easiest_and_hardest(stats)
        parts += [
            f"<h2>Paths of {stats.count}</h2>",
            _picture(rate_heat_map(stats), "execution rate by class and block"),
            _picture(cost_histogram(stats), "histogram of the cost per sample"),
            _picture(
                easiest_hardest(stats.subset(ends), read_images(loader, ends), PICTURED),
                "images with the cheapest and with the costliest paths",
            ),
        ]
    else:
        parts.append("<p>The network is static: it has no routers, and every image executes every block.</p>")
    parts += ["<h2>Settings</h2>", _table({k: str(v) for k, v in dataclasses.asdict(config).items()})]
    out = run / "report.html" if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = _PAGE.format(title=escape(f"{config.model} on {config.data}"), body="\n".join(parts))
    out.write_bytes(page.encode("utf-8", "replace"))  # as it says itself, whatever the locale's encoding is
    return out


def read_log(path: Path) -> list[dict]:
    """The lines of a training log; what a kill left of a last line is left out.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: something else than a log.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not all(line["kind"] in ("step", "epoch") for line in lines):
            raise ValueError("a line of another kind")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: not the log of a training run ({e!r})") from e
    return lines


def _summary(config: TrainConfig, epochs: list[dict], alignment: float) -> dict[str, str]:
    best, last = max(epochs, key=lambda e: e["test"]["accuracy"]), epochs[-1]
    facts = {
        "trained": f"{last['epoch']} of {config.epochs} epochs, {last['step']:,} steps of {config.batch_size} images",
        "best test accuracy": f"{best['test']['accuracy']:.2%}, after epoch {best['epoch']}",
        "last test accuracy": f"{last['test']['accuracy']:.2%}",
        "cost of a test image": f"{best['test']['macs'] / 1e6:.2f} MMACs, "
        f"{best['test']['macs'] / best['test']['dense_macs']:.1%} of dense (best)",
    }
    if not math.isnan(alignment):  # of a network that skips everything
        facts["alignment"] = f"{alignment:.3f}, mean cosine of successive feature differences (best)"
    if last["test"].get("churn") is not None:
        facts["path churn"] = f"{last['test']['churn']:.2%} of the decisions in the last epoch"
    for name, unit, scale in (("images", "images/s", 1), ("macs", "GMAC/s", 1e9)):
        trained, tested = (
            statistics.median(e[f"{part}{name}_per_second"] for e in epochs) / scale for part in ("", "test_")
        )
        facts[f"throughput, {unit}"] = f"{trained:,.1f} in training, {tested:,.1f} in testing (median of the epochs)"
    return facts


class FirstImages:
    """Batches of the first `limit` images of a loader; of all where it is None."""

    def __init__(self, loader: Loader | FolderLoader, limit: int | None):
        self.loader, self.limit, self.class_names = loader, limit, loader.class_names

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = self.limit
        for x, labels in self.loader:
            yield x[:left], labels[:left]
            if left is not None:
                left -= len(x)
                if left <= 0:
                    return


def easiest_and_hardest(stats: PathStatistics) -> Tensor:
    """int64, ascending: the samples that are pictured, those with the cheapest and those with the costliest paths."""
    order = stats.by_difficulty
    return torch.cat([order[:PICTURED], order[PICTURED:][-PICTURED:]]).sort().values


def read_images(loader: Loader | FolderLoader, chosen: Tensor) -> Tensor:
    """The images at these ascending positions, read once more: a whole set of large images would not fit in memory.

    Returns:
        uint8 [M, S, S, C], as the network sees them.
    """
    images, seen = [], 0
    for x, _ in loader:
        here = chosen[(chosen >= seen) & (chosen < seen + len(x))] - seen
        images.append(x[here.to(x.device)].cpu())
        seen += len(x)
        if seen > chosen[-1]:
            break
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (loader.mean, loader.std))
    pixels = (torch.cat(images) * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1)


def _picture(figure: Figure, what: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _table(rows: dict[str, str]) -> str:
    cells = (f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return "\n".join(["<table>", *cells, "</table>"])
