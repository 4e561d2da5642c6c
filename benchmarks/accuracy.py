"""How much AUC does compression cost? Trains full tables, ROBE and the hashing trick at equal sizes.

    python -m benchmarks.accuracy --data rows.tsv --seeds 5 --output runs/accuracy

All are sized by the ids of the training rows; the weights with the best validation AUC are tested. Writes accuracy.json
and prints a table: mean and standard deviation over the seeds, and the mean difference from the full tables of the same
seed.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from benchmarks.runs import train
from dlrm.checkpoint import write_json
from dlrm.metrics import environment

METHODS: dict[str, list[str | float]] = {
    "full tables": ["--embedding", "full"],
    **{f"ROBE {c}x": ["--compression", c] for c in (10, 100, 1000)},
    **{f"hash trick {c}x": ["--embedding", "hash", "--compression", c] for c in (10, 100, 1000)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: expected at least 2, for a standard deviation")

    runs: dict[str, list[dict]] = {name: [] for name in METHODS}
    for seed in range(args.seeds):
        for name, options in METHODS.items():
            folder = args.output / f"{name.replace(' ', '-').lower()}-{seed}"
            runs[name].append(train(args.data, folder, "--table-rows", "data", "--seed", seed, *options))
    write_json(args.output / "accuracy.json", {"runs": runs, "environment": environment()})

    full = [run["auc"] for run in runs["full tables"]]
    print(f"\n| {args.seeds} seeds | floats | test AUC | sd | log loss | against full | best epoch |")
    print("|---|---|---|---|---|---|---|")
    for name, of_seed in runs.items():
        auc = [run["auc"] for run in of_seed]
        print(
            f"| {name} | {of_seed[0]['array_floats']:,} | {mean(auc):.4f} | {stdev(auc):.4f} "
            f"| {mean(run['log_loss'] for run in of_seed):.4f} "
            f"| {mean(a - b for a, b in zip(auc, full)):+.4f} | {mean(run['best_epoch'] for run in of_seed):.2f} |"
        )


if __name__ == "__main__":
    main()
