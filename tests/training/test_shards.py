"""Shards: which samples, in which order, by which rank; and what cannot be read."""

import functools
import http.server
import shutil
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from spnet.training import shards
from spnet.training.data import make_loader
from spnet.training.folders import _random_box, image_transform
from spnet.training.shards import ShardLoader, find_shards, index_shards
from tests.images import batches_equal, jpg, write_shard
from tests.test_cli import fail, run

SIDE = 16
SIZES = (5, 7, 4, 6, 5)  # samples per shard


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """Five training shards and two for testing; every sample has a class of its own, its position in the set."""
    for split, sizes in (("train", SIZES), ("val", (17, 10))):
        first = 0
        for k, n in enumerate(sizes):
            write_shard(tmp_path / "set" / f"{split}-{k}.tar", range(first, first + n))
            first += n
    return tmp_path / "set"


def loader(folder, split="train", batch_size=4, **settings):
    settings = {"train": split == "train", "input_size": SIDE, **settings}
    return ShardLoader(index_shards(find_shards(folder, split))[0], batch_size, **settings)


def labels(batches):
    return [y.tolist() for _, y in batches]


def flat(lists):
    return [y for batch in lists for y in batch]


def test_an_epoch_visits_the_set_in_a_new_order(folder, monkeypatch):
    monkeypatch.setattr(shards, "SHUFFLE", 8)
    loader_ = loader(folder)
    assert (len(loader_), loader_.num_classes, loader_.in_channels, loader_.input_size) == (6, 27, 3, SIDE)
    orders = [flat(labels(loader_.epoch(e))) for e in range(3)]
    for order in orders:
        assert len(set(order)) == 24
        assert order != sorted(order)
    assert len(set(map(tuple, orders))) == 3
    alone = loader(f"{folder}/train-0.tar", batch_size=5)
    assert len({tuple(flat(labels(alone.epoch(e)))) for e in range(3)}) == 3


@pytest.mark.parametrize("shuffle", [1, 8, 4096])
def test_an_epoch_can_be_resumed_at_any_batch_with_any_workers(folder, monkeypatch, shuffle):
    monkeypatch.setattr(shards, "SHUFFLE", shuffle)
    for shard in ((0, 1), (1, 2)):
        whole = list(loader(folder, seed=3, shard=shard).epoch(2))
        assert len(whole) == 6
        for start in range(7):
            torch.manual_seed(start)
            assert batches_equal(loader(folder, seed=3, shard=shard).epoch(2, start), whole[start:])
    assert batches_equal(loader(folder, seed=3, shard=(1, 2), workers=2).epoch(2, 1), whole[1:])
    assert labels(loader(folder, seed=4, shard=(1, 2)).epoch(2)) != labels(whole)


@pytest.mark.parametrize("shuffle", [1, 4096])
def test_resuming_reads_only_the_shards_that_are_left(folder, monkeypatch, shuffle):
    monkeypatch.setattr(shards, "SHUFFLE", shuffle)
    loader_, opened, read = loader(folder), [], shards._read
    monkeypatch.setattr(shards, "_read", lambda url: opened.append(url) or read(url))
    list(loader_.epoch(0))
    assert len(opened) == len(set(opened)) == 5
    opened.clear()
    list(loader_.epoch(0, 5))
    assert len(opened) == len(set(opened)) <= (2 if shuffle == 1 else 5)
    assert not list(loader_.epoch(0, 6))


def test_ranks_have_shards_of_their_own_and_equally_many_samples(folder):
    parts = [labels(loader(folder, batch_size=5, shard=(r, 2)).epoch(1)) for r in range(2)]
    assert [list(map(len, p)) for p in parts] == [[2] * 5, [3] * 5]
    bounds = [0, 5, 12, 16, 22, 27]
    own = [{next(k for k in range(5) if y < bounds[k + 1]) for y in flat(p)} for p in parts]
    assert not own[0] & own[1]
    # Three ranks: two shards, two shards and one, which is read again and again.
    lonely = flat(labels(loader(folder, batch_size=6, shard=(2, 3)).epoch(0)))
    assert len(lonely) == 8
    assert len(set(lonely)) < 8
    with pytest.raises(ValueError, match="shards: expected at least one per rank, got 5 for 6 ranks"):
        loader(folder, batch_size=6, shard=(0, 6))


