"""Shared by the tests of the data: small sets, in memory and as files and shards, and the comparison of batches."""

import gzip
import io
import struct
import tarfile

import numpy as np
import torch
from PIL import Image

from spnet.training.datasets import ImageSet


def random_set(n=50, channels=3, side=32, num_classes=10, seed=0, input_size=32):
    g = torch.Generator().manual_seed(seed)
    return ImageSet(
        images=torch.randint(256, (n, channels, side, side), dtype=torch.uint8, generator=g),
        labels=torch.randint(num_classes, (n,), generator=g),
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        mean=(0.3, 0.4, 0.5)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        input_size=input_size,
    )


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion_mnist(folder, split="test", n=7, suffix="", labels=None):
    """Small files in the format of the real ones; returns their contents."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, n, dtype=np.uint8) if labels is None else np.array(labels, dtype=np.uint8)
    prefix = {"train": "train", "test": "t10k"}[split]
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx_bytes(array)
        path = folder / f"{prefix}-{name}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content) if suffix == ".gz" else content)
    return images, labels


def jpg(value, kind="JPEG"):
    """An encoded image of 40 x 30 pixels, another one for every value up to 19."""
    data = io.BytesIO()
    image = Image.radial_gradient("L").resize((40, 30)).point(lambda p: (p + 13 * value) % 256)
    image.convert("RGB").save(data, kind)
    return data.getvalue()


def write_shard(path, labels, files=lambda label: {"jpg": jpg(label), "cls": str(label).encode()}):
    """A tar file of a sample per label: what `files` gives for it, by file name extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            for kind, data in files(label).items():
                member = tarfile.TarInfo(f"{i:04d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def batches_equal(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )
