"""save and load: what comes back computes what was written, to the bit, and the file has each array once."""

import copy
import json
import os
import resource
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import robe

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


@pytest.mark.parametrize("weighted", [True, False])
def test_a_keyed_collection_is_weighted_in_both_or_refused(weighted, tmp_path):
    def model(weighted):
        table = robe.EmbeddingBagConfig("a", 1000, 8)
        layer = robe.RobeKeyedEmbeddingBagCollection([table], compression=10, is_weighted=weighted)
        return nn.ModuleDict({"bags": layer})

    saved = model(weighted)
    robe.save(saved, tmp_path / "model")
    assert torch.equal(robe.load(tmp_path / "model", model(weighted))["bags"].array.weight, saved["bags"].array.weight)
    with pytest.raises(ValueError, match=f"it has is_weighted={weighted} there, and here {not weighted}"):
        robe.load(tmp_path / "model", model(not weighted))


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
    assert again.again is again.user
    assert again.user.training  # as in the model that was given, not in that which was saved
    assert not robe.load(tmp_path / "model.safetensors", other().eval()).user.training
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


class Other(Recommender):
    def __init__(self, **changes):
        super().__init__()
        for name, module in changes.items():
            setattr(self, name, module)


class Scaled(robe.RobeEmbedding):
    def forward(self, input):
        return 3 * super().forward(input)


class Normalised(nn.Embedding):
    def forward(self, input):
        return nn.functional.normalize(super().forward(input), dim=-1)


def hooked():
    module = nn.Embedding(2000, 8, padding_idx=1)
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"user": nn.Embedding(999, 8, 1)},
            "'user', a Embedding, can't be swapped: it has num_embeddings=2000 there, and",
        ),
        ({"user": nn.Embedding(2000, 9, 1)}, "has embedding_dim=8 there, and here 9"),
        ({"user": nn.Embedding(2000, 8)}, "has padding_idx=1 there, and here None"),
        ({"user": nn.EmbeddingBag(2000, 8)}, "is a RobeEmbedding there"),
        ({"user": Normalised(2000, 8, 1)}, "is a Normalised, which has a forward of its own"),
        ({"user": hooked()}, "has hooks"),
        ({"user": nn.Linear(2000, 8)}, "is a RobeEmbedding there"),
        ({"user": Scaled(2000, 8, 1, compression=10)}, "is a RobeEmbedding there"),
        ({"words": nn.ModuleDict({"title": nn.EmbeddingBag(2000, 4)})}, "has mode=sum there, and here mean"),
        ({"words": nn.Identity()}, "has a layer 'words.title', and there is none in this Other"),
        ({"top": nn.Linear(15, 1)}, r"top.weight has the shape \(1, 16\), in this Other \(1, 15\)"),
        ({"top": nn.Linear(16, 1, bias=False)}, r"has top\.bias, which this Other has not"),
        ({"more": nn.Linear(1, 1)}, r"has no more\.\w+, which this Other has"),
        ({"top": nn.Linear(16, 1, device="meta")}, "module: top.weight is on the meta device"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_as_it_was(changes, message, tmp_path):
    robe.save(robe.compress(Recommender(), 20), tmp_path / "model")
    model = Other(**changes)
    modules = dict(model.named_modules())
    before = {name: x.clone() for name, x in model.state_dict().items() if not x.is_meta}
    with pytest.raises(ValueError, match=message):
        robe.load(tmp_path / "model", model)
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_files_of_one_layer_and_of_models_are_told_apart(tmp_path):
    robe.save(robe.compress(Recommender(), 20), tmp_path / "file")
    with pytest.raises(ValueError, match=r"a model with the layers user, words\.title, again, not one layer"):
        robe.load(tmp_path / "file")
    robe.save(robe.RobeEmbedding(2000, 8, compression=10), tmp_path / "file")
    with pytest.raises(ValueError, match="of one RobeEmbedding; load\\(\\) makes it without a module"):
        robe.load(tmp_path / "file", nn.Embedding(2000, 8))


class Collections(nn.Module):
    def __init__(self, *names, dim=8):
        super().__init__()
        self.c = robe.RobeEmbeddingBagCollection([robe.EmbeddingBagConfig(n, 1000, dim) for n in names], compression=10)


def test_feature_names_may_be_a_tuple(tmp_path):
    model = Collections("x", "y")
    model.c = robe.RobeEmbeddingBagCollection([robe.EmbeddingBagConfig("a", 1000, 8, ("x", "y"))], compression=10)
    robe.save(model, tmp_path / "model")
    assert robe.load(tmp_path / "model", model) is model


def test_collections_keep_the_order_of_their_features(tmp_path):
    robe.save(Collections("x", "y"), tmp_path / "model")
    robe.load(tmp_path / "model", Collections("x", "y"))
    for other in (Collections("y", "x"), Collections("x", "y", dim=4), Collections("x", "y", "z")):
        with pytest.raises(ValueError, match="'c', a RobeEmbeddingBagCollection, can't be swapped: it has tables="):
            robe.load(tmp_path / "model", other)


# ---------------------------------------------------------------------------------------------------------------------
# What models do with layers and arrays


class OwnArray(nn.Module):
    """Holds the array and the admission itself, and a layer of a class of its own."""

    def __init__(self, seed=0, size=500, admission=None, kind=Scaled):
        super().__init__()
        self.layer_first = kind(2000, 8, array=(array := robe.RobeArray(size, seed=seed)), admission=admission)
        self.array = array
        self.admission = admission
        self.other = robe.RobeEmbeddingBag(2000, 8, array=array, table_id=1, admission=admission)

    def forward(self, ids):
        return self.layer_first(ids).sum(1) + self.other(ids) + self.array.weight[0]


@pytest.mark.parametrize("kind", [Scaled, robe.RobeEmbedding])
def test_a_model_that_holds_its_array_itself(kind, tmp_path):
    admission = robe.Admission(64)
    admission.admit(torch.arange(100), torch.tensor(robe.hashing.table_key(3, 0)))
    model = OwnArray(3, admission=admission, kind=kind)
    robe.save(model, tmp_path / "model")
    again = OwnArray(8, size=200, admission=robe.Admission(8), kind=kind)
    robe.load(tmp_path / "model", again)
    assert again.array is again.layer_first.array is again.other.array
    assert again.admission is again.layer_first.admission is again.other.admission
    assert torch.equal(again(IDS), model(IDS))
    assert len(list(again.parameters())) == 1


def test_a_class_of_the_users_own_stays_and_only_its_array_is_exchanged(tmp_path):
    model = OwnArray(3)
    robe.save(model, tmp_path / "model")
    again = OwnArray(3)
    mine = again.layer_first
    robe.load(tmp_path / "model", again)
    assert again.layer_first is mine
    assert mine.array is again.other.array is again.array
    assert torch.equal(again(IDS), model(IDS))
    with pytest.raises(ValueError, match=r"can't be swapped: it is a .*Scaled there"):
        robe.load(tmp_path / "model", OwnArray(3, kind=robe.RobeEmbedding))
    robe.save(model.layer_first, tmp_path / "layer")
    with pytest.raises(
        ValueError, match=r"of a .*Scaled, which is more than a RobeEmbedding; save a model that has it"
    ):
        robe.load(tmp_path / "layer")


def test_frozen_arrays_stay_frozen(tmp_path):
    layer = robe.RobeEmbedding.from_pretrained(torch.randn(1000, 8), compression=4)
    robe.save(layer, tmp_path / "layer")
    again = robe.load(tmp_path / "layer")
    assert not again.array.weight.requires_grad
    assert torch.equal(again(IDS), layer(IDS))


def test_numbers_of_numpy(tmp_path):
    layer = robe.RobeEmbedding(np.int64(1000), np.int32(8), compression=10)
    robe.save(layer, tmp_path / "layer")
    assert torch.equal(robe.load(tmp_path / "layer")(IDS), layer(IDS))


def test_loading_leaves_torchs_generator_alone(tmp_path):
    robe.save(robe.RobeEmbedding(1000, 8, compression=10), tmp_path / "layer")
    state = torch.get_rng_state()
    robe.load(tmp_path / "layer")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ["seed", "inner"])
