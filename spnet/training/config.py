"""Everything that determines a training run."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path

from spnet.models.files import write_whole


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are the CIFAR recipe of SP-Net (ECCV 2022).

    Raises:
        ValueError: a value of another type or outside its range.
    """

    model: str = "resnet110_cifar"  # a name of spnet.list_models()
    data: str = "cifar10"  # fashion-mnist, cifar10, cifar100, imagefolder or webdataset
    data_root: str | None = None  # folder of the data set, or pattern of shards; None looks in the usual places
    out: str = "runs/spnet"  # folder of logs and checkpoints
    static: bool = False  # train the static network: no routers, cross-entropy of the heads only
    init: str | None = None  # model folder or safetensors file of a static network to start from
    epochs: int = 350
    batch_size: int = 128  # images per step, of all ranks and micro-batches together
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (150, 250)  # epochs at whose start the learning rate is multiplied by lr_decay
    lr_decay: float = 0.1
    gradient_clamp: float = 0.5  # each gradient component is clamped to +- this
    target_rate: float = 0.8  # execution rate that L_act asks of every block
    auxiliary_momentum: float = 0.6
    stage_weights: tuple[float, ...] = (0.1, 0.2, 1.0)  # first stage to last
    weight_activation: float = 2.0
    weight_path: float = 0.1
    weight_logits: float = 0.1
    weight_evolution: float = 1e-4
    hinge: bool = False  # L_act counts a block only above its target rate
    evolution: str = "within"  # within or across stages
    pairing: str = "final"  # L_logits: final or equal
    amp: bool = True  # automatic mixed precision where the device has it
    compile: bool = False  # torch.compile of the training forwards
    accumulate: int = 1  # micro-batches per step; BatchNorm and the rates of L_act are those of a micro-batch
    sync_batchnorm: bool = False  # BatchNorm over the samples of all ranks, not of each
    device: str = "cpu"
    seed: int = 0
    log_every: int = 50  # steps
    checkpoint_every: int = 200  # steps; an epoch's end is always a checkpoint
    workers: int = 4  # image-decoding processes of imagefolder and webdataset
    image_size: int = 224  # side of the images of imagefolder and webdataset
    bad_shards: str = "skip"  # skip or raise, where a shard of webdataset cannot be read

    def __post_init__(self):
        for name in ("milestones", "stage_weights"):
            if isinstance(getattr(self, name), list):  # as JSON has them
                object.__setattr__(self, name, tuple(getattr(self, name)))
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            if not _is_a(getattr(self, field.name), hints[field.name]):
                raise ValueError(f"{field.name}: expected {field.type}, got {getattr(self, field.name)!r}")
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
        if self.bad_shards not in ("skip", "raise"):
            raise ValueError(f"bad_shards: expected 'skip' or 'raise', got {self.bad_shards!r}")
        if not self.gradient_clamp > 0:
            raise ValueError(f"gradient_clamp: expected a positive value, got {self.gradient_clamp}")

    @classmethod
    def preset(cls, name: str, **overrides) -> TrainConfig:
        """The recipe "cifar" or "imagenet", with some settings replaced."""
        presets = {"cifar": {}, "imagenet": _IMAGENET}
        if name not in presets:
            raise ValueError(f"preset: expected one of {list(presets)}, got {name!r}")
        return cls(**{**presets[name], **overrides})

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: no JSON, an unknown setting, or a value of another type or outside its range.
        """
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path}: not the settings of a training run ({e})") from e

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    def differences(self, other: TrainConfig) -> list[str]:
        """Settings, by name, that would make a resumed run another run."""
        free = {"out", "data_root", "workers"}
        a, b = dataclasses.asdict(self), dataclasses.asdict(other)
        return [f"{name}: {a[name]!r} is not {b[name]!r}" for name in a if name not in free and a[name] != b[name]]


def _is_a(value: object, hint: typing.Any) -> bool:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return type(value) is tuple and all(_is_a(v, arguments[0]) for v in value)
    if arguments:
        return any(_is_a(value, h) for h in arguments)
    return type(value) is hint or (hint is float and type(value) is int)


_IMAGENET = dict(
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
)
