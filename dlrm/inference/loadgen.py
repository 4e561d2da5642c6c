"""MLPerf's inference benchmark of a model: LoadGen asks for predictions in one of its four scenarios and times them.

As MLPerf's dlrm-v2 has it, a sample is a run of 100 to 700 consecutive rows. LoadGen reads its rules only once in
a process and can't be stopped: ``run`` is for a program that ends with ``leave``.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dlrm.checkpoint import write_json
from dlrm.inference.loadgen_logs import SAMPLES_A_QUERY, SIZES, read_accuracy, read_speed, sample_bounds, trace
from dlrm.inference.predictor import Predictor
from dlrm.machine import environment
from dlrm.metrics import Scores, score

SCENARIOS = ("Offline", "Server", "SingleStream", "MultiStream")
MODEL = "dlrm-v2"  # LoadGen silently ignores names it doesn't know
TRACE, RESULT = "dlrm_trace_of_aggregated_samples.txt", "result.json"
OFFICIAL_SECONDS = 600
SERVER_BOUND = 0.06  # seconds, of the 99th percentile

_LOADED_SAMPLES = 204_800
_OFFLINE_SAMPLES = 24_576
_BATCH_ROWS = 2048  # large enough for the full speed of the MLPs
_SHARE_OF_BOUND = 0.25  # which a batch in Server may take: a query waits for up to one, and then is in one
_WARM_UP_SECONDS = 1.0
_SCORED_ROWS = 64 * _BATCH_ROWS  # of a run for speed
_THREAD = "loadgen"
_TRIAL_SECONDS, _TRIAL_QUERIES, _TRIALS = 20, 1000, 20  # of find_rate


class Invalid(RuntimeError):
    """A run that did not keep LoadGen's rules; said on stdout already."""

    exit_code = 1


@dataclass(frozen=True)
class Rows:
    """The data a model is asked about.

    Args:
        count: of rows.
        read: (start, stop) -> the records of these rows, an array that ``np.concatenate`` joins with others.
        batch: records -> ``dense``, ``sparse`` and ``labels`` as in data.rows.Batch.
    """

    count: int
    read: Callable[[int, int], np.ndarray]
    batch: Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Options:
    """What LoadGen is to do.

    Args:
        scenario: one of ``SCENARIOS``.
        accuracy: all samples once, and AUC; else speed.
        target_qps: samples a second that Server issues, or that Offline expects. None: Offline, and Server with
            ``accuracy``, measure what there is.
        seconds: the least duration; MLPerf asks for 600.

    Raises:
        ValueError: unknown scenario, no such rate or duration, or a rate missing or where there is none.
    """

    scenario: str
    accuracy: bool = False
    target_qps: float | None = None
    seconds: float = 60

    def __post_init__(self):
        if self.scenario not in SCENARIOS:
            raise ValueError(f"scenario: expected one of {', '.join(SCENARIOS)}, got {self.scenario!r}")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")
        if self.target_qps is not None and not 0 < self.target_qps < float("inf"):
            raise ValueError(f"target-qps: expected more than 0 samples a second, got {self.target_qps}")
        if self.target_qps is not None and self.scenario in ("SingleStream", "MultiStream"):
            raise ValueError(f"target-qps: {self.scenario} issues a query when the one before is answered")
        if self.target_qps is None and self.scenario == "Server" and not self.accuracy:
            raise ValueError("Server needs a rate: expected --target-qps, or --find-rate, got neither")


