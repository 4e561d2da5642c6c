"""infer.py as its user runs it."""

import numpy as np
import pytest
import torch

import infer
from data.rows import Batch
from data.synthetic import write
from data.tsv import CriteoTSV
from dlrm import DLRM, DLRMConfig, checkpoint

CONFIG = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10,) * 26, compression=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = DLRM(CONFIG)
    checkpoint.save(folder, model)
    return folder, model


def run(folder, data, output):
    return infer.main(["predict", "--checkpoint", str(folder), "--data", str(data), "--output", str(output)])


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
