"""``walk`` against ``masked`` by the contract of equality, in any number of threads."""

import copy
import math
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import spnet
from spnet.execution import device, plan, walk
from spnet.native import core
from spnet.routing import routed_blocks
from tests.conftest import VARIANTS, assert_as_exact_as_masked, margins, settle, vary

HALVES = st.sampled_from([torch.bfloat16, torch.float16])


@st.composite
def networks(draw, num_classes=(1, 2, 10), widths=(1, 3, 8, 16, 24, 33)) -> nn.Module:
    """Networks of both forms and their variants with awkward widths, sizes and depths."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    stages, imagenet = draw(st.integers(1, 3)), draw(st.booleans())
    model = spnet.models.SPNet(
        [draw(st.integers(1, 3)) for _ in range(stages)],
        sorted(draw(st.sampled_from(widths)) for _ in range(stages)),
        num_classes=draw(st.sampled_from(num_classes)),
        in_channels=draw(st.sampled_from([1, 3] if imagenet else [1, 3, 5])),
        input_size=draw(st.sampled_from([1, 5, 8, 16, 31, 48])),
        bottleneck=draw(st.booleans()),
        imagenet=imagenet,
        shortcut=draw(st.sampled_from(["pad", "projection"])),
        router_width=draw(st.sampled_from([16, 128])),
    )
    return settle(vary(model, draw(st.sets(st.sampled_from(VARIANTS)))))


def _input(model: nn.Module, batch: int) -> torch.Tensor:
    return torch.randn(batch, model.in_channels, model.input_size, model.input_size)


@given(networks(), st.sampled_from([0, 1, 2, 7]), st.sampled_from([0.0, 0.5, 1.0]))
def test_forced_paths(model, batch, rate):
    x = _input(model, batch)
    paths = torch.rand(batch, len(routed_blocks(model))) < rate
    expected = spnet.fast_forward(model, x, impl="masked", paths=paths)
    got, taken = spnet.fast_forward(model, x, impl="walk", paths=paths, return_paths=True)
    assert torch.equal(taken.decisions, paths)
    scale = expected.abs().max().clamp(min=1e-6) if batch else 1
    assert ((got - expected).abs() <= 1e-4 * scale).all()


@given(networks(), st.sampled_from([1, 2, 7]), st.integers(1, 3))
def test_own_decisions_and_any_number_of_threads(model, batch, threads):
    x = _input(model, batch)
    expected, masked = spnet.fast_forward(model, x, impl="masked", return_paths=True)
    got, walked = spnet.fast_forward(model, x, impl="walk", return_paths=True)
    clear = (margins(model, x) > 1e-3).all(1)
    assert torch.equal(masked.decisions[clear], walked.decisions[clear])
    same = (masked.decisions == walked.decisions).all(1)
    assert ((got - expected).abs()[same] <= 1e-4 * expected.abs().max().clamp(min=1e-6)).all()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(spnet.fast_forward(model, x, impl="walk"), got)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", [dict(input_size=8), dict(input_size=16, imagenet=True, bottleneck=True)], ids=str)
def test_a_thousand_samples(form):
    """Of which a thread takes as many together as it can; what a sample gets is what it gets alone."""
    model = settle(spnet.models.SPNet([1, 2], [8, 12], num_classes=5, **form))
    x = _input(model, 1000)
    expected, masked = spnet.fast_forward(model, x, impl="masked", return_paths=True)
    got, walked = spnet.fast_forward(model, x, impl="walk", return_paths=True)
    clear = (margins(model, x) > 1e-3).all(1)
    assert torch.equal(masked.decisions[clear], walked.decisions[clear])
    assert 0 < walked.decisions.float().mean() < 1
    same = (masked.decisions == walked.decisions).all(1)
    assert ((got - expected).abs()[same] <= 1e-4 * expected.abs().max()).all()
    assert torch.equal(torch.cat([spnet.fast_forward(model, part, impl="walk") for part in x.split(1)]), got)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(spnet.fast_forward(model, x, impl="walk"), got)
    finally:
        torch.set_num_threads(before)


# A single channel's few numbers may be rounded luckily by one execution and not by the other.
@given(networks([10], [8, 16, 24, 33]), st.sampled_from([1, 5]), st.sampled_from([0.0, 0.5, 1.0]), HALVES)
def test_half_precision(model, batch, rate, dtype):
    model = model.to(dtype)
    x, paths = _input(model, 8).to(dtype), torch.rand(8, len(routed_blocks(model))) < rate
    walked = spnet.fast_forward(model, x[:batch], impl="walk", paths=paths[:batch])
    assert walked.dtype == dtype
    assert_as_exact_as_masked(walked, model, x, paths)


def test_many_threads_on_one_plan_and_on_several(network):
    twin = settle(spnet.create_model("resnet20_cifar", in_channels=1), bias=1.0)
    x = torch.randn(5, 1, 32, 32)
    expected = [spnet.fast_forward(m, x, impl="walk") for m in (network, twin)]
    failures = []

    def work(i: int):
        for _ in range(10):
            if not torch.equal(spnet.fast_forward((network, twin)[i], x, impl="walk"), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


class _EmulatedCudaPlan:
    """``core.CudaPlan`` on the host."""

    def __init__(self, *arguments):
        *tables, device = arguments
        assert device is None  # of a tensor on the CPU
        self._plan = core.EmulatedCudaPlan(*tables, 232448)

    def run(self, *arguments):
        *work, stream = arguments
        assert stream == 7
        self._plan.run(*work, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_walk_by_its_emulation(monkeypatch, dtype):
    monkeypatch.setattr(core, "CudaPlan", _EmulatedCudaPlan, raising=False)
    monkeypatch.setattr(walk, "why_not_native", lambda device: "")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    model = settle(spnet.models.SPNet([2, 1], [8, 12], num_classes=5, input_size=9)).to(dtype)
    lowered, x, paths = spnet.lower(copy.deepcopy(model).float()), _input(model, 5), torch.rand(5, 6)[:, ::2] < 0.5
    with pytest.raises(ValueError, match="float16 and bfloat16, not torch.float32"):
        walk.CudaWalk(lowered.network, lowered.weights, torch.float32)
    cuda_walk = walk.CudaWalk(lowered.network, lowered.weights, dtype)
    logits, decisions = cuda_walk.run(x.to(dtype), paths, 0.0)
    assert torch.equal(decisions, paths)
    assert_as_exact_as_masked(logits, model, x.to(dtype), paths)
    assert not cuda_walk.run(x.to(dtype), None, math.inf)[1].any()


@pytest.mark.parametrize(
    ("dtype", "variants", "native", "impl", "reason"),
    [
        (torch.float16, (), "", "walk", "each thread carries"),
        (torch.bfloat16, (), "", "walk", "each thread carries"),
        (torch.float16, (), "no kernels", "batch", "walk does not fit: no kernels"),
        (torch.float32, (), "", "batch", "walk does not fit: walk on CUDA multiplies float16 and bfloat16"),
        (torch.float16, ("squeeze",), "", "batch", "walk does not fit: block 0: convolution 0: squeeze: expected 0"),
        (torch.float32, None, "", "routed", "walk and batch do not fit: block 0: body: expected 1x1 and 3x3"),
    ],
)
def test_what_auto_takes_on_cuda(monkeypatch, dtype, variants, native, impl, reason):
    """By the executions of CUDA, on the host."""
    monkeypatch.setitem(plan._EXECUTIONS, "cpu", plan._EXECUTIONS["cuda"])
    monkeypatch.setattr(core, "CudaPlan", _EmulatedCudaPlan, raising=False)
    monkeypatch.setattr(walk, "why_not_native", lambda device: native)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    model = spnet.models.SPNet([2, 1], [8, 12], num_classes=5, input_size=9)
    if variants is None:
        model.features.stage1[0].body[0] = nn.Conv2d(8, 8, 5, padding=2)
    settle(vary(model, variants or ())).to(dtype)
    x, paths = _input(model, 5).to(dtype), torch.rand(5, 3) < 0.5
    found = spnet.explain(model, x)
    assert (found.impl, reason in found.reason) == (impl, True), found.reason
    assert_as_exact_as_masked(spnet.fast_forward(model, x, paths=paths), model, x, paths)


def test_where_the_native_cuda_kernels_do_not_run(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("compact launch: no kernel image is available for execution on the device")

    why_not_native = device.why_not_native.__wrapped__  # asks anew
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(core, "cuda_architectures", "sm_90")
    monkeypatch.setattr(core, "cuda", SimpleNamespace(compact=lambda *arguments: None), raising=False)
    assert why_not_native(cpu) == ""
    core.cuda.compact = fail
    assert re.search(r"^the CUDA kernels of this build \(.*\) do not run on cpu: compact launch", why_not_native(cpu))
    monkeypatch.setattr(core, "cuda_architectures", None)
    assert why_not_native(cpu) == f"this build has no CUDA kernels ({core.cuda_status})"
    lowered = spnet.lower(settle(spnet.create_model("resnet20_cifar")))
    monkeypatch.setattr(walk, "why_not_native", why_not_native)
    with pytest.raises(ValueError, match="^this build has no CUDA kernels"):
        walk.CudaWalk(lowered.network, lowered.weights, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_walk_on_a_gpu(dtype):
    model = settle(spnet.create_model("resnet20_cifar")).to("cuda", dtype)
    x, paths = torch.randn(300, 3, 32, 32).to("cuda", dtype), (torch.rand(300, 9) < 0.5).cuda()
    walked, taken = spnet.fast_forward(model, x, impl="walk", paths=paths, return_paths=True)
    assert torch.equal(taken.decisions, paths)
    assert_as_exact_as_masked(walked, model, x, paths)
    assert torch.equal(spnet.fast_forward(model, x, impl="walk"), spnet.fast_forward(model, x, impl="walk"))
    assert spnet.explain(model, x).impl == "walk"
