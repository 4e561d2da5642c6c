"""Files that appear whole or not at all, and arrays read at any place of a file."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from data.schema import DataError
from data.storage import ArrayFile, locked, natural_order, open_binary, read_at, whole_file, write_json


def test_numbers_in_names_are_numbers():
    names = ["day_10.gz", "day_2.gz", "day_2", "a", "day_10_b", "day_1"]
    ordered = sorted(map(Path, names), key=natural_order)
    assert [path.name for path in ordered] == ["a", "day_1", "day_2", "day_2.gz", "day_10.gz", "day_10_b"]


def test_a_whole_file_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError("a bad row"), KeyboardInterrupt()])
def test_what_was_there_stays_when_writing_fails(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as unfinished:  # noqa: PT012
        unfinished.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_errors_of_the_disk_name_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as error, whole_file(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError, match="No such file") as error:
        write_json(tmp_path / "nowhere" / "a.json", {})
    assert error.value.filename == str(tmp_path / "nowhere" / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_the_umask_has_them(tmp_path):
    write_json(tmp_path / "a.json", {"rows": 3})
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert (tmp_path / "a.json").read_text() == '{\n  "rows": 3\n}\n'


@pytest.mark.parametrize("offset", [0, 7])
def test_an_array_in_a_file(tmp_path, offset):
    array = np.arange(60, dtype="<i4").reshape(20, 3)
    (tmp_path / "array").write_bytes(bytes(offset) + array.tobytes() + b"xy")
    file = ArrayFile(open_binary(tmp_path / "array"), tmp_path / "array", np.dtype(("<i4", (3,))), offset)
    assert file.rows == 20
    for start, stop in ((0, 20), (3, 4), (5, 5), (19, 20)):
        np.testing.assert_array_equal(file.take(start, stop), array[start:stop])
    np.testing.assert_array_equal(file.elements().take(4, 9), np.arange(4, 9))


def test_files_that_are_too_short(tmp_path):
    path = tmp_path / "array"
    path.write_bytes(bytes(100))
    file = open_binary(path)
    with pytest.raises(DataError, match=f"{path}: truncated: expected 26 rows, got 25"):
        ArrayFile(file, path, np.dtype("<i4"), 0, 26)
    array = ArrayFile(file, path, np.dtype("<i4"), 0, 25)
    os.truncate(path, 90)
    with pytest.raises(DataError, match=f"{path}: truncated: it ends at byte 90"):
        array.take(0, 25)
    with pytest.raises(DataError, match="nowhere: No such file"):
        open_binary(tmp_path / "nowhere")


def test_reading_into_nothing_reads_nothing(tmp_path):
    read_at(-1, tmp_path, np.empty(0, "<i4"), 0)


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path):
    path = tmp_path / ".lock"
    with locked(path, wait=True):
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        assert path.exists()
    assert not path.exists()
    with pytest.raises(KeyError), locked(path, wait=False):
        raise KeyError
    assert not path.exists()
