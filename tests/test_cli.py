"""The ``spnet`` command, run as a user types it."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import spnet
from spnet.cli import main
from spnet.training import TrainConfig
from spnet.training.data import DATASETS
from tests.images import write_fashion_mnist


def run(*args: str) -> str:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*args: str) -> str:
    result = CliRunner().invoke(main, args)
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def data(tmp_path):
    """A folder of IDX files in their true format: 64 training and 32 test images of 28x28."""
    folder = tmp_path / "data"
    write_fashion_mnist(folder, "train", 64)
    write_fashion_mnist(folder, "test", 32)
    return str(folder)


@pytest.mark.parametrize("command", ["demo", "train", "eval", "paths", "report", "info"])
def test_help_shows_an_example(command):
    assert "Example" in run(command, "--help")
    assert f"spnet {command}" in run(command, "--help")


def test_train_help_tells_every_setting_and_its_values():
    """So that nobody has to read the source to know what a preset does."""
    text = _without_space(run("train", "--help"))  # lines are broken at spaces and hyphens
    for field in dataclasses.fields(TrainConfig):
        option = "--" + field.name.replace("_", "-")
        assert option in text
        assert _without_space(field.metadata["about"]) in text
    assert "bylr-decay.[cifar150,250;imagenet50,100]" in text
    assert "targetrate.[cifaroff;imageneton]" in text
    assert "MomentumofSGD.[0.9]" in text


def _without_space(text: str) -> str:
    return "".join(text.split())


def test_demo_compares_both_and_writes_the_pictures(tmp_path):
    text = run("demo", "--out", str(tmp_path), "--repeats", "1")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("masked", "walk"))}
    assert rows["masked"][1] == rows["walk"][1]  # the same accuracy
    assert float(rows["walk"][2]) <= 0.65 * float(rows["masked"][2])  # MMACs
    agreement = float(re.search(r"agree: ([\d.]+)%", text)[1])
    assert agreement >= 99.9
    assert {p.name for p in tmp_path.iterdir()} == {"rates.png", "cost.png", "images.png"}


def test_train_eval_paths(tmp_path, data):
    data_set = ["--data", "fashion-mnist", "--data-root", data]
    common = [
        "train",
        "--preset",
        "cifar",
        *data_set,
        "--model",
        "resnet20_cifar",
        "--batch-size",
        "16",
        "--epochs",
        "1",
    ]
    static, out = str(tmp_path / "static"), str(tmp_path / "spnet")
    run(*common, "--static", "--out", static)
    routed = [*common, "--init", f"{static}/best", "--milestones", "1,2", "--no-amp", "--out", out]
    text = run(*routed)
    assert "32 samples: accuracy" in text
    config = json.loads((tmp_path / "spnet" / "config.json").read_text())
    assert config["milestones"] == [1, 2]
    assert config["amp"] is False
    assert "holds a run already" in fail(*routed)
    assert "other settings: lr" in fail(*routed, "--lr", "1", "--resume")
    assert "instead of a preset" in fail("train", "--config", f"{out}/config.json", "--preset", "cifar", "--resume")
    run("train", "--config", f"{out}/config.json", "--resume")
    assert f"networks are {out}/best and {out}/last" in fail("eval", out, *data_set)
    assert "every sample executes everything" in run("info", f"{static}/best")
    text = run("eval", f"{out}/best", *data_set)
    assert "32 samples: accuracy" in text
    card = tmp_path / "new" / "README.md"
    pictures = ["--out", str(tmp_path / "pictures"), "--card", str(card)]
    text = run("paths", f"{out}/best", *data_set, "--limit", "12", *pictures)
    assert text.startswith("12 samples")
    assert text[: text.index(str(tmp_path))].strip() in card.read_text(encoding="utf-8")
    assert (tmp_path / "pictures" / "rates.png").exists()
    page = tmp_path / "page.html"
    assert run("report", out, "--limit", "12", "--out", str(page)) == f"{page}\n"
    assert "Paths of 12 samples" in page.read_text()


def test_info():
    text = run("info")
    assert "cpu_level" in text
    assert "resnet110_cifar" in text
    text = run("info", "resnet20_cifar")
    assert "GMAC" in text
    assert "impl = walk" in text


def test_errors_are_one_line(tmp_path):
    missing = "model: runs/nowhere/best is neither a folder nor a bundled network; there is fashion-mnist"
    assert missing in fail("eval", "runs/nowhere/best")
    assert "resnet110_cifar" in fail("info", "resnet110")
    assert "is no model folder, as there is no config.json in it" in fail("eval", str(tmp_path))
    assert "No such option" in fail("train", "--learning-rate", "1")
    assert "invalid literal" in fail("train", "--milestones", "1,soon")
    assert "target_rate: expected a value in [0, 1]" in fail("train", "--target-rate", "1.5")
    for command in (["eval", "fashion-mnist"], ["train"]):
        assert all(name in fail(*command, "--data", "mnist") for name in DATASETS)
    assert "resnet110_cifar" in fail("train", "--model", "resnet110")
    assert "'final', 'equal'" in fail("train", "--pairing", "first")


@pytest.mark.parametrize("option", [("--impl", "walk"), ("--threshold", "3")])
def test_static_network_is_executed_in_one_way(tmp_path, data, option):
    spnet.save_model(spnet.create_model("resnet20_cifar", in_channels=1, routed=False), tmp_path / "net")
    evaluation = ("eval", str(tmp_path / "net"), "--data-root", data)
    assert "32 samples: accuracy" in run(*evaluation)
    assert "are for a routed network, and" in fail(*evaluation, *option)


@pytest.mark.parametrize("command", ["eval", "paths"])
def test_data_of_other_classes(tmp_path, data, command):
    """Labels 0 to 9 are also of the first classes of a network of 100."""
    spnet.save_model(spnet.create_model("resnet20_cifar", in_channels=1, num_classes=100), tmp_path / "net")
    text = fail(command, str(tmp_path / "net"), "--data-root", data)
    assert "data: expected the network's 100 classes, got 10 in fashion-mnist" in text


@pytest.mark.parametrize("command", ["eval", "paths", "report"])
@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("class_names", [*"abcdefghij"], "class 0 'a' of the network, got 'T-shirt/top' in fashion-mnist"),
        ("mean", [0.5], r"the network's mean [0.5], got [0.286041] in fashion-mnist"),
        ("std", [0.5], r"the network's std [0.5], got [0.353024] in fashion-mnist"),
    ],
)
def test_data_of_other_names_or_normalisation(tmp_path, data, command, name, values, says):
    """As many classes, and pixels of the same shape, are not yet the data that the network knows."""
    network = spnet.load_pretrained("fashion-mnist")
    network.data = {**network.data, name: values}
    spnet.save_model(network, tmp_path / "best")
    TrainConfig(data="fashion-mnist", data_root=data).save(tmp_path / "config.json")
    (tmp_path / "log.jsonl").write_text('{"kind": "epoch", "step": 1}\n')
    place = [str(tmp_path)] if command == "report" else [str(tmp_path / "best"), "--data", "fashion-mnist"]
    assert f"data: expected {says}" in fail(command, *place, "--data-root", data)


def test_files_and_folders_in_the_way_are_one_line(tmp_path, data):
    file = tmp_path / "file"
    file.touch()
    train = ("train", "--data", "fashion-mnist", "--data-root", data, "--model", "resnet20_cifar", "--batch-size", "32")
    assert "Not a directory" in fail(*train, "--out", str(file / "run"))
    assert "Is a directory" in fail("train", "--config", str(tmp_path))
    for command in (["demo"], train, ["paths", "fashion-mnist", "--data-root", data]):
        assert f"Directory '{file}' is a file" in fail(*command, "--out", str(file))
    for command in (["paths", "fashion-mnist", "--card"], ["report", str(tmp_path), "--out"]):
        assert f"File '{tmp_path}' is a directory" in fail(*command, str(tmp_path))


@pytest.mark.parametrize("command", ["demo", "paths"])
def test_a_folder_that_cannot_be_made_is_told_before_any_work(tmp_path, data, monkeypatch, command):
    (tmp_path / "file").touch()
    monkeypatch.setattr(spnet.execution.plan.Plan, "run", None)
    of = [] if command == "demo" else ["fashion-mnist", "--data-root", data]
    assert "Not a directory" in fail(command, *of, "--out", str(tmp_path / "file" / "out"))


def test_a_reader_that_has_read_enough_is_no_error():
    process = subprocess.Popen([sys.executable, "-m", "spnet", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"pipe" not in process.communicate()[1]


def test_device_that_is_not_there_is_one_line(tmp_path, data):
    train = ("train", "--data", "fashion-mnist", "--data-root", data, "--model", "resnet20_cifar", "--batch-size", "32")
    for device in ("tpu", "meta", f"cuda:{torch.cuda.device_count()}"):
        assert f"device: cannot use '{device}' here" in fail(*train, "--out", str(tmp_path / "run"), "--device", device)
        for command in ("eval", "paths"):
            assert f"device: cannot use '{device}' here" in fail(
                command, "fashion-mnist", "--data-root", data, "--device", device
            )
    assert not (tmp_path / "run").exists()
