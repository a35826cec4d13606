"""The dynamic auxiliary module: a copy of the network that follows it by momentum and slows its routers down."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class DynamicAuxiliary(nn.Module):
    """A copy of a network whose parameters follow the trained ones: ``p_aux = m * p_aux + (1 - m) * p``.

    It starts as an exact copy, always runs in training mode, and gets no gradient.

    Args:
        model: the network that is trained.
        momentum: m in [0, 1]; SP-Net used 0.6 on CIFAR and 0.9 on ImageNet.

    Raises:
        ValueError: momentum outside [0, 1].
        TypeError: model is no module.

    Source: SP-Net (ECCV 2022), dynamic auxiliary module.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.6):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a value in [0, 1], got {momentum}")
        self.momentum = momentum
        self._follow = get_ema_multi_avg_fn(momentum)
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> DynamicAuxiliary:
        return super().train(True)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the parameters of ``model``; once per step, before the forward.

        Raises:
            ValueError: another number of parameters than were copied, or of other shapes.
        """
        own, followed = list(self.module.parameters()), list(model.parameters())
        if [p.shape for p in own] != [p.shape for p in followed]:
            raise ValueError(f"model: expected the network that was copied, got another {type(model).__name__}")
        self._follow(own, followed, None)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """The copy's output for x, as the trained network's in training mode, without gradient."""
        return self.module(x)
