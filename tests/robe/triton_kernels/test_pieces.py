"""Gradients summed in a fixed order, against the reference."""

import pytest
import torch

from robe.ops import POOLINGS, REFERENCE
from tests.helpers.problems import Problem, assert_close, updated
from tests.helpers.triton_bodies import KERNELS, summed


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


@pytest.mark.parametrize("pooling", ["one", *POOLINGS])
def test_gradients_that_are_not_finite_stay_where_they_belong(pooling):
    problem = Problem([40], size=400, dim=4, block=4, dtype=torch.float64)
    grad = problem.grad(3)
    grad[1] = torch.inf
    name = "lookup" if pooling == "one" else "bag"
    arguments = grad, *(problem.lookup(3) if pooling == "one" else problem.bag(3, pooling))
    with summed(64):
        got = KERNELS[f"{name}_backward"](*arguments)
    assert_close(got, REFERENCE[f"{name}_backward"](*arguments))
