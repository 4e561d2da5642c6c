"""The compiled CPU kernels against the reference bodies in robe/ops.py, and arrays in int8 against numpy."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import robe
from robe.backends import set_instruction_set
from robe.ops import REFERENCE
from tests.helpers.kernels import BACKEND, IS_NATIVE, SETS, instruction_set, machine, needs_kernels
from tests.helpers.problems import (
    FLOATS,
    HASHES,
    MODES,
    RULES,
    TOLERANCE,
    Problem,
    assert_close,
    batches,
    drawn_calls,
    modes,
    problems,
    updated,
)

ROOT = Path(__file__).parents[2]


native_update = torch.ops.robe.update_


def native(name, *arguments):
    return getattr(torch.ops.robe, name)(*arguments)


machines = st.builds(machine, st.sampled_from(SETS or [""]), st.sampled_from([1, 3]))


# ---------------------------------------------------------------------------------------------------------------------
# Which kernels run


def test_backend_names_the_kernels():
    assert list(robe.backend()) == ["cpu", "cuda"]
    assert IS_NATIVE or BACKEND.startswith("reference (")
    assert (instruction_set() in ("plain", "avx2", "avx512")) == IS_NATIVE


@needs_kernels
@pytest.mark.parametrize("name", SETS)
def test_an_instruction_set_can_be_chosen(name):
    with machine(name):
        assert robe.backend()["cpu"] == f"native ({name})"


@pytest.mark.parametrize(
    ("file", "switch", "want"),
    [
        ("notes.txt", "triton", "reference (triton is not installed)"),  # any folder of this name can be imported
        ("__init__.py", "triton", "triton"),  # builds for some machines are distributed under other names
        ("__init__.py", "reference", "reference (ROBE_CUDA_KERNELS=reference)"),
    ],
)
def test_triton_is_found_where_it_is(file, switch, want, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / file).touch()
    code = "import robe; print(robe.backend()['cuda'])"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "ROBE_CUDA_KERNELS": switch}
    got = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert got.stdout.strip() == want


@pytest.mark.parametrize("name", ["", "avx", "AVX2", "plain "])
def test_an_unknown_instruction_set_is_refused_and_changes_nothing(name):
    before = robe.backend()
    with pytest.raises(ValueError, match=f"instruction set: '{name}' is not available here; in use: "):
        set_instruction_set(name)
    assert robe.backend() == before


def results(problem, batch):
    """Everything that the operators compute from the same inputs."""
    lookup, grad = problem.lookup(batch), problem.grad(batch)
    out = [native("lookup", *lookup, problem.scale, problem.filter)]
    trains = problem.dtype != torch.int8
    if trains:
        out.append(native("lookup_backward", grad, *lookup, problem.filter))
    for mode in (*MODES, "weighted"):
        bag = problem.bag(batch, mode.replace("weighted", "sum"), weighted=mode == "weighted")
        out.append(native("bag", *bag, problem.scale, problem.filter))
        if trains:
            out.append(native("bag_backward", grad, *bag, problem.filter))
        if trains and mode == "weighted":
            out.append(native("bag_weights_backward", grad, *bag, problem.filter))
    if trains:
        for rule, options in RULES.items():
            out += updated(native_update, problem.weight, rule, options, [(grad, lookup[1:], problem.filter)])
    return out


@needs_kernels
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"dim": 16, "block": 16},
        {"dim": 16, "block": 16, "words": 9},
        {"dim": 16, "block": 4, "words": 5000},
        {"dim": 5, "block": 2, "words": 9, "padding_idx": 3},
        {"dim": 64, "block": 16, "padding_idx": 3},
        {"dim": 13, "block": 5, "sign": True},
        {"dim": 5, "block": 12, "sign": True},
        {"dim": 24, "block": 8, "hash": "linear", "sign": True},
        {"dim": 6, "hash": "identity", "uneven": True},
    ],
    ids=str,
)
def test_every_instruction_set_gives_the_same_bits(dtype, options):

    def compute():  # from the seed on, so that the inputs are the same each time
        return results(Problem([40, 7, 300], dtype=dtype, size=6000, **options), 40)

    with machine("plain"):
        want = compute()
    for name in SETS[1:]:
        with machine(name):
            got = compute()
        assert len(got) == len(want)
        for a, b in zip(got, want):
            assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Operators against the reference


def written(name, arguments, like, columns=1):
    """What an out operator writes into vectors[:, columns:], the rest of which must stay as it is."""
    vectors = torch.full((like.shape[0], like.shape[1] + columns, like.shape[2]), 7, dtype=like.dtype)
    *before, filter = arguments
    assert native(name, *before, vectors[:, columns:], filter) is None
    assert (vectors[:, :columns] == 7).all()
    return vectors[:, columns:]


@needs_kernels
@settings(max_examples=150)
@given(problems((*FLOATS, torch.int8)), batches, machines)
def test_lookup_is_the_reference_to_the_bit(problem, batch, on):
    arguments = *problem.lookup(batch), problem.scale, problem.filter
    want = REFERENCE["lookup"](*arguments)
    with on:
        for name in ("lookup", "lookup_forward"):
            got = native(name, *arguments)
            assert got.is_contiguous()
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
        assert torch.equal(written("lookup_out", arguments, want), want)


@needs_kernels
@given(problems(), batches, machines)
def test_lookup_backward_is_the_reference_to_the_bit(problem, batch, on):
    arguments = problem.grad(batch), *problem.lookup(batch), problem.filter
    want = REFERENCE["lookup_backward"](*arguments)
    with on:
        assert torch.equal(native("lookup_backward", *arguments), want)


@needs_kernels
@given(problems((*FLOATS, torch.int8)), batches, modes, machines)
def test_bag_is_the_reference(problem, batch, mode, on):
    mode, weighted = mode
    arguments = *problem.bag(batch, mode, weighted=weighted), problem.scale, problem.filter
    want = REFERENCE["bag"](*arguments)
    with on:
        for name in ("bag", "bag_forward"):
            got = native(name, *arguments)
            assert got.is_contiguous()
            assert_close(got, want)
            assert mode != "max" or torch.equal(got, want)
        assert torch.equal(written("bag_out", arguments, want), got)


@needs_kernels
@settings(max_examples=150)
@given(problems(), batches, modes, machines)
def test_bag_backward_is_the_reference(problem, batch, mode, on):
    mode, weighted = mode
    arguments = problem.grad(batch), *problem.bag(batch, mode, weighted=weighted), problem.filter
    want = REFERENCE["bag_backward"](*arguments)
    with on:
        got = native("bag_backward", *arguments)
        if mode == "mean":
            # Sums of many terms that may cancel, each term rounded otherwise.
            assert_close(got, want, 30 * TOLERANCE[problem.dtype])
        else:
            assert torch.equal(got, want)
        if weighted:
            # Dot products of up to 128 components, in another order.
            got, want = native("bag_weights_backward", *arguments), REFERENCE["bag_weights_backward"](*arguments)
            assert_close(got, want, 30 * TOLERANCE[problem.dtype])
            assert not got[-3:].any()


@needs_kernels
@pytest.mark.parametrize("mode", ["one", *MODES])
def test_many_tables_and_long_bags(mode):
    """More tables than the kernels read in one go, and bags that go on from one piece of work to the next."""
    for seed, features in ((1, 200), (2, 1)):
        problem = Problem([0] * features, size=9999, dim=32, block=16, seed=seed)
        if mode == "one":
            arguments = problem.lookup(150)
            assert torch.equal(native("lookup", *arguments), REFERENCE["lookup"](*arguments))
        else:
            arguments = problem.bag(3, mode, longest=2000)
            assert_close(native("bag", *arguments), REFERENCE["bag"](*arguments), 2e-4)


@needs_kernels
@pytest.mark.parametrize("mode", ["one", *MODES])
@pytest.mark.parametrize("block", [1, 3000, 5000])
def test_rows_of_thousands_of_components(mode, block):
    problem = Problem([30, 0], size=20_000, dim=3000, block=block, sign=True, padding_idx=2)
    name = "lookup" if mode == "one" else "bag"
    arguments = problem.lookup(9) if mode == "one" else problem.bag(9, mode)
    assert_close(native(name, *arguments), REFERENCE[name](*arguments))
    arguments = problem.grad(9), *arguments
    assert_close(native(f"{name}_backward", *arguments), REFERENCE[f"{name}_backward"](*arguments))


@needs_kernels
@pytest.mark.parametrize("block", [8, 16, 64])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_large_results_that_pass_the_caches_by(block, padding_idx):
    """From 16 MiB on rows are written another way, if they are aligned; 2600 * 26 * 64 floats are 16.5 MiB."""
    problem = Problem([50] * 13 + [0] * 13, size=100_003, dim=64, block=block, padding_idx=padding_idx)
    weight, ids, keys, *_ = arguments = problem.lookup(2600)
    slots, _ = robe.hashing.slots(ids, keys, size=100_003, embedding_dim=64, block_size=block, hash="mix")
    want = weight.index_select(0, slots.flatten()).view(2600, 26, 64)
    if padding_idx is not None:
        want[ids == padding_idx] = 0
    assert want.nbytes >= 16 * 2**20
    for name in SETS:
        with machine(name):
            assert torch.equal(native("lookup", *arguments), want)
    with machine(threads=2):
        assert torch.equal(written("lookup_out", (*arguments, None, None), want), want)
    # One float to the side: nothing is aligned any more.
    aside = torch.full((want.numel() + 2,), 7.0)
    native("lookup_out", *arguments, None, aside[1:-1].view(want.shape))
    assert torch.equal(aside[1:-1].view(want.shape), want)
    assert aside[0] == aside[-1] == 7
    # Bags of one id each read the same.
    offsets = torch.arange(ids.numel() + 1)
    bags = native("bag", weight, ids.T.flatten(), offsets, None, "sum", *arguments[2:])
    assert torch.equal(bags, want)


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


def all_bits(dtype):
    """Every value there is, subnormals, infinities and NaNs too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same_numbers(got, want):
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0), want.nan_to_num(0))


