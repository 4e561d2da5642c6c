"""Checkpoints: a model comes back from the folder alone, and what is not one is refused by name."""

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dlrm import DLRM, DLRMConfig, checkpoint
from dlrm.checkpoint import CheckpointError
from dlrm.embeddings import VocabularyTables

CONFIG = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20), compression=3, hash_seed=7)
DENSE, SPARSE = torch.randn(5, 13), torch.randint(0, 2**32, (5, 2))


def build(embedding):
    config = replace(CONFIG, embedding=embedding)
    if embedding != "full":
        return DLRM(config)
    known = [torch.arange(n) for n in (9, 19)]
    return DLRM(replace(config, vocabulary=True), VocabularyTables(config.table_rows, 4, known))


@pytest.mark.parametrize("embedding", ["robe", "full", "hash"])
def test_round_trip(tmp_path, embedding):
    model = build(embedding)
    checkpoint.save(tmp_path / "new" / "run", model, {"epochs": 2})
    assert sorted(os.listdir(tmp_path / "new" / "run")) == ["config.json", "model.safetensors"]
    loaded = checkpoint.load(tmp_path / "new" / "run")
    assert loaded.config == model.config
    assert torch.equal(loaded(DENSE, SPARSE), model(DENSE, SPARSE))
    assert json.loads((tmp_path / "new" / "run" / "config.json").read_text())["training"] == {"epochs": 2}


def test_an_admission_is_kept_and_its_counts_are_not(tmp_path):
    model = DLRM(replace(CONFIG, compression=None, robe_size=40, admission_bytes=16))
    model.embeddings.admission.start_counting(1, counter_bytes=1 << 12)
    model.train()(DENSE, SPARSE)
    assert model.embeddings.admission.filter.any()
    checkpoint.save(tmp_path, model)
    loaded = checkpoint.load(tmp_path)
    assert loaded.embeddings.admission.counter is None
    assert torch.equal(loaded(DENSE, SPARSE), model.eval()(DENSE, SPARSE))
    assert torch.equal(loaded.embeddings.admission.filter, model.embeddings.admission.filter)


def test_files_have_the_permissions_of_other_files(tmp_path):
    checkpoint.save(tmp_path, build("robe"))
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_other_shapes_are_refused(tmp_path):
    checkpoint.save(tmp_path, build("robe"))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model": config["model"] | {"compression": 2.0}}))
    with pytest.raises(
        CheckpointError,
        match=r"model.safetensors: embeddings.array.weight has shape \(40,\), config.json makes it \(60,\)",
    ):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_other_weights_are_refused(tmp_path, change):
    checkpoint.save(tmp_path, build("robe"))
    state = load_file(tmp_path / "model.safetensors")
    state = (
        {**state, "bias": torch.zeros(2)}
        if change == "extra"
        else {k: v for k, v in state.items() if k != "top.0.bias"}
    )
    save_file(state, tmp_path / "model.safetensors")
    message = r"bias has shape \(2,\), config.json makes it none" if change == "extra" else r"top.0.bias has shape none"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: no such file; a checkpoint is a folder with"):
        checkpoint.load(tmp_path / "nowhere")
    checkpoint.save(tmp_path, build("robe"))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: can't be read"):
        checkpoint.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    for text in (
        "{",
        "[]",
        "{}",
        '{"model": {"embedding_dim": 3}}',
        '{"model": 5}',
        '{"model": {"embedding_dim": "a"}}',
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json: not a model's config"):
            checkpoint.load(tmp_path)


def test_a_failed_save_keeps_the_checkpoint_in_place(tmp_path, monkeypatch):
    model = build("robe")
    checkpoint.save(tmp_path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, build("hash"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", [{"hash_seed": 1}, {"block_size": 2}, {"sign": True}])
def test_a_config_under_which_rows_lie_elsewhere_is_refused(tmp_path, change):
    config = replace(CONFIG, robe_size=50, compression=None)
    checkpoint.save(tmp_path, DLRM(config))
    checkpoint.load(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"model": replace(config, **change).to_dict()}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its rows do not lie where config\.json says"):
        checkpoint.load(tmp_path)


def test_a_damaged_filter_is_refused_and_files_of_before_the_checksum_load(tmp_path):
    model = DLRM(replace(CONFIG, robe_size=50, compression=None, admission_bytes=8))
    checkpoint.save(tmp_path, model)
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    state = load_file(path)
    state["embeddings.admission.filter"] = state["embeddings.admission.filter"] + 1
    save_file(state, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="or the filter is damaged"):
        checkpoint.load(tmp_path)
    save_file(state, path)
    checkpoint.load(tmp_path)


WRONG = [None, True, -1, 0, 1.5, 10**30, 2**62, "a", [], [[]], {}, [1] * 5000, [2**40], {"a": 1}]


def test_a_config_of_wrong_values_is_refused_in_one_line_or_is_another_config(tmp_path):
    checkpoint.save(tmp_path, build("robe"))
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    accepted = 0  # others, such as True for sign, make another model of the same shapes
    for name in [*good["model"], "other"]:
        for wrong in WRONG:
            path.write_text(json.dumps(good | {"model": good["model"] | {name: wrong}}))
            with suppress(CheckpointError):
                checkpoint.load(tmp_path)
                accepted += 1
    assert accepted < 0.3 * len(WRONG) * len(good["model"])
    for text in ('{"model": ' * 100_000, "[" * 100_000, '{"model": NaN}', "1" * 5000):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json: not a model's config: "):
            checkpoint.load(tmp_path)


def test_weights_of_another_type_are_refused(tmp_path):
    checkpoint.save(tmp_path, build("robe"))
    state = load_file(tmp_path / "model.safetensors")
    for dtype in (torch.int32, torch.float64):
        save_file(state | {"top.0.bias": state["top.0.bias"].to(dtype)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"top.0.bias has dtype {dtype}, config.json makes it torch.float32"):
            checkpoint.load(tmp_path)


def test_what_a_model_was_trained_on_is_kept_and_compared(tmp_path):
    inputs = {"dense": "logarithms", "num_dense": 13}
    checkpoint.save(tmp_path, build("robe"), inputs=inputs)
    assert checkpoint.describe(tmp_path).inputs == inputs
    checkpoint.require_inputs(inputs, inputs | {"more": 1}, Path("rows"))
    with pytest.raises(ValueError, match="rows: num_dense: the rows have 12, the model was trained on 13"):
        checkpoint.require_inputs(inputs, inputs | {"num_dense": 12}, Path("rows"))
    checkpoint.save(tmp_path, build("robe"))
    checkpoint.require_inputs(checkpoint.describe(tmp_path).inputs, inputs, Path("rows"))
