"""train.py stopped, killed and started again, on generated rows."""

import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

import dlrm.training.run
import dlrm.training.trainer
import infer
import train
from data.formats.opening import open_source
from data.rows import to_frame
from data.synthetic import write
from dlrm.training.checkpoint import TrainingCheckpoints

PROGRAM = str(Path(train.__file__))
# 67 steps an epoch, evaluations after 34 and 67; a line of metrics.jsonl at 100.
OPTIONS = ["--epochs", "2", "--batch-size", "16", "--evaluations-per-epoch", "2", "--robe-size", "500"]
ROWS = 1500


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    write(path, ROWS)
    return path


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    """The folder of a run that nothing disturbed; to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run("--data", rows, "--output", folder, *OPTIONS, "--keep-checkpoints", 5) == 0
    return folder


def run(*args):
    return train.main([str(arg) for arg in args])


def outcome(folder):
    """What is the same after any stops and kills."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("seconds", "samples_per_second", "peak_rss_bytes"):
        assert metrics.pop(name) > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("train/samples_per_second", None)
    return metrics, lines, (folder / "model.safetensors").read_bytes()


def last_error(capsys):
    return capsys.readouterr().err.split("\r")[-1].strip().splitlines()[-1]


class Crash(BaseException):
    """Nothing of the program runs after it."""


@pytest.fixture
def at_step(monkeypatch):
    """Does something in the given step of what is run next; in this process, so quick."""

    def patch(step, do):
        made, original = [], dlrm.training.trainer.train_step

        def counting(*args):
            made.append(1)
            if len(made) == step:
                do()
            return original(*args)

        monkeypatch.setattr(dlrm.training.trainer, "train_step", counting)

    return patch


def crash():
    raise Crash


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# -- Processes --------------------------------------------------------------------------------------------------------


def work(folder, argv):
    """A process of train.py, without the seconds that its imports take."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = argv
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    code = train.main()
    sys.stdout.flush()
    sys.exit(code)


@pytest.fixture(scope="module")
def start():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch.utils.tensorboard", "matplotlib.pyplot"])

    def start(folder, *args):
        folder.mkdir(exist_ok=True)
        process = context.Process(target=work, args=(folder, [PROGRAM, *map(str, args)]))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def undisturbed(start, rows, tmp_path_factory):
    """The folder in which a run was, of the command that the tests below stop and kill."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, "--data", rows, "--output", "run", *OPTIONS, "--resume")
    process.join()
    assert process.exitcode == 0, (folder / "stderr").read_text()
    return folder


def wait_for_checkpoint(process, folder, step):
    while not any(found >= step for found in TrainingCheckpoints(folder / "run").steps()):
        assert process.exitcode is None, (folder / "stderr").read_text()
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "after"), [(signal.SIGTERM, 34), (signal.SIGINT, 0)])
def test_a_signal_stops_a_run_and_the_command_that_is_printed_goes_on(
    start, rows, tmp_path, undisturbed, number, after
):
    process = start(tmp_path, "--data", rows, "--output", "run", *OPTIONS, "--resume")
    wait_for_checkpoint(process, tmp_path, after)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    said = (tmp_path / "stdout").read_text().splitlines()
    step = int(re.fullmatch(r"stopped at step (\d+); everything is saved. To resume:", said[-2])[1])
    assert after <= step < 134
    assert TrainingCheckpoints(tmp_path / "run").steps()[-1] == step
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert said[-1].strip() == shlex.join(["python", PROGRAM, "--resume", "--output", "run"])
    if number == signal.SIGTERM:
        command = said[-1].strip().replace("python", shlex.quote(sys.executable), 1)
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
        assert f"resuming at step {step}" in done.stdout
    else:
        process = start(tmp_path, *shlex.split(said[-1])[2:])
        process.join()
        assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    assert outcome(tmp_path / "run") == outcome(undisturbed / "run")


