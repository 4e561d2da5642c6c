"""Criteo's click logs: one streaming pass, memory bounded whatever the file's size.

A row is a line of tab-separated fields without a header: the label (0 or 1), 13 integers of 32 bits, 26 categories of
up to 8 hexadecimal digits; an empty field is a missing value. Without the label (39 fields) the rows are to be
predicted. Files may be plain, gzip, xz or zstandard; their content tells, not their name.

Two readers give the same records: csrc/tsv.cpp, and polars where that is not compiled. The environment's ROBE_READER
names another compilation of it.
"""

import ctypes
import io
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from backports import zstd
from isal import igzip, isal_zlib

from data.rows import DENSE_NAMES, MISSING, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES, DataError, Layout
from data.sources import Fault, Piece, Source

MAX_HEX_DIGITS = 8
SUFFIXES = (".gz", ".xz", ".zst", ".tsv", ".txt", ".csv")

_PIECE_BYTES = 1 << 21  # of text parsed at a time, 9,000 rows: larger pieces parse no faster and take more memory
_MAX_LINE_BYTES = 1 << 16
_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": igzip.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": zstd.open,
}
_BROKEN: tuple[Any, ...] = (igzip.BadGzipFile, isal_zlib.error, lzma.LZMAError, zstd.ZstdError)


class CriteoTSV(Source):
    """A file of Criteo rows.

    Args:
        path: of the file.

    Raises:
        DataError: the file is missing, empty, or not of this format. Reading raises it for an archive that is corrupt
            or ends early.
    """

    rows: int | None = None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name
        while self.name.endswith(SUFFIXES):
            self.name = self.name.rpartition(".")[0]
        with self._open() as file, self._reading(1):
            head = file.readline(_MAX_LINE_BYTES)
        if not head:
            raise DataError(f"{self.path}: the file is empty")
        fields = head.count(b"\t") + 1
        if fields not in (NUM_SPARSE + NUM_DENSE, NUM_SPARSE + NUM_DENSE + 1):
            raise DataError(
                f"{self.path}:1: not a Criteo row: expected 40 tab-separated fields (39 without label), got {fields}"
            )
        self.layout = Layout(labelled=fields == NUM_SPARSE + NUM_DENSE + 1)

    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        line = 0  # lines before this text
        for text, lines in self._whole_lines():
            if line >= start:
                yield partial(parse, text, lines, self.path, line, self.labelled)
            elif line + lines > start:
                rest = text.split(b"\n", start - line)[-1]
                yield partial(parse, rest, line + lines - start, self.path, start, self.labelled)
            line += lines
        self.rows = line

    # ----------------------------------------------------------------------------------------------------------------

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
        """Turns the several errors of a broken archive into one that says how far it could be read."""
        try:
            yield
        except EOFError:
            raise DataError(f"{self.path}: truncated: the archive ends early, after line {line - 1}") from None
        except _BROKEN as error:
            raise DataError(f"{self.path}: corrupt archive after line {line - 1}: {error}") from None
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None

    def _whole_lines(self) -> Iterator[tuple[bytes, int]]:
        """The text in pieces that end with a line end, and how many lines each has."""
        line = 1
        with self._open() as file:
            while True:
                with self._reading(line):
                    text = file.read(_PIECE_BYTES)
                    if text and not text.endswith(b"\n"):
                        text += file.readline(_MAX_LINE_BYTES)
                    too_long = bool(text) and not text.endswith(b"\n") and bool(file.read(1))
                if not text:
                    return
                if not text.endswith(b"\n"):
                    if too_long:
                        line += text.count(b"\n")
                        raise DataError(f"{self.path}:{line}: not a Criteo row: a line of over {_MAX_LINE_BYTES} bytes")
                    text += b"\n"
                lines = text.count(b"\n")
                yield text, lines
                line += lines


def parse(text: bytes, lines: int, path: Path, first: int, labelled: bool) -> Piece:
    """The records and the faulty lines of text of so many whole lines, the first of which is number ``first``."""
    records, bad = (_parse_native if _NATIVE else _parse_polars)(text, lines, labelled)
    if not len(bad):
        return Piece(path, first, lines, records)
    split = text.split(b"\n")
    faults = [Fault(first + i, fault(split[i], labelled) or "not a row", split[i]) for i in bad]
    return Piece(path, first, lines, records, faults)


