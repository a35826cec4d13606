"""Training and evaluation of routed (and static) networks, resumable to the bit."""

from __future__ import annotations

import fcntl
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from spnet.analysis.macs import count_macs
from spnet.analysis.stability import path_churn
from spnet.api import fast_forward
from spnet.models import SPNet, create_model
from spnet.models.files import load_initial_weights, load_weights
from spnet.routing import routed_blocks
from spnet.training import distributed
from spnet.training.auxiliary import DynamicAuxiliary
from spnet.training.checkpoint import load_state, save_checkpoint
from spnet.training.config import TrainConfig
from spnet.training.data import Loader, make_loader
from spnet.training.loaders import seed_of
from spnet.training.losses import SPNetLoss


@dataclass(frozen=True)
class Evaluation:
    """What a network does on a labelled set."""

    accuracy: float  # fraction of the samples
    loss: float  # mean cross-entropy
    rates: tuple[float, ...]  # execution rate of each routed block
    macs: float  # mean multiply-accumulates per sample
    dense_macs: int  # of a sample that executes every block
    samples: int
    # bool [samples, L]: which blocks each sample executed, in the order of the set.
    decisions: Tensor = field(compare=False, repr=False)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    impl: str = "auto",
    threshold: float = 0.0,
    device: str | torch.device = "cpu",
    sharded: bool = False,
) -> Evaluation:
    """Accuracy, execution rates and cost of a network, in evaluation mode (restored afterwards).

    Args:
        model: routed or static network.
        batches: of (input [B, ...], labels int64 [B]).
        impl, threshold: see :func:`spnet.fast_forward`; a static network has but its own forward.
        sharded: the batches are this rank's part of a set; every rank calls, and gets the whole set's result.

    Raises:
        ValueError: no samples, or labels outside the network's classes.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _evaluate(model, batches, impl, threshold, device, sharded)
    finally:
        for module, training in modes:
            module.training = training


def _evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    impl: str,
    threshold: float,
    device: str | torch.device,
    sharded: bool,
) -> Evaluation:
    routed = len(routed_blocks(model))
    correct = loss = macs = 0.0
    samples, dense, decisions = 0, 0, []
    for x, labels in batches:
        x, labels = x.to(device), labels.to(device)
        if routed:
            logits, paths = fast_forward(model, x, impl=impl, threshold=threshold, return_paths=True)
            decisions.append(paths.decisions.cpu())
            macs += paths.macs.sum().item()
            dense = paths.dense_macs
        else:
            logits = model(x)
            decisions.append(torch.zeros(len(x), 0, dtype=torch.bool))
            dense = count_macs(model, x.shape[1:]).dense
            macs += dense * len(x)
        low, high = labels.aminmax() if len(labels) else (0, 0)
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"labels: expected 0 to {logits.shape[1] - 1}, got {int(low)} to {int(high)}")
        correct += (logits.argmax(1) == labels).sum().item()
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        samples += len(x)
    if sharded:
        correct, loss, macs, samples = distributed.sum_over_ranks([correct, loss, macs, samples])
        samples = int(samples)
        # The ranks' parts of a batch are neighbours; of a last small batch some ranks may have none.
        batches = zip_longest(*distributed.gather_over_ranks(decisions))
        decisions = [part for batch in batches for part in batch if part is not None]
    if not samples:
        raise ValueError("batches: expected at least one sample, got none")
    decisions = torch.cat(decisions)
    rates = tuple((decisions.sum(0) / samples).tolist())
    return Evaluation(correct / samples, loss / samples, rates, macs / samples, dense, samples, decisions)


class Trainer:
    """Train a network by a :class:`TrainConfig`; everything it writes lies in ``config.out``.

    ``config.json``, ``log.jsonl`` (a line per ``log_every`` steps and per epoch), ``tensorboard/``, and the
    checkpoints ``last`` and ``best`` (highest test accuracy), each a model folder for :func:`spnet.load_model`.
    An epoch's line has its throughput: ``images_per_second`` and ``macs_per_second``, the multiply-accumulates that
    training executes (every block, skipped or not; twice as many backward as forward; the auxiliary module's forward),
    and ``test_images_per_second`` and ``test_macs_per_second``, those that the paths of the test images execute.
    With routers its ``test`` has ``churn``, the fraction of the test samples' decisions that flipped since the epoch
    before (:func:`spnet.analysis.stability.path_churn`; None for the first, and where the set has changed its size).
    With shards there is ``bad_shards``, how often one could not be read since the start of the process, on all ranks.

    In a job of several ranks (:func:`spnet.training.distributed.job`) each trains on its part of every batch, all hold
    the same weights, auxiliary module and statistics after every step, and rank 0 writes; ``config.out`` must be one
    folder for all of them. ``job.txt`` there notes the job, for its next attempt.

    Args:
        config: the settings.
        train_loader, test_loader: replace the ones that the config names; see :class:`Loader` (and its ``shard``).
            With several ranks or micro-batches the first must leave out a last batch that is not full.

    Raises:
        ValueError: training and test data of different classes, settings out of range, a device that is not there, a
            batch that the ranks and micro-batches do not divide, or initial weights of another network.
        FileNotFoundError: a missing data set (says where to get it) or missing initial weights.
    """

    def __init__(self, config: TrainConfig, *, train_loader: Loader | None = None, test_loader: Loader | None = None):
        self.config, self.run = config, Path(config.out)
        self.device = distributed.usable_device(config.device)
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        if config.batch_size % (self.ranks * config.accumulate):
            raise ValueError(
                f"batch_size: expected a multiple of {self.ranks} ranks x {config.accumulate} micro-batches, "
                f"got {config.batch_size}"
            )
        torch.manual_seed(config.seed)
        data = dict(root=config.data_root, batch_size=config.batch_size, device=self.device, seed=config.seed)
        data |= dict(workers=config.workers, shard=(self.rank, self.ranks))
        data |= dict(image_size=config.image_size, bad_shards=config.bad_shards)
        self.train_loader = train_loader or make_loader(config.data, "train", **data)
        self.test_loader = test_loader or make_loader(config.data, "test", **data)
        t = self.train_loader
        for k, (own, other) in enumerate(zip_longest(t.class_names, self.test_loader.class_names)):
            if own != other:
                raise ValueError(
                    f"data: {t.num_classes} training classes differ from {self.test_loader.num_classes} test classes: "
                    f"class {k} is {own!r} in training, {other!r} in testing"
                )
        shape = dict(num_classes=t.num_classes, in_channels=t.in_channels, input_size=t.input_size)
        self.model: SPNet = create_model(config.model, routed=not config.static, **shape)
        stages = len(self.model.heads)
        if len(config.stage_weights) != stages:
            raise ValueError(
                f"stage_weights: expected {stages}, one per stage of {config.model}, got {len(config.stage_weights)}"
            )
        counts = config.weight_evolution and not config.static
        if counts and config.evolution == "across" and self.model.align is None:
            raise ValueError(
                "evolution: expected 'within', as 'across' compares stages aligned to one width, which "
                f"{config.model} does not have, got 'across'"
            )
        self.model.data = {"class_names": list(t.class_names), "mean": list(t.mean), "std": list(t.std)}
        if config.init is not None and not self._begun():
            load_initial_weights(self.model, config.init)
        self.model.to(self.device, memory_format=torch.channels_last)
        size = (t.in_channels, t.input_size, t.input_size)
        dense = count_macs(self.model.eval(), size).dense
        if config.sync_batchnorm:
            distributed.synchronise_batchnorm(self.model)
        self.loss = SPNetLoss(
            config.target_rate,
            stage_weights=config.stage_weights,
            activation=config.weight_activation,
            path=config.weight_path,
            logits=config.weight_logits,
            evolution=config.weight_evolution,
            hinge=config.hinge,
            pairing=config.pairing,
            evolution_form=config.evolution,
        )
        needs_auxiliary = self.loss.needs_auxiliary and not config.static
        self.auxiliary = DynamicAuxiliary(self.model, config.auxiliary_momentum) if needs_auxiliary else None
        networks = nn.ModuleList([self.model, *([] if self.auxiliary is None else [self.auxiliary])])
        self._statistics = [b for b in networks.buffers() if b.is_floating_point()]
        # The training forward; evaluations and checkpoints take the bare model.
        self._forward = distributed.data_parallel(self.model.train(), torch.zeros(2, *size, device=self.device))
        if config.compile:
            self._forward = torch.compile(self._forward)
            if self.auxiliary is not None:
                self.auxiliary.compile()
        self._macs = dense * (3 if self.auxiliary is None else 4)  # of one image in one step
        self.throughput: dict[str, float] = {}  # of the last epoch, by the names in its line of the log
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.amp_dtype = _amp_dtype(self.device) if config.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        self.epoch = self.batch = self.step = 0
        self.best_accuracy = -1.0
        self._sums: dict[str, Tensor] = {}
        self._decisions: Tensor | None = None  # of the last epoch's evaluation
        self._terminated = False

    def evaluate(self, impl: str = "auto") -> Evaluation:
        """Evaluate the current weights on the test set."""
        return evaluate(self.model, self.test_loader, impl=impl, device=self.device, sharded=True)

    def fit(self, *, resume: bool = False) -> Evaluation:
        """Train to the last epoch and return the last evaluation.

        SIGTERM saves after the running step or evaluation and exits; before every evaluation there is a checkpoint.

        Args:
            resume: go on from ``out/last``, bit-identically on a CPU; False expects an unused folder.

        Raises:
            FileExistsError: the folder holds a run already and resume is False, or another process trains in it.
            ValueError: resuming a run of other settings (names them) or of another number of training images, a
                damaged checkpoint or log, or ranks that read several checkpoints.
            FloatingPointError: a loss term or the weights are not finite; the last checkpoint stays.
            OSError: a full disk, say; the last checkpoint stays.
            SystemExit: of code 0, after SIGTERM to any rank.
        """
        if distributed.gather_over_ranks(resume)[0]:
            self._resume()
        elif self._begun():
            raise FileExistsError(f"out: {self.run} holds a run already; resume it or name another folder")
        evaluation, restarted = None, distributed.restarted()
        with ExitStack() as stack:
            stack.enter_context(self._stopping_on_sigterm())
            if self.rank == 0:
                self.run.mkdir(parents=True, exist_ok=True)
                self._log = stack.enter_context(open(self.run / "log.jsonl", "r+b" if resume else "ab"))
                self._lock(wait=restarted)
                if resume:
                    _cut_log(self._log, self.step, self.epoch)
                else:
                    self._log.truncate(0)
                self.config.save(self.run / "config.json")
                board = SummaryWriter(self.run / "tensorboard", purge_step=self.step + 1)
                self._board = stack.enter_context(board)
            distributed.note_job(self.run)
            while self.epoch < self.config.epochs:
                evaluation = self._train_epoch()
                if self.epoch < self.config.epochs and distributed.any_rank(self._terminated):
                    self._exit()
        return self.evaluate() if evaluation is None else evaluation

    def _begun(self) -> bool:
        """Whether there is a checkpoint, so that a run can only go on."""
        # Rank 0 decides for all: on a file server the ranks may see the folder as it was at different moments.
        return distributed.gather_over_ranks((self.run / "last").exists())[0]

    @contextmanager
    def _stopping_on_sigterm(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
            yield
            return

        def stop(*_: Any) -> None:
            self._terminated = True

        self._terminated = False
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def _exit(self) -> NoReturn:
        if self.rank == 0:
            print(f"SIGTERM: saved at step {self.step} in {self.run / 'last'}", file=sys.stderr)
        raise SystemExit(0)

    def _train_epoch(self) -> Evaluation:
        config, started, trained = self.config, time.perf_counter(), 0
        lr = config.lr * config.lr_decay ** sum(self.epoch >= m for m in config.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        batches = tqdm(
            self.train_loader.epoch(self.epoch, start=self.batch),
            desc=f"epoch {self.epoch + 1}/{config.epochs}",
            total=len(self.train_loader),
            initial=self.batch,
            disable=None if self.rank == 0 else True,
        )
        recent: list[Tensor] = []  # [T] each: the terms of the steps that were not checked yet
        for x, labels in batches:
            terms = self._train_step(x.to(self.device), labels.to(self.device))
            self.batch, self.step, trained = self.batch + 1, self.step + 1, trained + len(labels) * self.ranks
            recent.append(torch.stack([*terms.values()]))
            stop = distributed.any_rank(self._terminated)
            log = self.step % config.log_every == 0
            end = self.batch == len(self.train_loader)
            save = stop or (self.step % config.checkpoint_every == 0 and not end)
            if log or save or end:
                values = self._checked_terms([*terms], recent)
                recent.clear()
            if log:
                speed = trained / (time.perf_counter() - started)
                shown = {**values, "images/s": speed, "GMAC/s": speed * self._macs / 1e9}
                batches.set_postfix({k: f"{v:.3g}" for k, v in shown.items()})
                self._write("step", self.step, epoch=self.epoch, lr=lr, **values)
            if save:
                self._save()
            if stop:
                batches.close()
                self._exit()
        seconds = time.perf_counter() - started
        means = {name: (total / self.batch).tolist() for name, total in self._sums.items()}
        self._save()  # the evaluation may take longer than what SIGTERM leaves
        started = time.perf_counter()
        evaluation = self.evaluate()
        tested = evaluation.samples / (time.perf_counter() - started)
        self._check_finite({"test loss": evaluation.loss}, self.step)
        self.throughput = {
            "images_per_second": trained / seconds,
            "macs_per_second": trained / seconds * self._macs,
            "test_images_per_second": tested,
            "test_macs_per_second": tested * evaluation.macs,
        }
        test = asdict(evaluation)
        decisions, before = test.pop("decisions"), self._decisions
        if not config.static:
            # Since a resume the test set may have lost bad shards, or got them back.
            same = before is not None and before.shape == decisions.shape
            test["churn"] = path_churn(before, decisions) if same else None
        self.epoch, self.batch, self._sums, self._decisions = self.epoch + 1, 0, {}, decisions
        (bad,) = distributed.sum_over_ranks([self.train_loader.bad_shards + self.test_loader.bad_shards])
        self._write(
            "epoch",
            self.step,
            epoch=self.epoch,
            lr=lr,
            **({"bad_shards": int(bad)} if config.data == "webdataset" else {}),
            **self.throughput,
            train=means,
            test=test,
        )
        best = evaluation.accuracy > self.best_accuracy
        self.best_accuracy = max(self.best_accuracy, evaluation.accuracy)
        self._save(best=best)
        return evaluation

    def _train_step(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One step on this rank's part of a batch; returns what the whole batch's terms were."""
        if self.ranks > 1:  # alone, the global generator runs on: it is in the checkpoint
            torch.manual_seed(seed_of("noise", self.config.seed, self.epoch, self.batch, self.rank))
        if self.auxiliary is not None:
            self.auxiliary.update(self.model)
        self.optimizer.zero_grad()
        n, values = self.config.accumulate, []
        if len(x) % n:  # parts of other sizes, or fewer, would count with a wrong weight
            raise ValueError(
                f"train_loader: expected batches of {n} equal micro-batches, got one of {len(x)} images; "
                "leave out a last batch that is not full"
            )
        for part in zip(x.chunk(n), labels.chunk(n), strict=True):
            # Only the last micro-batch's backward averages the gradients over the ranks: they hold all of it by then.
            last = len(values) == n - 1
            with nullcontext() if last or self.ranks == 1 else self._forward.no_sync():
                values.append(self._accumulate(*part))
        seen = {name: sum(v[name] for v in values) / n for name in values[0]}
        distributed.average_over_ranks([*seen.values(), *self._statistics])
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_value_(self.model.parameters(), self.config.gradient_clamp)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, value in seen.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        return {name: value for name, value in seen.items() if name not in ("accuracy", "rates")}

    def _accumulate(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; returns its terms, accuracy and execution rates."""
        autocast = torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)
        with autocast:
            auxiliary = None if self.auxiliary is None else self.auxiliary(x)
            output = self._forward(x)
        rates = output.decisions.detach().mean(0)
        distributed.average_over_ranks([rates])
        total, terms = self.loss(output, labels, auxiliary, rates if self.ranks > 1 else None)
        self.scaler.scale(total / self.config.accumulate).backward()
        terms = {name: term.detach() for name, term in {**terms, "loss": total}.items()}
        accuracy = (output.stage_logits[-1].argmax(1) == labels).float().mean()
        return {**terms, "accuracy": accuracy, "rates": rates}

    def _checked_terms(self, names: list[str], recent: list[Tensor]) -> dict[str, float]:
        """The terms of the last step, after a check of those of every recent step: the first one to fail says why."""
        steps = [dict(zip(names, terms, strict=True)) for terms in torch.stack(recent).tolist()]
        for step, values in enumerate(steps, self.step - len(steps) + 1):
            self._check_finite(values, step)
        # The weights too: the gradient of a finite loss may not be finite.
        weights = nn.utils.get_total_norm(p.detach() for p in self.model.parameters()).item()
        self._check_finite({"norm of the weights": weights}, self.step)
        return steps[-1]

    def _check_finite(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name}: {value} by step {step}; the checkpoint before it stays")

    def _write(self, kind: str, step: int, **values: Any) -> None:
        if self.rank:
            return
        self._log.write(json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n")
        self._log.flush()

        def scalars(prefix: str, value: Any) -> None:
            if isinstance(value, dict):
                for k, v in value.items():
                    scalars(f"{prefix}/{k}", v)
            elif isinstance(value, list | tuple):
                for i, v in enumerate(value):
                    scalars(f"{prefix}/{i:03d}", v)
            elif value is not None:
                self._board.add_scalar(prefix, value, step)

        scalars(kind, values)

    def _lock(self, wait: bool) -> None:
        """Be the only process that writes into the run's folder: two would sweep up each other's checkpoints."""
        try:
            # Of this process alone, where flock would stay with loader workers that outlive a kill. A restarted job
            # waits: a file server may take a while to notice that the rank before is dead.
            fcntl.lockf(self._log, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise FileExistsError(
                f"out: another process trains in {self.run}; wait for its end or name another folder"
            ) from e

    def _save(self, best: bool = False) -> None:
        if self.rank:
            return
        self._board.flush()  # a resumed run writes only what comes after the checkpoint
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "num_images": self.train_loader.num_images,
            "best_accuracy": self.best_accuracy,
            "sums": self._sums,
            "decisions": self._decisions,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "auxiliary": None if self.auxiliary is None else self.auxiliary.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        save_checkpoint(self.run, self.model, state, best=best)

    def _resume(self) -> None:
        """Take up the checkpoint ``last``."""
        last = self.run / "last"
        state = load_state(last)
        differences = self.config.differences(TrainConfig.load(self.run / "config.json"))
        if differences:
            raise ValueError(f"resume: {self.run} was trained with other settings: {'; '.join(differences)}")
        try:
            self.model.load_state_dict(load_weights(last))
            if self.auxiliary is not None:
                self.auxiliary.load_state_dict(state["auxiliary"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
            num_images, self.best_accuracy = state["num_images"], state["best_accuracy"]
            self._decisions = state["decisions"]
            self._sums = {name: total.to(self.device) for name, total in state["sums"].items()}
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"resume: {last} is no checkpoint of this run ({e!r})") from e
        if num_images != self.train_loader.num_images:  # every epoch would have another order and length
            raise ValueError(
                f"resume: expected the {num_images} training images of {self.run}, got {self.train_loader.num_images}"
            )
        read = distributed.gather_over_ranks(f"{last.resolve().name} at step {self.step}")
        if len(set(read)) > 1:
            raise ValueError(f"resume: expected one checkpoint for all ranks, got {', '.join(read)}")


def _cut_log(log: BinaryIO, step: int, epoch: int) -> None:
    """Drop what will be written again, the lines after that step and epoch, and what a kill left of a line.

    The log then stands at its end. In place, so that no line can be lost.
    """
    end = 0
    try:
        for line in log:
            if not line.endswith(b"\n"):
                break
            values = json.loads(line)
            if values["step"] > step or values["epoch"] > epoch:
                break
            end += len(line)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"resume: {log.name} is not the log of a training run ({e!r})") from e
    log.seek(log.truncate(end))


def _amp_dtype(device: torch.device) -> torch.dtype | None:
    """The 16-bit type that the device computes faster than float32, or None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return None