@pytest.mark.parametrize("more", [[], ["--averaging-steps", "20", "--admission", "0.1"]], ids=" ".join)
def test_a_run_that_was_killed_again_and_again_ends_the_same(start, rows, tmp_path, undisturbed, more):
    """By the command that a scheduler repeats; the first time before anything is saved."""
    moments = random.Random(0)
    command = ["--data", rows, "--output", "run", *OPTIONS, *more, "--resume"]
    if more:
        undisturbed = tmp_path / "undisturbed"
        process = start(undisturbed, *command)
        process.join()
        assert process.exitcode == 0, (undisturbed / "stderr").read_text()
    for step in (None, 0, 34, 67):
        process = start(tmp_path, *command)
        if step is not None:
            wait_for_checkpoint(process, tmp_path, step)
            time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(tmp_path, *command)
    process.join()
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    assert outcome(tmp_path / "run") == outcome(undisturbed / "run")


# -- The same in this process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--robe-size", "500", "--optimizer", "adagrad", "--warmup-steps", "50"],
        ["--embedding", "full", "--table-rows", "data"],
        ["--synthetic-hots", "--robe-size", "500", "--optimizer", "sgd"],
        ["--robe-size", "500", "--averaging-steps", "5", "--admission", "0.1"],
        ["--robe-size", "500", "--optimizer", "sgd", "--admission", "0.1"],
        ["--robe-size", "500", "--admission", "0.1", "--admit-after", "4"],
        ["--robe-size", "500", "--prune", "0.6", "--prune-schedule", "0.05", "0.5", "--averaging-steps", "5"],
    ],
    ids=" ".join,
)
def test_every_model_goes_on_where_it_was(rows, tmp_path, at_step, options):
    options = ["--epochs", 1, "--batch-size", 64, "--evaluations-per-epoch", 2, *options]
    assert run("--data", rows, "--output", tmp_path / "whole", *options) == 0
    at_step(12, terminate)
    assert run("--data", rows, "--output", tmp_path / "run", *options) == 0
    assert TrainingCheckpoints(tmp_path / "run").steps()[-1] == 13, "the step after the signal"
    assert run("--resume", "--output", tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_stopped_in_an_evaluation_and_in_the_test(rows, tmp_path, finished, monkeypatch, capsys):
    for count, step in ((2, 67), (5, 134)):
        folder = tmp_path / str(step)
        evaluations = []

        def evaluate(*args, count=count, evaluations=evaluations, original=dlrm.metrics.evaluate):
            evaluations.append(1)
            if len(evaluations) == count:
                terminate()
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(dlrm.training.run, "evaluate", evaluate)
            assert run("--data", rows, "--output", folder, *OPTIONS) == 0
        assert f"stopped at step {step}; everything is saved" in capsys.readouterr().out
        assert not (folder / "metrics.json").exists()
        assert run("--resume", "--output", folder) == 0
        assert outcome(folder) == outcome(finished)


def test_checkpoints_by_time_and_how_many_are_kept(rows, tmp_path, at_step):
    at_step(30, crash)
    with pytest.raises(Crash):
        run("--data", rows, "--output", tmp_path, *OPTIONS, "--checkpoint-minutes", 0, "--keep-checkpoints", 3)
    assert TrainingCheckpoints(tmp_path).steps() == [27, 28, 29]


def test_the_printed_command_has_the_options_of_the_program(rows, tmp_path, at_step, capsys):
    at_step(3, terminate)
    options = ["--keep-checkpoints", "4", "--checkpoint-minutes", "2.5", "--device", "cpu"]
    assert run("--data", rows, "--output", tmp_path / "a run", *OPTIONS, *options) == 0
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert printed[printed.index("--resume") :][:3] == ["--resume", "--output", str(tmp_path / "a run")]
    assert sorted(printed[-6:]) == sorted(options)


def test_a_second_interrupt_does_not_wait(rows, tmp_path, at_step, capsys):
    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(5, interrupt_twice)
    before = signal.getsignal(signal.SIGINT)
    assert run("--data", rows, "--output", tmp_path, *OPTIONS) == 130
    assert signal.getsignal(signal.SIGINT) is before


# -- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "32"], "--batch-size: 32, but was 16 when this run was started; leave it out"),
        (["--compression", "10"], "--compression: 10.0, but was not given when this run was started"),
        (["--preset", "terabyte"], "--preset: terabyte, but was kaggle when"),
        (["--seed", "5"], "--seed: 5, but was 0 when"),
        (["--optimizer", "sgd"], "--optimizer: sgd, but was not given when"),
        (["--evaluations-per-epoch", "3"], "--evaluations-per-epoch: 3, but was 2 when"),
        (["--synthetic-hots"], "--synthetic-hots: True, but was not given when"),
        (["--admission", "0.1"], "--admission: 0.1, but was not given when"),
        (["--mllog", "log.txt"], "--mllog: log.txt, but was not given when"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_another_run_are_refused(finished, options, message, capsys):
    before = outcome(finished)
    assert run("--output", finished, "--resume", *options) == 2
    assert message in last_error(capsys)
    assert outcome(finished) == before


def test_going_on_for_more_epochs(rows, tmp_path, finished, capsys, at_step):
    shutil.copytree(finished, tmp_path / "run")
    at_step(20, terminate)
    assert run("--resume", "--output", tmp_path / "run", "--epochs", 3, "--preset", "kaggle") == 0
    assert "resuming at step 134" in capsys.readouterr().out
    assert run("--data", rows, "--output", tmp_path / "run", *OPTIONS) == 2, "is not finished any more"
    assert "has an unfinished run with a checkpoint of step 155" in last_error(capsys)
    assert run("--resume", "--output", tmp_path / "run") == 0
    assert run("--data", rows, "--output", tmp_path / "whole", *OPTIONS, "--epochs", 3) == 0
    (metrics, *others), (expected, *of_whole) = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert (metrics, others) == (expected, of_whole)


def test_a_run_goes_on_with_rows_of_its_kind_only(rows, finished, tmp_path, capsys):
    """The model would get the numbers of these rows as they are, where it was trained on logarithms."""
    before = outcome(finished)
    frame = to_frame(np.concatenate(list(open_source(rows).records())))
    names = [name for name in frame.columns if name.startswith("int_")]
    frame.with_columns(pl.col(names).fill_null(0).cast(pl.Float64) + 0.5).write_parquet(tmp_path / "rows.parquet")
    message = "dense: the rows have 'numbers as they are', the model was trained on 'log(x + 1) of integers'"
    assert run("--output", finished, "--resume", "--data", tmp_path / "rows.parquet") == 2
    assert message in last_error(capsys)
    assert outcome(finished) == before
    for command in (
        ["predict", "--output", tmp_path / "p.csv"],
        ["benchmark", "--output", tmp_path / "b"],
        ["loadgen", "--scenario", "Offline", "--output", tmp_path / "l"],
        ["export", "--format", "onnx", "--output", tmp_path / "m.onnx"],
    ):
        arguments = [*command, "--checkpoint", finished, "--data", tmp_path / "rows.parquet"]
        assert infer.main([str(x) for x in arguments]) == 2
        assert message in last_error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_finished_run_that_goes_on_is_the_same(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert run("--resume", "--output", tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(finished)


def test_going_back_with_another_rate(tmp_path, finished):
    """What was trained after the checkpoint is no part of the run: not of its history, logs, checkpoints or weights."""
    shutil.copytree(finished, tmp_path / "run")
    assert run("--resume", "67", "--output", tmp_path / "run", "--learning-rate", 1e-12, "--keep-checkpoints", 5) == 0
    metrics, lines, _ = outcome(tmp_path / "run")
    assert metrics["steps"] == 134
    before, old_lines, _ = outcome(finished)
    assert metrics["history"][:2] == before["history"][:2]
    assert metrics["history"][2:] != before["history"][2:]
    assert [line for line in lines if line["step"] <= 67] == [line for line in old_lines if line["step"] <= 67]
    assert [line["train/learning_rate"] for line in lines if "train/learning_rate" in line] == [1e-12]
    checkpoints = tmp_path / "run" / "checkpoints"
    start, end = (load_file(checkpoints / f"step-{step:09}" / "model.safetensors") for step in (67, 134))
    assert max(float((start[name] - end[name]).abs().max()) for name in start) < 1e-8


def test_the_best_weights_are_those_of_the_run_that_goes_on(rows, tmp_path, monkeypatch):
    """Going back behind the best evaluation: the weights it had kept are not those of this run."""
    options = ["--data", rows, "--output", tmp_path / "run", *OPTIONS, "--keep-checkpoints", 5]
    aucs = iter([0.6, 0.5, 0.7, 0.5, 0.5])
    fake = lambda *_: {"auc": next(aucs), "log_loss": 1.0}  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(dlrm.training.run, "evaluate", fake)
        assert run(*options) == 0
        aucs = iter([0.5, 0.5, 0.5])
        assert (
            run("--resume", "67", "--output", tmp_path / "run", "--learning-rate", 1e-12, "--keep-checkpoints", 5) == 0
        )
    metrics, _, weights = outcome(tmp_path / "run")
    assert metrics["validation_auc"] == 0.6
    assert weights == (tmp_path / "run" / "checkpoints" / "step-000000034" / "model.safetensors").read_bytes()


def test_data_may_move_but_not_change(rows, tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(rows, tmp_path / "moved.tsv")
    assert run("--resume", "67", "--output", tmp_path / "run", "--data", tmp_path / "moved.tsv") == 0
    assert outcome(tmp_path / "run") == outcome(finished)
    write(tmp_path / "others.tsv", 700)
    assert run("--resume", "--output", tmp_path / "run", "--data", tmp_path / "others.tsv") == 2
    assert last_error(capsys) == (
        f"error: {tmp_path / 'others.tsv'}: not the data of this run: 500 rows train, 100 validate, 100 test; expected "
        "1,071 rows train, 214 validate, 215 test"
    )
    assert outcome(tmp_path / "run") == outcome(finished)


def test_nothing_to_go_on_from(rows, tmp_path, finished, capsys):
    assert run("--resume", "--output", tmp_path / "run") == 2
    assert last_error(capsys) == "error: --data: expected to start a run, and there is no checkpoint to resume from"
    assert run("--resume", "7", "--data", rows, "--output", tmp_path / "run") == 2
    assert last_error(capsys).endswith("no checkpoint of step 7: there are none")
    assert not (tmp_path / "run").exists()
    assert run("--resume", "7", "--output", finished) == 2
    assert last_error(capsys).endswith("no checkpoint of step 7: there are 0, 34, 67, 101, 134")


def test_a_run_is_overwritten_on_request_only(rows, tmp_path, finished, at_step, capsys):
    at_step(40, crash)
    with pytest.raises(Crash):
        run("--data", rows, "--output", tmp_path / "run", *OPTIONS, "--seed", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run("--data", rows, "--output", tmp_path / "run", *OPTIONS) == 2
    assert last_error(capsys) == (
        f"error: --output: {tmp_path / 'run'} has an unfinished run with a checkpoint of step 34; resume it "
        "(--resume), choose another folder, or replace that run with --overwrite"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert run("--resume", "--output", tmp_path / "run") == 0
    assert run("--data", rows, "--output", tmp_path / "run", *OPTIONS) == 2
    assert run("--data", rows, "--output", tmp_path / "run", *OPTIONS, "--overwrite") == 0
    assert outcome(tmp_path / "run") == outcome(finished)
    assert TrainingCheckpoints(tmp_path / "run").steps() == [101, 134]


def test_killed_after_going_back(rows, tmp_path, finished, at_step):
    """The checkpoints it has left behind are not gone on from."""
    shutil.copytree(finished, tmp_path / "run")
    at_step(3, crash)
    with pytest.raises(Crash):
        run("--resume", "34", "--output", tmp_path / "run")
    assert TrainingCheckpoints(tmp_path / "run").steps() == [0, 34]
    assert run("--resume", "--output", tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(finished)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_ends_the_same(tmp_path, finished, capsys):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000000134" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    assert run("--resume", "--output", tmp_path / "run") == 2
    error = last_error(capsys)
    assert error.startswith(f"error: {path}: damaged: ")
    offered = re.search(r"the one before it: --resume (\d+)$", error)[1]
    assert run("--resume", offered, "--output", tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(finished)


def test_a_target_ends_the_run_early(rows, tmp_path, finished, capsys):
    history = outcome(finished)[0]["history"]
    target = history[0]["auc"] - 1e-6
    assert run("--data", rows, "--output", tmp_path / "run", *OPTIONS, "--target-auc", target) == 0
    assert f"AUC {target} reached at epoch 0.51\n" in capsys.readouterr().out
    metrics = outcome(tmp_path / "run")[0]
    assert (metrics["steps"], metrics["target_auc"], metrics["target_epoch"]) == (34, target, 34 / 67)
    assert metrics["history"] == history[:1]
    # A higher one lets it go on.
    assert run("--resume", "--output", tmp_path / "run", "--target-auc", 0.99) == 0
    assert "AUC 0.99 not reached\n" in capsys.readouterr().out
    metrics, lines, weights = outcome(tmp_path / "run")
    expected, *others = outcome(finished)
    assert [lines, weights] == others
    assert (metrics["target_epoch"], metrics["history"]) == (None, expected["history"])
    assert expected["target_auc"] is None


# -- Divergence and logs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["1e30", "3000"])
def test_diverging_training_exits_3_and_names_what_is_good(rows, tmp_path, finished, capsys, rate):
    shutil.copytree(finished, tmp_path / "run")
    options = ["--data", rows, *OPTIONS, "--optimizer", "sgd", "--learning-rate", rate]
    assert run("--output", tmp_path / "run", "--overwrite", *options) == 3
    error = last_error(capsys)
    found = re.search(r"is .* at step (\d+) \(batch (\d+) of epoch 1\); a lower learning rate than (\S+) may", error)
    assert found, error
    assert (found[1], float(found[3])) == (found[2], float(rate))
    advice = r"The checkpoint of step (\d+) is good: python .* --resume --output \S+ --learning-rate X$"
    last = int(re.search(advice, error)[1])
    checkpoints = TrainingCheckpoints(tmp_path / "run")
    assert last == checkpoints.steps()[-1] < int(found[1])
    assert all(bool(p.isfinite().all()) for p in checkpoints.load().model.parameters())
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert run("--resume", "--output", tmp_path / "run", "--learning-rate", 0.01) == 0


def test_mllog_of_a_run_that_was_stopped(rows, tmp_path, at_step, capsys):
    from tests.dlrm.training.test_mllog import complies, shape

    options = ["--data", rows, *OPTIONS]
    assert run(*options, "--output", tmp_path / "whole", "--mllog", tmp_path / "whole.txt") == 0
    assert complies(tmp_path / "whole.txt", "2.1.0")
    at_step(50, terminate)
    assert run(*options, "--output", tmp_path / "run", "--mllog", tmp_path / "log.txt") == 0
    assert shape(tmp_path / "log.txt")[-1] == ("eval_stop", 34 / 67)
    (tmp_path / "log.txt").rename(tmp_path / "moved.txt")
    assert run("--resume", "--output", tmp_path / "run") == 2
    assert "log.txt: not the log of this run" in last_error(capsys)
    assert run("--resume", "--output", tmp_path / "run", "--mllog", tmp_path / "moved.txt") == 0
    assert complies(tmp_path / "moved.txt", "2.1.0")
    assert shape(tmp_path / "moved.txt") == shape(tmp_path / "whole.txt")
    # The end is taken out, and written again.
    assert run("--resume", "--output", tmp_path / "run") == 0
    assert shape(tmp_path / "moved.txt") == shape(tmp_path / "whole.txt")
