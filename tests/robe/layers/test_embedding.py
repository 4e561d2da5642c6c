"""RobeEmbedding and RobeEmbeddingBag against nn.Embedding and nn.EmbeddingBag on the virtual table.

The table and the way of a gradient from the table to the array come from the oracle, not from the layers.
"""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import robe
from robe import RobeArray, RobeEmbedding, RobeEmbeddingBag
from tests.helpers.marks import asserted_on_gpus
from tests.helpers.oracle import places, table_grad_to_array
from tests.helpers.tables import (
    DIM,
    INT64_MAX,
    INT64_MIN,
    LAYOUTS,
    MODES,
    ROWS,
    assert_trains_as_its_counterpart,
    bag_inputs,
    every_layout,
    every_pooling,
    id_tensor,
    virtual_table,
    with_values,
)

# ---------------------------------------------------------------------------------------------------------------------
# Equal to torch's layers


@every_layout
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_full_weight_is_the_virtual_table(layout, padding_idx, kind):
    options, oracle = LAYOUTS[layout]
    layer = with_values(kind(ROWS, DIM, padding_idx=padding_idx, **options))
    table = layer.full_weight()
    assert torch.equal(table, virtual_table(layer.array.weight, ROWS, DIM, padding_idx, **oracle))
    layer.zero_grad()
    upstream = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table.backward(upstream)
    if padding_idx is not None:
        upstream[padding_idx] = 0
    grad = table_grad_to_array(upstream, **oracle)
    np.testing.assert_allclose(layer.array.weight.grad.numpy(), grad, rtol=1e-12, atol=1e-12)


INPUTS = {
    "a scalar": id_tensor(()),
    "none": id_tensor((0,)),
    "a vector": id_tensor((50,)),
    "a batch": id_tensor((3, 5)),
    "an empty batch": id_tensor((2, 0, 3)),
    "three dimensions": id_tensor((2, 3, 4)),
    "transposed": id_tensor((5, 7)).T,
    "every other": id_tensor((40,))[::2],
    "one id many times": torch.full((6, 2), 3),
    "expanded": torch.tensor([[7], [8]]).expand(2, 5),
}


@every_layout
@pytest.mark.parametrize("ids", INPUTS)
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_embedding_equals_nn_embedding(layout, ids, padding_idx):
    options, oracle = LAYOUTS[layout]
    layer = with_values(RobeEmbedding(ROWS, DIM, padding_idx, **options))
    table = virtual_table(layer.array.weight, ROWS, DIM, padding_idx, **oracle)
    counterpart = nn.Embedding(ROWS, DIM, padding_idx, _weight=table)
    assert_trains_as_its_counterpart(layer, counterpart, oracle, (INPUTS[ids],), exact=True)


@st.composite
def layers(draw):
    """Arguments of a layer, and the oracle's for the same."""
    rows, embedding_dim = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    block_size = draw(st.integers(1, 2 * embedding_dim + 3))
    size = draw(st.integers(block_size, block_size + 60))
    hash = draw(st.sampled_from(["mix", "linear"]))
    layout = {"block_size": block_size, "sign": draw(st.booleans()), "seed": draw(st.integers(-9, 9))}
    layout |= {"table_id": draw(st.integers(0, 9))} if hash == "mix" else {"first_row": draw(st.integers(0, 10**6))}
    padding_idx = draw(st.one_of(st.none(), st.integers(-rows, rows - 1)))
    options = {"robe_size": size, "hash": hash, "padding_idx": padding_idx, **layout}
    whole = hash == "mix" and size >= rows * embedding_dim
    oracle = {"size": size, "hash": "identity" if whole else hash, **layout} | ({"sign": False} if whole else {})
    return (rows, embedding_dim), options, oracle


