"""The training loop: steps, evaluations, and where a run can go on.

Everything that the next step depends on is in the model, the optimizers and ``Progress``; the order of the rows and the
learning rate are functions of the step. So a run that goes on from a checkpoint ends with the same weights.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import robe.optim
from dlrm.config import TrainingConfig
from dlrm.distributed import World
from dlrm.embeddings import Tables
from dlrm.model import DLRM
from dlrm.training.journal import Journal
from dlrm.training.mllog import MLLog
from robe import RobeArray

# Adam goes on moving a row by its momentum in the steps after it was read; SparseAdam does not, and needs larger steps
# to get as far: see docs/accuracy.md.
SPARSE_ADAM_RATE = 3
CHECKPOINT_SECONDS = 600.0
_AVERAGED_STEPS = 8  # between updates of averaged weights: each goes through all of them
_JOURNAL_STEPS = 100  # steps whose mean loss is a line of the journal
_CUDA_LOOK = 20  # steps between readings of the loss there, each of which waits for the device


class TrainingError(RuntimeError):
    """Training can't go on; what was kept so far is still good."""

    exit_code = 3  # of a program that ends with it


class Stopped(Exception):
    """Training was asked to stop; a checkpoint has been saved."""


@dataclass
class Progress:
    """How far a run has come. Beside weights and optimizers, all there is to go on from."""

    step: int = 0
    loss_sum: float = 0.0  # of the steps of this epoch
    recent_sum: float = 0.0  # of the steps since the last line of the journal
    history: list[dict[str, float]] = field(default_factory=list)  # evaluations: step, epoch, train_loss, auc, log_loss
    seconds: float = 0.0  # of the steps alone

    @property
    def best(self) -> dict[str, float]:
        """The first of the evaluations with the best AUC."""
        return max(self.history, key=lambda point: point["auc"])


def make_optimizers(model: DLRM, config: TrainingConfig, world: World | None = None) -> list[torch.optim.Optimizer]:
    """The optimizers of a config.

    Tables have sparse gradients, for which Adam is a class of its own (SparseAdam). ROBE arrays are updated by
    robe.optim, which never builds their dense gradient; but by torch's with Adam, whose moments go on moving weights
    that are not read, and where several processes have less to send to each other with the dense gradient.
    """
    world = world or World()
    tables = [p for module in model.modules() if isinstance(module, Tables) for p in module.parameters()]
    arrays = [m for m in model.modules() if isinstance(m, RobeArray)] if config.optimizer != "adam" else []
    if world.size > 1 and not sends_touched_slots(model, config.batch_size):
        arrays = []
    apart = tables + [array.weight for array in arrays]
    rest = [p for p in model.parameters() if all(p is not other for other in apart)]
    if tables:
        # torch asks for a decision before its optimizers build sparse tensors; they build valid ones.
        torch.sparse.check_sparse_tensor_invariants.disable()
    lr = config.learning_rate
    if config.optimizer == "adam":
        dense: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=lr)]
        return dense + [torch.optim.SparseAdam(tables, lr=SPARSE_ADAM_RATE * lr)] if tables else dense
    if config.optimizer == "adagrad":
        eps = config.adagrad_eps
        dense = [torch.optim.Adagrad(rest + tables, lr=lr, eps=eps)]
        return dense + [robe.optim.Adagrad(arrays, lr=lr, eps=eps, process_group=world.group)] if arrays else dense
    dense = [torch.optim.SGD(rest + tables, lr=lr)]
    return dense + [robe.optim.SGD(arrays, lr=lr, process_group=world.group)] if arrays else dense


def sends_touched_slots(model: DLRM, batch_size: int) -> bool:
    """Whether the gradients of what a batch reads, with the ids, are fewer numbers than the arrays have."""
    config = model.config
    ids = sum(config.hots) if config.hots else len(config.table_rows)
    touched = batch_size * (len(config.table_rows) * config.embedding_dim + 2 * ids)  # in units of 4 bytes
    arrays = sum(m.size for m in model.modules() if isinstance(m, RobeArray))
    return touched < arrays


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: Any,
    world: World | None = None,
    rows: int | None = None,
    stop: bool = False,
) -> Tensor:
    """One step of gradient descent on the mean binary cross-entropy.

    Args:
        batch: dense, sparse and labels as data.rows.Batch: this process's part.
        rows: of the parts of all processes together; None: this is all.
        stop: whether this process wants to stop training.

    Returns:
        (2,): the loss over all rows, and how many processes want to stop.
    """
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


