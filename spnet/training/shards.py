"""Shards in the WebDataset form: tar files of ``key.jpg`` (jpeg, png) and ``key.cls``, streamed. Needs webdataset.

Everything random is a function of (seed, epoch, position in the set): an epoch's order is worked out from the sizes of
the shards before anything is read, so that it can be taken up at any batch, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spnet.models.files import write_whole
from spnet.training import distributed
from spnet.training.datasets import IMAGENET_MEAN, IMAGENET_STD, Split, check_split
from spnet.training.folders import decode_rgb, image_transform
from spnet.training.loaders import DecodingLoader, _generator

SHUFFLE = 4096  # encoded samples that a rank holds and draws from: about 450 MB of ImageNet
BAD_SHARDS = ("skip", "raise")
_WORDS = {"train": ("train",), "test": ("val", "test")}
_IMAGES = ("jpg", "jpeg", "png")
_UNREADABLE = (OSError, ValueError, EOFError, tarfile.TarError, zlib.error)


@dataclass(frozen=True)
class Shard:
    """One tar file, and what was found when it was read through."""

    url: str
    samples: int
    labels: tuple[int, ...]  # those that occur, ascending


class Sample(NamedTuple):
    """An encoded sample."""

    position: int  # in the set
    name: str  # for messages
    image: bytes
    label: int


def find_shards(root: str | Path | None, split: Split) -> list[str]:
    """The shards of a split: those whose file name, or else whose folder, contains "train", or "val" or "test".

    Args:
        root: a folder (its ``*.tar`` and ``*/*.tar``), or paths and URLs with braces, several joined by ``::``, such
            as ``https://host/imagenet-{train-{000..146},val-{00..06}}.tar``.

    Raises:
        FileNotFoundError: no root, or none of its shards belongs to the split. ImportError: webdataset is missing.
    """
    check_split(split)
    if root is not None and os.path.isdir(root):  # Path.is_dir raises where a pattern is longer than a name may be
        urls = sorted(map(str, [*Path(root).glob("*.tar"), *Path(root).glob("*/*.tar")]))
    else:
        urls = [] if root is None else _webdataset().shardlists.expand_urls(str(root))

    def belongs(url: str) -> bool:
        folder, _, name = url.rpartition("/")
        for part in (name, folder.rpartition("/")[2]):
            found = {s for s, words in _WORDS.items() if any(w in part for w in words)}
            if found:
                return found == {split}
        return False

    shards = list(filter(belongs, urls))
    if not shards:
        words, others = (" or ".join(map(repr, _WORDS[s])) for s in (split, "test" if split == "train" else "train"))
        found = "none named" if root is None else f"no shards for {split!r} in {root}"
        raise FileNotFoundError(
            f"data_root: {found}. Expected tar files whose names, or else whose folders, contain {words} "
            f"but not {others} (inside of another word either): a folder of them, or a pattern such as "
            "'https://host/{train-{000..146},val-{00..06}}.tar'."
        )
    return shards


def index_shards(urls: Sequence[str], bad_shards: str = "skip") -> tuple[list[Shard], int]:
    """Read every shard through for its size and labels; in a job each rank reads its share of them.

    What was found is kept in ``$XDG_CACHE_HOME/spnet/shards`` (``~/.cache``), for a local file as long as it does not
    change, for a URL for ever; where nothing can be written there, for this time only.

    Args:
        bad_shards: "skip" prints and leaves out what is missing, corrupt, empty or has a sample without image or
            label; "raise" does not.

    Returns:
        The good shards, the same on every rank, and how many bad ones this rank found.

    Raises:
        ValueError: a bad shard with "raise"; no good one; or labels that are not 0 to n - 1. ImportError: webdataset
            is missing.
    """
    if bad_shards not in BAD_SHARDS:
        raise ValueError(f"bad_shards: expected {' or '.join(map(repr, BAD_SHARDS))}, got {bad_shards!r}")
    _webdataset()
    with ThreadPoolExecutor(8) as pool:
        mine = list(pool.map(_index, urls[distributed.rank() :: distributed.world_size()]))
    found = [pair for part in distributed.gather_over_ranks(mine) for pair in part]
    good = {url: shard for url, shard in found if isinstance(shard, Shard)}
    errors = {url: error for url, error in found if isinstance(error, str)}
    if errors and (bad_shards == "raise" or not good):
        raise ValueError(f"{len(errors)} of {len(urls)} shards cannot be read, such as {min(errors.values())}")
    if errors and distributed.rank() == 0:
        print(f"skipping {len(errors)} of {len(urls)} shards that cannot be read:", file=sys.stderr)
        print(*errors.values(), sep="\n", file=sys.stderr)
    shards = [good[url] for url in urls if url in good]
    labels = set().union(*(s.labels for s in shards))
    if labels != set(range(len(labels))):
        raise ValueError(f"labels: expected 0 to n - 1, got {len(labels)} from {min(labels)} to {max(labels)}")
    return shards, sum(isinstance(s, str) for _, s in mine)


def _index(url: str) -> tuple[str, Shard | str]:
    stamp = ""
    if os.path.exists(url):
        url_stat = os.stat(url)
        stamp = f"{os.path.abspath(url)} {url_stat.st_size} {url_stat.st_mtime_ns}"
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spnet" / "shards"
    kept = base / f"{hashlib.blake2b((stamp or url).encode(), digest_size=16).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or no longer what was written
        found = json.loads(kept.read_text())
        return url, Shard(url, found["samples"], tuple(found["labels"]))
    try:
        labels = [label for _, _, label in _read(url)]
        if not labels:
            raise ValueError(f"{url}: no samples")
    except _UNREADABLE as e:
        return url, f"{url}: {_why(e)}"
    shard = Shard(url, len(labels), tuple(sorted(set(labels))))
    try:
        base.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(asdict(shard)).encode())
    except OSError:  # the same words for every shard are shown once
        warnings.warn(f"{base}: cannot be written, so every start reads all shards through", stacklevel=2)
    return url, shard


