"""spnet: dynamic inference networks that really skip what their routers skip, and SP-Net training of them."""

import importlib

from spnet.analysis.paths import PathStatistics, paths
from spnet.api import Explanation, explain, fast_forward
from spnet.execution.calibrate import calibrate
from spnet.execution.lowering import lower
from spnet.execution.paths import Paths
from spnet.execution.plan import LoweringError, Plan, load_plan
from spnet.models import SPNet, SPNetOutput, create_model, list_models
from spnet.models.convert import convert, forward_training
from spnet.models.files import load_model, save_model
from spnet.models.official import load_official
from spnet.native import build_info
from spnet.preprocessing import preprocess
from spnet.pretrained import load_pretrained, sample_images
from spnet.routing import ResidualBlock, RoutedBlock, RoutedSequential, Router

__version__ = build_info()["version"]

__all__ = [
    "Explanation",
    "LoweringError",
    "PathStatistics",
    "Paths",
    "Plan",
    "ResidualBlock",
    "RoutedBlock",
    "RoutedSequential",
    "Router",
    "SPNet",
    "SPNetOutput",
    "build_info",
    "calibrate",
    "convert",
    "create_model",
    "explain",
    "fast_forward",
    "forward_training",
    "list_models",
    "load_model",
    "load_plan",
    "load_official",
    "load_pretrained",
    "lower",
    "paths",
    "preprocess",
    "sample_images",
    "save_model",
    "training",
]


def __getattr__(name: str):
    # Who deploys need not wait for what only training imports.
    if name == "training":
        return importlib.import_module("spnet.training")
    raise AttributeError(f"module 'spnet' has no attribute {name!r}")