def test_sizes_that_cannot_be_kept_are_read_again(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    urls = find_shards(folder, "train")
    for _ in range(2):
        with pytest.warns(UserWarning, match="file/spnet/shards: cannot be written, so every start reads all shards"):
            found, bad = index_shards(urls)
        assert ([s.samples for s in found], bad) == ([*SIZES], 0)


def test_ranks_test_the_whole_set_in_order(folder):
    assert flat(labels(loader(folder, "test", 10))) == list(range(27))
    parts = [labels(loader(folder, "test", 10, shard=(r, 2), workers=r)) for r in range(2)]
    assert flat(a + b for a, b in zip(*parts, strict=True)) == list(range(27))


def test_which_shards(tmp_path, folder):
    names = [u.rpartition("/")[2] for u in find_shards(folder, "train")]
    assert names == [f"train-{k}.tar" for k in range(5)]
    nested = "https://host/set-{train-{00..02},val-{0..1}}.tar"
    assert find_shards(nested, "train") == [f"https://host/set-train-0{k}.tar" for k in range(3)]
    assert find_shards("/a/train/{0..1}.tar::/a/test/0.tar", "train") == ["/a/train/0.tar", "/a/train/1.tar"]
    assert find_shards("/a/train/{0..1}.tar::/a/test/0.tar", "test") == ["/a/test/0.tar"]
    (tmp_path / "empty").mkdir()
    for root in (None, tmp_path / "empty", "/a/train/0.tar"):
        found = "none named" if root is None else f"no shards for 'test' in {root}"
        with pytest.raises(FileNotFoundError, match=f"data_root: {found}.* 'val' or 'test'"):
            find_shards(root, "test")
    names = [f"train-{k:04}" for k in range(40)]  # together longer than a file's name may be
    assert find_shards(f"{tmp_path}/{{{','.join(names)}}}.tar", "train") == [f"{tmp_path}/{name}.tar" for name in names]
    with pytest.raises(FileNotFoundError, match="'train' but not 'val' or 'test' .inside of another word either"):
        find_shards("/a/latest-train-{0..1}.tar", "train")


def spoil(folder, cut):
    """Four bad shards beside the five good ones, the first a good one cut off; returns their names."""
    whole = (folder / "train-0.tar").read_bytes()
    (folder / "train-5.tar").write_bytes(whole[:cut])
    (folder / "train-6.tar").write_bytes(b"no tar at all" * 100)
    write_shard(folder / "train-7.tar", [1, 2], lambda label: {"jpg": jpg(label)})
    return ["train-5.tar", "train-6.tar", "train-7.tar", "train-8.tar"]


@pytest.mark.parametrize("cut", ["in an image", "in a header", "after a sample"])
def test_bad_shards_are_left_out_and_counted_or_an_error(folder, capsys, cut):
    with tarfile.open(folder / "train-0.tar") as tar:
        second = tar.getmembers()[2]
    where = {
        "in an image": second.offset_data + 100,
        "in a header": second.offset + 100,
        "after a sample": second.offset,
    }
    bad = spoil(folder, where[cut])
    urls = find_shards(f"{folder}/train-{{0..8}}.tar", "train")
    good, count = index_shards(urls)
    assert [s.samples for s in good] == list(SIZES)
    assert count == 4
    printed = capsys.readouterr().err
    assert "skipping 4 of 9 shards that cannot be read" in printed
    assert all(name in printed for name in bad)
    assert "train-6.tar: ReadError: invalid header\n" in printed
    assert "train-8.tar: FileNotFoundError: No such file or directory\n" in printed
    with pytest.raises(ValueError, match="4 of 9 shards cannot be read, such as .*train-5.tar: "):
        index_shards(urls, "raise")
    with pytest.raises(ValueError, match="1 of 1 shards cannot be read, such as .*train-8.tar: FileNotFoundError"):
        index_shards(urls[8:])
    with pytest.raises(ValueError, match="labels: expected 0 to n - 1, got 7 from 5 to 11"):
        index_shards(urls[1:2])
    with pytest.raises(ValueError, match="bad_shards: expected 'skip' or 'raise', got 'ignore'"):
        index_shards(urls, "ignore")


def test_what_makes_a_shard_bad_is_told_without_addresses(folder):
    path = folder / "train-0.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"such as \S*train-0.tar: ReadError: unexpected end of data\Z"):
        index_shards([str(path)])
    write_shard(path, range(2), lambda label: {"jpg": jpg(label), "cls": b"cat"})
    with pytest.raises(ValueError, match=r"train-0.tar: \S+: expected a class's number in cls, got b'cat'\Z"):
        index_shards([str(path)])


@pytest.mark.parametrize("how", ["missing", "truncated", "shorter", "one short"])
def test_shard_that_is_bad_later(folder, capsys, how):
    loaders = {name: loader(folder, batch_size=9, bad_shards=name) for name in ("skip", "raise")}
    test, path = loader(folder, "test", 9), folder / "train-1.tar"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    else:
        write_shard(path, [5, 6] if how == "shorter" else range(5, 11))
    (order,) = [flat(labels(loaders["skip"].epoch(0)))]
    assert len(order) == 27
    assert set(order) >= set(range(27)) - set(range(5, 12))
    assert loaders["skip"].bad_shards == 1
    assert capsys.readouterr().err.count("train-1.tar: cannot be read any more") == 1
    with pytest.raises(ValueError, match="train-1.tar: cannot be read any more"):
        list(loaders["raise"].epoch(0))
    assert flat(labels(test)) == list(range(27))
    (folder / "val-1.tar").unlink()
    with pytest.raises(ValueError, match="val-1.tar: cannot be read any more"):
        list(test)


def test_image_that_cannot_be_decoded_is_named(folder):
    write_shard(folder / "train-0.tar", range(5), lambda label: {"jpg": b"none", "cls": b"%d" % label})
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^\S*train-0.tar: 000\d: expected an image.*\Z"):
            list(loader(folder, workers=workers))


def test_what_was_found_is_kept_while_the_file_stays(folder, monkeypatch):
    urls = find_shards(folder, "train")
    first, opened, read = index_shards(urls), [], shards._read
    monkeypatch.setattr(shards, "_read", lambda url: opened.append(url) or read(url))
    assert index_shards(urls) == first
    assert opened == []
    write_shard(folder / "train-2.tar", range(12, 16), lambda label: {"png": jpg(label, "PNG"), "cls": b"%d" % label})
    assert index_shards(urls) == first
    assert opened == [str(folder / "train-2.tar")]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"samples": 3}'])
