"""Does a training run that is killed again and again end with the same weights as one that is not?

    python -m benchmarks.kills --data rows.tsv --kills 20 --output runs/kills --preset kaggle --epochs 2

Takes two training runs, plus at most --within seconds for each kill. Trains once undisturbed and once with kill -9 at
random moments. Options that it does not know go to train.py.

Compares the weights, metrics.json (except times and memory) and the lines of metrics.jsonl. Prints the last checkpoint
after each kill and what differs, writes both to kills.json, and exits with 1 if anything differs.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.results import save
from benchmarks.runs import ROOT

MEASURED = ("seconds", "samples_per_second", "peak_rss_bytes")  # in metrics.json; differ in any two runs
RATE = "train/samples_per_second"


class Outcome(NamedTuple):
    """Results of a run that must not depend on kills."""

    metrics: dict[str, Any]
    weights: bytes
    lines: list[dict[str, Any]]


def start(data: Path, folder: Path, options: list[str]) -> subprocess.Popen:
    """Start train.py as a scheduler would restart a job: it resumes if there is a checkpoint."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(data), "--output", str(folder), "--resume"]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcome(folder: Path) -> Outcome:
    """Read the results of a finished run."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in MEASURED:
        del metrics[name]
    del metrics["environment"]["command"]  # names the folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop(RATE, None)
    return Outcome(metrics, (folder / "model.safetensors").read_bytes(), lines)


def killed_run(data: Path, folder: Path, options: list[str], kills: int, within: float, seed: int) -> list[str]:
    """Run train.py to its end, with kills on the way.

    Returns:
        The step of the last checkpoint after each kill, or "none".
    """
    moments, steps = random.Random(seed), []
    with tqdm(total=kills, unit="kill") as bar:
        while bar.n < kills:
            process = start(data, folder, options)
            try:
                process.wait(moments.uniform(0, within))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                bar.update()
            if process.returncode != -9:
                sys.exit(f"exit code {process.returncode} after {bar.n} kills: try more epochs, or a smaller --within")
            last = max((path.name[5:] for path in (folder / "checkpoints").glob("step-*")), default="none")
            steps.append(last.lstrip("0") or "0")
    if start(data, folder, options).wait():
        sys.exit(f"the run could not be finished after {kills} kills")
    return steps


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="rows to train on")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for both runs")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="number of kills (default: %(default)s)")
    parser.add_argument(
        "--within",
        type=float,
        default=10,
        metavar="X",
        help="kill within X seconds of a start, which takes a few itself (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments (default: %(default)s)")
    args, options = parser.parse_known_args()
    if args.output.exists():
        parser.error(f"--output: {args.output} exists; expected a new name")
    if start(args.data, args.output / "undisturbed", options).wait():
        sys.exit("the undisturbed run failed")
    steps = killed_run(args.data, args.output / "killed", options, args.kills, args.within, args.seed)
    print("last checkpoint after each kill:", *steps)
    undisturbed, killed = outcome(args.output / "undisturbed"), outcome(args.output / "killed")
    names = ("metrics.json", "model.safetensors", "metrics.jsonl")
    different = [name for name, a, b in zip(names, undisturbed, killed) if a != b]
    results = {"kills": args.kills, "checkpoints": steps, "different": different}
    save(args.output / "kills.json", results, seed=args.seed)
    print(f"different: {', '.join(different)}" if different else f"after {args.kills} kills: the same")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
