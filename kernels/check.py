"""Compile every kernel ahead of time, without a GPU: ``python -m spnet.kernels.check [--quick]``."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spnet.kernels.library import Launch

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # per block, opt-in
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Report(NamedTuple):
    """What the assembler says of one kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]  # matrix instructions found in its PTX


def compile_launch(launch: Launch, architecture: str) -> Report:
    """Compile the kernel of a launch as the first call would, with its arguments' specialisations, to a cubin."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        else:
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = _TYPES[value.dtype] if tensor else "i32"
            if tensor or value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=launch.options)
    ptx = compiled.asm["ptx"]
    found = tuple(sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx))))
    registers, stack = _usage(compiled.asm["cubin"])
    return Report(registers, stack, compiled.metadata.shared, found)


def _usage(cubin: bytes) -> tuple[int, int]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
    text = text.stdout + text.stderr
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "LOCAL"))
