"""Sources of rows: what all formats have in common.

A source is read in pieces: calls that read consecutive lines each, in any thread and any order. A source with random
access also reads any rows at once; the others are read from the beginning.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.rows import Batch, to_batch
from data.schema import DataError, Layout, printable

PIECE_ROWS = 1 << 14  # of sources with random access, which could be read in pieces of any size


class Fault(NamedTuple):
    """A line that is not a row.

    Attributes:
        line: its number in the file, counted from 0.
        cause: what is wrong with it.
        text: the line, without its end.
    """

    line: int
    cause: str
    text: bytes

    def describe(self, path: Path) -> str:
        """Return file:line, counted from 1, and the cause: one line that can be printed and written as UTF-8."""
        return f"{printable(path)}:{self.line + 1}: {self.cause}"


@dataclass
class Piece:
    """Consecutive lines of a source.

    Attributes:
        path: of the file they are in.
        first: the number of the first line in the source, counted from 0.
        lines: how many there are.
        records: of the lines that are rows.
        faults: the other lines.
        before: the number of lines in the files before this one: those that ``first`` counts and the faults don't.
    """

    path: Path
    first: int
    lines: int
    records: np.ndarray
    faults: list[Fault] = field(default_factory=list)
    before: int = 0

    def split(self, line: int) -> "tuple[Piece, Piece]":
        """Return the lines before a line of the source, and the others."""
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
        name: for files made of it: day_3 for day_3.gz.
        layout: of the records.
        rows: the number of rows. None for a log until it has been read to its end once.
    """

    path: Path
    name: str
    layout: Layout
    rows: int | None

    def files(self) -> list[Path]:
        """Return the files that decide what the rows are."""
        return [self.path]

    @property
    def labelled(self) -> bool:
        """True if the rows have a label."""
        return self.layout.labelled

    @abstractmethod
    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        """Yield calls that read the lines from ``start`` on, piece by piece in their order.

        Raises:
            DataError: a file can't be read on. A fault raises nothing: it is in the piece.
        """

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yield the records of rows start to stop (default: the end) in their order, however many at a time.

        Raises:
            DataError: a line is not a row, a file can't be read on, or there are fewer rows than the source promised.
        """
        if stop is not None and start >= stop:
            return
        end = start
        for read in self.pieces(start):
            piece = read()
            if piece.first > end:
                raise DataError(f"{self.path}: expected {piece.first} rows before those of {piece.path}, got {end}")
            wanted = piece if stop is None else piece.split(stop)[0]
            for fault in wanted.faults:
                raise DataError(fault.describe(piece.path))
            yield wanted.records
            end = piece.first + piece.lines
            if stop is not None and end >= stop:
                return
        promised = self.rows if stop is None or self.rows is None else min(stop, self.rows)
        if promised is not None and end < promised:
            raise DataError(f"{self.path}: expected {promised} rows, as it says, got {end}")

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Return rows start to stop (default: the end) in batches of any size that is cheap to read.

        Raises:
            DataError: a line is not a row, or a file can't be read on.
        """
        return map(to_batch, self.records(start, stop))

    def parts(self) -> dict[str, range] | None:
        """Return the rows of "train", "validation" and "test", or None if the data does not define them."""
        return None

    def verify(self) -> None:  # noqa: B027
        """Raise DataError if files were changed since they were written. Only prepared folders can tell."""


