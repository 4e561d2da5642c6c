"""What does the whole program cost beside a bare training step, and what does a second process gain?

    python -m benchmarks.training --output runs/training.json

Takes about 6 minutes. Prints a table for each question, and writes the same as JSON. Generated rows are kept in
--folder for the next time.

"Program" is Trainer.train on prepared rows: data, step, learning rate, loss, progress bar, metrics.jsonl and
TensorBoard. "Bare" is the step of benchmarks/step.py on batches held in memory. Both train the same model, in turns.

Processes are train.py itself on generated rows: one pinned to one core, two of torchrun with one core each, and one
with all cores. Their rate is that of the steps, without evaluations.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.results import save
from benchmarks.runs import ROOT
from benchmarks.step import LabelledBatch, stepper
from benchmarks.timing import cycle, quantiles
from data import prepare, synthetic
from data.batches import epoch_batches
from data.formats.prepared import Dataset
from dlrm import DLRM, PRESETS
from dlrm.training.journal import Journal
from dlrm.training.optimizers import make_optimizers
from dlrm.training.trainer import Trainer

STEPS = (("kaggle", 256), ("kaggle", 2048), ("terabyte", 256))
PROCESSES = (("kaggle", "sgd", 256), ("kaggle", "sgd", 2048), ("kaggle", "adam", 2048))
HELD = 64  # batches in memory


class Launch(NamedTuple):
    """A way to start train.py."""

    command: list[str]
    cores: set[int]
    threads: int  # of each process


def program(dataset: Dataset, preset: str, batch_size: int, rounds: int, seconds: float) -> dict:
    """Time the bare step and that of the program, in turns of about ``seconds`` each."""
    config = PRESETS[preset].model
    training = replace(PRESETS[preset].training, optimizer="sgd", learning_rate=0.001, batch_size=batch_size)
    training = replace(training, epochs=1, evaluations_per_epoch=1, target_auc=None)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(DLRM(config))
    bare = cycle(stepper(models[0], make_optimizers(models[0], training)), held_batches(dataset, batch_size))
    optimizers = make_optimizers(models[1], training)
    rows = min(steps_in(seconds, bare) * batch_size, dataset.rows)
    times: dict[str, list[float]] = {"bare": [], "program": []}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        journal = Journal(Path(folder))
        for turn in tqdm(range(rounds), desc=f"{preset}, B={batch_size}"):

            def batches(epoch: int, start: int, seed: int = turn):
                return epoch_batches(dataset, range(rows), batch_size, seed, epoch, start=start)

            trainer = Trainer(models[1], training, batches, rows, evaluate, optimizers=optimizers, journal=journal)
            with contextlib.redirect_stderr(nowhere):
                trainer.train()
            times["program"].append(trainer.progress.seconds / trainer.progress.step * 1e3)
            bare()
            start = time.perf_counter()
            for _ in range(trainer.progress.step):
                bare()
            times["bare"].append((time.perf_counter() - start) / trainer.progress.step * 1e3)
        journal.close()
    return {
        "preset": preset,
        "batch_size": batch_size,
        "steps_a_round": trainer.progress.step,
        "milliseconds": {name: quantiles(values) for name, values in times.items()},
        "ratio": quantiles(list(np.divide(times["program"], times["bare"]))),
    }


def held_batches(dataset: Dataset, batch_size: int) -> list[LabelledBatch]:
    """Return the first batches of an epoch, in memory."""
    batches = islice(epoch_batches(dataset, range(dataset.rows), batch_size), HELD)
    return [LabelledBatch(*(torch.from_numpy(x) for x in (b.dense, b.sparse, b.labels))) for b in batches]


def steps_in(seconds: float, step: Callable[[], object]) -> int:
    """Return how many steps take so many seconds, at least 5."""
    step()
    start = time.perf_counter()
    for _ in range(3):
        step()
    return max(5, round(seconds / ((time.perf_counter() - start) / 3)))


def processes(data: Path, preset: str, optimizer: str, batch_size: int, rounds: int) -> dict:
    """Time train.py with one core, with two processes of one core each, and with all cores."""
    cores = sorted(os.sched_getaffinity(0))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launches = {
        "one core": Launch([sys.executable], {cores[0]}, 1),
        "two processes": Launch(torchrun, set(cores[:2]), 1),
        "all cores": Launch([sys.executable], set(cores), len(cores)),
    }
    options = ["--preset", preset, "--optimizer", optimizer, "--batch-size", str(batch_size), "--epochs", "1"]
    options += ["--learning-rate", "0.001", "--evaluations-per-epoch", "1"]
    rates: dict[str, list[float]] = {name: [] for name in launches}
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(rounds), desc=f"processes, {preset}, {optimizer}, B={batch_size}"):
            for name, launch in launches.items():
                out = Path(folder) / name
                command = [*launch.command, str(ROOT / "train.py"), "--data", str(data), "--output", str(out), *options]
                subprocess.run(
                    command,
                    check=True,
                    env={**os.environ, "OMP_NUM_THREADS": str(launch.threads)},
                    preexec_fn=lambda cores=launch.cores: os.sched_setaffinity(0, cores),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                rates[name].append(json.loads((out / "metrics.json").read_text())["samples_per_second"])
    return {
        "preset": preset,
        "optimizer": optimizer,
        "batch_size": batch_size,
        "samples_per_second": {name: quantiles(values) for name, values in rates.items()},
        "ratio": quantiles(list(np.divide(rates["two processes"], rates["one core"]))),
    }


def evaluate() -> dict[str, float]:
    """Return scores without an evaluation, which is not timed."""
    return {"auc": 0.5, "log_loss": 0.7}


def report(results: dict) -> str:
    """Return results as tables of text."""
    lines = [f"{'training step':28}{'bare ms':>10}{'program ms':>12}{'ratio':>8}{'p20':>8}{'p80':>8}"]
    for result in results["program"]:
        bare, whole = (result["milliseconds"][name]["median"] for name in ("bare", "program"))
        ratio = result["ratio"]
        lines.append(
            f"{result['preset'] + ', B=' + str(result['batch_size']):28}{bare:10.2f}{whole:12.2f}"
            f"{ratio['median']:8.3f}{ratio['p20']:8.3f}{ratio['p80']:8.3f}"
        )
    lines.append(
        f"\n{'samples/s':28}{'one core':>12}{'2 processes':>12}{'all cores':>12}{'ratio':>8}{'p20':>8}{'p80':>8}"
    )
    for result in results["processes"]:
        rates = (result["samples_per_second"][name]["median"] for name in ("one core", "two processes", "all cores"))
        ratio = result["ratio"]
        lines.append(
            f"{result['preset'] + ', ' + result['optimizer'] + ', B=' + str(result['batch_size']):28}"
            + "".join(f"{rate:12,.0f}" for rate in rates)
            + f"{ratio['median']:8.2f}{ratio['p20']:8.2f}{ratio['p80']:8.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("runs/training.json"),
        help="JSON to write (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/training"),
        metavar="DIR",
        help="folder for the generated rows (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        metavar="N",
        help="measurements of steps; processes get a fifth (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        metavar="X",
        help="seconds of a measurement of steps (default: %(default)g)",
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    log, shards = args.folder / "rows.tsv", args.folder / "shards"
    if not log.exists():
        synthetic.write(log, 140_000, progress=True)
    if not shards.exists() and prepare.main([str(log), "--output", str(shards)]):
        sys.exit("the rows could not be prepared")
    dataset = Dataset(shards)
    results = {
        "program": [program(dataset, *which, args.rounds, args.seconds) for which in STEPS],
        "processes": [processes(shards, *which, max(args.rounds // 5, 1)) for which in PROCESSES],
    }
    print(report(results))
    save(args.output, [results])


if __name__ == "__main__":
    main()
