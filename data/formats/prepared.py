"""The project's own format: a folder of shards that can be read at any row, with manifests that describe them.

    dataset.json            the layout of a record, the sources, the split, the options
    NAME.manifest.json      for each source: its shards with rows, bytes and SHA-256, and how far it has been read
    NAME-00000.rows ...     shards: records (`data.schema.Layout`) and nothing else, 160 bytes for a row of a log

`data.prepare` writes it. A folder that it writes in another format has the same manifests beside its files.
"""

import hashlib
import os
import reprlib
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.fingerprints import Fingerprint
from data.formats.writer import Shard, Writer
from data.schema import DataError, Layout, printable
from data.sources import RandomAccess, Source, sections
from data.storage import check_name, read_at
from robe_json import read_json

MANIFEST = "dataset.json"
OWN_FORMAT = "rows"
VERSION: Literal[1] = 1
PARTS = ("train", "validation", "test")


def is_prepared(path: Path) -> bool:
    """Return whether `data.prepare` wrote a folder, in whatever format and whether or not it has finished."""
    return (path / MANIFEST).exists()


def source_manifest(folder: Path, name: str) -> Path:
    """Return the path of a source's manifest.

    Args:
        folder: the prepared folder.
        name: of the source.
    """
    return folder / f"{name}.manifest.json"


@dataclass(frozen=True)
class Split:
    """How the rows of a folder are split.

    Attributes:
        by: "rows", "days" or "files".
        train: by files: the sources to train on, and so on. All sources, in their order.
        validation: see ``train``.
        test: see ``train``.

    Raises:
        ValueError: there are sources, and ``by`` is not "files"; or the other way round.
    """

    by: Literal["rows", "days", "files"]
    train: list[str] | None = None
    validation: list[str] | None = None
    test: list[str] | None = None

    def __post_init__(self):
        if any(bool(names) != (self.by == "files") for names in self.of_parts):
            raise ValueError(f"split by {self.by}: expected {'' if self.by == 'files' else 'no '}sources of each part")

    @property
    def of_parts(self) -> list[list[str]]:
        """The sources of each part, in the order of PARTS; none unless split by files."""
        return [self.train or [], self.validation or [], self.test or []]


@dataclass(frozen=True)
class DatasetManifest:
    """What ``dataset.json`` holds.

    Attributes:
        version: of all manifests in the folder.
        format: of its files.
        layout: of a record.
        split: of its rows.
        sources: their names, in the order of the rows.
        options: that the bytes depend on, for ``--resume``.

    Raises:
        ValueError: a source has no name that a file could have, or is there twice; or the split has other sources.
    """

    version: Literal[1]
    format: str
    layout: Layout
    split: Split
    sources: list[str]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in self.sources:
            check_name(name, "sources")
        require_different("sources", self.sources)
        if self.split.by == "days" and len(self.sources) < 2:
            raise ValueError(f"split by days: expected at least 2 sources, got {len(self.sources)}")
        if self.split.by == "files" and [*chain.from_iterable(self.split.of_parts)] != self.sources:
            raise ValueError("split by files: expected all sources, in their order")


@dataclass
class SourceProgress:
    """Progress of a source, and its manifest.

    Attributes:
        version: of the manifest.
        complete: whether all of the source is prepared.
        lines: that were read, and whose rows are safe in shards.
        rows: in the shards.
        bad_rows: lines that are not rows.
        bad_bytes: of the quarantine file.
        bad_examples: file, line and cause of the first bad rows.
        shards: the files.
        source: the source's files as they were when it was prepared; None in manifests of 0.9 and before.

    Raises:
        ValueError: numbers are negative, or contradict each other; or a shard is there twice.
    """

    version: Literal[1]
    complete: bool = False
    lines: int = 0
    rows: int = 0
    bad_rows: int = 0
    bad_bytes: int = 0
    bad_examples: list[str] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    source: list[Fingerprint] | None = None

    def __post_init__(self):
        if min(self.rows, self.bad_rows, self.bad_bytes) < 0 or self.rows + self.bad_rows != self.lines:
            raise ValueError(
                f"lines: expected rows and bad_rows, {self.rows} and {self.bad_rows}, together, got {self.lines}"
            )
        require_different("shards", [shard.file for shard in self.shards])


