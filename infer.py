"""Use a trained DLRM.

    python infer.py predict --checkpoint runs/robe --data rows.tsv --output predictions.csv

writes one click probability per row of the data, in its order, under the name "probability": as CSV, Parquet or .npy,
by the output's name. The data may be in any format of data/; with labels, AUC and log loss are printed as well.

docs/inference.md has the figures, and more on each command.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from data.batches import in_background, rebatch
from data.formats import open_source
from data.predictions import check_name, predictions_file
from data.program import exit_code
from data.rows import DataError
from data.sources import Source
from dlrm import DLRM, checkpoint
from dlrm.inference import DTYPES, Predictor
from dlrm.metrics import EVALUATION_BATCH, Scores


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(run=run)
        command.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="of train.py's --output")
        command.add_argument("--array-dtype", choices=DTYPES, default="float32", help="the ROBE array is kept in")
        return command

    command = add("predict", run_predict, "write click probabilities")
    add_mlp_dtype(command)
    command.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="file or folder, with or without labels"
    )
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help=".csv, .parquet or .npy")
    return parser.parse_args(arguments)


def add_mlp_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mlp-dtype", choices=DTYPES, default="float32", help="the MLPs compute in")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return exit_code(lambda: args.run(args))


def describe_hots(hots: tuple[int, ...] | None) -> str:
    return "one id a feature" if hots is None else f"{', '.join(map(str, hots))} ids a feature"


def open_data(path: Path, model: DLRM) -> Source:
    """The rows to predict, once they are known to be what the model was trained on."""
    source = open_source(path)
    source.verify()
    if source.layout.hots != model.config.data_hots:
        raise DataError(
            f"{path}: has {describe_hots(source.layout.hots)}, the model was trained on "
            f"{describe_hots(model.config.data_hots)}"
        )
    return source


def run_predict(args: argparse.Namespace) -> None:
    check_name(args.output)
    model = checkpoint.load(args.checkpoint)
    source = open_data(args.data, model)
    predictor = Predictor(model, array_dtype=args.array_dtype, mlp_dtype=args.mlp_dtype)
    scores = Scores()
    start = time.perf_counter()
    with (
        predictions_file(args.output) as write,
        tqdm(total=source.rows, unit="row", unit_scale=True, desc="predicting") as bar,
    ):
        for batch in in_background(lambda: rebatch(source.read(), EVALUATION_BATCH)):
            (probabilities,) = predictor.predict([batch])
            write(probabilities)
            if batch.labels is not None:
                scores.add(batch.labels, probabilities)
            bar.update(len(probabilities))
        rows = bar.n
    seconds = time.perf_counter() - start
    print(f"{args.output}: {rows:,} probabilities, {rows / seconds:,.0f} a second")
    if scores.rows:
        result = scores.result()
        auc = "" if result["auc"] is None else f"AUC {result['auc']:.4f}, "
        print(f"{auc}log loss {result['log_loss']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
