"""Folders of images: which folder, which classes, and what a missing library or a broken file says."""

import io
import sys

import numpy as np
import pytest
import torch

from spnet.training import folders
from spnet.training.data import make_loader
from spnet.training.folders import image_folder

pytestmark = pytest.mark.usefixtures("no_data_from_outside")


def make_image_folders(root, **splits):
    for split, classes in splits.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)


def test_missing_torchvision_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    make_image_folders(tmp_path, train="ab", val="ab")
    for call in (
        lambda: image_folder(tmp_path, "train"),
        lambda: image_folder(tmp_path, "test"),
        lambda: make_loader("imagefolder", "train", root=tmp_path, batch_size=2),
    ):
        with pytest.raises(ImportError, match="pip install torchvision"):
            call()


def test_image_folders_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="train/<class>/"):
        image_folder(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="data/imagenet/val: not found"):
        image_folder(None, "test")
    make_image_folders(tmp_path, train=["cat", "dog"], val=["cat", "eel"])
    with pytest.raises(ValueError, match=r"expected the 2 classes of .*; 'dog' is only in train"):
        image_folder(tmp_path, "test")
    make_image_folders(tmp_path / "imagenet", train=["cat"], test=["cat"])
    monkeypatch.setenv("SPNET_DATA", str(tmp_path))
    assert folders._image_split_folder(None, "test") == tmp_path / "imagenet" / "test"
    assert folders._image_split_folder(None, "train") == tmp_path / "imagenet" / "train"


def test_undecodable_image_is_named(tmp_path):
    image_class = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    image_class.new("L", (3, 2)).save(good)
    assert folders._read_rgb(str(good)).mode == "RGB"
    bad.write_bytes(good.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"bad\.png: expected an image"):
        folders._read_rgb(str(bad))
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png: expected an image, got 8 bytes of something else"):
        folders._read_rgb(str(bad))
    bad.write_bytes(b"P6\n3 x\n255\n" + bytes(18))  # PPM: Pillow's own error is a ValueError without the name
    with pytest.raises(ValueError, match=r"bad\.png: expected an image, got .*b'x'"):
        folders._read_rgb(str(bad))


def test_image_that_claims_to_be_enormous_is_named():
    image_class = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    data = io.BytesIO()
    image_class.new("L", (3, 2)).save(data, "BMP")
    data = bytearray(data.getvalue())
    data[18:26] = (60000).to_bytes(4, "little") * 2  # width and height
    with pytest.raises(ValueError, match=r"bad\.bmp: expected an image, got .*exceeds limit"):
        folders.decode_rgb(bytes(data), "bad.bmp")


def test_sixteen_bits_of_grey_keep_their_brightness():
    image_class = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    grey, data = np.arange(0, 65536, 257, dtype=np.uint16), io.BytesIO()
    image_class.fromarray(grey.reshape(16, 16)).save(data, "PNG")
    pixels = np.asarray(folders.decode_rgb(data.getvalue(), "grey.png"))
    assert np.array_equal(pixels, np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3))


def test_image_folder_reads_real_files(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from PIL import Image

    make_image_folders(tmp_path, train="ab", val="ab")
    for split in ("train", "val"):
        for name, value in (("a", 0), ("b", 255)):
            Image.new("RGB", (300, 260), (value,) * 3).save(tmp_path / split / name / "1.png")
    x, y = next(iter(make_loader("imagefolder", "test", root=tmp_path, batch_size=2, workers=0)))
    assert x.shape == (2, 3, 224, 224)
    assert y.tolist() == [0, 1]
    assert make_loader("imagefolder", "train", root=tmp_path, batch_size=2, workers=0).class_names == ("a", "b")
    black = torch.tensor([-m / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)])
    torch.testing.assert_close(x[0, :, 0, 0], black)
