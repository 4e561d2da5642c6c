"""MLPerf's LoadGen on a model. Each run has a process of its own, as LoadGen needs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

import infer
from data import prepare
from data.formats.opening import open_source
from data.rows import Batch
from data.synthetic import write
from dlrm import DLRM, DLRMConfig, checkpoint
from dlrm.inference.loadgen import LoadGenOptions, find_rate, run_program
from dlrm.inference.loadgen_logs import sample_bounds, trace

ROOT = Path(__file__).parents[3]
CONFIG = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10,) * 26, compression=3)
ROWS = 5000
HANG = 120  # seconds


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with model, log.tsv, prepared and unlabelled; the labels; and the model's own predictions."""
    folder = tmp_path_factory.mktemp("loadgen")
    torch.manual_seed(0)
    model = DLRM(CONFIG)
    checkpoint.save(folder / "model", model)
    write(folder / "log.tsv", ROWS)
    assert prepare.main([str(folder / "log.tsv"), "--output", str(folder / "prepared")]) == 0
    write(folder / "clicks.tsv", 20, labelled=False)
    assert prepare.main([str(folder / "clicks.tsv"), "--output", str(folder / "unlabelled")]) == 0
    batch = Batch.concatenate(list(open_source(folder / "prepared").read()))
    with torch.no_grad():
        predictions = torch.sigmoid(model(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse))).numpy()
    return folder, batch.labels, predictions


def arguments(folder, scenario, *options, data="prepared"):
    of_run = ["--checkpoint", str(folder / "model"), "--data", str(folder / data), "--scenario", scenario]
    return ["loadgen", *of_run, *options]


def start(tmp_path, *command):
    """Start a program with two threads in an empty folder."""
    (tmp_path / "here").mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path / "here",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(tmp_path, made, scenario, *options):
    """Return exit code, stdout and result.json of a run."""
    output = tmp_path / "output"
    process = start(tmp_path, str(ROOT / "infer.py"), *arguments(made[0], scenario, *options, "--output", str(output)))
    out, err = process.communicate(timeout=HANG)
    assert (output / "result.json").exists(), err
    assert not list((tmp_path / "here").iterdir())
    return process.returncode, out, json.loads((output / "result.json").read_text())


def test_offline(tmp_path, made):
    _, labels, predictions = made
    code, out, result = run(tmp_path, made, "Offline", "--seconds", "1")
    assert code == (0 if result["valid"] else 1)
    said = f"Offline, {'VALID' if result['valid'] else 'INVALID'} (not of official length or data)"
    assert out.splitlines()[0].split(maxsplit=1) == ["scenario", said]
    if not result["valid"]:  # something took the cores while it found out how fast they are
        assert "Increase expected QPS" in result["reasons"][0]
    # A model that was not trained predicts nearly the same for all rows: some are in one bin.
    assert result["auc"] == pytest.approx(roc_auc_score(labels, predictions), abs=1e-5)
    assert result["log_loss"] == pytest.approx(log_loss(labels, predictions.astype(float)), abs=1e-6)
    assert f"{result['auc']:.4f}, {result['log_loss']:.4f} of the first {ROWS:,} rows" in out
    bounds = sample_bounds(ROWS)
    assert result["samples"] == result["loaded_samples"] == len(bounds) - 1
    # Answered are whole rounds of all samples, and some more: their rows are nearly those of the mean sample.
    assert result["rows_per_second"] / result["samples_per_second"] == pytest.approx(ROWS / (len(bounds) - 1), rel=0.1)
    assert not result["official"]
    assert (result["workers"], result["threads_per_worker"]) == (2, 1)
    assert 700 < result["mean_rows_per_batch"] <= 2048
    assert (tmp_path / "output" / "dlrm_trace_of_aggregated_samples.txt").read_text() == trace(bounds)


