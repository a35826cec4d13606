"""``batch`` against ``masked`` by the contract of equality, with the fused operators and without them."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import spnet
from spnet.execution import batch as batch_module
from spnet.routing import routed_blocks
from tests.conftest import VARIANTS, assert_as_exact_as_masked, margins, settle, vary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = st.sampled_from(DTYPES[1:])


@st.composite
def networks(draw, num_classes=(1, 2, 10)) -> nn.Module:
    """Networks of both forms and their variants with awkward widths, sizes and depths."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    stages = draw(st.integers(1, 3))
    imagenet = draw(st.booleans())
    model = spnet.models.SPNet(
        [draw(st.integers(1, 3)) for _ in range(stages)],
        sorted(draw(st.sampled_from([1, 3, 8, 16, 24, 33])) for _ in range(stages)),
        num_classes=draw(st.sampled_from(num_classes)),
        in_channels=draw(st.sampled_from([1, 3, 5])),
        input_size=draw(st.sampled_from([1, 5, 8, 16, 31, 48])),
        bottleneck=draw(st.booleans()),
        imagenet=imagenet,
        shortcut=draw(st.sampled_from(["pad", "projection"])),
        router_width=draw(st.sampled_from([16, 128])),
    )
    return settle(vary(model, draw(st.sets(st.sampled_from(VARIANTS)))))


def _input(model: nn.Module, batch: int) -> torch.Tensor:
    return torch.randn(batch, model.in_channels, model.input_size, model.input_size)


@pytest.fixture(params=["fused", "public"], autouse=True)
def operators(request, monkeypatch):
    if request.param == "public":
        monkeypatch.setattr(batch_module, "_has_fused", lambda dtype: False)


def _assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().clamp(min=1e-6) if expected.numel() else 1
    assert ((got - expected).abs() <= 1e-4 * scale).all()


@given(networks(), st.sampled_from([0, 1, 2, 7]), st.sampled_from([0.0, 0.5, 1.0]))
def test_forced_paths(model, batch, rate):
    x = _input(model, batch)
    before = x.clone()
    paths = torch.rand(batch, len(routed_blocks(model))) < rate
    expected = spnet.fast_forward(model, x, impl="masked", paths=paths)
    got, taken = spnet.fast_forward(model, x, impl="batch", paths=paths, return_paths=True)
    assert torch.equal(taken.decisions, paths)
    _assert_close(got, expected)
    assert torch.equal(x, before)


@given(networks(), st.sampled_from([1, 2, 7]), st.sampled_from([-0.5, 0.0, 0.5]))
def test_own_decisions(model, batch, threshold):
    x = _input(model, batch)
    options = {"threshold": threshold, "return_paths": True}
    expected, masked = spnet.fast_forward(model, x, impl="masked", **options)
    got, taken = spnet.fast_forward(model, x, impl="batch", **options)
    if threshold == 0:
        clear = (margins(model, x) > 1e-3).all(1)
        assert torch.equal(masked.decisions[clear], taken.decisions[clear])
    same = (masked.decisions == taken.decisions).all(1)
    _assert_close(got[same], expected[same])
    again, repeated = spnet.fast_forward(model, x, impl="batch", **options)
    assert torch.equal(got, again)
    assert torch.equal(taken.decisions, repeated.decisions)


@given(networks(num_classes=[10]), st.sampled_from([1, 5]), st.sampled_from([0.0, 0.5, 1.0]), HALVES)
def test_half_precision(model, batch, rate, dtype):
    model = model.to(dtype)
    x, paths = _input(model, 8).to(dtype), torch.rand(8, len(routed_blocks(model))) < rate
    got = spnet.fast_forward(model, x[:batch], impl="batch", paths=paths[:batch])
    assert got.dtype == dtype
    assert_as_exact_as_masked(got, model, x, paths)


def test_a_batchnorm_of_a_map_of_large_mean_is_not_rounded():
    for seed in range(4):
        torch.manual_seed(seed)
        model = vary(spnet.models.SPNet([3], [32], num_classes=10, input_size=16), ["preactivation"])
        model.features.stem[0].bias = nn.Parameter(30 * torch.randn(32))
        del model.features.stem[1]
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            model.train().features(torch.randn(32, 3, 16, 16))
        model.eval().bfloat16()
        x, paths = torch.randn(16, 3, 16, 16).bfloat16(), torch.ones(16, 3, dtype=torch.bool)
        assert_as_exact_as_masked(spnet.fast_forward(model, x, impl="batch", paths=paths), model, x, paths)


@pytest.mark.parametrize("impl", ["walk", "batch"])
def test_as_many_groups_as_channels_with_a_stride(impl):
    model = spnet.models.SPNet([1, 1], [8, 12], num_classes=5, input_size=9, shortcut="projection")
    model.features.stage2[0].body.insert(0, nn.Conv2d(8, 8, 1, 2, groups=8))
    model.features.stage2[0].body[1].stride = 1, 1
    x, paths = torch.randn(3, 3, 9, 9), torch.ones(3, 2, dtype=torch.bool)
    expected = spnet.fast_forward(settle(model), x, impl="masked", paths=paths)
    got = spnet.fast_forward(model, x, impl=impl, paths=paths)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("name", "dtype"), [("resnet18", torch.float32), *(("resnet50", dtype) for dtype in DTYPES)])