class AveragedWeights:
    """Exponential moving averages of a model's weights: average += (weight - average) / n, n = steps at first.

    Each step moves weights that rows share for the sake of the batch's rows; in the average, what these do to others
    cancels out. So it does the more for ROBE the more rows share a weight: docs/accuracy.md.

    Args:
        steps: n at the most; the number of steps that the average reaches back, about.
        tensors: of each parameter, where to go on; None: from the weights as they are.
    """

    def __init__(self, model: nn.Module, steps: int, tensors: dict[str, Tensor] | None = None):
        self._parameters = dict(model.named_parameters())
        self._steps = steps
        tensors = tensors or {name: p.detach().clone() for name, p in self._parameters.items()}
        self.tensors = {name: tensors[name] for name in self._parameters}  # in the order of the parameters

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1. Not all are looked at."""
        if step % _AVERAGED_STEPS == 0:
            weight = min(_AVERAGED_STEPS / min(step, self._steps), 1.0)
            torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), weight)

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Within, the model's weights are the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            self.tensors[name], parameter.data = parameter.data, self.tensors[name]


@dataclass
class Trainer:
    """A training run.

    Args:
        model: (dense, sparse) -> logits.
        make_batches: (epoch, start) -> its batches (dense, sparse, labels as data.rows.Batch), this process's part of
            each, from number ``start`` on; of config.batch_size rows in all processes together.
        rows: in an epoch.
        evaluate: the validation scores of the model as it is now, with "auc" and "log_loss"; the same in all processes.
        keep: called in the first process when those are the best so far.
        save: called there with the progress when a checkpoint is due: before the first step, after each evaluation,
            when ``checkpoint_seconds`` have passed, and before the run stops.
        wants_to_stop: asked after each step.
        optimizers: none: those of the config.
        averages: of the weights, with config.averaging_steps; None: they begin here.
        progress: where to go on.
    """

    model: DLRM
    config: TrainingConfig
    make_batches: Callable[[int, int], Iterable]
    rows: int
    evaluate: Callable[[], dict[str, float]]
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
    show: bool = True  # a progress bar

    def __post_init__(self):
        self.optimizers = self.optimizers or make_optimizers(self.model, self.config, self.world)
        if self.averages is None and self.config.averaging_steps:
            self.averages = AveragedWeights(self.model, self.config.averaging_steps)
        self.steps = math.ceil(self.rows / self.config.batch_size)  # in an epoch
        count = self.config.evaluations_per_epoch
        self._evaluate_at = {math.ceil(self.steps * k / count) for k in range(1, count + 1)}
        # Of each parameter group, where others have 1.
        self._rates = [[g["lr"] / self.config.learning_rate for g in o.param_groups] for o in self.optimizers]
        self._shown: dict[str, str] = {}

    @property
    def place(self) -> tuple[int, int]:
        """The epoch, counted from 0, and the number of its steps that are done: at its end, all of them."""
        step = self.progress.step
        epoch = max(step - 1, 0) // self.steps
        return epoch, step - epoch * self.steps

    @property
    def epoch(self) -> float:
        """How many are done."""
        return self.progress.step / self.steps

    @property
    def reached(self) -> dict[str, float] | None:
        """The first evaluation above the target."""
        target = self.config.target_auc
        return next((p for p in self.progress.history if target is not None and p["auc"] > target), None)

    @property
    def finished(self) -> bool:
        return self.reached is not None or self.progress.step >= self.steps * self.config.epochs

    @property
    def trained_rows(self) -> int:
        """Rows the steps so far have gone through."""
        epoch, done = self.place
        return epoch * self.rows + min(done * self.config.batch_size, self.rows)

    def train(self) -> None:
        """Train to the last epoch or to the target.

        Raises:
            TrainingError: the loss or a weight is NaN or infinite.
            Stopped: it was asked to.
            ValueError: the batches of an epoch are fewer than its rows make.
        """
        self._saved_at, self._saved_step = time.perf_counter(), -1
        self._clock: float | None = None  # since when steps are made that ``seconds`` does not have
        total = self.rows * self.config.epochs
        self.model.train()
        with tqdm(total=total, initial=self.trained_rows, unit="row", unit_scale=True, disable=not self.show) as bar:
            self._bar = bar
            if not self.progress.step:
                self._save()  # a run that diverges has where to go on from
            if self._evaluation_is_due():  # the run was stopped while it was at it
                self._evaluate()
            while not self.finished:
                self._train_epoch()

    def _train_epoch(self) -> None:
        progress, config, batch_size = self.progress, self.config, self.config.batch_size
        epoch, done = divmod(progress.step, self.steps)
        self._bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
        if not done:
            progress.loss_sum = 0.0
            if self.mllog:
                self.mllog.epoch_start(epoch + 1)
        look = 1 if self.world.device.type == "cpu" else _CUDA_LOOK
        self._unread: list[Tensor] = []
        self._clock = time.perf_counter()
        self._line_clock, self._line_rows = self._clock, self.trained_rows
        batches = self.make_batches(epoch, done)
        with closing(batches) if isinstance(batches, Generator) else nullcontext():
            for batch in batches:
                progress.step += 1
                done += 1
                rows = min(batch_size, self.rows - (done - 1) * batch_size)
                self._set_rate(config.rate(progress.step))
                numbers = train_step(self.model, self.optimizers, batch, self.world, rows, self.wants_to_stop())
                if self.averages:
                    self.averages.update(progress.step)
                self._unread.append(numbers)
                self._bar.update(rows)
                due = done in self._evaluate_at
                if len(self._unread) < look and not due and progress.step % _JOURNAL_STEPS:
                    continue
                stop = self._read_losses()
                if progress.step % _JOURNAL_STEPS == 0:
                    self._write_line()
                if due:
                    self._evaluate()
                if stop:
                    if self._saved_step != progress.step:
                        self._save()
                    raise Stopped
                if self.reached:
                    return
                if time.perf_counter() - self._saved_at > self.checkpoint_seconds:
                    self._save()
                if self._clock is None:
                    self._clock = time.perf_counter()
                    self._line_clock, self._line_rows = self._clock, self.trained_rows
        if done < self.steps:
            raise ValueError(f"expected {self.steps} batches of {self.rows} rows in epoch {epoch + 1}, got {done}")

    def _set_rate(self, rate: float) -> None:
        for optimizer, rates in zip(self.optimizers, self._rates):
            for group, of_group in zip(optimizer.param_groups, rates):
                group["lr"] = rate * of_group

    def _read_losses(self) -> bool:
        """Look at the losses since the last look; whether a process wants to stop."""
        progress = self.progress
        read = torch.stack(self._unread).tolist()
        self._unread.clear()
        for before_last, (loss, _) in zip(range(len(read) - 1, -1, -1), read):
            if not math.isfinite(loss):
                raise self._error(f"the loss is {loss}", before_last)
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
        self._line_clock, self._line_rows = now, rows

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
                is_best = not progress.history or scores["auc"] > progress.best["auc"]
                if is_best and self.world.is_first:
                    self.keep()
        except Stopped:
            self._save()
            raise
        self.model.train()
        point = {"step": progress.step, "epoch": self.epoch, "train_loss": progress.loss_sum / done}
        progress.history.append(point | {name: scores[name] for name in ("auc", "log_loss")})
        self._shown["validation_auc"] = f"{scores['auc']:.4f}"
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

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self.progress.seconds += time.perf_counter() - self._clock
        self._clock = None

    def _require_finite_weights(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise self._error("a weight is NaN or infinite", 0)

    def _error(self, what: str, steps_ago: int) -> TrainingError:
        epoch, done = self.place
        step = self.progress.step - steps_ago
        return TrainingError(
            f"{what} at step {step} (batch {done - steps_ago} of epoch {epoch + 1}); a lower learning rate than "
            f"{self.config.rate(max(step, 1)):g} may help"
        )
