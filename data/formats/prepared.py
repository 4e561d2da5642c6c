"""The project's own format: a folder of shards that can be read at any row, with manifests that describe them.

    dataset.json            the layout of a record, the sources, the split, the options
    NAME.manifest.json      for each source: its shards with rows, bytes and SHA-256, and how far it has been read
    NAME-00000.rows ...     shards: records (`data.schema.Layout`) and nothing else, 160 bytes for a row of a log

`data.prepare` writes it. A folder that it writes in another format has the same manifests beside its files.
"""

import hashlib
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.formats.writer import Shard, Writer
from data.schema import DataError, Layout
from data.sources import RandomAccess, Source, sections
from data.storage import read_at

MANIFEST = "dataset.json"
OWN_FORMAT = "rows"
VERSION = 1
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


def load_json(path: Path, *names: str) -> dict[str, Any]:
    """Read a manifest.

    Args:
        path: of the file.
        names: of values that it must have.

    Raises:
        DataError: it can't be read, or is no such manifest.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not a manifest: {error}") from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise DataError(f"{path}: not a manifest of version {VERSION}")
    for name in names:
        if name not in values:
            raise DataError(f"{path}: not a manifest: it has no {name}")
    return values


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
        manifest = load_json(self.path / MANIFEST, "sources", "format", "layout", "split")
        self.is_own = manifest["format"] == OWN_FORMAT
        self.layout = Layout.from_dict(manifest["layout"])
        self._split = manifest["split"]
        self._names: list[str] = manifest["sources"]
        manifests = self._source_manifests()
        self.shards = [Shard(**shard) for values in manifests for shard in values["shards"]]
        self._check_sizes()
        self._source_starts = np.cumsum([0] + [values["rows"] for values in manifests]).tolist()
        self._starts = np.cumsum([0] + [shard.rows for shard in self.shards]).tolist()
        self.rows = self._starts[-1]
        if self.is_own and not self.rows:
            raise DataError(f"{self.path}: no rows")

    def _source_manifests(self) -> list[dict[str, Any]]:
        manifests, unfinished = [], []
        for name in self._names:
            path = source_manifest(self.path, name)
            values = load_json(path) if path.exists() else {}
            if values.get("complete"):
                manifests.append(values)
            else:
                unfinished.append(name)
        if unfinished:
            raise DataError(
                f"{self.path}: not complete: {len(unfinished)} of {len(self._names)} sources are still to be prepared "
                f"({', '.join(unfinished[:3])}{', ...' if len(unfinished) > 3 else ''}); run data.prepare with --resume"
            )
        return manifests

    def _check_sizes(self) -> None:
        for shard in self.shards:
            file = self.path / shard.file
            size = file.stat().st_size if file.exists() else None
            if size != shard.bytes:
                got = "is missing" if size is None else f"has {size}"
                raise DataError(f"{file}: changed since it was written: expected {shard.bytes} bytes, it {got}")

    def sources(self) -> "list[Source]":
        """Return the sources that the folder was made of, under their names; those without rows are left out."""
        spans = zip(self._names, pairwise(self._source_starts))
        return [Span(self, name, start, stop) for name, (start, stop) in spans if start < stop]

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
        if self._split["by"] == "days":
            # As in MLPerf: the first half of the last day is the test set.
            half = (starts[-2] + starts[-1] + 1) // 2
            return {"train": range(starts[-2]), "test": range(starts[-2], half), "validation": range(half, starts[-1])}
        if self._split["by"] == "files":
            of_part = {part: [self._names.index(name) for name in self._split[part]] for part in PARTS}
            return {part: range(starts[files[0]], starts[files[-1] + 1]) for part, files in of_part.items()}
        return None

    def verify(self, everything: bool = False, progress: Callable[[int], object] = lambda _: None) -> None:
        """Check that the files are those that were written.

        Args:
            everything: read all files; by default, only those whose time of change differs from the manifest's.
            progress: called with the bytes of each file that was read.

        Raises:
            DataError: a file was changed, or can't be read.
        """
        for shard in self.shards:
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
    """Consecutive rows of another source, under a name of their own.

    Args:
        source: that has the rows.
        name: of these rows.
        start: the first row.
        stop: the row after the last one.
    """

    def __init__(self, source: RandomAccess, name: str, start: int, stop: int):
        self.path, self.name, self.layout = source.path, name, source.layout
        self._source, self._start, self.rows = source, start, stop - start

    def fill(self, records: np.ndarray, start: int) -> None:
        """Fill records with the rows from ``start`` on."""
        self._source.fill(records, self._start + start)


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
