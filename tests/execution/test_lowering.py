"""Networks of others: what their forward computes is found by running it, and their plans are never stale either."""

import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spnet
from spnet.execution import kept, lowering
from spnet.routing import routed_blocks
from tests.conftest import SqueezeExcitation, settle


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 1)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != 2 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 2 * width, 1, stride), nn.BatchNorm2d(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """In the way of torchvision."""

    def __init__(self):
        super().__init__()
        self.norm_layer = nn.BatchNorm2d
        self.features = [{"stage": 1, "reduction": 4}]
        self.scale, self.drop_rate, self.activation = 1, 0.0, F.relu
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Bottleneck(8, 8, 1), Bottleneck(16, 8, 1))
        self.layer2 = nn.Sequential(Bottleneck(16, 12, 2), Bottleneck(24, 12, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(24, 5)

    def pooled(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.avgpool(self.layer2(self.layer1(x)))

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected a batch")
        x = F.dropout(torch.flatten(self.pooled(x), 1), self.drop_rate, self.training)
        x = self.fc(x)
        return x if self.scale == 1 else self.scale * x


class Basic(nn.Module):
    def __init__(self, channels: int, groups: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, groups=groups), nn.BatchNorm2d(channels), nn.ReLU()),
            nn.Identity(),
            nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Functional(nn.Module):
    """In the way of the early networks for CIFAR."""

    def __init__(self, groups: int = 1):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layers = nn.Sequential(Basic(16, groups), Basic(16, groups), Basic(16, groups), Basic(16, groups))
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.conv(x))))
        x = F.avg_pool2d(x, x.size()[2:])
        return self.linear(x.view(x.size(0), -1))


class Fused(Functional):
    """Whose BatchNorm has been folded, by others."""

    def __init__(self):
        super().__init__()
        self.bn = nn.Identity()
        for block in self.layers:
            block.body[0][1] = block.body[2][1] = nn.Identity()


class Named(Functional):
    """Its paddings by their names."""

    def __init__(self, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, "valid")
        for block in self.layers:
            block.body[0][0] = nn.Conv2d(16, 16, kernel, padding="same")


class Mean(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(torch.relu(self.bn(self.conv(x)))).mean([-1, -2]).contiguous())


class Functions(SqueezeExcitation):
    """In the way of torchvision, its factors the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)), inplace=True)
        return torch.sigmoid(self.expand(scale)) * x


class Linear(nn.Module):
    """In the way of the first ones."""

    def __init__(self, channels: int):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        layers = nn.Linear(channels, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, channels, bias=False)
        self.fc = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


class InPlace(SqueezeExcitation):
    def forward(self, x: Tensor) -> Tensor:
        x *= self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu_()).sigmoid_()
        return x


class Variant(ResNet):
    """ResNet-D: a deep stem, averages in the shortcuts; with squeeze-and-excitation behind each body."""

    def __init__(self, squeeze: type[nn.Module] = nn.Identity, pool: nn.Module | None = None, groups: int = 1):
        super().__init__()
        layers = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        layers += nn.Conv2d(6, 5, 3, 1, 1), nn.ReLU(), nn.Conv2d(5, 8, 3, 1, 1, bias=False)
        self.conv1 = nn.Sequential(*layers)
        strided, channels = self.layer2[0], self.layer2[0].conv3.out_channels
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pool is None else pool
        strided.downsample = nn.Sequential(pool, nn.Conv2d(16, channels, 1, bias=False), nn.BatchNorm2d(channels))
        strided.conv2 = nn.Conv2d(12, 12, 3, 2, 1, groups=groups)
        for block in (*self.layer1, *self.layer2):
            block.bn3 = nn.Sequential(block.bn3, squeeze(block.conv3.out_channels))


class PreActivation(nn.Module):
    """In the way of Wide ResNets: where its shape changes, both branches begin with the first BatchNorm and ReLU."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.dropout, self.equal = nn.Dropout(0.3), channels == width
        self.shortcut = None if self.equal else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        if not self.equal:
            x = out
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(out)))))
        return torch.add(x if self.equal else self.shortcut(x), out)


class WideResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.layers = nn.Sequential(
            PreActivation(8, 20, 1), PreActivation(20, 20, 1), PreActivation(20, 40, 2), PreActivation(40, 40, 1)
        )
        self.bn, self.relu, self.fc = nn.BatchNorm2d(40), nn.ReLU(inplace=True), nn.Conv2d(40, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.layers(self.conv(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class Grouped(WideResNet):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(40, 5, 1, groups=5)


class RoundedDown(Functional):
    """Of 3x3 pixels its shortcut averages four, which is added to all pixels of its body."""

    def __init__(self):
        super().__init__()
        self.layers = Bottleneck(16, 8, 2)
        self.layers.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 16, 1))


class Spreading(Functional):
    """Its maps of one pixel over several, which are no pooled vector."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.conv(x))).expand(-1, -1, 4, 3))
        return self.linear(x.mean((2, 3)))


class SpreadingBetween(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](F.relu(self.bn(self.conv(x))))
        return self.linear(self.layers[1:](x.expand(-1, -1, 4, 3)).mean((2, 3)))


class Enlarging(SqueezeExcitation):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * scale.expand(-1, -1, 3, 3)


class SpreadingInside(Functional):
    def __init__(self):
        super().__init__()
        for block in self.layers:
            block.body[1], block.body[2][0].stride = Enlarging(16), (3, 3)


class Hard(SqueezeExcitation):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()))


class Gated(SqueezeExcitation):
    """By a number for each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x).relu()).sigmoid()


class Later(SqueezeExcitation):
    """Scales another map than the one whose averages it takes."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        Double.apply(x)
        return x * scale


class Spread(SqueezeExcitation):
    """Over the channels of one pixel, which are as many as the map has pixels in a row."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * scale.view(1, 1, 1, -1)[..., : x.shape[3]]


class Single(SqueezeExcitation):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True))).sigmoid()


class Axis(SqueezeExcitation):
    """As NumPy would have it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(torch.mean(x, axis=(2, 3), keepdim=True)).relu()).sigmoid()


class One(SqueezeExcitation):
    """A number for all channels."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.expand = nn.Conv2d(3, 1, 1)


class Mixing(SqueezeExcitation):
    """By a convolution with groups."""

    def __init__(self, channels: int):
        super().__init__(channels, 4)
        self.expand = nn.Conv2d(4, channels, 1, groups=2)


def routed(network: nn.Module) -> nn.Module:
    return settle(spnet.convert(network))


@pytest.fixture
def model() -> nn.Module:
    return routed(ResNet())


