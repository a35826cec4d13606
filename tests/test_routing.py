"""Routers and routed blocks: the meaning that every execution must keep."""

import math
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spnet
from spnet.routing import decide, routed_blocks, straight_through_gumbel


def test_router_is_the_published_formula():
    router = spnet.Router(8, width=16).eval()
    router.bn.running_mean.normal_()
    router.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 8, 6, 7)
    h = x.mean((2, 3)) @ router.fc1.weight.T + router.fc1.bias
    h = (h - router.bn.running_mean) / (router.bn.running_var + router.bn.eps).sqrt()
    expected = F.relu(h) @ router.fc2.weight.T + router.fc2.bias
    torch.testing.assert_close(router(x), expected, rtol=1e-5, atol=1e-5)


def test_router_starts_open_for_about_85_percent():
    assert torch.equal(spnet.Router(4).fc2.bias.data, torch.tensor([0.1, 2.0]))
    open_share = straight_through_gumbel(torch.tensor([[0.1, 2.0]]).expand(20_000, 2)).mean().item()
    # The binomial's standard deviation is 0.0024 around sigmoid(1.9) = 0.870.
    assert abs(open_share - 0.870) < 0.015


def test_router_init_std():
    weight = spnet.Router(64, init_std=1e-3).fc2.weight
    assert 0.5e-3 < weight.std() < 2e-3


