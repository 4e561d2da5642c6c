"""Files of every format, written by hand, come out as the rows they hold; broken ones as one clear error."""

import os
import re
import struct
import zipfile

import numpy as np
import polars as pl
import pytest

import data.formats.criteo_tsv
import data.sources
from data.formats.opening import open_source, open_sources
from data.rows import Batch
from data.schema import DataError
from tests.helpers.criteo import (
    COMPRESS,
    MISSING,
    Rows,
    int32,
    log_dense,
    make_rows,
    together,
    write_bin,
    write_log,
    write_npy,
    write_npz,
    write_parquet,
    write_processed,
)

ROWS = make_rows(120)
HOTS = (1, 3, 2, *(1 + i % 4 for i in range(23)))


def read(source, *args):
    return np.concatenate([source.layout.records(0), *source.records(*args)])


def compare(records, rows, dense=None):
    np.testing.assert_array_equal(records["label"], rows.labels)
    np.testing.assert_array_equal(records["dense"], rows.dense if dense is None else dense)
    np.testing.assert_array_equal(records["sparse"].astype(np.int64), rows.ids)


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


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.float64])
def test_npz_of_other_widths(tmp_path, kind):
    """Labels as tools write them; integers and ids of 64 bits."""
    labels = ROWS.labels.astype(kind)
    np.savez(tmp_path / "a.npz", X_int=ROWS.dense.clip(-3).astype(np.int64), X_cat=ROWS.ids, y=labels)
    compare(read(open_source(tmp_path / "a.npz")), ROWS, ROWS.dense.clip(-3))


@pytest.mark.parametrize("what", ["dense", "sparse", "labels"])
def test_a_triple_is_opened_by_any_of_its_names(tmp_path, what):
    write_npy(tmp_path, "day_0", ROWS)
    source = open_source(tmp_path / f"day_0_{what}.npy")
    assert source.name == "day_0"
    compare(read(source), ROWS, log_dense(ROWS.dense))


def test_a_folder_with_one_triple(tmp_path):
    write_npy(tmp_path, "day_0", ROWS)
    source = open_source(tmp_path)
    assert (source.name, source.rows) == ("day_0", 120)
    compare(read(source), ROWS, log_dense(ROWS.dense))


def test_a_triple_with_flat_labels(tmp_path):
    write_npy(tmp_path, "day_0", ROWS)
    np.save(tmp_path / "day_0_labels.npy", ROWS.labels)
    compare(read(open_source(tmp_path)), ROWS, log_dense(ROWS.dense))


def multi_hot(rows, seed=1):
    """{"0": ids (n, hots)...}, and the same side by side as unsigned numbers."""
    ids = np.random.default_rng(seed).integers(0, 2**32, (len(rows), sum(HOTS)))
    return {str(i): int32(part) for i, part in enumerate(np.split(ids, np.cumsum(HOTS)[:-1], 1))}, ids


@pytest.mark.parametrize("single", [True, False])
def test_multi_hot_ids(tmp_path, single):
    hots, ids = multi_hot(ROWS)
    write_npy(tmp_path, "day_0", ROWS, hots=hots, single=single)
    by_name = open_source(tmp_path / "day_0_sparse_multi_hot.npz")
    by_folder = open_source(tmp_path)
    for source in [by_name] if single else [by_name, by_folder, open_source(tmp_path / "day_0_labels.npy")]:
        assert source.name == "day_0"
        assert source.layout.hots == HOTS
        compare(read(source), Rows(ROWS.labels, ROWS.dense, ids), log_dense(ROWS.dense))
        compare(source.take(7, 60), Rows(ROWS.labels, ROWS.dense, ids)[7:60], log_dense(ROWS.dense[7:60]))
        assert [x.stop - x.start for x in source.layout.features] == list(HOTS)
    if single:
        compare(read(by_folder), ROWS, log_dense(ROWS.dense))


COLUMNS = {
    "own": ["label"] + [f"int_{i}" for i in range(13)] + [f"cat_{i}" for i in range(26)],
    "short": ["label"] + [f"I{i + 1}" for i in range(13)] + [f"C{i + 1}" for i in range(26)],
    "long": ["label"]
    + [f"integer_feature_{i + 1}" for i in range(13)]
    + [f"categorical_feature_{i + 1}" for i in range(26)],
}


