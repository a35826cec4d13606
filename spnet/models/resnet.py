"""Routed residual networks in the CIFAR and the ImageNet form, with stage heads for training.

Sources: He et al., "Deep residual learning" (CVPR 2016), sections 3.4 and 4.2; SP-Net (ECCV 2022).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spnet.routing import ResidualBlock, RoutedBlock, RoutedSequential, Router

if TYPE_CHECKING:
    from spnet.analysis.paths import PathStatistics


class SPNetOutput(NamedTuple):
    """What a network returns in training mode."""

    stage_logits: tuple[Tensor, ...]  # per stage [B, classes]; the last is the network's output
    router_logits: Tensor  # float32 [B, L, 2] of (skip, execute)
    decisions: Tensor  # float32 [B, L], 0/1 with the straight-through gradient
    features: tuple[Tensor, ...]  # per stage float32 [B, blocks, C]: the pooled output of each block
    stage_features: tuple[Tensor, ...]  # per stage [B, C]: what the stage head reads (ImageNet: aligned widths)


class PadShortcut(nn.Module):
    """Option-A shortcut: every ``stride``-th pixel, channels zero-padded evenly on both sides.

    Source: He et al. (CVPR 2016), section 3.3, option A.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        extra = out_channels - in_channels
        self.pad = (extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, pad={self.pad}"


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def _basic_body(in_channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_conv_bn(in_channels, width, 3, stride), nn.ReLU(True), *_conv_bn(width, width, 3))


def _bottleneck_body(in_channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *_conv_bn(in_channels, width, 1),
        nn.ReLU(True),
        *_conv_bn(width, width, 3, stride),
        nn.ReLU(True),
        *_conv_bn(width, 4 * width, 1),
    )


class SPNet(nn.Module):
    """A routed residual network: stem, stages of routed blocks, one head per stage.

    In evaluation mode ``model(x)`` returns the last head's logits [B, classes]; in training mode an
    :class:`SPNetOutput`. Use :func:`spnet.create_model` for the published depths.

    Args:
        stage_blocks: number of blocks per stage.
        widths: channels per stage (before a bottleneck's expansion).
        bottleneck: 1x1-3x3-1x1 bodies with expansion 4 instead of two 3x3 convolutions.
        imagenet: 7x7 stem with max-pooling, projection shortcuts, and earlier stages aligned to the last
            stage's width before their heads; else the CIFAR form (3x3 stem, option-A shortcuts).
        shortcut: "pad" (option A) or "projection" (1x1 convolution with BatchNorm where the shape changes);
            None takes the form's own.
        routed: False builds the static network of the same shape: every block executes, no routers.
        input_size: side of the square input that :func:`spnet.fast_forward` accepts.
        router_width, router_dropout: see :class:`spnet.Router`.

    Raises:
        ValueError: num_classes, in_channels or input_size is no whole number of at least 1; no stage, one without
            blocks, or another number of widths; or an unknown shortcut.
    """

    def __init__(
        self,
        stage_blocks: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        bottleneck: bool = False,
        imagenet: bool = False,
        shortcut: str | None = None,
        routed: bool = True,
        input_size: int = 32,
        router_width: int = 128,
        router_dropout: float = 0.4,
    ):
        super().__init__()
        for name, value in dict(num_classes=num_classes, in_channels=in_channels, input_size=input_size).items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
        if not 0 < len(stage_blocks) == len(widths) or min(stage_blocks) < 1:
            raise ValueError(
                f"stage_blocks: expected at least 1 for each of the widths {list(widths)}, got {list(stage_blocks)}"
            )
        self.in_channels, self.num_classes, self.input_size = in_channels, num_classes, input_size
        self.config: dict | None = None  # arguments of create_model, for model folders
        self.data: dict | None = None  # class names, and mean and std of the pixels that it was trained on
        shortcut = shortcut or ("projection" if imagenet else "pad")
        if shortcut not in ("pad", "projection"):
            raise ValueError(f"shortcut: expected 'pad' or 'projection', got {shortcut!r}")
        expansion = 4 if bottleneck else 1
        stem = _conv_bn(in_channels, widths[0], 7 if imagenet else 3, 2 if imagenet else 1) + [nn.ReLU(True)]
        if imagenet:
            stem.append(nn.MaxPool2d(3, 2, 1))
        children: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(*stem))
        channels = widths[0]
        for s, (n, width) in enumerate(zip(stage_blocks, widths, strict=True)):
            blocks = []
            for i in range(n):
                stride = 2 if s > 0 and i == 0 else 1
                out = width * expansion
                body = (_bottleneck_body if bottleneck else _basic_body)(channels, width, stride)
                if stride == 1 and channels == out:
                    skip = None
                elif shortcut == "pad":
                    skip = PadShortcut(channels, out, stride)
                else:
                    skip = nn.Sequential(*_conv_bn(channels, out, 1, stride))
                if routed:
                    router = Router(channels, router_width, router_dropout, init_std=1e-3 if imagenet else None)
                    blocks.append(RoutedBlock(body, router, skip, nn.ReLU(True)))
                else:
                    blocks.append(ResidualBlock(body, skip, nn.ReLU(True)))
                channels = out
            children[f"stage{s + 1}"] = RoutedSequential(*blocks)
        self.features = RoutedSequential(children)
        stage_channels = [w * expansion for w in widths]
        self.align = nn.ModuleList(nn.Linear(c, channels) for c in stage_channels[:-1]) if imagenet else None
        self.heads = nn.ModuleList(nn.Linear(channels if imagenet else c, num_classes) for c in stage_channels)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out" if imagenet else "fan_in", nonlinearity="relu")
        for m in [*self.heads, *(self.align or [])]:
            nn.init.kaiming_normal_(m.weight)
            nn.init.zeros_(m.bias)

    @property
    def stages(self) -> list[RoutedSequential]:
        return list(self.features.children())[1:]

    def forward(self, x: Tensor) -> Tensor | SPNetOutput:
        """x: [B, in_channels, input_size, input_size] in the dtype of the weights."""
        if self.training:
            return self.forward_stages(x)
        x = self.features(x)
        return self.heads[-1](Router.pool(x).to(x.dtype))

    def save_pretrained(self, folder: str | Path, statistics: PathStatistics | None = None) -> None:
        """Write a folder as the Hugging Face Hub has them: that of :func:`spnet.save_model`, and a model card.

        The card (README.md) is made from the network: architecture, data, classes, cost, how to run it; with
        statistics, those of :func:`spnet.paths` on a test set, also accuracy per class and execution rates.

        Other args and errors as in :func:`spnet.save_model`.
        """
        from spnet.models.hub import save_pretrained  # it builds networks, so it imports this file

        save_pretrained(self, folder, statistics)

    @staticmethod
    def from_pretrained(folder_or_repo_id: str | Path, *, revision: str | None = None) -> SPNet:
        """Read a model folder, or a repository of the Hugging Face Hub: in evaluation mode, float32, on the CPU.

        Args:
            folder_or_repo_id: a folder, which is read without any network connection; else "owner/name", which
                ``huggingface_hub`` downloads or finds in its cache.
            revision: branch, tag or commit of the repository.

        Raises:
            FileNotFoundError: neither a folder nor the name of a repository, or a folder without its files.
            ImportError: a repository is named, but huggingface_hub is not installed.
            ValueError: as :func:`spnet.load_model`. Errors of the download are those of huggingface_hub.
        """
        from spnet.models.hub import from_pretrained

        return from_pretrained(folder_or_repo_id, revision)

    def forward_stages(self, x: Tensor) -> SPNetOutput:
        """The forward of training mode; in evaluation mode by its statistics and with decisions of bool."""
        x = self.features.stem(x)
        pooled = Router.pool(x)
        router_logits, decisions, features, stage_features, stage_logits = [], [], [], [], []
        for s, stage in enumerate(self.stages):
            outputs = []
            for block in stage:
                if isinstance(block, RoutedBlock):
                    # The vector that the previous block's features are made of is this router's input: pool once.
                    x, z, d = block.masked(x, pooled=pooled)
                    router_logits.append(z)
                    decisions.append(d)
                else:
                    x = block(x)
                pooled = Router.pool(x)
                outputs.append(pooled)
            features.append(torch.stack(outputs, 1))
            # Pooled vectors are float32 also of half-precision features; a linear layer takes its weights' dtype.
            aligned, dtype = pooled, self.heads[s].weight.dtype
            if self.align is not None and s < len(self.align):
                aligned = self.align[s](pooled.to(dtype))
            stage_features.append(aligned)
            stage_logits.append(self.heads[s](aligned.to(dtype)))
        batch = x.shape[0]
        return SPNetOutput(
            tuple(stage_logits),
            torch.stack(router_logits, 1) if router_logits else pooled.new_zeros(batch, 0, 2),
            torch.stack(decisions, 1) if decisions else pooled.new_zeros(batch, 0),
            tuple(features),
            tuple(stage_features),
        )