def fault(line: bytes, labelled: bool) -> str | None:
    """What is wrong with a line, None if it is a row. The specification of a row: both readers agree with it."""
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
            if len(text) > MAX_HEX_DIGITS or set(text) - _HEX_DIGITS:
                return f"{where} up to {MAX_HEX_DIGITS} hexadecimal digits{got}"
        elif text and not _is_int32(text):
            return f"{where} an integer of 32 bits{got}"
    return None


_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")


def _is_int32(text: bytes) -> bool:
    digits = text.removeprefix(b"-")
    return digits.isdigit() and len(digits.lstrip(b"0")) <= 10 and int(digits) <= np.iinfo(np.int32).max


# -- The compiled reader ----------------------------------------------------------------------------------------------


def _load() -> ctypes.CDLL | None:
    path = Path(os.environ.get("ROBE_READER", Path(__file__).parent.parent / "_tsv.so"))
    if not path.exists() and "ROBE_READER" not in os.environ:
        return None
    library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.read_criteo.argtypes = [ctypes.c_char_p, integer, ctypes.c_int, pointer, pointer, pointer]
    library.read_criteo.restype = integer
    return library


_NATIVE = _load()


def reader() -> str:
    """Which reader reads text: "native" or "polars"."""
    return "native" if _NATIVE else "polars"


def _parse_native(text: bytes, lines: int, labelled: bool) -> tuple[np.ndarray, np.ndarray]:
    assert _NATIVE is not None
    records = Layout(labelled).records(lines)
    bad_lines = np.empty(lines, np.int64)
    bad = ctypes.c_int64()
    rows = _NATIVE.read_criteo(
        text, len(text), labelled, records.ctypes.data, bad_lines.ctypes.data, ctypes.addressof(bad)
    )
    return records[:rows], bad_lines[: bad.value]


# -- The reader in polars ---------------------------------------------------------------------------------------------


def _parse_polars(text: bytes, lines: int, labelled: bool) -> tuple[np.ndarray, list[int]]:
    records = _parse_rows(text, lines, labelled)
    if records is not None:
        return records, []
    split = text.split(b"\n")[:-1]
    faulty = [fault(line, labelled) is not None for line in split]
    good = [line + b"\n" for line, wrong in zip(split, faulty) if not wrong]
    records = _parse_rows(b"".join(good), len(good), labelled)
    assert records is not None, "a line that is a row can't be read"
    return records, [i for i, wrong in enumerate(faulty) if wrong]


def _parse_rows(text: bytes, lines: int, labelled: bool) -> np.ndarray | None:
    """The records of text; None if there is a line in it that is not a row."""
    layout = Layout(labelled)
    if not lines:
        return layout.records(0)
    names = (["label"] if labelled else []) + DENSE_NAMES
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
            schema=dict.fromkeys(names, pl.Int32) | dict.fromkeys(SPARSE_NAMES, pl.String),
        )
        # Not the value: it may have zeros before it.
        longest = frame.select(pl.max_horizontal(pl.col(SPARSE_NAMES).str.len_bytes().max())).item()
        frame = frame.with_columns(pl.col(SPARSE_NAMES).str.to_integer(base=16, dtype=pl.Int64))
    except pl.exceptions.PolarsError:
        return None
    # polars skips blank lines and fills short ones up with nulls: the counts show both.
    if frame.height != lines or text.count(b"\t") != lines * (len(frame.columns) - 1):
        return None
    sparse = frame.select(pl.col(SPARSE_NAMES).fill_null(0)).to_numpy()
    dense = frame.select(DENSE_NAMES)
    if (
        sparse.min() < 0
        or (longest or 0) > MAX_HEX_DIGITS
        or (labelled and not frame["label"].fill_null(-1).is_in([0, 1]).all())
        or (dense.min_horizontal() == MISSING).any()
        or b"+" in text  # polars reads "+1" and " 1" as numbers
        or b" " in text
    ):
        return None
    records = layout.records(lines)
    if labelled:
        records["label"] = frame["label"].to_numpy()
    records["dense"] = dense.select(pl.all().fill_null(MISSING)).to_numpy()
    records["sparse"] = sparse
    return records