@pytest.mark.parametrize("names", COLUMNS)
@pytest.mark.parametrize("labelled", [True, False])
def test_parquet_columns(tmp_path, names, labelled):
    """In any order, among others."""
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    frame = pl.read_parquet(path)
    frame.columns = COLUMNS[names]
    if not labelled:
        frame = frame.drop("label")
    frame.select(pl.lit("x").alias("other"), *reversed(frame.columns)).write_parquet(path)
    source = open_source(path)
    assert source.labelled == labelled
    records = read(source)
    if labelled:
        compare(records, ROWS)
    else:
        assert "label" not in records.dtype.names
        np.testing.assert_array_equal(records["dense"], ROWS.dense)
        np.testing.assert_array_equal(records["sparse"], ROWS.ids)


def test_parquet_hexadecimal_text(tmp_path):
    text = [None, "", "0", "00000000", "1f", "FFFFFFFF", "0000abcd", "DeadBeef"]
    rows = make_rows(len(text))
    rows.ids[:, 3] = [0, 0, 0, 0, 0x1F, 0xFFFFFFFF, 0xABCD, 0xDEADBEEF]
    source = open_source(write_parquet(tmp_path / "a.parquet", rows, cat_3=pl.Series(text)))
    assert source.layout.ids == "u4"
    compare(read(source), rows)


@pytest.mark.parametrize("kind", [pl.Int64, pl.UInt64])
def test_parquet_ids_of_64_bits(tmp_path, kind):
    rows = make_rows(4)
    values = [0, 2**40 + 3, 2**63 - 1, None if kind == pl.UInt64 else -5]
    rows.ids[:, 25] = [0, 2**40 + 3, 2**63 - 1, 0 if kind == pl.UInt64 else -5]
    source = open_source(write_parquet(tmp_path / "a.parquet", rows, cat_25=pl.Series(values, dtype=kind)))
    assert source.layout.ids == "i8"
    compare(read(source), rows)
    np.testing.assert_array_equal(next(source.read()).sparse, rows.ids)


def test_parquet_unsigned_ids_above_63_bits_keep_their_bits(tmp_path):
    rows = make_rows(2)
    values = pl.Series([2**64 - 1, 2**63], dtype=pl.UInt64)
    records = read(open_source(write_parquet(tmp_path / "a.parquet", rows, cat_0=values)))
    assert records["sparse"][:, 0].tolist() == [-1, -(2**63)]


def test_parquet_signed_32_bit_ids_are_unsigned(tmp_path):
    signed = {f"cat_{i}": pl.Series(int32(ROWS.ids[:, i])) for i in range(26)}
    source = open_source(write_parquet(tmp_path / "a.parquet", ROWS, **signed))
    assert source.layout.ids == "u4"
    compare(read(source), ROWS)


def test_parquet_floating_point_columns_are_taken_as_they_are(tmp_path):
    rows = make_rows(3)
    source = open_source(write_parquet(tmp_path / "a.parquet", rows, int_5=pl.Series([0.25, None, -7.5])))
    assert source.layout.dense == "f4"
    records = read(source)
    assert records["dense"][:, 5].tolist() == [0.25, 0, -7.5]
    batch = next(source.read())
    np.testing.assert_array_equal(batch.dense, records["dense"])
    assert batch.dense[0, 5] == 0.25


# -- Folders ----------------------------------------------------------------------------------------------------------

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


# -- What can't be read -----------------------------------------------------------------------------------------------


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def change(path, at, value):
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)


def arrays(**replaced):
    """A day_N.npz with other arrays; None: without."""

    def make(path):
        all_of_them = {"X_int": ROWS.dense, "X_cat_t": int32(ROWS.ids).T.copy(), "y": ROWS.labels} | replaced
        np.savez(path, **{name: array for name, array in all_of_them.items() if array is not None})

    return make


def triple(**replaced):
    """A triple with other arrays; None: without."""

    def make(path):
        write_npy(path.parent, "day_0", ROWS)
        for what, array in replaced.items():
            file = path.with_name(f"day_0_{what}.npy")
            file.unlink() if array is None else np.save(file, array)

    return make


