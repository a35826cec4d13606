"""Skipping measured in time: network x dtype x batch x executed fraction, each against everything that a user could
run instead.

In every cell all rivals first show that they compute the same logits; then they take turns, so that whatever the
machine does meanwhile happens to all of them. The lines at the end of the run give the minimum of each in ms.
``python -m pytest bench/bench_forward.py --benchmark-only``, with ``--full`` for every cell.
"""

import copy
import functools
import math
import statistics

import pytest
import torch
from competitors import Call, Competitor, competitors, static_of_half_the_cost
from networks import create
from timing import in_rotation, matmul_gflops, minima, take_turns
from torch import Tensor

import spnet
from spnet.native import core
from spnet.routing import routed_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU_DTYPES = [torch.float32] + [torch.bfloat16] * core.has_bfloat16()
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE == "cuda" else CPU_DTYPES
BATCHES = {"resnet110_cifar": (1, 16, 128)}
BATCHES |= dict.fromkeys(["resnet50", "seresnet50d", "resnext50", "resnetv2_50"], (1, 8, 32))
if DEVICE == "cuda":
    BATCHES = {"resnet110_cifar": (1, 128, 1024), "resnet50": (1, 64, 256), "resnet101": (1, 64, 256)}
INPUTS = 2  # in rotation
SECONDS = 1.5 if DEVICE == "cuda" else 4.0  # of a cell's clock
# A GPU takes seconds to compute a large batch in float64, so there these many samples of it are compared.
COMPARED = 16 if DEVICE == "cuda" else math.inf


def cells(config) -> list[tuple[str, torch.dtype, int, float]]:
    """(network, dtype, batch, executed fraction) of every cell of this run."""
    full = config.getoption("--full")
    found = []
    for network, batches in BATCHES.items():
        for dtype in DTYPES:
            for batch in batches:
                for executed in (0.0, 0.25, 0.5, 0.75, 1.0):
                    quick = (batch, executed) == (batches[1], 0.5)
                    if network == "resnet110_cifar":
                        quick = executed in (0.5, 1.0) or (executed == 0.0 and batch < 128)
                    if full or quick:
                        found.append((network, dtype, batch, executed))
    return found


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        chosen = cells(metafunc.config)
        ids = [f"{n}-{_name(d)}-B{b}-executed{e * 100:.0f}" for n, d, b, e in chosen]
        metafunc.parametrize("cell", chosen, ids=ids)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def network(name: str, dtype: torch.dtype) -> spnet.SPNet:
    return create(name).to(DEVICE, dtype)


# Of one batch size at a time: the engines of all would not fit in memory.
@functools.lru_cache(1)
def rivals_of(name: str, dtype: torch.dtype, batch: int, only: tuple[str, ...] | None, quick: bool):
    static = static_of_half_the_cost(name, batch, dtype, only, quick)
    return competitors(network(name, dtype), batch, dtype, only, quick), static


@functools.lru_cache(1)
def plan_of(name: str, dtype: torch.dtype) -> spnet.Plan:
    return spnet.lower(network(name, dtype))


def paths_of(batch: int, blocks: int, executed: float) -> Tensor:
    """Random paths [batch, blocks] that all execute the same number of blocks, so that no sample is a lucky one."""
    ranks = torch.rand(batch, blocks).argsort(1)
    return ranks < round(executed * blocks)


def error_per_sample(got: Tensor, exact: Tensor) -> Tensor:
    """Root mean square over the classes, [B]."""
    return (got.double() - exact).square().mean(1).sqrt()


@functools.lru_cache(2 * INPUTS)
def exact_logits(name: str, dtype: torch.dtype, seed: int, samples: int, executed: float) -> Tensor:
    """What the masked network gives for the compared samples in float64, which holds every weight of fewer bits."""
    model, (x, paths) = network(name, dtype), case(name, dtype, seed, samples, executed)
    some = compared(samples)
    return spnet.fast_forward(copy.deepcopy(model).double(), x[some].double(), impl="masked", paths=paths[some])


def compared(samples: int) -> Tensor:
    """Ascending positions of the compared samples, the first and the last among them."""
    count = min(samples, COMPARED)
    return torch.arange(count) * (samples - 1) // max(count - 1, 1)


@functools.lru_cache(2 * INPUTS)
def case(name: str, dtype: torch.dtype, seed: int, samples: int, executed: float) -> tuple[Tensor, Tensor]:
    """An input, the same for every executed fraction, and its paths."""
    model = network(name, dtype)
    torch.manual_seed(seed)
    x = torch.randn(samples, 3, model.input_size, model.input_size, device=DEVICE).to(dtype)
    return x, paths_of(samples, len(routed_blocks(model)), executed).to(DEVICE)