# 65,536 weights as 4096 rows of 16, each in slots of its own.
BITS = torch.tensor([0]), torch.tensor([4096]), 16, 16, "identity", False, None


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_comes_through(isa, dtype):
    weight, rows, ends = all_bits(dtype), torch.arange(4096), torch.arange(4097)
    with machine(isa):
        copied = native("lookup", weight, rows.unsqueeze(1), *BITS).flatten()
        assert torch.equal(copied.view(torch.int16), weight.view(torch.int16))
        for mode in MODES:
            pooled = native("bag", weight, rows, ends, None, mode, *BITS).flatten()
            assert same_numbers(pooled, weight)
        dense = native("lookup_backward", weight.view(4096, 1, 16), weight, rows.unsqueeze(1), *BITS)
        assert same_numbers(dense, weight)


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pooling_in_half_precision_rounds_as_torch_rounds(isa, dtype):
    """Sums of two and products are taken in float32 and rounded once: among 65,536 random pairs all cases occur."""
    weight, generator = all_bits(dtype), torch.Generator().manual_seed(0)
    with machine(isa):
        for _ in range(3):
            other, factors = (torch.randperm(4096, generator=generator) for _ in range(2))
            pairs, ends = torch.stack([torch.arange(4096), other], 1).flatten(), torch.arange(0, 8193, 2)
            got = native("bag", weight, pairs, ends, None, "sum", *BITS).flatten()
            table = weight.float().view(4096, 16)
            assert same_numbers(got, (table + table[other]).to(dtype).flatten())
            got = native("bag", weight, pairs, ends, None, "mean", *BITS).flatten()
            assert same_numbers(got, ((table + table[other]) / 2).to(dtype).flatten())
            got = native("bag", weight, pairs, ends, None, "max", *BITS).flatten()
            assert same_numbers(got, torch.maximum(table, table[other]).to(dtype).flatten())  # a NaN comes through
            factors = weight[factors * 16 + 5]
            got = native("bag", weight, torch.arange(4096), torch.arange(4097), factors, "sum", *BITS).flatten()
            assert same_numbers(got, (table * factors.float().unsqueeze(1)).to(dtype).flatten())


