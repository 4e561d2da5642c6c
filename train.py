"""Train a DLRM on Criteo rows.

    python train.py --data rows.tsv --preset kaggle --compression 1000 --output runs/robe
    python train.py --data rows.tsv --preset kaggle --embedding full --table-rows data --output runs/full

PATH is a file or folder in any format of data/: Criteo's logs, what data.prepare wrote, facebookresearch/dlrm's or
torchrec's files, Parquet. Unless the data says otherwise, rows are taken in their order: 5/7 train, 1/7 validate, 1/7
test. The weights with the best validation AUC are kept and tested. The output folder gets model.safetensors and
config.json (infer.py needs only these), metrics.json, and learning_curve.png.
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

from data.batches import epoch_batches, in_background, rebatch, split_rows, vocabulary
from data.dataset import PARTS, Dataset
from data.formats import open_source
from data.program import exit_code
from data.rows import Batch, DataError, Layout
from data.sources import Source, require_one_layout
from dlrm import DLRM, PRESETS, checkpoint
from dlrm.config import EMBEDDINGS, OPTIMIZERS, DLRMConfig, TrainingConfig
from dlrm.embeddings import build_embeddings
from dlrm.metrics import EVALUATION_BATCH, environment, evaluate, peak_rss_bytes
from dlrm.plots import learning_curves
from dlrm.trainer import train

METRICS = "metrics.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="file or folder")
    parser.add_argument(
        "--eval-data",
        type=Path,
        metavar="PATH",
        help="validate on its first half, test on the second; train on all of --data",
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
        pieces = tqdm(source.read(train_rows.start, train_rows.stop), desc="counting ids", leave=False)
        known = vocabulary(pieces, source.layout.features)
    config = model_config(args, known, source.layout)
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

    def batches(epoch: int) -> Iterator[Batch]:
        return epoch_batches(source, train_rows, training.batch_size, args.seed, epoch)

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
        batches,
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


def open_data(path: Path, eval_path: Path | None) -> tuple[Source, range, dict[str, tuple[Source, range]]]:
    """The training data, its training rows, and of validation and test the data and rows."""
    source = open_source(path)
    rows = check(source)
    if eval_path is None:
        try:
            parts = source.parts() or dict(zip(PARTS, split_rows(rows)))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
        empty = [part for part, of_part in parts.items() if not len(of_part)]
        if empty:
            raise DataError(f"{path}: no rows for {empty[0]}")
        return source, parts["train"], {part: (source, parts[part]) for part in ("validation", "test")}
    other = open_source(eval_path)
    count = check(other)
    require_one_layout([source, other])
    if count < 2:
        raise DataError(f"{eval_path}: expected at least 2 rows, to validate and to test on")
    halves = {"validation": (other, range(0, count // 2)), "test": (other, range(count // 2, count))}
    return source, range(0, rows), halves


def check(source: Source) -> int:
    """See that every row can be read, and return their number."""
    if not source.labelled:
        raise DataError(f"{source.path}: has no labels; training needs them")
    if isinstance(source, Dataset):  # was checked when it was written
        with tqdm(unit="B", unit_scale=True, desc=f"checking {source.path.name}", leave=False) as bar:
            source.verify(progress=bar.update)
        return source.rows
    rows = 0
    with tqdm(unit="row", unit_scale=True, desc=f"checking {source.path.name}", leave=False) as bar:
        for records in source.records():
            rows += len(records)
            bar.update(len(records))
    return rows


def training_config(args: argparse.Namespace) -> TrainingConfig:
    names = ("epochs", "batch_size", "learning_rate", "optimizer", "evaluations_per_epoch")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(PRESETS[args.preset].training, seed=args.seed, **changes)


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