def test_a_tie_and_a_nan_skip():
    z = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [float("nan"), 1.0], [0.0, float("nan")]])
    assert decide(z).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("logits", "tau", "decision", "slope"),
    [
        ([0.0, math.log(3)], 1.0, 1.0, 0.1875),  # p = 3/4, slope p (1 - p) / tau
        ([math.log(3), 0.0], 1.0, 0.0, 0.1875),  # p = 1/4
        ([0.0, math.log(3)], 0.5, 1.0, 0.18),  # p = 9/10
    ],
)
def test_straight_through_gumbel_is_hard_forward_and_soft_backward(monkeypatch, logits, tau, decision, slope):
    # Exponential samples of 1 make the Gumbel noise -ln(1) = 0.
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.fill_(1))
    z = torch.tensor([logits], requires_grad=True)
    d = straight_through_gumbel(z, tau)
    assert d.tolist() == [decision]
    d.sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([[-slope, slope]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_keeps_float32_in_a_half_model(dtype):
    model = spnet.create_model("resnet20_cifar").to(dtype).eval()
    assert model.features.stem[0].weight.dtype == dtype
    assert {p.dtype for b in routed_blocks(model).values() for p in b.router.parameters()} == {torch.float32}
    x = torch.randn(3, 16, 8, 8)
    router = routed_blocks(model)["features.stage1.0"].router
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x.to(dtype)).dtype == torch.float32
    torch.testing.assert_close(router(x.to(dtype)), router(x.to(dtype).float()), rtol=0, atol=0)


@pytest.mark.parametrize(("default", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_router_has_at_least_float32_whatever_the_default_is(default, kept):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        router = spnet.Router(4)
        z = router(torch.randn(3, 4, 2, 2))
    finally:
        torch.set_default_dtype(before)
    assert {t.dtype for t in router.state_dict().values() if t.is_floating_point()} == {kept}
    assert z.dtype == kept


def test_router_of_one_sample_in_training_uses_running_statistics():
    router = spnet.Router(4, width=8, dropout=0.0)
    router.bn.running_mean.normal_()
    before = router.bn.running_mean.clone()
    x = torch.randn(1, 4, 3, 3)
    trained = router.train()(x)
    torch.testing.assert_close(trained, router.eval()(x))
    assert torch.equal(before, router.bn.running_mean)


def _block(**kwargs):
    return spnet.RoutedBlock(nn.Conv2d(4, 4, 3, padding=1), spnet.Router(4, 8), activation=nn.ReLU(), **kwargs)


def test_block_in_evaluation_selects_per_sample():
    block = _block().eval()
    x = torch.randn(6, 4, 5, 5)
    d = torch.tensor([True, False, True, False, False, True])
    y = block.masked(x, decisions=d).output
    for i in range(6):
        torch.testing.assert_close(y[i], F.relu(x[i] + block.body(x)[i]) if d[i] else F.relu(x[i]), rtol=0, atol=0)


def test_block_in_training_multiplies_and_passes_the_gradient_to_the_router():
    block = _block()
    x = torch.randn(16, 4, 5, 5)
    routing = block.masked(x)
    expected = F.relu(x + routing.decisions[:, None, None, None] * block.body(x))
    torch.testing.assert_close(routing.output, expected, rtol=0, atol=0)
    routing.output.sum().backward()
    assert block.router.fc2.weight.grad.abs().sum() > 0


def test_a_skipped_body_contributes_nothing_even_if_not_finite():
    block = _block().eval()
    nn.init.constant_(block.body.bias, float("inf"))
    x = torch.rand(2, 4, 5, 5)
    y = block.masked(x, decisions=torch.tensor([False, True])).output
    assert torch.equal(y[0], x[0])
    assert y[1].isinf().all()


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18", "resnet50"])
@pytest.mark.parametrize("batch", [1, 3])
def test_network_outputs(name, batch):
    model = spnet.create_model(name, num_classes=7, in_channels=2, input_size=64)
    x = torch.randn(batch, 2, 64, 64)
    out = model(x)
    stages, blocks = (3, 9) if "cifar" in name else (4, 8 if name == "resnet18" else 16)
    assert [t.shape for t in out.stage_logits] == [(batch, 7)] * stages
    assert out.router_logits.shape == (batch, blocks, 2)
    assert out.decisions.shape == (batch, blocks)
    assert sum(f.shape[1] for f in out.features) == blocks
    assert len(out.stage_features) == stages
    sum(t.sum() for t in out.stage_logits).backward()
    assert model.eval()(x).shape == (batch, 7)


def test_training_output_agrees_with_evaluation_when_all_is_open():
    model = spnet.create_model("resnet20_cifar", router_dropout=0.0)
    for block in routed_blocks(model).values():
        nn.init.constant_(block.router.fc2.bias, 0.0)
        block.router.fc2.bias.data[1] = 1e4
    x = torch.randn(4, 3, 32, 32)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad():
        model(x)
        # Batch statistics have become the running ones, but for the n / (n - 1) of the variance.
        trained, evaluated = model(x).stage_logits[-1], model.eval()(x)
    torch.testing.assert_close(trained, evaluated, rtol=0.05, atol=0.05)


def test_static_network_has_the_routed_ones_weights():
    static = spnet.create_model("resnet20_cifar", routed=False).state_dict()
    routed = spnet.create_model("resnet20_cifar").state_dict()
    assert {k for k in routed if ".router." not in k} == set(static)


def test_unknown_model_names_the_near_matches():
    with pytest.raises(ValueError, match="unknown model 'resnet110'.*resnet110_cifar"):
        spnet.create_model("resnet110")
    for name in (None, 110, ""):
        with pytest.raises(ValueError, match=f"name: unknown model {name!r}; did you mean .*resnet110_cifar"):
            spnet.create_model(name)
    with pytest.raises(ValueError, match="shortcut"):
        spnet.create_model("resnet20_cifar", shortcut="option-a")


@pytest.mark.parametrize(("blocks", "widths"), [([], []), ([1, 2], [8]), ([1], [8, 16]), ([1, 0], [8, 16])])
def test_every_stage_has_blocks_and_a_width(blocks, widths):
    with pytest.raises(ValueError, match=re.escape(f"for each of the widths {widths}, got {blocks}")):
        spnet.SPNet(blocks, widths, num_classes=2)


@pytest.mark.parametrize("training", [True, False])
def test_masked_forward_compiles_whole(training):
    model = spnet.create_model("resnet20_cifar", in_channels=1).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in (32, 24, 40):  # the second time PyTorch lets sizes vary
        x = torch.randn(2, 1, size, size)
        outputs = []
        for network in (compiled, model):
            torch.manual_seed(1)
            outputs.append(network(x))
        torch.testing.assert_close(*outputs)


def test_a_run_is_seen_by_its_own_thread_alone():
    from spnet.routing import _active_run, active

    seen = []
    with active(object()):
        thread = threading.Thread(target=lambda: seen.append(_active_run.get()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert _active_run.get() is None


class _Constant(nn.Module):
    """Returns the same whatever it is given."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 3), (3, 1), (3, 2, 4), (2,), (1, 2), (6, 2)])
def test_logits_of_another_shape(shape, training):
    block = spnet.RoutedBlock(nn.Linear(4, 4), _Constant(torch.zeros(shape))).train(training)
    with pytest.raises(ValueError, match=r"router: expected logits \[3, 2\] of \(skip, execute\), got"):
        block(torch.zeros(3, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 4, 5), (3, 1, 5), (3, 4, 5)])
def test_a_body_that_is_expanded(shape, training):
    body, d = torch.randn(shape), torch.tensor([True, False, True])
    x = torch.randn(3, 4, 5)
    block = spnet.RoutedBlock(_Constant(body), _Constant(1e4 * torch.stack([~d, d], 1).float())).train(training)
    torch.testing.assert_close(block(x), x + d[:, None, None] * body, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 1), (3, 5), (5,), (), (3, 4, 6), (2, 4, 5), (3, 4, 5, 1)])
def test_a_body_of_another_shape(shape, training):
    block = spnet.RoutedBlock(_Constant(torch.zeros(shape)), spnet.Router(4)).train(training)
    message = f"body: expected [3, 4, 5] (the shortcut's shape), got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        block(torch.zeros(3, 4, 5))


@pytest.mark.parametrize("training", [True, False])
def test_a_body_that_returns_no_tensor(training):
    block = spnet.RoutedBlock(nn.GRU(4, 4), spnet.Router(4)).train(training)
    with pytest.raises(TypeError, match="body: expected a module that returns a Tensor, got a GRU of tuple"):
        block(torch.zeros(3, 4))


class _Rectified(nn.Linear):
    """Overwrites its input where no attribute tells."""

    def forward(self, x):
        return super().forward(x[:].relu_())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("shortcut", [None, nn.Linear(4, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_a_body_that_writes_to_its_input(training, shortcut, mode):
    for body in (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), _Rectified(4, 4)):
        block = spnet.RoutedBlock(body, spnet.Router(4), shortcut).train(training)
        name = type(body).__name__
        message = f"body: expected a module that leaves its input as it is, got a {name} that writes to it"
        with mode(), pytest.raises(ValueError, match=message):
            block(torch.randn(3, 4))


def test_what_a_body_is_given_in_inference_mode():
    block = _block().eval()
    x, d = torch.randn(2, 4, 5, 5), torch.tensor([True, False])
    expected = block.masked(x, decisions=d).output
    with torch.inference_mode():
        for view in (x + 0, torch.stack([x, x], -1)[..., 1], torch.complex(x, -x).conj().imag):
            assert view.is_inference()
            torch.testing.assert_close(block.masked(view, decisions=d).output, expected)


@pytest.mark.parametrize(
    ("parts", "name"),
    [((None, nn.ReLU()), "body"), ((nn.ReLU(), None), "router"), ((nn.ReLU(), nn.ReLU(), abs), "shortcut")],
)
def test_parts_that_are_no_modules(parts, name):
    with pytest.raises(TypeError, match=f"^{name}: expected a torch.nn.Module, got"):
        spnet.RoutedBlock(*parts)


def test_a_router_of_another_width():
    with pytest.raises(ValueError, match=r"x: expected 8 channels \(the router's\), got 6"):
        spnet.Router(8)(torch.zeros(2, 6, 3, 3))