class RandomAccess(Source):
    """A source whose rows can be read from any place."""

    rows: int

    @abstractmethod
    def fill(self, records: np.ndarray, start: int) -> None:
        """Fill records with the rows from ``start`` on. Threads may call this at the same time.

        Raises:
            DataError: the rows can't be read.
        """

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return the records of rows start to stop."""
        records = self.layout.records(stop - start)
        self.fill(records, start)
        return records

    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        """Yield calls that read the rows from ``start`` on, piece by piece."""
        for first in range(start, self.rows, PIECE_ROWS):
            last = min(first + PIECE_ROWS, self.rows)
            yield partial(self._piece, first, last)

    def _piece(self, first: int, last: int) -> Piece:
        return Piece(self.path, first, last - first, self.take(first, last))


class Several(Source):
    """Sources one behind the other.

    Args:
        path: that they have in common.
        sources: in their order.

    Raises:
        DataError: their layouts differ.
    """

    def __init__(self, path: Path, sources: Sequence[Source]):
        self.path, self.name, self.sources = path, path.name, list(sources)
        self.layout = require_one_layout(self.sources)

    def files(self) -> list[Path]:
        """Return the files of all sources."""
        return [file for source in self.sources for file in source.files()]

    @property
    def rows(self) -> int | None:  # type: ignore[override]
        """The number of rows in all sources, or None if that of one is not known."""
        rows = [source.rows for source in self.sources]
        return None if None in rows else sum(rows)  # type: ignore[arg-type]

    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        """Yield calls that read the lines from ``start`` on, piece by piece."""
        before = 0
        for source in self.sources:
            if source.rows is None or start < before + source.rows:
                for read in source.pieces(max(start - before, 0)):
                    yield partial(_read_behind, read, before)
            assert source.rows is not None, "known once its pieces are through"
            before += source.rows


def _read_behind(read: Callable[[], Piece], lines: int) -> Piece:
    piece = read()
    return replace(piece, first=piece.first + lines, before=piece.before + lines)


def files_read(source: Source) -> str | None:
    """Return the names of a source's files as a line of text, in the order of their rows; None if there is one file."""
    if not isinstance(source, Several):
        return None
    names = ", ".join(printable(each.path.name) for each in source.sources)
    return f"{printable(source.path)}: {len(source.sources)} files, in this order: {names}"


class SeveralRandomAccess(Several, RandomAccess):  # type: ignore[misc]
    """Sources with random access one behind the other.

    Args:
        path: that they have in common.
        sources: in their order.

    Raises:
        DataError: their layouts differ.
    """

    def __init__(self, path: Path, sources: Sequence[RandomAccess]):
        super().__init__(path, sources)
        self._starts = np.cumsum([0] + [source.rows for source in sources]).tolist()

    def fill(self, records: np.ndarray, start: int) -> None:
        """Fill records with the rows from ``start`` on."""
        for section in sections(records, start, self._starts):
            self.sources[section.number].fill(section.records, section.first)  # type: ignore[attr-defined]


class Section(NamedTuple):
    """Records that one of several sources or shards is to fill.

    Attributes:
        number: of the source or shard, from 0.
        records: to be filled.
        first: the first row wanted, counted in that source or shard.
    """

    number: int
    records: np.ndarray
    first: int


def sections(records: np.ndarray, start: int, starts: Sequence[int]) -> Iterator[Section]:
    """Deal out records, to be filled with the rows from ``start`` on, to the sources or shards that hold these rows.

    Args:
        records: to be filled.
        start: the row that belongs in the first of them.
        starts: the first row of each source or shard, ascending, and at the end the number of all rows.

    Yields:
        a section for each source or shard that has some of the rows.
    """
    number, filled = bisect_right(starts, start) - 1, 0
    while filled < len(records):
        first = start + filled - starts[number]
        rows = min(starts[number + 1] - starts[number] - first, len(records) - filled)
        if rows:
            yield Section(number, records[filled : filled + rows], first)
        number, filled = number + 1, filled + rows


def require_one_layout(sources: Sequence[Source]) -> Layout:
    """Return the layout that all sources have.

    Raises:
        DataError: their layouts differ.
    """
    first = sources[0]
    for source in sources:
        if source.layout != first.layout:
            raise DataError(
                f"{source.path}: its rows have {source.layout.describe()}, those of {first.path} have "
                f"{first.layout.describe()}; expected one layout"
            )
    return first.layout
