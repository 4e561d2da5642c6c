"""Files of Criteo rows that other tools write, and how any of them is opened.

- Criteo's own logs: see data/tsv.py
- facebookresearch/dlrm: ``day_N.npz`` {X_int i4 (n, 13), X_cat_t i4 (26, n), y i4 (n,)}, ``*_processed.npz`` {X_int,
  X_cat (n, 26), y}, ``terabyte_processed_*.bin``: rows of 40 int32, the label, 13 integers, 26 ids
- torchrec: ``day_N_dense.npy`` f4 (n, 13), ``day_N_labels.npy`` i4 (n, 1), and ``day_N_sparse.npy`` i4 (n, 26) or
  ``day_N_sparse_multi_hot.npz`` {"0" .. "25": i4 (n, hots)}
- Parquet: label, int_0 .. int_12, cat_0 .. cat_25, or under the other names in ``_PARQUET_NAMES``
- the project's own: see data/dataset.py

Everything but Parquet and the logs is read at any place without reading what comes before; compressed arrays are
unpacked into a temporary file first. Ids of 32 bits are taken as unsigned: Criteo's hashes come out as they are in the
logs, also from tools that write them as int32. Nothing in a file is ever unpickled.
"""

import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl

from data.dataset import MANIFEST, Dataset
from data.rows import DENSE_NAMES, MISSING, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES, DataError, Layout
from data.sources import Piece, RandomAccess, Several, SeveralRandomAccess, Source
from data.storage import ArrayFile, ClosedWhenUnused, natural_order, open_binary
from data.tsv import CriteoTSV

_NPY_MAGIC = b"\x93NUMPY"
_TRIPLE = re.compile(r"(?P<name>.+)_(?P<what>dense|labels|sparse)\.npy|(?P<multi>.+)_sparse_multi_hot\.npz")
_PARQUET_NAMES = (
    ["label", *DENSE_NAMES, *SPARSE_NAMES],
    ["label", *(f"I{i + 1}" for i in range(NUM_DENSE)), *(f"C{i + 1}" for i in range(NUM_SPARSE))],
    [
        "label",
        *(f"integer_feature_{i + 1}" for i in range(NUM_DENSE)),
        *(f"categorical_feature_{i + 1}" for i in range(NUM_SPARSE)),
    ],
)
_INTEGERS = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)
# Beside the data in a folder, and not data.
_NOT_DATA = ("README", "LICENSE", ".json", ".md", ".part", ".png", ".crc", ".bad", ".sketch")


def open_source(path: str | Path) -> Source:
    """The rows of a file or folder in any format, told by content and name.

    A folder's files are its rows in the natural order of their names: day_2 before day_10.

    Raises:
        DataError: nothing there, or nothing that is known here.
    """
    path = Path(path)
    if is_prepared(path):
        return Dataset(path)
    sources = open_sources(path)
    if len(sources) == 1:
        return sources[0]
    if all(isinstance(source, RandomAccess) for source in sources):
        return SeveralRandomAccess(path, sources)  # type: ignore[arg-type]
    return Several(path, sources)


def open_sources(path: Path) -> list[Source]:
    """The sources of a path, one for each file (or triple of files) in a folder, or that a folder was prepared from."""
    if not path.is_dir():
        return [_open_file(path)]
    if is_prepared(path):
        return Dataset(path).sources()
    files = sorted((file for file in path.iterdir() if file.is_file() and _is_data(file)), key=natural_order)
    if not files:
        raise DataError(f"{path}: no data in this folder")
    triples = [_triple_name(file) for file in files]
    for file, name in zip(files, triples):
        if name is not None and not file.with_name(f"{name}_dense.npy").exists():
            raise DataError(f"{path}: has {file.name}, but no {name}_dense.npy")
    # A triple is opened by its dense part; without ids of one each, by its multi-hot ids.
    sources = [_open_file(file) for file, name in zip(files, triples) if name is None or _what(file) == "dense"]
    return sources


