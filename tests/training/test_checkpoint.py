"""Checkpoints: whole or absent, whatever happens while one is written; and never unpickled."""

import functools
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import spnet
from spnet.models.files import CONFIG, WEIGHTS, load_weights
from spnet.training.checkpoint import STATE, load_state, save_checkpoint
from tests.conftest import Bomb


@functools.cache
def network():
    return spnet.create_model("resnet20_cifar", in_channels=1, num_classes=2)


def marked_checkpoint(run, step, best=True, size=1000):
    """A checkpoint all of whose numbers are its step; its state holds a tensor of some size."""
    with torch.no_grad():
        for t in network().state_dict().values():
            t.fill_(step)
    save_checkpoint(run, network(), {"step": step, "mark": torch.full((size,), float(step))}, best=best)


def step_of(folder):
    """The step of a checkpoint that is whole."""
    weights, state = load_weights(folder), load_state(folder)
    assert weights.keys() == network().state_dict().keys()
    assert {t.flatten()[i].item() for t in weights.values() for i in (0, -1)} == {state["step"]}
    assert state["mark"].unique().tolist() == [state["step"]]
    assert json.loads((folder / CONFIG).read_text())["model"] == network().config
    return state["step"]


def test_round_trip(tmp_path):
    model = spnet.create_model("resnet20_cifar")
    state = {"step": 3, "sums": {"a": torch.arange(3.0)}, "rates": [0.5, None], "rng": torch.get_rng_state()}
    save_checkpoint(tmp_path / "run", model, state)
    loaded = load_state(tmp_path / "run" / "last")
    assert loaded["step"] == 3
    assert loaded["rates"] == [0.5, None]
    assert torch.equal(loaded["sums"]["a"], torch.arange(3.0))
    assert torch.equal(loaded["rng"], state["rng"])
    weights = spnet.load_model(tmp_path / "run" / "last").state_dict()
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())


def test_links_and_pruning(tmp_path):
    run = tmp_path / "run"
    for step, best, expected in [
        (1, True, {1}),
        (2, False, {1, 2}),
        (3, False, {1, 3}),
        (4, True, {4}),
        (5, False, {4, 5}),
    ]:
        marked_checkpoint(run, step, best)
        assert {int(p.name.split("-")[1]) for p in (run / "checkpoints").iterdir()} == expected
        assert (step_of(run / "last"), step_of(run / "best")) == (step, min(expected))
    assert (run / "last").is_symlink()
    run.rename(tmp_path / "moved")  # the links are relative
    assert step_of(tmp_path / "moved" / "last") == 5
    assert (tmp_path / "moved" / "last").stat().st_mode & 0o777 == 0o755


def test_in_a_copy_that_followed_the_links(tmp_path):
    marked_checkpoint(tmp_path / "run", 1)
    marked_checkpoint(tmp_path / "run", 2, best=False)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    marked_checkpoint(tmp_path / "copy", 3, best=False)
    assert (step_of(tmp_path / "copy" / "last"), step_of(tmp_path / "copy" / "best")) == (3, 1)
    marked_checkpoint(tmp_path / "copy", 4)
    assert (step_of(tmp_path / "copy" / "last"), step_of(tmp_path / "copy" / "best")) == (4, 4)
    assert len(list((tmp_path / "copy" / "checkpoints").iterdir())) == 1


def test_relative_folder(tmp_path, monkeypatch):
    """Since Python 3.12 the temporary folder has an absolute name even so."""
    monkeypatch.chdir(tmp_path)
    mkdtemp = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **options: os.path.abspath(mkdtemp(**options)))
    marked_checkpoint(Path("run"), 1)
    assert step_of(Path("run", "last")) == 1


def test_missing_state(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: no checkpoint at .*last"):
        load_state(tmp_path / "last")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, -1])
def test_truncated_state(tmp_path, kept):
    marked_checkpoint(tmp_path, 1)
    path = tmp_path / "last" / STATE
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept >= 0 else -1])
    with pytest.raises(ValueError, match="resume: .*state.pt is no complete training state"):
        load_state(tmp_path / "last")


