"""How much AUC does compression cost? Full tables, the hashing trick, quotient-remainder and ROBE at equal memory.

    python -m benchmarks.accuracy --data rows.tsv --output runs/accuracy
    python -m benchmarks.accuracy --generate 5000000 --compressions 1000 --batch-size 2048 --epochs 1 \\
        --searches 1 --changes rate --output runs/generated

The rows in their order: 5/7 train, 1/7 validates, 1/7 tests. Memory is counted in bytes and in all that a trained model
keeps: arrays, tables, and the filter of an admission; compression is against tables with a row for each id of the
training rows. Each method has the same search on validation rows before (SEARCH: a change at a time, kept where it
helps), at each compression, on seeds that are not tested; all Z have that of Z = 16. Epochs end where validation AUC
falls; the best evaluation is tested. All methods are trained on averaged weights. Those in int8 are trained in float32,
with as many weights as have room in int8, and rounded before the test. Differences are paired by seed.

Every run that ended is a line of runs.jsonl: a program that is started again goes on. Writes accuracy.json, accuracy.md
and accuracy.png. ``--methods`` and ``--study`` choose what is run.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student
from tqdm import tqdm

from benchmarks.trials import ADMISSION, EPOCHS, FULL, METHODS, Rows, Trial, run
from dlrm.checkpoint import write_json
from dlrm.machine import environment
from robe.saving import whole_file

SEARCH_SEED = 1000  # and on; those of tests are 0 and on
SEARCHED_AS = {
    **{f"ROBE, Z={z}": "ROBE, Z=16" for z in (1, 4, 8)},
    f"{ADMISSION}, Z=1": ADMISSION,
    f"{ADMISSION}, int8": ADMISSION,
    "ROBE, authors', int8": "ROBE, authors'",
}
_ADMITTED = Trial(ADMISSION)


def _with(**options: Any) -> Trial:
    return replace(_ADMITTED, options=tuple(options.items()))


STUDIES: dict[str, list[Trial]] = {
    "choice": [
        _with(),
        _with(admit=1 / 16),
        _with(admit=1 / 4),
        _with(times=1),
        _with(times=20),
        _with(rounds=1),
        _with(rounds=3),
        _with(labelled=False),
        _with(labelled=False, zero=True),
        Trial("ROBE, Z=16", options=(("soft", 10.0),)),
        Trial("ROBE, Z=16"),
    ],
    "averaging": [
        replace(trial, averaging=steps)
        for steps in (0, 100, 500, 2000)
        for trial in (Trial(FULL), Trial("ROBE, Z=16"), Trial(ADMISSION))
    ],
    "layout": [_with(block_size=z) for z in (1, 4, 8, 16, 32)] + [_with(sign=True), _with(twice=True)],
    "scale": [replace(_ADMITTED, init=x) for x in (0.1, 1.0, 3.0, 10.0)] + [_with(gain=True), _with(table_scale=0.25)],
    "optimizer": [
        *(_with(array_rate=x) for x in (0.3, 1.0, 3.0)),
        _with(touched=True),
        replace(_with(optimizer="adagrad"), rate=0.01),
        _with(sharing=0.5),
        _with(sharing=1.0),
    ],
    "tiers": [
        *(_with(), _with(tier=0.25), _with(tier=0.5), _with(small_tables=5), _with(small_tables=30)),
        _with(project=True),
    ],
}
# Each changes one thing, and is kept if validation AUC is better; the next ones go on from there.
SEARCH: tuple[dict[str, float], ...] = ({"rate": 2.0}, {"rate": 0.5}, {"init": 0.1}, {"decay": 1e-6})


class Runs:
    """Runs in processes of one thread each, and a file of those that ended.

    Args:
        path: a line of JSON a run.
        rows: of all runs.
        batch_size: likewise.
        processes: how many at a time.
    """

    def __init__(self, path: Path, rows: Rows, batch_size: int, processes: int):
        self.path = path
        self._done: dict[tuple[str, int], dict[str, Any]] = {}
        self._cut_off = False  # the last line, of a program that was killed
        if path.exists():
            text = path.read_text()
            self._cut_off = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                with suppress(ValueError):  # a line that was cut off
                    run = json.loads(line)
                    self._done[run["trial"], run["seed"]] = run["result"]
        global _work
        _work = rows, batch_size
        # Forked, so that all read the same rows.
        self._pool = multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,))
        self.bar = tqdm(unit="run", file=sys.stderr)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.terminate()
        self._pool.join()
        self.bar.close()

    def results(self, jobs: list[tuple[Trial, int]]) -> dict[tuple[Trial, int], dict[str, Any]]:
        """Of each trial and seed."""
        jobs = list(dict.fromkeys(jobs))
        missing = [(trial, seed) for trial, seed in jobs if (trial.key, seed) not in self._done]
        self.bar.total = self.bar.n + len(missing)
        with self.path.open("a") as file:
            if self._cut_off:
                file.write("\n")
                self._cut_off = False
            for trial, seed, result in self._pool.imap_unordered(_run, missing):
                self._done[trial.key, seed] = result
                file.write(json.dumps({"trial": trial.key, "seed": seed, "result": result}) + "\n")
                file.flush()
                self.bar.set_postfix_str(f"{trial.method} {trial.compression:g}x: {result['auc']:.4f}")
                self.bar.update()
        return {(trial, seed): self._done[trial.key, seed] for trial, seed in jobs}


_work: tuple[Rows, int]  # of the processes of a pool


def _run(job: tuple[Trial, int]) -> tuple[Trial, int, dict[str, Any]]:
    return *job, run(_work[0], *job, _work[1])


def search(runs: Runs, trials: list[Trial], changes: Sequence[dict[str, float]], seeds: int) -> list[Trial]:
    """The best trial found from each on; all are searched side by side."""
    validation: dict[Trial, float] = {}
    of_seeds = range(SEARCH_SEED, SEARCH_SEED + seeds)

    def measure(tried: list[Trial]) -> None:
        results = runs.results([(trial, seed) for trial in tried for seed in of_seeds])
        for trial in tried:
            validation[trial] = mean(results[trial, seed]["validation_auc"] for seed in of_seeds)

    best = list(trials)
    measure(best)
    for change in changes:
        (name, value), *_ = change.items()
        changed = [
            replace(trial, **{name: value if name == "decay" else value * getattr(start, name)})
            for trial, start in zip(best, trials)
        ]
        measure(changed)
        best = [max(old, new, key=validation.__getitem__) for old, new in zip(best, changed)]
    return best


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (Student's t, paired)."""
    n = len(differences)
    return mean(differences), float(student.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)


