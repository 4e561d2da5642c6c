"""Batches: rows split, shuffled in bounded memory, shared among processes, and read ahead in the background."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from data.rows import Batch, to_batch
from data.sources import RandomAccess, Source

# Rows of a stream that are shuffled together: 130,000 rows are 35 MB as arrays. Fewer rows are shuffled as a whole.
SHUFFLE_ROWS = 1 << 17
# Rows of blocks from all over the data that are mixed: 2.6 MB of records, which stay in a core's cache.
MIXED_ROWS = 1 << 14
_BLOCK_ROWS = 256
_ROWS_AT_ONCE = 1 << 11  # that one thread hands to the other, where batches are smaller


def split_rows(rows: int) -> tuple[range, range, range]:
    """Split rows in their order into 5/7, 1/7 and 1/7, which splits Kaggle's 7 days by day.

    Args:
        rows: how many there are.

    Returns:
        the rows for training, validation and test.

    Raises:
        ValueError: there are fewer than 7 rows, so a part would be empty.
    """
    if rows < 7:
        raise ValueError(f"expected at least 7 rows to split 5:1:1 into train, validation and test, got {rows}")
    first, second = rows * 5 // 7, rows * 6 // 7
    return range(0, first), range(first, second), range(second, rows)


def rebatch(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield the same rows in batches of ``size`` rows; the last one may be smaller."""
    pending: list[Batch] = []
    rows = 0
    for batch in batches:
        pending.append(batch)
        rows += len(batch)
        if rows < size:
            continue
        whole = Batch.concatenate(pending)
        cut = rows - rows % size
        for start in range(0, cut, size):
            yield whole[start : start + size]
        pending = [whole[cut:]]
        rows -= cut
    if rows:
        yield Batch.concatenate(pending)


def shuffled(batches: Iterable[Batch], generator: np.random.Generator, rows: int = SHUFFLE_ROWS) -> Iterator[Batch]:
    """Yield the same rows, permuted within runs of ``rows`` rows so that memory stays bounded."""
    for run in rebatch(batches, rows):
        yield run[generator.permutation(len(run))]


def epoch_batches(
    source: Source,
    rows: range,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    mixed_rows: int = MIXED_ROWS,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield the training batches of an epoch, in an order that depends on seed and epoch only.

    Rows with random access are shuffled in two steps, without memory for each row. First the rows are cut into blocks
    of whole batches, and the blocks are permuted over the whole range. Then the rows of as many blocks as make
    ``mixed_rows`` are permuted among each other. If ``mixed_rows`` is at most ``batch_size``, the second step is left
    out: a batch is a run of consecutive rows, as in MLPerf's reference. Other sources are read in their order and
    permuted within runs of SHUFFLE_ROWS. A thread reads ahead.

    Args:
        source: of the rows.
        rows: its training rows.
        batch_size: rows of a batch in all processes together. The last batch may be smaller.
        seed: other seeds give other orders.
        epoch: other epochs have other orders.
        rank: of this process, which gets its share of every batch.
        world_size: the number of processes.
        mixed_rows: rows that are permuted among each other.
        start: batches to leave out; those that follow are the same as without. With random access they are not read,
            except for blocks whose rows are mixed with later ones.

    Raises:
        DataError: a row can't be read.
    """
    generator = np.random.default_rng([seed, epoch])
    if isinstance(source, RandomAccess):
        several = in_background(lambda: _mixed_blocks(source, rows, batch_size, generator, mixed_rows, start), 4)
        batches: Iterable[Batch] = (
            some[first : first + batch_size] for some in several for first in range(0, len(some), batch_size)
        )
    else:
        runs = in_background(lambda: shuffled(source.read(rows.start, rows.stop), generator))
        batches = islice(rebatch(runs, batch_size), start, None)
    for batch in batches:
        if world_size > 1:
            own = share(range(len(batch)), rank, world_size)
            batch = batch[own.start : own.stop]
        yield batch


def _mixed_blocks(
    source: RandomAccess, rows: range, batch_size: int, generator: np.random.Generator, mixed_rows: int, skipped: int
) -> Iterator[Batch]:
    """Yield whole batches after the skipped ones, one or several at a time. A smaller block stays at the end."""
    several = batch_size * max(_ROWS_AT_ONCE // batch_size, 1)
    mixed = mixed_rows > batch_size
    size = batch_size * max(_BLOCK_ROWS // batch_size, 1) if mixed else batch_size
    whole = len(rows) // size
    starts = generator.permutation(whole) * size + rows.start
    if len(rows) % size:
        starts = np.append(starts, rows.start + whole * size)
    blocks = max((mixed_rows if mixed else several) // size, 1)
    if not mixed:  # a block is a batch
        starts, skipped = starts[skipped:], 0
    window = source.layout.records(min(blocks * size, len(rows)))
    order = generator.permutation(len(window))  # one for all windows of the epoch: each has other blocks
    skipped_windows, skipped = divmod(skipped, blocks * size // batch_size)
    for first in range(skipped_windows * blocks, len(starts), blocks):
        filled = 0
        for start in starts[first : first + blocks].tolist():
            block = window[filled : filled + min(size, rows.stop - start)]
            source.fill(block, start)
            filled += len(block)
        if mixed:
            # As bytes: numpy copies structures field by field.
            items = window[:filled].view(np.uint8).reshape(filled, -1)
            if filled < len(window):
                order = generator.permutation(filled)
            for at in range(skipped * batch_size, filled, several):
                yield to_batch(items.take(order[at : at + several], axis=0).view(window.dtype).reshape(-1))
        else:
            yield to_batch(window[:filled])
        skipped = 0


def share(rows: range, rank: int, world_size: int) -> range:
    """Return a process's share of consecutive rows. The shares differ by one row at most.

    Args:
        rows: to be shared.
        rank: of the process.
        world_size: the number of processes.
    """
    return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]


def in_background(make: Callable[[], Iterable[Batch]], depth: int = 1) -> Iterator[Batch]:
    """Yield what a reader yields, while a thread runs it ahead; parsing and decompression release the interpreter lock.

    An error of the reader is raised here. Closing the iterator ends the thread.

    Args:
        make: returns the reader; called in the thread.
        depth: how many batches the reader may be ahead.
    """
    items: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(item) -> None:
        while not stopped.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in make():
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def vocabulary(batches: Iterable[Batch], features: Sequence[slice]) -> list[np.ndarray]:
    """Collect the distinct ids of each feature. Memory grows with their number.

    Args:
        batches: of all rows.
        features: the columns of each feature (`data.schema.Layout.features`).

    Returns:
        the ids of each feature, ascending.
    """
    known: list[np.ndarray] = []
    for batch in batches:
        ids = [np.unique(batch.sparse[:, columns]) for columns in features]
        known = [np.union1d(old, new) for old, new in zip(known, ids)] if known else ids
    return known
