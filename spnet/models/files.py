"""Model folders: ``model.safetensors`` beside ``config.json``; no pickle, no code."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spnet.models.registry import create_model
from spnet.models.resnet import SPNet
from spnet.routing import unwrapped

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file wholly or not at all, flushed to the disk; of several writers at once, the last one's stays.

    Raises:
        OSError: it cannot be written (a full disk, say); what was there before stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _open_alone(partial) as f:
            try:
                f.truncate(0)
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except OSError as e:
        raise OSError(f"{path}: not written, what was there before stays ({e})") from e


def _open_alone(path: Path) -> BinaryIO:
    """Open a file, leftover of a kill or new, that no other writer has open until it is closed."""
    while True:
        f = open(path, "ab")
        fcntl.flock(f, fcntl.LOCK_EX)
        # The writer that this one waited for has moved the file to its place: then a new one is opened.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), path.stat()):
                return f
        f.close()


def save_model(model: SPNet, folder: str | Path) -> None:
    """Write a model made by :func:`spnet.create_model` into a folder, flushed to the disk.

    Args:
        model: also inside the wrapper of torch.compile; its ``config`` and, where set, ``data`` go along: lists of
            numbers "mean" and "std", of the pixels, and where they are known "class_names".
        folder: made if it is missing; each of its two files is replaced wholly or not at all.

    Raises:
        TypeError: model is no module, or its config or data holds what JSON does not.
        ValueError: a model that create_model did not make, or data without mean and std.
        OSError: a full disk, say.
    """
    model = unwrapped(model)
    if not isinstance(model, SPNet) or model.config is None:
        raise ValueError(
            "model: expected one made by create_model, whose config says how to build it again; "
            "of another network keep the state_dict, or save the plan: spnet.lower(model).save(path)"
        )
    description = json.dumps({"model": model.config, "data": _checked_data(model.data)}, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    write_whole(folder / WEIGHTS, save(weights, {"format": "pt"}))  # the framework, as readers of the Hub expect
    write_whole(folder / CONFIG, description.encode())


def _checked_data(data: Any) -> dict | None:
    """What is recorded of the training data, if anything, with the pixels' mean and std."""

    def fits(values: Any, kind: type) -> bool:
        return isinstance(values, list | tuple) and all(isinstance(v, kind) for v in values)

    if data is None or (
        isinstance(data, dict)
        and all(fits(data.get(key), Real) for key in ("mean", "std"))
        and fits(data.get("class_names", []), str)
    ):
        return data
    raise ValueError(f"data: expected lists of numbers 'mean' and 'std', of strings 'class_names', got {data!r:.200}")


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file, or the one in a model folder.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the file is truncated or of another format.
    """
    folder = Path(path)
    path = folder / WEIGHTS if folder.is_dir() else folder
    if not path.exists():
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{WEIGHTS}"))  # of a training run: best and last
        hint = f", but in {' and '.join(inside[:2])}" if inside else ""
        raise FileNotFoundError(f"path: no weights at {path}{hint}")
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"path: {path} is no complete safetensors file ({e})") from e


def load_model(folder: str | Path) -> SPNet:
    """Read a model folder: the network in evaluation mode, float32, on the CPU.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a truncated or foreign file, or weights that do not fit the configuration.
    """
    folder = Path(folder)
    weights = load_weights(folder)
    try:
        described = json.loads((folder / CONFIG).read_text())
        with torch.device("cpu"):  # whatever the defaults of device and dtype are
            model = create_model(**described["model"]).float()
        model.load_state_dict(weights)
        model.data = _checked_data(described.get("data"))
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        why = f"no {e} in {CONFIG}" if isinstance(e, KeyError) else e
        raise ValueError(f"folder: {folder} does not describe its weights ({why})") from e
    return model.eval()


def load_initial_weights(model: SPNet, path: str | Path) -> None:
    """Start a routed network from the weights of one of the same depth; of a static one, its routers stay as they are.

    Args:
        model: changed in place.
        path: model folder or safetensors file of the other network; where it has routers, they are taken too.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a truncated file, or weights of another network.
    """
    weights = load_weights(path)
    own = model.state_dict()
    routed = any(".router." in name for name in weights)
    expected = {name for name in own if routed or ".router." not in name}
    wrong = sorted(expected ^ weights.keys())
    wrong += [n for n in expected & weights.keys() if weights[n].shape != own[n].shape]
    if wrong:
        raise ValueError(f"path: {path} holds another network: {len(wrong)} keys differ, such as {wrong[0]!r}")
    model.load_state_dict({**own, **weights})
