"""Files of click probabilities: one row for each row of the data, in its order, in a column called "probability"."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from data.formats.parquet import disk_errors
from data.npy import npy_header
from robe_files import whole_file

FORMATS = (".csv", ".parquet", ".npy")
_NAME = "probability"
_ROWS_AT_ONCE = 1 << 18

Write = Callable[[np.ndarray], object]


def check_name(path: Path) -> None:
    """Check that ``path`` can be the name of a file of predictions.

    Raises:
        ValueError: it is a folder, or its suffix is no format.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected the name of a file")
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends with {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


@contextmanager
def predictions_file(path: Path) -> Iterator[Write]:
    """Write a file of predictions in the format of its suffix, in bounded memory.

    The file takes its name when all predictions are written. CSV has the shortest decimals that give the float32 back;
    .npy is float32 (rows,).

    Args:
        path: of the file. Its folder is made if need be.

    Yields:
        a function to call with the probabilities of each batch, float32 (B,).

    Raises:
        ValueError: it is a folder, or its suffix is no format.
        OSError: it can't be written. The error names ``path``, and a file that was there stays as it was.
    """
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    make = {".csv": _csv, ".parquet": _parquet, ".npy": _npy}[path.suffix]
    with whole_file(path) as unfinished, open(unfinished, "wb") as file, make(file, path) as write:
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
    file.write(npy_header((rows,), dtype))  # as long as before: numpy leaves room for any number of rows


@contextmanager
def _parquet(file: BinaryIO, path: Path) -> Iterator[Write]:
    # polars writes a file bit by bit only if it can ask for the values, so they wait in a nameless file.
    with tempfile.TemporaryFile(dir=path.parent) as values_file:
        yield lambda values: values_file.write(values.tobytes())
        values_file.seek(0)

        def frames(with_columns, predicate, n_rows, batch_size):
            while len(values := np.frombuffer(values_file.read(4 * _ROWS_AT_ONCE), np.float32)):
                yield pl.DataFrame({_NAME: values})

        with disk_errors():
            register_io_source(frames, schema={_NAME: pl.Float32}).sink_parquet(file)
