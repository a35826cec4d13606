"""Names of the published networks and how to build them."""

from __future__ import annotations

import difflib
from functools import partial

from spnet.models.resnet import SPNet


def _cifar(depth: int, width: int = 1) -> partial:
    return partial(SPNet, [(depth - 2) // 6] * 3, [16 * width, 32 * width, 64 * width], num_classes=10)


def _imagenet(stage_blocks: list[int], bottleneck: bool) -> partial:
    return partial(
        SPNet,
        stage_blocks,
        [64, 128, 256, 512],
        num_classes=1000,
        bottleneck=bottleneck,
        imagenet=True,
        input_size=224,
    )


_MODELS = {
    "resnet20_cifar": _cifar(20),
    "resnet32_cifar": _cifar(32),
    "resnet56_cifar": _cifar(56),
    "resnet110_cifar": _cifar(110),
    "wide_resnet20_2_cifar": _cifar(20, width=2),
    "resnet18": _imagenet([2, 2, 2, 2], False),
    "resnet34": _imagenet([3, 4, 6, 3], False),
    "resnet50": _imagenet([3, 4, 6, 3], True),
    "resnet101": _imagenet([3, 4, 23, 3], True),
    "resnet152": _imagenet([3, 8, 36, 3], True),
}


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return list(_MODELS)


def create_model(name: str, **kwargs) -> SPNet:
    """Build a routed network with fresh weights.

    Args:
        name: one of :func:`list_models`.
        **kwargs: ``num_classes`` (default 10 for CIFAR forms, 1000 for ImageNet forms), ``in_channels`` (3),
            and any other option of :class:`spnet.models.SPNet`, such as ``routed=False`` for the static network.

    Raises:
        ValueError: unknown name, where the message lists near matches; or as :class:`spnet.models.SPNet`.
    """
    if name not in _MODELS:
        given = str(name)
        near = [n for n in _MODELS if given and n.startswith(given)] or difflib.get_close_matches(given, _MODELS)
        near = near or list_models()
        raise ValueError(f"name: unknown model {name!r}; did you mean {', '.join(near)}?")
    model = _MODELS[name](**kwargs)
    model.config = {"name": name, **kwargs}
    return model
