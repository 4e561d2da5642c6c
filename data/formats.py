"""Criteo's click logs as batches of arrays: one streaming pass, memory bounded whatever the file's size.

A row is a line of tab-separated fields without a header: the label (0 or 1), 13 integers, 26 categories of up to 8
hexadecimal digits; an empty field is a missing value. Without the label (39 fields) the rows are to be predicted. Files
may be plain, gzip or xz; their content tells, not their name.

Values become what facebookresearch/dlrm's preprocessing makes of them, except that categories keep their raw 32-bit id:
a missing or negative integer is 0, then log(x + 1); a missing category is id 0.
"""

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

NUM_DENSE, NUM_SPARSE = 13, 26
MAX_HEX_DIGITS = 8

_DENSE = [f"int_{i}" for i in range(NUM_DENSE)]
_SPARSE = [f"cat_{i}" for i in range(NUM_SPARSE)]
_PIECE_BYTES = 1 << 22  # of text parsed at a time, 18,000 rows: larger pieces parse no faster and take more memory
_MAX_LINE_BYTES = 1 << 16


class DataError(ValueError):
    """A file that can't be read as what it should be; the message says which file, where, and why."""


@dataclass
class Batch:
    """Rows as arrays. B rows."""

    dense: np.ndarray  # (B, 13) float32
    sparse: np.ndarray  # (B, 26) int64
    labels: np.ndarray | None  # (B,) float32, 0 or 1; None where the file has none

    def __len__(self) -> int:
        return len(self.sparse)

    def __getitem__(self, rows) -> "Batch":
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.dense[rows], self.sparse[rows], labels)

    @staticmethod
    def concatenate(batches: "list[Batch]") -> "Batch":
        if len(batches) == 1:
            return batches[0]
        labels = [b.labels for b in batches if b.labels is not None]
        return Batch(
            np.concatenate([b.dense for b in batches]),
            np.concatenate([b.sparse for b in batches]),
            np.concatenate(labels) if labels else None,
        )


def transform_dense(integers: np.ndarray) -> np.ndarray:
    """log(max(x, 0) + 1) in float32, any shape."""
    return np.log1p(np.maximum(integers, 0).astype(np.float32))


