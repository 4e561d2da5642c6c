"""MLPerf's inference benchmark: LoadGen asks a model for predictions in one of four scenarios, and times the answers.

A sample is 100 to 700 consecutive rows, as in MLPerf's dlrm-v2. LoadGen reads its settings only once in a process and
can't be stopped, so a program that calls ``run`` ends with ``leave``.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dlrm.inference.loadgen_logs import SAMPLES_A_QUERY, SIZES, read_accuracy, read_speed, sample_bounds, trace
from dlrm.inference.loadgen_system import BATCH_ROWS, LabelledRows, System
from dlrm.inference.predictor import Predictor
from dlrm.machine import environment
from dlrm.metrics import score
from robe_files import write_json

SCENARIOS = ("Offline", "Server", "SingleStream", "MultiStream")
MODEL = "dlrm-v2"  # LoadGen silently ignores names that it does not know
TRACE, RESULT = "dlrm_trace_of_aggregated_samples.txt", "result.json"
OFFICIAL_SECONDS = 600
SERVER_BOUND = 0.06  # seconds; limit of the 99th percentile of latency

_LOADED_SAMPLES = 204_800
_OFFLINE_SAMPLES = 24_576
_SHARE_OF_BOUND = 0.25  # that a batch may take in Server: a query waits for at most one batch, and then is in one
_THREAD = "loadgen"
_TRIAL_SECONDS, _TRIAL_QUERIES, _TRIALS = 20, 1000, 20  # of find_rate
_LONG_RUNS, _LOWER = 6, 0.97  # of find_rate: attempts at full length, each at a rate this much lower

RunTrial = Callable[[str, float | None, float, Path], dict[str, Any]]  # see find_rate


class Invalid(RuntimeError):
    """A run that broke LoadGen's rules. The reasons were printed with the result."""

    exit_code = 1  # of a program that ends with it


@dataclass(frozen=True)
class LoadGenOptions:
    """Options of a run.

    Args:
        scenario: one of ``SCENARIOS``.
        accuracy: whether to predict all samples once and compute AUC, rather than to measure speed.
        target_qps: samples a second that Server issues, or that Offline expects. None: the rate is measured first,
            in Offline, and in Server with ``accuracy``.
        seconds: least duration. MLPerf asks for 600.

    Raises:
        ValueError: the scenario is unknown, a number is out of range, Server has no rate, or a Stream has one.
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


def import_loadgen() -> Any:
    """Import MLPerf's module.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import mlperf_loadgen
    except ImportError:
        raise ValueError("LoadGen is not installed: pip install mlcommons-loadgen") from None
    return mlperf_loadgen


def run(predictor: Predictor, rows: LabelledRows, options: LoadGenOptions, output: Path) -> dict[str, Any]:
    """Let LoadGen test a model. A process can do this only once.

    Args:
        predictor: the model.
        rows: the rows to predict.
        options: of the run.
        output: folder for LoadGen's logs, the trace of samples and the result.

    Returns:
        The content of result.json. For speed: scenario, valid, reasons, samples_per_second, rows_per_second,
        latency_ms, and auc and log_loss of some rows. For accuracy: auc, log_loss and rows.

    Raises:
        ValueError: LoadGen is missing, or wrote no result.
        Exception: whatever reading or predicting raised. LoadGen may then still be running: see ``leave``.
    """
    loadgen = import_loadgen()
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULT).unlink(missing_ok=True)
    bounds = sample_bounds(rows.count)
    (output / TRACE).write_text(trace(bounds))
    samples = len(bounds) - 1
    threads = torch.get_num_threads()
    one_at_a_time = options.scenario == "SingleStream"  # so all threads work on one sample
    workers, threads = (1, threads) if one_at_a_time else (threads, 1)
    system = System(loadgen, predictor, rows, bounds, workers, threads)
    rate = system.warm_up(BATCH_ROWS if options.scenario in ("Offline", "Server") else int(SIZES.min()))
    if options.scenario == "Server":
        in_time = int(rate / workers * SERVER_BOUND * _SHARE_OF_BOUND)
        system.queue.max_rows = min(max(in_time, int(SIZES.max())), BATCH_ROWS)
    loaded = min(samples, _LOADED_SAMPLES)
    result = {
        **asdict(options),
        "array_dtype": predictor.array_dtype,
        "mlp_dtype": predictor.mlp_dtype,
        "samples": samples,
        "loaded_samples": loaded,
        "workers": workers,
        "threads_per_worker": threads,
        "max_rows_per_batch": system.queue.max_rows,
        "warm_up_rows_per_second": rate,
    }
    if not options.accuracy:
        result |= system.score()
    _test(loadgen, system, _settings(loadgen, options, output, loaded, rate, rows.count / samples), output, loaded)
    result["mean_rows_per_batch"] = system.rows_done / system.batches
    if options.accuracy:
        result |= score(*read_accuracy(output, bounds).T)
    else:
        result |= read_speed(output, options.scenario, system.rows_done / system.samples)
        result["official"] = options.seconds >= OFFICIAL_SECONDS and loaded == _LOADED_SAMPLES
    result |= environment()
    write_json(output / RESULT, result)
    return result