def is_prepared(path: Path) -> bool:
    """Whether a path is a folder in the project's own format. Folders that were prepared in others have to be whole."""
    return (path / MANIFEST).exists() and Dataset(path).is_own


def _is_data(file: Path) -> bool:
    return not (file.name.startswith((".", "_")) or file.name.endswith(_NOT_DATA))


def _open_file(path: Path) -> Source:
    with open_binary(path) as file:
        magic = file.read(6)
    if magic[:4] == b"PAR1":
        return CriteoParquet(path)
    if magic[:2] == b"PK":
        return TorchrecNpy(path) if _triple_name(path) else FacebookNpz(path)
    if magic == _NPY_MAGIC:
        return TorchrecNpy(path)
    if path.suffix == ".bin":
        return FacebookBin(path)
    return CriteoTSV(path)


def _triple_name(path: Path) -> str | None:
    """day_0 of day_0_dense.npy."""
    match = _TRIPLE.fullmatch(path.name)
    return (match["name"] or match["multi"]) if match else None


def _what(path: Path) -> str | None:
    match = _TRIPLE.fullmatch(path.name)
    return match and match["what"]


def _check_labels(labels: np.ndarray, path: Path, start: int) -> None:
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{path}: row {start + row + 1}: label: expected 0 or 1, got {labels[row]}")


class FacebookBin(RandomAccess):
    """facebookresearch/dlrm's ``terabyte_processed_*.bin``: rows of 40 int32."""

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
        self._file.read(records, start)
        _check_labels(records["label"], self.path, start)


class FacebookNpz(RandomAccess):
    """facebookresearch/dlrm's ``day_N.npz`` and ``*_processed.npz``."""

    def __init__(self, path: Path):
        self.path, self.name, self.layout = path, path.stem, Layout()
        with _Npz(path) as npz:
            if "X_int" not in npz.names or "y" not in npz.names or not {"X_cat", "X_cat_t"} & npz.names:
                raise DataError(f"{path}: expected arrays X_int, X_cat or X_cat_t, and y, got {sorted(npz.names)}")
            self._dense, shape = npz.array("X_int")
            self.rows = shape[0]
            if not self.rows:
                raise DataError(f"{path}: the file is empty")
            _expect(
                path,
                "X_int",
                self._dense.dtype.base.kind in "iu" and shape == (self.rows, NUM_DENSE),
                shape,
                self._dense,
            )
            self._labels, shape = npz.array("y")
            _expect(path, "y", self._labels.dtype.kind in "iuf" and shape == (self.rows,), shape, self._labels)
            self._by_column = "X_cat_t" in npz.names
            name = "X_cat_t" if self._by_column else "X_cat"
            self._sparse, shape = npz.array(name)
            expected = (NUM_SPARSE, self.rows) if self._by_column else (self.rows, NUM_SPARSE)
            _expect(path, name, self._sparse.dtype.base.kind in "iuf" and shape == expected, shape, self._sparse)
            if self._by_column:
                self._sparse = self._sparse.elements()

    def fill(self, records: np.ndarray, start: int) -> None:
        stop = start + len(records)
        labels = self._labels.take(start, stop)
        _check_labels(labels, self.path, start)
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
                records["sparse"][:, column] = self._ids(ids)
        else:
            records["sparse"] = self._ids(self._sparse.take(start, stop))

    def _ids(self, ids: np.ndarray) -> np.ndarray:
        """As uint32; the processed files have them as float64."""
        with np.errstate(invalid="ignore"):  # what is no number is no integer, as compared below
            wide = ids.astype(np.int64)
        if (wide != ids).any() or (len(wide) and (wide.min() < -(1 << 31) or wide.max() >= 1 << 32)):
            raise DataError(f"{self.path}: ids: expected integers of 32 bits, got {ids.min()} to {ids.max()}")
        return wide.astype(np.uint32)


