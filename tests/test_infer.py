"""infer.py as its user runs it."""

import copy
import json
import os

import numpy as np
import polars as pl
import pytest
import torch

import infer
from data import prepare
from data.formats.criteo_tsv import CriteoTSV
from data.rows import Batch
from data.synthetic import write
from dlrm import DLRM, DLRMConfig, checkpoint

CONFIG = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10,) * 26, compression=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = DLRM(CONFIG)
    checkpoint.save(folder, model)
    return folder, model


def run(folder, data, output, *options):
    paths = ["--checkpoint", str(folder), "--data", str(data), "--output", str(output)]
    return infer.main(["predict", *paths, *options])


@pytest.mark.parametrize("name", ["rows.tsv", "rows.tsv.gz"])
@pytest.mark.parametrize("labelled", [True, False])
def test_one_probability_per_row_in_order(tmp_path, trained, name, labelled, capsys):
    folder, model = trained
    write(tmp_path / name, 5000, labelled=labelled)  # more than a batch
    assert run(folder, tmp_path / name, tmp_path / "out" / "predictions.csv") == 0
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "probability"
    batch = Batch.concatenate(list(CriteoTSV(tmp_path / name).read()))
    with torch.no_grad():
        expected = torch.sigmoid(model(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse)))
    np.testing.assert_allclose(np.array(lines[1:], dtype=np.float32), expected.numpy(), rtol=1e-5)
    out = capsys.readouterr().out
    assert "5,000 probabilities" in out
    assert ("AUC" in out) == labelled


@pytest.mark.parametrize("made", ["rows", "parquet", "npz", "npy", "bin"])
def test_any_format_has_the_probabilities_of_the_log(tmp_path, trained, made):
    write(tmp_path / "rows.tsv.gz", 700)
    options = ["--format", made, "--shard-rows", "300", "--output", str(tmp_path / made)]
    assert prepare.main([str(tmp_path / "rows.tsv.gz"), *options]) == 0
    assert run(trained[0], tmp_path / "rows.tsv.gz", tmp_path / "log.csv") == 0
    assert run(trained[0], tmp_path / made, tmp_path / "made.csv") == 0
    log, other = (np.loadtxt(tmp_path / name, skiprows=1) for name in ("log.csv", "made.csv"))
    np.testing.assert_array_equal(other, log)


@pytest.mark.parametrize("suffix", [".parquet", ".npy"])
def test_any_format_of_predictions(tmp_path, trained, suffix):
    write(tmp_path / "rows.tsv", 3000)
    for name in ("p.csv", f"p{suffix}"):
        assert run(trained[0], tmp_path / "rows.tsv", tmp_path / name) == 0
    want = np.loadtxt(tmp_path / "p.csv", skiprows=1, dtype=np.float32)
    path = tmp_path / f"p{suffix}"
    got = np.load(path) if suffix == ".npy" else pl.read_parquet(path)["probability"].to_numpy()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_part_of_the_rows(tmp_path, trained, prepared):
    write(tmp_path / "rows.tsv", 700)
    data = tmp_path / "rows.tsv"
    assert run(trained[0], data, tmp_path / "all.npy") == 0
    if prepared:
        data = tmp_path / "prepared"
        assert prepare.main([str(tmp_path / "rows.tsv"), "--output", str(data)]) == 0
    whole = np.load(tmp_path / "all.npy")
    for part, rows in {"train": slice(0, 500), "validation": slice(500, 600), "test": slice(600, 700)}.items():
        assert run(trained[0], data, tmp_path / "part.npy", "--part", part) == 0
        np.testing.assert_allclose(np.load(tmp_path / "part.npy"), whole[rows], rtol=3e-7)


def test_an_int8_array_moves_predictions_a_little(tmp_path, trained):
    write(tmp_path / "rows.tsv", 300)
    assert run(trained[0], tmp_path / "rows.tsv", tmp_path / "a.npy") == 0
    assert run(trained[0], tmp_path / "rows.tsv", tmp_path / "b.npy", "--array-dtype", "int8") == 0
    moved = np.abs(np.load(tmp_path / "a.npy") - np.load(tmp_path / "b.npy"))
    assert 0 < moved.max() < 1e-3


