"""The ablation study compares runs that differ in their objective alone, and its table is arithmetic of its runs."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import spnet
from spnet.models.files import load_model, save_model

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
    starts, rest = ablation.configs(study)
    assert [c.static for c in starts] == [True, True]
    assert len(rest) == 2 * (1 + 4 * 2)
    for config in starts + rest:
        assert (config.epochs, config.milestones, config.model) == (4, (2, 3), "resnet20_cifar")
    weights = {"weight_path", "weight_logits", "weight_evolution"}
    of_sp_net = next(c for c in rest if c.out.endswith("seed1/sp-net-0.25"))
    assert of_sp_net.init == "out/seed1/start/last"
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
        ablation, "take_turns", lambda timed, seconds: calls.update(timed) or dict.fromkeys(timed, [2.0])
    )
    forwards = []
    forward = spnet.fast_forward
    monkeypatch.setattr(spnet, "fast_forward", lambda *args, **kw: forwards.append(forward(*args, **kw)))
    found = ablation.measure(study)
    assert found.keys() == set(study.runs())
    assert all(values["ms_per_image"] == 2.0 for values in found.values())
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
    # Mean and standard deviation of 90 and 92 %; of 10 and 20 %; of 0.3 and 0.5.
    row = "0.5 | 91.00 ± 1.41 | 50.0 ± 0.0 | 0.2500 ± 0.0000 | 15.00 ± 7.07 | 15.00 ± 7.07 | 0.400 ± 0.141 |"
    assert f"| SP-Net | {row}" in text
    assert "| static |  | 91.00 ± 1.41 | 50.0 ± 0.0 | 0.2500 ± 0.0000 |  |  | 0.400 ± 0.141 |" in text
    assert "4 epochs of the first 256 training images" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000
