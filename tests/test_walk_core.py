"""The native walk against the formula in csrc/plan.h, written out in plain PyTorch."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spnet.native import core

IDENTITY, PAD, PROJECTION, POOLED = range(4)


@dataclass
class Block:
    cin: int
    mid: int
    cout: int
    stride: int = 1
    shortcut: int = IDENTITY
    pad_before: int = 0
    router_width: int = 16
    kernels: tuple[int, ...] = (3, 3)
    strided: int = 0  # the convolution that has the stride
    groups: tuple[int, ...] = (1, 1, 1)
    squeezes: tuple[int, ...] = (0, 0, 0)
    relus: tuple[int, ...] = (1, 1)  # between the convolutions
    norm: bool = False  # a BatchNorm with a ReLU comes first in the body
    relu: int = 1  # of the sum
    # cout, kernel, stride, groups and ReLU of the convolutions on every sample
    before: tuple[tuple[int, int, int, int, int], ...] = ()

    def convolutions(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """cin, cout, kernel, stride, groups, squeeze and ReLU of each one of the body."""
        n = len(self.kernels)
        widths = [self.cin] + [self.mid] * (n - 1) + [self.cout]
        strides = [self.stride if i == self.strided else 1 for i in range(n)]
        relus = *self.relus[: n - 1], 0
        rows = zip(widths[:-1], widths[1:], self.kernels, strides, self.groups, self.squeezes, relus, strict=False)
        return [(self.cin, self.cin, 1, 1, self.cin, 0, 1)] * self.norm + list(rows)


def linked(cin: int, convolutions) -> list[tuple[int, int, int, int, int, int, int]]:
    """As Block.convolutions, of (cout, kernel, stride, groups, ReLU)."""
    rows = []
    for cout, kernel, stride, groups, relu in convolutions:
        rows.append((cin, cout, kernel, stride, groups, 0, relu))
        cin = cout
    return rows


@dataclass
class Network:
    """Sizes and random weights, and what they mean."""

    in_channels: int
    size: tuple[int, int]
    stem: int
    blocks: list[Block]
    classes: int = 10
    seed: int = 0
    stem_kernel: int = 3
    stem_stride: int = 1
    stem_groups: int = 1
    pool: tuple[int, int, int] = (0, 0, 0)
    stem_relu: int = 1
    # cout, kernel, stride, groups and ReLU of more convolutions: of the stem, and behind the blocks
    deeper: tuple[tuple[int, int, int, int, int], ...] = ()
    after: tuple[tuple[int, int, int, int, int], ...] = ()
    weights: list[Tensor] = field(init=False)

    def __post_init__(self):
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=g) * scale

        def conv(cin, cout, k=3, groups=1):
            cin //= groups
            return [normal(cout, cin, k, k, scale=(cin * k * k) ** -0.5), normal(cout, scale=0.1)]

        def linear(cin, cout):
            return [normal(cout, cin, scale=cin**-0.5), normal(cout, scale=0.1)]

        def chain(convolutions):
            for cin, cout, kernel, _, groups, squeeze, _ in convolutions:
                self.weights += conv(cin, cout, kernel, groups)
                if squeeze:
                    self.weights += linear(cout, squeeze) + linear(squeeze, cout)

        self.weights = []
        chain(self.stem_convolutions())
        channels = self.stem_convolutions()[-1][1]
        for b, before in zip(self.blocks, self.between(), strict=False):
            chain(before)
            chain(b.convolutions())
            if b.shortcut in (PROJECTION, POOLED):
                self.weights += conv(b.cin, b.cout, 1)
            self.weights += linear(b.cin, b.router_width)
            self.weights += [normal(b.router_width, scale=b.router_width**-0.5), normal(1, scale=0.1)]
            channels = b.cout
        after = self.between()[-1]
        chain(after)
        self.weights += linear(after[-1][1] if after else channels, self.classes)

    def stem_convolutions(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """As Block.convolutions."""
        stem = self.stem, self.stem_kernel, self.stem_stride, self.stem_groups, self.stem_relu
        return linked(self.in_channels, (stem, *self.deeper))

    def between(self) -> list[list[tuple[int, int, int, int, int, int, int]]]:
        """What comes before each block, and behind the last."""
        channels = [self.stem_convolutions()[-1][1], *(b.cout for b in self.blocks)]
        chains = *(b.before for b in self.blocks), self.after
        return [linked(cin, chain) for cin, chain in zip(channels, chains, strict=True)]

    def tables(self) -> tuple[Tensor, Tensor]:
        def chain(convolutions):
            for cin, cout, kernel, stride, groups, squeeze, relu in convolutions:
                table.extend((cin, cout, kernel, stride, kernel // 2, groups, squeeze, relu))

        table = [4, self.in_channels, *self.size, self.classes, len(self.blocks), *self.pool, 1 + len(self.deeper)]
        table += [len(self.after)]
        chain(self.stem_convolutions())
        for b, before in zip(self.blocks, self.between(), strict=False):
            body = b.convolutions()
            table += [len(body), b.shortcut, b.stride, b.pad_before, b.router_width, len(before), b.relu]
            chain(before)
            chain(body)
        chain(self.between()[-1])
        return torch.tensor(table), torch.cat([w.flatten() for w in self.weights])

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch, self.in_channels, *self.size, generator=torch.Generator().manual_seed(batch))

    def reference(self, x: Tensor, paths: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] along given paths [B, L], and the routers' margins [B, L] met on the way."""
        w = iter([w.to(dtype) for w in self.weights])
        x = x.to(dtype)

        def chain(x, convolutions):
            for _, _, kernel, stride, groups, squeeze, relu in convolutions:
                x = F.conv2d(x, next(w), next(w), stride=stride, padding=kernel // 2, groups=groups)
                x = F.relu(x) if relu else x
                if squeeze:
                    hidden = F.relu(F.linear(x.mean((2, 3)), next(w), next(w)))
                    x = x * F.linear(hidden, next(w), next(w)).sigmoid()[:, :, None, None]
            return x

        x = chain(x, self.stem_convolutions())
        if self.pool[0]:
            x = F.max_pool2d(x, *self.pool)
        margins = []
        for i, (b, before) in enumerate(zip(self.blocks, self.between(), strict=False)):
            x = chain(x, before)
            body = chain(x, b.convolutions())
            shortcut = x
            if b.shortcut == PAD:
                behind = b.cout - b.cin - b.pad_before
                shortcut = F.pad(x[:, :, :: b.stride, :: b.stride], (0, 0, 0, 0, b.pad_before, behind))
            elif b.shortcut == PROJECTION:
                shortcut = F.conv2d(x, next(w), next(w), stride=b.stride)
            elif b.shortcut == POOLED:
                shortcut = F.conv2d(F.avg_pool2d(x, b.stride, ceil_mode=True), next(w), next(w))
            hidden = F.relu(F.linear(x.mean((2, 3)), next(w), next(w)))
            margins.append(F.linear(hidden, next(w)[None], next(w))[:, 0])
            x = torch.where(paths[:, i, None, None, None], shortcut + body, shortcut)
            x = F.relu(x) if b.relu else x
        x = chain(x, self.between()[-1])
        logits = F.linear(x.mean((2, 3)), next(w), next(w))
        return logits, torch.stack(margins, 1) if margins else logits.new_zeros(len(x), 0)


def make_plan(network: Network, precision=core.Precision.float32) -> core.Plan:
    ints, floats = network.tables()
    return core.Plan(ints.data_ptr(), ints.numel(), floats.data_ptr(), floats.numel(), precision)


def run(plan, network: Network, x: Tensor, paths: Tensor | None = None, threshold: float = 0.0, threads: int = 1):
    """Logits and decisions, written over NaN and garbage."""
    logits = torch.full((len(x), network.classes), torch.nan)
    decisions = torch.full((len(x), len(network.blocks)), 7, dtype=torch.uint8)
    paths_address = 0 if paths is None else paths.contiguous().data_ptr()
    plan.run(
        x.data_ptr(), len(x), *x.stride(), paths_address, threshold, logits.data_ptr(), decisions.data_ptr(), threads
    )
    return logits, decisions


def assert_close(network: Network, x: Tensor, paths: Tensor, logits: Tensor, precision=core.Precision.float32):
    assert torch.isfinite(logits).all()
    if not logits.numel():
        return
    exact = network.reference(x, paths, torch.float64)[0]
    tolerance = 1e-4 * exact.abs().max()
    if precision == core.Precision.bfloat16:
        plain = network.reference(x, paths, torch.bfloat16)[0]
        tolerance = 2 * (plain - exact).abs().max() + exact.abs().max() / 256
    assert (logits - exact).abs().max() <= tolerance


def chain(*widths, size, in_channels=3, kinds=(IDENTITY,), mids=None, **kwargs) -> Network:
    """One block between any two widths; equal widths may be joined by an identity."""
    blocks = []
    for i, (cin, cout) in enumerate(zip(widths, widths[1:], strict=False)):
        kind = kinds[i % len(kinds)]
        stride = 1 if kind == IDENTITY else 1 + i % 2
        pad_before = (cout - cin) // 2 if kind == PAD else 0
        blocks.append(Block(cin, (mids or widths)[i], cout, stride, kind, pad_before, 3 + 13 * i))
    return Network(in_channels, size, widths[0], blocks, **kwargs)


NETWORKS = {
    "no-blocks": Network(1, (3, 2), 5, []),
    "one-pixel": chain(5, 5, 8, 24, size=(1, 1), kinds=(IDENTITY, PAD, PROJECTION)),
    "odd-widths": chain(3, 5, 8, 24, 24, size=(5, 7), kinds=(PAD, PROJECTION, PAD, IDENTITY)),
    "odd-pads": chain(5, 12, 13, 31, 33, size=(9, 6), kinds=(PAD,), in_channels=2),
    "whole-vectors": chain(16, 16, 32, 32, 64, 64, size=(8, 8), kinds=(IDENTITY, PAD)),
    "resnet-8": chain(16, 16, 32, 64, size=(32, 32), kinds=(IDENTITY, PAD, PAD)),
    "projections": chain(16, 40, 24, 24, size=(32, 32), kinds=(PROJECTION, PROJECTION, IDENTITY)),
    "large": chain(7, 7, 9, size=(64, 64), kinds=(IDENTITY, PAD), in_channels=1),
    "bodies": chain(6, 6, 10, 10, size=(12, 11), kinds=(IDENTITY, PROJECTION, IDENTITY), mids=(1, 50, 17)),
    "many-inputs": chain(9, 9, size=(4, 3), in_channels=37),
    "many-classes": chain(9, 9, size=(4, 3), classes=1003),
    "one-class": chain(9, 9, size=(4, 3), classes=1),
    "wide": chain(130, 130, size=(3, 20), in_channels=1),
    "bottlenecks": Network(
        3,
        (37, 50),
        12,
        [
            Block(12, 5, 20, 1, PROJECTION, kernels=(1, 3, 1)),
            Block(20, 6, 20, kernels=(1, 3, 1)),
            Block(20, 33, 40, 2, PROJECTION, kernels=(1, 3, 1), strided=1),
            Block(40, 7, 48, 2, PAD, 3, kernels=(1, 3, 1), strided=2),
            Block(48, 9, 48, kernels=(3, 1)),
            Block(48, 9, 48, kernels=(1, 1, 3)),
        ],
        stem_kernel=7,
        stem_stride=2,
        pool=(3, 2, 1),
    ),
    "pooled": Network(4, (23, 14), 32, [Block(32, 32, 32)], stem_kernel=7, stem_stride=2, pool=(2, 1, 0)),
    "grown-by-its-pool": Network(1, (41, 37), 16, [Block(16, 3, 8, 2, PROJECTION)], pool=(2, 1, 1)),
    "strided-stem": Network(5, (9, 12), 32, [Block(32, 40, 70, 2, PROJECTION)], stem_stride=2, pool=(2, 2, 1)),
    "deep-stem": Network(
        3,
        (33, 26),
        5,
        [Block(20, 6, 20, kernels=(1, 3, 1)), Block(20, 9, 17, 2, POOLED)],
        stem_stride=2,
        pool=(3, 2, 1),
        deeper=((24, 3, 1, 1, 1), (7, 1, 1, 1, 1), (20, 3, 2, 1, 1)),
    ),
    "deepest-stem": Network(
        2, (30, 31), 8, [Block(40, 4, 40)], stem_kernel=7, stem_stride=2, deeper=((40, 3, 2, 1, 1),)
    ),
    "averages": Network(
        3,
        (15, 13),
        9,
        [
            Block(9, 5, 20, 2, POOLED),
            Block(20, 5, 40, 1, POOLED, kernels=(1, 3, 1), strided=1),
            Block(40, 33, 17, 2, POOLED, kernels=(1, 3, 1), strided=1),
            Block(17, 5, 3, 2, POOLED, kernels=(3, 1, 3), strided=2),
        ],
    ),
    "squeezes": Network(
        3,
        (14, 19),
        12,
        [
            Block(12, 20, 12, squeezes=(0, 5)),
            Block(12, 37, 12, squeezes=(1, 0)),
            Block(12, 40, 20, 1, PAD, 3, kernels=(1, 3, 1), squeezes=(0, 0, 33)),
            Block(20, 33, 17, 2, POOLED, kernels=(1, 3, 1), squeezes=(4, 7, 3), strided=2),
            Block(17, 50, 17, kernels=(1, 3, 1), squeezes=(0, 9, 0)),
            Block(17, 5, 33, 2, PROJECTION, squeezes=(2, 3)),
        ],
    ),
    "strips": Network(
        1,
        (26, 25),
        256,
        [Block(256, 64, 256, kernels=(1, 3, 1)), Block(256, 64, 320, 1, PROJECTION, kernels=(1, 3, 1))],
    ),
    # Of widths below a vector, beside and beyond whole ones, of one channel; unequal numbers of inputs and outputs.
    "groups": Network(
        1,
        (19, 18),
        32,
        [
            Block(32, 48, 32, kernels=(1, 3, 1), groups=(1, 2, 1)),
            Block(32, 64, 40, 1, PROJECTION, kernels=(1, 3, 1), groups=(4, 16, 8)),
            Block(40, 72, 40, kernels=(1, 3, 1), groups=(8, 3, 1), squeezes=(0, 5, 0)),
            Block(40, 40, 56, 2, PROJECTION, kernels=(3, 3), groups=(40, 8)),
            Block(56, 112, 30, 2, PROJECTION, kernels=(1, 3, 1), groups=(1, 2, 2), strided=1),
            Block(30, 45, 75, 2, PAD, 7, groups=(15, 5)),
            Block(75, 50, 75, groups=(25, 25)),
        ],
        deeper=((36, 3, 2, 4, 1), (33, 1, 1, 3, 1), (32, 3, 1, 1, 1)),
    ),
    # On maps of at most 16 channels; and reading unequal numbers of them, by Winograd's tiles.
    "narrow-groups": Network(
        6, (7, 6), 12, [Block(12, 8, 40, 2, PROJECTION, kernels=(1, 3), groups=(4, 8))], stem_groups=3
    ),
    "unequal-groups": Network(1, (8, 8), 32, [Block(32, 80, 48, 1, PROJECTION, kernels=(1, 3), groups=(1, 2))]),
    "heavy-groups": Network(
        1, (9, 8), 1024, [Block(1024, 512, 1024, 1, PROJECTION, kernels=(1, 3, 1), groups=(1, 8, 1))]
    ),
    # That fit a strip into the cache but may not go by strips: a row would be written before the next one's taps are
    # read, or a mean taken before all rows are there.
    "no-strips": Network(1, (30, 200), 32, [Block(32, 16, 32, kernels=(3, 1))]),
    "no-strips-of-squeezes": Network(1, (26, 25), 256, [Block(256, 64, 256, kernels=(1, 3, 1), squeezes=(0, 0, 5))]),
    # The mean is of all rows, also of the last one, which the stride behind it steps over.
    "squeezes-before-a-stride": Network(
        1, (6, 5), 3, [Block(3, 5, 7, 2, PROJECTION, kernels=(3, 1), squeezes=(4, 0), strided=1)]
    ),
    "heavy": Network(
        1,
        (7, 5),
        256,
        [
            Block(256, 256, 256),
            Block(256, 256, 300, 2, PROJECTION),
            Block(300, 256, 310, 1, PAD, 5),
            Block(310, 256, 320, 2, PROJECTION),
        ],
    ),
    # Winograd's tiles, cut off at both edges, of one vector and of several, padded and not; and with weights that
    # are large, for many tiles and for few.
    "tiles": Network(20, (15, 13), 24, [Block(24, 40, 24), Block(24, 17, 40, 1, PROJECTION), Block(40, 33, 40)]),
    "large-weights": Network(1, (13, 14), 136, [Block(136, 136, 136), Block(136, 184, 184, 2, PROJECTION)]),
    # Their second convolutions begin in the middle of what the first ones computed.
    "wide-tiles": Network(1, (11, 121), 32, [Block(32, 32, 32), Block(32, 24, 40, 1, PROJECTION)]),
    "few-tiles": Network(1, (9, 7), 16, [Block(16, 16, 16), Block(16, 20, 33, 1, PROJECTION)]),
    # Maps of few channels behind a stride of 2, by strips and with weights that are large.
    "narrow-strips": Network(1, (97, 97), 16, [Block(16, 24, 10, 2, PROJECTION, strided=1)]),
    "narrow-heavy": Network(1, (7, 5), 300, [Block(300, 256, 10, 2, PROJECTION)]),
    # The convolutions of as many groups as channels are a BatchNorm. Narrow, a vector wide and not in whole ones;
    # with steps between blocks and behind them; with sums that are negative.
    "preactivated": Network(
        3,
        (17, 15),
        40,
        [
            Block(40, 12, 40, norm=True, relu=0),
            Block(40, 9, 40, kernels=(1, 3, 1), norm=True, relu=0),
            Block(40, 40, 17, 2, PROJECTION, relu=0, before=((40, 1, 1, 40, 1),)),
            Block(17, 5, 17, norm=True, relu=0, squeezes=(2, 3)),
            Block(17, 20, 33, 2, POOLED, kernels=(1, 3, 1), strided=1, relu=0, before=((17, 1, 1, 17, 1),)),
            Block(33, 8, 40, 2, PAD, 3, norm=True, relu=0),
            Block(40, 8, 40, kernels=(3, 1, 3), norm=True, relu=0, squeezes=(0, 0, 4)),
        ],
        stem_relu=0,
        after=((40, 1, 1, 40, 1),),
    ),
    "preactivated-strips": Network(
        1,
        (26, 25),
        256,
        [Block(256, 64, 256, kernels=(1, 3, 1), norm=True, relu=0)],
        stem_relu=0,
        after=((256, 1, 1, 256, 1),),
    ),
    # Rows that one strip has left are read again for the next, behind what the third convolution has written.
    "strips-of-four": Network(
        1,
        (10, 200),
        64,
        [
            Block(64, 40, 64, kernels=(3, 1, 1), norm=True),
            Block(64, 24, 72, 2, PROJECTION, kernels=(3, 3, 3), norm=True, strided=1),
        ],
    ),
    "preactivated-heavy": Network(
        1,
        (7, 5),
        256,
        [
            Block(256, 256, 256, norm=True, relu=0),
            Block(256, 256, 300, 2, PROJECTION, relu=0, before=((256, 1, 1, 256, 1),)),
            Block(300, 256, 300, norm=True, relu=0),
            Block(300, 256, 310, 2, PAD, 5, norm=True, relu=0),
        ],
        after=((310, 1, 1, 310, 1),),
    ),
    # Their maxima are negative at times, also at the edge.
    "negative-pool": Network(
        3, (23, 18), 9, [Block(9, 5, 9, relu=0)], stem_kernel=7, stem_stride=2, stem_relu=0, pool=(3, 2, 1)
    ),
    "negative-pool-of-squares": Network(2, (8, 9), 20, [Block(20, 5, 24, 1, PROJECTION)], stem_relu=0, pool=(2, 2, 1)),
    # Convolutions of all kinds between blocks and behind them, some of one channel; no ReLU inside bodies.
    "between": Network(
        2,
        (19, 22),
        8,
        [
            Block(12, 20, 12, before=((20, 3, 2, 4, 0), (12, 1, 1, 1, 1))),
            Block(12, 20, 12, relus=(0,)),
            Block(1, 5, 1, kernels=(1, 3, 1), relus=(0, 1), before=((1, 3, 1, 1, 0), (1, 1, 1, 1, 1))),
            Block(1, 7, 34, 2, PROJECTION, kernels=(3, 1, 3), relus=(1, 0)),
            Block(40, 16, 40, kernels=(1, 3, 1), norm=True, relu=0, before=((40, 3, 1, 2, 0),)),
        ],
        deeper=((8, 1, 1, 8, 0),),
        after=((40, 3, 2, 1, 1), (70, 1, 1, 10, 1)),
    ),
    # A BatchNorm ends a body, and as many groups as channels do not make one where there are more outputs or a stride.
    "last-affine": Network(
        3,
        (9, 8),
        12,
        [
            Block(12, 12, 12, kernels=(3, 1), groups=(1, 12)),
            Block(12, 12, 20, 2, PROJECTION, kernels=(1, 3), groups=(12, 1)),
        ],
    ),
    "wide-between": Network(1, (9, 8), 4, [Block(4, 6, 4, before=((70, 3, 1, 1, 0), (4, 1, 1, 1, 1)))]),
    "heavy-squeezes": Network(
        1,
        (7, 5),
        256,
        [
            Block(256, 256, 256, squeezes=(0, 40)),
            Block(256, 256, 300, 2, POOLED, kernels=(1, 3, 3), squeezes=(3, 0, 20), strided=1),
            Block(300, 300, 300, kernels=(1, 3, 1), squeezes=(0, 10, 0)),
        ],
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request) -> Network:
    return NETWORKS[request.param]


def precisions():
    """Each instruction-set level of this machine with each precision that it has."""
    before = core.cpu_level()
    for level in core.cpu_levels():
        core.set_cpu_level(level)
        if level != "amx":  # whose float32 is that of the level below
            yield pytest.param((level, core.Precision.float32), id=f"{level}-float32")
        if core.has_bfloat16():
            yield pytest.param((level, core.Precision.bfloat16), id=f"{level}-bfloat16")
    core.set_cpu_level(before)


@pytest.fixture(params=precisions())
def precision(request):
    """Runs a test at each instruction-set level in each precision."""
    level, precision = request.param
    before = core.cpu_level()
    core.set_cpu_level(level)
    yield precision
    core.set_cpu_level(before)


def path_choices(network: Network, batch: int):
    shape = (batch, len(network.blocks))
    yield torch.ones(shape, dtype=torch.bool)
    yield torch.zeros(shape, dtype=torch.bool)
    yield torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5


def without_groups(network: Network) -> Network:
    """The same function: zeros where an output does not read a channel."""
    blocks = [replace(block, groups=(1, 1, 1)) for block in network.blocks]
    dense = replace(
        network, blocks=blocks, stem_groups=1, deeper=tuple((*conv[:3], 1, conv[4]) for conv in network.deeper)
    )
    for weight, spread in zip(network.weights, dense.weights, strict=True):
        groups = spread.shape[1] // weight.shape[1] if weight.dim() > 1 else 1
        spread.zero_()
        for group, part in enumerate(weight.chunk(groups)):
            to = spread.chunk(groups)[group]
            (to.chunk(groups, 1)[group] if groups > 1 else to).copy_(part)
    return dense


@pytest.mark.parametrize("network", [name for name in NETWORKS if "groups" in name], indirect=True)
def test_groups_are_zeros(network, precision):
    dense, x = without_groups(network), network.input(5)
    paths = torch.rand(5, len(network.blocks)) < 0.7
    logits, expected = (run(make_plan(each, precision), each, x, paths)[0] for each in (network, dense))
    if precision == core.Precision.bfloat16:
        assert torch.equal(logits, expected)
    else:  # perhaps by Winograd's tiles the one, directly the other
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_forced_paths(network, precision, batch):
    plan, x = make_plan(network, precision), network.input(batch)
    assert plan.level == core.cpu_level()
    assert plan.precision == precision
    for paths in path_choices(network, batch):
        logits, decisions = run(plan, network, x, paths, threads=2)
        assert torch.equal(decisions.bool(), paths)
        assert decisions.max() <= 1 if decisions.numel() else True
        assert_close(network, x, paths, logits, precision)


def test_own_decisions(network, precision):
    check_own_decisions(network, precision)


@pytest.mark.parametrize("threshold", [-0.3, 0.3])
def test_thresholds(precision, threshold):
    check_own_decisions(NETWORKS["odd-widths"], precision, threshold)


def check_own_decisions(network: Network, precision: core.Precision, threshold: float = 0.0):
    x = network.input(7)
    logits, decisions = run(make_plan(network, precision), network, x, threshold=threshold)
    assert_close(network, x, decisions.bool(), logits, precision)
    margins = network.reference(x, decisions.bool())[1]
    clear = (margins - threshold).abs() > (1e-3 if precision == core.Precision.float32 else 3e-2)
    assert torch.equal(decisions.bool()[clear], margins[clear] > threshold)


def test_routers_take_both_ways():
    """Or the tests above would not test decisions."""
    network = NETWORKS["whole-vectors"]
    _, decisions = run(make_plan(network), network, network.input(16))
    assert 0 < decisions.float().mean() < 1


def test_thread_counts_and_batch_splits_agree_to_the_bit(network, precision):
    plan, x = make_plan(network, precision), network.input(5)
    logits, decisions = run(plan, network, x)
    for threads in (2, 3, 11, 40):
        for _ in range(2):
            again = run(plan, network, x, threads=threads)
            assert torch.equal(again[0], logits)
            assert torch.equal(again[1], decisions)
        for i in (0, 4):
            one = run(plan, network, x[i : i + 1], threads=threads)
            assert torch.equal(one[0], logits[i : i + 1])
            assert torch.equal(one[1], decisions[i : i + 1])


def test_workers_treat_subnormal_numbers_as_their_caller_does(precision):
    network = NETWORKS["whole-vectors"]
    for w in network.weights:
        w.mul_(w.dim() > 1)  # no biases, so that all is as small as the input
    plan, x = make_plan(network, precision), network.input(64) * 1e-39
    try:
        for flushes in (True, False, True):  # workers are there from the second turn on
            if not torch.set_flush_denormal(flushes):
                pytest.skip("this processor does not flush them")
            paths = torch.ones(64, len(network.blocks), dtype=torch.bool)
            expected, _ = run(plan, network, x, paths)
            for _ in range(10):
                assert torch.equal(run(plan, network, x, paths, threads=4)[0], expected)
    finally:
        torch.set_flush_denormal(False)


def test_input_layouts(network):
    plan, x = make_plan(network), network.input(4)
    expected = run(plan, network, x)
    wide = torch.full((8, x.shape[1] + 1, x.shape[2] + 2, 2 * x.shape[3]), torch.nan)
    sliced = wide[::2, 1:, 1:-1, ::2]
    sliced.copy_(x)
    for layout in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), sliced):
        got = run(plan, network, layout)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    same = x[:1].expand(3, -1, -1, -1)
    assert torch.equal(run(plan, network, same)[0], run(plan, network, same.contiguous())[0])


