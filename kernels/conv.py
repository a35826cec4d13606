"""``conv_``: convolutions of a residual body and of its shortcut, on the samples that execute.

An implicit matrix product: rows are the output pixels of the listed samples (M), columns the output channels (N), and
the sum runs over taps and input channels (K). Only the address of an input row knows of convolution, stride, padding
and of the index list, so 1x1 and 3x3 kernels, gather and scatter are one loop. Where there are fewer tiles than
multiprocessors, a small batch, several programs share a tile, each with a part of the sum: split-K.

With groups, 64 neighbouring outputs, a bundle, are computed together from all channels that one of them reads, with
weights of zero where an output does not read one: tensor cores multiply no fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from spnet.kernels import tiling
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

BUNDLE = 64  # outputs


class Scratch(NamedTuple):
    """Memory in which programs that share a tile meet; of one stream at a time."""

    partials: Tensor  # float32 [n]
    counters: Tensor  # int32 [n], zeros between launches

    @classmethod
    def on(cls, device: torch.device) -> Scratch:
        """4 MiB; tiles that find no room there are not shared."""
        partials = torch.empty(tiling.SPLIT_ELEMENTS, dtype=torch.float32, device=device)
        return cls(partials, torch.zeros(tiling.SPLIT_TILES, dtype=torch.int32, device=device))


@triton.jit
def _round_to_tf32(x):
    # Tensor cores cut off the last 13 bits: all errors towards zero, which add up to ten times those of rounding.
    rounded = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)  # the bits of a NaN could overflow


@triton.jit
def _conv_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    count_ptr,
    skip_relu_ptr,
    partials_ptr,
    counters_ptr,
    batch,
    stride_skip,
    H_IN: tl.constexpr,
    W_IN: tl.constexpr,
    H_OUT: tl.constexpr,
    W_OUT: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    BUNDLE: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING: tl.constexpr,
    stride_xb: tl.constexpr,
    stride_xh: tl.constexpr,
    stride_xw: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ADD: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    PIXELS: tl.constexpr = H_OUT * W_OUT
    K: tl.constexpr = KERNEL_H * KERNEL_W * CIN
    STEPS: tl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K  # per tap
    STEPS_OF_PART: tl.constexpr = KERNEL_H * KERNEL_W * STEPS // SPLIT
    TILES_N: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    GROUP_IN: tl.constexpr = CHANNELS // GROUPS
    GROUP_OUT: tl.constexpr = COUT // GROUPS
    LAST: tl.constexpr = (COUT - 1) // BUNDLE * BUNDLE // GROUP_OUT * GROUP_IN  # first channel of the last bundle
    EVEN_K: tl.constexpr = CIN % BLOCK_K == 0 and LAST + CIN <= CHANNELS
    EVEN_N: tl.constexpr = COUT % BLOCK_N == 0
    n = batch
    if count_ptr is not None:
        n = tl.load(count_ptr)
    rows = n * PIXELS
    tiles_m = tl.cdiv(rows, BLOCK_M)
    for task in range(tl.program_id(0), tiles_m * TILES_N * SPLIT, tl.num_programs(0)):
        tile = task // SPLIT
        part = task % SPLIT
        # Neighbouring programs share a strip of GROUP_M row blocks, and so their weights and inputs in L2.
        group = tile // (GROUP_M * TILES_N)
        group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * TILES_N)
        tile_m = group * GROUP_M + within % group_rows
        tile_n = within // group_rows

        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row < rows
        row = tl.where(row_ok, row, 0)  # reads a row that exists; nothing of it is stored
        position = row // PIXELS
        pixel = row % PIXELS
        h = pixel // W_OUT * STRIDE_H - PADDING
        w = pixel % W_OUT * STRIDE_W - PADDING
        listed = position
        if GATHER or SCATTER:
            listed = tl.load(index_ptr + position)
        source = listed if GATHER else position
        x_row = source.to(tl.int64) * stride_xb + h.to(tl.int64) * stride_xh + w * stride_xw
        if GROUPS > 1:
            bundle = tile_n * BLOCK_N // BUNDLE
            if BUNDLE % GROUP_OUT == 0:  # a multiple that the compiler sees
                first = bundle * (BUNDLE // GROUP_OUT * GROUP_IN)
            else:
                first = bundle * BUNDLE // GROUP_OUT * GROUP_IN
            x_row += first

        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_row = (column if EVEN_N else tl.where(column < COUT, column, 0)) * K
        k = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(part * STEPS_OF_PART, (part + 1) * STEPS_OF_PART):
            tap = step // STEPS
            channel = step % STEPS * BLOCK_K
            tap_h = tap // KERNEL_W
            tap_w = tap % KERNEL_W
            a_ptrs = x_ptr + (x_row + (tap_h * stride_xh + tap_w * stride_xw + channel))[:, None] + k[None, :]
            b_ptrs = weight_ptr + (weight_row[None, :] + (tap * CIN + channel)) + k[:, None]
            left = CIN - channel
            if GROUPS > 1:
                left = tl.minimum(CIN, CHANNELS - first) - channel
            if PADDING > 0:
                inside = (h + tap_h >= 0) & (h + tap_h < H_IN) & (w + tap_w >= 0) & (w + tap_w < W_IN)
                if EVEN_K:
                    a = tl.load(a_ptrs, mask=inside[:, None], other=0.0)
                    b = tl.load(b_ptrs)
                else:
                    a = tl.load(a_ptrs, mask=inside[:, None] & (k[None, :] < left), other=0.0)
                    b = tl.load(b_ptrs, mask=k[:, None] < left, other=0.0)
            elif EVEN_K:
                a = tl.load(a_ptrs)
                b = tl.load(b_ptrs)
            else:
                a = tl.load(a_ptrs, mask=k[None, :] < left, other=0.0)
                b = tl.load(b_ptrs, mask=k[:, None] < left, other=0.0)
            if PRECISION == "tf32":
                a = _round_to_tf32(a)
                b = _round_to_tf32(b)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

        last = True
        if SPLIT > 1:
            element = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            partial_ptrs = partials_ptr + tile * (SPLIT * BLOCK_M * BLOCK_N) + element
            tl.store(partial_ptrs + part * (BLOCK_M * BLOCK_N), acc)
            tl.debug_barrier()  # all of the program's are stored before its arrival is
            last = tl.atomic_add(counters_ptr + tile, 1) == SPLIT - 1
            if last:
                tl.store(counters_ptr + tile, 0)
                # In the order of the parts, whoever came last.
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for i in range(SPLIT):
                    acc += tl.load(partial_ptrs + i * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
        if last:
            column_ok = column < COUT
            stored = row_ok[:, None] if EVEN_N else row_ok[:, None] & column_ok[None, :]
            out_row = listed.to(tl.int64) * PIXELS + pixel if SCATTER else row.to(tl.int64)
            out_ptrs = out_ptr + out_row[:, None] * COUT + column[None, :]
            acc += (tl.load(bias_ptr + column) if EVEN_N else tl.load(bias_ptr + column, mask=column_ok, other=0.0))[
                None, :
            ]
            if ADD:
                acc += tl.load(out_ptrs, mask=stored, other=0.0).to(tl.float32)
            if RELU:
                clamped = acc < 0  # NaN stays NaN
                if skip_relu_ptr is not None:
                    executes = tl.load(skip_relu_ptr + position.to(tl.int64) * stride_skip, mask=row_ok, other=0)
                    clamped = clamped & (executes == 0)[:, None]
                acc = tl.where(clamped, 0.0, acc)
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=stored)


def conv_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    groups: int = 1,
    index: Tensor | None = None,
    count: Tensor | None = None,
    gather: bool = False,
    scatter: bool = False,
    add: bool = False,
    relu: bool = True,
    skip_relu: Tensor | None = None,
    tf32: bool = False,
    scratch: Scratch | None = None,
) -> None:
    """Convolve the first ``count`` samples, or those that are listed, and write into ``out``.

    With i < count and y = conv(x[index[i]] if gather else x[i]) + bias, added up in float32::

        target = out[index[i]] if scatter else out[i]
        target = relu?(target + y if add else y)          # rounded once

    Samples of out that are no target keep their bits. Padding is (k - 1) / 2.

    Args:
        out: [B', Ho, Wo, Cout] contiguous, dtype of x; shares no memory with x.
        x: float16, bfloat16 or float32 [B, H, W, Cin] contiguous.
        weight: [Cout, k, k, channels_read(Cin, Cout, groups)] contiguous, dtype of x, k in (1, 3):
            :func:`pack_weight`.
        bias: float32 [Cout].
        groups: as in an nn.Conv2d. Where what one of them reads is not finite, outputs of others may be NaN.
        stride: 1 or 2; Ho = ceil(H / stride), Wo = ceil(W / stride).
        index: int32 [B] with values in [0, B), distinct below count. Needed by gather and scatter.
        count: int32 [1], at most the batch of x, out and index; None: the whole batch, without index.
        relu: apply ReLU to the result. NaN stays NaN.
        skip_relu: bool [B] of any stride: samples that get no ReLU. For the shortcut of a routed block, to whose
            executing samples (its decisions) the body is added later. Without index and count.
        tf32: round x and weight of float32 to the 10 bits of mantissa that tensor cores multiply. Not on the CPU.
            Otherwise they multiply each number's leading and following bits, with errors like those of float32.
        scratch: lets several programs share a tile where there are few. Not on the CPU.

    Raises:
        TypeError, ValueError: an argument does not fit; out is unchanged.
    """
    modes = gather, scatter, add, relu, skip_relu, tf32
    SPNET.conv_(out, x, weight, bias, stride, groups, index, count, *modes, *(scratch or (None, None)))


def _first_channel(output: int, cin: int, cout: int, groups: int) -> int:
    """That the bundle of an output reads."""
    return output // BUNDLE * BUNDLE // (cout // groups) * (cin // groups)


def channels_read(cin: int, cout: int, groups: int = 1) -> int:
    """How many neighbouring channels a bundle reads, at most."""
    ends = (min(start + BUNDLE, cout) - 1 for start in range(0, cout, BUNDLE))
    inputs, outputs = cin // groups, cout // groups
    return max((last // outputs + 1) * inputs - _first_channel(last, cin, cout, groups) for last in ends)


def pack_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Of an nn.Conv2d [Cout, Cin / groups, k, k] -> contiguous [Cout, k, k, channels_read(Cin, Cout, groups)]."""
    weight = weight.permute(0, 2, 3, 1)
    if groups == 1:
        return weight.contiguous()
    cout, kernel, _, inputs = weight.shape
    cin = groups * inputs
    read = [o // (cout // groups) * inputs - _first_channel(o, cin, cout, groups) for o in range(cout)]
    place = torch.tensor(read, device=weight.device)[:, None] + torch.arange(inputs, device=weight.device)
    packed = weight.new_zeros(cout, kernel, kernel, channels_read(cin, cout, groups))
    return packed.scatter_(3, place[:, None, None].expand_as(weight), weight)


def _check(
    out, x, weight, bias, stride, groups, index, count, gather, scatter, add, relu, skip_relu, tf32, partials, counters
) -> None:
    check("x", x, DTYPES, (-1, -1, -1, -1))
    batch, h, w, cin = x.shape
    check("weight", weight, x.dtype, (-1, -1, -1, -1))
    cout, kernel = weight.shape[:2]
    if groups < 1 or cin % groups or cout % groups:
        raise ValueError(f"groups: expected a divisor of {cin} and {cout} channels, got {groups}")
    check("weight", weight, x.dtype, (-1, -1, -1, channels_read(cin, cout, groups)))
    if weight.shape[2] != kernel or kernel not in (1, 3):
        raise ValueError(f"weight: expected [Cout, k, k, Cin] with k = 1 or 3, got {list(weight.shape)}")
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")
    check("bias", bias, torch.float32, (cout,))
    check("out", out, x.dtype, (-1, -(-h // stride), -(-w // stride), cout))
    check_list(index, count, gather, scatter)
    check("skip_relu", skip_relu, torch.bool, (batch,))
    check("partials", partials, torch.float32, (-1,))
    check("counters", counters, torch.int32, (-1,))
    if skip_relu is not None and (count is not None or not relu):
        raise ValueError("skip_relu: expected relu=True and no count")
    if count is None and out.shape[0] != batch:
        raise ValueError(f"out: expected batch {batch} like x, got {out.shape[0]}")
    if max(max(batch, out.shape[0]) * h * w, kernel * w * cin, weight.numel()) > MOST:
        raise ValueError(
            f"x, weight: expected at most {MOST} pixels, elements in {kernel} rows of a map and weights, "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    check_contiguous(out=out, x=x, weight=weight, bias=bias, index=index, partials=partials, counters=counters)


def _twin(
    out, x, weight, bias, stride, groups, index, count, gather, scatter, add, relu, skip_relu, tf32, partials, counters
) -> None:
    n = x.shape[0] if count is None else int(count)
    rows = x[:n] if not gather else x[index[:n]]
    y = F.conv2d(
        rows.permute(0, 3, 1, 2).float(),
        _without_groups(weight, x.shape[3], groups).permute(0, 3, 1, 2).float(),
        bias,
        stride=stride,
        padding=weight.shape[1] // 2,
    ).permute(0, 2, 3, 1)
    target = index[:n].long() if scatter else torch.arange(n)
    if add:
        y = y + out[target].float()
    if relu:
        y = y.relu() if skip_relu is None else torch.where(skip_relu[:, None, None, None], y, y.relu())
    out[target] = y.to(out.dtype)


def _without_groups(weight: Tensor, cin: int, groups: int) -> Tensor:
    """The same convolution: [Cout, k, k, Cin]."""
    cout, kernel, _, reads = weight.shape
    dense = weight.new_zeros(cout, kernel, kernel, cin + reads)
    for start in range(0, cout, BUNDLE):
        first = _first_channel(start, cin, cout, groups)
        dense[start : start + BUNDLE, ..., first : first + reads] = weight[start : start + BUNDLE]
    return dense[..., :cin]


def launch(
    out,
    x,
    weight,
    bias,
    stride,
    groups,
    index,
    count,
    gather,
    scatter,
    add,
    relu,
    skip_relu,
    tf32,
    partials=None,
    counters=None,
    tile: tiling.Tile | None = None,
) -> Launch:
    """The launch of one ``conv_``, by the tile given or the one of the table."""
    kernel = weight.shape[1]
    geometry = dict(KERNEL_H=kernel, KERNEL_W=kernel, STRIDE_H=stride, STRIDE_W=stride, PADDING=kernel // 2)
    geometry["GROUPS"] = groups
    modes = dict(GATHER=gather, SCATTER=scatter, ADD=add, RELU=relu)
    scratch = None if partials is None else Scratch(partials, counters)
    return launch_product(out, x, weight, bias, index, count, skip_relu, geometry, modes, tf32, scratch, tile)


def launch_product(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    skip_relu: Tensor | None,
    geometry: dict[str, int],
    modes: dict[str, bool],
    tf32: bool,
    scratch: Scratch | None,
    tile: tiling.Tile | None,
) -> Launch:
    """Any convolution whose taps and channels lie in x [B, H, W, C] at its strides, the last of which is 1."""
    _, h_out, w_out, cout = out.shape
    batch, h_in, w_in, channels = x.shape
    cin = weight.shape[-1]
    rows = min(batch, out.shape[0]) * h_out * w_out
    if tile is None:
        shape = tiling.Shape.of(x.dtype, tf32, geometry["KERNEL_H"], cin, cout, rows, skip_relu is not None)
        tile = tiling.choose(tiling.architecture(x.device), shape)
    if geometry["GROUPS"] > 1:  # a tile reads what its bundle does
        tile = tile._replace(block_n=min(tile.block_n, BUNDLE))
    tiles = -(-rows // tile.block_m) * -(-cout // tile.block_n)
    steps = geometry["KERNEL_H"] * geometry["KERNEL_W"] * -(-cin // tile.block_k)
    elements = tiles * tile.split * tile.block_m * tile.block_n
    has_room = scratch is not None and tiles <= len(scratch.counters) and elements <= len(scratch.partials)
    split = tile.split if has_room and steps % tile.split == 0 else 1
    # Of halves the products are exact; FMAs in place of three products of tensor cores would take many times longer.
    precision = "ieee" if x.dtype != torch.float32 else "tf32" if tf32 else "tf32x3"
    arguments = dict(
        out_ptr=out,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        index_ptr=index,
        count_ptr=count,
        skip_relu_ptr=skip_relu,
        partials_ptr=scratch.partials if split > 1 else None,
        counters_ptr=scratch.counters if split > 1 else None,
        batch=batch,
        stride_skip=0 if skip_relu is None else skip_relu.stride(0),
        H_IN=h_in,
        W_IN=w_in,
        H_OUT=h_out,
        W_OUT=w_out,
        CIN=cin,
        COUT=cout,
        CHANNELS=channels,
        BUNDLE=BUNDLE,
        **geometry,
        stride_xb=x.stride(0),
        stride_xh=x.stride(1),
        stride_xw=x.stride(2),
        **modes,
        PRECISION=precision,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        SPLIT=split,
    )
    programs = min(tiles * split, multiprocessors(x.device) * tile.programs_per_sm)
    return Launch(_conv_kernel, programs, arguments, tile.warps, tile.stages)


define(
    "conv_(Tensor(a!) out, Tensor x, Tensor weight, Tensor bias, int stride, int groups, Tensor? index, Tensor? count,"
    " bool gather, bool scatter, bool add, bool relu, Tensor? skip_relu, bool tf32, Tensor(b!)? partials,"
    " Tensor(c!)? counters)",
    _check,
    _twin,
    launch,
)
