"""Any arguments: the model's kernels succeed or refuse, and touch no memory but their own (`make test-hostile`)."""

import os

import pytest
import torch

from dlrm.ops import REFERENCE, pack_linear
from tests.helpers.hostile import attack
from tests.helpers.kernels import needs_kernels

CALLS = int(os.environ.get("HOSTILE_CALLS", "1000"))  # of each operator

NUMBERS = torch.Generator().manual_seed(0)
X, DENSE, EMBEDDINGS = (torch.randn(*shape, generator=NUMBERS) for shape in ((3, 5), (3, 5), (3, 2, 5)))
GRAD = torch.randn(3, 8, generator=NUMBERS)
LAYERS = [pack_linear(torch.randn(*shape, generator=NUMBERS), None) for shape in ((7, 5), (40, 32), (1, 64))]


def _vectors(rng):
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    return [DENSE.to(dtype), EMBEDDINGS.to(dtype)]


def mlp(rng):
    depth = rng.choice((1, 2, 3))
    weights, biases = zip(*LAYERS[:depth])
    return [X, list(weights), list(biases), (7, 40, 1)[depth - 1], rng.random() < 0.5]


MAKERS = {
    "dot_interaction": _vectors,
    "dot_interaction_backward": lambda rng: [GRAD, *_vectors(rng)],
    "mlp": mlp,
}


def test_every_operator_is_attacked():
    assert MAKERS.keys() == REFERENCE.keys()


@needs_kernels
@pytest.mark.parametrize("name", MAKERS)
def test_hostile_arguments_are_refused_or_computed(name):
    succeeded, compared = attack(
        getattr(torch.ops.dlrm, name),
        REFERENCE[name],
        MAKERS[name],
        CALLS,
        seed=f"{name} 1",
        every=max(10, CALLS // 400),
    )
    assert 0.1 * CALLS < succeeded < 0.9 * CALLS
    assert compared
