"""save and load: what comes back computes what was written, to the bit, and the file has each array once."""

import copy
import json
import os
import resource
from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import robe
from robe.saving import whole_file

IDS = torch.randint(0, 1000, (6, 5), generator=torch.Generator().manual_seed(0))


class Recommender(nn.Module):
    def __init__(self, rows=2000, device=None):
        super().__init__()
        self.user = nn.Embedding(rows, 8, padding_idx=1, device=device)
        self.words = nn.ModuleDict({"title": nn.EmbeddingBag(rows, 4, mode="sum", device=device)})
        self.again = self.user
        self.day = nn.Embedding(7, 4)
        self.top = nn.Linear(16, 1)

    def forward(self, ids):
        parts = self.user(ids[:, 0]), self.words["title"](ids), self.day(ids[:, 0] % 7)
        return self.top(torch.cat(parts, dim=1))


def configs(**options):
    return [
        robe.EmbeddingBagConfig("a", 1000, 8, ["x", "y"], **options),
        robe.EmbeddingBagConfig("b", None, 8, **options),
    ]


def shared_admission():
    admission = robe.Admission(64)
    admission.admit(torch.arange(50), torch.tensor(robe.hashing.table_key(4, 2)))
    return robe.RobeEmbedding(1000, 8, robe_size=100, seed=4, table_id=2, admission=admission)


def int8():
    layer = robe.RobeEmbedding(1000, 8, robe_size=1000, seed=9)
    layer.array = layer.array.quantized(32)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: robe.RobeEmbedding(
        1000, 8, 3, compression=10, block_size=5, table_id=7, sign=True, seed=2**70
    ),
    "linear": lambda: robe.RobeEmbedding(1000, 8, robe_size=100, hash="linear", first_row=12),
    "identity": lambda: robe.RobeEmbedding(1000, 8, compression=1, first_row=5),
    "identity in another's array": lambda: robe.RobeEmbedding(
        1000, 4, array=robe.RobeArray(5000), hash="identity", first_row=200
    ),
    "double": lambda: robe.RobeEmbedding(1000, 8, compression=10, dtype=torch.float64, init_std=3),
    "bfloat16": lambda: robe.RobeEmbedding(1000, 8, compression=10, dtype=torch.bfloat16),
    "admission": shared_admission,
    "int8": int8,
    "bag": lambda: robe.RobeEmbeddingBag(1000, 8, mode="max", padding_idx=0, compression=10),
    "without end": lambda: robe.RobeEmbeddingBag(None, 8, mode="sum", robe_size=100),
    "collection": lambda: robe.RobeEmbeddingBagCollection(configs(pooling="mean"), robe_size=100, table_ids=[8, 4]),
    "collection, identity": lambda: robe.RobeEmbeddingBagCollection(configs()[:1], compression=1),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_comes_back_from_its_file_alone(make, tmp_path):
    layer = make()
    robe.save(layer, tmp_path / "layer.safetensors")
    again = robe.load(tmp_path / "layer.safetensors")
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert again.state_dict().keys() == layer.state_dict().keys()
    ids = IDS.repeat(1, 3)[:, : len(layer.feature_names)] if hasattr(layer, "feature_names") else IDS
    assert torch.equal(again(ids), layer(ids))
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_a_keyed_collection(tmp_path):
    tables = [robe.EmbeddingBagConfig("a", 1000, 8, ["x", "y"]), robe.EmbeddingBagConfig("b", 500, 4, ["x"], "mean")]
    layer = robe.RobeKeyedEmbeddingBagCollection(
        tables, compression=10, block_size=4, sign=True, seed=3, admission=robe.Admission(64)
    )
    robe.save(layer, tmp_path / "keyed")
    again = robe.load(tmp_path / "keyed")
    assert isinstance(again, robe.RobeKeyedEmbeddingBagCollection)
    assert again.embedding_bag_configs() == tables
    assert {id(collection.array) for collection in again.collections} == {id(again.array)}
    assert {id(collection.admission) for collection in again.collections} == {id(again.admission)}
    for one, other in zip(layer.collections, again.collections):
        assert one.extra_repr() == other.extra_repr()
        for name in one.feature_names:
            assert torch.equal(one.full_weight(name), other.full_weight(name))