def require_different(what: str, names: list[str]) -> None:
    """Raise ValueError if a name is there twice.

    Args:
        what: the names are of, for the message.
        names: to compare.
    """
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what}: {reprlib.repr(name)} is there twice")
        seen.add(name)


def read_progress(folder: Path, name: str) -> SourceProgress:
    """Read the manifest of a source; a source without one has made no progress.

    Args:
        folder: the prepared folder.
        name: of the source.

    Raises:
        DataError: it can't be read, or is no such manifest.
    """
    path = source_manifest(folder, name)
    return read_json(path, SourceProgress, DataError) if os.path.lexists(path) else SourceProgress(VERSION)


def check_shard(folder: Path, shard: Shard) -> None:
    """Check that a shard is there, and of the size that it had when it was written.

    Args:
        folder: the prepared folder.
        shard: one of its files.

    Raises:
        DataError: it is missing, of another size, or no file.
    """
    file = folder / shard.file
    try:
        status = file.stat()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise DataError(f"{file}: {error.strerror}") from None
        got = "is missing"
    else:
        if stat.S_ISREG(status.st_mode) and status.st_size == shard.bytes:
            return
        got = f"has {status.st_size}" if stat.S_ISREG(status.st_mode) else "is no file"
    raise DataError(f"{file}: changed since it was written: expected {shard.bytes} bytes, it {got}")


