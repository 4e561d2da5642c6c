"""The deep learning recommendation model (DLRM): model, presets, training, inference."""

from dlrm.config import DLRMConfig, TrainingConfig
from dlrm.model import DLRM
from dlrm.presets import PRESETS, preset

__all__ = ["DLRM", "PRESETS", "DLRMConfig", "TrainingConfig", "preset"]
