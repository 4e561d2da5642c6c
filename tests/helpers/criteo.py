"""Criteo rows made by hand, and written in every format by numpy, zipfile and polars alone.

Nothing here imports the project: readers and writers must not be compared with themselves.
"""

import gzip
import lzma
import os
from dataclasses import dataclass

import numpy as np
import polars as pl
from backports import zstd

MISSING = -(2**31)
NAMES = [f"int_{i}" for i in range(13)] + [f"cat_{i}" for i in range(26)]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}


@dataclass
class Rows:
    """Values of rows."""

    labels: np.ndarray  # (n,)
    dense: np.ndarray  # (n, 13) int32, MISSING where a value is missing
    ids: np.ndarray  # (n, 26) int64, 0 where a value is missing

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        return Rows(self.labels[rows], self.dense[rows], self.ids[rows])

    def lines(self, labelled=True):
        """Return the lines of a log."""
        return [
            "\t".join(
                [str(label)] * labelled
                + ["" if x == MISSING else str(x) for x in dense]
                + [f"{x:08x}" if x else "" for x in ids]
            )
            for label, dense, ids in zip(self.labels.tolist(), self.dense.tolist(), self.ids.tolist())
        ]

    def text(self, labelled=True):
        """Return the content of a log."""
        return "".join(line + "\n" for line in self.lines(labelled)).encode()


def make_rows(count, seed=0, different=None):
    """Return random rows with missing and negative integers, missing ids, and ids of up to 32 bits or of few values."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(-3, 10**6, (count, 13)).astype(np.int32)
    dense[:, 1] = rng.integers(-3, 5, count)
    dense[rng.random((count, 13)) < 0.3] = MISSING
    if different is None:
        ids = rng.integers(1, 2**32, (count, 26))
        ids[rng.random((count, 26)) < 0.2] = 0
    else:
        ids = rng.zipf(1.3, (count, 26)) % different
    return Rows(rng.integers(0, 2, count).astype(np.int32), dense, ids)


def together(*several):
    """Return rows one behind the other."""
    return Rows(*(np.concatenate([getattr(rows, what) for rows in several]) for what in ("labels", "dense", "ids")))


def without_missing(dense):
    """Return integers with 0 for a missing one."""
    return np.where(dense == MISSING, 0, dense).astype(np.int32)


def log_dense(dense):
    """Return log(max(x, 0) + 1) in float32."""
    return np.log(np.maximum(dense, 0) + 1.0).astype(np.float32)


def write_log(path, rows, labelled=True, end=""):
    """Write a log, compressed as its ending says."""
    path.write_bytes(COMPRESS[end](rows.text(labelled)))
    return path


def int32(ids):
    """Return the same 32 bits as signed integers."""
    return np.asarray(ids).astype(np.uint32).view(np.int32)


def write_bin(path, rows):
    """Write facebookresearch/dlrm's .bin."""
    np.concatenate([rows.labels[:, None], rows.dense, int32(rows.ids)], 1).astype("<i4").tofile(path)
    return path


def write_npz(path, rows, save=np.savez):
    """Write facebookresearch/dlrm's day_N.npz."""
    save(path, X_int=rows.dense, X_cat_t=np.ascontiguousarray(int32(rows.ids).T), y=rows.labels)
    return path


def write_processed(path, rows, save=np.savez_compressed):
    """Write facebookresearch/dlrm's NAME_processed.npz."""
    save(path, X_int=rows.dense, X_cat=rows.ids.astype(float), y=rows.labels, counts=np.full(26, 9, np.int32))
    return path


def write_npy(folder, name, rows, dense=None, hots=None, single=True):
    """Write torchrec's triple, with multi-hot ids {"0": (n, h)...} if given; single: also a file of single ids."""
    np.save(folder / f"{name}_dense.npy", log_dense(rows.dense) if dense is None else dense)
    np.save(folder / f"{name}_labels.npy", rows.labels[:, None])
    if single:
        np.save(folder / f"{name}_sparse.npy", int32(rows.ids))
    if hots is not None:
        np.savez(folder / f"{name}_sparse_multi_hot.npz", **hots)
    return folder / f"{name}_dense.npy"


def frame(rows, **replaced):
    """Return rows as columns, with null for a missing integer. Columns can be replaced, or left out by None."""
    columns = {"label": pl.Series(rows.labels)}
    for i in range(13):
        values = [None if x == MISSING else x for x in rows.dense[:, i].tolist()]
        columns[f"int_{i}"] = pl.Series(values, dtype=pl.Int32)
    columns |= {f"cat_{i}": pl.Series(rows.ids[:, i].astype(np.uint32)) for i in range(26)}
    columns |= replaced
    return pl.DataFrame({name: values for name, values in columns.items() if values is not None})


def write_parquet(path, rows, **replaced):
    """Write Parquet; columns can be replaced, or left out by None."""
    frame(rows, **replaced).write_parquet(path, row_group_size=50)
    return path


def make_lines(rows, labelled=True, seed=0):
    """Return random rows as text, with empty fields and negative integers."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        integers = ["" if rng.random() < 0.3 else str(rng.integers(-3, 10**6)) for _ in range(13)]
        categories = ["" if rng.random() < 0.2 else f"{rng.integers(0, 2**32):08x}" for _ in range(26)]
        lines.append("\t".join([str(rng.integers(0, 2))] * labelled + integers + categories))
    return lines


def write_lines(path, lines, end="\n"):
    """Write lines of text."""
    path.write_bytes(("\n".join(lines) + end).encode())
    return path


def cut(path, share=0.6):
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def change(path, at, value):
    """Overwrite bytes of a file."""
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)


def with_value(array, at, value):
    """Return a copy of an array with one value changed."""
    array = array.copy()
    array[at] = value
    return array


def written(write, then):
    """Return a function that writes rows to a path and then damages the file."""

    def make(path):
        write(path, make_rows(120))
        then(path)

    return make


def make_kind(kind, folder):
    """Write rows that not every format holds, and return their path and the rows expected."""
    rows = make_rows(120)
    if kind == "unlabelled":
        return write_log(folder / "day_0", rows, labelled=False), Rows(None, rows.dense, rows.ids)
    if kind == "wide":
        rows.ids[:, 7] = np.arange(120) * 2**40 - 2**45
        return write_parquet(folder / "day_0.parquet", rows, cat_7=pl.Series(rows.ids[:, 7])), rows
    if kind == "floats":
        return write_npy(folder, "day_0", rows), Rows(rows.labels, log_dense(rows.dense), rows.ids)
    hots = [1 + i % 3 for i in range(26)]
    ids = np.random.default_rng(2).integers(0, 2**32, (120, sum(hots)))
    split = {str(i): int32(part) for i, part in enumerate(np.split(ids, np.cumsum(hots)[:-1], 1))}
    path = write_npy(folder, "day_0", rows, hots=split, single=False)
    return path, Rows(rows.labels, log_dense(rows.dense), ids)


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