class Check:
    """Compares logits with the masked network in float64.

    float32 agrees to 1e-4 on the CPU; else an error may be twice that of the masked network run in the same dtype (by
    TF32, where the GPU multiplies so), plus one rounding. The masked network's error is that of all compared samples:
    one sample's may be small by luck.
    """

    def __init__(self, name: str, dtype: torch.dtype, seed: int, samples: int, executed: float):
        self.samples, self.compared = samples, compared(samples)
        self.exact = exact_logits(name, dtype, seed, samples, executed)
        scale = self.exact.square().mean().sqrt()
        self.allowed = 1e-4 * scale
        if dtype != torch.float32 or DEVICE == "cuda":
            x, paths = (t[self.compared] for t in case(name, dtype, seed, samples, executed))
            masked = spnet.fast_forward(network(name, dtype), x, impl="masked", paths=paths)
            self.allowed = 2 * error_per_sample(masked, self.exact).max() + torch.finfo(dtype).eps * scale

    def __call__(self, name: str, logits: Tensor) -> None:
        expected = [min(len(logits), self.samples), self.exact.shape[1]]
        assert list(logits.shape) == expected, f"{name}: expected logits {expected}, got {list(logits.shape)}"
        some = self.compared[self.compared < len(logits)]
        error = error_per_sample(logits[some], self.exact[: len(some)]).max()
        assert error <= self.allowed, f"{name}: logits are off by {error:.3g}, allowed {self.allowed:.3g}"


check_of = functools.lru_cache(2 * INPUTS)(Check)


def bind(cell: tuple[str, torch.dtype, int, float], rivals: dict[str, Competitor]) -> dict[str, list[Call]]:
    """Each rival's calls, one for each input, after it has shown that it computes the same logits."""
    name, dtype, batch, executed = cell
    # The check needs several samples to know the masked network's own error.
    samples = max(batch, 16 if network(name, dtype).input_size < 100 else 2)
    bound = {rival: [] for rival in rivals}
    for seed in range(INPUTS):
        checks = {"dense": check_of(name, dtype, seed, samples, 1.0)}
        checks["masked"] = checks["skips"] = check_of(name, dtype, seed, samples, executed)
        x, paths = (t[:batch] for t in case(name, dtype, seed, samples, executed))
        for rival, competitor in rivals.items():
            call = competitor.bind(x, paths)
            if competitor.kind in checks:
                checks[competitor.kind](rival, call())
            bound[rival].append(call)
    return bound


def limit_gflops(dtype: torch.dtype) -> float:
    """What the arithmetic of this machine reaches at most, measured now."""
    if DEVICE == "cuda":
        return matmul_gflops(dtype)
    return core.fma_gflops(torch.get_num_threads(), 0.3, getattr(core.Precision, _name(dtype)))


