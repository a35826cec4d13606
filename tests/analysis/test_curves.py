"""Pictures of a training log: readable for any number of epochs and blocks, and what is refused."""

import pytest
from test_pictures import assert_readable, stages

from spnet.analysis.curves import accuracy_curves, churn_curve, loss_curves, rates_over_epochs

TERMS = {"loss": 2.5, "cls": 2.0, "act": 0.1, "path": 0.2, "logits": 0.1, "evo": 0.1}


def log(epochs: int, blocks: int) -> list[dict]:
    """Of ten steps an epoch; a line each, but for the last epoch's."""
    steps = [{"kind": "step", "step": s + 1, **TERMS} for s in range(10 * (epochs - 1))]
    rates = [b / blocks for b in range(blocks)]
    tests = [
        {"accuracy": 0.5, "rates": rates, "macs": 5, "dense_macs": 9, "churn": 0.1 if e else None}
        for e in range(epochs)
    ]
    train = {**TERMS, "accuracy": 0.4}
    return steps + [
        {"kind": "epoch", "step": 10 * e + 10, "epoch": e + 1, "train": train, "test": t} for e, t in enumerate(tests)
    ]


def figures(epochs: int, blocks: tuple[str, ...]):
    lines = log(epochs, len(blocks))
    yield from (loss_curves(lines), accuracy_curves(lines), rates_over_epochs(lines, blocks))
    if epochs > 1:
        yield churn_curve(lines)


@pytest.mark.parametrize("epochs", [1, 2, 350])
@pytest.mark.parametrize("blocks", [stages(1), stages(3, 3, 3), stages(18, 18, 18)], ids=len)
def test_readable(epochs, blocks):
    for figure in figures(epochs, blocks):
        assert_readable(figure)


@pytest.mark.parametrize("epochs", [1, 2, 350])
def test_steps_and_epochs_are_whole_numbers(epochs):
    for figure in figures(epochs, stages(3, 3, 3)):
        axes = [ax for ax in figure.axes if ax.get_xlabel() in ("step", "epoch")]
        assert axes
        for ax in axes:
            low, high = ax.get_xlim()
            ticks = [t for t in ax.get_xticks() if low <= t <= high]
            assert ticks
            assert all(t == round(t) for t in ticks)


def test_what_is_no_log_of_these_blocks():
    with pytest.raises(ValueError, match="at least one whole epoch, got none"):
        loss_curves(log(3, 3)[:20])
    with pytest.raises(ValueError, match="expected the 3 names of the log's blocks, got 9"):
        rates_over_epochs(log(2, 3), stages(3, 3, 3))
    with pytest.raises(ValueError, match="two epochs or more"):
        churn_curve(log(1, 3))
