"""The native operations against limits of the same run: the same bytes moved in order, a loop of multiply-adds.

``python -m pytest bench/bench_operators.py --benchmark-only``
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from timing import in_rotation, matmul_gflops, minima

from spnet.execution import ops, reference
from spnet.kernels import conv_, pool_
from spnet.kernels.pool import slabs
from spnet.kernels.workload import BODY, Conv, convolutions
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
    best = minima({name: in_rotation(each) for name, each in calls.items()}, 2.0)
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
    """The 3x3 convolution of one stage of the walk against a loop of nothing but multiply-adds.

    Its operations are those of the direct convolution: Winograd's, in float32, needs fewer and passes the limit.
    """
    threads, kind = torch.get_num_threads(), getattr(core.Precision, precision)
    turns = [
        (core.conv_gflops(channels, side, side, threads, 0.2, kind), core.fma_gflops(threads, 0.2, kind))
        for _ in range(7)
    ]
    conv, fma = (max(values) for values in zip(*turns, strict=True))
    benchmark.group = f"walk, convolution, {precision}"
    benchmark.extra_info |= {"gflops": {"native": conv, "limit": fma}}
    benchmark.pedantic(core.conv_gflops, (channels, side, side, threads, 0.01, kind), rounds=5)
    report(
        f"{precision} convolution {channels}@{side}x{side}, level {core.cpu_level()}: {conv:.0f} GFLOP/s, "
        f"{100 * conv / fma:.0f} % of the limit {fma:.0f}"
    )


def sparse(conv: Conv, batch: int, device: str) -> tuple[tuple, dict]:
    """What ``conv_`` takes for one convolution of a residual body, on every second sample of a batch, in float16."""
    torch.manual_seed(0)
    side = -(-conv.size // conv.stride)
    out = torch.randn(batch, side, side, conv.cout, device=device).half()
    x = torch.randn(batch, conv.size, conv.size, conv.cin, device=device).half()
    weight = torch.randn(conv.cout, conv.kernel, conv.kernel, conv.cin, device=device).half() / 10
    index = torch.arange(batch, dtype=torch.int32, device=device) * 2 % batch
    options = dict(
        stride=conv.stride,
        index=index,
        count=torch.full((1,), batch // 2, dtype=torch.int32, device=device),
        gather=conv.role == "first",
        scatter=conv.role == "last",
        add=conv.role == "last",
    )
    return (out, x, weight, torch.randn(conv.cout, device=device)), options


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels are timed on a GPU")


@on_gpu
@pytest.mark.parametrize("conv", [c for c in convolutions("resnet50") if c.role in BODY], ids=str)
def test_triton_convolution(benchmark, report, conv):
    """A convolution of a ResNet-50 on half of 256 samples against a matrix product, beside cuDNN on 128 neighbours."""
    arguments, options = sparse(conv, 8, "cuda")
    twin = [t.cpu() for t in arguments]
    conv_(*arguments, **options)
    conv_(*twin, **{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()})
    # Both add up in float32 and round once, in another order.
    torch.testing.assert_close(arguments[0].cpu(), twin[0], rtol=2e-3, atol=2e-3)
    (out, x, weight, bias), options = sparse(conv, 256, "cuda")
    neighbours, filters = x[:128].permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    best = minima(
        {
            "native": lambda: conv_(out, x, weight, bias, **options),
            "cuDNN": lambda: F.conv2d(neighbours, filters, stride=conv.stride, padding=conv.kernel // 2),
        },
        3.0,
    )
    flops = 2 * 128 * out[0, ..., 0].numel() * weight.numel()
    rates = {name: flops / t / 1e9 for name, t in best.items()} | {"limit": matmul_gflops(torch.float16)}
    benchmark.group = "batch, convolution, float16"
    benchmark.extra_info |= {"minimum_ms": {n: t * 1e3 for n, t in best.items()}, "gflops": rates}
    benchmark.pedantic(lambda: conv_(out, x, weight, bias, **options), rounds=5)
    report(f"{conv}: native {rates['native']:.0f}, cuDNN {rates['cuDNN']:.0f}, limit {rates['limit']:.0f} GFLOP/s")


@on_gpu
@pytest.mark.parametrize(("side", "channels"), [(56, 256), (28, 512), (14, 1024), (7, 2048)])
def test_triton_pooling(benchmark, report, side, channels):
    """Pooled sums of half of 256 samples: GB/s of what must be read, against a sum over as many neighbours."""
    x = torch.randn(256, side, side, channels, device="cuda").half()
    sums = torch.empty(256, slabs(side * side), channels, device="cuda")
    index = torch.arange(256, dtype=torch.int32, device="cuda") * 2 % 256
    count = torch.full((1,), 128, dtype=torch.int32, device="cuda")
    pool_(sums, x, index, count)
    torch.testing.assert_close(sums[::2].sum(1), x[::2].float().sum((1, 2)), rtol=1e-4, atol=1e-2)
    best = minima({"native": lambda: pool_(sums, x, index, count), "limit": lambda: x[:128].sum((1, 2))}, 3.0)
    rates = {name: x[:128].nbytes / t / 1e9 for name, t in best.items()}
    benchmark.group = "batch, pooling"
    benchmark.extra_info |= {"minimum_ms": {n: t * 1e3 for n, t in best.items()}, "gbytes": rates}
    benchmark.pedantic(lambda: pool_(sums, x, index, count), rounds=5)
    report(f"pool {side}x{side}x{channels}: native {rates['native']:.0f}, PyTorch {rates['limit']:.0f} GB/s")
