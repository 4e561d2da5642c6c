"""How fast models answer: latency and throughput by batch size, side by side, and where the time goes."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlrm.config import DLRMConfig
from dlrm.embeddings import EmbeddingBags
from dlrm.inference.export.formats import FORMATS, load
from dlrm.inference.predictor import Predictor, array_bytes
from dlrm.metrics import Scores
from dlrm.model import DLRM
from robe import RobeEmbeddingBagCollection

STAGES = ("embedding", "interaction", "mlp")
BATCH_SIZES = (1, 4, 16, 64, 256, 1024, 2048, 4096, 16384)

_TURN = 0.1  # seconds of calls of one candidate before it is the next one's turn
_PAUSE = 0.06  # before it: ONNX Runtime's threads look for work, and so take cores, for 40 ms after the last of it
_SHARE_OF_MEMORY = 0.6  # that full tables may take

Batch = tuple[Tensor, Tensor]  # dense (B, num_dense), sparse (B, H)
Clock = Callable[[str], None]


@dataclass
class Candidate:
    """What is timed.

    Attributes:
        run: called with dense, sparse and a clock as in Predictor, which it may leave alone; returns
            probabilities (B,).
        note: what else there is to say of it.
        rows: (H,) rows of each id's table, where ids must be within them; None: ids as they are.
        scores: auc, log_loss and rows, once known.
    """

    run: Callable[[Tensor, Tensor, Clock], Tensor]
    note: str
    rows: Tensor | None = None
    scores: dict[str, Any] | None = None

    def inputs(self, batches: Sequence[Batch]) -> list[Batch]:
        if self.rows is None:
            return list(batches)
        return [(dense, torch.remainder(sparse, self.rows)) for dense, sparse in batches]


def make_candidates(
    model: DLRM, array_dtype: str, mlp_dtype: str, against: Sequence[str], max_rows: int | None = None
) -> dict[str, Candidate]:
    """A model in the dtypes asked for, first, and what it is timed beside: in float32, if it is not, and ``against``.

    Args:
        against: "full": the same MLPs with full tables; "eager": the model as a torch module; or exported files.
        max_rows: of a full table, at most.

    Raises:
        ValueError: something else in against, or dtypes as in Predictor.
    """
    candidates: dict[str, Candidate] = {}
    label = _describe(model)
    size = _megabytes(array_bytes(model.embeddings))

    def add_predictor(array_dtype: str, mlp_dtype: str) -> None:
        predictor = Predictor(model, array_dtype=array_dtype, mlp_dtype=mlp_dtype)
        dtypes = {"array": array_dtype, "MLPs": mlp_dtype}
        low = "".join(f", {what} {dtype}" for what, dtype in dtypes.items() if dtype != "float32")
        candidates[label + low] = Candidate(predictor, _megabytes(array_bytes(predictor.embeddings)))

    add_predictor(array_dtype, mlp_dtype)
    if (array_dtype, mlp_dtype) != ("float32", "float32"):
        add_predictor("float32", "float32")
    for what in against:
        if what == "eager":
            candidates[f"{label}, eager"] = Candidate(eager(model), size)
        elif what == "full":
            full, rows = full_tables(model, max_rows)
            used, all_rows = sum(full.config.table_rows), sum(model.config.table_rows)
            note = f"{used:,} rows of {all_rows:,}, {_megabytes(array_bytes(full.embeddings))}, ids modulo rows"
            candidates["full tables"] = Candidate(Predictor(full), note, rows)
            candidates["full tables, eager"] = Candidate(eager(full), "the same", rows)
        elif Path(what).suffix in FORMATS.values() and Path(what).is_file():
            run = load(what)
            candidates[what] = Candidate(_without_clock(run), f"{Path(what).stat().st_size / 1e6:,.1f} MB in all")
        else:
            raise ValueError(f"against: expected full, eager or a file that export made, got {what!r}")
    return candidates


def _without_clock(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Clock], Tensor]:
    return lambda dense, sparse, clock: run(dense, sparse)


def _describe(model: DLRM) -> str:
    if isinstance(model.embeddings, RobeEmbeddingBagCollection):
        return f"ROBE {4 * model.config.full_floats / array_bytes(model.embeddings):.4g}x"
    return {"hash": "hash trick", "full": "trained tables"}.get(model.config.embedding, "model")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB of embeddings"


def cut(dense: np.ndarray, sparse: np.ndarray, batch_size: int) -> list[Batch]:
    """Up to 256 batches of rows, some of which come again where there are too few."""
    count = min(max(len(dense) // batch_size, 1), 256)
    places = np.arange(count * batch_size) % len(dense)
    tensors = torch.from_numpy(dense[places]), torch.from_numpy(sparse[places])
    return list(zip(*(x.split(batch_size) for x in tensors)))


def score_all(candidates: Mapping[str, Candidate], batches: Iterable, progress: Callable[[int], object]) -> None:
    """Find the scores of the candidates that were trained.

    Args:
        batches: with ``dense``, ``sparse`` and ``labels`` as data.rows.Batch.
        progress: called with the number of rows of each batch.
    """
    trained = [(candidate, Scores()) for candidate in candidates.values() if candidate.rows is None]
    for batch in batches:
        for candidate, scores in trained:
            inputs = torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse)
            scores.add(batch.labels, candidate.run(*inputs, _no_clock).numpy())
        progress(len(batch.dense))
    for candidate, scores in trained:
        candidate.scores = scores.result()


def _no_clock(stage: str) -> None:
    pass


def measure(
    candidates: Mapping[str, Candidate], batches: Sequence[Batch], seconds: float, least_calls: int = 50
) -> dict[str, dict[str, Any]]:
    """Time candidates in turns, so that what disturbs the machine disturbs all of them.

    Args:
        batches: of one size, to go through again and again: enough that their ids do not stay in the caches.
        seconds: for all of them together, about.
        least_calls: of each.

    Returns:
        of each candidate: rows_per_second (from the median), milliseconds {p50, p90, p99, mean} of a call, calls, and
        stages: the mean milliseconds of each of STAGES in a call, or None where it does not tell.
    """
    inputs = {name: candidate.inputs(batches) for name, candidate in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    stages: dict[str, dict[str, float]] = {name: {} for name in candidates}

    def call(name: str, batch: Batch) -> float:
        start = last = time.perf_counter()
        of_stages = stages[name]

        def clock(stage: str) -> None:
            nonlocal last
            now = time.perf_counter()
            of_stages[stage] = of_stages.get(stage, 0) + now - last
            last = now

        candidates[name].run(*batch, clock)
        return time.perf_counter() - start

    for name in candidates:
        for batch in inputs[name][:3]:
            call(name, batch)
        stages[name].clear()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(next(iter(times.values()))) < least_calls:
        for name, own in inputs.items():
            time.sleep(_PAUSE)
            candidates[name].run(*own[len(times[name]) % len(own)], _no_clock)  # what was there is in no cache
            turn = time.perf_counter()
            while time.perf_counter() - turn < _TURN:
                times[name].append(call(name, own[len(times[name]) % len(own)]))
    return {name: _summary(times[name], stages[name], len(batches[0][0])) for name in candidates}


def _summary(seconds: list[float], stages: dict[str, float], batch_size: int) -> dict[str, Any]:
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99]).tolist()
    return {
        "rows_per_second": batch_size / p50,
        "milliseconds": {
            "p50": p50 * 1e3,
            "p90": p90 * 1e3,
            "p99": p99 * 1e3,
            "mean": sum(seconds) / len(seconds) * 1e3,
        },
        "calls": len(seconds),
        "stages": {stage: stages[stage] / len(seconds) * 1e3 for stage in STAGES} if stages else None,
    }


def eager(model: DLRM) -> Callable[[Tensor, Tensor, Clock], Tensor]:
    """The model as a torch module."""
    model.eval()

    def run(dense: Tensor, sparse: Tensor, clock: Clock) -> Tensor:
        with torch.inference_mode():
            return torch.sigmoid(model(dense, sparse))

    return run


def full_tables(model: DLRM, max_rows: int | None = None) -> tuple[DLRM, Tensor]:
    """The same MLPs and interaction with a table for each feature, as large as memory allows.

    Args:
        max_rows: of a table, at most; None: as many as 0.6 of the memory that is free holds.

    Returns:
        (model, rows of each feature's table). The weights are constants: only its speed means anything.
    """
    config = model.config
    rows = table_rows(config, _SHARE_OF_MEMORY * free_memory(), max_rows)
    tables = [torch.full((n, config.embedding_dim), 0.01) for n in rows]
    own = replace(config, embedding="full", table_rows=tuple(rows), compression=None, robe_size=None, vocabulary=False)
    with torch.device("meta"):  # no second copy of the MLPs
        other = DLRM(own, torch.nn.Identity())
    other.bottom, other.interaction, other.top = model.bottom, model.interaction, model.top
    other.embeddings = EmbeddingBags(tables)
    hots = config.data_hots or (1,) * len(rows)
    return other, torch.tensor(rows).repeat_interleave(torch.tensor(hots))


def table_rows(config: DLRMConfig, budget: float, max_rows: int | None = None) -> list[int]:
    """The rows of full tables with the largest cap on them that makes all tables fit into budget bytes."""
    low, high = 1, min(max(config.table_rows), max_rows or max(config.table_rows))
    while low < high:
        cap = (low + high + 1) // 2
        fits = sum(min(n, cap) for n in config.table_rows) * config.embedding_dim * 4 <= budget
        low, high = (cap, high) if fits else (low, cap - 1)
    return [min(n, low) for n in config.table_rows]


def report(results: Sequence[dict[str, Any]], against: str) -> str:
    """A table of results: dictionaries with batch_size, candidate and what ``measure`` gives.

    Args:
        against: the candidate whose rows a second others are divided by.
    """
    width = max(len(result["candidate"]) for result in results)
    lines = [
        f"{'batch':>6}  {'':{width}} {'rows/s':>10} {'':>7} {'p50 ms':>9} {'p90':>9} {'p99':>9}"
        + "".join(f" {stage:>11}" for stage in STAGES)
    ]
    base = {r["batch_size"]: r["rows_per_second"] for r in results if r["candidate"] == against}
    for result in results:
        ms, stages = result["milliseconds"], result["stages"]
        ratio = f"{result['rows_per_second'] / base[result['batch_size']]:.2f}x"
        lines.append(
            f"{result['batch_size']:6}  {result['candidate']:{width}} {result['rows_per_second']:10,.0f} {ratio:>7}"
            + "".join(f" {ms[p]:9.3f}" for p in ("p50", "p90", "p99"))
            + "".join(f" {stages[stage]:11.3f}" if stages else f" {'':11}" for stage in STAGES).rstrip()
        )
    return "\n".join(lines)


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its control group if that has less."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(int(text) - int(used.read_text()))
    return min(free)
