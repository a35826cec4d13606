"""``calibrate``: never slower than dense. Each block is timed with its body on the samples that execute it, and with
its body on all of them and a selection, which is faster where nearly all of them execute it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from spnet.execution.device import on
from spnet.execution.kept import plan_of
from spnet.execution.plan import Plan
from spnet.routing import uncompiled, unwrapped

ROUNDS = 7  # in each of which both have their turn


@uncompiled
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> Plan:
    """Measure how often and how fast each block of a model executes, and keep the faster of two ways to run it.

    ``batch`` obeys, in :func:`spnet.fast_forward` too until the model is changed; ``walk``, where a skip is a branch,
    has nothing to choose. What is computed stays the same.

    Args:
        model: a network that :func:`spnet.lower` takes, in evaluation mode.
        batches: inputs [B, C, H, W] like those to come, in content and in B, on the model's device. Every one is timed
            block by block, so a handful is enough; one without samples is passed over.

    Returns:
        The model's plan, with ``rates`` and ``choices``; ``save`` keeps them.

    Raises:
        LoweringError: the model does not fit.
        ValueError: no sample in the batches, or an input that does not fit the model.
        TypeError: batches is one tensor, whose samples would be taken for batches, or holds others than tensors.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches: expected an iterable of batches [B, C, H, W], got one Tensor; pass [x]")
    model, plan, samples = unwrapped(model), None, 0
    for x in batches:
        if plan is None:
            plan = plan_of(model, x)
            executed = torch.zeros(plan.num_blocks, dtype=torch.float64, device="cpu")
            seconds = torch.zeros(2, plan.num_blocks, dtype=torch.float64, device="cpu")  # routed, dense
        _, paths = plan(x, return_paths=True)
        executed += paths.decisions.sum(0).cpu()
        samples += len(x)
        if len(x) and plan.impl == "batch":
            seconds += _times(plan, x, paths.decisions)
    if not samples:
        raise ValueError("batches: expected at least one sample, got none")
    plan.choose(executed / samples, (seconds[1] < seconds[0]).tolist())
    return plan


@torch.inference_mode(False)
@torch.no_grad()
def _times(plan: Plan, x: Tensor, decisions: Tensor) -> Tensor:
    """Seconds of every block [2, L], routed and dense: the least of several turns."""
    clock = on(plan.device).clock
    with torch.autocast(plan.device.type, enabled=False):
        times = [_minima(clock, run) for run in plan.execution("batch").trials(x, decisions)]
    return torch.tensor(times, dtype=torch.float64, device="cpu").reshape(-1, 2).T


def _minima(clock: Callable, run: Callable[[bool], object]) -> tuple[float, float]:
    routed, dense = clock(lambda: run(False)), clock(lambda: run(True))
    turns = [(routed(), dense()) for _ in range(ROUNDS)]
    return tuple(map(min, zip(*turns[1:], strict=True)))  # the first warms up
