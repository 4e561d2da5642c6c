"""torchrec's triples and multi-hot ids, written by hand and by the writer; broken ones are one clear error."""

import struct

import numpy as np
import pytest

import data.formats.torchrec
from data.formats.opening import open_source
from data.rows import Batch
from data.schema import DataError
from tests.helpers.criteo import (
    Rows,
    Trap,
    cut,
    int32,
    log_dense,
    make_kind,
    make_rows,
    with_value,
    without_missing,
    write_log,
    write_npy,
)
from tests.helpers.sources import check_refused, compare, converted, names, read

ROWS = make_rows(120)
LOGGED = make_rows(250)  # what the writers get, by way of a log
HOTS = (1, 3, 2, *(1 + i % 4 for i in range(23)))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("log") / "day_0", LOGGED)


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
        ({"3": hots["3"][:, :0]}, "3: expected an array of numbers, row by row"),
        ({"26": hots["3"]}, "expected arrays 0 to 25"),
    ):
        write_npy(tmp_path, "day_0", ROWS, hots=hots | changed, single=False)
        with pytest.raises(DataError, match=f"{path}: {message}"):
            read(open_source(tmp_path))
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(DataError, match=f"{path}: not a .npz file"):
        open_source(path)


def test_a_folder_with_multi_hot_ids_of_other_features(tmp_path):
    """The number of ids in a row is the same."""
    hots, _ = multi_hot(ROWS)
    write_npy(tmp_path, "day_0", ROWS, hots=hots, single=False)
    write_npy(tmp_path, "day_1", ROWS, hots=hots | {"0": hots["1"], "1": hots["0"]}, single=False)
    with pytest.raises(DataError, match=r"day_1.*: its rows have .*expected one layout"):
        open_source(tmp_path)


def test_a_folder_with_a_part_of_a_second_triple(tmp_path):
    write_npy(tmp_path, "day_0", ROWS)
    write_npy(tmp_path, "day_1", ROWS)
    (tmp_path / "day_1_dense.npy").unlink()
    with pytest.raises(DataError, match=r"day_1_dense.npy"):
        open_source(tmp_path)


def test_npy(tmp_path, log):
    folder = converted(log, "npy", tmp_path / "out")
    assert names(folder) == [f"day_0_{what}.npy" for what in ("dense", "labels", "sparse")]
    dense, labels, sparse = (np.load(folder / name, allow_pickle=False) for name in names(folder))
    assert [dense.dtype, labels.dtype, sparse.dtype] == [np.float32, np.int32, np.int32]
    np.testing.assert_allclose(dense, log_dense(LOGGED.dense), rtol=3e-7)
    np.testing.assert_array_equal(labels, LOGGED.labels[:, None])
    np.testing.assert_array_equal(sparse, int32(LOGGED.ids))


def test_multi_hot_ids_as_numpy_reads_them(tmp_path):
    path, rows = make_kind("multi-hot", tmp_path)
    folder = converted(path, "npy", tmp_path / "out")
    assert names(folder) == ["day_0_dense.npy", "day_0_labels.npy", "day_0_sparse_multi_hot.npz"]
    with np.load(folder / "day_0_sparse_multi_hot.npz", allow_pickle=False) as npz:
        assert list(npz) == [str(i) for i in range(26)]
        np.testing.assert_array_equal(np.concatenate([npz[str(i)] for i in range(26)], 1), int32(rows.ids))


def triple(**replaced):
    """Return a function that writes a triple with other arrays, or without those that are None."""

    def make(path):
        write_npy(path.parent, "day_0", ROWS)
        for what, array in replaced.items():
            file = path.with_name(f"day_0_{what}.npy")
            file.unlink() if array is None else np.save(file, array)

    return make


def long_header(path):
    np.save(path.with_name("x.npy"), ROWS.labels)
    content = path.with_name("x.npy").read_bytes()
    path.with_name("x.npy").unlink()
    path.write_bytes(content[:8] + struct.pack("<H", 65535) + content[10:] + bytes(70000))


def header(path, shape):
    """Write a triple whose first array has another shape in its header."""
    triple()(path)
    content = path.read_bytes()
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    path.write_bytes(content[:10] + text + content[128:])


FLOATS = log_dense(ROWS.dense)


def test_whole_numbers_are_integers_as_in_the_other_formats(tmp_path):
    rows = make_rows(120)
    rows.dense = without_missing(rows.dense)
    path = write_npy(tmp_path, "day_0", rows, rows.dense.astype(np.float32))
    source = open_source(path)
    assert source.layout.dense == "i4"
    compare(read(source), rows)
    np.testing.assert_allclose(next(source.read()).dense, log_dense(rows.dense), rtol=1e-6)


def test_zeros_may_be_numbers_of_either_kind(tmp_path):
    rows = make_rows(3)
    rows.dense[:] = 0
    assert open_source(write_npy(tmp_path, "day_0", rows)).layout.dense == "f4"  # as they are in the other days


@pytest.mark.parametrize("value", [0.5, 2.0**31])
def test_another_number_among_integers_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.setattr(data.formats.torchrec, "_HEAD_ROWS", 50)
    dense = with_value(without_missing(ROWS.dense).astype(np.float32), (80, 3), value)
    with pytest.raises(DataError, match=r"day_0_dense.npy: row 81: expected integers of 32 bits, as in the first rows"):
        read(open_source(write_npy(tmp_path, "day_0", ROWS, dense)))


BAD = {
    "npy of no rows": (
        "day_0_dense.npy",
        lambda path: write_npy(path.parent, "day_0", ROWS[:0]),
        "day_0_dense.npy: the file is empty",
    ),
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
        "day_0_sparse.npy: truncated: .120, 26. i4 in 7436 bytes",
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
        "day_0_dense.npy: truncated: .1099511627776, 13. f4 in 6240 bytes",
    ),
    "npy header": ("day_0_dense.npy", long_header, "day_0_dense.npy: not a .npy array"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_error_that_names_the_file(tmp_path, case):
    check_refused(tmp_path, *BAD[case])


@pytest.mark.parametrize("what", ["dense", "sparse", "labels"])
def test_npy_with_pickles_is_refused_and_never_unpickled(tmp_path, what):
    trap = np.empty((120, 13), dtype=object)
    trap[:] = Trap(tmp_path / "sprung")
    triple(**{what: trap})(tmp_path / "x")
    with pytest.raises(DataError, match=rf"day_0_{what}.npy: expected an array of numbers"):
        read(open_source(tmp_path / "day_0_dense.npy"))
    assert not (tmp_path / "sprung").exists()
