"""Is a run that is killed again and again the same? Trains once undisturbed and once with kill -9 at random moments.

    python -m benchmarks.kills --data rows.tsv --kills 20 --output runs/kills --preset kaggle --epochs 2

Options it does not know are train.py's. Compares metrics.json, but for times and memory, the weights, and the lines of
metrics.jsonl; exits with 1 if they differ.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks.runs import ROOT

OF_THE_RUN = ("seconds", "samples_per_second", "peak_rss_bytes")
RATE = "train/samples_per_second"


def start(data: Path, folder: Path, options: list[str]) -> subprocess.Popen:
    """The command of a scheduler that starts a job again: it goes on where there is something to go on from."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(data), "--output", str(folder), "--resume"]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcome(folder: Path) -> tuple[dict, bytes, list[dict]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in OF_THE_RUN:
        del metrics[name]
    del metrics["environment"]["command"]  # has the folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop(RATE, None)
    return metrics, (folder / "model.safetensors").read_bytes(), lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--within", type=float, default=10, metavar="SECONDS", help="of a start; it takes some itself")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, options = parser.parse_known_args()
    if args.output.exists():
        parser.error(f"--output: {args.output} exists; expected a new name")
    if start(args.data, args.output / "undisturbed", options).wait():
        sys.exit("the undisturbed run failed")

    moments, killed, steps = random.Random(args.seed), 0, []
    folder = args.output / "killed"
    with tqdm(total=args.kills, unit="kill") as bar:
        while killed < args.kills:
            process = start(args.data, folder, options)
            try:
                process.wait(moments.uniform(0, args.within))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                bar.update()
            if process.returncode != -9:
                sys.exit(f"exit code {process.returncode} after {killed} kills: try more epochs, or a smaller --within")
            steps.append(max((path.name[5:] for path in (folder / "checkpoints").glob("step-*")), default="none"))
    if start(args.data, folder, options).wait():
        sys.exit(f"the run could not be finished after {killed} kills")
    print("last checkpoint after each kill:", *(step.lstrip("0") or "0" for step in steps))
    different = [
        what
        for what, a, b in zip(
            ("metrics.json", "model.safetensors", "metrics.jsonl"),
            outcome(args.output / "undisturbed"),
            outcome(folder),
        )
        if a != b
    ]
    print(f"different: {', '.join(different)}" if different else f"after {killed} kills: the same")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