def agrees(model: nn.Module, x: Tensor, **options) -> None:
    expected = spnet.fast_forward(model, x, impl="masked", **options)
    got = spnet.fast_forward(model, x, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("size", [(32, 32), (45, 31)])
@pytest.mark.parametrize(
    ("make", "impl"),
    [
        (ResNet, "walk"),
        (Functional, "walk"),
        (Mean, "walk"),
        (Fused, "walk"),
        (Named, "batch"),
        (lambda: Functional(4), "walk"),
        (Variant, "walk"),
        (lambda: Variant(SqueezeExcitation), "walk"),
        (lambda: Variant(Functions), "walk"),
        (lambda: Variant(Linear), "walk"),
        (lambda: Variant(InPlace, groups=3), "walk"),
        (WideResNet, "walk"),
    ],
)
def test_networks_of_others(make, impl, size, tmp_path):
    model, x = routed(make()), torch.randn(5, 3, *size)
    assert spnet.explain(model, x).impl == impl
    agrees(model, x)
    agrees(model, x, paths=torch.rand(5, 4) < 0.5)
    with torch.inference_mode():
        agrees(routed(make()), x)
    assert spnet.fast_forward(model, x[:0]).shape == (0, 5)
    plan = spnet.lower(model, (3, *size))
    assert torch.equal(plan(x), spnet.fast_forward(model, x))
    plan.save(tmp_path / "plan")
    assert torch.equal(spnet.load_plan(tmp_path / "plan")(x), plan(x))
    assert torch.equal(spnet.lower(torch.compile(model, backend="eager"), (3, *size))(x), plan(x))
    assert plan.macs.dense == spnet.fast_forward(model, x, return_paths=True, impl="masked")[1].dense_macs


def test_a_network_that_was_compiled_in_place(model):
    x = torch.randn(3, 3, 32, 32)
    model.compile(backend="eager")
    assert spnet.explain(model, x).impl == "walk"
    agrees(model, x)


def assert_compiles() -> None:
    graphs = []
    torch.compile(lambda x: x + 1, backend=lambda graph, inputs: graphs.append(graph) or graph)(torch.zeros(1))
    assert len(graphs) == 1


def test_compilation_goes_on_after_a_network_of_compiled_parts(model):
    for part in (model.layer1, model.layer2):
        part.compile(backend="eager")
    spnet.lower(model, (3, 32, 32))
    with pytest.raises(spnet.LoweringError, match="training mode"):
        spnet.lower(model.train(), (3, 32, 32))
    assert_compiles()


def test_compilation_goes_on_after_two_threads(model, monkeypatch):
    model.layer1.compile(backend="eager")
    number, active = itertools.count(), lowering.active
    second_is_in, one_is_out = threading.Event(), threading.Event()

    def overlapping(run):
        if next(number) == 0:
            second_is_in.wait(1)  # in vain where it waits outside
        else:
            second_is_in.set()
            one_is_out.wait(60)
        return active(run)

    def lower(_) -> None:
        spnet.lower(model, (3, 32, 32))
        one_is_out.set()

    monkeypatch.setattr(lowering, "active", overlapping)
    with ThreadPoolExecutor(2) as executor:
        list(executor.map(lower, range(2)))
    try:
        assert_compiles()
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize("make", [ResNet, lambda: Variant(Functions), lambda: Variant(Linear)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make, dtype):
    model = routed(make())
    x, paths = torch.randn(4, 3, 32, 32), torch.rand(4, 4) < 0.5
    expected = spnet.fast_forward(model, x, paths=paths)
    got = spnet.fast_forward(model.to(dtype), x.to(dtype), paths=paths)
    assert spnet.explain(model, x.to(dtype)).impl == "walk"
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


class Precise(ResNet):
    """With a head of float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(x).flatten(1).to(torch.float32)).to(x.dtype)


def test_a_head_of_another_precision():
    model, x = routed(Precise()).bfloat16(), torch.randn(3, 3, 32, 32).bfloat16()
    model.fc.float()
    assert spnet.lower(model, (3, 32, 32)).dtype == spnet.fast_forward(model, x).dtype == torch.bfloat16


def _scale(model):
    model.scale = 2


def _write_list(model):
    model.features[0]["stage"] = 2


def _write_weight(model):
    model.layer1[0].body[0].weight.data.mul_(2)


def _replace_layer(model):
    model.fc = nn.Linear(24, 5).eval()


@pytest.mark.parametrize(
    ("change", "lowered"), [(_scale, 1), (_write_list, 2), (_write_weight, 2), (_replace_layer, 2)]
)
def test_the_plan_follows_the_model(model, monkeypatch, change, lowered):
    """Also where what has changed decides what the forward does."""
    calls, x, paths = [], torch.randn(3, 3, 32, 32), torch.ones(3, 4, dtype=torch.bool)
    monkeypatch.setattr(kept, "assemble", lambda *args: calls.append(1) or lowering.assemble(*args))
    agrees(model, x, paths=paths)
    agrees(model, x, paths=paths)
    assert len(calls) == 1
    change(model)
    agrees(model, x, paths=paths)
    assert len(calls) == lowered


class Counting(ResNet):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Branching(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class Looking(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.equal(x, x) else x


class Skipping(ResNet):
    def pooled(self, x: Tensor) -> Tensor:
        F.relu(x)
        return super().pooled(x)


class Double(torch.autograd.Function):
    """Of another library, in place: no function of PyTorch's is called."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        with torch._C.DisableTorchFunction():
            return x.mul_(2)


class Unseen(ResNet):
    def pooled(self, x: Tensor) -> Tensor:
        x = self.maxpool(Double.apply(self.relu(self.bn1(self.conv1(x)))))
        return self.avgpool(self.layer2(self.layer1(x)))


class Twice(ResNet):
    def pooled(self, x: Tensor) -> Tensor:
        y = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.avgpool(self.layer2(y)) + self.avgpool(y).repeat(1, 2, 1, 1)[:, :24]


class Half(ResNet):
    def pooled(self, x: Tensor) -> Tensor:
        return super().pooled(x)[:, :12].repeat(1, 2, 1, 1)


class Dropping(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(self.pooled(x).flatten(1), 0.5))


class Wider(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(torch.float64)


class Narrower(ResNet):
    def pooled(self, x: Tensor) -> Tensor:
        return super().pooled(x).to(torch.float16).to(x.dtype)


class Whole(ResNet):
    def pooled(self, x: Tensor) -> Tensor:
        return super().pooled(x).to(torch.int32).to(x.dtype)


class Rounding(ResNet):
    def pooled(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer2(self.layer1(x)).mean((2, 3), dtype=torch.bfloat16).to(x.dtype)


class Shaped(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 5, 1, 1)


class Both(ResNet):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pooled(x)
        return self.fc(x.flatten(1)), x


class Foreign(ResNet):
    def __init__(self):
        super().__init__()
        self.fc = nn.Identity()
        self.weights = torch.randn(5, 24), torch.randn(5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.pooled(x).flatten(1), *self.weights)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Branching, "the stem calls mean, but not over all pixels"),
        (Looking, "the stem calls equal, which no plan computes"),
        (Skipping, "the stem is no line of layers: conv2d takes another tensor than the last one"),
        (Unseen, "the stem is no line of layers: max_pool2d takes another"),
        (Twice, "the head is no line of layers: adaptive_avg_pool2d takes another"),
        (Half, "the head calls __getitem__"),
        (Dropping, "the head calls dropout, which does more than flatten"),
        (Narrower, "the head calls to, which rounds torch.float32 to torch.float16"),
        (Whole, "the head calls to, which rounds torch.float32 to torch.int32"),
        (Rounding, "the head calls mean, which rounds torch.float32 to torch.bfloat16"),
        (Wider, "Wider does not return logits .* of its weights' dtype"),
        (Shaped, r"Shaped does not return logits \[B, classes\]"),
        (Both, "Both returns another tensor than its last layer"),
        (Foreign, "the head calls linear with a tensor that is no parameter or buffer"),
        *(
            (lambda pool=pool: Variant(pool=pool), "the shortcut of block 2 calls avg_pool2d, but not over all pixels")
            for pool in (nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, divisor_override=3))
        ),
        (
            lambda: Variant(pool=nn.AdaptiveAvgPool2d(4)),
            "the shortcut of block 2 calls adaptive_avg_pool2d, but not over all pixels",
        ),
        pytest.param(
            lambda: Named(2),
            "the body of block 0 has a convolution that is not square, undilated and evenly zero-padded",
            marks=pytest.mark.filterwarnings("ignore:Using padding='same'"),
        ),
        (Grouped, "the network does not end with the average over all pixels and a linear layer"),
        (lambda: Variant(Hard), "the body of block 0 calls hardsigmoid, which no plan computes"),
        (lambda: Variant(Axis), "the body of block 0 calls mean as no plan computes it: .* 'axis'"),
        (lambda: Variant(Gated), "the body of block 0 calls mul, but not to scale a map by what its averages say"),
        (lambda: Variant(Later), "the body of block 0 calls mul, but not to scale a map by what its averages say"),
        (lambda: Variant(One), "the body of block 0 calls mul, but not to scale a map by what its averages say"),
        (lambda: Variant(Spread), "the body of block 0 calls view, which does more than flatten"),
        (lambda: Variant(Single), "the body of block 0 is not a chain of convolutions"),
        (lambda: Variant(Mixing), "the body of block 0 has a squeeze-and-excitation that is not of two linear layers"),
    ],
)
def test_what_is_no_line_is_routed(make, reason):
    model, x = routed(make()), torch.randn(3, 3, 32, 32)
    with pytest.raises(spnet.LoweringError, match=reason):
        spnet.lower(model, (3, 32, 32))
    if make not in (Dropping, Both):
        agrees(model, x)
    assert spnet.explain(model, x).impl == "routed"


