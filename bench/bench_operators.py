"""The native operations against limits of the same run: the same bytes moved in order, a loop of multiply-adds.

``python -m pytest bench/bench_operators.py --benchmark-only``
"""

import functools

import pytest
import torch
from timing import in_rotation, minima

from spnet.execution import ops, reference
from spnet.native import core

PRECISIONS = ["float32"] + ["bfloat16"] * core.has_bfloat16()
STAGES = [(16, 32), (32, 16), (64, 8)]  # channels, side
# Of a batch that no cache holds, and of one that a core's own does.
BATCHES = {"large": (256, 256, 28, 28), "small": (16, 64, 8, 8)}


@pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("operation", ["gather_rows", "scatter_add_rows_"])
def test_rows(benchmark, report, operation, shape):
    """Half of a batch gathered, or added back: GB/s of what must be read and written, beside PyTorch's own.

    The limit is PyTorch's copy, or sum in place, of as many neighbouring samples.
    """
    torch.manual_seed(0)
    native, plain, limit = [], [], []
    for _ in range(2 if shape[0] > 100 else 64):
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        index = torch.randperm(shape[0])[: shape[0] // 2].sort().values
        if operation == "gather_rows":
            native.append(functools.partial(ops.gather_rows, x, index))
            plain.append(functools.partial(reference.gather_rows, x, index))
            limit.append(x[: len(index)].clone)
            torch.testing.assert_close(native[-1](), plain[-1](), rtol=0, atol=0)
        else:
            source = torch.randn(len(index), *shape[1:]).contiguous(memory_format=torch.channels_last)
            copy = x.clone()
            native.append(functools.partial(ops.scatter_add_rows_, x, index, source, True))
            plain.append(functools.partial(reference.scatter_add_rows_, copy, index, source, True))
            limit.append(functools.partial(torch.zeros_like(x)[: len(index)].add_, source))
            native[-1](), plain[-1]()
            torch.testing.assert_close(x, copy, rtol=0, atol=0)
    calls = {"native": native, "plain": plain, "limit": limit}
    best = minima({name: in_rotation(each) for name, each in calls.items()}, 3.0)
    moved = len(index) * x[0].nbytes * (2 if operation == "gather_rows" else 3)
    rates = {name: moved / t / 1e9 for name, t in best.items()}
    benchmark.group = f"rows, {operation}"
    benchmark.extra_info |= {"minimum_ms": {n: t * 1e3 for n, t in best.items()}, "gbytes": rates}
    benchmark.pedantic(native[0], rounds=5, warmup_rounds=1)
    report(
        f"{operation} {list(shape)}, half: native {rates['native']:.1f}, PyTorch {rates['plain']:.1f}, "
        f"neighbours {rates['limit']:.1f} GB/s"
    )


@pytest.mark.parametrize(("channels", "side"), STAGES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_convolution(benchmark, report, precision, channels, side):
    """The 3x3 convolution of one stage of the walk against a loop of nothing but multiply-adds."""
    threads, kind = torch.get_num_threads(), getattr(core.Precision, precision)
    turns = [
        (core.conv_gflops(channels, side, side, threads, 0.2, kind), core.fma_gflops(threads, 0.2, kind))
        for _ in range(7)
    ]
    conv, fma = (max(values) for values in zip(*turns, strict=True))
    benchmark.group = f"walk, convolution, {precision}"
    benchmark.extra_info |= {"conv_gflops": conv, "fma_gflops": fma, "percent_of_fma": 100 * conv / fma}
    benchmark.pedantic(core.conv_gflops, (channels, side, side, threads, 0.01, kind), rounds=5)
    report(
        f"{precision} convolution {channels}@{side}x{side}, level {core.cpu_level()}: {conv:.0f} GFLOP/s, "
        f"{100 * conv / fma:.0f} % of the limit {fma:.0f}"
    )
