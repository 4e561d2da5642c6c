"""How often ids occur: which are frequent enough to be kept, and what a column's ids are like."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from data.rows import feature_ids

RARE = 1  # the id that all rare ids of a feature become
# Most frequent ids that a sample keeps whatever their hash; one may have been dropped before it was frequent.
TOP_IDS = 1024
_MERGE_ROWS = 1 << 19  # rows whose ids are counted before they are added to the counts so far


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit values that spreads them evenly (the finalizer of Steele et al.'s SplitMix)."""
    z = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class IdCounts:
    """Counts of each feature's ids; 0, which stands for a missing value, is none.

    Without ``sample`` exact, and memory grows with the number of different ids, 16 bytes or more each. With it, exact
    counts of a random sample of about so many different ids of each feature (of all, if there are no more) and of
    the most frequent ones: ids are kept whose hash lies below a threshold, which falls as their number grows, so that
    an id in the sample has been counted since it was first seen.

    Args:
        features: the ids of each feature in a record.
        sample: different ids to keep of each feature.
    """

    def __init__(self, features: Sequence[slice], sample: int | None = None):
        self.features, self.sample = list(features), sample
        self._counts = [_frame(np.empty(0, np.uint64))] * len(self.features)
        self._shares = [1.0] * len(self.features)
        self._pending: list[np.ndarray] = []

    def add(self, records: np.ndarray) -> None:
        """Count the ids of records."""
        self._pending.append(np.ascontiguousarray(records["sparse"]))
        if sum(map(len, self._pending)) >= _MERGE_ROWS:
            self._merge()

    def counts(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids kept of a feature, as unsigned 64-bit values, and how often each occurred, most often first."""
        self._merge()
        frame = self._counts[feature].sort("count", "id", descending=[True, False])
        return frame["id"].to_numpy(), frame["count"].to_numpy()

    def sampled(self, feature: int) -> tuple[np.ndarray, float]:
        """The counts of the sampled ids of a feature, most often first, and the share of all its ids that they are."""
        ids, counts = self.counts(feature)
        share = self._shares[feature]
        return counts[_below(ids, share)], share

    def distinct(self, feature: int) -> int:
        """How many different ids a feature has: exact below ``sample``, else with an error of 1/sqrt(sample) or so."""
        counts, share = self.sampled(feature)
        return round(len(counts) / share)

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
        counts = counts.sort("count", "id", descending=[True, False])  # also so that the same rows give the same
        ids = counts["id"].to_numpy()
        while _below(ids, self._shares[feature]).sum() > self.sample:
            self._shares[feature] /= 2
        top = np.arange(len(ids)) < TOP_IDS
        return counts.filter(pl.Series(_below(ids, self._shares[feature]) | top))


def _frame(ids: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({"id": ids, "count": np.ones(len(ids), np.int64)})


def _below(ids: np.ndarray, share: float) -> np.ndarray:
    return mix64(ids) <= np.uint64(min(int(share * 2**64), 2**64 - 1))


class Frequent:
    """Ids that occurred often enough, exactly.

    Args:
        counts: of all rows.
        least: how often.
    """

    def __init__(self, counts: IdCounts, least: int):
        self.features = counts.features
        self._known = []
        for feature in range(len(self.features)):
            ids, times = counts.counts(feature)
            self._known.append(np.sort(ids[times >= least]))

    def __call__(self, records: np.ndarray) -> None:
        """Have the other ids become RARE, in place; 0, which stands for a missing value, stays."""
        for columns, known in zip(self.features, self._known):
            ids = records["sparse"][:, columns]
            wide = ids.astype(np.uint64)
            place = np.searchsorted(known, wide)
            there = place < len(known)
            there[there] = known[place[there]] == wide[there]
            ids[~there & (wide != 0)] = RARE


class CountMinSketch:
    """Which ids have occurred often enough so far, in bounded memory (Cormode and Muthukrishnan 2005).

    Counts are never too low; they are too high for an id that shares all its counters with others, which becomes
    likely once there are more different ids than counters in a row. Counters have 8 bits and stop at ``least``, and
    only the lowest ones of an id are raised (Estan and Varghese 2002).

    Args:
        features: the ids of each feature in a record.
        least: how often, 2 to 255.
        bytes: of the counters.
    """

    DEPTH = 4

    def __init__(self, features: Sequence[slice], least: int, bytes: int = 1 << 28):
        if not 2 <= least <= 255:
            raise ValueError(f"min_count: with a sketch expected 2 to 255, got {least}")
        self.features, self.least = list(features), least
        self.counters = np.zeros((self.DEPTH, bytes // self.DEPTH), np.uint8)

    def __call__(self, records: np.ndarray) -> None:
        """Count the ids of records, then have those that are still rare become RARE, in place; 0 stays."""
        for feature, (columns, ids) in enumerate(zip(self.features, feature_ids(records, self.features))):
            different, inverse, times = np.unique(ids, return_inverse=True, return_counts=True)
            counts = self._count(mix64(different.astype(np.uint64) ^ mix64(np.array([feature]))), times)
            kept = (counts >= self.least) | (different == 0)
            records["sparse"][:, columns] = np.where(kept, different, RARE)[inverse].reshape(len(records), -1)

    def _count(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        # One hash gives all places: first + row * second, as Kirsch and Mitzenmacher 2006.
        width = np.uint64(self.counters.shape[1])
        first, second = keys & np.uint64(0xFFFFFFFF), keys >> np.uint64(32) | np.uint64(1)
        places = [((first + np.uint64(row) * second) % width).astype(np.int64) for row in range(self.DEPTH)]
        before = np.min([self.counters[row, place] for row, place in enumerate(places)], axis=0)
        counts = np.minimum(before + times, self.least).astype(np.uint8)
        for row, place in enumerate(places):
            np.maximum.at(self.counters[row], place, counts)
        return counts
