"""Files of arrays against numpy: what it writes is read, and what is written it reads."""

import io

import numpy as np
import pytest

from data.npy import HEADER_BYTES, NpzArray, NpzFile, npy_header, read_npy, require, write_npz
from data.schema import DataError
from data.storage import open_binary

ARRAYS = {
    "flat": np.arange(7, dtype="<i4"),
    "rows": np.arange(26, dtype="<f8").reshape(13, 2),
    "column": np.arange(5, dtype="<f4").reshape(5, 1),
    "none": np.empty((0, 3), "<i8"),
    "deep": np.arange(24, dtype="<u1").reshape(2, 3, 4),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("offset", [0, 11])
def test_an_array_of_numpy(tmp_path, name, offset):
    array, content = ARRAYS[name], io.BytesIO()
    np.save(content, array)
    (tmp_path / "a.npy").write_bytes(bytes(offset) + content.getvalue())
    file = read_npy(open_binary(tmp_path / "a.npy"), tmp_path / "a.npy", offset)
    assert (file.shape, file.rows, file.dtype.base) == (array.shape, len(array), array.dtype)
    np.testing.assert_array_equal(file.take(0, len(array)), array)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_numpy(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    with NpzFile(tmp_path / "a.npz") as npz:
        assert npz.names == set(ARRAYS)
        files = {name: npz.array(name) for name in ARRAYS}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(files[name].take(0, len(array)), array)


def test_numpy_reads_what_is_written(tmp_path):
    files = {name: [io.BytesIO(half.tobytes()) for half in np.array_split(a, 2)] for name, a in ARRAYS.items()}
    for path in (tmp_path / "a.npz", tmp_path / "b.npz"):
        with open(path, "wb") as file:
            write_npz(file, [NpzArray(name, a.shape, a.dtype, files[name]) for name, a in ARRAYS.items()])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as npz:
        assert list(npz) == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert npz[name].dtype == array.dtype
            np.testing.assert_array_equal(npz[name], array)


@pytest.mark.parametrize("rows", [0, 1, 10**6, 2**40])
def test_a_header_has_room_for_any_number_of_rows(rows):
    for shape, dtype in (((rows, 13), "<f4"), ((rows, 26), "<i8"), ((rows, 1), "<i4"), ((rows,), "<f4")):
        header = npy_header(shape, np.dtype(dtype))
        assert len(header) == HEADER_BYTES
        file = io.BytesIO(header)
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype(dtype))


def test_an_array_that_does_not_fit(tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS["rows"])
    array = read_npy(open_binary(tmp_path / "a.npy"), tmp_path / "a.npy")
    require(True, array, "X_int", "integers (13, 2)")
    with pytest.raises(DataError, match=r"a.npy: X_int: expected integers \(13, 2\), got f8 \(13, 2\)"):
        require(False, array, "X_int", "integers (13, 2)")
