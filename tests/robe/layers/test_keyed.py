"""RobeKeyedEmbeddingBagCollection against nn.functional.embedding_bag on each virtual table.

KeyedJaggedTensor and KeyedTensor here have the methods of torchrec's that are used; tests/integrations has torchrec's.
"""

import enum
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional

import robe


class PoolingType(enum.Enum):
    SUM = "SUM"
    MEAN = "MEAN"
    NONE = "NONE"


@dataclass
class Config:
    """torchrec's, with more in it than is used."""

    num_embeddings: int
    embedding_dim: int
    name: str
    feature_names: list = field(default_factory=list)
    pooling: PoolingType = PoolingType.SUM
    init_fn: object = None


class KeyedTensor:
    def __init__(self, keys, length_per_key, values):
        self._keys, self._lengths, self._values = keys, length_per_key, values

    def keys(self):
        return self._keys

    def values(self):
        return self._values

    def __getitem__(self, key):
        return dict(zip(self._keys, self._values.split(self._lengths, dim=1)))[key]


class KeyedJaggedTensor:
    def __init__(self, bags, weights=None, dtype=torch.int64, variable=False):
        self.bags = bags
        self._values = torch.tensor([x for of_key in bags.values() for bag in of_key for x in bag], dtype=dtype)
        self._lengths = torch.tensor([len(bag) for of_key in bags.values() for bag in of_key], dtype=torch.int32)
        self._weights, self._variable = weights, variable

    def keys(self):
        return list(self.bags)

    def values(self):
        return self._values

    def lengths(self):
        return self._lengths

    def offsets(self):
        return torch.cat([self._lengths.new_zeros(1), self._lengths.cumsum(0).int()])

    def weights(self):
        return self._weights

    def offset_per_key(self):
        ends = torch.tensor([sum(map(len, of_key)) for of_key in self.bags.values()]).cumsum(0)
        return [0, *ends.tolist()]

    def variable_stride_per_key(self):
        return self._variable


TABLES = [
    Config(2000, 8, "t0", ["a", "b"]),
    Config(500, 4, "t1", ["c"], PoolingType.MEAN),
    Config(3000, 8, "t2", ["d", "a"]),
    Config(700, 8, "t3", pooling=PoolingType.MEAN),
    Config(900, 4, "t4", ["e"], PoolingType.MEAN),
]
COLUMNS = ["a@t0", "b", "c", "d", "a@t2", "t3", "e"]
WIDTHS = [8, 8, 4, 8, 8, 8, 4]
BAGS = {
    "a": [[1, 2], [], [1999]],
    "b": [[7], [7, 7], [8]],
    "c": [[499, 1, 2], [3], []],
    "d": [[2999], [0], [5, 6]],
    "t3": [[], [699], [1, 1, 1]],
    "e": [[899], [], [3, 4]],
}


def table_of(layer, name):
    """The virtual table of an output column."""
    feature, _, table = name.partition("@")
    for config in TABLES:
        if feature in (config.feature_names or [config.name]) and table in ("", config.name):
            for collection in layer.collections:
                if f"{feature}@{config.name}" in collection.feature_names:
                    return collection.full_weight(f"{feature}@{config.name}"), config.pooling.value.lower()
    raise AssertionError(name)


