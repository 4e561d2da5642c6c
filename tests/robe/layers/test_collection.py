"""The collection against one nn.Embedding or nn.EmbeddingBag per table, on virtual tables made by the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robe import EmbeddingBagConfig, RobeArray, RobeEmbedding, RobeEmbeddingBagCollection
from tests.helpers.marks import asserted_on_gpus
from tests.helpers.oracle import places, table_grad_to_array

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
ROWS, DIM = [5, 9, 3], 4  # 68 weights
FIRST_ROW = [0, 5, 14]
MODES = ("sum", "mean", "max")

# Options of a collection of these tables, and where the oracle then looks for their weights.
LAYOUTS = {
    "compression 4": ({"compression": 4}, {"hash": "mix", "size": 17, "block_size": 4}),
    "small blocks": (
        {"robe_size": 30, "block_size": 3, "sign": True, "seed": 5},
        {"hash": "mix", "size": 30, "block_size": 3, "sign": True, "seed": 5},
    ),
    "wide blocks": (
        {"compression": 2, "block_size": 7, "sign": True},
        {"hash": "mix", "size": 34, "block_size": 7, "sign": True},
    ),
    "linear": (
        {"robe_size": 500, "block_size": 3, "sign": True, "hash": "linear"},
        {"hash": "linear", "size": 500, "block_size": 3, "sign": True},
    ),
    "no compression": ({"compression": 1, "sign": True}, {"hash": "identity", "size": 68, "block_size": 4}),
    "identity in a larger array": (
        {"array": RobeArray(100, dtype=torch.float64), "hash": "identity"},
        {"hash": "identity", "size": 100, "block_size": 4},
    ),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def configs(rows=tuple(ROWS), pooling="sum", embedding_dim=DIM):
    return [EmbeddingBagConfig(f"t{k}", n, embedding_dim, pooling=pooling) for k, n in enumerate(rows)]


def with_values(collection):
    """In float64, with values all different, so that only equal slots tie for a maximum."""
    collection.double()
    weight = collection.array.weight
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(len(weight)))
    return collection


def layouts_of_tables(oracle, rows=ROWS):
    """The oracle's keywords for each table: told apart by table_id, or by the rows before them."""
    return [{**oracle, "table_id": k, "first_row": sum(rows[:k])} for k in range(len(rows))]


def counterparts(collection, layouts, make, rows=ROWS):
    """make(virtual table) of every table."""
    modules, weight = [], collection.array.weight.detach()
    for n, layout in zip(rows, layouts):
        slots, signs = places(range(n), embedding_dim=collection.embedding_dim, **layout)
        modules.append(make(weight[torch.from_numpy(slots)] * torch.from_numpy(signs)))
    return modules


def assert_trains_as_its_counterparts(collection, output, modules, outputs, layouts):
    """outputs: of the modules, one (B, D) per feature; modules: one per table."""
    torch.testing.assert_close(output, torch.stack(outputs, 1), rtol=1e-12, atol=1e-12)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    collection.zero_grad()
    output.backward(upstream)
    torch.stack(outputs, 1).backward(upstream)
    want = sum(table_grad_to_array(module.weight.grad, **layout) for module, layout in zip(modules, layouts))
    np.testing.assert_allclose(collection.array.weight.grad.numpy(), want, rtol=1e-11, atol=1e-12)


def one_id_each(batch_size, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, (batch_size,), generator=generator) for n in rows], 1)


