"""Lookups in Triton against the reference."""

import torch
from hypothesis import given, settings

from robe.ops import REFERENCE
from tests.helpers.problems import FLOATS, TOLERANCE, Problem, assert_close, batches, problems
from tests.helpers.triton_bodies import KERNELS, SIZES, TRAINED, summed, sums, written


@settings(max_examples=80)
@given(problems((*FLOATS, torch.int8), far=SIZES), batches)
def test_lookup_is_the_reference_to_the_bit(problem, batch):
    arguments = *problem.lookup(batch), problem.scale, problem.filter
    want = REFERENCE["lookup"](*arguments)
    got = KERNELS["lookup"](*arguments)
    assert got.is_contiguous()
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    for out in written("lookup_out", arguments, want):
        assert torch.equal(out, want)


@given(TRAINED, sums)
def test_lookup_backward_is_the_reference(problem, sums):
    batch, run = sums
    arguments = problem.grad(batch), *problem.lookup(batch), problem.filter
    want = REFERENCE["lookup_backward"](*arguments)
    with summed(run):
        got = KERNELS["lookup_backward"](*arguments)
    assert got.dtype == want.dtype
    assert_close(got, want, 10 * TOLERANCE[problem.dtype])  # sums of terms that may cancel, in another order


def test_an_id_out_of_range_reads_zeros_and_writes_nothing():
    """What the device does until it notices: with "identity", there may be no such slot."""
    problem = Problem([50], hash="identity")
    arguments = problem.lookup(4)
    arguments[1][2] = 2**40
    assert not KERNELS["lookup"](*arguments)[2].any()
    grad = KERNELS["lookup_backward"](torch.ones(4, 1, 8), *arguments)
    assert grad.sum() == 3 * 8
