"""Plans of runs: plain data that says everything, made once and enough to build from in any process."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dlrm.training.plan
from dlrm import PRESETS
from dlrm.distributed import World
from dlrm.training.plan import Builder, Request, require_memory, warn_of_labels
from tests.dlrm.training.memory_rows import RANGES, MemoryRows

GIVEN = {"data": Path("rows"), "robe_size": 500, "seed": 3, "batch_size": 20}


def request(folder, **given):
    return Request(folder / "run", GIVEN | given, "python train.py ...", "train.py --resume ...")


@pytest.fixture
def opened(monkeypatch):
    calls = []
    monkeypatch.setattr(MemoryRows, "opened", calls)
    return calls


def builder(folder, world=None, **given):
    return Builder(request(folder, **given), world or World(), MemoryRows)


def test_a_plan_is_sent_to_processes_that_build_the_same(tmp_path, opened):
    first, other = builder(tmp_path, admission=0.25), builder(tmp_path)
    plan = first.plan()
    sent = pickle.loads(pickle.dumps(plan))
    assert (sent.step, sent.command, sent.ranges) == (None, "python train.py ...", RANGES)
    assert sent.rows == {"train": 60, "validation": 20, "test": 20}
    assert sent.training == replace(PRESETS["kaggle"].training, batch_size=20, seed=3)
    assert sent.model.admission_bytes == 8 * len(sent.filter) > 0
    one, two = first.build(plan), other.build(sent)
    assert torch.equal(one.model.embeddings.admission.filter, plan.filter)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name])
    assert opened == [(Path("rows"), None, None), (Path("rows"), None, RANGES)], "rows are checked once"
    assert not (tmp_path / "run").exists()


def test_a_plan_of_full_tables_has_the_vocabulary(tmp_path):
    one = builder(tmp_path, embedding="full", table_rows="data", robe_size=None)
    plan = one.plan()
    for got, expected in zip(plan.vocabulary, MemoryRows("").count_ids(), strict=True):
        np.testing.assert_array_equal(got, expected)
    model = one.build(plan).model
    assert len(model.embeddings.keys) == sum(map(len, plan.vocabulary))
    assert builder(tmp_path, table_rows="data").plan().vocabulary is None, "ROBE needs none"


def test_a_target_that_is_never_reached_is_said(monkeypatch):
    training = replace(PRESETS["kaggle"].training, target_auc=0.8)
    assert warn_of_labels(MemoryRows(""), training) == ()
    monkeypatch.setattr(MemoryRows, "one_label", {"validation": 1})
    (warning,) = warn_of_labels(MemoryRows(""), training)
    assert warning.endswith("The weights with the lowest validation log loss are kept, and AUC 0.8 is never reached")


def test_an_admission_that_counts_is_not_chosen(tmp_path):
    one = builder(tmp_path, admission=0.25, admit_after=2)
    plan = one.plan()
    assert plan.filter is None
    admission = one.build(plan).model.embeddings.admission
    assert (admission.threshold, admission.filter.any()) == (2, False)


def test_an_admission_that_counts_is_for_one_process(tmp_path):
    with pytest.raises(ValueError, match="--admit-after: not with several processes"):
        builder(tmp_path, World(size=2), admission=0.25, admit_after=2).plan()


def test_embeddings_that_do_not_fit_are_refused_before_they_are_allocated(monkeypatch):
    model, training = replace(PRESETS["kaggle"].model, embedding="full", compression=None), PRESETS["kaggle"].training
    needed = 3 * 4 * model.full_floats
    monkeypatch.setattr(dlrm.training.plan, "total_memory", lambda: needed)
    require_memory(model, training)
    monkeypatch.setattr(dlrm.training.plan, "total_memory", lambda: needed - 1)
    with pytest.raises(MemoryError, match=r"the embeddings take 6\.5 GB with their optimizer's state, and this"):
        require_memory(model, training)
    require_memory(model, replace(training, optimizer="adagrad"))
    with pytest.raises(MemoryError):
        require_memory(model, replace(training, optimizer="adagrad", averaging_steps=10))
