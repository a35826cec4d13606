"""``max_pool_``: the max-pooling behind a stem, dense. PyTorch's own took longest of all kernels of a ResNet-50."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from spnet.kernels.library import DTYPES, MOST, SPNET, Launch, check, check_contiguous, define


@triton.jit
def _max_pool_kernel(
    out_ptr,
    x_ptr,
    pixels,
    H_IN: tl.constexpr,
    W_IN: tl.constexpr,
    H_OUT: tl.constexpr,
    W_OUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pixel = tl.program_id(0) // BLOCKS * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    sample = (pixel // (H_OUT * W_OUT)).to(tl.int64)
    top = pixel // W_OUT % H_OUT * STRIDE - PADDING
    left = pixel % W_OUT * STRIDE - PADDING
    largest = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    for tap in tl.static_range(KERNEL * KERNEL):
        h = top + tap // KERNEL
        w = left + tap % KERNEL
        inside = (h >= 0) & (h < H_IN) & (w >= 0) & (w < W_IN)
        x_ptrs = x_ptr + ((sample * H_IN + h) * W_IN + w)[:, None] * CHANNELS + channel[None, :]
        value = tl.load(x_ptrs, mask=ok & inside[:, None], other=float("-inf"))
        largest = tl.maximum(largest, value.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    tl.store(
        out_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :],
        largest.to(out_ptr.dtype.element_ty),
        mask=ok,
    )


def max_pool_(out: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> None:
    """``out = F.max_pool2d(x, kernel, stride, padding)``; the largest of numbers with a NaN is NaN.

    Args:
        out: [B, Ho, Wo, C] contiguous, dtype of x.
        x: float16, bfloat16 or float32 [B, H, W, C] contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; out is unchanged.
    """
    SPNET.max_pool_(out, x, kernel, stride, padding)


def pooled_shape(shape: tuple[int, ...], kernel: int, stride: int, padding: int) -> tuple[int, int, int, int]:
    """Of the result [B, Ho, Wo, C] for x [B, H, W, C]."""
    batch, h, w, channels = shape
    return batch, (h + 2 * padding - kernel) // stride + 1, (w + 2 * padding - kernel) // stride + 1, channels


def _check(out, x, kernel, stride, padding) -> None:
    check("x", x, DTYPES, (-1, -1, -1, -1))
    if not (0 < stride and 0 <= 2 * padding <= kernel):
        raise ValueError(f"expected stride > 0 and padding <= kernel / 2, got {kernel=}, {stride=}, {padding=}")
    check("out", out, x.dtype, pooled_shape(x.shape, kernel, stride, padding))
    if x.shape[:3].numel() > MOST:
        raise ValueError(f"x: expected at most {MOST} pixels, got {list(x.shape)}")
    check_contiguous(out=out, x=x)


def _twin(out, x, kernel, stride, padding) -> None:
    out.copy_(F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding).permute(0, 2, 3, 1))


def launch(out, x, kernel, stride, padding) -> Launch:
    """The launch of one ``max_pool_``."""
    batch, h_out, w_out, channels = out.shape
    arguments = dict(
        out_ptr=out,
        x_ptr=x,
        pixels=batch * h_out * w_out,
        H_IN=x.shape[1],
        W_IN=x.shape[2],
        H_OUT=h_out,
        W_OUT=w_out,
        CHANNELS=channels,
        KERNEL=kernel,
        STRIDE=stride,
        PADDING=padding,
        BLOCK_P=16,
        BLOCK_C=min(64, triton.next_power_of_2(channels)),
    )
    programs = -(-arguments["pixels"] // arguments["BLOCK_P"]) * -(-channels // arguments["BLOCK_C"])
    return Launch(_max_pool_kernel, programs, arguments, warps=4, stages=1)


define("max_pool_(Tensor(a!) out, Tensor x, int kernel, int stride, int padding)", _check, _twin, launch)