def test_server_with_too_few_queries(tmp_path, made):
    """Of 459 queries none may be late, and fewer prove nothing: the run is INVALID on any machine."""
    code, out, result = run(tmp_path, made, "Server", "--target-qps", "200", "--seconds", "0.6")
    assert (code, result["valid"]) == (1, False)
    assert "Server, INVALID" in out
    assert "more queries" in out
    assert result["reasons"]
    assert 100 <= result["queries"] < 459
    latency = result["latency_ms"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p99"] <= latency["max"]
    assert 700 <= result["max_rows_per_batch"] <= 2048
    assert result["target_qps"] == 200


@pytest.mark.parametrize(("scenario", "workers"), [("SingleStream", (1, 2)), ("MultiStream", (2, 1))])
def test_streams(tmp_path, made, scenario, workers):
    code, _, result = run(tmp_path, made, scenario, "--seconds", "1")
    assert code == (0 if result["valid"] else 1)
    assert (result["workers"], result["threads_per_worker"]) == workers
    assert result["latency_ms"]["p50"] <= result["early_stopping_latency_ms"] <= result["latency_ms"]["max"]
    if scenario == "MultiStream":
        assert result["queries"] >= 662
        assert result["samples_per_second"] == pytest.approx(8000 / result["latency_ms"]["mean"])
    else:
        assert 100 <= result["mean_rows_per_batch"] <= 700


@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_accuracy(tmp_path, made, scenario):
    _, labels, predictions = made
    code, out, result = run(tmp_path, made, scenario, "--accuracy")
    assert code == 0
    bounds, seen = sample_bounds(ROWS), []
    for sample in json.loads((tmp_path / "output" / "mlperf_log_accuracy.json").read_text()):
        rows = slice(*bounds[sample["qsl_idx"] :][:2])
        pairs = np.frombuffer(bytes.fromhex(sample["data"]), "<f4").reshape(-1, 2)
        np.testing.assert_allclose(pairs[:, 0], predictions[rows], rtol=1e-5)
        np.testing.assert_array_equal(pairs[:, 1], labels[rows])
        seen.append(sample["qsl_idx"])
    assert sorted(seen) == list(range(len(bounds) - 1))
    assert result["rows"] == ROWS
    assert result["auc"] == pytest.approx(roc_auc_score(labels, predictions), abs=1e-6)
    assert result["log_loss"] == pytest.approx(log_loss(labels, predictions.astype(float)), abs=1e-6)
    assert f"{result['auc']:.6f}" in out


BROKEN = """
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data.program import exit_code
from dlrm.inference import loadgen
from dlrm.inference.loadgen_system import LabelledRows

what, output = sys.argv[1:]


class Broken:
    array_dtype = mlp_dtype = "float32"

    def twin(self):
        return self

    def __call__(self, dense, sparse):
        if what == "predict" and (sparse >= 3000).any():  # the warm-up has the first 2048
            raise ValueError("row 3000 is broken")
        return torch.zeros(len(sparse))


def read(start, stop):
    if what == "read" and stop > 3000:
        raise ValueError("row 3000 is broken")
    return np.arange(start, stop)


rows = LabelledRows(9000, read, lambda x: SimpleNamespace(dense=x, sparse=x, labels=x.astype(np.float32)))
options = loadgen.LoadGenOptions("Server", target_qps=100, seconds=600)
loadgen.leave(exit_code(lambda: loadgen.run(Broken(), rows, options, Path(output))))
"""


def test_an_exception_ends_the_run(tmp_path):
    processes = []
    for what in ("predict", "read"):  # at the same time
        (tmp_path / what).mkdir()
        processes.append(start(tmp_path / what, "-c", BROKEN, what, str(tmp_path / what)))
    for process in processes:
        out, err = process.communicate(timeout=HANG)
        assert err.splitlines()[-1] == "error: row 3000 is broken"
        assert (process.returncode, out) == (2, "")
    assert not list(tmp_path.glob("*/result.json"))


def test_interrupted(tmp_path, made):
    output = tmp_path / "output"
    command = arguments(made[0], "Server", "--target-qps", "10", "--seconds", "600", "--output", str(output))
    process = start(tmp_path, str(ROOT / "infer.py"), *command)
    limit = time.monotonic() + HANG
    while not (output / "mlperf_log_detail.txt").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG)
    assert err.splitlines()[-1] == "error: interrupted"
    assert (process.returncode, out) == (130, "")


