"""Clocks: rivals take turns, so that whatever the machine does meanwhile happens to all of them."""

import itertools
import time
from collections.abc import Callable, Iterable

import torch


def take_turns(calls: dict[str, Callable], seconds: float = 15.0) -> dict[str, list[float]]:
    """Seconds of every call, measured in rounds in which each has its turn.

    Each call is repeated in its turn: the second finds in the caches what the first has left there. Between turns
    nobody runs: the threads of several rivals spin for a while after their work, which would fall on the next one.
    """
    once = {name: _clock(call) for name, call in calls.items()}  # also warms up
    repeats = {name: max(2, min(20, int(0.05 / t))) for name, t in once.items()}
    rounds = max(3, min(100, int(seconds / sum(0.02 + repeats[name] * t for name, t in once.items()))))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _wait_for_threads()
            times[name] += [_clock(call) for _ in range(repeats[name])]
    return times


def _wait_for_threads(at_most: float = 0.2) -> None:
    """Returns when no thread of this process works or spins any more, or after so many seconds."""
    pause = 0.005
    for _ in range(int(at_most / pause)):
        before = time.process_time()
        time.sleep(pause)
        if time.process_time() - before < 0.1 * pause:
            return


def minima(calls: dict[str, Callable], seconds: float = 15.0) -> dict[str, float]:
    return {name: min(t) for name, t in take_turns(calls, seconds).items()}


def in_rotation(calls: Iterable[Callable]) -> Callable:
    """Each call of the result is the next of ``calls``: inputs that change flatter neither cache nor branches."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def _clock(call: Callable) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_gflops(dtype: torch.dtype, size: int = 8192) -> float:
    """GFLOP/s of a large matrix product on the GPU, by TF32 where its convolutions do: their limit."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before, products.fp32_precision = products.fp32_precision, convolutions.fp32_precision
    try:
        best = min(_clock(lambda: a @ b) for _ in range(9))
    finally:
        products.fp32_precision = before
    return 2 * size**3 / best / 1e9