@given(layers(), st.data())
def test_embedding_equals_nn_embedding_whatever_its_options(case, data):
    arguments, options, oracle = case
    layer = with_values(RobeEmbedding(*arguments, **options))
    table = virtual_table(layer.array.weight, *arguments, options["padding_idx"], **oracle)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, arguments[0] - 1), max_size=9)), dtype=torch.long)
    if data.draw(st.booleans()):
        ids = ids.int()
    counterpart = nn.Embedding(*arguments, options["padding_idx"], _weight=table)
    assert_trains_as_its_counterpart(layer, counterpart, oracle, (ids,), exact=True)


@every_layout
@pytest.mark.parametrize("form", ["1-D", "2-D", "no ids", "no bags"])
@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)])
@pytest.mark.parametrize("padding_idx", [None, -1])
def test_bag_equals_nn_embedding_bag(layout, form, include_last_offset, mode, weighted, padding_idx):
    options, oracle = LAYOUTS[layout]
    bag = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": include_last_offset}
    layer = with_values(RobeEmbeddingBag(ROWS, DIM, **bag, **options))
    table = virtual_table(layer.array.weight, ROWS, DIM, padding_idx, **oracle)
    counterpart = nn.EmbeddingBag(ROWS, DIM, **bag, _weight=table)
    inputs = bag_inputs(form, weighted=weighted, include_last_offset=include_last_offset)
    assert_trains_as_its_counterpart(layer, counterpart, oracle, inputs)


@given(layers(), st.data())
def test_bag_equals_nn_embedding_bag_whatever_its_options(case, data):
    arguments, options, oracle = case
    ids = st.integers(0, arguments[0] - 1)
    if data.draw(st.booleans()):
        rectangle = st.tuples(st.integers(0, 4), st.integers(1, 4))
        batch_size, length = data.draw(rectangle)
        input = torch.tensor(data.draw(st.lists(ids, min_size=batch_size * length, max_size=batch_size * length)))
        input, offsets = input.long().view(batch_size, length), None
    else:
        bags = data.draw(st.lists(st.lists(ids, max_size=4), max_size=5))
        input = torch.tensor([x for bag in bags for x in bag], dtype=torch.long)
        offsets = torch.tensor([0, *np.cumsum([len(bag) for bag in bags])], dtype=torch.long)
    include_last_offset = data.draw(st.booleans())
    if offsets is not None and not include_last_offset:
        offsets = offsets[:-1]
        if len(offsets) == 0:
            input = input[:0]
    mode = data.draw(st.sampled_from(MODES))
    weights, torch_weights = None, None
    if mode == "sum" and data.draw(st.booleans()):
        values = torch.randn(input.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        weights, torch_weights = values.clone().requires_grad_(), values.clone().requires_grad_()
    own = (input.int(), offsets, weights) if data.draw(st.booleans()) else (input, offsets, weights)

    bag = {"mode": mode, "include_last_offset": include_last_offset}
    layer = with_values(RobeEmbeddingBag(*arguments, **bag, **options))
    table = virtual_table(layer.array.weight, *arguments, options["padding_idx"], **oracle)
    counterpart = nn.EmbeddingBag(*arguments, **bag, padding_idx=options["padding_idx"], _weight=table)
    assert_trains_as_its_counterpart(layer, counterpart, oracle, own, torch_inputs=(input, offsets, torch_weights))
    if weights is not None:
        torch.testing.assert_close(weights.grad, torch_weights.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_include_last_offset_ends_the_last_bag_before_the_last_value(mode):
    """torch disagrees with itself here (its modes "mean" and "max" read on), so the counterpart gets the values cut."""
    options, oracle = LAYOUTS["compression 10"]
    layer = with_values(RobeEmbeddingBag(ROWS, DIM, mode=mode, include_last_offset=True, **options))
    table = virtual_table(layer.array.weight, ROWS, DIM, **oracle)
    counterpart = nn.EmbeddingBag(ROWS, DIM, mode=mode, include_last_offset=True, _weight=table)
    ids, offsets = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 2, 3])
    assert_trains_as_its_counterpart(layer, counterpart, oracle, (ids, offsets), torch_inputs=(ids[:3], offsets))


