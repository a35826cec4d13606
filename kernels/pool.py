"""``pool_``: sums of a feature map over its pixels, redone only for samples that changed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spnet.kernels.library import DTYPES, SPNET, Launch, check, check_contiguous, define, multiprocessors

SLAB = 256  # pixels that one program sums: at batch 1 a 56x56 map still occupies a GPU


@triton.jit
def _pool_kernel(
    sums_ptr,
    x_ptr,
    index_ptr,
    count_ptr,
    batch,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLABS: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    n = batch
    if count_ptr is not None:
        n = tl.load(count_ptr)
    for task in range(tl.program_id(0), n * (SLABS * BLOCKS), tl.num_programs(0)):
        channel = task % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        slab = task // BLOCKS % SLABS
        sample = task // (BLOCKS * SLABS)
        if index_ptr is not None:
            sample = tl.load(index_ptr + sample)
        sample = sample.to(tl.int64)
        ok = channel < CHANNELS
        # One accumulator per lane, then one tree: the order depends on the shape of the map alone.
        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, SLAB, BLOCK_P):
            pixel = slab * SLAB + start + tl.arange(0, BLOCK_P)
            x_ptrs = x_ptr + (sample * PIXELS + pixel)[:, None] * CHANNELS + channel[None, :]
            acc += tl.load(x_ptrs, mask=(pixel < PIXELS)[:, None] & ok[None, :], other=0.0).to(tl.float32)
        tl.store(sums_ptr + (sample * SLABS + slab) * CHANNELS + channel, tl.sum(acc, 0), mask=ok)


def slabs(pixels: int) -> int:
    """S: into how many partial sums :func:`pool_` cuts a map of that many pixels."""
    return -(-pixels // SLAB)


def pool_(sums: Tensor, x: Tensor, index: Tensor | None = None, count: Tensor | None = None) -> None:
    """Sum each channel over the pixels of the listed samples: the pooled vector is ``sums.sum(1) / (H * W)``.

    Two calls give the same bits for the same sample, whatever the batch and the list.

    Args:
        sums: float32 [B, S, C] contiguous, S = slabs(H * W): sums over 256 pixels each. Samples that are not listed
            keep their bits.
        x: float16, bfloat16 or float32 [B, H, W, C] contiguous.
        index: int32 [B], the samples that changed; with count, or neither: the whole batch.
        count: int32 [1].

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    SPNET.pool_(sums, x, index, count)


def _check(sums, x, index, count) -> None:
    check("x", x, DTYPES, (-1, -1, -1, -1))
    batch, h, w, channels = x.shape
    check("sums", sums, torch.float32, (batch, slabs(h * w), channels))
    check("index", index, torch.int32, (batch,))
    check("count", count, torch.int32, (1,))
    if (index is None) != (count is None):
        raise ValueError("index, count: expected both or neither")
    check_contiguous(sums=sums, x=x, index=index)


def _twin(sums, x, index, count) -> None:
    changed = slice(None) if index is None else index[: int(count)].long()
    pixels = x[changed].flatten(1, 2).float()
    sums[changed] = torch.stack([slab.sum(1) for slab in pixels.split(SLAB, 1)], 1)


def launch(sums, x, index, count) -> Launch:
    """The launch of one ``pool_``."""
    batch, h, w, channels = x.shape
    arguments = dict(
        sums_ptr=sums,
        x_ptr=x,
        index_ptr=index,
        count_ptr=count,
        batch=batch,
        PIXELS=h * w,
        CHANNELS=channels,
        SLABS=slabs(h * w),
        SLAB=min(SLAB, triton.next_power_of_2(h * w)),
        BLOCK_P=32,
        BLOCK_C=min(64, triton.next_power_of_2(channels)),
    )
    tasks = batch * arguments["SLABS"] * -(-channels // arguments["BLOCK_C"])
    return Launch(_pool_kernel, min(tasks, 8 * multiprocessors(x.device)), arguments, warps=4, stages=3)


define("pool_(Tensor(a!) sums, Tensor x, Tensor? index, Tensor? count)", _check, _twin, launch)
