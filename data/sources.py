"""Where rows come from: what every format has in common.

A source is read as pieces, calls that read some rows each and may be made in any thread and any order. Sources with
``take`` read any rows at once; the others are read from the beginning.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.rows import Batch, DataError, Layout, to_batch

PIECE_ROWS = 1 << 14  # rows read at a time where a source has no sizes of its own


class Fault(NamedTuple):
    """A line that is no row."""

    line: int  # counted from 0
    cause: str
    text: bytes

    def describe(self, path: Path) -> str:
        """file:line and the cause."""
        return f"{path}:{self.line + 1}: {self.cause}"


@dataclass
class Piece:
    """Some lines of a source."""

    path: Path
    first: int  # line, counted from 0
    lines: int
    records: np.ndarray
    faults: list[Fault] = field(default_factory=list)
    before: int = 0  # lines of the files before this one, which ``first`` counts and the faults don't

    def split(self, line: int) -> "tuple[Piece, Piece]":
        """The lines before a line, and the others."""
        lines = min(max(line - self.first, 0), self.lines)
        faults = bisect_left(self.faults, self.first + lines - self.before, key=lambda fault: fault.line)
        rows = lines - faults
        return (
            replace(self, lines=lines, records=self.records[:rows], faults=self.faults[:faults]),
            replace(
                self,
                first=self.first + lines,
                lines=self.lines - lines,
                records=self.records[rows:],
                faults=self.faults[faults:],
            ),
        )


class Source(ABC):
    """Rows in an order.

    Attributes:
        path: of the file or folder.
        name: of the rows, for files made of them: day_3 of day_3.gz.
        layout: of the records.
        rows: how many there are; None where only reading tells, until it has come to the end once.
    """

    path: Path
    name: str
    layout: Layout
    rows: int | None

    @property
    def labelled(self) -> bool:
        return self.layout.labelled

    @abstractmethod
    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        """Calls that read the lines from number ``start`` on, piece by piece in order. Faulty lines are in the piece.

        Raises:
            DataError: a file that can't be read on.
        """

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Rows start to stop (default: the end) in order, however many at a time.

        Raises:
            DataError: a line that is no row, or a file that can't be read on.
        """
        if stop is not None and start >= stop:
            return
        for read in self.pieces(start):
            piece = read()
            wanted = piece if stop is None else piece.split(stop)[0]
            for fault in wanted.faults:
                raise DataError(fault.describe(piece.path))
            yield wanted.records
            if stop is not None and piece.first + piece.lines >= stop:
                return

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Rows start to stop (default: the end) as batches of whatever size is cheap to read."""
        return map(to_batch, self.records(start, stop))

    def parts(self) -> dict[str, range] | None:
        """Rows of "train", "validation" and "test", where the data says so."""
        return None

    def verify(self) -> None:  # noqa: B027
        """Raise DataError if the files are not those that were written. Only the project's own format can tell."""


class RandomAccess(Source):
    """A source any rows of which can be read at once."""

    rows: int

    @abstractmethod
    def fill(self, records: np.ndarray, start: int) -> None:
        """Put the rows from ``start`` on into records. Safe to call in several threads.

        Raises:
            DataError: they can't be read.
        """

    def take(self, start: int, stop: int) -> np.ndarray:
        """The records of rows start to stop."""
        records = self.layout.records(stop - start)
        self.fill(records, start)
        return records

    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        for first in range(start, self.rows, PIECE_ROWS):
            last = min(first + PIECE_ROWS, self.rows)
            yield partial(self._piece, first, last)

    def _piece(self, first: int, last: int) -> Piece:
        return Piece(self.path, first, last - first, self.take(first, last))


class Several(Source):
    """Sources one behind the other.

    Raises:
        DataError: they have rows of different layouts.
    """

    def __init__(self, path: Path, sources: Sequence[Source]):
        self.path, self.name, self.sources = path, path.name, list(sources)
        self.layout = require_one_layout(self.sources)

    @property
    def rows(self) -> int | None:  # type: ignore[override]
        rows = [source.rows for source in self.sources]
        return None if None in rows else sum(rows)  # type: ignore[arg-type]

    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        before = 0
        for source in self.sources:
            if source.rows is None or start < before + source.rows:
                for read in source.pieces(max(start - before, 0)):
                    yield partial(_later, read, before)
            assert source.rows is not None, "known once its pieces are through"
            before += source.rows


def _later(read: Callable[[], Piece], rows: int) -> Piece:
    piece = read()
    return replace(piece, first=piece.first + rows, before=piece.before + rows)


class SeveralRandomAccess(Several, RandomAccess):  # type: ignore[misc]
    """Random-access sources one behind the other."""

    def __init__(self, path: Path, sources: Sequence[RandomAccess]):
        super().__init__(path, sources)
        self._starts = np.cumsum([0] + [source.rows for source in sources]).tolist()

    def fill(self, records: np.ndarray, start: int) -> None:
        for number, part, first in each_part(records, start, self._starts):
            self.sources[number].fill(part, first)  # type: ignore[attr-defined]


def each_part(records: np.ndarray, start: int, starts: Sequence[int]) -> Iterator[tuple[int, np.ndarray, int]]:
    """Deal out records to be filled with the rows from ``start`` on, where part i has rows starts[i] to starts[i + 1].

    Returns:
        (part, its records, the first of its rows that is wanted) of each part that has some.
    """
    part, filled = bisect_right(starts, start) - 1, 0
    while filled < len(records):
        first = start + filled - starts[part]
        rows = min(starts[part + 1] - starts[part] - first, len(records) - filled)
        if rows:
            yield part, records[filled : filled + rows], first
        part, filled = part + 1, filled + rows


def require_one_layout(sources: Sequence[Source]) -> Layout:
    """The layout of sources that are to be one behind the other.

    Raises:
        DataError: they have different ones.
    """
    first = sources[0]
    for source in sources:
        if source.layout != first.layout:
            raise DataError(
                f"{source.path}: its rows have {source.layout.describe()}, those of {first.path} "
                f"{first.layout.describe()}; expected one kind"
            )
    return first.layout
