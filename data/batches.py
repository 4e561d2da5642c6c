"""From a file to training batches: the split by rows, a shuffle in bounded memory, reading ahead in the background."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from data.formats import Batch

# Rows shuffled together: 130,000 rows are 35 MB as arrays. A file with fewer rows is shuffled as a whole.
SHUFFLE_ROWS = 1 << 17


def split_rows(rows: int) -> tuple[range, range, range]:
    """(train, validation, test): rows in file order, 5/7, 1/7 and 1/7, as the Kaggle data was split by day.

    Raises:
        ValueError: fewer than 7 rows, so that a part would be empty.
    """
    if rows < 7:
        raise ValueError(f"expected at least 7 rows to split 5:1:1 into train, validation and test, got {rows}")
    first, second = rows * 5 // 7, rows * 6 // 7
    return range(0, first), range(first, second), range(second, rows)


def rebatch(pieces: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same rows in batches of ``size`` rows, the last one smaller."""
    pending: list[Batch] = []
    rows = 0
    for piece in pieces:
        pending.append(piece)
        rows += len(piece)
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


def shuffled(pieces: Iterable[Batch], generator: np.random.Generator, rows: int = SHUFFLE_ROWS) -> Iterator[Batch]:
    """The same rows, permuted within runs of ``rows`` rows, so that memory stays bounded."""
    for run in rebatch(pieces, rows):
        yield run[generator.permutation(len(run))]


def in_background(make: Callable[[], Iterable[Batch]], depth: int = 1) -> Iterator[Batch]:
    """Run a reader in a thread, ``depth`` items ahead; parsing and decompression release the interpreter lock.

    An error of the reader is raised here. Closing the iterator ends the thread.
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


def vocabulary(pieces: Iterable[Batch]) -> list[np.ndarray]:
    """The distinct ids of each category, ascending, one array per column. Memory grows with their number."""
    known: list[np.ndarray] = []
    for piece in pieces:
        columns = [np.unique(piece.sparse[:, i]) for i in range(piece.sparse.shape[1])]
        known = [np.union1d(old, new) for old, new in zip(known, columns)] if known else columns
    return known
