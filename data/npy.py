"""numpy's files of arrays, .npy and .npz: read at any place, and written without having the arrays in memory.

What a file says of itself is compared with its size before memory or disk is taken for it. Nothing is ever unpickled.
"""

import io
import math
import os
import re
import reprlib
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from data.schema import DataError
from data.storage import ArrayFile, ClosedWhenUnused, first_line, open_binary

HEADER_BYTES = 128  # numpy's own header of any array written here
MOST_HEADER_BYTES = 10_000  # to read, as in numpy
_START = {1: "<H", 2: "<I", 3: "<I"}  # by version: how the length of a header is written
# A header is a dictionary in Python's words. No quantifier gives back what it took, so matching takes linear time.
_ENTRY = re.compile(
    r"""
    \s*+ '(descr|fortran_order|shape)' \s*+ : \s*+
    ( '[^']*+' | True | False | \[ [^]]*+ \]
    | \( (?: \s*+ -?+ \d{1,18}+ L?+ \s*+ , )*+ (?: \s*+ -?+ \d{1,18}+ L?+ )?+ \s*+ \) )
    \s*+ ,?+""",
    re.VERBOSE,
)
_HEADER = re.compile(rf"\s*+ \{{ (?:{_ENTRY.pattern})*+ \s*+ \}} \s*+", re.VERBOSE)
# The types of numbers, by the name in a header. No other text makes a type.
_NUMBERS = {f"'{order}{kind}'": np.dtype(order + kind) for order in "<>|=" for kind in ("b1", "i1", "u1")} | {
    f"'{order}{kind}{size}'": np.dtype(f"{order}{kind}{size}")
    for order in "<>="
    for kind, sizes in (("i", (2, 4, 8)), ("u", (2, 4, 8)), ("f", (2, 4, 8)))
    for size in sizes
}
_MOST_DIMENSIONS, _MOST_ITEM_BYTES = 32, 1 << 31


@dataclass(frozen=True)
class NpyHeader:
    """What the header of a .npy array says.

    Attributes:
        path: of the file.
        name: of the array, if it is one of several in the file; else "".
        dtype: of an item, its shape included.
        rows: the number of items.
        length: of the header, in bytes.
    """

    path: Path
    name: str
    dtype: np.dtype
    rows: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return (self.rows, *self.dtype.shape)

    def check_size(self, size: int) -> None:
        """Check the size of header and array together, in bytes.

        Raises:
            DataError: it is another one than the header says.
        """
        there = size - self.length
        expected = self.rows * self.dtype.itemsize
        if there != expected:
            what = "truncated" if there < expected else "too long"
            raise DataError(
                f"{_where(self.path, self.name)}: {what}: {self.shape} {self.dtype.base.str[1:]} in {there} bytes"
            )


def _where(path: Path, name: str) -> str:
    return f"{path}: {name}" if name else str(path)


def parse_header(content: bytes, path: Path, name: str = "") -> NpyHeader:
    """Parse the header of a .npy array.

    Args:
        content: the header and anything behind it.
        path: of the file, for messages.
        name: of the array, if it is one of several in the file.

    Raises:
        DataError: it is no header of a .npy array, or the array holds something other than numbers row by row.
    """
    where = _where(path, name)
    number = _START.get(content[6]) if content[:6] == b"\x93NUMPY" and len(content) >= 12 else None
    if number is None:
        raise DataError(f"{where}: not a .npy array: expected numpy's magic and a version, got {content[:8]!r}")
    start = 8 + struct.calcsize(number)
    length = start + struct.unpack_from(number, content, 8)[0]
    if length > min(len(content), MOST_HEADER_BYTES):
        raise DataError(f"{where}: not a .npy array: its header has {length} bytes")
    header = content[start:length].decode("latin1")
    entries = _ENTRY.findall(header)
    values = dict(entries)
    if not _HEADER.fullmatch(header) or len(entries) != 3 or len(values) != 3:
        raise DataError(f"{where}: not a .npy array: its header is {header[:80]!r}")
    shape = tuple(map(int, re.findall(r"-?\d+", values["shape"])))
    base = _NUMBERS.get(values["descr"])
    rest = math.prod(shape[1:])
    if (
        base is None
        or values["fortran_order"] != "False"
        or not 1 <= len(shape) <= _MOST_DIMENSIONS
        or shape[0] < 0
        or min(shape[1:], default=1) < 1
        or rest * base.itemsize >= _MOST_ITEM_BYTES
    ):
        order = ", column by column" if values["fortran_order"] != "False" else ""
        kind = ascii(values["descr"].strip("'")[:40])[1:-1]
        raise DataError(f"{where}: expected an array of numbers, row by row, got {kind}, {shape}{order}")
    return NpyHeader(path, name, np.dtype((base, shape[1:])) if shape[1:] else base, shape[0], length)