class TorchrecNpy(RandomAccess):
    """torchrec's ``NAME_dense.npy``, ``NAME_sparse.npy`` and ``NAME_labels.npy``, opened by the name of any of them.

    By the name of ``NAME_sparse_multi_hot.npz``, or where it is there and ``NAME_sparse.npy`` is not, with its ids.
    """

    def __init__(self, path: Path):
        name = _triple_name(path)
        if name is None:
            raise DataError(f"{path}: expected a name like day_0_dense.npy, day_0_sparse.npy or day_0_labels.npy")
        self.path, self.name = path, name
        self._dense = self._open("dense", "f4", NUM_DENSE)
        self.rows = self._dense.rows
        if not self.rows:
            raise DataError(f"{self._dense.path}: the file is empty")
        self._labels = self._open("labels", "i4", 1)
        multi_hot = path.with_name(f"{name}_sparse_multi_hot.npz")
        if path == multi_hot or (multi_hot.exists() and not path.with_name(f"{name}_sparse.npy").exists()):
            self._sparse = self._open_multi_hot(multi_hot)
            hots = tuple(ids.dtype.shape[0] for ids in self._sparse)
            self.layout = Layout(dense="f4", hots=hots)
        else:
            self._sparse = [self._open("sparse", "i4", NUM_SPARSE)]
            self.layout = Layout(dense="f4")

    def _open(self, what: str, kind: str, width: int) -> ArrayFile:
        path = self.path.with_name(f"{self.name}_{what}.npy")
        array, shape = _read_npy_header(open_binary(path), path, 0)
        rows = self.rows if what != "dense" else shape[0]
        fits = array.dtype.base == np.dtype("<" + kind) and shape in ((rows, width), (rows,) * (width == 1))
        _expect(path, "array", fits, shape, array, f"{kind} ({rows}, {width})")
        return array

    def _open_multi_hot(self, path: Path) -> list[ArrayFile]:
        with _Npz(path) as npz:
            if npz.names != {str(i) for i in range(NUM_SPARSE)}:
                raise DataError(f"{path}: expected arrays 0 to {NUM_SPARSE - 1}, got {sorted(npz.names)}")
            arrays = []
            for i in range(NUM_SPARSE):
                array, shape = npz.array(str(i))
                fits = array.dtype.base == np.dtype("<i4") and len(shape) == 2 and shape[0] == self.rows
                _expect(path, str(i), fits and shape[1] >= 1, shape, array, f"i4 ({self.rows}, hots)")
                arrays.append(array)
        return arrays

    def fill(self, records: np.ndarray, start: int) -> None:
        stop = start + len(records)
        records["label"] = self._labels.take(start, stop).reshape(-1)
        _check_labels(records["label"], self.path, start)
        records["dense"] = self._dense.take(start, stop)
        if not np.isfinite(records["dense"]).all():
            row = int(np.flatnonzero(~np.isfinite(records["dense"]).all(1))[0])
            raise DataError(f"{self._dense.path}: row {start + row + 1}: expected finite numbers, got NaN or infinity")
        slices = self.layout.features if self.layout.hots else [slice(None)]
        for ids, array in zip(slices, self._sparse):
            records["sparse"][:, ids] = array.take(start, stop).view(np.uint32)


