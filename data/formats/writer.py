"""Base class of every format's writer, and the files it writes: they appear whole or not at all.

A writer gets the records of one shard, or of one source for a format without shards. It writes ``*.part`` files;
``finish`` gives them their names.
"""

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from data.schema import DataError, Layout
from data.storage import check_name
from robe_files import no_link, rename


@dataclass(frozen=True)
class Shard:
    """A file that was written whole.

    Several files may hold the same rows, as those of a .npy triple do; ``rows`` is then that of each.

    Attributes:
        file: its name in the folder.
        rows: how many it holds.
        bytes: its size.
        sha256: of its content, in hexadecimal.
        mtime_ns: when it was written. As long as size and time are the same, its content is assumed to be the same.

    Raises:
        ValueError: the name leads out of the folder, or rows or bytes are negative.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    mtime_ns: int

    def __post_init__(self):
        check_name(self.file, "file")
        if min(self.rows, self.bytes) < 0:
            raise ValueError(f"expected rows and bytes of at least 0, got {self.rows} and {self.bytes}")


class ShardFile:
    """A file being written under the name ``PATH.part``.

    Args:
        path: the name it takes in the end.

    Attributes:
        stream: the open file. Bytes may go to it directly; the checksum is then made by reading the file again.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, path: Path):
        self._path = path
        self.stream = open(path.with_name(path.name + ".part"), "wb+", opener=no_link)  # noqa: SIM115
        self._hash, self._hashed = hashlib.sha256(), 0

    def write(self, data) -> None:
        """Append bytes."""
        self.stream.write(data)
        self._hash.update(data)
        self._hashed += memoryview(data).nbytes

    def finish(self, rows: int) -> Shard:
        """Make the file safe on the disk, give it its name, and return the shard.

        Args:
            rows: how many it holds.

        Raises:
            OSError: it can't be written.
        """
        self.stream.flush()
        os.fsync(self.stream.fileno())
        size = os.fstat(self.stream.fileno()).st_size
        if self._hashed != size:
            self.stream.seek(0)
            self._hash = hashlib.file_digest(self.stream, "sha256")
        status = os.fstat(self.stream.fileno())
        self.stream.close()
        rename(Path(self.stream.name), self._path)
        return Shard(self._path.name, rows, size, self._hash.hexdigest(), status.st_mtime_ns)

    def abort(self) -> None:
        """Remove the file. Does nothing after ``finish``."""
        with suppress(OSError):  # what is still buffered can't be written to a full disk
            self.stream.close()
        Path(self.stream.name).unlink(missing_ok=True)


class Writer(ABC):
    """Files of one format.

    A format defines ``holds``, ``can_hold``, ``begin``, ``add`` and, where something has to wait for the last record,
    ``end``.

    Args:
        folder: where the files go.
        name: of the files, before the suffix.
        layout: of the records to come.

    Attributes:
        sharded: whether a source becomes several files with some rows each.
        holds: the rows that the format can hold, in words.

    Raises:
        OSError: a file can't be written.
    """

    sharded: ClassVar[bool] = False
    holds: ClassVar[str]

    @classmethod
    def check(cls, layout: Layout) -> None:
        """Raise DataError if the format can't hold such records."""
        if not cls.can_hold(layout):
            raise DataError(f"this format holds {cls.holds}; these rows have {layout.describe()}")

    @staticmethod
    @abstractmethod
    def can_hold(layout: Layout) -> bool:
        """Return whether the format can hold such records."""

    def __init__(self, folder: Path, name: str, layout: Layout):
        self.folder, self.name, self.layout = folder, name, layout
        self.rows = 0
        self._files: list[ShardFile] = []
        self._temporaries: list[BinaryIO] = []
        try:
            self.begin()
        except BaseException:
            self.abort()
            raise

    def write(self, records: np.ndarray) -> None:
        """Append records."""
        self.rows += len(records)
        self.add(records)

    def finish(self) -> list[Shard]:
        """Complete the files, make them safe on the disk, give them their names, and return them."""
        self.end()
        self._close_temporaries()
        return [file.finish(self.rows) for file in self._files]

    def abort(self) -> None:
        """Remove all files. Does nothing after ``finish``."""
        self._close_temporaries()
        for file in self._files:
            file.abort()

    @abstractmethod
    def begin(self) -> None:
        """Open the files."""

    @abstractmethod
    def add(self, records: np.ndarray) -> None:
        """Write records, now or at the end."""

    def end(self) -> None:  # noqa: B027
        """Write what has to wait for the last record."""

    def open_file(self, suffix: str) -> ShardFile:
        """Open a file of the shard, called the writer's name and a suffix."""
        file = ShardFile(self.folder / (self.name + suffix))
        self._files.append(file)
        return file

    def open_temporary(self) -> BinaryIO:
        """Open a file that is removed with the writer, for bytes whose place is not known yet."""
        file: BinaryIO = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        self._temporaries.append(file)
        return file

    def _close_temporaries(self) -> None:
        for file in self._temporaries:
            with suppress(OSError):  # what is still buffered has been read, or is not wanted
                file.close()
