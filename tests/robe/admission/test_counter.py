"""Counts of ids in bounded memory."""

import math
from collections import Counter

import pytest
import torch

import robe
from tests.helpers.admitted import KEYS, ids_of


def test_counts_are_exact_where_there_is_room():
    counter, want = robe.IdCounter(1 << 22), Counter()
    for seed in range(5):
        ids = ids_of(400, 3, seed=seed, top=300)
        counter.add(ids, KEYS)
        want.update((k, x) for row in ids.tolist() for k, x in enumerate(row))
    tables, values = map(torch.tensor, zip(*want))
    assert counter.count(values, KEYS[tables]).tolist() == list(want.values())
    assert not counter.count(torch.tensor([12345, -12345]), KEYS[0]).any()


def test_counts_are_never_too_low_where_there_is_none():
    counter, want = robe.IdCounter(1024), Counter()
    for seed in range(5):
        ids = ids_of(400, seed=seed, top=300)
        counter.add(ids, KEYS[0])
        want.update(ids.tolist())
    got = counter.count(torch.tensor(list(want)), KEYS[0])
    assert (got >= torch.tensor(list(want.values()))).all()
    assert (got > torch.tensor(list(want.values()))).any()


def test_counters_refuse_other_ids():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    counter = robe.IdCounter(1024)
    for given, keys in ((ids.float(), KEYS), (ids, KEYS[:2])):
        with pytest.raises(ValueError, match="expected"):
            counter.add(given, keys)
    assert not counter.counters.any()


def test_decay():
    counter = robe.IdCounter(1 << 16)
    counter.add(torch.tensor([5] * 9 + [6]), KEYS[0])
    counter.decay(0.5)
    assert counter.count(torch.tensor([5, 6]), KEYS[0]).tolist() == [4, 0]
    for factor in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="factor: expected 0 to 1, got"):
            counter.decay(factor)