def _why(error: Exception) -> str:
    # Not str(error): webdataset appends streams and URLs to an exception's arguments, and a stream to the first.
    told = getattr(error, "strerror", None) or str(next(iter(error.args), ""))
    return f"{type(error).__name__}: {told.partition(' @ <')[0]}"


def _read(url: str) -> Iterator[tuple[str, bytes, int]]:
    """Name, encoded image and label of every sample of a shard."""
    wds = _webdataset()
    stream = _Stream(wds.gopen(url))
    for sample in wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander([dict(url=url, stream=stream)])):
        name = f"{url}: {sample['__key__']}"
        image = next((sample[kind] for kind in _IMAGES if kind in sample), None)
        if image is None or "cls" not in sample:
            raise ValueError(f"{name}: expected one of {', '.join(_IMAGES)} and cls, got {[*sample][2:]}")
        try:
            label = int(sample["cls"])
        except ValueError as e:
            raise ValueError(f"{name}: expected a class's number in cls, got {sample['cls'][:20]!r}") from e
        yield name, image, label
    while stream.read(1 << 20):
        pass
    stream.file.close()  # a download that broke off says so here
    if url.endswith(".tar") and stream.end.strip(b"\0"):
        raise ValueError(f"{url}: expected a tar file, which ends in zeros, got one that was cut off")


class _Stream:
    """A file that remembers its last bytes: tarfile takes one that is cut off between two members for whole."""

    def __init__(self, file: Any) -> None:
        self.file, self.end = file, b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.end = (self.end + data)[-1024:]
        return data


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("shards need webdataset: install it with `pip install webdataset`") from error
    return webdataset


