"""Any arguments: the kernels succeed or refuse, and touch no memory but their own (`make test-hostile` says so)."""

import os

import pytest
import torch

from robe.ops import REFERENCE
from robe.ops.layout import UpdateLists, unpack_bag_backward, unpack_lookup_backward
from tests.helpers.hostile import attack
from tests.helpers.kernels import needs_kernels
from tests.helpers.problems import RULES

CALLS = int(os.environ.get("HOSTILE_CALLS", "1000"))  # of each operator

KEYS, ROWS, FILTER = torch.tensor([0, 20]), torch.tensor([4, 6]), torch.tensor([-1, 5, 0])
IDS, VALUES, OFFSETS = torch.tensor([[1, 2], [3, 5]]), torch.tensor([1, 2, 3, 0, 3]), torch.tensor([0, 1, 3, 3, 5])
GRAD, WEIGHT, FACTORS = torch.ones(2, 2, 5), torch.arange(60.0), torch.rand(5, generator=torch.manual_seed(0))
SCALE = torch.full((7,), 0.5)


def _tables(rng):
    hash = rng.choice(("mix", "mix", "linear", "identity"))
    padding = rng.choice((None, 3))
    return [KEYS, ROWS, 5, rng.choice((3, 5, 8)), hash, rng.random() < 0.5, padding]


def _filter(rng, tables):
    return FILTER if tables[4] == "mix" and rng.random() < 0.5 else None


def _array(rng):
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    return WEIGHT.to(dtype)


def _narrow(rng, ids):
    return ids.int() if rng.random() < 0.3 else ids


def _bags(rng, weight, weighted):
    pooling = "sum" if weighted else rng.choice(("sum", "mean", "max"))
    factors = FACTORS.to(weight.dtype) if weighted or (pooling == "sum" and rng.random() < 0.5) else None
    return [_narrow(rng, VALUES), _narrow(rng, OFFSETS), factors, pooling]


def forward(kind, out=False):
    def make(rng):
        tables, weight, scale = _tables(rng), _array(rng), None
        if rng.random() < 0.2:
            weight, scale = torch.arange(60).to(torch.int8), SCALE
        ids = [_narrow(rng, IDS)]
        if kind == "bag":
            ids = _bags(rng, torch.ones(1) if scale is not None else weight, False)
        dtype = torch.float32 if scale is not None else weight.dtype
        into = [torch.zeros(2, 2, 5, dtype=dtype)] if out else []
        return [weight, *ids, *tables, scale, *into, _filter(rng, tables)]

    return make


def backward(kind, weighted=False):
    def make(rng):
        tables, weight = _tables(rng), _array(rng)
        ids = [_narrow(rng, IDS)] if kind == "lookup" else _bags(rng, weight, weighted)
        return [GRAD, weight, *ids, *tables, _filter(rng, tables)]

    return make


def update(rng):
    weight = _array(rng).clone()
    rule = rng.choice(tuple(RULES))
    calls = []
    for _ in range(rng.choice((0, 1, 2))):
        kind = rng.choice(("lookup", "bag"))
        _, _, *arguments = backward(kind)(rng)
        if kind == "bag" and arguments[2] is not None:
            arguments[2] = arguments[2].to(weight.dtype)
        call = (unpack_lookup_backward if kind == "lookup" else unpack_bag_backward)(arguments)
        calls.append((GRAD.to(weight.dtype), call))
    state = [torch.ones_like(weight) for _ in range(2 if rule == "adam" else 1)]
    return [weight, state, rule, RULES[rule], *UpdateLists.pack(calls)]


def _counting(rng):
    return [torch.ones(4, 9, dtype=torch.int32), _narrow(rng, IDS), KEYS]


def count(rng):
    labelled = rng.random() < 0.5
    more = [torch.zeros(4, 9, dtype=torch.int32), IDS > 2] if labelled else [None, None]
    return [*_counting(rng), *more]


MAKERS = {
    "lookup": forward("lookup"),
    "lookup_forward": forward("lookup"),
    "lookup_out": forward("lookup", out=True),
    "lookup_backward": backward("lookup"),
    "bag": forward("bag"),
    "bag_forward": forward("bag"),
    "bag_out": forward("bag", out=True),
    "bag_backward": backward("bag"),
    "bag_weights_backward": backward("bag", weighted=True),
    "update_": update,
    "sum_gradients": lambda rng: [(arguments := update(rng))[0], *arguments[4:]],
    "count_ids_": count,
    "id_counts": lambda rng: [_counting(rng)[0], torch.tensor([1, -5, 2**62])],
    "frequent_rows_": lambda rng: [*_counting(rng), rng.choice((0, 1, 2)), torch.zeros(5, dtype=torch.int64)],
    "observe_ids_": lambda rng: [*_counting(rng), FILTER, rng.choice((1, 2, 3))],
}
# Their results, or the order of them, are a kernel's own where ids share counters.
UNCOMPARED = {"count_ids_", "frequent_rows_", "observe_ids_"}


def test_every_operator_is_attacked():
    assert MAKERS.keys() == REFERENCE.keys()


@needs_kernels
@pytest.mark.parametrize("name", MAKERS)
def test_hostile_arguments_are_refused_or_computed(name):
    every = CALLS + 1 if name in UNCOMPARED else max(25, CALLS // 400)
    succeeded, compared = attack(
        getattr(torch.ops.robe, name), REFERENCE[name], MAKERS[name], CALLS, seed=f"{name} 1", every=every
    )
    assert 0.1 * CALLS < succeeded < 0.9 * CALLS
    assert compared or name in UNCOMPARED