class BatchQueue:
    """Samples that wait for a worker, in the order in which they came.

    Args:
        sizes: (samples,) rows of each.
        max_rows: of a batch. A sample with more is one by itself.
        workers: that take; all are idle until they do.
    """

    def __init__(self, sizes: np.ndarray, max_rows: int, workers: int):
        self._sizes, self.max_rows, self._idle = sizes, max_rows, workers
        self._waiting: deque[tuple[int, int]] = deque()
        self._rows = 0  # that wait
        self._closed = False
        self._changed = threading.Condition()

    def put(self, ids: list[int], samples: list[int]) -> None:
        """Add samples, with the ids under which LoadGen wants the answers."""
        rows = int(self._sizes[samples].sum())
        with self._changed:
            self._waiting.extend(zip(ids, samples))
            self._rows += rows
            self._changed.notify(len(ids))

    def take(self) -> list[tuple[int, int]]:
        """Wait for samples and take the first ones: about an equal share of the rows for each idle worker.

        Returns:
            (id, sample) of each; none when the queue is closed and empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            share, rows = min(self._rows / max(self._idle, 1), self.max_rows), 0
            self._idle -= 1
            batch: list[tuple[int, int]] = []
            while self._waiting:
                size = int(self._sizes[self._waiting[0][1]])
                # A sample on the border goes where the larger part of it is.
                if batch and (rows + size > self.max_rows or rows + size / 2 > share):
                    break
                batch.append(self._waiting.popleft())
                rows += size
            self._rows -= rows
            return batch

    def done(self) -> None:
        """A worker is idle again. Say so before answering: LoadGen may ask again before the answer has returned."""
        with self._changed:
            self._idle += 1

    def close(self) -> None:
        """No more samples will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class System:
    """What LoadGen tests, and the samples it tests it with: threads that each predict batches by themselves.

    Args:
        loadgen: the module.
        predictor: each worker has a twin of it.
        rows: labelled.
        bounds: of the samples.
        workers: how many.
        threads: of torch in each.

    Attributes:
        samples, rows_done, batches: answered so far.
        error: that stopped it; what comes after it is answered with nothing.
    """

    def __init__(self, loadgen, predictor: Predictor, rows: Rows, bounds: np.ndarray, workers: int, threads: int):
        self._loadgen, self._rows, self._bounds, self._threads = loadgen, rows, bounds, threads
        self._predictors = [predictor.twin() for _ in range(workers)]
        self._loaded: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self.samples = self.rows_done = self.batches = 0
        self.error: BaseException | None = None
        self.queue = BatchQueue(np.diff(bounds), _BATCH_ROWS, workers)

    def warm_up(self, rows: int) -> float:
        """Predict batches of every size up to the largest, then of ``rows`` rows for a while, with all workers at once.

        Returns:
            rows a second of all workers.
        """
        records = self._rows.read(0, min(self._rows.count, self.queue.max_rows))
        sizes = [*range(int(SIZES.min()), len(records), int(SIZES.min())), len(records)]

        def work(predictor: Predictor) -> float:
            for size in sizes:
                self._predict(predictor, records[:size])
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < _WARM_UP_SECONDS:
                count += len(self._predict(predictor, records[:rows]))
            return count / (time.perf_counter() - start)

        workers = len(self._predictors)
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(self._threads,)) as pool:
            return sum(pool.map(work, self._predictors))

    def score(self) -> dict[str, Any]:
        """auc and log_loss of the first rows, and scored_rows, how many: so that speed is never without them."""
        scores = Scores()
        for start in range(0, min(self._rows.count, _SCORED_ROWS), _BATCH_ROWS):
            stop = min(start + _BATCH_ROWS, self._rows.count)
            pairs = self._predict(self._predictors[0], self._rows.read(start, stop))
            scores.add(pairs[:, 1], np.ascontiguousarray(pairs[:, 0]))
        result = scores.result()
        return {"auc": result["auc"], "log_loss": result["log_loss"], "scored_rows": result["rows"]}

    def start(self) -> None:
        """Let the workers wait for samples."""
        self._workers = [threading.Thread(target=self._work, args=(p,), daemon=True) for p in self._predictors]
        for worker in self._workers:
            worker.start()

    def finish(self) -> None:
        """End the workers: one that still let go of tensors when Python ends would crash the process."""
        self.queue.close()
        for worker in self._workers:
            worker.join()

    def load(self, samples: Iterable[int]) -> None:
        """Read samples into memory."""
        try:
            for sample in tqdm(sorted(set(samples)), desc="loading", unit="sample", delay=2, position=1, leave=False):
                self._loaded[sample] = self._rows.read(*self._bounds[sample : sample + 2].tolist())
        except Exception as error:  # it would leave LoadGen in a state in which it crashes
            self._fail(error)

    def unload(self, samples: Iterable[int]) -> None:
        """Free them."""
        for sample in set(samples):
            self._loaded.pop(sample, None)

    def _work(self, predictor: Predictor) -> None:
        torch.set_num_threads(self._threads)
        while batch := self.queue.take():
            answers, pairs, place = [], None, 0
            try:
                if self.error is None:
                    records = [self._loaded[sample] for _, sample in batch]
                    pairs = self._predict(predictor, records[0] if len(records) == 1 else np.concatenate(records))
            except Exception as error:
                self._fail(error)
            if pairs is not None:
                place = pairs.ctypes.data
            for number, sample in batch:
                size = 0 if pairs is None else pairs[0].nbytes * len(self._loaded[sample])
                answers.append(self._loadgen.QuerySampleResponse(number, place, size))
                place += size
            with self._lock:
                self.samples += len(batch)
                self.rows_done += 0 if pairs is None else len(pairs)
                self.batches += 1
            self.queue.done()
            self._loadgen.QuerySamplesComplete(answers)  # copies what it wants of the pairs before it returns

    def _predict(self, predictor: Predictor, records: np.ndarray) -> np.ndarray:
        """(rows, 2) float32: prediction and label, as MLPerf's log of accuracy has them."""
        batch = self._rows.batch(records)
        pairs = np.empty((len(records), 2), np.float32)
        pairs[:, 0] = predictor(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse)).numpy()
        pairs[:, 1] = batch.labels
        return pairs

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error


