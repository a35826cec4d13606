"""From images to a network's input: padded evenly, normalised, in the network's dtype and on its device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spnet.models.resnet import SPNet


def preprocess(model: SPNet, images: Tensor | np.ndarray) -> Tensor:
    """Turn images into the model's input: zero-padded evenly to its size, then normalised as in its training.

    Args:
        model: a network whose ``data`` holds lists "mean" and "std", as every trained one does. Its "class_names"
            are for others, who do without: model cards, statistics and the check of a test set.
        images: uint8 [N, H, W, C], or [N, H, W] where the model has one channel; no larger than the model's input.

    Returns:
        [N, in_channels, S, S] in the dtype and on the device of the model.

    Raises:
        ValueError: another shape or dtype, or a model without recorded mean and std.
    """
    if getattr(model, "data", None) is None:  # networks of others have none
        raise ValueError("model: the mean and std of its training data are unknown; normalise the images yourself")
    if not isinstance(images, Tensor):
        images = np.asarray(images)
    size, channels, shape = model.input_size, model.in_channels, list(images.shape)
    full = [*shape, 1] if channels == 1 and len(shape) == 3 else shape
    fits = len(full) == 4 and full[3] == channels and max(full[1:3]) <= size
    if images.dtype not in (torch.uint8, np.uint8) or not fits:
        forms = "[N, H, W] or [N, H, W, 1]" if channels == 1 else f"[N, H, W, {channels}]"
        raise ValueError(f"images: expected uint8 {forms} of at most {size}x{size}, got {images.dtype} {shape}")
    if not isinstance(images, Tensor):
        images = torch.from_numpy(np.array(images, order="C"))  # torch refuses negative strides, warns of read-only
    images = images.reshape(full)
    x = normalise(images.permute(0, 3, 1, 2), model.data["mean"], model.data["std"], size)
    return x.to(model.heads[-1].weight)


def normalise(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    input_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(pixel / 255 - mean) / std of images that are zero-padded evenly to a square.

    The padding is made of black pixels (value 0, so -mean / std in the result). An odd difference puts the
    extra row at the bottom and the extra column on the right.

    Args:
        images: uint8 [N, C, H, W], H and W at most S = input_size.
        mean, std: C numbers each, of pixel values in [0, 1].
        dtype: of the result; the arithmetic is float32.

    Returns:
        [N, C, S, S] on the device and in the memory format of `images`.

    Raises:
        ValueError: wrong dtype, rank, number of channels or size.
    """
    check_images(images, mean, std, input_size)
    scale, shift = scale_and_shift(mean, std, images.device)
    return to_float(pad_to(images, input_size), scale, shift).to(dtype)


def pad_to(images: Tensor, size: int) -> Tensor:
    """[N, C, H, W] -> [N, C, size, size] with zeros around, as `normalise` says; `images` itself if it fits."""
    h, w = images.shape[-2:]
    if h == w == size:
        return images
    top, left = (size - h) // 2, (size - w) // 2
    return F.pad(images, (left, size - w - left, top, size - h - top))


def to_float(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """float32 image * scale + shift, a new tensor; uint8 [N, C, H, W] and what `scale_and_shift` gives."""
    return images.to(torch.float32).mul_(scale).add_(shift)


def scale_and_shift(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [1, C, 1, 1] each, with pixel * scale + shift = (pixel / 255 - mean) / std."""
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    return (1 / (255 * s)).to(device, torch.float32), (-m / s).to(device, torch.float32)


def check_images(images: Tensor, mean: Sequence[float], std: Sequence[float], input_size: int) -> None:
    """Raise the ValueErrors of `normalise`."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: expected uint8 [N, C, H, W], got {describe(images)}")
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"images: expected as many channels as mean ({len(mean)}) and std ({len(std)}) have numbers, "
            f"got {describe(images)}"
        )
    if max(images.shape[2:]) > input_size:
        raise ValueError(f"images: expected at most {input_size}x{input_size}, got {describe(images)}")


def describe(x: Tensor) -> str:
    """Type and shape for an error message, as in "uint8 [8, 1, 28, 28]"."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
