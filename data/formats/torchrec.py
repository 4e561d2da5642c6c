"""torchrec's triples of .npy files, and its multi-hot ids.

- ``NAME_dense.npy``: f4 (n, 13). torchrec writes log(x + 3); numbers that are all whole are integers, and not yet input
  of a model.
- ``NAME_labels.npy``: i4 (n, 1)
- ids: ``NAME_sparse.npy`` or ``NAME_sparse_contig_freq.npy``, i4 or i8 (n, 26), or ``NAME_sparse_multi_hot.npz`` with
  arrays "0" to "25", i4 or i8 (n, hots)
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.formats.writer import ShardFile, Writer
from data.npy import HEADER_BYTES, NpzArray, NpzFile, npy_header, read_npy, require, write_npz
from data.rows import check_labels, transform_dense
from data.schema import NUM_DENSE, NUM_SPARSE, DataError, Layout
from data.sources import RandomAccess
from data.storage import ArrayFile, open_binary

_DENSE, _LABELS = "_dense.npy", "_labels.npy"
_SPARSE, _MULTI_HOT = "_sparse.npy", "_sparse_multi_hot.npz"
_IDS = (_SPARSE, "_sparse_contig_freq.npy", _MULTI_HOT)  # if several exist, the first counts
_NAME = re.compile(rf"(?P<name>.+?)({'|'.join(map(re.escape, (_DENSE, _LABELS, *_IDS)))})")
_INTEGERS = ("<i4", "<i8")
_HEAD_ROWS = 1 << 16  # that decide what the dense numbers are


def triple_name(path: Path) -> str | None:
    """Return day_0 for day_0_dense.npy, day_0_labels.npy, day_0_sparse.npy and the like; None for other names."""
    match = _NAME.fullmatch(path.name)
    return match and match["name"]


def one_of_each_triple(files: Sequence[Path]) -> list[Path]:
    """Return the files with only the dense file of each triple; files of other names stay.

    Raises:
        DataError: a triple has no dense file.
    """
    kept = []
    for file in files:
        name = triple_name(file)
        if name is not None and not file.with_name(name + _DENSE).exists():
            raise DataError(f"{file.parent}: has {file.name}, but no {name}{_DENSE}")
        if name is None or file.name == name + _DENSE:
            kept.append(file)
    return kept


class TorchrecNpy(RandomAccess):
    """A triple.

    Args:
        path: any of its files. Where there are several files of ids, and ``path`` is none of them, the first of
            ``NAME_sparse.npy``, ``NAME_sparse_contig_freq.npy`` and ``NAME_sparse_multi_hot.npz`` counts.

    Raises:
        DataError: a file is missing, broken, empty, or has another shape.
    """

    def __init__(self, path: Path):
        name = triple_name(path)
        if name is None:
            raise DataError(f"{path}: expected a name like day_0_dense.npy, day_0_sparse.npy or day_0_labels.npy")
        self.path, self.name = path, name
        self._dense = self._open(_DENSE, ("<f4",), NUM_DENSE)
        if not self._dense.rows:
            raise DataError(f"{self._dense.path}: the file is empty")
        self._labels = self._open(_LABELS, ("<i4",), 1)
        existing = [end for end in _IDS if path.with_name(name + end).exists()] or [_SPARSE]
        end = next((end for end in _IDS if path.name == name + end), existing[0])
        if end == _MULTI_HOT:
            self._sparse = self._open_multi_hot(path.with_name(name + end))
            hots = tuple(ids.dtype.shape[0] for ids in self._sparse)
        else:
            self._sparse, hots = [self._open(end, _INTEGERS, NUM_SPARSE)], None
        self._files = [path.with_name(name + x) for x in (_DENSE, _LABELS, end)]
        wide = any(array.dtype.base == np.int64 for array in self._sparse)
        head = self._dense.take(0, min(self.rows, _HEAD_ROWS))
        integers = head.any() and (head == np.floor(head)).all()  # zeros may be either, and are the same for a model
        try:
            self.layout = Layout(dense="i4" if integers else "f4", ids="i8" if wide else "u4", hots=hots)
        except ValueError as error:
            raise DataError(f"{path.with_name(name + end)}: {error}") from None

    def files(self) -> list[Path]:
        """Return the files of the triple."""
        return self._files

    @property
    def rows(self) -> int:  # type: ignore[override]
        """The number of rows."""
        return self._dense.rows

    def _open(self, end: str, kinds: Sequence[str], width: int) -> ArrayFile:
        path = self.path.with_name(self.name + end)
        array = read_npy(open_binary(path), path)
        rows = array.rows if end == _DENSE else self.rows
        fits = array.dtype.base.str in kinds and array.shape in ((rows, width), (rows,) * (width == 1))
        require(fits, array, "array", f"{' or '.join(kind[1:] for kind in kinds)} ({rows}, {width})")
        return array

    def _open_multi_hot(self, path: Path) -> list[ArrayFile]:
        with NpzFile(path) as npz:
            if npz.names != {str(i) for i in range(NUM_SPARSE)}:
                raise DataError(f"{path}: expected arrays 0 to {NUM_SPARSE - 1}, got {npz.contents}")
            for i in range(NUM_SPARSE):
                header = npz.header(str(i))
                fits = header.dtype.base.str in _INTEGERS and len(header.shape) == 2 and header.rows == self.rows
                require(fits, header, str(i), f"i4 or i8 ({self.rows}, hots)")
            return [npz.array(str(i)) for i in range(NUM_SPARSE)]

    def fill(self, records: np.ndarray, start: int) -> None:
        """Fill records with the rows from ``start`` on."""
        stop = start + len(records)
        records["label"] = self._labels.take(start, stop).reshape(-1)
        check_labels(records["label"], self.path, start)
        dense = self._dense.take(start, stop)
        self._refuse(~np.isfinite(dense), start, "finite numbers, got NaN or infinity")
        if self.layout.dense == "i4":
            wrong = (dense != np.floor(dense)) | (np.abs(dense) >= 1 << 31)
            self._refuse(wrong, start, "integers of 32 bits, as in the first rows")
        records["dense"] = dense
        columns = self.layout.features if self.layout.hots else [slice(None)]
        for of_array, array in zip(columns, self._sparse):
            ids = array.take(start, stop)
            records["sparse"][:, of_array] = ids if ids.dtype == np.int64 else ids.view(np.uint32)

    def _refuse(self, wrong: np.ndarray, start: int, expected: str) -> None:
        rows = np.flatnonzero(wrong.any(1))
        if len(rows):
            raise DataError(f"{self._dense.path}: row {start + rows[0] + 1}: expected {expected}")


class NpyWriter(Writer):
    """Writes a triple; multi-hot ids go to ``NAME_sparse_multi_hot.npz``.

    Integers become log(max(x, 0) + 1), a model's input.
    """

    holds = "labelled rows"

    @staticmethod
    def can_hold(layout: Layout) -> bool:
        """Return whether the format can hold such records."""
        return layout.labelled

    def begin(self) -> None:
        """Open the files."""
        self._dense, self._labels = self._open_array(_DENSE), self._open_array(_LABELS)
        self._columns: list[BinaryIO] = []
        if self.layout.hots:
            self._sparse = self.open_file(_MULTI_HOT)
            self._columns = [self.open_temporary() for _ in self.layout.hots]
        else:
            self._sparse = self._open_array(_SPARSE)

    def _open_array(self, suffix: str) -> ShardFile:
        file = self.open_file(suffix)
        file.stream.write(bytes(HEADER_BYTES))  # replaced at the end, when the number of rows is known
        return file

    def add(self, records: np.ndarray) -> None:
        """Write records; multi-hot ids to temporary files."""
        dense = records["dense"]
        self._dense.write((transform_dense(dense) if self.layout.dense == "i4" else dense).tobytes())
        self._labels.write(records["label"].tobytes())
        if self._columns:
            for file, columns in zip(self._columns, self.layout.features):
                file.write(records["sparse"][:, columns].tobytes())
        else:
            self._sparse.write(records["sparse"].tobytes())

    def end(self) -> None:
        """Write the headers and the multi-hot ids."""
        self._write_header(self._dense, "<f4", NUM_DENSE)
        self._write_header(self._labels, "<i4", 1)
        ids = "<i4" if self.layout.ids == "u4" else "<i8"
        if self.layout.hots is None:
            self._write_header(self._sparse, ids, NUM_SPARSE)
        else:
            of_features = enumerate(zip(self.layout.hots, self._columns))
            arrays = [NpzArray(str(i), (self.rows, hot), np.dtype(ids), [file]) for i, (hot, file) in of_features]
            write_npz(self._sparse.stream, arrays)

    def _write_header(self, file: ShardFile, kind: str, width: int) -> None:
        header = npy_header((self.rows, width), np.dtype(kind))
        assert len(header) == HEADER_BYTES
        file.stream.seek(0)
        file.stream.write(header)
