"""Files of Criteo rows that other tools write, and how any of them is opened.

- Criteo's own logs: see data/tsv.py
- facebookresearch/dlrm: ``day_N.npz`` {X_int i4 (n, 13), X_cat_t i4 (26, n), y i4 (n,)}, ``*_processed.npz`` {X_int,
  X_cat (n, 26), y}, ``terabyte_processed_*.bin``: rows of 40 int32, the label, 13 integers, 26 ids
- torchrec: ``day_N_dense.npy`` f4 (n, 13), ``day_N_labels.npy`` i4 (n, 1), and ``day_N_sparse.npy`` or
  ``day_N_sparse_contig_freq.npy``, i4 or i8 (n, 26), or ``day_N_sparse_multi_hot.npz`` {"0" .. "25": (n, hots)}
- Parquet: label, int_0 .. int_12, cat_0 .. cat_25, or under the other names that data/parquet.py knows
- the project's own: see data/dataset.py

Everything but Parquet and the logs is read at any place without reading what comes before; compressed arrays are
unpacked into a temporary file first. Ids of 32 bits are taken as unsigned: Criteo's hashes come out as they are in the
logs, also from tools that write them as int32. Nothing in a file is ever unpickled.
"""

import re
from pathlib import Path

import numpy as np

from data.formats.criteo_tsv import CriteoTSV
from data.formats.parquet import CriteoParquet
from data.formats.prepared import MANIFEST, Dataset
from data.rows import NUM_DENSE, NUM_SPARSE, DataError, Layout, check_labels
from data.sources import RandomAccess, Several, SeveralRandomAccess, Source
from data.storage import ArrayFile, NpzFile, natural_order, open_binary, read_npy_header

_NPY_MAGIC = b"\x93NUMPY"
_SPARSE_ENDS = ("_sparse.npy", "_sparse_contig_freq.npy", "_sparse_multi_hot.npz")  # the first that is there counts
_TRIPLE = re.compile(rf"(?P<name>.+?)(?P<end>_dense\.npy|_labels\.npy|{'|'.join(map(re.escape, _SPARSE_ENDS))})")
_INTEGERS = ["<i4", "<i8"]
# Beside the data in a folder, and not data.
_NOT_DATA = ("README", "LICENSE", ".json", ".md", ".part", ".png", ".crc", ".bad")


def open_source(path: str | Path) -> Source:
    """The rows of a file or folder in any format, told by content and name.

    A folder's files are its rows in the natural order of their names: day_2 before day_10.

    Raises:
        DataError: nothing there, or nothing that is known here.
    """
    path = Path(path)
    prepared = _open_prepared(path)
    if prepared:
        return prepared
    sources = _open_files(path)
    if len(sources) == 1:
        return sources[0]
    if all(isinstance(source, RandomAccess) for source in sources):
        return SeveralRandomAccess(path, sources)  # type: ignore[arg-type]
    return Several(path, sources)


def open_sources(path: Path) -> list[Source]:
    """The sources of a path, one for each file (or triple of files) in a folder, or that a folder was prepared from."""
    prepared = _open_prepared(path)
    return prepared.sources() if prepared else _open_files(path)


def _open_prepared(path: Path) -> Dataset | None:
    """A folder in the project's own format. One that was prepared in another has to be whole, too."""
    if not (path / MANIFEST).exists():
        return None
    dataset = Dataset(path)
    return dataset if dataset.is_own else None


def _open_files(path: Path) -> list[Source]:
    if not path.is_dir():
        return [_open_file(path)]
    files = sorted((file for file in path.iterdir() if file.is_file() and _is_data(file)), key=natural_order)
    if not files:
        raise DataError(f"{path}: no data in this folder")
    triples = [_triple_name(file) for file in files]
    for file, name in zip(files, triples):
        if name is not None and not file.with_name(f"{name}_dense.npy").exists():
            raise DataError(f"{path}: has {file.name}, but no {name}_dense.npy")
    # A triple is opened once, by its dense part.
    return [_open_file(file) for file, name in zip(files, triples) if name is None or file.name == f"{name}_dense.npy"]


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
    return match and match["name"]