@pytest.mark.parametrize("mode", MODES)
def test_bags_without_a_single_column_are_empty(mode):
    """(B, 0) input, which nn.EmbeddingBag does not take."""
    layer = RobeEmbeddingBag(ROWS, DIM, mode=mode, compression=10)
    output = layer(torch.empty(3, 0, dtype=torch.long))
    assert torch.equal(output, torch.zeros(3, DIM))
    output.sum().backward()
    assert not layer.array.weight.grad.any()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_bag_takes_int32_and_int64_in_any_pairing(ids_dtype, offsets_dtype):
    options, oracle = LAYOUTS["small blocks"]
    layer = with_values(RobeEmbeddingBag(ROWS, DIM, **options))
    table = virtual_table(layer.array.weight, ROWS, DIM, **oracle)
    ids, offsets, _ = bag_inputs("1-D")
    counterpart = nn.EmbeddingBag(ROWS, DIM, _weight=table)
    own = ids.to(ids_dtype), offsets.to(offsets_dtype)
    assert_trains_as_its_counterpart(layer, counterpart, oracle, own, torch_inputs=(ids, offsets))


def test_bag_takes_inputs_that_are_not_contiguous():
    options, oracle = LAYOUTS["small blocks"]
    layer = with_values(RobeEmbeddingBag(ROWS, DIM, mode="sum", **options))
    table = virtual_table(layer.array.weight, ROWS, DIM, **oracle)
    ids = id_tensor((7, 4)).T
    weights = torch.randn(7, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64).T
    counterpart = nn.EmbeddingBag(ROWS, DIM, mode="sum", _weight=table)
    assert_trains_as_its_counterpart(layer, counterpart, oracle, (ids, None, weights))


def test_bags_pool_by_mean_unless_told_otherwise_as_in_torch():
    layer = RobeEmbeddingBag(ROWS, DIM, compression=10)
    assert layer.mode == nn.EmbeddingBag(ROWS, DIM).mode == "mean"
    ids = torch.tensor([[1, 2]])
    torch.testing.assert_close(layer(ids)[0], layer.full_weight()[1:3].mean(0))


# ---------------------------------------------------------------------------------------------------------------------
# Without compression


