"""Train a DLRM on Criteo rows.

    python train.py --data rows.tsv --preset kaggle --compression 1000 --output runs/robe
    python train.py --data rows.tsv --preset kaggle --embedding full --table-rows data --output runs/full

The rows are taken in file order: 5/7 train, 1/7 validate, 1/7 test. The weights with the best validation AUC are kept
and tested. The output folder gets model.safetensors and config.json (infer.py needs only these), metrics.json, and
learning_curve.png.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.batches import in_background, rebatch, shuffled, split_rows, vocabulary
from data.formats import Batch, CriteoTSV, DataError
from dlrm import DLRM, PRESETS, checkpoint
from dlrm.config import EMBEDDINGS, OPTIMIZERS, DLRMConfig, TrainingConfig
from dlrm.embeddings import build_embeddings
from dlrm.metrics import EVALUATION_BATCH, environment, evaluate, peak_rss_bytes
from dlrm.plots import learning_curves
from dlrm.program import exit_code
from dlrm.trainer import train

METRICS = "metrics.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Criteo TSV; plain, .gz or .xz")
    parser.add_argument(
        "--eval-data", type=Path, help="validate on its first half, test on the second; train on all of --data"
    )
    parser.add_argument("--preset", choices=PRESETS, default="kaggle")
    parser.add_argument("--embedding", choices=EMBEDDINGS, default="robe")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--compression", type=float, help="times fewer weights than the full tables (default 1000)")
    size.add_argument("--robe-size", type=int, metavar="N", help="weights in the array")
    parser.add_argument("--block-size", type=int, metavar="Z", help="weights per hashed block (default: the dimension)")
    parser.add_argument("--init-std", type=float, metavar="X", help="scale of the initial array (default 0.01)")
    parser.add_argument(
        "--table-rows",
        choices=("preset", "data"),
        default="preset",
        help="rows of the full tables: the preset's, read at id %% rows; or as many as ids occur in the training rows, "
        "read through a dictionary of them. ROBE needs neither: this then only says what --compression refers to",
    )
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--learning-rate", type=float, metavar="X")
    parser.add_argument("--optimizer", choices=OPTIMIZERS)
    parser.add_argument("--evaluations-per-epoch", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of initial values, hash and shuffling")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output: {args.output} is a file; expected a folder, or a new name")
    training = training_config(args)
    # The whole data is read once before anything is written: a bad line should not end a run hours later.
    source, train_rows, parts = open_data(args.data, args.eval_data)
    known = None
    if args.table_rows == "data":
        known = vocabulary(tqdm(source.read(train_rows.start, train_rows.stop), desc="counting ids", leave=False))
    config = model_config(args, known)
    require_memory(config, training)

    torch.manual_seed(args.seed)
    ids = [torch.from_numpy(column) for column in known] if known and config.vocabulary else None
    model = DLRM(config, build_embeddings(config, ids))
    array_floats = sum(p.numel() for p in model.embeddings.parameters())
    print(
        f"{args.preset}, {config.embedding}: {array_floats:,} floats of embeddings for {config.full_floats:,} in full "
        f"tables ({config.full_floats / array_floats:.4g}x); {len(train_rows):,} rows train, "
        f"{len(parts['validation'][1]):,} validate, {len(parts['test'][1]):,} test"
    )

    def epoch_batches(epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng([args.seed, epoch])
        shuffled_runs = in_background(lambda: shuffled(source.read(train_rows.start, train_rows.stop), rng))
        return rebatch(shuffled_runs, training.batch_size)

    def scores(part: str) -> dict[str, float]:
        file, rows = parts[part]
        return evaluate(model, in_background(lambda: rebatch(file.read(rows.start, rows.stop), EVALUATION_BATCH)))

    def keep() -> None:
        (args.output / METRICS).unlink(missing_ok=True)  # an earlier run's, of other weights
        checkpoint.save(args.output, model, training.to_dict())

    args.output.mkdir(parents=True, exist_ok=True)
    result = train(
        model,
        training,
        epoch_batches,
        len(train_rows),
        evaluate=lambda: scores("validation"),
        keep=keep,
    )
    model = checkpoint.load(args.output)
    test = scores("test")
    metrics = {
        "auc": test["auc"],
        "log_loss": test["log_loss"],
        "validation_auc": result["best"]["auc"],
        "best_epoch": result["best"]["epoch"],
        "samples_per_second": result["samples_per_second"],
        "array_floats": array_floats,
        "full_floats": config.full_floats,
        "compression": config.full_floats / array_floats,
        "epochs": training.epochs,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak_rss_bytes(),
        "seed": args.seed,
        "preset": args.preset,
        "embedding": config.embedding,
        "rows": {"train": len(train_rows)} | {name: len(rows) for name, (_, rows) in parts.items()},
        "environment": environment(),
        "history": result["history"],
    }
    checkpoint.write_json(args.output / METRICS, metrics)
    learning_curves(args.output / "learning_curve.png", {config.embedding: result["history"]})
    print(
        f"test AUC {test['auc']:.4f}, log loss {test['log_loss']:.4f} (weights of epoch {result['best']['epoch']:.2f}, "
        f"validation AUC {result['best']['auc']:.4f}); {result['samples_per_second']:,.0f} samples/s; in {args.output}"
    )


def open_data(path: Path, eval_path: Path | None) -> tuple[CriteoTSV, range, dict[str, tuple[CriteoTSV, range]]]:
    """The training file, its training rows, and of validation and test the file and rows."""
    source = CriteoTSV(path)
    rows = check(source)
    if eval_path is None:
        try:
            train_rows, validation, test = split_rows(rows)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        return source, train_rows, {"validation": (source, validation), "test": (source, test)}
    other = CriteoTSV(eval_path)
    count = check(other)
    if count < 2:
        raise DataError(f"{eval_path}: expected at least 2 rows, to validate and to test on")
    halves = {"validation": (other, range(0, count // 2)), "test": (other, range(count // 2, count))}
    return source, range(0, rows), halves


def check(file: CriteoTSV) -> int:
    """Read every line, and return the number of rows."""
    if not file.labelled:
        raise DataError(f"{file.path}: has no labels (39 fields); training needs 40")
    rows = 0
    with tqdm(unit="row", unit_scale=True, desc=f"checking {file.path.name}", leave=False) as bar:
        for batch in file.read():
            rows += len(batch)
            bar.update(len(batch))
    return rows


def training_config(args: argparse.Namespace) -> TrainingConfig:
    names = ("epochs", "batch_size", "learning_rate", "optimizer", "evaluations_per_epoch")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(PRESETS[args.preset].training, seed=args.seed, **changes)


def model_config(args: argparse.Namespace, known: list[np.ndarray] | None) -> DLRMConfig:
    if args.embedding == "full" and (args.compression is not None or args.robe_size is not None):
        raise ValueError("--compression and --robe-size: the full tables are not compressed; leave them out")
    changes: dict = {
        "embedding": args.embedding,
        "block_size": args.block_size,
        "init_std": args.init_std,
        "hash_seed": args.seed,
    }
    if args.embedding == "full":
        changes["compression"] = None
    elif args.robe_size is not None:
        changes |= {"compression": None, "robe_size": args.robe_size}
    elif args.compression is not None:
        changes["compression"] = args.compression
    if known is not None:
        changes["table_rows"] = tuple(len(ids) + 1 for ids in known)  # one more for ids that training did not see
        changes["vocabulary"] = args.embedding == "full"
    return replace(PRESETS[args.preset].model, **changes)


def require_memory(config: DLRMConfig, training: TrainingConfig) -> None:
    """Refuse embeddings that can't fit before they are allocated."""
    floats = config.robe_size or config.full_floats / (config.compression or 1)
    copies = {"sgd": 1, "adagrad": 2, "adam": 3}[training.optimizer] + (config.embedding == "robe")
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
