"""Parquet with any of its column names and types; broken files are one clear error."""

import os

import numpy as np
import polars as pl
import pytest

import data.formats.parquet
from data.formats.opening import open_source
from data.schema import MISSING, DataError
from tests.helpers.criteo import (
    NAMES,
    cut,
    int32,
    log_dense,
    make_rows,
    with_value,
    write_log,
    write_parquet,
    written,
)
from tests.helpers.sources import check_refused, compare, converted, names, read

ROWS = make_rows(120)
LOGGED = make_rows(250)  # what the writers get, by way of a log


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("log") / "day_0", LOGGED)


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
    """Columns are in any order, among others."""
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


def floats(rows, missing=None):
    """Return the integer columns as floating-point numbers, with a value for the missing ones."""
    return {
        f"int_{i}": pl.Series([missing if x == MISSING else float(x) for x in rows.dense[:, i].tolist()], dtype=kind)
        for i, kind in zip(range(13), [pl.Float64, pl.Float32] * 7)
    }


@pytest.mark.parametrize("columns", [range(13), [0], [3, 12]], ids=str)
def test_whole_numbers_are_integers_whatever_their_type(tmp_path, columns):
    """pandas writes integers as floating-point numbers where one of them is missing."""
    replaced = {name: column for i, (name, column) in enumerate(floats(ROWS).items()) if i in columns}
    source = open_source(write_parquet(tmp_path / "a.parquet", ROWS, **replaced))
    assert source.layout.dense == "i4"
    compare(read(source), ROWS)
    np.testing.assert_allclose(next(source.read()).dense, log_dense(ROWS.dense[:65536]), rtol=1e-6)


def test_other_numbers_are_taken_as_they_are(tmp_path):
    rows = make_rows(3)
    columns = floats(rows) | {"int_5": pl.Series([0.25, None, -7.5])}
    source = open_source(write_parquet(tmp_path / "a.parquet", rows, **columns))
    assert source.layout.dense == "f4"
    records = read(source)
    assert records["dense"][:, 5].tolist() == [0.25, 0, -7.5]
    np.testing.assert_array_equal(records["dense"][:, 4], np.where(rows.dense[:, 4] == MISSING, 0, rows.dense[:, 4]))
    np.testing.assert_array_equal(next(source.read()).dense, records["dense"])


def test_a_file_of_both_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", make_rows(3), int_5=pl.Series([0.25, None, -7.5]))
    with pytest.raises(
        DataError, match=r"a.parquet: column int_5 holds numbers that are not integers, column int_0 int"
    ):
        open_source(path)


def test_a_fraction_behind_the_first_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data.formats.parquet, "_HEAD_ROWS", 50)
    column = floats(ROWS)["int_6"].to_list()
    column[80] = 0.5
    path = write_parquet(tmp_path / "a.parquet", ROWS, int_6=pl.Series(column))
    with pytest.raises(DataError, match=r"row 81, column int_6: expected an integer of 32 bits, got 0.5"):
        read(path)


TEXTS = [None, "", "0", "1f", "FFFFFFFF", "0000abcd"]


@pytest.mark.parametrize(
    "column",
    [
        pl.Series(TEXTS, dtype=pl.Categorical),
        pl.Series(TEXTS, dtype=pl.Enum(TEXTS[1:])),
        pl.Series([None if text is None else text.encode() for text in TEXTS]),
        pl.Series([None, None, 0, 0x1F, 0xFFFFFFFF, 0xABCD], dtype=pl.UInt32),
        pl.Series([0, None, 0, 0x1F, -1, 0xABCD], dtype=pl.Int32),
    ],
    ids=lambda column: str(column.dtype)[:11],
)
@pytest.mark.parametrize("wide", [False, True])
def test_categories_are_what_their_column_holds(tmp_path, column, wide):
    rows = make_rows(len(column))
    rows.ids[:, 3] = [0, 0, 0, 0x1F, 0xFFFFFFFF, 0xABCD]
    other = {"cat_9": pl.Series(rows.ids[:, 9])} if wide else {}
    source = open_source(write_parquet(tmp_path / "a.parquet", rows, cat_3=column, **other))
    assert source.layout.ids == ("i8" if wide else "u4")
    compare(read(source), rows)


@pytest.mark.parametrize("kind", [pl.Int8, pl.Int16, pl.UInt8, pl.UInt16, pl.Int64, pl.Boolean, pl.Float64])
def test_numbers_of_any_width(tmp_path, kind):
    rows = make_rows(4)
    rows.dense[:, 2] = rows.ids[:, 8] = rows.labels[:] = [0, 1, 1, 0]
    column = pl.Series([0, 1, 1, 0]).cast(kind)
    source = open_source(write_parquet(tmp_path / "a.parquet", rows, int_2=column, cat_8=column, label=column))
    compare(read(source), rows)


def test_columns_of_nulls_are_missing_values(tmp_path):
    rows = make_rows(4)
    rows.dense[:, 2], rows.ids[:, 8] = MISSING, 0
    nulls = pl.Series([None] * 4, dtype=pl.Null)
    compare(read(write_parquet(tmp_path / "a.parquet", rows, int_2=nulls, cat_8=nulls)), rows)


def test_ids_that_pandas_made_floating_point(tmp_path):
    rows = make_rows(3)
    rows.ids[:, 4] = [0, 2**53, -5]
    source = open_source(write_parquet(tmp_path / "a.parquet", rows, cat_4=pl.Series([None, 2.0**53, -5.0])))
    assert source.layout.ids == "i8"  # as where no value is missing
    compare(read(source), rows)


