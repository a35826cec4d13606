"""``batch`` on CUDA: the operators of :mod:`spnet.kernels`, the whole forward in one CUDA graph, nothing waits.

Which samples execute a block is known to the device alone. Batches are padded to a few sizes, one graph each, with
samples of NaN: a NaN margin skips every block, so that no body computes them, and they reach nobody. What an execution
needs of CUDA itself (capture, streams, clocks) is in one class, whose twin for the CPU calls the same function every
time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spnet.execution.device import on
from spnet.execution.table import IDENTITY, PAD, POOLED, Block, Convolution, Network
from spnet.kernels import (
    RouterWeights,
    Scratch,
    compact_,
    conv_,
    decide_,
    interior,
    max_pool_,
    pack_stem_weight,
    pack_weight,
    padded_shape,
    parts,
    pool_,
    pooled_shape,
    route_,
    slabs,
    stem_conv_,
)
from spnet.kernels.library import MOST

LARGEST = 1024  # samples of one graph; larger batches are cut
GRAPHS = 8  # kept per plan


def bucket(batch: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third of the samples is padding."""
    power = 1 << (batch - 1).bit_length()
    return power * 3 // 4 if power > 2 and batch <= power * 3 // 4 else power


class _Conv(NamedTuple):
    """A convolution on maps [B, H, W, C]."""

    shape: Convolution
    weight: Tensor  # [Cout, k, k, Cin / groups]
    bias: Tensor  # float32 [Cout]

    def out(self, x: Tensor) -> Tensor:
        """A new map for its result on every sample of x."""
        batch, h, w, _ = x.shape
        return x.new_empty(batch, -(-h // self.shape.stride), -(-w // self.shape.stride), self.shape.cout)

    def dense(self, x: Tensor) -> Tensor:
        """By PyTorch, for every sample, without ReLU."""
        weight, shape = self.weight.permute(0, 3, 1, 2), self.shape
        y = F.conv2d(_nchw(x), weight, self.bias.to(x.dtype), shape.stride, shape.padding, groups=shape.groups)
        return _nhwc(y)


class _Block(NamedTuple):
    shape: Block
    body: tuple[_Conv, ...]
    projection: _Conv | None
    router: RouterWeights


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _fits(conv: Convolution) -> bool:
    """Whether ``conv_`` computes it."""
    if conv.squeeze or conv.groups != 1:
        return False
    return conv.kernel in (1, 3) and conv.stride in (1, 2) and conv.padding == conv.kernel // 2


def _check(network: Network) -> None:
    if any(conv.squeeze or not conv.relu for conv in network.stem):
        raise ValueError("stem: expected a ReLU and no squeeze-and-excitation, all that its kernels compute")
    if network.after:
        raise ValueError("expected nothing between the blocks and the head, all that its kernels compute")
    for i, block in enumerate(network.blocks):
        if block.before or not block.relu or not all(conv.relu for conv in block.body[:-1]):
            raise ValueError(f"block {i}: expected nothing before it and ReLU behind its convolutions and behind it")
        for name, convs in (("body", block.body), ("shortcut", [block.projection] if block.projection else [])):
            for conv in convs:
                if not _fits(conv):
                    raise ValueError(
                        f"block {i}: {name}: expected 1x1 and 3x3 convolutions of stride 1 or 2, padding (k - 1) / 2 "
                        f"and 1 group, without squeeze-and-excitation, all that its kernels compute, got {conv}"
                    )


class _Layers:
    """The weights of a network on their device, and the forward made of them."""

    def __init__(self, network: Network, weights: Tensor, dtype: torch.dtype):
        _check(network)
        unpacked = network.split(weights)
        self.weights: list[Tensor] = []

        def take(pack: Callable[[Tensor], Tensor] | None = None) -> Tensor:
            # A copy: a view would keep all float32 weights alive, and would not lie at 16 bytes.
            weight = next(unpacked).clone()
            if pack is not None:
                rounded = weight.to(dtype)
                beyond = weight[rounded.isinf() & weight.isfinite()]
                if len(beyond):
                    raise ValueError(f"a weight of {beyond[0]:g} is beyond the range of {dtype}")
                weight = pack(rounded)
            self.weights.append(weight)
            return weight

        def convolution(shape: Convolution, pack: Callable[[Tensor], Tensor] = pack_weight) -> _Conv:
            return _Conv(shape, take(pack), take())

        self.network, self.dtype, self.device = network, dtype, weights.device
        stem, *more = network.stem
        is_centred = stem.kernel > 1 and stem.kernel % 2 == 1 and stem.padding == stem.kernel // 2
        self._pads = is_centred and stem.cin <= 4 and stem.groups == 1 and stem.stride in (1, 2)
        self._stem = convolution(stem, pack_stem_weight if self._pads else pack_weight)
        self._deeper = [convolution(shape) for shape in more]
        self.blocks = []
        for block in network.blocks:
            body = tuple(convolution(shape) for shape in block.body)
            projection = convolution(block.projection) if block.projection else None
            w1, b1, w2, b2 = (take() for _ in range(4))
            self.blocks.append(_Block(block, body, projection, RouterWeights(w1, b1, w2.flatten(), b2)))
        self._head = take()[:, None, None, :], take()

    def image(self, batch: int) -> tuple[Tensor, Tensor]:
        """What the stem reads, and the view [B, C, H, W] of it into which the pixels are to be copied."""
        shape = batch, *self.network[:3]
        if self._pads:
            stem = self.network.stem[0]
            padded = torch.zeros(padded_shape(shape, stem.kernel, stem.stride), dtype=self.dtype, device=self.device)
            return padded, interior(padded, shape, stem.kernel)
        _, channels, h, w = shape
        image = torch.zeros(batch, h, w, channels, dtype=self.dtype, device=self.device)
        return image, _nchw(image)

    def stem(self, image: Tensor, tf32: bool) -> Tensor:
        if self._pads:
            _, h, w = self.network[:3]
            conv = self._stem
            state = image.new_empty(len(image), -(-h // conv.shape.stride), -(-w // conv.shape.stride), conv.shape.cout)
            stem_conv_(state, image, conv.weight, conv.bias, stride=conv.shape.stride, tf32=tf32)
        else:
            state = self._stem.dense(image).relu_()
        for conv in self._deeper:
            state = conv.dense(state).relu_()
        if self.network.pool[0]:
            pooled = state.new_empty(pooled_shape(state.shape, *self.network.pool))
            max_pool_(pooled, state, *self.network.pool)
            state = pooled
        return state

    def forward(
        self, image: Tensor, decisions: Tensor, threshold: Tensor | None, logits: Tensor, scratch: Scratch,
        dense: tuple[bool, ...], tf32: bool,
    ) -> None:  # fmt: skip
        """image -> decisions bool [B, L] and logits float32 [B, classes]; without a threshold decisions are given."""
        state, sums = self.stem(image, tf32), None
        lists, counts = _lists(decisions)
        if threshold is None:
            compact_(lists, counts, decisions)
        changed = None, None
        for column, block in enumerate(self.blocks):
            executes, index, count = decisions[:, column], lists[column], counts[column : column + 1]
            if threshold is not None:
                sums = _pool(state, sums, *changed)
                margins = state.new_empty(len(decisions), parts(block.shape.router_width), dtype=torch.float32)
                route_(margins, sums, state.shape[1] * state.shape[2], *block.router[:3])
                decide_(index, count, executes, margins, block.router.b2, threshold)
            state = step(block, state, executes, index, count, dense[column], tf32, scratch)
            changed = index, count
            if block.shape.shortcut != IDENTITY:
                sums = None
        sums = _pool(state, sums, *changed)
        pooled = (sums[:, 0] if sums.shape[1] == 1 else sums.sum(1)) / (state.shape[1] * state.shape[2])
        # Not cuBLAS, whose workspace a graph would have to keep, and which multiplies by TF32 where told to.
        conv_(logits[:, None, None], pooled[:, None, None], *self._head, relu=False, scratch=scratch)


def _lists(decisions: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the lists of all blocks: int32 index [L, B] and count [L].

    Each begins at 16 bytes whatever the batch is: for others Triton would compile its kernels again.
    """
    batch, blocks = decisions.shape
    new = partial(decisions.new_empty, dtype=torch.int32)
    return new((blocks, -(-batch // 4) * 4))[:, :batch], new((blocks, 4))[:, 0]


def _pool(state: Tensor, sums: Tensor | None, index: Tensor | None, count: Tensor | None) -> Tensor:
    """The sums of ``pool_``; where there are some, redone for what the last block has changed."""
    if sums is None:
        sums, index, count = _new_sums(state), None, None
    pool_(sums, state, index, count)
    return sums


def _new_sums(state: Tensor) -> Tensor:
    batch, h, w, channels = state.shape
    return state.new_empty(batch, slabs(h * w), channels, dtype=torch.float32)


def step(
    block: _Block, state: Tensor, executes: Tensor, index: Tensor, count: Tensor, dense: bool, tf32: bool,
    scratch: Scratch,
) -> Tensor:  # fmt: skip
    """The state behind a block, in place where its shortcut is the identity and it is not dense.

    Args:
        state: [B, H, W, C].
        executes: bool [B]; index, count: the same as a list, unless dense.
        dense: compute the body for every sample, by PyTorch, and select.
    """
    y = _shortcut(block, state, executes, tf32, scratch)
    if dense:
        x = state
        for conv in block.body[:-1]:
            x = conv.dense(x).relu_()
        body = block.body[-1].dense(x).add_(y).relu_()
        return torch.where(executes[:, None, None, None], body, y)
    x = state.clone() if y is state and len(block.body) == 1 else state
    for i, conv in enumerate(block.body):
        first, last = i == 0, i == len(block.body) - 1
        out = y if last else conv.out(x)
        modes = dict(gather=first, scatter=last, add=last, stride=conv.shape.stride, tf32=tf32, scratch=scratch)
        conv_(out, x, conv.weight, conv.bias, index=index, count=count, **modes)
        x = out
    return y


def _shortcut(block: _Block, state: Tensor, executes: Tensor, tf32: bool, scratch: Scratch) -> Tensor:
    """The new state of the samples that skip, and what the body is added to of those that execute."""
    shape, stride = block.shape, block.shape.stride
    if shape.shortcut == IDENTITY:
        return state
    if shape.shortcut == PAD:
        before, cin, cout = shape.pad_before, state.shape[3], shape.body[-1].cout
        # Already >= 0, so it needs no ReLU.
        return F.pad(state[:, ::stride, ::stride], (before, cout - cin - before))
    if shape.shortcut == POOLED:
        state = _nhwc(F.avg_pool2d(_nchw(state), stride, ceil_mode=True))
    conv = block.projection
    y = conv.out(state)
    modes = dict(stride=conv.shape.stride, tf32=tf32, scratch=scratch)
    conv_(y, state, conv.weight, conv.bias, skip_relu=executes, **modes)
    return y


def _trial(
    block: _Block, state: Tensor, executes: Tensor, index: Tensor, count: Tensor, tf32: bool, scratch: Scratch,
    dense: bool,
) -> Tensor:  # fmt: skip
    state, sums = state.clone(), None
    if not dense:
        compact_(index[None], count, executes[:, None])
        if block.shape.shortcut == IDENTITY:
            sums = _new_sums(state)
    state = step(block, state, executes, index, count, dense, tf32, scratch)
    _pool(state, sums, index, count)
    return state


class _Captured:
    """The forward at one batch size: tensors that stay where they are, and what runs it on them."""

    def __init__(self, layers: _Layers, batch: int, forced: bool, dense: tuple[bool, ...], tf32: bool, capture):
        network, device = layers.network, layers.device
        self._image, self._pixels = layers.image(batch)
        self._pixels.fill_(torch.nan)
        self._decisions = torch.zeros(batch, len(network.blocks), dtype=torch.bool, device=device)
        self._threshold = None if forced else torch.zeros(1, dtype=torch.float32, device=device)
        self._logits = torch.empty(batch, network.num_classes, dtype=torch.float32, device=device)
        # Not shared: to be captured a forward is run, and an earlier graph may still be running then.
        scratch = Scratch.on(device)
        tensors = self._image, self._decisions, self._threshold, self._logits
        self.buffers = [t for t in (*tensors, *scratch) if t is not None]
        self.replay = capture(partial(layers.forward, *tensors, scratch, dense, tf32))

    def run(self, x: Tensor, paths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        n = x.shape[0]
        self._pixels[:n].copy_(x)
        if self._threshold is None:
            self._decisions[:n].copy_(paths)
        else:
            self._threshold.fill_(threshold)
        if n < self._pixels.shape[0]:
            self._pixels[n:].fill_(torch.nan)
            self._decisions[n:].fill_(False)
        self.replay()
        return self._logits[:n].clone(), self._decisions[:n].clone()


class Graph:
    """Any plan of 1x1 and 3x3 convolutions, in float16, bfloat16 or float32.

    Args:
        network: the shapes.
        weights: float32 [n], in the order of ``network.shapes()``, on the device that is to run it: CUDA, or the CPU
            by the operators' twins.
        dtype: of the maps and convolutions; routers, pooled sums and the head are float32.

    Attributes:
        dense: per block, whether every sample computes its body, by PyTorch.

    Raises:
        ValueError: a convolution that the kernels do not compute, or a weight beyond the range of the dtype.
    """

    def __init__(self, network: Network, weights: Tensor, dtype: torch.dtype):
        with torch.inference_mode(False), torch.no_grad():
            self._layers = _Layers(network, weights, dtype)
        self.dense = (False,) * len(network.blocks)
        self._device = on(weights.device)
        kernel = network.stem[0].kernel
        side = network.height + kernel, network.width + kernel + 1
        self._largest = max(1, min(LARGEST, MOST // math.prod(side)))
        self._graphs: OrderedDict[tuple, _Captured] = OrderedDict()
        self._lock = Lock()

    def run(self, x: Tensor, paths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W], paths bool [B, L] or None -> float32 logits [B, classes], decisions bool [B, L].

        Raises:
            torch.OutOfMemoryError: no memory for a graph of this batch size.
        """
        network, batch = self._layers.network, x.shape[0]
        if not batch:
            decisions = torch.empty(0, len(network.blocks), dtype=torch.bool, device=x.device)
            return torch.empty(0, network.num_classes, dtype=torch.float32, device=x.device), decisions
        with torch.no_grad(), self._lock:
            if batch <= self._largest:
                return self._run(x, paths, threshold)
            pieces = x.split(self._largest)
            forced = [None] * len(pieces) if paths is None else paths.split(self._largest)
            results = [self._run(piece, given, threshold) for piece, given in zip(pieces, forced, strict=True)]
        return tuple(map(torch.cat, zip(*results, strict=True)))

    @torch.no_grad()
    def trials(self, x: Tensor, decisions: Tensor) -> Iterator[Callable[[bool], object]]:
        """Per block, what runs it on its own maps, either dense or not: x [B, C, H, W], decisions bool [B, L].

        Of no more samples than one graph has.
        """
        x, decisions, tf32 = x[: self._largest], decisions[: self._largest], self._tf32()
        image, pixels = self._layers.image(len(x))
        pixels.copy_(x)
        state = self._layers.stem(image, tf32)
        lists, counts = _lists(decisions)
        scratch = Scratch.on(x.device)
        for column, (block, executes) in enumerate(zip(self._layers.blocks, decisions.unbind(1), strict=True)):
            run = partial(_trial, block, state, executes, lists[column], counts[column : column + 1], tf32, scratch)
            yield run
            state = run(False)

    def _tf32(self) -> bool:
        return self._layers.dtype == torch.float32 and self._device.tf32

    def _run(self, x: Tensor, paths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        tf32 = self._tf32()
        captured = self._captured(min(bucket(x.shape[0]), self._largest), paths is not None, self.dense, tf32)
        with self._device.in_order(captured.buffers, self._layers.weights):
            return captured.run(x, paths, threshold)

    def _captured(self, *key) -> _Captured:
        if key not in self._graphs:
            # Tensors made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._layers.device.type, enabled=False):
                self._graphs[key] = self._capture(*key)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _capture(self, *key) -> _Captured:
        while True:
            if len(self._graphs) == GRAPHS:
                self._graphs.popitem(last=False)
            beside = next(iter(self._graphs.values())).replay if self._graphs else None
            try:
                return _Captured(self._layers, *key, partial(self._device.capture, beside=beside))
            except torch.OutOfMemoryError as e:
                reason = str(e)  # not the error itself, which holds the tensors of the attempt
            if not self._graphs:
                advice = "a smaller one needs less, impl='routed' too"
                raise torch.OutOfMemoryError(f"x: no memory to capture a batch of {key[0]}; {advice}: {reason}")
            self._graphs.clear()
