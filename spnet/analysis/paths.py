"""Which blocks the samples of a data set execute: rates per block and class, distinct paths, cost per sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spnet.analysis.macs import align, count_macs
from spnet.api import fast_forward
from spnet.routing import unwrapped

Labels = Tensor | np.ndarray | None
Batch = Tensor | tuple[Tensor, Labels]


@dataclass(frozen=True, eq=False)
class PathStatistics:
    """The paths of N samples through L routed blocks. All tensors lie on the CPU; ``str()`` gives tables.

    Costs are multiply-accumulates (MACs) of stem, executed bodies, shortcuts, routers and head. Where the samples
    have no labels, "class" means the predicted class everywhere.
    """

    decisions: Tensor  # bool [N, L]: which blocks each sample executed
    macs: Tensor  # int64 [N]: cost of each sample
    dense_macs: int  # cost of a sample that executes every block
    body_macs: tuple[int, ...]  # L costs, each saved by one skip
    blocks: tuple[str, ...]  # L names
    predictions: Tensor  # int64 [N]
    losses: Tensor  # float32 [N]: cross-entropy of the sample's class
    labels: Tensor | None  # int64 [N]
    class_names: tuple[str, ...]  # one per class; numbers where the names are unknown

    def __len__(self) -> int:
        return len(self.macs)

    def subset(self, positions: Tensor) -> PathStatistics:
        """The statistics of the samples at these positions (int64 [M]), in that order.

        Raises:
            ValueError: no positions.
            IndexError: a position outside the samples.
        """
        if not len(self.macs[positions]):
            raise ValueError("positions: expected at least one sample, got none")
        per_sample = ("decisions", "macs", "predictions", "losses", "labels")
        chosen = {name: None if (v := getattr(self, name)) is None else v[positions] for name in per_sample}
        return replace(self, **chosen)

    @property
    def count(self) -> str:
        """The number of samples for people, such as "1,000 samples"."""
        return f"{len(self):,} sample{'s' * (len(self) != 1)}"

    @property
    def classes(self) -> Tensor:
        """int64 [N]: the label, or the prediction where there are no labels."""
        return self.predictions if self.labels is None else self.labels

    @property
    def class_samples(self) -> Tensor:
        """int64 [classes]: number of samples of each class."""
        return self.classes.bincount(minlength=len(self.class_names))

    @property
    def rates(self) -> Tensor:
        """float64 [L]: fraction of the samples that execute each block."""
        return self.decisions.double().mean(0)

    @cached_property
    def class_rates(self) -> Tensor:
        """float64 [classes, L]: the rates of each class; NaN for a class without samples."""
        return self._class_mean(self.decisions)

    @cached_property
    def class_macs(self) -> Tensor:
        """float64 [classes]: mean cost of a sample of each class; NaN for a class without samples."""
        return self._class_mean(self.macs[:, None])[:, 0]

    def _class_mean(self, values: Tensor) -> Tensor:
        sums = torch.zeros(len(self.class_names), values.shape[1], dtype=torch.float64, device="cpu")
        sums.index_add_(0, self.classes, values.double())
        return sums / self.class_samples[:, None]

    @property
    def fraction(self) -> float:
        """Mean cost as a fraction of the dense cost."""
        return self.macs.double().mean().item() / self.dense_macs

    @property
    def accuracy(self) -> float | None:
        """Fraction of correct predictions; None without labels."""
        return None if self.labels is None else (self.predictions == self.labels).double().mean().item()

    @cached_property
    def distinct_paths(self) -> tuple[Tensor, Tensor]:
        """The paths that occur, the most common first: bool [P, L], and how many samples take each: int64 [P]."""
        packed = np.packbits(self.decisions.numpy(), axis=1)
        _, first, counts = np.unique(packed, axis=0, return_index=True, return_counts=True)
        order = np.lexsort((first, -counts))
        return self.decisions[first[order]], torch.from_numpy(counts[order])

    @cached_property
    def by_difficulty(self) -> Tensor:
        """int64 [N]: the samples from the easiest to the hardest.

        An easy sample is one whose path is cheap; of two equal costs the one with the smaller cross-entropy.
        """
        return torch.from_numpy(np.lexsort((self.losses.numpy(), self.macs.numpy())))

    def to_dict(self) -> dict:
        """A summary that ``json`` can write: plain numbers, strings, lists and None (for what no sample says)."""
        counts = self.distinct_paths[1]
        correct = None if self.labels is None else self._class_mean((self.predictions == self.labels)[:, None])[:, 0]
        return {
            "samples": len(self),
            "accuracy": self.accuracy,
            "dense_macs": self.dense_macs,
            "mean_macs": self.macs.double().mean().item(),
            "min_macs": self.macs.min().item(),
            "max_macs": self.macs.max().item(),
            "mean_fraction_of_dense": self.fraction,
            "distinct_paths": len(counts),
            "samples_of_most_common_paths": counts[:10].tolist(),
            "blocks": [
                {"name": name, "body_macs": macs, "rate": rate}
                for name, macs, rate in zip(self.blocks, self.body_macs, self.rates.tolist(), strict=True)
            ],
            "classes": [
                {
                    "name": name,
                    "samples": n,
                    "accuracy": correct[i].item() if n and correct is not None else None,
                    "mean_macs": self.class_macs[i].item() if n else None,
                    "rates": self.class_rates[i].tolist() if n else None,
                }
                for i, (name, n) in enumerate(zip(self.class_names, self.class_samples.tolist(), strict=True))
            ],
        }

    def __str__(self) -> str:
        summary = self.to_dict()
        low, high = (summary[k] / 1e6 for k in ("min_macs", "max_macs"))
        common = ", ".join(f"{n / len(self):.1%}" for n in summary["samples_of_most_common_paths"][:3])
        lines = [
            self.count + ("" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"),
            f"cost per sample: {summary['mean_macs'] / 1e6:.2f} MMACs on average ({low:.2f} to {high:.2f}), "
            f"{self.fraction:.1%} of the dense {self.dense_macs / 1e6:.2f}",
            f"distinct paths: {summary['distinct_paths']}; most common: {common} of the samples",
            "",
            *align(self._class_rows(summary["classes"])),
            "",
            *align(self._block_rows()),
        ]
        return "\n".join(lines)

    def _class_rows(self, classes: list[dict], at_most: int = 20) -> list[tuple[str, ...]]:
        """Classes from cheap to costly; of many, the ends."""
        found = sorted((c for c in classes if c["samples"]), key=lambda c: c["mean_macs"])
        rows = []
        for c in found:
            accuracy = [] if c["accuracy"] is None else [f"{c['accuracy']:.1%}"]
            rows.append((shorten(c["name"]), str(c["samples"]), *accuracy, f"{c['mean_macs'] / self.dense_macs:.1%}"))
        header = ["class" if self.labels is not None else "predicted class", "samples", "accuracy", "MACs of dense"]
        if self.labels is None:
            header.remove("accuracy")
        if len(rows) > at_most:
            gap = f"... {len(rows) - at_most} between ...", *[""] * (len(header) - 1)
            rows[at_most // 2 : -at_most // 2] = [gap]
        return [tuple(header), *rows]

    def _block_rows(self) -> list[tuple[str, ...]]:
        occurring = self.class_samples > 0
        low, least = self.class_rates.masked_fill(~occurring[:, None], 2).min(0)
        high, most = self.class_rates.masked_fill(~occurring[:, None], -1).max(0)
        rows = [("block", "MMACs", "rate", "least executed by", "most executed by")]
        for i, name in enumerate(short_names(self.blocks)):
            ends = [f"{shorten(self.class_names[k[i]])} {r[i]:>4.0%}" for k, r in ((least, low), (most, high))]
            if low[i] == high[i]:
                ends = ["", "all alike"]
            rows.append((name, f"{self.body_macs[i] / 1e6:.2f}", f"{self.rates[i]:.1%}", *ends))
        return rows


def paths(
    model: nn.Module,
    data: Batch | Iterable[Batch],
    *,
    batch_size: int = 250,
) -> PathStatistics:
    """Send samples through a routed classifier and gather the statistics of their paths.

    Args:
        model: any module that contains :class:`spnet.RoutedBlock` and returns logits [B, classes], in evaluation mode.
        data: batches of ``(x, labels)``, ``(x, None)`` or plain ``x``, such as a loader gives them; or one such
            batch. x is [B, ...] in the model's dtype and on its device, labels are integers [B], also of numpy.
        batch_size: where ``data`` is one batch, how many of its samples run at a time.

    Raises:
        ValueError: batch_size < 1; no samples; labels of another length or outside the classes, or missing in some
            batches only; a model that does not return logits; everything that :func:`spnet.fast_forward` raises for
            model and x.
        TypeError: a batch that is no tensor, or labels that are no integers.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    decisions, macs, predictions, losses, labels = [], [], [], [], []
    blocks: tuple[str, ...] = ()
    cost = None  # of one sample: the same Macs for every batch
    samples = classes = 0
    for x, y in _batches(data, batch_size):
        logits, taken = fast_forward(model, x, return_paths=True)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model: expected logits [B, classes] as its output, got {got}")
        if len(x) == 0:
            continue
        counted = count_macs(model, x.shape[1:], x.dtype)
        if cost is not None and counted != cost:
            raise ValueError(f"data: expected samples of one shape, got also {list(x.shape[1:])}")
        cost, blocks, classes = counted, taken.blocks, logits.shape[1]
        logits = logits.float().cpu()
        y = None if y is None else _checked_labels(y, len(x), classes, samples)
        if samples and (y is None) != (labels[-1] is None):
            raise ValueError("labels: expected with every batch or with none, got them with some")
        predicted = logits.argmax(1)
        decisions.append(taken.decisions.cpu())
        macs.append(taken.macs.cpu())
        predictions.append(predicted)
        losses.append(F.cross_entropy(logits, predicted if y is None else y, reduction="none"))
        labels.append(y)
        samples += len(x)
    if cost is None:
        raise ValueError("data: expected at least one sample, got none")
    return PathStatistics(
        torch.cat(decisions),
        torch.cat(macs),
        cost.dense,
        tuple(b.body for b in cost.blocks),
        blocks,
        torch.cat(predictions),
        torch.cat(losses),
        None if labels[0] is None else torch.cat(labels),
        _class_names(unwrapped(model), data, classes),
    )


