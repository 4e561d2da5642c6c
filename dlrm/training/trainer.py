"""The training loop: steps, evaluations, and the moments at which a run can be resumed.

Everything that the next step depends on is in the model, the optimizers, the averages and ``Progress``; the order of
the rows and the learning rate are functions of the step. That is why a resumed run ends with the same weights.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dlrm.batch import Batch
from dlrm.config import TrainingConfig
from dlrm.distributed import World
from dlrm.metrics import describe_auc
from dlrm.model import DLRM
from dlrm.sparsity import BlockPruner, chains_of, cubic, prunable_of, rearrange
from dlrm.training.averages import AveragedWeights
from dlrm.training.journal import Journal
from dlrm.training.mllog import MLLog
from dlrm.training.optimizers import make_optimizers

CHECKPOINT_SECONDS = 600.0

_JOURNAL_STEPS = 100  # steps whose mean loss makes a line of the journal
_CUDA_LOOK = 20  # steps between two looks at the loss on a GPU: each look waits for it


class TrainingError(RuntimeError):
    """Training diverged. What was saved before is still good."""

    exit_code = 3  # of a program that ends with it


class Stopped(Exception):
    """Training was asked to stop, and has saved a checkpoint."""


@dataclass
class Progress:
    """The state of a run that a resumed run needs beside weights, averages and optimizers.

    Attributes:
        step: steps done.
        loss_sum: of the losses of this epoch's steps.
        recent_sum: of the losses since the last line of the journal.
        history: of each evaluation: step, epoch, train_loss, auc, log_loss. auc is None where all labels are the same.
        seconds: spent in steps.
        keep_from: the first step whose weights may be kept; the model is pruned until then.
    """

    step: int = 0
    loss_sum: float = 0.0
    recent_sum: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    keep_from: int = 0

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """The evaluations whose weights may be kept."""
        return [point for point in self.history if point["step"] >= self.keep_from]

    @property
    def best(self) -> dict[str, Any]:
        """The candidate with the best AUC, or the lowest log loss where no AUC is defined; the first of equal ones."""
        return max(self.candidates, key=quality)


def quality(scores: Mapping[str, Any]) -> tuple[bool, float]:
    """Return what the best evaluation has most of: AUC, or where all labels are the same, less log loss."""
    auc = scores["auc"]
    return (False, -scores["log_loss"]) if auc is None else (True, auc)


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    world: World | None = None,
    rows: int | None = None,
    stop: bool = False,
) -> Tensor:
    """Make one step of gradient descent on the mean binary cross-entropy.

    Args:
        model: (dense, sparse) -> logits.
        optimizers: of its parameters.
        batch: this process's part of the batch, with labels.
        world: the processes; None: this one alone.
        rows: in the parts of all processes together; None: this part is all.
        stop: whether this process wants to stop training.

    Returns:
        (2,): the loss over all rows, and the number of processes that want to stop.

    Raises:
        ValueError: the batch has no labels.
    """
    if batch.labels is None:
        raise ValueError("labels: expected for training, got none")
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    dense, sparse, labels = (torch.from_numpy(x) for x in (batch.dense, batch.sparse, batch.labels))
    size = 1
    if world is not None:
        size = world.size
        dense, sparse, labels = (x.to(world.device, non_blocking=True) for x in (dense, sparse, labels))
    rows = len(labels) if rows is None else rows
    loss = functional.binary_cross_entropy_with_logits(model(dense, sparse), labels, reduction="sum") / rows
    (loss * size if size > 1 else loss).backward()  # gradients are averaged over the processes, not summed
    numbers = torch.stack([loss.detach(), loss.detach().new_tensor(float(stop))])
    if world is not None:
        numbers = world.average_gradients(model.parameters(), numbers)
    for optimizer in optimizers:
        optimizer.step()
    return numbers


@dataclass
class Trainer:
    """The loop of a training run.

    Args:
        model: (dense, sparse) -> logits.
        config: how to train it.
        make_batches: (epoch, start) -> the batches of an epoch from number ``start`` on. Each has config.batch_size
            rows in all processes together; this process gets its part.
        rows: in an epoch.
        evaluate: returns the validation scores of the model as it is now, "auc" and "log_loss" among them; the same in
            all processes.
        keep: called in the first process when these are the best so far.
        save: called there when a checkpoint is due: before the first step, after each evaluation, when
            ``checkpoint_seconds`` have passed, and before the run stops.
        wants_to_stop: asked after each step.
        optimizers: empty: those of the config.
        averages: of the weights, with config.averaging_steps; None: they start here.
        progress: of the run that is resumed.
        world: the processes.
        journal, mllog: logs to write; None: none.
        checkpoint_seconds: the longest time between two checkpoints.
        show: whether to show a progress bar.
    """

    model: DLRM
    config: TrainingConfig
    make_batches: Callable[[int, int], Iterable[Batch]]
    rows: int
    evaluate: Callable[[], dict[str, Any]]
    keep: Callable[[], None] = lambda: None
    save: Callable[[Progress], None] = lambda progress: None
    wants_to_stop: Callable[[], bool] = lambda: False
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    averages: AveragedWeights | None = None
    progress: Progress = field(default_factory=Progress)
    world: World = field(default_factory=World)
    journal: Journal | None = None
    mllog: MLLog | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    show: bool = True

    def __post_init__(self):
        self.optimizers = self.optimizers or make_optimizers(self.model, self.config, self.world)
        if self.averages is None and self.config.averaging_steps:
            self.averages = AveragedWeights(self.model, self.config.averaging_steps)
        self.steps = math.ceil(self.rows / self.config.batch_size)  # in an epoch
        count = self.config.evaluations_per_epoch
        self._pruning = Pruning(self) if self.config.prune else None
        self._evaluate_at = {math.ceil(self.steps * k / count) for k in range(1, count + 1)}
        # Learning rate of each parameter group, in multiples of the config's.
        self._rates = [[g["lr"] / self.config.learning_rate for g in o.param_groups] for o in self.optimizers]
        self._shown: dict[str, str] = {}

    @property
    def place(self) -> tuple[int, int]:
        """The epoch, counted from 0, and how many of its steps are done: all of them at its end."""
        step = self.progress.step
        epoch = max(step - 1, 0) // self.steps
        return epoch, step - epoch * self.steps

    @property
    def epoch(self) -> float:
        """The epochs done, with a fraction."""
        return self.progress.step / self.steps

    @property
    def reached(self) -> dict[str, Any] | None:
        """The first candidate above the target; None where there is none."""
        target = self.config.target_auc
        evaluated = [] if target is None else [p for p in self.progress.candidates if p["auc"] is not None]
        return next((p for p in evaluated if p["auc"] > target), None)

    @property
    def finished(self) -> bool:
        """Whether the last epoch is done, or the target is reached."""
        return self.reached is not None or self.progress.step >= self.steps * self.config.epochs

    @property
    def trained_rows(self) -> int:
        """Rows in the steps so far; rows of several epochs count several times."""
        epoch, done = self.place
        return epoch * self.rows + min(done * self.config.batch_size, self.rows)

    def train(self) -> None:
        """Train to the last epoch or to the target.

        Raises:
            TrainingError: the loss or a weight is NaN or infinite.
            Stopped: training was asked to stop.
            ValueError: an epoch has fewer batches than its rows should make.
        """
        self._saved_at, self._saved_step = time.perf_counter(), -1
        self._clock: float | None = None  # start of the steps that progress.seconds does not include yet
        total = self.rows * self.config.epochs
        self.model.train()
        with tqdm(total=total, initial=self.trained_rows, unit="row", unit_scale=True, disable=not self.show) as bar:
            self._bar = bar
            if not self.progress.step:
                self._save()  # so that a run that diverges at once can be resumed
            if self._evaluation_is_due():  # the run was stopped during an evaluation
                self._evaluate()
            while not self.finished:
                self._train_epoch()

    def _train_epoch(self) -> None:
        epoch, done = divmod(self.progress.step, self.steps)
        self._bar.set_description(f"epoch {epoch + 1}/{self.config.epochs}")
        if not done:
            self.progress.loss_sum = 0.0
            if self.mllog:
                self.mllog.epoch_start(epoch + 1)
        self._unread: list[Tensor] = []  # numbers of train_step
        self._start_clock()
        batches = self.make_batches(epoch, done)
        with closing(batches) if isinstance(batches, Generator) else nullcontext():
            for batch in batches:
                done += 1
                self._step(batch, min(self.config.batch_size, self.rows - (done - 1) * self.config.batch_size))
                if self._is_time_to_look(done):
                    self._look(done)
                    if self.reached:
                        return
        if done < self.steps:
            raise ValueError(f"expected {self.steps} batches of {self.rows} rows in epoch {epoch + 1}, got {done}")

    def _step(self, batch: Batch, rows: int) -> None:
        self.progress.step += 1
        rate = self.config.rate(self.progress.step)
        for optimizer, rates in zip(self.optimizers, self._rates):
            for group, multiple in zip(optimizer.param_groups, rates):
                group["lr"] = rate * multiple
        self._unread.append(train_step(self.model, self.optimizers, batch, self.world, rows, self.wants_to_stop()))
        if self.averages:
            self.averages.update(self.progress.step)
        if self._pruning:
            self._pruning.step(self.progress.step)
        self._bar.update(rows)

    def _is_time_to_look(self, done: int) -> bool:
        often = 1 if self.world.device.type == "cpu" else _CUDA_LOOK
        return len(self._unread) >= often or done in self._evaluate_at or self.progress.step % _JOURNAL_STEPS == 0

    def _look(self, done: int) -> None:
        """Look at the losses, and do what is due after this step of the epoch."""
        stop = self._read_losses()
        if self.progress.step % _JOURNAL_STEPS == 0:
            self._write_line()
        if done in self._evaluate_at:
            self._evaluate()
        if stop:
            if self._saved_step != self.progress.step:
                self._save()
            raise Stopped
        if self.reached:
            return
        if time.perf_counter() - self._saved_at > self.checkpoint_seconds:
            self._save()
        if self._clock is None:
            self._start_clock()

    def _read_losses(self) -> bool:
        """Add up the losses since the last look; return whether a process wants to stop."""
        progress = self.progress
        read = torch.stack(self._unread).tolist()
        self._unread.clear()
        for steps_ago, (loss, _) in zip(range(len(read) - 1, -1, -1), read):
            if not math.isfinite(loss):
                raise self._error(f"the loss is {loss}", steps_ago)
            progress.loss_sum += loss
            progress.recent_sum += loss
        self._shown["loss"] = f"{progress.loss_sum / self.place[1]:.4f}"
        self._bar.set_postfix(self._shown, refresh=False)
        return any(stop for _, stop in read)

    def _write_line(self) -> None:
        now, rows = time.perf_counter(), self.trained_rows
        if self.journal:
            self.journal.write(
                self.progress.step,
                self.epoch,
                {
                    "train/loss": self.progress.recent_sum / _JOURNAL_STEPS,
                    "train/learning_rate": self.config.rate(self.progress.step),
                    "train/samples_per_second": (rows - self._line_rows) / (now - self._line_clock),
                },
            )
        self.progress.recent_sum = 0.0
        self._start_line(now, rows)

    def _evaluation_is_due(self) -> bool:
        step, history = self.progress.step, self.progress.history
        return self.place[1] in self._evaluate_at and (not history or history[-1]["step"] < step)

    def _evaluate(self) -> None:
        progress = self.progress
        self._stop_clock()
        self._require_finite_weights()
        start_ms = int(time.time() * 1e3)
        epoch, done = self.place
        try:
            with self.averages.in_the_model() if self.averages else nullcontext():
                scores = self.evaluate()
                is_best = progress.step >= progress.keep_from and (
                    not progress.candidates or quality(scores) > quality(progress.best)
                )
                if is_best and self.world.is_first:
                    self.keep()
        except Stopped:
            self._save()
            raise
        self.model.train()
        point = {"step": progress.step, "epoch": self.epoch, "train_loss": progress.loss_sum / done}
        progress.history.append(point | {name: scores[name] for name in ("auc", "log_loss")})
        self._shown["validation_auc"] = describe_auc(scores["auc"])
        self._bar.set_postfix(self._shown)
        if self.journal:
            values = {f"validation/{name}": scores[name] for name in ("auc", "log_loss")}
            self.journal.write(progress.step, self.epoch, values)
        if self.mllog:
            self.mllog.evaluation(self.epoch, scores["auc"], start_ms)
            if done == self.steps or self.reached:
                self.mllog.epoch_stop(epoch + 1)
        self._save()

    def _save(self) -> None:
        self._stop_clock()
        self._require_finite_weights()
        if self.world.is_first:
            self.save(self.progress)
        self._saved_at, self._saved_step = time.perf_counter(), self.progress.step

    def _start_clock(self) -> None:
        self._clock = time.perf_counter()
        self._start_line(self._clock, self.trained_rows)

    def _start_line(self, now: float, rows: int) -> None:
        self._line_clock, self._line_rows = now, rows

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self.progress.seconds += time.perf_counter() - self._clock
        self._clock = None

    def _require_finite_weights(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise self._error("a weight is NaN or infinite", 0)

    def _error(self, cause: str, steps_ago: int) -> TrainingError:
        epoch, done = self.place
        step = self.progress.step - steps_ago
        return TrainingError(
            f"{cause} at step {step} (batch {done - steps_ago} of epoch {epoch + 1}); a lower learning rate than "
            f"{self.config.rate(max(step, 1)):g} may help"
        )


class Pruning:
    """The pruning of a trainer's model: after each step, a function of the step and the weights.

    When it starts, the outputs of the MLPs' layers are sorted, with all that goes with them.

    Args:
        trainer: whose config says how to prune.
    """

    def __init__(self, trainer: Trainer):
        config = trainer.config
        start, end = (max(math.ceil(epoch * trainer.steps), 1) for epoch in config.prune_schedule)
        self._model, self._share, self._first, self._last = trainer.model, config.prune, start, end
        self._optimizers, self._averages = trainer.optimizers, trainer.averages
        self._names = {id(p): name for name, p in trainer.model.named_parameters()}
        self._pruner = BlockPruner(prunable_of(trainer.model), config.prune_block)
        trainer.progress.keep_from = end
        if trainer.averages:
            trainer.averages.start = end

    def step(self, step: int) -> None:
        """Prune after a step, counted from 1."""
        if step < self._first:
            return
        if step == self._first:
            for chain in chains_of(self._model):
                rearrange(chain, self._moments_and_average)
        self._pruner.step(self._share * cubic(step, self._first, self._last), self._average)

    def _average(self, parameter: Tensor) -> list[Tensor]:
        return [self._averages.tensors[self._names[id(parameter)]]] if self._averages else []

    def _moments_and_average(self, parameter: Tensor) -> list[Tensor]:
        states = [x for o in self._optimizers for x in o.state.get(parameter, {}).values()]
        moments = [x for x in states if isinstance(x, Tensor) and x.shape == parameter.shape]
        return moments + self._average(parameter)
