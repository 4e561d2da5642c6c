"""Splitting, regrouping, shuffling and reading ahead: no row lost, none twice."""

import threading

import numpy as np
import pytest

from data.batches import in_background, rebatch, shuffled, split_rows, vocabulary
from data.rows import Batch, Layout


def pieces(sizes):
    """Batches whose first category numbers the rows."""
    start = 0
    for size in sizes:
        sparse = np.zeros((size, 26), dtype=np.int64)
        sparse[:, 0] = np.arange(start, start + size)
        yield Batch(sparse[:, :13].astype(np.float32), sparse, np.arange(start, start + size, dtype=np.float32) % 2)
        start += size


def numbers(batches):
    return [row for batch in batches for row in batch.sparse[:, 0].tolist()]


@pytest.mark.parametrize("rows", [7, 8, 100, 137_085])
def test_split_is_five_one_one_sevenths_in_file_order(rows):
    train, validation, test = split_rows(rows)
    assert (train.start, train.stop, validation.stop, test.stop) == (0, validation.start, test.start, rows)
    assert len(train) == rows * 5 // 7
    assert min(map(len, (train, validation, test))) >= 1


def test_split_refuses_too_few_rows():
    with pytest.raises(ValueError, match="at least 7 rows"):
        split_rows(6)


@pytest.mark.parametrize("sizes", [[10], [3, 4, 3], [1] * 10, [0, 10, 0], [25, 1], [4, 4]])
@pytest.mark.parametrize("size", [1, 4, 10, 100])
def test_rebatch_keeps_rows_and_order(sizes, size):
    batches = list(rebatch(pieces(sizes), size))
    assert numbers(batches) == list(range(sum(sizes)))
    assert all(len(batch) == size for batch in batches[:-1])
    assert 0 < len(batches[-1]) <= size


def test_rebatch_of_unlabelled_rows():
    unlabelled = [Batch(b.dense, b.sparse, None) for b in pieces([3, 5])]
    assert [b.labels for b in rebatch(unlabelled, 4)] == [None, None]


def test_shuffle_permutes_whole_rows_within_runs():
    rows = list(shuffled(pieces([30, 30, 40]), np.random.default_rng(0), rows=50))
    order = numbers(rows)
    assert sorted(order[:50]) == list(range(50))
    assert sorted(order[50:]) == list(range(50, 100))
    assert order[:50] != list(range(50))
    for batch in rows:
        np.testing.assert_array_equal(batch.dense[:, 0], batch.sparse[:, 0])
        np.testing.assert_array_equal(batch.labels, batch.sparse[:, 0] % 2)
    assert order == numbers(shuffled(pieces([100]), np.random.default_rng(0), rows=50)), "pieces make no difference"
    assert order != numbers(shuffled(pieces([100]), np.random.default_rng(1), rows=50))


def test_background_yields_the_same_and_passes_errors_on():
    assert numbers(in_background(lambda: pieces([3, 4]))) == list(range(7))

    def broken():
        yield from pieces([3])
        raise ValueError("bad line")

    reader = in_background(broken)
    assert numbers([next(reader)]) == [0, 1, 2]
    with pytest.raises(ValueError, match="bad line"):
        next(reader)


def test_background_thread_ends_with_its_reader():
    before = threading.active_count()
    reader = in_background(lambda: pieces([1] * 1000))
    next(reader)
    assert threading.active_count() == before + 1
    reader.close()
    assert threading.active_count() == before


def test_vocabulary_is_the_distinct_ids_of_each_column():
    rng = np.random.default_rng(0)
    sparse = rng.integers(0, 50, (300, 26))
    batches = [Batch(None, sparse[a : a + 100], None) for a in (0, 100, 200)]
    for column, known in enumerate(vocabulary(batches, Layout().features)):
        assert known.tolist() == sorted(set(sparse[:, column].tolist()))