@pytest.mark.parametrize("options", [{"compression": 1}, {"compression": 0.5}, {"robe_size": 240}])
def test_without_compression_the_array_is_the_table(options):
    layer = RobeEmbedding(ROWS, DIM, **options)
    assert torch.equal(layer.full_weight(), layer.array.weight.view(ROWS, DIM))


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("kind", ["embedding", "sum", "mean", "max"])
def test_without_compression_training_is_that_of_torch_step_for_step(kind, padding_idx):
    torch.manual_seed(0)
    if kind == "embedding":
        layer = RobeEmbedding(ROWS, DIM, padding_idx, compression=1)
        counterpart = nn.Embedding(ROWS, DIM, padding_idx)
    else:
        layer = RobeEmbeddingBag(ROWS, DIM, mode=kind, padding_idx=padding_idx, compression=1)
        counterpart = nn.EmbeddingBag(ROWS, DIM, mode=kind, padding_idx=padding_idx)
    with torch.no_grad():
        layer.array.weight.copy_(counterpart.weight.flatten())
    target = torch.randn(16, 3 * DIM if kind == "embedding" else DIM)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (layer, counterpart)]
    start = layer.array.weight.detach().clone()
    for step in range(5):
        ids = id_tensor((16, 3), seed=step)
        losses = []
        for model, optimizer in zip((layer, counterpart), optimizers):
            optimizer.zero_grad()
            loss = (model(ids).view(16, -1) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        torch.testing.assert_close(layer.array.weight.view(ROWS, DIM), counterpart.weight, rtol=1e-7, atol=1e-7)
    assert (layer.array.weight - start).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Several tables on one array


def test_layers_that_share_an_array_have_one_parameter():
    array = RobeArray(100)
    model = nn.ModuleList(
        [RobeEmbedding(ROWS, DIM, array=array, table_id=0), RobeEmbeddingBag(10, 3, array=array, table_id=1)]
    )
    assert list(model.parameters()) == [array.weight]


@pytest.mark.parametrize("kinds", [(RobeEmbedding, RobeEmbedding), (RobeEmbedding, RobeEmbeddingBag)])
def test_the_table_id_tells_the_tables_of_an_array_apart(kinds):
    array = RobeArray(10_000)
    first, same, other = (kind(ROWS, DIM, array=array, table_id=t) for kind, t in zip((*kinds, kinds[1]), (0, 0, 1)))
    assert torch.equal(first.full_weight(), same.full_weight())
    assert (first.full_weight() == other.full_weight()).all(1).sum() == 0
    want = virtual_table(array.weight, ROWS, DIM, hash="mix", size=10_000, block_size=DIM, table_id=1)
    assert torch.equal(other.full_weight(), want)


def test_the_seed_tells_arrays_apart():
    tables = [RobeEmbedding(ROWS, DIM, robe_size=200, seed=seed) for seed in (0, 0, 1)]
    with torch.no_grad():
        for table in tables:
            table.array.weight.copy_(torch.arange(200))
    assert torch.equal(tables[0].full_weight(), tables[1].full_weight())
    assert not torch.equal(tables[0].full_weight(), tables[2].full_weight())


def test_gradients_of_layers_that_share_an_array_add_up():
    array = RobeArray(60, dtype=torch.float64)
    one = RobeEmbedding(ROWS, DIM, array=array, table_id=0)
    two = RobeEmbeddingBag(12, 5, mode="sum", array=array, table_id=1, block_size=3, sign=True)
    (one(torch.tensor([1, 1, 7])).sum() + 10 * two(torch.tensor([[2, 3]])).sum()).backward()
    table_one, table_two = np.zeros((ROWS, DIM)), np.zeros((12, 5))
    table_one[[1, 7]] = [[2], [1]]
    table_two[[2, 3]] = 10
    want = table_grad_to_array(table_one, 60, hash="mix", block_size=DIM)
    want += table_grad_to_array(table_two, 60, hash="mix", block_size=3, table_id=1, sign=True)
    np.testing.assert_allclose(array.weight.grad.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("hash", ["linear", "identity"])
def test_first_row_lays_tables_one_behind_the_other(hash):
    array = RobeArray(100, dtype=torch.float64)
    whole = RobeEmbedding(20, 5, array=array, hash=hash)
    parts = [RobeEmbedding(8, 5, array=array, hash=hash), RobeEmbedding(12, 5, array=array, hash=hash, first_row=8)]
    assert torch.equal(torch.cat([part.full_weight() for part in parts]), whole.full_weight())


# ---------------------------------------------------------------------------------------------------------------------
# Ids

FAR_IDS = [0, 1, -1, -7, 2**31, -(2**31) - 1, 2**40, INT64_MAX, INT64_MIN]


@pytest.mark.parametrize(("block_size", "hash"), [(2, "mix"), (4, "mix"), (11, "mix"), (2, "linear"), (11, "linear")])
def test_a_table_without_num_embeddings_takes_any_id(block_size, hash):
    options = {"block_size": block_size, "hash": hash, "sign": True}
    layer = with_values(RobeEmbedding(None, 4, robe_size=50, **options))
    bag = RobeEmbeddingBag(None, 4, mode="sum", array=layer.array, **options)
    slots, signs = places(FAR_IDS, embedding_dim=4, size=50, **options)
    want = layer.array.weight.detach()[torch.from_numpy(slots)] * torch.from_numpy(signs)
    assert torch.equal(layer(torch.tensor(FAR_IDS)), want)
    torch.testing.assert_close(bag(torch.tensor([FAR_IDS]))[0], want.sum(0), rtol=1e-12, atol=1e-12)


def test_padding_without_num_embeddings_is_the_id_as_it_stands():
    """There is no last row to count from, so -1 is the id -1."""
    layer = RobeEmbedding(None, 4, padding_idx=-1, robe_size=50)
    assert layer.padding_idx == -1
    rows = layer(torch.tensor([-1, 1, -2]))
    assert not rows[0].any()
    assert rows[1:].all()
    bag = RobeEmbeddingBag(None, 4, mode="mean", padding_idx=-1, array=layer.array)
    assert torch.equal(bag(torch.tensor([[-1, 1, -1], [-1, -1, -1]])), torch.stack([rows[1], torch.zeros(4)]))


@pytest.mark.cpu_only("a GPU trips an assertion instead")
@pytest.mark.parametrize("options", [{"compression": 10}, {"compression": 1}, {"robe_size": 50, "hash": "linear"}])
@pytest.mark.parametrize("bad", [ROWS, -1, INT64_MAX, INT64_MIN])
def test_an_id_outside_the_table_is_an_index_error(options, bad):
    message = f"id {bad} of feature 0, whose table has 40 rows"
    with pytest.raises(IndexError, match=message):
        RobeEmbedding(ROWS, DIM, **options)(torch.tensor([[0, bad]]))
    with pytest.raises(IndexError, match=message):
        RobeEmbeddingBag(ROWS, DIM, **options)(torch.tensor([[0, bad]]))


@pytest.mark.cpu_only("a GPU trips an assertion instead")
@every_pooling
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("bad", [ROWS, -1])
def test_an_id_outside_the_table_is_found_in_every_mode_and_beside_padding(mode, weighted, padding_idx, bad):
    layer = RobeEmbeddingBag(ROWS, DIM, mode=mode, padding_idx=padding_idx, compression=10)
    weights = torch.ones(2, 2) if weighted else None
    with pytest.raises(IndexError, match=f"id {bad} of feature 0, whose table has 40 rows"):
        layer(torch.tensor([[0, 1], [0, bad]], dtype=torch.int32), None, weights)


# ---------------------------------------------------------------------------------------------------------------------
# What they show, and what they refuse


def test_repr_shows_the_options():
    options = {"block_size": 4, "table_id": 3, "sign": True}
    layer = RobeEmbedding(ROWS, DIM, -1, compression=10, **options)
    assert layer.extra_repr() == "40, 6, block_size=4, hash='mix', table_id=3, sign=True, padding_idx=39"
    bag = RobeEmbeddingBag(None, DIM, mode="sum", robe_size=50, hash="linear", first_row=7)
    assert bag.extra_repr() == "None, 6, block_size=6, hash='linear', first_row=7, mode='sum'"
    assert "hash='identity'" in repr(RobeEmbedding(ROWS, DIM, compression=1))
    assert "(array): RobeArray(24, seed=0, init_std=0.01)" in repr(layer)


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "max_norm: rows share weights"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq: not supported"),
        ({"sparse": True}, "sparse: the gradient of the array is dense"),
        ({"_weight": torch.ones(ROWS, DIM)}, r"_weight: the table is virtual; from_pretrained\(\) sets"),
        ({"padding_idx": ROWS}, "padding_idx: expected to lie within 40 rows, got 40"),
        ({"padding_idx": -ROWS - 1}, "padding_idx: expected to lie within 40 rows, got -41"),
    ],
)
def test_both_layers_refuse(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(ROWS, DIM, compression=10, **options)


def test_tables_do_not_begin_before_the_array():
    with pytest.raises(ValueError, match="first_row: expected at least 0 with hash='identity', got -1"):
        RobeEmbedding(ROWS, DIM, array=RobeArray(300), hash="identity", first_row=-1)


def test_an_array_with_room_for_the_table_starts_with_it_whatever_first_row_says():
    layer = RobeEmbedding(ROWS, DIM, compression=1, first_row=5)
    assert layer.hash == "identity"
    assert torch.equal(layer.full_weight().flatten(), layer.array.weight)


def test_norm_type_is_accepted_as_torch_accepts_it_without_max_norm():
    layer = RobeEmbedding(ROWS, DIM, compression=10, norm_type=1.0)
    assert layer(torch.arange(3)).shape == (3, DIM)


@pytest.mark.parametrize(
    "layer",
    [RobeEmbedding(ROWS, DIM, compression=10)] + [RobeEmbeddingBag(ROWS, DIM, mode=m, compression=10) for m in MODES],
    ids=["embedding", *MODES],
)
def test_second_derivatives_are_refused(layer):
    loss = layer(torch.tensor([[1, 2], [3, 4]])).square().sum()
    (grad,) = torch.autograd.grad(loss, layer.array.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.square().sum().backward()


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_full_weight_of_an_unbounded_table_is_refused(kind):
    with pytest.raises(ValueError, match="full_weight: a table without num_embeddings has no end"):
        kind(None, DIM, robe_size=50).full_weight()


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.int8, torch.int16])
def test_both_layers_refuse_ids_of_other_types(kind, dtype):
    with pytest.raises(ValueError, match=f"(ids|values): expected int32 or int64, got {dtype}"):
        kind(ROWS, DIM, compression=10)(torch.ones(2, 3, dtype=dtype))


