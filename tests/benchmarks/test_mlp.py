"""benchmarks.mlp on small MLPs; its figures are for real runs."""

import pytest
import torch
from tqdm import tqdm

from benchmarks import mlp
from dlrm.model import MLP


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(mlp, "mlps", lambda name: {"bottom": MLP((13, 64, 16), True), "top": MLP((100, 96, 1), False)})


def test_every_candidate_is_timed(monkeypatch):
    monkeypatch.setattr(mlp, "BATCHES", (1, 3))
    with tqdm(disable=True) as bar:
        results = mlp.measure("kaggle", 0, bar)
    assert [(x["mlp"], x["batch_size"]) for x in results] == [("bottom", 1), ("bottom", 3), ("top", 1), ("top", 3)]
    names = {"dense", "torch"} | {f"1x{n}, {share} %" for n in (16, 32) for share in (50, 75, 90)}
    assert set(results[0]["microseconds"]) == names
    assert results[0]["microseconds"]["dense"]["times_faster"] == 1
    text = mlp.report(results)
    assert text.count("times faster than dense") == 4
    assert all(name in text for name in results[0]["microseconds"])


@pytest.mark.parametrize("which", ["bottom", "top"])
def test_the_candidates_compute_the_mlp(which):
    model = mlp.mlps("kaggle")[which]
    x = torch.randn(5, model[0].in_features)
    want = model(x).detach()
    torch.testing.assert_close(mlp.by_torch(model)(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mlp.pruned(model, 16, 0.0)(x), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mlp.pruned(model, 16, 0.9)(x), want, atol=1e-3)