def test_bfloat16_pixels(network, precision):
    plan, x = make_plan(network, precision), network.input(3).bfloat16()
    logits = torch.full((3, network.classes), torch.nan)
    decisions = torch.empty(3, len(network.blocks), dtype=torch.uint8)
    arguments = x.data_ptr(), 3, *x.stride(), 0, 0.0, logits.data_ptr(), decisions.data_ptr(), 1, True
    if precision == core.Precision.float32:
        with pytest.raises(ValueError, match="^walk: x: expected float32, got bfloat16"):
            plan.run(*arguments)
        return
    plan.run(*arguments)
    expected = run(plan, network, x.float())
    assert torch.equal(logits, expected[0])
    assert torch.equal(decisions, expected[1])


def test_a_workspace_carries_nothing_over(network, precision):
    """Not even NaN: halos and channels beyond a map's own stay clean."""
    plan, x = make_plan(network, precision), network.input(3)
    everything = torch.ones(3, len(network.blocks), dtype=torch.bool)
    expected = [(paths, run(plan, network, x, paths)) for paths in (None, everything)]
    for bad in (torch.nan, torch.inf, -torch.inf):
        for paths, (logits, decisions) in expected:
            run(plan, network, torch.full_like(x, bad), everything)
            got = run(plan, network, x, paths)
            assert torch.equal(got[0], logits)
            assert torch.equal(got[1], decisions)


