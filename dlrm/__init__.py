"""A DLRM with injected embeddings, its training, its checkpoints."""

from dlrm.config import PRESETS, DLRMConfig, TrainingConfig, preset
from dlrm.model import DLRM

__all__ = ["DLRM", "PRESETS", "DLRMConfig", "TrainingConfig", "preset"]
