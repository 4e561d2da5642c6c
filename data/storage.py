"""Files: arrays read at any place, and files that appear whole or not at all."""

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.rows import DataError


def natural_order(path: Path) -> list[Any]:
    """A key by which day_2 comes before day_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


class ClosedWhenUnused(io.FileIO):
    """A file of which it is meant that it stays open as long as something refers to it, and no longer."""

    def __del__(self):
        self.close()


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered; it is closed with the last reference to it.

    Raises:
        DataError: it can't be opened.
    """
    try:
        return ClosedWhenUnused(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


class ArrayFile:
    """An array of ``rows`` items in a file, from an offset on, read piece by piece.

    Read, not mapped: as fast (the pages are in the same cache), a disk's error and a file cut short are exceptions and
    not the end of the process, and memory stays bounded.

    Raises:
        DataError: the file is too short for it.
    """

    def __init__(self, file: BinaryIO, path: Path, dtype: np.dtype, offset: int, rows: int | None = None):
        self.path, self.dtype, self.offset = path, dtype, offset
        self._file = file
        there = (os.fstat(file.fileno()).st_size - offset) // dtype.itemsize
        self.rows = there if rows is None else rows
        if there < self.rows:
            raise DataError(f"{path}: truncated: expected {self.rows} rows, got {there}")

    def elements(self) -> "ArrayFile":
        """The same array as one of single numbers."""
        return ArrayFile(
            self._file,
            self.path,
            self.dtype.base,
            self.offset,
            self.rows * self.dtype.itemsize // self.dtype.base.itemsize,
        )

    def take(self, start: int, stop: int) -> np.ndarray:
        """Items start to stop."""
        items = np.empty(stop - start, self.dtype)
        self.read(items, start)
        return items

    def read(self, items: np.ndarray, start: int) -> None:
        """Fill an array with the items from ``start`` on; safe in several threads."""
        read_at(self._file.fileno(), self.path, items, self.offset + start * self.dtype.itemsize)


def read_at(descriptor: int, path: Path, items: np.ndarray, position: int) -> None:
    """Fill an array with the bytes of an open file from a position on.

    Raises:
        DataError: the file ends before.
    """
    rest = memoryview(items.reshape(-1).view(np.uint8)) if items.size else memoryview(b"")
    while rest:
        try:
            got = os.preadv(descriptor, [rest], position)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        if not got:
            raise DataError(f"{path}: truncated: it ends at byte {position}")
        rest, position = rest[got:], position + got


def rename(part: Path, path: Path) -> None:
    """Have a file take its name, also after a power cut."""
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write: it takes the name ``path`` when all went well, else nothing is left of it.

    Raises:
        OSError: it can't be written; names ``path``.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file: whole, or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