def _expect(path: Path, name: str, fits: bool, shape: tuple, array: ArrayFile, expected: str | None = None) -> None:
    if not fits:
        wanted = f"expected {expected}, got" if expected else "unexpected"
        raise DataError(f"{path}: {name}: {wanted} {array.dtype.base.str[1:]} {shape}")


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
        check_labels(records["label"], self.path, start)


class FacebookNpz(RandomAccess):
    """facebookresearch/dlrm's ``day_N.npz`` and ``*_processed.npz``."""

    def __init__(self, path: Path):
        self.path, self.name, self.layout = path, path.stem, Layout()
        with NpzFile(path) as npz:
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
    """torchrec's ``NAME_dense.npy``, ``NAME_labels.npy`` and ids, opened by the name of any of them.

    Where there are several files of ids and none of them is named, it is the first of ``_SPARSE_ENDS``.
    """

    def __init__(self, path: Path):
        name = _triple_name(path)
        if name is None:
            raise DataError(f"{path}: expected a name like day_0_dense.npy, day_0_sparse.npy or day_0_labels.npy")
        self.path, self.name = path, name
        self._dense = self._open("_dense.npy", ["<f4"], NUM_DENSE)
        if not self._dense.rows:
            raise DataError(f"{self._dense.path}: the file is empty")
        self._labels = self._open("_labels.npy", ["<i4"], 1)
        ends = [end for end in _SPARSE_ENDS if path.with_name(name + end).exists()] or [_SPARSE_ENDS[0]]
        end = next((end for end in _SPARSE_ENDS if path.name == name + end), ends[0])
        if end.endswith(".npz"):
            self._sparse = self._open_multi_hot(path.with_name(name + end))
            hots = tuple(ids.dtype.shape[0] for ids in self._sparse)
        else:
            self._sparse, hots = [self._open(end, _INTEGERS, NUM_SPARSE)], None
        wide = any(array.dtype.base == np.int64 for array in self._sparse)
        self.layout = Layout(dense="f4", ids="i8" if wide else "u4", hots=hots)

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self._dense.rows

    def _open(self, end: str, kinds: list[str], width: int) -> ArrayFile:
        path = self.path.with_name(self.name + end)
        array, shape = read_npy_header(open_binary(path), path, 0)
        rows = shape[0] if end == "_dense.npy" else self.rows
        fits = array.dtype.base.str in kinds and shape in ((rows, width), (rows,) * (width == 1))
        _expect(path, "array", fits, shape, array, f"{' or '.join(kind[1:] for kind in kinds)} ({rows}, {width})")
        return array

    def _open_multi_hot(self, path: Path) -> list[ArrayFile]:
        with NpzFile(path) as npz:
            if npz.names != {str(i) for i in range(NUM_SPARSE)}:
                raise DataError(f"{path}: expected arrays 0 to {NUM_SPARSE - 1}, got {sorted(npz.names)}")
            arrays = []
            for i in range(NUM_SPARSE):
                array, shape = npz.array(str(i))
                fits = array.dtype.base.str in _INTEGERS and len(shape) == 2 and shape[0] == self.rows
                _expect(path, str(i), fits and shape[1] >= 1, shape, array, f"i4 or i8 ({self.rows}, hots)")
                arrays.append(array)
        return arrays

    def fill(self, records: np.ndarray, start: int) -> None:
        stop = start + len(records)
        records["label"] = self._labels.take(start, stop).reshape(-1)
        check_labels(records["label"], self.path, start)
        records["dense"] = self._dense.take(start, stop)
        if not np.isfinite(records["dense"]).all():
            row = int(np.flatnonzero(~np.isfinite(records["dense"]).all(1))[0])
            raise DataError(f"{self._dense.path}: row {start + row + 1}: expected finite numbers, got NaN or infinity")
        slices = self.layout.features if self.layout.hots else [slice(None)]
        for ids, array in zip(slices, self._sparse):
            taken = array.take(start, stop)
            records["sparse"][:, ids] = taken if taken.dtype == np.int64 else taken.view(np.uint32)