def columns(**replaced):
    return lambda path: write_parquet(path, ROWS, **{k: v if v is None else pl.Series(v) for k, v in replaced.items()})


def written(write, then):
    def make(path):
        write(path, ROWS)
        then(path)

    return make


def with_value(array, at, value):
    array = array.copy()
    array[at] = value
    return array


def member_cut(path):
    """A .npz whose archive is whole and whose array is too short for its header."""
    write_npz(path, ROWS)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in sorted(members.items(), reverse=True):
            new.writestr(name, content[:-8] if name.startswith("X_int") else content)


def long_header(path):
    np.save(path.with_name("x.npy"), ROWS.labels)
    content = path.with_name("x.npy").read_bytes()
    path.with_name("x.npy").unlink()
    path.write_bytes(content[:8] + struct.pack("<H", 65535) + content[10:] + bytes(70000))


def header(path, shape):
    """A triple whose first array has another shape in its header."""
    triple()(path)
    content = path.read_bytes()
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    path.write_bytes(content[:10] + text + content[128:])


def encrypted(path):
    write_npz(path, ROWS, np.savez_compressed)
    content = bytearray(path.read_bytes())
    for magic, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):  # bit 0 of the flags
        where = content.find(magic)
        while where >= 0:
            content[where + at] |= 1
            where = content.find(magic, where + 1)
    path.write_bytes(content)


FLOATS = log_dense(ROWS.dense)
TEXT = [f"{x:x}" for x in ROWS.ids[:, 0]]

