"""What plans require of their device, and what they use of it beside operators: capture, streams, clocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Lock
from time import perf_counter

import torch
from torch import Tensor

from spnet.native import core

DTYPES = torch.float32, torch.bfloat16, torch.float16


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ValueError that says why no plan of this dtype runs on this device."""
    if device.type not in ("cpu", "cuda") or dtype not in DTYPES:
        raise ValueError(f"{dtype} on {device} is neither float32, bfloat16 nor float16 on the CPU or CUDA")
    if device.type == "cuda" and torch.version.hip is not None:
        raise ValueError("plans run on GPUs of NVIDIA, and this is PyTorch for ROCm")


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What the CPU computes plans of a dtype in: float32 where the processor does not multiply that dtype."""
    return dtype if dtype == torch.bfloat16 and core.has_bfloat16() else torch.float32


@cache
def why_not_native(device: torch.device) -> str:
    """Why the native CUDA kernels do not run on this GPU, in words; empty where they do.

    A launch tells: a GPU that they are not compiled for and a driver older than their CUDA are found alike.
    """
    if core.cuda_architectures is None:
        return f"this build has no CUDA kernels ({core.cuda_status})"
    mask, out = (torch.ones(1, dtype=dtype, device=device) for dtype in (torch.bool, torch.int64))
    count, stream = torch.empty_like(out), torch.cuda.current_stream(device).cuda_stream
    try:
        core.cuda.compact(device.index, stream, mask.data_ptr(), 1, out.data_ptr(), count.data_ptr())
    except RuntimeError as e:
        return f"the CUDA kernels of this build ({core.cuda_status}) do not run on {device}: {e}"
    return ""


def check_cuda(capability: tuple[int, int], has_triton: bool) -> None:
    """Raise a ValueError unless a GPU of this compute capability, and this installation, can run the Triton kernels."""
    if capability < (8, 0):
        raise ValueError(f"batch on CUDA needs compute capability 8.0 or higher, got {capability[0]}.{capability[1]}")
    if not has_triton:
        raise ValueError("batch on CUDA needs Triton, which is not installed")


class OnCpu:
    """The twin of :class:`OnCuda`: calls the function every time."""

    tf32 = False

    def __init__(self, device: torch.device):
        pass

    def capture(self, function: Callable[[], None], beside=None) -> Callable[[], None]:
        return function

    def in_order(self, buffers: list[Tensor], weights: list[Tensor]):
        return nullcontext()

    def clock(self, function: Callable[[], object]) -> Callable[[], float]:
        def seconds() -> float:
            start = perf_counter()
            function()
            return perf_counter() - start

        return seconds


_capturing = Lock()  # a capture begins by waiting for the device, which another capture would not survive


class OnCuda:
    """Capture, streams and clocks of one CUDA device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._made_on = torch.cuda.current_stream(device)
        self._side = torch.cuda.Stream(device)
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @property
    def tf32(self) -> bool:
        # What allow_tf32 sets too; reading that raises where convolutions and recurrent networks differ.
        return torch.backends.cudnn.conv.fp32_precision == "tf32"

    def capture(self, function: Callable[[], None], beside: Callable | None = None) -> Callable[[], None]:
        """Run the function once, which compiles its kernels, then capture it; the result replays it.

        Args:
            beside: an earlier result that is never replayed at the same time: both use the same memory.
        """
        # The first run too: cuDNN's search among its algorithms, and a lack of memory, empty the cache of PyTorch's
        # allocator, which it refuses during a capture.
        with _capturing, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            try:
                with torch.cuda.stream(self._side):
                    function()
            finally:  # also where memory ran out: what was launched before still writes to the caller's tensors
                current.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            pool = None if beside is None else beside.__self__.pool()
            # Other threads may go on using the GPU.
            options = dict(pool=pool, stream=self._side, capture_error_mode="thread_local")
            with torch.cuda.graph(graph, **options):
                function()
        return graph.replay

    @contextmanager
    def in_order(self, buffers: list[Tensor], weights: list[Tensor]) -> Iterator[None]:
        """What is launched inside waits, on the device, for what was launched inside before on another stream.

        Args:
            buffers, weights: what it writes and reads; the weights were made on the stream that made this object.
        """
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if self._last is not None and self._last[0] != stream:
                stream.wait_event(self._last[1])
            # Or what is dropped now would be reused before the work is done.
            for tensor in buffers if stream == self._made_on else [*buffers, *weights]:
                tensor.record_stream(stream)
            try:
                yield
            finally:  # what was launched before an error still runs
                event = self._last[1] if self._last is not None else torch.cuda.Event()
                event.record(stream)
                self._last = stream, event

    def clock(self, function: Callable[[], object]) -> Callable[[], float]:
        """The result runs a captured function and returns its seconds on the device."""
        replay = self.capture(function)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds() -> float:
            with torch.cuda.device(self._device):
                begin.record()
                replay()
                end.record()
                end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return seconds


def on(device: torch.device) -> OnCpu | OnCuda:
    return (OnCuda if device.type == "cuda" else OnCpu)(device)
