"""Triton kernels for routed residual networks, one operation per file; imported as ``spnet.kernels``.

What they have in common:

- Feature maps are NHWC: float16, bfloat16 or float32 [B, H, W, C], contiguous. Sums, routers and accumulators are
  float32.
- The samples that execute a block are an ``index`` (int32 [B], ascending) and a ``count`` (int32 [1]), both on the
  device. Kernels are launched for the whole batch and read the count themselves, so a forward needs no
  synchronisation and can be captured in one graph. Nothing is allocated: results go into the caller's buffers,
  and what an operation does not have to write keeps its bits.
- They are operators of :mod:`torch.library` in the namespace ``spnet``: CUDA tensors run the kernel, CPU tensors its
  twin in plain PyTorch, which stands beside it and is its specification. None is differentiable.

One block of a bottleneck network with an identity shortcut, state [B, H, W, C], widths C and M::

    pool_(sums, state, index, count)                            # only what the block before has changed
    route_(margins, sums, H * W, router.w1, router.b1, router.w2)
    decide_(index, count, decisions[:, l], margins, router.b2, threshold)
    # or, where paths force the decisions, for all blocks at once: compact_(lists, counts, paths)
    conv_(a, state, w1, bias1, index=index, count=count, gather=True)              # [n, H, W, M]
    conv_(b, a, w2, bias2, count=count)                                            # [n, H, W, M]
    conv_(state, b, w3, bias3, index=index, count=count, scatter=True, add=True)   # relu(state + body)

one whose shortcut is a convolution, whose result is the new state::

    conv_(state2, state, ws, bias_s, stride=2, skip_relu=decisions[:, l])   # ReLU where nothing will be added
    ...
    conv_(state2, b, w3, bias3, index=index, count=count, scatter=True, add=True)

with squeeze-and-excitation behind the second convolution, of whose map the averages give the factors [n, M]::

    scale_(b, b, factors, count=count)

with pre-activation::

    scale_(a, state, weight, bias, index=index, count=count, gather=True, relu=True)   # a BatchNorm that is alone

and the stem, whose input lies in a border of zeros::

    interior(padded, x.shape, 7).copy_(x)
    stem_conv_(map, padded, pack_stem_weight(weight), bias, stride=2)
    max_pool_(state, map, 3, 2, 1)

Tile shapes are looked up, never tuned at a call: :mod:`spnet.kernels.tiling`. ``python -m spnet.kernels.check``
compiles every kernel without a GPU, ``python -m spnet.kernels.tune`` measures tiles on one. Of GPUs the kernels have
run on an H100 alone, ``scale_`` and the groups of ``conv_`` on none.
"""

from spnet.kernels.compact import compact_, decide_
from spnet.kernels.conv import Scratch, conv_, pack_weight
from spnet.kernels.max_pool import max_pool_, pooled_shape
from spnet.kernels.pool import pool_, slabs
from spnet.kernels.route import RouterWeights, parts, route_
from spnet.kernels.scale import scale_
from spnet.kernels.stem import interior, pack_stem_weight, padded_shape, stem_conv_

__all__ = [
    "RouterWeights",
    "Scratch",
    "compact_",
    "conv_",
    "decide_",
    "interior",
    "max_pool_",
    "pack_stem_weight",
    "pack_weight",
    "padded_shape",
    "parts",
    "pool_",
    "pooled_shape",
    "route_",
    "scale_",
    "slabs",
    "stem_conv_",
]
