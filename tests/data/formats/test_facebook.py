"""Files of facebookresearch/dlrm, written by hand and by the writers; broken ones are one clear error."""

import zipfile

import numpy as np
import pytest

import data.formats.criteo_tsv
import data.sources
from data.formats.opening import open_source
from data.schema import DataError
from tests.helpers.criteo import (
    Rows,
    Trap,
    change,
    cut,
    int32,
    log_dense,
    make_rows,
    with_value,
    without_missing,
    write_bin,
    write_log,
    write_npz,
    written,
)
from tests.helpers.sources import check_refused, compare, converted, names, read

ROWS = make_rows(120)
LOGGED = make_rows(250)  # what the writers get, by way of a log


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("log") / "day_0", LOGGED)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.float64])
def test_npz_of_other_widths(tmp_path, kind):
    """Labels as tools write them; integers and ids of 64 bits."""
    labels = ROWS.labels.astype(kind)
    np.savez(tmp_path / "a.npz", X_int=ROWS.dense.clip(-3).astype(np.int64), X_cat=ROWS.ids, y=labels)
    compare(read(open_source(tmp_path / "a.npz")), ROWS, ROWS.dense.clip(-3))


def test_npz(tmp_path, log):
    folder = converted(log, "npz", tmp_path / "out")
    assert names(folder) == ["day_0.npz"]
    with zipfile.ZipFile(folder / "day_0.npz") as archive:  # no time of its own in it
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(folder / "day_0.npz", allow_pickle=False) as npz:
        assert set(npz) == {"X_int", "X_cat_t", "y"}
        assert {npz[name].dtype for name in npz} == {np.dtype("<i4")}
        np.testing.assert_array_equal(npz["X_int"], without_missing(LOGGED.dense))
        np.testing.assert_array_equal(npz["X_cat_t"], int32(LOGGED.ids).T)
        np.testing.assert_array_equal(npz["y"], LOGGED.labels)


def test_bin(tmp_path, log):
    folder = converted(log, "bin", tmp_path / "out")
    assert names(folder) == ["day_0.bin"]
    rows = np.fromfile(folder / "day_0.bin", "<i4").reshape(-1, 40)
    dense = np.maximum(LOGGED.dense, 0)  # negative ones are 0 as well, as facebookresearch's preprocessing has them
    expected = np.concatenate([LOGGED.labels[:, None], dense, int32(LOGGED.ids)], 1)
    np.testing.assert_array_equal(rows, expected)


def arrays(**replaced):
    """Return a function that writes a day_N.npz with other arrays, or without those that are None."""

    def make(path):
        all_of_them = {"X_int": ROWS.dense, "X_cat_t": int32(ROWS.ids).T.copy(), "y": ROWS.labels} | replaced
        np.savez(path, **{name: array for name, array in all_of_them.items() if array is not None})

    return make


def member_cut(path):
    """Write a .npz whose archive is whole and whose array is too short for its header."""
    write_npz(path, ROWS)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in sorted(members.items(), reverse=True):
            new.writestr(name, content[:-8] if name.startswith("X_int") else content)


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


BAD = {
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
    "zip": ("a.npz", lambda path: zipfile.ZipFile(path, "w").close(), "a.npz: expected arrays X_int"),
    "zip of others": (
        "a.npz",
        lambda path: np.savez(path, x=np.ones(3)),
        r"a.npz: expected arrays .*, got a zip archive of \['x'\]",
    ),
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
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_error_that_names_the_file(tmp_path, case):
    check_refused(tmp_path, *BAD[case])


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


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    source = open_source(write_bin(tmp_path / "a.bin", ROWS))
    cut(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a.bin: truncated: it ends at byte 11520"):
        read(source)


def test_a_bad_row_in_a_later_piece(tmp_path, monkeypatch):
    """The row has its number in the file, and does not disturb the rows before it."""
    monkeypatch.setattr(data.sources, "PIECE_ROWS", 50)
    rows = Rows(with_value(ROWS.labels, 50, 9), ROWS.dense, ROWS.ids)
    source = open_source(write_bin(tmp_path / "a.bin", rows))
    compare(read(source, 0, 50), ROWS[:50])
    with pytest.raises(DataError, match=r"a.bin: row 51: label: expected 0 or 1, got 9"):
        read(source)
