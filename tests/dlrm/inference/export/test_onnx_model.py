"""ONNX files against the model in torch, and against the hash of the oracle."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from dlrm import DLRMConfig
from dlrm.inference.export import export, onnx_graph, onnx_model
from dlrm.inference.predictor import Predictor
from dlrm.sparsity import BlockPruner, prunable_of, sparsity
from tests.dlrm.inference.export.models import (
    HOTS,
    VOCABULARY,
    eager,
    export_as_user,
    inputs,
    make,
    run_as_stranger,
    run_onnx,
)
from tests.helpers.oracle import places

KINDS = {
    "one block a row": {},
    "signs": {"sign": True},
    "blocks of 2": {"block_size": 2, "sign": True},
    "blocks of 1": {"block_size": 1},
    "blocks of 3": {"block_size": 3, "sign": True},
    "blocks of 7": {"block_size": 7, "sign": True},
    "blocks of 8": {"block_size": 8},
    "one place": {"compression": None, "robe_size": 4, "init_std": 0.1},
    "another seed": {"hash_seed": -5},
    "full": {"embedding": "full", "compression": None},
    "hash": {"embedding": "hash"},
    "vocabulary": VOCABULARY,
    "hots": {"hots": HOTS, "sign": True},
    "hots of tables": {"hots": HOTS, "embedding": "full"},
    "hots of a vocabulary": {"hots": HOTS, **VOCABULARY},
    "one hot each": {"hots": (1, 1, 1)},
    "synthetic hots": {"hots": HOTS, "synthetic_hots": True},
    "cross": {"interaction": "cross", "cross_rank": 3, "cross_layers": 2},
    "deep": {"bottom_mlp": (3, 9, 4), "top_mlp": (1,)},
    "one feature": {"table_rows": (50,)},
    "admission": {"admission_bytes": 56},
    "admission, small blocks": {"admission_bytes": 56, "block_size": 2, "sign": True, "hots": HOTS},
    "admission, long blocks": {"admission_bytes": 56, "block_size": 7, "sign": True},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_onnx_has_the_probabilities_of_the_model(tmp_path, changes):
    model = make(**changes)
    done = export(model, tmp_path / "model.onnx", format="onnx")
    assert done.rows == 10_000
    assert done.difference <= 1e-5
    assert done.bytes == (tmp_path / "model.onnx").stat().st_size
    for rows in (0, 1, 2, 301):
        dense, sparse = inputs(model, rows)
        probability = run_onnx(tmp_path / "model.onnx", dense, sparse)
        assert probability.dtype == np.float32
        assert probability.shape == (rows,)
        if rows:  # the model itself takes no empty batch of bags
            np.testing.assert_allclose(probability, eager(model, dense, sparse), atol=1e-6)
    assert probability.std() > 1e-3  # that depend on the rows


@pytest.mark.parametrize("interaction", ["dot", "cross"])
@pytest.mark.parametrize("block", [16, 32])
def test_blocks_of_zeros_are_not_in_the_file(tmp_path, block, interaction):
    model = make(bottom_mlp=(64, 4), top_mlp=(200, 150, 1), interaction=interaction, cross_rank=20)
    with torch.no_grad():
        for parameter in model.interaction.parameters():
            parameter *= 0.2  # or its products of rounded numbers are 1e-5 apart
    export(model, tmp_path / "whole.onnx", format="onnx")
    BlockPruner(prunable_of(model), block).step(0.75)
    assert export(model, tmp_path / "model.onnx", format="onnx").difference <= 1e-5
    dense, sparse = inputs(model, 301)
    probability = run_onnx(tmp_path / "model.onnx", dense, sparse)
    predicted = Predictor(model)(torch.from_numpy(dense), torch.from_numpy(sparse))
    np.testing.assert_allclose(probability, predicted, atol=1e-6)
    assert probability.std() > 1e-3
    whole, pruned = ((tmp_path / name).stat().st_size for name in ("whole.onnx", "model.onnx"))
    zeros = 4 * sparsity(model) * sum(x.weight.numel() for x in model.modules() if isinstance(x, nn.Linear))
    assert whole - pruned > 0.85 * zeros


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("array_dtype", ["float32", "bfloat16", "int8"])
def test_onnx_reads_the_slots_of_the_oracle(tmp_path, block_size, array_dtype):
    model = make(block_size=block_size, sign=True, hash_seed=3, compression=None, robe_size=150)
    export(model, tmp_path / "model.onnx", format="onnx", array_dtype=array_dtype)
    dense, sparse = inputs(model, 40)
    weight = model.embeddings.array.weight.detach()
    if array_dtype == "bfloat16":
        weight = weight.bfloat16().float()
    elif array_dtype == "int8":
        array = model.embeddings.array.quantized()
        weight = array.weight * array.scale.repeat_interleave(64)[:150]
    layout = {"hash": "mix", "size": 150, "embedding_dim": 4, "block_size": block_size, "seed": 3, "sign": True}
    features = [places(sparse[:, k], table_id=k, **layout) for k in range(sparse.shape[1])]
    rows = torch.stack([weight[slots] * torch.from_numpy(signs) for slots, signs in features], dim=1)
    with torch.no_grad():
        x = model.interaction(model.bottom(torch.from_numpy(dense)), rows.float())
        expected = model.top(x).squeeze(1).sigmoid()
    np.testing.assert_allclose(run_onnx(tmp_path / "model.onnx", dense, sparse), expected, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 3, 4, 7])
def test_onnx_reads_one_row_for_the_ids_that_were_not_let_in(tmp_path, block_size):
    model = make(block_size=block_size, sign=True, compression=None, robe_size=150, admission_bytes=80)
    export(model, tmp_path / "model.onnx", format="onnx")
    dense, sparse = inputs(model, 200)
    embeddings = model.embeddings
    inside = embeddings.admission.admits(torch.from_numpy(sparse), embeddings.table_keys).numpy()
    assert 0.2 < inside.mean() < 0.8
    replaced = np.where(inside, sparse, -(2**63))
    got = run_onnx(tmp_path / "model.onnx", dense, sparse)
    assert np.array_equal(got, run_onnx(tmp_path / "model.onnx", dense, replaced))
    np.testing.assert_allclose(got, eager(model, dense, sparse), atol=1e-6)
    embeddings.admission = None
    np.testing.assert_allclose(got, eager(model, dense, replaced), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"hots": HOTS}, {"block_size": 7, "sign": True}])
@pytest.mark.parametrize("array_dtype", ["bfloat16", "int8"])
def test_an_array_in_another_dtype_is_kept_in_it(tmp_path, changes, array_dtype):
    model = make(**changes, compression=None, robe_size=20_000)
    export(model, tmp_path / "model.onnx", format="onnx", array_dtype=array_dtype)
    size = {"bfloat16": 2 * 20_000, "int8": 20_000 + 4 * 20_000 // 64}[array_dtype]
    assert size < (tmp_path / "model.onnx").stat().st_size < size + 16_000
    dense, sparse = inputs(model, 100)
    probability = run_onnx(tmp_path / "model.onnx", dense, sparse)
    predicted = Predictor(model, array_dtype=array_dtype)(torch.from_numpy(dense), torch.from_numpy(sparse))
    rounding = 3e-3 if changes == {"hots": HOTS} and array_dtype == "bfloat16" else 1e-6  # Predictor's, of the sums
    np.testing.assert_allclose(probability, predicted, atol=rounding)
    assert np.abs(probability - eager(model, dense, sparse)).max() > 1e-5  # it is not in float32


def test_the_file_has_standard_operators_and_the_config(tmp_path):
    model = make(hots=HOTS, synthetic_hots=True, sign=True, block_size=3)
    export(model, tmp_path / "model.onnx", format="onnx")
    file = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in file.graph.node} == {""}
    assert [(x.domain, x.version) for x in file.opset_import] == [("", 20)]
    assert file.producer_name == "robe-dlrm"
    config = {entry.key: entry.value for entry in file.metadata_props}["config"]
    assert DLRMConfig.from_dict(json.loads(config)) == model.config
    assert not file.functions


@pytest.mark.parametrize("block_size", [4, 7])
def test_another_filter_is_found_out(old_file, monkeypatch, block_size):
    monkeypatch.setattr(onnx_model, "BITS_OF_WORD", 5)
    with pytest.raises(ValueError, match=r"differ from the model's by (0\.\d+|1), expected at most 1e-05"):
        export(make(admission_bytes=56, block_size=block_size), old_file, format="onnx")


@pytest.mark.parametrize(
    ("name", "wrong"), [("MULTIPLIERS", (0xBF58476D1CE4E5B9, 3)), ("SHIFTS", (30, 27, 30)), ("GOLDEN", 3)]
)
def test_another_hash_is_found_out(old_file, monkeypatch, name, wrong):
    monkeypatch.setattr(onnx_model if name == "GOLDEN" else onnx_graph, name, wrong)
    with pytest.raises(ValueError, match=r"differ from the model's by (0\.\d+|1), expected at most 1e-05"):
        export(make(), old_file, format="onnx")


def test_weights_beyond_protobuf_are_refused(old_file, monkeypatch):
    monkeypatch.setattr(onnx_model, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="one ONNX file holds 2 GB; use --format aoti"):
        export(make(), old_file, format="onnx")


def test_onnx_as_its_user_runs_it(tmp_path):
    model = make(block_size=2, sign=True)
    out = export_as_user(tmp_path, model, "model.onnx", "--format", "onnx")
    assert "10,000 rows differ from the model's by at most" in out
    dense, sparse = inputs(model, 200)
    probability = run_as_stranger(tmp_path, "model.onnx", dense, sparse)
    np.testing.assert_allclose(probability, eager(model, dense, sparse), atol=1e-6)