class Dataset(RandomAccess):
    """A prepared folder.

    Args:
        path: of the folder.

    Attributes:
        is_own: whether its rows are in this format. If not, use only ``verify`` and ``shards``.
        shards: its files.

    Raises:
        DataError: it is no prepared folder, was left unfinished, or a file is missing or has another size than when it
            was written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name
        manifest = read_json(self.path / MANIFEST, DatasetManifest, DataError)
        self.is_own = manifest.format == OWN_FORMAT
        self.layout = manifest.layout
        self._split = manifest.split
        self._names = manifest.sources
        self._manifests = self._source_manifests()
        self.shards = [shard for progress in self._manifests for shard in progress.shards]
        self._check_files()
        if self.is_own:
            self._check_rows()
        self._source_starts = [0, *accumulate(progress.rows for progress in self._manifests)]
        self._starts = [0, *accumulate(shard.rows for shard in self.shards)]
        self.rows = self._starts[-1]
        if self.is_own and not self.rows:
            raise DataError(f"{self.path}: no rows")

    def _source_manifests(self) -> list[SourceProgress]:
        manifests = [read_progress(self.path, name) for name in self._names]
        unfinished = [name for name, progress in zip(self._names, manifests) if not progress.complete]
        if unfinished:
            some = printable(", ".join(unfinished[:3])) + ", ..." * (len(unfinished) > 3)
            raise DataError(
                f"{self.path}: not complete: {len(unfinished)} of {len(self._names)} sources are still to be prepared "
                f"({some}); run data.prepare with --resume"
            )
        return manifests

    def _check_files(self) -> None:
        folder, seen = self.path.resolve(), set()
        for shard in self.shards:
            check_shard(self.path, shard)
            file = (folder / shard.file).resolve()
            if file.parent != folder:
                raise DataError(f"{self.path / shard.file}: is a link that leads out of the folder")
            if file in seen:
                raise DataError(f"{self.path / shard.file}: is listed twice")
            seen.add(file)

    def _check_rows(self) -> None:
        width = self.layout.dtype.itemsize
        for shard in self.shards:
            if shard.bytes != shard.rows * width:
                raise DataError(
                    f"{self.path / shard.file}: expected {shard.rows} rows of {width} bytes, got {shard.bytes} bytes"
                )
        for name, progress in zip(self._names, self._manifests):
            in_shards = sum(shard.rows for shard in progress.shards)
            if in_shards != progress.rows:
                raise DataError(
                    f"{source_manifest(self.path, name)}: expected {progress.rows} rows, its shards have {in_shards}"
                )

    def files(self) -> list[Path]:
        """Return the manifests: they have the checksums of the rows."""
        return [self.path / MANIFEST, *(source_manifest(self.path, name) for name in self._names)]

    def sources(self) -> "list[Source]":
        """Return the sources that the folder was made of, under their names; those without rows are left out."""
        spans = zip(self._names, self._manifests, pairwise(self._source_starts))
        return [
            Span(self, name, start, stop, progress.shards) for name, progress, (start, stop) in spans if start < stop
        ]

    def fill(self, records: np.ndarray, start: int) -> None:
        """Fill records with the rows from ``start`` on."""
        for section in sections(records, start, self._starts):
            self._read(self.path / self.shards[section.number].file, section.records, section.first)

    def _read(self, file: Path, records: np.ndarray, first: int) -> None:
        # Opened each time: a large dataset has more shards than a process may have files open.
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
        try:
            read_at(descriptor, file, records, first * records.dtype.itemsize)
        finally:
            os.close(descriptor)

    def parts(self) -> dict[str, range] | None:
        """Return the rows of "train", "validation" and "test"; None if they were not split by days or files."""
        starts = self._source_starts
        if self._split.by == "days":
            # As in MLPerf: the first half of the last day is the test set.
            half = (starts[-2] + starts[-1] + 1) // 2
            return {"train": range(starts[-2]), "test": range(starts[-2], half), "validation": range(half, starts[-1])}
        if self._split.by == "files":
            ends = list(accumulate(len(names) for names in self._split.of_parts))
            return {part: range(starts[a], starts[b]) for part, (a, b) in zip(PARTS, pairwise([0, *ends]))}
        return None

    def verify(
        self,
        everything: bool = False,
        progress: Callable[[int], object] = lambda _: None,
        shards: Sequence[Shard] | None = None,
    ) -> None:
        """Check that the files are those that were written.

        Args:
            everything: read all files; by default, only those whose time of change differs from the manifest's.
            progress: called with the bytes of each file that was read.
            shards: the files; None: all.

        Raises:
            DataError: a file was changed, or can't be read.
        """
        for shard in self.shards if shards is None else shards:
            file = self.path / shard.file
            try:
                if not everything and file.stat().st_mtime_ns == shard.mtime_ns:
                    continue
                with open(file, "rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"{file}: {error.strerror}") from None
            if digest != shard.sha256:
                raise DataError(
                    f"{file}: changed since it was written: expected SHA-256 {shard.sha256[:16]}..., "
                    f"got {digest[:16]}..."
                )
            progress(shard.bytes)


class Span(RandomAccess):
    """A source that a prepared folder was made of.

    Args:
        dataset: the folder.
        name: of the source.
        start: its first row.
        stop: the row after its last one.
        shards: that have its rows.
    """

    def __init__(self, dataset: Dataset, name: str, start: int, stop: int, shards: Sequence[Shard]):
        self.path, self.name, self.layout = dataset.path, name, dataset.layout
        self._dataset, self._start, self.rows, self._shards = dataset, start, stop - start, shards

    def files(self) -> list[Path]:
        """Return the manifests that decide what the rows are."""
        return [self.path / MANIFEST, source_manifest(self.path, self.name)]

    def verify(self) -> None:
        """Raise DataError if a shard was changed since it was written."""
        self._dataset.verify(shards=self._shards)

    def fill(self, records: np.ndarray, start: int) -> None:
        """Fill records with the rows from ``start`` on."""
        self._dataset.fill(records, self._start + start)


class RowsWriter(Writer):
    """Writes shards: the records as they are."""

    sharded = True
    holds = "all rows"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        """Return whether the format can hold such records."""
        return True

    def begin(self) -> None:
        """Open the file."""
        self._file = self.open_file(".rows")

    def add(self, records: np.ndarray) -> None:
        """Write records."""
        self._file.write(np.ascontiguousarray(records).view(np.uint8).data)