def test_foreign_state_is_not_executed(tmp_path):
    mark = tmp_path / "executed"
    files = {"text": b"no state", "zeros": bytes(500), "pickle": pickle.dumps({"step": Bomb(mark)}, 2)}
    for name, zipped in (("zip", True), ("legacy", False)):
        torch.save({"step": 1, "x": Bomb(mark)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        files[name] = (tmp_path / name).read_bytes()
    marked_checkpoint(tmp_path, 1)
    files["weights"] = (tmp_path / "last" / WEIGHTS).read_bytes()
    for data in files.values():
        (tmp_path / "last" / STATE).write_bytes(data)
        with pytest.raises(ValueError, match="resume: .*state.pt is no complete training state"):
            load_state(tmp_path / "last")
    assert not mark.exists()
    torch.load(tmp_path / "zip", weights_only=False)  # the bomb does go off where it is unpickled
    assert mark.exists()


def test_state_of_another_kind(tmp_path):
    for foreign in (torch.zeros(3), [1, 2]):
        torch.save(foreign, tmp_path / STATE)
        with pytest.raises(ValueError, match=f"state.pt is no training state but a {type(foreign).__name__}"):
            load_state(tmp_path)


# ---------------------------------------------------------------------------- what happens while one is written
#
# This file is also the program that is killed: it forks a child for every accident.


def _child(accident):
    """Run a function in a forked child; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 1
        try:
            code = accident() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill_before_every_file_operation(run):
    """Kills in the order of the operations, until one save finishes. Steps of (last, best) after each."""
    operations = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "shutil.rmtree"}
    after = []
    for n in itertools.count():
        left = [n]

        def hook(event, args):
            if event in operations and (event != "open" or str(run) in str(args[0])):
                if left[0] == 0:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1  # noqa: B023

        def killed():
            sys.addaudithook(hook)
            marked_checkpoint(run, n + 2)  # noqa: B023

        status = _child(killed)
        after.append((step_of(run / "last"), step_of(run / "best")))
        if status == 0:
            return after
        assert status == -signal.SIGKILL


def _out_of_room(run, limit, *, deadly):
    """A file may not grow beyond a limit: with the signal a kill in the middle of a write, without it a full disk."""

    def accident():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            marked_checkpoint(run, 99, size=500_000)
        except OSError as e:
            return 7 if "not written" in str(e) and "File too large" in str(e) else 8

    return _child(accident)


def _main(run):
    torch.set_num_threads(1)
    network()  # once, and not in every child
    marked_checkpoint(run, 1)
    report = {"kills": _kill_before_every_file_operation(run), "room": []}
    report["folders"] = len(list((run / "checkpoints").iterdir()))
    for limit in (100, 300_000, 1_800_000):  # in the header, in the weights of 1.1 MB, in the state of 2 MB
        for deadly in (False, True):
            before = step_of(run / "last")
            shutil.copytree(run, run.with_name("copy"), symlinks=True)
            status = _out_of_room(run.with_name("copy"), limit, deadly=deadly)
            copy = run.with_name("copy")
            folders = len(list((copy / "checkpoints").iterdir()))
            whole = (step_of(copy / "last"), step_of(copy / "best")) == (before, before)
            marked_checkpoint(copy, 100)  # and the next one sweeps up
            swept = step_of(copy / "last") == 100 and len(list((copy / "checkpoints").iterdir())) == 1
            report["room"].append([deadly, status, whole, folders, swept])
            shutil.rmtree(copy)
    print(json.dumps(report))


@pytest.fixture(scope="module")
def accidents(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    run = tmp_path_factory.mktemp("accidents") / "run"
    path = os.pathsep.join([str(Path(spnet.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, run], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kill_between_any_two_file_operations(accidents):
    steps = accidents["kills"]
    assert len(steps) >= 15
    before = (1, 1)
    for n, (last, best) in enumerate(steps):
        assert last in (before[0], n + 2)
        assert best in (before[1], n + 2)
        assert best == n + 2 or last != n + 2  # the new `last` comes after the new `best`
        before = (last, best)
    assert steps[-1] == [len(steps) + 1] * 2
    assert accidents["folders"] == 1  # the leftovers of all the kills are swept up


def test_full_disk_and_kill_in_the_middle_of_a_write(accidents):
    for deadly, status, whole, folders, swept in accidents["room"]:
        assert status == (-signal.SIGXFSZ if deadly else 7)
        assert whole
        assert folders == (2 if deadly else 1)  # after an error nothing is left, after a kill the next save sweeps up
        assert swept


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
