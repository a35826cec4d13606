"""``batch`` on CUDA: the operators of :mod:`spnet.kernels`, the whole forward in one CUDA graph, nothing waits.

Which samples execute a block is known to the device alone. Batches are padded to a few sizes, one graph each, with
samples of NaN: a NaN margin skips every block, so that no body computes them, and they reach nobody. What an execution
needs of CUDA itself (capture, streams, clocks) is in one class, whose twin for the CPU calls the same function every
time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
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
    scale_,
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
    """A convolution on maps [B, H, W, C], and what follows it."""

    shape: Convolution
    weight: Tensor  # [Cout, k, k, Cin / groups]; of an affine one float32 [C]
    bias: Tensor  # float32 [Cout]
    packed: Tensor  # what conv_ reads: the weight, but for those with groups
    squeeze: tuple[Tensor, ...]  # float32 [S, C], [S], [C, S], [C] of its squeeze-and-excitation, or nothing

    def out(self, x: Tensor) -> Tensor:
        """A new map for its result on every sample of x."""
        batch, h, w, _ = x.shape
        return x.new_empty(batch, -(-h // self.shape.stride), -(-w // self.shape.stride), self.shape.cout)

    def dense(self, x: Tensor) -> Tensor:
        """For every sample, by PyTorch what it knows."""
        shape = self.shape
        if shape.is_affine:
            y = torch.empty_like(x)
            scale_(y, x, self.weight, self.bias, relu=bool(shape.relu))
        else:
            weight, bias = self.weight.permute(0, 3, 1, 2), self.bias.to(x.dtype)
            y = _nhwc(F.conv2d(_nchw(x), weight, bias, shape.stride, shape.padding, groups=shape.groups))
            if shape.relu:
                y.relu_()
        if self.squeeze:
            scale_(y, y, self._excitation(y, None, None))
        return y

    def routed(
        self, out: Tensor, x: Tensor, index: Tensor, count: Tensor, gather: bool, end: dict[str, bool], tf32: bool,
        scratch: Scratch,
    ) -> None:  # fmt: skip
        """On the samples that execute, by the kernels.

        Args:
            gather: x holds all samples, not those that execute alone.
            end: scatter, add and relu of ``conv_`` where this is the last one of a body, else empty.
        """
        modes = dict(index=index, count=count)
        own = modes | dict(gather=gather, relu=bool(self.shape.relu)) | ({} if self.squeeze else end)
        target = self.out(x) if self.squeeze and end else out
        if self.shape.is_affine:
            scale_(target, x, self.weight, self.bias, **own)
        else:
            options = dict(stride=self.shape.stride, groups=self.shape.groups, tf32=tf32, scratch=scratch)
            conv_(target, x, self.packed, self.bias, **own, **options)
        if self.squeeze:
            scale_(out, target, self._excitation(target, count, scratch), **modes, **end)

    def _excitation(self, y: Tensor, count: Tensor | None, scratch: Scratch | None) -> Tensor:
        """Logits float32 [B, C] of the factors of each sample; meaningless ones from ``count`` on."""
        sums = _new_sums(y)
        index = None if count is None else torch.arange(len(y), dtype=torch.int32, device=y.device)
        pool_(sums, y, index, count)
        w1, b1, w2, b2 = self.squeeze
        pooled = _mean(sums, y)
        hidden, logits = pooled.new_empty(len(y), len(w1)), torch.empty_like(pooled)
        # Of all samples, which takes no longer than of some.
        for to, x, weight, bias, relu in ((hidden, pooled, w1, b1, True), (logits, hidden, w2, b2, False)):
            conv_(to[:, None, None], x[:, None, None], weight[:, None, None], bias, relu=relu, scratch=scratch)
        return logits


class _Block(NamedTuple):
    shape: Block
    before: tuple[_Conv, ...]
    body: tuple[_Conv, ...]
    projection: _Conv | None
    router: RouterWeights


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _check(network: Network) -> None:
    for i, block in enumerate(network.blocks):
        for name, convs in (("body", block.body), ("shortcut", [block.projection] if block.projection else [])):
            for conv in convs:
                if conv.kernel not in (1, 3) or conv.stride not in (1, 2) or conv.padding != conv.kernel // 2:
                    raise ValueError(
                        f"block {i}: {name}: expected 1x1 and 3x3 convolutions of stride 1 or 2 and padding "
                        f"(k - 1) / 2, all that its kernels compute, got {conv}"
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
            weight, bias = take(None if shape.is_affine else pack), take()
            packed = weight
            if shape.is_affine:
                weight = weight.flatten()
            elif shape.groups > 1:
                packed = pack_weight(weight.permute(0, 3, 1, 2), shape.groups)
                self.weights.append(packed)
            return _Conv(shape, weight, bias, packed, tuple(take() for _ in range(4 if shape.squeeze else 0)))

        self.network, self.dtype, self.device = network, dtype, weights.device
        stem, *more = network.stem
        is_centred = stem.kernel > 1 and stem.kernel % 2 == 1 and stem.padding == stem.kernel // 2
        self._pads = is_centred and stem.cin <= 4 and stem.groups == 1 and stem.stride in (1, 2) and not stem.squeeze
        self._stem = convolution(stem, pack_stem_weight if self._pads else pack_weight)
        self._deeper = [convolution(shape) for shape in more]
        self.blocks = []
        for block in network.blocks:
            before, body = (tuple(convolution(shape) for shape in chain) for chain in (block.before, block.body))
            projection = convolution(block.projection) if block.projection else None
            w1, b1, w2, b2 = (take() for _ in range(4))
            self.blocks.append(_Block(block, before, body, projection, RouterWeights(w1, b1, w2.flatten(), b2)))
        self._after = tuple(convolution(shape) for shape in network.after)
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
            modes = dict(stride=conv.shape.stride, relu=bool(conv.shape.relu), tf32=tf32)
            stem_conv_(state, image, conv.weight, conv.bias, **modes)
        else:
            state = self._stem.dense(image)
        state = through(self._deeper, state)
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
            if block.before:
                state, sums = through(block.before, state), None
            if threshold is not None:
                sums = _pool(state, sums, *changed)
                margins = state.new_empty(len(decisions), parts(block.shape.router_width), dtype=torch.float32)
                route_(margins, sums, state.shape[1] * state.shape[2], *block.router[:3])
                decide_(index, count, executes, margins, block.router.b2, threshold)
            state = step(block, state, executes, index, count, dense[column], tf32, scratch)
            changed = index, count
            if block.shape.shortcut != IDENTITY:
                sums = None
        if self._after:
            state, sums = through(self._after, state), None
        sums = _pool(state, sums, *changed)
        pooled = _mean(sums, state)
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


def _mean(sums: Tensor, state: Tensor) -> Tensor:
    """Float32 [B, C] of the sums of ``pool_``."""
    return (sums[:, 0] if sums.shape[1] == 1 else sums.sum(1)) / (state.shape[1] * state.shape[2])


def through(chain: Iterable[_Conv], x: Tensor) -> Tensor:
    """Of every sample."""
    for conv in chain:
        x = conv.dense(x)
    return x


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
        body = through(block.body, state).add_(y)
        return torch.where(executes[:, None, None, None], body.relu_() if block.shape.relu else body, y)
    x = state.clone() if y is state and len(block.body) == 1 else state
    for i, conv in enumerate(block.body):
        is_last = i == len(block.body) - 1
        out = y if is_last else conv.out(x)
        end = dict(scatter=True, add=True, relu=bool(block.shape.relu)) if is_last else {}
        conv.routed(out, x, index, count, i == 0, end, tf32, scratch)
        x = out
    return y


def _shortcut(block: _Block, state: Tensor, executes: Tensor, tf32: bool, scratch: Scratch) -> Tensor:
    """The new state of the samples that skip, and what the body is added to of those that execute."""
    shape, stride = block.shape, block.shape.stride
    if shape.shortcut == IDENTITY:
        return state
    if shape.shortcut == PAD:
        before, cin, cout = shape.pad_before, state.shape[3], shape.body[-1].cout
        # Where it is to have a ReLU, it is already >= 0.
        return F.pad(state[:, ::stride, ::stride], (before, cout - cin - before))
    if shape.shortcut == POOLED:
        state = _nhwc(F.avg_pool2d(_nchw(state), stride, ceil_mode=True))
    conv = block.projection
    y = conv.out(state)
    modes = dict(stride=conv.shape.stride, relu=bool(shape.relu), tf32=tf32, scratch=scratch)
    conv_(y, state, conv.weight, conv.bias, skip_relu=executes if shape.relu else None, **modes)
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
            state = through(block.before, state)
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
