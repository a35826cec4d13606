"""Data for training by name: `make_loader`, and what else a user of it needs.

`datasets` reads the small sets, `folders` and `shards` those that do not fit in memory; `loaders` makes batches.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import torch

from spnet.models.resnet import SPNet
from spnet.preprocessing import normalise
from spnet.training.datasets import DATASETS, ImageSet, Split, load_dataset
from spnet.training.folders import image_folder
from spnet.training.loaders import FolderLoader, Loader
from spnet.training.shards import ShardLoader, find_shards, index_shards

__all__ = [
    "DATASETS",
    "FolderLoader",
    "ImageSet",
    "Loader",
    "ShardLoader",
    "check_data",
    "load_dataset",
    "make_loader",
    "normalise",
]


def make_loader(
    name: str,
    split: Split,
    *,
    root: str | Path | None = None,
    batch_size: int,
    device: str | torch.device = "cpu",
    seed: int = 0,
    train: bool | None = None,
    workers: int = 4,
    shard: tuple[int, int] = (0, 1),
    image_size: int = 224,
    bad_shards: str = "skip",
) -> Loader | FolderLoader | ShardLoader:
    """The loader of any data set in `DATASETS`.

    Args:
        train: shuffle, augment and drop a last batch that is not full. Default: split == "train".
        workers: decoding processes for "imagefolder" and "webdataset"; the other sets need none.
        image_size: side of the images of these two.
        bad_shards: "skip" or "raise"; see `index_shards` and `ShardLoader`.
        shard: (rank, number of ranks): yield only this rank's part of every batch.

    Returns:
        A loader with `epoch(epoch, start)`, `len`, `num_images`, `num_classes`, `in_channels`, `class_names`, `mean`,
        `std` and `input_size`.

    Raises:
        ValueError, FileNotFoundError, ImportError: see `load_dataset`, `image_folder`, `index_shards` and the loaders.
    """
    train = split == "train" if train is None else train
    settings = dict(train=train, device=device, seed=seed, shard=shard)
    if name == "imagefolder":
        images = image_folder(root, split, train=train, size=image_size)
        return FolderLoader(images, images.classes, batch_size, workers=workers, input_size=image_size, **settings)
    if name == "webdataset":
        shards, bad = index_shards(find_shards(root, split), bad_shards)
        loader = ShardLoader(
            shards, batch_size, workers=workers, input_size=image_size, bad_shards=bad_shards, **settings
        )
        loader.bad_shards += bad
        return loader
    return Loader(load_dataset(name, split, root), batch_size, **settings)


def check_data(network: SPNet, loader: Loader | FolderLoader | ShardLoader, name: str) -> None:
    """Check that a network can be tested on a data set, whose name is for the message.

    Raises:
        ValueError: the classes, or the mean and std that pixels are normalised by, are not those of the network (as
            far as it records them).
    """
    if loader.num_classes != network.num_classes:  # the labels of fewer classes would pass for the network's first ones
        raise ValueError(
            f"data: expected the network's {network.num_classes} classes, got {loader.num_classes} in {name}"
        )
    if network.data is None:
        return
    numbers = tuple(map(str, range(loader.num_classes)))  # in place of names: shards have none
    names = network.data.get("class_names", numbers)
    known = numbers not in (loader.class_names, tuple(names))
    for k, (own, other) in enumerate(zip_longest(names, loader.class_names)):
        if known and own != other:
            raise ValueError(f"data: expected class {k} {own!r} of the network, got {other!r} in {name}")
    for what, got in (("mean", loader.mean), ("std", loader.std)):
        if network.data[what] != list(got):
            raise ValueError(f"data: expected the network's {what} {network.data[what]}, got {list(got)} in {name}")
