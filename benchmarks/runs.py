"""Training runs started as a user starts them, for other benchmarks to compare."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def train(data: Path, folder: Path, *options: str | float) -> dict[str, Any]:
    """Run train.py and return its metrics.json.

    Args:
        data: file or folder of rows.
        folder: of the run.
        options: of train.py.

    Raises:
        SystemExit: the run failed, and has printed why; with its exit code.
    """
    command = [sys.executable, ROOT / "train.py", "--data", data, "--output", folder, *map(str, options)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads((folder / "metrics.json").read_text())
