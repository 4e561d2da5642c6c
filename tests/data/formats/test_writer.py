"""Writers of all formats: rows come back by way of every pair of them, and what a format can't hold is refused."""

import hashlib
import itertools

import numpy as np
import pytest

from data.formats.opening import WRITERS
from data.formats.writer import Shard, ShardFile, Writer
from data.schema import Layout
from tests.helpers.criteo import (
    log_dense,
    make_kind,
    make_rows,
    without_missing,
    write_log,
)
from tests.helpers.sources import converted, names, read, run

ROWS = make_rows(250)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("log") / "day_0", ROWS)


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


def test_files_of_a_writer_take_their_names_at_the_end(tmp_path):
    file = ShardFile(tmp_path / "day_0.rows")
    file.write(b"12345")
    assert [path.name for path in tmp_path.iterdir()] == ["day_0.rows.part"]
    shard = file.finish(3)
    file.abort()
    status = (tmp_path / "day_0.rows").stat()
    assert shard == Shard("day_0.rows", 3, 5, hashlib.sha256(b"12345").hexdigest(), status.st_mtime_ns)
    file = ShardFile(tmp_path / "day_1.rows")
    file.stream.write(b"67")  # past the checksum, which is then of the file
    assert file.finish(1).sha256 == hashlib.sha256(b"67").hexdigest()
    ShardFile(tmp_path / "day_2.rows").abort()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day_0.rows", "day_1.rows"]