def test_bag_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="mode: expected one of sum, mean, max, got 'median'"):
        RobeEmbeddingBag(ROWS, DIM, mode="median", compression=10)


@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({}, (torch.tensor(1),), r"input: expected 1-D with offsets, or 2-D, got shape \(\)"),
        ({}, (torch.zeros(1, 1, 1).long(),), r"input: expected 1-D with offsets, or 2-D, got shape \(1, 1, 1\)"),
        ({}, (torch.tensor([1, 2]),), "offsets: expected a 1-D tensor with 1-D input"),
        ({}, (torch.tensor([1, 2]), torch.tensor(0)), "offsets: expected a 1-D tensor with 1-D input"),
        ({}, (torch.tensor([[1, 2]]), torch.tensor([0])), "offsets: expected None with 2-D input"),
        asserted_on_gpus(
            {}, (torch.tensor([1, 2]), torch.tensor([1])), "offsets: expected to rise from 0 to at most 2"
        ),
        asserted_on_gpus({}, (torch.tensor([1, 2]), torch.tensor([0, 2, 1])), "offsets: .* and a fall between"),
        asserted_on_gpus(
            {}, (torch.tensor([1, 2]), torch.tensor([-1, 1])), "offsets: expected to rise from 0 to at most 2"
        ),
        asserted_on_gpus(
            {}, (torch.tensor([1, 2]), torch.tensor([0, 3])), "offsets: expected to rise from 0 to at most 2"
        ),
        ({}, (torch.tensor([1, 2]), torch.tensor([0.0])), r"offsets: expected int32 or int64, got torch\.float32"),
        asserted_on_gpus(
            {"include_last_offset": True}, (torch.tensor([1]), torch.tensor([0, 2])), "rise from 0 to at most 1"
        ),
        ({"include_last_offset": True}, (torch.tensor([1]), torch.tensor([]).long()), r"expected \(F \* B \+ 1,\)"),
        ({}, (torch.ones(1, 2),), r"values: expected int32 or int64, got torch\.float32"),
        ({}, (torch.tensor([[1, 2]]), None, torch.ones(1, 2)), "supported with pooling 'sum' only, got pooling 'mean'"),
        (
            {"mode": "max"},
            (torch.tensor([[1, 2]]), None, torch.ones(1, 2)),
            "with pooling 'sum' only, got pooling 'max'",
        ),
        ({"mode": "sum"}, (torch.tensor([[1, 2]]), None, torch.ones(2)), r"expected the shape of input \(1, 2\)"),
        (
            {"mode": "sum"},
            (torch.tensor([1, 2]), torch.tensor([0]), torch.ones(1)),
            r"per_sample_weights: expected the shape of input \(2,\), got \(1,\)",
        ),
        ({"mode": "sum"}, (torch.tensor([[1, 2]]), None, torch.ones(1, 2).double()), r"got torch\.float64 \(2,\)"),
    ],
)
def test_bag_refuses_inputs_that_do_not_fit(options, inputs, message):
    with pytest.raises(ValueError, match=message):
        RobeEmbeddingBag(ROWS, DIM, compression=10, **options)(*inputs)


