"""Any arguments: the model's kernels succeed or refuse, and touch no memory but their own (`make test-hostile`)."""

import os
import random
from types import SimpleNamespace

import pytest
import torch

from dlrm.ops import REFERENCE, pack_linear
from tests.helpers.hostile import attack
from tests.helpers.kernels import needs_kernels

CALLS = int(os.environ.get("HOSTILE_CALLS", "1000"))  # of each operator

NUMBERS = torch.Generator().manual_seed(0)
X, DENSE, EMBEDDINGS = (torch.randn(*shape, generator=NUMBERS) for shape in ((3, 5), (3, 5), (3, 2, 5)))
GRAD = torch.randn(3, 8, generator=NUMBERS)
ARRAY, SCALE = torch.randn(60, generator=NUMBERS), torch.full((1,), 0.02)
IDS, TABLES = torch.tensor([[0, 3], [2, 1], [1, 0]]), (torch.tensor([2**40, -7]), torch.tensor([0, 9]))
FILTER = torch.tensor([-1, 2**61 - 1])
CHAINS = {
    name: [pack_linear(torch.randn(*shape, generator=NUMBERS), None, block) for *shape, block in shapes]
    for name, shapes in {
        "bottom": ((40, 4, None), (5, 40, 16)),
        "dots": ((33, 8, 32), (1, 33, None)),
        "crossed": ((1, 15, None),),
        "v": ((3, 15, 16),),
        "w": ((15, 3, None),),
    }.items()
}
SHAPES = (7, 5), (40, 16), (1, 48)
LAYERS = [
    [pack_linear(torch.randn(*shape, generator=NUMBERS), None, block) for block in (None, 16)] for shape in SHAPES
]


def _vectors(rng):
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    return [DENSE.to(dtype), EMBEDDINGS.to(dtype)]


def mlp(rng):
    depth = rng.choice((1, 2, 3))
    layers = zip(*(rng.choice(layer) for layer in LAYERS[:depth]))
    return [X, *map(list, layers), (7, 40, 1)[depth - 1], rng.random() < 0.5]


class Plan:
    """The operators of a plan as one: made, run once, dropped."""

    def __init__(self, make, run, drop):
        self.make, self.run, self.drop = make, run, drop
        schemas = (getattr(torch.ops.dlrm, name).default._schema.arguments for name in ("make_plan", "run_plan"))
        self.default = SimpleNamespace(_schema=SimpleNamespace(arguments=[*next(schemas), *next(schemas)[1:]]))

    def __call__(self, *arguments):
        plan = self.make(*arguments[:-2])
        try:
            return self.run(plan, *arguments[-2:])
        finally:
            self.drop(plan)


def plan(rng):
    """A model of two features and five dimensions: a bottom MLP, an array, dot products or a cross net, a top MLP."""
    hash = rng.choice(("mix", "linear", "identity"))
    keys, bounds = (torch.tensor([0, 15]), torch.tensor([3, 4])) if hash == "identity" else TABLES
    weight, scale, filter = ARRAY, None, None
    if hash == "mix":
        weight, scale = rng.choice(((ARRAY, None), (ARRAY.bfloat16(), None), (ARRAY.mul(50).to(torch.int8), SCALE)))
        filter = rng.choice((None, FILTER))
    chains = rng.choice((("bottom", "dots"), ("bottom", "crossed", "v", "w")))
    layers = zip(*(layer for name in chains for layer in CHAINS[name]))
    sign = hash == "mix" and rng.random() < 0.5
    return [
        *(weight, keys, bounds, 5, 5 if hash == "identity" else rng.choice((1, 3, 5, 7)), hash, sign, None),
        *(scale, filter, *map(list, layers), [5, 1, 3, 15][: len(chains)], [len(CHAINS[x]) for x in chains]),
        *(X[:, :4].contiguous(), IDS),
    ]


MAKERS = {
    "dot_interaction": _vectors,
    "dot_interaction_backward": lambda rng: [GRAD, *_vectors(rng)],
    "mlp": mlp,
}


OF_A_PLAN = ("make_plan", "run_plan", "drop_plan")


def test_every_operator_is_attacked():
    assert {*MAKERS, *OF_A_PLAN} == REFERENCE.keys()


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


@needs_kernels
def test_a_hostile_plan_is_refused_or_computed():
    operators = Plan(*(getattr(torch.ops.dlrm, name) for name in OF_A_PLAN))
    reference = Plan(*(REFERENCE[name] for name in OF_A_PLAN))
    succeeded, compared = attack(operators, reference, plan, CALLS, seed="plan 1", every=max(10, CALLS // 400))
    assert 0.1 * CALLS < succeeded < 0.9 * CALLS
    assert compared


@needs_kernels
def test_a_number_that_is_no_plan_is_refused():
    made = torch.ops.dlrm.make_plan(*plan(random.Random(0))[:-2])
    for number in (made + 1, -made, made * 0, made.repeat(2), made.int(), made[:0], made[0]):
        with pytest.raises(ValueError, match="plan: expected"):
            torch.ops.dlrm.run_plan(number, X[:, :4], IDS)
    torch.ops.dlrm.drop_plan(made + 1)  # of no plan: nothing happens
    torch.ops.dlrm.run_plan(made, X[:, :4], IDS)
    torch.ops.dlrm.drop_plan(made)
    with pytest.raises(ValueError, match="plan: expected one that make_plan returned, got"):
        torch.ops.dlrm.run_plan(made, X[:, :4], IDS)