# ---------------------------------------------------------------------------------------------------------------------
# update_, and the number of threads


@needs_kernels
@given(problems(), batches, st.sampled_from(sorted(RULES)), st.data(), machines)
def test_update_is_the_reference(problem, batch, rule, data, on):
    calls = drawn_calls(data.draw, problem, batch)
    with on:
        got = updated(native_update, problem.weight, rule, RULES[rule], calls)
    want = updated(REFERENCE["update_"], problem.weight, rule, RULES[rule], calls)
    before = updated(REFERENCE["update_"], problem.weight, rule, RULES[rule], [])
    # Half precision: a state that is rounded the other way once moves the weight by more than a step of its own.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}[problem.dtype]
    for a, b, unchanged in zip(got, want, before):
        assert_close(a, b, tolerance)
        # Decay and moments move every slot that is touched, so what the reference leaves alone was not touched.
        assert torch.equal(a[b == unchanged], unchanged[b == unchanged]) or problem.dtype in FLOATS[2:]


@needs_kernels
@pytest.mark.parametrize("size", [701, 1000, 4095, 4096, 4097, 262_143, 300_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(size, dtype):
    """Blocks of 700 slots lie across the segments that the threads take, and thousands of ids collide."""
    results = []
    for threads in (1, 2, 3, 5):
        problem = Problem([4, 1000], size=size, dim=1400, block=700, dtype=dtype, sign=True)
        lookup, grad = problem.lookup(40), problem.grad(40)
        bag = problem.bag(40, "mean", longest=3)
        with machine(threads=threads):
            result = [native("lookup_backward", grad, *lookup), native("bag_backward", grad, *bag)]
            result += updated(
                torch.ops.robe.update_, problem.weight, "adam", RULES["adam"], [(grad, lookup[1:]), (grad, bag[1:])]
            )
        results.append(result)
    assert torch.equal(results[0][0], REFERENCE["lookup_backward"](grad, *lookup))
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert torch.equal(a, b)


@needs_kernels
@pytest.mark.parametrize("size", [255, 256, 257, 511, 4096, 262_144])
@pytest.mark.parametrize("block", [1, 8, 11])
def test_colliding_ids_add_up_in_order_on_any_number_of_threads(size, block):
    results = []
    for threads in (1, 2, 3, 5):
        problem = Problem([5, 0, 20], size=size, dim=8, block=block, sign=True, padding_idx=1)
        lookup, grad = problem.lookup(3000), problem.grad(3000)
        bag = problem.bag(3000, "max", longest=3)
        with machine(threads=threads):
            result = [
                native("lookup", *lookup),
                native("bag", *bag),
                native("lookup_backward", grad, *lookup),
                native("bag_backward", grad, *bag),
                *updated(
                    torch.ops.robe.update_, problem.weight, "sgd", RULES["sgd"], [(grad, lookup[1:]), (grad, bag[1:])]
                ),
            ]
        results.append(result)
    for want, name, arguments in (
        (results[0][2], "lookup_backward", (grad, *lookup)),
        (results[0][3], "bag_backward", (grad, *bag)),
    ):
        assert torch.equal(want, REFERENCE[name](*arguments))
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Int8 arrays. These hold for the reference too.


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


# ---------------------------------------------------------------------------------------------------------------------
# Errors: the same from both

KEYS, ROWS = torch.tensor([11, 22]), torch.tensor([4, 6])
IDS, VALUES, OFFSETS = torch.tensor([[1, 2]]), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])
TABLES = (KEYS, ROWS, 5, 3, "mix", False, None)
LOOKUP = (torch.ones(60), IDS, *TABLES, None)
BAG = (torch.ones(60), VALUES, OFFSETS, None, "sum", *TABLES, None)