def test_nan_flows(network, precision):
    """To the logits of its sample and to no other's; a router that sees it skips."""
    plan, x = make_plan(network, precision), network.input(3)
    expected, _ = run(plan, network, x)
    x[1, 0, -1, -1] = torch.nan
    for threads in (1, 2, 7):
        logits, decisions = run(plan, network, x, threads=threads)
        assert torch.equal(logits[::2], expected[::2])
        if not any(b.stride == 2 for b in network.blocks):  # which may step over the pixel
            assert logits[1].isnan().all()
            assert not decisions[1].any()


@pytest.mark.parametrize("channels", [5, 6])
def test_infinity_stays_in_its_channel(precision, channels):
    """Lanes beyond the channels may hold 0 * inf = NaN where nothing reads them, and else nothing but 0."""
    network = chain(channels, channels, size=(4, 4), in_channels=1)
    for w in network.weights:
        w.abs_()
    x = network.input(2).abs()
    x[0, 0, 0, 0] = torch.inf
    for paths in path_choices(network, 2):
        logits, _ = run(make_plan(network, precision), network, x, paths)
        expected, _ = network.reference(x, paths)
        assert torch.equal(logits.isfinite(), expected.isfinite())
        if core.cpu_level() != "amx":  # there 0 * inf = NaN may be added
            assert torch.equal(logits.isnan(), expected.isnan())


