"""Criteo rows in Parquet, with the column names of Spark, NVTabular and the Hugging Face hub."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl

from data.formats.writer import Writer
from data.rows import check_labels, to_frame
from data.schema import DENSE_NAMES, MISSING, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES, DataError, Layout
from data.sources import Piece, Source
from data.storage import first_line, open_binary

# The names that a file may use: this project's, short ones, long ones.
_NAMES = (
    ["label", *DENSE_NAMES, *SPARSE_NAMES],
    ["label", *(f"I{i + 1}" for i in range(NUM_DENSE)), *(f"C{i + 1}" for i in range(NUM_SPARSE))],
    [
        "label",
        *(f"integer_feature_{i + 1}" for i in range(NUM_DENSE)),
        *(f"categorical_feature_{i + 1}" for i in range(NUM_SPARSE)),
    ],
)
_INTEGERS = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64, pl.Boolean, pl.Null)
_TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Binary)
_HEAD_ROWS = 1 << 16  # that decide what floating-point columns hold
_EXACT = 1 << 53  # the integers below it are the same in float64


class CriteoParquet(Source):
    """A Parquet file with a column for each feature, read from the beginning, some rows at a time.

    Integer features may be missing (null). pandas writes them as floating-point numbers if one is missing, so it is the
    values that count: a column of whole numbers holds integers, whatever its type. Columns that hold other numbers are
    taken as they are, for the model as well; then all 13 must be floating-point columns. Categories are integers (or
    whole numbers in float64), or text of up to 8 hexadecimal digits, plain or in a dictionary; missing ones are id 0.
    Other columns are ignored.

    Args:
        path: of the file.

    Raises:
        DataError: the file is missing, broken or empty, a column is missing or has another type, or some integer
            features are transformed and others are not. Reading raises it for a file with fewer rows than it says.
    """

    rows: int

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        self._file: BinaryIO | None = None
        with self._reading("not a Parquet file that can be read"):
            schema = self._scan().collect_schema()
            self.rows = self._scan().select(pl.len()).collect().item()
        self._names = self._find_columns(schema)
        if not self.rows:
            raise DataError(f"{path}: the file is empty")
        self.layout = self._find_layout(schema)

    def _scan(self) -> pl.LazyFrame:
        return pl.scan_parquet(self._utf8_path(), glob=False)

    def _utf8_path(self) -> str:
        """Return a path that polars can open, which takes text only: of an open file, if the name is not UTF-8."""
        path = str(self.path)
        if any("\udc80" <= c <= "\udcff" for c in path):  # what Python makes of bytes that are not UTF-8
            self._file = self._file or open_binary(self.path)
            path = f"/proc/self/fd/{self._file.fileno()}"
        return path

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Turn what polars raises for a broken file into a DataError, its panics too."""
        try:
            yield
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise DataError(f"{self.path}: {what}: {first_line(error)}") from None

    def _find_columns(self, schema: pl.Schema) -> list[str]:
        for names in _NAMES:
            if set(names[1:]) <= set(schema):
                break
        else:
            missing = sorted(set(_NAMES[0][1:]) - set(schema), key=_NAMES[0].index)
            raise DataError(
                f"{self.path}: expected columns int_0 .. int_12, cat_0 .. cat_25 and, unless rows have none, label; "
                f"there is no {missing[0]}"
            )
        for name in names[1 : 1 + NUM_DENSE]:
            if schema[name] not in _INTEGERS and not schema[name].is_float():
                raise DataError(f"{self.path}: column {name}: expected numbers, got {schema[name]}")
        for name in names[1 + NUM_DENSE :]:
            if schema[name] not in (*_INTEGERS, *_TEXT, pl.Float64):
                raise DataError(
                    f"{self.path}: column {name}: expected integers or hexadecimal text, got {schema[name]}"
                )
        if names[0] not in schema:
            return names[1:]
        kind = schema[names[0]]
        if kind not in (*_INTEGERS, *_TEXT) and not kind.is_float() and not kind.is_decimal():
            raise DataError(f"{self.path}: column label: expected 0 or 1, got {kind}")
        return names

    def _find_layout(self, schema: pl.Schema) -> Layout:
        labelled = len(self._names) == 1 + NUM_DENSE + NUM_SPARSE
        dense, sparse = self._names[labelled : labelled + NUM_DENSE], self._names[labelled + NUM_DENSE :]
        wide = any(schema[name] in (pl.Int64, pl.UInt64, pl.Float64) for name in sparse)
        return Layout(labelled, "f4" if self._is_transformed(schema, dense) else "i4", "i8" if wide else "u4")

    def _is_transformed(self, schema: pl.Schema, names: list[str]) -> bool:
        """Return whether the dense columns hold numbers other than integers."""
        floats = [name for name in names if schema[name].is_float()]
        if not floats:
            return False
        with self._reading("its first rows"):
            head = self._scan().select(floats).head(_HEAD_ROWS).collect()
        transformed = [name for name in floats if (head[name].is_finite() & ~is_whole(head[name])).any()]
        integers = [name for name in names if name not in floats]
        if transformed and integers:
            raise DataError(
                f"{self.path}: column {transformed[0]} holds numbers that are not integers, column {integers[0]} "
                f"integers ({schema[integers[0]]}); expected 13 columns of integers, whose logarithm the model "
                "gets, or 13 of floating-point numbers, which it gets as they are"
            )
        return bool(transformed)

    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        """Yield calls that read the rows from ``start`` on, piece by piece."""
        at = start
        batches = self._scan().select(self._names).slice(start).collect_batches(chunk_size=1 << 16, maintain_order=True)
        while True:
            with self._reading(f"after row {at}"):
                frame = next(batches, None)
            if frame is None:
                break
            yield partial(self._piece, frame, at)
            at += frame.height
        if at != max(start, self.rows):
            raise DataError(f"{self.path}: damaged: expected {self.rows} rows, as it says itself, got {at}")

    def _piece(self, frame: pl.DataFrame, start: int) -> Piece:
        return Piece(self.path, start, frame.height, self._records(frame, start))

    def _records(self, frame: pl.DataFrame, start: int) -> np.ndarray:
        records = self.layout.records(frame.height)
        columns = frame.get_columns()
        if self.labelled:
            column = columns.pop(0)
            column = self._as_text(column, start) if column.dtype in _TEXT else column
            labels = column.cast(pl.Float64, strict=False).fill_null(-1).to_numpy()
            check_labels(labels, self.path, start)
            records["label"] = labels
        for i, column in enumerate(columns[:NUM_DENSE]):
            records["dense"][:, i] = self._dense(column, start)
        for i, column in enumerate(columns[NUM_DENSE:]):
            records["sparse"][:, i] = self._ids(column, start)
        return records

    def _dense(self, column: pl.Series, start: int) -> np.ndarray:
        if column.dtype.is_float():
            self._refuse(column, ~column.is_finite(), start, "a finite number")
        if self.layout.dense == "f4":
            values = column.cast(pl.Float32).fill_null(0)
            self._refuse(column, ~values.is_finite(), start, "a finite number")
            return values.to_numpy()
        values = column.cast(pl.Int32, strict=False).fill_null(MISSING)
        wrong = values == MISSING
        if column.dtype.is_float():
            wrong |= ~is_whole(column)  # else cast drops the fraction
        self._refuse(column, wrong & column.is_not_null(), start, "an integer of 32 bits")
        return values.to_numpy()

    def _ids(self, column: pl.Series, start: int) -> np.ndarray:
        kind = column.dtype
        if kind in _TEXT:
            column = self._as_text(column, start)
            digits = column.replace("", None)
            values = digits.str.to_integer(base=16, dtype=pl.Int64, strict=False)
            wrong = digits.is_not_null() & ~digits.str.contains(r"^[0-9a-fA-F]{1,8}$")
            self._refuse(column, wrong, start, "up to 8 hexadecimal digits")
        elif kind == pl.UInt64:
            values = column.reinterpret(signed=True)
        elif kind == pl.Float64:
            self._refuse(column, ~(is_whole(column) & (column.abs() <= _EXACT)), start, "an integer")
            values = column.cast(pl.Int64)
        else:
            values = column.cast(pl.Int64)
        ids = values.fill_null(0).to_numpy()
        if kind.is_signed_integer() and kind != pl.Int64:
            ids = ids & 0xFFFFFFFF  # 32 bits are unsigned, beside wider columns too
        return ids if self.layout.ids == "i8" else ids.astype(np.uint32)

    def _as_text(self, column: pl.Series, start: int) -> pl.Series:
        """Return a column as text: of a dictionary, or of bytes."""
        if column.dtype != pl.Binary:
            return column.cast(pl.String)
        try:
            return column.cast(pl.String)
        except pl.exceptions.PolarsError:
            raise DataError(
                f"{self.path}: column {column.name}: expected text, got bytes that are not, in row {start + 1} or later"
            ) from None

    def _refuse(self, column: pl.Series, wrong: pl.Series, start: int, expected: str) -> None:
        at = wrong.fill_null(False).arg_true()
        if len(at):
            where, got = f"row {start + at[0] + 1}, column {column.name}", repr(column[at[0]])
            raise DataError(f"{self.path}: {where}: expected {expected}, got {got}")


def is_whole(column: pl.Series) -> pl.Series:
    """Return which numbers of a floating-point column are integers; NaN and infinity count as none, null as null."""
    return column.is_finite() & (column == column.floor())


class ParquetWriter(Writer):
    """Writes Parquet shards with columns label, int_0 .. int_12 (null where missing) and cat_0 .. cat_25."""

    sharded = True
    holds = "rows with one id a feature"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        """Return whether the format can hold such records."""
        return layout.hots is None

    def begin(self) -> None:
        """Open the file."""
        self._file = self.open_file(".parquet")
        self._frames: list[pl.DataFrame] = []

    def add(self, records: np.ndarray) -> None:
        """Keep records for the end."""
        self._frames.append(to_frame(records))

    def end(self) -> None:
        """Write the file."""
        # Without rows there is still a file with its columns.
        frames = self._frames or [to_frame(self.layout.records(0))]
        with disk_errors():
            pl.concat(frames).write_parquet(self._file.stream)
        self._frames.clear()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn polars' errors about the disk, such as a full one, into OSError."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
