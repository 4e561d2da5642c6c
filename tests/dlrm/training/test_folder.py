"""One process at a time trains in a folder."""

import shutil
import subprocess
import sys

import pytest

from dlrm.training.folder import LOCK, RunFolder

HOLD = """
import sys
from pathlib import Path
from dlrm.training.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.claim()
print("claimed", flush=True)
sys.stdin.read()
"""


def claimed(path):
    folder = RunFolder(path)
    folder.claim()
    return folder


def test_a_folder_is_for_one_process_until_that_dies(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"claimed\n"
        for _ in range(2):
            with pytest.raises(ValueError, match=r"--output: another process is training in .*run; wait for its end"):
                RunFolder(tmp_path / "run").claim()
        other.kill()
    claimed(tmp_path / "run").release()
    assert not (tmp_path / "run" / LOCK).exists()


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    (tmp_path / "old").mkdir()
    claimed(tmp_path / "old" / "a" / "b").release()
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    claimed(tmp_path / "old").release()
    assert (tmp_path / "old").is_dir()
    folder = claimed(tmp_path / "new" / "a")
    (tmp_path / "new" / "a" / "file").touch()
    folder.release()
    assert (tmp_path / "new" / "a" / "file").exists()


def test_what_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output: .*file is a file; expected a folder"):
        RunFolder(tmp_path / "file").claim()
    with pytest.raises(ValueError, match=r"--output: .*: expected a name in UTF-8"):
        RunFolder(tmp_path / "n\udcff").claim()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_deleted_folder_is_known_also_when_another_takes_its_place(tmp_path):
    folder = claimed(tmp_path / "run")
    folder.require()
    shutil.rmtree(tmp_path / "run")
    assert not folder.is_there
    other = claimed(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="the folder was deleted during the run"):
        folder.require()
    folder.release()
    assert other.is_there, "its lock is not removed by the first one"
    other.release()


def test_results_of_a_run_are_named_and_cleared(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "notes.txt").touch()
    assert folder.results() == [], "an empty log is no loss"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for name in ("metrics.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert folder.results() == ["model.safetensors", "metrics.json", "metrics.jsonl"]
    folder.clear()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "notes.txt"}
