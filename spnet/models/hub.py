"""The conventions of the Hugging Face Hub: a model folder with a model card, read from a folder or a repository."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spnet.analysis.macs import count_macs, mega
from spnet.models.files import CONFIG, WEIGHTS, load_model, save_model, write_whole
from spnet.models.resnet import SPNet
from spnet.routing import routed_blocks, unwrapped

if TYPE_CHECKING:
    from spnet.analysis.paths import PathStatistics

CARD = "README.md"
_LISTED_CLASSES = 20
_MARKUP = re.compile(r"[\\`*_<\[|]")  # what Markdown would take for emphasis, a tag, a link or another column


def save_pretrained(model: SPNet, folder: str | Path, statistics: PathStatistics | None = None) -> None:
    """See :meth:`spnet.SPNet.save_pretrained`."""
    save_model(model, folder)
    write_whole(Path(folder) / CARD, model_card(model, statistics).encode())


def from_pretrained(folder_or_repo_id: str | Path, revision: str | None = None) -> SPNet:
    """See :meth:`spnet.SPNet.from_pretrained`."""
    folder = Path(folder_or_repo_id)
    if folder.is_dir():
        return load_model(folder)
    repo_id = str(folder_or_repo_id)
    owner, _, name = repo_id.partition("/")
    if not owner.strip(".~") or not name or "/" in name:
        raise FileNotFoundError(f"folder_or_repo_id: {repo_id} is neither a folder nor of the form 'owner/name'")
    if find_spec("huggingface_hub") is None:
        raise ImportError(
            f"folder_or_repo_id: {repo_id} is no folder here, and to read a repository of the Hugging Face Hub "
            "huggingface_hub has to be installed: pip install huggingface_hub"
        )
    from huggingface_hub import snapshot_download

    return load_model(snapshot_download(repo_id, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))


def model_card(model: SPNet, statistics: PathStatistics | None = None) -> str:
    """Markdown that describes a network by what it tells itself, and by the paths of test images through it.

    Args:
        model: routed or static, also inside the wrapper of torch.compile.
        statistics: of :func:`spnet.paths`; without them the card states no accuracy and no execution rates.

    Raises:
        TypeError: model is no module.
        ValueError: a model that create_model did not make.
    """
    model = unwrapped(model)
    if not isinstance(model, SPNet) or model.config is None:
        raise ValueError("model: expected one made by create_model, whose config says what it is called")
    size = model.input_size
    macs = count_macs(copy.deepcopy(model).eval(), (model.in_channels, size, size))
    routed = len(routed_blocks(model))
    blocks = [len(stage) for stage in model.stages]
    what = "each with a router that decides per image whether it is executed" if routed else "without routers"
    shape = f"[B, {model.in_channels}, {size}, {size}]"
    bodies = sum(b.body for b in macs.blocks)
    rows = {
        "input": f"{shape}, float32",  # as from_pretrained reads the network, whatever its weights are kept in
        "pixels": "normalised in training by mean and std that are not recorded",
        "classes": str(model.num_classes),
        "parameters": f"{macs.parameters:,}, stage heads for training included",
        "cost per image": f"{mega(macs.dense)} MMACs ({mega(macs.flops)} MFLOPs, counted as 2 x MACs)",
    }
    if routed:
        rows["cost per image"] += f" with every block executed, {mega(macs.dense - bodies)} MMACs with none"
    if model.data is not None:
        mean, std = (", ".join(f"{v:g}" for v in model.data[key]) for key in ("mean", "std"))
        rows["pixels"] = f"divided by 255, then normalised by mean {mean} and std {std}"
        names = [_MARKUP.sub(r"\\\g<0>", name) for name in model.data.get("class_names", ())]
        listed = ", ".join(names) if len(names) <= _LISTED_CLASSES else f"names in `{CONFIG}`"
        rows["classes"] += f": {listed}" if names else ""
        images = "[N, H, W]" if model.in_channels == 1 else f"[N, H, W, {model.in_channels}]"
        prepare = (
            f"x = spnet.preprocess(model, images)  # uint8 {images}, at most {model.input_size}x{model.input_size}"
        )
    else:
        prepare = f"x = ...  # {shape}"
    run = "logits, paths = spnet.fast_forward(model, x, return_paths=True)" if routed else "logits = model(x)"
    options = "".join(f", {k}={v!r}" for k, v in model.config.items() if k != "name")
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    measured = "No accuracy is stated, as none is recorded with the weights."
    if statistics is not None:
        measured = f"""## Measured

```
{statistics}
```

## Limits

Whatever it is shown, it answers with one of its classes. Accuracy, cost and execution rates hold for images like
those that were measured, in the size and with the pixel statistics above; others may take other paths."""
    return f"""---
library_name: spnet
pipeline_tag: image-classification
tags:
- {"dynamic-inference" if routed else "residual-network"}
---

# {model.config["name"]}

A residual network of {sum(blocks)} blocks in {len(blocks)} stages ({", ".join(map(str, blocks))}), {what}:
`spnet.create_model({model.config["name"]!r}{options})`.

| | |
|---|---|
{table}

{measured}

## Use

```python
import spnet

model = spnet.SPNet.from_pretrained("this folder, or owner/name")
{prepare}
{run}
```
"""
