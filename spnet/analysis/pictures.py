"""Pictures of path statistics: rate per block and class, cost per sample, easiest and hardest images.

Every function returns a ``matplotlib.figure.Figure`` of its own and touches no global state of matplotlib.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from spnet.analysis.macs import mega
from spnet.analysis.paths import PathStatistics, short_names, shorten

WIDTH = 8  # inches; with DPI 150 a page that is 800 pixels wide shows text of 9 points at 12 pixels
DPI = 150
BLUE, RED, GREY = "#2f6fab", "#c0392b", "#666666"
MOST_NUMBERS = 20  # columns; more leave no room for a number in each cell
MOST_LETTERS = 70  # on a line below the columns
MOST_NAMES = 40  # rows; more leave no room for a name beside each


def rate_heat_map(stats: PathStatistics) -> Figure:
    """Execution rate per class (rows, the mean of all samples on top) and block (columns, grouped by stage).

    Classes without samples are left out. Up to 20 blocks and 39 classes each cell shows its rate in percent; of more
    classes the rows have no names.
    """
    present = stats.class_samples > 0
    rates = torch.cat([stats.rates[None], stats.class_rates[present]]).numpy()  # [1 + classes, L]
    names = [n for n, p in zip(stats.class_names, present.tolist(), strict=True) if p]
    rows, columns = rates.shape
    height = 1.5 + (0.3 * rows if rows <= MOST_NAMES else 8)
    fig = Figure((WIDTH, height), DPI, layout="constrained")
    ax = fig.subplots()
    # A row of its own for the mean, visible also above a thousand classes, and a gap below it.
    head = max(1, rows / 30)
    mesh = dict(cmap="Blues", vmin=0, vmax=1)
    x = np.arange(columns + 1)
    y = np.arange(rows) + 1.25 * head
    ax.pcolormesh(x, [0, head], rates[:1], **mesh)
    image = ax.pcolormesh(x, y, rates[1:], **mesh)
    centres = np.r_[head / 2, y[:-1] + 0.5]
    ax.set(xlim=(0, columns), ylim=(y[-1], 0))
    numbers = columns <= MOST_NUMBERS and rows <= MOST_NAMES
    if numbers:
        for (i, j), rate in np.ndenumerate(rates):
            colour = "white" if rate > 0.55 else "black"
            ax.text(j + 0.5, centres[i], f"{100 * rate:.0f}", ha="center", va="center", size=8, color=colour)
    labels = ["all samples", *(shorten(n) for n in names)]
    if rows > MOST_NAMES:
        centres, labels = centres[:1], labels[:1]
        ax.set_ylabel(f"{len(names)} {_class_word(stats)}es")
    ax.set_yticks(centres, labels, parse_math=False, size=9)
    _label_blocks(ax, stats.blocks)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=ax, fraction=0.03, pad=0.02, format=PercentFormatter(1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)
    ax.set_title(f"Samples that execute a block, by {_class_word(stats)}" + ", %" * numbers, size=11)
    return fig


def _label_blocks(ax: Axes, blocks: tuple[str, ...]) -> None:
    """Name the columns: numbers below them and their stage below the numbers, or else whole names, upright."""
    names = short_names(blocks)
    stages = [(stage, len(list(members))) for stage, members in groupby(n.rpartition(".")[0] for n in names)]
    numbers = [n.rpartition(".")[2] for n in names]
    room = MOST_LETTERS / len(names)  # of a column, in characters
    grouped = all(len(stage) < room * size for stage, size in stages) and max(map(len, numbers)) <= 3
    ticks, start = [], 0
    step = 1 if len(names) <= 32 else 3  # of every stage: the names of the first, the fourth, ...
    for stage, size in stages if grouped else [("", len(names))]:
        ticks += range(start, start + size, step)
        if start:
            ax.axvline(start, color="white", linewidth=3)
        spot = dict(xycoords=ax.get_xaxis_transform(), textcoords="offset points", annotation_clip=False)
        ax.annotate(stage, (start + size / 2, 0), (0, -20), ha="center", va="top", size=9, parse_math=False, **spot)
        start += size
    labels = numbers if grouped else names
    rotation = "horizontal" if grouped else "vertical"
    ax.set_xticks([t + 0.5 for t in ticks], [labels[t] for t in ticks], rotation=rotation, parse_math=False, size=9)
    if not (grouped and stages[0][0]):
        ax.set_xlabel("block", size=9)


def cost_histogram(stats: PathStatistics) -> Figure:
    """Number of samples per cost of their path, in millions of multiply-accumulates, with mean and dense cost.

    A bin is as wide as the average body, so that one more executed block moves a sample by about one bin.
    """
    fig = Figure((WIDTH, 3.4), DPI, layout="constrained")
    ax = fig.subplots()
    dense = stats.dense_macs / 1e6
    fixed = dense - sum(stats.body_macs) / 1e6
    bins = len(stats.blocks) + 1
    step = (dense - fixed) / (bins - 1) or 1.0
    edges = fixed + step * (np.arange(bins + 1) - 0.5)
    cost = stats.macs.numpy() / 1e6
    ax.hist(np.clip(cost, fixed, dense), edges, color=BLUE, edgecolor="white", linewidth=0.8)
    mean = f"mean {mega(1e6 * cost.mean(), 3)} ({stats.fraction:.0%} of dense)"
    ax.axvline(cost.mean(), color="black", linewidth=1.5, label=mean)
    ax.axvline(dense, color=RED, linewidth=1.5, linestyle="--", label=f"dense {mega(stats.dense_macs, 3)}")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9, borderpad=0)
    ax.set_xlim(min(fixed - step, 0), dense + step)
    ax.set_xlabel("cost per sample, MMACs", size=9)
    ax.set_ylabel("samples", size=9)
    ax.yaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"Cost of the paths of {stats.count}", size=11, loc="left")
    return fig


def easiest_hardest(stats: PathStatistics, images: Tensor | np.ndarray, n: int = 12) -> Figure:
    """The n images with the cheapest and the n with the costliest paths (``stats.by_difficulty``), six in a row.

    Below each: its class, in red what it was taken for where that is wrong, and its cost in % of dense.

    Args:
        images: uint8 [N, H, W] or [N, H, W, C] with C = 1 or 3, in the order of the samples of ``stats``.

    Raises:
        ValueError: images of another shape, dtype or number; n < 1.
    """
    images = _checked_images(images, len(stats))
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    order = stats.by_difficulty
    n, columns = min(n, len(order)), 6
    rows = -(-n // columns)
    cell = WIDTH / columns * min(images.shape[1] / images.shape[2], 1) + 0.47  # the image and three lines of text
    fig = Figure((WIDTH, 2 * (0.4 + cell * rows)), DPI, layout="constrained")
    titles = "Easiest: the cheapest paths", "Hardest: the costliest paths"
    for part, title, chosen in zip(fig.subfigures(2), titles, (order[:n], order.flip(0)[:n]), strict=True):
        part.suptitle(title, size=11)
        axes = part.subplots(rows, columns, squeeze=False).flatten()
        for ax in axes:
            ax.set_axis_off()
            ax.set_anchor("N")
        for ax, i in zip(axes, chosen.tolist(), strict=False):
            _show_image(ax, images[i], stats, i)
    return fig


def _show_image(ax: Axes, image: np.ndarray, stats: PathStatistics, i: int) -> None:
    ax.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    expected, got = stats.classes[i].item(), stats.predictions[i].item()
    lines = [
        (shorten(stats.class_names[expected]), dict(size=9)),
        (f"{stats.macs[i].item() / stats.dense_macs:.0%} of dense", dict(size=8, color=GREY)),
    ]
    if got != expected:
        lines.append((f"taken for {shorten(stats.class_names[got], 15)}", dict(size=8, color=RED)))
    for line, (text, style) in enumerate(lines):
        spot = dict(xycoords="axes fraction", textcoords="offset points", ha="center", va="top")
        ax.annotate(text, (0.5, 0), (0, -3 - 11.5 * line), parse_math=False, **spot, **style)


def write_pictures(
    stats: PathStatistics, images: Tensor | np.ndarray, folder: str | Path, chosen: Tensor | None = None
) -> list[Path]:
    """Write ``rates.png``, ``cost.png`` and ``images.png`` (1200 pixels wide) into a folder, made if missing.

    Args:
        images: as in :func:`easiest_hardest`.
        chosen: int64 [M], the samples that the images are of; None where they are of all.

    Returns:
        The three paths. Errors as in :func:`easiest_hardest`; nothing is written then.
    """
    pictures = {
        "rates.png": rate_heat_map(stats),
        "cost.png": cost_histogram(stats),
        "images.png": easiest_hardest(stats if chosen is None else stats.subset(chosen), images),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(folder / name)
    return [folder / name for name in pictures]


def _checked_images(images: Tensor | np.ndarray, samples: int) -> np.ndarray:
    images = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if not shaped or images.dtype != np.uint8 or len(images) != samples:
        raise ValueError(
            f"images: expected uint8 [{samples}, H, W] or [{samples}, H, W, C] with 1 or 3 channels, "
            f"got {images.dtype} {list(images.shape)}"
        )
    return images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images


def _class_word(stats: PathStatistics) -> str:
    return "predicted class" if stats.labels is None else "class"
