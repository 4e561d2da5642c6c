"""Counts of ids, against collections.Counter."""

from collections import Counter

import numpy as np
import pytest

from data.counts import RARE_ID, CountMinSketch, Frequent, IdCounts, mix64
from data.schema import Layout
from tests.helpers.sources import records_of

HOTS = (3, 1, 2) + (1,) * 23
LAYOUTS = [Layout(), Layout(ids="i8"), Layout(hots=HOTS), Layout(ids="i8", hots=HOTS)]


def random_records(layout, rows, ids=200, seed=0):
    """Zipf-like, id 0 and RARE_ID among them, other ids as large as they can be."""
    rng = np.random.default_rng(seed)
    spread = rng.integers(2, 2**32 if layout.ids == "u4" else 2**63, ids, dtype=np.uint64)
    spread[:2] = 0, RARE_ID
    records = layout.records(rows)
    records["sparse"] = spread[(ids * rng.random((rows, layout.num_ids)) ** 3).astype(int)]
    return records


def columns_of(records, features):
    return [[int(x) for row in records["sparse"][:, ids] for x in row] for ids in features]


def count(records, features, sample=None, pieces=5):
    counts = IdCounts(features, sample)
    for part in np.array_split(records, pieces):
        counts.add(part)
    return counts


ONE = [slice(0, 1)]


def test_mix64_in_python_integers():
    def mixed(x):
        z = (x + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    values = [0, 1, 2**32 - 1, 2**63, 2**64 - 1, 123456789]
    assert mix64(np.array(values, np.uint64)).tolist() == [mixed(x) for x in values]


@pytest.mark.parametrize("merge_rows", [1, 700, 1 << 19])
@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_exact_counts(layout, merge_rows, monkeypatch):
    monkeypatch.setattr("data.counts.MERGE_ROWS", merge_rows)
    records = random_records(layout, 1000)
    counts = count(records, layout.features)
    for feature, column in enumerate(columns_of(records, layout.features)):
        expected = Counter(column)
        assert expected.pop(0) > 0  # a missing value is no id
        ids, times = counts.counts(feature)
        assert list(zip(ids.tolist(), times.tolist())) == sorted(expected.items(), key=lambda item: (-item[1], item[0]))
        assert counts.distinct(feature) == len(expected)
        sample, share = counts.sampled(feature)
        assert (sample.tolist(), share) == (times.tolist(), 1)


def test_records_may_change_after_they_were_counted():
    records = records_of([5, 5, 7])
    counts = IdCounts(ONE)
    counts.add(records)
    records["sparse"] = 9
    assert [some.tolist() for some in counts.counts(0)] == [[5, 7], [2, 1]]


def test_a_sample_of_many_ids(monkeypatch):
    monkeypatch.setattr("data.counts.MERGE_ROWS", 1 << 15)
    rng = np.random.default_rng(0)
    top = np.repeat(np.arange(1, 51), 300)
    ids = rng.permutation(np.concatenate([np.arange(1000, 301_000), rng.integers(1000, 301_000, 100_000), top]))
    counts = count(records_of(ids), ONE, 4096, pieces=50)
    expected = Counter(ids.tolist())
    assert counts.distinct(0) == pytest.approx(len(expected), rel=0.05)
    kept, times = counts.counts(0)
    assert len(kept) <= 2 * 4096 + 1024
    assert (np.diff(times) <= 0).all()
    sample, share = counts.sampled(0)
    in_sample = {i for i, h in zip(kept.tolist(), mix64(kept).tolist()) if h < share * 2**64}
    assert len(in_sample) == len(sample) > 2048
    assert in_sample == {i for i in expected if int(mix64(np.array([i]))[0]) < share * 2**64}
    exact = [(i, t) for i, t in zip(kept.tolist(), times.tolist()) if i in in_sample]
    assert exact == [(i, expected[i]) for i, _ in exact]
    assert sample.tolist() == [t for _, t in exact]
    assert kept[:50].tolist() == [i for i, _ in sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:50]]
    assert times[:50].tolist() == sorted(expected.values(), reverse=True)[:50]


