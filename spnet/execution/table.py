"""The flat description of a routed network that plans are made of: the twin of ``csrc/plan.h``, in any size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT_VERSION = 3
IDENTITY, PAD, PROJECTION, POOLED = range(4)


class Convolution(NamedTuple):
    """A square convolution with a bias, undilated, zero-padded; then, where it has one, squeeze-and-excitation."""

    cin: int
    cout: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    squeeze: int = 0  # neurons of the hidden layer of its squeeze-and-excitation; 0: none


class Block(NamedTuple):
    """A body of convolutions with ReLU between them, its shortcut and its router."""

    body: tuple[Convolution, ...]
    shortcut: int  # IDENTITY, PAD, PROJECTION, or POOLED: means of stride x stride pixels, then a projection
    stride: int  # of the shortcut
    pad_before: int
    router_width: int

    @property
    def projection(self) -> Convolution | None:
        """The convolution of its shortcut."""
        if self.shortcut not in (PROJECTION, POOLED):
            return None
        return Convolution(self.body[0].cin, self.body[-1].cout, 1, self.stride if self.shortcut == PROJECTION else 1)


class Network(NamedTuple):
    """What the integers of a plan say."""

    in_channels: int
    height: int
    width: int
    num_classes: int
    pool: tuple[int, int, int]  # kernel, stride and padding of the max-pooling behind the stem; zeros without
    stem: tuple[Convolution, ...]  # with a ReLU behind each
    blocks: tuple[Block, ...]

    def table(self) -> Tensor:
        """int64 [n], as ``csrc/plan.h`` describes them."""
        ints = [
            FORMAT_VERSION,
            *self[:4],
            len(self.blocks),
            *self.pool,
            len(self.stem),
            *chain.from_iterable(self.stem),
        ]
        for block in self.blocks:
            ints += [len(block.body), *block[1:], *chain.from_iterable(block.body)]
        return torch.tensor(ints, dtype=torch.int64, device="cpu")

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Shapes of the weights, in their order."""
        for conv in self.stem:
            yield from _conv_shapes(conv)
        channels = self.stem[-1].cout
        for block in self.blocks:
            for conv in (*block.body, block.projection):
                if conv is not None:
                    yield from _conv_shapes(conv)
            yield from ((block.router_width, channels), (block.router_width,), (1, block.router_width), (1,))
            channels = block.body[-1].cout
        yield from ((self.num_classes, channels), (self.num_classes,))

    def split(self, weights: Tensor) -> Iterator[Tensor]:
        """The weights [n] one by one, as views in their shapes."""
        shapes = list(self.shapes())
        parts = weights.split([math.prod(shape) for shape in shapes])
        yield from (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _conv_shapes(conv: Convolution) -> Iterator[tuple[int, ...]]:
    yield conv.cout, conv.cin // conv.groups, conv.kernel, conv.kernel
    yield (conv.cout,)
    if conv.squeeze:
        yield from ((conv.squeeze, conv.cout), (conv.squeeze,), (conv.cout, conv.squeeze), (conv.cout,))


# No limits of networks: they keep a damaged file from asking for terabytes or for negative sizes.
_LARGEST = 2**16
_MOST = {"stride": 64, "kernel": 64, "num_classes": 10**6, "n_blocks": 10**5}


def _require(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ValueError(f"plan: {name}: expected {low if low == high else f'{low} to {high}'}, got {value}")
    return value


def _size(name: str, value: int) -> int:
    return _require(name, value, 1, _MOST.get(name.split()[-1], _LARGEST))


class _Rows:
    """Hands out consecutive integers of a table."""

    def __init__(self, ints: list[int]):
        self._ints, self.used = ints, 0

    def take(self, n: int) -> list[int]:
        self.used += n
        if self.used > len(self._ints):
            raise ValueError(f"plan: integers: expected {self.used} or more, got {len(self._ints)}")
        return self._ints[self.used - n : self.used]

    def convolution(self, name: str, channels: int) -> Convolution:
        conv = Convolution(*self.take(7))
        for field, value in zip(conv._fields, conv, strict=True):
            if field not in ("padding", "squeeze"):
                _size(f"{name} {field}", value)
        _require(f"{name} cin", conv.cin, channels, channels)
        _require(f"{name} padding", conv.padding, 0, conv.kernel - 1)
        _require(f"{name} squeeze", conv.squeeze, 0, _LARGEST)
        for n in (conv.cin, conv.cout):
            _require(f"{name} channels beyond whole groups", n % conv.groups, 0, 0)
        return conv

    def convolutions(self, name: str, n: int, channels: int) -> tuple[Convolution, ...]:
        found = []
        for i in range(_require(f"{name} n_convolutions", n, 1, 64)):
            found.append(self.convolution(f"{name} convolution {i}", channels))
            channels = found[-1].cout
        return tuple(found)

    def block(self, name: str, channels: int) -> Block:
        n, shortcut, stride, pad_before, router_width = self.take(5)
        _require(f"{name} shortcut", shortcut, IDENTITY, POOLED)
        _size(f"{name} stride", stride)
        _size(f"{name} router_width", router_width)
        body = self.convolutions(name, n, channels)
        cout = body[-1].cout
        if shortcut == IDENTITY:
            _require(f"{name} cout, as its shortcut is the identity", cout, channels, channels)
            _require(f"{name} stride of the identity", stride, 1, 1)
        if shortcut == PAD:
            _require(f"{name} cout, as its shortcut pads", cout, channels, _LARGEST)
        _require(f"{name} pad_before", pad_before, 0, cout - channels if shortcut == PAD else 0)
        return Block(body, shortcut, stride, pad_before, router_width)


def read_table(table: Tensor) -> Network:
    """Read the integers of a plan.

    Raises:
        ValueError: impossible ones; the message names the field, what was expected and what came.
    """
    rows = _Rows(table.tolist())
    version, channels, height, width, classes, n_blocks, *pool, n_stem = rows.take(10)
    _require("format_version", version, FORMAT_VERSION, FORMAT_VERSION)
    for name, value in (("in_channels", channels), ("height", height), ("width", width), ("num_classes", classes)):
        _size(name, value)
    if pool != [0, 0, 0]:
        _size("pool kernel", pool[0])
        _size("pool stride", pool[1])
        _require("pool padding", pool[2], 0, pool[0] // 2)
    stem = rows.convolutions("stem:", n_stem, channels)
    size = _through("stem:", (height, width), stem)
    if pool[0]:
        size = _out("pool:", size, *pool)
    blocks, cin = [], stem[-1].cout
    for i in range(_require("n_blocks", n_blocks, 0, _MOST["n_blocks"])):
        name = f"block {i}:"
        block = rows.block(name, cin)
        out = _through(name, size, block.body)
        size = _out(name, size, 1, block.stride, 0)
        if out != size:
            raise ValueError(f"plan: {name} expected a body to {list(size)} pixels like the shortcut, got {list(out)}")
        blocks.append(block)
        cin = block.body[-1].cout
    _require("integers", len(table), rows.used, rows.used)
    return Network(channels, height, width, classes, tuple(pool), stem, tuple(blocks))


def _through(name: str, size: tuple[int, int], convolutions: Iterable[Convolution]) -> tuple[int, int]:
    for conv in convolutions:
        size = _out(name, size, conv.kernel, conv.stride, conv.padding)
    return size


def _out(name: str, size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    out = tuple((n + 2 * padding - kernel) // stride + 1 for n in size)
    if min(out) < 1:
        raise ValueError(f"plan: {name} expected a map of at least the kernel of {kernel}, got {list(size)}")
    return out
