"""The flat description of a routed network that plans are made of: the twin of ``csrc/plan.h``, in any size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT_VERSION = 2
IDENTITY, PAD, PROJECTION = range(3)


class Convolution(NamedTuple):
    """A square convolution with a bias, undilated, zero-padded."""

    cin: int
    cout: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


class Block(NamedTuple):
    """A body of convolutions with ReLU between them, its shortcut and its router."""

    body: tuple[Convolution, ...]
    shortcut: int  # IDENTITY, PAD or PROJECTION
    stride: int  # of the shortcut
    pad_before: int
    router_width: int

    @property
    def projection(self) -> Convolution:
        return Convolution(self.body[0].cin, self.body[-1].cout, 1, self.stride)


class Network(NamedTuple):
    """What the integers of a plan say."""

    in_channels: int
    height: int
    width: int
    num_classes: int
    pool: tuple[int, int, int]  # kernel, stride and padding of the max-pooling behind the stem; zeros without
    stem: Convolution
    blocks: tuple[Block, ...]

    def table(self) -> Tensor:
        """int64 [n], as ``csrc/plan.h`` describes them."""
        ints = [FORMAT_VERSION, *self[:4], len(self.blocks), *self.pool, *self.stem]
        for block in self.blocks:
            ints += [len(block.body), *block[1:], *(i for conv in block.body for i in conv)]
        return torch.tensor(ints, dtype=torch.int64, device="cpu")

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Shapes of the weights, in their order."""
        yield from _conv_shapes(self.stem)
        channels = self.stem.cout
        for block in self.blocks:
            for conv in block.body:
                yield from _conv_shapes(conv)
            if block.shortcut == PROJECTION:
                yield from _conv_shapes(block.projection)
            yield from ((block.router_width, channels), (block.router_width,), (1, block.router_width), (1,))
            channels = block.body[-1].cout
        yield from ((self.num_classes, channels), (self.num_classes,))


def _conv_shapes(conv: Convolution) -> Iterator[tuple[int, ...]]:
    yield conv.cout, conv.cin // conv.groups, conv.kernel, conv.kernel
    yield (conv.cout,)


# No smallest or largest size is meant, but that a damaged file neither asks for terabytes nor for negative sizes.
_MOST = {"stride": 64, "kernel": 64, "num_classes": 10**6, "n_blocks": 10**5}


def _require(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ValueError(f"plan: {name}: expected {low if low == high else f'{low} to {high}'}, got {value}")
    return value


def _size(name: str, value: int) -> int:
    return _require(name, value, 1, _MOST.get(name.split()[-1], 2**16))


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
        conv = Convolution(*self.take(6))
        for field, value in zip(conv._fields, conv, strict=True):
            if field != "padding":
                _size(f"{name} {field}", value)
        _require(f"{name} cin", conv.cin, channels, channels)
        _require(f"{name} padding", conv.padding, 0, conv.kernel - 1)
        for channels in (conv.cin, conv.cout):
            _require(f"{name} channels beyond whole groups", channels % conv.groups, 0, 0)
        return conv

    def block(self, name: str, channels: int) -> Block:
        n, shortcut, stride, pad_before, router_width = self.take(5)
        _require(f"{name} shortcut", shortcut, IDENTITY, PROJECTION)
        _size(f"{name} stride", stride)
        _size(f"{name} router_width", router_width)
        body, cin = [], channels
        for i in range(_require(f"{name} n_convolutions", n, 1, 64)):
            body.append(self.convolution(f"{name} convolution {i}", cin))
            cin = body[-1].cout
        if shortcut == IDENTITY:
            _require(f"{name} cout, as its shortcut is the identity", cin, channels, channels)
            _require(f"{name} stride of the identity", stride, 1, 1)
        if shortcut == PAD:
            _require(f"{name} cout, as its shortcut pads", cin, channels, _MOST.get("", 2**16))
        _require(f"{name} pad_before", pad_before, 0, cin - channels if shortcut == PAD else 0)
        return Block(tuple(body), shortcut, stride, pad_before, router_width)


def read_table(table: Tensor) -> Network:
    """Read the integers of a plan.

    Raises:
        ValueError: impossible ones; the message names the field, what was expected and what came.
    """
    rows = _Rows(table.tolist())
    version, channels, height, width, classes, n_blocks, *pool = rows.take(9)
    _require("format_version", version, FORMAT_VERSION, FORMAT_VERSION)
    for name, value in (("in_channels", channels), ("height", height), ("width", width), ("num_classes", classes)):
        _size(name, value)
    if pool != [0, 0, 0]:
        _size("pool kernel", pool[0])
        _size("pool stride", pool[1])
        _require("pool padding", pool[2], 0, pool[0] // 2)
    stem = rows.convolution("stem", channels)
    size = _out("stem", (height, width), stem.kernel, stem.stride, stem.padding)
    if pool[0]:
        size = _out("pool", size, *pool)
    blocks, cin = [], stem.cout
    for i in range(_require("n_blocks", n_blocks, 0, _MOST["n_blocks"])):
        name = f"block {i}:"
        block = rows.block(name, cin)
        out = size
        for conv in block.body:
            out = _out(name, out, conv.kernel, conv.stride, conv.padding)
        size = _out(name, size, 1, block.stride, 0)
        if out != size:
            raise ValueError(f"plan: {name} expected a body to {list(size)} pixels like the shortcut, got {list(out)}")
        blocks.append(block)
        cin = block.body[-1].cout
    _require("integers", len(table), rows.used, rows.used)
    return Network(channels, height, width, classes, tuple(pool), stem, tuple(blocks))


def _out(name: str, size: tuple[int, int], kernel: int, stride: int, padding: int) -> tuple[int, int]:
    out = tuple((n + 2 * padding - kernel) // stride + 1 for n in size)
    if min(out) < 1:
        raise ValueError(f"plan: {name} expected a map of at least the kernel of {kernel}, got {list(size)}")
    return out
