"""Files of arrays against numpy: what it writes is read, and what is written it reads."""

import io
import os
import random
import resource
import tempfile
import warnings
import zipfile

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
def test_an_array_of_numpy(tmp_path, name):
    array = ARRAYS[name]
    np.save(tmp_path / "a.npy", array)
    file = read_npy(open_binary(tmp_path / "a.npy"), tmp_path / "a.npy")
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


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("kind", ["|b1", "|i1", "|u1", ">i2", "<u2", "<f2", "<i4", ">u4", "<f4", "<i8", "<u8", ">f8"])
def test_every_version_and_type_of_numbers_is_read_as_numpy_reads_it(tmp_path, version, kind):
    array = np.arange(24).reshape(6, 4).astype(kind)
    with open(tmp_path / "a.npy", "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of version 2 and 3
        np.lib.format.write_array(file, array, version)
    read = read_npy(open_binary(tmp_path / "a.npy"), tmp_path / "a.npy")
    assert read.dtype.base == array.dtype
    np.testing.assert_array_equal(read.take(0, 6), array)


def npy(header, content=b"", magic=b"\x93NUMPY\1\0"):
    return magic + len(header).to_bytes(2, "little") + header.encode() + content


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr':'<i4','fortran_order':False,'shape':(2,3)}\n",
        "  { 'shape' : ( 2L, 3L, ) , 'fortran_order' : False , 'descr' : '=i4' , }   ",
    ],
)
def test_headers_of_other_writers_are_read(tmp_path, header):
    (tmp_path / "a.npy").write_bytes(npy(header, np.arange(6, dtype="<i4").tobytes()))
    read = read_npy(open_binary(tmp_path / "a.npy"), tmp_path / "a.npy")
    np.testing.assert_array_equal(read.take(0, 2), np.arange(6).reshape(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of integers as Python 2 wrote them
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.arange(6).reshape(2, 3))


GOOD = {"descr": "'<i4'", "fortran_order": "False", "shape": "(2, 3)"}


def header_with(**values):
    return npy("{" + ", ".join(f"'{name}': {value}" for name, value in (GOOD | values).items()) + "}\n", bytes(24))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a .npy array: expected numpy's magic and a version"),
        (b"\x93NUMPY\1\0\0", "not a .npy array: expected numpy's magic and a version"),
        (npy("{}", magic=b"\x93NUMPY\4\0"), "not a .npy array: expected numpy's magic and a version"),
        (npy("x" * 20)[:-1], "not a .npy array: its header has 30 bytes"),
        (npy("{" + " " * 9999 + "}"), "not a .npy array: its header has 10011 bytes"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(100), "not a .npy array: its header has 4294967307 bytes"),
        (npy("{'descr': '<i4', 'fortran_order': False, 'shape': (50, 13), '''\n"), "not a .npy array: its header is"),
        (npy("{'descr': '<i4', 'fortran_order': False}"), "not a .npy array: its header is"),
        (header_with(more="1"), "not a .npy array: its header is"),
        (npy("{'descr': '<i4', " + "'shape': (1,), " * 3 + "}"), "not a .npy array: its header is"),
        (npy("{" + "(" * 5000), "not a .npy array: its header is"),
        (npy("-" * 5000), "not a .npy array: its header is"),
        (npy("{'descr'" + " " * 9000), "not a .npy array: its header is"),
        (npy("{[]: 1}"), "not a .npy array: its header is"),
        (header_with(shape="(2, 1" + "0" * 30 + ")"), "not a .npy array: its header is"),
        (header_with(shape="(2, 3"), "not a .npy array: its header is"),
        (header_with(shape="(2 3)"), "not a .npy array: its header is"),
        (header_with(shape="(2,,3)"), "not a .npy array: its header is"),
        (header_with(shape="2"), "not a .npy array: its header is"),
        (header_with(shape="()"), "expected an array of numbers, row by row, got <i4, ()"),
        (header_with(shape="(-2, 3)"), "expected an array of numbers, row by row, got <i4, (-2, 3)"),
        (header_with(shape="(2, -3)"), "expected an array of numbers, row by row, got <i4, (2, -3)"),
        (header_with(shape="(2, 0)"), "expected an array of numbers, row by row, got <i4, (2, 0)"),
        (header_with(shape="(2," + "1," * 40 + ")"), "expected an array of numbers, row by row, got <i4"),
        (header_with(shape="(2, 999999999999)"), "expected an array of numbers, row by row, got <i4"),
        (header_with(shape="(999999999999999999, 3)"), "truncated: (999999999999999999, 3) i4 in 24 bytes"),
        (header_with(shape="(1, 3)"), "too long: (1, 3) i4 in 24 bytes"),
        (header_with(fortran_order="True"), "expected an array of numbers, row by row, got <i4, (2, 3), column by"),
        (header_with(descr="'|O'"), "expected an array of numbers, row by row, got |O"),
        (header_with(descr="'<c8'"), "expected an array of numbers, row by row, got <c8"),
        (header_with(descr="'<M8[s]'"), "expected an array of numbers, row by row, got <M8[s]"),
        (header_with(descr="'(9,9)i4'"), "expected an array of numbers, row by row, got (9,9)i4"),
        (header_with(descr="[('a', '<i4')]"), "expected an array of numbers, row by row, got [('a', '<i4')]"),
    ],
)
def test_a_header_that_is_none_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_npy(open_binary(tmp_path / "a.npy"), tmp_path / "a.npy")
    assert str(error.value).startswith(f"{tmp_path / 'a.npy'}: {message}")
    assert "\n" not in str(error.value)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    writer = os.open(tmp_path / "a.npy", os.O_RDWR)
    with pytest.raises(DataError, match="expected a file, to be read at any place"):
        read_npy(open_binary(tmp_path / "a.npy"), tmp_path / "a.npy")
    os.close(writer)