def replaced(arguments, *changes):
    """Arguments with others in place of some: (position, value) pairs."""
    changed = list(arguments)
    for position, value in changes:
        changed[position] = value
    return changed


BAD_LOOKUPS = {
    "weight of integers": [(0, torch.ones(60, dtype=torch.int64))],
    "weight of two dimensions": [(0, torch.ones(60, 1))],
    "weight shorter than a block": [(0, torch.ones(2))],
    "float ids": [(1, IDS.float())],
    "short ids": [(1, IDS.short())],
    "bool ids": [(1, IDS.bool())],
    "ids of one dimension": [(1, IDS[0])],
    "ids of three dimensions": [(1, IDS.unsqueeze(0))],
    "ids of one column": [(1, IDS[:, :1])],
    "one key": [(2, KEYS[:1])],
    "no feature": [(2, KEYS[:0]), (3, ROWS[:0]), (1, IDS[:, :0])],
    "keys of two dimensions": [(2, KEYS.unsqueeze(1)), (3, ROWS.unsqueeze(1))],
    "no components": [(4, 0)],
    "blocks of nothing": [(5, 0)],
    "negative dim": [(4, -1)],
    "unknown hash": [(6, "md5")],
    "scale": [(9, torch.ones(60))],
    "id too large": [(1, torch.tensor([[3, 2], [4, 6]]))],
    "id of the second feature": [(1, torch.tensor([[3, 6]], dtype=torch.int32))],
    "negative id": [(1, torch.tensor([[-(2**63), 1]]))],
}
BAD_BAGS = {
    "weight of integers": [(0, torch.ones(60, dtype=torch.int64))],
    "float values": [(1, VALUES.float())],
    "values of two dimensions": [(1, VALUES.view(1, 3))],
    "float offsets": [(2, OFFSETS.float())],
    "offsets of two dimensions": [(2, OFFSETS.view(1, 3))],
    "one offset less": [(2, OFFSETS[:2])],
    "no offsets": [(2, OFFSETS[:0])],
    "offsets from 1": [(2, torch.tensor([1, 2, 3]))],
    "offsets below 0": [(2, torch.tensor([-1, 2, 3]))],
    "offsets past the end": [(2, torch.tensor([0, 2, 4]))],
    "offsets that fall": [(2, torch.tensor([0, 3, 2]))],
    "offsets that fall within": [(2, torch.tensor([0, 2, 1, 3, 3], dtype=torch.int32))],
    "unknown mode": [(4, "median")],
    "weights with mean": [(3, torch.ones(3)), (4, "mean")],
    "two weights": [(3, torch.ones(2))],
    "weights of another type": [(3, torch.ones(3).double())],
    "one key": [(5, KEYS[:1])],
    "unknown hash": [(9, "md5")],
    "id too large": [(1, torch.tensor([3, 5, 6]))],
    "negative id": [(1, torch.tensor([-1, 5, 6]))],
}


