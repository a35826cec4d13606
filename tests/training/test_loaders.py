"""The batches of both loaders: which images, in which order, with which pixels, and resumption."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spnet.preprocessing import normalise
from spnet.training import loaders
from spnet.training.datasets import ImageSet
from spnet.training.loaders import FolderLoader, Loader, random_crop_flip
from tests.images import batches_equal, random_set

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_random_crop_flip_equals_a_loop_over_samples(channels, n):
    g = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, channels, 13, 12), dtype=torch.uint8, generator=g)
    top, left = torch.randint(6, (n,), generator=g), torch.randint(5, (n,), generator=g)
    flip = torch.randint(2, (n,), generator=g).bool()
    got = random_crop_flip(images, top, left, flip, size=8)
    assert got.shape == (n, channels, 8, 8)
    assert got.dtype == torch.uint8
    for i in range(n):
        window = images[i, :, top[i] : top[i] + 8, left[i] : left[i] + 8]
        assert torch.equal(got[i], window.flip(-1) if flip[i] else window)


def test_test_loader_yields_the_whole_set_in_order():
    s = random_set(n=23, side=28)
    loader = Loader(s, 10, train=False)
    assert len(loader) == 3
    assert not loader.augment
    assert not loader.drop_last
    images, labels = (torch.cat(t) for t in zip(*loader, strict=True))
    assert torch.equal(images, normalise(s.images, s.mean, s.std, 32))
    assert torch.equal(labels, s.labels)
    assert labels.dtype == torch.int64
    assert batches_equal(loader.epoch(0), loader.epoch(5))


def test_train_loader_visits_every_image_once_in_a_new_order_each_epoch():
    s = random_set(n=40, num_classes=40)
    s = ImageSet(**{**vars(s), "labels": torch.arange(40)})
    loader = Loader(s, 8, train=True, augment=False)
    orders = [torch.cat([y for _, y in loader.epoch(e)]).tolist() for e in range(3)]
    assert all(sorted(o) == list(range(40)) for o in orders)
    assert len({tuple(o) for o in orders}) == 3
    assert list(range(40)) not in orders
    for x, y in loader.epoch(0):
        assert torch.equal(x, normalise(s.images[y], s.mean, s.std, 32))


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 31)])
def test_augmented_batches_are_windows_of_the_padded_images(channels, side):
    """Every image is one of the 81 x 2 possible pictures of its original, found by trying them all."""
    s = random_set(n=48, channels=channels, side=side, num_classes=48)
    s = ImageSet(**{**vars(s), "labels": torch.arange(48)})
    before = (32 - side) // 2
    after = 32 - side - before
    padded = F.pad(s.images, (4 + before, 4 + after, 4 + before, 4 + after))
    found = []
    for x, y in Loader(s, 16, train=True, seed=1).epoch(2):
        for image, i in zip(x, y.tolist(), strict=True):
            windows = padded[i].unfold(1, 32, 1).unfold(2, 32, 1)  # [C, 9, 9, 32, 32]
            windows = windows.permute(1, 2, 0, 3, 4)
            both = torch.stack((windows, windows.flip(-1)))  # [2, 9, 9, C, 32, 32]
            pictures = normalise(both.flatten(0, 2), s.mean, s.std, 32)
            hits = (pictures == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert len(hits) == 1
            found.append(np.unravel_index(hits[0], (2, 9, 9)))
    flip, top, left = np.array(found).T
    assert 12 <= flip.sum() <= 36  # binomial(48, 1/2): 24 +- 3.5 standard deviations
    for offsets in (top, left):
        assert offsets.min() <= 1
        assert offsets.max() >= 7
        assert len(set(offsets)) >= 6
    assert len(set(zip(flip, top, left, strict=True))) > 30  # drawn per image, not per batch


@pytest.mark.parametrize("train", [True, False])
def test_an_epoch_can_be_resumed_at_any_batch(train):
    s = random_set(n=35, side=28)
    whole = list(Loader(s, 8, train=train, seed=3).epoch(4))
    assert len(whole) == (4 if train else 5)
    for start in range(len(whole) + 1):
        torch.manual_seed(start)  # the global generator has no say
        assert batches_equal(Loader(s, 8, train=train, seed=3).epoch(4, start), whole[start:])


def test_batches_depend_on_seed_and_epoch_only():
    s = random_set(n=32)
    first = list(Loader(s, 8, train=True, seed=3).epoch(1))
    loader = Loader(s, 8, train=True, seed=3)
    state = torch.get_rng_state()
    list(loader.epoch(0)), next(loader.epoch(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert batches_equal(loader.epoch(1), first)
    assert not batches_equal(loader.epoch(2), first)
    assert not batches_equal(Loader(s, 8, train=True, seed=4).epoch(1), first)
    assert batches_equal(loader, loader.epoch(0))


def test_seeds_are_the_same_in_every_process():
    code = "from spnet.training.loaders import seed_of; print(seed_of('augment', 3, 1, 2))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == loaders.seed_of("augment", 3, 1, 2)
    seeds = {loaders.seed_of("order", s, e, b) for s in range(10) for e in range(10) for b in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_memory_format(channels_last, train):
    x, _ = next(iter(Loader(random_set(n=8), 4, train=train, channels_last=channels_last)))
    assert x.dtype == torch.float32
    assert x.shape == (4, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_loader_counts_batches():
    s = random_set(n=10)
    assert [len(Loader(s, b, train=True)) for b in (1, 3, 10)] == [10, 3, 1]
    assert [len(Loader(s, b, train=False)) for b in (1, 3, 10, 11)] == [10, 4, 1, 1]
    assert len(Loader(s, 3, train=True, drop_last=False)) == 4
    assert [len(y) for _, y in Loader(s, 3, train=True, drop_last=False)] == [3, 3, 3, 1]


def test_loader_rejects_what_it_cannot_load():
    s = random_set(n=10)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Loader(s, 0, train=True)
    with pytest.raises(ValueError, match="at most the 10 images of the set, got 11"):
        Loader(s, 11, train=True)
    with pytest.raises(ValueError, match="got an empty set"):
        Loader(s.subset(0), 1, train=False)
    for bad in (-1, 10):
        labels = s.labels.clone()
        labels[7] = bad
        with pytest.raises(ValueError, match=f"labels: expected 0 to 9, got {bad} at position 7"):
            Loader(ImageSet(**{**vars(s), "labels": labels}), 2, train=False)
    for start in (-1, 6):
        with pytest.raises(ValueError, match=f"batch number from 0 to 5, got {start}"):
            Loader(s, 2, train=True).epoch(0, start)


@pytest.mark.gpu
def test_cuda_loader_sees_the_same_batches():
    s = random_set(n=35, side=28)
    for train in (True, False):
        pairs = zip(Loader(s, 8, train=train), Loader(s, 8, train=train, device="cuda"), strict=True)
        for (x, y), (u, v) in pairs:
            assert u.is_cuda
            assert v.is_cuda
            assert torch.equal(y, v.cpu())
            torch.testing.assert_close(u.cpu(), x, rtol=0, atol=1e-6)


class DecodedImages:
    """Stands for a folder of images: draws from the global generator as torchvision's transforms do."""

    def __init__(self, n=20, num_classes=4, bad_label_at=None):
        self.n, self.num_classes, self.bad_label_at = n, num_classes, bad_label_at

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        label = self.num_classes if i == self.bad_label_at else i % self.num_classes
        return torch.full((3, 4, 4), float(i)) + torch.rand(1), label