def test_the_tables_are_copied(network):
    ints, floats = network.tables()
    plan = core.Plan(ints.data_ptr(), ints.numel(), floats.data_ptr(), floats.numel())
    ints.zero_(), floats.fill_(torch.nan)
    x, paths = network.input(2), torch.ones(2, len(network.blocks), dtype=torch.bool)
    assert_close(network, x, paths, run(plan, network, x, paths)[0])


def test_many_python_threads(precision):
    """On one plan and on several, with several threads each."""
    cases = []
    for name in ("odd-widths", "whole-vectors", "projections"):
        network = NETWORKS[name]
        plan, x = make_plan(network, precision), network.input(6)
        cases.append((plan, network, x, run(plan, network, x)))

    def work(i: int) -> bool:
        plan, network, x, expected = cases[i % 3]
        n = (6, 1, 2)[i // 3 % 3]
        logits, decisions = run(plan, network, x[:n], threads=1 + i % 4)
        return torch.equal(logits, expected[0][:n]) and torch.equal(decisions, expected[1][:n])

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(work, range(120)))


def test_a_plan_keeps_its_level():
    network, before = NETWORKS["odd-widths"], core.cpu_level()
    plan, x = make_plan(network), network.input(2)
    expected = run(plan, network, x)
    try:
        core.set_cpu_level(core.cpu_levels()[0])
        assert torch.equal(run(plan, network, x)[0], expected[0])
        assert plan.level == before
    finally:
        core.set_cpu_level(before)


