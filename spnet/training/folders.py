"""Folders of images in the ImageNet form: one folder per split, in it one per class. Needs torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spnet.training.datasets import IMAGENET_MEAN, IMAGENET_STD, Split, check_split, data_folders


def image_folder(root: str | Path | None, split: Split, *, train: bool | None = None) -> Any:
    """A `torchvision.datasets.ImageFolder` over `root/train`, or `root/val` (else `root/test`) for "test".

    Items are (float32 [3, 224, 224], int): for training a random resized crop and a flip, otherwise resized
    to 256 and cropped in the centre; normalised with the ImageNet statistics.

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
        from torchvision import datasets, transforms
    except ImportError as error:
        raise ImportError("folders of images need torchvision: install it with `pip install spnet[vision]`") from error
    geometry = (
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        if train
        else [transforms.Resize(256), transforms.CenterCrop(224)]
    )
    to_tensor = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return datasets.ImageFolder(str(folder), transform=transforms.Compose(geometry + to_tensor), loader=_read_rgb)


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
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG files
        raise ValueError(f"{path}: expected an image, got {error}") from error
