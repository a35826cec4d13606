"""What each regularizer of SP-Net does: accuracy, cost, measured time, path churn and evolution alignment.

    python -m bench.ablation --out runs/ablation

Trains on Fashion-MNIST, for every seed: a static network; from its weights, for as many epochs again, the static
network itself and, for every target rate, the routed network under four objectives. All else is equal: data, order,
augmentation, learning rates and initial weights of the routers. Then the networks are timed by `spnet.fast_forward` in
one process, taking turns, and the results go to DIR/results.json, DIR/README.md and DIR/curves.png.

A study that was stopped goes on by the same command. `--minutes` lets no training begin after so many; the networks
that are trained by then are timed. What became of each goes into a small file in DIR/finished, which is all that
another machine of the same kind needs to go on; the other folders are training runs of `spnet train`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure

import spnet
from bench.timing import take_turns
from spnet.analysis.benchmarks import table
from spnet.analysis.curves import whole_epochs
from spnet.analysis.pictures import DPI, WIDTH
from spnet.analysis.stability import evolution_alignment
from spnet.models.files import WEIGHTS, load_initial_weights, load_model, write_whole
from spnet.models.registry import create_model, list_models
from spnet.training import Evaluation, TrainConfig, Trainer, evaluate
from spnet.training.checkpoint import load_state
from spnet.training.data import Loader, load_dataset
from spnet.training.report import read_log

STATIC, DENSE = "static", "dense"
# L_path and L_logits are what the momentum-updated auxiliary module is for, so they come and go together.
OBJECTIVES = {
    "L_act only": {"weight_path": 0.0, "weight_logits": 0.0, "weight_evolution": 0.0},
    "+ path": {"weight_evolution": 0.0},
    "+ evolution": {"weight_path": 0.0, "weight_logits": 0.0},
    "SP-Net": {},
}
COLOURS = dict(zip(OBJECTIVES, ["#666666", "#2f6fab", "#d68910", "#c0392b"], strict=True))
BATCH = 500
# Test images, the first ones: for every epoch's evaluation and churn, for its alignment, and for the clock.
EVERY_EPOCH, ALIGNED, TIMED = 2000, 500, 1000
TURNS = 3.0  # seconds of the clock for each network
_MACHINE = ("cpu", "device", "cpu_level", "threads", "torch")  # what the table says of it
ALIGNMENT = "alignment.json"  # in a run's folder

Run = tuple[int, str, float | None]  # seed, objective, target rate


@dataclasses.dataclass(frozen=True)
class Study:
    """The size of a study, and where its files are."""

    out: str
    model: str
    images: int
    epochs: int
    seeds: int
    rates: tuple[float, ...]
    device: str
    jobs: int
    batch_size: int = TrainConfig.batch_size

    def runs(self) -> list[Run]:
        """Everything that starts from a seed's static network."""
        routed = itertools.product(range(self.seeds), OBJECTIVES, self.rates)
        return [*((seed, STATIC, None) for seed in range(self.seeds)), *routed]

    def folder(self, seed: int, objective: str, rate: float | None) -> Path:
        words = [objective.replace("+ ", "").replace(" ", "-").lower(), *([] if rate is None else [str(rate)])]
        return Path(self.out) / f"seed{seed}" / "-".join(words)

    def result(self, seed: int, objective: str, rate: float | None) -> Path:
        """What became of a run: there once it is trained and measured."""
        return self.finished / f"seed{seed}-{self.folder(seed, objective, rate).name}.json"

    def start(self, seed: int) -> Path:
        """The weights that all runs of a seed start from."""
        return self.finished / f"seed{seed}-start.safetensors"

    @property
    def finished(self) -> Path:
        return Path(self.out) / "finished"

    def config(self, out: Path, seed: int, **settings) -> TrainConfig:
        # The learning rate falls after 60 and 85 % of the epochs. Checkpoints are those of the epochs' ends.
        milestones = round(self.epochs * 0.6), round(self.epochs * 0.85)
        common = dict(model=self.model, data="fashion-mnist", epochs=self.epochs, milestones=milestones, seed=seed)
        common |= dict(batch_size=self.batch_size, device=self.device, compile=True, checkpoint_every=10**6)
        return TrainConfig(out=str(out), **common, **settings)

    def check(self) -> None:
        """Leave word of what decides a run's outcome, or compare it with what is there.

        Raises:
            ValueError: the folder is of a study of another size, or a batch has more images than there are.
        """
        if self.batch_size > self.images:
            raise ValueError(f"batch_size: expected at most the {self.images} images, got {self.batch_size}")
        settings = {name: getattr(self, name) for name in ("model", "images", "epochs", "batch_size", "device")}
        note = self.finished / "study.json"
        if note.exists():
            there = json.loads(note.read_text())
            pairs = ((name, there.get(name), value) for name, value in settings.items())
            other = [f"{name} {found}, not {value}" for name, found, value in pairs if found != value]
            if other:
                raise ValueError(f"out: {self.out} holds a study of {', '.join(other)}; name another folder")
        self.finished.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps(settings).encode())


