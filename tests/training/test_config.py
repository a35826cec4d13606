"""Settings: presets, ranges, files, and what makes a resumed run another one."""

import dataclasses
import json
import re

import pytest

from spnet.training import TrainConfig


def test_defaults_are_the_cifar_recipe():
    c = TrainConfig.preset("cifar")
    assert c == TrainConfig()
    assert (c.lr, c.momentum, c.weight_decay, c.batch_size, c.epochs) == (0.1, 0.9, 1e-4, 128, 350)
    assert (c.milestones, c.lr_decay, c.gradient_clamp) == ((150, 250), 0.1, 0.5)
    assert (c.target_rate, c.auxiliary_momentum, c.stage_weights) == (0.8, 0.6, (0.1, 0.2, 1.0))
    assert (c.weight_activation, c.weight_path, c.weight_logits, c.weight_evolution) == (2.0, 0.1, 0.1, 1e-4)
    assert (c.hinge, c.evolution, c.pairing) == (False, "within", "final")


def test_imagenet_recipe():
    c = TrainConfig.preset("imagenet")
    assert (c.lr, c.momentum, c.weight_decay, c.batch_size, c.epochs) == (0.05, 0.9, 1e-4, 256, 150)
    assert (c.target_rate, c.auxiliary_momentum, c.stage_weights) == (0.7, 0.9, (0.01, 0.1, 0.2, 1.0))
    assert (c.weight_activation, c.weight_path, c.weight_logits, c.weight_evolution) == (2.0, 0.1, 0.1, 0.1)
    assert (c.hinge, c.evolution, c.pairing) == (True, "across", "final")


def test_preset_overrides():
    c = TrainConfig.preset("imagenet", epochs=3, milestones=[1, 2])
    assert (c.epochs, c.milestones, c.lr) == (3, (1, 2), 0.05)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of .*cifar.*imagenet.*, got 'mnist'"):
        TrainConfig.preset("mnist")


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"log_every": 0},
        {"checkpoint_every": -1},
        {"target_rate": 1.5},
        {"target_rate": float("nan")},
        {"auxiliary_momentum": -0.1},
        {"momentum": 2},
        {"lr": -0.1},
        {"lr": float("inf")},
        {"lr_decay": float("nan")},
        {"weight_decay": -1e-4},
        {"weight_activation": -2.0},
        {"weight_path": float("nan")},
        {"stage_weights": (0.1, -0.2, 1.0)},
        {"gradient_clamp": 0},
        {"gradient_clamp": float("nan")},
        {"workers": -1},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"milestones": (3, -1)},
        {"image_size": 0},
        {"bad_shards": "ignore"},
        {"evolution": "between"},
        {"pairing": "first"},
    ],
    ids=str,
)
def test_values_out_of_range(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        TrainConfig(**bad)


def test_unknown_choices_name_those_that_there_are():
    with pytest.raises(ValueError, match="^pairing: expected 'final' or 'equal', got 'last'$"):
        TrainConfig(pairing="last")
    with pytest.raises(ValueError, match="^evolution: expected 'within' or 'across', got 'between'$"):
        TrainConfig(evolution="between")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("static", "false"),
        ("static", 1),
        ("epochs", "3"),
        ("epochs", 2.5),
        ("epochs", True),
        ("lr", "0.1"),
        ("lr", None),
        ("init", 3),
        ("out", None),
        ("milestones", "150,250"),
        ("milestones", (1.5,)),
        ("stage_weights", 1.0),
    ],
)
def test_value_of_another_type(name, value):
    """ "static": "false" would train a static network."""
    with pytest.raises(
        ValueError, match=f"^{name}: expected (int|float|bool|str|tuple).*, got {re.escape(repr(value))}"
    ):
        TrainConfig(**{name: value})


def test_whole_numbers_are_floats_too():
    assert TrainConfig(lr=1, stage_weights=[0, 1]).stage_weights == (0, 1)


def test_file_round_trip(tmp_path):
    c = TrainConfig(model="resnet20_cifar", milestones=(3, 4), stage_weights=(0.5, 1.0), data_root=None, lr=1e-3)
    c.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == c
    assert TrainConfig.load(str(tmp_path / "config.json")).differences(c) == []
    assert json.loads((tmp_path / "config.json").read_text()).keys() == dataclasses.asdict(c).keys()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_file_of_an_editor(tmp_path, mark):
    text = mark + '{\r\n  "epochs": 3,\r\n  "data_root": "größe"\r\n}\r\n'
    (tmp_path / "config.json").write_bytes(text.encode("utf-8"))
    assert TrainConfig.load(tmp_path / "config.json") == TrainConfig(epochs=3, data_root="größe")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"epoch": 3}', '{"epochs": 0}', '{"epochs": null}'])
def test_damaged_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: not the settings of a training run"):
        TrainConfig.load(tmp_path / "config.json")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        TrainConfig.load(tmp_path / "config.json")


def test_differences_name_the_settings():
    c = TrainConfig()
    assert c.differences(dataclasses.replace(c, out="elsewhere", data_root="there", workers=0, init="that")) == []
    assert c.differences(dataclasses.replace(c, lr=0.2, seed=1)) == ["lr: 0.1 is not 0.2", "seed: 0 is not 1"]
