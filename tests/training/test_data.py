"""The entry: the right loader for a name, with everything a trainer asks of it."""

import pytest

from spnet.training.data import DATASETS, make_loader
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
