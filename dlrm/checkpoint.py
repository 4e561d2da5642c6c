"""The folder of a model: config.json and model.safetensors, from which alone it is rebuilt.

    checkpoint.save("runs/robe", model)
    model = checkpoint.load("runs/robe")

A training run also keeps what it needs to go on: see dlrm.training.checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dlrm.config import DLRMConfig
from dlrm.model import DLRM
from robe import IdCounter
from robe.metadata import checksum, layers_of
from robe_files import whole_file, write_json
from robe_json import read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_LAYOUT = "layout"  # in the metadata of the weights; files of before 0.10.0 have none
# Counts of an admission that chooses ids during training. Only checkpoints of training keep them.
_COUNTERS = "embeddings.admission.counter.counters"


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or whose weights do not fit its config."""


@dataclass(frozen=True)
class Description:
    """The content of config.json.

    Attributes:
        model: hyperparameters, from which the model is built.
        training: how it was trained, for readers.
        inputs: what it was trained on, as ``RunData.inputs`` says it; None: not known, as in models before 0.10.0.
    """

    model: DLRMConfig
    training: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None


def save(
    folder: str | Path,
    model: DLRM,
    training: dict[str, Any] | None = None,
    inputs: dict[str, Any] | None = None,
) -> None:
    """Write a model's folder. Files that are already there are replaced once the new ones are whole.

    Args:
        folder: where to write; created if needed.
        model: the model.
        training: how the model was trained; kept in config.json for readers, and ignored by ``load``.
        inputs: what it was trained on; kept there for ``require_inputs``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x for name, x in contiguous_state(model).items() if name != _COUNTERS}
    with whole_file(folder / WEIGHTS) as part:
        save_file(state, part, metadata=layout(model))
    write_json(folder / CONFIG, {"model": model.config.to_dict(), "training": training, "inputs": inputs})


def load(folder: str | Path) -> DLRM:
    """Rebuild the model of a folder.

    Args:
        folder: written by ``save`` or by train.py --output.

    Raises:
        CheckpointError: files are missing or damaged, or the weights have other shapes than the config says.
    """
    config = describe(folder).model
    return build_model(config, _file(folder, WEIGHTS), CONFIG)


def describe(folder: str | Path) -> Description:
    """Read what a folder's config.json says of its model.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = _file(folder, CONFIG)
    try:
        return read_json(path, Description)
    except ValueError as error:
        cause = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: not a model's config: {cause}") from None


def _file(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint is a folder with {CONFIG} and {WEIGHTS}")
    return path


def require_inputs(trained_on: Mapping[str, Any] | None, inputs: Mapping[str, Any], path: Path) -> None:
    """Refuse rows of another kind than a model was trained on: it would predict from them without an error.

    Args:
        trained_on: the inputs of the rows that it was trained on; None: not known.
        inputs: of these rows.
        path: of these rows, for the message.

    Raises:
        ValueError: they differ.
    """
    for name, expected in (trained_on or {}).items():
        if inputs.get(name) != expected:
            raise ValueError(
                f"{path}: {name}: the rows have {inputs.get(name)!r}, the model was trained on {expected!r}"
            )


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
        CheckpointError: the file can't be read, or its tensors have other names or shapes than the config says, or
            their rows lie elsewhere.
    """
    state = read_tensors(weights_path)
    try:
        with torch.device("meta"):  # which takes no memory, whatever the config says
            expected = DLRM(config).state_dict()
    except ValueError as error:
        raise CheckpointError(f"{weights_path.with_name(config_name)}: not a model's config: {error}") from None
    counters = state.get(_COUNTERS)
    if counters is not None and config.admission_bytes:
        expected[_COUNTERS] = counters
    for name in sorted(expected.keys() | state.keys()):
        want = tuple(expected[name].shape) if name in expected else "none"
        got = tuple(state[name].shape) if name in state else "none"
        if want != got:
            raise CheckpointError(f"{weights_path}: {name} has shape {got}, {config_name} makes it {want}")
        want_type, got_type = expected[name].dtype, state[name].dtype
        if want_type.is_floating_point != got_type.is_floating_point or got_type.itemsize > want_type.itemsize:
            raise CheckpointError(f"{weights_path}: {name} has dtype {got_type}, {config_name} makes it {want_type}")
    model = DLRM(config)
    if counters is not None:
        counter = IdCounter(counters.numel() * counters.element_size())
        model.embeddings.admission.counter = counter  # type: ignore[union-attr]
    model.load_state_dict(state)
    made = layout(model)
    if any(made.get(name) != value for name, value in _metadata(weights_path).items() if name == _LAYOUT):
        raise CheckpointError(
            f"{weights_path}: its rows do not lie where {config_name} says: hash_seed, block_size or sign is not that "
            "of the training, or the filter is damaged"
        )
    return model


def layout(model: DLRM) -> dict[str, str]:
    """Return the metadata of a model's weights: a checksum of what decides where rows of its array lie.

    Without it, another hash_seed in the config would load, and rows would be noise. Models without an array have none.
    """
    layers = dict(layers_of(model))
    return {_LAYOUT: checksum(layers)} if layers else {}


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata() or {}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. The tensors are views into it, at any address: copy what is computed with.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, AttributeError) as error:  # the last two: types that torch has not
        raise CheckpointError(f"{path}: can't be read: {error}") from None
