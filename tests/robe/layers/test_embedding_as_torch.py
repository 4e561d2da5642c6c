"""RobeEmbedding and RobeEmbeddingBag as torch's own suite has nn.Embedding and nn.EmbeddingBag."""

import inspect
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robe import RobeArray, RobeEmbedding, RobeEmbeddingBag
from tests.helpers.oracle import places
from tests.helpers.tables import DIM, MODES, ROWS, every_pooling, id_tensor, with_values


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
    with pytest.raises(ValueError, match=r"embeddings: expected \(num_embeddings, embedding_dim\), got shape \(40,\)"):
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
