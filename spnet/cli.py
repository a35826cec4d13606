"""The ``spnet`` command: demo, train, eval, paths, report, bench, info."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import click
import torch

import spnet
from spnet.analysis import benchmarks
from spnet.analysis.macs import count_macs, format_macs
from spnet.analysis.pictures import write_pictures
from spnet.api import IMPLEMENTATIONS
from spnet.demo import run_demo
from spnet.models.files import CONFIG, write_whole
from spnet.models.hub import model_card
from spnet.pretrained import bundled_networks
from spnet.routing import routed_blocks
from spnet.training import TrainConfig, Trainer, distributed, evaluate
from spnet.training.config import PRESETS
from spnet.training.data import DATASETS, FolderLoader, Loader, ShardLoader, check_data, make_loader
from spnet.training.report import FirstImages, easiest_and_hardest, read_images, write_report
from spnet.training.shards import BAD_SHARDS


class _Group(click.Group):
    """Errors that name their cause are shown as one line, without a traceback."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # its reader has read enough: click ends quietly
        except (ValueError, OSError, FloatingPointError, ImportError) as e:
            raise click.ClickException(str(e)) from e


# What stands in its place is told before any work.
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}


@click.group(cls=_Group, context_settings=_CONTEXT)
@click.version_option(spnet.__version__)
def main() -> None:
    """Dynamic inference networks that really skip what their routers skip."""


def _load(folder: str) -> spnet.SPNet:
    """A model folder, or the name of a bundled network."""
    path = Path(folder)
    if (path / "best" / CONFIG).exists():
        raise ValueError(f"model: {folder} is a training run; its networks are {path / 'best'} and {path / 'last'}")
    if (path / CONFIG).exists():
        return spnet.load_model(path)
    if path.exists():
        raise FileNotFoundError(f"model: {folder} is no model folder, as there is no {CONFIG} in it")
    bundled = bundled_networks()
    if folder not in bundled:
        raise FileNotFoundError(
            f"model: {folder} is neither a folder nor a bundled network; there is {', '.join(bundled)}"
        )
    return spnet.load_pretrained(folder)


def _load_with_data(
    model: str, device: str, data: str, data_root: str | None, **settings
) -> tuple[spnet.SPNet, Loader | FolderLoader | ShardLoader]:
    """The network and the loader of the test set that `_data_options` name."""
    network = _load(model).to(distributed.usable_device(device))
    settings |= dict(root=data_root, device=device, image_size=network.input_size)
    loader = make_loader(data, "test", **settings)
    check_data(network, loader, data)
    return network, loader


def _data_options(command):
    for option in (
        click.option("--device", default="cpu", help="Where the network runs."),
        click.option("--bad-shards", type=click.Choice(BAD_SHARDS), default="skip", help=_about("bad_shards")),
        click.option("--workers", type=click.IntRange(0), default=4, help=_about("workers")),
        click.option("--batch-size", type=click.IntRange(1), default=250),
        click.option("--data-root", help="Folder of the data set; default: the usual places."),
        click.option("--data", type=click.Choice(DATASETS), default="fashion-mnist"),
    ):
        command = option(command)
    return command


@main.command()
@click.option("--out", type=_FOLDER, default="demo", help="Folder for the pictures.")
@click.option("--batch-size", type=click.IntRange(1), default=100)
@click.option("--repeats", type=click.IntRange(1), default=5, help="Interleaved runs; the fastest of each counts.")
def demo(out: Path, batch_size: int, repeats: int) -> None:
    """Answer 1,000 real images by the dense network and by the fastest execution, side by side.

    \b
    Example:
      spnet demo --out demo
    """
    click.echo(run_demo(out, batch_size, repeats))


def _config_options(command):
    """An option for every setting of TrainConfig; the preset supplies what is not given."""
    types = typing.get_type_hints(TrainConfig)
    choices = {"model": spnet.list_models(), "data": DATASETS}
    for field in reversed(dataclasses.fields(TrainConfig)):
        hint = types[field.name]
        name = "--" + field.name.replace("_", "-")
        told = dict(help=f"{field.metadata['about']}{_values(field)}", default=None)
        chosen = choices.get(field.name, field.metadata["choices"])
        if hint is bool:
            option = click.option(f"{name}/--no-{name[2:]}", **told)
        elif typing.get_origin(hint) is tuple:
            option = click.option(name, callback=_numbers(typing.get_args(hint)[0]), metavar="N,N,...", **told)
        else:
            kind = next(t for t in (typing.get_args(hint) or (hint,)) if t is not type(None))
            kind = click.Path(file_okay=False) if field.name == "out" else kind
            metavar = "NAME" if field.name == "model" else None  # the others are few enough to be listed
            option = click.option(name, type=click.Choice(chosen) if chosen else kind, metavar=metavar, **told)
        command = option(command)
    return command