def test_working_memory_of_a_cifar_network():
    blocks = [Block(16, 16, 16)] * 3 + [Block(16, 32, 32, 2, PAD, 8)] + [Block(32, 32, 32)] * 2
    blocks += [Block(32, 64, 64, 2, PAD, 16)] + [Block(64, 64, 64)] * 2
    assert make_plan(Network(3, (32, 32), 16, blocks)).workspace_bytes <= 1 << 20


def test_bfloat16_needs_the_level():
    before = core.cpu_level()
    try:
        core.set_cpu_level(core.cpu_levels()[0])
        assert not core.has_bfloat16()
        with pytest.raises(ValueError, match="^precision: bfloat16 needs .*, got level " + core.cpu_level()):
            make_plan(VALID, core.Precision.bfloat16)
    finally:
        core.set_cpu_level(before)


# --- What is refused ------------------------------------------------------------------------------------------

HEADER = ("format_version", "in_channels", "in_height", "in_width", "num_classes", "n_blocks")
HEADER += ("pool_kernel", "pool_stride", "pool_padding", "stem: n_convolutions", "after: n_convolutions")
CONVOLUTION = ("cin", "cout", "kernel", "stride", "padding", "groups", "squeeze", "relu")
BLOCK = ("n_convolutions", "shortcut", "shortcut_stride", "pad_before", "router_width", "n_convolutions of before")
BLOCK += ("relu",)
BLOCK += tuple(f"convolution {i}: {name}" for i in range(2) for name in CONVOLUTION)
VALID = Network(3, (9, 8), 4, [Block(4, 6, 4), Block(4, 6, 9, 2, PAD, 2), Block(9, 6, 5, 2, PROJECTION)])


