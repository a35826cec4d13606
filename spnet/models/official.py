"""Weights saved by the official SP-Net code and by ConvNet-AIG, read into :class:`spnet.SPNet`.

Both keep flat names (``layer1.0.conv1.weight``, ``layer1.0.fc1bn.bias``), order a router's logits (skip, execute)
and pad the channels of option A evenly on both sides, as this package does. So reading is renaming; everything
else here is to find out which network the names and shapes belong to, and to say where they belong to none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spnet.models.files import load_weights
from spnet.models.registry import create_model, list_models
from spnet.models.resnet import SPNet

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def load_official(path_or_state_dict: str | os.PathLike | Mapping) -> SPNet:
    """Read weights of the official SP-Net code or of ConvNet-AIG: the network in evaluation mode, float32, on the CPU.

    Depth, widths, classes, input channels, kind of body and shortcut and the routers' width follow from the names
    and shapes. Accepted are heads called ``linear`` or ``fc``, shortcuts called ``shortcut`` or ``downsample``,
    routers of linear layers or 1x1 convolutions, names under ``module.`` (DataParallel) or ``_orig_mod.``
    (torch.compile), and a checkpoint whose ``"state_dict"`` holds the weights; its other entries (epoch, optimiser) are
    ignored. A file is read without running any code in it.

    ``model(x)`` gives the original's main logits for the original's decisions, which are taken without noise, as
    SP-Net does in evaluation; ConvNet-AIG's own script adds Gumbel noise there too.

    Training only: earlier stage heads (``fc1``, ...) and alignment layers (``cc1``, ...) that the file lacks, as
    all of ConvNet-AIG do, keep fresh random weights.

    ``model.config`` is set where a name of :func:`spnet.list_models` describes the network. Another depth or width
    runs like any other, but its ``config`` stays None and ``save_model`` refuses it: keep the original file.

    Args:
        path_or_state_dict: a file written by ``torch.save``, a ``.safetensors`` file, or what such a file holds.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a truncated or foreign file, one that holds Python objects beside tensors, or weights of another
            network; every key is named that has no place, is missing or does not fit.
    """
    if isinstance(path_or_state_dict, Mapping):
        source, checkpoint = "state_dict", path_or_state_dict
    else:
        path = Path(path_or_state_dict)
        source, checkpoint = f"path: {path}", _read(path)
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f"{source}: expected a state dict, got a {type(checkpoint).__name__}")

    prefix, weights, foreign = _unwrap(checkpoint)
    with torch.device("cpu"):  # whatever the defaults of device and dtype are
        model = _build(weights).float()
    own = model.state_dict()
    names = _official_names(model, weights)
    missing = [n for ours, n in names.items() if n not in weights and not _optional(ours, n, weights)]
    found = {ours: weights[n] for ours, n in names.items() if n in weights}
    misfits = [
        f"{prefix}{names[ours]} (expected {_describe(own[ours])}, got {_describe(t)})"
        for ours, t in found.items()
        if t.shape != own[ours].shape or t.is_floating_point() != own[ours].is_floating_point()
    ]
    unplaced = [*foreign, *(prefix + n for n in weights.keys() - names.values())]
    problems = {
        "could not place": sorted(unplaced),
        "missing": sorted(prefix + n for n in missing),
        "of another shape": sorted(misfits),
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{source}: no weights of a network of SP-Net or ConvNet-AIG; {told}")
    model.load_state_dict({**own, **found})
    return model.eval()


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return load_weights(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no file at {path}")
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as e:  # a damaged pickle raises nearly anything, also KeyError and MemoryError
            refused = re.search(r"Unsupported global: GLOBAL (\S+) was", str(e))
            if refused is None:
                raise ValueError(f"path: {path} is truncated or no file of tensors ({type(e).__name__})") from e
            raise ValueError(
                f"path: {path} holds Python objects beside its tensors ({refused[1]}), and reading those can run code. "
                "If you trust its origin, write its tensors alone to a new file, once: "
                f"torch.save({{'state_dict': torch.load({str(path)!r}, map_location='cpu', weights_only=False)"
                "['state_dict']}, 'weights.pth')"
            ) from e


def _unwrap(checkpoint: Mapping) -> tuple[str, dict[str, Tensor], list[str]]:
    """Take off the wrappers: (the prefix that all names had, the tensors by bare name, keys of anything else)."""
    state = checkpoint.get("state_dict")
    state = state if isinstance(state, Mapping) else checkpoint
    tensors = {k: t for k, t in state.items() if isinstance(k, str) and isinstance(t, Tensor)}
    foreign = [str(k) for k in state if k not in tensors]
    prefix = ""
    while tensors and (wrapper := next((w for w in _WRAPPERS if all(k.startswith(prefix + w) for k in tensors)), "")):
        prefix += wrapper
    weights = {k.removeprefix(prefix): t for k, t in tensors.items()}
    for k, t in weights.items():
        # A router of 1x1 convolutions is its linear layers with two axes more.
        if re.fullmatch(r"layer\d+\.\d+\.fc[12]\.weight", k) and t.dim() == 4 and t.shape[2:] == (1, 1):
            weights[k] = t.flatten(1)
    return prefix, weights, foreign


def _build(weights: Mapping[str, Tensor]) -> SPNet:
    """The network, with fresh weights, that the names and shapes ask for.

    What they leave open takes its usual value, so that one comparison at the end can name all that is wrong.
    """
    blocks = {tuple(map(int, m.groups())) for k in weights if (m := re.match(r"layer([1-9]\d*)\.(\d+)\.", k))}

    def size(usual: int, *candidates: tuple[str, int]) -> int:
        # A second tensor tells the same size: one that is missing or wrong does not make the others look wrong.
        found = (
            weights[name].shape[axis] for name, axis in candidates if name in weights and weights[name].dim() > axis
        )
        return next(filter(None, found), usual)

    def count(s: int) -> int:
        n = 0
        while (s, n) in blocks:
            n += 1
        return n

    stage_blocks: list[int] = []
    while n := count(len(stage_blocks) + 1):
        stage_blocks.append(n)
    stage_blocks = stage_blocks or [1]
    widths = [
        size(16 << s, (f"layer{s + 1}.0.bn1.weight", 0), (f"layer{s + 1}.0.conv1.weight", 0))
        for s in range(len(stage_blocks))
    ]
    bottleneck = "layer1.0.conv3.weight" in weights
    imagenet = size(7 if len(stage_blocks) == 4 else 3, ("conv1.weight", 2)) == 7
    # Neither code base pads a bottleneck: without parameters those are missing.
    projection = bottleneck or any(re.match(r"layer\d+\.\d+\.(shortcut|downsample)\.", k) for k in weights)
    head = _main_head(weights)
    options = {
        "num_classes": size(10, (f"{head}.bias", 0), (f"{head}.weight", 0)),
        "in_channels": size(3, ("conv1.weight", 1)),
        "router_width": size(128, ("layer1.0.fc1.bias", 0), ("layer1.0.fc1.weight", 0)),
        "shortcut": "projection" if projection else "pad",
    }
    side = 224 if imagenet else 32
    model = SPNet(stage_blocks, widths, bottleneck=bottleneck, imagenet=imagenet, input_size=side, **options)

    depth = 2 + sum(stage_blocks) * (3 if bottleneck else 2)
    name = f"resnet{depth}" + ("" if imagenet else "_cifar")
    if name in list_models():
        with torch.device("meta"):
            named = create_model(name, **options).state_dict()
        if {k: t.shape for k, t in named.items()} == {k: t.shape for k, t in model.state_dict().items()}:
            model.config = {"name": name, **options}
    return model


def _main_head(weights: Mapping[str, Tensor]) -> str:
    return "fc" if "fc.weight" in weights else "linear"


def _official_names(model: SPNet, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The official name of every entry of the model's state dict."""
    shortcut = "downsample" if any(".downsample." in k for k in weights) else "shortcut"
    main = len(model.heads) - 1

    def layer(kind: str, i: str) -> str:
        return f"{kind}{int(i) // 3 + 1}"  # a body is (convolution, BatchNorm, ReLU) two or three times

    def official(name: str) -> str:
        module, leaf = name.rsplit(".", 1)
        if module.startswith("features.stem."):
            return ("conv1." if module.endswith(".0") else "bn1.") + leaf
        if m := re.fullmatch(r"heads\.(\d+)", module):
            return f"{_main_head(weights) if int(m[1]) == main else f'fc{int(m[1]) + 1}'}.{leaf}"
        if m := re.fullmatch(r"align\.(\d+)", module):
            return f"cc{int(m[1]) + 1}.{leaf}"
        stage, block, part, rest = re.fullmatch(r"features\.stage(\d+)\.(\d+)\.(\w+)\.(\w+)", module).groups()
        if part == "body":
            rest = layer("bn" if int(rest) % 3 else "conv", rest)
        elif part == "shortcut":
            rest = f"{shortcut}.{rest}"
        elif rest == "bn":
            rest = "fc1bn"
        return f"layer{stage}.{block}.{rest}.{leaf}"

    return {name: official(name) for name in model.state_dict()}


def _optional(ours: str, official: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether the entry may be absent: a counter that old PyTorch did not have, or a layer for training only."""
    if official.endswith("num_batches_tracked"):
        return True
    layer = official.rsplit(".", 1)[0]
    whole = f"{layer}.weight" not in weights and f"{layer}.bias" not in weights
    return whole and (ours.startswith("align.") or (ours.startswith("heads.") and layer != _main_head(weights)))


def _describe(t: Tensor) -> str:
    return f"{'float' if t.is_floating_point() else t.dtype} {list(t.shape)}"
