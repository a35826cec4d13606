"""Multiply-accumulates against formulas by hand and against PyTorch's own counter."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spnet
from spnet.analysis.macs import count_macs, format_macs, mega


def conv(kernel: int, in_channels: int, out_channels: int, side: int) -> int:
    """MACs of a square convolution with an output of side x side."""
    return kernel * kernel * in_channels * out_channels * side * side


def router(channels: int) -> int:
    return channels * 128 + 128 * 2


def router_parameters(channels: int) -> int:
    return (channels * 128 + 128) + 2 * 128 + (128 * 2 + 2)


def small(**kwargs) -> spnet.SPNet:
    return spnet.SPNet([2, 2], [4, 8], num_classes=3, in_channels=2, input_size=8, **kwargs).eval()


SMALL_SHAPE = (2, 8, 8)


@pytest.mark.parametrize(("name", "n"), [("resnet20_cifar", 3), ("resnet110_cifar", 18)])
def test_cifar_network_by_hand(name, n):
    macs = count_macs(spnet.create_model(name).eval(), (3, 32, 32))
    rows, channels = iter(macs.blocks), 16
    expected = conv(3, 3, 16, 32) + 64 * 10
    for s, (width, side) in enumerate([(16, 32), (32, 16), (64, 8)]):
        for i in range(n):
            row = next(rows)
            body = conv(3, channels, width, side) + conv(3, width, width, side)
            assert (row.name, row.body, row.shortcut, row.router) == (
                f"features.stage{s + 1}.{i}",
                body,
                0,
                router(channels),
            )
            convolutions = 9 * (channels + width) * width + 2 * 2 * width  # with two BatchNorms
            assert row.parameters == convolutions + router_parameters(channels)
            expected += body + router(channels)
            channels = width
    assert macs.dense == expected
    assert macs.flops == 2 * expected


def test_dense_resnet110_is_0_253_gmac():
    assert round(count_macs(spnet.create_model("resnet110_cifar").eval(), (3, 32, 32)).dense / 1e9, 3) == 0.253


def test_resnet50_by_hand():
    macs = count_macs(spnet.create_model("resnet50").eval(), (3, 224, 224))
    rows, channels, in_side = iter(macs.blocks), 64, 56
    expected = conv(7, 3, 64, 112) + 2048 * 1000
    for s, (n, width, side) in enumerate([(3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)]):
        for i in range(n):
            row = next(rows)
            body = conv(1, channels, width, in_side) + conv(3, width, width, side) + conv(1, width, 4 * width, side)
            shortcut = conv(1, channels, 4 * width, side) if i == 0 else 0
            assert (row.name, row.body, row.shortcut, row.router) == (
                f"features.stage{s + 1}.{i}",
                body,
                shortcut,
                router(channels),
            )
            expected += body + shortcut + router(channels)
            channels, in_side = 4 * width, side
    assert macs.dense == expected
    assert next(rows, None) is None


def flop_counter(model: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    return counter.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"bottleneck": True}, {"imagenet": True}, {"shortcut": "projection"}])
def test_equals_torchs_flop_counter(options):
    static, routed = small(routed=False, **options), small(**options)
    macs = count_macs(routed, SMALL_SHAPE)
    assert count_macs(static, SMALL_SHAPE).flops == flop_counter(static, SMALL_SHAPE)
    assert macs.flops == flop_counter(routed, SMALL_SHAPE)
    assert macs.flops == flop_counter(static, SMALL_SHAPE) + 2 * sum(b.router for b in macs.blocks)
    for name, block in routed.named_modules():
        if isinstance(block, spnet.RoutedBlock):
            row = next(b for b in macs.blocks if b.name == name)
            assert row.parameters == sum(p.numel() for p in block.parameters())
    assert macs.parameters == sum(p.numel() for p in routed.parameters())
    assert count_macs(static, SMALL_SHAPE).blocks == ()


def test_cost_of_paths():
    macs = count_macs(small(), SMALL_SHAPE)
    bodies = [b.body for b in macs.blocks]
    decisions = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    decisions[0], decisions[1] = True, False
    costs = macs.of_paths(decisions)
    assert costs.dtype == torch.int64
    fixed = macs.dense - sum(bodies)
    assert costs.tolist() == [
        fixed + sum(b for b, d in zip(bodies, row, strict=True) if d) for row in decisions.tolist()
    ]
    assert costs[0] == macs.dense
    assert macs.of_paths(decisions[:0]).shape == (0,)


def test_what_the_routers_decide_does_not_matter():
    model = small()
    before = count_macs(model, SMALL_SHAPE)
    fresh = small()
    for block in [*fresh.stages[0], *fresh.stages[1]]:
        block.router.fc2.bias.data = torch.tensor([1000.0, 0.0])
    assert not spnet.fast_forward(fresh, torch.zeros(1, *SMALL_SHAPE), return_paths=True)[1].decisions.any()
    assert count_macs(fresh, SMALL_SHAPE) == before


class Repeated(nn.Conv2d):
    """A 3x3 convolution applied several times: the same weights, another cost."""

    def __init__(self, times: int, channels: int = 4):
        super().__init__(channels, channels, 3, padding=1, bias=False)
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = super().forward(x)
        return x


def test_kept_result_follows_the_structure():
    model = small()
    first = count_macs(model, SMALL_SHAPE)
    assert count_macs(model, SMALL_SHAPE) is first
    for times in range(1, 8):
        model.features.stage1[1].body = None  # so that the new one gets its memory, and with it its id
        model.features.stage1[1].body = Repeated(times).eval()
        macs = count_macs(model, SMALL_SHAPE)
        assert macs.blocks[1].body == times * conv(3, 4, 4, 8)
        assert macs.dense == first.dense - first.blocks[1].body + macs.blocks[1].body


def test_kept_result_follows_weights_of_another_shape():
    model = small()
    first, second = model.features.stage1[1].body[0], model.features.stage1[1].body[3]
    model.features.stage1[1].body = nn.Sequential(first, second).eval()
    count_macs(model, SMALL_SHAPE)
    first.weight, second.weight = nn.Parameter(first.weight[:2]), nn.Parameter(second.weight[:, :2])
    assert count_macs(model, SMALL_SHAPE).blocks[1].body == 2 * conv(3, 4, 2, 8)


class Twice(Repeated):
    times = 2


def test_kept_result_follows_attributes_and_classes():
    model, x = small(), torch.zeros(1, *SMALL_SHAPE)
    first, second = model.features.stage1[1].body[::3]
    first.padding, second.padding = [1, 1], (1, 1)
    one = conv(3, 4, 4, 8)
    before = count_macs(model, SMALL_SHAPE).dense

    def changed():
        costs = [spnet.fast_forward(model, x, impl=i, return_paths=True)[1] for i in ("masked", "routed", "batch")]
        (dense,) = {paths.dense_macs for paths in costs}
        return dense - before

    first.padding[:], second.padding = [2, 2], (0, 0)
    assert changed() == conv(3, 4, 4, 10) - one
    first.padding[:], second.padding = [1, 1], (1, 1)
    assert changed() == 0
    second.__class__ = Twice
    assert count_macs(model, SMALL_SHAPE).dense - before == one


def test_kept_result_follows_the_size_of_the_input():
    model = nn.Sequential(nn.Conv2d(2, 3, 1)).eval()
    assert [count_macs(model, (2, side, side)).dense for side in (4, 8, 4)] == [conv(1, 2, 3, s) for s in (4, 8, 4)]


def test_counting_keeps_no_model_alive():
    model = small()
    count_macs(model, SMALL_SHAPE)
    weak = weakref.ref(model)
    del model
    gc.collect()
    assert weak() is None


def test_blocks_anywhere_in_a_network_of_someone_else():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = spnet.RoutedBlock(nn.Linear(6, 6), spnet.Router(6, width=5))
            self.inner = nn.ModuleDict({"a": spnet.RoutedBlock(nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 6))})
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.inner["a"](x))

    macs = count_macs(Net().eval(), (6,))
    assert [(b.name, b.body, b.shortcut, b.router) for b in macs.blocks] == [
        ("unused", 0, 0, 0),
        ("inner.a", 36, 36, 12),
    ]
    assert macs.dense == 36 + 36 + 12 + 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    assert count_macs(small().to(dtype), SMALL_SHAPE) == count_macs(small(), SMALL_SHAPE)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Linear(6, 2)

    def forward(self, x):
        return self.logits(x[:, 0])


def test_a_sample_of_tokens():
    blocks = (spnet.RoutedBlock(nn.Linear(6, 6), Tokens()) for _ in range(2))
    model = nn.Sequential(nn.Embedding(20, 6), *blocks, nn.Flatten(), nn.Linear(24, 3)).eval()
    macs = count_macs(model, (4,), torch.int64)
    assert [(b.body, b.router) for b in macs.blocks] == [(4 * 36, 12)] * 2
    assert macs.dense == 2 * (4 * 36 + 12) + 24 * 3
    tokens = torch.randint(20, (5, 4))
    for impl in ("masked", "routed"):
        _, paths = spnet.fast_forward(model, tokens, impl=impl, return_paths=True)
        assert torch.equal(paths.macs, macs.of_paths(paths.decisions))
    assert torch.equal(spnet.paths(model, tokens).macs, paths.macs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers(kind, directions):
    steps, width, gates = 10, 6, {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    model = kind(8, width, num_layers=2, batch_first=True, bidirectional=directions == 2)
    by_layer = gates * width * (8 + width) + gates * width * (directions * width + width)
    assert count_macs(model.eval(), (steps, 8)).dense == steps * directions * by_layer


def test_recurrent_layers_of_cudnn():
    class Cudnn(nn.LSTM):
        def forward(self, x):
            h, hidden = x.new_empty(1, len(x), self.hidden_size), self.hidden_size
            how = 2, hidden, 0, 1, True, 0.0, False, False, [], None  # 2 is an LSTM
            return torch.ops.aten._cudnn_rnn(x, self._flat_weights, 4, None, h, h, *how)[0]

    model = Cudnn(8, 6, batch_first=True, device="meta").eval()
    assert count_macs(model, (10, 8)).dense == 10 * 24 * (8 + 6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
def test_operators_of_unknown_cost_are_warned_of():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear}, torch.qint8).eval()
    with pytest.warns(UserWarning, match="model: the cost of quantized.linear_dynamic.default is not known"):
        count_macs(model, (4,))


def test_under_inference_mode():
    expected = count_macs(small(), SMALL_SHAPE)
    with torch.inference_mode():
        assert count_macs(small(), SMALL_SHAPE) == expected


def test_attention_that_has_a_fast_path():
    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    samples, width = 10, 8
    expected = 4 * samples * width**2 + 2 * samples**2 * width  # projections; scores and their use
    assert count_macs(Attention(width, 2, batch_first=True).eval(), (samples, width)).dense == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_compiled_model_counts_as_the_model_in_it():
    class Wrapper(nn.Module):  # what torch.compile makes, without the seconds that importing the compiler takes
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

    model = small()
    assert count_macs(Wrapper(model), SMALL_SHAPE) is count_macs(model, SMALL_SHAPE)


def test_training_mode_is_refused_and_leaves_the_model_alone():
    model = small().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="model: expected evaluation mode"):
        count_macs(model, SMALL_SHAPE)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_forwards_of_other_threads_are_not_counted():
    model, stop = small(), threading.Event()
    expected = count_macs(small(), SMALL_SHAPE)
    x = torch.zeros(1, *SMALL_SHAPE)

    def work():
        while not stop.is_set():
            spnet.fast_forward(model, x)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        counts = [count_macs(small(), SMALL_SHAPE) for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert all(c == expected for c in counts)


def test_table():
    macs = count_macs(small(), SMALL_SHAPE)
    table = format_macs(macs)
    lines = table.splitlines()
    assert lines[0].split() == ["block", "body", "shortcut", "router"]
    assert lines[1].split() == ["MMACs", "MMACs", "MMACs", "parameters"]
    for line, block in zip(lines[2:], macs.blocks, strict=False):
        name, body_macs, shortcut, router_macs, parameters = line.split()
        assert name == block.name
        assert float(body_macs) == pytest.approx(block.body / 1e6, abs=5e-4)
        assert float(shortcut) == pytest.approx(block.shortcut / 1e6, abs=5e-4)
        assert float(router_macs) == pytest.approx(block.router / 1e6, abs=5e-4)
        assert int(parameters.replace(",", "")) == block.parameters
    assert len({len(line) for line in lines[1:-1]}) == 1, "columns are aligned"
    assert f"{macs.parameters:,} parameters" in lines[-1]


def test_totals_name_macs_and_flops():
    total = format_macs(count_macs(spnet.create_model("resnet110_cifar").eval(), (3, 32, 32))).splitlines()[-1]
    assert "0.253 GMAC" in total
    assert "0.506 GFLOPs" in total
    assert "2 x MACs" in total


@pytest.mark.parametrize(
    ("macs", "digits", "text"),
    [
        (0, 4, "0"),
        (253_412_352, 4, "253.4"),
        (999_960_000, 4, "1000"),
        (15_610_499_999, 4, "15610"),
        (4.0892e9, 3, "4089"),
    ],
)
def test_millions_without_an_exponent(macs, digits, text):
    assert mega(macs, digits) == text


def test_table_of_a_static_network():
    assert "no routed blocks" in format_macs(count_macs(small(routed=False), SMALL_SHAPE))
