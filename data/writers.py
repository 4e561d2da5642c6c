"""Writers of every format that data.prepare makes: records in, files out that appear whole or not at all.

A writer is given the records of one file (of one shard, for formats that have shards), and leaves ``*.part`` files
until ``finish`` has them take their names.
"""

import hashlib
import io
import os
import re
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import numpy as np
import polars as pl

from data.formats.prepared import Shard
from data.rows import DENSE_NAMES, MISSING, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES, DataError, Layout, transform_dense
from data.storage import rename


class SupportsWrite(Protocol):
    def write(self, data: bytes, /) -> Any: ...


_NPY_HEADER_BYTES = 128  # that numpy's own header takes for any shape here


class Writer(ABC):
    """Files of a format.

    Args:
        folder: where they go.
        name: what they are called before the suffix.
        layout: of the records to come.

    Raises:
        OSError: a file can't be written.
    """

    sharded: ClassVar[bool] = False  # whether a source becomes several files of some rows each
    holds: ClassVar[str]  # what rows, in words

    @classmethod
    def check(cls, layout: Layout) -> None:
        """Raise DataError if the format has no place for such records."""
        if not cls.can_hold(layout):
            raise DataError(f"this format holds {cls.holds}; these rows have {layout.describe()}")

    @staticmethod
    @abstractmethod
    def can_hold(layout: Layout) -> bool: ...

    def __init__(self, folder: Path, name: str, layout: Layout):
        self.folder, self.name, self.layout = folder, name, layout
        self.rows = 0
        self._parts: list[PartFile] = []
        self._temporaries: list[BinaryIO] = []
        try:
            self._begin()
        except BaseException:
            self.abort()
            raise

    def write(self, records: np.ndarray) -> None:
        """Add records."""
        self.rows += len(records)
        self._write(records)

    def finish(self) -> list[Shard]:
        """Complete the files, see them safe on the disk, and have them take their names. Says what they are."""
        self._finish()
        self._close_temporaries()
        return [file.finish(self.rows) for file in self._parts]

    def abort(self) -> None:
        """Leave nothing behind. Does nothing after ``finish``."""
        self._close_temporaries()
        for file in self._parts:
            file.abort()

    @abstractmethod
    def _begin(self) -> None:
        """Open the files."""

    @abstractmethod
    def _write(self, records: np.ndarray) -> None: ...

    def _finish(self) -> None:  # noqa: B027
        """Write what has to wait for the last record."""

    def _close_temporaries(self) -> None:
        for file in self._temporaries:
            with suppress(OSError):  # of what is still buffered: by now it has been read, or nobody wants it
                file.close()

    def _temporary(self) -> BinaryIO:
        """A file that goes with the writer, for what has its place at the end."""
        file: BinaryIO = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
        self._temporaries.append(file)
        return file

    def _open(self, suffix: str) -> "PartFile":
        file = PartFile(self.folder / (self.name + suffix))
        self._parts.append(file)
        return file


class PartFile:
    """A file that is written under another name, and known by its SHA-256 when it is done.

    Attributes:
        file: to write to directly; the checksum is then made by reading it again.
    """

    def __init__(self, path: Path):
        self._path = path
        self.file = open(path.with_name(path.name + ".part"), "wb+")  # noqa: SIM115
        self._hash, self._hashed = hashlib.sha256(), 0

    def write(self, data) -> None:
        """Append bytes."""
        self.file.write(data)
        self._hash.update(data)
        self._hashed += memoryview(data).nbytes

    def finish(self, rows: int) -> Shard:
        self.file.flush()
        os.fsync(self.file.fileno())
        size = os.fstat(self.file.fileno()).st_size
        if self._hashed != size:
            self.file.seek(0)
            self._hash = hashlib.file_digest(self.file, "sha256")
        status = os.fstat(self.file.fileno())
        self.file.close()
        rename(Path(self.file.name), self._path)
        return Shard(self._path.name, rows, size, self._hash.hexdigest(), status.st_mtime_ns)

    def abort(self) -> None:
        """Remove it; after ``finish`` does nothing."""
        with suppress(OSError):  # of what is still buffered, on a full disk
            self.file.close()
        Path(self.file.name).unlink(missing_ok=True)


