"""The flat description of a routed network that plans are made of: the twin of ``csrc/plan.h``, in any size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT_VERSION = 4
IDENTITY, PAD, PROJECTION, POOLED = range(4)


class Convolution(NamedTuple):
    """A square convolution with a bias, undilated, zero-padded; then what it has of ReLU and squeeze-and-excitation."""

    cin: int
    cout: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    squeeze: int = 0  # neurons of the hidden layer of its squeeze-and-excitation; 0: none
    relu: int = 0  # 1: it has one

    @property
    def is_affine(self) -> bool:
        """Every channel times a number, plus another: a BatchNorm that is alone."""
        return self.cin == self.cout == self.groups and (self.kernel, self.stride, self.padding) == (1, 1, 0)


class Block(NamedTuple):
    """A body of convolutions, its shortcut and its router, and what comes before all of them for every sample."""

    body: tuple[Convolution, ...]
    shortcut: int  # IDENTITY, PAD, PROJECTION, or POOLED: means of stride x stride pixels, then a projection
    stride: int  # of the shortcut
    pad_before: int
    router_width: int
    before: tuple[Convolution, ...] = ()
    relu: int = 1  # of the sum

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
    stem: tuple[Convolution, ...]
    blocks: tuple[Block, ...]
    after: tuple[Convolution, ...] = ()

    def table(self) -> Tensor:
        """int64 [n], as ``csrc/plan.h`` describes them."""
        ints = [
            FORMAT_VERSION,
            *self[:4],
            len(self.blocks),
            *self.pool,
            len(self.stem),
            len(self.after),
            *chain.from_iterable(self.stem),
        ]
        for block in self.blocks:
            ints += [len(block.body), *block[1:5], len(block.before), block.relu]
            ints += chain.from_iterable((*block.before, *block.body))
        ints += chain.from_iterable(self.after)
        return torch.tensor(ints, dtype=torch.int64, device="cpu")

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Shapes of the weights, in their order."""
        for conv in self.stem:
            yield from _conv_shapes(conv)
        for block in self.blocks:
            for conv in (*block.before, *block.body, block.projection):
                if conv is not None:
                    yield from _conv_shapes(conv)
            width, channels = block.router_width, block.body[0].cin
            yield from ((width, channels), (width,), (1, width), (1,))
        for conv in self.after:
            yield from _conv_shapes(conv)
        last = self.after or (self.blocks[-1].body if self.blocks else self.stem)
        channels = last[-1].cout
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


class _Map(NamedTuple):
    """A map on its way through the network."""

    channels: int
    size: tuple[int, int]
    rectified: int  # 1: it comes from a ReLU, so it holds nothing negative


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
        conv = Convolution(*self.take(8))
        for field, value in zip(conv._fields, conv, strict=True):
            if field not in ("padding", "squeeze", "relu"):
                _size(f"{name} {field}", value)
        _require(f"{name} cin", conv.cin, channels, channels)
        _require(f"{name} padding", conv.padding, 0, conv.kernel - 1)
        _require(f"{name} squeeze", conv.squeeze, 0, _LARGEST)
        _require(f"{name} relu", conv.relu, 0, 1)
        for n in (conv.cin, conv.cout):
            _require(f"{name} channels beyond whole groups", n % conv.groups, 0, 0)
        return conv

    def chain(self, name: str, n: int, map_: _Map, least: int = 1) -> tuple[tuple[Convolution, ...], _Map]:
        found = []
        for i in range(_require(f"{name} n_convolutions", n, least, 64)):
            found.append(self.convolution(f"{name} convolution {i}", map_.channels))
            map_ = _through(name, map_, found[-1])
        return tuple(found), map_

    def block(self, name: str, map_: _Map) -> tuple[Block, _Map]:
        n, shortcut, stride, pad_before, router_width, n_before, relu = self.take(7)
        _require(f"{name} shortcut", shortcut, IDENTITY, POOLED)
        _size(f"{name} stride", stride)
        _size(f"{name} router_width", router_width)
        _require(f"{name} relu", relu, 0, 1)
        before, map_ = self.chain(f"{name} before:", n_before, map_, least=0)
        body, out = self.chain(name, n, map_)
        _require(f"{name} relu of the body's last convolution", out.rectified, 0, 0)
        if shortcut == IDENTITY:
            _require(f"{name} cout, as its shortcut is the identity", out.channels, map_.channels, map_.channels)
            _require(f"{name} stride of the identity", stride, 1, 1)
        if shortcut == PAD:
            _require(f"{name} cout, as its shortcut pads", out.channels, map_.channels, _LARGEST)
        if shortcut in (IDENTITY, PAD) and not map_.rectified:
            _require(f"{name} relu, as what the block is given comes from no ReLU", relu, 0, 0)
        _require(f"{name} pad_before", pad_before, 0, out.channels - map_.channels if shortcut == PAD else 0)
        size = _out(name, map_.size, 1, stride, 0)
        if out.size != size:
            raise ValueError(
                f"plan: {name} expected a body to {list(size)} pixels like the shortcut, got {list(out.size)}"
            )
        return Block(body, shortcut, stride, pad_before, router_width, before, relu), out._replace(rectified=relu)


def read_table(table: Tensor) -> Network:
    """Read the integers of a plan.

    Raises:
        ValueError: impossible ones; the message names the field, what was expected and what came.
    """
    rows = _Rows(table.tolist())
    version, channels, height, width, classes, n_blocks, *pool, n_stem, n_after = rows.take(11)
    _require("format_version", version, FORMAT_VERSION, FORMAT_VERSION)
    for name, value in (("in_channels", channels), ("height", height), ("width", width), ("num_classes", classes)):
        _size(name, value)
    if pool != [0, 0, 0]:
        _size("pool kernel", pool[0])
        _size("pool stride", pool[1])
        _require("pool padding", pool[2], 0, pool[0] // 2)
    stem, map_ = rows.chain("stem:", n_stem, _Map(channels, (height, width), 0))
    if pool[0]:
        map_ = map_._replace(size=_out("pool:", map_.size, *pool))
    blocks = []
    for i in range(_require("n_blocks", n_blocks, 0, _MOST["n_blocks"])):
        block, map_ = rows.block(f"block {i}:", map_)
        blocks.append(block)
    after, _ = rows.chain("after:", n_after, map_, least=0)
    _require("integers", len(table), rows.used, rows.used)
    return Network(channels, height, width, classes, tuple(pool), stem, tuple(blocks), after)


def _through(name: str, map_: _Map, conv: Convolution) -> _Map:
    return _Map(conv.cout, _out(name, map_.size, conv.kernel, conv.stride, conv.padding), conv.relu)


def _out(name: str, size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    out = tuple((n + 2 * padding - kernel) // stride + 1 for n in size)
    if min(out) < 1:
        raise ValueError(f"plan: {name} expected a map of at least the kernel of {kernel}, got {list(size)}")
    return out