def test_a_file_that_holds_fewer_rows_than_it_says_is_refused(tmp_path, monkeypatch):
    source = open_source(write_parquet(tmp_path / "a.parquet", ROWS))
    write_parquet(tmp_path / "a.parquet", ROWS[:70])
    for start in (0, 60, 100):
        with pytest.raises(DataError, match=r"a.parquet: damaged: expected 120 rows, as it says itself, got (70|100)"):
            list(source.records(start))


def test_a_panic_of_polars_is_an_error_of_the_file(tmp_path, monkeypatch):
    def panic(*args, **kwargs):
        raise pl.exceptions.PanicException("called `Option::unwrap()` on a `None` value\nand more")

    path = write_parquet(tmp_path / "a.parquet", ROWS)
    source = open_source(path)
    monkeypatch.setattr(pl.LazyFrame, "collect_batches", lambda *args, **kwargs: iter(panic, None))
    with pytest.raises(DataError, match=r"a.parquet: after row 0: called `Option::unwrap\(\)` on a `None` value$"):
        read(source)
    monkeypatch.setattr(pl.LazyFrame, "collect_schema", panic)
    with pytest.raises(DataError, match=r"a.parquet: not a Parquet file that can be read: called"):
        open_source(path)


def test_names_that_are_not_utf8_or_look_like_patterns(tmp_path):
    for name in (b"tr\xe9in.parquet", b"a*b.parquet", b"[x].parquet", b"s3:x.parquet"):
        path = tmp_path / os.fsdecode(name)
        write_parquet(tmp_path / "plain", ROWS)
        (tmp_path / "plain").rename(path)
        compare(read(path), ROWS)


def test_parquet(tmp_path, log):
    folder = converted(log, "parquet", tmp_path / "out")
    assert names(folder) == [f"day_0-0000{i}.parquet" for i in range(3)]
    frame = pl.concat([pl.read_parquet(folder / name) for name in names(folder)])
    assert frame.columns == ["label", *NAMES]
    assert set(frame.dtypes) == {pl.Int32, pl.UInt32}
    np.testing.assert_array_equal(frame["label"], LOGGED.labels)
    values = frame.select(NAMES[:13]).rows()
    assert values == [tuple(None if x == MISSING else x for x in row) for row in LOGGED.dense.tolist()]
    np.testing.assert_array_equal(frame.select(NAMES[13:]).to_numpy(), LOGGED.ids)


def columns(**replaced):
    return lambda path: write_parquet(path, ROWS, **{k: v if v is None else pl.Series(v) for k, v in replaced.items()})


TEXT = [f"{x:x}" for x in ROWS.ids[:, 0]]


BAD = {
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
    "ids are floats": (
        "a.parquet",
        columns(cat_0=[1.0] * 119 + [1.5]),
        "a.parquet: row 120, column cat_0: expected an integer, got 1.5",
    ),
    "ids are rounded": ("a.parquet", columns(cat_0=[1e17] * 120), "row 1, column cat_0: expected an integer, got 1e"),
    "ids are not a number": (
        "a.parquet",
        columns(cat_0=[float("nan")] * 120),
        "row 1, column cat_0: expected an integer, got nan",
    ),
    "ids are short floats": (
        "a.parquet",
        columns(cat_0=pl.Series([1.0] * 120, dtype=pl.Float32)),
        "a.parquet: column cat_0: expected integers or",
    ),
    "ids are dates": (
        "a.parquet",
        columns(cat_0=pl.Series([1] * 120, dtype=pl.Date)),
        "a.parquet: column cat_0: expected integers or hexadecimal text, got Date",
    ),
    "ids are lists": ("a.parquet", columns(cat_0=[[1]] * 120), "a.parquet: column cat_0: .* got List"),
    "ids are bytes": (
        "a.parquet",
        columns(cat_0=[b"1f"] * 119 + [b"\xff"]),
        "a.parquet: column cat_0: expected text, got bytes",
    ),
    "a word in a dictionary": (
        "a.parquet",
        columns(cat_0=pl.Series(["1f"] * 119 + ["word"], dtype=pl.Categorical)),
        "row 120, column cat_0: expected up to 8 hexadecimal digits, got 'word'",
    ),
    "integers are dates": ("a.parquet", columns(int_0=pl.Series([1] * 120, dtype=pl.Date)), "int_0: .* got Date"),
    "labels are dates": ("a.parquet", columns(label=pl.Series([1] * 120, dtype=pl.Date)), "label: .* got Date"),
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
    "parquet infinite": ("a.parquet", columns(int_0=[np.inf] * 120), "row 1, column int_0: expected a finite number"),
    "parquet huge": ("a.parquet", columns(int_0=[1e300] * 120), "row 1, column int_0: expected an integer of 32 bits"),
    "parquet too huge for the model": (
        "a.parquet",
        lambda path: write_parquet(path, ROWS, **floats(ROWS) | {"int_0": pl.Series([0.5] * 119 + [1e300])}),
        "row 120, column int_0: expected a finite number, got 1e",
    ),
    "parquet labels": ("a.parquet", columns(label=[1] * 100 + [2] * 20), "a.parquet: row 101: label: .* got 2"),
    "parquet labels null": ("a.parquet", columns(label=[1] * 119 + [None]), "a.parquet: row 120: label: expected"),
    "parquet labels text": ("a.parquet", columns(label=["yes"] * 120), "a.parquet: row 1: label: expected 0 or 1"),
    "parquet labels half": ("a.parquet", columns(label=[0.5] * 120), "a.parquet: row 1: label: expected 0 or 1"),
    "no rows": ("a.parquet", lambda path: write_parquet(path, ROWS[:0]), "a.parquet: the file is empty"),
    "parquet cut": ("a.parquet", written(write_parquet, cut), "a.parquet: not a Parquet file that can be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_error_that_names_the_file(tmp_path, case):
    check_refused(tmp_path, *BAD[case])
