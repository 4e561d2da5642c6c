"""Parts of a run's data: the rows to train on, to validate on and to test on."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.batches import split_rows
from data.formats.prepared import PARTS, Dataset
from data.schema import DataError, printable
from data.sources import Source, require_one_layout


@dataclass
class Part:
    """Consecutive rows of a source."""

    source: Source
    rows: range

    def __len__(self) -> int:
        return len(self.rows)


def check(source: Source) -> int:
    """Check that every row can be read, with a progress bar.

    The rows of a prepared folder were checked when they were written: of these, only files whose time of change has
    changed are read.

    Args:
        source: of the rows.

    Returns:
        the number of rows.

    Raises:
        DataError: a row can't be read, or there are no labels.
    """
    if not source.labelled:
        raise DataError(f"{source.path}: has no labels; training needs them")
    if isinstance(source, Dataset):
        with tqdm(unit="B", unit_scale=True, desc=f"checking {printable(source.path.name)}", leave=False) as bar:
            source.verify(progress=bar.update)
        return source.rows
    rows = 0
    with tqdm(unit="row", unit_scale=True, desc=f"checking {printable(source.path.name)}", leave=False) as bar:
        for records in source.records():
            rows += len(records)
            bar.update(len(records))
    return rows


def split(path: Path, source: Source, rows: int) -> dict[str, Part]:
    """Split a source into parts: as the data says, otherwise 5/7, 1/7 and 1/7 of the rows in their order.

    Args:
        path: of the data, for messages.
        source: of the rows.
        rows: how many it has.

    Returns:
        the parts "train", "validation" and "test".

    Raises:
        DataError: a part is empty.
    """
    try:
        ranges = source.parts() or dict(zip(PARTS, split_rows(rows)))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    empty = [part for part, of_part in ranges.items() if not len(of_part)]
    if empty:
        raise DataError(f"{path}: no rows for {empty[0]}")
    return {part: Part(source, ranges[part]) for part in PARTS}


def halves(path: Path, source: Source, rows: int, other: Source, other_rows: int) -> dict[str, Part]:
    """Use all of one source to train on, and the halves of another one to validate and to test on.

    Args:
        path: of the other source, for messages.
        source: the rows to train on.
        rows: how many these are.
        other: its first half is for validation, its second half for the test.
        other_rows: how many rows it has.

    Returns:
        the parts "train", "validation" and "test".

    Raises:
        DataError: the other source has fewer than two rows, or rows of another layout.
    """
    require_one_layout([source, other])
    if other_rows < 2:
        raise DataError(f"{path}: expected at least 2 rows to validate and to test on, got {other_rows}")
    half = other_rows // 2
    return {
        "train": Part(source, range(rows)),
        "validation": Part(other, range(half)),
        "test": Part(other, range(half, other_rows)),
    }
