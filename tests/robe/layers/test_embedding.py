"""RobeEmbedding and RobeEmbeddingBag against nn.Embedding and nn.EmbeddingBag on the virtual table.

The table and the way of a gradient from the table to the array come from the oracle in conftest, not from the layers.
"""

import inspect
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robe import RobeArray, RobeEmbedding, RobeEmbeddingBag
from tests.helpers.marks import asserted_on_gpus
from tests.helpers.oracle import places, table_grad_to_array

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
ROWS, DIM = 40, 6
MODES = ("sum", "mean", "max")

# Options of a layer of ROWS x DIM weights, and where the oracle then looks for them.
LAYOUTS = {
    "compression 10": ({"compression": 10}, {"hash": "mix", "size": 24, "block_size": 6}),
    "no compression": ({"compression": 1}, {"hash": "identity", "size": 240, "block_size": 6}),
    "small blocks": (
        {"robe_size": 30, "block_size": 4, "sign": True, "seed": 5, "table_id": 3},
        {"hash": "mix", "size": 30, "block_size": 4, "sign": True, "seed": 5, "table_id": 3},
    ),
    "wide blocks": (
        {"compression": 7.5, "block_size": 13, "sign": True},
        {"hash": "mix", "size": 32, "block_size": 13, "sign": True},
    ),
    "block of one": ({"compression": 3, "block_size": 1}, {"hash": "mix", "size": 80, "block_size": 1}),
    "linear": (
        {"robe_size": 50, "block_size": 4, "sign": True, "hash": "linear", "first_row": 1000},
        {"hash": "linear", "size": 50, "block_size": 4, "sign": True, "first_row": 1000},
    ),
    "identity behind another table": (
        {"array": RobeArray(300, dtype=torch.float64), "hash": "identity", "first_row": 10},
        {"hash": "identity", "size": 300, "block_size": 6, "first_row": 10},
    ),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def with_values(layer):
    """The layer in float64 with values all different, so that only equal slots tie for a maximum."""
    layer.double()
    weight = layer.array.weight
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(len(weight)))
    return layer


def virtual_table(weight, rows, embedding_dim, padding_idx=None, **layout):
    """The virtual table (rows, embedding_dim), by the oracle."""
    slots, signs = places(range(rows), embedding_dim=embedding_dim, **layout)
    table = weight.detach()[torch.from_numpy(slots)] * torch.from_numpy(signs)
    if padding_idx is not None:
        table[padding_idx] = 0
    return table


def assert_trains_as_its_counterpart(layer, counterpart, layout, inputs, *, exact=False, torch_inputs=None):
    """Same output, and the gradient of the array is that of the counterpart's table, at the oracle's slots."""
    output, want = layer(*inputs), counterpart(*(inputs if torch_inputs is None else torch_inputs))
    assert output.shape == want.shape
    assert output.dtype == want.dtype
    torch.testing.assert_close(output, want, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-12)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    layer.zero_grad()
    output.backward(upstream)
    want.backward(upstream)
    grad = table_grad_to_array(counterpart.weight.grad, **layout)
    np.testing.assert_allclose(layer.array.weight.grad.numpy(), grad, rtol=1e-11, atol=1e-12)


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


def id_tensor(shape, *, rows=ROWS, seed=0):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


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


def bag_inputs(form, *, weighted=False, include_last_offset=False):
    """input, offsets, per_sample_weights in one of the forms that nn.EmbeddingBag takes."""
    if form == "2-D":
        ids, offsets = id_tensor((4, 7)), None
    else:
        ids = id_tensor((20,)) if form == "1-D" else id_tensor((0,))
        starts = [0, 0, 3, 3, 4, 11, 20, 20] if form == "1-D" else [0, 0, 0]
        if form == "no bags":
            starts = []
        offsets = torch.tensor(starts + [len(ids)] * include_last_offset, dtype=torch.long)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return ids, offsets, weights if weighted else None


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
# What torch's own suite asks of its layers, on the virtual table