def _settings(loadgen: Any, options: LoadGenOptions, output: Path, loaded: int, rate: float, sample_rows: float) -> Any:
    """Return MLPerf's own settings, overridden by those of user.conf, which is written.

    Args:
        loadgen: MLPerf's module.
        options: of the run.
        output: folder of user.conf.
        loaded: samples in memory.
        rate: rows a second in the warm-up.
        sample_rows: rows of the mean sample.
    """
    name, qps = options.scenario, options.target_qps
    if qps is None and name == "Offline":
        qps = rate / sample_rows * 1.3  # rather too many samples: too few for the duration are INVALID
    elif qps is None and name == "Server":
        qps = rate / sample_rows / 2  # for accuracy; no answer has to be in time
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
    # LoadGen prepares queries for this latency, and runs out of them if answers come sooner. user.conf could only state
    # whole milliseconds.
    shortest = int(SIZES.min() * SAMPLES_A_QUERY.get(name, 1) / rate / 2 * 1e9)
    settings.single_stream_expected_latency_ns = settings.multi_stream_expected_latency_ns = max(shortest, 1000)
    return settings


def _test(loadgen: Any, system: System, settings: Any, output: Path, loaded: int) -> None:
    """Run LoadGen to its end, or to an error, in a thread: Ctrl-C does not reach Python while it is in LoadGen."""
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(output)
    sut = loadgen.ConstructFastSUT(system.queue.put, lambda: None)
    library = loadgen.ConstructQSL(system.sample_count, loaded, system.load, system.unload)
    audit = str(output / "audit.config")  # LoadGen would read one in the current folder
    arguments = sut, library, settings, logs, audit
    test = threading.Thread(target=loadgen.StartTestWithLogSettings, args=arguments, name=_THREAD, daemon=True)
    system.start()
    test.start()
    with tqdm(desc="answering", unit="sample", delay=2, position=0) as bar:
        while test.is_alive() and system.error is None:
            test.join(0.2)
            bar.update(system.samples - bar.n)
    if system.error is not None:
        test.join(2)  # its open queries get empty answers, so it may end
        if not test.is_alive():
            system.finish()
        raise system.error
    system.finish()
    loadgen.DestroyFastSUT(sut)
    loadgen.DestroyQSL(library)


def find_rate(trial: RunTrial, seconds: float, output: Path) -> dict[str, Any]:
    """Search for the highest rate at which Server is VALID.

    Short trials bisect between 0 and Offline's rate. A run of full length follows at the rate they found, or a little
    lower while that is INVALID.

    Args:
        trial: (scenario, samples a second or None for Offline, least seconds, folder) -> result.
        seconds: least duration of the last run.
        output: folder of the last run. Trials have folders in "trials" there.

    Returns:
        The result of the last run, VALID or not, and trials: scenario, rate, valid and p99_ms of every run.

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
        # Another program that takes a core for a second makes a run INVALID, so a rate has to fail twice.
        if attempt("Server", rate, least)["valid"] or attempt("Server", rate, least)["valid"]:
            low = rate
        else:
            high = rate
    if not low:
        raise ValueError(f"Server is INVALID at every rate down to {high:,.2f} samples a second")
    for _ in range(_LONG_RUNS):
        result = attempt("Server", low, seconds, output)
        if result["valid"]:
            break
        low *= _LOWER
    return result | {"trials": trials}


def run_program(command: list[str], output: Path) -> dict[str, Any]:
    """Run LoadGen in another process, since each can do it only once.

    Args:
        command: a program that calls ``run``.
        output: folder of its result.

    Returns:
        The content of result.json.

    Raises:
        ValueError: there is no result.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, Invalid.exit_code) or not (output / RESULT).exists():
        said = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"{output}: the run ended with exit code {done.returncode}: {said[-1]}")
    return json.loads((output / RESULT).read_text())


def leave(code: int) -> None:
    """End the process. If LoadGen still runs, after an error or Ctrl-C, Python's own end would hang or crash."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
