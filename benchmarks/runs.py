"""Training runs as a user starts them, for the benchmarks to compare."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def train(data: Path, folder: Path, *options: str | float) -> dict[str, Any]:
    """Run train.py and return its metrics.json.

    Raises:
        SystemExit: it failed; with its exit code, after it has said why.
    """
    command = [sys.executable, ROOT / "train.py", "--data", data, "--output", folder, *map(str, options)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads((folder / "metrics.json").read_text())
