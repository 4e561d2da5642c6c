"""benchmarks.training on a few rows; its figures are for real runs."""

import os

import pytest
import torch

from benchmarks import training
from benchmarks.training import held_batches, processes, program, report, steps_in
from data import prepare
from data.formats.prepared import Dataset
from data.synthetic import write


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write(folder / "rows.tsv", 1400)
    assert prepare.main([str(folder / "rows.tsv"), "--output", str(folder / "shards")]) == 0
    return folder / "shards"


def test_program_and_bare_step_are_timed_on_as_many_steps(shards):
    result = program(Dataset(shards), "kaggle", 128, rounds=2, seconds=0)
    assert result["steps_a_round"] == 5
    assert set(result["milliseconds"]) == {"bare", "program"}
    bare, whole = (result["milliseconds"][name]["median"] for name in ("bare", "program"))
    assert result["ratio"]["median"] == pytest.approx(whole / bare, rel=0.5)


def test_held_batches_are_the_first_of_an_epoch(shards, monkeypatch):
    monkeypatch.setattr(training, "HELD", 3)
    batches = held_batches(Dataset(shards), 100)
    assert [batch.sparse.shape for batch in batches] == [(100, 26)] * 3
    assert all(batch.labels.dtype == torch.float32 for batch in batches)


def test_steps_of_some_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])

    def step():
        now[0] += 0.1

    assert steps_in(2.0, step) == 20
    assert steps_in(0.1, step) == 5


def test_processes_train_on_the_cores_they_are_given(shards, monkeypatch):
    started = []

    def run(command, env, preexec_fn, **options):
        started.append((command, env["OMP_NUM_THREADS"]))
        out = command[command.index("--output") + 1]
        os.makedirs(out, exist_ok=True)
        with open(f"{out}/metrics.json", "w") as file:
            file.write(f'{{"samples_per_second": {100 * (1 + ("torch.distributed.run" in command))}}}')

    monkeypatch.setattr(training.subprocess, "run", run)
    monkeypatch.setattr(training.os, "sched_getaffinity", lambda process: {0, 1, 2})
    result = processes(shards, "kaggle", "sgd", 256, rounds=2)
    assert [threads for _, threads in started] == ["1", "1", "3"] * 2
    assert result["ratio"]["median"] == 2
    assert result["samples_per_second"]["all cores"]["median"] == 100
    assert "2.00" in report({"program": [], "processes": [result]})