class ShardLoader(DecodingLoader):
    """Batches of samples that are streamed from shards; the interface is that of `Loader`.

    For training every rank has shards of its own, in an order that is new in every epoch, and draws from a buffer of
    `SHUFFLE` samples that it fills from them; a rank whose shards hold fewer samples than its share begins again.
    Otherwise the set is read in order, each rank taking its part of every batch.

    Args:
        shards: see `index_shards`.
        batch_size, train, device, seed, workers, drop_last, channels_last, shard: as for `FolderLoader`.
        bad_shards: what to do where a shard can no longer be read in training: "skip" prints it, counts it in
            `bad_shards`, and takes samples of the rank's next shards instead; "raise" does not. A test set must stay
            what it was: there it is always an error.
        input_size: side of the yielded images.

    Raises:
        ValueError: as for `FolderLoader`; fewer shards than ranks. While iterating: a shard that cannot be read, or an
            image that cannot be decoded.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        batch_size: int,
        *,
        train: bool,
        device: str | torch.device = "cpu",
        seed: int = 0,
        workers: int = 0,
        drop_last: bool | None = None,
        channels_last: bool = True,
        shard: tuple[int, int] = (0, 1),
        bad_shards: str = "skip",
        input_size: int = 224,
    ) -> None:
        super().__init__(
            sum(s.samples for s in shards),
            batch_size,
            train=train,
            device=device,
            seed=seed,
            workers=workers,
            drop_last=drop_last,
            channels_last=channels_last,
            shard=shard,
            class_names=tuple(map(str, sorted(set().union(*(s.labels for s in shards))))),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            input_size=input_size,
        )
        if train and len(shards) < self._ranks:
            raise ValueError(f"shards: expected at least one per rank, got {len(shards)} for {self._ranks} ranks")
        self._shards = shards
        self._first = [0, *accumulate(s.samples for s in shards)]
        self._skip = train and bad_shards == "skip"
        self._transform = image_transform(train, input_size)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self.train:
            share = self.batch_size * (self._rank + 1) // self._ranks - self.batch_size * self._rank // self._ranks
            own = self._shard_order(epoch)[self._rank :: self._ranks]
            wanted = self._drawn(len(self) * share, epoch)[start * share :]
            sizes = [share] * (len(self) - start)
        else:
            own = list(range(len(self._shards)))
            parts = [part for *_, part in self._parts(self._order(epoch), start)]
            wanted, sizes = torch.cat([torch.empty(0, dtype=torch.int64), *parts]).tolist(), list(map(len, parts))
        samples = self._fetched(wanted, own)
        yield from self._decoded(_Images(self._transform), (list(islice(samples, n)) for n in sizes), epoch)

    def _shard_order(self, epoch: int) -> list[int]:
        return torch.randperm(len(self._shards), generator=_generator("shards", self.seed, epoch)).tolist()

    def _drawn(self, count: int, epoch: int) -> list[int]:
        """The order in which a buffer of SHUFFLE gives up the first `count` samples of a stream."""
        generator = _generator("order", self.seed, epoch, self._rank)
        size = min(SHUFFLE, count)
        buffer, drawn = list(range(size)), []
        for new, i in enumerate(torch.randint(size, (count - size,), generator=generator).tolist(), size):
            drawn.append(buffer[i])
            buffer[i] = new
        return drawn + [buffer[i] for i in torch.randperm(size, generator=generator).tolist()]

    def _fetched(self, wanted: Sequence[int], own: Sequence[int]) -> Iterator[Sample]:
        """The samples at these places of the stream of `own` shards (again and again), in that order."""
        missing, held = set(wanted), {}
        stream = self._stream(missing, own)
        for place in wanted:
            while place not in held:
                found, sample = next(stream)
                if found in missing:
                    held[found] = sample
            yield held.pop(place)

    def _stream(self, wanted: set[int], own: Sequence[int]) -> Iterator[tuple[int, Sample]]:
        """Place and sample of the shards that hold a place that is wanted, one shard after the other."""
        end = 0
        for turn, k in enumerate(cycle(own)):
            place, end = end, end + self._shards[k].samples
            if wanted.isdisjoint(range(place, end)):
                continue
            # What a bad shard lacks comes from the next.
            for i in islice(cycle(own), turn % len(own), turn % len(own) + (len(own) if self._skip else 1)):
                shard, count = self._shards[i], 0
                try:
                    for read in islice(_read(shard.url), shard.samples):
                        yield place, Sample(self._first[i] + count, *read)
                        place, count = place + 1, count + 1
                        if place == end:
                            break
                    else:
                        if count < shard.samples:
                            raise ValueError(f"fewer than the {shard.samples} samples that it had")
                except _UNREADABLE as e:
                    if not self._skip:
                        raise ValueError(f"{shard.url}: cannot be read any more ({_why(e)})") from e
                    self.bad_shards += 1
                    print(f"skipping {shard.url}: cannot be read any more ({_why(e)})", file=sys.stderr)
                if place == end:
                    break
            else:
                raise ValueError(f"shards: none of this rank's {len(own)} can be read any more")


class _Images(torch.utils.data.Dataset):
    """`images[sample]` is (float32 [3, S, S], label)."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __getitem__(self, sample: Sample) -> tuple[Tensor, int]:
        return self.transform(decode_rgb(sample.image, sample.name)), sample.label
