"""Files: arrays that are read at any place."""

import io
import os
import re
import reprlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.schema import DataError

MOST_NAME_BYTES = 255  # what file systems take
_NOT_IN_NAMES = re.compile(r"[/\x00]")


def natural_order(path: Path) -> list[Any]:
    """Return a sort key that puts day_2 before day_10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(text) if i % 2 else text for i, text in enumerate(parts)]


def check_name(name: str, what: str) -> None:
    """Check that a name is that of a file in a folder, and leads nowhere else.

    Args:
        name: of a file, or what such a name begins with.
        what: it names, for the message.

    Raises:
        ValueError: it does not.
    """
    if name in ("", ".", "..") or _NOT_IN_NAMES.search(name) or len(os.fsencode(name)) > MOST_NAME_BYTES:
        raise ValueError(f"{what}: expected a plain name in the folder, got {reprlib.repr(name)}")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or as much as a terminal has room for."""
    return str(error).partition("\n")[0][:200]


class ClosedWhenUnused(io.FileIO):
    """A file that closes with the last reference to it, on purpose and therefore without a ResourceWarning."""

    def __del__(self):
        self.close()


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered. It closes with the last reference to it.

    Raises:
        DataError: it can't be opened.
    """
    try:
        return ClosedWhenUnused(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


class ArrayFile:
    """An array that is stored in a file from an offset on, and read in slices.

    It is read, not mapped: as fast (the pages are in the same cache), memory stays bounded, and a disk error or a file
    that was cut short raises an exception where a mapping would end the process.

    Args:
        file: open for reading.
        path: the file's name, for messages.
        dtype: of an item, its shape included.
        offset: position of the first item, in bytes.
        rows: number of items; None: as many as the file has.

    Raises:
        DataError: the file is too short.
    """

    def __init__(self, file: BinaryIO, path: Path, dtype: np.dtype, offset: int, rows: int | None = None):
        self.path, self.dtype, self.offset = path, dtype, offset
        self._file = file
        there = (os.fstat(file.fileno()).st_size - offset) // dtype.itemsize
        self.rows = there if rows is None else rows
        if there < self.rows:
            raise DataError(f"{path}: truncated: expected {self.rows} rows, got {there}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return (self.rows, *self.dtype.shape)

    def elements(self) -> "ArrayFile":
        """Return the same array as a flat one of single numbers."""
        return ArrayFile(
            self._file,
            self.path,
            self.dtype.base,
            self.offset,
            self.rows * self.dtype.itemsize // self.dtype.base.itemsize,
        )

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return items start to stop."""
        items = np.empty(stop - start, self.dtype)
        self.read(items, start)
        return items

    def read(self, items: np.ndarray, start: int) -> None:
        """Fill an array with the items from ``start`` on. Threads may call this at the same time."""
        read_at(self._file.fileno(), self.path, items, self.offset + start * self.dtype.itemsize)


def read_at(descriptor: int, path: Path, items: np.ndarray, position: int) -> None:
    """Fill an array with the bytes of an open file from a position on.

    Raises:
        DataError: the file ends too early, or can't be read.
    """
    rest = memoryview(items.reshape(-1).view(np.uint8).data) if items.size else memoryview(b"")
    while rest:
        try:
            got = os.preadv(descriptor, [rest], position)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        if not got:
            raise DataError(f"{path}: truncated: it ends at byte {position}")
        rest, position = rest[got:], position + got
