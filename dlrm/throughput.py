"""How fast models answer: latency and throughput by batch size, side by side, and where the time goes."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlrm.config import DLRMConfig
from dlrm.embeddings import EmbeddingBags
from dlrm.model import DLRM

STAGES = ("embedding", "interaction", "mlp")
BATCH_SIZES = tuple(4**i for i in range(8))  # 1 .. 16384

_TURN = 0.02  # seconds of calls of one candidate before it is the next one's turn
_SHARE_OF_MEMORY = 0.6  # that full tables may take

Batch = tuple[Tensor, Tensor]  # dense (B, num_dense), sparse (B, H)


@dataclass
class Candidate:
    """What is timed.

    Args:
        run: called with dense, sparse and a clock as in dlrm.inference.Predictor, which it may leave alone.
        rows: of each feature's table, where ids must be within them; None: ids as they are.
    """

    run: Callable[[Tensor, Tensor, Callable[[str], None]], Any]
    rows: Tensor | None = None

    def inputs(self, batches: Sequence[Batch]) -> list[Batch]:
        if self.rows is None:
            return list(batches)
        return [(dense, torch.remainder(sparse, self.rows)) for dense, sparse in batches]


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
            candidates[name].run(*own[len(times[name]) % len(own)], lambda _: None)  # what was there is in no cache
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


def eager(model: DLRM) -> Callable[[Tensor, Tensor, Callable[[str], None]], Tensor]:
    """The model as a torch module."""
    model.eval()

    def run(dense: Tensor, sparse: Tensor, clock: Callable[[str], None]) -> Tensor:
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
    with torch.device("meta"):  # no second copy of the MLPs
        other = DLRM(config, torch.nn.Identity())
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


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its control group if that has less."""
    free = [
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    ]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(int(text) - int(used.read_text()))
    return min(free)
