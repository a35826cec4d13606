"""Shared by all tests: small networks whose routers really route."""

import copy
import math
import os
from collections.abc import Collection

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

import spnet
from spnet.routing import routed_blocks

# Examples run whole networks, whose first call is slow; no deadline, and the same examples on every run.
settings.register_profile("spnet", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("spnet")

# The networks of the tests are too small to share between cores; what threads change is tested by name.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_runtest_logfinish():
    """A kernel that fails ends CUDA in its process: pytest-xdist goes on in another, where no more tests fail by it."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def settle(model: nn.Module, bias: float = 0.0, spread: float = 1.0) -> nn.Module:
    """Give a fresh network the statistics and the router spread that a trained one has; evaluation mode.

    Args:
        bias: of the execute logits over the skip logits; 0 executes about half.
        spread: scale of the router logits.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1, generator=generator)
                m.running_var.uniform_(0.5, 1.5, generator=generator)
            if isinstance(m, spnet.Router):
                m.fc2.weight.normal_(0, spread, generator=generator)
                m.fc2.bias.copy_(torch.tensor([0.0, bias]))
    return model.eval()


class SqueezeExcitation(nn.Module):
    """In the way of timm."""

    def __init__(self, channels: int, width: int = 3):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


VARIANTS = ("deep stem", "averages", "groups", "squeeze", "preactivation")


def vary(model: spnet.models.SPNet, variants: Collection[str]) -> spnet.models.SPNet:
    """What ResNet-D, ResNeXt, SE-ResNet, RegNetY and ResNetV2 have beyond a ResNet; of VARIANTS, in place."""
    if "deep stem" in variants:
        first, pool = model.features.stem[:3], model.features.stem[3:]
        channels = first[0].out_channels
        more = nn.Conv2d(channels, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, channels, 3, 1, 1), nn.ReLU()
        model.features.stem = nn.Sequential(*first, *more, *pool)
    for number, block in enumerate(routed_blocks(model).values()):
        convolutions = [layer for layer in block.body if isinstance(layer, nn.Conv2d)]
        channels = convolutions[0].in_channels, convolutions[-1].out_channels
        if "averages" in variants and channels[0] != channels[1]:
            pool = nn.AvgPool2d(math.prod(layer.stride[0] for layer in convolutions), ceil_mode=True)
            block.shortcut = nn.Sequential(pool, nn.Conv2d(*channels, 1), nn.BatchNorm2d(channels[1]))
        if "groups" in variants:
            for place, layer in enumerate(block.body):
                if isinstance(layer, nn.Conv2d):
                    sizes = layer.in_channels, layer.out_channels
                    groups = math.gcd(*sizes, (2, 8, 64)[number % 3])
                    block.body[place] = nn.Conv2d(*sizes, layer.kernel_size, layer.stride, layer.padding, groups=groups)
        if "squeeze" in variants:
            place = (3, len(block.body))[number % 2]
            block.body.insert(place, SqueezeExcitation(convolutions[-(number % 2)].out_channels))
    if "preactivation" in variants:
        stem = model.features.stem
        del stem[max(i for i, layer in enumerate(stem) if isinstance(layer, nn.ReLU))]
        for stage in model.stages:
            for block in list(stage):
                channels = block.body[0].in_channels
                block.activation = nn.Identity()
                # A projection reads what the body does.
                place = (
                    (block.body, 0) if isinstance(block.shortcut, nn.Identity) else (stage, list(stage).index(block))
                )
                place[0].insert(place[1], nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()))
        channels = next(layer for layer in reversed(block.body) if isinstance(layer, nn.Conv2d)).out_channels
        stage.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()))
    return model


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def margins(model: nn.Module, x: Tensor) -> Tensor:
    """|z_execute - z_skip| of every block, [B, L], along the masked model's paths."""
    found = []
    handles = [
        b.router.register_forward_hook(lambda m, i, z: found.append((z[:, 1] - z[:, 0]).abs()))
        for b in routed_blocks(model).values()
    ]
    with torch.no_grad():
        spnet.fast_forward(model, x, impl="masked")
    for h in handles:
        h.remove()
    return torch.stack(found, 1)


def assert_as_exact_as_masked(got: Tensor, model: nn.Module, x: Tensor, paths: Tensor) -> None:
    """The contract of half precision: at most twice the error of ``masked`` in the model's dtype, and one rounding.

    Args:
        got: logits of the first samples of x; the error of masked is that of all of x.
        x: several samples, whose logits are several too. Of few numbers masked may have a small error by luck.
    """
    truth = spnet.fast_forward(copy.deepcopy(model).double(), x.double(), impl="masked", paths=paths)
    masked = spnet.fast_forward(model, x, impl="masked", paths=paths)
    rounding = torch.finfo(masked.dtype).eps * truth.abs().max()
    allowed = 2 * (masked.double() - truth).abs().max() + rounding
    assert (got.double() - truth[: len(got)]).abs().max() <= allowed


@pytest.fixture
def network():
    """resnet20_cifar with one input channel, deciding about half of its blocks."""
    return settle(spnet.create_model("resnet20_cifar", in_channels=1))


@pytest.fixture
def other_defaults():
    """PyTorch makes float64 tensors, without memory, where nothing else is asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        yield
    torch.set_default_dtype(before)
