"""Click probabilities as a file: one row for each row of the data, in its order, under the name "probability"."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from data.storage import whole_file
from data.writers import npy_header

FORMATS = (".csv", ".parquet", ".npy")
_NAME = "probability"
_ROWS_AT_ONCE = 1 << 18

Write = Callable[[np.ndarray], object]


def check_name(path: Path) -> None:
    """Raise ValueError where ``path`` can't be the name of a file of predictions."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected the name of a file")
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends with {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


@contextmanager
def predictions_file(path: Path) -> Iterator[Write]:
    """A file of predictions, of the format its name says; it has that name once all are written.

    Memory stays bounded. CSV has the shortest decimals that give the float32 back; .npy is float32 (rows,).

    Returns:
        what to call with the probabilities, float32 (B,), batch after batch.

    Raises:
        ValueError: as check_name.
        OSError: it can't be written; names ``path``, and there is nothing new at it.
    """
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    make = {".csv": _csv, ".parquet": _parquet, ".npy": _npy}[path.suffix]
    with whole_file(path) as file, make(file, path) as write:
        yield write


@contextmanager
def _csv(file: BinaryIO, path: Path) -> Iterator[Write]:
    file.write(f"{_NAME}\n".encode())
    yield lambda values: pl.DataFrame({_NAME: values}).write_csv(file, include_header=False)


@contextmanager
def _npy(file: BinaryIO, path: Path) -> Iterator[Write]:
    dtype = np.dtype("<f4")
    length = file.write(npy_header((0,), dtype))
    yield lambda values: file.write(values.astype(dtype, copy=False).tobytes())
    rows = (file.tell() - length) // dtype.itemsize
    file.seek(0)
    file.write(npy_header((rows,), dtype))  # numpy leaves room in it for any number of rows


@contextmanager
def _parquet(file: BinaryIO, path: Path) -> Iterator[Write]:
    # polars writes a file of many pieces only if it may ask for them, so they wait in a nameless file.
    with tempfile.TemporaryFile(dir=path.parent) as values_file:
        yield lambda values: values_file.write(values.tobytes())
        values_file.seek(0)

        def pieces(with_columns, predicate, n_rows, batch_size):
            while len(values := np.frombuffer(values_file.read(4 * _ROWS_AT_ONCE), np.float32)):
                yield pl.DataFrame({_NAME: values})

        try:
            register_io_source(pieces, schema={_NAME: pl.Float32}).sink_parquet(file)
        except pl.exceptions.PolarsError as error:
            number = re.search(r"os error (\d+)", str(error))
            if not number:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
