"""``walk`` against everything that a CPU user would run instead, on ResNet-110 for 32x32 images.

In every cell all rivals first show that they compute the same logits; then they take turns, so that whatever the
machine does meanwhile happens to all of them. The lines at the end of the run give the minimum of each in ms.
``python -m pytest bench/bench_walk.py --benchmark-only``
"""

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from competitors import Competitor, competitors
from torch import Tensor

import spnet
from spnet.native import core
from spnet.routing import routed_blocks

DTYPES = [torch.float32] + [torch.bfloat16] * core.has_bfloat16()
PRECISIONS = {torch.float32: core.Precision.float32, torch.bfloat16: core.Precision.bfloat16}
CELLS = [(batch, 0.5) for batch in (1, 16, 128)] + [(128, 1.0), (128, 0.0)]
STAGES = [(16, 32), (32, 16), (64, 8)]  # channels, side

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: _name(d))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def network(dtype: torch.dtype) -> spnet.SPNet:
    """ResNet-110 with the statistics of its own activations, so that 54 blocks neither explode nor vanish."""
    torch.manual_seed(0)
    model = spnet.create_model("resnet110_cifar")
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(32, 3, 32, 32))
    return model.eval().to(dtype)


rivals_of = functools.cache(lambda dtype, batch: competitors(network(dtype), batch, dtype))


def paths_of(batch: int, blocks: int, executed: float) -> Tensor:
    """Random paths [batch, blocks] that all execute the same number of blocks, so that no sample is a lucky one."""
    ranks = torch.rand(batch, blocks).argsort(1)
    return ranks < round(executed * blocks)


def take_turns(calls: dict[str, Callable], seconds: float = 15.0) -> dict[str, list[float]]:
    """Seconds of every call, measured in rounds in which each has its turn.

    Between turns nobody runs: the threads of several rivals spin for a while after their work, which would fall on
    whoever comes next.
    """
    once = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once[name] = time.perf_counter() - start
    repeats = {name: max(1, min(20, int(0.02 / t))) for name, t in once.items()}
    rounds = max(5, min(100, int(seconds / sum(repeats[name] * t for name, t in once.items()))))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.02)
            for _ in range(repeats[name]):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return times


def minima(calls: dict[str, Callable], seconds: float = 15.0) -> dict[str, float]:
    return {name: min(t) for name, t in take_turns(calls, seconds).items()}


def error_per_sample(got: Tensor, exact: Tensor) -> Tensor:
    """Root mean square over the classes, [B]."""
    return (got.double() - exact).square().mean(1).sqrt()


class Check:
    """Compares logits with the masked network in float64.

    float32 agrees to 1e-4; in bfloat16 an error may be twice that of the masked network run in bfloat16, plus one
    rounding. The masked network's error is taken over at least 16 samples: one sample's may be small by luck.
    """

    def __init__(self, model: spnet.SPNet, x: Tensor, paths: Tensor, dtype: torch.dtype):
        # A copy from the state: float64 holds every float32 and bfloat16 weight.
        exact = spnet.create_model(**model.config).double().eval()
        exact.load_state_dict(model.state_dict())
        self.exact = spnet.fast_forward(exact, x.double(), impl="masked", paths=paths)
        scale = self.exact.square().mean().sqrt()
        self.allowed = 1e-4 * scale
        if dtype != torch.float32:
            masked = spnet.fast_forward(model, x, impl="masked", paths=paths)
            self.allowed = 2 * error_per_sample(masked, self.exact).max() + torch.finfo(dtype).eps * scale

    def __call__(self, name: str, logits: Tensor, batch: int) -> None:
        """logits: of the first ``batch`` samples."""
        exact = self.exact[:batch]
        assert logits.shape == exact.shape, f"{name}: expected logits {list(exact.shape)}, got {list(logits.shape)}"
        error = error_per_sample(logits, exact).max()
        assert error <= self.allowed, f"{name}: logits are off by {error:.3g}, allowed {self.allowed:.3g}"