@pytest.mark.parametrize(
    ("scenario", "options", "message"),
    [
        ("Server", [], "Server needs a rate: expected --target-qps, or --find-rate, got neither"),
        ("Server", ["--target-qps", "0"], "target-qps: expected more than 0 samples a second, got 0.0"),
        ("Server", ["--target-qps", "9", "--find-rate"], "--find-rate is for --scenario Server without"),
        ("Offline", ["--find-rate"], "--find-rate is for --scenario Server without"),
        ("Offline", ["--seconds", "nan"], "seconds: expected more than 0, got nan"),
        ("MultiStream", ["--target-qps", "9"], "target-qps: MultiStream issues a query when the one before is"),
    ],
)
def test_wrong_options(made, capsys, scenario, options, message):
    assert infer.main(arguments(made[0], scenario, *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("log.tsv", "log.tsv: LoadGen asks for rows in any order, .*python -m data.prepare"),
        ("unlabelled", "unlabelled: expected rows with labels"),
    ],
)
def test_wrong_data(made, capsys, data, message):
    assert infer.main(arguments(made[0], "Offline", data=data)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_loadgen(made, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    assert infer.main(arguments(made[0], "Offline")) == 2
    assert "pip install mlcommons-loadgen" in capsys.readouterr().err


def test_unknown_scenario():
    with pytest.raises(ValueError, match="scenario: expected one of Offline, Server"):
        LoadGenOptions("Interactive")


def machine(offline, short, steady):
    """Return trials on a machine that is VALID up to these rates, and a list of their (scenario, rate, folder)."""
    asked = []

    def trial(scenario, rate, seconds, folder):
        asked.append((scenario, rate, folder))
        if scenario == "Offline":
            return {"valid": True, "reasons": [], "samples_per_second": offline, "latency_ms": {"p99": 1.0}}
        valid = rate <= (steady if seconds == 600 else short)
        return {"valid": valid, "reasons": [] if valid else ["late"], "rate": rate, "latency_ms": {"p99": 2.0}}

    return trial, asked


@pytest.mark.parametrize(("short", "steady"), [(700, 700), (973, 900), (31, 31)])
def test_find_rate(tmp_path, short, steady):
    trial, asked = machine(1000.0, short, steady)
    result = find_rate(trial, 600, tmp_path)
    assert result["valid"]
    # Trials tell the rate to 2.5 %, near 0 only to a thousandth of Offline's; longer runs come down from there by 3 %.
    assert steady * 0.97 - 1 <= result["rate"] <= steady
    folders = [folder for *_, folder in asked]
    trials = folders[: folders.index(tmp_path)]
    assert len(set(trials)) == len(trials) <= 22
    assert all(folder.parent == tmp_path / "trials" for folder in trials)
    assert folders[len(trials) :] == [tmp_path] * (len(folders) - len(trials))
    assert [x["rate"] for x in result["trials"]] == [1000.0, *(rate for _, rate, _ in asked[1:])]


def test_a_rate_that_fails_once_is_tried_again(tmp_path):
    trial, asked = machine(1000.0, 800, 800)

    def disturbed(scenario, rate, seconds, folder):
        result = trial(scenario, rate, seconds, folder)
        # Every other trial is disturbed by something else on the machine.
        first = scenario == "Server" and seconds < 600 and len(asked) % 2 == 0
        return result | ({"valid": False, "reasons": ["disturbed"]} if first else {})

    assert 0.97 * 800 - 1 <= find_rate(disturbed, 600, tmp_path)["rate"] <= 800


def test_find_rate_gives_up(tmp_path):
    trial, asked = machine(1000.0, 700, 100)
    assert not find_rate(trial, 600, tmp_path)["valid"]
    assert sum(folder == tmp_path for *_, folder in asked) == 6
    with pytest.raises(ValueError, match="Server is INVALID at every rate down to"):
        find_rate(machine(1000.0, 0, 0)[0], 600, tmp_path)


@pytest.mark.parametrize("code", [0, 1])
def test_a_program_of_its_own(tmp_path, code):
    program = f"open('result.json', 'w').write('{{\"valid\": {str(not code).lower()}}}'); raise SystemExit({code})"
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {program}"]
    assert run_program(command, tmp_path) == {"valid": not code}


@pytest.mark.parametrize("program", ["raise SystemExit('error: no such data')", "exit()"])
def test_a_program_without_a_result(tmp_path, program):
    message = "exit code 1: error: no such data" if "such" in program else "exit code 0: no message"
    with pytest.raises(ValueError, match=message):
        run_program([sys.executable, "-c", program], tmp_path)
