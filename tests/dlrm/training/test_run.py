"""A run on rows in memory, without any module of data: its folder, its report, and its resumption."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from dlrm import checkpoint
from dlrm.distributed import World
from dlrm.training.checkpoint import TrainingCheckpoints
from dlrm.training.plan import LAST, Request
from dlrm.training.run import run
from tests.dlrm.training.memory_rows import RANGES, MemoryRows

GIVEN = {"data": Path("rows"), "robe_size": 500, "batch_size": 20, "epochs": 2, "evaluations_per_epoch": 1}
# 3 steps in each of 2 epochs.


def start(folder, data=MemoryRows, **options):
    lines = []
    request = Request(folder, GIVEN, "train.py --data rows", "train.py --resume --output run", **options)
    run(request, World(), data, lines.append)
    return lines


class Signalled(MemoryRows):
    """Sends SIGTERM with the second batch."""

    def epoch(self, *arguments, **options):
        for number, batch in enumerate(super().epoch(*arguments, **options)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def test_a_run_and_its_report(tmp_path):
    lines = start(tmp_path / "run")
    assert lines[0].startswith("kaggle, robe: 500 floats of embeddings for 540,201,232 in full tables (1.08e+06x); ")
    assert lines[0].endswith("; 60 rows train, 20 validate, 20 test")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert lines[1:] == [
        f"test AUC {metrics['auc']:.4f}, log loss {metrics['log_loss']:.4f} (weights of epoch "
        f"{metrics['best_epoch']:.2f}, validation AUC {metrics['validation_auc']:.4f}); "
        f"{metrics['samples_per_second']:,.0f} samples/s; in {tmp_path / 'run'}"
    ]
    assert metrics["environment"]["command"] == "train.py --data rows"
    assert metrics["seconds"] > 0
    assert checkpoint.load(tmp_path / "run").config.robe_size == 500


def test_a_stopped_run_is_resumed_to_the_same_end(tmp_path):
    start(tmp_path / "whole")
    lines = start(tmp_path / "run", Signalled)
    assert lines[1:] == [
        "stopped at step 2; everything is saved. To resume:", "    python train.py --resume --output run"
    ]  # fmt: skip
    assert TrainingCheckpoints(tmp_path / "run").steps() == [0, 2]
    assert lines[0] + "; resuming at step 2" == start(tmp_path / "run", resume=LAST)[0]
    one, other = (checkpoint.load(tmp_path / name).state_dict() for name in ("whole", "run"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def strict_json(path):
    """Parse JSON as the standard has it, without NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("part", RANGES)
@pytest.mark.parametrize("label", [0, 1])
def test_a_part_of_one_label_is_named_before_training_and_the_rest_is_written(tmp_path, monkeypatch, part, label):
    monkeypatch.setattr(MemoryRows, "one_label", {part: label})
    lines = start(tmp_path / "run")
    assert lines[1].startswith(f"warning: all {len(RANGES[part])} {part} rows have label {label}: ")
    metrics = strict_json(tmp_path / "run" / "metrics.json")
    history = metrics["history"]
    assert (metrics["auc"] is None) == (part == "test")
    assert (metrics["validation_auc"] is None) == (part == "validation") == (history[0]["auc"] is None)
    assert metrics["log_loss"] > 0
    assert f"test AUC {'undefined' if part == 'test' else ''}" in lines[-1]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation/auc"] for line in logged] == [point["auc"] for point in history]
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 1000
    if part == "validation":
        best = min(history, key=lambda point: point["log_loss"])
        assert metrics["best_epoch"] == best["epoch"], "the weights with the lowest log loss are kept"


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    start(tmp_path / "run", Signalled)
    with pytest.raises(ValueError, match="has an unfinished run with a checkpoint of step 2; resume it"):
        start(tmp_path / "run")


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "metrics.json", "metrics.jsonl", "checkpoints"])
def test_a_finished_run_is_replaced_only_on_request(tmp_path, lost):
    folder = tmp_path / "run"
    start(folder)
    for path in folder.iterdir():  # each of them alone is worth keeping
        if path.name != lost:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if lost == "metrics.jsonl":
        (folder / lost).write_text("{}\n")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    what = "an unfinished run" if lost == "checkpoints" else f"{lost} of another run"
    for resume in (None, LAST) if lost != "checkpoints" else (None,):
        with pytest.raises(ValueError, match=f"--output: .* has {what}.*--overwrite"):
            start(folder, resume=resume)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    start(folder, overwrite=True)
    assert (folder / "metrics.json").exists()


def test_a_run_that_replaces_another_leaves_none_of_its_results(tmp_path):
    start(tmp_path / "run")
    start(tmp_path / "run", Signalled, overwrite=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "metrics.jsonl", "tensorboard"}


def test_a_log_of_mlperf_is_not_overwritten(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("of another run")
    monkeypatch.setitem(GIVEN, "mllog", log)
    with pytest.raises(ValueError, match=r"--mllog: .*log is there already"):
        start(tmp_path / "run")
    assert log.read_text() == "of another run"
    assert not (tmp_path / "run").exists()


class Deleted(MemoryRows):
    """Deletes the folder of the run with the second batch."""

    folder: ClassVar[Path]

    def epoch(self, *arguments, **options):
        for number, batch in enumerate(super().epoch(*arguments, **options)):
            if number == 1:
                shutil.rmtree(self.folder)
            yield batch


def test_a_deleted_folder_ends_the_run_and_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Deleted, "folder", tmp_path / "run", raising=False)
    with pytest.raises(FileNotFoundError, match="the folder was deleted during the run") as error:
        start(tmp_path / "run", Deleted)
    assert error.value.filename == str(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_training_needs_no_module_of_data():
    code = (
        "import sys, dlrm.training.run, dlrm.inference\n"
        "assert not [name for name in sys.modules if name == 'data' or name.startswith('data.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
