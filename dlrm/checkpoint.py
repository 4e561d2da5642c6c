"""Checkpoints.

A model is a folder with config.json and model.safetensors, from which alone it is rebuilt: ``save``, ``load``.

A training run keeps more, to go on as if it had never stopped: ``TrainingCheckpoints``. Each is a folder
step-000001234 with model.safetensors; optimizer.safetensors, the state of the optimizers, of torch's generator and of
averaged weights; state.json, everything else, with the SHA-256 of the others and of itself; and best.safetensors, the
weights with the best evaluation by then, which is a link to the file in the run's folder where the file system allows.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import robe.optim
from dlrm.config import DLRMConfig
from dlrm.model import DLRM
from robe import IdCounter
from robe.saving import whole_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BEST, OPTIMIZER, STATE = "best.safetensors", "optimizer.safetensors", "state.json"
VERSION = 1
_COUNT_IN_INTEGERS = (robe.optim.SGD, robe.optim.Adagrad, robe.optim.Adam, torch.optim.SparseAdam)
_GENERATOR = "generator"  # torch's, among the tensors of the optimizers
_AVERAGE = "average"  # likewise, of each parameter
_COUNTERS = "embeddings.admission.counter.counters"  # of an admission that counts while it trains


class CheckpointError(ValueError):
    """A folder that is not a checkpoint, or whose weights are not those of its config."""


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
    state = {name: x for name, x in _state(model).items() if name != _COUNTERS}  # counts are for training only
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
    return _build(config, weights_path, config_path.name)


def _state(model: DLRM) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _build(config: DLRMConfig, weights_path: Path, config_name: str) -> DLRM:
    state = _read(weights_path)
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


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from None


@dataclass
class Saved:
    """A training checkpoint that was read: ``model``, and the state with which ``restore`` goes on."""

    path: Path
    model: DLRM
    state: dict[str, Any]
    _tensors: dict[str, torch.Tensor]

    def restore(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Put the optimizers, made for ``model``, and torch's generator into the state they were in.

        Which optimizer has a parameter may have changed, as it does with the number of processes.

        Raises:
            CheckpointError: it belongs to other optimizers.
        """
        states: dict[str, dict[str, Any]] = {name: dict(x) for name, x in self.state["optimizers"].items()}
        for name, tensor in self._tensors.items():
            parameter, _, what = name.partition("/")
            if name != _GENERATOR and what != _AVERAGE:
                states.setdefault(parameter, {})[what] = tensor
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in optimizers:
            of_parameter = {}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in enumerate(parameters):
                of_own = {**optimizer.state.get(p, {}), **states.pop(names[id(p)], {})}
                if "step" in of_own:  # torch's dense optimizers keep a tensor
                    step = int(of_own["step"])
                    of_own["step"] = step if isinstance(optimizer, _COUNT_IN_INTEGERS) else torch.tensor(float(step))
                if of_own:
                    of_parameter[i] = of_own
            # The groups are those of the config, which sets the rate of every step.
            groups = optimizer.state_dict()["param_groups"]
            try:
                optimizer.load_state_dict({"state": of_parameter, "param_groups": groups})
            except (ValueError, KeyError, RuntimeError) as error:
                raise CheckpointError(f"{self.path / OPTIMIZER}: not the state of these optimizers: {error}") from None
        if states:
            raise CheckpointError(
                f"{self.path / OPTIMIZER}: not the state of these optimizers: they have no {next(iter(states))}"
            )
        torch.set_rng_state(self._tensors[_GENERATOR])

    @property
    def averages(self) -> dict[str, torch.Tensor]:
        """Of parameters whose average was kept."""
        end = "/" + _AVERAGE
        return {name.removesuffix(end): x for name, x in self._tensors.items() if name.endswith(end)}

    def put_back_best(self, folder: Path) -> None:
        """Give the run's folder the weights with the best evaluation by then: those there may be of a later one."""
        best, path = self.path / BEST, folder / WEIGHTS
        if best.exists() and not (path.exists() and path.samefile(best)):
            with whole_file(path) as part:
                part.unlink()
                _link(best, part)


