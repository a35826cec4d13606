"""SP-Net training: losses, auxiliary module, data and trainer, usable in pieces or whole."""

from spnet.training import losses
from spnet.training.auxiliary import DynamicAuxiliary
from spnet.training.config import TrainConfig
from spnet.training.losses import SPNetLoss
from spnet.training.trainer import Evaluation, Trainer, evaluate

__all__ = ["DynamicAuxiliary", "Evaluation", "SPNetLoss", "TrainConfig", "Trainer", "evaluate", "losses"]
