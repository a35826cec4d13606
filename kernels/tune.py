"""Measure tiles on this GPU and write its architecture's table: ``python -m spnet.kernels.tune``.

What is measured is written at once, and a shape that the table has is passed over: a run that was stopped goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import click
import torch
import triton
from triton.errors import TritonError

from spnet.kernels import tiling, workload
from spnet.kernels.library import Launch
from spnet.kernels.tiling import Shape, Tile


def candidates(shape: Shape) -> list[Tile]:
    """Tiles worth a try; those that do not fit the GPU are left out by the measurement."""
    halves = shape.dtype in ("float16", "bfloat16")
    cin, cout = (max(16, tiling.power_of_two(n)) for n in (shape.cin, shape.cout))
    small = 2 * shape.rows * cout <= tiling.SPLIT_ELEMENTS  # so few that programs can share tiles
    if small:
        sizes = [(64, n, 4) for n in (16, 32, 64)]
    elif halves:
        square = [(128, 128, 4), (128, 128, 8)]
        sizes = [(64, 64, 4), (64, 128, 4), (128, 64, 4), *square, (128, 256, 8), (256, 64, 8), (256, 128, 8)]
    else:
        sizes = [(64, 32, 4), (64, 64, 4), (128, 64, 8), (128, 128, 8)]
    found = []
    for (m, n, warps), k in product(sizes, (64, 128) if halves else (16, 32, 64)):
        k = min(k, cin)
        if n > cout or (k > 64 and max(m, n) > 64):
            continue
        steps = shape.kernel**2 * -(-shape.cin // k)
        splits, pairs = [1], [(3, 1), (3, 2), (4, 1)] if warps == 8 else [(3, 2), (3, 3), (4, 2)]
        if small:
            room = tiling.SPLIT_ELEMENTS // (-(-shape.rows // m) * -(-cout // n) * m * n)
            splits += [s for s in (2, 3, 4, 6, 8, 12, 16) if steps % s == 0 and steps >= 2 * s and s <= room][-2:]
            pairs = [(3, 2), (4, 2)]
        elif steps <= 2:
            pairs = [(2, 3), (2, 4)]  # a step that is nearly alone overlaps with those of other programs
        found += [Tile(m, n, k, 8, warps, *pair, split) for split in splits for pair in pairs]
    return list(dict.fromkeys(found))


def compile_all(launches: Iterable[Launch]) -> None:
    """Compile their kernels on all cores. What does not compile is left to the launch, which says so."""

    def compile_one(launch: Launch) -> None:
        with suppress(TritonError):
            launch.kernel.warmup(**launch.arguments, **launch.options, grid=(launch.programs,))

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        list(executor.map(compile_one, launches))


def microseconds(launch: Launch) -> float:
    """Median time of a launch from a captured graph; infinite where the GPU has no room for the kernel.

    So is it where registers spill: the compile check would refuse the table.
    """
    try:
        spills = launch.run().n_spills
        torch.cuda.synchronize()  # the clock has a stream of its own, on which the arguments may not be there yet
    except TritonError:
        return float("inf")
    if spills:
        return float("inf")
    return 1e3 * triton.testing.do_bench_cudagraph(launch.run, rep=1, return_mode="median")


def tune(
    convolutions: Iterable[workload.Conv],
    dtypes: Iterable[str],
    batches: Iterable[int],
    architecture: str,
    device: torch.device,
    known: Container[str] = (),
    prepare: Callable[[Iterable[Launch]], None] = compile_all,
    time: Callable[[Launch], float] = microseconds,
) -> Iterator[tuple[str, dict]]:
    """Entries of a table: for each distinct shape the fastest tile, with its time and that of the rule's tile.

    None for a shape of which no tile runs.

    Args:
        convolutions: of :func:`spnet.kernels.workload.convolutions`.
        known: keys of shapes to pass over.
        prepare: called with launches on the meta device that are about to be timed.
        time: called with a launch, in any unit.
    """
    seen: set[str] = set()
    for conv, dtype, batch in product(convolutions, dtypes, batches):
        shape = conv.shape(dtype, batch)
        if shape.key in seen or shape.key in known:
            continue
        seen.add(shape.key)
        default = tiling.rule(architecture, shape)
        tiles = dict.fromkeys([default, *candidates(shape)])
        kernels = {tile._replace(programs_per_sm=1) for tile in tiles}  # which is no part of a kernel
        prepare(conv.launch(dtype, batch, tile, torch.device("meta")) for tile in kernels)
        times = {tile: time(conv.launch(dtype, batch, tile, device)) for tile in tiles}
        # The fastest that also runs where the shape has another role, in this network or another.
        others = [
            conv._replace(role=role) for role in workload.BODY if role != conv.role and conv.role in workload.BODY
        ]
        for best in sorted((tile for tile in tiles if times[tile] < float("inf")), key=times.get):
            prepare(other.launch(dtype, batch, best, torch.device("meta")) for other in others)
            if all(time(other.launch(dtype, batch, best, device)) < float("inf") for other in others):
                yield shape.key, dict(tile=list(best), microseconds=times[best], by_rule=times[default])
                break


def fill(path: Path, versions: dict[str, str], entries: Callable[[Container[str]], Iterable[tuple[str, dict]]]) -> int:
    """Add entries to the table at ``path``, each as it comes; returns how many there are.

    Args:
        entries: called with the keys that the table has.
    """
    tiles = json.loads(path.read_text())["tiles"] if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    for key, entry in entries(set(tiles)):
        tiles[key] = entry
        path.write_text(json.dumps({**versions, "tiles": dict(sorted(tiles.items()))}, indent=1) + "\n")
    return len(tiles)


@click.command(help=__doc__)
@click.option("--network", "networks", multiple=True, type=click.Choice(workload.NETWORKS), default=["resnet50"])
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(workload.DTYPES), default=["float16"])
@click.option("--batch", "batches", multiple=True, type=int, default=workload.BATCHES, show_default=True)
def main(networks: tuple[str, ...], dtypes: tuple[str, ...], batches: tuple[int, ...]) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("no GPU is visible to PyTorch: tiles are measured, not guessed")
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = tiling.architecture(device)
    path = tiling.TABLES / f"{architecture}.json"
    convolutions = dict.fromkeys(conv for network in networks for conv in workload.convolutions(network))
    versions = dict(device=torch.cuda.get_device_name(device), torch=torch.__version__, triton=triton.__version__)
    count = fill(path, versions, partial(tune, convolutions, dtypes, batches, architecture, device))
    print(f"{path}: {count} tiles")


if __name__ == "__main__":
    main()
