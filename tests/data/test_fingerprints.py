"""Fingerprints tell files apart by name, size, time and ends."""

import os

import pytest

from data.fingerprints import END_BYTES, difference, fingerprints
from data.schema import DataError


def written(path, content, time=1):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(time, time))
    return path


def test_the_same_file_in_another_folder_is_the_same(tmp_path):
    (old,) = fingerprints([written(tmp_path / "a" / "x", b"abc")])
    assert (old.file, old.bytes, old.mtime_ns) == ("x", 3, 1)
    assert difference([old], fingerprints([written(tmp_path / "b" / "x", b"abc")])) is None
    assert difference([], []) is None


@pytest.mark.parametrize(
    ("name", "content", "time", "said"),
    [
        ("y", b"abc", 1, "x then, y now"),
        ("x", b"abcd", 1, "x had 3 bytes, has 4"),
        ("x", b"abd", 1, "x has other content"),
        ("x", b"abc", 2, "x has another time of change"),
    ],
)
def test_another_file_is_told_apart(tmp_path, name, content, time, said):
    old = fingerprints([written(tmp_path / "a" / "x", b"abc")])
    assert difference(old, fingerprints([written(tmp_path / "b" / name, content, time)])) == said


@pytest.mark.parametrize("place", [0, END_BYTES - 1, -1, -END_BYTES])
def test_the_ends_of_a_large_file_are_read(tmp_path, place):
    content = bytearray(3 * END_BYTES)
    old = fingerprints([written(tmp_path / "x", content)])
    content[place] = 1
    assert difference(old, fingerprints([written(tmp_path / "x", content)])) == "x has other content"


def test_a_file_that_is_not_there_is_named_and_a_pipe_is_left_alone(tmp_path):
    with pytest.raises(DataError, match="x: No such file"):
        fingerprints([tmp_path / "x"])
    os.mkfifo(tmp_path / "pipe")
    assert fingerprints([tmp_path / "pipe"]) == []
