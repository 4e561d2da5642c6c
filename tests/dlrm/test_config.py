"""Configs: validation, schedules, and JSON there and back."""

import json
from dataclasses import fields, replace

import pytest

from dlrm import PRESETS, DLRMConfig, TrainingConfig

SMALL = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20))


def test_configs_with_other_than_default_values_survive_json():
    model = replace(
        SMALL, interaction="cross", cross_layers=2, cross_rank=7, hots=(3, 1), compression=None, robe_size=5
    )
    assert DLRMConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    training = TrainingConfig(7, 0.5, "adagrad", 2, 3, 0.75, 10, 20, 30, 1e-6, 4, 50, 0.75, 32, (0.5, 1.5))
    assert TrainingConfig.from_dict(json.loads(json.dumps(training.to_dict()))) == training
    default = TrainingConfig(1, 1.0, "sgd", 1)
    assert all(getattr(training, f.name) != getattr(default, f.name) for f in fields(training)), "every field is tried"


def test_configs_of_the_first_version_still_load():
    model = {
        "embedding_dim": 4, "bottom_mlp": [8, 4], "top_mlp": [8, 1], "table_rows": [10, 20], "num_dense": 13,
        "embedding": "robe", "compression": 1000.0, "robe_size": None, "block_size": None, "sign": False,
        "hash_seed": 0, "init_std": None, "vocabulary": False,
    }  # fmt: skip
    assert DLRMConfig.from_dict(model) == SMALL
    training = {"batch_size": 256, "learning_rate": 1e-3, "optimizer": "adam", "epochs": 3, "evaluations_per_epoch": 4,
                "target_auc": None, "seed": 0}  # fmt: skip
    assert TrainingConfig.from_dict(training) == PRESETS["kaggle"].training


# -- Schedules --------------------------------------------------------------------------------------------------------


def published_rates(lr, warmup, decay_start, decay_steps, steps):
    """The rates of the first steps by the rule of MLPerf's reference, written out; it counts steps from 1."""
    rates = []
    for step in range(1, steps + 1):
        if step < warmup:
            rates.append(lr * (1 - (warmup - step) / warmup))
        elif decay_steps and decay_start <= step < decay_start + decay_steps:
            done = step - decay_start
            rates.append(max(lr * ((decay_steps - done) / decay_steps) ** 2, 1e-7))
        elif decay_steps and step >= decay_start + decay_steps:
            rates.append(rates[-1])
        else:
            rates.append(lr)
    return rates


@pytest.mark.parametrize(
    ("lr", "warmup", "decay_start", "decay_steps"),
    [(18.0, 8, 70, 30), (24.0, 0, 0, 0), (0.5, 10, 0, 0), (0.5, 1, 1, 1), (2.0, 10, 10, 7), (2.0, 0, 3, 5),
     (2.0, 0, 0, 5), (1e-6, 3, 5, 40)],
)  # fmt: skip
def test_rates_are_those_of_the_published_schedule(lr, warmup, decay_start, decay_steps):
    config = TrainingConfig(1, lr, "sgd", 1, warmup_steps=warmup, decay_start=decay_start, decay_steps=decay_steps)
    expected = published_rates(lr, warmup, decay_start, decay_steps, 130)
    assert [config.rate(step) for step in range(1, 131)] == pytest.approx(expected, rel=1e-12)


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
        ({"interaction": "cat"}, "interaction: expected one of dot, cross, got cat"),
        ({"cross_layers": 0}, "cross_layers: expected at least 1, got 0"),
        ({"cross_rank": -1}, "cross_rank: expected at least 1, got -1"),
        ({"admission_bytes": 12}, "admission_bytes: expected a multiple of 8, got 12"),
        (
            {"compression": 100.0, "admission_bytes": 8},
            "admission_bytes: expected less than the 4 bytes that compression leaves",
        ),
        ({"embedding": "hash", "admission_bytes": 8}, "admission_bytes: expected embedding='robe' with it"),
        ({"hots": (1,)}, "hots: expected 2 numbers from 1"),
        ({"hots": (1, 0)}, "hots: expected 2 numbers from 1"),
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
        ({"evaluations_per_epoch": 0}, "evaluations_per_epoch: expected at least 1"),
        ({"target_auc": 1.0}, "target_auc: expected between 0 and 1"),
        ({"adagrad_eps": 0.0}, "adagrad_eps: expected a positive number"),
        ({"warmup_steps": -1}, "warmup_steps: expected at least 0"),
        ({"decay_start": -1}, "decay_start: expected at least 0"),
        ({"decay_steps": -5}, "decay_steps: expected at least 0"),
        (
            {"warmup_steps": 9, "decay_start": 8, "decay_steps": 3},
            "decay_start: expected at least warmup_steps 9, got 8",
        ),
    ],
)
def test_impossible_trainings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["kaggle"].training, **changes)


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="dropout: not a field of DLRMConfig"):
        DLRMConfig.from_dict(SMALL.to_dict() | {"dropout": 0.5})
    with pytest.raises(ValueError, match="bottom_mlp: expected a list, got nothing"):
        DLRMConfig.from_dict({"embedding_dim": 4})
    with pytest.raises(ValueError, match="expected the fields of DLRMConfig"):
        DLRMConfig.from_dict([1, 2])
