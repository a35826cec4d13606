"""``batch``: a plan run block by block on the whole batch, each body on the samples that execute it alone.

On the CPU: channels-last maps and PyTorch's fused oneDNN operators, which are private; where they are missing or
oneDNN is switched off, public ones do the same. The samples of a channels-last batch are consecutive chunks of memory,
so a *run* of neighbouring samples that execute a block is a batch without a gather, and its residual is added in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import groupby, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spnet.execution.device import computed_in
from spnet.execution.table import IDENTITY, PAD, POOLED, Block, Convolution, Network

LARGEST = 2.0**60  # of a pixel for the fused operators: sums of larger ones may overflow and become NaN


class _Convolution:
    """A convolution of channels-last maps by public operators."""

    def __init__(self, shape: Convolution, weight: Tensor, bias: Tensor):
        self._weight, self._bias = weight.contiguous(memory_format=torch.channels_last), bias
        self._options, self._relu = (shape.stride, shape.padding, 1, shape.groups), shape.relu

    def __call__(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self._weight, self._bias, *self._options)
        return y.relu_() if self._relu else y

    def add_to_(self, y: Tensor, x: Tensor, relu: int) -> None:
        """y + convolution(x), or its ReLU, in place of y."""
        y.add_(self(x))
        if relu:
            y.relu_()


class _Affine(_Convolution):
    """Of every channel by itself, with weights of float32: rounded ones would shift maps of a large mean."""

    def __init__(self, shape: Convolution, weight: Tensor, bias: Tensor):
        statistics = torch.zeros_like(bias), torch.ones_like(bias)
        self._normalize = partial(F.batch_norm, weight=weight.flatten(), bias=bias, eps=0.0)
        self._statistics, self._relu = statistics, shape.relu

    def __call__(self, x: Tensor) -> Tensor:
        y = self._normalize(x, *self._statistics)
        return y.relu_() if self._relu else y


class _FusedConvolution(_Convolution):
    """The same by oneDNN, with the weights in its own order. Its ReLU turns NaN into 0."""

    def __init__(self, shape: Convolution, weight: Tensor, bias: Tensor):
        self._weight, self._bias = weight, bias
        self._options = [shape.padding] * 2, [shape.stride] * 2, [1, 1], shape.groups
        self._unary = "relu" if shape.relu else "none"
        self._kept: dict[bytes, Tensor] = {}  # by order
        self._ordered: dict[tuple[int, int], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return _pointwise(x, self._weight_for(x), self._bias, *self._options, self._unary, [], "")

    def add_to_(self, y: Tensor, x: Tensor, relu: int) -> None:
        unary = "relu" if relu else None
        _pointwise_add_(y, x, self._weight_for(x), self._bias, *self._options, "add", 1.0, unary, [], "")

    def _weight_for(self, x: Tensor) -> Tensor:
        # The order that oneDNN wants depends on the numbers of samples and threads. Weights in another are put right
        # at every call, which on AVX2 can take longer than the convolution.
        key = len(x), torch.get_num_threads()
        weight = self._ordered.get(key)
        if weight is None:
            weight = _reorder(self._weight, *self._options, x.shape)
            weight = self._kept.setdefault(_order(weight).numpy().tobytes(), weight)
            self._ordered[key] = weight
        return weight


def _operator(name: str, overload: str):
    return getattr(getattr(torch.ops.mkldnn, name, None), overload, None)


_pointwise = _operator("_convolution_pointwise", "default")
_pointwise_add_ = _operator("_convolution_pointwise_", "binary")
_reorder = _operator("_reorder_convolution_weight", "default")
_order = _operator("_get_mkldnn_serialized_md", "default")


def _has_fused(dtype: torch.dtype) -> bool:
    found = None not in (_pointwise, _pointwise_add_, _reorder, _order)
    if not (found and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Squeezing:
    """A convolution and the squeeze-and-excitation behind it: Hu et al., CVPR 2018."""

    def __init__(self, convolution: _Convolution, *weights: Tensor):
        self._convolution, self._weights = convolution, weights

    def __call__(self, x: Tensor) -> Tensor:
        y = self._convolution(x)
        return y.mul_(self._scale(y))

    def add_to_(self, y: Tensor, x: Tensor, relu: int) -> None:
        body = self._convolution(x)
        y.addcmul_(body, self._scale(body))
        if relu:
            y.relu_()

    def _scale(self, y: Tensor) -> Tensor:
        return _perceive(_pool(y), *self._weights).sigmoid_().to(y.dtype)[:, :, None, None]


class _Block(NamedTuple):
    shape: Block
    before: list[_Convolution | _Squeezing]
    body: list[_Convolution | _Squeezing]
    projection: _Convolution | None
    router: list[Tensor]  # as _perceive takes them


class _Layers:
    """The weights of a network, ready to run."""

    def __init__(self, network: Network, weights: Tensor, dtype: torch.dtype, make: type[_Convolution]):
        parts = network.split(weights)

        def convolution(shape: Convolution) -> _Convolution | _Squeezing:
            weight, bias = islice(parts, 2)
            made = _Affine(shape, weight, bias) if shape.is_affine else make(shape, weight.to(dtype), bias.to(dtype))
            return _Squeezing(made, *islice(parts, 4)) if shape.squeeze else made

        self.stem = [convolution(shape) for shape in network.stem]
        self.blocks: list[_Block] = []
        for block in network.blocks:
            before, body = ([convolution(shape) for shape in chain] for chain in (block.before, block.body))
            projection = convolution(block.projection) if block.projection else None
            self.blocks.append(_Block(block, before, body, projection, list(islice(parts, 4))))
        self.after = [convolution(shape) for shape in network.after]
        self.head = next(parts), next(parts)


class Batch:
    """Any plan on the CPU.

    Args:
        network: the shapes.
        weights: float32 [n], in the order of ``network.shapes()``.
        dtype: of the maps and convolutions, float32 in place of what this processor does not multiply; routers, pooled
            sums and the head are float32.

    Attributes:
        dense: per block, whether every sample computes its body.
    """

    def __init__(self, network: Network, weights: Tensor, dtype: torch.dtype):
        self._network, self._weights, self._dtype = network, weights, computed_in(dtype)
        self.dense = (False,) * len(network.blocks)
        # The ReLU of the fused operators would hide a NaN, here one of the weights.
        self._is_fused = _has_fused(self._dtype) and bool(weights.isfinite().all())
        self._layers = self._make(_FusedConvolution) if self._is_fused else self._plain

    @cached_property
    def _plain(self) -> _Layers:
        return self._make(_Convolution)

    def _make(self, convolution: type[_Convolution]) -> _Layers:
        return _Layers(self._network, self._weights, self._dtype, convolution)

    @torch.no_grad()
    def run(self, x: Tensor, paths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W], paths bool [B, L] or None -> float32 logits [B, classes], decisions bool [B, L]."""
        # Not as a decorator, which would give one thread the setting that another had before.
        with torch.autocast("cpu", enabled=False):
            logits, decisions = self._run(self._layers, x, paths, threshold)
            if self._is_fused and len(x) and not max(map(abs, torch.stack(torch.aminmax(x)).tolist())) <= LARGEST:
                bad = ~(x.abs().flatten(1).amax(1).float() <= LARGEST)
                paths = None if paths is None else paths[bad]
                logits[bad], decisions[bad] = self._run(self._plain, x[bad], paths, threshold)
        return logits, decisions

    def _run(self, layers: _Layers, x: Tensor, paths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        n_blocks = len(layers.blocks)
        if not len(x):
            logits = x.new_empty(0, self._network.num_classes, dtype=torch.float32)
            return logits, x.new_empty(0, n_blocks, dtype=torch.bool)
        state = self._stem(layers, x)
        dense = self.dense
        decisions = x.new_empty(len(x), n_blocks, dtype=torch.bool) if paths is None else paths.clone()
        pooled = None
        for column, block in enumerate(layers.blocks):
            state, pooled = _through(block.before, state), None if block.before else pooled
            if paths is None:
                if pooled is None:
                    pooled = _pool(state)
                decisions[:, column] = _perceive(pooled, *block.router)[:, 0] > threshold
            executes = decisions[:, column]
            state, pooled = _execute(block, state, pooled, executes, dense[column])
        return F.linear(_pool(_through(layers.after, state)), *layers.head), decisions

    def _stem(self, layers: _Layers, x: Tensor) -> Tensor:
        state = _through(layers.stem, x.to(self._dtype).contiguous(memory_format=torch.channels_last))
        return F.max_pool2d(state, *self._network.pool) if self._network.pool[0] else state

    @torch.no_grad()
    def trials(self, x: Tensor, decisions: Tensor) -> Iterator[Callable[[bool], object]]:
        """Per block, what runs it on its own maps, either dense or not: x [B, C, H, W], decisions bool [B, L]."""
        state = self._stem(self._layers, x)
        for block, executes in zip(self._layers.blocks, decisions.unbind(1), strict=True):
            state = _through(block.before, state)
            run = partial(_trial, block, state, executes)
            yield run
            state = run(False)


def _trial(block: _Block, state: Tensor, executes: Tensor, dense: bool) -> Tensor:
    state, pooled = _execute(block, state.clone(), _pool(state), executes, dense)
    if pooled is None:
        _pool(state)  # as the next router will
    return state


def _execute(
    block: _Block, state: Tensor, pooled: Tensor | None, executes: Tensor, dense: bool
) -> tuple[Tensor, Tensor | None]:
    """The state behind a block, in place where the shortcut is the identity; and its pooled vectors where kept."""
    if dense:
        return _execute_dense(block, state, executes), None
    executed, skipped = _runs(executes)
    if block.shape.shortcut != IDENTITY:
        return _execute_strided(block, state, executed, skipped), None
    for run in executed:
        _add_body_(block, state[run], state[run])
        if pooled is not None:
            pooled[run] = _pool(state[run])
    return state, pooled


def _execute_dense(block: _Block, x: Tensor, executes: Tensor) -> Tensor:
    if block.shape.shortcut == IDENTITY:
        y, skipped = x.clone(), x
    else:
        y = _shortcut(block, x)
        skipped = y.relu() if block.shape.relu else y.clone()
    _add_body_(block, y, x)
    return torch.where(executes[:, None, None, None], y, skipped)


def _shortcut(block: _Block, x: Tensor) -> Tensor:
    shape = block.shape
    if shape.shortcut == PAD:
        behind = shape.body[-1].cout - shape.body[0].cin - shape.pad_before
        y = x[:, :, :: shape.stride, :: shape.stride]
        return F.pad(y, (0, 0, 0, 0, shape.pad_before, behind)).contiguous(memory_format=torch.channels_last)
    if shape.shortcut == POOLED:
        x = F.avg_pool2d(x, shape.stride, ceil_mode=True)
    return block.projection(x)


def _execute_strided(block: _Block, x: Tensor, executed: list[slice], skipped: list[slice]) -> Tensor:
    y = _shortcut(block, x)
    for run in executed:
        _add_body_(block, y[run], x[run])
    for run in skipped if block.shape.relu else ():
        y[run].relu_()
    return y


def _add_body_(block: _Block, y: Tensor, x: Tensor) -> None:
    """What the block makes of y, its shortcut, in place; y may be x."""
    *first, last = block.body
    last.add_to_(y, _through(first, x) if first else x.clone(), block.shape.relu)


def _through(chain: list[_Convolution | _Squeezing], x: Tensor) -> Tensor:
    for convolution in chain:
        x = convolution(x)
    return x


def _runs(decisions: Tensor) -> tuple[list[slice], list[slice]]:
    """Runs of neighbouring samples that execute, and of those that skip: decisions bool [B]."""
    runs = [], []
    begin = 0
    for value, group in groupby(decisions.tolist()):
        end = begin + len(list(group))
        runs[not value].append(slice(begin, end))
        begin = end
    return runs


def _pool(x: Tensor) -> Tensor:
    """[B, C, H, W] -> float32 [B, C]"""
    return x.mean((2, 3), dtype=torch.float32)


def _perceive(pooled: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Of the pooled vectors [B, C], by two layers: a router's margin [B, 1], or the logits of scales [B, C]."""
    return F.linear(F.relu(F.linear(pooled, weight1, bias1)), weight2, bias2)