def test_what_was_found_is_found_again_where_it_is_damaged(folder, monkeypatch, tmp_path, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    urls = find_shards(folder, "train")
    first = index_shards(urls)
    for kept in (tmp_path / "cache").rglob("*.json"):
        kept.write_text(text)
    assert index_shards(urls) == first


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_shards_of_a_url(folder, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/train-{{0..4}}.tar"
        assert batches_equal(loader(root).epoch(0), loader(folder).epoch(0))
        good, bad = index_shards(find_shards(root.replace("..4", "..5"), "train"))
        assert (len(good), bad) == (5, 1)
        server.shutdown()


def test_missing_library_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match="pip install webdataset"):
        make_loader("webdataset", "train", root=folder, batch_size=2)


def test_training_from_shards_by_the_command(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", [0, 1, 0, 1])
    write_shard(tmp_path / "train" / "1.tar", [0, 1, 0, 1])
    write_shard(tmp_path / "val" / "0.tar", [0, 1, 1])
    (tmp_path / "train" / "2.tar").write_bytes(b"")
    command = "train --preset imagenet --data webdataset --model resnet18 --image-size 32 --workers 1 --epochs 1"
    command = [*command.split(), "--data-root", str(tmp_path), "--batch-size", "4", "--out", str(tmp_path / "run")]
    text = run(*command)
    assert "skipping 1 of 3 shards that cannot be read" in text
    assert "3 samples: accuracy" in text
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"step": 2' in log
    assert '"bad_shards": 1' in log
    best = str(tmp_path / "run" / "best")
    data = ("--data", "webdataset", "--data-root", str(tmp_path), "--workers", "0")
    assert "3 samples: accuracy" in run("eval", best, *data, "--device", "cpu")
    (tmp_path / "val" / "1.tar").write_bytes(b"")
    assert "3 samples: accuracy" in run("eval", best, *data)
    assert "1 of 2 shards cannot be read" in fail("eval", best, *data, "--bad-shards", "raise")
    (tmp_path / "val" / "1.tar").unlink()
    drawn = ("--limit", "2", "--out", str(tmp_path / "paths"))
    text = run("paths", best, *data, *drawn)
    assert text.startswith("2 samples")
    assert (tmp_path / "paths" / "images.png").exists()
    run("report", str(tmp_path / "run"))
    assert "Paths of 3 samples" in (tmp_path / "run" / "report.html").read_text()
    assert "1 of 3 shards cannot be read" in fail(*command, "--bad-shards", "raise")
    write_shard(tmp_path / "val" / "0.tar", [0, 1, 2])
    assert "data: 2 training classes differ from 3 test classes" in fail(*command)


def test_transform():
    image = Image.linear_gradient("L").convert("RGB").resize((64, 32))
    test = image_transform(False, 28)(image)
    assert test.shape == (3, 28, 28)
    assert test.is_contiguous()
    # The centre 28 x 28 of 64 x 32, one pixel to a pixel.
    expected = image.crop((18, 2, 46, 30))
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    pixels = (test.permute(1, 2, 0) * std + mean) * 255
    assert torch.equal(pixels.round(), torch.from_numpy(np.array(expected)).float())
    # Boxes of 8 to 100 % of the area and of ratio 3/4 to 4/3, everywhere.
    torch.manual_seed(0)
    boxes = torch.tensor([_random_box(640, 480) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    for low, high, size in ((left, right, 640), (top, bottom, 480)):
        assert 0 <= low.min() < 10
        assert size - 10 < high.max() <= size
    share, ratio = w * h / (640 * 480), w / h
    assert 0.08 - 1e-6 <= share.min() < 0.1
    assert 0.9 < share.max() <= 1
    assert 0.7499 <= ratio.min() < 0.76
    assert 1.32 < ratio.max() <= 1.3334
    assert len({image_transform(True, 28)(image).sum().item() for _ in range(8)}) == 8
