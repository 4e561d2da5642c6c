"""Parquet with any of its column names and types; broken files are one clear error."""

import numpy as np
import polars as pl
import pytest

from data.formats.opening import open_source
from data.schema import MISSING
from tests.helpers.criteo import NAMES, cut, int32, make_rows, with_value, write_log, write_parquet, written
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


def test_parquet_floating_point_columns_are_taken_as_they_are(tmp_path):
    rows = make_rows(3)
    source = open_source(write_parquet(tmp_path / "a.parquet", rows, int_5=pl.Series([0.25, None, -7.5])))
    assert source.layout.dense == "f4"
    records = read(source)
    assert records["dense"][:, 5].tolist() == [0.25, 0, -7.5]
    batch = next(source.read())
    np.testing.assert_array_equal(batch.dense, records["dense"])
    assert batch.dense[0, 5] == 0.25


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
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_error_that_names_the_file(tmp_path, case):
    check_refused(tmp_path, *BAD[case])
