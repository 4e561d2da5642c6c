"""A run on rows in memory, without any module of data: its folder, its report, and its resumption."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

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


def test_training_needs_no_module_of_data():
    code = (
        "import sys, dlrm.training.run, dlrm.inference\n"
        "assert not [name for name in sys.modules if name == 'data' or name.startswith('data.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
