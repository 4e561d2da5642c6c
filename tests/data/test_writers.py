"""Every format data.prepare writes, read back by numpy and polars, and by way of it back again."""

import itertools
import zipfile

import numpy as np
import polars as pl
import pytest

from data import prepare
from data.formats.opening import WRITERS, open_source
from data.formats.writer import Writer
from data.schema import Layout
from tests.helpers.criteo import (
    MISSING,
    NAMES,
    Rows,
    int32,
    log_dense,
    make_rows,
    without_missing,
    write_log,
    write_npy,
    write_parquet,
)

ROWS = make_rows(250)
RECORD = np.dtype([("label", "<i4"), ("dense", "<i4", 13), ("sparse", "<u4", 26)])


def run(*args):
    return prepare.main([str(arg) for arg in args])


def read(path):
    source = open_source(path)
    return np.concatenate([source.layout.records(0), *source.records()])


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("log") / "day_0", ROWS)


def converted(source, kind, folder, *options):
    assert run(source, "--output", folder, "--format", kind, "--shard-rows", 100, *options) == 0
    return folder


def names(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".json"))


def test_rows(tmp_path, log):
    folder = converted(log, "rows", tmp_path / "out")
    assert names(folder) == [f"day_0-0000{i}.rows" for i in range(3)]
    records = np.concatenate([np.fromfile(folder / name, RECORD) for name in names(folder)])
    assert [(folder / name).stat().st_size for name in names(folder)] == [16000, 16000, 8000]
    np.testing.assert_array_equal(records["label"], ROWS.labels)
    np.testing.assert_array_equal(records["dense"], ROWS.dense)
    np.testing.assert_array_equal(records["sparse"], ROWS.ids)


def test_parquet(tmp_path, log):
    folder = converted(log, "parquet", tmp_path / "out")
    assert names(folder) == [f"day_0-0000{i}.parquet" for i in range(3)]
    frame = pl.concat([pl.read_parquet(folder / name) for name in names(folder)])
    assert frame.columns == ["label", *NAMES]
    assert set(frame.dtypes) == {pl.Int32, pl.UInt32}
    np.testing.assert_array_equal(frame["label"], ROWS.labels)
    values = frame.select(NAMES[:13]).rows()
    assert values == [tuple(None if x == MISSING else x for x in row) for row in ROWS.dense.tolist()]
    np.testing.assert_array_equal(frame.select(NAMES[13:]).to_numpy(), ROWS.ids)


def test_npz(tmp_path, log):
    folder = converted(log, "npz", tmp_path / "out")
    assert names(folder) == ["day_0.npz"]
    with zipfile.ZipFile(folder / "day_0.npz") as archive:  # no time of its own in it
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(folder / "day_0.npz", allow_pickle=False) as npz:
        assert set(npz) == {"X_int", "X_cat_t", "y"}
        assert {npz[name].dtype for name in npz} == {np.dtype("<i4")}
        np.testing.assert_array_equal(npz["X_int"], without_missing(ROWS.dense))
        np.testing.assert_array_equal(npz["X_cat_t"], int32(ROWS.ids).T)
        np.testing.assert_array_equal(npz["y"], ROWS.labels)


def test_bin(tmp_path, log):
    folder = converted(log, "bin", tmp_path / "out")
    assert names(folder) == ["day_0.bin"]
    rows = np.fromfile(folder / "day_0.bin", "<i4").reshape(-1, 40)
    dense = np.maximum(ROWS.dense, 0)  # negative ones are 0 as well, as facebookresearch's preprocessing has them
    expected = np.concatenate([ROWS.labels[:, None], dense, int32(ROWS.ids)], 1)
    np.testing.assert_array_equal(rows, expected)


def test_npy(tmp_path, log):
    folder = converted(log, "npy", tmp_path / "out")
    assert names(folder) == [f"day_0_{what}.npy" for what in ("dense", "labels", "sparse")]
    dense, labels, sparse = (np.load(folder / name, allow_pickle=False) for name in names(folder))
    assert [dense.dtype, labels.dtype, sparse.dtype] == [np.float32, np.int32, np.int32]
    np.testing.assert_allclose(dense, log_dense(ROWS.dense), rtol=3e-7)
    np.testing.assert_array_equal(labels, ROWS.labels[:, None])
    np.testing.assert_array_equal(sparse, int32(ROWS.ids))


