"""Models compiled ahead of time against the model in torch. Each compilation takes half a minute."""

import numpy as np
import pytest
import torch

from dlrm.inference.export import export, load
from dlrm.inference.predictor import Predictor
from tests.dlrm.inference.export.models import HOTS, VOCABULARY, eager, export_as_user, inputs, make, run_as_stranger


def test_no_compiler_is_one_error(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        export(make(), tmp_path / "model.pt2", format="aoti")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_aoti_as_its_user_runs_it(tmp_path):
    model = make(block_size=3, sign=True, hots=HOTS, interaction="cross", cross_rank=3)
    out = export_as_user(tmp_path, model, "model.pt2", "--format", "aoti", "--array-dtype", "int8")
    assert len(out.splitlines()) == 2
    assert "10,000 rows differ from the model's by at most" in out
    dense, sparse = inputs(model, 200)
    probability = run_as_stranger(tmp_path, "model.pt2", dense, sparse)
    predicted = Predictor(model, array_dtype="int8")(torch.from_numpy(dense), torch.from_numpy(sparse))
    # Intermediate values are large here: each of the two is within 7e-7 of the result in float64.
    np.testing.assert_allclose(probability, predicted, atol=1.5e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "array_dtype"),
    [
        ({"hots": HOTS, "synthetic_hots": True, "block_size": 7, "sign": True}, "bfloat16"),
        (VOCABULARY, "float32"),
        ({"admission_bytes": 56, "block_size": 2}, "float32"),
        ({"admission_bytes": 56, "block_size": 7}, "int8"),
    ],
)
def test_aoti_has_the_probabilities_of_the_model(tmp_path, changes, array_dtype):
    model = make(**changes)
    assert export(model, tmp_path / "model.pt2", format="aoti", array_dtype=array_dtype).difference <= 1e-5
    if array_dtype == "bfloat16":
        model.embeddings.array.weight.data = model.embeddings.array.weight.bfloat16().float()
    elif array_dtype == "int8":
        model.embeddings.array = model.embeddings.array.quantized()
    run = load(tmp_path / "model.pt2")
    for rows in (1, 2, 301):
        dense, sparse = inputs(model, rows)
        probability = run(torch.from_numpy(dense), torch.from_numpy(sparse))
        np.testing.assert_allclose(probability, eager(model, dense, sparse), atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
