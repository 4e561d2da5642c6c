"""The rows that a run trains, validates and tests on."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.batches import split_rows
from data.formats.prepared import PARTS, Dataset
from data.rows import DataError
from data.sources import Source, require_one_layout


@dataclass
class Part:
    """Some rows of a source."""

    source: Source
    rows: range

    def __len__(self) -> int:
        return len(self.rows)


def check(source: Source) -> int:
    """See that every row can be read, and return their number; shows how far it is.

    Raises:
        DataError: a row can't be read, or there are no labels.
    """
    if not source.labelled:
        raise DataError(f"{source.path}: has no labels; training needs them")
    if isinstance(source, Dataset):  # was checked when it was written
        with tqdm(unit="B", unit_scale=True, desc=f"checking {source.path.name}", leave=False) as bar:
            source.verify(progress=bar.update)
        return source.rows
    rows = 0
    with tqdm(unit="row", unit_scale=True, desc=f"checking {source.path.name}", leave=False) as bar:
        for records in source.records():
            rows += len(records)
            bar.update(len(records))
    return rows


def split(path: Path, source: Source, rows: int) -> dict[str, Part]:
    """The parts "train", "validation" and "test" of one source: as the data says, otherwise 5/7, 1/7 and 1/7.

    Raises:
        DataError: a part is empty.
    """
    try:
        parts = source.parts() or dict(zip(PARTS, split_rows(rows)))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    empty = [part for part, of_part in parts.items() if not len(of_part)]
    if empty:
        raise DataError(f"{path}: no rows for {empty[0]}")
    return {part: Part(source, parts[part]) for part in PARTS}


def halves(path: Path, source: Source, rows: int, other: Source, other_rows: int) -> dict[str, Part]:
    """All of one source for training; the first half of another, at ``path``, for validation, the second for the test.

    Raises:
        DataError: the other has less than two rows, or rows of another layout.
    """
    require_one_layout([source, other])
    if other_rows < 2:
        raise DataError(f"{path}: expected at least 2 rows, to validate and to test on")
    half = other_rows // 2
    return {
        "train": Part(source, range(rows)),
        "validation": Part(other, range(half)),
        "test": Part(other, range(half, other_rows)),
    }
