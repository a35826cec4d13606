"""The trainer on a small set: it learns, it logs, it stops in order, and it goes on as if nothing had happened."""

import dataclasses
import errno
import functools
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import spnet
from spnet.models.files import WEIGHTS
from spnet.training import Evaluation, TrainConfig, Trainer, distributed, evaluate, losses
from spnet.training import trainer as trainer_module
from spnet.training.checkpoint import STATE, load_state
from spnet.training.data import ImageSet, Loader
from tests.conftest import Bomb

SIDE, CLASSES = 8, 4
STEPS = 4  # per epoch
THROUGHPUT = [f"{part}{unit}_per_second" for part in ("", "test_") for unit in ("images", "macs")]
TERMS = ["cls", "act", "path", "logits", "evo", "loss"]


def make_set(n=32, classes=CLASSES, seed=0):
    """Images whose class is the brighter quarter."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = torch.randint(100, (n, 1, SIDE, SIDE), generator=g)
    for i, label in enumerate(labels):
        row, column = divmod(int(label), 2)
        images[i, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 120
    names = tuple(f"class {i}" for i in range(classes))
    return ImageSet(images.to(torch.uint8), labels, names, mean=(0.3,), std=(0.25,), input_size=SIDE)


def make_trainer(out, *, loader=Loader, test_loader=Loader, images=32, augment=True, classes=CLASSES, **settings):
    """A trainer of two epochs of four steps, with a checkpoint every three: after steps 3, 4, 6 and 8."""
    defaults = dict(model="resnet20_cifar", epochs=2, batch_size=8, milestones=(), lr=0.05, target_rate=0.6)
    defaults |= dict(log_every=2, checkpoint_every=3, amp=False)
    config = TrainConfig(**{"out": str(out), **defaults, **settings})
    train, test = make_set(images, classes), make_set(24, classes, seed=1)
    shard = distributed.rank(), distributed.world_size()
    train_loader = loader(train, config.batch_size, train=True, augment=augment, seed=config.seed, shard=shard)
    return Trainer(config, train_loader=train_loader, test_loader=test_loader(test, 10, train=False, shard=shard))


class HookedLoader(Loader):
    """A loader that calls ``hook(k)`` before it yields its k-th batch, counted over all epochs."""

    hook = staticmethod(lambda k: None)

    def epoch(self, epoch, start=0):
        for i, batch in enumerate(super().epoch(epoch, start), start):
            self.hook(epoch * len(self) + i)
            yield batch


def hooked(hook):
    return type("Hooked", (HookedLoader,), {"hook": staticmethod(hook)})


def stop_before(k):
    """A loader that interrupts the run before its k-th batch."""

    def hook(i):
        if i == k:
            raise KeyboardInterrupt

    return hooked(hook)


def log_of(run, *, timing=False):
    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=reject) for line in (run / "log.jsonl").read_text().splitlines()]
    if not timing:
        for line in lines:
            for name in THROUGHPUT:
                line.pop(name, None)
    return lines


def scalars_of(run):
    """TensorBoard's own reading: tag -> [(step, value)]."""
    with tempfile.TemporaryDirectory() as folder:
        # It takes the files of a resumed run by the second of their start; here that may be the same one.
        files = sorted((run / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns)
        for i, file in enumerate(files):
            shutil.copy(file, Path(folder) / f"events.out.tfevents.{i:010d}")
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def equal(a, b):
    """Bitwise equality of nested containers of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(a, b):
    """Two folders hold the same run, bit for bit: weights, auxiliary module, optimiser, random state and log."""
    for name in ("last", "best"):
        assert (a / name / WEIGHTS).read_bytes() == (b / name / WEIGHTS).read_bytes()
        states = load_state(a / name), load_state(b / name)
        for key in states[0]:
            assert equal(states[0][key], states[1][key]), f"{name}: {key}"
        assert states[0].keys() == states[1].keys()
    assert log_of(a) == log_of(b)
    boards = scalars_of(a), scalars_of(b)
    for board in boards:
        for name in THROUGHPUT:
            del board[f"epoch/{name}"]
    assert boards[0] == boards[1]


@pytest.fixture(autouse=True)
def _one_thread():
    """The nets are tiny, and bits are compared with another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run from the first step to the last, and what fit() returned."""
    run = tmp_path_factory.mktemp("straight") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluation = make_trainer(run).fit()
    torch.set_num_threads(threads)
    return run, evaluation


# ------------------------------------------------------------------------------------------------- a whole run


def test_learns(tmp_path):
    make_trainer(tmp_path, images=64, augment=False, epochs=5, target_rate=0.5).fit()
    epochs = [line for line in log_of(tmp_path) if line["kind"] == "epoch"]
    losses_, accuracies = zip(*((e["train"]["cls"], e["train"]["accuracy"]) for e in epochs), strict=True)
    assert losses_[-1] < 0.5 * losses_[0]
    assert accuracies[-1] > 0.8 > accuracies[0]
    assert epochs[-1]["test"]["accuracy"] > 0.8


def test_fit_returns_the_last_evaluation(straight):
    run, evaluation = straight
    last = [line for line in log_of(run) if line["kind"] == "epoch"][-1]["test"]
    del last["churn"]
    assert Evaluation(**{**last, "rates": tuple(last["rates"])}, decisions=evaluation.decisions) == evaluation
    assert evaluation.samples == 24
    again = evaluate(spnet.load_model(run / "last"), Loader(make_set(24, seed=1), 10, train=False))
    assert dataclasses.replace(again, loss=evaluation.loss) == evaluation
    assert math.isclose(again.loss, evaluation.loss, rel_tol=1e-5)  # another memory format, other roundings


def test_log(straight):
    lines = log_of(straight[0], timing=True)
    steps = [line for line in lines if line["kind"] == "step"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("step", s) for s in (2, 4)),
        ("epoch", 4),
        *(("step", s) for s in (6, 8)),
        ("epoch", 8),
    ]
    for line in steps:
        assert [k for k in line if k in TERMS] == TERMS
        # The default weights of the CIFAR recipe.
        weighted = line["cls"] + 2 * line["act"] + 0.1 * line["path"] + 0.1 * line["logits"] + 1e-4 * line["evo"]
        assert math.isclose(line["loss"], weighted, rel_tol=1e-5)
        assert line["lr"] == 0.05
    for number, line in enumerate(epochs, 1):
        assert line["epoch"] == number
        assert set(line["train"]) == {*TERMS, "accuracy", "rates"}
        assert set(line["test"]) == {"accuracy", "loss", "rates", "macs", "dense_macs", "samples", "churn"}
        assert len(line["train"]["rates"]) == len(line["test"]["rates"]) == 9
        assert 0 < line["test"]["macs"] <= line["test"]["dense_macs"]
        # Training executes everything, three times for the network and once for the auxiliary module.
        train_macs, test_macs = (line[f"{p}macs_per_second"] / line[f"{p}images_per_second"] for p in ("", "test_"))
        assert line["images_per_second"] > 0
        assert math.isclose(train_macs, 4 * line["test"]["dense_macs"])
        assert math.isclose(test_macs, line["test"]["macs"])
    # Fractions of 32 training samples and of 24 test samples.
    assert all((32 * r).is_integer() for e in epochs for r in (*e["train"]["rates"], e["train"]["accuracy"]))
    assert (24 * epochs[0]["test"]["accuracy"]).is_integer()


def test_churn_is_that_of_the_test_images_since_the_epoch_before(tmp_path):
    trainer = make_trainer(tmp_path, epochs=3, lr=0.2, target_rate=0.3)
    seen, evaluate_ = [], trainer.evaluate
    trainer.evaluate = lambda: seen.append(evaluate_()) or seen[-1]
    trainer.fit()
    decisions = [e.decisions.tolist() for e in seen]
    flips = [
        sum(p != q for a, b in zip(before, after, strict=True) for p, q in zip(a, b, strict=True))
        for before, after in zip(decisions, decisions[1:], strict=False)
    ]
    assert all(flips)
    logged = [line["test"]["churn"] for line in log_of(tmp_path) if line["kind"] == "epoch"]
    assert logged == [None, *(pytest.approx(f / (24 * 9)) for f in flips)]
    assert load_state(tmp_path / "last")["decisions"].tolist() == decisions[-1]


def test_epoch_means_are_those_of_the_steps(tmp_path):
    make_trainer(tmp_path, epochs=1, log_every=1).fit()
    *steps, epoch = log_of(tmp_path)
    assert len(steps) == STEPS
    for term in TERMS:
        assert math.isclose(epoch["train"][term], sum(s[term] for s in steps) / STEPS, rel_tol=1e-5)


def test_tensorboard_has_what_the_log_has(straight):
    run = straight[0]
    expected = defaultdict(list)

    def collect(prefix, value, step):
        if isinstance(value, dict):
            for k, v in value.items():
                collect(f"{prefix}/{k}", v, step)
        elif isinstance(value, list):
            for i, v in enumerate(value):
                collect(f"{prefix}/{i:03d}", v, step)
        elif value is not None:
            expected[prefix].append((step, value))

    for line in log_of(run, timing=True):
        kind, step = line.pop("kind"), line.pop("step")
        collect(kind, line, step)
    scalars = scalars_of(run)
    for tag in [f"step/{t}" for t in TERMS] + [f"epoch/test/rates/{i:03d}" for i in range(9)]:
        assert tag in scalars
    assert {"epoch/test/accuracy", "epoch/test/macs", "epoch/train/accuracy"} <= scalars.keys()
    assert scalars.keys() == expected.keys()
    for tag, values in scalars.items():
        assert [s for s, _ in values] == [s for s, _ in expected[tag]]
        for (_, got), (_, value) in zip(values, expected[tag], strict=True):
            assert math.isclose(got, value, rel_tol=1e-6)  # TensorBoard keeps float32


def test_folder(straight):
    run = straight[0]
    assert {p.name for p in run.iterdir()} == {"best", "checkpoints", "config.json", "last", "log.jsonl", "tensorboard"}
    assert TrainConfig.load(run / "config.json").model == "resnet20_cifar"
    model = spnet.load_model(run / "last")
    assert model.data == {"class_names": [f"class {i}" for i in range(CLASSES)], "mean": [0.3], "std": [0.25]}
    assert model.input_size == SIDE
    assert spnet.preprocess(model, make_set().images[:3, 0]).shape == (3, 1, SIDE, SIDE)
    accuracies = [line["test"]["accuracy"] for line in log_of(run) if line["kind"] == "epoch"]
    best = load_state(run / "best")
    assert best["best_accuracy"] == max(accuracies)
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    assert load_state(run / "last")["step"] == 2 * STEPS
    assert len(list((run / "checkpoints").iterdir())) == len({(run / n).resolve() for n in ("last", "best")})


def test_folder_in_use(straight):
    before = sorted((p, p.stat().st_mtime_ns) for p in straight[0].rglob("*"))
    with pytest.raises(FileExistsError, match="out: .* holds a run already; resume it or name another folder"):
        make_trainer(straight[0]).fit()
    assert sorted((p, p.stat().st_mtime_ns) for p in straight[0].rglob("*")) == before


@pytest.mark.parametrize("resume", [True, False])
def test_two_runs_in_one_folder(straight, tmp_path, resume):
    run = copy_of(straight[0], tmp_path / "run")
    if not resume:
        (run / "last").unlink()
    before = log_of(run)
    held = "import fcntl, sys; log = open(sys.argv[1], 'ab'); fcntl.lockf(log, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", held, run / "log.jsonl"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FileExistsError, match=f"out: another process trains in {run}; wait for its end"):
            make_trainer(run).fit(resume=resume)
        assert log_of(run) == before
        other.stdin.close()
    make_trainer(run).fit(resume=resume)


def test_same_seed_same_run(straight, tmp_path):
    make_trainer(tmp_path).fit()
    assert_same_run(straight[0], tmp_path)


def test_other_seed_other_run(tmp_path):
    weights = []
    for seed in (0, 1):
        trainer = make_trainer(tmp_path / str(seed), seed=seed)
        weights.append(trainer.model.features.stem[0].weight.detach())
    assert not torch.equal(*weights)


def test_learning_rate_schedule(tmp_path):
    make_trainer(tmp_path, epochs=4, lr=0.4, milestones=(1, 3), lr_decay=0.5, log_every=STEPS, weight_logits=0).fit()
    lines = log_of(tmp_path)
    assert [line["lr"] for line in lines if line["kind"] == "step"] == [0.4, 0.2, 0.2, 0.1]
    assert [line["lr"] for line in lines if line["kind"] == "epoch"] == [0.4, 0.2, 0.2, 0.1]
    assert load_state(tmp_path / "last")["optimizer"]["param_groups"][0]["lr"] == 0.1


def test_gradients_are_clamped(tmp_path):
    seen = []

    def hook(k):
        if k:
            seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))

    trainer = make_trainer(tmp_path, loader=hooked(hook), epochs=1, weight_activation=1e9, lr=1e-6)
    trainer.fit()
    assert len(seen) == STEPS - 1
    for gradient in seen:
        assert gradient.abs().max() == 0.5
        assert (gradient.abs() < 0.5).any()


def test_auxiliary_follows_once_per_step_before_its_forward(tmp_path):
    history, forwards = [], []
    trainer = make_trainer(tmp_path, loader=hooked(lambda k: history.append(weight(trainer.model))), epochs=1)

    def weight(module):
        return module.features.stem[0].weight.detach().double().clone()

    trainer.auxiliary.register_forward_pre_hook(lambda m, _: forwards.append(weight(m.module)))
    trainer.fit()
    assert len(forwards) == len(history) == STEPS
    expected = history[0]
    for p, got in zip(history, forwards, strict=True):
        expected = 0.6 * expected + 0.4 * p
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert not torch.equal(forwards[1], history[1])


def test_no_auxiliary_module_where_no_term_needs_it(tmp_path):
    trainer = make_trainer(tmp_path, epochs=1, weight_path=0, weight_logits=0)
    assert trainer.auxiliary is None
    trainer.fit()
    assert load_state(tmp_path / "last")["auxiliary"] is None
    assert "path" not in log_of(tmp_path)[0]
    make_trainer(tmp_path, epochs=1, weight_path=0, weight_logits=0).fit(resume=True)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_mixed_precision(monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(trainer_module, "_amp_dtype", lambda device: dtype)
    seen = set()
    trainer = make_trainer(tmp_path, epochs=1, amp=True)
    assert trainer.amp_dtype is dtype
    body = trainer.model.features.stage1[0].body
    for module in (body, trainer.auxiliary.module.features.stage1[0].body):
        module.register_forward_hook(lambda m, i, o: seen.add((m.training, o.dtype)))
    trainer.model.features.stage1[0].router.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    evaluation = trainer.fit()
    # Training in 16 bits; routers and the evaluation in float32.
    assert seen - {torch.float32} == {(True, dtype or torch.float32), (False, torch.float32)}
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in trainer.model.parameters())
    assert math.isfinite(evaluation.loss)


def without_randomness(trainer):
    """The trainer, with decisions by nothing random, about half to execute, and BatchNorm by frozen statistics."""
    for module in [*trainer.model.modules(), *trainer.auxiliary.modules()]:
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval().train = lambda mode=True: None
        if isinstance(module, spnet.Router):
            module.dropout.p = 0.0
            torch.nn.init.zeros_(module.fc2.bias)
    return trainer


def test_accumulation_takes_the_step_of_the_whole_batch(monkeypatch, tmp_path):
    monkeypatch.setattr(spnet.routing, "straight_through_gumbel", lambda z: (z[:, 1] > z[:, 0]) + 0 * z.sum(1))
    lines, weights, steps = [], [], []
    for n in (1, 2, 4):
        # L_act is left out: its rates are those of the micro-batch.
        trainer = make_trainer(tmp_path / str(n), epochs=1, log_every=1, accumulate=n, weight_activation=0)
        start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        without_randomness(trainer).auxiliary.register_forward_hook(lambda *_: steps.append(n))  # noqa: B023
        trainer.fit()
        lines.append(log_of(tmp_path / str(n)))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert [steps.count(n) for n in (1, 2, 4)] == [STEPS, 2 * STEPS, 4 * STEPS]
    assert 0 < sum(lines[0][-1]["train"]["rates"]) < 9
    for n in (1, 2):
        got, expected = lines[n][-1]["train"], lines[0][-1]["train"]
        assert got.pop("rates") == expected["rates"]
        assert got == pytest.approx({name: value for name, value in expected.items() if name != "rates"}, rel=1e-4)
        assert (weights[n] - weights[0]).norm() <= 1e-3 * (weights[0] - start).norm()


@pytest.mark.parametrize("images", [9, 13])  # a last batch of 1, or of 5, in 4 micro-batches
def test_accumulation_of_a_last_batch_that_is_not_full(tmp_path, images):
    keeps = functools.partial(Loader, drop_last=False)
    with pytest.raises(
        ValueError, match=f"train_loader: expected batches of 4 .*, got one of {images - 8} images; leave"
    ):
        make_trainer(tmp_path, loader=keeps, images=images, accumulate=4).fit()


def test_rates_of_accumulation_are_those_of_a_micro_batch(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, epochs=1, log_every=1, accumulate=2)
    trainer.model.register_forward_hook(lambda m, i, o: seen.append(o.decisions) if m.training else None)
    trainer.fit()
    acts = [((d.mean(0) - 0.6) ** 2).mean().item() for d in seen]
    logged = [line["act"] for line in log_of(tmp_path) if line["kind"] == "step"]
    assert logged == pytest.approx([(a + b) / 2 for a, b in zip(acts[::2], acts[1::2], strict=True)])


def test_compiled_training_is_training(monkeypatch, straight, tmp_path):
    compile_, compiled = torch.compile, []

    def eagerly(forward, **options):  # the compiler's front end; generating code takes a minute
        compiled.append(forward)
        return compile_(forward, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", eagerly)
    trainer = make_trainer(tmp_path, compile=True)
    trainer.fit()
    assert [getattr(f, "__self__", f) for f in compiled] == [trainer.model, trainer.auxiliary]
    for name in ("last", "best"):
        assert (tmp_path / name / WEIGHTS).read_bytes() == (straight[0] / name / WEIGHTS).read_bytes()
    assert log_of(tmp_path) == log_of(straight[0])


def test_mixed_precision_can_be_switched_off(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer_module, "_amp_dtype", lambda device: torch.bfloat16)
    assert make_trainer(tmp_path, amp=False).amp_dtype is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_only_on_a_terminal(monkeypatch, tmp_path, capsys):
    make_trainer(tmp_path / "a", epochs=1).fit()
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    make_trainer(tmp_path / "b", epochs=1).fit()
    assert "epoch 1/1" in terminal.getvalue()
    assert f"{STEPS}/{STEPS}" in terminal.getvalue()
    assert "images/s=" in terminal.getvalue()
    assert "GMAC/s=" in terminal.getvalue()


# ------------------------------------------------------------------------------------------------- static nets


def test_static_network_and_a_start_from_it(tmp_path):
    trainer = make_trainer(tmp_path / "static", static=True, augment=False)
    evaluation = trainer.fit()
    assert trainer.auxiliary is None
    assert evaluation.rates == ()
    assert evaluation.macs == evaluation.dense_macs > 0
    first, last = log_of(tmp_path / "static")[0], log_of(tmp_path / "static")[-1]
    assert [k for k in first if k in TERMS] == ["cls", "loss"]
    assert first["cls"] == first["loss"]
    assert last["train"]["rates"] == last["test"]["rates"] == []
    assert "churn" not in last["test"]
    make_trainer(tmp_path / "static", static=True, augment=False).fit(resume=True)
    static = spnet.load_model(tmp_path / "static" / "last")

    routed = make_trainer(tmp_path / "routed", init=str(tmp_path / "static" / "last"))
    own = routed.model.state_dict()
    assert all(torch.equal(own[name], t) for name, t in static.state_dict().items())
    assert equal(routed.auxiliary.module.state_dict(), own)
    # With every block open the routed network is the static one, and costs the routers more.
    x = next(iter(routed.test_loader))[0]
    routed.model.eval()
    everything = torch.ones(10, 9, dtype=torch.bool)
    logits, paths = spnet.fast_forward(routed.model, x, impl="masked", paths=everything, return_paths=True)
    torch.testing.assert_close(logits, static(x))
    assert paths.dense_macs > evaluation.dense_macs
    routed.fit()
    # Whoever goes on needs the initial weights no longer, where they were or anywhere.
    (tmp_path / "static").rename(tmp_path / "elsewhere")
    make_trainer(tmp_path / "routed", init=str(tmp_path / "static" / "last")).fit(resume=True)
    make_trainer(tmp_path / "routed", init=str(tmp_path / "elsewhere" / "last")).fit(resume=True)


def test_start_from_another_network(tmp_path):
    spnet.save_model(spnet.create_model("resnet32_cifar", num_classes=4, in_channels=1, routed=False), tmp_path / "32")
    with pytest.raises(ValueError, match="32 holds another network"):
        make_trainer(tmp_path / "run", init=str(tmp_path / "32"))
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing"):
        make_trainer(tmp_path / "run", init=str(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- evaluate


@pytest.fixture
def model():
    """A small network that routes: about half of its blocks."""
    model = spnet.create_model("resnet20_cifar", num_classes=CLASSES, in_channels=1, input_size=SIDE)
    for block in spnet.routing.routed_blocks(model).values():
        torch.nn.init.zeros_(block.router.fc2.bias)
    return model.eval()


@pytest.mark.parametrize("impl", ["auto", "masked", "routed"])
def test_evaluate_equals_a_plain_loop(model, impl):
    data = make_set(30)
    got = evaluate(model, Loader(data, 7, train=False), impl=impl)
    x, labels = next(iter(Loader(data, 30, train=False)))
    with torch.no_grad():
        logits = model(x)
        z = x
        decisions = []
        for part in model.features:
            for block in part if part is not model.features.stem else [part]:
                if isinstance(block, spnet.RoutedBlock):
                    zs = block.router(z)
                    decisions.append(zs[:, 1] > zs[:, 0])
                z = block(z)
        decisions = torch.stack(decisions, 1)  # [30, 9]
    macs = spnet.analysis.macs.count_macs(model, (1, SIDE, SIDE))
    bodies = [b.body for b in macs.blocks]
    skipped = sum(sum(c for c, d in zip(bodies, row, strict=True) if not d) for row in decisions.tolist())
    assert got.samples == 30
    assert got.accuracy == (logits.argmax(1) == labels).sum().item() / 30
    assert math.isclose(got.loss, F.cross_entropy(logits, labels).item(), rel_tol=1e-5)
    assert torch.equal(got.decisions, decisions)
    assert got.rates == pytest.approx(decisions.float().mean(0).tolist())
    assert 0 < sum(got.rates) < 9
    assert got.dense_macs == macs.dense
    assert got.macs == pytest.approx(macs.dense - skipped / 30)


def test_evaluate_static_network():
    static = spnet.create_model("resnet20_cifar", num_classes=CLASSES, in_channels=1, routed=False, input_size=SIDE)
    x, labels = next(iter(Loader(make_set(64), 64, train=False)))
    got = evaluate(static, [(x[:50], labels[:50]), (x[50:], labels[50:])])
    logits = static.eval()(x)
    assert got.accuracy == (logits.argmax(1) == labels).sum().item() / 64
    assert math.isclose(got.loss, F.cross_entropy(logits, labels).item(), rel_tol=1e-5)
    assert got.rates == ()
    assert got.decisions.shape == (64, 0)
    assert got.macs == got.dense_macs


def test_evaluate_restores_every_mode(model):
    loader = Loader(make_set(), 32, train=False)
    model.train()
    model.features.stem.eval()  # frozen statistics, say
    modes = [m.training for m in model.modules()]
    evaluate(model, loader)
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError, match="x: expected"):
        evaluate(model, [(torch.zeros(1, 3, 5, 5), torch.tensor([0]))])
    assert [m.training for m in model.modules()] == modes


def test_evaluate_nothing(model):
    for nothing in ([], [(torch.zeros(0, 1, SIDE, SIDE), torch.zeros(0, dtype=torch.int64))]):
        with pytest.raises(ValueError, match="batches: expected at least one sample, got none"):
            evaluate(model, nothing)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [-1, -100, CLASSES])
def test_labels_outside_the_classes(model, tmp_path, bad):
    data = make_set()
    data.labels[5] = bad
    with pytest.raises(ValueError, match=f"labels: expected 0 to 3, got {bad} at position 5"):
        Loader(data, 8, train=True)
    with pytest.raises(ValueError, match="labels: expected 0 to 3, got"):
        evaluate(model, [(torch.zeros(2, 1, SIDE, SIDE), torch.tensor([0, bad]))])


def test_training_and_test_data_of_different_classes(tmp_path):
    train, test = (Loader(make_set(classes=n), 8, train=False) for n in (4, 5))
    with pytest.raises(ValueError, match="data: 4 training classes differ from 5 test classes"):
        Trainer(TrainConfig(model="resnet20_cifar", out=str(tmp_path)), train_loader=train, test_loader=test)
    named = dataclasses.replace(make_set(), class_names=("class 0", "class 1", "cat", "class 3"))
    train, test = Loader(make_set(), 8, train=False), Loader(named, 8, train=False)
    with pytest.raises(ValueError, match="4 test classes: class 2 is 'class 2' in training, 'cat' in testing"):
        Trainer(TrainConfig(model="resnet20_cifar", out=str(tmp_path)), train_loader=train, test_loader=test)


def test_settings_that_do_not_fit(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="stage_weights: expected 3, one per stage of resnet20_cifar, got 4"):
        make_trainer(run, stage_weights=(0.01, 0.1, 0.2, 1.0))
    with pytest.raises(ValueError, match="unknown model 'resnet20'; did you mean resnet20_cifar"):
        make_trainer(run, model="resnet20")
    with pytest.raises(
        ValueError, match=r"evolution: expected 'within', .* resnet20_cifar does not have, got 'across'"
    ):
        make_trainer(run, evolution="across")
    for unused in (dict(static=True), dict(weight_evolution=0)):
        make_trainer(run, evolution="across", **unused)


# ------------------------------------------------------------------------------------ interrupted, and gone on


@pytest.mark.parametrize("step", [3, 4, 5, 7])
def test_resume_after_an_interruption(straight, tmp_path, step):
    # The checkpoints before: in the middle of an epoch, at its end (twice), and in the middle of the next.
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, loader=stop_before(step)).fit()
    torch.manual_seed(99)  # the random state of the new process does not matter
    trainer = make_trainer(tmp_path)
    assert trainer.fit(resume=True) == straight[1]
    assert_same_run(straight[0], tmp_path)


def test_resume_after_an_interruption_of_the_evaluation(straight, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, test_loader=stop_before(1)).fit()
    assert load_state(tmp_path / "last")["step"] == STEPS
    make_trainer(tmp_path).fit(resume=True)
    assert_same_run(straight[0], tmp_path)


def test_resume_after_an_interruption_between_an_epochs_line_and_its_checkpoint(straight, monkeypatch, tmp_path):
    save, saved = trainer_module.save_checkpoint, []

    def interrupted(*args, **kwargs):
        saved.append(args)
        if len(saved) == 3:  # after step 3, at the end of the epoch, and after its evaluation
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path).fit()
    assert log_of(tmp_path)[-1]["kind"] == "epoch"
    monkeypatch.undo()
    make_trainer(tmp_path).fit(resume=True)
    assert log_of(tmp_path) == log_of(straight[0])


@pytest.mark.parametrize("epoch", [1, 2])
def test_sigterm_during_an_evaluation(straight, capsys, tmp_path, epoch):
    def terminate(k):
        evaluations.append(k)
        if len(evaluations) == 3 * epoch - 1:  # the second of three test batches
            os.kill(os.getpid(), signal.SIGTERM)

    evaluations, steps = [], []
    trainer = make_trainer(tmp_path, loader=hooked(steps.append), test_loader=hooked(terminate))
    if epoch == 1:
        with pytest.raises(SystemExit) as stopped:
            trainer.fit()
        assert stopped.value.code == 0
        assert "SIGTERM: saved at step 4 in" in capsys.readouterr().err
        assert load_state(tmp_path / "last")["epoch"] == 1
        make_trainer(tmp_path).fit(resume=True)
    else:
        trainer.fit()
    assert len(steps) == epoch * STEPS
    assert_same_run(straight[0], tmp_path)


def test_resume_twice_with_mixed_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer_module, "_amp_dtype", lambda device: torch.bfloat16)
    make_trainer(tmp_path / "a", amp=True).fit()
    for step in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path / "b", amp=True, loader=stop_before(step)).fit(resume=step > 3)
    make_trainer(tmp_path / "b", amp=True).fit(resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_resume_after_sigkill(straight, tmp_path):
    run = tmp_path / "run"
    path = os.pathsep.join([str(Path(spnet.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run([sys.executable, __file__, run, "7"], env={**os.environ, "PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL
    assert load_state(run / "last")["step"] == 6
    assert log_of(run)[-1]["step"] == 6
    with open(run / "log.jsonl", "a") as log:  # what a kill in the middle of a write may leave
        log.write('{"kind": "step", "step": 8, "epoch": 1}\n{"kind": "st')
    assert make_trainer(run).fit(resume=True) == straight[1]
    assert_same_run(straight[0], run)


def test_random_state_is_that_of_the_runs_own_gpu(straight, monkeypatch, tmp_path):
    """So that a host with fewer of them can go on."""
    states = {torch.device("cuda", 1): torch.tensor([7], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    for name in ("get_rng_state_all", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("of all GPUs"))
    trainer = make_trainer(copy_of(straight[0], tmp_path / "run"))
    trainer._resume()
    trainer.device, trainer._board = torch.device("cuda", 1), SummaryWriter(tmp_path / "board")
    trainer._save()
    trainer.device = torch.device("cuda", 0)
    trainer._resume()
    trainer._board.close()
    assert states[torch.device("cuda", 0)] == 7


def test_interrupted_before_the_first_checkpoint(straight, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, loader=stop_before(2)).fit()
    assert [line["step"] for line in log_of(tmp_path)] == [2]
    with pytest.raises(FileNotFoundError, match="resume: no checkpoint at .*last"):
        make_trainer(tmp_path).fit(resume=True)
    make_trainer(tmp_path).fit()  # nothing is lost by a fresh start, and its log begins anew
    assert_same_run(straight[0], tmp_path)


def test_resume_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: no checkpoint at .*last"):
        make_trainer(tmp_path / "nothing").fit(resume=True)
    assert not (tmp_path / "nothing").exists()


def test_resume_of_a_finished_run(straight):
    run, evaluation = straight
    before = log_of(run)
    assert make_trainer(run).fit(resume=True) == evaluation
    assert log_of(run) == before


def copy_of(run, to):
    subprocess.run(["cp", "-a", run, to], check=True)
    return to


def test_resume_with_other_settings_names_them(straight, tmp_path):
    run = copy_of(straight[0], tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="other settings: lr: 0.1 is not 0.05; target_rate: 0.5 is not 0.6"):
        make_trainer(run, lr=0.1, target_rate=0.5).fit(resume=True)
    with pytest.raises(ValueError, match="other settings: model: 'resnet32_cifar' is not 'resnet20_cifar'"):
        make_trainer(run, model="resnet32_cifar").fit(resume=True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_resume_where_folder_and_workers_changed(straight, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "a", loader=stop_before(7)).fit()
    (tmp_path / "a").rename(tmp_path / "b")
    make_trainer(tmp_path / "b", data_root="elsewhere", workers=0).fit(resume=True)
    assert_same_run(straight[0], tmp_path / "b")


def fewer(images):
    """A loader of only so many of the images."""
    return lambda data, *args, **kwargs: Loader(data.subset(images), *args, **kwargs)


def test_resume_with_another_test_set_has_no_churn(tmp_path):
    """As after a shard of it went bad, or was repaired."""
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, epochs=3, loader=stop_before(5)).fit()
    assert make_trainer(tmp_path, epochs=3, test_loader=fewer(20)).fit(resume=True).samples == 20
    churn = [line["test"]["churn"] for line in log_of(tmp_path) if line["kind"] == "epoch"]
    assert churn[:2] == [None, None]
    assert churn[2] is not None


def test_resume_with_another_number_of_training_images(straight, tmp_path):
    run = copy_of(straight[0], tmp_path / "run")
    before = log_of(run)
    with pytest.raises(ValueError, match="^resume: expected the 32 training images of .*run, got 24"):
        make_trainer(run, images=24).fit(resume=True)
    assert log_of(run) == before


@pytest.mark.parametrize("file", [STATE, WEIGHTS])
def test_resume_from_a_damaged_checkpoint(straight, tmp_path, file):
    run, mark = copy_of(straight[0], tmp_path / "run"), tmp_path / "executed"
    whole = (run / "last" / file).read_bytes()
    other = io.BytesIO()
    torch.save({"step": 1}, other)
    log = (run / "log.jsonl").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], pickle.dumps(Bomb(mark), 2), other.getvalue()):
        (run / "last" / file).write_bytes(damaged)
        with pytest.raises(ValueError, match="^resume: .*last"):
            make_trainer(run).fit(resume=True)
    assert not mark.exists()
    assert (run / "log.jsonl").read_bytes() == log
    (run / "last" / file).write_bytes(whole)
    make_trainer(run).fit(resume=True)


@pytest.mark.parametrize("text", ["no log\n", "[]\n", "{}\n"])
def test_resume_with_a_damaged_log(straight, tmp_path, text):
    run = copy_of(straight[0], tmp_path / "run")
    (run / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"resume: .*log.jsonl is not the log of a training run"):
        make_trainer(run).fit(resume=True)
    assert (run / "log.jsonl").read_text() == text


def test_resume_with_weights_of_another_network(straight, tmp_path):
    run = copy_of(straight[0], tmp_path / "run")
    spnet.save_model(spnet.create_model("resnet20_cifar"), run / "last")
    with pytest.raises(ValueError, match="resume: .*last is no checkpoint of this run"):
        make_trainer(run).fit(resume=True)


def test_full_disk_while_saving(straight, monkeypatch, tmp_path):
    calls = []
    real = os.fsync

    def full_at_the_second_checkpoint(descriptor):
        calls.append(descriptor)
        if len(calls) > 1 + 3 + 1:  # config.json; weights, description and state of the first; then its weights
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_second_checkpoint)
    with pytest.raises(OSError, match="not written, what was there before stays .*No space left on device"):
        make_trainer(tmp_path).fit()
    monkeypatch.undo()
    assert load_state(tmp_path / "last")["step"] == 3
    spnet.load_model(tmp_path / "last")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    make_trainer(tmp_path).fit(resume=True)
    assert_same_run(straight[0], tmp_path)


def test_kill_while_the_settings_are_written_again(straight, monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, loader=stop_before(7)).fit()

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", kill)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path).fit(resume=True)
    monkeypatch.undo()
    make_trainer(tmp_path).fit(resume=True)
    assert_same_run(straight[0], tmp_path)


# -------------------------------------------------------------------------------------------------- not finite


def assert_stays_at(run, step):
    assert load_state(run / "last")["step"] == step
    model = spnet.load_model(run / "last")
    assert all(t.isfinite().all() for t in model.state_dict().values())
    log_of(run)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("classification_loss", "cls"),
        ("activation_loss", "act"),
        ("executing_path_loss", "path"),
        ("logits_loss", "logits"),
        ("evolution_loss_within", "evo"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_term_that_is_not_finite(monkeypatch, tmp_path, function, name, value):
    term, calls = getattr(losses, function), []

    def broken(*args):
        calls.append(args)
        return term(*args) * (value if len(calls) == 5 else 1)

    monkeypatch.setattr(losses, function, broken)
    with pytest.raises(FloatingPointError, match=f"^{name}: (nan|inf) by step 5; the checkpoint before it stays"):
        make_trainer(tmp_path, log_every=1).fit()
    assert_stays_at(tmp_path, 4)


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(8, 100), (100, 8), (7, 100), (100, 7), (100, 100)])
def test_not_finite_between_two_looks(monkeypatch, tmp_path, log_every, checkpoint_every):
    """One step later every term is NaN: the first step tells which one began."""
    term, calls = losses.evolution_loss_within, []

    def broken(*args):
        calls.append(args)
        return term(*args) * (math.inf if len(calls) == 6 else 1)

    monkeypatch.setattr(losses, "evolution_loss_within", broken)
    with pytest.raises(FloatingPointError, match="^evo: inf by step 6"):
        make_trainer(tmp_path, log_every=log_every, checkpoint_every=checkpoint_every).fit()
    assert_stays_at(tmp_path, 4)


@pytest.mark.parametrize(("step", "checkpoint"), [(6, 4), (8, 6)])
def test_gradient_of_a_finite_loss_that_is_not_finite(tmp_path, step, checkpoint):
    def hook(k):
        if k == step - 1:
            bias = trainer.model.heads[-1].bias
            bias.register_hook(lambda g: g * math.nan)

    trainer = make_trainer(tmp_path, loader=hooked(hook))
    with pytest.raises(FloatingPointError, match=f"norm of the weights: nan by step {step}"):
        trainer.fit()
    assert_stays_at(tmp_path, checkpoint)


if __name__ == "__main__":  # the process that is killed: out folder, steps until the kill
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])

    def kill(k):
        if k == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    make_trainer(folder, loader=hooked(kill)).fit()
