"""Splitting, regrouping, shuffling and reading ahead: no row lost, none twice."""

import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import data.batches
from data.batches import epoch_batches, in_background, rebatch, share, shuffled, split_rows, vocabulary
from data.formats.criteo_tsv import CriteoTSV
from data.rows import Batch
from data.schema import DataError, Layout
from data.sources import Several, SeveralRandomAccess
from tests.helpers.criteo import make_lines, write_lines
from tests.helpers.sources import Numbered


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


# -- epoch_batches ----------------------------------------------------------------------------------------------------


def numbered_log(path, first, rows):
    """A log whose ids are the numbers of its rows."""
    lines = [line.rsplit("\t", 26)[0] for line in make_lines(rows)]
    return CriteoTSV(write_lines(path, [line + f"\t{first + i:x}" * 26 for i, line in enumerate(lines)]))


def make_source(kind, rows, folder):
    cut = rows // 3
    return {
        "random access": lambda: Numbered(rows),
        "several of random access": lambda: SeveralRandomAccess(
            Path("all"), [Numbered(cut), Numbered(0), Numbered(rows - cut, cut)]
        ),
        "log": lambda: numbered_log(folder / "log", 0, rows),
        "logs": lambda: Several(
            folder, [numbered_log(folder / "a", 0, cut), numbered_log(folder / "b", cut, rows - cut)]
        ),
        "log and random access": lambda: Several(
            folder, [numbered_log(folder / "a", 0, cut), Numbered(rows - cut, cut)]
        ),
    }[kind]()


