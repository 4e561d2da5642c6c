"""Train a DLRM on click logs, with ROBE embeddings or with full tables.

Train with embeddings that take 1,000 times less memory than the full tables:

    python train.py --data rows.tsv --preset kaggle --compression 1000 --output runs/robe

Train the same model with full tables, for comparison:

    python train.py --data rows.tsv --preset kaggle --embedding full --table-rows data --output runs/full

Resume a run that was stopped or killed:

    python train.py --resume --output runs/robe

Train with two processes:

    torchrun --nproc-per-node 2 train.py --data prepared --preset terabyte --output runs/terabyte

Data: Criteo's logs, a folder written by data.prepare, files of facebookresearch/dlrm or torchrec, or Parquet (see
docs/data.md). Unless the data defines a split, rows are used in their order: 5/7 to train, 1/7 to validate, 1/7 to
test. The weights with the best validation AUC are kept and scored on the test rows.

Output, in the folder of the run:

    model.safetensors, config.json      the model; all that infer.py needs
    metrics.json, learning_curve.png    results
    metrics.jsonl, tensorboard/         figures written during training
    checkpoints/                        to resume from

Ctrl-C or SIGTERM saves a checkpoint and stops. A resumed run ends with the same weights as one that never stopped.

Exit codes: 0 done, or stopped; 2 options, data or machine do not allow the run; 3 training diverged; 130 interrupted by
a second Ctrl-C.
"""

import argparse
import shlex
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from data.program import exit_code
from data.training_rows import TrainingRows
from dlrm import PRESETS
from dlrm.config import EMBEDDINGS, OPTIMIZERS
from dlrm.distributed import World, leave
from dlrm.training.options import RunOptions
from dlrm.training.plan import LAST, Request
from dlrm.training.run import run
from dlrm.training.trainer import CHECKPOINT_SECONDS


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which rows are used."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, metavar="PATH", help="file or folder of rows; required unless resuming")
    group.add_argument(
        "--eval-data",
        type=Path,
        metavar="PATH",
        help="rows for validation (first half) and test (second half); --data is then used for training only",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is trained."""
    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=PRESETS, help="model sizes and training recipe (default: kaggle)")
    group.add_argument(
        "--embedding",
        choices=EMBEDDINGS,
        help="robe: one shared array (default); full: a table per feature; hash: small tables, read at id modulo size",
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--compression",
        type=float,
        metavar="X",
        help="use X times less memory than the full tables (robe and hash; default: 1000)",
    )
    size.add_argument("--robe-size", type=int, metavar="N", help="weights in the array, instead of --compression")
    group.add_argument(
        "--block-size",
        type=int,
        metavar="Z",
        help="consecutive weights that one hash of ROBE addresses (default: the embedding dimension)",
    )
    group.add_argument(
        "--init-std", type=float, metavar="X", help="standard deviation of the array's initial weights (default: 0.01)"
    )
    group.add_argument(
        "--admission",
        type=float,
        metavar="SHARE",
        help="give embeddings only to ids that help prediction; the other ids of a feature share one. Takes at most "
        "this share of the embedding memory for the filter of ids; 0.125 works well. The ids are chosen in passes over "
        "the training rows",
    )
    group.add_argument(
        "--admit-after",
        type=int,
        metavar="N",
        help="with --admission: choose ids during training instead, those seen N times",
    )
    group.add_argument(
        "--table-rows",
        choices=("preset", "data"),
        help="sizes of the full tables. preset: the preset's, read at id %% size (default); data: a row for each id in "
        "the training rows. With robe and hash this sets what --compression is relative to",
    )
    group.add_argument(
        "--synthetic-hots",
        action="store_true",
        default=None,
        help="make several ids a feature from one, 214 a row in all, as in MLPerf's DLRM-DCNv2",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="seed of initial weights, hashing and shuffling (default: 0)"
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how it is trained."""
    group = parser.add_argument_group("training", "Defaults come from the preset.")
    group.add_argument("--epochs", type=int, metavar="N", help="passes over the training rows")
    group.add_argument("--target-auc", type=float, metavar="X", help="stop as soon as the validation AUC exceeds X")
    group.add_argument("--batch-size", type=int, metavar="N", help="rows per step, in all processes together")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="optimizer of all weights")
    group.add_argument("--learning-rate", type=float, metavar="X", help="learning rate after warm-up, before decay")
    group.add_argument("--warmup-steps", type=int, metavar="N", help="raise the learning rate linearly over N steps")
    group.add_argument("--decay-start", type=int, metavar="N", help="start to lower the learning rate after step N")
    group.add_argument(
        "--decay-steps", type=int, metavar="N", help="lower it quadratically over N steps; 0: keep it constant"
    )
    group.add_argument(
        "--averaging-steps",
        type=int,
        metavar="N",
        help="evaluate and keep a moving average of the weights over about N steps; 0: the last weights",
    )
    group.add_argument(
        "--prune",
        type=float,
        metavar="SHARE",
        help="set this share of the blocks of the MLPs' and the cross net's weights to zero while it trains, such as "
        "0.75; 0: none",
    )
    group.add_argument(
        "--prune-block", type=int, metavar="N", help="outputs of a layer that make a block, for each input"
    )
    group.add_argument(
        "--prune-schedule",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        help="epochs after which pruning starts, and is done; weights are kept from then on only",
    )
    group.add_argument("--evaluations-per-epoch", type=int, metavar="N", help="evaluations in an epoch, evenly spaced")
    group.add_argument("--mllog", type=Path, metavar="FILE", help="also write a log in MLPerf's format")


def add_program_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are not part of the run."""
    group = parser.add_argument_group("output and checkpoints")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--overwrite", action="store_true", help="replace the run that is in --output")
    start.add_argument(
        "--resume",
        type=int,
        nargs="?",
        const=LAST,
        metavar="STEP",
        help="resume the run in --output from its last checkpoint, or from that of STEP, with the options it was "
        "started with; start it if there is no checkpoint. --data, --eval-data, --epochs, --learning-rate and "
        "--target-auc may be changed",
    )
    group.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=CHECKPOINT_SECONDS / 60,
        metavar="X",
        help="longest time between two checkpoints (default: %(default)g); evaluations save one too",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        default=2,
        metavar="K",
        help="checkpoints to keep (default: %(default)s)",
    )
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available, else cpu")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Returns:
        device, and request: what ``dlrm.training.run`` is asked for.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (add_data_options, add_model_options, add_training_options, add_program_options):
        add(parser)
    args = parser.parse_args(arguments)
    repeated = []  # a resumed run does not remember these
    for name in ("checkpoint_minutes", "keep_checkpoints", "device"):
        if getattr(args, name) != parser.get_default(name):
            repeated += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    args.request = Request(
        output=args.output,
        given={field.name: getattr(args, field.name) for field in fields(RunOptions)},
        command=shlex.join(sys.argv),
        resume_command=shlex.join([sys.argv[0], "--resume", "--output", str(args.output), *repeated]),
        resume=args.resume,
        overwrite=args.overwrite,
        checkpoint_seconds=60 * args.checkpoint_minutes,
        keep_checkpoints=args.keep_checkpoints,
    )
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = parse(arguments)

    def train() -> None:
        world = World.join(args.device)
        try:
            run(args.request, world, partial(TrainingRows, say=print), print)
        finally:
            world.close()

    return exit_code(train)


if __name__ == "__main__":
    leave(main())