def error_of(function, arguments):
    with pytest.raises(Exception) as raised:  # noqa: PT011  (which one is what the test compares)
        function(*arguments)
    return raised.type, str(raised.value)


@needs_kernels
@pytest.mark.parametrize("name", BAD_LOOKUPS)
def test_lookup_raises_what_the_reference_raises(name):
    arguments = replaced(LOOKUP, *BAD_LOOKUPS[name])
    want = error_of(REFERENCE["lookup"], arguments)
    assert want[0] in (ValueError, IndexError)
    assert error_of(torch.ops.robe.lookup, arguments) == want
    assert error_of(torch.ops.robe.lookup_out, (*arguments, torch.empty(len(arguments[1]), 2, 5))) == want


@needs_kernels
@pytest.mark.parametrize("name", BAD_BAGS)
def test_bag_raises_what_the_reference_raises(name):
    arguments = replaced(BAG, *BAD_BAGS[name])
    want = error_of(REFERENCE["bag"], arguments)
    assert want[0] in (ValueError, IndexError)
    assert error_of(torch.ops.robe.bag, arguments) == want
    assert error_of(torch.ops.robe.bag_out, (*arguments, torch.empty(1, 2, 5))) == want


@needs_kernels
@pytest.mark.parametrize("name", ["lookup_backward", "bag_backward", "bag_weights_backward"])
def test_backwards_raise_what_the_reference_raises_for_an_id_outside(name):
    grad = torch.ones(1, 2, 5)
    if name == "lookup_backward":
        arguments = grad, *replaced(LOOKUP[:-1], (1, torch.tensor([[4, 6]])))
    else:
        arguments = grad, *replaced(BAG[:-1], (1, torch.tensor([3, 5, 6])), (3, torch.ones(3)))
    want = error_of(REFERENCE[name], arguments)
    assert want[0] is IndexError
    assert error_of(getattr(torch.ops.robe, name), arguments) == want


