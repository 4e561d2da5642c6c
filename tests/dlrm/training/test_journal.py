"""What a run says while it runs, and what is taken out again when it goes on from before."""

import json
import warnings

import pytest
import torch

import dlrm.training.trainer
from dlrm import TrainingConfig
from dlrm.training.journal import Journal
from dlrm.training.trainer import Trainer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def points(folder):
    """tag: [(step, value)] as TensorBoard shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of protobuf
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
        accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, round(event.value, 5)) for event in accumulator.Scalars(tag)] for tag in tags}


def write(journal, *steps, value=0.5):
    for step in steps:
        journal.write(step, step / 7, {"train/loss": value, "train/learning_rate": 0.01})


def test_lines_and_points(tmp_path):
    journal = Journal(tmp_path)
    write(journal, 100, 200)
    journal.write(200, 2.0, {"validation/auc": 0.75})
    journal.close()
    assert lines(tmp_path) == [
        {"step": 100, "epoch": 14.285714, "train/loss": 0.5, "train/learning_rate": 0.01},
        {"step": 200, "epoch": 28.571429, "train/loss": 0.5, "train/learning_rate": 0.01},
        {"step": 200, "epoch": 2.0, "validation/auc": 0.75},
    ]
    assert points(tmp_path) == {
        "train/loss": [(100, 0.5), (200, 0.5)],
        "train/learning_rate": [(100, 0.01), (200, 0.01)],
        "validation/auc": [(200, 0.75)],
    }


def test_all_that_is_before_the_position_is_on_the_disk(tmp_path):
    journal = Journal(tmp_path)
    assert journal.position() == 0
    write(journal, 1, 2)
    position = journal.position()
    assert position == (tmp_path / "metrics.jsonl").stat().st_size
    assert len(lines(tmp_path)) == 2
    assert points(tmp_path)["train/loss"] == [(1, 0.5), (2, 0.5)]
    journal.close()


@pytest.mark.parametrize("half", ["", '{"step": 4, "epo'])
def test_a_journal_that_goes_on_has_nothing_of_what_came_after(tmp_path, half):
    """Written and flushed after the checkpoint, and half a line where the run was killed."""
    journal = Journal(tmp_path)
    write(journal, 1, 2)
    position = journal.position()
    write(journal, 3, 4, value=9.0)
    journal.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(half)

    journal = Journal(tmp_path, position, 2)
    assert journal.position() == position
    write(journal, 3)
    journal.close()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert points(tmp_path)["train/loss"] == [(1, 0.5), (2, 0.5), (3, 0.5)]


@pytest.mark.parametrize("step", [0, 2])
def test_a_journal_of_a_new_run_has_nothing_of_the_old(tmp_path, step):
    """Also of one that goes on from before its first line."""
    journal = Journal(tmp_path)
    write(journal, 3, 4)
    journal.close()
    journal = Journal(tmp_path, 0, step)
    write(journal, 5)
    journal.close()
    assert [line["step"] for line in lines(tmp_path)] == [5]
    assert points(tmp_path)["train/loss"] == [(5, 0.5)]


def test_going_on_twice(tmp_path):
    positions = {}
    journal = Journal(tmp_path)
    for step in range(1, 5):
        write(journal, step)
        positions[step] = journal.position()
    journal.close()
    for back, then in ((3, 8), (1, 9)):
        journal = Journal(tmp_path, positions[back], back)
        write(journal, then)
        journal.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 9]
    assert points(tmp_path)["train/loss"] == [(1, 0.5), (9, 0.5)]


def test_a_line_has_the_mean_loss_of_the_100_steps_before_it(tmp_path, monkeypatch):
    """Whatever the epochs: here of 30 steps, whose losses are their numbers."""
    step = iter(range(1, 1000))
    monkeypatch.setattr(dlrm.training.trainer, "train_step", lambda *_: torch.tensor([float(next(step)), 0.0]))
    config = TrainingConfig(1, 0.1, "sgd", epochs=11, evaluations_per_epoch=1, warmup_steps=200)
    journal = Journal(tmp_path)
    scores = {"auc": 0.5, "log_loss": 1.0}
    model = torch.nn.Linear(1, 1)
    Trainer(model, config, lambda *_: range(30), 30, lambda: scores, journal=journal, show=False).train()
    journal.close()
    of_steps = [line for line in lines(tmp_path) if "train/loss" in line]
    assert [(line["step"], line["train/loss"]) for line in of_steps] == [(100, 50.5), (200, 150.5), (300, 250.5)]
    assert [line["train/learning_rate"] for line in of_steps] == [0.05, 0.1, 0.1]
    assert all(line["train/samples_per_second"] > 0 for line in of_steps)
    of_evaluations = [line for line in lines(tmp_path) if "validation/auc" in line]
    assert [line["step"] for line in of_evaluations] == list(range(30, 331, 30))