def assert_refused(position: int, value: int, message: str):
    ints, floats = VALID.tables()
    ints[position] = value
    with pytest.raises(ValueError, match=rf"^plan: {message}: expected .*, got {value}$"):
        core.Plan(ints.data_ptr(), ints.numel(), floats.data_ptr(), floats.numel())


@pytest.mark.parametrize(
    ("name", "value"),
    [("format_version", v) for v in (0, 1, 2, 3, 5, -1)]
    + [("in_channels", v) for v in (0, -3, 513)]
    + [(n, v) for n in ("in_height", "in_width") for v in (0, -1, 1025)]
    + [("num_classes", v) for v in (0, -1, 1_000_001)]
    + [("n_blocks", v) for v in (-1, 100_001, 1 << 60)]
    + [(n, v) for n in ("pool_stride", "pool_padding") for v in (-1, 1, 3)]
    + [("pool_kernel", v) for v in (-1, 1, 4)]
    + [("stem: n_convolutions", v) for v in (-1, 0, 65, 1 << 62)]
    + [("after: n_convolutions", v) for v in (-1, 65, 1 << 62)],
)
def test_refuses_a_header(name, value):
    assert_refused(HEADER.index(name), value, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("cin", 2), ("cout", 0), ("cout", -1), ("cout", 4097), ("kernel", 5), ("stride", 0), ("stride", 3)]
    + [("padding", 0), ("groups", 0), ("groups", 3), ("squeeze", 1), ("squeeze", -1)]
    + [("relu", -1), ("relu", 2)],
)
def test_refuses_a_stem(name, value):
    assert_refused(len(HEADER) + CONVOLUTION.index(name), value, f"stem: convolution 0: {name}")