class CriteoParquet(Source):
    """A Parquet file with a column for each feature. Read from the beginning, some rows at a time.

    Integer features may be missing (null); floating-point ones are taken as they are. Categories are integers, or
    text of up to 8 hexadecimal digits; missing ones are id 0.
    """

    rows: int | None

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        try:
            self._scan = pl.scan_parquet(path, glob=False)
            schema = self._scan.collect_schema()
            self.rows = self._scan.select(pl.len()).collect().item()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: not a Parquet file that can be read: {_first_line(error)}") from None
        self._names, self.layout = self._columns(schema)
        if not self.rows:
            raise DataError(f"{path}: the file is empty")

    def _columns(self, schema: pl.Schema) -> tuple[list[str], Layout]:
        for names in _PARQUET_NAMES:
            if set(names[1:]) <= set(schema):
                break
        else:
            missing = sorted(set(_PARQUET_NAMES[0][1:]) - set(schema), key=_PARQUET_NAMES[0].index)
            raise DataError(f"{self.path}: expected columns label, int_0 .. int_12, cat_0 .. cat_25; no {missing[0]}")
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
        names = self._names if self.labelled else self._names[1:]
        try:
            batches = self._scan.select(names).slice(start).collect_batches(chunk_size=1 << 16, maintain_order=True)
            for frame in batches:
                yield lambda frame=frame, start=start: Piece(
                    self.path, start, frame.height, self._records(frame, start)
                )
                start += frame.height
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{self.path}: after row {start}: {_first_line(error)}") from None

    def _records(self, frame: pl.DataFrame, start: int) -> np.ndarray:
        records = self.layout.records(frame.height)
        columns = frame.get_columns()
        if self.labelled:
            labels = columns.pop(0).cast(pl.Float64, strict=False).fill_null(-1).to_numpy()
            _check_labels(labels, self.path, start)
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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# -- Arrays in files --------------------------------------------------------------------------------------------------


def _expect(path: Path, name: str, fits: bool, shape: tuple, array: ArrayFile, expected: str | None = None) -> None:
    if not fits:
        wanted = f"expected {expected}, got" if expected else "unexpected"
        raise DataError(f"{path}: {name}: {wanted} {array.dtype.base.str[1:]} {shape}")


def _read_npy_header(file: BinaryIO, path: Path, offset: int) -> tuple[ArrayFile, tuple[int, ...]]:
    """The rows of the .npy array that begins at an offset of a file, and its shape."""
    try:
        file.seek(offset)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_order, dtype = read(file)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not a .npy array: {_first_line(error)}") from None
    numbers = (
        dtype.kind in "biuf" and not column_order and bool(shape) and shape[0] >= 0 and min(shape[1:], default=1) > 0
    )
    if not numbers or math.prod(shape[1:]) >= 1 << 31:
        raise DataError(f"{path}: expected an array of numbers, row by row, got {dtype}, {shape}")
    return ArrayFile(file, path, np.dtype((dtype, shape[1:])) if shape[1:] else dtype, file.tell(), shape[0]), shape


class _Npz:
    """The arrays of a .npz file: where they lie if they are stored, else unpacked into temporary files."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._zip = zipfile.ZipFile(open_binary(path))
        except zipfile.BadZipFile as error:
            raise DataError(f"{path}: not a .npz file, or one that ends early: {error}") from None
        self.names = {name.removesuffix(".npy") for name in self._zip.namelist()}

    def __enter__(self) -> "_Npz":
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def array(self, name: str) -> tuple[ArrayFile, tuple[int, ...]]:
        info = self._zip.getinfo(name + ".npy")
        if info.compress_type == zipfile.ZIP_STORED:
            file = open_binary(self._path)
            file.seek(info.header_offset + 26)  # of the local header: the lengths of name and extra field
            lengths = np.frombuffer(file.read(4), "<u2").astype(int)
            start = info.header_offset + 30 + int(lengths.sum())
            array, shape = _read_npy_header(file, self._path, start)
            there = start + info.file_size - array.offset
            if there < array.rows * array.dtype.itemsize:
                raise DataError(f"{self._path}: {name}: truncated: {shape} {array.dtype.base.str[1:]} in {there} bytes")
            return array, shape
        try:
            with tempfile.TemporaryFile() as temporary, self._zip.open(info) as member:
                shutil.copyfileobj(member, temporary, 1 << 20)
                temporary.flush()
                unpacked = ClosedWhenUnused(os.dup(temporary.fileno()))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, or how
            raise DataError(f"{self._path}: {name}: corrupt archive: {error}") from None
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}, while unpacking {self._path}", tempfile.gettempdir()
            ) from None
        return _read_npy_header(unpacked, self._path, 0)