class RowsWriter(Writer):
    """The project's own shards: the records themselves."""

    sharded = True
    holds = "all rows"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        return True

    def _begin(self) -> None:
        self._file = self._open(".rows")

    def _write(self, records: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(records).view(np.uint8).data)


class BinWriter(Writer):
    """facebookresearch/dlrm's rows of 40 int32. Missing and negative integers are 0, as its preprocessing has them."""

    holds = "labelled rows with integers and one 32-bit id a feature"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        return layout == Layout()

    def _begin(self) -> None:
        self._file = self._open(".bin")

    def _write(self, records: np.ndarray) -> None:
        records = records.copy()
        records["dense"] = np.maximum(records["dense"], 0)
        self._file.write(records.tobytes())


class NpzWriter(Writer):
    """facebookresearch/dlrm's ``day_N.npz``: X_int, X_cat_t, y. A missing integer is 0 there."""

    holds = BinWriter.holds

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        return BinWriter.can_hold(layout)

    def _begin(self) -> None:
        self._file = self._open(".npz")
        # Ids lie there by column, the rows come one after the other: a temporary file for each column.
        self._dense, self._labels = self._temporary(), self._temporary()
        self._columns = [self._temporary() for _ in range(NUM_SPARSE)]

    def _write(self, records: np.ndarray) -> None:
        self._dense.write(np.where(records["dense"] == MISSING, 0, records["dense"]).tobytes())
        self._labels.write(records["label"].tobytes())
        for column, ids in zip(self._columns, records["sparse"].T):
            column.write(ids.tobytes())

    def _finish(self) -> None:
        arrays = (
            ("X_int", (self.rows, NUM_DENSE), [self._dense]),
            ("X_cat_t", (NUM_SPARSE, self.rows), self._columns),
            ("y", (self.rows,), [self._labels]),
        )
        write_npz(self._file.file, [(name, shape, np.dtype("<i4"), files) for name, shape, files in arrays])


class NpyWriter(Writer):
    """torchrec's ``NAME_dense.npy``, ``NAME_labels.npy`` and ``NAME_sparse.npy`` or ``NAME_sparse_multi_hot.npz``.

    Integers become log(x + 1), which is what the project's models are given.
    """

    holds = "labelled rows"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        return layout.labelled

    def _begin(self) -> None:
        self._dense, self._labels = self._array("_dense.npy"), self._array("_labels.npy")
        self._columns: list[BinaryIO] = []
        if self.layout.hots:
            self._sparse = self._open("_sparse_multi_hot.npz")
            self._columns = [self._temporary() for _ in self.layout.hots]
        else:
            self._sparse = self._array("_sparse.npy")

    def _array(self, suffix: str) -> PartFile:
        file = self._open(suffix)
        file.file.write(bytes(_NPY_HEADER_BYTES))  # its place, until the number of rows is known
        return file

    def _write(self, records: np.ndarray) -> None:
        dense = records["dense"]
        self._dense.write((transform_dense(dense) if self.layout.dense == "i4" else dense).tobytes())
        self._labels.write(records["label"].tobytes())
        if self._columns:
            for file, ids in zip(self._columns, self.layout.features):
                file.write(records["sparse"][:, ids].tobytes())
        else:
            self._sparse.write(records["sparse"].tobytes())

    def _finish(self) -> None:
        arrays = [(self._dense, "<f4", NUM_DENSE), (self._labels, "<i4", 1)]
        ids = "<i4" if self.layout.ids == "u4" else "<i8"
        if self._columns:
            assert self.layout.hots is not None
            members = [
                (str(i), (self.rows, hot), np.dtype(ids), [file])
                for i, (hot, file) in enumerate(zip(self.layout.hots, self._columns))
            ]
            write_npz(self._sparse.file, members)
        else:
            arrays.append((self._sparse, ids, NUM_SPARSE))
        for file, kind, width in arrays:
            header = npy_header((self.rows, width), np.dtype(kind))
            assert len(header) == _NPY_HEADER_BYTES
            file.file.seek(0)
            file.file.write(header)