def test_a_model_of_nan_predicts_nothing(tmp_path, trained, capsys):
    write(tmp_path / "rows.tsv", 30)
    model = copy.deepcopy(trained[1])
    with torch.no_grad():
        model.top[0].bias[0] = torch.nan
    checkpoint.save(tmp_path / "nan", model)
    assert run(tmp_path / "nan", tmp_path / "rows.tsv", tmp_path / "p.csv") == 2
    assert "error: the model predicts NaN" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def benchmark(folder, *options):
    sizes = ["--batch-sizes", "1", "16", "--seconds", "0.1"]
    return infer.main(["benchmark", "--checkpoint", str(folder), *sizes, *options])


def test_benchmark(tmp_path, trained, capsys):
    write(tmp_path / "rows.tsv", 2100)
    options = ["--data", str(tmp_path / "rows.tsv"), "--part", "test", "--against", "full", "eager"]
    assert benchmark(trained[0], *options, "--array-dtype", "int8", "--output", str(tmp_path / "out")) == 0
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    names = ["ROBE 3.006x, array int8", "ROBE 3.006x", "full tables", "full tables, eager", "ROBE 3.006x, eager"]
    assert [(r["batch_size"], r["candidate"]) for r in result["results"]] == [(b, n) for b in (1, 16) for n in names]
    assert result["machine"]["torch"] == torch.__version__
    assert (tmp_path / "out" / "throughput.png").stat().st_size > 10_000
    # The scores are predict's, of the same rows.
    capsys.readouterr()
    assert run(trained[0], tmp_path / "rows.tsv", tmp_path / "p.npy", "--part", "test") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    for name in ("ROBE 3.006x", "ROBE 3.006x, eager"):
        scores = result["candidates"][name]["scores"]
        assert scores["rows"] == 300
        assert said == f"AUC {scores['auc']:.4f}, log loss {scores['log_loss']:.4f}"
    assert result["candidates"]["full tables"]["scores"] is None


def test_benchmark_on_generated_rows(trained, capsys):
    assert benchmark(trained[0]) == 0
    assert {"benchmark.json", "throughput.png"} <= set(os.listdir(trained[0] / "benchmark"))
    assert "ROBE 3.006x: 0.0 MB of embeddings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--array-dtype", "int8"], "--data: expected with --array-dtype and --mlp-dtype, so that AUC stands beside"),
        (
            ["--against", "everything"],
            "against: expected full, full-pruned, eager or a file that export made, got 'everything'",
        ),
    ],
)
def test_benchmark_refuses(trained, options, message, capsys):
    assert benchmark(trained[0], *options) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_shard_that_was_changed_is_not_predicted_from(tmp_path, trained, capsys):
    write(tmp_path / "rows.tsv", 50)
    assert prepare.main([str(tmp_path / "rows.tsv"), "--output", str(tmp_path / "prepared")]) == 0
    shard = tmp_path / "prepared" / "rows-00000.rows"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(0, 0))  # whatever the clock's resolution
    assert run(trained[0], tmp_path / "prepared", tmp_path / "p.csv") == 2
    assert "rows-00000.rows: changed since it was written" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_one_label_only_has_no_auc(tmp_path, trained, capsys):
    write(tmp_path / "rows.tsv", 50)
    text = "\n".join("1" + line[1:] for line in (tmp_path / "rows.tsv").read_text().splitlines())
    (tmp_path / "rows.tsv").write_text(text)
    assert run(trained[0], tmp_path / "rows.tsv", tmp_path / "predictions.csv") == 0
    assert "AUC" not in capsys.readouterr().out


def test_bad_rows_leave_the_old_file(tmp_path, trained, capsys):
    output = tmp_path / "predictions.csv"
    output.write_text("old")
    write(tmp_path / "rows.tsv", 6000)
    with open(tmp_path / "rows.tsv", "a") as file:
        file.write("1\t2\n")
    assert run(trained[0], tmp_path / "rows.tsv", output) == 2
    assert "rows.tsv:6001: expected 40 tab-separated fields, got 2" in capsys.readouterr().err
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.csv", "rows.tsv"]


def test_bad_paths(tmp_path, trained, capsys):
    write(tmp_path / "rows.tsv", 10)
    assert run(tmp_path / "nowhere", tmp_path / "rows.tsv", tmp_path / "p.csv") == 2
    assert "config.json: no such file; a checkpoint is a folder with" in capsys.readouterr().err
    assert run(trained[0], tmp_path / "nowhere.tsv", tmp_path / "p.csv") == 2
    assert "nowhere.tsv: No such file" in capsys.readouterr().err
    assert run(trained[0], tmp_path / "rows.tsv", tmp_path) == 2
    assert "is a folder; expected the name of a file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.tsv"]
