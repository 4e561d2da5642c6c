"""Configs: the presets' published sizes, validation, and JSON there and back."""

import json
from dataclasses import replace

import pytest

from dlrm import PRESETS, DLRMConfig, TrainingConfig, preset

SMALL = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20))


def test_presets_have_the_published_sizes():
    kaggle, terabyte = PRESETS["kaggle"].model, PRESETS["terabyte"].model
    assert sum(kaggle.table_rows) == 33_762_577
    assert kaggle.full_floats == 540_201_232
    assert sum(terabyte.table_rows) == 187_767_399
    assert terabyte.full_floats == 24_034_227_072
    assert len(kaggle.table_rows) == len(terabyte.table_rows) == 26
    assert (kaggle.bottom_mlp, kaggle.top_mlp) == ((512, 256, 64, 16), (512, 256, 1))
    assert (terabyte.bottom_mlp, terabyte.top_mlp) == ((512, 256, 128), (1024, 1024, 512, 256, 1))
    recipe = PRESETS["terabyte"].training
    assert (recipe.optimizer, recipe.learning_rate, recipe.batch_size) == ("sgd", 1.0, 2048)


@pytest.mark.parametrize(
    "config", [SMALL, preset("kaggle", robe_size=5, compression=None).model, PRESETS["terabyte"].model]
)
def test_model_config_survives_json(config):
    assert DLRMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_training_config_survives_json():
    config = PRESETS["kaggle"].training
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": "tables"}, "embedding: expected one of robe, full, hash, got tables"),
        ({"embedding_dim": 0}, "embedding_dim: expected at least 1"),
        ({"embedding_dim": 5}, "bottom_mlp: expected widths that end with embedding_dim 5"),
        ({"top_mlp": (8, 2)}, "top_mlp: expected widths that end with 1"),
        ({"table_rows": (3, 0)}, "table_rows"),
        ({"table_rows": ()}, "table_rows"),
        ({"compression": None}, "compression and robe_size: expected exactly one of them, got neither"),
        ({"robe_size": 5}, "compression and robe_size: expected exactly one of them, got 2"),
        ({"compression": -1.0}, "compression: expected"),
        ({"compression": 1.0}, "compression: expected more than 1"),
        ({"compression": None, "robe_size": 0}, "robe_size: expected at least 1"),
        ({"embedding": "hash", "compression": None, "robe_size": 9}, "robe_size: expected embedding='robe'"),
        ({"vocabulary": True}, "vocabulary: expected embedding='full'"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lamb"}, "optimizer: expected one of sgd, adagrad, adam, got lamb"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"epochs": 0}, "epochs: expected at least 1"),
    ],
)
def test_impossible_trainings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["kaggle"].training, **changes)


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="dropout: not a field of DLRMConfig"):
        DLRMConfig.from_dict(SMALL.to_dict() | {"dropout": 0.5})
    with pytest.raises(ValueError, match="missing"):
        DLRMConfig.from_dict({"embedding_dim": 4})
    with pytest.raises(ValueError, match="expected the fields of DLRMConfig"):
        DLRMConfig.from_dict([1, 2])


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of kaggle, terabyte, got avazu"):
        preset("avazu")
