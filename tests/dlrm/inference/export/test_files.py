"""Files of any format: what is written, what is refused, and infer.py export."""

import numpy as np
import pytest
import torch
from torch import nn

import infer
from data.formats.criteo_tsv import CriteoTSV
from data.synthetic import write
from dlrm import DLRM, checkpoint
from dlrm.inference.export import export, files, load
from robe import Admission, EmbeddingBagConfig, RobeEmbeddingBagCollection
from tests.dlrm.inference.export.models import CONFIG, eager, inputs, make


def test_load_gives_a_function_of_tensors(tmp_path):
    model = make()
    export(model, tmp_path / "model.onnx", format="onnx")
    dense, sparse = inputs(model, 9)
    probability = load(tmp_path / "model.onnx")(torch.from_numpy(dense), torch.from_numpy(sparse))
    np.testing.assert_allclose(probability, eager(model, dense, sparse), atol=1e-6)
    with pytest.raises(ValueError, match=r"expected a name that ends with \.onnx or \.pt2"):
        load(tmp_path / "model.pt")


@pytest.mark.slow
def test_no_id_is_counted_by_an_export(tmp_path):
    model = make()
    model.embeddings.admission = admission = Admission(64, threshold=1, counter_bytes=1 << 23)
    model.train()
    for format, name in (("onnx", "model.onnx"), ("aoti", "model.pt2")):
        export(model, tmp_path / name, format=format)
        assert not admission.filter.any()
        assert not admission.counter.counters.any()
        assert (tmp_path / name).stat().st_size < 1 << 22, "without the counters"


def test_a_model_of_nan_is_not_written(old_file):
    model = make()
    with torch.no_grad():
        model.top[0].bias[0] = torch.nan
    with pytest.raises(ValueError, match="differ from the model's by nan"):
        export(model, old_file, format="onnx")


def test_bad_arguments(tmp_path):
    for path, options, message in (
        ("model.onnx", {"format": "tflite"}, "format: expected one of onnx, aoti, got 'tflite'"),
        ("model.pt2", {"format": "onnx"}, "ends with .onnx for format onnx"),
        ("model.onnx", {"format": "aoti"}, "ends with .pt2 for format aoti"),
        ("model.onnx", {"format": "onnx", "array_dtype": "int4"}, "array_dtype: expected one of"),
        ("model.onnx", {"format": "onnx", "batches": []}, "at least one row"),
    ):
        with pytest.raises(ValueError, match=message):
            export(make(), tmp_path / path, **options)
    with pytest.raises(ValueError, match="needs a model with a ROBE array"):
        export(make(embedding="full"), tmp_path / "model.onnx", format="onnx", array_dtype="int8")
    tables = [EmbeddingBagConfig(str(k), 10, 4) for k in range(3)]
    for embeddings in (nn.Embedding(3, 4), RobeEmbeddingBagCollection(tables, robe_size=50)):
        with pytest.raises(ValueError, match="embeddings: expected"):
            export(DLRM(CONFIG, embeddings), tmp_path / "model.onnx", format="onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export(make(), tmp_path / "folder.onnx", format="onnx")


@pytest.fixture(scope="module")
def criteo(tmp_path_factory):
    """A checkpoint of a model of Criteo's rows."""
    folder = tmp_path_factory.mktemp("criteo")
    checkpoint.save(folder, make(num_dense=13, table_rows=(10,) * 26))
    return folder


def test_the_rows_of_data_are_compared(tmp_path, criteo, capsys, monkeypatch):
    write(tmp_path / "rows.tsv", 10_500)
    compared = []
    largest = files.largest_difference

    def spy(exported, expected, rows):
        compared.append(rows)
        return largest(exported, expected, rows)

    monkeypatch.setattr(files, "largest_difference", spy)
    arguments = ["export", "--checkpoint", str(criteo), "--format", "onnx", "--data", str(tmp_path / "rows.tsv")]
    assert infer.main([*arguments, "--output", str(tmp_path / "new" / "model.onnx")]) == 0
    assert "10,000 rows" in capsys.readouterr().out
    ((dense, sparse),) = compared
    source = list(CriteoTSV(tmp_path / "rows.tsv").read())
    np.testing.assert_array_equal(sparse, np.concatenate([batch.sparse for batch in source])[:10_000])
    np.testing.assert_array_equal(dense, np.concatenate([batch.dense for batch in source])[:10_000])


def test_errors_are_one_line(tmp_path, criteo, capsys):
    for checkpoint_folder, output, options, message in (
        (tmp_path / "nowhere", "model.onnx", [], "config.json: no such file"),
        (criteo, "model.pt2", [], "ends with .onnx"),
        (criteo, "model.onnx", ["--data", str(tmp_path / "nowhere.tsv")], "nowhere.tsv: No such file"),
    ):
        arguments = ["--checkpoint", str(checkpoint_folder), "--output", str(tmp_path / output), "--format", "onnx"]
        assert infer.main(["export", *arguments, *options]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
