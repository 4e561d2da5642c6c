"""The presets: the sizes and schedules that the benchmarks publish."""

import json
import math

import pytest

from dlrm import PRESETS, DLRMConfig, TrainingConfig, preset


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


def test_trainings_have_the_published_numbers():
    """MLPerf Training's, of v0.7 and v1 (terabyte) and of v3 (dcnv2)."""
    for name in ("terabyte", "terabyte-32768", "terabyte-55296"):
        recipe = PRESETS[name].training
        assert PRESETS[name].model == PRESETS["terabyte"].model
        assert (recipe.optimizer, recipe.target_auc, recipe.evaluations_per_epoch) == ("sgd", 0.8025, 20)
    schedules = {
        name: (t.batch_size, t.learning_rate, t.warmup_steps, t.decay_start, t.decay_steps)
        for name, t in ((name, PRESETS[name].training) for name in PRESETS)
    }
    assert schedules["terabyte"] == (2048, 1.0, 0, 0, 0)
    assert schedules["terabyte-32768"] == (32768, 18.0, 8000, 70000, 30000)
    assert schedules["terabyte-55296"] == (55296, 24.0, 2750, 49315, 27772)
    assert schedules["dcnv2"] == (65536, 0.005, 0, 0, 0)
    assert schedules["kaggle"][2:] == (0, 0, 0)
    dcnv2 = PRESETS["dcnv2"].training
    assert (dcnv2.optimizer, dcnv2.adagrad_eps, dcnv2.target_auc) == ("adagrad", 1e-8, 0.80275)
    assert dcnv2.evaluations_per_epoch == 20


def test_dcnv2_has_the_published_sizes():
    model = PRESETS["dcnv2"].model
    assert model.table_rows == (
        40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976,
        14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
    )  # fmt: skip
    assert (model.interaction, model.cross_layers, model.cross_rank) == ("cross", 3, 512)
    assert (model.embedding_dim, model.bottom_mlp, model.top_mlp) == (128, (512, 256, 128), (1024, 1024, 512, 256, 1))
    assert {PRESETS[name].model.interaction for name in PRESETS if name != "dcnv2"} == {"dot"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    of = PRESETS[name]
    assert DLRMConfig.from_dict(json.loads(json.dumps(of.model.to_dict()))) == of.model
    assert TrainingConfig.from_dict(json.loads(json.dumps(of.training.to_dict()))) == of.training


def test_rates_of_the_published_recipe_at_its_corners():
    rate = PRESETS["terabyte-32768"].training.rate
    assert rate(1) == pytest.approx(18 / 8000)
    assert rate(7999) == pytest.approx(18 * 7999 / 8000)
    assert rate(8000) == rate(69_999) == rate(70_000) == 18
    assert rate(70_001) == pytest.approx(18 * (29_999 / 30_000) ** 2)
    assert rate(85_000) == pytest.approx(18 / 4)
    assert rate(99_999) == rate(100_000) == rate(10**9) == pytest.approx(1e-7), "18 / 30,000**2 is less"
    assert math.isclose(PRESETS["terabyte-55296"].training.rate(10**9), 1e-7)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset: expected one of kaggle, terabyte, .*, dcnv2, got avazu"):
        preset("avazu")
