"""What a folder holds is data, known not to be data, or an error; sources stand in the order of their days."""

import os
import socket
from pathlib import Path

import pytest

from data.files import data_files, in_order, require_regular, stem
from data.schema import DataError


def make(folder, *names):
    for name in names:
        (folder / name).write_text("x")


def test_the_files_of_a_folder_in_natural_order(tmp_path):
    make(tmp_path, "day_10.gz", "day_9.gz", "day_2", "other")
    assert [file.name for file in data_files(tmp_path)] == ["day_2", "day_9.gz", "day_10.gz", "other"]


def test_digits_of_other_kinds_are_letters(tmp_path):
    make(tmp_path, "\u00b2", "\u0663", "day_10", "day_9")
    assert [file.name for file in data_files(tmp_path)] == ["day_9", "day_10", "\u00b2", "\u0663"]


def test_files_known_not_to_be_data(tmp_path):
    make(tmp_path, "README", "readme.txt", "README.md", "LICENSE", "license.txt", "_SUCCESS", ".hidden", ".day_1.crc")
    make(tmp_path, "MD5SUMS", "sha256sums.txt", "checksums.txt", "day_0.sha256", "a.json", "plot.png", "day_0.bad")
    make(tmp_path, "day_0.part", "day_0.crc", ".lock", "x.lock", "download.sh", "_metadata", "a\nREADME")
    (tmp_path / ".git").mkdir()
    make(tmp_path / ".git", "HEAD")
    (tmp_path / "empty").mkdir()
    make(tmp_path, "day_0")
    assert [file.name for file in data_files(tmp_path)] == ["day_0"]


def test_a_link_to_nothing_is_an_error(tmp_path):
    make(tmp_path, "day_0")
    (tmp_path / "day_1").symlink_to("unmounted/day_1")
    with pytest.raises(DataError, match=r"/day_1: a link to unmounted/day_1: No such file or directory"):
        data_files(tmp_path)
    (tmp_path / "day_1").unlink()
    (tmp_path / "day_1").symlink_to("day_1")
    with pytest.raises(DataError, match=r"/day_1: a link to day_1: Too many levels"):
        data_files(tmp_path)


def test_links_to_files_are_files(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "data").mkdir()
    make(tmp_path / "store", "a", "b")
    for name in "ab":
        (tmp_path / "data" / f"day_{name}").symlink_to(tmp_path / "store" / name)
    assert [file.name for file in data_files(tmp_path / "data")] == ["day_a", "day_b"]


def test_a_file_and_a_link_to_it_are_the_same_rows(tmp_path):
    make(tmp_path, "day_0")
    (tmp_path / "latest").symlink_to("day_0")
    with pytest.raises(DataError, match=r"/latest: the same file as .*/day_0: its rows would be read twice"):
        data_files(tmp_path)


def test_a_folder_in_a_folder_is_an_error(tmp_path):
    make(tmp_path, "day_0")
    (tmp_path / "day_1").mkdir()
    make(tmp_path / "day_1", "part-0")
    with pytest.raises(DataError, match=r"/day_1: a folder, in a folder of data"):
        data_files(tmp_path)
    (tmp_path / "day_1" / "part-0").rename(tmp_path / "day_1" / "_SUCCESS")
    assert [file.name for file in data_files(tmp_path)] == ["day_0"]


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


@pytest.mark.parametrize(("make_it", "kind"), [(make_pipe, "a pipe"), (make_socket, "a socket")])
def test_what_is_no_regular_file_is_refused_by_name(tmp_path, make_it, kind):
    path = tmp_path / "day_0"
    make_it(path)
    for check in (lambda: require_regular(path), lambda: data_files(tmp_path)):
        with pytest.raises(DataError, match=rf"/day_0: {kind}; expected a regular file"):
            check()


def test_devices_are_refused_and_files_are_not(tmp_path):
    with pytest.raises(DataError, match=r"/dev/zero: a device; expected a regular file"):
        require_regular(Path("/dev/zero"))
    make(tmp_path, "a")
    require_regular(tmp_path / "a")
    with pytest.raises(DataError, match=r"/b: No such file"):
        require_regular(tmp_path / "b")


def ordered(*names):
    return [str(path) for path in in_order([Path(name) for name in names])]


def test_sources_stand_in_the_order_of_their_days():
    days = [f"logs/day_{day}.gz" for day in range(24)]
    assert ordered(*sorted(days)) == days
    assert ordered(*days[::-1]) == days
    assert ordered("/disk2/day_10", "/disk1/day_9.gz", "/disk1/day_2.xz") == [
        "/disk1/day_2.xz",
        "/disk1/day_9.gz",
        "/disk2/day_10",
    ]
    assert ordered("2024-1-10", "2024-1-9", "2023-12-31") == ["2023-12-31", "2024-1-9", "2024-1-10"]
    assert ordered("day_010.parquet", "day_9.parquet") == ["day_9.parquet", "day_010.parquet"]


def test_other_names_keep_the_order_they_are_given_in():
    assert ordered("train", "b", "a") == ["train", "b", "a"]
    assert ordered("extra", "day_10", "day_9", "all") == ["extra", "day_9", "day_10", "all"]
    assert ordered() == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("day_3.gz", "day_3"), ("a.b.tsv.zst", "a.b"), ("x.csv.xz", "x"), ("day_1", "day_1"), (".gz", ".gz")],
)
def test_stem(name, expected):
    assert stem(Path("folder.gz", name)) == expected
