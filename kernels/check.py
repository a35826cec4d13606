"""Compile every kernel ahead of time, without a GPU: ``python -m spnet.kernels.check``."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain, product
from typing import NamedTuple

import click
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spnet.kernels import tiling, workload
from spnet.kernels.library import Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
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
    registers, stack, local = _usage(compiled.asm["cubin"])
    return Report(registers, stack + local, compiled.metadata.shared, found)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
    text = text.stdout + text.stderr
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))


@cache
def cases(architecture: str) -> dict[str, Launch]:
    """What to compile: of launches that differ in nothing but sizes and channels, one; and all that were measured.

    tf32 does a third of what float32 does: of each tile one. bfloat16 differs from float16 in the names of
    instructions: of each role one, for sm_90.
    """
    meta = torch.device("meta")
    seen = set()
    found = dict(chain.from_iterable(workload.small_launches(batch, meta) for batch in workload.BATCHES))
    for dtype, network in product(workload.DTYPES, (*workload.NETWORKS, "resnext50")):
        for conv in workload.convolutions(network):
            kind = conv.dtype(dtype)
            shapes = {batch: conv.shape(kind, batch) for batch in workload.BATCHES}
            tiles = [(batch, tiling.choose(architecture, shape)) for batch, shape in shapes.items()]
            measured = tiling.measured(architecture, shapes[1])
            for batch, tile in [*tiles, *((workload.BATCHES[-1], tile) for tile in sorted(measured))]:
                even = shapes[1].cin % tile.block_k == 0, conv.cout % tile.block_n == 0
                kernel = tile._replace(programs_per_sm=1, split=min(tile.split, 2))  # as far as its code differs
                form = kind, kernel, even, conv.kernel, conv.role, conv.groups
                if kind == "tf32":
                    form = kind, kernel, conv.kernel, conv.groups
                elif kind == "bfloat16":
                    if architecture != "sm_90":
                        continue
                    form = kind, conv.role, conv.groups
                if form not in seen:
                    seen.add(form)
                    of = f"{conv.kernel}x{conv.kernel}/{conv.stride} {conv.cin}->{conv.cout}"
                    of += f" of {conv.groups} groups" if conv.groups > 1 else ""
                    name = f"conv {kind} {conv.role} {of} {tuple(tile)}"
                    found[name] = conv.launch(kind, batch, tile, meta)
    return found


def complaints(name: str, report: Report, architecture: str) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if report.spilled_bytes:
        found.append(f"spills {report.spilled_bytes} bytes")
    if report.shared_bytes > tiling.SHARED_BYTES[architecture]:
        found.append(f"needs {report.shared_bytes} bytes of shared memory, has {tiling.SHARED_BYTES[architecture]}")
    halves = name.startswith(("conv float16", "conv bfloat16"))
    if architecture == "sm_90" and halves and "wgmma.mma_async" not in report.instructions:
        found.append("has no wgmma")
    return found


def _compile(job: tuple[str, str]) -> Report:
    name, architecture = job
    return compile_launch(cases(architecture)[name], architecture)


@click.command(help=__doc__)
@click.option(
    "--arch",
    "architectures",
    multiple=True,
    type=click.Choice(tuple(tiling.SHARED_BYTES)),
    default=ARCHITECTURES,
    show_default=True,
)
@click.option("--jobs", default=os.cpu_count(), show_default=True, help="Processes.")
def main(architectures: tuple[str, ...], jobs: int) -> None:
    if triton.knobs.runtime.interpret:
        raise click.ClickException("TRITON_INTERPRET=1 is set: there is nothing to compile")
    work = [(name, architecture) for architecture in architectures for name in cases(architecture)]
    failed = 0
    # Not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for (name, architecture), report in zip(work, pool.map(_compile, work, chunksize=4), strict=True):
            found = complaints(name, report, architecture)
            failed += bool(found)
            usage = f"{report.registers:3} registers, {report.spilled_bytes} spilled, {report.shared_bytes:6} shared"
            print(f"{architecture:7} {usage}  {name}  {' '.join(report.instructions)}  {'; '.join(found)}".rstrip())
    print(f"{len(work)} kernels, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
