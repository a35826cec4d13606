"""What all operations share: how they are registered, and what a launch consists of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of maps
MOST = 2**31 - 256  # of what int32 counts up to whole tiles
_library = torch.library.Library("spnet", "FRAGMENT")
SPNET = torch.ops.spnet


class Launch(NamedTuple):
    """One launch of one kernel, ready to be run, timed or compiled for a GPU that is not here."""

    kernel: Any  # triton.JITFunction
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)

    def run(self) -> Any:
        """Returns the compiled kernel; None in the interpreter and where there is nothing to run."""
        return self.kernel[(self.programs,)](**self.arguments, **self.options) if self.programs else None


def define(schema: str, check: Callable, twin: Callable, launch: Callable[..., Launch]) -> None:
    """Register an operation that writes into its arguments: CPU runs the twin, CUDA the launch.

    Args:
        schema: of torch.library, with the name of the operation; returns nothing.
        check, twin, launch: called with the arguments of the schema. ``check`` raises, and runs before both others
            and alone for fake tensors; the launch's ``programs`` come from the device of the first argument.
    """
    name = schema.partition("(")[0]
    _library.define(f"{schema} -> ()")

    def cpu(*args) -> None:
        _check_tensors(name, args)
        check(*args)
        twin(*args)

    def cuda(*args) -> None:
        _check_tensors(name, args)
        check(*args)
        with torch.cuda.device(args[0].device):
            launch(*args).run()

    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"spnet::{name}", check, lib=_library)


def _check_tensors(name: str, args: tuple) -> None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if len(devices := {t.device for t in tensors}) > 1:
        raise ValueError(f"{name}: expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"{name}: an argument requires grad, but it has no gradient; call it under torch.no_grad()")


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; any other is taken for one that runs four programs (the interpreter, the compiler)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def check(name: str, tensor: Tensor | None, dtype: torch.dtype | tuple, shape: tuple[int, ...]) -> None:
    """Raise unless the tensor has one of the dtypes and the shape, whose -1 fit any size."""
    if tensor is None:
        return
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.ndim != len(shape) or any(s not in (-1, t) for s, t in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")


def check_list(index: Tensor | None, count: Tensor | None, gather: bool, scatter: bool) -> None:
    """Raise unless they are the list and the number of samples that gather and scatter need."""
    check("index", index, torch.int32, (-1,))
    check("count", count, torch.int32, (1,))
    if (gather or scatter) and (index is None or count is None):
        raise ValueError("index, count: expected both with gather or scatter, got None")


def check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous, got strides {tensor.stride()} for {list(tensor.shape)}")
