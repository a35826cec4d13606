"""Networks: the CIFAR and ImageNet residual families, their registry, and the reading of official weights."""

from spnet.models.registry import create_model, list_models
from spnet.models.resnet import SPNet, SPNetOutput

__all__ = ["SPNet", "SPNetOutput", "create_model", "list_models"]
