"""``route_``: the folded router of one block, for the whole batch, in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spnet.kernels.library import SPNET, Launch, check, check_contiguous, define

BLOCK_R = 16  # hidden units of one program: a router of 128 runs on 8 multiprocessors even for a single sample


class RouterWeights(NamedTuple):
    """A router with its BatchNorm folded in and its two logits folded into one margin."""

    w1: Tensor  # float32 [R, C]
    b1: Tensor  # float32 [R]
    w2: Tensor  # float32 [R]
    b2: Tensor  # float32 [1]


@triton.jit
def _route_kernel(
    margins_ptr,
    sums_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    batch,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLABS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part = tl.program_id(0) % PARTS
    sample = tl.program_id(0) // PARTS * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = part * BLOCK_R + tl.arange(0, BLOCK_R)
    sample_ok = sample < batch
    unit_ok = unit < WIDTH
    # Multiply and add per lane, then one tree: no sample's order depends on another sample.
    acc = tl.zeros((BLOCK_B, BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        channel_ok = channel < CHANNELS
        pooled = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for slab in range(SLABS):
            sums_ptrs = sums_ptr + (sample.to(tl.int64) * SLABS + slab)[:, None] * CHANNELS + channel[None, :]
            pooled += tl.load(sums_ptrs, mask=sample_ok[:, None] & channel_ok[None, :], other=0.0)
        w1_ptrs = w1_ptr + unit[:, None] * CHANNELS + channel[None, :]
        w1 = tl.load(w1_ptrs, mask=unit_ok[:, None] & channel_ok[None, :], other=0.0)
        acc += (pooled / PIXELS)[:, None, :] * w1[None, :, :]
    hidden = tl.sum(acc, 2) + tl.load(b1_ptr + unit, mask=unit_ok, other=0.0)[None, :]
    hidden = tl.where(hidden < 0, 0.0, hidden)  # NaN stays NaN
    margin = tl.sum(hidden * tl.load(w2_ptr + unit, mask=unit_ok, other=0.0)[None, :], 1)
    tl.store(margins_ptr + sample * PARTS + part, margin, mask=sample_ok)


def parts(width: int) -> int:
    """P: into how many partial sums :func:`route_` cuts the margin of a router with that many hidden units."""
    return -(-width // BLOCK_R)


def route_(margins: Tensor, sums: Tensor, pixels: int, w1: Tensor, b1: Tensor, w2: Tensor) -> None:
    """The margin z_execute - z_skip of every sample, without its constant: ``w2 . relu(W1 pooled + b1)``.

    Two calls give the same bits for the same sample, whatever the batch.

    Args:
        margins: float32 [B, P] contiguous, P = parts(R): sums over 16 hidden units each, for
            :func:`spnet.kernels.decide_`, which adds b2.
        sums: float32 [B, S, C] contiguous, from :func:`spnet.kernels.pool_`; pooled = sums.sum(1) / pixels.
        pixels: H * W of the map that was summed.
        w1, b1, w2: as in :class:`RouterWeights`, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    SPNET.route_(margins, sums, pixels, w1, b1, w2)


def _check(margins, sums, pixels, w1, b1, w2) -> None:
    check("sums", sums, torch.float32, (-1, -1, -1))
    check("w1", w1, torch.float32, (-1, sums.shape[2]))
    check("b1", b1, torch.float32, (w1.shape[0],))
    check("w2", w2, torch.float32, (w1.shape[0],))
    check("margins", margins, torch.float32, (sums.shape[0], parts(w1.shape[0])))
    check_contiguous(margins=margins, sums=sums, w1=w1, b1=b1, w2=w2)


def _twin(margins, sums, pixels, w1, b1, w2) -> None:
    hidden = (sums.sum(1) / pixels @ w1.T + b1).relu() * w2
    margins.copy_(torch.stack([part.sum(1) for part in hidden.split(BLOCK_R, 1)], 1))


def launch(margins, sums, pixels, w1, b1, w2) -> Launch:
    """The launch of one ``route_``."""
    batch, n_slabs, channels = sums.shape
    arguments = dict(
        margins_ptr=margins,
        sums_ptr=sums,
        w1_ptr=w1,
        b1_ptr=b1,
        w2_ptr=w2,
        batch=batch,
        PIXELS=pixels,
        CHANNELS=channels,
        SLABS=n_slabs,
        WIDTH=w1.shape[0],
        PARTS=parts(w1.shape[0]),
        BLOCK_B=4,
        BLOCK_R=BLOCK_R,
        BLOCK_C=min(128, triton.next_power_of_2(channels)),
    )
    return Launch(_route_kernel, -(-batch // 4) * arguments["PARTS"], arguments, warps=4, stages=3)


define(
    "route_(Tensor(a!) margins, Tensor sums, int pixels, Tensor w1, Tensor b1, Tensor w2)",
    _check,
    _twin,
    launch,
)