def import_loadgen():
    """MLPerf's module.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import mlperf_loadgen
    except ImportError:
        raise ValueError("LoadGen is not installed: pip install mlcommons-loadgen") from None
    return mlperf_loadgen


def run(predictor: Predictor, rows: Rows, options: Options, output: Path) -> dict[str, Any]:
    """Let LoadGen test a model, once in a process.

    Args:
        output: folder for LoadGen's logs, the trace of samples and the result.

    Returns:
        what result.json has: scenario, valid and reasons, samples_per_second, rows_per_second, latency_ms, and auc and
        log_loss of some rows (speed); or auc, log_loss and rows (accuracy).

    Raises:
        ValueError: LoadGen is missing, or wrote no result.
        Exception: whatever reading or predicting raised. LoadGen may still be running then: see ``leave``.
    """
    loadgen = import_loadgen()
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULT).unlink(missing_ok=True)
    bounds = sample_bounds(rows.count)
    (output / TRACE).write_text(trace(bounds))
    samples = len(bounds) - 1
    threads = torch.get_num_threads()
    alone = options.scenario == "SingleStream"  # one sample is all there is, so all threads work on it
    workers, threads = (1, threads) if alone else (threads, 1)
    system = System(loadgen, predictor, rows, bounds, workers, threads)
    steady = options.scenario in ("Offline", "Server")
    rate = system.warm_up(_BATCH_ROWS if steady else int(SIZES.min()))
    if options.scenario == "Server":
        in_time = int(rate / workers * SERVER_BOUND * _SHARE_OF_BOUND)
        system.queue.max_rows = min(max(in_time, int(SIZES.max())), _BATCH_ROWS)
    loaded = min(samples, _LOADED_SAMPLES)
    scores = {} if options.accuracy else system.score()
    settings = _settings(loadgen, options, output, loaded, rate, rows.count / samples)
    _test(loadgen, system, settings, output, samples, loaded)
    result = {
        **asdict(options),
        "array_dtype": predictor.array_dtype,
        "mlp_dtype": predictor.mlp_dtype,
        "samples": samples,
        "loaded_samples": loaded,
        "workers": workers,
        "threads_per_worker": threads,
        "max_rows_per_batch": system.queue.max_rows,
        "mean_rows_per_batch": system.rows_done / system.batches,
        "warm_up_rows_per_second": rate,
    }
    if options.accuracy:
        result |= score(*read_accuracy(output, bounds).T)
    else:
        result |= scores | read_speed(output, options.scenario, system.rows_done / system.samples)
        result["official"] = options.seconds >= OFFICIAL_SECONDS and loaded == _LOADED_SAMPLES
    result |= environment()
    write_json(output / RESULT, result)
    return result


def _settings(loadgen, options: Options, output: Path, loaded: int, rate: float, sample_rows: float):
    """MLPerf's own settings, and over them those of user.conf, which is written."""
    name, qps = options.scenario, options.target_qps
    if qps is None and name == "Offline":
        qps = rate / sample_rows * 1.3  # rather more samples than the duration needs: fewer are INVALID
    elif qps is None and name == "Server":
        qps = rate / sample_rows / 2  # to be answered in time is not asked for
    values = {"min_duration": int(options.seconds * 1000), "performance_sample_count_override": loaded}
    lines = [f"{MODEL}.{name}.{key} = {value}" for key, value in values.items()]
    if qps is not None:
        lines.append(f"{MODEL}.{name}.target_qps = {qps!r}")
    if name == "Offline" and options.seconds < OFFICIAL_SECONDS:
        least = max(1, round(_OFFLINE_SAMPLES * options.seconds / OFFICIAL_SECONDS))
        lines.append(f"{MODEL}.{name}.min_query_count = {least}")
    config = output / "user.conf"
    config.write_text("\n".join(lines) + "\n")
    settings = loadgen.TestSettings()
    if settings.FromConfig(str(config), MODEL, name):
        raise ValueError(f"{config}: LoadGen can't read it")
    settings.scenario = getattr(loadgen.TestScenario, name)
    settings.mode = loadgen.TestMode.AccuracyOnly if options.accuracy else loadgen.TestMode.PerformanceOnly
    # LoadGen prepares queries for this latency, and runs out of them where they are answered sooner. In a file it would
    # be whole milliseconds.
    shortest = int(SIZES.min() * SAMPLES_A_QUERY.get(name, 1) / rate / 2 * 1e9)
    settings.single_stream_expected_latency_ns = settings.multi_stream_expected_latency_ns = max(shortest, 1000)
    return settings


