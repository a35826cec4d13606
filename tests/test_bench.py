"""A benchmark that timed wrong answers would be worth nothing: every cell checks its rivals first."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench_forward(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import bench_forward

    monkeypatch.setattr(bench_forward, "take_turns", lambda calls, seconds: pytest.fail("timed before it was checked"))
    return bench_forward


@pytest.mark.parametrize("kind", ["masked", "dense", "skips"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_rival_fails_its_cell(bench_forward, monkeypatch, kind, dtype):
    from competitors import Competitor

    name, executed = "resnet20_cifar", 0.5
    wrong = Competitor(lambda x, paths: lambda: bench_forward.network(name, dtype)(x) * 1.5, kind)
    monkeypatch.setattr(bench_forward, "rivals_of", lambda *cell: (({"wrong": wrong}, {}), {}))
    config = SimpleNamespace(getoption=lambda option: None)
    with pytest.raises(AssertionError, match="^wrong: logits are off by"):
        bench_forward.test_forward(None, None, (name, dtype, 2, executed), config)