@functools.cache
def case(dtype: torch.dtype, batch: int, executed: float) -> tuple[Tensor, Tensor, Check]:
    """The input, which is the same for every executed fraction, its paths, and the check of both."""
    model = network(dtype)
    torch.manual_seed(1)
    x = torch.randn(batch, 3, 32, 32).to(dtype)
    paths = paths_of(batch, len(routed_blocks(model)), executed)
    return x, paths, Check(model, x, paths, dtype)


def measure(benchmark, call: Callable) -> None:
    """Let pytest-benchmark's own table hold the walk; the comparison is in extra_info."""
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(
    ("batch", "executed"), CELLS, ids=lambda v: f"B{v}" if isinstance(v, int) else f"executed{v * 100:.0f}"
)
@by_dtype
def test_walk(benchmark, report, dtype, batch, executed):
    model, precision = network(dtype), PRECISIONS[dtype]
    samples = max(batch, 16)
    x, paths, check = case(dtype, samples, executed)
    *_, check_dense = case(dtype, samples, 1.0)
    x, paths = x[:batch], paths[:batch]

    plan = spnet.lower(model)
    rivals, absent = rivals_of(dtype, batch)
    rivals = {
        "walk": Competitor(lambda x, paths: functools.partial(plan, x, paths=paths), "skips"),
        "fast_forward": Competitor(
            lambda x, paths: functools.partial(spnet.fast_forward, model, x, impl="walk", paths=paths), "skips"
        ),
        **rivals,
    }
    calls = {name: rival.bind(x, paths) for name, rival in rivals.items()}
    for name, call in calls.items():
        (check_dense if rivals[name].kind == "dense" else check)(name, call(), batch)

    times = take_turns(calls)
    best = {name: min(t) for name, t in times.items()}
    limit = core.fma_gflops(torch.get_num_threads(), 0.3, precision) * 1e9
    _, taken = plan(x, paths=paths, return_paths=True)
    macs, dense_macs = taken.macs.sum().item(), taken.dense_macs * batch
    # The masks cost an engine something, so the network without them is a rival of its own.
    dense = min((name for name, rival in rivals.items() if rival.kind != "skips"), key=best.get)
    masked = min((name for name, rival in rivals.items() if rival.kind == "masked"), key=best.get)
    ideal = best[dense] * macs / dense_macs
    figures = {
        "minimum_ms": {name: t * 1e3 for name, t in best.items()},
        "median_ms": {name: statistics.median(t) * 1e3 for name, t in times.items()},
        "absent": absent,
        "best_masked": masked,
        "best_dense": dense,
        "ratio_to_best_masked": best[masked] / best["walk"],
        "ratio_to_best_dense": best[dense] / best["walk"],
        "executed_macs": macs,
        "dense_macs": dense_macs,
        "efficiency": ideal / best["walk"],
        "gflops": 2 * macs / best["walk"] / 1e9,
        "fma_gflops": limit / 1e9,
        "percent_of_fma": 200 * macs / best["walk"] / limit,
        "threads": torch.get_num_threads(),
    }
    benchmark.group = f"walk, ResNet-110, {_name(dtype)}, batch {batch}, {executed:.0%} executed"
    benchmark.extra_info |= figures
    measure(benchmark, calls["walk"])

    listed = ", ".join(f"{name} {t * 1e3:.3g}" for name, t in best.items())
    listed += "".join(f", {name} absent ({why})" for name, why in absent.items())
    report(
        f"{_name(dtype)} B={batch} {executed:.0%} executed: {figures['ratio_to_best_masked']:.2f}x {masked}, "
        f"{figures['ratio_to_best_dense']:.2f}x {dense} (the best masked, the best of all dense); "
        f"{macs / 1e6:.0f} of {dense_macs / 1e6:.0f} MMACs, efficiency {figures['efficiency']:.0%}, "
        f"{figures['percent_of_fma']:.0f} % of FMA limit {limit / 1e9:.0f} GFLOP/s; ms: {listed}"
    )