def compare(runs: Runs, args: argparse.Namespace) -> list[dict]:
    """Search, then test; a row for each method and compression."""

    def start(method: str, compression: float) -> Trial:
        method = SEARCHED_AS.get(method, method)
        if method == FULL:
            return Trial(FULL, epochs=args.epochs)
        return Trial(method, compression, epochs=args.epochs * args.longer)

    places = [(m, c) for m in args.methods for c in args.compressions[: 1 if m == FULL else None]]
    searched = list(dict.fromkeys(start(*place) for place in places))
    changes = [change for change in SEARCH if set(change) <= set(args.changes)]
    found = dict(zip(searched, search(runs, searched, changes, args.searches) if args.searches else searched))
    best = [replace(found[start(method, compression)], method=method) for method, compression in places]
    return tested(runs, best, args.seeds)


def tested(runs: Runs, trials: list[Trial], seeds: int) -> list[dict]:
    """Rows of the table: the first trial is what the others are compared with."""
    results = runs.results([(trial, seed) for trial in trials for seed in range(seeds)])
    table = []
    for trial in trials:
        of_seed = [results[trial, seed] for seed in range(seeds)]
        auc = [result["auc"] for result in of_seed]
        against, half = interval([result["auc"] - results[trials[0], s]["auc"] for s, result in enumerate(of_seed)])
        table.append(
            {
                "trial": json.loads(trial.key),
                "bytes": of_seed[0]["bytes"],
                "auc": auc,
                "mean": mean(auc),
                "sd": stdev(auc),
                "against": against,
                "interval": half,
                "validation_auc": mean(result["validation_auc"] for result in of_seed),
                "log_loss": mean(result["log_loss"] for result in of_seed),
                "best_epoch": mean(result["best_epoch"] for result in of_seed),
            }
        )
    return table


