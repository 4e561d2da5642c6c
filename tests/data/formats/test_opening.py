"""Files of every format, written by hand, come out as the rows they hold, alone and in folders."""

import os

import numpy as np
import polars as pl
import pytest

import data.formats.criteo_tsv
import data.sources
from data.formats.opening import FORMATS as REGISTRY
from data.formats.opening import WRITERS, open_source, open_sources
from data.rows import Batch
from data.schema import MISSING, DataError
from tests.helpers.criteo import (
    COMPRESS,
    Rows,
    cut,
    log_dense,
    make_rows,
    together,
    write_bin,
    write_log,
    write_npy,
    write_npz,
    write_parquet,
    write_processed,
    written,
)
from tests.helpers.sources import check_refused, compare, converted, read

ROWS = make_rows(120)


def write_npy_here(path, rows):
    return write_npy(path.parent, path.stem, rows)


FORMATS = {
    "npz": write_npz,
    "npz compressed": lambda path, rows: write_npz(path, rows, np.savez_compressed),
    "processed": lambda path, rows: write_processed(path.with_name("kaggle_processed.npz"), rows),
    "processed stored": lambda path, rows: write_processed(path.with_name("kaggle_processed.npz"), rows, np.savez),
    "bin": lambda path, rows: write_bin(path.with_suffix(".bin"), rows),
    "npy": write_npy_here,
    "parquet": write_parquet,
    "log": write_log,
    **{
        f"log {end}": lambda path, rows, end=end: write_log(path.with_name(f"day_0{end}"), rows, end=end)
        for end in (".gz", ".xz", ".zst")
    },
}