def test_the_published_forms(name, dtype):
    model = settle(spnet.create_model(name, num_classes=7, input_size=33)).to(dtype)
    x = _input(model, 4).to(dtype)
    paths = torch.rand(4, len(routed_blocks(model))) < 0.5
    truth = spnet.fast_forward(copy.deepcopy(model).double(), x.double(), impl="masked", paths=paths)
    masked = spnet.fast_forward(model, x, impl="masked", paths=paths)
    got = spnet.fast_forward(model, x, impl="batch", paths=paths)
    error, allowed = ((a.double() - truth).abs().max() / truth.abs().max() for a in (got, masked))
    assert error <= (1e-4 if dtype == torch.float32 else 2 * allowed + torch.finfo(dtype).eps)


@pytest.fixture(scope="module", params=["basic", "bottleneck"])
def imagenet_network(request):
    """A quarter as wide as the published ones."""
    torch.manual_seed(0)
    widths, form = (16, 32, 64, 128), {"bottleneck": request.param == "bottleneck", "shortcut": "projection"}
    return settle(spnet.models.SPNet((2, 2, 2, 2), widths, num_classes=7, input_size=33, imagenet=True, **form))


def test_input_layouts(imagenet_network):
    model = imagenet_network
    x = _input(model, 3)
    expected = spnet.fast_forward(model, x, impl="batch")
    wide = torch.full((6, 4, 35, 66), torch.nan)
    sliced = wide[::2, 1:, 1:-1, ::2]
    sliced.copy_(x)
    for layout in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), sliced):
        before = layout.clone()
        _assert_close(spnet.fast_forward(model, layout, impl="batch"), expected)
        assert torch.equal(layout, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])  # of which the last becomes so within
def test_what_is_not_finite_stays_in_its_sample(imagenet_network, dtype, value):
    model = copy.deepcopy(imagenet_network).to(dtype)
    x = _input(model, 5).to(dtype)
    clean, paths = spnet.fast_forward(model, x, impl="batch", return_paths=True)
    x[1] = value
    x[3, 0, 16, 16] = value
    got, taken = spnet.fast_forward(model, x, impl="batch", return_paths=True)
    expected, masked = spnet.fast_forward(model, x, impl="masked", return_paths=True)
    kept = torch.tensor([0, 2, 4])  # in runs of other lengths, whose sums may differ in the last bit
    assert (got - clean)[kept].abs().max() <= 32 * torch.finfo(dtype).eps * clean.abs().max()
    assert torch.equal(taken.decisions[::2], paths.decisions[::2])
    assert torch.equal(taken.decisions[1::2], masked.decisions[1::2])
    assert torch.equal(got[1::2].isnan(), expected[1::2].isnan())
    assert got[1::2].isnan().any()


def test_a_weight_that_is_not_finite(imagenet_network):
    model = copy.deepcopy(imagenet_network)
    model.features.stage1[0].body[0].weight.data[0, 0, 0, 0] = torch.nan
    everything = torch.ones(2, len(routed_blocks(model)), dtype=torch.bool)
    assert spnet.fast_forward(model, _input(model, 2), impl="batch", paths=everything).isnan().all()


def test_several_threads_on_one_plan(imagenet_network):
    plan, inputs = (
        partial(spnet.lower(imagenet_network), impl="batch"),
        [_input(imagenet_network, n) for n in (1, 4, 5)],
    )
    expected = [plan(x, return_paths=True) for x in inputs]

    def work(i: int) -> bool:
        logits, paths = plan(inputs[i % 3], return_paths=True)
        same = torch.equal(logits, expected[i % 3][0])
        return same and torch.equal(paths.decisions, expected[i % 3][1].decisions)

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(work, range(12)))


def test_autocast_stays_in_its_thread(imagenet_network, monkeypatch):
    plan, both = spnet.lower(imagenet_network), Barrier(2, timeout=60)
    run = batch_module.Batch._run

    def together(*args):
        both.wait()
        result = run(*args)
        both.wait()
        return result

    monkeypatch.setattr(batch_module.Batch, "_run", together)
    expected = imagenet_network(x := _input(imagenet_network, 2))

    def work(enabled: bool) -> bool:
        with torch.autocast("cpu", enabled=enabled):
            _assert_close(plan(x, impl="batch"), expected)
            return torch.is_autocast_enabled("cpu")

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(work, (False, True))) == [False, True]


def test_without_onednn(imagenet_network):
    x = _input(imagenet_network, 2)
    expected = spnet.fast_forward(imagenet_network, x, impl="masked")
    with torch.backends.mkldnn.flags(enabled=False):
        _assert_close(spnet.lower(imagenet_network)(x, impl="batch"), expected)


ORDERED = """
import torch, spnet
model = spnet.create_model("wide_resnet20_2_cifar").eval()
x = torch.randn(8, 3, 32, 32)
paths = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)[:, None].expand(8, 9)
for _ in range(2):
    spnet.fast_forward(model, x, impl="batch", paths=paths)
    print("end of a run", flush=True)
"""


def test_weights_are_put_in_order_once():
    if not batch_module._has_fused(torch.float32):
        pytest.skip("without the fused operators of oneDNN")
    # AVX2 is where a wrong order costs most.
    environment = {**os.environ, "ONEDNN_VERBOSE": "1", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", ORDERED], env=environment, capture_output=True, text=True, check=True)
    second = done.stdout.split("end of a run")[1]
    assert second.count(",exec,cpu,convolution,") == 1 + 9 * 2 * 3
    assert second.count(",exec,cpu,reorder,") == 0
