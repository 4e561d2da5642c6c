"""Checkpoints: a folder with config.json and model.safetensors, from which alone a model is rebuilt."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dlrm.config import DLRMConfig
from dlrm.model import DLRM

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or whose weights are not those of its config."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write the file that this yields; it takes the name ``path`` when all went well, else nothing is left of it.

    Raises:
        OSError: it can't be written; names ``path``.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; safetensors makes files that only their owner reads
        yield part
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:  # the latter also stands for a full disk
        raise OSError(
            getattr(error, "errno", None), getattr(error, "strerror", None) or str(error), str(path)
        ) from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file: whole, or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(values, indent=2) + "\n")


def save(folder: str | Path, model: DLRM, training: dict[str, Any] | None = None) -> None:
    """Write a checkpoint; files in place are replaced once the new ones are whole.

    Args:
        training: how the model was trained, kept in config.json for the reader's benefit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with whole_file(folder / WEIGHTS) as part:
        save_file(state, part)
    write_json(folder / CONFIG, {"model": model.config.to_dict(), "training": training})


def load(folder: str | Path) -> DLRM:
    """Rebuild the model of a checkpoint.

    Raises:
        CheckpointError: no checkpoint, damaged, or weights of another shape than the config says.
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
    try:
        state = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights_path}: can't be read: {error}") from None
    with torch.device("meta"):
        expected = DLRM(config).state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want = tuple(expected[name].shape) if name in expected else "none"
        got = tuple(state[name].shape) if name in state else "none"
        if want != got:
            raise CheckpointError(f"{weights_path}: {name} has shape {got}, {config_path.name} makes it {want}")
    model = DLRM(config)
    model.load_state_dict(state)
    return model
