"""``compact_`` and ``decide_``: which samples execute a block, as a list on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spnet.kernels.library import SPNET, Launch, check, check_contiguous, define

MAX_BATCH = 65_536


@triton.jit
def _compact_kernel(
    index_ptr,
    count_ptr,
    decisions_ptr,
    margins_ptr,
    b2_ptr,
    threshold_ptr,
    batch,
    stride_i,
    stride_c,
    stride_d,
    stride_l,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    index_ptr += block * stride_i
    count_ptr += block * stride_c
    decisions_ptr += block * stride_l
    total = tl.zeros((), tl.int32)
    for start in range(0, batch, BLOCK):
        sample = start + tl.arange(0, BLOCK)
        ok = sample < batch
        d_ptrs = decisions_ptr + sample.to(tl.int64) * stride_d
        if margins_ptr is not None:
            part = tl.arange(0, BLOCK_PARTS)
            margin_ptrs = margins_ptr + sample[:, None] * PARTS + part[None, :]
            margin = tl.sum(tl.load(margin_ptrs, mask=ok[:, None] & (part < PARTS)[None, :], other=0.0), 1)
            executes = ok & (margin + tl.load(b2_ptr) > tl.load(threshold_ptr))  # NaN: it does not
            tl.store(d_ptrs, executes, mask=ok)
        else:
            executes = tl.load(d_ptrs, mask=ok, other=0) != 0
        found = executes.to(tl.int32)
        tl.store(index_ptr + total + tl.cumsum(found, 0) - 1, sample, mask=executes)
        total += tl.sum(found, 0)
    tl.store(count_ptr, total)


def compact_(index: Tensor, count: Tensor, decisions: Tensor) -> None:
    """List the samples that execute: ``index[l, :count[l]]`` are the True positions of ``decisions[:, l]``, ascending.

    Args:
        index: int32 [L, B] with contiguous rows, B <= 65,536; what lies behind count keeps its bits.
        count: int32 [L] of any stride.
        decisions: bool [B, L] of any strides.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    SPNET.compact_(index, count, decisions)


def decide_(index: Tensor, count: Tensor, decisions: Tensor, margins: Tensor, b2: Tensor, threshold: Tensor) -> None:
    """Decide, then list: a sample executes where ``margins.sum(1) + b2 > threshold``; a tie or a NaN skips.

    Args:
        index, count: int32 [B] and [1], as of one block in :func:`compact_`.
        decisions: bool [B] of any stride, written: a column of [B, L].
        margins: float32 [B, P], what :func:`spnet.kernels.route_` wrote; contiguous.
        b2: float32 [1], the folded router's last bias.
        threshold: float32 [1]; on the device, so that a captured graph can be replayed with another.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    SPNET.decide_(index, count, decisions, margins, b2, threshold)


def _check_compact(index, count, decisions) -> None:
    check("decisions", decisions, torch.bool, (-1, -1))
    batch, blocks = decisions.shape
    check("index", index, torch.int32, (blocks, batch))
    check("count", count, torch.int32, (blocks,))
    if batch > MAX_BATCH:
        raise ValueError(f"decisions: expected at most {MAX_BATCH} samples, got {batch}")
    if index.stride(1) != 1 and batch > 1:
        raise ValueError(f"index: expected contiguous rows, got strides {index.stride()} for {list(index.shape)}")


def _check_decide(index, count, decisions, margins, b2, threshold) -> None:
    check("index", index, torch.int32, (-1,))
    check("count", count, torch.int32, (1,))
    check("decisions", decisions, torch.bool, (-1,))
    _check_compact(index[None], count, decisions[:, None])
    check("margins", margins, torch.float32, (decisions.shape[0], -1))
    check("b2", b2, torch.float32, (1,))
    check("threshold", threshold, torch.float32, (1,))
    check_contiguous(margins=margins)


def _twin_compact(index, count, decisions) -> None:
    for block, executes in enumerate(decisions.unbind(1)):
        positions = executes.nonzero().squeeze(1)
        index[block, : len(positions)] = positions.int()
        count[block] = len(positions)


def _twin_decide(index, count, decisions, margins, b2, threshold) -> None:
    decisions.copy_(margins.sum(1) + b2 > threshold)
    _twin_compact(index[None], count, decisions[:, None])


def launch(index, count, decisions) -> Launch:
    """The launch of one ``compact_``: a program for each block, so that the order is that of the samples."""
    return _launch(index, count, decisions, None, None, None)


def launch_decide(index, count, decisions, margins, b2, threshold) -> Launch:
    """The launch of one ``decide_``."""
    return _launch(index[None], count, decisions[:, None], margins, b2, threshold)


def _launch(index, count, decisions, margins, b2, threshold) -> Launch:
    parts = 0 if margins is None else margins.shape[1]
    block_parts = triton.next_power_of_2(max(parts, 1))
    arguments = dict(
        index_ptr=index,
        count_ptr=count,
        decisions_ptr=decisions,
        margins_ptr=margins,
        b2_ptr=b2,
        threshold_ptr=threshold,
        batch=decisions.shape[0],
        stride_i=index.stride(0),
        stride_c=count.stride(0),
        stride_d=decisions.stride(0),
        stride_l=decisions.stride(1),
        PARTS=parts,
        BLOCK_PARTS=block_parts,
        BLOCK=max(16, min(1024, 2**13 // block_parts)),  # as many margins as fit registers
    )
    return Launch(_compact_kernel, decisions.shape[1], arguments, warps=8, stages=1)


define(
    "compact_(Tensor(a!) index, Tensor(b!) count, Tensor decisions)",
    _check_compact,
    _twin_compact,
    launch,
)
define(
    "decide_(Tensor(a!) index, Tensor(b!) count, Tensor(c!) decisions, Tensor margins, Tensor b2, Tensor threshold)",
    _check_decide,
    _twin_decide,
    launch_decide,
)