def test_a_layer_that_its_arguments_would_not_make_again_is_refused(change, tmp_path):
    if change == "seed":
        layer = robe.RobeEmbedding(1000, 8, robe_size=100, seed=1)
        layer.array = robe.RobeArray(100, seed=2)  # its rows lie where seed 1 has them
    else:
        layer = robe.RobeEmbedding(1000, 8, robe_size=100)
        nn.utils.parametrize.register_parametrization(layer.array, "weight", nn.Identity())
    with pytest.raises(ValueError, match="module: it was changed after it was made"):
        robe.save(layer, tmp_path / "layer")
    assert not list(tmp_path.iterdir())


def test_device_of_the_arrays_can_be_chosen(monkeypatch, tmp_path):
    """There is one that has values here; which one is asked for is what can be seen."""
    robe.save(robe.RobeEmbedding(1000, 8, compression=10), tmp_path / "layer")
    robe.save(robe.compress(Recommender(), 20), tmp_path / "model")
    asked, empty = [], robe.RobeArray.to_empty
    monkeypatch.setattr(
        robe.RobeArray, "to_empty", lambda self, device: asked.append(device) or empty(self, device="cpu")
    )
    robe.load(tmp_path / "layer", device="cuda:0")
    robe.load(tmp_path / "model", Recommender(), device="cuda:1")
    robe.load(tmp_path / "model", Recommender(device="meta"))
    assert [str(device) for device in asked] == ["cuda:0", "cuda:1", "cpu"]


# ---------------------------------------------------------------------------------------------------------------------
# Files


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