class TrainingCheckpoints:
    """The checkpoints of a training run, the last few of them.

    Args:
        folder: of the run; they are in its folder "checkpoints".
        keep: how many; older ones are removed when a new one is whole.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        self.folder, self.keep = folder / "checkpoints", keep

    def path(self, step: int) -> Path:
        """The folder of one."""
        path, replaced = self._path(step), self._path(step, "replaced")
        return replaced if replaced.exists() and not path.exists() else path  # killed while it was being replaced

    def _path(self, step: int, state: str = "step") -> Path:
        return self.folder / f"{state}-{step:09}"

    def steps(self) -> list[int]:
        """Those that are there, ascending."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted({int(found[1]) for name in names if (found := re.fullmatch(r"(?:step|replaced)-(\d+)", name))})

    def save(
        self,
        step: int,
        model: DLRM,
        optimizers: Sequence[torch.optim.Optimizer],
        state: dict[str, Any],
        best: Path | None = None,
        averages: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Write a checkpoint under a temporary name, flush it to the disk, rename it, and remove the oldest.

        Args:
            state: whatever else the run needs, for JSON.
            best: the file of the best weights so far, which is replaced and never changed.
            averages: of parameters, by their names.

        Raises:
            OSError: it can't be written; the earlier ones are as they were.
        """
        part = self.folder / "unfinished"
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed here
        tensors = {_GENERATOR: torch.get_rng_state()}
        tensors |= {f"{name}/{_AVERAGE}": x.contiguous() for name, x in (averages or {}).items()}
        numbers: dict[str, dict[str, Any]] = {}  # what is not a tensor
        names_of = {id(p): name for name, p in model.named_parameters()}
        for optimizer in optimizers:
            for p, values in optimizer.state.items():
                name = names_of[id(p)]
                numbers[name] = {what: x for what, x in values.items() if not isinstance(x, torch.Tensor)}
                of_tensors = {what: x for what, x in values.items() if isinstance(x, torch.Tensor)}
                tensors |= {f"{name}/{what}": x.contiguous() for what, x in of_tensors.items()}
        try:
            part.mkdir(parents=True)
            with whole_file(part / WEIGHTS) as file:
                save_file(_state(model), file)
            with whole_file(part / OPTIMIZER) as file:
                save_file(tensors, file)
            if best:
                _link(best, part / BEST)
            names = [WEIGHTS, OPTIMIZER, *([BEST] if best else [])]
            digests = {name: _sha256(part / name) for name in names}
            state = {"version": VERSION, "model": model.config.to_dict(), "optimizers": numbers} | state
            write_json(part / STATE, {"sha256": digests | {STATE: _sha256_of_state(state)}} | state)
            for name in (*names, STATE, ""):
                _flush(part / name)
            path, replaced = self._path(step), self._path(step, "replaced")
            if path.exists():  # the same step again, of a run that went on from here
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            part.rename(path)
            _flush(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.remove_after(step)
        for other in self.steps()[: -self.keep]:
            self._remove(other)

    def remove_after(self, step: int) -> None:
        """Remove those of later steps: of a run that goes on from this one, they are not a part."""
        for other in self.steps():
            if other > step:
                self._remove(other)

    def _remove(self, step: int) -> None:
        for state in ("step", "replaced"):
            shutil.rmtree(self._path(step, state), ignore_errors=True)

    def load(self, step: int | None = None) -> Saved | None:
        """Read a checkpoint.

        Args:
            step: which; None: the last.

        Returns:
            None where there are none.

        Raises:
            CheckpointError: it is damaged, or no checkpoint of this program. Says which earlier one there is.
        """
        steps = self.steps()
        if step is None and not steps:
            return None
        if step is None:
            step = steps[-1]
        elif step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}: {there}")
        try:
            return _load_training(self.path(step))
        except CheckpointError as error:
            earlier = [other for other in steps if other < step]
            advice = f"; the one before it: --resume {earlier[-1]}" if earlier else "; there is none before it"
            raise CheckpointError(f"{error}{advice}") from None


def _load_training(path: Path) -> Saved:
    try:
        state = json.loads((path / STATE).read_text())
        if state["version"] != VERSION:
            raise ValueError(f"expected version {VERSION}, got {state['version']}")
        config = DLRMConfig.from_dict(state["model"])
        digests = state.pop("sha256")
        if digests.pop(STATE) != _sha256_of_state(state):
            raise ValueError("damaged: its SHA-256 is not that which it has")
        digests = {name: digests[name] for name in (WEIGHTS, OPTIMIZER, BEST) if name in digests or name != BEST}
    except OSError as error:
        raise CheckpointError(f"{path / STATE}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / STATE}: not the state of a training run: {error}") from None
    for name, digest in digests.items():
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from None
        if found != digest:
            raise CheckpointError(f"{path / name}: damaged: SHA-256 {found[:16]}..., {STATE} has {digest[:16]}...")
    model = _build(config, path / WEIGHTS, STATE)
    return Saved(path, model, state, _read(path / OPTIMIZER))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # not on every file system
        shutil.copyfile(source, target)


def _sha256_of_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
