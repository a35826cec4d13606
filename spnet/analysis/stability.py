"""How steady a network's routing is: decisions that flip between two epochs, and the direction features move in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from spnet.models.resnet import SPNet

Differences = list[tuple[Tensor, Tensor]]


def path_churn(before: Tensor, after: Tensor) -> float:
    """The fraction of decisions that differ: how many flipped between two states of a network.

    Args:
        before, after: bool [N, L], the decisions of the same N samples at the same L routed blocks.

    Raises:
        ValueError: two shapes, other dtypes, or no decisions.
    """
    if before.shape != after.shape or before.dtype != torch.bool or after.dtype != torch.bool or not before.numel():
        got = " and ".join(f"{d.dtype} {list(d.shape)}" for d in (before, after))
        raise ValueError(f"decisions: expected bool [N, L] of the same samples and blocks, got {got}")
    return (before != after).double().mean().item()


def differences_within(features: Sequence[Tensor]) -> Differences:
    """Successive feature differences of each stage, [B, C] each: (middle - first block, last - middle block).

    Args:
        features: per stage [B, blocks, C], the pooled output of each block; a stage of fewer than three blocks
            has no two successive differences.

    Source: SP-Net (ECCV 2022), feature evolution regularization, CIFAR form.
    """
    found = []
    for f in features:
        if f.shape[1] >= 3:
            first, middle, last = f[:, 0], f[:, f.shape[1] // 2], f[:, -1]
            found.append((middle - first, last - middle))
    return found


def differences_across(stage_features: Sequence[Tensor]) -> Differences:
    """Feature differences to the last stage S, [B, C] each: (f_S - f_i, f_S - f_j) for stages i < j < S.

    Args:
        stage_features: per stage [B, C], aligned to one width.

    Raises:
        ValueError: stages of several widths.

    Source: SP-Net (ECCV 2022), feature evolution regularization, ImageNet form.
    """
    widths = [f.shape[1] for f in stage_features]
    if len(set(widths)) > 1:
        raise ValueError(f"stage_features: expected stages aligned to one width, got {widths}")
    return list(combinations([stage_features[-1] - f for f in stage_features[:-1]], 2))


@torch.no_grad()
def evolution_alignment(
    model: SPNet, batches: Iterable[tuple[Tensor, Tensor]], device: str | torch.device = "cpu"
) -> float:
    """Mean cosine of successive feature differences, those that L_evo aligns: 1 is a straight line through depth.

    The pairs are :func:`differences_across` where the model aligns its stages (ImageNet form), else
    :func:`differences_within`. A pair of which one difference is zero (the sample skipped every block in between) has
    no angle and is left out.

    Args:
        model: in evaluation mode, on `device`; routed or static.
        batches: of (input [B, ...], labels); the labels are not read.

    Returns:
        The mean over samples and pairs, in [-1, 1]; NaN where no pair has an angle.

    Raises:
        ValueError: a model in training mode (its decisions would be random).
    """
    if model.training:
        raise ValueError(f"model: expected evaluation mode, but {type(model).__name__} is in training mode")
    total, count = 0.0, 0
    for x, _ in batches:
        output = model.forward_stages(x.to(device))
        within = model.align is None
        for a, b in differences_within(output.features) if within else differences_across(output.stage_features):
            moved = a.any(1) & b.any(1)
            total += F.cosine_similarity(a[moved].double(), b[moved].double(), dim=1).sum().item()
            count += int(moved.sum())
    return total / count if count else math.nan
