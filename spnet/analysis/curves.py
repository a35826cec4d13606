"""Pictures of a training log: losses, accuracy, execution rates and churn of paths over time.

A log is the lines of ``log.jsonl`` of :class:`spnet.training.Trainer` as dictionaries. Every function returns a
``matplotlib.figure.Figure`` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spnet.analysis.paths import short_names
from spnet.analysis.pictures import BLUE, DPI, GREY, MOST_NAMES, RED, WIDTH

TITLES = {
    "loss": "whole objective",
    "cls": "L_cls, classification",
    "act": "L_act, execution rates",
    "path": "L_path, router logits",
    "logits": "L_logits, class logits",
    "evo": "L_evo, feature evolution",
}


def whole_epochs(log: Sequence[dict]) -> list[dict]:
    """The log's lines of whole epochs.

    Raises:
        ValueError: there is none.
    """
    found = [line for line in log if line["kind"] == "epoch"]
    if not found:
        raise ValueError("log: expected at least one whole epoch, got none")
    return found


def _style(ax: Axes, title: str, xlabel: str) -> None:
    ax.set_title(title, size=10, loc="left")
    ax.set_xlabel(xlabel, size=9)
    ax.tick_params(labelsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))  # two may not fit between whole numbers
    ax.spines[["top", "right"]].set_visible(False)


def loss_curves(log: Sequence[dict]) -> Figure:
    """Every term of the objective over steps, unweighted: single steps, and their means over an epoch.

    Raises:
        ValueError: a log without a whole epoch.
    """
    steps, epochs = [line for line in log if line["kind"] == "step"], whole_epochs(log)
    terms = [name for name in TITLES if name in epochs[0]["train"]]
    columns = min(len(terms), 3)
    rows = -(-len(terms) // columns)
    fig = Figure((WIDTH, 0.4 + 2.1 * rows), DPI, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(terms) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, terms, strict=False):
        ax.plot([s["step"] for s in steps], [s[name] for s in steps], color=BLUE, lw=0.7, alpha=0.5, label="step")
        means = [e["train"][name] for e in epochs]
        ax.plot([e["step"] for e in epochs], means, ".-", color=RED, lw=1.2, ms=4, label="mean of an epoch")
        _style(ax, TITLES[name], "step")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return fig


def accuracy_curves(log: Sequence[dict]) -> Figure:
    """Accuracy on training and test images, and, with routers, mean cost of a test image, over epochs.

    Raises:
        ValueError: a log without a whole epoch.
    """
    epochs = whole_epochs(log)
    routed = bool(epochs[0]["test"]["rates"])
    fig = Figure((WIDTH, 2.9), DPI, layout="constrained")
    axes = fig.subplots(1, 1 + routed, squeeze=False)[0]
    x = [e["epoch"] for e in epochs]
    for part, colour in (("train", GREY), ("test", BLUE)):
        axes[0].plot(x, [e[part]["accuracy"] for e in epochs], ".-", color=colour, label=part)
    axes[0].legend(frameon=False, fontsize=8)
    _style(axes[0], "accuracy", "epoch")
    if routed:
        axes[1].plot(x, [e["test"]["macs"] / e["test"]["dense_macs"] for e in epochs], ".-", color=BLUE)
        axes[1].set_ylim(0, 1.02)
        _style(axes[1], "cost of a test image, of dense", "epoch")
    for ax in axes:
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    return fig


def rates_over_epochs(log: Sequence[dict], blocks: tuple[str, ...]) -> Figure:
    """Execution rate of every block (rows, the first on top) on the test images after every epoch (columns).

    Args:
        blocks: the blocks' names.

    Raises:
        ValueError: a log without a whole epoch, or of another number of blocks.
    """
    epochs = whole_epochs(log)
    rates = np.array([e["test"]["rates"] for e in epochs]).T  # [L, epochs]
    if len(rates) != len(blocks) or not len(blocks):
        raise ValueError(f"blocks: expected the {len(rates)} names of the log's blocks, got {len(blocks)}")
    fig = Figure((WIDTH, 1.2 + min(0.2 * len(blocks), 6)), DPI, layout="constrained")
    ax = fig.subplots()
    first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    x, y = np.arange(first - 0.5, last + 1), np.arange(len(blocks) + 1)
    image = ax.pcolormesh(x, y, rates, cmap="Blues", vmin=0, vmax=1)
    _style(ax, "Execution rate of every block on the test images", "epoch")
    ax.spines[:].set_visible(False)
    step = -(-len(blocks) // MOST_NAMES)
    names = short_names(blocks)[::step]
    ax.set_yticks(y[:-1:step] + 0.5, names, parse_math=False, size=8)
    ax.invert_yaxis()
    ax.tick_params(length=0)
    bar = fig.colorbar(image, ax=ax, fraction=0.03, pad=0.02, format=PercentFormatter(1))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    return fig


def churn_curve(log: Sequence[dict]) -> Figure:
    """Fraction of the test images' decisions that flipped since the epoch before, over epochs.

    Raises:
        ValueError: a log of fewer than two epochs, or of a network without routers.
    """
    epochs = [e for e in whole_epochs(log) if e["test"].get("churn") is not None]
    if not epochs:
        raise ValueError("log: expected two epochs or more of a network with routers")
    fig = Figure((WIDTH, 2.4), DPI, layout="constrained")
    ax = fig.subplots()
    ax.plot([e["epoch"] for e in epochs], [e["test"]["churn"] for e in epochs], ".-", color=BLUE)
    ax.set_ylim(0)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    _style(ax, "Path churn: decisions that flipped since the epoch before", "epoch")
    return fig