POOLING = [("sum", False), ("sum", True), ("mean", False), ("max", False)]
every_pooling = pytest.mark.parametrize(("mode", "weighted"), POOLING)


def random_weights(shape, dtype=torch.float64):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return weights.to(dtype).requires_grad_()


def assert_equals_torch(layer, output, want, weights=None, **tolerance):
    """The output and what it sends back to the array and to the weights, those of them that take a gradient."""
    torch.testing.assert_close(output, want, **tolerance)  # shape and dtype too
    leaves = [x for x in (layer.array.weight, weights) if x is not None and x.requires_grad]
    assert output.requires_grad == bool(leaves)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(want.dtype)
    for x in leaves:
        own, of_torch = (torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for y in (output, want))
        torch.testing.assert_close(own, of_torch, **tolerance)


def assert_pools_as_torch(layer, input, offsets=None, weights=None, **tolerance):
    bags = {"mode": layer.mode, "padding_idx": layer.padding_idx, "include_last_offset": layer.include_last_offset}
    want = F.embedding_bag(input, layer.full_weight(), offsets, per_sample_weights=weights, **bags)
    assert_equals_torch(layer, layer(input, offsets, weights), want, weights, **tolerance)


@every_pooling
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ids_dtype", "offsets_dtype"), [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_bag_equals_functional_in_every_dtype(mode, weighted, dtype, ids_dtype, offsets_dtype):
    layer = with_values(RobeEmbeddingBag(9, DIM, mode=mode, robe_size=20, sign=True)).to(dtype)
    eps = torch.finfo(dtype).eps  # torch rounds the gradient of the table, then that of the array: a few roundings
    for ids, offsets in ([8, 0, 0, 5, 5, 5, 2], [0, 0, 1, 4, 4, 7]), ([], [0]), ([], [0, 0, 0]):
        ids, offsets = torch.tensor(ids, dtype=ids_dtype), torch.tensor(offsets, dtype=offsets_dtype)
        weights = random_weights(ids.shape, dtype) if weighted else None
        assert_pools_as_torch(layer, ids, offsets, weights, rtol=4 * eps, atol=8 * eps)


