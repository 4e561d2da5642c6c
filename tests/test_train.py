"""train.py as its user runs it, on generated rows."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

import dlrm.training.plan
import infer
import train
from data import prepare
from data.batches import split_rows, vocabulary
from data.formats.criteo_tsv import CriteoTSV
from data.formats.opening import open_source
from data.rows import Batch
from data.synthetic import write
from dlrm import checkpoint
from dlrm.metrics import predict

ROOT = Path(train.__file__).parent
ROWS = 3000
QUICK = ["--epochs", "1", "--batch-size", "256", "--evaluations-per-epoch", "2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.tsv.gz"
    write(path, ROWS)
    return path


def run(*args):
    return train.main([str(arg) for arg in args])


@pytest.mark.parametrize(
    "options",
    [
        ["--compression", 1000],
        ["--compression", 10, "--table-rows", "data", "--block-size", 4, "--optimizer", "adagrad"],
        ["--robe-size", 777, "--seed", 3],
        ["--compression", 100, "--table-rows", "data", "--admission", 0.125, "--averaging-steps", 6],
        ["--robe-size", 777, "--admission", 0.2, "--admit-after", 3],
        ["--embedding", "full", "--table-rows", "data"],
        ["--embedding", "hash", "--compression", 1000, "--optimizer", "sgd", "--learning-rate", 0.1],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_a_run_leaves_a_checkpoint_whose_test_scores_are_those_reported(rows, tmp_path, options, capsys):
    assert run("--data", rows, "--output", tmp_path / "run", *QUICK, *options) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "model.safetensors", "metrics.json", "learning_curve.png", "metrics.jsonl", "tensorboard",
        "checkpoints",
    }  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    test = split_rows(ROWS)[2]
    batch = Batch.concatenate(list(CriteoTSV(rows).read(test.start, test.stop)))
    model = checkpoint.load(tmp_path / "run")
    probability = np.concatenate(list(predict(model, [batch])))
    assert metrics["auc"] == pytest.approx(roc_auc_score(batch.labels, probability), abs=1e-6)
    assert metrics["log_loss"] == pytest.approx(log_loss(batch.labels, probability.astype(float)), abs=1e-5)
    assert metrics["array_floats"] == sum(p.numel() for p in model.embeddings.parameters())
    kept = 4 * metrics["array_floats"] + metrics["admission_bytes"]
    assert metrics["compression"] == pytest.approx(4 * metrics["full_floats"] / kept)
    assert metrics["rows"] == {"train": 2142, "validation": 429, "test": 429}
    assert len(metrics["history"]) == 2
    assert metrics["validation_auc"] == max(point["auc"] for point in metrics["history"])
    assert metrics["samples_per_second"] > 0
    assert metrics["peak_rss_bytes"] > 1e8
    assert {"seed", "epochs", "seconds", "environment"} <= metrics.keys()
    assert f"test AUC {metrics['auc']:.4f}" in capsys.readouterr().out


def test_compression_is_that_of_the_tables_chosen(rows, tmp_path):
    run("--data", rows, "--output", tmp_path / "preset", *QUICK)
    assert json.loads((tmp_path / "preset" / "metrics.json").read_text())["array_floats"] == 540_201
    run("--data", rows, "--output", tmp_path / "data", *QUICK, "--table-rows", "data", "--compression", 10)
    metrics = json.loads((tmp_path / "data" / "metrics.json").read_text())
    file = CriteoTSV(rows)
    known = vocabulary(file.read(0, split_rows(ROWS)[0].stop), file.layout.features)
    assert metrics["full_floats"] == 16 * sum(len(ids) + 1 for ids in known)
    assert metrics["array_floats"] == metrics["full_floats"] // 10


def test_ids_that_have_a_row_are_chosen_from_the_training_rows(rows, tmp_path, capsys):
    options = ["--table-rows", "data", "--compression", 100, "--admission", 0.125]
    assert run("--data", rows, "--output", tmp_path / "run", *QUICK, *options) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 100 <= metrics["compression"] < 100.1
    bytes = metrics["admission_bytes"]
    assert 0 < bytes <= metrics["full_floats"] * 4 / 100 * 0.125
    model = checkpoint.load(tmp_path / "run")
    train_rows = split_rows(ROWS)[0]
    batch = Batch.concatenate(list(CriteoTSV(rows).read(0, train_rows.stop)))
    gains, rate = [], batch.labels.mean()
    for column in batch.sparse.T:
        for x in np.unique(column):
            n, k = (column == x).sum(), batch.labels[column == x].sum()
            information = n * rate * (1 - rate)
            mean = (k - n * rate) / (information + 4)
            gains.append((information * mean**2 / 2 if n >= 10 else -1, x, len(gains)))
    assert model.embeddings.admission.filter.any()
    features = np.repeat(np.arange(26), [len(np.unique(column)) for column in batch.sparse.T])
    often = sum(gain >= 0 for gain, _, _ in gains)
    assert often - 8 < bytes - 8 < often, "8 bits for each, in whole words"
    best = sorted(zip(gains, features), reverse=True)[: often - 5]
    assert best[-1][0][0] > 0
    for (_, x, _), feature in best:
        ids = torch.full((1, 26), int(x))
        assert model.embeddings.admission.admits(ids, model.embeddings.table_keys)[0, feature]


def test_same_seed_same_weights_other_seed_others(rows, tmp_path):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--data", rows, "--output", tmp_path / name, *QUICK, "--robe-size", 500, "--seed", seed)
        states.append((tmp_path / name / "model.safetensors").read_bytes())
    assert states[0] == states[1] != states[2]


def test_evaluation_data_of_its_own(rows, tmp_path):
    write(tmp_path / "eval.tsv", 401, seed=9)
    assert run("--data", rows, "--eval-data", tmp_path / "eval.tsv", "--output", tmp_path / "run", *QUICK) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows"] == {"train": ROWS, "validation": 200, "test": 201}


def write_lines(path, count, change=lambda lines: lines):
    write(path, count)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


BAD = {
    "missing": (None, "rows.tsv: No such file or directory"),
    "empty": (lambda path: path.write_text(""), "rows.tsv: the file is empty"),
    "not rows": (lambda path: path.write_bytes(b"a,b,c\n1,2,3\n"), "rows.tsv:1: not a Criteo row"),
    "not Parquet": (lambda path: path.write_bytes(b"PAR1\x15\x04"), "rows.tsv: not a Parquet file that can be read"),
    "too few": (lambda path: write(path, 5), "rows.tsv: expected at least 7 rows"),
    "no labels": (lambda path: write(path, 20, labelled=False), "rows.tsv: has no labels"),
    # In the test part, which training itself would reach last.
    "bad line": (lambda path: write_lines(path, 20, lambda lines: [*lines[:19], "1\t2"]), "rows.tsv:20: expected 40"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, case, capsys):
    make, message = BAD[case]
    if make:
        make(tmp_path / "rows.tsv")
    assert run("--data", tmp_path / "rows.tsv", "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert message in error[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compression", "0"], "compression: expected a positive number, got 0.0"),
        (["--compression", "1"], "compression: expected more than 1"),
        (["--robe-size", "5"], "an array of 5 weights does not hold one block of 16"),
        (["--embedding", "full", "--compression", "10"], "the full tables are not compressed"),
        (["--epochs", "0"], "epochs: expected at least 1"),
        (["--preset", "terabyte", "--embedding", "full"], "the embeddings take 96.1 GB"),
        (["--block-size", "0"], "block_size: expected at least 1, got 0"),
        (["--admission", "1"], "--admission: expected a share between 0 and 1, of --embedding robe, got 1.0"),
        (["--admission", "0.1", "--embedding", "hash"], "--admission: expected a share between 0 and 1, of --embedd"),
        (["--admit-after", "5"], "--admit-after: expected --admission with it"),
        (["--admission", "0.1", "--admit-after", "0"], "threshold: expected at least 1, got 0"),
        (["--averaging-steps", "-1"], "averaging_steps: expected at least 0, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_options_are_refused(rows, tmp_path, options, message, capsys, monkeypatch):
    monkeypatch.setattr(dlrm.training.plan, "total_memory", lambda: 24e9)
    assert run("--data", rows, "--output", tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_output_that_is_a_file(rows, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert run("--data", rows, "--output", tmp_path / "run") == 2
    assert "is a file; expected a folder" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.slow
def test_from_the_command_line(rows, tmp_path):
    """A process of its own: exit code, no traceback, progress on stderr."""
    command = [
        sys.executable,
        ROOT / "train.py",
        "--data",
        rows,
        "--robe-size",
        "500",
        "--output",
        tmp_path / "run",
        *QUICK,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "validation_auc=" in done.stderr
    assert "loss=" in done.stderr
    bad = subprocess.run(
        [*command, "--overwrite", "--data", tmp_path / "nowhere"], capture_output=True, text=True, check=False
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"error: {tmp_path / 'nowhere'}: No such file or directory\n"


# -- Data in other formats --------------------------------------------------------------------------------------------


def multi_hot(folder, rows, hots, seed=0):
    """torchrec's files."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    np.save(folder / "day_0_dense.npy", rng.normal(size=(rows, 13)).astype("f4"))
    np.save(folder / "day_0_labels.npy", rng.integers(0, 2, (rows, 1)).astype("i4"))
    ids = {str(i): rng.integers(0, 1000, (rows, hot)).astype("i4") for i, hot in enumerate(hots)}
    np.savez(folder / "day_0_sparse_multi_hot.npz", **ids)
    return folder


