"""Criteo's click logs: text that is read and written as a stream, in bounded memory whatever the file's size.

A row is a line of tab-separated fields without a header: the label (0 or 1), 13 integers of 32 bits, 26 categories of
up to 8 hexadecimal digits. An empty field is a missing value. Rows whose clicks are to be predicted have no label, thus
39 fields. Files may be plain or compressed by gzip, xz or zstandard; their content tells which, not their name.

Two parsers give the same records: data/csrc/criteo_tsv.cpp, and polars where that is not compiled. The environment
variable ROBE_READER names another build of it.
"""

import ctypes
import io
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
from backports import zstd
from isal import igzip, isal_zlib

from data.files import require_regular, stem
from data.formats.foreign import not_rows, refuse_foreign
from data.formats.writer import Writer
from data.rows import to_frame
from data.schema import DENSE_NAMES, MISSING, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES, DataError, Layout
from data.sources import Fault, Piece, Source

PIECE_BYTES = 1 << 21  # of text, 9,000 rows: larger pieces parse no faster and take more memory
MAX_LINE_BYTES = 1 << 16
_MAX_HEX_DIGITS = 8
_HEAD_LINES = 100  # that decide whether the rows of a file have labels
_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": igzip.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": zstd.open,
}
_BROKEN: tuple[Any, ...] = (igzip.BadGzipFile, isal_zlib.error, lzma.LZMAError, zstd.ZstdError)


class CriteoTSV(Source):
    """A log.

    Args:
        path: of the file.

    Raises:
        DataError: the file is missing, empty, or not of this format. Reading raises it for an archive that is corrupt
            or ends early, and for a file that has changed since it was read before.
    """

    rows: int | None = None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = stem(self.path)
        require_regular(self.path)
        lines = self._head()
        if not lines:
            raise DataError(f"{self.path}: the file is empty")
        refuse_foreign(self.path, b"".join(lines)[:512])
        self.layout = Layout(labelled=self._labelled(lines))

    def _head(self) -> list[bytes]:
        """Return the first lines, as far as they can be read."""
        lines: list[bytes] = []
        with self._open() as file:
            while len(lines) < _HEAD_LINES:
                try:
                    with self._reading(len(lines) + 1):
                        line = file.readline(MAX_LINE_BYTES)
                except DataError:
                    if not lines:
                        raise
                    break  # reported when the rows before it have been read
                if not line:
                    break
                lines.append(line)
        return lines

    def _labelled(self, lines: list[bytes]) -> bool:
        """Return whether most of the first lines that look like rows have a label: any of them may be damaged."""
        fields = Counter(line.count(b"\t") + 1 for line in lines)
        without = NUM_DENSE + NUM_SPARSE
        if not fields[without] and not fields[without + 1]:
            raise DataError(f"{self.path}:1: {not_rows(lines)}")
        if fields[without] == fields[without + 1]:
            raise DataError(
                f"{self.path}: expected rows of one kind, got as many of {without + 1} fields as of {without} (without "
                f"label) in the first {len(lines)} lines"
            )
        return fields[without + 1] > fields[without]

    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        """Yield calls that parse the lines from ``start`` on, piece by piece."""
        line = 0  # lines before this text
        for text, lines in self._whole_lines():
            if line >= start:
                yield partial(parse, text, lines, self.path, line, self.labelled)
            elif line + lines > start:
                rest = text.split(b"\n", start - line)[-1]
                yield partial(parse, rest, line + lines - start, self.path, start, self.labelled)
            line += lines
        if self.rows not in (None, line):
            raise DataError(f"{self.path}: changed while it was read: it had {self.rows} lines, and has {line}")
        self.rows = line

    def _open(self) -> io.BufferedIOBase:
        try:
            with open(self.path, "rb") as file:
                magic = file.read(6)
            for start, opener in _OPENERS.items():
                if magic.startswith(start):
                    return opener(self.path, "rb")
            return open(self.path, "rb")
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None

    @contextmanager
    def _reading(self, line: int) -> Iterator[None]:
        """Turn the errors of a broken archive into a DataError that says how far it could be read."""
        try:
            yield
        except EOFError:
            raise DataError(f"{self.path}: truncated: the archive ends early, after line {line - 1}") from None
        except _BROKEN as error:
            raise DataError(f"{self.path}: corrupt archive after line {line - 1}: {error}") from None
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None

    def _whole_lines(self) -> Iterator[tuple[bytes, int]]:
        """Yield the text in pieces that end with a line end, and the number of lines in each."""
        line = 1
        with self._open() as file:
            while True:
                with self._reading(line):
                    text = file.read(PIECE_BYTES)
                    if text and not text.endswith(b"\n"):
                        text += file.readline(MAX_LINE_BYTES)
                    too_long = bool(text) and not text.endswith(b"\n") and bool(file.read(1))
                if not text:
                    return
                if not text.endswith(b"\n"):
                    if too_long:
                        line += text.count(b"\n")
                        raise DataError(f"{self.path}:{line}: not a Criteo row: a line of over {MAX_LINE_BYTES} bytes")
                    text += b"\n"
                lines = text.count(b"\n")
                yield text, lines
                line += lines


