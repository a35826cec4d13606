"""``convert`` on miniature networks whose blocks are written like those of torchvision, timm and common scripts."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import spnet
from spnet.analysis.macs import count_macs
from spnet.routing import routed_blocks
from spnet.training import DynamicAuxiliary, SPNetLoss
from tests.conftest import settle


def _conv_bn(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]


class Basic(nn.Module):
    """Modules throughout, one ReLU in two places, an in-place sum."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels, out, 3, stride)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv_bn(out, out, 3)
        self.downsample = nn.Sequential(*_conv_bn(channels, out, 1, stride)) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Functional(Basic):
    """Functions for activations, an empty nn.Sequential as identity, and an unwritten-out shortcut."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__(channels, out, stride)
        self.downsample = self.downsample or nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.downsample(x)
        return F.relu(out)


class Transform(nn.Module):
    """The body a module of its own, the shortcut first in the sum, an activation other than ReLU."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.proj = nn.Sequential(*_conv_bn(channels, out, 1, stride)) if channels != out else None
        self.f = nn.Sequential(*_conv_bn(channels, out, 3, stride), nn.SiLU(), *_conv_bn(out, out, 3))
        self.activation = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x) if self.proj is None else self.proj(x) + self.f(x)
        return self.activation(x)


class DropPath(nn.Module):
    """Stochastic depth, decided by the module's own mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) < 0.8) / 0.8


class Excite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class PreActivation(nn.Module):
    """No activation after the sum; where the shape changes, both branches begin with the same normalisation."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.norm1 = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.downsample = nn.Conv2d(channels, out, 1, stride) if channels != out else None
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1)
        self.norm2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.se = Excite(out)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        preact = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(preact)
        out = self.conv2(F.relu(self.norm2(self.conv1(preact))))
        return self.drop_path(self.se(out)) + shortcut


class Scaled(nn.Module):
    """Weights and functions between the modules of the body, and modules in a list: no straight line."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)])
        self.gamma = nn.Parameter(torch.full((out, 1, 1), 0.3))
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.project = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](x)
        halves = y.chunk(2, 1)
        _ = halves[0]  # read for nothing, as some published blocks do
        y = self.convs[1](torch.cat([F.gelu(halves[0]), halves[1]], 1)).mul(self.gamma)
        return torch.add(y, self.project(self.pool(x)))


class Line(nn.Module):
    """A stage that is no nn.Sequential but calls its children in order."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(f"b{i + 1}", block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


class Network(nn.Module):
    def __init__(self, block: type[nn.Module], stage: type[nn.Module] = nn.Sequential):
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(3, 8, 3), nn.ReLU())
        self.layer1 = stage(block(8, 8, 1), block(8, 8, 1))
        self.layer2 = stage(block(8, 16, 2), block(16, 16, 1), block(16, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


BLOCKS = [Basic, Functional, Transform, PreActivation, Scaled]


@pytest.fixture(params=BLOCKS, ids=lambda block: block.__name__)
def block(request) -> type[nn.Module]:
    return request.param


@pytest.fixture
def original(block) -> nn.Module:
    return settle(Network(block))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 3, 13, 11)


def test_all_open_gives_the_original_outputs(original, x):
    model = spnet.convert(copy.deepcopy(original))
    paths = torch.ones(7, 5, dtype=torch.bool)
    expected = original(x)
    assert torch.equal(spnet.fast_forward(model, x, impl="masked", paths=paths), expected)
    assert torch.equal(spnet.fast_forward(model, x, impl="routed", paths=paths), expected)
    assert torch.equal(model(x), expected)  # fresh routers are open
    assert torch.equal(settle(model, bias=-1e3)(x), spnet.fast_forward(model, x, impl="routed", paths=~paths))


def test_parameters_stay_the_same_objects(original):
    parameters, mode = set(original.parameters()), copy.deepcopy(original)
    model = spnet.convert(original)
    assert model is original
    routers = {p for b in routed_blocks(model).values() for p in b.router.parameters()}
    assert parameters == set(model.parameters()) - routers
    assert len(set(routed_blocks(model))) == 5
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in spnet.convert(mode.train()).modules())


