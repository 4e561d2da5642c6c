r"""How much AUC does compression cost? ROBE, the hashing trick and quotient-remainder against full tables.

    python -m benchmarks.accuracy --data rows.tsv --output runs/accuracy
    python -m benchmarks.accuracy --generate 5000000 --compressions 1000 --batch-size 2048 --epochs 1 \
        --searches 1 --changes rate --output runs/generated

Takes about 2 hours on 2 cores: the first command makes 330 training runs, which take 20 to 45 seconds each on 137,085
rows. --methods, --compressions, --seeds and --searches choose fewer. Started again, the program goes on where it was.

Prints a table with a line for each method and compression, and writes it to accuracy.md and accuracy.json, with a plot,
accuracy.png. runs.jsonl has a line for each run that ended. --study NAME compares variants of ROBE instead, and writes
NAME.md and NAME.json.

Protocol: rows are used in their order, 5/7 to train, 1/7 to validate, 1/7 to test. Memory is counted in bytes of all
that a trained model keeps: arrays, tables, and an admission's filter. Compression is relative to tables with a row for
each id of the training rows. Every method gets the same search on validation rows at each compression (SEARCH: one
change at a time, kept if it helps), on seeds that are not tested; all Z use what was found for Z = 16. Training ends
when validation AUC falls, and the best evaluation is tested. All methods train on averaged weights. Arrays in int8 are
trained in float32 with as many weights as fit in int8, and rounded before the test. Differences are paired by seed.
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
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from tqdm import tqdm

from benchmarks.accuracy_plot import plot
from benchmarks.results import machine
from benchmarks.trials import ADMISSION, EPOCHS, FULL, METHODS, Trial, TrialData, run
from robe_files import write_json

SEARCH_SEED = 1000  # first seed of searches; tests count from 0
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
# Each changes one thing, and is kept if validation AUC improves. Later ones start from there.
SEARCH: tuple[dict[str, float], ...] = ({"rate": 2.0}, {"rate": 0.5}, {"init": 0.1}, {"decay": 1e-6})


class Job(NamedTuple):
    """A training run: a trial with a seed."""

    trial: Trial
    seed: int


class Runs:
    """Training runs in processes of one thread each, and the file of those that ended.

    Args:
        path: a file with a line of JSON for each run.
        data: the rows that all runs use.
        batch_size: of all runs.
        processes: runs at a time.
    """

    def __init__(self, path: Path, data: TrialData, batch_size: int, processes: int):
        self.path = path
        self._done: dict[tuple[str, int], dict[str, Any]] = {}  # by key of the trial, and seed
        self._cut_off = False  # whether the last line is incomplete, because the program was killed
        if path.exists():
            text = path.read_text()
            self._cut_off = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                with suppress(ValueError):  # an incomplete line
                    run = json.loads(line)
                    self._done[run["trial"], run["seed"]] = run["result"]
        global _work
        _work = _Work(data, batch_size)
        # Forked, so that all processes share the rows.
        self._pool = multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,))
        self.bar = tqdm(unit="run", file=sys.stderr)

    def __enter__(self) -> "Runs":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes."""
        self._pool.terminate()
        self._pool.join()
        self.bar.close()

    def results(self, jobs: list[Job]) -> dict[Job, dict[str, Any]]:
        """Return the result of each job. Those that have not run before run now."""
        jobs = list(dict.fromkeys(jobs))
        missing = [job for job in jobs if (job.trial.key, job.seed) not in self._done]
        self.bar.total = self.bar.n + len(missing)
        with self.path.open("a") as file:
            if self._cut_off:
                file.write("\n")
                self._cut_off = False
            for (trial, seed), result in self._pool.imap_unordered(_run, missing):
                self._done[trial.key, seed] = result
                file.write(json.dumps({"trial": trial.key, "seed": seed, "result": result}) + "\n")
                file.flush()
                self.bar.set_postfix_str(f"{trial.method} {trial.compression:g}x: {result['auc']:.4f}")
                self.bar.update()
        return {job: self._done[job.trial.key, job.seed] for job in jobs}


class _Work(NamedTuple):
    data: TrialData
    batch_size: int


_work: _Work  # of the processes of a pool


def _run(job: Job) -> tuple[Job, dict[str, Any]]:
    return job, run(_work.data, job.trial, job.seed, _work.batch_size)