def test_averages_that_leave_pixels_out():
    model = routed(RoundedDown())
    agrees(model, torch.randn(3, 3, 4, 6))
    message = "the shortcut of block 0 calls avg_pool2d, .* nor over squares side by side that leave no pixel out"
    with pytest.raises(spnet.LoweringError, match=message):
        spnet.lower(model, (3, 3, 3))


def test_a_body_and_a_shortcut_of_other_sizes():
    block = spnet.RoutedBlock(nn.Conv2d(1, 4, 3, 1, 1), spnet.Router(1, 6), activation=nn.ReLU())
    layers = nn.Conv2d(3, 1, 3), nn.ReLU(), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    with pytest.raises(spnet.LoweringError, match=r"block 0 adds a body of \[4, 5, 6\] to a shortcut of \[1, 5, 6\]"):
        spnet.lower(settle(nn.Sequential(*layers)), (3, 7, 8))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Spreading, "the stem is not a chain of convolutions"),
        (SpreadingBetween, "what comes before block 1 is not a chain of convolutions"),
        (SpreadingInside, "the body of block 0 calls mul, but not to scale a map by what its averages say"),
    ],
)
def test_a_map_of_one_pixel_is_no_pooled_vector(make, reason):
    model = routed(make())
    agrees(model, torch.randn(3, 3, 1, 1))
    with pytest.raises(spnet.LoweringError, match=reason):
        spnet.lower(model, (3, 1, 1))


def test_a_forward_that_changes_its_attributes_is_routed():
    model, x = routed(Counting()), torch.randn(3, 3, 32, 32)
    agrees(model, x)
    before = model.calls
    spnet.fast_forward(model, x)
    assert model.calls > before
    with pytest.raises(ValueError, match="impl: 'walk' does not fit .* the forward of Counting changes its attributes"):
        spnet.fast_forward(model, x, impl="walk")


