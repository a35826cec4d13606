"""The networks that are measured, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import spnet
from spnet.routing import routed_blocks


def create(name: str) -> spnet.SPNet:
    """A network with the statistics of its own activations, so that many blocks neither explode nor vanish."""
    torch.manual_seed(0)
    model = _VARIANTS[name]() if name in _VARIANTS else spnet.create_model(name)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad():
        model.train().features(torch.randn(16, 3, model.input_size, model.input_size))
    return model.eval()


def _seresnet50d() -> spnet.SPNet:
    """ResNet-50 with the stem and the shortcuts of ResNet-D, and squeeze-and-excitation.

    He et al., "Bag of Tricks for Image Classification", CVPR 2019; Hu et al., CVPR 2018.
    """
    model = spnet.create_model("resnet50")
    layers = [layer for sizes in ((3, 32, 2), (32, 32, 1), (32, 64, 1)) for layer in (*_conv_bn(*sizes), nn.ReLU())]
    model.features.stem = nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1))
    for block in routed_blocks(model).values():
        convolutions = [layer for layer in block.body if isinstance(layer, nn.Conv2d)]
        channels, out = convolutions[0].in_channels, convolutions[-1].out_channels
        if convolutions[1].stride[0] == 2:
            block.shortcut = nn.Sequential(nn.AvgPool2d(2), *_conv_bn(channels, out, kernel=1))
        block.body.append(_SqueezeExcitation(out))
    return model


def _resnext50() -> spnet.SPNet:
    """ResNeXt-50 (32x4d): Xie et al., "Aggregated Residual Transformations", CVPR 2017."""
    model = spnet.create_model("resnet50")
    for block in routed_blocks(model).values():
        reduce, middle, expand = (layer for layer in block.body if isinstance(layer, nn.Conv2d))
        width = 2 * middle.in_channels
        layers = [*_conv_bn(reduce.in_channels, width, kernel=1), nn.ReLU()]
        layers += [*_conv_bn(width, width, middle.stride[0], groups=32), nn.ReLU()]
        block.body = nn.Sequential(*layers, *_conv_bn(width, expand.out_channels, kernel=1))
    return model


def _resnetv2_50() -> spnet.SPNet:
    """ResNet-50 with pre-activation: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016."""
    model = spnet.create_model("resnet50")
    model.features.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage in model.stages:
        for block in list(stage):
            convolutions = [layer for layer in block.body if isinstance(layer, nn.Conv2d)]
            layers: list[nn.Module] = [] if stage[0] is block else [nn.BatchNorm2d(channels), nn.ReLU()]
            for layer in convolutions[:-1]:
                layers += [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()]
            block.body, block.activation = nn.Sequential(*layers, convolutions[-1]), nn.Identity()
            if stage[0] is block:  # both branches of it begin with them
                block.shortcut = block.shortcut[0]
                before, channels = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()), convolutions[-1].out_channels
        stage.insert(0, before)
    model.stages[-1].append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()))
    return model


_VARIANTS = {"seresnet50d": _seresnet50d, "resnext50": _resnext50, "resnetv2_50": _resnetv2_50}


def _conv_bn(cin: int, cout: int, stride: int = 1, kernel: int = 3, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)


class _SqueezeExcitation(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 16, 1), nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