def test_masked_and_routed_agree(original, x):
    model = settle(spnet.convert(original))
    for paths in (None, torch.rand(7, 5) < 0.5, torch.zeros(7, 5, dtype=torch.bool)):
        expected, masked = spnet.fast_forward(model, x, impl="masked", paths=paths, return_paths=True)
        got, routed = spnet.fast_forward(model, x, impl="routed", paths=paths, return_paths=True)
        assert torch.equal(masked.decisions, routed.decisions)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert 0 < routed.macs.max() < routed.dense_macs


def test_a_skipped_body_is_left_out(original, x):
    model = settle(spnet.convert(original))
    for body in (b.body for b in routed_blocks(model).values()):
        body.register_forward_hook(lambda m, i, y: torch.full_like(y, torch.nan))
    skipped = torch.zeros(7, 5, dtype=torch.bool)
    assert spnet.fast_forward(model, x, impl="masked", paths=skipped).isfinite().all()
    assert spnet.fast_forward(model, x, impl="routed", paths=skipped).isfinite().all()


def test_macs_are_the_original_ones_and_the_routers(original):
    dense = count_macs(original, (3, 13, 11)).dense
    macs = count_macs(spnet.convert(original, router_width=16), (3, 13, 11))
    routers = [16 * c + 2 * 16 for c in (8, 8, 8, 16, 16)]
    assert [b.router for b in macs.blocks] == routers
    assert macs.dense == dense + sum(routers)
    assert all(b.body > b.shortcut for b in macs.blocks)


def test_stages_are_lines(block, x):
    for stage in (nn.Sequential, Line):
        model = spnet.convert(settle(Network(block, stage)))
        explanation = spnet.explain(model, x)
        first, *others = explanation.blocks.values()
        # What the first takes is not made in a line, so it may belong to others.
        assert first.startswith("copied: no layer") or (explanation.impl, first) == ("walk", "a branch not taken")
        cost = "activation SiLU computed for every sample" if block is Transform else "untouched"
        kept = "a branch not taken" if explanation.impl == "walk" else cost
        assert others[1].startswith("shortcut")
        assert others[:1] + others[2:] == [kept] * 3


def test_state_dict_round_trip(block, x):
    model = settle(spnet.convert(Network(block)))
    again = spnet.convert(Network(block)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_training_gives_what_the_losses_read(block, x):
    model = spnet.convert(Network(block))
    auxiliary = DynamicAuxiliary(model)
    for p in auxiliary.module.parameters():
        p.add_(0.01)
    with torch.no_grad():
        followed = spnet.forward_training(auxiliary.module, x)
    output = spnet.forward_training(model, x)
    assert output.stage_logits[0].shape == (7, 5)
    assert output.router_logits.shape == (7, 5, 2)
    assert output.decisions.shape == (7, 5)
    assert [f.shape for f in output.features] == [(7, 2, 8), (7, 3, 16)]
    objective = SPNetLoss(0.5, stage_weights=[1.0], evolution=1.0)
    loss, terms = objective(output, torch.arange(7) % 5, followed)
    assert set(terms) == {"cls", "act", "path", "logits", "evo"}
    assert all(t > 0 for t in terms.values())
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_training_updates_every_statistic_once(block, x):
    model = spnet.convert(Network(block))
    spnet.forward_training(model, x)
    assert all(m.num_batches_tracked == 1 for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d))


def test_training_forward_is_straight_through(x):
    model = spnet.convert(Network(Basic))
    output = spnet.forward_training(model, x)
    assert output.decisions.unique().tolist() in ([0, 1], [1])
    output.decisions.sum().backward()
    assert all(b.router.fc2.weight.grad.abs().sum() > 0 for b in routed_blocks(model).values())
    assert model(x).shape == (7, 5)  # without the losses it is called as ever