def _batches(data: Batch | Iterable[Batch], batch_size: int) -> Iterator[tuple[Tensor, Labels]]:
    if isinstance(data, Tensor):
        data = (data, None)
    if _is_pair(data):
        x, labels = data
        if labels is not None and len(labels) != len(x):
            raise ValueError(f"labels: expected {len(x)}, one per sample, got {len(labels)}")
        parts = x.split(batch_size)
        of_parts = [None] * len(parts) if labels is None else torch.as_tensor(labels).split(batch_size)
        yield from zip(parts, of_parts, strict=True)
        return
    for batch in data:
        if isinstance(batch, Tensor):
            yield batch, None
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            yield tuple(batch)
        else:
            raise TypeError(f"data: expected batches of x or (x, labels), got {type(batch).__name__}")


def _is_pair(data) -> bool:
    """Tell (x, labels) from two batches: labels have one dimension, batches more."""
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[0], Tensor):
        return False
    return data[1] is None or (isinstance(data[1], Tensor | np.ndarray) and data[1].ndim == 1)


def _checked_labels(labels: Tensor | np.ndarray, batch: int, classes: int, offset: int) -> Tensor:
    """Labels as int64 [batch] on the CPU; ``offset`` samples came before."""
    labels = torch.as_tensor(labels).cpu()
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"labels: expected [{batch}], one per sample, got {list(labels.shape)}")
    labels = labels.long()
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        i = wrong[0].item()
        raise ValueError(f"labels: expected 0 to {classes - 1}, got {labels[i].item()} at position {offset + i}")
    return labels


def _class_names(model: nn.Module, data, classes: int) -> tuple[str, ...]:
    """The model's own names, else the loader's, else numbers."""
    own = getattr(model, "data", None)
    for names in (own.get("class_names") if isinstance(own, dict) else None, getattr(data, "class_names", None)):
        if names is not None and len(names) == classes:
            return tuple(map(str, names))
    return tuple(map(str, range(classes)))


def short_names(blocks: tuple[str, ...]) -> list[str]:
    """Names without the components that all of them start with: ("features.stage1.0",
    "features.stage2.0") -> ["stage1.0", "stage2.0"]; the last component always stays."""
    parts = [name.split(".") for name in blocks]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def shorten(name: str, length: int = 20) -> str:
    """A class name cut to a length, with "..." where something is missing."""
    return name if len(name) <= length else name[: length - 3].rstrip(" ,") + "..."
