"""The compiled kernels of updates against the reference, to the bit on any number of threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robe.ops import REFERENCE
from tests.helpers.kernels import machine, needs_kernels
from tests.helpers.native import IDS, KEYS, ROWS, machines, native, native_update
from tests.helpers.problems import (
    FLOATS,
    RULES,
    Problem,
    assert_close,
    batches,
    drawn_calls,
    packed,
    problems,
    updated,
)

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
@given(problems(), batches, st.data(), machines)
def test_sums_of_gradients_are_the_reference(problem, batch, data, on):
    calls = packed(drawn_calls(data.draw, problem, batch))
    with on:
        slots, sums = native("sum_gradients", problem.weight, *calls)
    want_slots, want = REFERENCE["sum_gradients"](problem.weight, *calls)
    assert torch.equal(slots, want_slots)
    assert_close(sums, want, {torch.float64: 1e-12, torch.float32: 1e-4}.get(problem.dtype, 0.02))


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
            calls = [(grad, lookup[1:]), (grad, bag[1:])]
            result += updated(torch.ops.robe.update_, problem.weight, "adam", RULES["adam"], calls)
            result += native("sum_gradients", problem.weight, *packed(calls))
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


BUFFER = torch.ones(120)


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
        ({"layouts": [4, 5, 3, 0, 0, 0, 0]}, "layouts: unknown pooling or hash"),
        ({"layouts": [0, 5, 3, 3, 0, 0, 0]}, "layouts: unknown pooling or hash"),
        ({"layouts": [-1, 5, 3, 0, 0, 0, 0]}, "layouts: unknown pooling or hash"),
        ({"layouts": [0, 2**62, 3, 0, 0, 0, 0]}, "embedding_dim: expected at most 2147483647, got 4611686018427387904"),
        *(
            ({name: entries}, f"{name}: expected one for each gradient, 1, got {len(entries)}")
            for name in ("ids", "offsets", "per_sample_weights", "table_keys", "num_embeddings", "filters")
            for entries in ([], [KEYS, KEYS])
        ),
        ({"grads": []}, "ids: expected one for each gradient, 0, got 1"),
        ({"options": [0.1, 0.0, 0.9, 0.0, float("nan")]}, "options: expected finite numbers"),
        ({"weight": BUFFER[:60], "state": [BUFFER[:60]]}, "state: expected memory of its own, .* with weight"),
        ({"weight": BUFFER[:60], "state": [BUFFER[59:119]]}, "state: expected memory of its own, .* with weight"),
        ({"state": [BUFFER[:60], BUFFER[30:90]]}, "state: expected memory of its own, .* with the other state"),
        ({"weight": BUFFER[:60], "grads": [BUFFER[50:60].view(1, 2, 5)]}, "weight: expected memory of its own"),
        ({"state": [BUFFER[:60]], "grads": [BUFFER[50:60].view(1, 2, 5)]}, "state: expected memory of its own"),
        ({"state": [torch.ones(60, 1)]}, "state: expected tensors like weight"),
        ({"weight": torch.ones(60, dtype=torch.int8)}, "weight: expected a floating-point vector"),
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
    for body in (torch.ops.robe.update_, REFERENCE["update_"]):
        if body is REFERENCE["update_"] and message == "weight: expected contiguous":
            continue  # only kernels need that
        with pytest.raises(ValueError, match=message):
            body(*arguments.values())
        assert (arguments["weight"] == 1).all()