def _about(setting: str) -> str:
    return TrainConfig.__dataclass_fields__[setting].metadata["about"]


def _values(field: dataclasses.Field) -> str:
    """The value of a setting in every preset, for its help; nothing where there is none."""
    if field.default is None:
        return ""
    values = {name: _shown(preset.get(field.name, field.default)) for name, preset in PRESETS.items()}
    alike = len(set(values.values())) == 1
    return f"  [{_shown(field.default) if alike else '; '.join(map(' '.join, values.items()))}]"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _numbers(kind: type):
    def parse(ctx: click.Context, param: click.Parameter, value: str | None):
        try:
            return None if value is None else tuple(kind(v) for v in value.split(",") if v)
        except ValueError as e:
            raise click.BadParameter(str(e)) from e

    return parse


@main.command(context_settings={"show_default": False})
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), help="Supplies what is not given, see brackets; default: cifar."
)
@click.option("--config", "file", type=click.Path(exists=True), help="Settings saved by a run, instead of a preset.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
@_config_options
def train(preset: str | None, file: str | None, resume: bool, **settings) -> None:
    """Train a network; the settings are those of spnet.training.TrainConfig.

    \b
    Example: a static network, then an SP-Net that starts from it
      spnet train --data fashion-mnist --model resnet20_cifar --static \\
                  --epochs 3 --milestones 2 --out runs/static
      spnet train --data fashion-mnist --model resnet20_cifar --init runs/static/best \\
                  --epochs 6 --milestones 4,5 --target-rate 0.6 --out runs/spnet
      spnet eval runs/spnet/best

    \b
    Example: eight GPUs; --batch-size is that of all, and a rank's death costs the steps since the last checkpoint
      torchrun --nproc-per-node 8 --max-restarts 3 -m spnet train --preset imagenet --device cuda \\
               --data-root imagenet --out runs/imagenet
    """
    settings = {k: v for k, v in settings.items() if v is not None}
    if file is not None:
        if preset is not None:
            raise click.UsageError("--config: stands instead of a preset, so --preset has no effect; give one of them")
        config = dataclasses.replace(TrainConfig.load(file), **settings)
    else:
        config = TrainConfig.preset(preset or "cifar", **settings)
    with distributed.job(config.device):
        # After a rank's death torchrun starts all of them again, by the same command. A run that the first attempt
        # found in the folder, and refused to overwrite, is not the one to go on with.
        out = Path(config.out)
        resume = resume or (distributed.restarted() and distributed.noted_job(out) and (out / "last").exists())
        trainer = Trainer(config)
        result = trainer.fit(resume=resume)
        if distributed.rank() == 0:
            click.echo(_describe(result))
            if trainer.throughput:
                click.echo(_describe_throughput(**trainer.throughput))


def _describe(e: spnet.training.Evaluation) -> str:
    share = f"{e.macs / e.dense_macs:.1%} of dense"
    return f"{e.samples} samples: accuracy {e.accuracy:.2%}, {e.macs / 1e6:.2f} MMACs per sample ({share})"


def _describe_throughput(
    images_per_second: float, macs_per_second: float, test_images_per_second: float, test_macs_per_second: float
) -> str:
    return (
        f"last epoch: trained at {images_per_second:,.0f} images/s ({macs_per_second / 1e9:,.1f} GMAC/s), "
        f"tested at {test_images_per_second:,.0f} images/s ({test_macs_per_second / 1e9:,.1f} GMAC/s)"
    )


@main.command("eval")
@click.argument("model")
@_data_options
@click.option("--impl", type=click.Choice(["auto", *IMPLEMENTATIONS]), default="auto")
@click.option("--threshold", type=float, default=0.0, help="Execute a block where z_execute - z_skip is above it.")
def evaluate_(model: str, impl: str, threshold: float, device: str, **test_set) -> None:
    """Accuracy and cost of MODEL (a folder written by training, or a bundled network) on a test set.

    \b
    Example:
      spnet eval fashion-mnist --data fashion-mnist
    """
    network, loader = _load_with_data(model, device, **test_set)
    if not routed_blocks(network) and (impl != "auto" or threshold):
        raise click.UsageError(f"--impl and --threshold are for a routed network, and {model} is static")
    click.echo(_describe(evaluate(network, loader, impl=impl, threshold=threshold, device=device)))


@main.command()
@click.argument("model")
@_data_options
@click.option("--limit", type=click.IntRange(1), help="Only so many images.")
@click.option("--out", type=_FOLDER, default="paths", help="Folder for the pictures.")
@click.option("--card", type=_FILE, help="Also write a model card with the statistics.")
def paths(model: str, limit: int | None, out: Path, card: Path | None, device: str, **test_set) -> None:
    """Statistics and pictures of the paths that test images take through MODEL.

    \b
    Example:
      spnet paths fashion-mnist --limit 1000 --out paths
      spnet paths runs/spnet/best --data cifar10 --card runs/spnet/best/README.md
    """
    network, loader = _load_with_data(model, device, **test_set)
    out.mkdir(parents=True, exist_ok=True)  # before all images are run
    stats = spnet.paths(network, FirstImages(loader, limit))
    click.echo(stats)
    if card is not None:
        card.parent.mkdir(parents=True, exist_ok=True)
        write_whole(card, model_card(network, stats).encode())
    shown = easiest_and_hardest(stats)
    for path in write_pictures(stats, read_images(loader, shown), out, shown):
        click.echo(path)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=_FILE, help="The page; default: report.html in RUN.")