@pytest.mark.parametrize(("ids", "exact"), [(4096, True), (8192, True), (8193, False)])
def test_a_sample_of_few_ids_is_all_of_them(ids, exact):
    counts = count(records_of(np.arange(1, ids + 1)), ONE, 4096)
    assert (counts.distinct(0) == ids) or not exact
    assert (counts.sampled(0)[1] == 1) == exact


@pytest.mark.parametrize("least", [1, 2, 5, 100])
@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_frequent_ids_stay(layout, least):
    records = random_records(layout, 600)
    changed = records.copy()
    Frequent(count(records, layout.features), least)(changed)
    for before, after in zip(columns_of(records, layout.features), columns_of(changed, layout.features)):
        times = Counter(before)
        assert after == [i if times[i] >= least or i == 0 else RARE_ID for i in before]
        assert 0 in after


def test_frequent_of_ids_it_has_not_seen():
    changed = records_of([3, 4, 2**32 - 1, 0, 1, 2])
    Frequent(count(records_of([4, 4, 3]), ONE), 2)(changed)
    assert changed["sparse"][:, 0].tolist() == [RARE_ID, 4, RARE_ID, 0, RARE_ID, RARE_ID]
    none = records_of([3, 0])
    Frequent(count(records_of([3]), ONE), 2)(none)
    assert none["sparse"][:, 0].tolist() == [RARE_ID, 0]


@pytest.mark.parametrize("least", [2, 3, 255])
@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_a_sketch_of_few_ids_counts_exactly(layout, least):
    sketch, seen = CountMinSketch(layout.features, least, 1 << 22), [Counter() for _ in range(26)]
    for seed in range(5):
        records = random_records(layout, 200, ids=60, seed=seed % 2)
        before = columns_of(records, layout.features)
        sketch(records)
        for times, ids, after in zip(seen, before, columns_of(records, layout.features)):
            times.update(ids)
            assert after == [i if times[i] >= least or i == 0 else RARE_ID for i in ids]


@pytest.mark.parametrize("bytes", [4, 64, 4096])
def test_a_full_sketch_never_calls_a_frequent_id_rare(bytes):
    sketch, seen = CountMinSketch(Layout().features[:3], 4, bytes), [Counter() for _ in range(3)]
    for seed in range(10):
        records = random_records(Layout(), 300, ids=400, seed=0)[seed * 30 :]
        before = columns_of(records, sketch.features)
        sketch(records)
        for times, ids, after in zip(seen, before, columns_of(records, sketch.features)):
            times.update(ids)
            assert all(got in (i, RARE_ID) for i, got in zip(ids, after))
            assert all(got == i for i, got in zip(ids, after) if times[i] >= 4 or i == 0)
    assert sketch.counters.max() == 4
    assert sketch.counters.nbytes == bytes


def test_features_of_a_sketch_do_not_share_counts():
    sketch, records = CountMinSketch(Layout().features, 2, 1 << 20), records_of([7])
    records["sparse"] = 7
    sketch(records)
    assert (records["sparse"] == RARE_ID).all()


def test_a_sketch_errs_rarely():
    """30,000 ids once each in 4 rows of 2**18 counters: hardly any shares all of its counters."""
    records = records_of(np.arange(2, 30_002))
    CountMinSketch(ONE, 2, 1 << 20)(records)
    for part in (records_of(np.arange(2, 30_002)),):
        sketch = CountMinSketch(ONE, 2, 1 << 20)
        for some in np.array_split(part, 100):
            sketch(some)
            assert (some["sparse"][:, 0] != RARE_ID).mean() < 0.01


@pytest.mark.parametrize("least", [0, 1, 256])
def test_a_sketch_of_impossible_counts(least):
    with pytest.raises(ValueError, match="expected 2 to 255"):
        CountMinSketch(ONE, least)
    with pytest.raises(ValueError, match="bytes: expected at least 4, got 3"):
        CountMinSketch(ONE, 2, 3)


def test_the_same_rows_give_the_same():
    results = []
    for pieces in (1, 7):
        records = random_records(Layout(), 3000, ids=2000)
        counts = count(records, Layout().features, 100, pieces)
        sketch = CountMinSketch(Layout().features, 3, 1 << 12)
        kept = records.copy()
        sketch(kept)
        results.append(([some.tolist() for some in counts.counts(3)], kept["sparse"].tolist()))
    assert results[0] == results[1]