def metrics_of(tmp_path, data, *options):
    output = tmp_path / "run"
    assert run("--data", data, "--output", output, "--overwrite", *QUICK, "--robe-size", 500, *options) == 0
    return json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.mark.parametrize("options", [[], ["--embedding", "full", "--table-rows", "data"]], ids=["robe", "full"])
def test_several_ids_a_feature(tmp_path, options, capsys, rows):
    hots = (3, 1, 2) + (1,) * 22 + (4,)
    data = multi_hot(tmp_path / "data", 700, hots)
    size = [] if options else ["--robe-size", 500]
    assert run("--data", data, "--output", tmp_path / "run", *QUICK, *size, *options) == 0
    assert checkpoint.load(tmp_path / "run").config.hots == hots
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows"] == {"train": 500, "validation": 100, "test": 100}
    command = ["predict", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "p.csv"), "--data"]
    assert infer.main([*command, str(data)]) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 701
    capsys.readouterr()
    assert infer.main([*command, str(rows)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "has one id a feature, the model was trained on 3, 1, 2, 1" in error[0]


@pytest.mark.parametrize("split", ["rows", "days", "files"])
def test_a_prepared_folder(tmp_path, split):
    for i, count in enumerate((300, 200, 101)):
        write(tmp_path / f"day_{i}.gz", count, seed=i)
    days = [str(tmp_path / f"day_{i}.gz") for i in range(3)]
    options = {
        "rows": days,
        "days": [*days, "--split", "days"],
        "files": [days[0], "--validation", days[1], "--test", days[2]],
    }[split]
    assert prepare.main([*options, "--output", str(tmp_path / "prepared")]) == 0
    expected = {"rows": (429, 86, 86), "days": (500, 50, 51), "files": (300, 200, 101)}[split]
    metrics = metrics_of(tmp_path, tmp_path / "prepared")
    assert metrics["rows"] == dict(zip(("train", "validation", "test"), expected))


def test_logs_their_folder_and_what_is_prepared_of_them_have_the_same_rows(tmp_path):
    (tmp_path / "logs").mkdir()
    for i in (10, 2):
        write(tmp_path / "logs" / f"day_{i}.gz", 350, seed=i)
    scores = [metrics_of(tmp_path, tmp_path / "logs")]
    for format in ("rows", "parquet"):
        out = tmp_path / format
        assert prepare.main([str(tmp_path / "logs"), "--format", format, "--output", str(out)]) == 0
        scores.append(metrics_of(tmp_path, out))
        batches = [Batch.concatenate(list(open_source(path).read())) for path in (tmp_path / "logs", out)]
        np.testing.assert_array_equal(batches[0].sparse, batches[1].sparse)
        np.testing.assert_array_equal(batches[0].dense, batches[1].dense)
        np.testing.assert_array_equal(batches[0].labels, batches[1].labels)
    assert [metrics["rows"]["train"] for metrics in scores] == [500] * 3
    assert scores[0]["auc"] == scores[2]["auc"], "both are streams"