@click.option("--data-root", help="Folder of the data set, where it is another than in training.")
@click.option("--limit", type=click.IntRange(1), help="Only so many test images.")
@click.option("--device", default="cpu", help="Where the checkpoint runs.")
def report(run: Path, out: Path | None, data_root: str | None, limit: int | None, device: str) -> None:
    """One HTML page about RUN, the folder of a training run: curves, paths of the test images, settings.

    \b
    Example:
      spnet report runs/spnet
    """
    click.echo(write_report(run, out, data_root=data_root, limit=limit, device=device))


@main.command()
@click.option("--quick/--full", default=True, help="A quarter of an hour on two CPU cores, or every cell.")
@click.option("--out", type=_FOLDER, default="bench/results", help="Folder for the result files.")
@click.option("--name", help="Of the result files, by convention device-date; default: the processor and today.")
@click.option("--compare", type=click.Path(exists=True), nargs=2, help="Two result files: shows what became slower.")
@click.option("--merge", type=click.Path(exists=True), multiple=True, help="Result files to make one of, in --out.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Only write the results in --out into it.")
def bench(
    quick: bool,
    out: Path,
    name: str | None,
    compare: tuple[str, str] | None,
    merge: tuple[str, ...],
    readme: Path | None,
) -> None:
    """Measure skipping against what a user could run instead: table, JSON and figures.

    Runs `pytest bench/ --benchmark-only` of a checkout of spnet.

    \b
    Example:
      spnet bench --out results
      spnet bench --compare before.json after.json
      spnet bench --merge some.json --merge others.json --name machine-date
    """
    if compare:
        click.echo(benchmarks.compare(*map(benchmarks.load, compare)))
        return
    if readme and not merge:
        link = Path(os.path.relpath(out.resolve(), readme.resolve().parent)).as_posix()
        readme.write_text(benchmarks.update_readme(readme.read_text(), out, link))
        return
    if merge:
        results, failed = benchmarks.merge([*map(benchmarks.load, merge)]), 0
    else:
        results, failed = _measured(quick)
    for path in benchmarks.write(results, out, name or benchmarks.default_name(results)):
        click.echo(path)
    if failed:
        raise click.ClickException("bench: a cell failed, see above; what the others measured is written")


def _measured(quick: bool) -> tuple[dict, int]:
    """What the benchmarks have measured, and the exit status of pytest."""
    suites = Path(spnet.__file__).resolve().parents[1] / "bench"
    if not (suites / "conftest.py").exists():
        raise click.ClickException(f"bench: {suites} is not there; the benchmarks need a checkout of spnet")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", str(suites), "--benchmark-only", f"--benchmark-json={file}"]
        status = subprocess.run(command if quick else [*command, "--full"]).returncode
        if not file.exists():
            raise click.ClickException("bench: pytest measured nothing")
        return benchmarks.collect(file, f"spnet bench --{'quick' if quick else 'full'}"), status


@main.command()
@click.argument("model", required=False)
def info(model: str | None) -> None:
    """What this build can do; with MODEL (one of the models, a folder or a bundled network) its cost and execution too.

    \b
    Example:
      spnet info resnet110_cifar
    """
    for key, value in spnet.build_info().items():
        click.echo(f"{key:12} {value}")
    click.echo(f"{'models':12} {', '.join(spnet.list_models())}")
    if model is None:
        return
    network = spnet.create_model(model) if model in spnet.list_models() else _load(model)
    network.eval()
    shape = (network.in_channels, network.input_size, network.input_size)
    click.echo("\n" + format_macs(count_macs(network, shape)))
    if routed_blocks(network):
        click.echo(f"\n{spnet.explain(network, torch.zeros(1, *shape))}")