def in_format(kind, path, rows):
    """(path, dense) of rows written in a format: torchrec's dense numbers are logarithms."""
    return FORMATS[kind](path, rows), log_dense(rows.dense) if kind == "npy" else rows.dense


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_come_out_as_they_are(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(data.sources, "PIECE_ROWS", 50)
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", 5000)
    path, dense = in_format(kind, tmp_path / "day_0.npz", ROWS)
    source = open_source(path)
    assert source.labelled
    assert source.path == path
    records = read(source)
    compare(records, ROWS, dense)
    assert source.rows == len(ROWS)
    assert records.dtype.itemsize == 160
    batch = Batch.concatenate(list(source.read()))
    assert [batch.dense.dtype, batch.sparse.dtype, batch.labels.dtype] == [np.float32, np.int64, np.float32]
    np.testing.assert_allclose(batch.dense, log_dense(ROWS.dense), rtol=1e-6)
    np.testing.assert_array_equal(batch.sparse, ROWS.ids)
    np.testing.assert_array_equal(batch.labels, ROWS.labels)
    for start, stop in ((0, 1), (30, 77), (49, 51), (50, 100), (100, None), (119, 120), (120, None), (5, 5)):
        compare(read(open_source(path), start, stop), ROWS[start:stop], dense[start:stop])


@pytest.mark.parametrize("kind", FORMATS)
def test_names_are_those_of_the_rows(tmp_path, kind):
    path, _ = in_format(kind, tmp_path / ("day_0" if kind == "log" else "day_0.npz"), ROWS)
    assert open_source(path).name == ("kaggle_processed" if "processed" in kind else "day_0")


@pytest.mark.parametrize("kind", ["npz", "npz compressed", "bin", "npy"])
def test_renumbered_ids_stay(tmp_path, kind):
    rows = make_rows(50, different=1000)
    path, dense = in_format(kind, tmp_path / "day_0.npz", rows)
    compare(read(open_source(path)), rows, dense)


def test_extreme_values(tmp_path):
    rows = Rows(np.array([1, 0, 1], np.int32), np.zeros((3, 13), np.int32), np.zeros((3, 26), np.int64))
    rows.dense[0], rows.dense[1], rows.dense[2] = 2**31 - 1, -(2**31) + 1, MISSING
    rows.ids[0], rows.ids[1], rows.ids[2] = 2**32 - 1, 2**31, 2**31 - 1
    for kind in ("npz", "processed", "bin", "parquet", "log"):
        path, dense = in_format(kind, tmp_path / "day_0.npz", rows)
        compare(read(open_source(path)), rows, dense)


DAYS = [make_rows(count, seed) for seed, count in enumerate((30, 1, 50), 1)]


ALL = together(*DAYS)


@pytest.mark.parametrize("kind", ["npz", "bin", "npy", "parquet", "log", "log .gz", "log .xz", "log .zst", "mixed"])
def test_a_folder_is_its_files_in_natural_order(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(data.sources, "PIECE_ROWS", 20)
    for day, rows in zip((1, 2, 10), DAYS):
        if kind.startswith("log "):
            write_log(tmp_path / f"day_{day}{kind[4:]}", rows, end=kind[4:])
        elif kind == "mixed":
            (FORMATS["bin"] if day == 2 else write_log)(tmp_path / f"day_{day}.tsv", rows)
        else:
            in_format(kind, tmp_path / (f"day_{day}" if kind == "log" else f"day_{day}.npz"), rows)
    for name in ("README", "README.md", "_SUCCESS", "info.json", ".hidden", "day_0.part", "plot.png", "LICENSE"):
        (tmp_path / name).write_text("no data")
    (tmp_path / "folder").mkdir()
    dense = log_dense(ALL.dense) if kind == "npy" else ALL.dense
    assert [source.name for source in open_sources(tmp_path)] == ["day_1", "day_2", "day_10"]
    compare(read(open_source(tmp_path)), ALL, dense)
    for start in (0, 7, 29, 30, 31, 40, 80):
        for stop in (start + 1, 31, 45, 81, None):
            if stop is None or stop >= start:
                compare(read(open_source(tmp_path), start, stop), ALL[start:stop], dense[start:stop])
    source = open_source(tmp_path)
    read(source)
    assert source.rows == 81
    compare(read(source, 35), ALL[35:], dense[35:])
    if kind in ("npz", "bin", "npy"):
        for start, stop in ((0, 81), (29, 32), (30, 31), (31, 81), (80, 81), (44, 44)):
            compare(source.take(start, stop), ALL[start:stop], dense[start:stop])


def test_a_folder_with_logs_packed_in_several_ways(tmp_path):
    for day, (end, rows) in enumerate(zip(COMPRESS, [*DAYS, ROWS])):
        write_log(tmp_path / f"day_{day}{end}", rows, end=end)
    compare(read(open_source(tmp_path)), together(*DAYS, ROWS))


BAD = {
    "missing": ("nowhere", lambda path: None, "nowhere: No such file"),
    "empty": ("a.tsv", lambda path: path.write_bytes(b""), "a.tsv: the file is empty"),
    "log cut": (
        "a.gz",
        written(lambda path, rows: write_log(path, rows, end=".gz"), cut),
        "a.gz: truncated: the archive ends early, after line",
    ),
    "log of 2": ("a", lambda path: path.write_bytes(ROWS.text().replace(b"\n0\t", b"\n2\t", 1)), r"a:\d+: field 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_error_that_names_the_file(tmp_path, case):
    check_refused(tmp_path, *BAD[case])


def test_folders_that_are_no_data(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: no data in this folder"):
        open_source(tmp_path)
    (tmp_path / "README").write_text("nothing here")
    with pytest.raises(DataError, match=f"{tmp_path}: no data in this folder"):
        open_source(tmp_path)
    np.save(tmp_path / "day_0_labels.npy", ROWS.labels)
    with pytest.raises(DataError, match=r"has day_0_labels.npy, but no day_0_dense.npy"):
        open_source(tmp_path)


@pytest.mark.parametrize("other", ["day_0.gz", "day_0.tsv", "day_0.parquet", "day_0.npz"])
def test_rows_are_not_read_twice_where_a_file_is_there_packed_and_unpacked(tmp_path, other):
    write_log(tmp_path / "day_0", ROWS)
    write = {".gz": lambda path, rows: write_log(path, rows, end=".gz"), ".tsv": write_log}
    (write | {".parquet": write_parquet, ".npz": write_npz})[(tmp_path / other).suffix](tmp_path / other, ROWS)
    for open_it in (open_source, open_sources):
        with pytest.raises(DataError, match=rf"{tmp_path}: has day_0 and {other}; expected one file of day_0"):
            open_it(tmp_path)


def test_what_is_neither_data_nor_known_is_an_error(tmp_path):
    write_log(tmp_path / "day_0", ROWS)
    (tmp_path / "notes").write_text("remember the milk\n")
    with pytest.raises(DataError, match=r"/notes:1: not a Criteo row: expected 40 tab-separated fields"):
        open_source(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"/pipe: a pipe; expected a regular file"):
        open_source(tmp_path / "pipe")


@pytest.mark.parametrize("kind", ["unlabelled", "npy", "wide", "floats"])
def test_a_folder_with_rows_of_two_kinds(tmp_path, kind):
    write_log(tmp_path / "a", ROWS)
    if kind == "unlabelled":
        write_log(tmp_path / "b", ROWS, labelled=False)
    elif kind == "npy":
        write_npy(tmp_path, "b", ROWS)
    elif kind == "wide":
        write_parquet(tmp_path / "b", ROWS, cat_0=pl.Series(ROWS.ids[:, 0]))
    else:
        write_parquet(tmp_path / "b", ROWS, **{f"int_{i}": pl.Series([0.5] * 120) for i in range(13)})
    with pytest.raises(
        DataError, match=rf"{tmp_path}/b.*: its rows have .*, those of {tmp_path}/a have .*; expected one layout"
    ):
        open_source(tmp_path)


def test_every_format_of_the_registry_opens_what_it_writes(tmp_path):
    assert list(WRITERS) == [format.name for format in REGISTRY]
    log = write_log(tmp_path / "log", ROWS)
    for format in REGISTRY:
        folder = converted(log, format.name, tmp_path / format.name)
        sources = [source for source in (open_source(folder), *open_sources(folder)) if type(source) is format.reader]
        assert sources, format.name
