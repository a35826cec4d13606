"""The bundled network is what its log says, on the real images."""

import json

import pytest
import torch

import spnet
from spnet.pretrained import ASSETS
from spnet.training import evaluate
from spnet.training.data import make_loader

FOLDER = ASSETS / "fashion-mnist"


def _last_epoch() -> dict:
    return json.loads((FOLDER / "training" / "spnet36.jsonl").read_text().splitlines()[-1])


def test_sample_images():
    images, labels = spnet.sample_images("fashion-mnist")
    assert images.shape == (1000, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert sorted(labels.unique().tolist()) == list(range(10))


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown pretrained network 'mnist'; there is fashion-mnist"):
        spnet.load_pretrained("mnist")


def test_accuracy_and_cost_on_the_sample():
    model = spnet.load_pretrained("fashion-mnist")
    assert not model.training
    assert model.config["name"] == "wide_resnet20_2_cifar"
    images, labels = spnet.sample_images("fashion-mnist")
    stats = spnet.paths(model, (spnet.preprocess(model, images), labels))
    # The binomial's standard deviation for 1,000 images is 0.8 points.
    assert stats.accuracy >= 0.94 - 2 * 0.008
    assert stats.fraction <= 0.5
    logits = spnet.fast_forward(model, spnet.preprocess(model, images[:200]), impl="masked")
    assert (logits.argmax(1) == stats.predictions[:200]).all()


def test_the_log_reaches_the_promise():
    test = _last_epoch()["test"]
    assert test["samples"] == 10_000
    assert test["accuracy"] >= 0.94
    assert test["macs"] <= 0.5 * test["dense_macs"]


def test_the_network_is_the_one_of_the_log():
    try:
        loader = make_loader("fashion-mnist", "test", batch_size=500)
    except FileNotFoundError as e:
        pytest.skip(f"needs the whole test set: {e}")
    logged, measured = _last_epoch()["test"], evaluate(spnet.load_pretrained("fashion-mnist"), loader)
    # Rounding may flip a decision or a class whose margin is next to nothing: at most 3 images in 10,000.
    assert abs(measured.accuracy - logged["accuracy"]) <= 3e-4
    assert abs(measured.macs - logged["macs"]) <= 3e-4 * logged["dense_macs"]


def test_the_samples_are_the_first_of_the_test_set():
    try:
        data = make_loader("fashion-mnist", "test", batch_size=500).data
    except FileNotFoundError as e:
        pytest.skip(f"needs the whole test set: {e}")
    images, labels = spnet.sample_images("fashion-mnist")
    assert torch.equal(images, data.images[:1000, 0])
    assert torch.equal(labels, data.labels[:1000])