def test_forward_training_of_other_models(x):
    with pytest.raises(ValueError, match="expected RoutedBlocks in training mode, but Network contains none"):
        spnet.forward_training(Network(Basic), x)
    with pytest.raises(ValueError, match="expected RoutedBlocks in training mode, but Network is in evaluation mode"):
        spnet.forward_training(spnet.convert(Network(Basic)).eval(), x)


def test_forward_training_of_a_model_that_leaves_out_a_block(x):
    model = spnet.convert(Network(Basic))
    model.layer1.forward = lambda x: model.layer1[1](x)
    with pytest.raises(ValueError, match="the forward of Network did not call block 'layer1.0'"):
        spnet.forward_training(model, x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_forward_training_with_checkpoints(x):
    model = spnet.convert(Network(Basic))
    layer, gradients = model.layer1.forward, []
    for forward in (layer, partial(checkpoint, layer, use_reentrant=False)):
        model.layer1.forward = forward
        torch.manual_seed(1)
        loss = spnet.forward_training(model, x).router_logits.square().sum()
        gradients.append(torch.autograd.grad(loss, [*model.parameters()], allow_unused=True))
    torch.testing.assert_close(*gradients)
    model.layer1.forward = partial(checkpoint, layer, use_reentrant=True)
    # The input of layer1 needs gradient, but what is computed inside has none until the backward.
    with pytest.raises(ValueError, match=r"calls block 'layer1.0' without gradient, .* use_reentrant=False"):
        spnet.forward_training(model, x)
    with torch.no_grad():
        spnet.forward_training(model, x)
    for block in routed_blocks(model).values():
        block.router.requires_grad_(False)
    spnet.forward_training(model, x)


def test_forward_training_of_a_model_that_repeats_a_block(x):
    model = spnet.convert(Network(Basic))
    model.layer1.forward = lambda x: model.layer1[1](model.layer1[1](model.layer1[0](x)))
    with pytest.raises(ValueError, match="RoutedBlock 'layer1.1' ran twice in one forward, so it has no one path"):
        spnet.forward_training(model, x)


def test_forward_training_of_compiled_code(x):
    model = spnet.convert(Network(Basic))
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="did not call block 'layer1.0', or calls it in compiled code"):
        spnet.forward_training(model, x)
    plain = spnet.convert(Network(Basic))
    compiled = copy.deepcopy(plain)
    for block in routed_blocks(compiled).values():
        block.body.compile(backend="eager")
    outputs = []
    for network in (plain, compiled):
        torch.manual_seed(1)
        outputs.append(spnet.forward_training(network, x))
    assert all(map(torch.equal, tree_leaves(outputs[0]), tree_leaves(outputs[1])))


def test_frozen_modules_stay_frozen():
    model = Network(Basic)
    model.layer1[0].bn1.eval()
    converted = spnet.convert(model)
    assert not converted.layer1[0].body.bn1.training
    assert converted.layer1[0].training
    assert converted.layer1[0].router.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(dtype, x):
    original = settle(Network(Basic)).to(dtype)
    model = spnet.convert(copy.deepcopy(original))
    router = model.layer1[0].router.fc1.weight.dtype
    assert router == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert torch.equal(model(x.to(dtype)), original(x.to(dtype)))


def test_the_default_device_does_not_matter():
    model = Network(Basic)
    with torch.device("meta"):
        spnet.convert(model)
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}


def test_on_the_meta_device(x):
    model = spnet.convert(Network(Basic).to("meta"))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model(x.to("meta")).shape == (7, 5)


def test_a_block_or_a_line_alone():
    x = torch.randn(2, 8, 5, 5)
    for original in (Basic(8, 8, 1), nn.Sequential(Basic(8, 8, 1), Basic(8, 16, 2)), PreActivation(8, 16, 2)):
        original.eval()
        expected = original(x)
        model = spnet.convert(original)
        assert torch.equal(model(x), expected)
        assert isinstance(model, spnet.RoutedBlock | spnet.RoutedSequential)