def folder_loader(workers=0, train=True, batch_size=6, seed=0, shard=(0, 1), **kwargs):
    dataset = DecodedImages(**kwargs)
    options = dict(train=train, seed=seed, workers=workers, input_size=4, shard=shard)
    return FolderLoader(dataset, "abcd", batch_size, **options)


def test_folder_loader_order_and_attributes():
    loader = folder_loader(train=False)
    assert (loader.num_classes, loader.in_channels, loader.input_size) == (4, 3, 4)
    assert loader.class_names == ("a", "b", "c", "d")
    assert len(loader.mean) == len(loader.std) == 3
    x, y = (torch.cat(t) for t in zip(*loader, strict=True))
    assert x[:, 0, 0, 0].floor().tolist() == list(range(20))
    assert y.tolist() == [i % 4 for i in range(20)]
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert next(iter(loader))[0].is_contiguous(memory_format=torch.channels_last)
    trained = folder_loader()
    assert len(trained) == 3
    assert len(loader) == 4
    orders = [torch.cat([x for x, _ in trained.epoch(e)])[:, 0, 0, 0].floor().tolist() for e in (0, 1)]
    assert orders[0] != orders[1]
    assert all(len(set(o)) == 18 for o in orders)


def test_class_names_of_folders_whose_names_are_no_utf8():
    names = [b"caf\xe9".decode("utf-8", "surrogateescape"), "th\u00e9"]
    assert FolderLoader(DecodedImages(), names, 4, train=False).class_names == ("caf\ufffd", "th\u00e9")


