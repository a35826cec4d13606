"""The small data sets: Fashion-MNIST and CIFAR-10/100, read whole into memory from their published files."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spnet.preprocessing import check_images, describe

DATASETS = ("fashion-mnist", "cifar10", "cifar100", "imagefolder", "webdataset")
Split = Literal["train", "test"]

FASHION_MNIST_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Mean and standard deviation over all pixels of the 60,000 training images (28x28, before padding);
# tests/training/test_datasets.py recomputes them from the files.
FASHION_MNIST_MEAN = (0.286041,)
FASHION_MNIST_STD = (0.353024,)
# Per-channel statistics over all pixels of the 50,000 training images, as published with most CIFAR code
# (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, describes the images).
CIFAR10_MEAN, CIFAR10_STD = (0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)
CIFAR100_MEAN, CIFAR100_STD = (0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)
# The constants that the torchvision documentation gives for its ImageNet classifiers.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled image set held in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], index into `class_names`.
        class_names: one name per class.
        mean, std: per channel, of pixel values in [0, 1], over the training images before padding.
        input_size: side of the network's square input; smaller images are zero-padded evenly to it.

    Raises:
        ValueError: a field has the wrong dtype, rank or length.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int = 32

    def __post_init__(self) -> None:
        check_images(self.images, self.mean, self.std, self.input_size)
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels: expected int64 [{len(self.images)}], got {describe(self.labels)}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        return self.images.shape[1]

    def subset(self, which: int | Sequence[int] | Tensor) -> ImageSet:
        """The first `which` images, or the images at the given positions (in that order).

        Raises:
            ValueError: a number outside 0..N.
            IndexError: a position outside the set.
        """
        if isinstance(which, int):
            if not 0 <= which <= len(self):
                raise ValueError(f"subset: expected 0 to {len(self)} images, got {which}")
            return replace(self, images=self.images[:which], labels=self.labels[:which])
        positions = torch.as_tensor(which)
        if positions.dtype != torch.bool:  # an empty list arrives as float32
            positions = positions.to(torch.int64)
        return replace(self, images=self.images[positions], labels=self.labels[positions])


def load_dataset(name: str, split: Split, root: str | Path | None = None) -> ImageSet:
    """Read one of the small data sets into memory.

    Args:
        name: "fashion-mnist", "cifar10" or "cifar100".
        split: "train" or "test".
        root: the folder that holds the files (for CIFAR: that folder or its parent). Default: the first of
            `$SPNET_DATA/<name>`, the place where Debian installs the set, and `./data/<name>` that has them.

    Raises:
        ValueError: unknown name or split; a file that is corrupt, truncated or of another kind.
        FileNotFoundError: the data set is not there; the message says what to install or where to put it.
    """
    check_split(split)
    if name == "fashion-mnist":
        return _load_fashion_mnist(split, root)
    if name in ("cifar10", "cifar100"):
        return _load_cifar(name, split, root)
    if name in ("imagefolder", "webdataset"):
        raise ValueError(f"name: {name!r} does not fit in memory, use make_loader")
    raise ValueError(f"name: expected one of {', '.join(DATASETS)}, got {name!r}")


def _load_fashion_mnist(split: Split, root: str | Path | None) -> ImageSet:
    prefix = {"train": "train", "test": "t10k"}[split]
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    if root is not None:
        folders = [Path(root)]
    else:
        *named, local = data_folders("fashion-mnist")
        folders = [*named, FASHION_MNIST_DEBIAN_FOLDER, local]
    advice = (
        "Install them with `apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or put {names} "
        "(plain or .gz) into {folder}."
    )
    images_path, labels_path = _find_files(folders, names, advice, suffixes=("", ".gz"))
    images = _read_idx(images_path, rank=3)  # [N, H, W]
    labels = _read_idx(labels_path, rank=1)  # [N]
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: expected {len(images)} labels, got {len(labels)}")
    _check_file_labels(labels, len(FASHION_MNIST_CLASSES), labels_path)
    return ImageSet(
        images=torch.from_numpy(images).unsqueeze(1),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=FASHION_MNIST_CLASSES,
        mean=FASHION_MNIST_MEAN,
        std=FASHION_MNIST_STD,
    )


def _load_cifar(name: str, split: Split, root: str | Path | None) -> ImageSet:
    if name == "cifar10":
        inner, label_bytes, num_classes = "cifar-10-batches-bin", 1, 10
        data = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        names_file, mean, std = "batches.meta.txt", CIFAR10_MEAN, CIFAR10_STD
    else:  # a record begins with the coarse label, then the fine one
        inner, label_bytes, num_classes = "cifar-100-binary", 2, 100
        data = [f"{split}.bin"]
        names_file, mean, std = "fine_label_names.txt", CIFAR100_MEAN, CIFAR100_STD
    if root is not None:
        folders = [Path(root) / inner, Path(root)]
    else:
        folders = [f for d in data_folders(name) for f in (d / inner, d, d.parent / inner)]
    advice = (
        f"Unpack the binary version of CIFAR-{num_classes} from https://www.cs.toronto.edu/~kriz/cifar.html "
        "so that {names} lie in {folder}."
    )
    *paths, names_path = _find_files(folders, (*data, names_file), advice)
    class_names = tuple(names_path.read_text(encoding="utf-8", errors="replace").split())
    if len(class_names) != num_classes:
        raise ValueError(f"{names_path}: expected {num_classes} class names, got {len(class_names)}")

    images, labels = [], []
    for path in paths:
        record = label_bytes + 3 * 32 * 32
        raw = np.fromfile(path, dtype=np.uint8)
        if raw.size == 0 or raw.size % record:
            raise ValueError(f"{path}: expected whole records of {record} bytes, got {raw.size} bytes")
        raw = raw.reshape(-1, record)
        _check_file_labels(raw[:, label_bytes - 1], num_classes, path)
        labels.append(raw[:, label_bytes - 1].astype(np.int64))
        images.append(raw[:, label_bytes:].reshape(-1, 3, 32, 32))
    return ImageSet(
        images=torch.from_numpy(np.concatenate(images)),
        labels=torch.from_numpy(np.concatenate(labels)),
        class_names=class_names,
        mean=mean,
        std=std,
    )


def data_folders(name: str) -> list[Path]:
    """Where a data set is looked for by default: below $SPNET_DATA if set, then below ./data."""
    bases = [os.environ.get("SPNET_DATA"), "data"]
    return [Path(base) / name for base in bases if base]


def check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")


def _find_files(
    folders: Sequence[Path], names: Sequence[str], advice: str, suffixes: Sequence[str] = ("",)
) -> list[Path]:
    """The files `names` (each with the first suffix that exists) in the first folder that has any of them.

    A folder with only some of the files is an error, not passed over: its owner meant it.
    """
    for folder in folders:
        candidates = {name: [p for s in suffixes if (p := folder / (name + s)).is_file()] for name in names}
        missing = [name for name, paths in candidates.items() if not paths]
        if not missing:
            return [paths[0] for paths in candidates.values()]
        if len(missing) < len(names):
            folders = [folder]
            break
    raise FileNotFoundError(
        f"{', '.join(missing)}: not found in {', '.join(map(str, folders))}. "
        + advice.format(names=", ".join(names), folder=folders[0])
    )


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """An IDX file of unsigned bytes, gzip-compressed if its name says so -> uint8 array of `rank` axes.

    The format: two zero bytes, the type (8 = unsigned byte), the rank, one big-endian uint32 per axis, the
    data.
    """
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file, got {error}") from error
    else:
        raw = path.read_bytes()
    header = 4 + 4 * rank
    magic = bytes((0, 0, 8, rank))
    if len(raw) < header or raw[:4] != magic:
        raise ValueError(
            f"{path}: expected an IDX file with magic number 0x{magic.hex()}, got 0x{raw[:4].hex()} in {len(raw)} bytes"
        )
    shape = tuple(np.frombuffer(raw, ">u4", count=rank, offset=4).tolist())
    expected = header + int(np.prod(shape, dtype=object))
    if len(raw) != expected:
        raise ValueError(f"{path}: expected {expected} bytes for {list(shape)}, got {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


def _check_file_labels(labels: np.ndarray, num_classes: int, path: Path) -> None:
    bad = np.flatnonzero(labels >= num_classes)
    if bad.size:
        raise ValueError(f"{path}: expected labels 0 to {num_classes - 1}, got {labels[bad[0]]} at position {bad[0]}")
