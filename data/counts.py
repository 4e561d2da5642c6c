"""Counts of ids: which ids are frequent enough to keep, and how ids are distributed."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from data.rows import feature_ids

RARE_ID = 1  # stands for all rare ids of a feature
# The most frequent ids, which a sample keeps whatever their hash. One may have been dropped before it was frequent.
TOP_IDS = 1024
MERGE_ROWS = 1 << 19  # rows to collect before their ids are added to the counts


def mix64(x: np.ndarray) -> np.ndarray:
    """Map 64-bit values one to one and spread them evenly (the finalizer of SplitMix, Steele et al. 2014)."""
    z = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class IdCounts:
    """Counts of each feature's ids. Id 0, a missing value, is not counted.

    Without ``sample``, all ids are counted, and memory grows by 16 bytes or more for each distinct id. With it, only a
    random sample of the ids is counted, and the most frequent ones. These counts are exact too: the sample has the ids
    whose hash lies below a threshold, which falls as their number grows, so an id in the sample has been counted since
    it was first seen.

    Args:
        features: the columns of each feature in a record (`data.schema.Layout.features`).
        sample: about how many distinct ids of each feature to keep; None: all.
    """

    def __init__(self, features: Sequence[slice], sample: int | None = None):
        self.features, self.sample = list(features), sample
        self._counts = [_frame(np.empty(0, np.uint64))] * len(self.features)
        self._fractions = [1.0] * len(self.features)
        self._pending: list[np.ndarray] = []

    def add(self, records: np.ndarray) -> None:
        """Count the ids of records, which may change afterwards."""
        self._pending.append(np.ascontiguousarray(records["sparse"]))
        if sum(map(len, self._pending)) >= MERGE_ROWS:
            self._merge()

    def counts(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a feature that were kept, as unsigned 64-bit values, and their counts, highest first."""
        self._merge()
        frame = self._counts[feature].sort("count", "id", descending=[True, False])
        return frame["id"].to_numpy(), frame["count"].to_numpy()

    def sampled(self, feature: int) -> tuple[np.ndarray, float]:
        """Return the counts of a feature's sampled ids, highest first, and the fraction of its ids in the sample."""
        ids, counts = self.counts(feature)
        fraction = self._fractions[feature]
        return counts[_below(ids, fraction)], fraction

    def distinct(self, feature: int) -> int:
        """Return a feature's number of distinct ids: exact up to ``sample``, above with an error of 1/sqrt(sample)."""
        counts, fraction = self.sampled(feature)
        return round(len(counts) / fraction)

    def _merge(self) -> None:
        if not self._pending:
            return
        sparse = np.concatenate(self._pending)
        self._pending = []
        for feature, columns in enumerate(self.features):
            ids = sparse[:, columns].reshape(-1)
            new = _frame(ids[ids != 0].astype(np.uint64))
            both = pl.concat([self._counts[feature], new.group_by("id").agg(pl.col("count").sum())])
            counts = both.group_by("id").agg(pl.col("count").sum())
            if self.sample is not None and len(counts) > 2 * self.sample:
                counts = self._thin_out(counts, feature)
            self._counts[feature] = counts

    def _thin_out(self, counts: pl.DataFrame, feature: int) -> pl.DataFrame:
        assert self.sample is not None
        # By id too: the same rows then give the same sample.
        counts = counts.sort("count", "id", descending=[True, False])
        ids = counts["id"].to_numpy()
        while _below(ids, self._fractions[feature]).sum() > self.sample:
            self._fractions[feature] /= 2
        top = np.arange(len(ids)) < TOP_IDS
        return counts.filter(pl.Series(_below(ids, self._fractions[feature]) | top))


def _frame(ids: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({"id": ids, "count": np.ones(len(ids), np.int64)})


def _below(ids: np.ndarray, fraction: float) -> np.ndarray:
    return mix64(ids) <= np.uint64(min(int(fraction * 2**64), 2**64 - 1))


class Frequent:
    """Replaces rare ids, by exact counts.

    Args:
        counts: of all rows, without a sample.
        least: how often an id has to occur to be kept.
    """

    def __init__(self, counts: IdCounts, least: int):
        self.features = counts.features
        self._known = []
        for feature in range(len(self.features)):
            ids, times = counts.counts(feature)
            self._known.append(np.sort(ids[times >= least]))

    def __call__(self, records: np.ndarray) -> None:
        """Set rare ids to RARE_ID, in place. Id 0, a missing value, stays."""
        for columns, known in zip(self.features, self._known):
            ids = records["sparse"][:, columns]
            wide = ids.astype(np.uint64)
            place = np.searchsorted(known, wide)
            there = place < len(known)
            there[there] = known[place[there]] == wide[there]
            ids[~there & (wide != 0)] = RARE_ID


class CountMinSketch:
    """Replaces ids that have been rare so far, in bounded memory: a count-min sketch (Cormode and Muthukrishnan 2005).

    An id has DEPTH counters, which it shares with others; the lowest is its count. A count is never too low. It is too
    high if an id shares all its counters, which becomes likely once there are more distinct ids than a quarter of the
    counters. Counters have 8 bits and stop at ``least``; only the lowest ones of an id are raised (Estan and Varghese
    2002).

    Args:
        features: the columns of each feature in a record (`data.schema.Layout.features`).
        least: how often an id has to occur to be kept, 2 to 255.
        bytes: memory of the counters.

    Raises:
        ValueError: ``least`` or ``bytes`` is out of range.
    """

    DEPTH = 4

    def __init__(self, features: Sequence[slice], least: int, bytes: int = 1 << 28):
        if not 2 <= least <= 255:
            raise ValueError(f"min_count: with a sketch expected 2 to 255, got {least}")
        if bytes < self.DEPTH:
            raise ValueError(f"bytes: expected at least {self.DEPTH}, got {bytes}")
        self.features, self.least = list(features), least
        self.counters = np.zeros((self.DEPTH, bytes // self.DEPTH), np.uint8)

    def __call__(self, records: np.ndarray) -> None:
        """Count the ids of records, then set those that are still rare to RARE_ID, in place. Id 0 stays."""
        for feature, (columns, ids) in enumerate(zip(self.features, feature_ids(records, self.features))):
            different, inverse, times = np.unique(ids, return_inverse=True, return_counts=True)
            counts = self._count(mix64(different.astype(np.uint64) ^ mix64(np.array([feature]))), times)
            kept = (counts >= self.least) | (different == 0)
            records["sparse"][:, columns] = np.where(kept, different, RARE_ID)[inverse].reshape(len(records), -1)

    def _count(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        # One hash gives all places: first + i * second (Kirsch and Mitzenmacher 2006).
        width = np.uint64(self.counters.shape[1])
        first, second = keys & np.uint64(0xFFFFFFFF), keys >> np.uint64(32) | np.uint64(1)
        places = [((first + np.uint64(i) * second) % width).astype(np.int64) for i in range(self.DEPTH)]
        before = np.min([self.counters[i, place] for i, place in enumerate(places)], axis=0)
        counts = np.minimum(before + times, self.least).astype(np.uint8)
        for i, place in enumerate(places):
            np.maximum.at(self.counters[i], place, counts)
        return counts
