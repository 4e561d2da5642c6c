"""numpy's files of arrays, .npy and .npz: read at any place, and written without having the arrays in memory."""

import io
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.schema import DataError
from data.storage import ArrayFile, ClosedWhenUnused, first_line, open_binary

HEADER_BYTES = 128  # numpy's own header of any array written here


def read_npy(file: BinaryIO, path: Path, offset: int = 0) -> ArrayFile:
    """Return the array of numbers in a .npy file, or in a file that holds one from an offset on. Never unpickles.

    Raises:
        DataError: it is no .npy array, is too short, or holds something other than numbers row by row.
    """
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
    return ArrayFile(file, path, np.dtype((dtype, shape[1:])) if shape[1:] else dtype, file.tell(), shape[0])


class NpzFile:
    """The arrays of a .npz file. Stored arrays are read in place, compressed ones from temporary files.

    Args:
        path: of the file.

    Attributes:
        names: of the arrays.

    Raises:
        DataError: it is no .npz file.
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

    def array(self, name: str) -> ArrayFile:
        """Return an array.

        Raises:
            DataError: it is broken, or not an array of numbers.
            OSError: there is no room to unpack it.
        """
        info = self._zip.getinfo(name + ".npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return read_npy(self._unpack(info, name), self._path)
        file = open_binary(self._path)
        file.seek(info.header_offset + 26)  # in the local header: the lengths of name and extra field
        lengths = np.frombuffer(file.read(4), "<u2").astype(int)
        start = info.header_offset + 30 + int(lengths.sum())
        array = read_npy(file, self._path, start)
        there = start + info.file_size - array.offset
        if there < array.rows * array.dtype.itemsize:
            kind = array.dtype.base.str[1:]
            raise DataError(f"{self._path}: {name}: truncated: {array.shape} {kind} in {there} bytes")
        return array

    def _unpack(self, info: zipfile.ZipInfo, name: str) -> BinaryIO:
        try:
            with tempfile.TemporaryFile() as temporary, self._zip.open(info) as member:
                shutil.copyfileobj(member, temporary, 1 << 20)
                temporary.flush()
                return ClosedWhenUnused(os.dup(temporary.fileno()))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it is encrypted
            raise DataError(f"{self._path}: {name}: corrupt archive: {error}") from None
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}, while unpacking {self._path}", tempfile.gettempdir()
            ) from None


def require(fits: bool, array: ArrayFile, name: str, expected: str) -> None:
    """Raise DataError unless an array fits.

    Args:
        fits: whether it does.
        array: for the message: its file, type and shape.
        name: of the array.
        expected: in words.
    """
    if not fits:
        raise DataError(f"{array.path}: {name}: expected {expected}, got {array.dtype.base.str[1:]} {array.shape}")


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the header of a .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


class NpzArray(NamedTuple):
    """An array on its way into a .npz file.

    Attributes:
        name: in the file.
        shape: of the array.
        dtype: of its elements.
        files: open files whose contents, one behind the other, are the array's bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    files: Sequence[BinaryIO]


def write_npz(file: BinaryIO, arrays: Iterable[NpzArray]) -> None:
    """Write an uncompressed .npz file. The same arrays always give the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as npz:
        for array in arrays:
            # zipfile would put the current time here.
            info = zipfile.ZipInfo(f"{array.name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with npz.open(info, "w", force_zip64=True) as member:
                member.write(npy_header(array.shape, array.dtype))
                for content in array.files:
                    content.seek(0)
                    shutil.copyfileobj(content, member, 1 << 20)
