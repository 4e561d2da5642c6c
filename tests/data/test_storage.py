"""Arrays read at any place of a file, and locks."""

import os
from pathlib import Path

import numpy as np
import pytest

from data.schema import DataError
from data.storage import ArrayFile, natural_order, open_binary, read_at


def test_numbers_in_names_are_numbers():
    names = ["day_10.gz", "day_2.gz", "day_2", "a", "day_10_b", "day_1"]
    ordered = sorted(map(Path, names), key=natural_order)
    assert [path.name for path in ordered] == ["a", "day_1", "day_2", "day_2.gz", "day_10.gz", "day_10_b"]


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