# ---------------------------------------------------------------------------------------------------------------------
# A padding row with a value


def pretrained(padding_idx, freeze=False, **options):
    """nn.Embedding with a trained padding row, and the layer that equals it."""
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    options = {"padding_idx": padding_idx, "freeze": freeze} | options
    layer = RobeEmbedding.from_pretrained(table, compression=1, **options)
    return torch.nn.Embedding.from_pretrained(table, freeze=freeze, padding_idx=padding_idx), layer


@pytest.mark.parametrize("padding_idx", [0, -1, 7])
def test_a_padding_row_is_read_and_not_trained_as_in_torch(padding_idx):
    theirs, ours = pretrained(padding_idx)
    ids = torch.arange(50).view(5, 10)
    assert torch.equal(ours.full_weight(), theirs.weight)
    for layer, weight in ((theirs, theirs.weight), (ours, ours.array.weight)):
        optimizer = torch.optim.SGD([weight], lr=0.5)
        layer(ids).square().sum().backward()
        optimizer.step()
    assert torch.equal(ours(ids), theirs(ids))
    ours.full_weight().sum().backward()
    assert not ours.array.weight.grad.view(50, 8)[padding_idx].any()


def test_a_padding_row_goes_where_the_layer_goes(tmp_path):
    theirs, ours = pretrained(3)
    ids = torch.arange(50)
    robe.save(ours, tmp_path / "layer")
    again = RobeEmbedding(array=ours.array, **json.loads(json.dumps(ours.arguments())))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), robe.load(tmp_path / "layer"), again):
        assert torch.equal(copied(ids), theirs(ids))
    assert torch.equal(copy.deepcopy(ours).bfloat16()(ids), theirs(ids).bfloat16())
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), theirs(ids))
    int8 = copy.deepcopy(ours)
    int8.array = ours.array.quantized()
    assert torch.equal(int8(ids)[3], theirs(ids)[3])


