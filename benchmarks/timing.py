"""Timing side by side: every candidate in every round, so that what disturbs the machine disturbs all of them.

Each measurement is preceded by calls that are not timed, so that no candidate pays for what the one before it left in
the caches: the figures are those of a program that does nothing else.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import robe
from dlrm.checkpoint import write_json
from dlrm.machine import environment

COPIES_OF_IDS = {
    1: 256,
    64: 64,
    256: 32,
    2048: 8,
    65536: 2,
}  # batches to go through: the same ids again would lie in the cache

LARGE = 25_000_000  # weights: 100 MB

ADMISSION = " + admission"  # in the names of candidates that have one


def side_by_side(
    candidates: dict[str, Callable[[], object]], seconds: float, least_rounds: int = 5, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time callables in turns.

    Args:
        candidates: name -> what to time; called many times.
        seconds: to spend in all, about.
        least_rounds: measurements of each, at least.
        device: where they compute; with "cuda" a measurement ends when the device has.

    Returns:
        name -> median, p20 and p80 of the microseconds of a call, and rounds.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    calls = {}
    for run in candidates.values():  # compiles kernels, and is not of the time to spend
        for _ in range(2):
            run()
    start = time.perf_counter()
    for name, run in candidates.items():
        run()
        wait()
        once = time.perf_counter()
        run()
        wait()
        # A measurement of a millisecond or more, so that the clock and the loop weigh nothing.
        calls[name] = max(1, round(1e-3 / max(time.perf_counter() - once, 1e-6)))
    seconds -= time.perf_counter() - start
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(samples.values()))) < least_rounds:
        for name, run in candidates.items():
            count = calls[name]
            for _ in range((count + 1) // 2):
                run()
            wait()
            begin = time.perf_counter()
            for _ in range(count):
                run()
            wait()
            samples[name].append((time.perf_counter() - begin) / count * 1e6)
    return {name: quantiles(times) | {"rounds": len(times)} for name, times in samples.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, median and p80."""
    return dict(zip(("p20", "median", "p80"), np.percentile(values, [20, 50, 80]).tolist()))


def cycle(run: Callable[[Any], object], inputs: list) -> Callable[[], object]:
    """A callable that goes through the inputs, one a call."""
    turn = 0

    def step():
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return run(inputs[turn])

    return step


def make_ids(rows: tuple[int, ...], batch_size: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """(B, F) int64 ids, each within its table's rows.

    Args:
        kind: "uniform"; or "zipf", P(k-th most frequent id) ~ 1 / k, frequent ids anywhere in the table.
    """
    share = rng.random((batch_size, len(rows)))
    sizes = np.array(rows, dtype=np.int64)
    if kind == "uniform":
        return (share * sizes).astype(np.int64)
    rank = np.minimum(np.exp(share * np.log(sizes + 1)).astype(np.int64) - 1, sizes - 1)
    return (rank.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) % sizes.astype(np.uint64)).astype(np.int64)


def robe_layer(
    features: int, dim: int, size: int, block_size: int, device: str = "cpu"
) -> robe.RobeEmbeddingBagCollection:
    """A table without end for each feature, on an array of ``size`` weights."""
    tables = [robe.EmbeddingBagConfig(f"cat_{i}", None, dim) for i in range(features)]
    return robe.RobeEmbeddingBagCollection(tables, robe_size=size, block_size=block_size, device=device)


def admitting_layer(
    features: int, dim: int, size: int, block_size: int, ids: list[Tensor]
) -> robe.RobeEmbeddingBagCollection:
    """A ``robe_layer`` with a filter an eighth the size of its array, full at 8 bits an id.

    Args:
        ids: batches (B, F): the most frequent are let in, so many that they are half of all.
    """
    device = ids[0].device
    layer = robe_layer(features, dim, size, block_size, str(device))
    admission = robe.Admission(layer.array.size // 16 * 8, device=device)
    columns = [column.unique(return_counts=True) for column in torch.cat(ids).T]
    values, counts = (torch.cat(tensors) for tensors in zip(*columns))
    keys = layer.table_keys.repeat_interleave(torch.tensor([len(column) for column, _ in columns], device=device))
    order = (counts + torch.rand_like(counts, dtype=torch.float32)).argsort(descending=True)
    order = order[counts[order].cumsum(0) <= counts.sum() / 2][: admission.bytes]
    admission.admit(values[order], keys[order])
    admission.admit(
        torch.randint(1 << 62, (admission.bytes - len(order),), device=device), keys[:1]
    )  # ids that are not looked up
    layer.admission = admission
    return layer


def times_without_admission(times: dict[str, dict[str, float]], name: str) -> str:
    """The time of a candidate with an admission, in times of the same without; nothing for the others."""
    without = times.get(name.replace(ADMISSION, ""))
    return f"{times[name]['median'] / without['median']:.2f}" if without and ADMISSION in name else ""


def parse(description: str | None, seconds: float, devices: tuple[str, ...] = ("cpu",)) -> argparse.Namespace:
    """The options of a benchmark: ``seconds`` the default for each table of figures, ``devices`` where it can run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--presets", nargs="+", choices=("kaggle", "terabyte"), default=["kaggle", "terabyte"])
    parser.add_argument("--max-rows", type=int, default=3_000_000, help="cap of the rows of the full tables")
    parser.add_argument("--seconds", type=float, default=seconds, help="for each table of figures")
    if len(devices) > 1:
        parser.add_argument("--device", choices=devices, default=devices[0])
    args = parser.parse_args()
    if len(devices) > 1 and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, torch finds no CUDA device here")
    return args


def save(path: Path, results: list[dict], device: str = "cpu") -> None:
    """Write results as JSON, with the machine they belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = environment() | {"kernels": robe.backend()[device], "load_average": os.getloadavg()[0]}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    write_json(path, {"machine": machine, "results": results})