class _Watched(Trainer):
    """Notes the evolution alignment of every epoch."""

    def evaluate(self, impl: str = "auto") -> Evaluation:
        model = self.model.eval()
        value = evolution_alignment(model, itertools.islice(self.test_loader, ALIGNED // BATCH), self.device)
        write_whole(self.run / ALIGNMENT, json.dumps([*_alignment(self.run)[: self.epoch], value]).encode())
        return super().evaluate(impl)


def _alignment(run: Path) -> list[float]:
    """The evolution alignment after each epoch."""
    noted = run / ALIGNMENT
    return json.loads(noted.read_text()) if noted.exists() else []


def _train(study: Study, deadline: float, config: TrainConfig) -> None:
    """Train a network to its last epoch, if it is not yet and time is left.

    Args:
        deadline: the time, in seconds since the epoch, after which no training begins.
    """
    out = Path(config.out)
    waits = config.init is not None and not Path(config.init).exists()
    if waits or _trained(config) or time.time() > deadline:
        return
    loaders = dict(
        train_loader=_loader("train", study.images, config.batch_size, device=config.device, seed=config.seed),
        test_loader=_loader("test", EVERY_EPOCH, BATCH, device=config.device),
    )
    began = time.perf_counter()
    result = _Watched(config, **loaders).fit(resume=(out / "last").exists())
    print(f"{out}: {result.accuracy:.2%} in {time.perf_counter() - began:.0f} s", flush=True)


def _train_start(study: Study, deadline: float, seed: int) -> None:
    if study.start(seed).exists():
        return
    config = config_of_start(study, seed)
    _train(study, deadline, config)
    if _trained(config):
        write_whole(study.start(seed), (Path(config.out) / "last" / WEIGHTS).read_bytes())


def _loader(split: str, images: int, batch_size: int, **options) -> Loader:
    """Of the first images of a split."""
    data = load_dataset("fashion-mnist", split).subset(images)
    return Loader(data, batch_size, train=split == "train", **options)


def _trained(config: TrainConfig) -> bool:
    # By the checkpoint: an epoch is in the log before its weights are saved, which a full disk or a kill may prevent.
    last = Path(config.out) / "last"
    return last.exists() and load_state(last)["epoch"] == config.epochs


def config_of_start(study: Study, seed: int) -> TrainConfig:
    """Of the static network that all runs of a seed start from."""
    return study.config(Path(study.out) / f"seed{seed}" / "start", seed, static=True)


def config_of(study: Study, run: Run) -> TrainConfig:
    seed, objective, rate = run
    settings = dict(static=True) if objective == STATIC else dict(target_rate=rate, **OBJECTIVES[objective])
    return study.config(study.folder(*run), seed, init=str(study.start(seed)), **settings)


def _unfinished(study: Study) -> list[Run]:
    return [run for run in study.runs() if not study.result(*run).exists()]


def train(study: Study, deadline: float = math.inf) -> None:
    """Train what is not trained yet; see `_train`."""
    threads = max(1, torch.get_num_threads() // study.jobs)
    # Not multiprocessing.Pool: it waits for ever for a process that was killed.
    processes = dict(mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads)
    with ProcessPoolExecutor(study.jobs, **processes, initargs=(threads,)) as pool:
        list(pool.map(functools.partial(_train_start, study, deadline), range(study.seeds)))
        rest = [config_of(study, run) for run in _unfinished(study)]
        list(pool.map(functools.partial(_train, study, deadline), rest))


def measure(study: Study, runs: list[Run]) -> dict[Run, dict]:
    """These networks on all test images, and their milliseconds per image in batches of 100.

    A network that executes everything takes turns with them: what the clock of another call is compared by.
    """
    test = _loader("test", 10000, BATCH, device=study.device)
    x = next(iter(_loader("test", TIMED, TIMED, device=study.device)))[0]
    batches, calls, found = x.split(100), {}, {}

    def forward(model: spnet.SPNet, threshold: float) -> None:
        for part in batches:
            spnet.fast_forward(model, part, threshold=threshold)

    for run in runs:
        weights = study.folder(*run) / "last"
        model = load_model(weights).to(study.device, memory_format=torch.channels_last)
        # By the same kernels as the others: behind routers that execute everything.
        dense = create_model(**{**model.config, "routed": True}).eval()
        dense.to(study.device, memory_format=torch.channels_last)
        calls.setdefault(DENSE, functools.partial(forward, dense, -math.inf))
        if run[1] == STATIC:
            load_initial_weights(dense, weights)
            calls[run] = functools.partial(forward, dense, -math.inf)
        else:
            calls[run] = functools.partial(forward, model, 0.0)
        tested = evaluate(model, test, device=study.device)
        found[run] = {"accuracy": tested.accuracy, "macs": tested.macs, "dense_macs": tested.dense_macs}
    times = {name: min(t) * 1e3 / TIMED for name, t in take_turns(calls, TURNS * len(calls)).items()}
    for run, values in found.items():
        values |= {"ms_per_image": times[run], "dense_ms_per_image": times[DENSE]}
    return found


def finish(study: Study) -> None:
    """Measure the networks that are trained, and write what became of each."""
    runs = [run for run in _unfinished(study) if _trained(config_of(study, run))]
    if not runs:
        return
    machine = spnet.build_info()
    if study.device == "cuda":
        machine["device"] = torch.cuda.get_device_name()
    for run, measured in measure(study, runs).items():
        epochs = whole_epochs(read_log(study.folder(*run) / "log.jsonl"))
        result = {
            **dict(zip(("seed", "objective", "rate"), run, strict=True)),
            **measured,
            "epochs": {
                "accuracy": [e["test"]["accuracy"] for e in epochs],
                "churn": [e["test"].get("churn") for e in epochs],
                "alignment": _alignment(study.folder(*run)),
            },
            "machine": machine,
            "date": time.strftime("%Y-%m-%d"),
        }
        write_whole(study.result(*run), (json.dumps(result, indent=1) + "\n").encode())


def collect(study: Study) -> dict:
    """Everything measured, as one JSON value; what differs between the machines of several calls stands together."""
    found = [json.loads(study.result(*run).read_text()) for run in study.runs()]
    machines, dates = ([run.pop(name) for run in found] for name in ("machine", "date"))
    machine = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(machines)):
        values = [m.get(name) for m in machines]
        same = all(value == values[0] for value in values)
        machine[name] = values[0] if same else " and ".join(dict.fromkeys(map(str, values)))
    date = " to ".join(dict.fromkeys((min(dates), max(dates))))
    settings = {k: v for k, v in dataclasses.asdict(study).items() if k != "out"}
    return {"machine": machine, "date": date, "study": settings, "runs": found}


def summarise(results: dict) -> dict[tuple[str, float | None], dict[str, list[float]]]:
    """For every objective and rate the value of each seed: what the table shows."""
    found: dict[tuple, dict[str, list[float]]] = {}
    for run in results["runs"]:
        values = found.setdefault((run["objective"], run["rate"]), {})
        churn = [c for c in run["epochs"]["churn"] if c is not None]
        row = {
            "accuracy": 100 * run["accuracy"],
            "macs": 100 * run["macs"] / run["dense_macs"],
            "ms": run["ms_per_image"],
            "time": 100 * run["ms_per_image"] / run["dense_ms_per_image"] if "dense_ms_per_image" in run else None,
            "churn": 100 * statistics.mean(churn) if churn else None,
            "last churn": 100 * churn[-1] if churn else None,
            "alignment": run["epochs"]["alignment"][-1],
        }
        for name, value in row.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return found


def _spread(values: list[float] | None, digits: int) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def markdown(results: dict) -> str:
    study = results["study"]
    machine = ", ".join(f"{k} {v}" for k, v in results["machine"].items() if k in _MACHINE)
    lines = ["# What each regularizer of SP-Net does", "", __doc__.split("\n\n")[2], ""]
    lines += [
        f"{machine}; {results['date']}. {study['model']}, {study['epochs']} epochs of the first {study['images']} "
        f"training images of Fashion-MNIST in batches of {study.get('batch_size', 128)}, {study['seeds']} seeds: "
        "mean ± standard deviation over them. Accuracy and "
        "cost (of the dense network's MACs) are of all 10,000 test images after the last epoch. Churn is the share of "
        f"decisions, of the first {EVERY_EPOCH} test images, that flip between consecutive epochs: the mean over all "
        "epochs and that of the last one. Alignment is the mean cosine of successive feature differences, of "
        f"{ALIGNED} test images after the last epoch. The time is that of fast_forward in batches of 100, which runs "
        "the static network behind routers that execute everything; in % of such a network's, timed in turns with it. "
        '"+ path" adds the auxiliary module with L_path and L_logits, "+ evolution" adds L_evo, SP-Net both. '
        "The curves are means, the bands around them reach from the least to the greatest of the seeds.",
        "",
    ]
    columns = [
        ("accuracy", "accuracy, %", 2),
        ("macs", "MACs, %", 1),
        ("ms", "ms per image", 4),
        ("time", "time, %", 1),
        ("churn", "churn, %", 2),
        ("last churn", "last churn, %", 2),
        ("alignment", "alignment", 3),
    ]
    rows = []
    for (objective, rate), values in summarise(results).items():
        shown = [_spread(values.get(name), digits) for name, _, digits in columns]
        rows.append([objective, "" if rate is None else f"{rate:g}", *shown])
    lines += table(["objective", "target rate", *(heading for _, heading, _ in columns)], rows)
    return "\n".join([*lines, "![curves](curves.png)", ""])


def curves(results: dict) -> Figure:
    """Accuracy, churn and alignment over epochs, a column per target rate; lines are means, bands the seeds' range."""
    rates = results["study"]["rates"]
    fig = Figure((WIDTH, 7), DPI, layout="constrained")
    axes = fig.subplots(3, len(rates), sharex=True, sharey="row", squeeze=False)
    rows = [("accuracy", "test accuracy"), ("churn", "path churn"), ("alignment", "evolution alignment")]
    for (key, label), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(label)
        for rate, ax in zip(rates, line, strict=True):
            for objective, colour in COLOURS.items():
                _band(ax, _series(results, objective, rate, key), colour, objective)
            if key != "churn":
                _band(ax, _series(results, STATIC, None, key), "black", STATIC, ls=":")
    for rate, top, bottom in zip(rates, axes[0], axes[-1], strict=True):
        top.set_title(f"target rate {rate:g}", size=10)
        bottom.set_xlabel("epoch")
    axes[0][0].legend(fontsize=8, frameon=False)
    return fig


def _series(results: dict, objective: str, rate: float | None, key: str) -> torch.Tensor:
    """[seeds, epochs], NaN where there is no value."""
    of = [r["epochs"][key] for r in results["runs"] if (r["objective"], r["rate"]) == (objective, rate)]
    return torch.tensor([[float("nan") if v is None else v for v in values] for values in of])


def _band(ax, values: torch.Tensor, colour: str, label: str, ls: str = "-") -> None:
    x = range(1, values.shape[1] + 1)
    ax.plot(x, values.mean(0), ls, color=colour, label=label)
    ax.fill_between(x, values.amin(0), values.amax(0), color=colour, alpha=0.12, lw=0)


def write(results: dict, out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "README.md").write_text(markdown(results))
    curves(results).savefig(out / "curves.png")


def _rates(context, parameter, text: str) -> tuple[float, ...]:
    try:
        rates = tuple(map(float, text.split(",")))
    except ValueError as e:
        raise click.BadParameter(str(e)) from e
    if not all(0 <= rate <= 1 for rate in rates) or len(set(rates)) < len(rates):  # equal ones would share a folder
        raise click.BadParameter(f"expected different rates in [0, 1], got {text}")
    return rates


@click.command()
@click.option("--out", default="runs/ablation", help="Folder of the runs and of the results.")
@click.option(
    "--model",
    type=click.Choice([name for name in list_models() if name.endswith("_cifar")]),
    help="Default: resnet32_cifar on a GPU, resnet20_cifar on a CPU.",
)
@click.option(
    "--images", type=click.IntRange(1, 60000), help="Training images, the first. Default: all on a GPU, 10240 on a CPU."
)
@click.option("--epochs", type=click.IntRange(1), help="Default: 20 on a GPU, 6 on a CPU.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=TrainConfig.batch_size,
    show_default=True,
    help="Images per step.",
)
@click.option("--seeds", type=click.IntRange(1), default=3)
@click.option("--rates", default="0.3,0.5,0.7", callback=_rates, help="Target rates.")
@click.option(
    "--jobs", type=click.IntRange(1), help="Networks trained at once. Default: 8 on a GPU, one per core on a CPU."
)
@click.option("--minutes", type=float, default=math.inf, help="Begin no training after so many; go on another time.")
@click.option("--report", is_flag=True, help="Only write the table and the curves again.")
def main(out, model, images, epochs, batch_size, seeds, rates, jobs, minutes, report) -> None:
    """Train and compare; sized to the machine it finds."""
    deadline = time.time() + 60 * minutes
    if report:
        results = Path(out) / "results.json"
        if not results.exists():
            raise click.ClickException(f"out: no results of a study at {results}")
        write(json.loads(results.read_text()), Path(out))
        return
    gpu = torch.cuda.is_available()
    study = Study(
        out=out,
        model=model or ("resnet32_cifar" if gpu else "resnet20_cifar"),
        images=images or (60000 if gpu else 10240),
        epochs=epochs or (20 if gpu else 6),
        seeds=seeds,
        rates=rates,
        device="cuda" if gpu else "cpu",
        jobs=jobs or (8 if gpu else torch.get_num_threads()),
        batch_size=batch_size,
    )
    try:
        study.check()
    except ValueError as e:
        raise click.ClickException(str(e)) from e
    failure = None
    try:
        train(study, deadline)
    except Exception as e:  # one network that diverges, or a process that was killed: what the others did is kept
        failure = e
    finish(study)
    if failure is not None:
        raise failure
    missing = len(_unfinished(study))
    if missing:
        click.echo(f"{len(study.runs()) - missing} of {len(study.runs())} runs are finished; the same command goes on")
        return
    write(collect(study), Path(out))


if __name__ == "__main__":
    main()