@pytest.mark.parametrize("assign", [False, True])
def test_a_padding_row_is_what_the_state_dict_has(assign):
    """Without an entry, as in those of 0.8.0, padding reads zeros."""
    theirs, ours = pretrained(3)
    plain = RobeEmbedding(50, 8, 3, compression=1)
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    assert list(before) == ["array.weight"]
    plain.load_state_dict(ours.state_dict(), assign=assign)
    assert torch.equal(plain(torch.arange(50)), theirs(torch.arange(50)))
    plain.load_state_dict(before, assign=assign)
    assert not plain(torch.tensor(3)).any()
    assert list(plain.state_dict()) == ["array.weight"]
    ours.load_state_dict({}, strict=False)  # of another part of a model
    assert torch.equal(ours(torch.tensor(3)), theirs(torch.tensor(3)))


def test_a_padding_row_of_zeros_is_none():
    assert RobeEmbedding(9, 4, 0, robe_size=9, padding_row=[0.0] * 4).padding_row is None
    assert "padding_row" not in RobeEmbedding(9, 4, 0, robe_size=9).arguments()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_idx": 0, "padding_row": [1.0]}, r"padding_row: expected 4 values .* got shape \(1,\)"),
        ({"padding_row": [1.0] * 4}, "padding_row: expected 4 values beside a padding_idx"),
        ({"padding_idx": 0, "padding_row": [math.nan] * 4}, "padding_row: expected finite values"),
    ],
)
def test_padding_rows_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RobeEmbedding(9, 4, robe_size=9, **options)
    with pytest.raises(TypeError, match="RobeEmbeddingBag: got an unexpected keyword argument 'padding_row'"):
        RobeEmbeddingBag(9, 4, robe_size=9, padding_row=[1.0] * 4)


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_a_table_that_is_not_finite_is_refused(kind):
    table = torch.zeros(20, 4)
    table[7, 2] = math.inf
    with pytest.raises(ValueError, match="embeddings: expected finite values, got inf in row 7, component 2"):
        kind.from_pretrained(table, compression=2)