def test_what_may_change_unseen_is_routed(model):
    x = torch.randn(3, 3, 32, 32)
    model.options = object()
    with pytest.raises(ValueError, match="attribute 'options' of a ResNet may change unseen"):
        spnet.fast_forward(model, x, impl="walk")
    agrees(model, x)
    assert spnet.explain(model, x).impl == "routed"
    assert spnet.lower(model, (3, 32, 32)).impl == "walk"  # a plan that nobody compares
    del model.options
    assert spnet.explain(model, x).impl == "walk"


class Doubled(nn.Parameter):
    """A weight that is not what a convolution by it says."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return 2 * result if func is F.conv2d else result


def test_weights_with_functions_of_their_own_are_routed(model):
    x = torch.randn(3, 3, 32, 32)
    agrees(model, x)
    model.conv1.weight = Doubled(model.conv1.weight.detach())
    agrees(model, x)
    with pytest.raises(spnet.LoweringError, match="a weight is a Doubled, whose functions may not be PyTorch's"):
        spnet.lower(model, (3, 32, 32))


def test_what_does_not_fit_is_looked_at_once(monkeypatch):
    model, x, calls = routed(Half()), torch.randn(3, 3, 32, 32), []
    monkeypatch.setattr(kept, "read", lambda *args: calls.append(1) or lowering.read(*args))
    for _ in range(3):
        spnet.fast_forward(model, x)
    assert len(calls) == 1
    model.scale = 1.0
    spnet.fast_forward(model, x)
    assert len(calls) == 2
    spnet.fast_forward(model, torch.randn(3, 3, 40, 40))
    assert len(calls) == 3


@pytest.mark.parametrize("make", [ResNet, Half])
def test_neither_plan_nor_refusal_keeps_its_model(make):
    model = routed(make())
    spnet.fast_forward(model, torch.randn(2, 3, 32, 32))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_images_of_several_shapes(model, monkeypatch):
    calls = []
    monkeypatch.setattr(kept, "assemble", lambda *args: calls.append(1) or lowering.assemble(*args))
    sizes = range(32, 32 + kept.MOST_SHAPES + 2)
    for _ in range(2):
        for size in sizes:
            agrees(model, torch.randn(2, 3, size, 32))
    assert len(calls) == kept.MOST_SHAPES
    assert "plans for images of 4 other shapes are kept" in str(spnet.explain(model, torch.randn(2, 3, 37, 32)))


class Failing(ResNet):
    error: list[Exception] = []

    def pooled(self, x: Tensor) -> Tensor:
        if self.error:
            raise self.error[0]
        return super().pooled(x)


def test_a_failure_is_no_refusal(monkeypatch):
    """Of memory on the CPU, for one: PyTorch raises a RuntimeError there."""
    model, x = routed(Failing()), torch.randn(2, 3, 32, 32)
    for error in (RuntimeError("can't allocate memory"), MemoryError()):
        monkeypatch.setattr(Failing, "error", [error])
        with pytest.raises((RuntimeError, MemoryError)):
            spnet.fast_forward(model, x)
    monkeypatch.setattr(Failing, "error", [])
    assert spnet.explain(model, x).impl == "walk"


def test_an_image_that_the_network_does_not_take(model):
    for x in (torch.randn(2, 4, 32, 32), torch.randn(2, 3)):
        with pytest.raises((RuntimeError, AssertionError)):
            spnet.fast_forward(model, x)
        with pytest.raises(ValueError, match="impl: 'walk' does not fit this model: "):
            spnet.fast_forward(model, x, impl="walk")
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        spnet.fast_forward(model, [1.0])
    with pytest.raises(ValueError, match="x: expected torch.float32"):
        spnet.fast_forward(model, torch.randn(2, 3, 32, 32).double())


def test_calibrated_for_its_images():
    model, x = routed(Functional(4)), torch.randn(6, 3, 16, 16)
    plan = spnet.calibrate(model, [x, x])
    assert plan.input_shape == (3, 16, 16)
    assert torch.equal(plan.rates, plan(x, return_paths=True)[1].decisions.float().mean(0))


def test_lowering_beside_other_threads(model):
    """What is noted is what this thread calls."""
    other, stop, failures = routed(Functional()), threading.Event(), []
    x = torch.randn(2, 3, 32, 32)
    expected = other(x)

    def run():
        while not stop.is_set():
            if not torch.equal(other(x), expected):
                failures.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(20):
            assert spnet.lower(model, (3, 32, 32)).num_blocks == len(routed_blocks(model))
    finally:
        stop.set()
        thread.join()
    assert not failures