@by_dtype
def test_linearity(benchmark, report, dtype):
    """Time against executed fraction at B=128: R^2 of the straight line."""
    model = network(dtype)
    plan, blocks = spnet.lower(model), len(routed_blocks(model))
    torch.manual_seed(1)
    x = torch.randn(128, 3, 32, 32).to(dtype)
    fractions = [0.0, 0.25, 0.5, 0.75, 1.0]
    paths = {f: paths_of(128, blocks, f) for f in fractions}
    best = minima({f: functools.partial(plan, x, paths=p) for f, p in paths.items()}, 6.0)
    executed = [p.double().mean().item() for p in paths.values()]
    slope, intercept = statistics.linear_regression(executed, list(best.values()))
    r2 = statistics.correlation(executed, list(best.values())) ** 2
    benchmark.group = f"walk, linearity, {_name(dtype)}"
    benchmark.extra_info |= {"minimum_ms": {f: t * 1e3 for f, t in best.items()}, "r2": r2}
    measure(benchmark, functools.partial(plan, x, paths=paths[0.5]))
    listed = ", ".join(f"{f:.0%} {t * 1e3:.3g}" for f, t in best.items())
    report(
        f"{_name(dtype)} B=128 linearity: R^2 = {r2:.5f}, {intercept * 1e3:.2f} + {slope * 1e3:.1f} x executed ms; "
        f"ms: {listed}"
    )


@by_dtype
def test_threads(benchmark, report, dtype):
    """One thread against two at B=128, half executed."""
    allowed = torch.get_num_threads()
    if allowed < 2:
        pytest.skip("one thread only")
    model = network(dtype)
    plan, blocks = spnet.lower(model), len(routed_blocks(model))
    torch.manual_seed(1)
    x, paths = torch.randn(128, 3, 32, 32).to(dtype), paths_of(128, blocks, 0.5)
    times = {1: [], 2: []}
    try:
        for round_number in range(16):
            for threads in times:
                torch.set_num_threads(threads)
                start = time.perf_counter()
                plan(x, paths=paths)
                if round_number > 0:
                    times[threads].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(allowed)
    one, two = min(times[1]), min(times[2])
    benchmark.group = f"walk, threads, {_name(dtype)}"
    benchmark.extra_info |= {"minimum_ms": {"1": one * 1e3, "2": two * 1e3}, "ratio": one / two}
    measure(benchmark, functools.partial(plan, x, paths=paths))
    report(f"{_name(dtype)} B=128 threads: two are {one / two:.2f}x one; ms: 1 {one * 1e3:.3g}, 2 {two * 1e3:.3g}")


@pytest.mark.parametrize(("channels", "side"), STAGES, ids=lambda v: str(v))
@by_dtype
def test_convolution(benchmark, report, dtype, channels, side):
    """The 3x3 convolution of one stage against a loop of nothing but multiply-adds."""
    threads, precision = torch.get_num_threads(), PRECISIONS[dtype]
    turns = [
        (
            core.conv_gflops(channels, side, side, threads, 0.2, precision),
            core.fma_gflops(threads, 0.2, precision),
        )
        for _ in range(7)
    ]
    conv, fma = (max(values) for values in zip(*turns, strict=True))
    benchmark.group = f"walk, convolution, {_name(dtype)}"
    benchmark.extra_info |= {"conv_gflops": conv, "fma_gflops": fma, "percent_of_fma": 100 * conv / fma}
    measure(benchmark, lambda: core.conv_gflops(channels, side, side, threads, 0.01, precision))
    report(
        f"{_name(dtype)} convolution {channels}@{side}x{side}: {conv:.0f} GFLOP/s, "
        f"{100 * conv / fma:.0f} % of FMA limit {fma:.0f}"
    )