def _test(loadgen, system: System, settings, output: Path, samples: int, loaded: int) -> None:
    """Run LoadGen to its end, or to an error, in a thread: Ctrl-C does not reach Python while it is in LoadGen."""
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(output)
    sut = loadgen.ConstructFastSUT(system.queue.put, lambda: None)
    library = loadgen.ConstructQSL(samples, loaded, system.load, system.unload)
    audit = str(output / "audit.config")  # by default LoadGen takes one from the current directory
    arguments = sut, library, settings, logs, audit
    test = threading.Thread(target=loadgen.StartTestWithLogSettings, args=arguments, name=_THREAD, daemon=True)
    system.start()
    test.start()
    with tqdm(desc="answering", unit="sample", delay=2, position=0) as bar:
        while test.is_alive() and system.error is None:
            test.join(0.2)
            bar.update(system.samples - bar.n)
    if system.error is not None:
        test.join(2)  # what it has asked is answered with nothing, after which it may end
        if not test.is_alive():
            system.finish()
        raise system.error
    system.finish()
    loadgen.DestroyFastSUT(sut)
    loadgen.DestroyQSL(library)


def find_rate(trial: Callable[[str, float | None, float, Path], dict], seconds: float, output: Path) -> dict[str, Any]:
    """The highest rate at which Server is VALID.

    Args:
        trial: (scenario, samples a second, least seconds, folder) -> result. Offline has None samples a second.
        seconds: of the last run, at the rate that short trials have found.
        output: its folder; trials have folders in "trials" there.

    Returns:
        the result of the last run, VALID or not, and ``trials``: scenario, rate, valid and p99_ms of each.

    Raises:
        ValueError: no rate is VALID.
    """
    trials: list[dict[str, Any]] = []

    def attempt(scenario: str, rate: float | None, least: float, folder: Path | None = None) -> dict[str, Any]:
        folder = folder or output / "trials" / f"{len(trials):02}-{scenario}"
        result = trial(scenario, rate, least, folder)
        p99, rate = result["latency_ms"]["p99"], rate or result["samples_per_second"]
        trials.append({"scenario": scenario, "rate": rate, "valid": result["valid"], "p99_ms": p99})
        said = "VALID" if result["valid"] else f"INVALID: {result['reasons'][0].split(' *')[0]}"
        print(f"{scenario} at {rate:,.1f} samples/s for {least:,.0f} s: {said} (p99 {p99:,.1f} ms)", file=sys.stderr)
        return result

    short = min(_TRIAL_SECONDS, seconds)
    low, high = 0.0, attempt("Offline", None, short)["samples_per_second"]
    while high - low > 0.025 * high and len(trials) <= _TRIALS:
        rate = (low + high) / 2
        # LoadGen wants some hundred queries before it calls a rate VALID.
        least = max(short, _TRIAL_QUERIES / rate)
        # Another program that takes a core for a second makes a run INVALID: a rate has to fail twice.
        if attempt("Server", rate, least)["valid"] or attempt("Server", rate, least)["valid"]:
            low = rate
        else:
            high = rate
    if not low:
        raise ValueError(f"Server is INVALID at every rate down to {high:,.2f} samples a second")
    for _ in range(6):
        result = attempt("Server", low, seconds, output)
        if result["valid"]:
            break
        low *= 0.97
    return result | {"trials": trials}


def leave(code: int) -> None:
    """End the process. Where LoadGen still runs, after an error or Ctrl-C, Python's own end would wait or crash."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
