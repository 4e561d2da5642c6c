"""Checkpoints of a training run, from which it goes on as if it had never stopped.

Each is a folder ``checkpoints/step-000001234`` in the folder of the run:

- model.safetensors: the weights
- optimizer.safetensors: the state of the optimizers and of torch's generator, and averaged weights
- state.json: everything else, with the SHA-256 of the other files and of itself
- best.safetensors: the weights with the best evaluation so far; a hard link to the run's model.safetensors where the
  file system allows it
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import robe.optim
from dlrm.checkpoint import WEIGHTS, CheckpointError, build_model, contiguous_state, layout, read_tensors
from dlrm.config import DLRMConfig
from dlrm.model import DLRM
from robe_files import flush, rename, whole_file, write_json
from robe_json import from_json, read_json

BEST, OPTIMIZER, STATE = "best.safetensors", "optimizer.safetensors", "state.json"
VERSION = 1
OWN_STATE = ("version", "model", "optimizers")  # in the state of every checkpoint, beside what ``save`` was given

_COUNT_IN_INTEGERS = (robe.optim.SGD, robe.optim.Adagrad, robe.optim.Adam, torch.optim.SparseAdam)
_Number = int | float | bool | None
# Entries of optimizer.safetensors beside "PARAMETER/STATE".
_GENERATOR = "generator"  # torch's random numbers
_AVERAGE = "average"  # "PARAMETER/average": its averaged weights


@dataclass
class Saved:
    """A training checkpoint whose files are whole. Tensors are read when they are first asked for.

    Attributes:
        path: the folder.
        config: of the model.
        state: what was given to ``TrainingCheckpoints.save``, and the optimizers' numbers.
    """

    path: Path
    config: DLRMConfig
    state: dict[str, Any]

    @cached_property
    def model(self) -> DLRM:
        """The model with its weights."""
        return build_model(self.config, self.path / WEIGHTS, STATE)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        # Copies, at addresses that torch chooses: at others, products of matrices are rounded in another way.
        return {name: x.clone() for name, x in read_tensors(self.path / OPTIMIZER).items()}

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, by the names of their parameters."""
        end = "/" + _AVERAGE
        return {name.removesuffix(end): x for name, x in self._tensors.items() if name.endswith(end)}

    def restore(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Put optimizers of ``model``, and torch's generator, into the state they were saved in.

        A parameter may belong to another optimizer than before, as it does when the number of processes changes.

        Args:
            optimizers: of all parameters of ``model``.

        Raises:
            CheckpointError: the state belongs to other optimizers.
        """
        states = self._states_of_parameters()
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            new: dict[int, dict[str, Any]] = {}
            for i, p in enumerate(parameters):
                state = {**optimizer.state.get(p, {}), **states.pop(names[id(p)], {})}
                if "step" in state:  # torch's dense optimizers keep it as a tensor
                    step = int(state["step"])
                    state["step"] = step if isinstance(optimizer, _COUNT_IN_INTEGERS) else torch.tensor(float(step))
                if state:
                    new[i] = state
            # The groups stay as the config made them: the learning rate is set in every step.
            groups = optimizer.state_dict()["param_groups"]
            try:
                optimizer.load_state_dict({"state": new, "param_groups": groups})
            except (ValueError, KeyError, RuntimeError) as error:
                raise CheckpointError(f"{self.path / OPTIMIZER}: not the state of these optimizers: {error}") from None
        if states:
            raise CheckpointError(
                f"{self.path / OPTIMIZER}: not the state of these optimizers: they have no {next(iter(states))}"
            )
        try:
            torch.set_rng_state(self._tensors[_GENERATOR])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{self.path / OPTIMIZER}: not the state of torch's generator: {error}") from None

    def _states_of_parameters(self) -> dict[str, dict[str, Any]]:
        states: dict[str, dict[str, Any]] = {name: dict(x) for name, x in self.state["optimizers"].items()}
        for name, tensor in self._tensors.items():
            parameter, _, entry = name.partition("/")
            if name != _GENERATOR and entry != _AVERAGE:
                states.setdefault(parameter, {})[entry] = tensor
        return states

    def put_back_best(self, folder: Path) -> None:
        """Give the run the best weights at the time of this checkpoint, if it has found others since.

        Args:
            folder: of the run.
        """
        best, path = self.path / BEST, folder / WEIGHTS
        if best.exists() and not (path.exists() and path.samefile(best)):
            with whole_file(path) as part:
                part.unlink()
                _link(best, part)


class TrainingCheckpoints:
    """The last few checkpoints of a training run.

    Args:
        folder: of the run; checkpoints are in its subfolder "checkpoints".
        keep: how many to keep; older ones are removed once a new one is whole.

    Raises:
        ValueError: keep is less than 1.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        self.folder, self.keep = folder / "checkpoints", keep

    def path(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        path, replaced = self._path(step), self._path(step, "replaced")
        return replaced if replaced.exists() and not path.exists() else path  # killed while it was being replaced

    def _path(self, step: int, state: str = "step") -> Path:
        return self.folder / f"{state}-{step:09}"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted({int(found[1]) for name in names if (found := re.fullmatch(r"(?:step|replaced)-(\d+)", name))})

    def save(
        self,
        step: int,
        model: DLRM,
        optimizers: Sequence[torch.optim.Optimizer],
        state: dict[str, Any],
        best: Path | None = None,
        averages: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint; then remove those of later steps, and the oldest ones.

        It is written under a temporary name, flushed to the disk and renamed: a crash leaves the earlier ones whole.

        Args:
            step: of the run.
            model: the model.
            optimizers: its optimizers.
            state: what else the run needs, for JSON.
            best: the file of the best weights so far; it may be replaced later, but never changed.
            averages: averaged weights, by the names of their parameters.

        Raises:
            OSError: it can't be written, or the folder of the run was deleted. The earlier ones are as they were.
        """
        part = self.folder / "unfinished"
        shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
        try:
            self.folder.mkdir(exist_ok=True)  # but not the run's own folder, which may have been deleted
            part.mkdir()
            _write(part, model, optimizers, state, best, averages or {})
            path, replaced = self._path(step), self._path(step, "replaced")
            if path.exists():  # the run went back, and has come to this step again
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            rename(part, path)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.remove_after(step)
        for other in self.steps()[: -self.keep]:
            self._remove(other)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are not part of a run that goes on from this one."""
        for other in self.steps():
            if other > step:
                self._remove(other)

    def _remove(self, step: int) -> None:
        for state in ("step", "replaced"):
            shutil.rmtree(self._path(step, state), ignore_errors=True)

    def load(self, step: int | None = None) -> Saved | None:
        """Open a checkpoint and verify its checksums.

        Args:
            step: which one; None: the last.

        Returns:
            the checkpoint; None for the last one where there are none.

        Raises:
            CheckpointError: there is none of that step, or it is damaged. The message names the one before it.
        """
        steps = self.steps()
        if step is None and not steps:
            return None
        if step is None:
            step = steps[-1]
        elif step not in steps:
            others = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}: {others}")
        try:
            return _open(self.path(step))
        except CheckpointError as error:
            earlier = [other for other in steps if other < step]
            advice = f"; the one before it: --resume {earlier[-1]}" if earlier else "; there is none before it"
            raise CheckpointError(f"{error}{advice}") from None


def _write(
    folder: Path,
    model: DLRM,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    best: Path | None,
    averages: dict[str, Tensor],
) -> None:
    tensors = {_GENERATOR: torch.get_rng_state()}
    tensors |= {f"{name}/{_AVERAGE}": x.contiguous() for name, x in averages.items()}
    numbers: dict[str, dict[str, Any]] = {}  # of the optimizers' state, what is not a tensor
    names_of = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, values in optimizer.state.items():
            name = names_of[id(p)]
            numbers[name] = {entry: x for entry, x in values.items() if not isinstance(x, Tensor)}
            tensors |= {f"{name}/{entry}": x.contiguous() for entry, x in values.items() if isinstance(x, Tensor)}
    with whole_file(folder / WEIGHTS) as file:
        save_file(contiguous_state(model), file, metadata=layout(model))
    with whole_file(folder / OPTIMIZER) as file:
        save_file(tensors, file)
    if best:
        _link(best, folder / BEST)
        flush(folder / BEST)
    names = [WEIGHTS, OPTIMIZER, *([BEST] if best else [])]
    digests = {name: _sha256(folder / name) for name in names}
    state = {"version": VERSION, "model": model.config.to_dict(), "optimizers": numbers} | state
    write_json(folder / STATE, {"sha256": digests | {STATE: _sha256_of_state(state)}} | state)


def _open(path: Path) -> Saved:
    if not (path / STATE).exists():
        raise CheckpointError(f"{path / STATE}: {os.strerror(errno.ENOENT)}")
    try:
        state = read_json(path / STATE, dict[str, Any])
        if state["version"] != VERSION:
            raise ValueError(f"expected version {VERSION}, got {state['version']}")
        config = DLRMConfig.from_dict(state["model"])
        state["optimizers"] = from_json(state["optimizers"], dict[str, dict[str, _Number]], "optimizers")
        digests = from_json(state.pop("sha256"), dict[str, str], "sha256")
        if digests.pop(STATE) != _sha256_of_state(state):
            raise ValueError("damaged: its SHA-256 is not the one it holds")
        digests = {name: digests[name] for name in (WEIGHTS, OPTIMIZER, BEST) if name in digests or name != BEST}
    except (ValueError, KeyError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path / STATE}: ")
        raise CheckpointError(f"{path / STATE}: not the state of a training run: {cause}") from None
    for name, digest in digests.items():
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from None
        if found != digest:
            raise CheckpointError(f"{path / name}: damaged: SHA-256 {found[:16]}..., {STATE} has {digest[:16]}...")
    return Saved(path, config, state)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_state(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        shutil.copyfile(source, target)
