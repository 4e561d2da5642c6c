"""Ids and keys for tests of admissions, and their row hashes in Python's own integers."""

import torch

from robe.hashing import table_key

GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


KEYS = torch.tensor([table_key(7, k) for k in range(3)])


def mix64(x):
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK
    return x ^ (x >> 31)


def place(key, x, words):
    """The word of an id in the filter, and its bits there."""
    row = mix64((key + x * GOLDEN) & MASK)
    return (row * words) >> 64, 1 << row % 64 | 1 << row // 64 % 64 | 1 << row // 4096 % 64


def ids_of(*shape, seed=0, top=10**6):
    """Skewed ids, some of them negative or huge."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(shape, generator=generator) ** 4 * top).long()
    return ids.where(ids % 11 > 0, -(ids << 40))


def rows_of(ids, keys):
    """Python's row hashes, in order."""
    pairs = zip(keys.expand_as(ids).flatten().tolist(), ids.flatten().tolist())
    return [mix64((key + x * GOLDEN) & MASK) for key, x in pairs]