BAD = {
    # .bin
    "bin cut in a row": (
        "a.bin",
        written(write_bin, lambda path: cut(path, 0.503)),
        r"a.bin: expected rows of 160 bytes \(label, 13 integers, 26 ids\), got 9657 bytes",
    ),
    "bin empty": ("a.bin", lambda path: path.write_bytes(b""), r"a.bin: expected rows of 160 bytes .*, got 0 bytes"),
    "bin labels": (
        "a.bin",
        written(write_bin, lambda path: change(path, 160 * 70, b"\7\0\0\0")),
        r"a.bin: row 71: label: expected 0 or 1, got 7",
    ),
    # .npz
    "zip": ("a.npz", lambda path: zipfile.ZipFile(path, "w").close(), "a.npz: expected arrays X_int"),
    "zip of others": ("a.npz", lambda path: np.savez(path, x=np.ones(3)), r"a.npz: expected arrays .*, got \['x'\]"),
    "npz cut": ("a.npz", written(write_npz, cut), "a.npz: not a .npz file, or one that ends early"),
    "npz compressed cut": (
        "a.npz",
        written(lambda path, rows: write_npz(path, rows, np.savez_compressed), cut),
        "a.npz: not a .npz file, or one that ends early",
    ),
    "npz corrupt": (
        "a.npz",
        written(
            lambda path, rows: write_npz(path, rows, np.savez_compressed), lambda path: change(path, 500, bytes(100))
        ),
        "a.npz: X_int: corrupt archive",
    ),
    "npz encrypted": ("a.npz", encrypted, "a.npz: X_int: corrupt archive: .*encrypted"),
    "npz member cut": ("a.npz", member_cut, r"a.npz: X_int: truncated: \(120, 13\) i4 in 6232 bytes"),
    "npz of no rows": ("a.npz", lambda path: write_npz(path, ROWS[:0]), "a.npz: the file is empty"),
    "npy of no rows": (
        "day_0_dense.npy",
        lambda path: write_npy(path.parent, "day_0", ROWS[:0]),
        "day_0_dense.npy: the file is empty",
    ),
    "no labels": ("a.npz", arrays(y=None), "a.npz: expected arrays X_int, X_cat or X_cat_t, and y"),
    "no ids": ("a.npz", arrays(X_cat_t=None), "a.npz: expected arrays X_int"),
    "no integers": ("a.npz", arrays(X_int=None), "a.npz: expected arrays X_int"),
    "12 integers": (
        "a.npz",
        arrays(X_int=ROWS.dense[:, :12]),
        r"a.npz: X_int: expected integers \(120, 13\), got i4 \(120, 12\)",
    ),
    "integers of one dimension": (
        "a.npz",
        arrays(X_int=ROWS.dense[:, 0]),
        r"a.npz: X_int: expected integers \(120, 13\), got i4 \(120,\)",
    ),
    "integers are floats": (
        "a.npz",
        arrays(X_int=FLOATS),
        r"a.npz: X_int: expected integers \(120, 13\), got f4 \(120, 13\)",
    ),
    "integers of 64 bits": (
        "a.npz",
        arrays(X_int=with_value(ROWS.dense.clip(0).astype(np.int64), (110, 3), 2**31)),
        "a.npz: X_int: expected integers of 32 bits, got 2147483648",
    ),
    "the smallest integer of 64 bits": (
        "a.npz",
        arrays(X_int=with_value(ROWS.dense.clip(0).astype(np.int64), (110, 3), -(2**63))),
        "a.npz: X_int: expected integers of 32 bits, got -9223372036854775808",
    ),
    "ids not by column": (
        "a.npz",
        arrays(X_cat_t=int32(ROWS.ids)),
        r"a.npz: X_cat_t: expected numbers \(26, 120\), got i4 \(120, 26\)",
    ),
    "ids by column": (
        "a.npz",
        arrays(X_cat_t=None, X_cat=int32(ROWS.ids).T.copy()),
        r"a.npz: X_cat: expected numbers \(120, 26\), got i4 \(26, 120\)",
    ),
    "ids in Fortran order": ("a.npz", arrays(X_cat_t=int32(ROWS.ids).T), "a.npz: expected an array of numbers"),
    "ids not whole": (
        "a.npz",
        arrays(X_cat_t=None, X_cat=with_value(ROWS.ids.astype(float), (100, 2), 1.5)),
        "a.npz: ids: expected integers of 32 bits",
    ),
    "ids not a number": (
        "a.npz",
        arrays(X_cat_t=None, X_cat=with_value(ROWS.ids.astype(float), (100, 2), np.nan)),
        "a.npz: ids: expected integers of 32 bits",
    ),
    "ids too large": (
        "a.npz",
        arrays(X_cat_t=None, X_cat=with_value(ROWS.ids, (100, 2), 2**32)),
        "a.npz: ids: expected integers of 32 bits, got 0 to 4294967296",
    ),
    "ids too small": (
        "a.npz",
        arrays(X_cat_t=None, X_cat=with_value(ROWS.ids, (100, 2), -(2**31) - 1)),
        "a.npz: ids: expected integers of 32 bits, got -2147483649",
    ),
    "ids are text": (
        "a.npz",
        arrays(X_cat_t=np.full((26, 120), "ab")),
        r"a.npz: expected an array of numbers, row by row, got <U2, \(26, 120\)",
    ),
    "labels of other rows": (
        "a.npz",
        arrays(y=ROWS.labels[1:]),
        r"a.npz: y: expected numbers \(120,\), got i4 \(119,\)",
    ),
    "labels 2": ("a.npz", arrays(y=with_value(ROWS.labels, 90, 2)), "a.npz: row 91: label: expected 0 or 1, got 2"),
    "labels -1": ("a.npz", arrays(y=with_value(ROWS.labels, 90, -1)), "a.npz: row 91: label: .* got -1"),
    "labels 0.5": (
        "a.npz",
        arrays(y=with_value(ROWS.labels.astype(float), 90, 0.5)),
        "a.npz: row 91: label: expected 0 or 1, got 0.5",
    ),
    "labels NaN": (
        "a.npz",
        arrays(y=with_value(ROWS.labels.astype(float), 90, np.nan)),
        "a.npz: row 91: label: expected 0 or 1, got nan",
    ),
    "a number": ("a.npz", arrays(y=np.int32(3)), "a.npz: expected an array of numbers"),
    # .npy
    "npy of another name": ("a.npy", lambda path: np.save(path, FLOATS), "a.npy: expected a name like day_0_dense.npy"),
    "no dense": ("day_0_sparse.npy", triple(dense=None), "day_0_dense.npy: No such file"),
    "no sparse": ("day_0_dense.npy", triple(sparse=None), "day_0_sparse.npy: No such file"),
    "no labels file": ("day_0_dense.npy", triple(labels=None), "day_0_labels.npy: No such file"),
    "dense are integers": (
        "day_0_dense.npy",
        triple(dense=ROWS.dense),
        r"day_0_dense.npy: array: expected f4 \(120, 13\), got i4 \(120, 13\)",
    ),
    "dense of 64 bits": ("day_0_dense.npy", triple(dense=FLOATS.astype(float)), "day_0_dense.npy: array: .* got f8"),
    "dense of other bytes": ("day_0_dense.npy", triple(dense=FLOATS.astype(">f4")), "day_0_dense.npy: array: expected"),
    "dense of no columns": ("day_0_dense.npy", triple(dense=FLOATS[:, :0]), "day_0_dense.npy: "),
    "dense in Fortran order": (
        "day_0_dense.npy",
        triple(dense=np.asfortranarray(FLOATS)),
        "day_0_dense.npy: expected an array of numbers, row by row",
    ),
    "dense NaN": (
        "day_0_dense.npy",
        triple(dense=with_value(FLOATS, (80, 3), np.nan)),
        "day_0_dense.npy: row 81: expected finite numbers",
    ),
    "dense infinite": (
        "day_0_dense.npy",
        triple(dense=with_value(FLOATS, (80, 3), -np.inf)),
        "day_0_dense.npy: row 81: expected finite numbers",
    ),
    "sparse of other rows": (
        "day_0_dense.npy",
        triple(sparse=int32(ROWS.ids)[:119]),
        r"day_0_sparse.npy: array: expected i4 or i8 \(120, 26\), got i4 \(119, 26\)",
    ),
    "sparse of 25": ("day_0_dense.npy", triple(sparse=int32(ROWS.ids)[:, :25]), "day_0_sparse.npy: array: expected"),
    "sparse of floats": ("day_0_dense.npy", triple(sparse=ROWS.ids * 1.0), "day_0_sparse.npy: array: .* got f8"),
    "labels of two columns": (
        "day_0_dense.npy",
        triple(labels=np.stack([ROWS.labels] * 2, 1)),
        r"day_0_labels.npy: array: expected i4 \(120, 1\), got i4 \(120, 2\)",
    ),
    "npy labels": (
        "day_0_dense.npy",
        triple(labels=with_value(ROWS.labels, 100, 3)),
        "day_0_.*.npy: row 101: label: expected 0 or 1, got 3",
    ),
    "npy cut": (
        "day_0_dense.npy",
        lambda path: (triple()(path), cut(path.with_name("day_0_sparse.npy"))),
        "day_0_sparse.npy: truncated: expected 120 rows, got 71",
    ),
    "npy cut in the header": (
        "day_0_dense.npy",
        lambda path: (triple()(path), cut(path, 0.01)),
        "day_0_dense.npy: not a .npy array",
    ),
    "npy shape": ("day_0_dense.npy", lambda path: header(path, "(-5, 13)"), "day_0_dense.npy: expected an array"),
    "npy huge": (
        "day_0_dense.npy",
        lambda path: header(path, f"(5, {2**40})"),
        "day_0_dense.npy: expected an array of numbers",
    ),
    "npy longer than the file": (
        "day_0_dense.npy",
        lambda path: header(path, f"({2**40}, 13)"),
        "day_0_dense.npy: truncated: expected 1099511627776 rows, got 120",
    ),
    "npy header": ("day_0_dense.npy", long_header, "day_0_dense.npy: not a .npy array"),
    # Parquet
    "no column": ("a.parquet", columns(cat_3=None), "a.parquet: expected columns .*; there is no cat_3"),
    "no integer column": ("a.parquet", columns(int_12=None), "a.parquet: expected columns .*; there is no int_12"),
    "not hexadecimal": (
        "a.parquet",
        columns(cat_0=with_value(np.array(TEXT, dtype=object), 60, "xyz").tolist()),
        r"a.parquet: row 61, column cat_0: expected up to 8 hexadecimal digits, got 'xyz'",
    ),
    "9 digits": (
        "a.parquet",
        columns(cat_0=with_value(np.array(TEXT, dtype=object), 60, "123456789").tolist()),
        r"a.parquet: row 61, column cat_0: expected up to 8 hexadecimal digits",
    ),
    "a sign": (
        "a.parquet",
        columns(cat_0=with_value(np.array(TEXT, dtype=object), 119, "-1").tolist()),
        r"a.parquet: row 120, column cat_0: expected up to 8 hexadecimal digits",
    ),
    "ids are floats": ("a.parquet", columns(cat_0=[1.0] * 120), "a.parquet: column cat_0: expected integers or"),
    "ids are of 128 bits": (
        "a.parquet",
        columns(cat_0=pl.Series([1] * 120, dtype=pl.Int128)),
        "a.parquet: column cat_0: expected integers or",
    ),
    "integers are decimals": (
        "a.parquet",
        columns(int_0=pl.Series([1] * 120).cast(pl.Decimal(10, 2))),
        "a.parquet: column int_0: expected numbers, got",
    ),
    "integers are text": ("a.parquet", columns(int_0=["1"] * 120), "a.parquet: column int_0: expected numbers, got"),
    "wide integers": (
        "a.parquet",
        columns(int_0=[1] * 119 + [2**31]),
        "a.parquet: row 120, column int_0: expected an integer of 32 bits, got 2147483648",
    ),
    "parquet NaN": (
        "a.parquet",
        columns(int_0=[1.0] * 119 + [float("nan")]),
        "a.parquet: row 120, column int_0: expected a finite number, got nan",
    ),
    "parquet infinite": ("a.parquet", columns(int_0=[1e300] * 120), "row 1, column int_0: expected a finite number"),
    "parquet labels": ("a.parquet", columns(label=[1] * 100 + [2] * 20), "a.parquet: row 101: label: .* got 2"),
    "parquet labels null": ("a.parquet", columns(label=[1] * 119 + [None]), "a.parquet: row 120: label: expected"),
    "parquet labels text": ("a.parquet", columns(label=["yes"] * 120), "a.parquet: row 1: label: expected 0 or 1"),
    "parquet labels half": ("a.parquet", columns(label=[0.5] * 120), "a.parquet: row 1: label: expected 0 or 1"),
    "no rows": ("a.parquet", lambda path: write_parquet(path, ROWS[:0]), "a.parquet: the file is empty"),
    "parquet cut": ("a.parquet", written(write_parquet, cut), "a.parquet: not a Parquet file that can be read"),
    # Logs
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
    name, make, message = BAD[case]
    make(tmp_path / name)
    with pytest.raises(DataError) as error:
        read(open_source(tmp_path / name))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
    assert re.search(message, str(error.value)), str(error.value)


def test_ids_of_64_bits_as_torchrec_writes_them(tmp_path):
    path = write_npy(tmp_path, "day_0", ROWS, single=False)
    wide = ROWS.ids * 2**20 - 5
    np.save(tmp_path / "day_0_sparse_contig_freq.npy", wide)
    np.testing.assert_array_equal(Batch.concatenate(list(open_source(path).read())).sparse, wide)
    np.save(tmp_path / "day_0_sparse.npy", ROWS.ids)  # comes first, unless the other is named
    np.testing.assert_array_equal(Batch.concatenate(list(open_source(tmp_path).read())).sparse, ROWS.ids)
    named = open_source(tmp_path / "day_0_sparse_contig_freq.npy")
    assert named.name == "day_0"
    np.testing.assert_array_equal(Batch.concatenate(list(named.read())).sparse, wide)
    hots, ids = multi_hot(ROWS)
    hots["1"] = hots["1"].astype(np.int64) + 2**40
    np.savez(tmp_path / "day_0_sparse_multi_hot.npz", **hots)
    several = open_source(tmp_path / "day_0_sparse_multi_hot.npz")
    at = several.layout.features[1]
    batch = Batch.concatenate(list(several.read()))
    np.testing.assert_array_equal(batch.sparse[:, at], hots["1"])
    np.testing.assert_array_equal(np.delete(batch.sparse, at, 1), np.delete(ids, at, 1))


def test_multi_hot_ids_that_do_not_fit(tmp_path):
    hots, _ = multi_hot(ROWS)
    path = tmp_path / "day_0_sparse_multi_hot.npz"
    for changed, message in (
        ({"3": hots["3"][:-1]}, r"3: expected i4 or i8 \(120, hots\), got i4 \(119, 1\)"),
        ({"3": hots["3"].astype(np.int16)}, "3: expected i4"),
        ({"3": hots["3"][:, 0]}, "3: expected i4"),
        ({"3": hots["3"][:, :0]}, "expected an array of numbers, row by row"),
        ({"26": hots["3"]}, "expected arrays 0 to 25"),
    ):
        write_npy(tmp_path, "day_0", ROWS, hots=hots | changed, single=False)
        with pytest.raises(DataError, match=f"{path}: {message}"):
            read(open_source(tmp_path))
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(DataError, match=f"{path}: not a .npz file"):
        open_source(path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("what", ["X_int", "X_cat_t", "y"])
def test_npz_with_pickles_is_refused_and_never_unpickled(tmp_path, save, what):
    trap = np.empty((120,), dtype=object)
    trap[:] = [Trap(tmp_path / "sprung")] * 120
    good = {"X_int": ROWS.dense, "X_cat_t": int32(ROWS.ids).T.copy(), "y": ROWS.labels}
    save(tmp_path / "a.npz", **(good | {what: trap}))
    with pytest.raises(DataError, match=r"a.npz: expected an array of numbers"):
        read(open_source(tmp_path / "a.npz"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("what", ["dense", "sparse", "labels"])
def test_npy_with_pickles_is_refused_and_never_unpickled(tmp_path, what):
    trap = np.empty((120, 13), dtype=object)
    trap[:] = Trap(tmp_path / "sprung")
    triple(**{what: trap})(tmp_path / "x")
    with pytest.raises(DataError, match=rf"day_0_{what}.npy: expected an array of numbers"):
        read(open_source(tmp_path / "day_0_dense.npy"))
    assert not (tmp_path / "sprung").exists()


def test_folders_that_are_no_data(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: no data in this folder"):
        open_source(tmp_path)
    (tmp_path / "README").write_text("nothing here")
    with pytest.raises(DataError, match=f"{tmp_path}: no data in this folder"):
        open_source(tmp_path)
    np.save(tmp_path / "day_0_labels.npy", ROWS.labels)
    with pytest.raises(DataError, match=r"has day_0_labels.npy, but no day_0_dense.npy"):
        open_source(tmp_path)


def test_a_folder_with_a_part_of_a_second_triple(tmp_path):
    write_npy(tmp_path, "day_0", ROWS)
    write_npy(tmp_path, "day_1", ROWS)
    (tmp_path / "day_1_dense.npy").unlink()
    with pytest.raises(DataError, match=r"day_1_dense.npy"):
        open_source(tmp_path)


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
        write_parquet(tmp_path / "b", ROWS, int_0=pl.Series([0.5] * 120))
    with pytest.raises(
        DataError, match=rf"{tmp_path}/b.*: its rows have .*, those of {tmp_path}/a have .*; expected one layout"
    ):
        open_source(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    source = open_source(write_bin(tmp_path / "a.bin", ROWS))
    cut(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a.bin: truncated: it ends at byte 11520"):
        read(source)


def test_a_bad_row_in_a_later_piece(tmp_path, monkeypatch):
    """Has its number in the file, and is no matter to the rows before it."""
    monkeypatch.setattr(data.sources, "PIECE_ROWS", 50)
    rows = Rows(with_value(ROWS.labels, 50, 9), ROWS.dense, ROWS.ids)
    source = open_source(write_bin(tmp_path / "a.bin", rows))
    compare(read(source, 0, 50), ROWS[:50])
    with pytest.raises(DataError, match=r"a.bin: row 51: label: expected 0 or 1, got 9"):
        read(source)


def test_a_folder_with_multi_hot_ids_of_other_features(tmp_path):
    """As many in all."""
    hots, _ = multi_hot(ROWS)
    write_npy(tmp_path, "day_0", ROWS, hots=hots, single=False)
    write_npy(tmp_path, "day_1", ROWS, hots=hots | {"0": hots["1"], "1": hots["0"]}, single=False)
    with pytest.raises(DataError, match=r"day_1.*: its rows have .*expected one layout"):
        open_source(tmp_path)
