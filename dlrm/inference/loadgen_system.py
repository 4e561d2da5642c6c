"""The system that LoadGen tests: a queue of samples, and worker threads that predict them in batches."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dlrm.batch import Batch
from dlrm.inference.loadgen_logs import SIZES
from dlrm.inference.predictor import Predictor
from dlrm.metrics import Scores

BATCH_ROWS = 2048  # limit of a batch; large enough for the full speed of the MLPs

_WARM_UP_SECONDS = 1.0
_SCORED_ROWS = 64 * BATCH_ROWS  # in a run for speed


@dataclass(frozen=True)
class LabelledRows:
    """The rows that samples are made of, readable in any order.

    Args:
        count: number of rows.
        read: (start, stop) -> the records of these rows, an array that ``np.concatenate`` joins with others.
        batch: records -> the batch, with labels.
    """

    count: int
    read: Callable[[int, int], np.ndarray]
    batch: Callable[[np.ndarray], Batch]


class Query(NamedTuple):
    """A sample that LoadGen asks for, and the number under which it wants the answer."""

    number: int
    sample: int


class BatchQueue:
    """Samples that wait for a worker, in the order in which they came.

    Args:
        sizes: (samples,), the rows of each sample.
        max_rows: limit of a batch. A larger sample is a batch by itself.
        workers: number of workers, all idle until they take a batch.
    """

    def __init__(self, sizes: np.ndarray, max_rows: int, workers: int):
        self._sizes, self.max_rows, self._idle = sizes, max_rows, workers
        self._waiting: deque[Query] = deque()
        self._rows = 0  # of the samples that wait
        self._closed = False
        self._changed = threading.Condition()

    def put(self, numbers: list[int], samples: list[int]) -> None:
        """Add samples, with the numbers under which LoadGen wants the answers."""
        rows = int(self._sizes[samples].sum())
        with self._changed:
            self._waiting.extend(map(Query, numbers, samples))
            self._rows += rows
            self._changed.notify(len(numbers))

    def take(self) -> list[Query]:
        """Wait for samples and take the first ones: about an equal share of the rows for each idle worker.

        Returns:
            The batch; empty when the queue is closed and nothing waits.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            share, rows = min(self._rows / max(self._idle, 1), self.max_rows), 0
            self._idle -= 1
            batch: list[Query] = []
            while self._waiting:
                size = int(self._sizes[self._waiting[0].sample])
                # A sample across the border goes where its larger part is.
                if batch and (rows + size > self.max_rows or rows + size / 2 > share):
                    break
                batch.append(self._waiting.popleft())
                rows += size
            self._rows -= rows
            return batch

    def done(self) -> None:
        """Count a worker as idle again. Call it before answering: LoadGen may ask again before the answer returns."""
        with self._changed:
            self._idle += 1

    def close(self) -> None:
        """Declare that no more samples will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class System:
    """The system under test: threads that each predict whole batches, and the samples they predict.

    Args:
        loadgen: MLPerf's module.
        predictor: the model, which all workers call.
        rows: the labelled rows.
        bounds: (samples + 1,), of ``sample_bounds``.
        workers: number of worker threads.
        threads: torch's threads in each worker.

    Attributes:
        queue: the samples that wait.
        sample_count: number of different samples.
        samples, rows_done, batches: counts of what was answered so far.
        error: the exception that stopped the test. Later samples get empty answers.
    """

    def __init__(
        self, loadgen: Any, predictor: Predictor, rows: LabelledRows, bounds: np.ndarray, workers: int, threads: int
    ):
        self._loadgen, self._rows, self._bounds, self._threads = loadgen, rows, bounds, threads
        self.sample_count = len(bounds) - 1
        self._predictor, self._worker_count = predictor, workers
        self._loaded: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self.samples = self.rows_done = self.batches = 0
        self.error: BaseException | None = None
        self.queue = BatchQueue(np.diff(bounds), BATCH_ROWS, workers)

    def warm_up(self, rows: int) -> float:
        """Predict batches of every size up to the largest, then of one size for a second, with all workers at once.

        Args:
            rows: size of the batches whose speed is measured.

        Returns:
            Rows a second of all workers together.
        """
        records = self._rows.read(0, min(self._rows.count, self.queue.max_rows))
        sizes = [*range(int(SIZES.min()), len(records), int(SIZES.min())), len(records)]

        def work(worker: int) -> float:
            for size in sizes:
                self._predict(records[:size])
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < _WARM_UP_SECONDS:
                count += len(self._predict(records[:rows]))
            return count / (time.perf_counter() - start)

        workers = self._worker_count
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(self._threads,)) as pool:
            return sum(pool.map(work, range(workers)))

    def score(self) -> dict[str, Any]:
        """Return auc and log_loss of the first rows, and their number, scored_rows. Speed is reported beside them."""
        scores = Scores()
        for start in range(0, min(self._rows.count, _SCORED_ROWS), BATCH_ROWS):
            stop = min(start + BATCH_ROWS, self._rows.count)
            pairs = self._predict(self._rows.read(start, stop))
            scores.add(pairs[:, 1], np.ascontiguousarray(pairs[:, 0]))
        result = scores.result()
        return {"auc": result["auc"], "log_loss": result["log_loss"], "scored_rows": result["rows"]}

    def start(self) -> None:
        """Start the workers, which wait for samples."""
        self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(self._worker_count)]
        for worker in self._workers:
            worker.start()

    def finish(self) -> None:
        """End the workers. One that still freed tensors while Python ends would crash the process."""
        self.queue.close()
        for worker in self._workers:
            worker.join()

    def load(self, samples: Iterable[int]) -> None:
        """Read samples into memory."""
        try:
            for sample in tqdm(sorted(set(samples)), desc="loading", unit="sample", delay=2, position=1, leave=False):
                self._loaded[sample] = self._rows.read(*self._bounds[sample : sample + 2].tolist())
        except Exception as error:  # LoadGen would crash if an exception reached it
            self._fail(error)

    def unload(self, samples: Iterable[int]) -> None:
        """Free the memory of samples."""
        for sample in set(samples):
            self._loaded.pop(sample, None)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while batch := self.queue.take():
            pairs = None
            try:
                if self.error is None:
                    records = [self._loaded[query.sample] for query in batch]
                    pairs = self._predict(records[0] if len(records) == 1 else np.concatenate(records))
            except Exception as error:
                self._fail(error)
            answers = self._answers(batch, pairs)
            with self._lock:
                self.samples += len(batch)
                self.rows_done += 0 if pairs is None else len(pairs)
                self.batches += 1
            self.queue.done()
            self._loadgen.QuerySamplesComplete(answers)  # copies the pairs before it returns

    def _answers(self, batch: list[Query], pairs: np.ndarray | None) -> list:
        """Return LoadGen's responses: where the pairs of each sample lie in memory; empty ones without pairs."""
        address = 0 if pairs is None else pairs.ctypes.data
        answers = []
        for query in batch:
            size = 0 if pairs is None else pairs[0].nbytes * len(self._loaded[query.sample])
            answers.append(self._loadgen.QuerySampleResponse(query.number, address, size))
            address += size
        return answers

    def _predict(self, records: np.ndarray) -> np.ndarray:
        """Return (rows, 2) float32: prediction and label, the order of MLPerf's accuracy log."""
        batch = self._rows.batch(records)
        pairs = np.empty((len(records), 2), np.float32)
        pairs[:, 0] = self._predictor(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse)).numpy()
        pairs[:, 1] = batch.labels
        return pairs

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