def parse(text: bytes, lines: int, path: Path, first: int, labelled: bool) -> Piece:
    """Parse whole lines.

    Args:
        text: that ends with a line end.
        lines: the number of lines in it.
        path: of the file, for the piece.
        first: the number of the first line in the file.
        labelled: whether the rows have a label.

    Returns:
        the records, and the lines that are no rows.
    """
    records, bad = (_parse_native if NATIVE else _parse_polars)(text, lines, labelled)
    if not len(bad):
        return Piece(path, first, lines, records)
    split = text.split(b"\n")
    faults = [Fault(first + i, fault(split[i], labelled) or "not a row", split[i]) for i in bad]
    return Piece(path, first, lines, records, faults)


def fault(line: bytes, labelled: bool) -> str | None:
    """Return what is wrong with a line, or None if it is a row.

    This is the specification of a row: both parsers agree with it, and `values` says what a row holds.
    """
    names = (["label"] if labelled else []) + DENSE_NAMES + SPARSE_NAMES
    fields = line.removesuffix(b"\r").split(b"\t")
    if len(fields) != len(names):
        return f"expected {len(names)} tab-separated fields, got {len(fields)}"
    for column, (name, text) in enumerate(zip(names, fields), 1):
        where, got = f"field {column} ({name}): expected", f", got {text.decode(errors='replace')[:40]!r}"
        if name == "label":
            if text not in (b"0", b"1"):
                return f"{where} 0 or 1{got}"
        elif name in SPARSE_NAMES:
            if len(text) > _MAX_HEX_DIGITS or set(text) - _HEX_DIGITS:
                return f"{where} up to {_MAX_HEX_DIGITS} hexadecimal digits{got}"
        elif text and not _is_int32(text):
            return f"{where} an integer of 32 bits{got}"
    return None


_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")


def _is_int32(text: bytes) -> bool:
    digits = text.removeprefix(b"-")
    significant = digits.lstrip(b"0") or b"0"
    return digits.isdigit() and len(significant) <= 10 and int(significant) <= np.iinfo(np.int32).max


def values(line: bytes, labelled: bool) -> list[int]:
    """Return label, integers and ids of a line that is a row, as a record has them."""
    fields = line.removesuffix(b"\r").split(b"\t")
    label = [int(fields.pop(0))] if labelled else []
    integers = [_to_int(text) if text else int(MISSING) for text in fields[:NUM_DENSE]]
    return label + integers + [int(text, 16) if text else 0 for text in fields[NUM_DENSE:]]


def _to_int(text: bytes) -> int:
    digits = text.removeprefix(b"-").lstrip(b"0") or b"0"  # Python converts no more than 4,300 digits
    return -int(digits) if text.startswith(b"-") else int(digits)


# -- The compiled parser ----------------------------------------------------------------------------------------------


def _load() -> ctypes.CDLL | None:
    path = Path(os.environ.get("ROBE_READER", Path(__file__).parent.parent / "_tsv.so"))
    if not path.exists() and "ROBE_READER" not in os.environ:
        return None
    library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.read_criteo.argtypes = [ctypes.c_char_p, integer, ctypes.c_int, pointer, pointer, pointer]
    library.read_criteo.restype = integer
    return library


NATIVE = _load()


def reader() -> str:
    """Return the parser in use: "native" or "polars"."""
    return "native" if NATIVE else "polars"


def _parse_native(text: bytes, lines: int, labelled: bool) -> tuple[np.ndarray, np.ndarray]:
    assert NATIVE is not None
    records = Layout(labelled).records(lines)
    bad_lines = np.empty(lines, np.int64)
    bad = ctypes.c_int64()
    rows = NATIVE.read_criteo(
        text, len(text), labelled, records.ctypes.data, bad_lines.ctypes.data, ctypes.addressof(bad)
    )
    return records[:rows], bad_lines[: bad.value]


# -- The parser in polars ---------------------------------------------------------------------------------------------


_NOT_IN_ROWS = bytes(set(range(256)) - _HEX_DIGITS - set(b"-\t\r\n"))