KINDS = ["random access", "several of random access", "log", "logs", "log and random access"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "batch_size"), [(range(0, 600), 64), (range(37, 600), 64), (range(5, 581), 64), (range(100, 130), 64),
                             (range(3, 400), 1), (range(0, 512), 256), (range(0, 600), 300), (range(9, 10), 7)]
)  # fmt: skip
@pytest.mark.parametrize("mixed_rows", [1, 200, 1 << 14])
def test_every_row_once_an_epoch(tmp_path, kind, rows, batch_size, mixed_rows):
    source = make_source(kind, 600, tmp_path)
    batches = list(epoch_batches(source, rows, batch_size, mixed_rows=mixed_rows))
    assert sorted(numbers(batches)) == list(rows)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (-(-len(rows) // batch_size) - 1)
    assert 0 < len(batches[-1]) <= batch_size
    for batch in batches:
        assert (batch.sparse == batch.sparse[:, :1]).all(), "rows stay whole"


@pytest.mark.parametrize(("blocks", "extra"), [(64, 0), (128, 0), (64, 1), (65, 0), (1, 0)])
def test_windows_that_are_just_full(blocks, extra):
    rows = blocks * 256 + extra
    batches = list(epoch_batches(Numbered(rows), range(rows), 64))
    assert sorted(numbers(batches)) == list(range(rows))
    assert {len(batch) for batch in batches} == {64} | ({extra} - {0})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed_rows", [1, 1 << 14])
def test_no_rows_no_batches(tmp_path, kind, mixed_rows):
    assert list(epoch_batches(make_source(kind, 9, tmp_path), range(4, 4), 2, mixed_rows=mixed_rows)) == []


@pytest.mark.parametrize("kind", ["several of random access", "logs"])
def test_the_order_is_that_of_seed_and_epoch(tmp_path, kind):
    source = make_source(kind, 900, tmp_path)

    def order(**options):
        return numbers(epoch_batches(source, range(900), 100, **options))

    orders = [order(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert [order(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)] == orders
    assert order() == orders[0]


def test_values_are_those_of_the_rows():
    for batch in epoch_batches(Numbered(2000), range(2000), 30):
        np.testing.assert_array_equal(batch.labels, batch.sparse[:, 0] % 2)
        np.testing.assert_allclose(batch.dense[:, 12], np.log1p(batch.sparse[:, 0] % 1000), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [16, 100, 5000])
@pytest.mark.parametrize("start", [0, 11])
def test_without_mixing_a_batch_is_a_run_of_rows(batch_size, start):
    rows = range(start, 20_011)
    batches = list(epoch_batches(Numbered(20_011), rows, batch_size, mixed_rows=1))
    for batch in batches:
        first = batch.sparse[0, 0]
        assert numbers([batch]) == list(range(first, first + len(batch)))
        assert (first - start) % batch_size == 0
    firsts = [int(batch.sparse[0, 0]) for batch in batches]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("batch_size", [64, 256, 1000, 4000])
def test_rows_of_a_batch_come_from_all_over(batch_size):
    rows = 200_000
    batches = list(epoch_batches(Numbered(rows), range(rows), batch_size))
    for batch in batches[: 12 * 16_000 // batch_size - 1]:  # a window of fewer blocks comes last
        got = np.sort(batch.sparse[:, 0])
        places = len(np.unique(got // max(256, batch_size)))
        assert places >= min(0.4 * batch_size, 0.6 * (1 << 14) / max(256, batch_size))
        assert got[-1] - got[0] > rows / 3
    first_of = [batch.sparse[0, 0] for batch in batches]
    assert abs(np.corrcoef(first_of, np.arange(len(first_of)))[0, 1]) < 0.35


def test_a_window_reads_blocks_of_whole_batches():
    source = Numbered(10_000)
    list(epoch_batches(source, range(10_000), 100))
    assert sorted(source.calls) == [(start, 200) for start in range(0, 10_000, 200)]


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("kind", ["random access", "log"])
def test_the_parts_of_the_processes_make_the_batch(tmp_path, world_size, kind):
    source = make_source(kind, 401, tmp_path)
    whole = list(epoch_batches(source, range(401), 50, 3, 2))
    of_rank = [list(epoch_batches(source, range(401), 50, 3, 2, rank, world_size)) for rank in range(world_size)]
    for batch, *parts in zip(whole, *of_rank, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        joined = Batch.concatenate(parts)
        np.testing.assert_array_equal(joined.sparse, batch.sparse)
        np.testing.assert_array_equal(joined.dense, batch.dense)
        np.testing.assert_array_equal(joined.labels, batch.labels)


@pytest.mark.parametrize("mixed_rows", [1, 1 << 14])
def test_errors_of_the_source_reach_the_consumer(tmp_path, mixed_rows):
    with pytest.raises(DataError, match="row 70 is broken"):
        list(epoch_batches(Numbered(100, fail_at=70), range(100), 10, mixed_rows=mixed_rows))
    log = CriteoTSV(write_lines(tmp_path / "rows", [*make_lines(30), "x"]))
    with pytest.raises(DataError, match="rows:31: expected 40"):
        list(epoch_batches(log, range(31), 10))


@pytest.mark.parametrize("mixed_rows", [1, 1 << 14])
@pytest.mark.parametrize("left", ["closed", "dropped"])
def test_no_thread_stays_behind(mixed_rows, left):
    before = threading.active_count()
    batches = epoch_batches(Numbered(10**6), range(10**6), 10, mixed_rows=mixed_rows)
    next(batches)
    assert threading.active_count() == before + 1
    if left == "closed":
        batches.close()
    del batches
    assert threading.active_count() == before


def test_reading_ahead_is_bounded():
    source = Numbered(10**6)
    batches = epoch_batches(source, range(10**6), 100, mixed_rows=1)
    next(batches)
    time.sleep(0.2)
    read = sum(rows for _, rows in source.calls)
    assert 2000 < read <= 7 * 2048, "some, not all"
    batches.close()


@pytest.mark.parametrize("mixed_rows", [1, 1 << 14])
def test_memory_does_not_grow_with_the_rows(mixed_rows):
    rows = 10**9
    tracemalloc.start()
    batches = epoch_batches(Numbered(rows), range(rows), 2048, mixed_rows=mixed_rows)
    got = np.concatenate([next(batches).sparse[:, 0] for _ in range(20)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batches.close()
    assert peak < 100e6
    assert np.ptp(got) > rows / 2


def test_streams_are_shuffled_in_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(data.batches, "SHUFFLE_ROWS", 50)
    monkeypatch.setattr(data.batches.shuffled, "__defaults__", (50,))
    source = numbered_log(tmp_path / "log", 0, 120)
    order = numbers(epoch_batches(source, range(10, 115), 20))
    for start, stop in ((10, 60), (60, 110), (110, 115)):
        run = order[start - 10 : stop - 10]
        assert sorted(run) == list(range(start, stop))
        assert len(run) == 5 or run != sorted(run)


# -- From a batch on --------------------------------------------------------------------------------------------------


def rows_of(batches):
    return [batch.sparse[:, 0].tolist() for batch in batches]


def some_starts(count):
    """All, where they are few; else those at the beginning, at the end and about powers of 2, where windows begin."""
    near = {2**k + d for k in range(20) for d in (-1, 0, 1)}
    return [k for k in range(count + 2) if count < 40 or k < 2 or k > count - 3 or (k in near and k % 3)]


@pytest.mark.parametrize("kind", ["random access", "several of random access"])
@pytest.mark.parametrize(
    ("rows", "batch_size"),
    [(range(3, 120), 1), (range(0, 600), 7), (range(37, 600), 64), (range(0, 512), 256), (range(5, 4001), 300),
     (range(0, 20), 30), (range(0, 5000), 100), (range(0, 4096), 2048), (range(7, 7), 4)],
)  # fmt: skip
@pytest.mark.parametrize("mixed_rows", [1, 600, None])
def test_a_later_start_leaves_out_batches_and_changes_none(tmp_path, kind, rows, batch_size, mixed_rows):
    source = make_source(kind, rows.stop, tmp_path)
    options = {"seed": 5, "epoch": 2} | ({} if mixed_rows is None else {"mixed_rows": mixed_rows})
    whole = rows_of(epoch_batches(source, rows, batch_size, **options))
    for start in some_starts(len(whole)):
        assert rows_of(epoch_batches(source, rows, batch_size, start=start, **options)) == whole[start:], start


@pytest.mark.parametrize("kind", ["log", "log and random access"])
@pytest.mark.parametrize("batch_size", [1, 16, 100, 300])
def test_a_later_start_of_streams(tmp_path, kind, batch_size):
    source = make_source(kind, 200, tmp_path)
    whole = rows_of(epoch_batches(source, range(9, 200), batch_size, 1, 2))
    for start in some_starts(len(whole)) if batch_size > 1 else (0, 1, 100, 190, 191):
        assert rows_of(epoch_batches(source, range(9, 200), batch_size, 1, 2, start=start)) == whole[start:]


@pytest.mark.parametrize("mixed_rows", [1, 600])
@pytest.mark.parametrize("start", [0, 1, 5, 11, 12])
def test_a_later_start_of_each_process(mixed_rows, start):
    def of(rank, start):
        return rows_of(epoch_batches(Numbered(1111), range(1111), 100, 3, 1, rank, 3, mixed_rows, start))

    for rank in range(3):
        assert of(rank, start) == of(rank, 0)[start:]


def test_what_a_later_start_leaves_out_is_not_read():
    rows, size = 50_000, 100
    for start in (0, 1, 7, 100, 499, 500):
        source = Numbered(rows)
        list(epoch_batches(source, range(rows), size, mixed_rows=1, start=start))
        assert sum(count for _, count in source.calls) == rows - size * start
    window = (1 << 14) // 200 * 200  # blocks of two batches
    for start in (0, 1, 161, 162, 163, 350):
        source = Numbered(rows)
        list(epoch_batches(source, range(rows), size, start=start))
        assert sum(count for _, count in source.calls) == rows - size * start // window * window


@pytest.mark.parametrize("rows", [range(0, 0), range(5, 6), range(10, 13), range(3, 103)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 100])
def test_shares_are_a_partition_in_order(rows, world_size):
    parts = [share(rows, rank, world_size) for rank in range(world_size)]
    assert [row for part in parts for row in part] == list(rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
