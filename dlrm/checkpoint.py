"""The folder of a model: config.json and model.safetensors, from which alone it is rebuilt.

    checkpoint.save("runs/robe", model)
    model = checkpoint.load("runs/robe")

A training run also keeps what it needs to go on: see dlrm.training.checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dlrm.config import DLRMConfig
from dlrm.model import DLRM
from robe import IdCounter
from robe_files import whole_file, write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Counts of an admission that chooses ids during training. Only checkpoints of training keep them.
_COUNTERS = "embeddings.admission.counter.counters"


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or whose weights do not fit its config."""


def save(folder: str | Path, model: DLRM, training: dict[str, Any] | None = None) -> None:
    """Write a model's folder. Files that are already there are replaced once the new ones are whole.

    Args:
        folder: where to write; created if needed.
        model: the model.
        training: how the model was trained; kept in config.json for readers, and ignored by ``load``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x for name, x in contiguous_state(model).items() if name != _COUNTERS}
    with whole_file(folder / WEIGHTS) as part:
        save_file(state, part)
    write_json(folder / CONFIG, {"model": model.config.to_dict(), "training": training})


def load(folder: str | Path) -> DLRM:
    """Rebuild the model of a folder.

    Args:
        folder: written by ``save`` or by train.py --output.

    Raises:
        CheckpointError: files are missing or damaged, or the weights have other shapes than the config says.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    for path in (config_path, weights_path):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a checkpoint is a folder with {CONFIG} and {WEIGHTS}")
    try:
        config = DLRMConfig.from_dict(json.loads(config_path.read_text())["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config_path}: not a model's config: {error}") from None
    return build_model(config, weights_path, config_path.name)


def contiguous_state(model: DLRM) -> dict[str, torch.Tensor]:
    """Return a model's state_dict with contiguous tensors, as safetensors wants them."""
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def build_model(config: DLRMConfig, weights_path: Path, config_name: str) -> DLRM:
    """Build a model and load its weights.

    Args:
        config: the hyperparameters.
        weights_path: the safetensors file.
        config_name: where the config comes from, for error messages.

    Raises:
        CheckpointError: the file can't be read, or its tensors have other names or shapes than the config says.
    """
    state = read_tensors(weights_path)
    with torch.device("meta"):
        expected = DLRM(config).state_dict()
    counters = state.get(_COUNTERS)
    if counters is not None and config.admission_bytes:
        expected[_COUNTERS] = counters
    for name in sorted(expected.keys() | state.keys()):
        want = tuple(expected[name].shape) if name in expected else "none"
        got = tuple(state[name].shape) if name in state else "none"
        if want != got:
            raise CheckpointError(f"{weights_path}: {name} has shape {got}, {config_name} makes it {want}")
    model = DLRM(config)
    if counters is not None:
        counter = IdCounter(counters.numel() * counters.element_size())
        model.embeddings.admission.counter = counter  # type: ignore[union-attr]
    model.load_state_dict(state)
    return model


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from None