def _parse_polars(text: bytes, lines: int, labelled: bool) -> tuple[np.ndarray, list[int]]:
    records = _parse_rows(text, lines, labelled)
    if records is not None:
        return records, []
    split = text.split(b"\n")[:-1]
    faulty = [fault(line, labelled) is not None for line in split]
    good = [line for line, wrong in zip(split, faulty) if not wrong]
    records = _parse_rows(b"".join(line + b"\n" for line in good), len(good), labelled)
    if records is None:  # rows that polars reads in its own way, or not at all
        flat = np.array([values(line, labelled) for line in good], np.int64)
        records = flat.astype(np.uint32).view(Layout(labelled).dtype).reshape(-1)
    return records, [i for i, wrong in enumerate(faulty) if wrong]


def _parse_rows(text: bytes, lines: int, labelled: bool) -> np.ndarray | None:
    """Return the records of text, or None if a line in it is not a row, or may not be one."""
    layout = Layout(labelled)
    if not lines:
        return layout.records(0)
    label = dict.fromkeys(["label"] if labelled else [], pl.String)  # "01" is a number, and no label
    # polars takes "+1" and " 1" for numbers, drops a byte-order mark, and unpacks what begins like an archive.
    if len(text.translate(None, _NOT_IN_ROWS)) != len(text):
        return None
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
        if b"\r" in text:  # polars drops it at the end of a field
            return None
    try:
        frame = pl.read_csv(
            text,
            has_header=False,
            separator="\t",
            quote_char=None,
            schema=label | dict.fromkeys(DENSE_NAMES, pl.Int32) | dict.fromkeys(SPARSE_NAMES, pl.String),
        )
        # The length and not the value: there may be leading zeros. Nor does the value show the sign of "-0".
        categories = pl.col(SPARSE_NAMES)
        longest = frame.select(pl.max_horizontal(categories.str.len_bytes().max())).item()
        signs = frame.select(pl.any_horizontal(categories.str.contains("-", literal=True).any())).item()
        frame = frame.with_columns(categories.str.to_integer(base=16, dtype=pl.Int64))
    except pl.exceptions.PolarsError:
        return None
    # polars skips blank lines and pads short ones with nulls: the counts show both.
    if frame.height != lines or text.count(b"\t") != lines * (len(frame.columns) - 1):
        return None
    sparse = frame.select(pl.col(SPARSE_NAMES).fill_null(0)).to_numpy()
    dense = frame.select(DENSE_NAMES)
    if (
        signs
        or (longest or 0) > _MAX_HEX_DIGITS
        or (labelled and not frame["label"].fill_null("").is_in(["0", "1"]).all())
        or (dense.min_horizontal() == MISSING).any()
    ):
        return None
    records = layout.records(lines)
    if labelled:
        records["label"] = (frame["label"] == "1").to_numpy()
    records["dense"] = dense.select(pl.all().fill_null(MISSING)).to_numpy()
    records["sparse"] = sparse
    return records


# -- The writer -------------------------------------------------------------------------------------------------------


class SupportsWrite(Protocol):
    """A file that takes bytes."""

    def write(self, data: bytes, /) -> Any:
        """Append bytes."""


class TSVWriter(Writer):
    """Writes a log. A category of id 0 becomes an empty field, a missing one."""

    holds = "rows with integers and one 32-bit id a feature"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        """Return whether the format can hold such records."""
        return layout == Layout(labelled=layout.labelled)

    def begin(self) -> None:
        """Open the file."""
        self._file = self.open_file(".tsv")

    def add(self, records: np.ndarray) -> None:
        """Write records."""
        write_tsv(self._file, to_frame(records))


def write_tsv(file: SupportsWrite, frame: pl.DataFrame) -> None:
    """Write rows as lines of a log.

    Args:
        file: open for writing.
        frame: the rows, as from `data.rows.to_frame`.
    """
    text = frame.with_columns(_hexadecimal(frame[name].to_numpy()).alias(name) for name in SPARSE_NAMES)
    file.write(text.write_csv(separator="\t", include_header=False).encode())


def _hexadecimal(ids: np.ndarray) -> pl.Series:
    """Return 32-bit ids as Criteo writes them: 8 hexadecimal digits, null for id 0."""
    ids = ids.astype(np.uint32)
    text = _FOUR_DIGITS.gather(ids >> 16) + _FOUR_DIGITS.gather(ids & 0xFFFF)
    return text.set(pl.Series(ids == 0), None)


_FOUR_DIGITS = pl.Series([f"{i:04x}" for i in range(1 << 16)])
