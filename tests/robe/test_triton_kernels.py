"""The kernels in Triton, in its interpreter, against the reference bodies in robe/ops.py.

`make test-triton` runs these, and the tests of operators, layers and optimizers on the same kernels.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robe.ops import REFERENCE
from tests.helpers.problems import (
    FLOATS,
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

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: make test-triton", allow_module_level=True)

import triton
from triton.runtime import interpreter

from robe import triton_kernels
from robe.triton_kernels import KERNELS

TRAINED = problems(far=(700, 2000))


def test_cuda_tensors_get_these_kernels():
    code = (
        "import sys, torch, robe; has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        f"print(robe.backend()['cuda'], {{has('robe::' + name, 'CUDA') for name in {list(KERNELS)}}}); "
        "assert 'triton' not in sys.modules"
    )

    def told(**environment):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=os.environ | environment, text=True, check=True, capture_output=True).stdout

    assert told(ROBE_KERNELS="native") == f"triton ({triton.__version__}) {{True}}\n"
    assert told(ROBE_KERNELS="reference") == "reference (ROBE_KERNELS=reference) {False}\n"


def written(name, arguments, like):
    """What an out operator writes into a part of a larger tensor, the rest of which must stay as it is."""
    (batch, features, dim), (*before, filter) = like.shape, arguments
    for whole in (like.new_full((batch, features + 1, dim), 7), like.new_full((batch, features, dim, 2), 7)):
        part, rest = (whole[:, 1:], whole[:, :1]) if whole.dim() == 3 else (whole[..., 1], whole[..., 0])
        KERNELS[name](*before, part, filter)
        assert (rest == 7).all()
        yield part


@settings(max_examples=80)
@given(problems((*FLOATS, torch.int8), far=(700, 2000)), batches)
def test_lookup_is_the_reference_to_the_bit(problem, batch):
    arguments = *problem.lookup(batch), problem.scale, problem.filter
    want = REFERENCE["lookup"](*arguments)
    got = KERNELS["lookup"](*arguments)
    assert got.is_contiguous()
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    for out in written("lookup_out", arguments, want):
        assert torch.equal(out, want)


@contextmanager
def summed(run):
    """Within, gradients are added in a fixed order, so many pieces for the same slots apart; None: with atomics."""
    before = triton_kernels._RUN
    torch.use_deterministic_algorithms(run is not None)
    triton_kernels._RUN = run or before
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        triton_kernels._RUN = before


# Batches, and how many pieces are summed apart: where these are few, they are many programs, which the interpreter runs
# one after another. An update has up to three calls, and each of their pieces is in it.
few = st.one_of(st.integers(0, 5), st.just(30))
sums = st.one_of(st.tuples(batches, st.sampled_from([None, 64])), st.tuples(few, st.just(2)))
updates = st.one_of(st.tuples(few, st.just(64)), st.tuples(st.integers(0, 5), st.just(4)))


@given(TRAINED, sums)
def test_lookup_backward_is_the_reference(problem, sums):
    batch, run = sums
    arguments = problem.grad(batch), *problem.lookup(batch), problem.filter
    want = REFERENCE["lookup_backward"](*arguments)
    with summed(run):
        got = KERNELS["lookup_backward"](*arguments)
    assert got.dtype == want.dtype
    assert_close(got, want, 10 * TOLERANCE[problem.dtype])  # sums of terms that may cancel, in another order


@given(problems((*FLOATS, torch.int8), far=(700, 2000)), batches, modes)
def test_bag_is_the_reference(problem, batch, mode):
    mode, weighted = mode
    arguments = *problem.bag(batch, mode, weighted=weighted), problem.scale, problem.filter
    want = REFERENCE["bag"](*arguments)
    got = KERNELS["bag"](*arguments)
    assert got.is_contiguous()
    assert_close(got, want)  # the interpreter cuts to half precision where a GPU rounds
    assert mode != "max" or torch.equal(got, want)
    for out in written("bag_out", arguments, want):
        assert torch.equal(out, got)


@settings(max_examples=80)
@given(TRAINED, sums, modes)
def test_bag_backward_is_the_reference(problem, sums, mode):
    batch, run = sums
    mode, weighted = mode
    arguments = problem.grad(batch), *problem.bag(batch, mode, weighted=weighted), problem.filter
    want = REFERENCE["bag_backward"](*arguments)
    with summed(run):
        got = KERNELS["bag_backward"](*arguments)
    assert_close(got, want, 30 * TOLERANCE[problem.dtype])
    if weighted:
        got, want = KERNELS["bag_weights_backward"](*arguments), REFERENCE["bag_weights_backward"](*arguments)
        assert_close(got, want, 30 * TOLERANCE[problem.dtype])
        assert not got[-3:].any()


@given(problems(FLOATS[1:], far=(700, 2000)), updates, st.sampled_from(sorted(RULES)), st.data())
def test_update_is_the_reference(problem, sums, rule, data):
    batch, run = sums
    calls = drawn_calls(data.draw, problem, batch)
    with summed(run):
        got = updated(KERNELS["update_"], problem.weight, rule, RULES[rule], calls)
    want = updated(REFERENCE["update_"], problem.weight, rule, RULES[rule], calls)
    before = updated(REFERENCE["update_"], problem.weight, rule, RULES[rule], [])
    for a, b, unchanged in zip(got, want, before):
        # Adagrad and Adam divide by what they sum: where gradients cancel, their rounding is what remains.
        assert_close(a, b, {torch.float32: 2e-3}.get(problem.dtype, 0.06))
        assert torch.equal(a[b == unchanged], unchanged[b == unchanged]) or problem.dtype != torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_update_of_tables_of_several_dimensions(rule):
    """In one step, calls of several layers on one array. Small whole numbers, whose sums are exact in any order."""
    of_layers = [Problem([50, 9], dim=dim, block=block, size=500, seed=dim) for dim, block in ((8, 8), (5, 2), (3, 7))]
    calls = []
    for problem in of_layers:
        calls.append((problem.grad(6).round(), problem.lookup(6)[1:]))
        calls.append((problem.grad(6).round(), problem.bag(6, "sum")[1:]))
    weight = of_layers[0].weight.round()
    got, want = (updated(body["update_"], weight, rule, RULES[rule], calls) for body in (KERNELS, REFERENCE))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_update_in_double_precision_is_left_to_the_reference():
    problem = Problem([50], dtype=torch.float64)
    calls = [(problem.grad(6), problem.lookup(6)[1:])]
    got, want = (
        updated(body["update_"], problem.weight, "adam", RULES["adam"], calls) for body in (KERNELS, REFERENCE)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_update_without_momentum_leaves_the_state_alone():
    problem = Problem([50])
    calls = [(problem.grad(6), problem.lookup(6)[1:])]
    weight, state = updated(KERNELS["update_"], problem.weight, "sgd", [0.1, 0.0, 0.0, 0.0, 0.0], calls)
    assert not torch.equal(weight, problem.weight)
    assert (state == 0.5).all()


def test_an_unknown_rule_is_refused():
    problem = Problem([50])
    with pytest.raises(ValueError, match="rule: expected one of sgd, adagrad, adam, got 'lion'"):
        updated(KERNELS["update_"], problem.weight, "lion", RULES["adam"], [(problem.grad(6), problem.lookup(6)[1:])])


@pytest.mark.parametrize("mode", ["one", *MODES])
@pytest.mark.parametrize("block", [1, 1500, 5000])
def test_rows_of_thousands_of_components(mode, block):
    """More than a program reads at a time, in blocks or within one."""
    problem = Problem([30, 0], size=7000, dim=3000, block=block, sign=True, padding_idx=2, wide=False)
    name = "lookup" if mode == "one" else "bag"
    arguments = problem.lookup(2) if mode == "one" else problem.bag(2, mode, longest=3)
    assert_close(KERNELS[name](*arguments), REFERENCE[name](*arguments))
    arguments = problem.grad(2), *arguments
    want = REFERENCE[f"{name}_backward"](*arguments)
    for run in (None, 64):
        with summed(run):
            assert_close(KERNELS[f"{name}_backward"](*arguments), want)


@pytest.mark.parametrize("batch", [63, 64, 65, 127, 128, 200, 1000])
def test_an_id_that_all_examples_have(batch):
    """More pieces for its slots than one program sums. Whole numbers: their sums are exact."""
    problem = Problem([1, 3], size=20, dim=4, block=3)
    grad, arguments = problem.grad(batch).round(), problem.lookup(batch)
    with summed(64):
        got = KERNELS["lookup_backward"](grad, *arguments)
    assert torch.equal(got, REFERENCE["lookup_backward"](grad, *arguments))
    for dtype in (torch.float32, torch.bfloat16):
        calls = [(grad.to(dtype), arguments[1:])] * 2
        got, want = (
            updated(body["update_"], problem.weight.to(dtype), "sgd", [0.125, 0, 0, 0, 0], calls)
            for body in (KERNELS, REFERENCE)
        )
        assert_close(got[0], want[0], None if dtype == torch.float32 else 0.02)


def test_pieces_that_begin_together_and_end_apart_are_not_taken_for_the_same():
    """In an array of one block, all blocks are in one place, and the last of each row is shorter."""
    problem = Problem([9], size=4, dim=6, block=4)
    arguments = problem.grad(100).round(), *problem.lookup(100)
    with summed(2):
        assert torch.equal(KERNELS["lookup_backward"](*arguments), REFERENCE["lookup_backward"](*arguments))


@pytest.mark.parametrize("mode", ["one", *MODES])
def test_gradients_that_are_not_finite_stay_where_they_belong(mode):
    problem = Problem([40], size=400, dim=4, block=4, dtype=torch.float64)
    grad = problem.grad(3)
    grad[1] = torch.inf
    name = "lookup" if mode == "one" else "bag"
    arguments = grad, *(problem.lookup(3) if mode == "one" else problem.bag(3, mode))
    with summed(64):
        got = KERNELS[f"{name}_backward"](*arguments)
    assert_close(got, REFERENCE[f"{name}_backward"](*arguments))


@pytest.mark.parametrize("run", [None, 64])
@pytest.mark.parametrize("sign", [False, True])
def test_max_of_values_that_are_not_numbers(run, sign):
    """Such a value is the largest of its bag, whose gradient nothing takes; infinities are numbers."""
    problem = Problem([40], size=60, dim=4, block=2, sign=sign, dtype=torch.float64)
    for k, value in enumerate([torch.nan, torch.inf, -torch.inf] * 4):
        problem.weight[5 * k] = value
    grad, arguments = problem.grad(50), problem.bag(50, "max")
    want = REFERENCE["bag"](*arguments)
    assert want.isnan().any()
    torch.testing.assert_close(KERNELS["bag"](*arguments), want, rtol=0, atol=0, equal_nan=True)
    with summed(run):
        got = KERNELS["bag_backward"](grad, *arguments)
    assert_close(got, REFERENCE["bag_backward"](grad, *arguments))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: what is known without the device is refused as ever, the rest trips an assertion on the device


def test_shapes_and_types_are_refused():
    problem = Problem([50])
    weight, ids, *tables = problem.lookup(4)
    with pytest.raises(ValueError, match=r"ids: expected \(B, 1\), one column per feature, got \(4, 2\)"):
        KERNELS["lookup"](weight, torch.cat([ids, ids], 1), *tables)
    with pytest.raises(ValueError, match=r"out: expected torch.float32 \(4, 1, 8\), got torch.float64 \(4, 1, 8\)"):
        KERNELS["lookup_out"](weight, ids, *tables, None, torch.empty(4, 1, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="ids: expected on cpu, where the weights are, got meta"):
        KERNELS["lookup"](weight, ids.to("meta"), *tables)
    with pytest.raises(ValueError, match="scale: expected with an int8 weight"):
        KERNELS["lookup"](weight, ids, *tables, torch.ones(1))


def test_gradients_and_states_of_other_shapes_are_refused():
    problem = Problem([50])
    lookup, bag = problem.lookup(4), problem.bag(4, "sum", weighted=True)
    for grad in (torch.ones(1, 1, 8), torch.ones(4, 1, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"grad: expected torch.float32 \(4, 1, 8\) on cpu, got "):
            KERNELS["lookup_backward"](grad, *lookup)
        for name in ("bag_backward", "bag_weights_backward"):
            with pytest.raises(ValueError, match=r"grad: expected torch.float32 \(4, 1, 8\) on cpu, got "):
                KERNELS[name](grad, *bag)
        with pytest.raises(ValueError, match=r"grad: expected torch.float32 \(4, 1, 8\) on cpu, got "):
            updated(KERNELS["update_"], problem.weight, "adam", RULES["adam"], [(grad, lookup[1:])])
    for state in ([], [torch.ones(1000)], [torch.ones(1000), torch.ones(99)]):
        with pytest.raises(ValueError, match=r"state: expected 2 tensors like the weights \(1000,\), got"):
            KERNELS["update_"](problem.weight, state, "adam", RULES["adam"], [], [], [], [], [], [], [], [])


@pytest.fixture
def assertions(monkeypatch):
    """The interpreter leaves assertions out, whatever a kernel's options say."""
    options = interpreter.InterpreterOptions(debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.mark.usefixtures("assertions")
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize("hash", ["mix", "identity"])
def test_an_id_out_of_range_trips_an_assertion(bad, hash):
    problem = Problem([50], hash=hash, padding_idx=-7)
    arguments = problem.lookup(4)
    KERNELS["lookup"](*arguments)
    arguments[1][2] = bad
    with pytest.raises(Exception, match="index out of range: an id is not below num_embeddings of its table"):
        KERNELS["lookup"](*arguments)
    weight, values, *rest = problem.bag(4, "sum")
    KERNELS["bag"](weight, values, *rest)
    values[0] = bad
    with pytest.raises(Exception, match="index out of range"):
        KERNELS["bag"](weight, values, *rest)


@pytest.mark.usefixtures("assertions")
@pytest.mark.parametrize("offsets", [[1, 2, 3], [0, 3, 2], [0, 2, 6], [0, -1, 3]])
def test_offsets_that_do_not_rise_trip_an_assertion(offsets):
    weight, _, _, *rest = Problem([50]).bag(2, "sum")
    KERNELS["bag"](weight, torch.arange(5), torch.tensor([0, 3, 5]), *rest)
    with pytest.raises(Exception, match="offsets: expected to rise from 0 to at most the number of values"):
        KERNELS["bag"](weight, torch.arange(5), torch.tensor(offsets), *rest)


@pytest.mark.usefixtures("assertions")
@pytest.mark.parametrize(("key", "rows"), [(-8, 50), (3, 50), (8 * 990, 50), (0, 0)])
def test_a_table_beside_the_array_trips_an_assertion_and_is_not_touched(key, rows, monkeypatch):
    problem = Problem([50], hash="identity")
    weight, ids, _, _, *layout = problem.lookup(4)
    arguments = weight, ids, torch.tensor([key]), torch.tensor([rows]), *layout
    with pytest.raises(Exception, match="a table does not lie within the array, at a multiple of D"):
        KERNELS["lookup"](*arguments)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=False))
    assert not KERNELS["lookup"](*arguments).any()
    assert not KERNELS["lookup_backward"](problem.grad(4), *arguments).any()


def test_an_id_out_of_range_reads_zeros_and_writes_nothing():
    """What the device does until it notices: with "identity", there may be no such slot."""
    problem = Problem([50], hash="identity")
    arguments = problem.lookup(4)
    arguments[1][2] = 2**40
    assert not KERNELS["lookup"](*arguments)[2].any()
    grad = KERNELS["lookup_backward"](torch.ones(4, 1, 8), *arguments)
    assert grad.sum() == 3 * 8


def test_this_file_runs_the_interpreter():
    assert isinstance(triton_kernels._forward, interpreter.InterpretedFunction)
