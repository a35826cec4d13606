"""``walk``: a plan run by the native core, one sample per worker with its feature map in cache or shared memory."""

from __future__ import annotations

import torch
from torch import Tensor

from spnet.execution.device import computed_in, why_not_native
from spnet.execution.table import Network
from spnet.native import core

_PRECISIONS = {torch.float32: core.Precision.float32, torch.bfloat16: core.Precision.bfloat16}
_HALVES = {torch.float16: core.Dtype.float16, torch.bfloat16: core.Dtype.bfloat16}


class _Walk:
    """What both have in common: a plan of the native core, which copies table and weights, both on the host."""

    def __init__(self, native: type, network: Network, weights: Tensor, *how):
        table = network.table()
        self._native = native(table.data_ptr(), table.numel(), weights.data_ptr(), weights.numel(), *how)
        self._outputs = network.num_classes, len(network.blocks)

    def _run(self, x: Tensor, paths: Tensor | None, threshold: float, *how) -> tuple[Tensor, Tensor]:
        batch, (classes, blocks) = len(x), self._outputs
        paths = None if paths is None else paths.contiguous()
        logits = torch.empty(batch, classes, dtype=torch.float32, device=x.device)
        decisions = torch.empty(batch, blocks, dtype=torch.bool, device=x.device)
        forced = 0 if paths is None else paths.data_ptr()
        outputs = logits.data_ptr(), decisions.data_ptr()
        self._native.run(x.data_ptr(), batch, *x.stride(), forced, threshold, *outputs, *how)
        return logits, decisions


class Walk(_Walk):
    """Networks of basic and bottleneck blocks on the CPU: 1x1 and 3x3 convolutions, a stem of 3x3 or 7x7.

    Args:
        network: the shapes.
        weights: float32 [n], in the order of ``network.shapes()``; packed for this processor, not kept.
        dtype: of the maps and the packed weights, float32 in place of what this processor does not multiply.

    Raises:
        ValueError: a network that the native core does not run.
    """

    def __init__(self, network: Network, weights: Tensor, dtype: torch.dtype):
        self._dtype = computed_in(dtype)
        super().__init__(core.Plan, network, weights, _PRECISIONS[self._dtype])

    def run(self, x: Tensor, paths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W], paths bool [B, L] or None -> float32 logits [B, classes], decisions bool [B, L]."""
        x = x.to(self._dtype)
        return self._run(x, paths, threshold, torch.get_num_threads(), x.dtype == torch.bfloat16)


class CudaWalk(_Walk):
    """The same in one launch: each thread block carries samples through the network in its shared memory.

    Nothing waits for the device; runs are ordered by the caller's stream and may be captured in a CUDA graph, which
    then needs this object as long as it lives.

    Args:
        network, weights: as for :class:`Walk`; the weights lie on the device that will run them.
        dtype: float16 or bfloat16.

    Raises:
        ValueError: a network that the native core does not run or whose maps do not fit shared memory, another dtype,
            or a build whose CUDA kernels do not run on this GPU.
    """

    def __init__(self, network: Network, weights: Tensor, dtype: torch.dtype):
        if dtype not in _HALVES:
            raise ValueError(f"walk on CUDA multiplies float16 and bfloat16, not {dtype}")
        if why_not := why_not_native(weights.device):
            raise ValueError(why_not)
        super().__init__(core.CudaPlan, network, weights.cpu(), _HALVES[dtype], weights.device.index)

    def run(self, x: Tensor, paths: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
        """As :meth:`Walk.run`, on the device of the weights."""
        return self._run(x, paths, threshold, torch.cuda.current_stream(x.device).cuda_stream)
