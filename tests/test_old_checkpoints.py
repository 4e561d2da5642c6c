"""Folders that earlier versions wrote: models load, and runs are resumed to the same end.

tests/fixtures/0.8.0 has a run that version 0.8.0 stopped at step 41 of 64, the model that it went on to, and what it
measured; make.py there made it. The rows are generated again from their seed.

With AVX-512, as where the fixture was made, all weights end with the same bits. With other instructions torch sums the
products of the MLPs in another order: with AVX2, weights end within 1.2e-7. Another hash, filter, optimizer state or
order of rows would change them by 1e-3 and more.
"""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import robe
import train
from data.formats.opening import open_source
from data.synthetic import write
from data.training_rows import TrainingRows
from dlrm import checkpoint
from dlrm.metrics import predict
from dlrm.training.checkpoint import TrainingCheckpoints

FIXTURE = Path(__file__).parent / "fixtures" / "0.8.0"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    write(path, EXPECTED["rows"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == EXPECTED["rows_sha256"], "data.synthetic generates other rows than it did"
    return path


def probabilities(folder, rows):
    test = TrainingRows(rows).ranges["test"]
    return np.concatenate(list(predict(checkpoint.load(folder), open_source(rows).read(test.start, test.stop))))


def test_a_model_of_0_8_0_predicts_what_it_predicted(rows):
    model = checkpoint.load(FIXTURE / "finished")
    assert (model.embeddings.array.size, model.config.admission_bytes) == (400, 192)
    assert model.embeddings.admission.filter.any()
    np.testing.assert_allclose(probabilities(FIXTURE / "finished", rows), EXPECTED["probabilities"], rtol=0, atol=1e-6)


def test_a_run_of_0_8_0_is_resumed_to_the_same_end(rows, tmp_path, capsys):
    shutil.copytree(FIXTURE / "interrupted", tmp_path / "run")
    assert TrainingCheckpoints(tmp_path / "run").steps() == [41]
    assert train.main(["--resume", "--output", str(tmp_path / "run"), "--data", str(rows)]) == 0
    assert "resuming at step 41" in capsys.readouterr().out
    got = load_file(tmp_path / "run" / "model.safetensors")
    expected = load_file(FIXTURE / "finished" / "model.safetensors")
    start = load_file(FIXTURE / "interrupted" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            got[name], weight, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )
    changes = [
        float((expected[name] - start[name]).abs().max()) for name in expected if start[name].is_floating_point()
    ]
    assert min(changes) > 100 * TOLERANCE, "every tensor has changed since then"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["log_loss"] == pytest.approx(EXPECTED["log_loss"], abs=TOLERANCE)
    assert metrics["auc"] == pytest.approx(EXPECTED["auc"], abs=1.01 / (19 * 81)), "one pair of rows may change places"
    history = metrics["history"]
    assert [point["step"] for point in history] == [16, 32, 48, 64]
    assert history[:2] == EXPECTED["history"][:2]
    for point, old in zip(history[2:], EXPECTED["history"][2:], strict=True):
        assert point["train_loss"] == pytest.approx(old["train_loss"], abs=TOLERANCE)
        assert point["log_loss"] == pytest.approx(old["log_loss"], abs=TOLERANCE)
    np.testing.assert_allclose(probabilities(tmp_path / "run", rows), EXPECTED["probabilities"], rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def layers_of_0_8_0():
    """The functions that made layers.*; they use public names alone."""
    spec = importlib.util.spec_from_file_location("make_layers", FIXTURE / "make_layers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("how", ["robe.save", "torch.save"])
def test_layers_of_0_8_0_compute_what_they_computed(how):
    made = layers_of_0_8_0()
    expected = json.loads((FIXTURE / "layers.json").read_text())
    if how == "torch.save":  # a whole model, pickled with the names of its modules then
        model = torch.load(FIXTURE / "layers.pt", weights_only=False)
    else:
        model = made.build()
        for weight in model.parameters():
            weight.data.zero_()
        robe.load(FIXTURE / "layers.safetensors", model)
    assert made.outputs(model) == expected
    model["embedding"].train()(torch.tensor([1])).sum().backward()  # and it trains
    assert model["embedding"].array.weight.grad.count_nonzero() > 0
