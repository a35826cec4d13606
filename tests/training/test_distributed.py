"""Processes train as one: the same steps, the same files, and the same end when one of them is stopped or dies."""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_trainer
import torch
import torch.distributed as dist
from test_trainer import assert_same_run, assert_stays_at, equal, hooked, log_of, make_set, stop_before
from torch import nn

import spnet
from spnet.models.files import load_weights
from spnet.training import TrainConfig, Trainer, distributed, evaluate, losses
from spnet.training.checkpoint import load_state
from spnet.training.data import Loader
from spnet.training.shards import index_shards
from tests.conftest import settle
from tests.images import write_fashion_mnist, write_shard

RANKS = 3  # of two numbers the sum is the same in either order
ROOT = Path(spnet.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


# ------------------------------------------------------------------------- what all ranks do, in one start of them


def make_trainer(out, images=48, **settings):
    """Of two epochs of four steps, as in the tests of one process."""
    return test_trainer.make_trainer(out, images=images, batch_size=12, **settings)


def noiseless(out, **settings):
    """A trainer whose decisions depend on nothing random, of which about half are to execute; two steps."""
    trainer = make_trainer(out, epochs=1, images=24, log_every=1, **settings)
    for network in (trainer.model, trainer.auxiliary.module):
        for module in network.modules():
            if isinstance(module, spnet.Router):
                module.dropout.p = 0.0
                nn.init.zeros_(module.fc2.bias)
    return trainer


def straight_through(router_logits):
    soft = router_logits.softmax(-1)[:, 1]
    return (soft > 0.5).float() + soft - soft.detach()


def run_equal(folder):
    """The part of test_ranks_equal_one_process that a rank plays; alone, it is the one process."""
    noise, spnet.routing.straight_through_gumbel = spnet.routing.straight_through_gumbel, straight_through
    try:
        for hinge in (False, True):
            noiseless(folder / f"hinge-{hinge}", sync_batchnorm=True, hinge=hinge, weight_activation=20).fit()
    finally:
        spnet.routing.straight_through_gumbel = noise


def evaluated(rank=0, ranks=1):
    """Of a network with several paths; 24 images in batches of 10: the last one has 4."""
    network = settle(spnet.create_model("resnet20_cifar", num_classes=4, in_channels=1, input_size=8), spread=9)
    loader = Loader(make_set(24, seed=1), 10, train=False, shard=(rank, ranks))
    return dataclasses.asdict(evaluate(network, loader, sharded=True))


def run_evaluation(folder, rank):
    torch.manual_seed(0)
    torch.save(evaluated(rank, RANKS), folder / f"evaluation-{rank}.pt")


def routed(rank=slice(None)):
    """Router logits of as many training samples as there are ranks, or of one of them."""
    torch.manual_seed(0)
    router, x = spnet.Router(8, dropout=0.0), torch.randn(RANKS, 8)
    distributed.synchronise_batchnorm(router)
    return router.logits(x[rank])


def run_one_sample_each(folder, rank):
    torch.save(routed(slice(rank, rank + 1)), folder / f"routed-{rank}.pt")


def run_indexed(folder, rank):
    """Rank 0 writes shards of which each rank reads every third; the fourth is no tar."""
    if rank == 0:
        for k in range(3):
            write_shard(folder / "shards" / f"{k}.tar", [0, 1])
        (folder / "shards" / "3.tar").write_bytes(b"no")
    dist.barrier()
    shards, bad = index_shards([str(folder / "shards" / f"{k}.tar") for k in range(4)])
    (folder / f"indexed-{rank}").write_text(json.dumps([[Path(s.url).name for s in shards], bad]))


def run_resumed(folder, rank):
    trainer = make_trainer(folder / "straight")
    evaluation = trainer.fit()
    state = {"model": trainer.model.state_dict(), "auxiliary": trainer.auxiliary.state_dict()}
    torch.save([state, dataclasses.asdict(evaluation)], folder / f"straight-{rank}.pt")
    try:
        make_trainer(folder / "interrupted", loader=stop_before(7)).fit()
    except KeyboardInterrupt:
        if rank == 0:
            shutil.copytree(folder / "interrupted", folder / "behind", symlinks=True)
        dist.barrier()
        make_trainer(folder / "interrupted").fit(resume=True)


def run_divided(folder, rank):
    """The ranks wish different things, then one of them sees an older checkpoint, as by a slow file server."""
    evaluation = make_trainer(folder / "straight").fit(resume=rank == 0)
    assert evaluation == make_trainer(folder / "straight").fit(resume=True)
    try:
        make_trainer(folder / ("behind" if rank == 1 else "straight")).fit(resume=True)
    except ValueError as e:
        (folder / f"divided-{rank}").write_text(str(e))


def run_terminated(folder, rank):
    """SIGTERM comes to one rank, at the last step of an epoch, and later to another in the middle of one."""
    for to, step in ((1, 4), (0, 5)):

        def terminate(k, to=to, step=step):
            if k == step - 1 and rank == to:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            make_trainer(folder / "terminated", loader=hooked(terminate)).fit(resume=step == 5)
        except SystemExit as e:
            (folder / f"terminated-{step}-{rank}").write_text(json.dumps([e.code, load_step(folder, rank)]))
    make_trainer(folder / "terminated").fit(resume=True)


def load_step(folder, rank):
    dist.barrier()  # rank 0 has written
    return load_state(folder / "terminated" / "last")["step"]


def run_not_finite(folder, rank):
    term, calls = losses.activation_loss, []

    def broken(*args):
        calls.append(args)
        return term(*args) * (math.nan if len(calls) == 5 and rank == 1 else 1)

    losses.activation_loss = broken
    try:
        make_trainer(folder / "nan", log_every=1).fit()
    except FloatingPointError as e:
        (folder / f"nan-{rank}").write_text(str(e))
    losses.activation_loss = term


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder in which the ranks have done all of the above."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(folder)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, folder, str(r)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(RANKS)
    ]
    try:
        errors = [p.communicate(timeout=120)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * RANKS, "\n".join(errors)
    assert "SIGTERM: saved at step 4 in" in errors[0]
    assert not any("SIGTERM" in error for error in errors[1:])
    return folder


def test_ranks_equal_one_process(ranks, tmp_path):
    run_equal(tmp_path)
    for run in ("hinge-False", "hinge-True"):
        alone, together = ([line for line in log_of(f / run)] for f in (tmp_path, ranks))
        for a, b in zip(alone, together, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"kind", "train", "test"}:
                assert a[name] == pytest.approx(b[name], rel=1e-4), (run, a["step"], name)
        *_, a = alone
        *_, b = together
        assert a["train"]["rates"] == b["train"]["rates"]
        assert 0 < sum(a["train"]["rates"]) < 9
        assert a["train"]["accuracy"] == b["train"]["accuracy"]
        start = noiseless(tmp_path / "start").model.state_dict()
        alone, together = (load_weights(f / run / "last") for f in (tmp_path, ranks))
        for name, weight in alone.items():
            # Within a thousandth of what the two steps changed, and rounding (all there is of a bias before BatchNorm).
            moved = (weight.double() - start[name]).norm()
            error = (weight.double() - together[name]).norm()
            assert error <= 1e-3 * moved + 1e-6 * (1 + weight.double().norm()), (run, name)


def test_every_rank_holds_the_same(ranks):
    (state, evaluation), *others = (torch.load(ranks / f"straight-{r}.pt") for r in range(RANKS))
    assert equal(others, [[state, evaluation]] * (RANKS - 1))
    model = spnet.load_model(ranks / "straight" / "last")
    assert equal(state["model"], dict(model.state_dict()))


def test_sharded_evaluation_is_that_of_the_whole_set(ranks):
    expected = evaluated()
    loss = expected.pop("loss")
    assert len(expected["decisions"].unique(dim=0)) > 2
    for rank in range(RANKS):
        got = torch.load(ranks / f"evaluation-{rank}.pt")
        assert got.pop("loss") == pytest.approx(loss, rel=1e-5)
        assert equal(got, expected)


def test_one_sample_per_rank_is_normalised_by_all(ranks):
    together = torch.cat([torch.load(ranks / f"routed-{rank}.pt") for rank in range(RANKS)])
    torch.testing.assert_close(together, routed())


def test_every_rank_knows_all_shards(ranks):
    pytest.importorskip("webdataset")
    assert [json.loads((ranks / f"indexed-{rank}").read_text()) for rank in range(RANKS)] == [
        [["0.tar", "1.tar", "2.tar"], bad] for bad in (1, 0, 0)
    ]


def test_resume(ranks):
    assert_same_run(ranks / "straight", ranks / "interrupted")


def test_ranks_that_read_several_checkpoints(ranks):
    names = [(ranks / run / "last").resolve().name for run in ("straight", "behind", "straight")]
    expected = ", ".join(f"{name} at step {step}" for name, step in zip(names, (8, 6, 8), strict=True))
    for rank in range(RANKS):
        got = (ranks / f"divided-{rank}").read_text()
        assert got == f"resume: expected one checkpoint for all ranks, got {expected}"


@pytest.mark.parametrize("step", [4, 5])
def test_sigterm_to_one_rank_stops_all_at_the_same_step(ranks, step):
    for rank in range(RANKS):
        assert json.loads((ranks / f"terminated-{step}-{rank}").read_text()) == [0, step]
    assert_same_run(ranks / "straight", ranks / "terminated")


def test_term_that_is_not_finite_on_one_rank(ranks):
    for rank in range(RANKS):
        assert (ranks / f"nan-{rank}").read_text() == "act: nan by step 5; the checkpoint before it stays"
    assert_stays_at(ranks / "nan", 4)


# The command, with a rank 1 that kills itself before the third batch of the first attempt.
COMMAND = """
import os, runpy, signal
from spnet.training.loaders import Loader

rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
augmented = Loader._augmented

def noted(self, images, epoch, batch, *args):
    if (rank, attempt, batch) == ("1", "0", 2):
        os.kill(os.getpid(), signal.SIGKILL)
    with open(f"batches-{attempt}-{rank}", "a") as file:
        file.write(f"{batch} of {len(images)}\\n")
    return augmented(self, images, epoch, batch, *args)

Loader._augmented = noted
runpy.run_module("spnet", run_name="__main__")
"""


def test_torchrun_restarts_and_resumes_after_the_death_of_a_rank(tmp_path):
    write_fashion_mnist(tmp_path, "train", 64)
    write_fashion_mnist(tmp_path, "test", 32)
    (tmp_path / "command.py").write_text(COMMAND)

    def torchrun(ranks, command):
        command = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} --max-restarts 1 {command} train"
        command += " --data-root . --data fashion-mnist --model resnet20_cifar --batch-size 16 --epochs 1"
        command = [sys.executable, *command.split(), "--checkpoint-every", "1", "--out", "run"]
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)

    done = torchrun(2, "command.py")
    assert done.returncode == 0, done.stderr
    assert "Error: rank 0: lost another rank, whose own message says why; the last checkpoint stays" in done.stderr
    assert done.stdout.count("32 samples: accuracy") == 1
    for rank in range(2):
        assert (tmp_path / f"batches-0-{rank}").read_text().startswith("0 of 8\n1 of 8\n")
        assert (tmp_path / f"batches-1-{rank}").read_text() == "2 of 8\n3 of 8\n"
    assert load_state(tmp_path / "run" / "last")["step"] == 4
    # The second attempt of another job is as little meant to go on with this run as the first.
    done = torchrun(1, "-m spnet")
    assert done.returncode == 1
    assert done.stderr.count("Error: out: run holds a run already") == 2
    assert "accuracy" not in done.stdout


