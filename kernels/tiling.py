"""Tile shapes of the convolutions: measured ones from a table per architecture, a rule for all others."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLES = Path(__file__).parent / "tiles"
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
SPLIT_TILES = 256  # at most, of a launch in which programs share tiles
SPLIT_ELEMENTS = SPLIT_TILES * 64 * 64  # of all their partial sums
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148}


class Tile(NamedTuple):
    """How a convolution is cut up. All but group_m, programs_per_sm and split are powers of two."""

    block_m: int  # output pixels, of all samples that execute
    block_n: int  # output channels
    block_k: int  # input channels per step
    group_m: int  # tiles along M that share their weights in L2
    warps: int
    stages: int  # of the software pipeline
    programs_per_sm: int  # of the persistent grid
    split: int = 1  # programs that share a tile, where there is scratch memory and it divides the steps


class Shape(NamedTuple):
    """What a tile is chosen by."""

    dtype: str  # "float16", "bfloat16", "tf32" or "float32"
    kernel: int  # taps along one side
    cin: int
    cout: int
    shortcut: bool  # whose registers suffice for tiles that a body, which adds to what it finds, may have no room for
    rows: int  # output pixels of the whole batch, rounded up to a power of two

    @classmethod
    def of(
        cls, dtype: torch.dtype, tf32: bool, kernel: int, cin: int, cout: int, rows: int, shortcut: bool = False
    ) -> Shape:
        name = "tf32" if tf32 and dtype is torch.float32 else str(dtype).removeprefix("torch.")
        return cls(name, kernel, cin, cout, shortcut, power_of_two(rows))

    @property
    def key(self) -> str:
        """In a table; both halves are multiplied at the same speed."""
        parts = self.dtype.replace("bfloat", "float"), self.kernel, self.cin, self.cout
        return "-".join(map(str, (*parts, *["shortcut"] * self.shortcut, self.rows)))


def choose(architecture: str, shape: Shape) -> Tile:
    """The measured tile of this shape, of a shortcut also that of a body, or the rule's where none was measured."""
    tiles = table(architecture)
    return tiles.get(shape.key) or tiles.get(shape._replace(shortcut=False).key) or rule(architecture, shape)


def measured(architecture: str, shape: Shape) -> set[Tile]:
    """The measured tiles of this shape, of any number of rows."""
    of_any_rows = shape.key.rpartition("-")[0]
    return {tile for key, tile in table(architecture).items() if key.rpartition("-")[0] == of_any_rows}


@cache
def table(architecture: str) -> dict[str, Tile]:
    """Measured tiles by Shape.key; empty where nobody has run ``python -m spnet.kernels.tune``."""
    path = TABLES / f"{architecture}.json"
    if not path.exists():
        return {}
    return {key: Tile(*entry["tile"]) for key, entry in json.loads(path.read_text())["tiles"].items()}


def rule(architecture: str, shape: Shape) -> Tile:
    """An unmeasured default: the largest tile that the tensor cores like, made smaller until every SM has one."""
    halves = shape.dtype in ("float16", "bfloat16")
    block_m = 64 if shape.dtype == "float32" else 128
    block_n = min(128 if halves else 64, max(16, power_of_two(shape.cout)))  # float32 passes through registers
    wide = halves and architecture in ("sm_90", "sm_100")  # elsewhere operands pass through registers
    block_k = min(64 if wide else 32, max(16, power_of_two(shape.cin)))
    multiprocessors = _MULTIPROCESSORS.get(architecture, 108)

    def tiles() -> int:
        return -(-shape.rows // block_m) * -(-shape.cout // block_n)

    while block_n > 32 and tiles() < multiprocessors:
        block_n //= 2
    if block_m == 128 and tiles() < multiprocessors:
        block_m = 64
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    programs_per_sm = 1 if warps == 8 else 2
    itemsize = 2 if halves else 4
    room = SHARED_BYTES.get(architecture, 99 << 10) // programs_per_sm - block_m * block_n * itemsize
    stages = max(2, min(4, room // ((block_m + block_n) * block_k * itemsize)))
    steps = shape.kernel**2 * -(-shape.cin // block_k)
    splits = [
        n
        for n in (2, 3, 4, 6, 8)
        if steps % n == 0 and steps >= 4 * n and tiles() * n <= multiprocessors * programs_per_sm
    ]
    return Tile(block_m, block_n, block_k, 8, warps, stages, programs_per_sm, max(splits, default=1))


def architecture(device: torch.device) -> str:
    """ "sm_90" for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