@pytest.mark.parametrize(
    "other",
    [Recommender, lambda: robe.compress(Recommender(), 3, seed=8), lambda: Recommender(device="meta")],
    ids=["its tables", "compressed otherwise", "tables without memory"],
)
def test_a_model_comes_back_compressed(other, tmp_path):
    model = robe.compress(Recommender(), 20, block_size=4, seed=5, sign=True)
    model.user.eval()
    robe.save(model, tmp_path / "model.safetensors")
    again = other()
    assert robe.load(tmp_path / "model.safetensors", again) is again
    assert torch.equal(again(IDS), model(IDS))
    assert again.user.array is again.words["title"].array is again.again.array
    assert torch.equal(again.again(IDS), model.user(IDS))
    assert again.user.training  # as it was in the model that was given
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(name for name in file.keys() if "array" in name) == ["again.array.weight"]  # noqa: SIM118
        about = json.loads(file.metadata()["robe"])
    assert len(about["arrays"]) == 1
    assert set(about["layers"]) == {"user", "again", "words.title"}
    assert os.path.getsize(tmp_path / "model.safetensors") < 4 * (2000 * 12 // 20 + 7 * 4 + 17) + 2500


def test_a_compressed_model_that_trained_with_a_counting_admission(tmp_path):
    admission = robe.Admission(256, threshold=3, counter_bytes=4096)
    model = robe.compress(Recommender(), 10, admission=admission)
    for _ in range(3):
        model(IDS)
    robe.save(model, tmp_path / "model")
    again = robe.load(tmp_path / "model", Recommender())
    assert again.user.admission is again.words["title"].admission
    assert again.user.admission.threshold == 3
    assert torch.equal(again.user.admission.counter.counters, admission.counter.counters)
    assert torch.equal(again.eval()(IDS), model.eval()(IDS))
    admission.freeze()
    robe.save(model, tmp_path / "model")
    assert robe.load(tmp_path / "model", Recommender()).user.admission.counter is None


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def test_models_that_do_not_fit_are_refused_and_left_as_they_were(tmp_path):
    file = tmp_path / "model"
    robe.save(robe.compress(Recommender(), 20), file)

    class Other(Recommender):
        def __init__(self, **changes):
            super().__init__()
            for name, module in changes.items():
                setattr(self, name, module)

    for changes, error, message in (
        (
            {"user": nn.Embedding(999, 8)},
            ValueError,
            r"'user' is a RobeEmbedding of 2000 rows of 8; .* Embedding\(999, 8",
        ),
        ({"user": nn.EmbeddingBag(2000, 8)}, ValueError, "it can't take the place of EmbeddingBag"),
        ({"words": nn.Identity()}, ValueError, "has a layer 'words.title', and there is none in this Other"),
        ({"top": nn.Linear(15, 1)}, RuntimeError, "size mismatch for top.weight"),
        ({"top": nn.Linear(16, 1, bias=False)}, RuntimeError, "top.bias"),
    ):
        model = Other(**changes)
        before = dict(model.named_modules())
        with pytest.raises(error, match=message):
            robe.load(file, model)
        assert dict(model.named_modules()) == before
    with pytest.raises(ValueError, match=r"a model with the layers user, words\.title, again, not one layer"):
        robe.load(file)
    robe.save(robe.RobeEmbedding(2000, 8, compression=10), file)
    with pytest.raises(ValueError, match="of one RobeEmbedding; load\\(\\) makes it without a module"):
        robe.load(file, nn.Embedding(2000, 8))


def test_files_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        robe.load(tmp_path / "no file")
    (tmp_path / "text").write_text("not a safetensors file")
    with pytest.raises(ValueError, match="text: not a safetensors file, or damaged"):
        robe.load(tmp_path / "text")
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: not written by robe\.save: its metadata has no 'robe'"):
        robe.load(tmp_path / "other")
    save_file({"x": torch.ones(2)}, tmp_path / "newer", {"robe": json.dumps({"version": 2})})
    with pytest.raises(ValueError, match=r"newer: expected version 1 of robe\.save's format, got 2"):
        robe.load(tmp_path / "newer")
    robe.save(robe.RobeEmbedding(1000, 8, compression=10), tmp_path / "cut")
    content = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="cut: not a safetensors file, or damaged"):
        robe.load(tmp_path / "cut")


def test_a_model_without_robe_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="module: no ROBE layer in this Recommender"):
        robe.save(Recommender(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_file_in_place(tmp_path):
    layer = robe.RobeEmbedding(1000, 8, robe_size=100_000)
    robe.save(layer, tmp_path / "layer")
    want = (tmp_path / "layer").read_bytes()
    larger = copy.deepcopy(layer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="layer"):
            robe.save(larger, tmp_path / "layer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["layer"]
    assert (tmp_path / "layer").read_bytes() == want


def test_a_whole_file_takes_its_name_when_all_went_well(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_file(path) as part:
        part.write_text(str(1 / 0))
    assert (path.read_text(), [p.name for p in tmp_path.iterdir()]) == ("one", ["file"])
