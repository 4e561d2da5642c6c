"""How close does ROBE come to full tables, and to the best possible AUC, at 10x, 100x and 1000x?

    python -m benchmarks.demo --output runs/demo

This is `make train`. Takes at most 6 minutes on 2 cores. Generates 200,000 Criteo rows with a planted signal, so that
the best possible AUC is known, and trains the same DLRM with full tables and with ROBE through train.py. Prints a
table, and writes comparison.json and learning_curves.png beside the folders of the runs.

Full tables have a row for each id of the training rows, so compression counts only rows that are really trained.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.results import machine
from benchmarks.runs import train
from data.batches import split_rows
from data.formats.criteo_tsv import CriteoTSV
from data.rows import Batch
from data.synthetic import Signal, write
from dlrm.metrics import describe_auc, score
from dlrm.plots import learning_curves
from robe_files import write_json

COMPRESSIONS = (10, 100, 1000)
AVERAGED = ("--averaging-steps", 500)
ADMITTED = ("--admission", 0.125)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for rows, runs and results")
    parser.add_argument(
        "--rows", type=int, default=200_000, metavar="N", help="rows to generate (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of rows and runs (default: %(default)s)")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    rows = args.output / "rows.tsv"
    signal = write(rows, args.rows, args.seed, progress=True)
    methods: dict[str, list] = {"full tables": ["--embedding", "full", *AVERAGED]}
    methods |= {
        f"ROBE {compression}x": ["--compression", compression, *ADMITTED, *AVERAGED] for compression in COMPRESSIONS
    }
    runs = {}
    for name, options in methods.items():
        folder = args.output / name.replace(" ", "-").lower()
        runs[name] = train(rows, folder, "--table-rows", "data", "--seed", args.seed, "--overwrite", *options)

    best = best_possible_auc(rows, signal)
    comparison = {"machine": machine(), "seed": args.seed, "rows": args.rows, "best_possible_auc": best, "runs": runs}
    write_json(args.output / "comparison.json", comparison)
    picture = args.output / "learning_curves.png"
    learning_curves(picture, {name: run["history"] for name, run in runs.items()}, best_possible=best)
    print(f"\n{'':14}{'test AUC':>10}{'floats':>14}{'bytes':>10}{'samples/s':>12}")
    for name, run in runs.items():
        size = run["array_floats"]
        megabytes = (4 * size + run["admission_bytes"]) / 1e6
        print(f"{name:14}{describe_auc(run['auc']):>10}{size:14,}{megabytes:7.2f} MB{run['samples_per_second']:12,.0f}")
    print(f"{'best possible':14}{describe_auc(best):>10}   (the AUC of the true probabilities on the same test rows)")
    print(f"\nlearning curves: {picture}")


def best_possible_auc(rows: Path, signal: Signal) -> float | None:
    """Return the AUC of the true probabilities on the test rows; None where all labels are the same."""
    file = CriteoTSV(rows)
    test = split_rows(sum(len(batch) for batch in file.read()))[2]
    batch = Batch.concatenate(list(file.read(test.start, test.stop)))
    assert batch.labels is not None
    logits = torch.from_numpy(signal.logits(batch.dense, batch.sparse))
    return score(batch.labels, logits.double().sigmoid().numpy())["auc"]


if __name__ == "__main__":
    main()
