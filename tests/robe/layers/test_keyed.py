"""RobeKeyedEmbeddingBagCollection against nn.functional.embedding_bag on each virtual table.

KeyedJaggedTensor and KeyedTensor here have the methods of torchrec's that are used; tests/integrations has torchrec's.
"""

import enum
import functools
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

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
        ({"a": "77", "b": ids}, r"features\['a'\]: " + both + "a str"),
        ({"a": [1, 2], "b": ids}, r"features\['a'\]: expected values as a tensor of one dimension, got a int"),
        ({"a": (ids, [0, 2]), "b": ids}, r"expected offsets as a tensor of one dimension, got a list"),
        (
            {"a": (ids, ids.view(1, 2)), "b": ids},
            r"expected offsets as a tensor of one dimension, got a tensor \(1, 2\)",
        ),
        ({"a": (ids, ids[:0]), "b": ids}, r"features\['a'\]: expected offsets \(B \+ 1,\), got none"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(features)
    layer = robe.RobeKeyedEmbeddingBagCollection([Config(2000, 8, "t0")], robe_size=500, is_weighted=True)
    with pytest.raises(ValueError, match=r"expected \(values, offsets, weights\), got a tensor"):
        layer({"t0": ids})
    # Together there are as many weights as values.
    layer = robe.RobeKeyedEmbeddingBagCollection([Config(9, 8, "t", ["a", "b"])], robe_size=500, is_weighted=True)
    offsets = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"features\['a'\]: expected as many weights as values, 2, got 1"):
        layer({"a": (ids, offsets, torch.ones(1)), "b": (ids, offsets, torch.ones(3))})


# -- Tables that fit --------------------------------------------------------------------------------------------------

FIT = [
    robe.EmbeddingBagConfig("a", 50, 4, ["x"]),
    robe.EmbeddingBagConfig("b", 7, 6, ["y", "z"], "mean"),
    robe.EmbeddingBagConfig("c", 70, 4, ["u"]),
]
FLOATS = 50 * 4 + 7 * 6 + 70 * 4


def slots_read(layer):
    """The slot of each component of each table: what it reads where the array holds its own slots."""
    with torch.no_grad():
        layer.array.weight.copy_(torch.arange(layer.array.size))
    tables = {f: c.full_weight(f) for c in layer.collections for f in c.feature_names}
    assert torch.equal(tables["y@b"], tables["z@b"])
    return torch.cat([tables[f].flatten() for f in ("x@a", "y@b", "u@c")])


@pytest.mark.parametrize(
    "options", [{"compression": 1}, {"compression": 0.5}, {"robe_size": FLOATS}, {"robe_size": FLOATS + 9}]
)
def test_an_array_with_room_for_every_weight_gives_each_a_slot(options):
    layer = robe.RobeKeyedEmbeddingBagCollection(FIT, **options, block_size=3, sign=True)
    assert slots_read(layer).sort().values.tolist() == list(range(FLOATS))
    arguments = layer.arguments()
    tables = [robe.EmbeddingBagConfig(**table) for table in arguments.pop("tables")]
    again = robe.RobeKeyedEmbeddingBagCollection(tables, array=layer.array, **arguments)
    ids = {"x": torch.arange(7), "y": torch.arange(7), "z": torch.arange(7), "u": torch.arange(7)}
    for name, want in layer(ids).items():
        assert torch.equal(again(ids)[name], want)


def test_keyed_collections_lie_one_behind_the_other_on_a_shared_array():
    array, second = robe.RobeArray(2 * FLOATS + 2), FLOATS + 2
    layers = [robe.RobeKeyedEmbeddingBagCollection(FIT, array=array, first_slot=first) for first in (0, second)]
    for layer, first in zip(layers, (0, second)):
        assert slots_read(layer).sort().values.tolist() == list(range(first, first + FLOATS))
    with pytest.raises(ValueError, match="the array has"):
        robe.RobeKeyedEmbeddingBagCollection(FIT, array=array, first_slot=second + 4)
    with pytest.raises(ValueError, match="first_slot: expected a multiple of 4, the power of two in embedding_dim=4"):
        robe.RobeKeyedEmbeddingBagCollection(FIT, array=array, first_slot=1)


def test_tables_of_odd_dimensions_lie_behind_those_that_have_to_be_aligned():
    tables = [robe.EmbeddingBagConfig(f"t{dim}", 5, dim, [f"f{dim}"]) for dim in (3, 8, 6, 4)]
    layer = robe.RobeKeyedEmbeddingBagCollection(tables, compression=1)
    layer.array.weight.data.copy_(torch.arange(105))
    begin = {c.embedding_dim: int(c.full_weight(c.feature_names[0])[0, 0]) for c in layer.collections}
    assert begin == {8: 0, 4: 40, 6: 60, 3: 90}