def test_lines_in_lines(x):
    inner = nn.Sequential(Basic(8, 8, 1), Basic(8, 8, 1))
    original = settle(nn.Sequential(nn.Conv2d(3, 8, 3), Basic(8, 8, 1), inner, nn.ReLU()))
    expected = original(x)
    model = spnet.convert(original)
    assert torch.equal(model(x), expected)
    # What the convolution gives has not passed the first block's activation.
    expected = ["activation ReLU computed for every sample", "untouched", "untouched"]
    assert list(spnet.explain(model, x).blocks.values()) == expected
    assert type(model) is type(model[2]) is spnet.RoutedSequential


class Backwards(Line):
    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(list(self.children())):
            x = block(x)
        return x


def test_only_lines_become_lines(x):
    for outer in (Line, Backwards):  # a network keeps its class, and a stage of another order its forward
        original = outer(*(Basic(3, 3, 1) for _ in range(2)))
        original.stage = Backwards(*(Basic(3, 3, 1) for _ in range(2)))
        expected = settle(original)(x)
        model = spnet.convert(original)
        assert torch.equal(model(x), expected)
        assert (type(model), type(model.stage)) == (outer, Backwards)
        assert len(routed_blocks(model)) == 4


class Halves(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels // 2, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.chunk(2, 1)[0])


def test_body_that_takes_half_of_the_channels(x):
    model = Network(Basic)
    model.layer1[0].conv1 = Halves(8)
    expected = settle(model)(x)
    assert torch.equal(spnet.convert(model)(x), expected)


def test_relu_by_function_is_one_that_routed_knows():
    block = spnet.convert(Network(Functional)).layer1[0]
    assert type(block.activation) is type(block.body.relu) is nn.ReLU


def test_where_chooses(x):
    seen = []

    def where(name, module):
        seen.append(name)
        return getattr(module, "downsample", True) is None and name != "layer1.0"

    model = spnet.convert(settle(Network(Basic)), where=where)
    assert list(routed_blocks(model)) == ["layer1.1", "layer2.1", "layer2.2"]
    assert "layer1.0" in seen
    assert isinstance(model.layer1[0], Basic)
    assert model(x).shape == (7, 5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_parts_of_torchscript_are_left_as_they_are(x):
    model = settle(Network(Basic))
    expected = model(x)
    model.layer1[0] = torch.jit.trace(model.layer1[0], torch.zeros(1, 8, 9, 9))
    whole = torch.jit.trace(model, x)
    assert "layer1.0" not in routed_blocks(spnet.convert(model))
    torch.testing.assert_close(spnet.fast_forward(model, x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no residual block to route; looked at 'the model' .* is of TorchScript"):
        spnet.convert(whole)


def _altered(forward=None, prepare=None) -> nn.Module:
    """A network whose block layer1.1 has another forward, or has been prepared by a function."""
    model = Network(Basic)
    block = model.layer1[1]
    if forward is not None:
        block.__class__ = type("Odd", (Basic,), {"forward": forward})
    if prepare is not None:
        prepare(model, block)
    return model


def _overwriting(self, x):
    return self.bn1(self.conv1(self.relu(x))) + x


def _overwriting_later(self, x):
    return self.bn1(self.conv1(x.flip(2).flip(2).relu_())) + x


def _overwriting_by_operator(self, x):
    y = x
    y *= 2
    return self.conv1(y) + x


def _overwriting_by_the_sum(self, x):
    identity = x
    identity += self.bn1(self.conv1(x))
    return self.relu(identity)


def _by_mode(self, x):
    return F.dropout(self.conv1(x), 0.5, self.training) + x


def _two_bodies(self, x):
    return self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))


def _entangled(self, x):
    y = self.bn1(x)
    return self.conv2(self.conv1(y + x)) + y


def _with_channels_last(self, x):
    y = self.linear(self.norm(x)).permute(0, 3, 1, 2)
    return self.conv1(y).permute(0, 2, 3, 1) + x


def _add_layers_of_the_last_axis(model, block):
    block.norm, block.linear = nn.LayerNorm(8), nn.Linear(8, 8)


def _nest(model, block):
    block.conv2 = Basic(8, 8, 1)


def _repeat(model, block):
    model.layer1.append(block)


def _hook(model, block):
    block.register_forward_hook(lambda m, i, y: None)


def _backward_pre_hook(model, block):
    block.register_full_backward_pre_hook(lambda m, g: None)


def _pre_hook(model, block):
    block.register_forward_pre_hook(lambda m, i: None)


@pytest.mark.parametrize(
    ("forward", "prepare", "why"),
    [
        (_overwriting, None, "overwrites its input"),
        (_overwriting_later, None, "overwrites its input"),
        (_overwriting_by_operator, None, "overwrites its input"),
        (_overwriting_by_the_sum, None, "overwrites its input by the sum"),
        (lambda self, x: x.add_(self.conv1(x)), None, "overwrites its input by the sum"),
        (_by_mode, None, "computes another thing in training mode than in evaluation mode"),
        (_two_bodies, None, "two branches of equally many convolutions"),
        (_entangled, None, "share more than one tensor"),
        (_with_channels_last, _add_layers_of_the_last_axis, r"maps \[B, H, W, C\]"),
        (None, _nest, "contains block 'layer1.1.conv2'"),
        (None, _repeat, "also stands at 'layer1.2'"),
        (None, _hook, "has a hook"),
        (None, _pre_hook, "has a hook"),
        (None, _backward_pre_hook, "has a hook"),
    ],
)
def test_blocks_that_cannot_be_routed(forward, prepare, why):
    model = _altered(forward, prepare)
    before = str(model)
    with pytest.raises(ValueError, match=f"block 'layer1.1' .*{why}"):
        spnet.convert(model)
    assert str(model) == before
    left = spnet.convert(model, where=lambda name, module: not name.startswith(("layer1.1", "layer1.2")))
    assert list(routed_blocks(left)) == ["layer1.0", "layer2.0", "layer2.1", "layer2.2"]


def test_already_routed():
    model = spnet.convert(Network(Basic))
    with pytest.raises(ValueError, match="already routed, 'layer1.0' is a RoutedBlock"):
        spnet.convert(model)


class Branching(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) + x if x.sum() > 0 else x


class TwoInputs(Basic):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.conv1(x) + x


class PlainBody(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))


class Linear(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(x) + x


class Constant(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) + self.conv2.weight


class Twice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv1(x) + x) * 2


@pytest.mark.parametrize(
    ("odd", "lacks"),
    [
        (Branching, "cannot be traced"),
        (TwoInputs, "takes more than one input"),
        (PlainBody, "does not end in a sum"),
        (Linear, "adds branches without a convolution"),
        (Constant, "adds something that does not depend on its input"),
        (Twice, "does not end in a sum"),
    ],
)
def test_no_residual_block(odd, lacks):
    with pytest.raises(ValueError, match=rf"Network has no residual block .*'layer1.0' \({odd.__name__}\) {lacks}"):
        spnet.convert(Network(odd))


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="Linear has no residual block to route; looked at no module"):
        spnet.convert(nn.Linear(3, 3))


@pytest.mark.parametrize("model", [None, "resnet50", spnet.SPNet], ids=["None", "name", "class"])
def test_no_module(model):
    for call in (spnet.convert, lambda model: spnet.forward_training(model, torch.randn(1, 3, 8, 8))):
        with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got (NoneType|str|type)$"):
            call(model)


def test_every_block_starts_open_whatever_the_features():
    model = spnet.convert(Network(Basic)).eval()
    x = 1e6 * torch.randn(4, 3, 32, 32)
    _, paths = spnet.fast_forward(model, x, impl="masked", return_paths=True)
    assert paths.decisions.all()