class CriteoTSV:
    """A file of Criteo rows.

    Args:
        path: of the file.

    Attributes:
        labelled: whether rows begin with a label.

    Raises:
        DataError: the file is missing, empty, or not of this format. Reading raises it for the first bad line, with its
            number, and for an archive that ends early.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._open() as file, self._reading(1):
            head = file.readline(_MAX_LINE_BYTES)
        if not head:
            raise DataError(f"{self.path}: the file is empty")
        fields = head.count(b"\t") + 1
        if fields not in (NUM_SPARSE + NUM_DENSE, NUM_SPARSE + NUM_DENSE + 1):
            raise DataError(
                f"{self.path}:1: not a Criteo row: expected 40 tab-separated fields (39 without label), got {fields}"
            )
        self.labelled = fields == NUM_SPARSE + NUM_DENSE + 1
        self._columns = (["label"] if self.labelled else []) + _DENSE + _SPARSE

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Rows start to stop (default: the end) in file order, in batches of whatever size is cheap to parse."""
        line = 0  # rows before this piece
        for piece in self._whole_lines():
            rows = piece.count(b"\n")
            if line + rows > start and not (stop is not None and line >= stop):
                batch = self._parse(piece, line + 1)
                yield batch[max(start - line, 0) : None if stop is None else stop - line]
            line += rows
            if stop is not None and line >= stop:
                return

    # ----------------------------------------------------------------------------------------------------------------

    def _open(self) -> io.BufferedIOBase:
        try:
            with open(self.path, "rb") as file:
                magic = file.read(6)
            if magic[:2] == b"\x1f\x8b":
                return gzip.open(self.path, "rb")  # type: ignore[return-value]
            if magic == b"\xfd7zXZ\x00":
                return lzma.open(self.path, "rb")  # type: ignore[return-value]
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
        except (gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{self.path}: corrupt archive after line {line - 1}: {error}") from None
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None

    def _pieces(self) -> Iterator[bytes]:
        line = 1
        with self._open() as file:
            while True:
                with self._reading(line):
                    piece = file.read(_PIECE_BYTES)
                if not piece:
                    return
                line += piece.count(b"\n")
                yield piece

    def _whole_lines(self) -> Iterator[bytes]:
        """The text in pieces that end with a line end."""
        rest, line = b"", 1
        for piece in self._pieces():
            end = piece.rfind(b"\n") + 1
            if not end and len(rest) + len(piece) > _MAX_LINE_BYTES:
                raise DataError(f"{self.path}:{line}: not a Criteo row: a line of over {_MAX_LINE_BYTES} bytes")
            if end:
                whole = rest + piece[:end]
                line += whole.count(b"\n")
                yield whole
                rest = b""
            rest += piece[end:]
        if rest:
            yield rest + b"\n"

    def _parse(self, text: bytes, first_line: int) -> Batch:
        rows = text.count(b"\n")
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        try:
            frame = pl.read_csv(
                text,
                has_header=False,
                separator="\t",
                quote_char=None,
                schema={name: pl.String if name in _SPARSE_SET else pl.Int64 for name in self._columns},
            ).with_columns(pl.col(_SPARSE).str.to_integer(base=16, dtype=pl.Int64))
        except pl.exceptions.PolarsError as error:
            self._find_bad_line(text, first_line)
            raise DataError(f"{self.path}: lines {first_line} to {first_line + rows - 1}: {error}") from None
        sparse = frame.select(pl.col(_SPARSE).fill_null(0)).to_numpy(order="c")
        labels = frame["label"].to_numpy() if self.labelled else None
        # polars skips blank lines and fills short ones up with nulls: the counts show both.
        well_formed = frame.height == rows and text.count(b"\t") == rows * (len(self._columns) - 1)
        well_formed &= sparse.min() >= 0 and sparse.max() < 1 << (4 * MAX_HEX_DIGITS)
        well_formed &= labels is None or bool(np.isin(labels, (0, 1)).all())
        well_formed &= b"+" not in text and b" " not in text  # polars reads "+1" and " 1" as numbers
        if not well_formed:
            self._find_bad_line(text, first_line)
            raise DataError(f"{self.path}: a bad line among {first_line} to {first_line + rows - 1}")
        dense = transform_dense(frame.select(pl.col(_DENSE).fill_null(0)).to_numpy(order="c"))
        return Batch(dense, sparse, None if labels is None else labels.astype(np.float32))

    def _find_bad_line(self, text: bytes, first_line: int) -> None:
        """Raise DataError for the first line that is not a row."""
        for number, line in enumerate(text.split(b"\n")[:-1], first_line):
            cause = self._fault(line)
            if cause:
                raise DataError(f"{self.path}:{number}: {cause}")

    def _fault(self, line: bytes) -> str | None:
        fields = line.split(b"\t")
        if len(fields) != len(self._columns):
            return f"expected {len(self._columns)} tab-separated fields, got {len(fields)}"
        for column, (name, field) in enumerate(zip(self._columns, fields), 1):
            where, got = f"field {column} ({name}): expected", f", got {field.decode(errors='replace')[:40]!r}"
            if name == "label":
                if field not in (b"0", b"1"):
                    return f"{where} 0 or 1{got}"
            elif name in _SPARSE_SET:
                if len(field) > MAX_HEX_DIGITS or set(field) - _HEX_DIGITS:
                    return f"{where} up to {MAX_HEX_DIGITS} hexadecimal digits{got}"
            elif field and not _is_int64(field):
                return f"{where} an integer{got}"
        return None


_SPARSE_SET = frozenset(_SPARSE)
_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")


def _is_int64(field: bytes) -> bool:
    digits = field.removeprefix(b"-")
    return digits.isdigit() and -(1 << 63) <= int(field) < 1 << 63
