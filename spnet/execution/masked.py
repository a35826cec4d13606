"""``masked``: every body is computed for every sample. The specification and the dense baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from spnet.routing import RoutedBlock, Run, decide, logits_of


class MaskedRun(Run):
    """One forward that computes everything, with forced decisions where given and all decisions recorded.

    Args:
        blocks: the model's RoutedBlocks, in the order of the columns of ``paths``.
        paths: bool [B, L] or None; forces the decisions.
        threshold: of the routers' decisions, see :func:`spnet.routing.decide`.
    """

    def __init__(self, blocks: list[RoutedBlock], paths: Tensor | None = None, threshold: float = 0.0):
        self._column = {id(block): i for i, block in enumerate(blocks)}
        self._forced = paths
        self._threshold = threshold
        self._decisions: dict[int, Tensor] = {}

    def decisions(self, block: RoutedBlock, x: Tensor, pooled: Tensor | None = None) -> Tensor:
        """The decisions of one block, bool [B]: forced, or the router's. Recorded either way."""
        column = self._column[id(block)]
        if column in self._decisions:
            raise ValueError(f"model: RoutedBlock number {column} ran twice in one forward, so it has no one path")
        if self._forced is not None:
            d = self._forced[:, column]
            if len(d) != len(x):
                raise ValueError(f"paths: RoutedBlock number {column} got a batch of {len(x)}, paths has {len(d)} rows")
        else:
            d = decide(logits_of(block, x, pooled), self._threshold)
        self._decisions[column] = d
        return d

    def block(self, block: RoutedBlock, x: Tensor) -> Tensor:
        return block.masked(x, decisions=self.decisions(block, x)).output

    def paths(self, batch: int, device: torch.device) -> Tensor:
        """All decisions, bool [batch, L]; a block that did not run has executed nothing.

        Raises:
            ValueError: a block ran on another batch, as one that sees the patches of an image does.
        """
        none = torch.zeros(batch, dtype=torch.bool, device=device)
        columns = [self._decisions.get(i, none) for i in range(len(self._column))]
        other = next((i for i, d in enumerate(columns) if len(d) != batch), None)
        if other is not None:
            sizes = f"{len(columns[other])}, the model of {batch}"
            raise ValueError(f"return_paths: RoutedBlock number {other} got a batch of {sizes}")
        return torch.stack(columns, 1) if columns else none[:, None][:, :0]