@pytest.mark.parametrize(
    ("block", "name", "value"),
    [
        (0, "n_convolutions", 0),
        (0, "n_convolutions", 1),
        (0, "n_convolutions", 5),
        (0, "n_convolutions", 1 << 61),
        (0, "convolution 0: cin", 3),
        (0, "convolution 0: cout", 0),
        (0, "convolution 0: cout", 4097),
        (0, "convolution 0: cout", 1 << 62),
        (0, "convolution 0: kernel", 7),
        (0, "convolution 0: padding", 0),
        (0, "convolution 0: groups", 0),
        (0, "convolution 0: groups", 4),
        (0, "convolution 1: groups", 3),
        (0, "convolution 1: groups", 4),
        (1, "convolution 1: groups", -1),
        (1, "convolution 1: groups", 1 << 60),
        (0, "convolution 0: squeeze", -1),
        (0, "convolution 1: squeeze", 4097),
        (0, "convolution 1: cin", 5),
        (0, "convolution 1: cout", 0),
        (1, "convolution 1: stride", 2),
        (0, "shortcut_stride", 2),
        (0, "pad_before", 1),
        (0, "router_width", 0),
        (0, "router_width", 4097),
        (0, "n_convolutions of before", -1),
        (0, "n_convolutions of before", 65),
        (0, "relu", -1),
        (0, "relu", 2),
        (0, "convolution 0: relu", 2),
        (0, "convolution 1: relu", 1),
        (1, "convolution 0: cin", 5),
        (1, "convolution 1: cout", 4097),
        (1, "convolution 0: stride", 0),
        (1, "convolution 0: stride", 3),
        (1, "shortcut_stride", 1),
        (1, "shortcut", -1),
        (1, "shortcut", 4),
        (1, "pad_before", -1),
        (1, "pad_before", 6),
        (2, "convolution 0: cin", 4),
        (2, "pad_before", 1),
        (2, "shortcut_stride", -2),
    ],
)
def test_refuses_a_block(block, name, value):
    start = len(HEADER) + len(CONVOLUTION) + len(BLOCK) * block
    assert_refused(start + BLOCK.index(name), value, f"block {block}: {name}")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Block(4, 6, 5)], "block 0: cout: expected 4 as cin"),
        ([Block(4, 6, 4, 2)], "block 0: stride: expected 1, for the shortcut is the identity"),
        ([Block(4, 6, 3, 1, PAD)], "block 0: cout: expected cin = 4 or more to pad to"),
        ([Block(4, 6, 4, relu=0), Block(4, 6, 4)], "block 1: relu: expected 0, for what it is given comes"),
        ([Block(4, 6, 5, 1, PAD, before=((4, 1, 1, 4, 0),))], "block 0: relu: expected 0, for what it is given comes"),
    ],
)
def test_refuses_a_shortcut(blocks, message):
    with pytest.raises(ValueError, match=message):
        make_plan(Network(3, (9, 8), 4, blocks))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(in_channels=5), "in_channels: expected 1 to 4, got 5"),
        (
            dict(stem_stride=1),
            "stem: convolution 0: stride: expected 2, all that walk computes with a kernel of 7, got 1",
        ),
        (
            dict(in_channels=4, stem_groups=2),
            "stem: convolution 0: groups: expected 1, all that walk computes with a kernel of 7, got 2",
        ),
        (dict(size=(3, 9), pool=(3, 2, 0)), "the map to pool: expected 3 to 1024, got 2"),
        (dict(pool=(2, 3, 0)), "pool_stride: expected 1 to 2, got 3"),
        (dict(pool=(3, 2, 2)), "pool_padding: expected 0 to 1, got 2"),
    ],
)
def test_refuses_an_image(changed, message):
    options = dict(in_channels=3, size=(9, 8), stem=4, blocks=[], stem_kernel=7, stem_stride=2) | changed
    with pytest.raises(ValueError, match=f"^plan: {message}$"):
        make_plan(Network(**options))


