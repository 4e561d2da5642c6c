"""Train a DLRM on Criteo rows.

    python train.py --data rows.tsv --preset kaggle --compression 1000 --output runs/robe
    python train.py --data rows.tsv --preset kaggle --embedding full --table-rows data --output runs/full
    python train.py --resume --output runs/robe
    torchrun --nproc-per-node 2 train.py --data prepared --preset terabyte --output runs/terabyte

PATH is a file or folder in any format of data/: Criteo's logs, what data.prepare wrote, facebookresearch/dlrm's or
torchrec's files, Parquet. Unless the data says otherwise, rows are taken in their order: 5/7 train, 1/7 validate, 1/7
test. The weights with the best validation AUC are kept and tested. The output folder gets model.safetensors and
config.json (infer.py needs only these), metrics.json, learning_curve.png, metrics.jsonl and tensorboard/ (figures while
it trains), and checkpoints/. Interrupted (Ctrl-C, SIGTERM), it saves where it is; --resume goes on from there, or from
the last checkpoint after a kill, and ends with the same weights.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.batches import epoch_batches, in_background, rebatch, share, vocabulary
from data.formats.opening import open_source
from data.parts import Part, check, halves, split
from data.program import exit_code
from data.rows import Batch
from data.schema import DataError, Layout
from dlrm import DLRM, PRESETS, checkpoint
from dlrm.checkpoint import WEIGHTS, Saved, TrainingCheckpoints
from dlrm.config import EMBEDDINGS, MLPERF_HOTS, OPTIMIZERS, DLRMConfig, TrainingConfig
from dlrm.distributed import PeerFailed, World
from dlrm.embeddings import build_embeddings, synthetic_ids
from dlrm.metrics import EVALUATION_BATCH, environment, evaluate, peak_rss_bytes
from dlrm.plots import learning_curves
from dlrm.training.journal import Journal
from dlrm.training.mllog import MLLog
from dlrm.training.trainer import (
    CHECKPOINT_SECONDS,
    AveragedWeights,
    Progress,
    Stopped,
    Trainer,
    TrainingError,
    make_optimizers,
)
from robe import Admission
from robe.hashing import table_key

METRICS, CURVES = "metrics.json", "learning_curve.png"
LAST = -1  # --resume without a step
# Options that need not be what they were when a run goes on.
FREE = {"data", "eval_data", "epochs", "learning_rate", "target_auc"}
PATHS = {"data", "eval_data", "mllog"}
DEFAULTS = {"preset": "kaggle", "embedding": "robe", "table_rows": "preset", "seed": 0}
TRAINING_OPTIONS = (
    "epochs", "target_auc", "batch_size", "learning_rate", "warmup_steps", "decay_start", "decay_steps", "optimizer",
    "averaging_steps", "evaluations_per_epoch",
)  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_argument_group("what is trained")
    run.add_argument("--data", type=Path, metavar="PATH", help="file or folder; required but with --resume")
    run.add_argument(
        "--eval-data",
        type=Path,
        metavar="PATH",
        help="validate on its first half, test on the second; train on all of --data",
    )
    run.add_argument("--preset", choices=PRESETS, help="default kaggle")
    run.add_argument("--embedding", choices=EMBEDDINGS, help="default robe")
    size = run.add_mutually_exclusive_group()
    size.add_argument("--compression", type=float, help="times fewer weights than the full tables (default 1000)")
    size.add_argument("--robe-size", type=int, metavar="N", help="weights in the array")
    run.add_argument("--block-size", type=int, metavar="Z", help="weights per hashed block (default: the dimension)")
    run.add_argument("--init-std", type=float, metavar="X", help="scale of the initial array (default 0.01)")
    run.add_argument(
        "--admission",
        type=float,
        metavar="SHARE",
        help="only ids that are worth it have a row of their own, the others of a feature share one; a filter keeps "
        "them, in at most this share of the memory that is left (1/8 is good). They are chosen in passes over the "
        "training rows, or with --admit-after while it trains",
    )
    run.add_argument("--admit-after", type=int, metavar="N", help="ids have a row of their own once seen N times")
    run.add_argument(
        "--table-rows",
        choices=("preset", "data"),
        help="rows of the full tables: the preset's, read at id %% rows (default); or as many as ids occur in the "
        "training rows, read through a dictionary of them. ROBE needs neither: this then only says what --compression "
        "refers to",
    )
    run.add_argument(
        "--synthetic-hots",
        action="store_true",
        default=None,
        help="make several ids a feature of one, as many as MLPerf's DCNv2 has (214 a row)",
    )
    run.add_argument("--seed", type=int, help="of initial values, hash and shuffling (default 0)")
    how = parser.add_argument_group("how it is trained (default: as the preset has it)")
    how.add_argument("--epochs", type=int, metavar="N")
    how.add_argument("--target-auc", type=float, metavar="X", help="end with the first evaluation above it")
    how.add_argument("--batch-size", type=int, metavar="N", help="of all processes together")
    how.add_argument("--learning-rate", type=float, metavar="X")
    how.add_argument("--warmup-steps", type=int, metavar="N", help="over which the learning rate grows linearly")
    how.add_argument("--decay-start", type=int, metavar="N", help="step after which it falls, as MLPerf's")
    how.add_argument("--decay-steps", type=int, metavar="N", help="over how many, with power 2")
    how.add_argument(
        "--averaging-steps",
        type=int,
        metavar="N",
        help="evaluate and keep an average of the weights over about so many steps; 0: the last weights",
    )
    how.add_argument("--optimizer", choices=OPTIMIZERS)
    how.add_argument("--evaluations-per-epoch", type=int, metavar="N")
    how.add_argument("--mllog", type=Path, metavar="FILE", help="write MLPerf's training log")
    program = parser.add_argument_group("the program")
    program.add_argument("--output", type=Path, required=True, metavar="DIR")
    program.add_argument(
        "--resume",
        type=int,
        nargs="?",
        const=LAST,
        metavar="STEP",
        help="go on from the last checkpoint of --output, or from that of STEP, with the options the run was started "
        "with; without a checkpoint, start",
    )
    program.add_argument("--checkpoint-minutes", type=float, default=CHECKPOINT_SECONDS / 60, metavar="X")
    program.add_argument("--keep-checkpoints", type=int, default=2, metavar="K", help="the last K (default 2)")
    program.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    args = parser.parse_args(arguments)
    args.program = [
        word
        for action in program._group_actions
        if action.dest not in ("output", "resume") and getattr(args, action.dest) != action.default
        for word in (action.option_strings[0], str(getattr(args, action.dest)))
    ]
    args.run = {action.dest: getattr(args, action.dest) for group in (run, how) for action in group._group_actions}
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return exit_code(lambda: run_in_world(args))


def run_in_world(args: argparse.Namespace) -> None:
    world = World.join(args.device)
    try:
        run(args, world)
    finally:
        world.close()


def run(args: argparse.Namespace, world: World) -> None:
    if args.admit_after is not None and world.size > 1:
        raise ValueError(
            "--admit-after: each of several processes would count its own rows; leave it out, and ids are "
            "chosen before training"
        )
    start, start_ms = time.perf_counter(), int(time.time() * 1e3)
    checkpoints = TrainingCheckpoints(args.output, args.keep_checkpoints)
    saved = world.each(lambda: find_checkpoint(args, checkpoints))
    options = world.each(lambda: merge_options(args.run, saved))
    training = world.each(lambda: training_config(options, saved))
    # The whole data is read once before anything is written: a bad line should not end a run hours later.
    parts = open_parts(options, world)
    rows = {name: len(part) for name, part in parts.items()}
    if saved:
        world.each(lambda: require_rows(rows, saved, options.data))
        model = saved.model
        if options.admit_after is not None:
            model.embeddings.admission.threshold = options.admit_after
    else:
        model = new_model(options, training, parts["train"], world)
    model.to(world.device)
    world.same_weights(model)
    optimizers = make_optimizers(model, training, world)
    if saved:
        saved.restore(optimizers)
    averages = None
    if training.averaging_steps:
        before = {name: x.to(world.device) for name, x in saved.averages.items()} if saved else None
        averages = AveragedWeights(model, training.averaging_steps, before)
    progress = Progress(**saved.state["progress"]) if saved else Progress()
    command = saved.state["command"] if saved else shlex.join(sys.argv)
    say = print if world.is_first else lambda *_: None
    say(describe(options, model, rows) + (f"; going on at step {progress.step}" if saved else ""))

    signals = StopSignals()
    journal, mllog = None, None
    if world.is_first:
        # Before anything of theirs is taken out of the logs.
        checkpoints.remove_after(progress.step if saved else -1)
        args.output.mkdir(parents=True, exist_ok=True)
        positions = saved.state["positions"] if saved else {"journal": 0, "mllog": 0}
        if options.mllog:
            mllog = MLLog(options.mllog, positions["mllog"])
            mllog.begin(model.config, training, rows["train"], rows["validation"], start_ms)
        journal = Journal(args.output, positions["journal"], progress.step)
        if saved:
            saved.put_back_best(args.output)

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        source, of_part = parts["train"].source, parts["train"].rows
        batch_size, seed = training.batch_size, options.seed
        return epoch_batches(source, of_part, batch_size, seed, epoch, world.rank, world.size, start=first)

    def scores(part: str, of: DLRM) -> dict[str, float]:
        own = share(parts[part].rows, world.rank, world.size)
        read = in_background(lambda: rebatch(parts[part].source.read(own.start, own.stop), EVALUATION_BATCH))
        return evaluate(of, read if world.size > 1 else signals.watch(read), world)

    def save(progress: Progress) -> None:
        state = {
            "progress": asdict(progress),
            "training": training.to_dict(),
            "rows": rows,
            "positions": {"journal": journal.position(), "mllog": mllog.position() if mllog else 0},
            "options": {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in vars(options).items()},
            "command": command,
            "processes": world.size,
        }
        best = args.output / WEIGHTS if progress.history else None
        checkpoints.save(progress.step, model, optimizers, state, best, averages.tensors if averages else None)

    trainer = Trainer(
        model,
        training,
        batches,
        rows["train"],
        evaluate=lambda: scores("validation", model),
        keep=lambda: checkpoint.save(args.output, model, training.to_dict()),
        save=save,
        wants_to_stop=lambda: signals.received,
        optimizers=optimizers,
        averages=averages,
        progress=progress,
        world=world,
        journal=journal,
        mllog=mllog,
        checkpoint_seconds=60 * args.checkpoint_minutes,
        show=world.is_first,
    )
    if world.is_first and not trainer.finished:
        (args.output / METRICS).unlink(missing_ok=True)  # of a run before this one, or of fewer epochs
    try:
        with signals:
            trainer.train()
            if mllog:
                mllog.run_stop(training.target_auc is None or trainer.reached is not None)
            test = scores("test", world.each(lambda: checkpoint.load(args.output)).to(world.device))
    except Stopped:
        say(f"stopped at step {progress.step}, all is saved; to go on:\n    {resume_command(args, world)}")
        return
    except TrainingError as error:
        if not world.is_first:  # all have found the same
            raise PeerFailed(error.exit_code) from None
        if not checkpoints.steps():
            raise
        last = checkpoints.steps()[-1]
        raise TrainingError(
            f"{error}. Good until step {last}: {resume_command(args, world)} --learning-rate X"
        ) from None
    finally:
        if journal and progress.history:
            learning_curves(args.output / CURVES, {model.config.embedding: progress.history})
        for log in (journal, mllog):
            if log:
                log.close()
    metrics = summary(options, trainer, test, rows) | {"seconds": time.perf_counter() - start}
    metrics["environment"] = environment() | {"command": command}
    if world.is_first:
        checkpoint.write_json(args.output / METRICS, metrics)
    say(f"{describe_result(metrics)}; in {args.output}")


def find_checkpoint(args: argparse.Namespace, checkpoints: TrainingCheckpoints) -> Saved | None:
    """Where to go on; None for a new run.

    Raises:
        ValueError: --output is a file, or has a run that a new one would overwrite.
    """
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output: {args.output} is a file; expected a folder, or a new name")
    if args.resume is not None:
        return checkpoints.load(None if args.resume == LAST else args.resume)
    if checkpoints.steps() and not (args.output / METRICS).exists():
        raise ValueError(
            f"--output: {args.output} has a run that is not finished, with a checkpoint of step "
            f"{checkpoints.steps()[-1]}: go on with it (--resume), or give a new name"
        )
    return None


def require_rows(rows: dict[str, int], saved: Saved, path: Path) -> None:
    expected = saved.state["rows"]
    if rows != expected:
        raise DataError(f"{path}: not the data of this run: {describe_rows(rows)}; expected {describe_rows(expected)}")


def describe(options: argparse.Namespace, model: DLRM, rows: dict[str, int]) -> str:
    full, bytes = model.config.full_floats, model.config.admission_bytes
    admission = f" and an admission of {bytes:,} bytes" if bytes else ""
    return (
        f"{options.preset}, {model.config.embedding}: {embedding_floats(model):,} floats of embeddings{admission} for "
        f"{full:,} in full tables ({compression(model):.4g}x); {describe_rows(rows)}"
    )


def describe_rows(rows: dict[str, int]) -> str:
    return f"{rows['train']:,} rows train, {rows['validation']:,} validate, {rows['test']:,} test"


def describe_result(metrics: dict[str, Any]) -> str:
    target, epoch = metrics["target_auc"], metrics["target_epoch"]
    reached = "not reached" if epoch is None else f"reached at epoch {epoch:.2f}"
    return (
        (f"AUC {target} {reached}\n" if target else "")
        + f"test AUC {metrics['auc']:.4f}, log loss {metrics['log_loss']:.4f} (weights of epoch "
        f"{metrics['best_epoch']:.2f}, validation AUC {metrics['validation_auc']:.4f}); "
        f"{metrics['samples_per_second']:,.0f} samples/s"
    )


def compression(model: DLRM) -> float:
    """Bytes of the full tables over bytes kept."""
    return 4 * model.config.full_floats / (4 * embedding_floats(model) + model.config.admission_bytes)


def embedding_floats(model: DLRM) -> int:
    return sum(p.numel() for p in model.embeddings.parameters())


def summary(
    options: argparse.Namespace, trainer: Trainer, test: dict[str, float], rows: dict[str, int]
) -> dict[str, Any]:
    """What metrics.json says of a finished run."""
    progress, config, floats = trainer.progress, trainer.model.config, embedding_floats(trainer.model)
    return {
        "auc": test["auc"],
        "log_loss": test["log_loss"],
        "validation_auc": progress.best["auc"],
        "best_epoch": progress.best["epoch"],
        "target_auc": trainer.config.target_auc,
        "target_epoch": trainer.reached and trainer.reached["epoch"],
        "samples_per_second": trainer.trained_rows / progress.seconds,
        "array_floats": floats,
        "admission_bytes": config.admission_bytes,
        "full_floats": config.full_floats,
        "compression": compression(trainer.model),
        "epochs": trainer.config.epochs,
        "steps": progress.step,
        "peak_rss_bytes": peak_rss_bytes(),
        "seed": options.seed,
        "preset": options.preset,
        "embedding": config.embedding,
        "processes": trainer.world.size,
        "rows": rows,
        "history": progress.history,
    }


class StopSignals:
    """Within ``with``, SIGTERM and SIGINT ask the program to stop; a second SIGINT interrupts it."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same; raises Stopped when a signal has come."""
        for batch in batches:
            if self.received:
                raise Stopped
            yield batch


