"""Options of a run: defaults, JSON there and back, and what may change when a run is resumed."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

from dlrm import PRESETS
from dlrm.config import MLPERF_HOTS
from dlrm.training.options import RunOptions, merge_options, model_config, training_config

OPTIONS = RunOptions(Path("rows.tsv"))


def test_options_survive_json(tmp_path, monkeypatch):
    """Paths come back absolute."""
    monkeypatch.chdir(tmp_path)
    given = replace(OPTIONS, eval_data=Path("/e"), mllog=Path("log.txt"), robe_size=7, synthetic_hots=True, seed=3)
    back = RunOptions.from_dict(json.loads(json.dumps(given.to_dict())))
    assert back == replace(given, data=tmp_path / "rows.tsv", mllog=tmp_path / "log.txt")
    assert RunOptions.from_dict(OPTIONS.to_dict()) == replace(OPTIONS, data=tmp_path / "rows.tsv")


def test_options_of_earlier_versions_have_fewer():
    values = {name: value for name, value in OPTIONS.to_dict().items() if name not in ("admission", "decay_start")}
    assert RunOptions.from_dict(values) == replace(OPTIONS, data=OPTIONS.data.absolute())


def test_a_run_starts_with_what_is_given_and_defaults():
    given = dict.fromkeys(field.name for field in fields(RunOptions))
    options = merge_options(given | {"data": Path("x"), "robe_size": 5, "seed": 0}, None)
    assert options == RunOptions(Path("x"), robe_size=5)
    assert (options.preset, options.embedding, options.table_rows) == ("kaggle", "robe", "preset")
    with pytest.raises(ValueError, match="--data: expected to start a run, and there is no checkpoint to resume from"):
        merge_options(given, None)


FREE = {"data": Path("other"), "eval_data": Path("e"), "epochs": 9, "learning_rate": 0.5, "target_auc": 0.7}


@pytest.mark.parametrize("name", [field.name for field in fields(RunOptions)])
def test_some_options_may_change_when_a_run_is_resumed(name):
    value = FREE.get(name, Path("other") if name == "mllog" else "other")
    if name in FREE:
        assert merge_options({name: value}, OPTIONS) == replace(OPTIONS, **{name: value})
        return
    before = asdict(OPTIONS)[name]
    was = "was not given" if before is None else f"was {before}"
    option = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"{option}: other, but {was} when this run was started; leave it out"):
        merge_options({name: value}, OPTIONS)
    assert merge_options({name: before}, OPTIONS) == OPTIONS


def test_a_log_may_move_but_not_begin_in_the_middle():
    started = replace(OPTIONS, mllog=Path("a"))
    assert merge_options({"mllog": Path("b")}, started).mllog == Path("b")


def test_a_training_is_that_of_the_preset_but_for_the_options():
    assert training_config(OPTIONS, None) == PRESETS["kaggle"].training
    options = replace(OPTIONS, preset="terabyte", epochs=2, averaging_steps=0, seed=4)
    assert training_config(options, None) == replace(PRESETS["terabyte"].training, epochs=2, seed=4)
    started = replace(PRESETS["kaggle"].training, batch_size=7, epochs=9)
    assert training_config(replace(OPTIONS, epochs=10), started) == replace(started, epochs=10)


def test_a_model_is_that_of_the_preset_but_for_the_options():
    assert model_config(OPTIONS, None, None) == PRESETS["kaggle"].model
    config = model_config(replace(OPTIONS, robe_size=99, block_size=4, init_std=0.5, seed=3), (2,) * 26, None)
    assert (config.robe_size, config.compression, config.block_size) == (99, None, 4)
    assert (config.init_std, config.hash_seed, config.hots, config.synthetic_hots) == (0.5, 3, (2,) * 26, False)
    config = model_config(replace(OPTIONS, synthetic_hots=True), None, None)
    assert (config.hots, config.synthetic_hots) == (MLPERF_HOTS, True)
    assert model_config(replace(OPTIONS, embedding="full"), None, None).compression is None


@pytest.mark.parametrize("embedding", ["robe", "full", "hash"])
def test_tables_have_a_row_for_each_known_id_and_one_more(embedding):
    known = [np.arange(feature + 1) for feature in range(26)]
    config = model_config(replace(OPTIONS, embedding=embedding, table_rows="data"), None, known)
    assert config.table_rows == tuple(range(2, 28))
    assert config.vocabulary == (embedding == "full")
    known[3][-1] = 2**32
    options = replace(OPTIONS, embedding=embedding)
    if embedding == "full":
        with pytest.raises(ValueError, match="--table-rows data: expected ids of 32 bits for --embedding full"):
            model_config(options, None, known)
    else:
        assert model_config(options, None, known) == config


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2000), (0.1, 400), (0.0001, 8)])
def test_an_admission_has_its_share_in_whole_words(share, expected):
    config = model_config(replace(OPTIONS, robe_size=1000, admission=share), None, None)
    assert config.admission_bytes == expected
    assert config.array_floats == 1000


def test_an_admission_takes_its_share_of_what_compression_leaves():
    whole = model_config(OPTIONS, None, None)
    config = model_config(replace(OPTIONS, admission=0.25), None, None)
    assert config.array_floats + config.admission_bytes // 4 == whole.array_floats
    assert config.admission_bytes == pytest.approx(whole.array_floats, abs=8), "a quarter of 4 bytes each"


@pytest.mark.parametrize(
    ("changes", "hots", "message"),
    [
        ({"embedding": "full", "compression": 9.0}, None, "--compression and --robe-size: the full tables are not"),
        ({"admission": 1.0}, None, "--admission: expected a share between 0 and 1, of --embedding robe, got 1.0"),
        ({"admission": 0.1, "embedding": "hash"}, None, "--admission: expected a share between 0 and 1"),
        ({"admit_after": 3}, None, "--admit-after: expected --admission with it"),
        ({"synthetic_hots": True}, (2,) * 26, "--synthetic-hots: the data has several ids a feature already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_refused(changes, hots, message):
    with pytest.raises(ValueError, match=message):
        model_config(replace(OPTIONS, **changes), hots, None)