class ParquetWriter(Writer):
    """Parquet shards: label, int_0 .. int_12 (null where missing), cat_0 .. cat_25."""

    sharded = True
    holds = "rows with one id a feature"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        return layout.hots is None

    def _begin(self) -> None:
        self._file = self._open(".parquet")
        self._frames: list[pl.DataFrame] = []

    def _write(self, records: np.ndarray) -> None:
        self._frames.append(to_frame(records))

    def _finish(self) -> None:
        # Of no rows there is still a file, with its columns.
        frames = self._frames or [to_frame(self.layout.records(0))]
        try:
            pl.concat(frames).write_parquet(self._file.file)
        except pl.exceptions.PolarsError as error:
            # A full disk, as polars has it.
            number = re.search(r"os error (\d+)", str(error))
            if not number:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        self._frames.clear()


class TSVWriter(Writer):
    """Criteo's own logs. A category of id 0 is a missing one there."""

    holds = "rows with integers and one 32-bit id a feature"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        return layout == Layout(labelled=layout.labelled)

    def _begin(self) -> None:
        self._file = self._open(".tsv")

    def _write(self, records: np.ndarray) -> None:
        write_tsv(self._file, to_frame(records))


WRITERS: dict[str, type[Writer]] = {
    "rows": RowsWriter,
    "parquet": ParquetWriter,
    "npz": NpzWriter,
    "bin": BinWriter,
    "npy": NpyWriter,
    "tsv": TSVWriter,
}


def to_frame(records: np.ndarray) -> pl.DataFrame:
    """Records as columns; missing integers as nulls."""
    columns = {"label": records["label"]} if "label" in (records.dtype.names or ()) else {}
    columns |= {name: records["dense"][:, i] for i, name in enumerate(DENSE_NAMES)}
    columns |= {name: records["sparse"][:, i] for i, name in enumerate(SPARSE_NAMES)}
    frame = pl.DataFrame({name: np.ascontiguousarray(values) for name, values in columns.items()})
    if records["dense"].dtype.kind == "i":
        frame = frame.with_columns(pl.col(name).replace(MISSING, None) for name in DENSE_NAMES)
    return frame


_HEXADECIMAL = pl.Series([f"{i:04x}" for i in range(1 << 16)])


def hexadecimal(ids: np.ndarray) -> pl.Series:
    """32-bit ids as Criteo writes them: 8 digits, nothing for 0."""
    ids = ids.astype(np.uint32)
    text = _HEXADECIMAL.gather(ids >> 16) + _HEXADECIMAL.gather(ids & 0xFFFF)
    return text.set(pl.Series(ids == 0), None)


def write_tsv(file: SupportsWrite, frame: pl.DataFrame) -> None:
    """Rows as lines of Criteo's logs; frame as of ``to_frame``."""
    text = frame.with_columns(hexadecimal(frame[name].to_numpy()).alias(name) for name in SPARSE_NAMES)
    file.write(text.write_csv(separator="\t", include_header=False).encode())


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What a .npy file begins with."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def write_npz(file: BinaryIO, arrays: Sequence[tuple[str, tuple[int, ...], np.dtype, list[BinaryIO]]]) -> None:
    """Write a .npz of (name, shape, dtype, files whose bytes one after the other are the array), not compressed."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as npz:
        for name, shape, dtype, sources in arrays:
            # A time of its own would make other bytes of the same rows.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with npz.open(info, "w", force_zip64=True) as member:
                member.write(npy_header(shape, dtype))
                for source in sources:
                    source.seek(0)
                    shutil.copyfileobj(source, member, 1 << 20)