def resume_command(args: argparse.Namespace, world: World) -> str:
    program = ["python"] if world.size == 1 else ["torchrun", "--nproc-per-node", str(world.size)]
    return shlex.join([*program, sys.argv[0], "--resume", "--output", str(args.output), *args.program])


def merge_options(given: dict[str, Any], saved: Saved | None) -> argparse.Namespace:
    """The options of a run: those given; of one that goes on, those it was started with.

    Raises:
        ValueError: given ones are others than those.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if saved is None:
        if "data" not in given:
            raise ValueError("--data: is needed to start a run (there is no checkpoint to go on from)")
        names = ("compression", "robe_size", "block_size", "init_std", "admission", "admit_after", "synthetic_hots")
        changes = (*PATHS, *TRAINING_OPTIONS, *names)
        return argparse.Namespace(**dict.fromkeys(changes) | DEFAULTS | given)
    # Those that are new since then were not given.
    started = dict.fromkeys((*TRAINING_OPTIONS, "admission", "admit_after")) | saved.state["options"]
    for name in PATHS:
        started[name] = started[name] and Path(started[name])
    for name, value in given.items():
        free = name in FREE or (name == "mllog" and started[name])  # it may have moved, but not begin in the middle
        if not free and value != started[name]:
            was = "was not given" if started[name] is None else f"was {started[name]}"
            raise ValueError(
                f"--{name.replace('_', '-')}: {value}, but {was} when this run was started; leave it out, or start "
                "another run"
            )
    return argparse.Namespace(**started | given)


def open_parts(options: argparse.Namespace, world: World) -> dict[str, Part]:
    """The training, validation and test rows, once all of them have been seen to be readable."""
    source = world.each(lambda: open_source(options.data))
    rows = world.first(lambda: check(source))
    if options.eval_data is None:
        return world.each(lambda: split(options.data, source, rows))
    other = world.each(lambda: open_source(options.eval_data))
    other_rows = world.first(lambda: check(other))
    return world.each(lambda: halves(options.eval_data, source, rows, other, other_rows))


def new_model(options: argparse.Namespace, training: TrainingConfig, train: Part, world: World) -> DLRM:
    """The model of a new run, before its first step."""
    known = world.first(lambda: count_ids(train)) if options.table_rows == "data" else None
    config = world.each(lambda: model_config(options, known, train.source.layout))
    world.each(lambda: require_memory(config, training))
    filter = None
    if options.admission and options.admit_after is None:
        filter = world.first(lambda: choose_ids(train, config))
        config = replace(config, admission_bytes=8 * len(filter))

    def build() -> DLRM:
        torch.manual_seed(options.seed)
        ids = [torch.from_numpy(column) for column in known] if known and config.vocabulary else None
        model = DLRM(config, build_embeddings(config, ids))
        if filter is not None:
            model.embeddings.admission.filter.copy_(filter)
        elif options.admit_after is not None:
            model.embeddings.admission.start_counting(options.admit_after)
        return model

    return world.each(build)


def choose_ids(train: Part, config: DLRMConfig) -> torch.Tensor:
    """The filter of an admission, of at most the bytes that the config has for it."""

    def read() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with tqdm(total=len(train), unit="row", unit_scale=True, desc="choosing ids", leave=False) as bar:
            for batch in train.source.read(train.rows.start, train.rows.stop):
                assert batch.labels is not None
                sparse = torch.from_numpy(batch.sparse)
                if config.synthetic_hots:
                    sparse = synthetic_ids(sparse, config.hots or (), config.table_rows)
                yield sparse, torch.from_numpy(batch.labels).unsqueeze(1)
                bar.update(len(batch))

    keys = torch.tensor([table_key(config.hash_seed, feature) for feature in config.feature_of_id])
    return Admission.choose(read, keys, config.admission_bytes).filter


def count_ids(train: Part) -> list[np.ndarray]:
    pieces = tqdm(train.source.read(train.rows.start, train.rows.stop), desc="counting ids", leave=False)
    return vocabulary(pieces, train.source.layout.features)


def training_config(options: argparse.Namespace, saved: Saved | None) -> TrainingConfig:
    changes = {name: getattr(options, name) for name in TRAINING_OPTIONS if getattr(options, name) is not None}
    before = TrainingConfig.from_dict(saved.state["training"]) if saved else PRESETS[options.preset].training
    return replace(before, seed=options.seed, **changes)


def model_config(args: argparse.Namespace, known: list[np.ndarray] | None, layout: Layout) -> DLRMConfig:
    if args.embedding == "full" and (args.compression is not None or args.robe_size is not None):
        raise ValueError("--compression and --robe-size: the full tables are not compressed; leave them out")
    changes: dict = {
        "embedding": args.embedding,
        "block_size": args.block_size,
        "init_std": args.init_std,
        "hash_seed": args.seed,
        "hots": layout.hots,
    }
    share = args.admission
    if share is not None:
        if args.embedding != "robe" or not 0 < share < 1:
            raise ValueError(f"--admission: expected a share between 0 and 1, of --embedding robe, got {share}")
    elif args.admit_after is not None:
        raise ValueError("--admit-after: expected --admission with it, the memory of the ids that are let in")
    if args.synthetic_hots:
        if layout.hots is not None:
            raise ValueError("--synthetic-hots: the data has several ids a feature already; leave it out")
        changes |= {"hots": MLPERF_HOTS, "synthetic_hots": True}
    if args.embedding == "full":
        changes["compression"] = None
    elif args.robe_size is not None:
        changes |= {"compression": None, "robe_size": args.robe_size}
    elif args.compression is not None:
        changes["compression"] = args.compression
    if known is not None:
        changes["table_rows"] = tuple(len(ids) + 1 for ids in known)  # one more for ids that training did not see
        changes["vocabulary"] = args.embedding == "full"
        if changes["vocabulary"] and max(int(ids[-1]) for ids in known) >= 1 << 32:
            raise ValueError("--table-rows data: expected ids of 32 bits for --embedding full")
    config = replace(PRESETS[args.preset].model, **changes)
    if share is not None:
        config = replace(config, admission_bytes=max(int(4 * share * config.array_floats) // 8, 1) * 8)
    return config


def require_memory(config: DLRMConfig, training: TrainingConfig) -> None:
    """Refuse embeddings that can't fit before they are allocated."""
    floats = config.robe_size or config.full_floats / (config.compression or 1)
    copies = {"sgd": 1, "adagrad": 2, "adam": 3}[training.optimizer] + (config.embedding == "robe")
    copies += training.averaging_steps > 0
    needed, there = floats * 4 * copies, physical_memory()
    if needed > there:
        raise MemoryError(
            f"the embeddings take {needed / 1e9:.1f} GB with their optimizer's state, this machine has "
            f"{there / 1e9:.1f} GB: compress them more, or with --embedding full try --table-rows data"
        )


def physical_memory() -> float:
    """Bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
