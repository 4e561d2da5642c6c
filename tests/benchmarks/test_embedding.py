"""benchmarks.embedding on small tables; its figures are for real runs."""

import importlib.metadata

import numpy as np
import pytest
import torch
from tqdm import tqdm

from benchmarks import embedding
from benchmarks.timing import COPIES_OF_IDS, make_ids, robe_layer


def test_every_candidate_of_a_preset_is_timed(monkeypatch):
    monkeypatch.setitem(embedding.BATCHES, "cpu", (1,))
    monkeypatch.setattr(embedding, "LARGE", 5000)
    monkeypatch.setitem(COPIES_OF_IDS, 1, 2)
    monkeypatch.setattr(embedding, "_is_installed", lambda package: False)
    with tqdm(disable=True) as bar:
        uniform, zipf = embedding.measure("kaggle", 100, 0, "cpu", bar)
    assert (uniform["ids"], zipf["ids"]) == ("uniform", "zipf")
    names = {"26 nn.EmbeddingBag", "copy of the output"}
    names |= {f"ROBE {array}, Z={z}" for array in ("1000x", "100 MB") for z in (8, 16)}
    names |= {f"ROBE 1000x + admission, Z={z}" for z in (8, 16)}
    assert set(zipf["microseconds"]) == names
    special = {"ROBE 1000x, Z=16, reference", "ROBE 1000x, Z=16, 10^6 rows", "ROBE 1000x, Z=16, 10^12 rows"}
    assert set(uniform["microseconds"]) == names | special
    text = embedding.report([uniform, zipf])
    assert all(name in text for name in names | special)
    assert text.count("times faster") == 2


def test_peers_read_the_same_weights(monkeypatch):
    monkeypatch.setattr(embedding, "_is_installed", lambda package: False)
    peers = embedding.Peers((5, 9), 4, "cpu")
    batch = make_ids((5, 9), 6, "uniform", np.random.default_rng(0))
    vectors = peers.candidates([batch])["26 nn.EmbeddingBag"]()
    for feature, (bag, got) in enumerate(zip(peers.bags, vectors)):
        assert torch.equal(got, bag.weight[torch.from_numpy(batch[:, feature])])


def test_the_reference_is_the_layer():
    layer = robe_layer(3, 8, 500, 4)
    ids = torch.randint(-(2**40), 2**40, (20, 3))
    torch.testing.assert_close(embedding.reference(layer)(ids), layer(ids).detach())


def test_packages_are_found_without_importing_them(monkeypatch):
    assert embedding._is_installed("torch")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: None)
    assert not embedding._is_installed("torch")


@pytest.mark.parametrize("name", ["kaggle", "terabyte"])
def test_presets_have_26_tables(name):
    assert len(embedding.PRESETS[name].model.table_rows) == 26