@pytest.mark.parametrize(
    "options", [{"robe_size": FLOATS - 1}, {"array": robe.RobeArray(FLOATS)}, {"compression": 1, "admission": True}]
)
def test_without_room_or_on_a_shared_array_keyed_tables_are_hashed(options):
    if "admission" in options:
        options = options | {"admission": robe.Admission(8)}
    layer = robe.RobeKeyedEmbeddingBagCollection(FIT, **options)
    assert {collection.hash for collection in layer.collections} == {"mix"}


def test_weights_that_0_8_0_hashed_are_not_read_from_other_slots():
    layer = robe.RobeKeyedEmbeddingBagCollection(FIT, compression=1)
    state = layer.state_dict()
    layer.load_state_dict(state)
    layer.load_state_dict(dict(state))
    state._metadata[""]["version"] = 1
    with pytest.raises(RuntimeError, match=r"hashed in this checkpoint of 0\.8\.0"):
        layer.load_state_dict(state)
    robe.RobeKeyedEmbeddingBagCollection(FIT, array=robe.RobeArray(FLOATS)).load_state_dict(state)


# -- Options of torchrec's configs ------------------------------------------------------------------------------------


class DataType(enum.Enum):
    FP32 = "FP32"
    BF16 = "BF16"
    INT8 = "INT8"


@dataclass
class WholeConfig(Config):
    """With torchrec's other options and their defaults."""

    data_type: DataType = DataType.FP32
    weight_init_max: float | None = None
    weight_init_min: float | None = None
    need_pos: bool = False
    use_virtual_table: bool = False
    total_num_buckets: int | None = None

    def __post_init__(self):
        if self.init_fn is None:
            bound = math.sqrt(1 / self.num_embeddings)
            self.init_fn = functools.partial(torch.nn.init.uniform_, a=-bound, b=bound)


KINDS = {
    "keyed": robe.RobeKeyedEmbeddingBagCollection,
    "from_configs": robe.RobeEmbeddingBagCollection.from_configs,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"init_fn": torch.nn.init.ones_}, "'t' has init_fn=.*leave it out, and set init_std="),
        ({"init_fn": functools.partial(torch.nn.init.uniform_, a=0, b=1)}, "'t' has init_fn="),
        ({"weight_init_max": 0.0}, r"'t' has weight_init_max=0\.0"),
        ({"weight_init_min": -1.0}, r"'t' has weight_init_min=-1\.0"),
        ({"need_pos": True}, "'t' has need_pos=True"),
        ({"use_virtual_table": True}, "'t' has use_virtual_table=True"),
        ({"total_num_buckets": 7}, "'t' has total_num_buckets=7"),
        ({"data_type": DataType.INT8}, "'t' has data_type INT8: expected one of FP32, FP16, BF16"),
        (
            {"data_type": DataType.BF16},
            "one array has one data_type; 'first' has torch.float32, 't' has torch.bfloat16",
        ),
    ],
)
def test_options_that_a_shared_array_cannot_follow_are_refused_by_name(kind, option, message):
    with pytest.raises(ValueError, match=message):
        kind([WholeConfig(50, 8, "first"), WholeConfig(50, 8, "t", **option)], robe_size=99)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_data_type_of_configs_is_that_of_the_array(kind):
    tables = [WholeConfig(50, 8, name, data_type=DataType.BF16) for name in "ab"]
    assert kind(tables, robe_size=99).array.weight.dtype == torch.bfloat16
    assert kind(tables, robe_size=99, dtype=torch.bfloat16).array.weight.dtype == torch.bfloat16
    assert kind(tables, array=robe.RobeArray(99, dtype=torch.bfloat16)).array.size == 99
    with pytest.raises(ValueError, match=r"'a' has data_type torch\.bfloat16, and the array is of torch.float64"):
        kind(tables, robe_size=99, dtype=torch.float64)
    whole = [WholeConfig(50, 8, name) for name in "ab"]
    assert kind(whole, robe_size=99, dtype=torch.float64).array.weight.dtype == torch.float64


def test_a_config_without_pooling_is_refused():
    with pytest.raises(ValueError, match="got a SimpleNamespace, which has no pooling"):
        robe.RobeKeyedEmbeddingBagCollection(
            [SimpleNamespace(name="t", num_embeddings=5, embedding_dim=4, feature_names=[])], robe_size=99
        )
