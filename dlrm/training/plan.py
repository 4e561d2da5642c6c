"""A training run before its first step: planned in the first process, then built in every one.

The plan is plain data. It is made once, since that takes passes over the rows, and sent to the other processes; an
error in it ends all of them, and is reported once.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dlrm.batch import Batch
from dlrm.checkpoint import CheckpointError, require_inputs
from dlrm.config import DLRMConfig, TrainingConfig
from dlrm.distributed import World
from dlrm.embeddings import build_embeddings, synthetic_ids
from dlrm.machine import total_memory
from dlrm.metrics import EVALUATION_BATCH
from dlrm.model import DLRM
from dlrm.training.checkpoint import OWN_STATE, STATE, Saved, TrainingCheckpoints
from dlrm.training.folder import METRICS, RunFolder
from dlrm.training.optimizers import NUMBERS_A_WEIGHT, make_optimizers
from dlrm.training.options import RunOptions, merge_options, model_config, training_config
from dlrm.training.summary import describe_rows
from dlrm.training.trainer import CHECKPOINT_SECONDS, Progress
from robe import Admission
from robe.hashing import table_key
from robe_json import from_json

LAST = -1  # the step of Request.resume that stands for the last checkpoint


class RunData(Protocol):
    """The rows of a run. The program that starts the run opens them: dlrm knows no data formats."""

    @property
    def ranges(self) -> dict[str, range]:
        """The rows of the parts "train", "validation" and "test"."""

    @property
    def hots(self) -> tuple[int, ...] | None:
        """Ids of each feature in a row; None: one each."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model gets of a row, for JSON: rows with other inputs are refused later."""

    def count_ids(self) -> list[np.ndarray]:
        """Return the distinct ids of each feature in the training rows, ascending."""

    def read_training(self, description: str) -> Iterator[Batch]:
        """Return the training rows in their order, with a progress bar."""

    def epoch(
        self, epoch: int, start: int, *, batch_size: int, seed: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """Return a process's part of the batches of an epoch, from number ``start`` on."""

    def read_part(self, part: str, *, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Return a process's share of the rows of a part, in their order."""


# (--data, --eval-data, ranges of the parts) -> rows. Without ranges every row is checked, and they are found.
OpenData = Callable[[Path, Path | None, dict[str, range] | None], RunData]


@dataclass(frozen=True)
class Request:
    """The request of a program to ``dlrm.training.run.run``.

    Attributes:
        output: the folder of the run.
        given: the options of the run that were given, by their names in RunOptions.
        command: the command line of this process.
        resume_command: the script with the options that resume the run; "python" or "torchrun" is put in front.
        resume: step of the checkpoint to resume from. LAST: the last one; without any, start a run. None: start a run.
        overwrite: whether a run that starts may replace another one in the folder.
        checkpoint_seconds: longest time between two checkpoints.
        keep_checkpoints: the number of checkpoints to keep.
    """

    output: Path
    given: dict[str, Any]
    command: str
    resume_command: str
    resume: int | None = None
    overwrite: bool = False
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class Plan:
    """All that is decided before a run is built, the same in every process.

    Attributes:
        step: of the checkpoint that the run is resumed from; None: a new run.
        options: of the run.
        inputs: what the model is trained on.
        training: how it is trained.
        model: what is trained.
        ranges: the rows of each part.
        command: the command line that started the run.
        warnings: what the user should know before a long run.
        vocabulary: of a new model with config.vocabulary: the known ids of each feature.
        filter: of a new model with an admission: (W,) int64; None where it fills while the model trains.
    """

    step: int | None
    options: RunOptions
    inputs: dict[str, Any]
    training: TrainingConfig
    model: DLRMConfig
    ranges: dict[str, range]
    command: str
    warnings: tuple[str, ...] = ()
    vocabulary: list[np.ndarray] | None = None
    filter: Tensor | None = None

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows in each part."""
        return {part: len(rows) for part, rows in self.ranges.items()}


@dataclass(frozen=True)
class RunState:
    """The state of a run in a checkpoint, beside weights and optimizers.

    Attributes:
        progress: of the training.
        training: how it is trained.
        rows: in each part.
        positions: of its logs, in bytes.
        options: of the run, as ``RunOptions.to_dict`` returns them.
        command: the command line that started it.
        processes: that trained.
        inputs: what the model is trained on; None: not known, as before 0.10.0.
    """

    progress: Progress
    training: TrainingConfig
    rows: dict[str, int]
    positions: dict[str, int]
    options: dict[str, Any]
    command: str
    processes: int
    inputs: dict[str, Any] | None = None

    @classmethod
    def of(cls, saved: Saved) -> "RunState":
        """Return the state in a checkpoint.

        Raises:
            CheckpointError: something is missing or of another type.
        """
        values = {name: value for name, value in saved.state.items() if name not in OWN_STATE}
        try:
            state = from_json(values, cls)
            RunOptions.from_dict(state.options)
        except ValueError as error:
            raise CheckpointError(f"{saved.path / STATE}: not the state of a training run: {error}") from None
        return state


class Built(NamedTuple):
    """A run that is ready for its next step."""

    model: DLRM
    optimizers: list[torch.optim.Optimizer]
    data: RunData
    saved: Saved | None  # the checkpoint that it is resumed from


class Builder:
    """Plans and builds a run.

    Args:
        request: of the program.
        world: the processes.
        open_data: opens the rows.
    """

    def __init__(self, request: Request, world: World, open_data: OpenData):
        self.request, self.world, self.open_data = request, world, open_data
        # In the first process, what planning has opened is used to build.
        self._saved: Saved | None = None
        self._data: RunData | None = None

    def plan(self) -> Plan:
        """Plan the run, in the first process.

        All rows are read before anything is written: a bad line should not end a run hours later.

        Raises:
            ValueError: options that do not fit, a damaged checkpoint, bad data.
            MemoryError: the model would not fit.
        """
        request = self.request
        saved = self._saved = find_checkpoint(request)
        state = RunState.of(saved) if saved else None
        options = merge_options(request.given, RunOptions.from_dict(state.options) if state else None)
        if options.admit_after is not None and self.world.size > 1:
            raise ValueError(
                "--admit-after: not with several processes, each of which would count its own rows; leave it out, and "
                "ids are chosen before training"
            )
        training = training_config(options, state.training if state else None)
        data = self._data = self.open_data(options.data, options.eval_data, None)
        if saved and state:
            rows, expected = {part: len(x) for part, x in data.ranges.items()}, state.rows
            if rows != expected:
                raise ValueError(
                    f"{options.data}: not the data of this run: {describe_rows(rows)}; expected "
                    f"{describe_rows(expected)}"
                )
            require_inputs(state.inputs, data.inputs, options.data)
            step, warnings = state.progress.step, warn_of_labels(data, training)
            return Plan(step, options, data.inputs, training, saved.config, data.ranges, state.command, warnings)
        known = data.count_ids() if options.table_rows == "data" else None
        model = model_config(options, data.hots, known)
        require_memory(model, training)
        warnings = warn_of_labels(data, training)
        filter = None
        if options.admission and options.admit_after is None:
            filter = choose_ids(lambda: data.read_training("choosing ids"), model)
            model = replace(model, admission_bytes=8 * len(filter))
        vocabulary = known if model.vocabulary else None
        return Plan(
            None, options, data.inputs, training, model, data.ranges, request.command, warnings, vocabulary, filter
        )

    def build(self, plan: Plan) -> Built:
        """Open the rows, build the model and its optimizers, and give them the state of the checkpoint.

        Raises:
            ValueError: a layer can't be as the config says, or the checkpoint is damaged.
        """
        options, saved = plan.options, self._saved
        data = self._data or self.open_data(options.data, options.eval_data, plan.ranges)
        if plan.step is None:
            model = new_model(plan)
        else:
            saved = saved or _checkpoints(self.request).load(plan.step)
            assert saved is not None
            model = saved.model
            if options.admit_after is not None:
                admission_of(model).threshold = options.admit_after
        model.to(self.world.device)
        optimizers = make_optimizers(model, plan.training, self.world)
        if saved:
            saved.restore(optimizers)
        return Built(model, optimizers, data, saved)


def find_checkpoint(request: Request) -> Saved | None:
    """Return the checkpoint to resume from; None for a new run.

    Raises:
        ValueError: there is none, and the folder has a run that a new one would overwrite.
    """
    output, checkpoints = request.output, _checkpoints(request)
    if request.resume is not None:
        saved = checkpoints.load(None if request.resume == LAST else request.resume)
        if saved:
            return saved
    if request.overwrite:
        return None
    steps, results = checkpoints.steps(), RunFolder(output).results()
    if steps and METRICS not in results:
        raise ValueError(
            f"--output: {output} has an unfinished run with a checkpoint of step {steps[-1]}; resume it (--resume), "
            "choose another folder, or replace that run with --overwrite"
        )
    if steps or results:
        found = results[0] if results else "checkpoints"
        raise ValueError(
            f"--output: {output} has {found} of another run; choose another folder, or replace that run with "
            "--overwrite"
        )
    mllog = request.given.get("mllog")
    if mllog and request.resume is None and mllog.is_file() and mllog.stat().st_size:
        raise ValueError(f"--mllog: {mllog} is there already; choose another name, or replace it with --overwrite")
    return None


def _checkpoints(request: Request) -> TrainingCheckpoints:
    return TrainingCheckpoints(request.output, request.keep_checkpoints)


def new_model(plan: Plan) -> DLRM:
    """Build the model of a new run, with initial values from its seed."""
    torch.manual_seed(plan.options.seed)
    vocabulary = None if plan.vocabulary is None else [torch.from_numpy(ids) for ids in plan.vocabulary]
    model = DLRM(plan.model, build_embeddings(plan.model, vocabulary))
    if plan.filter is not None:
        admission_of(model).filter.copy_(plan.filter)
    elif plan.options.admit_after is not None:
        admission_of(model).start_counting(plan.options.admit_after)
    return model


def admission_of(model: DLRM) -> Admission:
    """Return the admission of a model that has one."""
    admission = model.embeddings.admission
    assert isinstance(admission, Admission)
    return admission


def warn_of_labels(data: RunData, training: TrainingConfig) -> tuple[str, ...]:
    """Return a warning for each part whose rows all have one label. Parts are read until both labels are found."""
    target = f", and AUC {training.target_auc} is never reached" if training.target_auc else ""
    follows = {
        "train": "the model learns nothing but that",
        "validation": f"their AUC is undefined. The weights with the lowest validation log loss are kept{target}",
        "test": "their AUC is undefined, null in metrics.json",
    }
    warnings = []
    for part, rows in data.ranges.items():
        found: set[float] = set()
        batches = data.read_part(part, batch_size=EVALUATION_BATCH, rank=0, world_size=1)
        with closing(batches) if isinstance(batches, Generator) else nullcontext():
            for batch in batches:
                assert batch.labels is not None
                found |= set(np.unique(batch.labels).tolist())
                if len(found) > 1:
                    break
        if len(found) == 1:
            warnings.append(f"all {len(rows):,} {part} rows have label {found.pop():.0f}: {follows[part]}")
    return tuple(warnings)


def choose_ids(read: Callable[[], Iterable[Batch]], config: DLRMConfig) -> Tensor:
    """Choose the ids with an embedding of their own.

    Args:
        read: starts a pass over the training rows.
        config: of the model; its admission has the bytes that the filter may take.

    Returns:
        the filter, (W,) int64, of at most these bytes.
    """

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in read():
            assert batch.labels is not None
            sparse = torch.from_numpy(batch.sparse)
            if config.synthetic_hots:
                sparse = synthetic_ids(sparse, config.hots or (), config.table_rows)
            yield sparse, torch.from_numpy(batch.labels).unsqueeze(1)

    keys = torch.tensor([table_key(config.hash_seed, feature) for feature in config.feature_of_id])
    return Admission.choose(samples, keys, config.admission_bytes).filter


def require_memory(config: DLRMConfig, training: TrainingConfig) -> None:
    """Refuse embeddings that can't fit, before they are allocated.

    Raises:
        MemoryError: they take more than this process can ever have.
    """
    floats = config.robe_size or config.full_floats / (config.compression or 1)
    copies = NUMBERS_A_WEIGHT[training.optimizer] + (config.embedding == "robe") + (training.averaging_steps > 0)
    needed, total = floats * 4 * copies, total_memory()
    if needed > total:
        raise MemoryError(
            f"the embeddings take {needed / 1e9:.1f} GB with their optimizer's state, and this process can have "
            f"{total / 1e9:.1f} GB: compress them more, or with --embedding full try --table-rows data"
        )