@needs_kernels
@pytest.mark.parametrize("name", ["lookup_out", "bag_out"])
@pytest.mark.parametrize(
    "out",
    [torch.empty(1, 2, 4), torch.empty(2, 5), torch.empty(1, 2, 5, 1), torch.empty(1, 2, 5).double()],
    ids=lambda out: f"{out.dtype}, {tuple(out.shape)}",
)
def test_an_out_that_does_not_fit_is_refused(name, out):
    arguments = *(LOOKUP if name == "lookup_out" else BAG), out
    for body in (getattr(torch.ops.robe, name), REFERENCE[name]):
        with pytest.raises(ValueError, match=r"^out: expected .*, got "):
            body(*arguments)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_first_of_many_ids_outside_is_named_whatever_the_threads(threads):
    problem = Problem([100] * 5, dim=64, block=64)
    lookup, grad = list(problem.lookup(1000)), problem.grad(1000)
    bag, ends = list(problem.bag(1000, "sum", longest=3)), [*range(5)]
    for row, feature, wrong in ((990, 0, 777), (501, 3, -5), (501, 4, 123), (700, 1, 999)):
        lookup[1][row, feature] = wrong
    total = int(bag[2][-1])
    for position, wrong in ((total - 1, 777), (total // 2, 555), (total // 2 + 1, -3)):
        bag[1][position] = wrong
    bag_feature = int(np.searchsorted(bag[2].numpy(), total // 2, side="right") - 1) // 1000
    assert bag_feature in ends
    with machine(threads=threads):
        for function, arguments, message in (
            (torch.ops.robe.lookup, lookup, "id -5 of feature 3, whose table has 100 rows"),
            (torch.ops.robe.lookup_backward, [grad, *lookup], "id -5 of feature 3, whose table has 100 rows"),
            (torch.ops.robe.bag, bag, f"id 555 of feature {bag_feature}, whose"),
            (torch.ops.robe.bag_backward, [grad, *bag], f"id 555 of feature {bag_feature}, whose"),
        ):
            with pytest.raises(IndexError, match=f"index out of range: {message}"):
                function(*arguments)


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "lion"}, "rule: expected one of sgd, adagrad, adam, got 'lion'"),
        ({"state": []}, "state: expected 1 tensors for sgd"),
        ({"state": [torch.ones(59)]}, "state: expected tensors like weight"),
        ({"state": [torch.ones(60).double()]}, "state: expected tensors like weight"),
        ({"weight": torch.ones(120)[::2]}, "weight: expected contiguous"),
        ({"options": [0.1]}, "options: expected 5"),
        ({"layouts": [0, 5, 3, 0, 0, 0]}, "layouts: expected 7 entries"),
        ({"layouts": [4, 5, 3, 0, 0, 0, 0]}, "layouts: unknown mode or hash"),
        ({"layouts": [0, 5, 3, 3, 0, 0, 0]}, "layouts: unknown mode or hash"),
    ],
)
def test_update_refuses_and_changes_nothing(changes, message):
    arguments = {
        "weight": torch.ones(60),
        "state": [torch.ones(60)],
        "rule": "sgd",
        "options": RULES["sgd"],
        "grads": [torch.ones(1, 2, 5)],
        "ids": [IDS],
        "offsets": [torch.empty(0)],
        "per_sample_weights": [torch.empty(0)],
        "table_keys": [KEYS],
        "num_embeddings": [ROWS],
        "filters": [KEYS[:0]],
        "layouts": [0, 5, 3, 0, 0, 0, 0],
    } | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.robe.update_(*arguments.values())
    assert (arguments["weight"] == 1).all()


@needs_kernels
def test_an_identity_table_must_lie_within_the_array():
    for keys, rows in (([0, 20], [4, 9]), ([-5, 20], [4, 6]), ([0, 2**62], [4, 6]), ([0, 20], [4, 0])):
        with pytest.raises(
            ValueError, match=r"hash='identity': the table of feature . does not lie within the array's"
        ):
            native("lookup", torch.ones(60), IDS, torch.tensor(keys), torch.tensor(rows), 5, 5, "identity", False, None)


# ---------------------------------------------------------------------------------------------------------------------
# What torch asks of operators


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_opcheck(hash, dtype):
    problem = Problem([10, 20], size=300, dim=5, block=3, hash=hash, dtype=dtype)
    lookup, bag = (*problem.lookup(3), problem.scale), (*problem.bag(3, "sum", weighted=True), problem.scale)
    out = torch.empty(3, 3, 5, dtype=problem.embedding_dtype)
    torch.library.opcheck(torch.ops.robe.lookup_forward, lookup)
    torch.library.opcheck(torch.ops.robe.bag_forward, bag)
    torch.library.opcheck(torch.ops.robe.lookup_out, (*lookup, out[:, 1:]))
    torch.library.opcheck(torch.ops.robe.bag_out, (*bag, out[:, 1:]))


