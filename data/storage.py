"""Files: arrays read at any place, and files that appear whole or not at all."""

import io
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
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
    rest = memoryview(items.reshape(-1).view(np.uint8).data) if items.size else memoryview(b"")
    while rest:
        try:
            got = os.preadv(descriptor, [rest], position)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        if not got:
            raise DataError(f"{path}: truncated: it ends at byte {position}")
        rest, position = rest[got:], position + got


def read_npy_header(file: BinaryIO, path: Path, offset: int) -> tuple[ArrayFile, tuple[int, ...]]:
    """The rows of the .npy array that begins at an offset of a file, and its shape."""
    try:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_order, dtype = read(file)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not a .npy array: {first_line(error)}") from None
    numbers = (
        dtype.kind in "biuf" and not column_order and bool(shape) and shape[0] >= 0 and min(shape[1:], default=1) > 0
    )
    if not numbers or math.prod(shape[1:]) >= 1 << 31:
        raise DataError(f"{path}: expected an array of numbers, row by row, got {dtype}, {shape}")
    return ArrayFile(file, path, np.dtype((dtype, shape[1:])) if shape[1:] else dtype, file.tell(), shape[0]), shape


class NpzFile:
    """The arrays of a .npz file: where they lie if they are stored, else unpacked into temporary files.

    Raises:
        DataError: it isn't one.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(open_binary(path))
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: not a .npz file, or one that ends early: {error}") from None
        self.names = {name.removesuffix(".npy") for name in self._zip.namelist()}

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def array(self, name: str) -> tuple[ArrayFile, tuple[int, ...]]:
        """The rows of an array, and its shape.

        Raises:
            DataError: it is broken, or not one of numbers.
            OSError: there is no room to unpack it.
        """
        info = self._zip.getinfo(name + ".npy")
        if info.compress_type == zipfile.ZIP_STORED:
            file = open_binary(self._path)
            file.seek(info.header_offset + 26)  # of the local header: the lengths of name and extra field
            lengths = np.frombuffer(file.read(4), "<u2").astype(int)
            start = info.header_offset + 30 + int(lengths.sum())
            array, shape = read_npy_header(file, self._path, start)
            there = start + info.file_size - array.offset
            if there < array.rows * array.dtype.itemsize:
                raise DataError(f"{self._path}: {name}: truncated: {shape} {array.dtype.base.str[1:]} in {there} bytes")
            return array, shape
        try:
            with tempfile.TemporaryFile() as temporary, self._zip.open(info) as member:
                shutil.copyfileobj(member, temporary, 1 << 20)
                temporary.flush()
                unpacked = ClosedWhenUnused(os.dup(temporary.fileno()))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, or how
            raise DataError(f"{self._path}: {name}: corrupt archive: {error}") from None
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}, while unpacking {self._path}", tempfile.gettempdir()
            ) from None
        return read_npy_header(unpacked, self._path, 0)


def first_line(error: Exception) -> str:
    """Of an error's message."""
    return str(error).partition("\n")[0]


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
