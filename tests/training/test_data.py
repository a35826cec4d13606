"""The entry: the right loader for a name, with everything a trainer asks of it."""

import pytest

import spnet
from spnet.training.data import DATASETS, check_data, make_loader
from spnet.training.datasets import FASHION_MNIST_CLASSES, FASHION_MNIST_MEAN, FASHION_MNIST_STD
from tests.images import write_fashion_mnist


def test_make_loader_gives_what_a_trainer_needs(tmp_path):
    write_fashion_mnist(tmp_path, "train", n=9)
    write_fashion_mnist(tmp_path, "test", n=9)
    train = make_loader("fashion-mnist", "train", root=tmp_path, batch_size=4, seed=7)
    test = make_loader("fashion-mnist", "test", root=tmp_path, batch_size=4)
    evaluated = make_loader("fashion-mnist", "train", root=tmp_path, batch_size=4, train=False)
    assert [len(train), len(test), len(evaluated)] == [2, 3, 3]
    assert train.train
    assert train.augment
    assert train.seed == 7
    assert not test.train
    assert not evaluated.augment
    for loader in (train, test):
        assert (loader.num_classes, loader.in_channels, loader.input_size) == (10, 1, 32)
        assert loader.class_names == FASHION_MNIST_CLASSES
        assert (loader.mean, loader.std) == (FASHION_MNIST_MEAN, FASHION_MNIST_STD)


@pytest.mark.parametrize("name", DATASETS)
def test_unknown_split(name):
    with pytest.raises(ValueError, match="expected 'train' or 'test', got 'val'"):
        make_loader(name, "val", batch_size=1)


def test_the_data_of_another_network(tmp_path):
    write_fashion_mnist(tmp_path, "test", n=9)
    loader = make_loader("fashion-mnist", "test", root=tmp_path, batch_size=4)
    network = spnet.create_model("resnet20_cifar", in_channels=1)
    data = {"class_names": [*loader.class_names], "mean": [*loader.mean], "std": [*loader.std]}
    without_names = {key: data[key] for key in ("mean", "std")}
    for fits in (None, data, without_names, data | {"class_names": [*map(str, range(10))]}):
        network.data = fits
        check_data(network, loader, "it")
    names = data["class_names"]
    for change, text in (
        ({"class_names": [names[1], names[0], *names[2:]]}, "expected class 0 'Trouser' of the network"),
        ({"mean": [0.9]}, r"expected the network's mean \[0.9\]"),
        ({"std": [0.1]}, r"expected the network's std \[0.1\]"),
    ):
        network.data = data | change
        with pytest.raises(ValueError, match=f"data: {text}.* in it"):
            check_data(network, loader, "it")