@pytest.mark.parametrize("rule", RULES)
def test_opcheck_update(rule):
    problem = Problem([10, 20], size=300, dim=5, block=3)
    _, ids, keys, rows, *_ = problem.lookup(3)
    none = torch.empty(0)
    state = [torch.ones(300) for _ in range({"adam": 2}.get(rule, 1))]
    lists = [problem.grad(3)], [ids], [none], [none], [keys], [rows], [keys[:0]]
    torch.library.opcheck(
        torch.ops.robe.update_, (problem.weight, state, rule, RULES[rule], *lists, [0, 5, 3, 0, 0, 0, 0])
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory

STATM = Path("/proc/self/statm")


def resident():
    """Bytes of memory in use."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(call, warm_up, count):
    """The least of two: a leak grows each time, the allocator's own memory once in a while."""
    for _ in range(warm_up):
        call()
    sizes = [resident()]
    for _ in range(2):
        for _ in range(count):
            call()
        sizes.append(resident())
    return min(sizes[1] - sizes[0], sizes[2] - sizes[1])


def refused(function, *arguments):
    with pytest.raises(ValueError, match="hash: expected one of"):
        function(*arguments)


@needs_kernels
@pytest.mark.skipif(not STATM.exists(), reason="reads the memory in use from /proc, which only Linux has")
def test_nothing_leaks():
    """The kernels take over tensors and strings from torch, and must free each, however the call ends."""
    # The shortest leaked string would be 1 MB here.
    assert growth(lambda: native("lookup_forward", *LOOKUP), 2000, 40_000) < 500_000
    assert growth(lambda: native("bag_forward", *BAG), 2000, 40_000) < 500_000
    # Arguments that are large: leaked once in a hundred calls, they would be seen.
    wide = lambda: torch.ones(250_000)  # noqa: E731  (1 MB, another one for each call)
    counters = lambda: torch.zeros(4, 62_500, dtype=torch.int32)  # noqa: E731
    hash = "x" * 1_000_000
    ones = torch.ones(1, 2, 5)
    for call in (
        lambda: native("lookup_forward", wide(), *LOOKUP[1:]),
        lambda: native("lookup_out", wide(), *LOOKUP[1:], ones),
        lambda: native("lookup_backward", ones, wide(), *LOOKUP[1:-1]),
        lambda: native("bag_weights_backward", ones, wide(), *BAG[1:3], torch.ones(3), *BAG[4:-1]),
        lambda: updated(native_update, wide(), "adam", RULES["adam"], [(ones, LOOKUP[1:-1])]),
        lambda: native("mlp", torch.ones(4, 32), [torch.ones(250, 32, 32)], [torch.ones(8000)], 8000, True),
        lambda: native("count_ids_", counters(), IDS, KEYS, counters(), IDS > 1),
        lambda: native("id_counts", counters(), KEYS),
        lambda: native("frequent_rows_", counters(), IDS, KEYS, 0, torch.zeros(100_000, dtype=torch.int64)),
        lambda: native("observe_ids_", counters(), IDS, KEYS, KEYS, 1),
        lambda: refused(torch.ops.robe.lookup_forward, *replaced(LOOKUP, (6, hash))),
        lambda: refused(torch.ops.robe.bag_forward, *replaced(BAG, (9, hash))),
    ):
        assert growth(call, 10, 100) < 20_000_000


# ---------------------------------------------------------------------------------------------------------------------
# Which library is loaded: each in a process of its own

PROGRAM = """
import warnings
warnings.simplefilter("error")
import robe, torch
layer = robe.RobeEmbedding(10, 4, robe_size=30)
layer(torch.tensor([1, 2])).sum().backward()
assert layer.array.weight.grad.any()
robe.optim.Adagrad(layer)
print(robe.backend()["cpu"])
"""


def run_with(kernels, program=PROGRAM):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"ROBE_KERNELS": str(kernels)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_reference_can_be_asked_for_and_works():
    choose = "\ntry:\n    robe.backends.set_instruction_set('plain')\nexcept ValueError as error:\n    print(error)"
    result = run_with("reference", PROGRAM + choose)
    assert result.stderr == ""
    backend = "reference (ROBE_KERNELS=reference)"
    assert result.stdout.splitlines() == [
        backend,
        f"instruction set: 'plain' is not available here; in use: {backend}",
    ]


def test_a_library_that_is_not_there_is_refused():
    result = run_with("/nonexistent")
    assert result.returncode != 0
    message = "ValueError: ROBE_KERNELS: expected native, reference or a library's file, got '/nonexistent'"
    assert result.stderr.splitlines()[-1] == message


def test_a_library_that_cannot_be_loaded_leaves_the_reference_and_the_reason(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"no library at all")
    result = run_with(tmp_path / "broken.so")
    assert result.stderr == ""
    assert result.stdout.startswith("reference (broken.so can't be loaded: ")


@needs_kernels
def test_a_library_may_be_given_by_its_file():
    result = run_with(next(Path(robe.__file__).parent.glob("_cpu*")))
    assert result.stderr == ""
    assert result.stdout.startswith("native (")
