"""The ablation study compares runs that differ in their objective alone, and its table is arithmetic of its runs."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import spnet
from spnet.models.files import load_model, save_model
from spnet.training.data import Loader
from tests.images import random_set

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    import bench.ablation

    return bench.ablation


@pytest.fixture
def study(ablation):
    return ablation.Study("out", "resnet20_cifar", 256, 4, 2, (0.25, 0.5), "cpu", 2)


def test_runs_differ_in_their_objective_alone(ablation, study):
    starts = [ablation.config_of_start(study, seed) for seed in range(2)]
    rest = [ablation.config_of(study, run) for run in study.runs()]
    assert [c.static for c in starts] == [True, True]
    assert len({c.out for c in starts + rest}) == 2 * (1 + 1 + 4 * 2)
    for config in starts + rest:
        assert (config.epochs, config.milestones, config.model) == (4, (2, 3), "resnet20_cifar")
    weights = {"weight_path", "weight_logits", "weight_evolution"}
    of_sp_net = next(c for c in rest if c.out.endswith("seed1/sp-net-0.25"))
    assert of_sp_net.init == "out/finished/seed1-start.safetensors"
    for name, off in {
        "l_act-only": weights,
        "path": {"weight_evolution"},
        "evolution": {"weight_path", "weight_logits"},
    }.items():
        config = next(c for c in rest if c.out.endswith(f"seed1/{name}-0.25"))
        different = {
            f.name
            for f in dataclasses.fields(config)
            if getattr(config, f.name) != getattr(of_sp_net, f.name) and f.name != "out"
        }
        assert different == off
        assert all(getattr(config, name) == 0 for name in off)


def test_every_network_is_measured(ablation, monkeypatch, tmp_path):
    """The static one too, which has no router: timed where it executes everything."""
    study = ablation.Study(str(tmp_path), "resnet20_cifar", 256, 4, 1, (0.5,), "cpu", 1)
    for run in study.runs():
        model = spnet.create_model("resnet20_cifar", in_channels=1, routed=run[1] != ablation.STATIC)
        save_model(model, study.folder(*run) / "last")
    data = [(torch.randn(2, 1, 32, 32), torch.tensor([1, 2]))]
    monkeypatch.setattr(ablation, "_loader", lambda *args, **kwargs: data)
    calls = {}
    monkeypatch.setattr(
        ablation,
        "take_turns",
        lambda timed, seconds: calls.update(timed) or {**dict.fromkeys(timed, [2.0]), "dense": [4.0]},
    )
    forwards = []
    forward = spnet.fast_forward
    monkeypatch.setattr(spnet, "fast_forward", lambda *args, **kw: forwards.append(forward(*args, **kw)))
    found = ablation.measure(study, study.runs())
    assert found.keys() == set(study.runs())
    assert all(values["ms_per_image"] == 2.0 and values["dense_ms_per_image"] == 4.0 for values in found.values())
    del forwards[:]
    static = study.runs()[0]
    calls[static]()
    expected = load_model(study.folder(*static) / "last")(data[0][0])
    torch.testing.assert_close(forwards[0], expected, rtol=1e-4, atol=1e-4)


def test_table(ablation, study, tmp_path):
    runs = []
    for seed, objective, rate in study.runs():
        churn = None if objective == "static" else 0.1 + 0.1 * seed
        runs.append(
            {
                "seed": seed,
                "objective": objective,
                "rate": rate,
                "accuracy": 0.9 + 0.02 * seed,
                "macs": 50.0,
                "dense_macs": 100,
                "ms_per_image": 0.25,
                "dense_ms_per_image": 0.5 + 0.5 * seed,
                "epochs": {
                    "accuracy": [0.5, 0.9],
                    "churn": [None, churn],
                    "alignment": [0.1, 0.3 + 0.2 * seed],
                },
            }
        )
    machine = {"cpu_level": "avx512", "threads": 2, "torch": "2"}
    results = {"machine": machine, "date": "2026-01-02", "study": dataclasses.asdict(study), "runs": runs}
    ablation.write(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    # Mean and standard deviation of 90 and 92 %; of 50 and 25 %; of 10 and 20 %; of 0.3 and 0.5.
    row = "91.00 ± 1.41 | 50.0 ± 0.0 | 0.2500 ± 0.0000 | 37.5 ± 17.7 |"
    assert f"| SP-Net | 0.5 | {row} 15.00 ± 7.07 | 15.00 ± 7.07 | 0.400 ± 0.141 |" in text
    assert f"| static |  | {row}  |  | 0.400 ± 0.141 |" in text
    assert "4 epochs of the first 256 training images" in text
    assert "bands around them reach from the least to the greatest of the seeds" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000


class Here:
    """A pool of processes that is this one."""

    map = staticmethod(map)

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def small(ablation, monkeypatch):
    """The command, for a study of small images whose every training takes a minute; returns the networks trained."""
    clock, trained = [0.0], []
    settings, fit = ablation.Study.config, ablation._Watched.fit

    def loader(split, images, batch_size, **options):
        data = random_set(32 if split == "train" else 24, channels=1, side=8, input_size=8)
        return Loader(data, min(batch_size, 24), train=split == "train", **options)

    def timed(self, **kwargs):
        trained.append(self.run.name)
        clock[0] += 60
        return fit(self, **kwargs)

    def run(out, *args, fails=False):
        del trained[:]
        size = "--model resnet20_cifar --images 32 --epochs 2 --seeds 1 --rates 0.5 --batch-size 16 --jobs 1".split()
        done = CliRunner().invoke(ablation.main, ["--out", str(out), *size, *args])
        assert (done.exit_code != 0) == fails, done.output
        return done.output, list(trained)

    monkeypatch.setattr(ablation, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(ablation, "_loader", loader)
    monkeypatch.setattr(ablation, "take_turns", lambda calls, seconds: dict.fromkeys(calls, [1.0]))
    now = SimpleNamespace(time=lambda: clock[0], perf_counter=lambda: clock[0], strftime=lambda form: "2026-01-02")
    monkeypatch.setattr(ablation, "time", now)
    monkeypatch.setattr(ablation._Watched, "fit", timed)
    monkeypatch.setattr(
        ablation.Study,
        "config",
        lambda *args, **kw: dataclasses.replace(settings(*args, **kw), compile=False, amp=False),
    )
    return run


def test_study_goes_on_elsewhere_from_what_is_finished(small, tmp_path):
    once, a, b = (tmp_path / name for name in ("once", "a", "b"))
    every = ["start", "static", "l_act-only-0.5", "path-0.5", "evolution-0.5", "sp-net-0.5"]
    assert small(once)[1] == every
    text, trained = small(a, "--minutes", "2.5")
    assert text.endswith("2 of 5 runs are finished; the same command goes on\n")
    assert trained == every[:3]
    assert not (a / "results.json").exists()
    shutil.copytree(a / "finished", b / "finished")
    assert small(b)[1] == every[3:]
    assert small(b)[1] == []  # all is there
    expected, got = (json.loads((out / "results.json").read_text()) for out in (once, b))
    assert got == expected
    assert [run["epochs"]["churn"][0] for run in got["runs"]] == [None] * 5
    assert all(len(values) == 2 for run in got["runs"] for values in run["epochs"].values())
    assert (b / "README.md").read_text() == (once / "README.md").read_text()
    assert sum(file.stat().st_size for file in (b / "finished").iterdir()) < 2**21


def test_machines_of_several_calls_stand_together(small, ablation, monkeypatch, tmp_path):
    machines = iter(({"cpu_level": "a", "threads": 2}, {"cpu_level": "b", "threads": 2}))
    monkeypatch.setattr(spnet, "build_info", lambda: next(machines))
    small(tmp_path, "--minutes", "2.5")
    small(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["machine"] == {"cpu_level": "a and b", "threads": 2}
    assert "cpu_level a and b, threads 2; 2026-01-02." in (tmp_path / "README.md").read_text()


def test_folder_of_another_study(small, tmp_path):
    small(tmp_path, "--minutes", "0")
    text, trained = small(tmp_path, "--epochs", "3", "--batch-size", "8", fails=True)
    assert "holds a study of epochs 2, not 3, batch_size 16, not 8; name another folder" in text
    assert trained == []


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--images 70000", "1<=x<=60000"),
        ("--epochs 0", "x>=1"),
        ("--seeds 0", "x>=1"),
        ("--jobs 0", "x>=1"),
        ("--batch-size 0", "x>=1"),
        ("--model resnet20", "'resnet20' is not one of 'resnet20_cifar'"),
        ("--rates half", "could not convert string to float: 'half'"),
        ("--rates 0.5,1.5", "expected different rates in [0, 1], got 0.5,1.5"),
        ("--rates 0.3,0.30", "expected different rates in [0, 1], got 0.3,0.30"),
    ],
)
def test_options_out_of_range(ablation, tmp_path, option, told):
    done = CliRunner().invoke(ablation.main, ["--out", str(tmp_path / "out"), *option.split()])
    assert (done.exit_code, told in done.output) == (2, True), done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--images 100", "batch_size: expected at most the 100 images, got 128"),
        ("--report", "out: no results of a study at "),
    ],
)
def test_study_that_cannot_be_leaves_no_folder(ablation, tmp_path, option, told):
    done = CliRunner().invoke(ablation.main, ["--out", str(tmp_path / "out"), *option.split()])
    assert (done.exit_code, told in done.output) == (1, True), done.output
    assert not (tmp_path / "out").exists()


def test_run_that_fails_loses_no_other(small, ablation, monkeypatch, tmp_path):
    fit = ablation._Watched.fit

    def diverge(self, **kwargs):
        if self.run.name == "path-0.5":
            raise FloatingPointError("cls: nan")
        return fit(self, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ablation._Watched, "fit", diverge)
        small(tmp_path, fails=True)
    assert {file.name for file in (tmp_path / "finished").glob("*.json")} == {
        "study.json",
        "seed0-static.json",
        "seed0-l_act-only-0.5.json",
    }
    assert small(tmp_path)[1] == ["path-0.5", "evolution-0.5", "sp-net-0.5"]


def test_full_disk_while_the_last_weights_are_saved(small, ablation, monkeypatch, tmp_path):
    """All epochs are in the log, but the network is that of the epoch before."""
    save = ablation._Watched._save

    def full(self, best=False):
        if self.run.name == "path-0.5" and self.epoch == 2:
            raise OSError("No space left on device")
        save(self, best)

    with monkeypatch.context() as patched:
        patched.setattr(ablation._Watched, "_save", full)
        small(tmp_path, fails=True)
    assert not (tmp_path / "finished" / "seed0-path-0.5.json").exists()
    assert small(tmp_path)[1] == ["path-0.5", "evolution-0.5", "sp-net-0.5"]


def test_kill_while_an_epoch_is_noted(small, ablation, monkeypatch, tmp_path):
    """Its line in the log is half there, and the epoch is trained again."""
    write = ablation._Watched._write

    def killed(self, kind, *args, **values):
        write(self, kind, *args, **values)
        if kind == "epoch":
            log = self.run / "log.jsonl"
            log.write_bytes(log.read_bytes()[:-30])
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ablation._Watched, "_write", killed)
        small(tmp_path, fails=True)
    assert (tmp_path / "seed0" / "start" / "log.jsonl").exists()
    text, trained = small(tmp_path)
    assert len(trained) == 6
    assert all(
        len(v) == 2 for r in json.loads((tmp_path / "results.json").read_text())["runs"] for v in r["epochs"].values()
    )