def search(runs: Runs, trials: list[Trial], changes: Sequence[dict[str, float]], seeds: int) -> list[Trial]:
    """Return the best trial that was found from each start.

    Args:
        runs: to make.
        trials: the starts, searched side by side.
        changes: to try one after another; the name of a Trial's field, and a factor (of decay, a value).
        seeds: runs of each trial.
    """
    validation: dict[Trial, float] = {}
    of_seeds = range(SEARCH_SEED, SEARCH_SEED + seeds)

    def measure(tried: list[Trial]) -> None:
        results = runs.results([Job(trial, seed) for trial in tried for seed in of_seeds])
        for trial in tried:
            validation[trial] = mean(results[Job(trial, seed)]["validation_auc"] for seed in of_seeds)

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
    """Return the mean of differences and half the width of its 95 % interval (Student's t)."""
    n = len(differences)
    return mean(differences), float(student.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)


def compare(runs: Runs, args: argparse.Namespace) -> list[dict]:
    """Search, then test. Returns a line of the table for each method and compression."""

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
    """Test trials on several seeds. Returns a line of the table for each; all are compared with the first."""
    results = runs.results([Job(trial, seed) for trial in trials for seed in range(seeds)])
    table = []
    for trial in trials:
        of_seed = [results[Job(trial, seed)] for seed in range(seeds)]
        auc = [result["auc"] for result in of_seed]
        first = [results[Job(trials[0], seed)]["auc"] for seed in range(seeds)]
        against, half = interval([x - y for x, y in zip(auc, first)])
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


def label(trial: dict[str, Any]) -> str:
    """Return a trial in words: method, compression, and whatever is not the default."""
    name = trial["method"]
    if trial["method"] != FULL:
        name += f" {trial['compression']:g}x"
    changed = {k: v for k, v in trial.items() if k not in ("method", "compression") and v != getattr(Trial(""), k)}
    options = changed | dict(changed.pop("options", ()))
    return name + "".join(f", {k} {v:g}" if isinstance(v, float) else f", {k} {v}" for k, v in options.items())


def markdown(table: list[dict], seeds: int) -> str:
    """Return the table as Markdown."""
    lines = [
        f"| {seeds} seeds | bytes | test AUC | sd | against the first, 95 % | validation AUC | log loss | best epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in table:
        against = f"{line['against']:+.4f} ± {line['interval']:.4f}" if line is not table[0] else ""
        lines.append(
            f"| {label(line['trial'])} | {line['bytes']:,} | {line['mean']:.4f} | {line['sd']:.4f} | {against} "
            f"| {line['validation_auc']:.4f} | {line['log_loss']:.4f} | {line['best_epoch']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--data", type=Path, metavar="PATH", help="labelled rows in any format of docs/data.md")
    rows.add_argument("--generate", type=int, metavar="N", help="generate N rows, whose best possible AUC is known")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="test runs of each trial (default: 5)")
    parser.add_argument(
        "--searches", type=int, default=2, metavar="N", help="runs of each trial in a search; 0: no search (default: 2)"
    )
    changes = sorted({name for change in SEARCH for name in change})
    parser.add_argument(
        "--changes", nargs="+", choices=changes, default=changes, help="what is searched (default: all)"
    )
    parser.add_argument(
        "--compressions",
        type=float,
        nargs="+",
        default=[10.0, 100.0, 1000.0],
        metavar="X",
        help="times less memory than full tables (default: 10 100 1000)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"methods to compare (default: all, which are {', '.join(METHODS)})",
    )
    parser.add_argument("--study", choices=STUDIES, help="compare variants of ROBE, not methods")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="rows in a step (default: 256)")
    parser.add_argument(
        "--epochs", type=float, default=EPOCHS, metavar="X", help=f"most epochs of training (default: {EPOCHS})"
    )
    parser.add_argument(
        "--longer", type=float, default=1.0, metavar="X", help="times more epochs for all but full tables (default: 1)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="training runs at a time, of one thread each (default: one for each CPU)",
    )
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: expected at least 2, for a standard deviation")
    return args


def main() -> None:
    """Run the program."""
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    data = TrialData.generate(args.generate) if args.data is None else TrialData.read(args.data)
    with Runs(args.output / "runs.jsonl", data, args.batch_size, args.processes) as runs:
        if args.study:
            study = STUDIES[args.study]
            compressed = [
                t if t.method == FULL else replace(t, compression=c) for c in args.compressions for t in study
            ]
            trials = list(dict.fromkeys([Trial(FULL), *compressed]))
            name, table = args.study, tested(runs, trials, args.seeds)
        else:
            name, table = "accuracy", compare(runs, args)
    results = {
        "machine": machine(),
        "rows": len(data.batch),
        "full_bytes": data.full_bytes,
        "best_possible_auc": data.best,
        "batch_size": args.batch_size,
        "seeds": args.seeds,
        "table": table,
    }
    write_json(args.output / f"{name}.json", results)
    text = markdown(table, args.seeds)
    if data.best is not None:
        text += f"\nBest possible AUC of the test rows: {data.best:.4f}\n"
    (args.output / f"{name}.md").write_text(text)
    if not args.study:
        plot(args.output / f"{name}.png", results)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
