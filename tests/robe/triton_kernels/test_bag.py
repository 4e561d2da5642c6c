"""Bags in Triton against the reference."""

import pytest
import torch
from hypothesis import given, settings

from robe.ops import REFERENCE
from tests.helpers.problems import FLOATS, TOLERANCE, Problem, assert_close, modes, problems
from tests.helpers.triton_bodies import KERNELS, SIZES, TRAINED, batches_of_bags, summed, sums_of_bags, written


@given(problems((*FLOATS, torch.int8), far=SIZES), batches_of_bags, modes)
def test_bag_is_the_reference(problem, batch, pooling):
    pooling, weighted = pooling
    arguments = *problem.bag(batch, pooling, weighted=weighted), problem.scale, problem.filter
    want = REFERENCE["bag"](*arguments)
    got = KERNELS["bag"](*arguments)
    assert got.is_contiguous()
    assert_close(got, want)  # the interpreter cuts to half precision where a GPU rounds
    assert pooling != "max" or torch.equal(got, want)
    for out in written("bag_out", arguments, want):
        assert torch.equal(out, got)


@settings(max_examples=80)
@given(TRAINED, sums_of_bags, modes)
def test_bag_backward_is_the_reference(problem, sums, pooling):
    batch, run = sums
    pooling, weighted = pooling
    arguments = problem.grad(batch), *problem.bag(batch, pooling, weighted=weighted), problem.filter
    want = REFERENCE["bag_backward"](*arguments)
    with summed(run):
        got = KERNELS["bag_backward"](*arguments)
    assert_close(got, want, 30 * TOLERANCE[problem.dtype])
    if weighted:
        got, want = KERNELS["bag_weights_backward"](*arguments), REFERENCE["bag_weights_backward"](*arguments)
        assert_close(got, want, 30 * TOLERANCE[problem.dtype])
        assert not got[-3:].any()


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
