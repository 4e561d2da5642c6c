"""Use a trained DLRM.

    python infer.py predict --checkpoint runs/robe --data rows.tsv --output predictions.csv

writes one click probability per row of the data, in its order, under the header "probability". The data may be
in any format of data/; with labels, AUC and log loss are printed as well.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import polars as pl
from tqdm import tqdm

from data.batches import in_background, rebatch
from data.formats import open_source
from data.program import exit_code
from data.rows import DataError
from dlrm import checkpoint
from dlrm.metrics import EVALUATION_BATCH, predict, score


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("predict", help="write click probabilities")
    command.set_defaults(run=run_predict)
    command.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    command.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="file or folder, with or without labels"
    )
    command.add_argument("--output", type=Path, required=True, metavar="CSV")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return exit_code(lambda: args.run(args))


def describe_hots(hots: tuple[int, ...] | None) -> str:
    return "one id a feature" if hots is None else f"{', '.join(map(str, hots))} ids a feature"


def run_predict(args: argparse.Namespace) -> None:
    if args.output.is_dir():
        raise ValueError(f"--output: {args.output} is a folder; expected the name of a file")
    model = checkpoint.load(args.checkpoint)
    source = open_source(args.data)
    source.verify()
    if source.layout.hots != model.config.data_hots:
        raise DataError(
            f"{args.data}: has {describe_hots(source.layout.hots)}, the model was trained on "
            f"{describe_hots(model.config.data_hots)}"
        )
    labels: list[np.ndarray] = []

    def batches():
        for batch in in_background(lambda: rebatch(source.read(), EVALUATION_BATCH)):
            if source.labelled:
                labels.append(batch.labels)
            yield batch

    args.output.parent.mkdir(parents=True, exist_ok=True)
    probabilities: list[np.ndarray] = []
    with (
        checkpoint.whole_file(args.output) as part,
        open(part, "wb") as file,
        tqdm(unit="row", unit_scale=True, desc="predicting") as bar,
    ):
        file.write(b"probability\n")
        for values in predict(model, batches()):
            pl.DataFrame({"probability": values}).write_csv(file, include_header=False)
            probabilities.append(values)
            bar.update(len(values))
    rows = sum(map(len, probabilities))
    print(f"{args.output}: {rows:,} probabilities")
    if source.labelled and len(np.unique(np.concatenate(labels))) == 2:
        scores = score(np.concatenate(labels), np.concatenate(probabilities))
        print(f"AUC {scores['auc']:.4f}, log loss {scores['log_loss']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
