"""What comes with the package: a trained network and real images for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spnet.models.files import WEIGHTS, load_model
from spnet.models.resnet import SPNet

ASSETS = Path(__file__).resolve().parent / "assets"
SAMPLE = "test-1000.npz"


def bundled_networks() -> list[str]:
    """The names that :func:`load_pretrained` knows."""
    return sorted(p.parent.name for p in ASSETS.glob(f"*/{WEIGHTS}"))


def _folder(name: str) -> Path:
    known = bundled_networks()
    if name not in known:
        raise ValueError(f"name: unknown pretrained network {name!r}; there is {', '.join(known)}")
    return ASSETS / name


def load_pretrained(name: str) -> SPNet:
    """A trained network that comes with the package, in evaluation mode, float32, on the CPU.

    Args:
        name: "fashion-mnist" (wide_resnet20_2_cifar, one channel, Fashion-MNIST padded to 32x32).

    Raises:
        ValueError: unknown name.
    """
    return load_model(_folder(name))


def sample_images(name: str) -> tuple[Tensor, Tensor]:
    """Test images that come with a pretrained network.

    Args:
        name: as for :func:`load_pretrained`. "fashion-mnist": the first 1,000 images of its test set (MIT licence).

    Returns:
        uint8 [N, H, W] images and int64 [N] labels.
    """
    with np.load(_folder(name) / SAMPLE, allow_pickle=False) as f:
        return torch.from_numpy(f["images"]), torch.from_numpy(f["labels"]).long()
