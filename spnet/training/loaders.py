"""Loaders: batches of a set in memory (`Loader`) or decoded from files by worker processes (`FolderLoader`).

Both draw everything random from (seed, epoch, position), so that a resumed run sees the same batches without
any saved state.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spnet.preprocessing import pad_to, scale_and_shift, to_float
from spnet.training.datasets import IMAGENET_MEAN, IMAGENET_STD, ImageSet

CROP_PADDING = 4  # pixels of zeros on every side before the random crop


class _EpochLoader(ABC):
    """What both loaders share: attributes, order and length of an epoch, and its start at any batch.

    Args:
        num_images: size of the set.
        The others: as for `Loader` and `ImageSet`.

    Raises:
        ValueError: batch_size < 1, an empty set, no full batch with drop_last, or fewer images than ranks.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        train: bool,
        device: str | torch.device,
        seed: int,
        drop_last: bool | None,
        channels_last: bool,
        shard: tuple[int, int],
        class_names: Sequence[str],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        input_size: int,
    ) -> None:
        drop_last = train if drop_last is None else drop_last
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if num_images == 0:
            raise ValueError("data: expected at least one image, got an empty set")
        if drop_last and num_images < batch_size:
            raise ValueError(f"batch_size: expected at most the {num_images} images of the set, got {batch_size}")
        self._rank, self._ranks = shard
        if self._ranks > min(batch_size, num_images):
            raise ValueError(
                f"shard: expected at least one image per rank and batch, got {self._ranks} ranks "
                f"for {num_images} images in batches of {batch_size}"
            )
        self.batch_size, self.drop_last = batch_size, drop_last
        self.train, self.seed = train, seed
        self.device = torch.device(device)
        # Of folders, whose names may hold bytes that are no UTF-8: neither a page nor a picture can show those.
        names = (str(n).encode("utf-8", "surrogateescape").decode("utf-8", "replace") for n in class_names)
        self.class_names, self.num_classes = tuple(names), len(class_names)
        self.mean, self.std, self.in_channels = mean, std, len(mean)
        self.input_size = input_size
        self.bad_shards = 0  # that this rank has found
        self.num_images = num_images
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        full, rest = divmod(self.num_images, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (float32 [B, C, S, S], int64 [B]) from batch `start` of the epoch to its end.

        Raises:
            ValueError: start outside 0..len(self); len(self) itself is the finished epoch and yields nothing.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start: expected a batch number from 0 to {len(self)}, got {start}")
        return self._batches(epoch, start)

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def _parts(self, order: Tensor, start: int) -> Iterator[tuple[int, int, int, Tensor]]:
        """Yield the number and size of each batch, where this rank's part of it begins, and its positions in the set.

        A last batch of fewer images than ranks has no part for some of them, who yield nothing for it.
        """
        for batch in range(start, len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            begin, end = (len(whole) * r // self._ranks for r in (self._rank, self._rank + 1))
            if end > begin:
                yield batch, len(whole), begin, whole[begin:end]

    def _order(self, epoch: int) -> Tensor:
        """int64 [num_images] on the CPU: the order in which the epoch visits the set."""
        if not self.train:
            return torch.arange(self.num_images)
        return torch.randperm(self.num_images, generator=_generator("order", self.seed, epoch))


class Loader(_EpochLoader):
    """Batches of an `ImageSet` that lies whole in the memory of `device`.

    Everything random is a function of (seed, epoch, batch number): `epoch(e, start=k)` yields exactly what
    `epoch(e)` yields from its batch k on. Random numbers are drawn on the CPU, so every device sees the same
    order, crops and flips.

    Args:
        data: the image set.
        batch_size: images per batch.
        train: shuffle every epoch; also the default of `augment` and `drop_last`.
        augment: random crop after padding with 4 zero pixels, and horizontal flip with probability 1/2.
        drop_last: leave out a last batch that is not full.
        channels_last: memory format of the yielded images.
        shard: (rank, number of ranks): yield only this rank's part of every batch, an equal share up to one image.

    Raises:
        ValueError: batch_size < 1, an empty set, no full batch with drop_last, fewer images than ranks, or labels
            outside the classes.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        train: bool,
        device: str | torch.device = "cpu",
        seed: int = 0,
        augment: bool | None = None,
        drop_last: bool | None = None,
        channels_last: bool = True,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(
            len(data),
            batch_size,
            train=train,
            device=device,
            seed=seed,
            drop_last=drop_last,
            channels_last=channels_last,
            shard=shard,
            class_names=data.class_names,
            mean=data.mean,
            std=data.std,
            input_size=data.input_size,
        )
        bad = ((data.labels < 0) | (data.labels >= data.num_classes)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"labels: expected 0 to {data.num_classes - 1}, got {data.labels[bad[0]].item()} "
                f"at position {bad[0].item()}"
            )
        self.data = data
        self.augment = train if augment is None else augment
        self._images = data.images.to(self.device)
        self._labels = data.labels.to(self.device)
        self._scale, self._shift = scale_and_shift(data.mean, data.std, self.device)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, size, begin, chosen in self._parts(self._order(epoch).to(self.device), start):
            # index_select: 0.02 ms for 128 x 3 x 32 x 32 on one core, plain indexing 0.3 ms.
            images = pad_to(self._images.index_select(0, chosen), self.input_size)  # uint8 [B, C, S, S]
            if self.augment:
                images = self._augmented(images, epoch, batch, size, begin)
            # The memory format last: broadcasting over C innermost costs 1.7 ms instead of 0.5 ms.
            images = to_float(images, self._scale, self._shift).contiguous(memory_format=self._format)
            yield images, self._labels.index_select(0, chosen)

    def _augmented(self, images: Tensor, epoch: int, batch: int, size: int, begin: int) -> Tensor:
        generator = _generator("augment", self.seed, epoch, batch)
        shifts = torch.randint(2 * CROP_PADDING + 1, (2, size), generator=generator)
        flips = torch.randint(2, (1, size), generator=generator)
        drawn = torch.cat((shifts, flips))[:, begin : begin + len(images)]
        # One transfer, and none that the host waits for.
        top, left, flip = drawn.to(self.device, non_blocking=True).unbind()
        return random_crop_flip(F.pad(images, (CROP_PADDING,) * 4), top, left, flip.bool(), self.input_size)


class DecodingLoader(_EpochLoader):
    """What the loaders of encoded images share: the worker processes that decode them."""

    def __init__(self, num_images: int, batch_size: int, *, workers: int, **settings: Any) -> None:
        super().__init__(num_images, batch_size, **settings)
        self.workers = workers

    def _decoded(self, dataset: Any, batches: Iterable[list], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch of (`dataset[item]` for the items of a list), stacked."""
        pinned = self.device.type == "cuda"
        decoded = torch.utils.data.DataLoader(
            _SeededItems(dataset, self.seed, epoch),
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=pinned,
            generator=_generator("workers", self.seed, epoch),  # else it would draw from the global one
            worker_init_fn=_outlive_sigterm,
        )
        for images, labels in _one_line_errors(decoded):
            bad = ((labels < 0) | (labels >= self.num_classes)).nonzero().flatten()
            if len(bad):
                raise ValueError(f"labels: expected 0 to {self.num_classes - 1}, got {labels[bad[0]].item()}")
            images = images.to(self.device, non_blocking=pinned)
            yield images.contiguous(memory_format=self._format), labels.to(self.device, non_blocking=pinned)


def _one_line_errors(batches: Iterable) -> Iterator:
    """The batches of a DataLoader; its workers' errors without the traceback that it makes their message."""
    try:
        yield from batches
    except (ValueError, OSError) as e:  # of a file that is gone, or may not be read, the second
        kind = ValueError if isinstance(e, ValueError) else OSError
        raise kind(str(e).rpartition(f"\n{type(e).__name__}: ")[2].rstrip()) from e


class FolderLoader(DecodingLoader):
    """Batches of a set of images that are decoded when they are asked for; the interface is that of `Loader`.

    Args:
        dataset: `dataset[i]` is (float32 [3, S, S] normalised, label). Its random transforms must draw from
            torch's global CPU generator; that one is seeded from (seed, epoch, i) before every image and put
            back afterwards, so an image does not depend on the worker that decodes it, or on the batch.
        class_names: one name per class.
        batch_size, train, device, seed, drop_last, channels_last, shard: as for `Loader`.
        mean, std, input_size: what `dataset` normalises with, and S.
        workers: decoding processes; 0 decodes in this one.

    Raises:
        ValueError: batch_size < 1, an empty set, no full batch with drop_last, or fewer images than ranks. While
            iterating: a label outside the classes, or what `dataset` raises.
        OSError: what `dataset` raises while iterating.
    """

    def __init__(
        self,
        dataset: Any,
        class_names: Sequence[str],
        batch_size: int,
        *,
        train: bool,
        device: str | torch.device = "cpu",
        seed: int = 0,
        workers: int = 0,
        drop_last: bool | None = None,
        channels_last: bool = True,
        shard: tuple[int, int] = (0, 1),
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        input_size: int = 224,
    ) -> None:
        super().__init__(
            len(dataset),
            batch_size,
            train=train,
            device=device,
            seed=seed,
            drop_last=drop_last,
            channels_last=channels_last,
            shard=shard,
            class_names=class_names,
            mean=mean,
            std=std,
            input_size=input_size,
            workers=workers,
        )
        self.dataset = dataset

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = [positions.tolist() for *_, positions in self._parts(self._order(epoch), start)]
        yield from self._decoded(self.dataset, batches, epoch)


def _outlive_sigterm(worker: int) -> None:
    # It is sent to the whole process group; the trainer still takes a step and saves. Workers end with their parent.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_parents_sigterm, daemon=True).start()


def _end_at_parents_sigterm() -> None:
    # Python's exit sends it to the workers of an epoch that was not read to its end, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


class _SeededItems(torch.utils.data.Dataset):
    """Items of a data set, each read with the global CPU generator seeded from (seed, epoch, position).

    An item is asked for by its position, or by what has it as an attribute.
    """

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, item: Any) -> tuple[Tensor, int]:
        position = getattr(item, "position", item)
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(seed_of("image", self.seed, self.epoch, position))
        try:
            return self.dataset[item]
        finally:
            generator.set_state(state)


def random_crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut one window out of every image and mirror some of them.

    Args:
        images: any dtype, [B, C, P, P'].
        top, left: int64 [B], first row and column of each window.
        flip: bool [B], whether the window is mirrored left to right.
        size: side of the window.

    Returns:
        [B, C, size, size], same dtype and device.
    """
    b, c, p, q = images.shape
    steps = torch.arange(size, device=images.device)
    rows = top[:, None] + steps  # [B, S]
    columns = left[:, None] + torch.where(flip[:, None], steps.flip(0), steps)  # [B, S]
    planes = torch.arange(c, device=images.device) * (p * q)
    # One flat gather: 0.7 ms for 128 x 3 x 32 x 32 on one core; indexing by (b, row, column) takes 1.9 ms.
    flat = planes[None, :, None, None] + (rows[:, :, None] * q + columns[:, None, :])[:, None]  # [B, C, S, S]
    return images.flatten(1).gather(1, flat.flatten(1)).view(b, c, size, size)


def seed_of(*parts: str | int) -> int:
    """A seed that is a fixed function of its parts, the same in every process and on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a generator's seed is a non-negative int64


def _generator(*parts: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))
