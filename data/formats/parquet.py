"""Criteo rows in Parquet, with the column names of Spark, NVTabular and the Hugging Face hub."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from data.formats.writer import Writer
from data.rows import check_labels, to_frame
from data.schema import DENSE_NAMES, MISSING, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES, DataError, Layout
from data.sources import Piece, Source
from data.storage import first_line

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
_INTEGERS = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)


class CriteoParquet(Source):
    """A Parquet file with a column for each feature, read from the beginning, some rows at a time.

    Integer features may be missing (null); floating-point ones are taken as they are. Categories are integers, or
    text of up to 8 hexadecimal digits; missing ones are id 0. Other columns are ignored.

    Args:
        path: of the file.

    Raises:
        DataError: the file is missing, broken or empty, or a column is missing or has another type.
    """

    rows: int | None

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        try:
            self._scan = pl.scan_parquet(path, glob=False)
            schema = self._scan.collect_schema()
            self.rows = self._scan.select(pl.len()).collect().item()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: not a Parquet file that can be read: {first_line(error)}") from None
        self._names, self.layout = self._columns(schema)
        if not self.rows:
            raise DataError(f"{path}: the file is empty")

    def _columns(self, schema: pl.Schema) -> tuple[list[str], Layout]:
        for names in _NAMES:
            if set(names[1:]) <= set(schema):
                break
        else:
            missing = sorted(set(_NAMES[0][1:]) - set(schema), key=_NAMES[0].index)
            raise DataError(
                f"{self.path}: expected columns int_0 .. int_12, cat_0 .. cat_25 and, unless rows have none, label; "
                f"there is no {missing[0]}"
            )
        dense = [schema[name] for name in names[1 : 1 + NUM_DENSE]]
        for name, kind in zip(names[1:], dense):
            if kind not in _INTEGERS and not kind.is_float():
                raise DataError(f"{self.path}: column {name}: expected numbers, got {kind}")
        sparse = {name: schema[name] for name in names[1 + NUM_DENSE :]}
        for name, kind in sparse.items():
            if kind not in _INTEGERS and kind != pl.String:
                raise DataError(f"{self.path}: column {name}: expected integers or hexadecimal text, got {kind}")
        wide = any(kind in (pl.Int64, pl.UInt64) for kind in sparse.values())
        return names, Layout(
            labelled=names[0] in schema,
            dense="f4" if any(kind.is_float() for kind in dense) else "i4",
            ids="i8" if wide else "u4",
        )

    def pieces(self, start: int = 0) -> Iterator[Callable[[], Piece]]:
        """Yield calls that read the rows from ``start`` on, piece by piece."""
        names = self._names if self.labelled else self._names[1:]
        try:
            batches = self._scan.select(names).slice(start).collect_batches(chunk_size=1 << 16, maintain_order=True)
            for frame in batches:
                yield partial(self._piece, frame, start)
                start += frame.height
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{self.path}: after row {start}: {first_line(error)}") from None

    def _piece(self, frame: pl.DataFrame, start: int) -> Piece:
        return Piece(self.path, start, frame.height, self._records(frame, start))

    def _records(self, frame: pl.DataFrame, start: int) -> np.ndarray:
        records = self.layout.records(frame.height)
        columns = frame.get_columns()
        if self.labelled:
            labels = columns.pop(0).cast(pl.Float64, strict=False).fill_null(-1).to_numpy()
            check_labels(labels, self.path, start)
            records["label"] = labels
        for i, column in enumerate(columns[:NUM_DENSE]):
            records["dense"][:, i] = self._dense(column, start)
        for i, column in enumerate(columns[NUM_DENSE:]):
            records["sparse"][:, i] = self._ids(column, start)
        return records

    def _dense(self, column: pl.Series, start: int) -> np.ndarray:
        if self.layout.dense == "f4":
            values = column.cast(pl.Float32).fill_null(0)
            self._refuse(column, ~values.is_finite(), start, "a finite number")
        else:
            values = column.cast(pl.Int32, strict=False).fill_null(MISSING)
            self._refuse(column, (values == MISSING) & column.is_not_null(), start, "an integer of 32 bits")
        return values.to_numpy()

    def _ids(self, column: pl.Series, start: int) -> np.ndarray:
        if column.dtype == pl.String:
            digits = column.replace("", None)
            values = digits.str.to_integer(base=16, dtype=pl.Int64, strict=False)
            wrong = digits.is_not_null() & ~digits.str.contains(r"^[0-9a-fA-F]{1,8}$")
            self._refuse(column, wrong, start, "up to 8 hexadecimal digits")
        elif column.dtype == pl.UInt64:
            values = column.reinterpret(signed=True)
        else:
            values = column.cast(pl.Int64)
        ids = values.fill_null(0).to_numpy()
        return ids if self.layout.ids == "i8" else ids.astype(np.uint32)

    def _refuse(self, column: pl.Series, wrong: pl.Series, start: int, expected: str) -> None:
        at = wrong.fill_null(False).arg_true()
        if len(at):
            where, got = f"row {start + at[0] + 1}, column {column.name}", repr(column[at[0]])
            raise DataError(f"{self.path}: {where}: expected {expected}, got {got}")


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