def ragged(lengths, rows=ROWS, seed=0):
    """values and offsets, features major; lengths[feature][example]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.randint(n, (sum(of),), generator=generator) for n, of in zip(rows, lengths)])
    offsets = torch.tensor([0, *np.cumsum([length for of in lengths for length in of])], dtype=torch.long)
    return values, offsets


def bags_of_feature(values, offsets, feature, batch_size, weights=None):
    """input, offsets, per_sample_weights of a feature alone, offsets with the last one, for nn.EmbeddingBag."""
    own = offsets[feature * batch_size : (feature + 1) * batch_size + 1].long()
    cut = slice(int(own[0]), int(own[-1]))
    return values[cut], own - own[0], None if weights is None else weights[cut]


# ---------------------------------------------------------------------------------------------------------------------
# Equal to a layer of torch's per table


@every_layout
@pytest.mark.parametrize("pooling", MODES)
@pytest.mark.parametrize("batch_size", [0, 1, 6])
def test_one_id_per_feature_equals_nn_embedding_of_each_table(layout, pooling, batch_size):
    options, oracle = LAYOUTS[layout]
    collection = with_values(RobeEmbeddingBagCollection(configs(pooling=pooling), **options))
    layouts = layouts_of_tables(oracle)
    modules = counterparts(collection, layouts, lambda table: nn.Embedding(*table.shape, _weight=table))
    ids = one_id_each(batch_size)
    output = collection(ids)
    assert output.shape == (batch_size, 3, DIM)
    outputs = [module(ids[:, k]) for k, module in enumerate(modules)]
    assert_trains_as_its_counterparts(collection, output, modules, outputs, layouts)


@every_layout
@pytest.mark.parametrize(("pooling", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)])
@pytest.mark.parametrize(
    "lengths",
    [[[2, 0, 3], [1, 1, 1], [0, 0, 4]], [[0, 0], [3, 0], [0, 0]], [[0], [0], [0]], [[], [], []]],
    ids=["ragged", "mostly empty", "all empty", "no examples"],
)
def test_bags_equal_nn_embedding_bag_of_each_table(layout, pooling, weighted, lengths):
    options, oracle = LAYOUTS[layout]
    collection = with_values(RobeEmbeddingBagCollection(configs(pooling=pooling), **options))
    layouts = layouts_of_tables(oracle)
    modules = counterparts(
        collection,
        layouts,
        lambda table: nn.EmbeddingBag(*table.shape, mode=pooling, include_last_offset=True, _weight=table),
    )
    values, offsets = ragged(lengths)
    batch_size = len(lengths[0])
    weights = [
        torch.linspace(-1, 2, len(values), dtype=torch.float64).requires_grad_() if weighted else None for _ in range(2)
    ]
    output = collection(values, offsets, weights[0])
    assert output.shape == (batch_size, 3, DIM)
    outputs = [module(*bags_of_feature(values, offsets, k, batch_size, weights[1])) for k, module in enumerate(modules)]
    assert_trains_as_its_counterparts(collection, output, modules, outputs, layouts)
    if weighted:
        torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-12, atol=1e-12)


@given(st.data())
def test_bags_equal_nn_embedding_bag_whatever_the_tables(data):
    rows = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    embedding_dim = data.draw(st.integers(1, 6))
    block_size = data.draw(st.integers(1, 2 * embedding_dim + 2))
    size = block_size + data.draw(st.integers(0, 60))
    hash = data.draw(st.sampled_from(["mix", "linear"]))
    whole = hash == "mix" and size >= sum(rows) * embedding_dim
    sign, pooling = data.draw(st.booleans()), data.draw(st.sampled_from(MODES))
    batch_size = data.draw(st.integers(0, 4))
    of_feature = st.lists(st.integers(0, 3), min_size=batch_size, max_size=batch_size)
    lengths = [data.draw(of_feature) for _ in rows]

    collection = with_values(
        RobeEmbeddingBagCollection(
            configs(rows, pooling, embedding_dim), robe_size=size, block_size=block_size, sign=sign, hash=hash
        )
    )
    oracle = {"size": size, "block_size": block_size, "sign": sign and not whole, "hash": "identity" if whole else hash}
    layouts = layouts_of_tables(oracle, rows)
    modules = counterparts(
        collection,
        layouts,
        lambda table: nn.EmbeddingBag(*table.shape, mode=pooling, include_last_offset=True, _weight=table),
        rows,
    )
    values, offsets = ragged(lengths, rows)
    own = (values.int(), offsets.int()) if data.draw(st.booleans()) else (values, offsets)
    outputs = [module(*bags_of_feature(values, offsets, k, batch_size)) for k, module in enumerate(modules)]
    assert_trains_as_its_counterparts(collection, collection(*own), modules, outputs, layouts)


@every_layout
@pytest.mark.parametrize("pooling", MODES)
def test_bags_of_one_id_equal_one_id_per_feature(layout, pooling):
    """Same rows and same gradient on both ways in: what a data loader picks must not matter."""
    collection = with_values(RobeEmbeddingBagCollection(configs(pooling=pooling), **LAYOUTS[layout][0]))
    ids = one_id_each(6)
    results = []
    for inputs in ((ids,), (ids.T.flatten(), torch.arange(19))):
        collection.zero_grad()
        output = collection(*inputs)
        (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)).sum().backward()
        results.append((output.detach(), collection.array.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-12)
    assert results[0][1].any()


@pytest.mark.parametrize("ids", [one_id_each(4).int(), one_id_each(8)[::2], one_id_each(4).T.contiguous().T])
def test_one_id_per_feature_in_any_type_and_stride(ids):
    options, oracle = LAYOUTS["small blocks"]
    collection = with_values(RobeEmbeddingBagCollection(configs(), **options))
    layouts = layouts_of_tables(oracle)
    modules = counterparts(collection, layouts, lambda table: nn.Embedding(*table.shape, _weight=table))
    outputs = [module(ids[:, k].long()) for k, module in enumerate(modules)]
    assert_trains_as_its_counterparts(collection, collection(ids), modules, outputs, layouts)


def test_a_table_may_serve_several_features():
    tables = [
        EmbeddingBagConfig("page", 5, DIM, feature_names=["seen", "clicked"]),
        EmbeddingBagConfig("user", 9, DIM),
    ]
    collection = with_values(RobeEmbeddingBagCollection(tables, robe_size=30))
    assert collection.feature_names == ["seen", "clicked", "user"]
    layouts = layouts_of_tables({"hash": "mix", "size": 30, "block_size": DIM}, rows=[5, 9])
    modules = counterparts(collection, layouts, lambda table: nn.Embedding(*table.shape, _weight=table), rows=[5, 9])
    ids = torch.tensor([[1, 4, 8], [2, 2, 0]])
    outputs = [modules[table](ids[:, feature]) for feature, table in enumerate([0, 0, 1])]
    assert_trains_as_its_counterparts(collection, collection(ids), modules, outputs, layouts)
    for feature, module in zip(collection.feature_names, [modules[0], modules[0], modules[1]]):
        assert torch.equal(collection.full_weight(feature), module.weight)


@every_layout
def test_full_weight_is_the_virtual_table_of_a_feature(layout):
    options, oracle = LAYOUTS[layout]
    collection = with_values(RobeEmbeddingBagCollection(configs(), **options))
    tables = counterparts(collection, layouts_of_tables(oracle), lambda table: table)
    for k, table in enumerate(tables):
        assert torch.equal(collection.full_weight(f"t{k}"), table)


def test_without_compression_the_array_is_the_tables_one_after_another():
    collection = RobeEmbeddingBagCollection(configs(), compression=1)
    assert collection.array.size == sum(ROWS) * DIM
    tables = torch.cat([collection.full_weight(f"t{k}") for k in range(3)])
    assert torch.equal(tables, collection.array.weight.view(sum(ROWS), DIM))


@pytest.mark.parametrize("pooling", MODES)
def test_without_compression_training_is_that_of_torch_step_for_step(pooling):
    torch.manual_seed(0)
    collection = RobeEmbeddingBagCollection(configs(pooling=pooling), compression=1)
    modules = nn.ModuleList(nn.EmbeddingBag(n, DIM, mode=pooling, include_last_offset=True) for n in ROWS)
    with torch.no_grad():
        collection.array.weight.copy_(torch.cat([module.weight.flatten() for module in modules]))
    target = torch.randn(3, 3, DIM)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (collection, modules)]
    start = collection.array.weight.detach().clone()
    for step in range(5):
        values, offsets = ragged([[2, 0, 3], [1, 1, 1], [0, 2, 4]], seed=step)
        outputs = [module(*bags_of_feature(values, offsets, k, 3)[:2]) for k, module in enumerate(modules)]
        for output, optimizer in zip((collection(values, offsets), torch.stack(outputs, 1)), optimizers):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
            optimizer.step()
    want = torch.cat([module.weight for module in modules])
    torch.testing.assert_close(collection.array.weight.view(-1, DIM), want, rtol=1e-6, atol=1e-7)
    assert (collection.array.weight - start).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# The array


def test_compression_is_that_of_all_tables_together():
    assert RobeEmbeddingBagCollection(configs([1000, 2, 500]), compression=10).array.size == 1502 * DIM // 10


def test_collections_share_an_array_and_table_k_has_table_id_k():
    array = RobeArray(500, seed=8)
    one = RobeEmbeddingBagCollection(configs(), array=array)
    two = RobeEmbeddingBagCollection(configs([7], embedding_dim=2), array=array)
    assert list(nn.ModuleList([one, two]).parameters()) == [array.weight]
    for k, rows in enumerate(ROWS):
        layer = RobeEmbedding(rows, DIM, array=array, table_id=k)
        assert torch.equal(one.full_weight(f"t{k}"), layer.full_weight())
        slots, _ = places(range(rows), embedding_dim=DIM, hash="mix", size=500, block_size=DIM, seed=8, table_id=k)
        assert torch.equal(layer.full_weight(), array.weight[torch.from_numpy(slots)])


def test_tables_of_equal_ids_read_different_rows():
    collection = RobeEmbeddingBagCollection(configs([100] * 3), robe_size=1000)
    rows = collection(torch.arange(100).unsqueeze(1).expand(100, 3))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (rows[:, a] == rows[:, b]).all(1).sum() <= 2  # 0.1 expected of 100


@pytest.mark.cpu_only("a GPU trips an assertion instead")
@pytest.mark.parametrize("block_size", [2, 9])
def test_unbounded_tables_take_any_id_beside_bounded_ones(block_size):
    collection = RobeEmbeddingBagCollection(configs([None, 5]), robe_size=50, block_size=block_size)
    far = [INT64_MIN, -1, 0, 2**40, INT64_MAX]
    ids = torch.tensor([[x, k] for k, x in enumerate(far)])
    layout = {"embedding_dim": DIM, "hash": "mix", "size": 50, "block_size": block_size}
    slots = [places(far, **layout)[0], places(range(5), **layout, table_id=1)[0]]
    want = collection.array.weight[torch.from_numpy(np.stack(slots, 1))]
    assert torch.equal(collection(ids), want)
    assert torch.equal(collection(ids.T.flatten(), torch.arange(11)), want)
    with pytest.raises(IndexError, match="id 5 of feature 1, whose table has 5 rows"):
        collection(torch.tensor([[5, 5]]))
    with pytest.raises(ValueError, match="full_weight: a table without num_embeddings has no end"):
        collection.full_weight("t0")


# ---------------------------------------------------------------------------------------------------------------------
# What it shows, and what it refuses


def test_repr_shows_the_options():
    collection = RobeEmbeddingBagCollection(
        [EmbeddingBagConfig("a", 5, 4, ["x", "y"], "mean"), EmbeddingBagConfig("b", 9, 4, pooling="mean")],
        robe_size=30,
        block_size=3,
        sign=True,
    )
    assert collection.extra_repr() == (
        "2 tables, 3 features, embedding_dim=4, block_size=3, hash='mix', pooling='mean', sign=True"
    )
    assert "hash='identity'" in repr(RobeEmbeddingBagCollection(configs(), compression=1))


def test_tables_may_come_from_a_generator():
    collection = RobeEmbeddingBagCollection((config for config in configs()), compression=4)
    assert [table.name for table in collection.tables] == collection.feature_names == ["t0", "t1", "t2"]


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ([], {}, "tables: expected at least one EmbeddingBagConfig"),
        (configs() + configs()[1:2], {}, "tables: table names must be unique, 't1' is there twice"),
        (
            [EmbeddingBagConfig("a", 5, 4, ["x", "y"]), EmbeddingBagConfig("b", 5, 4, ["y"])],
            {},
            "tables: feature names must be unique, 'y' is there twice",
        ),
        ([EmbeddingBagConfig("a", 5, 4, ["b"]), EmbeddingBagConfig("b", 5, 4)], {}, "feature names .* 'b' is there"),
        ([EmbeddingBagConfig("a", 5, 4, ["x", "x"])], {}, "feature names must be unique, 'x' is there twice"),
        (
            [EmbeddingBagConfig("a", 5, 4), EmbeddingBagConfig("b", 5, 8)],
            {},
            "need the same embedding_dim; 'a' has 4, 'b' has 8: RobeKeyedEmbeddingBagCollection takes several",
        ),
        (
            [EmbeddingBagConfig("a", 5, 4), EmbeddingBagConfig("b", 5, 4, pooling="max")],
            {},
            "need the same pooling; 'a' has 'sum', 'b' has 'max'",
        ),
        (configs(pooling="median"), {}, "pooling: expected one of sum, mean, max, got 'median'"),
        (configs([5, 0]), {"robe_size": 9}, "num_embeddings: expected at least 1, or None for any int64 id, got 0"),
        (configs([5, None]), {"robe_size": 9, "hash": "linear"}, "hash='linear': .* every table needs num_embeddings"),
        (configs([5, None]), {"robe_size": 9, "hash": "identity"}, "every table needs num_embeddings"),
        (configs([5, None]), {"compression": 10}, "compression: tables without num_embeddings"),
        (configs(), {"robe_size": 67, "hash": "identity"}, "the tables take 68 slots, the array has 67"),
    ],
)
def test_collection_refuses(tables, options, message):
    with pytest.raises(ValueError, match=message):
        RobeEmbeddingBagCollection(tables, **(options or {"robe_size": 30}))


@pytest.mark.parametrize(
    ("pooling", "inputs", "message"),
    [
        ("sum", (one_id_each(2), None, torch.ones(2, 3)), "per_sample_weights: expected with offsets"),
        ("mean", (torch.tensor([1]), torch.tensor([0, 1, 1, 1]), torch.ones(1)), "'sum' only, got pooling 'mean'"),
        ("sum", (torch.tensor([1]), torch.tensor([0, 1, 1, 1]), torch.ones(2)), r"got torch\.float32 \(2,\)"),
        ("sum", (torch.tensor([1]), torch.tensor([0, 1, 1])), r"expected \(F \* B \+ 1,\) for F = 3 features, got"),
        asserted_on_gpus("sum", (torch.tensor([1]), torch.tensor([0, 1, 0, 1])), "offsets: .* and a fall between"),
        asserted_on_gpus(
            "sum", (torch.tensor([1]), torch.tensor([0, 1, 1, 2])), "offsets: expected to rise from 0 to at most 1"
        ),
        ("sum", (one_id_each(2)[:, :2],), r"ids: expected \(B, 3\), one column per feature, got \(2, 2\)"),
        ("sum", (torch.tensor([1, 2, 3]),), r"ids: expected 2 dimensions, got shape \(3,\)"),
        ("sum", (one_id_each(2), torch.arange(7)), r"values: expected 1 dimension, got shape \(2, 3\)"),
        ("sum", (one_id_each(2).float(),), r"ids: expected int32 or int64, got torch\.float32"),
    ],
)
def test_collection_refuses_inputs_that_do_not_fit(pooling, inputs, message):
    with pytest.raises(ValueError, match=message):
        RobeEmbeddingBagCollection(configs(pooling=pooling), compression=4)(*inputs)


@pytest.mark.cpu_only("a GPU trips an assertion instead")
@every_layout
@pytest.mark.parametrize("bad", [9, -1, INT64_MAX])
def test_an_id_outside_its_table_is_an_index_error(layout, bad):
    collection = RobeEmbeddingBagCollection(configs(), **LAYOUTS[layout][0])
    message = f"id {bad} of feature 1, whose table has 9 rows"
    with pytest.raises(IndexError, match=message):
        collection(torch.tensor([[4, bad, 2]]))
    with pytest.raises(IndexError, match=message):
        collection(torch.tensor([4, bad, 2]), torch.arange(4))


def test_full_weight_names_the_features_there_are():
    collection = RobeEmbeddingBagCollection(configs(), compression=4)
    with pytest.raises(ValueError, match="feature: expected one of t0, t1, t2, got 't3'"):
        collection.full_weight("t3")
