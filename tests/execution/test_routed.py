"""``routed`` against ``masked``: any network, any batch, any paths, by the contract of equality.

In float32 the decisions agree wherever the router's margin exceeds 1e-3, and equal paths give outputs that
agree to 1e-4 relative. In half precision the error against float64 is at most twice the masked model's.
"""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spnet
from spnet.models.resnet import PadShortcut
from spnet.routing import Routing, routed_blocks
from tests.conftest import assert_as_exact_as_masked, margins, settle


class _ViewShortcut(nn.Module):
    """A shortcut whose result shares the memory of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:]


class _Branches(nn.Module):
    """A user's own network: the block's input is used again behind the block's back."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) + y + x


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(True),
    "relu6": nn.ReLU6,
    "none": lambda: None,
    "tanh": nn.Tanh,
}


def _router(channels: int, kind: str) -> nn.Module:
    if kind == "own":
        return spnet.Router(channels, 8)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2))


@st.composite
def networks(draw) -> nn.Module:
    """A random network of routed blocks in lines, nested lines, plain sequentials and branches."""
    seed = draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    channels = draw(st.sampled_from([3, 8, 17]))
    modules: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
    if draw(st.booleans()):
        modules.append(nn.ReLU(draw(st.booleans())))
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["identity", "identity", "identity", "view", "pad", "projection"]))
        stride, out = 1, channels
        shortcut: nn.Module | None = None
        if kind == "view":
            shortcut = _ViewShortcut()
        elif kind == "pad":
            stride, out = 2, channels + 3
            shortcut = PadShortcut(channels, out, 2)
        elif kind == "projection":
            stride, out = draw(st.sampled_from([1, 2])), 12
            shortcut = nn.Conv2d(channels, out, 1, stride)
        body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, out, 3, padding=1)
        )
        activation = ACTIVATIONS[draw(st.sampled_from(list(ACTIVATIONS)))]()
        router = _router(channels, draw(st.sampled_from(["own", "own", "any"])))
        modules.append(spnet.RoutedBlock(body, router, shortcut, activation))
        channels = out
        if draw(st.integers(0, 4)) == 0:
            modules.append(draw(st.sampled_from([nn.Identity(), nn.ReLU(), nn.Dropout(0.5), nn.AvgPool2d(1)])))
    shape = draw(st.sampled_from(["line", "line", "nested", "plain", "branches"]))
    if shape == "line":
        model = spnet.RoutedSequential(*modules)
    elif shape == "plain":
        model = nn.Sequential(*modules)
    elif shape == "nested":
        cut = draw(st.integers(0, len(modules) - 1))
        model = spnet.RoutedSequential(*modules[:cut], spnet.RoutedSequential(*modules[cut:]))
    else:
        line = [spnet.RoutedBlock(nn.Conv2d(3, 3, 3, padding=1), _router(3, "own"), None, nn.ReLU()) for _ in range(3)]
        model = _Branches(spnet.RoutedSequential(*line), spnet.RoutedSequential(*copy.deepcopy(line)))
    return settle(model)


def _check(model: nn.Module, x: Tensor) -> None:
    expected, masked = spnet.fast_forward(model, x, impl="masked", return_paths=True)
    got, routed = spnet.fast_forward(model, x, impl="routed", return_paths=True)
    clear = (margins(model, x) > 1e-3).all(1)
    assert torch.equal(masked.decisions[clear], routed.decisions[clear])
    same = (masked.decisions == routed.decisions).all(1)
    scale = expected.abs().max().clamp(min=1e-6) if len(x) else 1
    assert ((got - expected).abs()[same] <= 1e-4 * scale).all()


