"""Steps of optimizers in Triton against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robe.ops import REFERENCE
from tests.helpers.problems import FLOATS, RULES, Problem, assert_close, drawn_calls, problems, updated
from tests.helpers.triton_bodies import KERNELS, SIZES, summed, updates


@given(problems(FLOATS[1:], far=SIZES), updates, st.sampled_from(sorted(RULES)), st.data())
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
        with pytest.raises(ValueError, match=r"state: expected (2 tensors for adam, got|tensors like weight)"):
            KERNELS["update_"](problem.weight, state, "adam", RULES["adam"], [], [], [], [], [], [], [], [])
