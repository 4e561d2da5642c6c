"""Rows in memory for runs: all that dlrm.training asks of data, without data."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np

RANGES = {"train": range(60), "validation": range(60, 80), "test": range(80, 100)}


class MemoryRows:
    """100 rows whose labels follow the first id; satisfies RunData."""

    opened: ClassVar[list] = []  # the arguments of every call
    one_label: ClassVar[dict] = {}  # of the parts whose rows all have the same

    def __init__(self, path, eval_path=None, ranges=None):
        self.opened.append((path, eval_path, ranges))
        self.ranges = RANGES if ranges is None else ranges
        self.hots = None
        self.inputs = {"dense": "normal", "num_dense": 13}
        rng = np.random.default_rng(0)
        self.dense = rng.normal(size=(100, 13)).astype(np.float32)
        self.sparse = rng.integers(0, 6, (100, 26)) + 10 * np.arange(26)
        self.labels = (self.sparse[:, 0] % 2).astype(np.float32)
        for part, label in self.one_label.items():
            self.labels[RANGES[part].start : RANGES[part].stop] = label

    def batch(self, places):
        return MemoryBatch(dense=self.dense[places], sparse=self.sparse[places], labels=self.labels[places])

    def count_ids(self):
        return [np.unique(column) for column in self.sparse[self.ranges["train"].start : self.ranges["train"].stop].T]

    def read_training(self, description):
        yield self.batch(np.arange(60))

    def epoch(self, epoch, start, *, batch_size, seed, rank, world_size):
        order = np.random.default_rng([seed, epoch]).permutation(60)
        for first in range(start * batch_size, 60, batch_size):
            yield self.batch(np.array_split(order[first : first + batch_size], world_size)[rank])

    def read_part(self, part, *, batch_size, rank, world_size):
        yield self.batch(np.array_split(np.array(self.ranges[part]), world_size)[rank])


class MemoryBatch(SimpleNamespace):
    def __len__(self):
        return len(self.dense)
