"""Files that appear whole or not at all, and last; locks."""

import os
import stat
import threading
import time

import pytest
from safetensors import SafetensorError

from robe_files import locked, whole_file, write_json


def test_a_whole_file_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_link_in_the_place_of_the_unfinished_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.json.part").symlink_to("mine")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "{}\n"


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


def test_a_whole_file_takes_its_name_when_all_went_well(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_file(path) as part:
        part.write_text(str(1 / 0))
    assert (path.read_text(), [p.name for p in tmp_path.iterdir()]) == ("one", ["file"])


def test_a_full_disk_under_safetensors_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError, match="I/O error: No space left") as error, whole_file(tmp_path / "file"):
        raise SafetensorError("I/O error: No space left on device")
    assert error.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        fsync(descriptor)

    def noted_replace(old, new):
        steps.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_json(tmp_path / "a.json", {})
    assert steps == ["/a.json.part", "rename", ""]


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


def test_a_lock_is_not_taken_on_a_file_that_its_holder_has_removed(tmp_path):
    path = tmp_path / ".lock"
    taken, started = [], threading.Event()

    def wait():
        started.set()
        with locked(path, wait=True) as is_there:
            taken.append(is_there())

    with locked(path, wait=True) as is_there:
        thread = threading.Thread(target=wait)
        thread.start()
        started.wait()
        time.sleep(0.1)  # the other has opened the file by then
        assert is_there()
        path.unlink()
        assert not is_there()
    thread.join(60)
    assert taken == [True]
    assert not path.exists()
