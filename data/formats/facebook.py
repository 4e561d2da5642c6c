"""Files of facebookresearch/dlrm.

- ``day_N.npz``: X_int i4 (n, 13), X_cat_t i4 (26, n), y i4 (n,)
- ``*_processed.npz``: X_int i4 (n, 13), X_cat f8 (n, 26), y i4 (n,)
- ``terabyte_processed_*.bin``: rows of 40 int32, that is the label, 13 integers and 26 ids
"""

from pathlib import Path

import numpy as np

from data.formats.writer import Writer
from data.npy import NpzArray, NpzFile, require, write_npz
from data.rows import check_labels
from data.schema import MISSING, NUM_DENSE, NUM_SPARSE, DataError, Layout
from data.sources import RandomAccess
from data.storage import ArrayFile, open_binary


class FacebookBin(RandomAccess):
    """A ``terabyte_processed_*.bin``.

    Args:
        path: of the file.

    Raises:
        DataError: the file is empty, does not hold whole rows, or its first label is neither 0 nor 1.
    """

    def __init__(self, path: Path):
        self.path, self.name, self.layout = path, path.stem, Layout()
        size = path.stat().st_size
        width = self.layout.dtype.itemsize
        if not size or size % width:
            raise DataError(f"{path}: expected rows of {width} bytes (label, 13 integers, 26 ids), got {size} bytes")
        self.rows = size // width
        self._file = ArrayFile(open_binary(path), path, self.layout.dtype, 0)
        self.take(0, 1)

    def fill(self, records: np.ndarray, start: int) -> None:
        """Fill records with the rows from ``start`` on."""
        self._file.read(records, start)
        check_labels(records["label"], self.path, start)


class BinWriter(Writer):
    """Writes a .bin file. Missing and negative integers become 0, as in facebookresearch/dlrm's preprocessing."""

    holds = "labelled rows with integers and one 32-bit id a feature"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        """Return whether the format can hold such records."""
        return layout == Layout()

    def begin(self) -> None:
        """Open the file."""
        self._file = self.open_file(".bin")

    def add(self, records: np.ndarray) -> None:
        """Write records."""
        records = records.copy()
        records["dense"] = np.maximum(records["dense"], 0)
        self._file.write(records.tobytes())


class FacebookNpz(RandomAccess):
    """A ``day_N.npz`` or ``*_processed.npz``.

    Args:
        path: of the file.

    Raises:
        DataError: the file is broken, empty, or has other arrays.
    """

    def __init__(self, path: Path):
        self.path, self.name, self.layout = path, path.stem, Layout()
        with NpzFile(path) as npz:
            if "X_int" not in npz.names or "y" not in npz.names or not {"X_cat", "X_cat_t"} & npz.names:
                raise DataError(
                    f"{path}: expected arrays X_int, X_cat or X_cat_t, and y, got a zip archive of "
                    f"{sorted(npz.names)}; unpack it first if these are logs"
                )
            self._dense = npz.array("X_int")
            self.rows = rows = self._dense.rows
            if not rows:
                raise DataError(f"{path}: the file is empty")
            self._by_column = "X_cat_t" in npz.names
            ids = "X_cat_t" if self._by_column else "X_cat"
            self._labels, self._sparse = npz.array("y"), npz.array(ids)
        for array, name, kinds, what, shape in (
            (self._dense, "X_int", "iu", "integers", (rows, NUM_DENSE)),
            (self._labels, "y", "iuf", "numbers", (rows,)),
            (self._sparse, ids, "iuf", "numbers", (NUM_SPARSE, rows) if self._by_column else (rows, NUM_SPARSE)),
        ):
            require(array.dtype.base.kind in kinds and array.shape == shape, array, name, f"{what} {shape}")
        if self._by_column:
            self._sparse = self._sparse.elements()

    def fill(self, records: np.ndarray, start: int) -> None:
        """Fill records with the rows from ``start`` on."""
        stop = start + len(records)
        labels = self._labels.take(start, stop)
        check_labels(labels, self.path, start)
        records["label"] = labels
        integers = self._dense.take(start, stop)
        limits = np.iinfo(np.int32)
        wrong = (integers < limits.min) | (integers > limits.max)
        if wrong.any():
            raise DataError(f"{self.path}: X_int: expected integers of 32 bits, got {integers[wrong][0]}")
        records["dense"] = integers
        if self._by_column:
            for column in range(NUM_SPARSE):
                ids = self._sparse.take(column * self.rows + start, column * self.rows + stop)
                records["sparse"][:, column] = self._as_uint32(ids)
        else:
            records["sparse"] = self._as_uint32(self._sparse.take(start, stop))

    def _as_uint32(self, ids: np.ndarray) -> np.ndarray:
        # The processed files have ids as float64.
        with np.errstate(invalid="ignore"):  # NaN becomes some integer, which differs from it below
            wide = ids.astype(np.int64)
        if (wide != ids).any() or (len(wide) and (wide.min() < -(1 << 31) or wide.max() >= 1 << 32)):
            raise DataError(f"{self.path}: ids: expected integers of 32 bits, got {ids.min()} to {ids.max()}")
        return wide.astype(np.uint32)


class NpzWriter(Writer):
    """Writes a ``day_N.npz`` with X_int, X_cat_t and y. A missing integer becomes 0."""

    holds = BinWriter.holds

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        """Return whether the format can hold such records."""
        return BinWriter.can_hold(layout)

    def begin(self) -> None:
        """Open the file."""
        self._file = self.open_file(".npz")
        # The file has ids column by column, but they come row by row: each column waits in a temporary file.
        self._dense, self._labels = self.open_temporary(), self.open_temporary()
        self._columns = [self.open_temporary() for _ in range(NUM_SPARSE)]

    def add(self, records: np.ndarray) -> None:
        """Write records to temporary files."""
        self._dense.write(np.where(records["dense"] == MISSING, 0, records["dense"]).tobytes())
        self._labels.write(records["label"].tobytes())
        for column, ids in zip(self._columns, records["sparse"].T):
            column.write(ids.tobytes())

    def end(self) -> None:
        """Write the file."""
        int32 = np.dtype("<i4")
        write_npz(
            self._file.stream,
            [
                NpzArray("X_int", (self.rows, NUM_DENSE), int32, [self._dense]),
                NpzArray("X_cat_t", (NUM_SPARSE, self.rows), int32, self._columns),
                NpzArray("y", (self.rows,), int32, [self._labels]),
            ],
        )
