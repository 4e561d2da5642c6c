"""benchmarks.data on a few rows; its figures are for real runs."""

import json

import pytest

from benchmarks import data as benchmark
from benchmarks.data import StepKind, batches, logs_to_shards, report, steps, work
from data.formats.prepared import Dataset
from data.synthetic import write

ROWS = 5000


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a log, and what logs_to_shards found on it."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "rows.tsv", ROWS)
    return folder, logs_to_shards({"plain": folder / "rows.tsv"}, ROWS, folder / "shards", rounds=1)


def test_logs_become_shards_in_processes_of_their_own(made):
    folder, results = made
    assert [result["name"] for result in results] == ["polars alone", "data.prepare, plain"]
    assert all(result["rows_per_second"]["median"] > 100 for result in results)
    assert all(1e7 < result["peak_rss_bytes"] < 1e10 for result in results)
    assert Dataset(folder / "shards").rows == ROWS


@pytest.mark.parametrize("job", ["polars", "prepare"])
def test_a_job_says_how_long_it_took(made, tmp_path, capsys, job):
    work(job, made[0] / "rows.tsv", tmp_path / "shards")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"] > 0


def test_batches_and_steps_are_reported(made, monkeypatch):
    dataset = Dataset(made[0] / "shards")
    monkeypatch.setattr(benchmark, "HELD", 2)
    step = steps(dataset, StepKind("kaggle", "sgd", 2048), rounds=1)
    assert set(step["ratio"]) == {"2 in memory", "one in memory"}
    results = {"prepare": made[1], "batches": batches(dataset, 1), "steps": [step]}
    assert [(x["batch_size"], x["mixed_rows"] > 1) for x in results["batches"]] == [
        (2048, False),
        (2048, True),
        (256, False),
        (256, True),
    ]
    lines = report(results).splitlines()
    for start in ("polars alone", "data.prepare, plain", "B=256, rows mixed", "kaggle, sgd, B=2048"):
        assert any(line.startswith(start) for line in lines)
