"""What a batch executed, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Paths:
    """The executing paths of a batch and what they cost.

    Multiply-accumulates count stem, bodies, shortcuts, routers and head; a sample's cost is that of the blocks
    it executes.
    """

    decisions: Tensor  # bool [B, L], on the device of the input: which blocks each sample executed
    macs: Tensor  # int64 [B], multiply-accumulates of each sample
    dense_macs: int  # multiply-accumulates of one sample that executes every block
    blocks: tuple[str, ...]  # L names of the RoutedBlocks