def read_npy(file: BinaryIO, path: Path) -> ArrayFile:
    """Return the array of numbers in a .npy file. Never unpickles.

    Raises:
        DataError: it is no .npy array, of another size than it says, or holds something other than numbers row by row.
    """
    header = parse_header(_bytes_at(file, path, 0, MOST_HEADER_BYTES), path)
    header.check_size(os.fstat(file.fileno()).st_size)
    return ArrayFile(file, path, header.dtype, header.length, header.rows)


def _bytes_at(file: BinaryIO, path: Path, start: int, length: int) -> bytes:
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DataError(f"{path}: expected a file, to be read at any place")
        return os.pread(file.fileno(), length, start)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


class NpzFile:
    """The arrays of a .npz file. Stored arrays are read in place, compressed ones from temporary files.

    Args:
        path: of the file.

    Attributes:
        names: of the arrays.
        contents: the names of all files in it, those that are no arrays included, for messages.

    Raises:
        DataError: it is no .npz file.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, open_binary(path)
        try:
            self._zip = zipfile.ZipFile(self._file)
        except _BROKEN as error:
            raise DataError(f"{path}: not a .npz file, or one that ends early: {first_line(error)}") from None
        files = {info.filename: info for info in self._zip.infolist()}
        if len(files) != len(self._zip.infolist()):
            raise DataError(f"{path}: not a .npz file: two arrays have one name")
        self._members = {name.removesuffix(".npy"): info for name, info in files.items() if name.endswith(".npy")}
        self.names, self.contents = set(self._members), reprlib.repr(sorted(files))

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def header(self, name: str) -> NpyHeader:
        """Return the header of an array. Reads no more than that.

        Raises:
            DataError: it is broken, or not that of an array of numbers; or the array is of another size than it says.
        """
        info = self._member(name)
        if info.compress_type == zipfile.ZIP_STORED:
            content = _bytes_at(self._file, self._path, self._start(name), min(info.file_size, MOST_HEADER_BYTES))
        else:
            content = next(self._unpacked(name, MOST_HEADER_BYTES), b"")
        header = parse_header(content, self._path, name)
        header.check_size(info.file_size)
        return header

    def array(self, name: str) -> ArrayFile:
        """Return an array.

        Raises:
            DataError: it is broken, or not an array of numbers.
            OSError: there is no room to unpack it.
        """
        header = self.header(name)
        if self._member(name).compress_type == zipfile.ZIP_STORED:
            file, start = open_binary(self._path), self._start(name)
        else:
            file, start = self._unpack(name), 0
        return ArrayFile(file, self._path, header.dtype, start + header.length, header.rows)

    def _member(self, name: str) -> zipfile.ZipInfo:
        info = self._members[name]
        if info.flag_bits & 1:
            self._refuse(name, "corrupt archive, or an encrypted one")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            self._refuse(name, f"expected it stored or deflated, got method {info.compress_type}")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            self._refuse(name, f"corrupt archive: {info.file_size} bytes are stored in {info.compress_size}")
        return info

    def _start(self, name: str) -> int:
        """Where the bytes of a stored array begin."""
        info = self._member(name)
        local = _bytes_at(self._file, self._path, info.header_offset, 30)
        if len(local) < 30 or local[:4] != b"PK\3\4":
            self._refuse(name, "corrupt archive: it is not where the archive says")
        of_name, of_extra = struct.unpack_from("<HH", local, 26)
        return info.header_offset + len(local) + of_name + of_extra

    def _unpacked(self, name: str, at_once: int) -> Iterator[bytes]:
        """Yield the bytes of a compressed array, never more than the archive says there are."""
        try:
            with self._zip.open(self._member(name)) as member:
                while content := member.read(at_once):
                    yield content
        except _BROKEN as error:
            self._refuse(name, f"corrupt archive: {first_line(error)}")

    def _unpack(self, name: str) -> BinaryIO:
        try:
            with tempfile.TemporaryFile() as temporary:
                for content in self._unpacked(name, 1 << 20):
                    temporary.write(content)
                temporary.flush()
                return ClosedWhenUnused(os.dup(temporary.fileno()))
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}, while unpacking {self._path}", tempfile.gettempdir()
            ) from None

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise DataError(f"{self._path}: {name}: {why}")


# What zipfile raises for archives that are broken, or that it can't read.
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, OverflowError, UnicodeError, OSError)


def require(fits: bool, array: ArrayFile | NpyHeader, name: str, expected: str) -> None:
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
