"""A training run from its request to its report: what train.py does once it has parsed its options."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

from dlrm import checkpoint
from dlrm.batch import Batch
from dlrm.checkpoint import WEIGHTS
from dlrm.distributed import PeerFailed, World
from dlrm.machine import environment
from dlrm.metrics import EVALUATION_BATCH, evaluate
from dlrm.model import DLRM
from dlrm.plots import learning_curves
from dlrm.training.averages import AveragedWeights
from dlrm.training.checkpoint import TrainingCheckpoints
from dlrm.training.folder import CURVES, METRICS, RunFolder
from dlrm.training.journal import Journal
from dlrm.training.mllog import MLLog
from dlrm.training.plan import Builder, Built, OpenData, Plan, Request, RunState
from dlrm.training.signals import StopSignals
from dlrm.training.summary import describe_model, describe_result, describe_rows, summary
from dlrm.training.trainer import Progress, Stopped, Trainer, TrainingError
from robe_files import write_json


def run(request: Request, world: World, open_data: OpenData, say: Callable[[str], object]) -> None:
    """Train a model and write the folder of its run; or resume a run. Every process of a world calls this.

    Args:
        request: what to train, where, and how to resume it.
        world: the processes.
        open_data: opens the rows.
        say: called in the first process with lines for the user.

    Raises:
        ValueError, MemoryError, OSError: the options, the data or the machine do not allow the run.
        TrainingError: training diverged.
        PeerFailed: the first process failed, and has raised its error.
    """
    start = _Start(time.perf_counter(), int(time.time() * 1e3))
    folder = RunFolder(request.output)
    with ExitStack() as stack:
        stack.callback(folder.release)
        world.first(folder.claim)
        builder = Builder(request, world, open_data)
        plan = world.first(builder.plan)
        built = world.each(partial(builder.build, plan))
        world.same_weights(built.model)
        plan = replace(plan, vocabulary=None, filter=None)  # the model has them now, and they may be large
        _Run(request, folder, world, plan, built, start, say if world.is_first else lambda line: None).run()


class _Start(NamedTuple):
    clock: float  # of time.perf_counter
    unix_ms: int  # milliseconds since 1970


class _Run:
    """A run that was built, in one process."""

    def __init__(
        self,
        request: Request,
        folder: RunFolder,
        world: World,
        plan: Plan,
        built: Built,
        start: _Start,
        say: Callable[[str], object],
    ):
        self.request, self.folder, self.world, self.plan = request, folder, world, plan
        self.start, self.say = start, say
        self.model, self.optimizers, self.data, self.saved = built
        self.checkpoints = TrainingCheckpoints(request.output, request.keep_checkpoints)
        self.state = RunState.of(self.saved) if self.saved else None
        self.progress = self.state.progress if self.state else Progress()
        self.averages: AveragedWeights | None = None
        if plan.training.averaging_steps:
            averages = {name: x.to(world.device) for name, x in self.saved.averages.items()} if self.saved else None
            self.averages = AveragedWeights(self.model, plan.training.averaging_steps, averages)
        self.signals = StopSignals()
        self.journal: Journal | None = None
        self.mllog: MLLog | None = None

    def run(self) -> None:
        plan, world = self.plan, self.world
        resumed = f"; resuming at step {self.progress.step}" if self.saved else ""
        self.say(f"{describe_model(plan.options.preset, self.model)}; {describe_rows(plan.rows)}{resumed}")
        for warning in plan.warnings:
            self.say(f"warning: {warning}")
        world.first(self._open_logs)
        trainer = self._make_trainer()
        if world.is_first and not trainer.finished:
            # Of an earlier run in this folder, or of this one with fewer epochs.
            (self.request.output / METRICS).unlink(missing_ok=True)
        try:
            with self.signals:
                trainer.train()
                if self.mllog:
                    self.mllog.run_stop(plan.training.target_auc is None or trainer.reached is not None)
                best = world.each(lambda: checkpoint.load(self.request.output))
                test = self._scores("test", best.to(world.device))
        except Stopped:
            self.say(f"stopped at step {self.progress.step}; everything is saved. To resume:")
            self.say(f"    {self._resume_command}")
            return
        except TrainingError as error:
            if not world.is_first:  # all processes found the same
                raise PeerFailed(error.exit_code) from None
            raise self._with_advice(error) from None
        except FileNotFoundError:
            if world.is_first:
                self.folder.require()  # says it, if the folder was deleted while a file was written
            raise
        finally:
            self._close_logs()
        self._report(trainer, test)

    @property
    def _resume_command(self) -> str:
        start = "python" if self.world.size == 1 else f"torchrun --nproc-per-node {self.world.size}"
        return f"{start} {self.request.resume_command}"

    def _open_logs(self) -> None:
        plan, output, saved = self.plan, self.request.output, self.saved
        # Later checkpoints go first: from here on they would not match the logs.
        self.checkpoints.remove_after(self.progress.step if saved else -1)
        if not saved:
            self.folder.clear()
        positions = self.state.positions if self.state else {}
        if plan.options.mllog:
            self.mllog = MLLog(plan.options.mllog, positions.get("mllog", 0))
            rows = plan.rows
            self.mllog.begin(self.model.config, plan.training, rows["train"], rows["validation"], self.start.unix_ms)
        self.journal = Journal(output, positions.get("journal", 0), self.progress.step)
        if saved:
            saved.put_back_best(output)

    def _close_logs(self) -> None:
        if self.journal and self.progress.history and self.folder.is_there:
            learning_curves(self.request.output / CURVES, {self.model.config.embedding: self.progress.history})
        for log in (self.journal, self.mllog):
            if log:
                log.close()

    def _make_trainer(self) -> Trainer:
        plan = self.plan
        return Trainer(
            self.model,
            plan.training,
            self._batches,
            plan.rows["train"],
            evaluate=lambda: self._scores("validation", self.model),
            keep=self._keep,
            save=self._save,
            wants_to_stop=lambda: self.signals.received,
            optimizers=self.optimizers,
            averages=self.averages,
            progress=self.progress,
            world=self.world,
            journal=self.journal,
            mllog=self.mllog,
            checkpoint_seconds=self.request.checkpoint_seconds,
            show=self.world.is_first,
        )

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        return self.data.epoch(
            epoch,
            start,
            batch_size=self.plan.training.batch_size,
            seed=self.plan.options.seed,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _scores(self, part: str, model: DLRM) -> dict[str, Any]:
        world = self.world
        batches = self.data.read_part(part, batch_size=EVALUATION_BATCH, rank=world.rank, world_size=world.size)
        # Several processes have to stop at the same place: they finish the evaluation.
        return evaluate(model, batches if world.size > 1 else self.signals.watch(batches), world)

    def _keep(self) -> None:
        self.folder.require()
        checkpoint.save(self.request.output, self.model, self.plan.training.to_dict(), self.plan.inputs)

    def _save(self, progress: Progress) -> None:
        assert self.journal is not None
        self.folder.require()
        state = {
            "progress": asdict(progress),
            "training": self.plan.training.to_dict(),
            "rows": self.plan.rows,
            "positions": {"journal": self.journal.position(), "mllog": self.mllog.position() if self.mllog else 0},
            "options": self.plan.options.to_dict(),
            "command": self.plan.command,
            "processes": self.world.size,
            "inputs": self.plan.inputs,
        }
        best = self.request.output / WEIGHTS if progress.candidates else None
        averages = self.averages.tensors if self.averages else None
        self.checkpoints.save(progress.step, self.model, self.optimizers, state, best, averages)

    def _with_advice(self, error: TrainingError) -> TrainingError:
        steps = self.checkpoints.steps()
        if not steps:
            return error
        command = f"{self._resume_command} --learning-rate X"
        return TrainingError(f"{error}. The checkpoint of step {steps[-1]} is good: {command}")

    def _report(self, trainer: Trainer, test: dict[str, Any]) -> None:
        metrics = summary(self.plan.options.preset, trainer, test, self.plan.rows)
        metrics["seconds"] = time.perf_counter() - self.start.clock
        metrics["environment"] = environment() | {"command": self.plan.command}
        if self.world.is_first:
            self.folder.require()
            write_json(self.request.output / METRICS, metrics)
        self.say(f"{describe_result(metrics)}; in {self.request.output}")
