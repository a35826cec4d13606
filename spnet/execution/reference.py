"""What the native operators of :mod:`spnet.execution.ops` compute, in plain PyTorch.

These are the specification that the operators are tested against, and their implementation on devices for which
there is no native one.
"""

from torch import Tensor


def compact(decisions: Tensor) -> Tensor:
    """decisions: bool [B] -> int64 [n], positions of the True values, ascending."""
    return decisions.nonzero().squeeze(1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x: [B, ...], index: int64 [n] -> [n, ...]."""
    return x.index_select(0, index)


def scatter_add_rows_(x: Tensor, index: Tensor, src: Tensor, relu: bool) -> None:
    """x: [B, ...], index: int64 [n] of distinct values, src: [n, ...]; changes the rows of x that are listed."""
    rows = x.index_select(0, index) + src
    x.index_copy_(0, index, rows.relu() if relu else rows)