def test_forward(benchmark, report, cell, pytestconfig):
    name, dtype, batch, executed = cell
    model = network(name, dtype)
    only, full = pytestconfig.getoption("--rivals"), pytestconfig.getoption("--full")
    chosen = spnet.explain(
        model, torch.zeros(1, 3, model.input_size, model.input_size, dtype=dtype, device=DEVICE)
    ).impl
    forward, plan = functools.partial(spnet.fast_forward, model), plan_of(name, dtype)
    ours = {
        "fast_forward": Competitor(lambda x, paths: functools.partial(forward, x, paths=paths), "skips"),
        "plan": Competitor(lambda x, paths: functools.partial(plan, x, paths=paths), "skips"),
    }
    # Both have kernels of their own on a GPU, so the choice between them is measured too.
    if DEVICE == "cuda" and chosen == "walk" and (only is None or "batch" in only):
        ours["batch"] = Competitor(lambda x, paths: functools.partial(plan, x, paths=paths, impl="batch"), "skips")
    bound = bind(cell, ours)  # before the others, which may take minutes to set up
    (rivals, absent), static = rivals_of(name, dtype, batch, only, not full)
    rivals = rivals | static if executed == 0.5 else rivals
    bound |= bind(cell, rivals)
    rivals = ours | rivals
    taken = [plan.paths_of(call.keywords["paths"]) for call in bound["plan"]]
    calls = {rival: in_rotation(each) for rival, each in bound.items()}

    times = take_turns(calls, SECONDS)
    best = {rival: min(t) for rival, t in times.items()}
    limit = limit_gflops(dtype) * 1e9
    macs, dense_macs = statistics.mean(t.macs.sum().item() for t in taken), taken[0].dense_macs * batch
    # The masks cost an engine something, so the network without them is a rival of its own.
    dense = min((r for r, c in rivals.items() if c.kind in ("masked", "dense")), key=best.get)
    masked = min((r for r, c in rivals.items() if c.kind == "masked"), key=best.get)
    least = min(best["fast_forward"], best["plan"])
    figures = {
        "network": name,
        "dtype": _name(dtype),
        "batch": batch,
        "executed": executed,
        "impl": chosen,
        "minimum_ms": {rival: t * 1e3 for rival, t in best.items()},
        "median_ms": {rival: statistics.median(t) * 1e3 for rival, t in times.items()},
        "kinds": {rival: c.kind for rival, c in rivals.items()},
        "absent": absent,
        "best_masked": masked,
        "best_dense": dense,
        "ratio_to_best_masked": best[masked] / least,
        "ratio_to_best_dense": best[dense] / least,
        "executed_macs": macs,
        "dense_macs": dense_macs,
        "ideal_ms": best[dense] * macs / dense_macs * 1e3,
        "efficiency": best[dense] * macs / dense_macs / least,
        "percent_of_limit": 200 * macs / least / limit,
        "limit_gflops": limit / 1e9,
        "threads": torch.get_num_threads(),
    }
    benchmark.group = f"forward, {name}, {_name(dtype)}, batch {batch}, {executed:.0%} executed"
    benchmark.extra_info |= figures
    benchmark.pedantic(calls["fast_forward"], rounds=5, warmup_rounds=1)
    listed = ", ".join(f"{rival} {t * 1e3:.3g}" for rival, t in best.items())
    listed += "".join(f", {rival} absent ({why})" for rival, why in absent.items())
    report(
        f"{name} {_name(dtype)} B={batch} {executed:.0%} executed by {chosen}: "
        f"{figures['ratio_to_best_masked']:.2f}x {masked}, {figures['ratio_to_best_dense']:.2f}x {dense} "
        f"(the best masked, the best of all dense); {macs / 1e6:.0f} of {dense_macs / 1e6:.0f} MMACs, efficiency "
        f"{figures['efficiency']:.0%}, {figures['percent_of_limit']:.0f} % of {limit / 1e9:.0f} GFLOP/s; ms: {listed}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_linearity(benchmark, report, dtype):
    """Time against executed fraction, ResNet-110 at B=128: R^2 of the straight line."""
    model = network("resnet110_cifar", dtype)
    plan, blocks = spnet.lower(model), len(routed_blocks(model))
    torch.manual_seed(1)
    x = torch.randn(128, 3, 32, 32).to(DEVICE, dtype)
    fractions = [0.0, 0.25, 0.5, 0.75, 1.0]
    paths = {f: paths_of(128, blocks, f).to(DEVICE) for f in fractions}
    best = minima({f: functools.partial(plan, x, paths=p) for f, p in paths.items()}, SECONDS)
    executed = [p.double().mean().item() for p in paths.values()]
    slope, intercept = statistics.linear_regression(executed, list(best.values()))
    r2 = statistics.correlation(executed, list(best.values())) ** 2
    benchmark.group = f"linearity, {_name(dtype)}"
    benchmark.extra_info |= {"minimum_ms": {f: t * 1e3 for f, t in best.items()}, "r2": r2}
    benchmark.pedantic(plan, (x,), {"paths": paths[0.5]}, rounds=5)
    listed = ", ".join(f"{f:.0%} {t * 1e3:.3g}" for f, t in best.items())
    report(
        f"{_name(dtype)} B=128 linearity: R^2 = {r2:.5f}, {intercept * 1e3:.2f} + {slope * 1e3:.1f} x executed ms; "
        f"ms: {listed}"
    )


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread only")
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=_name)
def test_threads(benchmark, report, dtype):
    """One CPU thread against two, ResNet-110 at B=128, half executed."""
    model = copy.deepcopy(network("resnet110_cifar", dtype)).cpu()
    plan, blocks = spnet.lower(model), len(routed_blocks(model))
    torch.manual_seed(1)
    x, paths = torch.randn(128, 3, 32, 32).to(dtype), paths_of(128, blocks, 0.5)
    allowed = torch.get_num_threads()

    def with_threads(threads: int) -> None:
        torch.set_num_threads(threads)
        plan(x, paths=paths)

    try:
        best = minima({threads: functools.partial(with_threads, threads) for threads in (1, 2)}, 10.0)
    finally:
        torch.set_num_threads(allowed)
    benchmark.group = f"threads, {_name(dtype)}"
    benchmark.extra_info |= {"minimum_ms": {t: s * 1e3 for t, s in best.items()}, "ratio": best[1] / best[2]}
    benchmark.pedantic(plan, (x,), {"paths": paths}, rounds=5)
    report(
        f"{_name(dtype)} B=128: two threads are {best[1] / best[2]:.2f}x one; "
        f"ms: {best[1] * 1e3:.3g}, {best[2] * 1e3:.3g}"
    )
