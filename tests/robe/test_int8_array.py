"""Arrays in int8 against numpy."""

import copy

import numpy as np
import pytest
import torch

import robe
from robe.ops import REFERENCE
from tests.helpers.native import native
from tests.helpers.problems import (
    MODES,
    Problem,
)


def grouped(values, group):
    """(groups, group) float64 in numpy, the end filled with zeros."""
    values = np.asarray(values, dtype=np.float64)
    return np.pad(values, (0, -len(values) % group)).reshape(-1, group)


SIZES = [(1, 64), (63, 64), (64, 64), (65, 64), (129, 64), (100, 1), (101, 2), (257, 256), (300, 4096), (64, 2)]


@pytest.mark.parametrize(("size", "group"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_int8_weights_lie_within_half_a_step(size, group, dtype):
    array = robe.RobeArray(size, dtype=dtype, seed=5, init_std=3.0)
    small = array.quantized(group)
    assert (small.weight.dtype, small.scale.dtype) == (torch.int8, torch.float32)
    assert small.weight.shape == (size,)
    assert small.scale.shape == (-(-size // group),)
    assert (small.size, small.seed) == (size, 5)
    values = grouped(array.weight.detach().double(), group)
    steps = np.abs(values).max(1) / 127
    np.testing.assert_allclose(small.scale.numpy(), steps, rtol=1e-6)
    read = grouped(small.weight.numpy(), group) * small.scale.double().numpy()[:, None]
    assert (np.abs(read - values) <= steps[:, None] * 0.50001).all()
    assert np.abs(small.weight.numpy().astype(int)).max() == 127
    assert not list(small.parameters())


def test_int8_groups_of_zeros_stay_zeros():
    array = robe.RobeArray(10)
    with torch.no_grad():
        array.weight.copy_(torch.tensor([0.0] * 4 + [1, -2, 0, 0] + [0, 0]))
    small = array.quantized(4)
    assert small.weight.tolist() == [0] * 4 + [64, -127, 0, 0] + [0, 0]
    assert small.scale.tolist()[::2] == [0, 0]
    layer = robe.RobeEmbedding(2, 5, array=array, hash="identity")
    layer.array = small
    want = torch.tensor([[0.0] * 5, [-2, 0, 0, 0, 0]])
    want[0, 4] = 64 * 2 / 127
    torch.testing.assert_close(layer(torch.arange(2)), want)


def int8_layers(array):
    """Layers of every kind on an array, each with inputs."""
    ids, offsets = torch.tensor([1, 7, 7, 2, 0, 5, 9]), torch.tensor([0, 2, 2])
    tables = [robe.EmbeddingBagConfig(name, n, 6) for name, n in (("a", 10), ("b", None))]
    collection_offsets = torch.tensor([0, 2, 2, 3, 5, 5, 7])
    yield robe.RobeEmbedding(10, 6, array=array, block_size=6), (ids,)
    yield robe.RobeEmbedding(10, 6, 7, array=array, block_size=4, sign=True), (ids,)
    yield robe.RobeEmbedding(10, 6, array=array, block_size=8, sign=True), (ids,)
    yield robe.RobeEmbedding(10, 6, array=array, block_size=8, hash="linear", sign=True), (ids.int(),)
    for mode in MODES:
        yield robe.RobeEmbeddingBag(10, 6, mode=mode, array=array, block_size=3), (ids, offsets)
        yield robe.RobeEmbeddingBag(10, 6, mode=mode, array=array, sign=True, padding_idx=7), (ids, offsets)
    weights = torch.linspace(-1, 1, 7)
    yield robe.RobeEmbeddingBag(10, 6, mode="sum", array=array, sign=True), (ids, offsets, weights)
    yield robe.RobeEmbeddingBagCollection(tables, array=array), (torch.tensor([[1, -5], [9, 2**40]]),)
    yield robe.RobeEmbeddingBagCollection(tables, array=array), (ids, collection_offsets)


@pytest.mark.parametrize("group", [1, 2, 64, 1024])
@pytest.mark.parametrize("kind", range(13))
def test_a_layer_on_int8_reads_the_values_that_the_bytes_stand_for(kind, group):
    """Groups of 1 to the whole array, which ends amid a group; blocks lie across groups."""
    array = robe.RobeArray(101, init_std=1.0)
    layer, inputs = list(int8_layers(array))[kind]
    small = array.quantized(group)
    values = small.weight.float() * small.scale.repeat_interleave(group)[: array.size]
    with torch.no_grad():
        array.weight.copy_(values)
        want = layer(*inputs)
    layer.array = small
    got = layer(*inputs)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    if isinstance(layer, robe.RobeEmbedding) or len(inputs) == 1:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_int8_layers_are_as_many_as_the_parameters_of_the_test():
    assert len(list(int8_layers(robe.RobeArray(101)))) == 13


def test_int8_collection_writes_into_a_slice():
    layer, inputs = list(int8_layers(robe.RobeArray(101)))[-2]
    layer.array = layer.array.quantized(8)
    vectors = torch.full((2, 3, 6), 7.0)
    written = layer(*inputs, out=vectors[:, 1:])
    assert written.data_ptr() == vectors[:, 1:].data_ptr()
    assert torch.equal(vectors[:, 1:], layer(*inputs))
    assert (vectors[:, 0] == 7).all()


def test_int8_compiles_as_in_eager_mode():
    for layer, inputs in int8_layers(robe.RobeArray(101)):
        layer.array = layer.array.quantized(8)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs), layer(*inputs))
        torch.compiler.reset()


def test_int8_has_no_gradient():
    problem = Problem([10], dtype=torch.int8)
    with pytest.raises(ValueError, match="int8"):
        native("lookup_backward", problem.grad(2), *problem.lookup(2))
    with pytest.raises(ValueError, match="int8"):
        native("bag_backward", problem.grad(2), *problem.bag(2, "sum"))
    layer = robe.RobeEmbedding(10, 4, array=robe.RobeArray(50))
    layer.array = layer.array.quantized()
    with pytest.raises(ValueError, match="arrays: expected RobeArrays"):
        robe.optim.SGD(layer)


@pytest.mark.parametrize("scale", [None, torch.ones(2, 2), torch.ones(2, dtype=torch.float64), torch.ones(0)])
def test_int8_needs_its_scale(scale):
    problem = Problem([10], dtype=torch.int8)
    for body in (torch.ops.robe.lookup, REFERENCE["lookup"]):
        with pytest.raises(ValueError, match="scale: expected"):
            body(*problem.lookup(2), scale)
    problem = Problem([10])
    with pytest.raises(
        ValueError, match="scale: expected with an int8 weight, which has no gradient, and only with one"
    ):
        native("lookup", *problem.lookup(2), torch.ones(250))


@pytest.mark.parametrize("group", [0, -1, 3, 96])
def test_int8_groups_are_powers_of_two(group):
    with pytest.raises(ValueError, match=f"group_size: expected a power of two, got {group}"):
        robe.RobeArray(10).quantized(group)


def test_int8_is_saved_loaded_and_copied(tmp_path):
    layers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers.append(robe.RobeEmbedding(None, 6, array=robe.RobeArray(101)))
        layers[-1].array = layers[-1].array.quantized(8)
    first, second = layers
    ids = torch.arange(20)
    assert not torch.equal(first(ids), second(ids))
    assert set(first.state_dict()) == {"array.weight", "array.scale"}
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(first(ids), second(ids))
    twin = copy.deepcopy(first)
    want = first(ids)
    first.array.weight.zero_()
    assert not first(ids).any()
    assert torch.equal(twin(ids), want)


def test_quantized_leaves_the_array_alone():
    array = robe.RobeArray(101)
    before = array.weight.detach().clone()
    small = array.quantized(8)
    small.weight.zero_()
    small.scale.zero_()
    assert torch.equal(array.weight, before)
    assert "int8, group_size=8" in repr(small)
