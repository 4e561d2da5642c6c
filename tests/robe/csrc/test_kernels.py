"""The compiled kernels of lookups and bags, and of their gradients, against the reference bodies."""

import pytest
import torch
from hypothesis import given, settings

import robe
from robe.ops import REFERENCE
from tests.helpers.kernels import SETS, machine, needs_kernels
from tests.helpers.native import machines, native, native_update, written
from tests.helpers.problems import (
    FLOATS,
    MODES,
    RULES,
    TOLERANCE,
    Problem,
    assert_close,
    batches,
    modes,
    problems,
    updated,
)


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
