"""The samples that LoadGen asks for, the logs that it writes, and results as text."""

import json
from pathlib import Path
from typing import Any

import numpy as np

SIZES = np.array([100] * 2 + [200] * 12 + [300] * 2 + [400, 500, 600, 700])  # rows of a sample; each as likely
SAMPLES_A_QUERY = {"MultiStream": 8}
_UNDEFINED = "undefined, since all labels are the same"
_PERCENTILES = {"50.00": "p50", "90.00": "p90", "95.00": "p95", "99.00": "p99", "99.90": "p99.9"}


def sample_bounds(rows: int) -> np.ndarray:
    """Return the first row of each sample, and the end of the last: int64 (samples + 1,) from 0 to ``rows``.

    Args:
        rows: number of rows.

    Raises:
        ValueError: no rows.
    """
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    legacy = np.random.RandomState(123)  # MLPerf defines its samples by this generator
    ends = np.cumsum(SIZES[legacy.randint(0, len(SIZES), rows // SIZES.min() + 1)])
    return np.concatenate([[0], ends[: np.searchsorted(ends, rows)], [rows]])


def trace(bounds: np.ndarray) -> str:
    """Return samples as MLPerf's text: a line "start, end, rows" for each."""
    starts, ends = bounds[:-1].tolist(), bounds[1:].tolist()
    return "".join(f"{start}, {end}, {end - start}\n" for start, end in zip(starts, ends))


def read_speed(output: Path, scenario: str, sample_rows: float) -> dict[str, Any]:
    """Read the result of a run for speed from LoadGen's log.

    Args:
        output: folder of the logs.
        scenario: of the run.
        sample_rows: rows of the mean sample that was answered.

    Returns:
        valid, reasons (list of str), queries, samples_per_second, rows_per_second, latency_ms (of queries); and for
        the Streams, early_stopping_latency_ms, LoadGen's estimate of the percentile that counts, if it has one.

    Raises:
        ValueError: the log is not that of a finished run.
    """
    found, errors = _read_events(output / "mlperf_log_detail.txt")
    valid = found["result_validity"] == "VALID"
    reasons = [] if valid else [found["result_invalid_reason"]]
    if not found["early_stopping_met"]:
        reasons.append(found["early_stopping_result"])
    of_query = "_per_query" if scenario == "MultiStream" else ""
    query = "_query" if of_query else ""
    latency = {name: found[f"result_{name}{query}_latency_ns"] for name in ("mean", "min", "max")}
    latency |= {name: found[f"result_{p}_percentile{of_query}_latency_ns"] for p, name in _PERCENTILES.items()}
    rate = {
        "Offline": lambda: found["result_samples_per_second"],
        "Server": lambda: found["result_completed_samples_per_sec"],
        "SingleStream": lambda: found["result_qps_with_loadgen_overhead"],
        "MultiStream": lambda: SAMPLES_A_QUERY["MultiStream"] / latency["mean"] * 1e9,
    }[scenario]()
    estimate = {"SingleStream": "early_stopping_latency_ss", "MultiStream": "early_stopping_latency_ms"}.get(scenario)
    result = {
        "valid": valid,
        "reasons": [" ".join(reason.split()) for reason in reasons + errors if reason.strip()],
        "queries": found["result_query_count"],
        "samples_per_second": rate,
        "rows_per_second": rate * sample_rows,
        "latency_ms": {name: value / 1e6 for name, value in latency.items()},
    }
    if estimate and found["early_stopping_met"]:
        result["early_stopping_latency_ms"] = found[estimate] / 1e6
    return result


def _read_events(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the last value of each key in a log, and the errors."""
    found: dict[str, Any] = {}
    errors = []
    for line in path.read_text().splitlines() if path.exists() else []:
        event = json.loads(line.removeprefix(":::MLLOG "))
        found[event["key"]] = event["value"]
        if event["key"].startswith("error_"):
            errors.append(str(event["value"]))
    if "result_validity" not in found:
        raise ValueError(f"{path}: expected result_validity, got none: {'; '.join(errors) or 'no such run'}")
    return found, errors


def read_accuracy(output: Path, bounds: np.ndarray) -> np.ndarray:
    """Read the labels and predictions that LoadGen logged.

    Args:
        output: folder of the logs.
        bounds: of ``sample_bounds``.

    Returns:
        (rows, 2) float32: label and prediction, in the order of the rows.

    Raises:
        ValueError: rows are missing, or a sample has more or fewer than it should.
    """
    path = output / "mlperf_log_accuracy.json"
    pairs = np.full((bounds[-1], 2), np.nan, np.float32)
    answered = np.zeros(len(bounds) - 1, bool)
    with open(path) as file:  # 1.5 GB for MLPerf's rows; a sample in each line
        for line in file:
            entry = line.strip().strip("[],")
            if not entry:
                continue
            values = json.loads(entry)
            sample = values["qsl_idx"]
            start, end = bounds[sample : sample + 2].tolist()
            got = np.frombuffer(bytes.fromhex(values["data"]), "<f4").reshape(-1, 2)
            if len(got) != end - start:
                raise ValueError(f"{path}: sample {sample}: expected {end - start} rows, got {len(got)}")
            # MultiStream fills up its last query with samples that it had before.
            if not answered[sample]:
                pairs[start:end], answered[sample] = got[:, ::-1], True
    if not answered.all():
        raise ValueError(f"{path}: expected {len(answered)} samples, got {answered.sum()}")
    return pairs


def describe(result: dict[str, Any]) -> str:
    """Return a result as a short table."""
    if result["accuracy"]:
        lines = [
            ("scenario", f"{result['scenario']}, accuracy"),
            ("rows", f"{result['rows']:,} in {result['samples']:,} samples"),
            ("AUC", _UNDEFINED if result["auc"] is None else f"{result['auc']:.6f}"),
            ("log loss", f"{result['log_loss']:.6f}"),
        ]
    else:
        official = "official length and data" if result["official"] else "not of official length or data"
        latency = result["latency_ms"]
        lines = [
            ("scenario", f"{result['scenario']}, {'VALID' if result['valid'] else 'INVALID'} ({official})"),
            *(("why", reason) for reason in result["reasons"]),
            ("samples/s", f"{result['samples_per_second']:,.2f}"),
            ("rows/s", f"{result['rows_per_second']:,.0f}"),
        ]
        if result["scenario"] != "Offline":  # which asks for everything at once
            lines.append(("latency, ms", ", ".join(f"{name} {value:,.2f}" for name, value in latency.items())))
        if "early_stopping_latency_ms" in result:
            lines.append(("latency that counts, ms", f"{result['early_stopping_latency_ms']:,.2f}"))
        rows = f"{result['mean_rows_per_batch']:,.0f} rows a batch, {result['max_rows_per_batch']:,} at most"
        auc = _UNDEFINED if result["auc"] is None else f"{result['auc']:.4f}"
        lines.append(("AUC, log loss", f"{auc}, {result['log_loss']:.4f} of the first {result['scored_rows']:,} rows"))
        lines.append(("workers", f"{result['workers']} of {result['threads_per_worker']} threads; {rows}"))
    return "\n".join(f"{name:<24}{value}" for name, value in lines)
