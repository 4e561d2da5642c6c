"""The project's own format: a folder of shards that can be read at any row, and manifests that say what is in them.

    dataset.json            the layout of a record, the files it was made of, the split
    NAME.manifest.json      of each of those files: its shards with rows, bytes and SHA-256, and how far it was read
    NAME-00000.rows ...     shards: records (data/rows.py: Layout) and nothing else, 160 bytes for a row of Criteo

``data.prepare`` writes it. Folders of other formats that it writes have the same manifests beside their files.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.rows import DataError, Layout
from data.sources import RandomAccess, Source, each_part
from data.storage import read_at

MANIFEST = "dataset.json"
OWN_FORMAT = "rows"
VERSION = 1
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shard:
    """A file that was written whole. One of several for the same rows has all of them, as a .npy triple's."""

    file: str
    rows: int
    bytes: int
    sha256: str
    mtime_ns: int  # that it was written: while size and time are the same, its content is taken to be so too


def part_manifest(folder: Path, name: str) -> Path:
    """Of the rows that came from the source of that name."""
    return folder / f"{name}.manifest.json"


def load_json(path: Path, *names: str) -> dict[str, Any]:
    """A manifest with values of these names.

    Raises:
        DataError: it isn't one.
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
        is_own: whether its rows are in this format; if not, only ``verify`` and ``shards`` are of use.
        shards: its files.

    Raises:
        DataError: it is not one, was left unfinished, or a file is missing or of another size than it was written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name
        manifest = load_json(self.path / MANIFEST, "sources", "format", "layout", "split")
        self.shards: list[Shard] = []
        unfinished = []
        self._names: list[str] = manifest["sources"]
        rows_of: list[int] = []  # of each source
        for name in self._names:
            part = part_manifest(self.path, name)
            values = load_json(part) if part.exists() else {}
            if not values.get("complete"):
                unfinished.append(name)
                continue
            self.shards += [Shard(**shard) for shard in values["shards"]]
            rows_of.append(values["rows"])
        if unfinished:
            raise DataError(
                f"{self.path}: not complete: {len(unfinished)} of {len(self._names)} files are still to be prepared "
                f"({', '.join(unfinished[:3])}{', ...' if len(unfinished) > 3 else ''}); run data.prepare with --resume"
            )
        self.is_own = manifest["format"] == OWN_FORMAT
        self.layout = Layout.from_dict(manifest["layout"])
        self._split = manifest["split"]
        for shard in self.shards:
            file = self.path / shard.file
            size = file.stat().st_size if file.exists() else None
            if size != shard.bytes:
                got = "is missing" if size is None else f"has {size}"
                raise DataError(f"{file}: changed since it was written: expected {shard.bytes} bytes, it {got}")
        self._source_starts = np.cumsum([0] + rows_of).tolist()
        self._starts = np.cumsum([0] + [shard.rows for shard in self.shards]).tolist()
        self.rows = self._starts[-1]
        if self.is_own and not self.rows:
            raise DataError(f"{self.path}: no rows")

    def sources(self) -> "list[Source]":
        """The rows of each source that was prepared, by its name."""
        spans = zip(self._names, pairwise(self._source_starts))
        return [Span(self, name, start, stop) for name, (start, stop) in spans if start < stop]

    def fill(self, records: np.ndarray, start: int) -> None:
        for number, part, first in each_part(records, start, self._starts):
            self._read(self.path / self.shards[number].file, part, first)

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
        """Rows of "train", "validation" and "test" as the manifest has them; None: by rows, as for every format."""
        starts = self._source_starts
        if self._split["by"] == "days":
            # As MLPerf has it: the first half of the last day is the test set.
            half = (starts[-2] + starts[-1] + 1) // 2
            return {"train": range(starts[-2]), "test": range(starts[-2], half), "validation": range(half, starts[-1])}
        if self._split["by"] == "files":
            of_part = {part: [self._names.index(name) for name in self._split[part]] for part in PARTS}
            return {part: range(starts[files[0]], starts[files[-1] + 1]) for part, files in of_part.items()}
        return None

    def verify(self, everything: bool = False, progress: Callable[[int], object] = lambda _: None) -> None:
        """Raise DataError for a file whose content is not what was written.

        Args:
            everything: read all files; default: those whose time of change is another than when they were written.
            progress: called with the bytes of each file that was read.
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
                    f"{file}: changed since it was written: SHA-256 {digest[:16]}..., expected {shard.sha256[:16]}..."
                )
            progress(shard.bytes)


class Span(RandomAccess):
    """Some rows of a source, under a name of their own."""

    def __init__(self, source: RandomAccess, name: str, start: int, stop: int):
        self.path, self.name, self.layout = source.path, name, source.layout
        self._source, self._start, self.rows = source, start, stop - start

    def fill(self, records: np.ndarray, start: int) -> None:
        self._source.fill(records, self._start + start)