def test_folder_loader_resumes_and_leaves_the_global_generator_alone():
    whole = list(folder_loader(seed=2).epoch(1))
    state = torch.get_rng_state()
    for start in range(len(whole) + 1):
        assert batches_equal(folder_loader(seed=2).epoch(1, start), whole[start:])
    assert torch.equal(torch.get_rng_state(), state)
    assert not batches_equal(folder_loader(seed=2).epoch(2), whole)
    assert not batches_equal(folder_loader(seed=3).epoch(1), whole)
    with pytest.raises(ValueError, match="batch number from 0 to 3, got 4"):
        folder_loader().epoch(0, 4)


def test_folder_loader_does_not_depend_on_the_number_of_workers():
    assert batches_equal(folder_loader(workers=2).epoch(1, 1), folder_loader().epoch(1, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_is_gone_is_one_line(workers, tmp_path):
    class Files(DecodedImages):
        def __getitem__(self, i):
            return (tmp_path / f"{i}.png").read_bytes()

    with pytest.raises(OSError, match=r"^\[Errno 2\] No such file or directory: '\S*/0.png'\Z"):
        list(FolderLoader(Files(), "abcd", 2, train=False, workers=workers))


def test_folder_loader_outlives_a_sigterm_to_its_workers():
    loader = folder_loader(workers=2, n=60)
    batches = loader.epoch(1)
    got = [next(batches), next(batches)]  # one of each worker: both have started
    subprocess.run(["kill", *(str(w.pid) for w in multiprocessing.active_children())], check=True)
    assert batches_equal(got + list(batches), folder_loader(n=60).epoch(1))


def test_exit_in_the_middle_of_an_epoch():
    """Python waits for the workers, who would ignore the SIGTERM that it sent them."""
    loader = "from tests.training.test_loaders import folder_loader; batches = folder_loader(workers=2, n=60).epoch(0)"
    subprocess.run([sys.executable, "-c", loader + "; next(batches)"], cwd=ROOT, check=True, timeout=100)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_shards_are_the_parts_of_every_batch(kind, train, ranks):
    def loader(*shard):
        if kind == "folder":
            return folder_loader(train=train, seed=4, shard=shard)
        return Loader(random_set(n=20), 6, train=train, seed=4, shard=shard)

    whole = list(loader(0, 1).epoch(3, 1))
    shards = [loader(r, ranks) for r in range(ranks)]
    assert {len(s) for s in shards} == {len(loader(0, 1))}
    parts = [list(s.epoch(3, 1)) for s in shards]
    if not train:  # the last batch has 2 images: some of 3 or 6 ranks have nothing of it
        *whole, last = whole
        rest = [p.pop() for p in parts if len(p) > len(whole)]
        assert len(rest) == 2
        assert batches_equal([tuple(map(torch.cat, zip(*rest, strict=True)))], [last])
    for batch, *mine in zip(whole, *parts, strict=True):
        assert {len(y) for _, y in mine} == {6 // ranks}
        assert batches_equal([tuple(map(torch.cat, zip(*mine, strict=True)))], [batch])


def test_fewer_images_than_ranks():
    with pytest.raises(ValueError, match="at least one image per rank and batch, got 4 ranks for 3 images in batches"):
        Loader(random_set(n=3), 8, train=False, shard=(0, 4))
    with pytest.raises(ValueError, match="got 4 ranks for 20 images in batches of 2"):
        folder_loader(batch_size=2, shard=(3, 4))


def test_folder_loader_rejects_what_it_cannot_load():
    with pytest.raises(ValueError, match="got an empty set"):
        folder_loader(n=0)
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        folder_loader(batch_size=0)
    with pytest.raises(ValueError, match="labels: expected 0 to 3, got 4"):
        list(folder_loader(bad_label_at=3, train=False))
