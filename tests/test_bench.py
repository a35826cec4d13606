"""A benchmark that timed wrong answers would be worth nothing: every cell checks its rivals first."""

import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import spnet

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench_forward(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import bench_forward

    monkeypatch.setattr(bench_forward, "take_turns", lambda calls, seconds: pytest.fail("timed before it was checked"))
    return bench_forward


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("masked", torch.float32), ("dense", torch.float32), ("skips", torch.float32), ("masked", torch.bfloat16)],
    ids=str,
)
def test_a_wrong_rival_fails_its_cell(bench_forward, monkeypatch, kind, dtype):
    from competitors import Competitor

    name, executed = "resnet20_cifar", 0.5
    wrong = Competitor(lambda x, paths: lambda: bench_forward.network(name, dtype)(x) * 1.5, kind)
    monkeypatch.setattr(bench_forward, "rivals_of", lambda *cell: (({"wrong": wrong}, {}), {}))
    config = SimpleNamespace(getoption=lambda option: None)
    with pytest.raises(AssertionError, match="^wrong: logits are off by"):
        bench_forward.test_forward(None, None, (name, dtype, 2, executed), config)


def test_a_wrong_last_sample_is_seen_where_few_are_compared(bench_forward, monkeypatch):
    monkeypatch.setattr(bench_forward, "COMPARED", 4)
    assert bench_forward.compared(64).tolist() == [0, 21, 42, 63]
    assert bench_forward.compared(3).tolist() == [0, 1, 2]
    name, dtype = "resnet20_cifar", torch.bfloat16
    check = bench_forward.Check(name, dtype, 0, 8, 0.5)
    x, paths = bench_forward.case(name, dtype, 0, 8, 0.5)
    logits = spnet.fast_forward(bench_forward.network(name, dtype), x, impl="masked", paths=paths)
    check("right", logits)
    check("right", logits[:1])
    logits[-1] *= 1.5
    with pytest.raises(AssertionError, match="^wrong: logits are off by"):
        check("wrong", logits)
    with pytest.raises(AssertionError, match=r"^wrong: expected logits \[8, 10\], got \[16, 10\]"):
        check("wrong", logits.repeat(2, 1))


def test_a_result_says_its_gpu(monkeypatch):
    from bench import conftest

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    info = {}
    for program, driver in ((None, None), ("/bin/nvidia-smi", "580.1")):
        monkeypatch.setattr(conftest.shutil, "which", {"nvidia-smi": program}.get)
        monkeypatch.setattr(conftest.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="580.1\n580.1\n"))
        conftest.pytest_benchmark_update_machine_info(None, info)
        assert (info["device"], info["driver"], info["cuda_version"]) == ("A GPU", driver, "13.0")
    assert {"torch", "triton"} <= info.keys()


def test_a_rival_in_a_graph_keeps_what_the_graph_reads(bench_forward, monkeypatch):
    import competitors

    read = []

    def forward(self, *inputs):
        read.extend(map(weakref.ref, inputs))
        return inputs[0].mean((2, 3))

    monkeypatch.setattr(competitors.FoldedNetwork, "forward", forward)
    monkeypatch.setattr(competitors, "_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    bind = competitors.cuda_graph(spnet.create_model("resnet20_cifar").eval(), 2, torch.float16, True)
    call = bind(torch.randn(2, 3, 32, 32), torch.ones(2, 9, dtype=torch.bool))
    assert len(read) == 4
    assert all(tensor() is not None for tensor in read)
    del call


@pytest.mark.parametrize(
    ("only", "text"),
    [(("eager", "naives"), "naives unknown"), (("compile dense", "naive"), "expected one")],
)
def test_rivals_that_give_no_comparison(bench_forward, only, text):
    import competitors

    with pytest.raises(ValueError, match=text):
        competitors.competitors(spnet.create_model("resnet20_cifar").eval(), 2, torch.float32, only)