@pytest.mark.parametrize("labelled", [True, False])
def test_tsv_is_the_log_it_came_from(tmp_path, labelled):
    path = write_log(tmp_path / "day_0", ROWS, labelled)
    folder = converted(path, "tsv", tmp_path / "out")
    assert names(folder) == ["day_0.tsv"]
    assert (folder / "day_0.tsv").read_bytes() == path.read_bytes()
    converted(converted(path, "rows", tmp_path / "rows"), "tsv", tmp_path / "again")
    assert (tmp_path / "again" / "day_0.tsv").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("there", "back"), list(itertools.product(WRITERS, repeat=2)))
def test_round_trips(tmp_path, there, back, log):
    """log -> there -> back -> rows: what the narrower of the two formats holds comes back."""
    first = converted(log, there, tmp_path / "there")
    if there == "npy" and back in ("npz", "bin", "tsv"):
        return  # refused: see below
    second = converted(first, back, tmp_path / "back")
    records = read(converted(second, "rows", tmp_path / "rows"))
    dense = ROWS.dense
    if "npz" in (there, back):
        dense = without_missing(dense)
    if "bin" in (there, back):
        dense = np.maximum(dense, 0)
    if "npy" in (there, back):
        np.testing.assert_allclose(records["dense"], log_dense(dense), rtol=3e-7)
    else:
        np.testing.assert_array_equal(records["dense"], dense)
    np.testing.assert_array_equal(records["label"], ROWS.labels)
    np.testing.assert_array_equal(records["sparse"], ROWS.ids)


def make_kind(kind, folder):
    """(path, records expected) of rows that not every format holds."""
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


FITS = {
    "unlabelled": ("rows", "parquet", "tsv"),
    "wide": ("rows", "parquet", "npy"),
    "floats": ("rows", "parquet", "npy"),
    "multi-hot": ("rows", "npy"),
}


@pytest.mark.parametrize(("kind", "to"), list(itertools.product(FITS, WRITERS)))
def test_rows_that_not_every_format_holds(tmp_path, kind, to, capsys):
    path, rows = make_kind(kind, tmp_path)
    if to not in FITS[kind]:
        assert run(path, "--output", tmp_path / "out", "--format", to) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert sum("error" in line for line in error) == 1
        assert error[-1].startswith("error: this format holds ")
        assert not (tmp_path / "out").exists()
        return
    records = read(converted(path, to, tmp_path / "out"))
    assert ("label" in records.dtype.names) == (rows.labels is not None)
    if rows.labels is not None:
        np.testing.assert_array_equal(records["label"], rows.labels)
    if to == "npy" and records["dense"].dtype != rows.dense.dtype:
        np.testing.assert_allclose(records["dense"], log_dense(rows.dense), rtol=3e-7)
    else:
        np.testing.assert_array_equal(records["dense"], rows.dense)
    np.testing.assert_array_equal(records["sparse"].astype(np.int64), rows.ids)


def test_multi_hot_ids_as_numpy_reads_them(tmp_path):
    path, rows = make_kind("multi-hot", tmp_path)
    folder = converted(path, "npy", tmp_path / "out")
    assert names(folder) == ["day_0_dense.npy", "day_0_labels.npy", "day_0_sparse_multi_hot.npz"]
    with np.load(folder / "day_0_sparse_multi_hot.npz", allow_pickle=False) as npz:
        assert list(npz) == [str(i) for i in range(26)]
        np.testing.assert_array_equal(np.concatenate([npz[str(i)] for i in range(26)], 1), int32(rows.ids))


def test_the_same_rows_are_the_same_bytes(tmp_path, log):
    for kind in WRITERS:
        a, b = (converted(log, kind, tmp_path / kind / name) for name in "ab")
        assert [(a / name).read_bytes() for name in names(a)] == [(b / name).read_bytes() for name in names(b)]


def test_a_writer_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch):
    opened = Writer.open_file

    def second_fails(self, suffix):
        if suffix == "_labels.npy":
            raise OSError(28, "No space left on device")
        return opened(self, suffix)

    monkeypatch.setattr(Writer, "open_file", second_fails)
    with pytest.raises(OSError, match="No space left"):
        WRITERS["npy"](tmp_path, "day_0", Layout())
    assert list(tmp_path.iterdir()) == []
