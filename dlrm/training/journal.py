"""Figures written during training: metrics.jsonl and TensorBoard's event files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

METRICS_LOG, EVENTS = "metrics.jsonl", "tensorboard"


class Journal:
    """The figures of a run during training. Each call writes a line of metrics.jsonl and points of TensorBoard.

    Args:
        folder: of the run.
        size: what ``position`` returned for the checkpoint that the run is resumed from; what was written after it is
            removed. 0: a new run.
        step: of that checkpoint.
    """

    def __init__(self, folder: Path, size: int = 0, step: int = 0):
        # Imported here, since it takes a second.
        from torch.utils.tensorboard import SummaryWriter

        self._lines = open_at(folder / METRICS_LOG, size)
        if not size:
            for event in (folder / EVENTS).glob("events.*"):
                event.unlink()
        self._board = SummaryWriter(str(folder / EVENTS), purge_step=step + 1 if size else None)

    def write(self, step: int, epoch: float, values: Mapping[str, float | None]) -> None:
        """Write figures of a step.

        Args:
            step: counted from 1.
            epoch: epochs done, with a fraction.
            values: by names such as "train/loss" and "validation/auc". None: the figure is not defined.
        """
        self._lines.write(json.dumps({"step": step, "epoch": round(epoch, 6), **values}) + "\n")
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def position(self) -> int:
        """Flush everything to the disk, and return the size of metrics.jsonl in bytes."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._board.flush()
        return self._lines.tell()

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        self._board.close()


def open_at(path: Path, size: int):
    """Open a text file for writing after its first ``size`` bytes; the rest is removed."""
    file = open(path, "a")  # noqa: SIM115
    if os.path.getsize(path) > size:
        os.truncate(path, size)
    file.seek(0, os.SEEK_END)
    return file
