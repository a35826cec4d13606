"""Checkpoints that are whole or absent: each in a folder of its own, made current by one atomic rename."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from spnet.models.files import save_model, write_whole
from spnet.models.resnet import SPNet

STATE = "state.pt"


def save_checkpoint(run: Path, model: SPNet, state: dict[str, Any], *, best: bool = False) -> None:
    """Write ``run/last`` (and ``run/best``): a model folder with the rest of the training state beside it.

    ``last`` and ``best`` are symbolic links. A kill or a full disk at any moment leaves the previous checkpoint
    as it was; what is not linked is swept up by the next save. Where a copy of the run has folders in their place,
    the links take it.

    Args:
        state: tensors, numbers, strings and containers of them: it is read back without unpickling code.

    Raises:
        OSError: a full disk, say.
    """
    store = run / "checkpoints"
    store.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # into a file, torch.save reports a full disk as "unexpected pos"
    torch.save(state, buffer)
    folder = Path(tempfile.mkdtemp(prefix=f"step-{state['step']:08d}-", dir=store))
    try:
        folder.chmod(0o755)
        save_model(model, folder)
        write_whole(folder / STATE, buffer.getbuffer())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # `best` first: after a kill between the two, going on from the `last` before makes the same checkpoint again.
    for name in ("best", "last") if best else ("last",):
        link = store / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(store.name, folder.name))
        if (run / name).is_dir() and not (run / name).is_symlink():
            (run / name).rename(store / f"step-of-copied-{name}")
        os.replace(link, run / name)
    linked = {(run / name).resolve() for name in ("last", "best") if (run / name).exists()}
    for old in store.glob("step-*"):
        if old.resolve() not in linked:
            shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> dict[str, Any]:
    """Read the training state of a checkpoint; never unpickles code.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is truncated or foreign.
    """
    path = folder / STATE
    if not path.exists():
        raise FileNotFoundError(f"resume: no checkpoint at {folder}")
    data = io.BytesIO(path.read_bytes())
    try:
        state = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file fails in any way: a dozen types of error were seen
        raise ValueError(f"resume: {path} is no complete training state ({type(e).__name__})") from e
    if not isinstance(state, dict):
        raise ValueError(f"resume: {path} is no training state but a {type(state).__name__}")
    return state
