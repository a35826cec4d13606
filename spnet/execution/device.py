"""What the plans of each kind of device require."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

EXPERIMENTAL = "SPNET_EXPERIMENTAL_CUDA_BATCH"
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ValueError that says why no plan of this dtype runs on this device."""
    if dtype not in DTYPES.get(device.type, ()):
        raise ValueError(
            f"{dtype} on {device} is neither float32 nor bfloat16 on the CPU, nor one of these or float16 on CUDA"
        )
    if device.type == "cuda":
        if os.environ.get(EXPERIMENTAL) != "1":
            raise ValueError(f"batch on CUDA has not been measured on a GPU; {EXPERIMENTAL}=1 in the environment opens it")
        check_cuda(torch.cuda.get_device_capability(device), find_spec("triton") is not None)


def check_cuda(capability: tuple[int, int], has_triton: bool) -> None:
    """Raise a ValueError unless a GPU of this compute capability, and this installation, can run the Triton kernels."""
    if capability < (8, 0):
        raise ValueError(f"batch on CUDA needs compute capability 8.0 or higher, got {capability[0]}.{capability[1]}")
    if not has_triton:
        raise ValueError("batch on CUDA needs Triton, which is not installed")
