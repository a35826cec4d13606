"""Reading the data sets from their files."""

import gzip
import re

import numpy as np
import pytest
import torch

from spnet.training import datasets
from spnet.training.datasets import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_DEBIAN_FOLDER,
    FASHION_MNIST_MEAN,
    FASHION_MNIST_STD,
    ImageSet,
    load_dataset,
)
from tests.images import random_set, write_fashion_mnist

pytestmark = pytest.mark.usefixtures("no_data_from_outside")

needs_fashion_mnist = pytest.mark.skipif(
    not FASHION_MNIST_DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)


def write_cifar(folder, name, per_file=3):
    """All files of a small CIFAR; returns {file: (labels, images)}, the labels being the fine ones."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "cifar10":
        files, classes = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"], 10
        (folder / "batches.meta.txt").write_text("".join(f"name{i}\n" for i in range(10)) + "\n")
    else:
        files, classes = ["train.bin", "test.bin"], 100
        (folder / "fine_label_names.txt").write_text("".join(f"name{i}\n" for i in range(100)))
    contents = {}
    for file in files:
        labels = rng.integers(0, classes, per_file, dtype=np.uint8)
        images = rng.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8)
        coarse = [] if name == "cifar10" else [np.full((per_file, 1), 255, dtype=np.uint8)]
        np.concatenate([*coarse, labels[:, None], images.reshape(per_file, -1)], axis=1).tofile(folder / file)
        contents[file] = (labels, images)
    return contents


def test_image_set_describes_itself():
    s = random_set(n=5, channels=1, side=28, num_classes=4)
    assert (len(s), s.in_channels, s.num_classes, s.input_size) == (5, 1, 4, 32)


def test_subset_by_number_positions_and_mask():
    s = random_set(n=6)
    assert torch.equal(s.subset(2).images, s.images[:2])
    assert torch.equal(s.subset([4, 1]).labels, s.labels[[4, 1]])
    assert torch.equal(s.subset(torch.tensor([5])).images, s.images[5:])
    assert torch.equal(s.subset(s.labels >= 5).labels, s.labels[s.labels >= 5])
    assert len(s.subset([])) == len(s.subset(0)) == 0
    assert s.subset(2).class_names == s.class_names
    with pytest.raises(ValueError, match="expected 0 to 6 images, got 7"):
        s.subset(7)
    with pytest.raises(IndexError):
        s.subset([6])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", torch.zeros(5, 3, 32, 32), r"uint8 \[N, C, H, W\], got float32 \[5, 3, 32, 32\]"),
        ("images", torch.zeros(5, 32, 32, dtype=torch.uint8), r"got uint8 \[5, 32, 32\]"),
        ("images", torch.zeros(5, 1, 32, 32, dtype=torch.uint8), r"mean \(3\)"),
        ("images", torch.zeros(5, 3, 33, 32, dtype=torch.uint8), "at most 32x32"),
        ("labels", torch.zeros(4, dtype=torch.int64), r"labels: expected int64 \[5\], got int64 \[4\]"),
        ("labels", torch.zeros(5, dtype=torch.int32), "got int32"),
        ("std", (0.1,), r"std \(1\)"),
    ],
)
def test_image_set_rejects_wrong_fields(field, value, message):
    s = random_set(n=5)
    with pytest.raises(ValueError, match=message):
        ImageSet(**{**vars(s), field: value})


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_files_are_read(tmp_path, split, suffix):
    images, labels = write_fashion_mnist(tmp_path, split, suffix=suffix)
    s = load_dataset("fashion-mnist", split, tmp_path)
    assert s.images.dtype == torch.uint8
    assert s.images.shape == (7, 1, 28, 28)
    assert np.array_equal(s.images[:, 0].numpy(), images)
    assert s.labels.dtype == torch.int64
    assert s.labels.tolist() == labels.tolist()
    assert s.class_names == FASHION_MNIST_CLASSES
    assert s.input_size == 32


def test_fashion_mnist_is_found_below_spnet_data_then_data(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_MNIST_DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    write_fashion_mnist(tmp_path / "data" / "fashion-mnist", n=2)
    assert len(load_dataset("fashion-mnist", "test")) == 2
    write_fashion_mnist(tmp_path / "elsewhere" / "fashion-mnist", n=3)
    monkeypatch.setenv("SPNET_DATA", str(tmp_path / "elsewhere"))
    assert len(load_dataset("fashion-mnist", "test")) == 3
    monkeypatch.setattr(datasets, "FASHION_MNIST_DEBIAN_FOLDER", tmp_path / "debian")
    write_fashion_mnist(tmp_path / "debian", n=4)
    assert len(load_dataset("fashion-mnist", "test")) == 3
    monkeypatch.delenv("SPNET_DATA")
    assert len(load_dataset("fashion-mnist", "test")) == 4


def test_missing_fashion_mnist_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_MNIST_DEBIAN_FOLDER", tmp_path / "absent")
    for root in (None, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist") as error:
            load_dataset("fashion-mnist", "train", root)
        assert "train-images-idx3-ubyte" in str(error.value)
    assert str(tmp_path / "nowhere") in str(error.value)


def test_half_a_fashion_mnist_names_the_missing_half(tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"^t10k-labels-idx1-ubyte: not found in"):
        load_dataset("fashion-mnist", "test", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], r"expected 5504 bytes for \[7, 28, 28\], got 5503"),
        (lambda b: b + b"\0", "expected 5504 bytes .* got 5505"),
        (lambda b: b"", "magic number 0x00000803, got 0x in 0 bytes"),
        (lambda b: b[:9], "magic number 0x00000803, got 0x00000803 in 9 bytes"),
        (lambda b: b"\0\0\x0d\x03" + b[4:], "magic number 0x00000803, got 0x00000d03"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], r"expected \d{20,} bytes"),
    ],
    ids=["truncated", "too long", "empty", "no header", "floats", "huge shape"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_idx_file_is_refused(tmp_path, damage, message, suffix):
    write_fashion_mnist(tmp_path, suffix=suffix)
    path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    pack, unpack = (gzip.compress, gzip.decompress) if suffix else (bytes, bytes)
    path.write_bytes(pack(damage(unpack(path.read_bytes()))))
    with pytest.raises(ValueError, match=message) as error:
        load_dataset("fashion-mnist", "test", tmp_path)
    assert str(error.value).startswith(f"{path}: expected")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"hello",
        lambda b: b[:200] + b"\x55" * 50 + b[250:],
        lambda b: b"",
    ],
    ids=["truncated", "foreign", "changed", "empty"],
)
def test_damaged_gzip_file_is_refused(tmp_path, damage):
    write_fashion_mnist(tmp_path, suffix=".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: expected"):
        load_dataset("fashion-mnist", "test", tmp_path)


def test_fashion_mnist_labels_are_checked(tmp_path):
    write_fashion_mnist(tmp_path, n=3, labels=[1, 9, 10])
    with pytest.raises(ValueError, match="labels-idx1-ubyte: expected labels 0 to 9, got 10 at position 2"):
        load_dataset("fashion-mnist", "test", tmp_path)
    write_fashion_mnist(tmp_path, n=3, labels=[1, 2])
    with pytest.raises(ValueError, match="labels-idx1-ubyte: expected 3 labels, got 2"):
        load_dataset("fashion-mnist", "test", tmp_path)


@needs_fashion_mnist
def test_fashion_mnist_statistics_are_those_of_the_real_files():
    s = load_dataset("fashion-mnist", "train")
    assert s.images.shape == (60000, 1, 28, 28)
    assert s.labels.bincount().tolist() == [6000] * 10
    counts = np.bincount(s.images.numpy().reshape(-1), minlength=256).astype(np.float64)
    values = np.arange(256) / 255
    mean = (counts * values).sum() / counts.sum()
    std = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
    assert FASHION_MNIST_MEAN == s.mean == (round(mean, 6),)
    assert FASHION_MNIST_STD == s.std == (round(std, 6),)
    test = load_dataset("fashion-mnist", "test")
    assert test.images.shape == (10000, 1, 28, 28)
    assert test.labels.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("root_is_parent", [True, False])
def test_cifar_files_are_read(tmp_path, name, root_is_parent):
    folder = tmp_path / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    contents = write_cifar(folder, name)
    test_file = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}[name]
    for split in ("train", "test"):
        s = load_dataset(name, split, tmp_path if root_is_parent else folder)
        files = [f for f in contents if (f == test_file) == (split == "test")]
        assert np.array_equal(s.images.numpy(), np.concatenate([contents[f][1] for f in files]))
        assert s.labels.tolist() == np.concatenate([contents[f][0] for f in files]).tolist()
        assert s.class_names == tuple(f"name{i}" for i in range(s.num_classes))
        assert s.labels.dtype == torch.int64
        assert s.in_channels == 3
        assert s.input_size == 32


def test_cifar_is_found_below_spnet_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SPNET_DATA", str(tmp_path))
    write_cifar(tmp_path / "cifar-10-batches-bin", "cifar10")
    assert len(load_dataset("cifar10", "train")) == 15
    write_cifar(tmp_path / "cifar10", "cifar10", per_file=2)
    assert load_dataset("cifar10", "train").mean == CIFAR10_MEAN
    assert load_dataset("cifar10", "train").std == CIFAR10_STD
    assert len(load_dataset("cifar10", "train")) == 10


def test_missing_cifar_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="binary version of CIFAR-100") as error:
        load_dataset("cifar100", "train", tmp_path)
    assert str(tmp_path / "cifar-100-binary") in str(error.value)
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"^data_batch_3\.bin: not found in"):
        load_dataset("cifar10", "train", tmp_path)


def test_damaged_cifar_is_refused(tmp_path):
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "test_batch.bin"
    whole = path.read_bytes()
    for content in (whole[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"records of 3073 bytes, got {len(content)} bytes") as error:
            load_dataset("cifar10", "test", tmp_path)
        assert str(path) in str(error.value)
    path.write_bytes(whole[:3073] + b"\x0a" + whole[3074:])
    with pytest.raises(ValueError, match=r"test_batch\.bin: expected labels 0 to 9, got 10 at position 1"):
        load_dataset("cifar10", "test", tmp_path)
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"batches\.meta\.txt: expected 10 class names, got 2"):
        load_dataset("cifar10", "test", tmp_path)


def test_unknown_names_and_splits():
    with pytest.raises(ValueError, match=r"expected one of fashion-mnist, .* got 'mnist'"):
        load_dataset("mnist", "train")
    with pytest.raises(ValueError, match="make_loader"):
        load_dataset("imagefolder", "train")
    with pytest.raises(ValueError, match="expected 'train' or 'test', got 'val'"):
        load_dataset("cifar10", "val")
