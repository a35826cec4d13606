"""Everything that determines a training run."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spnet.models.files import write_whole
from spnet.training.losses import EVOLUTION_FORMS, PAIRINGS, check_choice
from spnet.training.shards import BAD_SHARDS


def _setting(default: Any, about: str, choices: Sequence[str] = ()) -> Any:
    """A field with the line that `spnet train --help` shows, and the values that it may have."""
    return dataclasses.field(default=default, metadata={"about": about, "choices": tuple(choices)})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are the CIFAR recipe of SP-Net (ECCV 2022).

    ``spnet train --help`` has a line about each of them, and its value in either recipe.

    Raises:
        ValueError: a value of another type or outside its range.
    """

    model: str = _setting("resnet110_cifar", "Network, a name that `spnet info` lists.")
    data: str = _setting("cifar10", "Data set.")
    data_root: str | None = _setting(None, "Folder of the data set, or pattern of shards; else the usual places.")
    out: str = _setting("runs/spnet", "Folder of logs and checkpoints.")
    static: bool = _setting(False, "The static network: no routers, cross-entropy of the heads only.")
    init: str | None = _setting(None, "Model folder or safetensors file of a network to start from.")
    epochs: int = _setting(350, "Times that every training image is seen.")
    batch_size: int = _setting(128, "Images per step, of all ranks and micro-batches together.")
    lr: float = _setting(0.1, "Learning rate of SGD at the start.")
    momentum: float = _setting(0.9, "Momentum of SGD.")
    weight_decay: float = _setting(1e-4, "Weight decay of SGD.")
    milestones: tuple[int, ...] = _setting((150, 250), "Epochs at whose start lr is multiplied by lr-decay.")
    lr_decay: float = _setting(0.1, "Factor of lr at every milestone.")
    gradient_clamp: float = _setting(0.5, "Each component of the gradient is clamped to +- this.")
    target_rate: float = _setting(0.8, "Execution rate, 0 to 1, that L_act asks of every block.")
    auxiliary_momentum: float = _setting(0.6, "m of the auxiliary module: p_aux = m p_aux + (1 - m) p.")
    stage_weights: tuple[float, ...] = _setting((0.1, 0.2, 1.0), "Of L_cls and L_logits, first stage to last.")
    weight_activation: float = _setting(2.0, "Weight of L_act.")
    weight_path: float = _setting(0.1, "Weight of L_path, executing path regularization.")
    weight_logits: float = _setting(0.1, "Weight of L_logits.")
    weight_evolution: float = _setting(1e-4, "Weight of L_evo, feature evolution regularization.")
    hinge: bool = _setting(False, "L_act counts a block only above its target rate.")
    evolution: str = _setting("within", "L_evo of the blocks of a stage, or of the stages.", EVOLUTION_FORMS)
    pairing: str = _setting("final", "L_logits follows the auxiliary module's last logits, or the stage's.", PAIRINGS)
    amp: bool = _setting(True, "Automatic mixed precision where the device has it.")
    compile: bool = _setting(False, "torch.compile of the training forwards.")
    accumulate: int = _setting(1, "Micro-batches per step, each with its own BatchNorm statistics and rates.")
    sync_batchnorm: bool = _setting(False, "BatchNorm over the samples of all ranks, not of each.")
    device: str = _setting("cpu", "cpu, or cuda; with torchrun every rank takes a GPU of its own.")
    seed: int = _setting(0, "Of weights, order, augmentation and routers.")
    log_every: int = _setting(50, "Steps between two lines of the log.")
    checkpoint_every: int = _setting(200, "Steps between two checkpoints; an epoch's end is always one.")
    workers: int = _setting(4, "Image-decoding processes of imagefolder and webdataset.")
    image_size: int = _setting(224, "Side of the images of imagefolder and webdataset, in pixels.")
    bad_shards: str = _setting("skip", "Where a shard of webdataset cannot be read.", BAD_SHARDS)

    def __post_init__(self):
        for name in ("milestones", "stage_weights"):
            if isinstance(getattr(self, name), list):  # as JSON has them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            if not _is_a(getattr(self, field.name), hints[field.name]):
                raise ValueError(f"{field.name}: expected {field.type}, got {getattr(self, field.name)!r}")
            if field.metadata["choices"]:
                check_choice(field.name, getattr(self, field.name), field.metadata["choices"])
        for name in ("epochs", "batch_size", "accumulate", "log_every", "checkpoint_every", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("target_rate", "auxiliary_momentum", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a value in [0, 1], got {getattr(self, name)}")
        weights = ("stage_weights", "weight_activation", "weight_path", "weight_logits", "weight_evolution")
        for name in ("lr", "lr_decay", "weight_decay", "workers", *weights):
            value = getattr(self, name)
            # Infinity or NaN would show as a loss that is not finite, many steps later and by another name.
            if not all(0 <= v < math.inf for v in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name}: expected at least 0 and finite, got {value}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed: expected -2**63 to 2**64 - 1, got {self.seed}")
        if any(epoch < 0 for epoch in self.milestones):
            raise ValueError(f"milestones: expected epochs, 0 or later, got {self.milestones}")
        if not self.gradient_clamp > 0:
            raise ValueError(f"gradient_clamp: expected a positive value, got {self.gradient_clamp}")

    @classmethod
    def preset(cls, name: str, **overrides) -> TrainConfig:
        """The recipe "cifar" or "imagenet", with some settings replaced."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {list(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read what :meth:`save` wrote, or an editor since: UTF-8, also with a mark of that and with Windows line ends.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: no JSON, an unknown setting, or a value of another type or outside its range.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8-sig")))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}: not the settings of a training run ({e})") from e

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    def differences(self, other: TrainConfig) -> list[str]:
        """Settings, by name, that would make a resumed run another run."""
        free = {"out", "data_root", "workers", "init"}
        a, b = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{name}: {a[name]!r} is not {b[name]!r}" for name in a if name not in free and a[name] != b[name]]


def _is_a(value: object, hint: typing.Any) -> bool:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return type(value) is tuple and all(_is_a(v, arguments[0]) for v in value)
    if arguments:
        return any(_is_a(value, h) for h in arguments)
    return type(value) is hint or (hint is float and type(value) is int)


# What differs from the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar": {},
    "imagenet": dict(
        model="resnet50",
        data="imagefolder",
        epochs=150,
        batch_size=256,
        lr=0.05,
        milestones=(50, 100),
        target_rate=0.7,
        auxiliary_momentum=0.9,
        stage_weights=(0.01, 0.1, 0.2, 1.0),
        weight_evolution=0.1,
        hinge=True,
        evolution="across",
    ),
}