# A rank of a job on GPUs, with NCCL faked: to leave it hangs, by its own call and at the interpreter's exit.
NCCL = """
import atexit, sys, time
import torch, torch.distributed as dist
from spnet.training import distributed

init, destroy = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda backend, **kwargs: print(backend) or init("gloo", **kwargs)
distributed.usable_device = torch.cuda.set_device = lambda device: device
end = sys.argv[1]
if end in ("return", "SystemExit(0)"):
    dist.destroy_process_group = lambda: print("destroyed") or destroy()
else:
    dist.destroy_process_group = lambda: time.sleep(1000)
    atexit.register(time.sleep, 1000)
with distributed.job("cuda"):
    print("joined")
    if end != "return":
        raise eval(end)
"""


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        ("return", 0, ""),
        ("SystemExit(0)", 0, ""),
        ("SystemExit('broken')", 1, "broken"),
        ("ValueError('broken')", 1, "ValueError: broken"),
        ("RuntimeError('gloo: broken')", 1, "ConnectionError: rank 0: lost another rank, whose own message says why"),
    ],
)
def test_rank_on_a_gpu_that_fails_ends_at_once(end, code, says):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "a job"}
    job |= {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    environment = ENVIRONMENT | {name: str(value) for name, value in job.items()}
    done = subprocess.run(
        [sys.executable, "-c", NCCL, end], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # as PyTorch 2.9 does
    assert said == ["cpu:gloo,cuda:nccl", "joined", *([] if code else ["destroyed"])]
    assert says in done.stderr


def test_one_gpu_for_all_ranks(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"^device: expected 'cuda' in a job, .* got 'cuda:1'$"):
        with distributed.job("cuda:1"):
            pass


def test_job_that_cannot_be_joined(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken.getsockname()[1], "TORCHELASTIC_RUN_ID": "a job"}
        ranks = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
        for name, value in (address | ranks).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ConnectionError, match=r"^rank 0: could not join the others, .* stays \(.+\)$"):
            with distributed.job("cpu"):
                pass


@pytest.mark.parametrize("settings", [dict(batch_size=9), dict(batch_size=8, accumulate=3)])
def test_batch_that_ranks_and_micro_batches_do_not_divide(monkeypatch, tmp_path, settings):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    n = settings.get("accumulate", 1)
    with pytest.raises(ValueError, match=f"batch_size: expected a multiple of 2 ranks x {n} micro-batches, got "):
        Trainer(TrainConfig(out=str(tmp_path), **settings))


if __name__ == "__main__":  # one rank: folder, rank
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    run_equal(folder)
    run_evaluation(folder, rank)
    run_one_sample_each(folder, rank)
    if importlib.util.find_spec("webdataset"):
        run_indexed(folder, rank)
    run_resumed(folder, rank)
    run_divided(folder, rank)
    run_terminated(folder, rank)
    run_not_finite(folder, rank)
    dist.destroy_process_group()
