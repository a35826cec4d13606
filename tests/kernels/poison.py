"""Memory that tells when something outside of a tensor, or of what an operation may touch, is read or written."""

import torch
from torch import Tensor


def guarded(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy that lies between NaNs (integers: between values that are no position)."""
    guard = float("nan") if tensor.is_floating_point() else True if tensor.dtype is torch.bool else 1 << 30
    memory = torch.full((tensor.numel() + 256,), guard, dtype=tensor.dtype, device=device)
    memory[128 : 128 + tensor.numel()] = tensor.flatten().to(device)
    return memory[128 : 128 + tensor.numel()].view(tensor.shape)


def listed(batch: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An index list of ``count`` of ``batch`` samples, behind whose end there is no position, and the count."""
    index = torch.full((batch,), 1 << 30, dtype=torch.int32)
    index[:count] = torch.randperm(batch)[:count].sort().values.int()
    return guarded(index, device), guarded(torch.tensor([count], dtype=torch.int32), device)


def assert_guards(tensor: Tensor) -> None:
    """Nothing was written next to a guarded tensor."""
    memory = torch.as_strided(tensor, (tensor.numel() + 256,), (1,), 0)
    around = torch.cat([memory[:128], memory[-128:]])
    assert (around.isnan() if tensor.is_floating_point() else around == around[0]).all()