@given(networks(), st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_own_decisions(model, batch, memory_format):
    x = torch.randn(batch, 3, 9, 11).contiguous(memory_format=memory_format)
    _check(model.to(memory_format=memory_format), x)


@given(networks(), st.sampled_from([1, 2, 7, 33]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_forced_paths(model, batch, rate):
    x = torch.randn(batch, 3, 9, 11)
    before = x.clone()
    paths = torch.rand(batch, len(routed_blocks(model))) < rate
    expected = spnet.fast_forward(model, x, impl="masked", paths=paths)
    got, taken = spnet.fast_forward(model, x, impl="routed", paths=paths, return_paths=True)
    assert torch.equal(taken.decisions, paths)
    assert torch.equal(x, before)
    scale = expected.abs().max().clamp(min=1e-6)
    assert ((got - expected).abs() <= 1e-4 * scale).all()


@given(networks(), st.sampled_from([1, 5, 16]), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([torch.bfloat16]))
def test_half_precision(model, batch, rate, dtype):
    x = torch.randn(batch, 3, 9, 11).to(dtype)
    model = model.to(dtype)
    paths = torch.rand(batch, len(routed_blocks(model))) < rate
    routed = spnet.fast_forward(model, x, impl="routed", paths=paths)
    assert routed.dtype == dtype
    assert_as_exact_as_masked(routed, model, x, paths)


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet18", "resnet50"])
@pytest.mark.parametrize("bias", [-50.0, 0.0, 50.0])
def test_networks(name, bias):
    size = 32 if "cifar" in name else 64
    model = settle(spnet.create_model(name, num_classes=10, input_size=size), bias)
    _check(model, torch.randn(5, 3, size, size))


class _DoubledBlock(spnet.RoutedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) - 1


class _DoubledLine(spnet.RoutedSequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) - 1


class _Lowered(nn.Sequential):
    """Ends in a ReLU, but its result is not that of a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


class _Sum(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return sum(pair)


def _replace_forward(module: nn.Module, factor: float) -> nn.Module:
    module.forward = lambda *args: factor * type(module).forward(module, *args) - 1
    return module


def _line(*places: str) -> spnet.RoutedSequential:
    """Three blocks and what a user has made of them."""

    def block(made_by: type = spnet.RoutedBlock) -> spnet.RoutedBlock:
        return made_by(nn.Linear(4, 4), spnet.Router(4, 8), None, nn.ReLU())

    line = [nn.ReLU(), block(), block(), block()]
    for place in places:
        if place == "block":
            line[2] = block(_DoubledBlock)
        elif place == "line":
            line[1:3] = [_DoubledLine(*line[1:3])]
        elif place == "first":
            line[0] = _Lowered(nn.Linear(4, 4), nn.ReLU())
        elif place == "pair":
            line[2:2] = [_Pair(), _Sum()]
        else:
            _replace_forward(line[2].get_submodule(place.removeprefix("own ")), -2)
    return settle(spnet.RoutedSequential(*line))


@pytest.mark.parametrize(
    "place", ["block", "line", "first", "pair", "own ", "own router", "own activation", "own shortcut", "own body"]
)
def test_a_forward_of_a_users_own(place):
    for seed in range(20):
        torch.manual_seed(seed)
        _check(_line(place), torch.randn(16, 4))


class _Keeping(nn.Module):
    """Keeps what it takes or returns, as a feature tap of a user's own does."""

    def __init__(self, inner: nn.Module, kept: str):
        super().__init__()
        self.inner, self._which = inner, kept

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.kept = x if self._which == "input" else y
        return y


class _Reading(nn.Module):
    """Reads what its modules have kept, after the line has run and its result has been overwritten."""

    def __init__(self, *line: nn.Module):
        super().__init__()
        self.line = spnet.RoutedSequential(*line)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x)
        y += 1
        return y + x + sum(m.kept for m in self.line.modules() if isinstance(m, _Keeping) and m.kept.shape == y.shape)


class _Constant(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.value[: len(x)]


class _Rectified(nn.Linear):
    """Overwrites its input where no attribute tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu_())


def _held(place: str) -> nn.Module:
    router, shortcut, activation = spnet.Router(4, 8), None, nn.ReLU()
    first: list[nn.Module] = [nn.Linear(4, 4), nn.ReLU()]
    if place == "module":
        first.append(_Keeping(nn.ReLU(), "output"))
    elif place == "router":
        router = _Keeping(nn.Linear(4, 2), "input")
    elif place == "shortcut":
        shortcut = _Keeping(nn.Linear(4, 4), "output")
    elif place == "constant":
        shortcut = _Constant(16, 4)
    elif place == "activation":
        activation = _Keeping(nn.Tanh(), "output")
    elif place == "input":
        first, activation = [], None
    block = spnet.RoutedBlock(nn.Linear(4, 4), router, shortcut, activation)
    return settle(_Reading(*first, block, spnet.RoutedBlock(nn.Linear(4, 4), spnet.Router(4, 8))))


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("place", "module router shortcut constant activation input".split())
def test_what_others_hold_is_as_masked_leaves_it(place, inference_mode):
    for seed in range(20):
        torch.manual_seed(seed)
        model = _held(place)
        before = copy.deepcopy(model.state_dict())
        with torch.inference_mode(inference_mode):
            xs = [torch.randn(7, 4)]
            xs.append(xs[0].clone())
            expected, paths = spnet.fast_forward(model, xs[0], impl="masked", return_paths=True)
            got = spnet.fast_forward(model, xs[1], impl="routed")
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(*xs)
            paths = torch.zeros_like(paths.decisions)
            expected, got = (spnet.fast_forward(model, xs[0], impl=impl, paths=paths) for impl in ("masked", "routed"))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("executes", [[False] * 3, [True] * 3, [False, True, False]])
@pytest.mark.parametrize("line", [nn.Sequential, spnet.RoutedSequential])
def test_a_body_that_writes_to_its_input_is_refused(line, executes, mode):
    for body in (nn.Sequential(nn.SiLU(inplace=True), nn.Linear(4, 4)), _Rectified(4, 4)):
        block = spnet.RoutedBlock(body, spnet.Router(4, 8), None, nn.ReLU())
        model = settle(line(nn.Linear(4, 4), nn.ReLU(), block))
        for impl in ("masked", "routed"):
            with mode(), pytest.raises(ValueError, match="body: expected a module that leaves its input as it is, got"):
                spnet.fast_forward(model, torch.randn(3, 4), impl=impl, paths=torch.tensor(executes)[:, None])


class _Halved(spnet.RoutedBlock):
    def masked(self, x: Tensor, **options) -> Routing:
        routing = super().masked(x, **options)
        return routing._replace(output=routing.output * 0.5)


@pytest.mark.parametrize("place", ["class", "instance"])
def test_a_masked_of_a_users_own(place):
    for seed in range(20):
        torch.manual_seed(seed)
        model = _line()
        if place == "class":
            model[2].__class__ = _Halved
        else:
            model[2].masked = lambda x, block=model[2], **options: spnet.RoutedBlock.masked(block, 2 * x, **options)
        _check(model, torch.randn(16, 4))
        _check(nn.Sequential(*model).eval(), torch.randn(16, 4))


class _Widened(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float() / 3


@pytest.mark.parametrize("executes", [[False] * 4, [False, True, True, False], [True] * 4])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.Identity])
def test_a_body_of_another_dtype(activation, executes):
    torch.manual_seed(0)
    line = [spnet.RoutedBlock(_Widened(4, 4), spnet.Router(4, 8), None, activation()) for _ in range(2)]
    model = settle(spnet.RoutedSequential(nn.Linear(4, 4), activation(), *line))
    x, paths = torch.ones(4, 4), torch.tensor([executes, executes[1:] + executes[:1]]).T
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (spnet.fast_forward(model, x, impl=i, paths=paths) for i in ("masked", "routed"))
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class _Double(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def test_a_skipped_body_of_another_dtype_outside_autocast():
    blocks = [
        spnet.RoutedBlock(_Double(4, 4).double(), spnet.Router(4, 8).to(t)) for t in (torch.float32, torch.float64)
    ]
    model = settle(spnet.RoutedSequential(nn.Linear(4, 4), *blocks, nn.Linear(4, 3).double()))
    for threshold in (math.inf, 0.0, -math.inf, math.inf):
        expected, got = (
            spnet.fast_forward(model, torch.ones(4, 4), impl=i, threshold=threshold) for i in ("masked", "routed")
        )
        torch.testing.assert_close(got, expected)


def test_a_body_of_one_number_per_channel_for_all_samples():
    line = [spnet.RoutedBlock(_Constant(1, 4, 1), spnet.Router(4, 8), None, nn.ReLU()) for _ in range(3)]
    for seed in range(5):
        torch.manual_seed(seed)
        _check(settle(spnet.RoutedSequential(nn.ReLU(), *line)), torch.randn(8, 4, 3) + 2 * torch.randn(8, 4, 1))


def test_a_body_of_one_number_per_channel():
    body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))
    line = [spnet.RoutedBlock(copy.deepcopy(body), spnet.Router(4, 8), None, nn.ReLU()) for _ in range(3)]
    model = settle(spnet.RoutedSequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *line))
    for seed in range(5):
        torch.manual_seed(seed)
        _check(model, torch.randn(8, 3, 5, 5) + 2 * torch.randn(8, 3, 1, 1))


def test_all_skipped_and_all_executed_are_exact(network):
    x = torch.randn(6, 1, 32, 32)
    for paths in (torch.zeros(6, 9, dtype=torch.bool), torch.ones(6, 9, dtype=torch.bool)):
        masked = spnet.fast_forward(network, x, impl="masked", paths=paths)
        assert torch.equal(spnet.fast_forward(network, x, impl="routed", paths=paths), masked)


class _Seen(TorchDispatchMode):
    """The operators that get to see a tensor of the whole batch's feature maps."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch, self.ops = batch, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        if any(t.dim() == 4 and len(t) == self.batch for t in tensors):
            self.ops.append(str(func))
        return out


def _line_with_mixed_decisions() -> tuple[nn.Module, Tensor, Tensor]:
    """A line of four identity blocks, an input, and its decisions: some samples skip and some execute each block."""
    for seed in range(1000):
        torch.manual_seed(seed)
        blocks = [
            spnet.RoutedBlock(nn.Conv2d(4, 4, 3, padding=1), spnet.Router(4, 8), None, nn.ReLU()) for _ in range(4)
        ]
        line = settle(spnet.RoutedSequential(nn.Conv2d(3, 4, 1), nn.ReLU(), *blocks))
        x = torch.randn(16, 3, 8, 8) + torch.randn(16, 3, 1, 1)
        decisions = spnet.fast_forward(line, x, impl="masked", return_paths=True)[1].decisions
        if 0 < decisions.sum(0).min() <= decisions.sum(0).max() < 16:
            return line, x, decisions
    raise AssertionError("no mixed decisions in 1000 networks")


@pytest.mark.parametrize("forced", [True, False])
def test_skipped_samples_of_identity_blocks_are_neither_read_nor_written(forced):
    line, x, decisions = _line_with_mixed_decisions()
    paths = decisions if forced else None
    with _Seen(16) as seen:
        spnet.fast_forward(line, x, impl="routed", paths=paths)
    names = [n for n in seen.ops if "convolution" not in n and n != "aten.relu.default"]  # the stem
    allowed = {"spnet.gather_rows.default", "spnet.scatter_add_rows_.default"}
    pools = [n for n in names if n not in allowed]
    # The first router reads every sample once; after that a pooled vector is renewed where a body ran.
    assert pools == ([] if forced else ["aten.mean.dim"])


def test_at_most_one_device_to_host_transfer_per_block(network):
    class Transfers(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            if any(s in name for s in ("compact", "nonzero", "_local_scalar_dense", "masked_select", "unique")):
                self.count += 1
            return func(*args, **(kwargs or {}))

    with Transfers() as transfers:
        spnet.fast_forward(network, torch.randn(7, 1, 32, 32), impl="routed")
    assert transfers.count == 9


def test_a_kept_intermediate_is_never_overwritten(network):
    x = torch.randn(6, 1, 32, 32)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name):
        def hook(module, args, output):
            kept[name] = (output, output.clone())

        return hook

    # Activations in place change a tensor that a hook on the module before it has kept, in any execution.
    for name, module in network.features.named_modules():
        if isinstance(module, spnet.RoutedBlock) or name == "stem":
            module.register_forward_hook(keep(name))
    spnet.fast_forward(network, x, impl="routed")
    assert len(kept) == 10
    assert all(torch.equal(held, was) for held, was in kept.values())


@pytest.mark.parametrize("part", ["shortcut", "activation"])
@pytest.mark.parametrize("activation", [None, nn.ReLU()])
@pytest.mark.parametrize("line", [nn.Sequential, spnet.RoutedSequential])
def test_a_hook_changes_what_a_part_returns(line, activation, part):
    blocks = [spnet.RoutedBlock(nn.Linear(4, 4), spnet.Router(4, 8), None, activation) for _ in range(3)]
    model = settle(line(nn.ReLU(), *copy.deepcopy(blocks)))  # an activation of its own each
    x, paths = torch.randn(8, 4), torch.rand(8, 3) < 0.5
    before = spnet.fast_forward(model, x, impl="masked", paths=paths)
    getattr(model[2], part).register_forward_hook(lambda module, args, y: 2 * y)
    expected = spnet.fast_forward(model, x, impl="masked", paths=paths)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(spnet.fast_forward(model, x, impl="routed", paths=paths), expected)


def test_the_modules_of_a_body_see_only_its_samples(network):
    sizes = []
    network.features.stage1[1].body.register_forward_hook(lambda m, args, y: sizes.append(len(args[0])))
    paths = torch.ones(6, 9, dtype=torch.bool)
    paths[:4, 1] = False
    spnet.fast_forward(network, torch.randn(6, 1, 32, 32), paths=paths)
    assert sizes == [2]
    paths[:, 1] = False
    spnet.fast_forward(network, torch.randn(6, 1, 32, 32), paths=paths)
    assert sizes == [2]


def test_a_block_that_does_not_run_has_executed_nothing():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (spnet.RoutedBlock(nn.Linear(4, 4), spnet.Router(4, 8)) for _ in range(2))

        def forward(self, x):
            return self.a(x)

    model = settle(Half())
    for impl in ("masked", "routed"):
        _, paths = spnet.fast_forward(model, torch.randn(5, 4), impl=impl, return_paths=True)
        assert not paths.decisions[:, 1].any()
