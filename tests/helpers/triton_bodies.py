"""The bodies of operators in Triton, for tests in its interpreter; outside it, a module that imports this is skipped.

`make test-triton` runs these tests, and those of operators, layers and optimizers on the same kernels.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st

from tests.helpers.problems import batches, problems

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: make test-triton", allow_module_level=True)

from robe.triton_kernels import KERNELS, pieces

SIZES = (700, 2000)  # of arrays, beside small ones
TRAINED = problems(far=SIZES)

# Batches, and the lengths of runs that are summed apart: where these are few, they are many programs, which the
# interpreter runs one after another. An update has up to three calls, and each of their pieces is in it.
_few = st.one_of(st.integers(0, 5), st.just(30))
sums = st.one_of(st.tuples(batches, st.sampled_from([None, 64])), st.tuples(_few, st.just(2)))
# A program of bags goes through their ids one after another, and the interpreter takes seconds for hundreds of bags.
batches_of_bags = st.one_of(st.integers(0, 5), st.sampled_from([30, 70]))
sums_of_bags = st.one_of(
    st.tuples(batches_of_bags, st.sampled_from([None, 64])), st.tuples(st.integers(0, 5), st.just(2))
)
updates = st.one_of(st.tuples(_few, st.just(64)), st.tuples(st.integers(0, 5), st.just(4)))


@contextmanager
def summed(run):
    """Within, gradients are added in a fixed order, with runs of that length summed apart; None: with atomics."""
    before = pieces.RUN_LENGTH
    torch.use_deterministic_algorithms(run is not None)
    pieces.RUN_LENGTH = run or before
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        pieces.RUN_LENGTH = before


def written(name, arguments, like):
    """Yield what an out operator writes into a part of a larger tensor, the rest of which must stay as it is."""
    (batch, features, dim), (*before, filter) = like.shape, arguments
    for whole in (like.new_full((batch, features + 1, dim), 7), like.new_full((batch, features, dim, 2), 7)):
        part, rest = (whole[:, 1:], whole[:, :1]) if whole.dim() == 3 else (whole[..., 1], whole[..., 0])
        KERNELS[name](*before, part, filter)
        assert (rest == 7).all()
        yield part
