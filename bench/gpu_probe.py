"""A minute's look at a GPU by its own clock: plans in float16, and the dense network in a CUDA graph.

``python bench/gpu_probe.py``. The dense network is without routers and masks, its BatchNorm folded, its maps
channels-last, cuDNN's algorithms chosen by time. Milliseconds are minima. bench_forward.py has the rivals that take
minutes to compile, their clock on the host, and every check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from bench_forward import paths_of
from competitors import FoldedNetwork, cuda_graph
from networks import create
from torch import Tensor, nn

import spnet


def milliseconds(call: Callable[[], object], calls: int) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)


def in_graph(call: Callable[[], object]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def dense_in_graph(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return cuda_graph(model, len(x), x.dtype, masked=False)(x, torch.empty(0))


def peak_mib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def walk() -> None:
    model = create("resnet110_cifar").cuda().half()
    exact_model, plan = copy.deepcopy(model).double(), spnet.lower(model)

    def compare(x: Tensor, executed: float) -> None:
        paths, some = paths_of(len(x), plan.num_blocks, executed).cuda(), slice(132)
        masked = spnet.fast_forward(model, x[some], impl="masked", paths=paths[some])
        exact = spnet.fast_forward(exact_model, x[some].double(), impl="masked", paths=paths[some])
        error = relative_error(plan(x, paths=paths)[some], exact)
        call = milliseconds(lambda: plan(x, paths=paths), 30)
        forward = milliseconds(lambda: spnet.fast_forward(model, x, paths=paths), 30)
        # The graph of batch is not to be captured by another.
        graph = milliseconds(in_graph(lambda: plan(x, paths=paths)), 30) if plan.impl == "walk" else float("nan")
        print(
            f"resnet110_cifar B={len(x)} {executed:.0%} executed by {plan.impl}: plan {call:.4f} ms, fast_forward "
            f"{forward:.4f}, plan in a CUDA graph {graph:.4f}; relative error {error:.2e}, of the masked network "
            f"{relative_error(masked, exact):.2e}",
            flush=True,
        )

    for size in (1, 16, 128, 132, 1024):
        x = torch.randn(size, 3, 32, 32, device="cuda").half()
        for executed in (0.0, 0.5, 1.0):
            compare(x, executed)
        dense = milliseconds(dense_in_graph(model, x), 30)
        print(f"resnet110_cifar B={size} dense in a CUDA graph: {dense:.4f} ms", flush=True)


def batch() -> None:
    model = create("resnet50").cuda().half()
    for size in (64, 256):
        memory(model, torch.randn(size, 3, 224, 224, device="cuda").half())
    plan = spnet.lower(model)

    def compare(x: Tensor, executed: float) -> None:
        paths = paths_of(len(x), plan.num_blocks, executed).cuda()
        logits, taken = plan(x, paths=paths, return_paths=True)
        masked = spnet.fast_forward(model, x, impl="masked", paths=paths)
        call = milliseconds(lambda: plan(x, paths=paths), 15)
        macs = taken.macs.double().mean().item() / taken.dense_macs
        print(
            f"resnet50 B={len(x)} {executed:.0%} executed by {plan.impl}: plan {call:.3f} ms, {macs:.1%} of the MACs; "
            f"relative difference to the masked network {relative_error(logits, masked):.2e}",
            flush=True,
        )

    for size in (64, 256, 1):
        x = torch.randn(size, 3, 224, 224, device="cuda").half()
        dense = milliseconds(dense_in_graph(model, x), 15)
        print(f"resnet50 B={size} dense in a CUDA graph: {dense:.3f} ms", flush=True)
        for executed in (1.0, 0.5, 0.25, 0.0):
            compare(x, executed)


@torch.no_grad()
def memory(model: nn.Module, x: Tensor) -> None:
    network = FoldedNetwork(model, torch.float16).eval().to(memory_format=torch.channels_last)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    dense = peak_mib(lambda: network(nhwc))
    plan = spnet.lower(model)
    paths = paths_of(len(x), plan.num_blocks, 0.5).cuda()
    print(f"resnet50 B={len(x)}: dense takes {dense:.1f} MiB, the plan {peak_mib(lambda: plan(x, paths=paths)):.1f}")


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), spnet.build_info(), flush=True)
    walk()
    batch()
