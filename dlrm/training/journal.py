"""What a training run says while it runs: metrics.jsonl and TensorBoard's events."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

METRICS_LOG, EVENTS = "metrics.jsonl", "tensorboard"


class Journal:
    """The running figures of a training run, a line of metrics.jsonl and a point in TensorBoard each.

    Args:
        folder: of the run.
        size: of metrics.jsonl, ``position`` of the checkpoint from which the run goes on: what was written after it
            is taken out. 0: a new run.
        step: of that checkpoint.
    """

    def __init__(self, folder: Path, size: int = 0, step: int = 0):
        # Imported where it is used: it takes a second.
        from torch.utils.tensorboard import SummaryWriter

        self._lines = open_at(folder / METRICS_LOG, size)
        if not size:
            for event in (folder / EVENTS).glob("events.*"):
                event.unlink()
        self._board = SummaryWriter(str(folder / EVENTS), purge_step=step + 1 if size else None)

    def write(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Figures of a step: "train/loss", "validation/auc" and the like."""
        self._lines.write(json.dumps({"step": step, "epoch": round(epoch, 6), **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def position(self) -> int:
        """Write what was said to the disk, and return the size of metrics.jsonl."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._board.flush()
        return self._lines.tell()

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def open_at(path: Path, size: int):
    """Open a text file to write on after its first ``size`` bytes."""
    file = open(path, "a")  # noqa: SIM115
    if os.path.getsize(path) > size:
        os.truncate(path, size)
    file.seek(0, os.SEEK_END)
    return file
