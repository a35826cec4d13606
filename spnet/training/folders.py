"""Folders of images in the ImageNet form: one folder per split, in it one per class. Needs torchvision."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spnet.preprocessing import normalise
from spnet.training.datasets import IMAGENET_MEAN, IMAGENET_STD, Split, check_split, data_folders


def image_folder(root: str | Path | None, split: Split, *, train: bool | None = None, size: int = 224) -> Any:
    """A `torchvision.datasets.ImageFolder` over `root/train`, or `root/val` (else `root/test`) for "test".

    Items are (float32 [3, size, size], int), see `image_transform`.

    Args:
        root: default `$SPNET_DATA/imagenet`, then `./data/imagenet`.
        train: which of the two transforms. Default: split == "train".

    Raises:
        FileNotFoundError: no such folder. ValueError: train and test have different classes; an image that
        cannot be decoded (when it is read). ImportError: torchvision is missing.
    """
    folder = _image_split_folder(root, split)
    train = split == "train" if train is None else train
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("folders of images need torchvision: install it with `pip install torchvision`") from error
    return datasets.ImageFolder(str(folder), transform=image_transform(train, size), loader=_read_rgb)


def image_transform(train: bool, size: int) -> Callable[[Any], Tensor]:
    """A function from a PIL image to float32 [3, size, size], normalised with the ImageNet statistics.

    For training a random crop of 8 to 100 % of the area and of ratio 3/4 to 4/3, resized, and mirrored with
    probability 1/2, drawn from torch's global CPU generator; otherwise the shorter side is resized to size * 8/7 and
    the centre cropped. Source: Szegedy et al., "Going deeper with convolutions" (CVPR 2015), section 6.
    """
    return partial(_transformed, train=train, size=size)


def _transformed(image: Any, train: bool, size: int) -> Tensor:
    from PIL import Image

    box = _random_box(*image.size) if train else _centre_box(*image.size)
    pixels = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BILINEAR, box)))  # [S, S, 3]
    if train and torch.rand(()) < 0.5:
        pixels = pixels.flip(1)
    pixels = pixels.permute(2, 0, 1).contiguous()  # not to broadcast over C innermost: 2.8 -> 2.2 ms an image
    return normalise(pixels[None], IMAGENET_MEAN, IMAGENET_STD, size)[0]


def _random_box(width: int, height: int) -> tuple[float, float, float, float]:
    for _ in range(10):
        area, log_ratio, x, y = torch.rand(4, dtype=torch.float64).tolist()
        area = width * height * (0.08 + 0.92 * area)
        ratio = (3 / 4) ** (1 - 2 * log_ratio)
        w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if w <= width and h <= height:
            left, top = x * (width - w), y * (height - h)
            return left, top, left + w, top + h
    return _centre_box(width, height, 1)


def _centre_box(width: int, height: int, part: float = 7 / 8) -> tuple[float, float, float, float]:
    side = min(width, height) * part
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _image_split_folder(root: str | Path | None, split: Split) -> Path:
    """The folder of a split, after a check that training and test folder have the same classes."""
    check_split(split)
    roots = [Path(root)] if root is not None else data_folders("imagenet")
    base = next((r for r in roots if r.is_dir()), roots[0])
    train = base / "train"
    test = base / "val" if (base / "val").is_dir() or not (base / "test").is_dir() else base / "test"
    folder = train if split == "train" else test
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: not found. Put the images into {base}/train/<class>/ and {base}/val/<class>/, one "
            "folder per class."
        )
    if train.is_dir() and test.is_dir():
        in_train, in_test = ({p.name for p in f.iterdir() if p.is_dir()} for f in (train, test))
        if in_train != in_test:
            example = min(in_train ^ in_test)
            raise ValueError(
                f"{test}: expected the {len(in_train)} classes of {train}, got {len(in_test)}; "
                f"{example!r} is only in {'train' if example in in_train else test.name}"
            )
    return folder


def _read_rgb(path: str) -> Any:
    return decode_rgb(Path(path).read_bytes(), path)


def decode_rgb(data: bytes, name: str) -> Any:
    """A PIL image of an encoded one; `name` is for the message.

    Raises:
        ValueError: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip at 255
                return image.convert("I").point(lambda value: value * (1 / 256)).convert("RGB")
            return image.convert("RGB")
    except Image.UnidentifiedImageError as error:  # its message is the address of the BytesIO
        raise ValueError(f"{name}: expected an image, got {len(data)} bytes of something else") from error
    # SyntaxError for some broken PNG files, ValueError for some of PPM.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: expected an image, got {error}") from error