def label(row: dict) -> str:
    trial = row["trial"]
    name = trial["method"]
    if trial["method"] != FULL:
        name += f" {trial['compression']:g}x"
    changed = {k: v for k, v in trial.items() if k not in ("method", "compression") and v != getattr(Trial(""), k)}
    options = changed | dict(changed.pop("options", ()))
    return name + "".join(f", {k} {v:g}" if isinstance(v, float) else f", {k} {v}" for k, v in options.items())


def markdown(table: list[dict], seeds: int) -> str:
    lines = [
        f"| {seeds} seeds | bytes | test AUC | sd | against the first, 95 % | validation AUC | log loss | best epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        against = f"{row['against']:+.4f} ± {row['interval']:.4f}" if row is not table[0] else ""
        lines.append(
            f"| {label(row)} | {row['bytes']:,} | {row['mean']:.4f} | {row['sd']:.4f} | {against} "
            f"| {row['validation_auc']:.4f} | {row['log_loss']:.4f} | {row['best_epoch']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(path: Path, table: list[dict], best_possible: float | None) -> None:
    """AUC against memory, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    methods: dict[str, list[dict]] = {}
    for row in table:
        methods.setdefault(row["trial"]["method"], []).append(row)
    colors: dict[str, str] = {}
    for method, points in methods.items():
        if method == FULL:
            axes.axhline(points[0]["mean"], color="black", linewidth=1, label=FULL)
            continue
        points = sorted(points, key=lambda row: row["bytes"])
        spread = [row["sd"] for row in points]
        width = 2.5 if method == ADMISSION else 1.2
        in_float = method.removesuffix(", int8")
        axes.errorbar(
            [row["bytes"] for row in points],
            [row["mean"] for row in points],
            yerr=spread,
            label=method,
            color=colors.setdefault(in_float, f"C{len(colors)}"),
            linestyle="-" if method == in_float else "--",
            linewidth=width,
            marker="o",
            markersize=2 * width,
            capsize=2,
        )
    if best_possible is not None:
        axes.axhline(best_possible, color="grey", linestyle=":", label="best possible")
    axes.set(xscale="log", xlabel="memory of the embeddings, bytes", ylabel="test AUC")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--data", type=Path, metavar="PATH", help="any format of data/")
    rows.add_argument("--generate", type=int, metavar="N", help="rows with a known best AUC")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--searches", type=int, default=2, metavar="N", help="seeds of a search; 0: none")
    changes = sorted({name for change in SEARCH for name in change})
    parser.add_argument("--changes", nargs="+", choices=changes, default=changes, help="what is searched (default all)")
    parser.add_argument("--compressions", type=float, nargs="+", default=[10.0, 100.0, 1000.0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--study", choices=STUDIES, help="instead of methods, variants of ROBE")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help=f"at the most (default {EPOCHS})")
    parser.add_argument("--longer", type=float, default=1.0, metavar="X", help="times as many, but for full tables")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: expected at least 2, for a standard deviation")
    return args


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = Rows.generate(args.generate) if args.data is None else Rows.read(args.data)
    with Runs(args.output / "runs.jsonl", rows, args.batch_size, args.processes) as runs:
        if args.study:
            study = STUDIES[args.study]
            compressed = [
                t if t.method == FULL else replace(t, compression=c) for c in args.compressions for t in study
            ]
            trials = list(dict.fromkeys([Trial(FULL), *compressed]))
            name, table = args.study, tested(runs, trials, args.seeds)
        else:
            name, table = "accuracy", compare(runs, args)
    write_json(
        args.output / f"{name}.json",
        {
            "table": table,
            "rows": len(rows.batch),
            "full_bytes": rows.full_bytes,
            "best_possible_auc": rows.best,
            "batch_size": args.batch_size,
            "environment": environment(),
        },
    )
    text = markdown(table, args.seeds)
    if rows.best is not None:
        text += f"\nBest possible AUC of the test rows: {rows.best:.4f}\n"
    (args.output / f"{name}.md").write_text(text)
    plot(args.output / f"{name}.png", table, rows.best)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