def test_refuses_other_numbers_of_integers_and_floats():
    ints, floats = VALID.tables()
    n_ints, n_floats = ints.numel(), floats.numel()
    for n in (-1, 0, 10):
        with pytest.raises(ValueError, match=f"integers: expected a header of 11, got {n}"):
            core.Plan(ints.data_ptr(), n, floats.data_ptr(), n_floats)
    for n in range(11, n_ints):
        with pytest.raises(ValueError, match=f"integers: expected [0-9]+ or more, .*, got {n}"):
            core.Plan(ints.data_ptr(), n, floats.data_ptr(), n_floats)
    with pytest.raises(ValueError, match=f"integers: expected {n_ints}, .*, got {n_ints + 5}"):
        core.Plan(ints.data_ptr(), n_ints + 5, floats.data_ptr(), n_floats)
    for n in (-1, 0, n_floats - 1, n_floats + 1, 1 << 61):
        with pytest.raises(ValueError, match=f"floats: expected {n_floats}, .*, got {n}"):
            core.Plan(ints.data_ptr(), n_ints, floats.data_ptr(), n)
    with pytest.raises(ValueError, match="integers: null"):
        core.Plan(0, n_ints, floats.data_ptr(), n_floats)
    with pytest.raises(ValueError, match="floats: null"):
        core.Plan(ints.data_ptr(), n_ints, 0, n_floats)


def test_the_floats_of_a_refused_plan_are_not_read():
    ints, floats = VALID.tables()
    ints[4] = 1_000_000
    with pytest.raises(ValueError, match="floats: expected"):
        core.Plan(ints.data_ptr(), ints.numel(), 16, floats.numel())  # address 16 cannot be read


def test_run_refuses():
    plan, x = make_plan(VALID), VALID.input(2)
    out = torch.empty(2, 10), torch.empty(2, 3, dtype=torch.uint8)
    valid = dict(zip(("x", "batch"), (x.data_ptr(), 2), strict=True))
    valid |= dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), x.stride(), strict=True))
    valid |= {"paths": 0, "threshold": 0.0, "threads": 1}
    valid |= {"logits": out[0].data_ptr(), "decisions": out[1].data_ptr()}
    plan.run(**valid)
    for name, value in (("batch", -1), ("threads", 0), ("x", 0), ("logits", 0), ("decisions", 0)):
        with pytest.raises(ValueError, match=f"^walk: {name}: "):
            plan.run(**{**valid, name: value})


# --- Levels chosen by the environment -------------------------------------------------------------------------

# Without torch, whose import takes seconds: the module by its file, numbers as bytes.
RUN_PLAN = """
import array, importlib.util, sys
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(core.cpu_level())
if len(sys.argv) > 2:
    tables = [array.array(kind) for kind in "qffB"]
    for table, path in zip(tables, sys.argv[2:6]):
        table.frombytes(open(path, "rb").read())
    address = [table.buffer_info()[0] for table in tables]
    ints, floats, x, paths = tables
    plan = core.Plan(address[0], len(ints), address[1], len(floats))
    c, h, w, classes, blocks = ints[1:6]
    batch = len(x) // (c * h * w)
    logits, decisions = array.array("f", [0] * batch * classes), array.array("B", [0] * batch * blocks)
    out = logits.buffer_info()[0], decisions.buffer_info()[0]
    plan.run(address[2], batch, c * h * w, h * w, w, 1, address[3], 0.0, *out, 2)
    print(plan.level, *logits)
"""


def python(level: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-c", RUN_PLAN, core.__file__, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "SPNET_CPU_LEVEL": level}, capture_output=True, text=True)


@pytest.mark.parametrize("name", core.cpu_levels())
def test_the_environment_chooses_a_level(name, tmp_path):
    network = NETWORKS["odd-widths"]
    x, paths = network.input(2), torch.ones(2, len(network.blocks), dtype=torch.bool)
    files = []
    for i, table in enumerate((*network.tables(), x, paths)):
        files.append(tmp_path / str(i))
        files[-1].write_bytes(table.numpy().tobytes())
    result = python(name, *files)
    assert result.returncode == 0, result.stderr
    level, plan_level, *logits = result.stdout.split()
    assert level == plan_level == name
    logits = torch.tensor([float(v) for v in logits]).reshape(2, -1)
    assert_close(network, x, paths, logits)


def test_a_level_that_the_processor_lacks():
    result = python("avx4096")
    assert result.returncode != 0
    assert "SPNET_CPU_LEVEL: expected one that this processor runs (" in result.stderr
    assert "got avx4096" in result.stderr