@every_pooling
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (1, 2, 2, 1), (2, 3, 6, 5), (3, 4, 60, 20), (150, 5, 4, 6), (2, 130, 4, 6)]
)
def test_bag_is_the_rows_reduced(mode, weighted, sizes):
    """The array has one weight more than a row, so that nearly all components share theirs."""
    rows, embedding_dim, batch_size, length = sizes
    layer = with_values(RobeEmbeddingBag(rows, embedding_dim, mode=mode, robe_size=embedding_dim + 1, sign=True))
    ids = id_tensor((batch_size, length), rows=rows)
    weights = random_weights(ids.shape) if weighted else None
    each = F.embedding(ids, layer.full_weight())
    if weighted:
        each = each * weights.unsqueeze(-1)
    want = {"sum": each.sum(1), "mean": each.mean(1), "max": each.max(1).values}[mode]
    tolerance = {"rtol": 1e-11, "atol": 1e-11}
    assert_equals_torch(layer, layer(ids, None, weights), want, weights, **tolerance)
    offsets = torch.arange(batch_size) * length
    weights = None if weights is None else weights.detach().flatten().requires_grad_()
    assert_pools_as_torch(layer, ids.flatten(), offsets, weights, **tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("include_last_offset", [False, True])
@pytest.mark.parametrize("padding_idx", [0, -1])
def test_uneven_bags_equal_rectangular_ones_filled_up_with_padding(mode, include_last_offset, padding_idx):
    layer = RobeEmbeddingBag(
        8, DIM, mode=mode, include_last_offset=include_last_offset, padding_idx=padding_idx, robe_size=20
    )
    with_values(layer)
    pad = padding_idx % 8
    bags = [[3], [pad, pad], [], [5, pad, 6, 6], [1, 2]]
    starts = np.cumsum([0, *map(len, bags)])[: len(bags) + include_last_offset]
    ids, offsets = torch.tensor([x for bag in bags for x in bag]), torch.from_numpy(starts)
    assert_pools_as_torch(layer, ids, offsets, rtol=1e-12, atol=1e-12)
    filled = torch.tensor([bag + [pad] * (4 - len(bag)) for bag in bags])
    assert_pools_as_torch(layer, filled, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer(filled), layer(ids, offsets))


@pytest.mark.parametrize("others", [[], [2], [1, 3]])
@pytest.mark.parametrize("times", [1, 2000])
def test_padding_takes_no_gradient_however_often_it_is_read(others, times):
    layer = with_values(RobeEmbedding(5, 2, padding_idx=0, robe_size=7))
    ids = torch.tensor(others + [0] * times)
    want = F.embedding(ids, layer.full_weight(), padding_idx=0)
    assert_equals_torch(layer, layer(ids), want, rtol=1e-12, atol=1e-12)
    layer(ids).sum().backward()
    assert layer.array.weight.grad.sum() == 2 * len(others)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("weights_trained", [False, True])
def test_layer_and_weights_take_a_gradient_each_where_it_asks_for_one(trained, weights_trained):
    layer = with_values(RobeEmbeddingBag(ROWS, DIM, mode="sum", compression=10)).requires_grad_(trained)
    logits = random_weights((3, 4)).detach().requires_grad_(weights_trained)
    ids = id_tensor((1, 4)).expand(3, 4)
    assert_pools_as_torch(layer, ids, weights=logits.softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_bag_takes_input_and_offsets_that_are_strided_or_expanded(mode):
    layer = with_values(RobeEmbeddingBag(ROWS, DIM, mode=mode, compression=10))
    assert_pools_as_torch(layer, id_tensor((1, 300)).expand(7, 300), rtol=1e-11, atol=1e-11)
    assert_pools_as_torch(layer, id_tensor((12,))[::2], torch.tensor([0, 9, 2, 9, 6])[::2], rtol=1e-12, atol=1e-12)


def test_gradients_add_up_over_calls_and_over_a_graph_that_is_kept():
    layer = with_values(RobeEmbedding(ROWS, DIM, compression=10))
    counts = torch.zeros(ROWS, 1, dtype=torch.float64)
    for ids in torch.tensor([[7, 1, 3], [7, 7, 2]]):
        rows = layer(ids)
        rows.sum().backward(retain_graph=True)
        rows.sum().backward()
        counts += 2 * torch.bincount(ids, minlength=ROWS).unsqueeze(1)
    (want,) = torch.autograd.grad(layer.full_weight(), layer.array.weight, counts.expand(ROWS, DIM))
    assert torch.equal(layer.array.weight.grad, want)


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_ids_that_change_before_backward_are_found_out(kind):
    """The backward pass hashes the ids again: other ones would send the gradient to other rows."""
    ids = torch.tensor([[1, 2]])
    output = kind(ROWS, DIM, compression=10)(ids)
    ids[0, 0] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
@pytest.mark.parametrize(
    "context",
    [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["eval", "no_grad", "inference_mode", "autocast"],
)
def test_what_is_read_while_training_is_read_otherwise_too(kind, context):
    layer, ids = kind(ROWS, DIM, compression=10), torch.tensor([[1, 2], [39, 3]])
    rows = layer.train()(ids)
    layer.eval()
    with context():
        assert torch.equal(layer(ids), rows)
        assert layer(ids).dtype == torch.float32


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_functional_call_reads_the_weights_it_is_given(kind):
    layer, other = (with_values(kind(ROWS, DIM, compression=10, seed=3)) for _ in range(2))
    with torch.no_grad():
        other.array.weight.mul_(3)
    ids = torch.tensor([[1, 2], [39, 3]])
    weights = {"array.weight": other.array.weight}
    output = torch.func.functional_call(layer, weights, (ids,))
    assert torch.equal(output, other(ids))
    output.sum().backward()
    assert layer.array.weight.grad is None
    assert other.array.weight.grad.any()


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_vmap_over_ids_reads_as_a_loop_does(kind):
    layer = with_values(kind(ROWS, DIM, compression=10))
    ids = id_tensor((3, 4, 5))
    torch.testing.assert_close(torch.vmap(layer)(ids), torch.stack([layer(x) for x in ids]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["embedding", *MODES])
def test_a_penalty_on_the_gradient_of_the_output_trains(kind):
    """It takes second derivatives of the loss, but only first ones of the layer."""
    ids, grads = torch.tensor([[1, 2, 2], [39, 3, 1]]), []
    if kind == "embedding":
        layer = with_values(RobeEmbedding(ROWS, DIM, compression=10))
        outputs = layer(ids), F.embedding(ids, layer.full_weight())
    else:
        layer = with_values(RobeEmbeddingBag(ROWS, DIM, mode=kind, compression=10))
        outputs = layer(ids), F.embedding_bag(ids, layer.full_weight(), mode=kind)
    for output in outputs:
        (slope,) = torch.autograd.grad(output.pow(3).sum(), output, create_graph=True)
        grads += torch.autograd.grad(slope.square().sum(), layer.array.weight)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_outputs_may_be_changed_in_place(kind):
    """Autograd allows that of views under conditions only."""
    layer = with_values(kind(ROWS, DIM, compression=10))
    ids = torch.tensor([[1, 2], [3, 3]])
    plain, changed = layer(ids), layer(ids)
    changed.mul_(2).add_(1)
    torch.testing.assert_close(changed, plain * 2 + 1, rtol=1e-12, atol=1e-12)
    (want,) = torch.autograd.grad(2 * plain.sum(), layer.array.weight)
    (grad,) = torch.autograd.grad(changed.sum(), layer.array.weight)
    torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_the_weights_may_be_made_by_something_else(kind):
    """A plain attribute, as DataParallel and FullyShardedDataParallel leave it; and a parametrization."""
    layer, ids = kind(ROWS, DIM, compression=10), torch.tensor([[1, 2]])
    rows, weight = layer(ids), layer.array.weight
    del layer.array.weight
    layer.array.weight = 2 * weight
    torch.testing.assert_close(layer(ids), 2 * rows)
    layer(ids).sum().backward()
    assert weight.grad.any()

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = kind(ROWS, DIM, compression=10)
    rows = layer(ids)
    nn.utils.parametrize.register_parametrization(layer.array, "weight", Double())
    torch.testing.assert_close(layer(ids), 2 * rows)


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
@pytest.mark.filterwarnings("ignore:.torch.jit.")
def test_a_trace_reads_other_ids_too(kind):
    layer = kind(ROWS, DIM, compression=10)
    other = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(torch.jit.trace(layer, torch.tensor([[1, 2]]))(other), layer(other))


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(("kind", "counterpart"), [(RobeEmbedding, nn.Embedding), (RobeEmbeddingBag, nn.EmbeddingBag)])
def test_from_pretrained_has_torchs_arguments_and_the_nearest_rows(kind, counterpart, freeze):
    of_torch, of_ours = (inspect.signature(k.from_pretrained).parameters for k in (counterpart, kind))
    assert list(of_ours)[:-1] == list(of_torch)
    assert [of_ours[name].default for name in of_torch] == [p.default for p in of_torch.values()]
    table = torch.randn(ROWS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = kind.from_pretrained(table, freeze, compression=1)
    assert torch.equal(exact.full_weight(), table)
    layer = kind.from_pretrained(table, freeze, padding_idx=-1, compression=4, sign=True)
    assert (layer.padding_idx, layer.array.weight.dtype) == (ROWS - 1, torch.float64)
    assert layer.array.weight.requires_grad is not freeze
    slots, signs = places(range(ROWS - 1), hash="mix", size=60, embedding_dim=DIM, block_size=DIM, sign=True)
    reads = np.zeros((slots.size, 60))
    reads[np.arange(slots.size), slots.flatten()] = signs.flatten()
    want = np.linalg.lstsq(reads, table[:-1].flatten().numpy(), rcond=None)[0]
    used = reads.any(0)
    np.testing.assert_allclose(layer.array.weight.detach().numpy()[used], want[used], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_from_pretrained_refuses(kind):
    table = torch.ones(ROWS, DIM)
    with pytest.raises(ValueError, match="array: all of its weights would be set"):
        kind.from_pretrained(table, array=RobeArray(60))
    with pytest.raises(ValueError, match=r"embeddings: expected a table \(rows, dimension\), got shape \(40,\)"):
        kind.from_pretrained(table[:, 0], compression=10)
    with pytest.raises(ValueError, match="sparse: the gradient of the array is dense"):
        kind.from_pretrained(table, sparse=True, compression=10)


@pytest.mark.parametrize(("kind", "counterpart"), [(RobeEmbedding, nn.Embedding), (RobeEmbeddingBag, nn.EmbeddingBag)])
def test_arguments_have_torchs_order(kind, counterpart):
    names = list(inspect.signature(counterpart).parameters)
    assert list(inspect.signature(kind).parameters)[: len(names)] == names
    assert RobeEmbeddingBag(ROWS, DIM, None, 2.0, False, "sum", compression=10).mode == "sum"
    assert RobeEmbedding(ROWS, DIM, 3, None, 2.0, False, False, compression=10).padding_idx == 3


@pytest.mark.parametrize(("kind", "counterpart"), [(RobeEmbedding, nn.Embedding), (RobeEmbeddingBag, nn.EmbeddingBag)])
def test_options_that_are_refused_are_there_to_be_asked_for(kind, counterpart):
    layer, torchs = kind(ROWS, DIM, compression=10), counterpart(ROWS, DIM)
    for name in ("max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
        assert getattr(layer, name) == getattr(torchs, name)


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
def test_there_is_no_weight_and_none_can_be_set(kind):
    layer = kind(ROWS, DIM, compression=10)
    assert not hasattr(layer, "weight")
    message = f"{kind.__name__} has no weight: its parameter is array.weight, shared; full_weight"
    with pytest.raises(AttributeError, match=message):
        _ = layer.weight
    with pytest.raises(AttributeError, match=message):
        layer.weight = nn.Parameter(torch.ones(ROWS, DIM))
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = layer.other


@pytest.mark.parametrize("kind", [RobeEmbedding, RobeEmbeddingBag])
@pytest.mark.filterwarnings("ignore:.torch.jit.")  # torch.func scripts
def test_derivatives_in_forward_mode_are_refused_not_wrong(kind):
    layer = kind(ROWS, DIM, compression=10)
    weight, ids = layer.array.weight.detach(), torch.tensor([[1, 2]])

    def rows(weight):
        return torch.func.functional_call(layer, {"array.weight": weight}, (ids,))

    with pytest.raises(RuntimeError, match="derivatives in forward mode are not supported"):
        torch.func.jvp(rows, (weight,), (torch.ones_like(weight),))
    bag, ones = RobeEmbeddingBag(ROWS, DIM, mode="sum", compression=10), torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="derivatives in forward mode are not supported"):
        torch.func.jvp(lambda weights: bag(ids, None, weights), (ones,), (ones,))


@pytest.mark.parametrize(("kind", "counterpart"), [(RobeEmbedding, nn.Embedding), (RobeEmbeddingBag, nn.EmbeddingBag)])
def test_arguments_have_torchs_names_and_those_of_forward_its_order(kind, counterpart):
    assert list(inspect.signature(kind.forward).parameters) == list(inspect.signature(counterpart.forward).parameters)
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(counterpart).parameters.items()
        if parameter.default is not parameter.empty and not name.startswith("_")
    }
    assert {"max_norm", "sparse", "dtype"} < set(options)
    kind(num_embeddings=ROWS, embedding_dim=DIM, compression=10, **options)


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
