"""The dynamic auxiliary module against the closed form of its momentum average."""

import math

import pytest
import torch
from torch import nn

import spnet
from spnet.training import DynamicAuxiliary
from tests.conftest import states_equal


@pytest.fixture
def model():
    return spnet.create_model("resnet20_cifar", in_channels=1).train()


def test_momentum_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    auxiliary = DynamicAuxiliary(model, momentum=0.5)
    for value, expected in [(2.0, 1.5), (4.0, 2.75), (8.0, 5.375)]:  # each the mean of itself and the one before
        model.weight.data.fill_(value)
        auxiliary.update(model)
        assert auxiliary.module.weight.item() == expected


@pytest.mark.parametrize("momentum", [0.1, 0.6, 0.9, 0.99])
def test_momentum_average_in_closed_form(model, momentum):
    # p_aux after k steps = m^k p_0 + (1 - m) sum_i m^(k-i) p_i
    steps = 7
    history = [[p.detach().double() for p in model.parameters()]]
    auxiliary = DynamicAuxiliary(model, momentum)
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        history.append([p.detach().double() for p in model.parameters()])
        auxiliary.update(model)
    weights = [momentum**steps] + [(1 - momentum) * momentum ** (steps - i) for i in range(1, steps + 1)]
    assert math.isclose(sum(weights), 1)
    for got, *values in zip(auxiliary.module.parameters(), *history, strict=True):
        expected = sum(w * v for w, v in zip(weights, values, strict=True))
        # Each of the steps rounds the difference and the sum to float32 (2^-24 relative each).
        bound = 3 * steps * 2.0**-24 * max(v.abs().max().item() for v in values)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


def test_momentum_zero_and_one_are_exact(model):
    follower, fixed = DynamicAuxiliary(model, 0.0), DynamicAuxiliary(model, 1.0)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        follower.update(model)
        fixed.update(model)
    assert all(map(torch.equal, follower.module.parameters(), model.parameters()))
    assert all(map(torch.equal, fixed.module.parameters(), start))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, math.inf])
def test_momentum_out_of_range(model, momentum):
    with pytest.raises(ValueError, match=r"momentum: expected a value in \[0, 1\]"):
        DynamicAuxiliary(model, momentum)


def test_another_network_cannot_be_followed(model):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        DynamicAuxiliary(3)
    auxiliary = DynamicAuxiliary(model)
    for other in (nn.Linear(1, 1), spnet.create_model("resnet20_cifar")):
        with pytest.raises(ValueError, match="model: expected the network that was copied, got another"):
            auxiliary.update(other)


def test_starts_as_an_exact_copy(model):
    auxiliary = DynamicAuxiliary(model)
    assert states_equal(auxiliary.module, model)
    storages = {t.data_ptr() for t in model.state_dict().values()}
    assert not storages & {t.data_ptr() for t in auxiliary.state_dict().values()}
    x = torch.randn(3, 1, 32, 32)
    torch.manual_seed(5)
    output = model(x)
    torch.manual_seed(5)  # the same noise and dropout
    copy = auxiliary(x)
    assert torch.equal(output.router_logits, copy.router_logits)
    assert all(map(torch.equal, output.stage_logits, copy.stage_logits))


def test_update_follows_parameters_and_not_statistics(model):
    auxiliary = DynamicAuxiliary(model)
    before = {name: b.clone() for name, b in auxiliary.module.named_buffers()}
    model(torch.randn(3, 1, 32, 32))  # changes the model's running statistics
    auxiliary.update(model)
    assert all(torch.equal(b, before[name]) for name, b in auxiliary.module.named_buffers())
    auxiliary(torch.randn(3, 1, 32, 32))
    assert not all(torch.equal(b, before[name]) for name, b in auxiliary.module.named_buffers())


def test_always_in_training_mode(model):
    auxiliary = DynamicAuxiliary(model.eval())
    parent = nn.ModuleDict({"model": model, "auxiliary": auxiliary})
    for change in (lambda: parent.train(False), parent.eval, auxiliary.eval, lambda: auxiliary.train(False)):
        change()
        assert all(m.training for m in auxiliary.modules())
        assert not model.training
    assert isinstance(auxiliary(torch.randn(2, 1, 32, 32)), spnet.SPNetOutput)


def test_no_gradient(model):
    own = [id(p) for p in model.parameters()]
    auxiliary = DynamicAuxiliary(model)
    assert [id(p) for p in model.parameters()] == own
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in auxiliary.parameters())
    assert not set(own) & {id(p) for p in auxiliary.parameters()}
    output = auxiliary(torch.randn(2, 1, 32, 32))
    assert not output.router_logits.requires_grad
    assert not any(z.requires_grad for z in output.stage_logits)


def test_batch_of_one(model):
    assert DynamicAuxiliary(model)(torch.randn(1, 1, 32, 32)).router_logits.shape == (1, 9, 2)
