"""Calibration: real maps, real rates, the faster choice, kept by the plan and by its file."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

import spnet
from spnet.execution import kept, plan
from spnet.execution.device import OnCpu
from spnet.routing import routed_blocks
from tests.conftest import settle, vary


@pytest.fixture(params=["batch", "graph"], autouse=True)
def execution(request, monkeypatch):
    monkeypatch.setitem(plan._EXECUTIONS, "cpu", {"batch": plan._graph if request.param == "graph" else plan.Batch})
    return request.param


@pytest.fixture
def clock(monkeypatch):
    """Blocks 1 and 2 are said to be faster dense; yields the number of runs that were timed."""
    made = []

    def clock(self, function):
        block, dense = divmod(len(made), 2)
        made.append(function())
        return lambda: 1.0 - 0.5 * dense if block % 4 in (1, 2) else 1.0 + 0.5 * dense

    monkeypatch.setattr(OnCpu, "clock", clock)
    return made


def _network(**options) -> nn.Module:
    options = dict(widths=[4, 8], input_size=31, imagenet=True, bottleneck=True) | options
    return settle(spnet.models.SPNet([2, 2], num_classes=5, **options))


def _batches() -> list[torch.Tensor]:
    return [torch.randn(n, 3, 31, 31) for n in (4, 0, 3)]


def test_rates_and_choices(tmp_path, clock):
    model, batches = _network(), _batches()
    expected = [spnet.fast_forward(model, x, return_paths=True) for x in batches]
    found = spnet.calibrate(model, iter(batches))
    decisions = torch.cat([paths.decisions for _, paths in expected])
    assert torch.equal(found.rates, decisions.float().mean(0))
    assert 0 < found.rates.mean() < 1
    assert found.choices == ("routed", "dense", "dense", "routed")
    assert len(clock) == 2 * 2 * 4

    assert kept.plan_of(model) is found
    assert found.execution("batch").dense == (False, True, True, False)
    for x, (logits, _) in zip(batches, expected, strict=True):
        got = spnet.fast_forward(model, x, impl="batch")
        torch.testing.assert_close(got, logits, rtol=0, atol=1e-4 * logits.abs().max().item() if len(x) else 0)
    explained = spnet.explain(model, batches[0]).blocks
    assert ["computed with all others" in text for text in explained.values()] == [False, True, True, False]

    found.save(tmp_path / "plan")
    loaded = spnet.load_plan(tmp_path / "plan")
    assert torch.equal(loaded.rates, found.rates)
    assert loaded.choices == found.choices
    assert loaded.execution("batch").dense == (False, True, True, False)
    assert torch.equal(loaded(batches[0]), found(batches[0]))

    with torch.no_grad():
        model.heads[-1].bias += 1
    spnet.fast_forward(model, batches[0])
    assert kept.plan_of(model).rates is None
    assert kept.plan_of(model).choices == ("routed",) * 4


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16])
def test_whatever_the_default_dtype_is(monkeypatch, default):
    """Which may neither count up to 257 nor tell 1.0001 s from 1 s."""
    model = _network()
    batches = [torch.randn(n, 3, 31, 31, dtype=torch.float32) for n in (128, 130)]
    decisions = torch.cat([spnet.fast_forward(model, x, return_paths=True)[1].decisions for x in batches])
    seconds = itertools.cycle([1.0001, 1.0])
    monkeypatch.setattr(OnCpu, "clock", lambda self, function: partial(float, next(seconds)))
    torch.set_default_dtype(default)
    try:
        found = spnet.calibrate(model, batches)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.rates, decisions.float().mean(0))
    assert found.choices == ("dense",) * 4


def test_before_calibration(tmp_path):
    lowered = spnet.lower(_network())
    lowered.save(tmp_path / "plan")
    for each in (lowered, spnet.load_plan(tmp_path / "plan")):
        assert each.rates is None
        assert each.choices == ("routed",) * 4


@pytest.mark.parametrize("variants", [(), ("preactivation",)])
@pytest.mark.parametrize(
    "options", [{}, {"bottleneck": False}, {"imagenet": False}, {"imagenet": False, "bottleneck": False}]
)
def test_trials_run_the_blocks_on_their_own_maps(options, variants, execution):
    model, x = settle(vary(_network(**options), variants)), torch.randn(4, 3, 31, 31)
    blocks = routed_blocks(model)
    paths = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    outputs = []
    for block in blocks.values():
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    spnet.fast_forward(model, x, impl="masked", paths=paths)
    for block in blocks.values():
        block._forward_hooks.clear()
    with torch.no_grad():
        trials = spnet.lower(model).execution("batch").trials(x, paths)
        for expected, run in zip(outputs, trials, strict=True):
            for dense in (False, True, False):  # a run leaves its maps as they were
                got = run(dense)
                got = got.permute(0, 3, 1, 2) if execution == "graph" else got
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_by_the_clock():
    model = _network()
    found = spnet.calibrate(model, _batches())
    assert set(found.choices) <= {"routed", "dense"}
    x = _batches()[0]
    expected = spnet.fast_forward(model, x, impl="masked")
    torch.testing.assert_close(found(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_walk_has_nothing_to_choose(network, clock, monkeypatch):
    monkeypatch.setitem(plan._EXECUTIONS, "cpu", {"walk": plan.Walk})
    x = torch.randn(4, 1, 32, 32)
    found = spnet.calibrate(network, [x])
    _, paths = found(x, return_paths=True)
    assert torch.equal(found.rates, paths.decisions.float().mean(0))
    assert found.choices == ("routed",) * 9
    assert not clock


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 31, 31)]])
def test_no_samples(batches):
    with pytest.raises(ValueError, match="batches: expected at least one sample, got none"):
        spnet.calibrate(_network(), batches)


def test_one_tensor_is_no_batches(network):
    """Its samples would be taken for batches, and refused by their shape."""
    with pytest.raises(TypeError, match="batches: expected an iterable of batches .* got one Tensor"):
        spnet.calibrate(network, torch.zeros(2, 1, 32, 32))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"x: expected torch.float32 \[B, 3, 31, 31\]"):
        spnet.calibrate(_network(), [torch.zeros(1, 3, 32, 32)])
    with pytest.raises(spnet.LoweringError, match="training mode"):
        spnet.calibrate(_network().train(), _batches())
