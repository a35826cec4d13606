"""Images to a network's input: padding, normalisation, and what `preprocess` makes of a network's own record."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import spnet
from spnet.preprocessing import normalise
from spnet.training.loaders import Loader
from tests.images import random_set

MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]


@pytest.mark.parametrize(("side", "first"), [(28, 2), (32, 0), (27, 2), (1, 15)])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_normalise_pads_with_black_pixels_evenly(side, first, n):
    s = random_set(n=n, side=side)
    got = normalise(s.images, s.mean, s.std, 32)
    expected = np.zeros((n, 3, 32, 32))
    expected[:, :, first : first + side, first : first + side] = s.images.numpy() / 255.0
    expected = (expected - np.reshape(s.mean, (3, 1, 1))) / np.reshape(s.std, (3, 1, 1))
    assert got.dtype == torch.float32
    assert got.shape == (n, 3, 32, 32)
    # Three float32 roundings of values below 4: 3 * 2 * 2**-23.
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-6)


def test_normalise_keeps_memory_format_and_takes_any_layout():
    s = random_set(n=4, side=28)
    plain = normalise(s.images, s.mean, s.std, 32)
    channels_last = normalise(s.images.contiguous(memory_format=torch.channels_last), s.mean, s.std, 32)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(channels_last, plain)
    sliced = s.images[::2, :, 1:]
    assert torch.equal(normalise(sliced, s.mean, s.std, 32), normalise(sliced.clone(), s.mean, s.std, 32))
    assert torch.equal(normalise(s.images, s.mean, s.std, 32, torch.bfloat16), plain.to(torch.bfloat16))


def test_normalise_rejects_wrong_images():
    s = random_set(n=1)
    for images, message in (
        (s.images.float(), "expected uint8"),
        (s.images[0], r"got uint8 \[3, 32, 32\]"),
        (s.images[:, :1], "channels"),
    ):
        with pytest.raises(ValueError, match=message):
            normalise(images, s.mean, s.std, 32)
    with pytest.raises(ValueError, match="at most 28x28"):
        normalise(s.images, s.mean, s.std, 28)


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def model(request):
    """A small network of one or three channels that knows its mean and std."""
    return recorded(request.param)


def recorded(channels):
    model = spnet.create_model("resnet20_cifar", in_channels=channels).eval()
    model.data = {"mean": MEAN[:channels], "std": STD[:channels]}
    return model


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def padded_and_normalised(images, size=32):
    """uint8 [N, H, W, C] -> float64 [N, C, size, size], written out with numpy."""
    n, h, w, c = images.shape
    top, left = (size - h) // 2, (size - w) // 2
    x = np.zeros((n, size, size, c))
    x[:, top : top + h, left : left + w] = images.numpy() / 255.0
    return torch.from_numpy((x - MEAN[:c]) / STD[:c]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("side", [(32, 32), (28, 28), (27, 30), (1, 32), (32, 31)], ids=str)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_preprocess_pads_evenly_and_normalises(model, n, side):
    images = random_images(n, *side, model.in_channels)
    x = spnet.preprocess(model, images)
    assert x.dtype == torch.float32
    assert x.shape == (n, model.in_channels, 32, 32)
    # Three float32 roundings of values below 4: 3 * 2 * 2**-23.
    torch.testing.assert_close(x.double(), padded_and_normalised(images), rtol=0, atol=1e-6)


def test_preprocess_takes_every_form_of_the_same_images(model):
    images = random_images(3, 28, 30, model.in_channels)
    x = spnet.preprocess(model, images)
    wide = torch.zeros(6, 28, 60, model.in_channels, dtype=torch.uint8)
    wide[::2, :, ::2] = images
    same = [images.numpy(), np.asfortranarray(images.numpy()), wide[::2, :, ::2], wide.numpy()[::2, :, ::2]]
    read_only = images.numpy().copy()
    read_only.flags.writeable = False
    same += [np.flip(images.numpy(), (2, 3)).copy()[:, :, ::-1, ::-1], read_only]
    if model.in_channels == 1:
        same += [images[..., 0], images[..., 0].numpy()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in same:
            assert torch.equal(spnet.preprocess(model, form), x)


def test_preprocess_gives_what_the_network_was_trained_on():
    s = random_set(n=5, side=28)
    (x, _), *rest = Loader(s, 5, train=False)
    assert not rest
    assert torch.equal(spnet.preprocess(recorded(3), s.images.permute(0, 2, 3, 1)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_preprocess_computes_in_float32_and_rounds_once_to_the_models_dtype(model, dtype):
    images = random_images(2, 28, 28, model.in_channels)
    expected = spnet.preprocess(model, images).to(dtype)
    x = spnet.preprocess(model.to(dtype), images)
    assert x.dtype == dtype
    assert torch.equal(x, expected)
    assert model(x).dtype == dtype


def test_preprocess_goes_to_the_models_device(model):
    x = spnet.preprocess(model.to("meta"), random_images(2, 28, 28, model.in_channels))
    assert x.device.type == "meta"
    assert x.shape == (2, model.in_channels, 32, 32)


@pytest.mark.gpu
def test_preprocess_goes_to_the_gpu(model):
    images = random_images(2, 28, 28, model.in_channels)
    expected = spnet.preprocess(model, images)
    model.cuda()
    for where in (images, images.cuda()):
        x = spnet.preprocess(model, where)
        assert x.is_cuda
        torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("images", [None, "image.png", [[0.5]]], ids=str)
def test_preprocess_of_no_images(model, images):
    with pytest.raises(ValueError, match=r"^images: expected uint8 \[N, H, W.* of at most 32x32, got "):
        spnet.preprocess(model, images)


@pytest.mark.parametrize(
    ("shape", "dtype", "got"),
    [
        ((2, 28, 28, 3), torch.float32, "float32 [2, 28, 28, 3]"),
        ((2, 28, 28, 3), torch.int8, "int8 [2, 28, 28, 3]"),
        ((28, 28), torch.uint8, "uint8 [28, 28]"),
        ((1, 2, 28, 28, 3), torch.uint8, "uint8 [1, 2, 28, 28, 3]"),
        ((2, 33, 32, 3), torch.uint8, "uint8 [2, 33, 32, 3]"),
        ((2, 32, 33, 3), torch.uint8, "uint8 [2, 32, 33, 3]"),
        ((2, 28, 28, 1), torch.uint8, "uint8 [2, 28, 28, 1]"),
        ((2, 28, 28), torch.uint8, "uint8 [2, 28, 28]"),
        ((28, 28, 3), torch.uint8, "uint8 [28, 28, 3]"),
        ((2, 3, 28, 28), torch.uint8, "uint8 [2, 3, 28, 28]"),
    ],
    ids=[
        "float",
        "signed",
        "one image",
        "rank 5",
        "too high",
        "too wide",
        "one channel",
        "no channel",
        "one image with channels",
        "channels first",
    ],
)
def test_preprocess_rejects_wrong_images(shape, dtype, got):
    expected = r"^images: expected uint8 \[N, H, W, 3\] of at most 32x32, got (torch\.)?"
    for images in (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype).numpy()):
        with pytest.raises(ValueError, match=expected + re.escape(got) + "$"):
            spnet.preprocess(recorded(3), images)


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28, 3), (1, 1, 28, 28), (1, 33, 28)], ids=str)
def test_preprocess_rejects_wrong_images_of_one_channel(shape):
    expected = r"^images: expected uint8 \[N, H, W\] or \[N, H, W, 1\] of at most 32x32, got torch.uint8 "
    with pytest.raises(ValueError, match=expected + re.escape(str(list(shape))) + "$"):
        spnet.preprocess(recorded(1), torch.zeros(shape, dtype=torch.uint8))


def test_preprocess_needs_the_recorded_mean_and_std(model):
    model.data = None
    with pytest.raises(ValueError, match="model: the mean and std of its training data are unknown"):
        spnet.preprocess(model, random_images(2, 28, 28, model.in_channels))
    with pytest.raises(ValueError, match="model: the mean and std of its training data are unknown"):
        spnet.preprocess(torch.nn.Linear(1, 1), random_images(2, 28, 28, 1))


def test_who_deploys_does_not_import_training():
    code = "import spnet, sys; print([m for m in sys.modules if m.startswith(('spnet.training', 'tensorboard'))])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
