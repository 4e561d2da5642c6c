"""torchrun train.py, as its user runs it, on generated rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from data.synthetic import write
from tests.helpers.processes import free_port

ROOT = Path(train.__file__).parent
# SGD: the first steps of Adagrad divide gradients by themselves, and make much of a rounding.
OPTIONS = ["--optimizer", "sgd", "--learning-rate", "0.1", "--robe-size", "100000", "--epochs", "1"]
OPTIONS += ["--batch-size", "250", "--evaluations-per-epoch", "1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    write(path, 3500)  # 10 batches to train on
    return path


def start(*args):
    """The program in two processes."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command = [*torchrun, str(ROOT / "train.py"), "--device", "cpu", *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_two_processes_train_what_one_trains(rows, tmp_path):
    two = start("--data", rows, "--output", tmp_path / "two", *OPTIONS)
    assert train.main(["--data", str(rows), "--output", str(tmp_path / "one"), *OPTIONS]) == 0
    out, error = two.communicate(timeout=120)
    assert two.returncode == 0, error
    assert out.count("test AUC") == 1, "one process speaks"
    expected, got = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert (expected["processes"], got["processes"]) == (1, 2)
    for name in ("auc", "log_loss", "validation_auc"):
        assert got[name] == pytest.approx(expected[name], abs=1e-5)
    assert got["rows"] == expected["rows"]
    assert got["steps"] == expected["steps"] == 10
    for point, expected_point in zip(got["history"], expected["history"], strict=True):
        assert point["train_loss"] == pytest.approx(expected_point["train_loss"], abs=1e-6)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_stopped(rows, tmp_path):
    two = start("--data", rows, "--output", tmp_path, *OPTIONS, "--epochs", "100000")
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "checkpoints").glob("step-*[1-9]*")):  # both train by then
            assert time.monotonic() < deadline
            assert two.poll() is None, two.communicate()
            time.sleep(0.05)
        two.send_signal(signal.SIGTERM)
        out, _ = two.communicate(timeout=60)
    finally:
        two.kill()
    assert "everything is saved" in out
    assert "torchrun --nproc-per-node 2" in out
    stopped = max(int(path.name.split("-")[1]) for path in (tmp_path / "checkpoints").glob("step-*"))
    assert not (tmp_path / "metrics.json").exists()
    last = stopped // 10 + 2
    assert train.main(["--resume", "--output", str(tmp_path), "--epochs", str(last)]) == 0
    metrics = metrics_of(tmp_path)
    assert metrics["processes"] == 1
    assert metrics["steps"] == 10 * last
    assert [point["step"] for point in metrics["history"]] == list(range(10, 10 * last + 1, 10))


@pytest.mark.parametrize("case", ["bad line", "impossible model", "impossible layer"])
def test_what_is_wrong_is_said_once(rows, tmp_path, case):
    if case == "bad line":
        lines = rows.read_text().splitlines()
        (tmp_path / "rows.tsv").write_text("\n".join([*lines[:20], "1\t2", *lines[20:]]) + "\n")
        two = start("--data", tmp_path / "rows.tsv", "--output", tmp_path / "run", *OPTIONS)
        message = "rows.tsv:21: expected 40"
    elif case == "impossible model":
        two = start("--data", rows, "--output", tmp_path / "run", "--embedding", "hash", "--robe-size", "5")
        message = "robe_size: expected embedding='robe' with it, got hash"
    else:  # which is found when the plan is made, and the model is built
        two = start("--data", rows, "--output", tmp_path / "run", "--robe-size", "5")
        message = "an array of 5 weights does not hold one block of 16"
    _, error = two.communicate(timeout=60)
    assert two.returncode != 0
    assert "exitcode  : 2" in error, "torchrun's report of the first process that failed"
    said = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, error
    assert message in said[0]
    assert not (tmp_path / "run").exists()