# -- Archives ----------------------------------------------------------------------------------------------------------


def member(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def archive(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members:
            file.writestr(name, content)
    return path


def in_directory(path, name, at, value):
    """Change bytes of a member's entry in the directory of an archive."""
    content = bytearray(path.read_bytes())
    place = content.rindex(name) - 46 + at
    content[place : place + len(value)] = value
    path.write_bytes(content)


ONES = np.ones((1000, 4), "<i4")


def test_members_that_are_no_arrays_have_no_name(tmp_path):
    archive(tmp_path / "a.npz", [("a", member(ONES)), ("b.npy", member(ONES)), ("README", b"")])
    with NpzFile(tmp_path / "a.npz") as npz:
        assert npz.names == {"b"}


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_numpy_does_not_write_is_refused(tmp_path, compression):
    archive(tmp_path / "a.npz", [("a.npy", member(ONES))], compression)
    with (
        NpzFile(tmp_path / "a.npz") as npz,
        pytest.raises(DataError, match=r"a.npz: a: expected it stored or deflated, got method 1[24]"),
    ):
        npz.array("a")


def test_two_arrays_of_one_name_are_refused(tmp_path):
    archive(tmp_path / "a.npz", [("a.npy", member(ONES)), ("a.npy", member(2 * ONES))])
    with pytest.raises(DataError, match=r"a.npz: not a .npz file: two arrays have one name"):
        NpzFile(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("compression", "at", "value", "message"),
    [
        (zipfile.ZIP_STORED, 42, b"\1\0\0\0", "corrupt archive: it is not where the archive says"),
        (zipfile.ZIP_STORED, 42, b"\0\0\0\x70", "corrupt archive: it is not where the archive says"),
        (zipfile.ZIP_STORED, 24, b"\0\x10\0\0", "corrupt archive: 4096 bytes are stored in 16128"),
        (zipfile.ZIP_STORED, 8, b"\1", "corrupt archive, or an encrypted one"),
        (zipfile.ZIP_DEFLATED, 24, b"\0\x30\0\0", r"truncated: \(1000, 4\) i4 in 12160 bytes"),
        (zipfile.ZIP_DEFLATED, 24, b"\xff\xff\xff\x7f", r"too long: \(1000, 4\) i4 in 2147483519 bytes"),
        (zipfile.ZIP_DEFLATED, 16, b"\0\0\0\0", "corrupt archive: Bad CRC-32"),
        (zipfile.ZIP_DEFLATED, 10, b"\0", "corrupt archive: 16128 bytes are stored in"),
    ],
)
def test_a_directory_that_lies_is_refused(tmp_path, compression, at, value, message):
    path = archive(tmp_path / "a.npz", [("array.npy", member(ONES))], compression)
    in_directory(path, b"array.npy", at, value)
    with NpzFile(path) as npz, pytest.raises(DataError, match=f"^{path}: array: {message}"):
        npz.array("array")


def test_no_more_is_unpacked_than_the_header_needs(tmp_path, monkeypatch):
    """A bomb: 64 MB of zeros behind a header of few rows, and a directory that says so."""
    header = npy_header((10, 4), np.dtype("<i4"))
    path = archive(tmp_path / "a.npz", [("a.npy", header + bytes(1 << 26)), ("b.npy", member(ONES))])
    monkeypatch.setattr(tempfile, "TemporaryFile", None)  # not even opened
    limit = memory()
    with NpzFile(path) as npz:
        for method in (npz.header, npz.array):
            with pytest.raises(DataError, match=r"a: too long: \(10, 4\) i4 in 67108864 bytes"):
                method("a")
        assert npz.header("b").shape == (1000, 4)
    assert memory() - limit < 1 << 25


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_damage_is_one_error_or_an_array_of_the_shape_that_is_said(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, a=np.arange(60, dtype="<i4").reshape(20, 3), b=np.arange(20.0))
    good, random_, read = path.read_bytes(), random.Random(3), 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(random_.choice((1, 1, 3))):
            place = random_.randrange(len(content))
            content[place : place + random_.choice((0, 1, 1, 2))] = random_.randbytes(random_.choice((0, 1, 1, 2)))
        path.write_bytes(content)
        try:
            with NpzFile(path) as npz:
                for name in sorted(npz.names):
                    array = npz.array(name)
                    assert array.take(0, array.rows).shape == array.shape
            read += 1
        except DataError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert 20 < read < 280


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
