"""``stem_conv_``: the first convolution of a network, dense, for at most four input channels.

With three channels a tap is too short for a vector load or a tensor core. The image is therefore kept with a border of
zeros and four channels, so that the k + 1 pixels under one row of taps are 4 (k + 1) neighbouring numbers: seen with
overlapping strides, the stem is a convolution of k x 1 taps over that many channels, whose loads are aligned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spnet.kernels.conv import launch_product
from spnet.kernels.library import DTYPES, MOST, SPNET, Launch, check, check_contiguous, define
from spnet.kernels.tiling import Tile

CHANNELS = 4


def stem_conv_(
    out: Tensor, padded: Tensor, weight: Tensor, bias: Tensor, *, stride: int, relu: bool = True, tf32: bool = False
) -> None:
    """``out = relu?(conv(x) + bias)`` for the whole batch, padding (k - 1) / 2.

    Args:
        out: [B, Ho, Wo, Cout] contiguous, Ho = ceil(H / stride), Wo = ceil(W / stride), dtype of padded.
        padded: float16, bfloat16 or float32 of padded_shape(x.shape, k, stride), contiguous: zeros, and the image in
            its :func:`interior`.
        weight: [Cout, k, 4 (k + 1)] contiguous, dtype of padded, k odd: :func:`pack_stem_weight`.
        bias: float32 [Cout].
        stride: 1 or 2.
        relu: apply ReLU. NaN stays NaN.
        tf32: as in :func:`spnet.kernels.conv_`.

    Raises:
        TypeError, ValueError: an argument does not fit; out is unchanged.
    """
    SPNET.stem_conv_(out, padded, weight, bias, stride, relu, tf32)


def padded_shape(shape: tuple[int, ...], kernel: int, stride: int) -> tuple[int, int, int, int]:
    """Shape [B, H', W', 4] of the padded image for x [B, C, H, W], C <= 4."""
    batch, channels, h, w = shape
    if channels > CHANNELS:
        raise ValueError(f"shape: expected at most {CHANNELS} channels, got {list(shape)}")
    height = (-(-h // stride) - 1) * stride + kernel
    width = (-(-w // stride) - 1) * stride + kernel + 1
    return batch, height, width + width % 2, CHANNELS  # an even width keeps rows of halves at 16 bytes


def interior(padded: Tensor, shape: tuple[int, ...], kernel: int) -> Tensor:
    """The view [B, C, H, W] of a padded image into which x of that shape is to be copied."""
    _, channels, h, w = shape
    border = kernel // 2
    return padded[:, border : border + h, border : border + w, :channels].permute(0, 3, 1, 2)


def pack_stem_weight(weight: Tensor) -> Tensor:
    """Weight of an nn.Conv2d [Cout, C <= 4, k, k] -> contiguous [Cout, k, 4 (k + 1)], zeros where nothing is."""
    _, channels, _, kernel = weight.shape
    packed = F.pad(weight.permute(0, 2, 3, 1), (0, CHANNELS - channels, 0, 1))
    return packed.reshape(-1, kernel, CHANNELS * (kernel + 1)).contiguous()


def _check(out, padded, weight, bias, stride, relu, tf32) -> None:
    check("padded", padded, DTYPES, (-1, -1, -1, CHANNELS))
    check("weight", weight, padded.dtype, (-1, -1, -1))
    cout, kernel, row = weight.shape
    if kernel % 2 == 0 or row != CHANNELS * (kernel + 1):
        raise ValueError(f"weight: expected [Cout, k, {CHANNELS} (k + 1)] with k odd, got {list(weight.shape)}")
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")
    check("bias", bias, torch.float32, (cout,))
    batch, height, width, _ = padded.shape
    h, w = (height - kernel) // stride + 1, (width - kernel - 1) // stride + 1
    check("out", out, padded.dtype, (batch, h, -1, cout))
    if not w - 1 <= out.shape[2] <= w:
        raise ValueError(f"out: expected width {w}, got {out.shape[2]}")
    if batch * height * width > MOST:
        raise ValueError(f"padded: expected at most {MOST} pixels, got {list(padded.shape)}")
    check_contiguous(out=out, padded=padded, weight=weight, bias=bias)


def _twin(out, padded, weight, bias, stride, relu, tf32) -> None:
    cout, kernel, _ = weight.shape
    taps = weight.view(cout, kernel, kernel + 1, CHANNELS).permute(0, 3, 1, 2)
    y = F.conv2d(padded.permute(0, 3, 1, 2).float(), taps.float(), bias, stride=stride).permute(0, 2, 3, 1)
    y = y[:, :, : out.shape[2]]
    out.copy_(y.relu() if relu else y)


def launch(out, padded, weight, bias, stride, relu, tf32, tile: Tile | None = None) -> Launch:
    """The launch of one ``stem_conv_``, by the tile given or the one of the table."""
    batch, height, width, _ = padded.shape
    _, kernel, row = weight.shape
    image, line = height * width * CHANNELS, width * CHANNELS
    x = padded.as_strided((batch, height, out.shape[2], row), (image, line, stride * CHANNELS, 1))
    geometry = dict(KERNEL_H=kernel, KERNEL_W=1, STRIDE_H=stride, STRIDE_W=1, PADDING=0, GROUPS=1)
    modes = dict(GATHER=False, SCATTER=False, ADD=False, RELU=relu)
    return launch_product(out, x, weight, bias, None, None, None, geometry, modes, tf32, None, tile)


define(
    "stem_conv_(Tensor(a!) out, Tensor padded, Tensor weight, Tensor bias, int stride, bool relu, bool tf32)",
    _check,
    _twin,
    launch,
)