def expected(layer, bags, weights=None):
    columns = []
    for name in COLUMNS:
        table, mode = table_of(layer, name)
        feature = name.partition("@")[0]
        ids = torch.tensor([x for bag in bags[feature] for x in bag], dtype=torch.int64)
        offsets = torch.tensor([0, *map(len, bags[feature])]).cumsum(0)
        of_ids = None if weights is None else weights[feature]
        columns.append(
            functional.embedding_bag(
                ids, table, offsets, mode=mode, per_sample_weights=of_ids, include_last_offset=True
            )
        )
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("order", [list(BAGS), list(BAGS)[::-1], [*list(BAGS)[3:], "unused", *list(BAGS)[:3]]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_columns_and_their_order(order, dtype):
    layer = robe.RobeKeyedEmbeddingBagCollection(TABLES, compression=10, seed=2)
    bags = BAGS | {"unused": [[10**6], [], [5]]}
    features = KeyedJaggedTensor({key: bags[key] for key in order}, dtype=dtype)
    out = layer(features)
    assert isinstance(out, KeyedTensor)
    assert out.keys() == COLUMNS
    assert [out[name].shape for name in COLUMNS] == [(3, width) for width in WIDTHS]
    torch.testing.assert_close(out.values(), expected(layer, BAGS))
    out.values().sum().backward()
    got, layer.array.weight.grad = layer.array.weight.grad, None
    expected(layer, BAGS).sum().backward()
    torch.testing.assert_close(got, layer.array.weight.grad)


def test_one_array_and_rows_of_its_own_for_each_table():
    layer = robe.RobeKeyedEmbeddingBagCollection(TABLES, compression=10)
    floats = sum(t.num_embeddings * t.embedding_dim for t in TABLES)
    assert layer.array.size == floats // 10
    assert len(list(layer.parameters())) == 1
    assert len(layer.collections) == 3
    keys = [key for collection in layer.collections for key in collection.table_keys.tolist()]
    assert len(set(keys)) == len(TABLES)
    assert layer.embedding_bag_configs() == TABLES
    assert not layer.is_weighted()
    assert layer.device.type == "cpu"


@pytest.mark.parametrize("backwards", [False, True])
def test_weights(backwards):
    tables = [Config(2000, 8, "t0", ["a", "b"]), Config(500, 4, "t1", ["c"])]
    layer = robe.RobeKeyedEmbeddingBagCollection(tables, robe_size=500, is_weighted=True)
    keys = ["c", "b", "a"] if backwards else ["a", "b", "c"]
    weights = {key: torch.rand(sum(map(len, BAGS[key]))) for key in keys}
    features = KeyedJaggedTensor({key: BAGS[key] for key in keys}, torch.cat(list(weights.values())))
    out = layer(features)
    for key in "abc":
        table = next(c for c in layer.collections if any(n.startswith(key) for n in c.feature_names))
        name = next(n for n in table.feature_names if n.startswith(key))
        ids, offsets = (
            torch.tensor([x for bag in BAGS[key] for x in bag]),
            torch.tensor([0, *map(len, BAGS[key])]).cumsum(0),
        )
        want = functional.embedding_bag(
            ids, table.full_weight(name), offsets, mode="sum", per_sample_weights=weights[key], include_last_offset=True
        )
        torch.testing.assert_close(out[key], want)


def test_dtypes_and_a_state_dict():
    features = KeyedJaggedTensor(BAGS)
    for dtype, want in ((torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        layer = robe.RobeKeyedEmbeddingBagCollection(TABLES, compression=10, dtype=dtype)
        assert layer(features).values().dtype == want
        other = robe.RobeKeyedEmbeddingBagCollection(TABLES, compression=10, dtype=dtype)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(layer(features).values(), other(features).values())


def test_from_configs():
    tables = [Config(2000, 8, "t0", ["a", "b"], PoolingType.MEAN), Config(500, 8, "t1", pooling=PoolingType.MEAN)]
    layer = robe.RobeEmbeddingBagCollection.from_configs(tables, compression=10)
    assert (layer.feature_names, layer.pooling, layer.array.size) == (["a", "b", "t1"], "mean", 2000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: robe.RobeKeyedEmbeddingBagCollection([TABLES[0], TABLES[0]], robe_size=99), "'t0' is there twice"),
        (lambda: robe.RobeKeyedEmbeddingBagCollection([], robe_size=99), "tables: expected at least one"),
        (lambda: robe.RobeKeyedEmbeddingBagCollection(TABLES), "expected exactly one of array="),
        (
            lambda: robe.RobeKeyedEmbeddingBagCollection([Config(9, 4, "t", pooling=PoolingType.NONE)], robe_size=99),
            "pooling: expected one of sum, mean, max, got 'none'",
        ),
        (
            lambda: robe.RobeEmbeddingBagCollection(
                [robe.EmbeddingBagConfig("t", 9, 4)], robe_size=99, table_ids=[1, 2]
            ),
            "table_ids: expected 1, one a table, got 2",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.cpu_only("a GPU trips an assertion instead")
def test_refused_features():
    layer = robe.RobeKeyedEmbeddingBagCollection(TABLES, compression=10)
    with pytest.raises(ValueError, match="features: expected a key 'c', got a, b"):
        layer(KeyedJaggedTensor({"a": [[1]], "b": [[2]]}))
    with pytest.raises(ValueError, match="features: expected one batch size for all keys"):
        layer(KeyedJaggedTensor(BAGS, variable=True))
    with pytest.raises(TypeError, match="features: expected torchrec's KeyedJaggedTensor, or a dict, got a Tensor"):
        layer(torch.ones(3))
    with pytest.raises(IndexError):
        layer(KeyedJaggedTensor(BAGS | {"b": [[2000], [], []]}))


def as_bags(bags, dtype=torch.int64):
    return torch.tensor([x for bag in bags for x in bag], dtype=dtype), torch.tensor([0, *map(len, bags)]).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_dict_of_bags(dtype):
    layer = robe.RobeKeyedEmbeddingBagCollection(TABLES, compression=10)
    out = layer({key: as_bags(bags, dtype) for key, bags in reversed(BAGS.items())} | {"unused": torch.ones(5)})
    assert list(out) == COLUMNS
    assert [x.shape for x in out.values()] == [(3, width) for width in WIDTHS]
    torch.testing.assert_close(torch.cat(list(out.values()), dim=1), expected(layer, BAGS))
    out["a@t0"].sum().backward()
    assert layer.array.weight.grad.any()


def test_a_dict_of_ids_and_of_equal_bags():
    """Beside bags of any length, with which they may share a collection."""
    layer = robe.RobeKeyedEmbeddingBagCollection(TABLES, compression=10)
    ids = {"a": torch.tensor([5, 6, 7]), "c": torch.tensor([[1, 2], [3, 3], [4, 5]]), "t3": torch.tensor([1, 2, 3])}
    ids["d"] = torch.zeros(3, 0, dtype=torch.int64)
    got = layer(ids | {key: as_bags(BAGS[key]) for key in ("b", "e")})
    bags = BAGS | {"a": [[5], [6], [7]], "c": [[1, 2], [3, 3], [4, 5]], "d": [[], [], []], "t3": [[1], [2], [3]]}
    torch.testing.assert_close(torch.cat(list(got.values()), dim=1), expected(layer, bags))


def test_a_dict_with_weights():
    tables = [Config(2000, 8, "t0", ["a", "b"]), Config(500, 4, "t1", ["c"])]
    layer = robe.RobeKeyedEmbeddingBagCollection(tables, robe_size=500, is_weighted=True)
    features = {key: (*as_bags(BAGS[key]), torch.rand(sum(map(len, BAGS[key])))) for key in "abc"}
    keyed = KeyedJaggedTensor({key: BAGS[key] for key in "abc"}, torch.cat([x[2] for x in features.values()]))
    for key, x in layer(features).items():
        torch.testing.assert_close(x, layer(keyed)[key])


def test_refused_dicts():
    layer = robe.RobeKeyedEmbeddingBagCollection([Config(2000, 8, "t0", ["a", "b"])], robe_size=500)
    ids, weights = torch.tensor([1, 2]), torch.ones(2)
    both = r"expected \(B,\) or \(B, N\) ids, or \(values, offsets\), got "
    for features, message in (
        ({"a": ids}, "features: expected a key 'b', got a"),
        ({"a": ids, "b": ids[:1]}, r"features\['b'\]: expected 2 examples, as features\['a'\] has, got 1"),
        ({"a": ids, "b": ids.view(1, 1, 2)}, r"features\['b'\]: " + both + r"a tensor \(1, 1, 2\)"),
        (
            {"a": (ids, torch.tensor([0, 1])), "b": ids},
            "expected offsets from 0 to 2, the number of values, got 0 ... 1",
        ),
        ({"a": (*as_bags([[1], [2]]), weights), "b": ids}, r"features\['a'\]: " + both + "a tuple of 3"),
        ({"a": 7, "b": ids}, r"features\['a'\]: " + both + "a int"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(features)
    layer = robe.RobeKeyedEmbeddingBagCollection([Config(2000, 8, "t0")], robe_size=500, is_weighted=True)
    with pytest.raises(ValueError, match=r"expected \(values, offsets, weights\), got a tensor"):
        layer({"t0": ids})
