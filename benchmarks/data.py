"""How fast do logs become shards and shards become batches, and what do batches cost a training step?

    python -m benchmarks.data --output runs/data.json

Takes 7 minutes and 2.5 GB of disk in --folder, where generated logs are kept for the next time. Prints a table for each
of the three parts, and writes the same as JSON.

Logs to shards: data.prepare on generated logs of 5 million rows (1.2 GB; --rows), plain and gzip, beside polars, which
reads the same file, converts its hexadecimal columns and does nothing else. Each runs in a process of its own, in
turns. Times are without the start of Python; memory is the peak of the process.

Batches: of 2048 and 256 rows from the shards, on one core; of consecutive rows in permuted order, as MLPerf shuffles,
and with rows mixed as well, as train.py does.

Steps: training steps on such batches as they come, on 64 of them held in memory, and on a single one, in turns.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from benchmarks.results import save
from benchmarks.runs import ROOT
from benchmarks.timing import quantiles
from data import prepare, synthetic
from data.batches import MIXED_ROWS, epoch_batches
from data.formats import criteo_tsv as tsv
from data.formats.prepared import Dataset
from data.rows import Batch
from data.schema import DENSE_NAMES, SPARSE_NAMES
from dlrm import DLRM, PRESETS
from dlrm.machine import peak_rss_bytes
from dlrm.training.optimizers import make_optimizers
from dlrm.training.trainer import train_step

HELD = 64  # batches in memory


class StepKind(NamedTuple):
    """A kind of training step."""

    preset: str
    optimizer: str
    batch_size: int


# SGD on the slots that were read is the fastest step, so the hardest one for data to keep up with.
STEPS = (
    StepKind("kaggle", "adam", 256),
    StepKind("kaggle", "sgd", 256),
    StepKind("kaggle", "sgd", 2048),
    StepKind("terabyte", "sgd", 2048),
)


def polars_alone(path: Path) -> None:
    """Read a log with polars, and convert its hexadecimal columns."""
    schema = dict.fromkeys(["label", *DENSE_NAMES], pl.Int64) | dict.fromkeys(SPARSE_NAMES, pl.String)
    frame = pl.scan_csv(path, has_header=False, separator="\t", quote_char=None, schema=schema)
    frame.with_columns(pl.col(SPARSE_NAMES).str.to_integer(base=16, dtype=pl.Int64)).collect()


def prepare_shards(path: Path, folder: Path) -> None:
    """Write the shards of a log anew."""
    shutil.rmtree(folder, ignore_errors=True)
    if prepare.main([str(path), "--output", str(folder)]):
        raise SystemExit("data.prepare failed")


def work(job: str, path: Path, folder: Path) -> None:
    """Do a job in this process, and print its seconds and peak memory as JSON."""
    start = time.perf_counter()
    if job == "polars":
        polars_alone(path)
    else:
        prepare_shards(path, folder)
    seconds = time.perf_counter() - start
    print("\n" + json.dumps({"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}))


def logs_to_shards(logs: dict[str, Path], rows: int, folder: Path, rounds: int) -> list[dict]:
    """Time data.prepare and polars on logs, in turns."""
    candidates = [("polars alone", "polars", logs["plain"])]
    candidates += [(f"data.prepare, {name}", "prepare", path) for name, path in logs.items()]
    found: dict[str, list[dict]] = {name: [] for name, _, _ in candidates}
    for _ in tqdm(range(rounds), desc="logs to shards"):
        for name, job, path in candidates:
            os.sync()  # or this candidate would wait for what another has written
            command = [sys.executable, "-m", "benchmarks.data", "--work", job, str(path), str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return [
        {
            "name": name,
            "rows_per_second": quantiles([rows / run["seconds"] for run in runs]),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        }
        for name, runs in found.items()
    ]


def batches(dataset: Dataset, rounds: int) -> list[dict]:
    """Time the making of batches on one core."""
    candidates = [(size, mixed) for size in (2048, 256) for mixed in (1, MIXED_ROWS)]
    rates: dict[tuple[int, int], list[float]] = {candidate: [] for candidate in candidates}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rows = min(dataset.rows, 1_000_000)
    for turn in tqdm(range(rounds), desc="batches"):
        for size, mixed in candidates:
            start = time.perf_counter()
            for _ in epoch_batches(dataset, range(rows), size, epoch=turn, mixed_rows=mixed):
                pass
            rates[size, mixed].append(rows / (time.perf_counter() - start))
    os.sched_setaffinity(0, cores)
    return [
        {"batch_size": size, "mixed_rows": mixed, "rows_per_second": quantiles(rates[size, mixed])}
        for size, mixed in candidates
    ]


def steps(dataset: Dataset, kind: StepKind, rounds: int) -> dict:
    """Time training steps. In every round, each candidate trains a model of its own for about half a second."""
    preset, optimizer, batch_size = kind

    def stream() -> Iterator[Batch]:
        epochs = (epoch_batches(dataset, range(dataset.rows), batch_size, epoch=epoch) for epoch in count())
        return chain.from_iterable(epochs)

    source = stream()
    held = [next(source) for _ in range(HELD)]
    candidates = {"as they come": stream(), f"{HELD} in memory": cycle(held), "one in memory": cycle(held[:1])}
    models = {}
    for name in candidates:
        torch.manual_seed(0)
        model = DLRM(PRESETS[preset].model)
        training = replace(PRESETS[preset].training, optimizer=optimizer, learning_rate=0.001)
        models[name] = (model, make_optimizers(model, training))
        train_step(*models[name], held[0])
    start = time.perf_counter()
    for _ in range(3):
        train_step(*models["one in memory"], held[0])
    number = max(3, round(0.5 / ((time.perf_counter() - start) / 3)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in tqdm(range(rounds), desc=f"steps, {preset}, {optimizer}, B={batch_size}"):
        for name, of_candidate in candidates.items():
            train_step(*models[name], next(of_candidate))
            start = time.perf_counter()
            for _ in range(number):
                train_step(*models[name], next(of_candidate))
            times[name].append((time.perf_counter() - start) / number * 1e3)
    return {
        **kind._asdict(),
        "milliseconds": {name: quantiles(values) for name, values in times.items()},
        # Round by round, because whatever slows the machine down for a while slows down both.
        "ratio": {
            name: quantiles(list(np.divide(times["as they come"], times[name]))) for name in list(candidates)[1:]
        },
    }


def report(results: dict) -> str:
    """Return results as tables of text."""
    lines = [f"{'logs to shards':36}{'M rows/s':>10}{'p20':>8}{'p80':>8}{'times polars':>14}{'peak MB':>10}"]
    base = results["prepare"][0]["rows_per_second"]["median"]
    for result in results["prepare"]:
        rate = result["rows_per_second"]
        lines.append(
            f"{result['name']:36}{rate['median'] / 1e6:10.2f}{rate['p20'] / 1e6:8.2f}{rate['p80'] / 1e6:8.2f}"
            f"{rate['median'] / base:14.2f}{result['peak_rss_bytes'] / 1e6:10.0f}"
        )
    lines.append(f"\n{'batches, one core':36}{'M rows/s':>10}{'p20':>8}{'p80':>8}")
    for result in results["batches"]:
        rate = result["rows_per_second"]
        order = "rows mixed" if result["mixed_rows"] > 1 else "consecutive rows"
        name = f"B={result['batch_size']}, {order}"
        lines.append(f"{name:36}{rate['median'] / 1e6:10.2f}{rate['p20'] / 1e6:8.2f}{rate['p80'] / 1e6:8.2f}")
    lines.append(f"\n{'training step, ms':36}{'as they come':>14}{'64 held':>10}{'one held':>10}{'ratios':>16}")
    for result in results["steps"]:
        times = [time["median"] for time in result["milliseconds"].values()]
        ratios = " / ".join(f"{ratio['median']:.3f}" for ratio in result["ratio"].values())
        name = f"{result['preset']}, {result['optimizer']}, B={result['batch_size']}"
        lines.append(f"{name:36}{times[0]:14.2f}{times[1]:10.2f}{times[2]:10.2f}{ratios:>16}")
    return "\n".join(lines)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("runs/data.json"),
        help="JSON to write (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/data"),
        metavar="DIR",
        help="folder for logs and shards, 2.5 GB (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, default=5_000_000, metavar="N", help="rows of the logs (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="measurements of each candidate; steps get three times as many (default: %(default)s)",
    )
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        job, path, folder = args.work
        return work(job, Path(path), Path(folder))
    if tsv.reader() != "native":
        print("the compiled reader of logs is missing: make setup builds it", file=sys.stderr)
    args.folder.mkdir(parents=True, exist_ok=True)
    logs = {"plain": args.folder / f"{args.rows}.tsv", "gzip": args.folder / f"{args.rows}.tsv.gz"}
    if not logs["plain"].exists():
        synthetic.write(logs["plain"], args.rows, progress=True)
    if not logs["gzip"].exists():
        with open(logs["plain"], "rb") as plain, gzip.open(logs["gzip"], "wb", compresslevel=1) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)
    prepared = logs_to_shards(logs, args.rows, args.folder / "shards", args.rounds)
    dataset = Dataset(args.folder / "shards")
    results = {
        "rows": args.rows,
        "prepare": prepared,
        "batches": batches(dataset, args.rounds),
        "steps": [steps(dataset, kind, 3 * args.rounds) for kind in STEPS],
    }
    print(report(results))
    save(args.output, [results])


if __name__ == "__main__":
    main()
