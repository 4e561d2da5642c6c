"""The rows of a training run, as the training loop reads them: parts, epochs of batches, passes over all rows."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.batches import epoch_batches, in_background, rebatch, share, vocabulary
from data.formats.opening import open_source
from data.parts import Part, check, halves, split
from data.rows import Batch
from data.sources import Source, files_read


class TrainingRows:
    """The training, validation and test rows of a run.

    Args:
        path: file or folder, in any format.
        eval_path: rows for validation and test, so that all of ``path`` is for training; None: ``path`` has all parts.
        ranges: the rows of each part, where they are known; None: every row is checked, and the data is split.
        say: called, before the rows are checked, with a line that names the files, if there are several.

    Attributes:
        parts: "train", "validation" and "test".

    Raises:
        DataError: a row can't be read, there are no labels, or a part would be empty.
    """

    def __init__(
        self,
        path: Path,
        eval_path: Path | None = None,
        ranges: Mapping[str, range] | None = None,
        say: Callable[[str], object] = lambda line: None,
    ):
        if ranges is None:
            self.parts = _check_and_split(path, eval_path, say)
        else:
            source = open_source(path)
            other = source if eval_path is None else open_source(eval_path)
            self.parts = {name: Part(source if name == "train" else other, rows) for name, rows in ranges.items()}

    @property
    def ranges(self) -> dict[str, range]:
        """The rows of each part."""
        return {name: part.rows for name, part in self.parts.items()}

    @property
    def hots(self) -> tuple[int, ...] | None:
        """Ids of each feature in a row; None: one each."""
        return self.parts["train"].source.layout.hots

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model gets of a row, for JSON."""
        return self.parts["train"].source.layout.inputs()

    def count_ids(self) -> list[np.ndarray]:
        """Return the distinct ids of each feature in the training rows, ascending. Memory grows with their number."""
        return vocabulary(self.read_training("counting ids"), self.parts["train"].source.layout.features)

    def read_training(self, description: str) -> Iterator[Batch]:
        """Return the training rows in their order, with a progress bar.

        Args:
            description: of the bar.
        """
        part = self.parts["train"]
        with tqdm(total=len(part), unit="row", unit_scale=True, desc=description, leave=False) as bar:
            for batch in part.source.read(part.rows.start, part.rows.stop):
                yield batch
                bar.update(len(batch))

    def epoch(
        self, epoch: int, start: int, *, batch_size: int, seed: int, rank: int, world_size: int
    ) -> Iterator[Batch]:
        """Return the training batches of an epoch, in an order that seed and epoch determine.

        Args:
            epoch: counted from 0.
            start: batches to leave out.
            batch_size: rows of a batch in all processes together.
            seed: of the order.
            rank: of this process, which gets its part of every batch.
            world_size: the number of processes.
        """
        part = self.parts["train"]
        return epoch_batches(part.source, part.rows, batch_size, seed, epoch, rank, world_size, start=start)

    def read_part(self, part: str, *, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """Return a process's share of the rows of a part, in their order. A thread reads ahead.

        Args:
            part: "train", "validation" or "test".
            batch_size: rows of a batch.
            rank: of this process.
            world_size: the number of processes.
        """
        source, rows = self.parts[part].source, share(self.parts[part].rows, rank, world_size)
        return in_background(lambda: rebatch(source.read(rows.start, rows.stop), batch_size))


def _check_and_split(path: Path, eval_path: Path | None, say: Callable[[str], object]) -> dict[str, Part]:
    source, rows = _open_and_check(path, say)
    if eval_path is None:
        return split(path, source, rows)
    return halves(eval_path, source, rows, *_open_and_check(eval_path, say))


def _open_and_check(path: Path, say: Callable[[str], object]) -> tuple[Source, int]:
    source = open_source(path)
    files = files_read(source)
    if files:
        say(files)
    return source, check(source)
