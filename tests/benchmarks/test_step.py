"""benchmarks.step on small models; its figures are for real runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import step
from benchmarks.timing import COPIES_OF_IDS
from dlrm import PRESETS

CONFIG = replace(PRESETS["kaggle"].model, bottom_mlp=(8, 16), top_mlp=(8, 1), table_rows=(50,) * 26)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(step, "LARGE", 2000)
    monkeypatch.setitem(COPIES_OF_IDS, 1, 2)
    monkeypatch.setitem(COPIES_OF_IDS, 256, 2)
    return [torch.full((n, CONFIG.embedding_dim), 0.01) for n in CONFIG.table_rows]


def test_a_step_trains(small):
    (batch, _) = step.batches(CONFIG, [50] * 26, 256, np.random.default_rng(0))
    model = step.with_embeddings(CONFIG, step.Constant(256, 26, 16))
    make = step.stepper(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    before = [p.clone() for p in model.parameters()]
    make(batch)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_models_to_compare_have_the_same_mlps():
    first, second = (step.with_embeddings(CONFIG, step.Constant(1, 26, 16)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first.top.parameters(), second.top.parameters()))


def test_training_steps_and_forwards_are_reported(small):
    times = {"forward": step.forwards(CONFIG, small, 1, 0), "training step": step.training(CONFIG, small, 256, 0)}
    against = {"forward": "MLPs alone", "training step": "embeddings constant"}
    names = {"embeddings constant", "26 nn.EmbeddingBag, sparse gradients"}
    names |= {f"ROBE {array}, Z={z}" for array in ("1000x", "100 MB") for z in (8, 16)}
    names |= {f"ROBE {array}, Z=16, dense gradient" for array in ("1000x", "100 MB")}
    assert set(times["training step"]) == names | {f"ROBE 1000x + admission, Z={z}" for z in (8, 16)}
    results = [
        {"preset": "kaggle", "what": what, "batch_size": 1, "against": against[what], "milliseconds": times[what]}
        for what in times
    ]
    lines = step.report(results).splitlines()
    for what, base in against.items():
        (line,) = (line for line in lines if line.startswith(f"  {base} "))
        assert line.split()[-1] == "1.000", what
