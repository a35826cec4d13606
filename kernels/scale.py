"""``scale_``: every channel times a number, of its own or its sample's, on the samples that execute.

A BatchNorm with no convolution in front of it, into which it could be folded, and what squeeze-and-excitation does
behind a convolution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spnet.kernels.library import (
    DTYPES,
    MOST,
    SPNET,
    Launch,
    check,
    check_contiguous,
    check_list,
    define,
    multiprocessors,
)


@triton.jit
def _scale_kernel(
    out_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    index_ptr,
    count_ptr,
    batch,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ADD: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    SLABS: tl.constexpr = (PIXELS + BLOCK_P - 1) // BLOCK_P
    n = batch
    if count_ptr is not None:
        n = tl.load(count_ptr)
    for task in range(tl.program_id(0), n * (SLABS * BLOCKS), tl.num_programs(0)):
        channel = task % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        pixel = task // BLOCKS % SLABS * BLOCK_P + tl.arange(0, BLOCK_P)
        position = task // (BLOCKS * SLABS)
        listed = position
        if GATHER or SCATTER:
            listed = tl.load(index_ptr + position)
        source = (listed if GATHER else position).to(tl.int64)
        target = (listed if SCATTER else position).to(tl.int64)
        ok = channel < CHANNELS
        stored = (pixel < PIXELS)[:, None] & ok[None, :]
        place = pixel[:, None] * CHANNELS + channel[None, :]
        y = tl.load(x_ptr + source * (PIXELS * CHANNELS) + place, mask=stored, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            y *= tl.load(scale_ptr + channel, mask=ok, other=0.0)[None, :]
            y += tl.load(shift_ptr + channel, mask=ok, other=0.0)[None, :]
        else:
            y *= tl.sigmoid(tl.load(scale_ptr + position * CHANNELS + channel, mask=ok, other=0.0))[None, :]
        out_ptrs = out_ptr + target * (PIXELS * CHANNELS) + place
        if ADD:
            y += tl.load(out_ptrs, mask=stored, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # NaN stays NaN
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=stored)


def scale_(
    out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    index: Tensor | None = None,
    count: Tensor | None = None,
    gather: bool = False,
    scatter: bool = False,
    add: bool = False,
    relu: bool = False,
) -> None:
    """Scale the first ``count`` samples, or those that are listed, and write into ``out``.

    With i < count and y = x[index[i]] if gather else x[i], in float32::

        y = y * scale + shift, or without a shift y * sigmoid(scale[i])
        target = out[index[i]] if scatter else out[i]
        target = relu?(target + y if add else y)          # rounded once

    Samples of out that are no target keep their bits.

    Args:
        out: [B', H, W, C] contiguous, dtype of x; x itself, where neither gather nor scatter is asked for, or another
            tensor, which shares no memory with it.
        x: float16, bfloat16 or float32 [B, H, W, C] contiguous.
        scale: float32 [C]; without a shift [B, C], of as many samples as count says.
        shift: float32 [C].
        index, count, gather, scatter, add, relu: as in :func:`spnet.kernels.conv_`.

    Raises:
        TypeError, ValueError: an argument does not fit; out is unchanged.
    """
    SPNET.scale_(out, x, scale, shift, index, count, gather, scatter, add, relu)


def _check(out, x, scale, shift, index, count, gather, scatter, add, relu) -> None:
    check("x", x, DTYPES, (-1, -1, -1, -1))
    batch, h, w, channels = x.shape
    check("out", out, x.dtype, (-1, h, w, channels))
    check("scale", scale, torch.float32, (-1, channels) if shift is None else (channels,))
    check("shift", shift, torch.float32, (channels,))
    check_list(index, count, gather, scatter)
    if count is None and not len(out) == batch == (batch if shift is not None else len(scale)):
        raise ValueError(f"out, scale: expected batch {batch} like x, got {len(out)} and {list(scale.shape)}")
    if max(h * w * channels, max(batch, len(out)) * h * w, scale.numel()) > MOST:
        raise ValueError(f"x: expected at most {MOST} pixels, and elements of a sample, got {list(x.shape)}")
    check_contiguous(out=out, x=x, scale=scale, shift=shift, index=index)


def _twin(out, x, scale, shift, index, count, gather, scatter, add, relu) -> None:
    n = x.shape[0] if count is None else int(count)
    y = (x[index[:n]] if gather else x[:n]).float()
    y = y * scale.sigmoid()[:n, None, None] if shift is None else y * scale + shift
    target = index[:n].long() if scatter else torch.arange(n)
    if add:
        y = y + out[target].float()
    out[target] = (y.relu() if relu else y).to(out.dtype)


def launch(out, x, scale, shift, index, count, gather, scatter, add, relu) -> Launch:
    """The launch of one ``scale_``."""
    batch, h, w, channels = x.shape
    arguments = dict(
        out_ptr=out,
        x_ptr=x,
        scale_ptr=scale,
        shift_ptr=shift,
        index_ptr=index,
        count_ptr=count,
        batch=batch,
        PIXELS=h * w,
        CHANNELS=channels,
        GATHER=gather,
        SCATTER=scatter,
        ADD=add,
        RELU=relu,
        BLOCK_P=min(32, triton.next_power_of_2(h * w)),
        BLOCK_C=min(64, triton.next_power_of_2(channels)),
    )
    tasks = batch * -(-h * w // arguments["BLOCK_P"]) * -(-channels // arguments["BLOCK_C"])
    return Launch(_scale_kernel, min(tasks, 8 * multiprocessors(x.device)), arguments, warps=4, stages=2)


define(
    "scale_(Tensor(a!) out, Tensor x, Tensor scale, Tensor? shift, Tensor? index, Tensor? count, bool gather,"
    " bool scatter, bool add, bool relu)",
    _check,
    _twin,
    launch,
)
