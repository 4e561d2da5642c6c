"""Timing of candidates side by side, and the layers and ids that several benchmarks time.

Every candidate is measured in every round, so that whatever disturbs the machine disturbs all of them. Calls that are
not timed precede each measurement, so that no candidate pays for what the one before it left in the caches: the figures
are those of a program that does nothing else.

Not a program: benchmarks.embedding, benchmarks.step and benchmarks.mlp use it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import robe
from robe.backends import INSTRUCTION_SETS, set_instruction_set

# Batch size -> different batches to go through. The same ids again and again would lie in the cache.
COPIES_OF_IDS = {1: 256, 64: 64, 256: 32, 2048: 8, 65536: 2}

LARGE = 25_000_000  # weights of a large array: 100 MB

ADMISSION = " + admission"  # part of the names of candidates that have one


def side_by_side(
    candidates: dict[str, Callable[[], object]],
    seconds: float,
    least_rounds: int = 5,
    device: str = "cpu",
    against: str | None = None,
) -> dict[str, dict[str, float]]:
    """Time callables in turns.

    Args:
        candidates: name -> function to time; called many times.
        seconds: for all of them together, about.
        least_rounds: least measurements of each.
        device: where they compute. With "cuda", a measurement ends when the device is done.
        against: a candidate by which the others are divided, round by round.

    Returns:
        name -> median, p20 and p80 of a call in microseconds, and rounds. With ``against``, also times_faster,
        times_faster_p20 and times_faster_p80: how many times as fast as that candidate.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    calls = {}
    for run in candidates.values():  # compiles kernels, which does not count as time spent
        for _ in range(2):
            run()
    start = time.perf_counter()
    for name, run in candidates.items():
        run()
        wait()
        once = time.perf_counter()
        run()
        wait()
        # A measurement takes a millisecond or more, so that the clock and the loop do not matter.
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
    results = {name: quantiles(times) | {"rounds": len(times)} for name, times in samples.items()}
    if against is not None:
        for name, times in samples.items():
            ratios = quantiles([base / time for base, time in zip(samples[against], times)])
            results[name]["times_faster"] = ratios.pop("median")
            results[name] |= {f"times_faster_{key}": value for key, value in ratios.items()}
    return results


def quantiles(values: list[float]) -> dict[str, float]:
    """Return p20, median and p80."""
    return dict(zip(("p20", "median", "p80"), np.percentile(values, [20, 50, 80]).tolist()))


def cycle(run: Callable[[Any], object], inputs: list) -> Callable[[], object]:
    """Return a function that calls ``run`` on the next of the inputs each time, and starts again after the last."""
    turn = 0

    def step():
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return run(inputs[turn])

    return step


def make_ids(table_rows: tuple[int, ...], batch_size: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Draw ids, int64 (B, F).

    Args:
        table_rows: rows of each feature's table, which bound its ids.
        batch_size: B.
        kind: "uniform"; or "zipf": P(k-th most frequent id) ~ 1 / k, with frequent ids anywhere in the table.
        rng: source of randomness.
    """
    share = rng.random((batch_size, len(table_rows)))
    sizes = np.array(table_rows, dtype=np.int64)
    if kind == "uniform":
        return (share * sizes).astype(np.int64)
    rank = np.minimum(np.exp(share * np.log(sizes + 1)).astype(np.int64) - 1, sizes - 1)
    return (rank.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) % sizes.astype(np.uint64)).astype(np.int64)


def robe_layer(
    features: int, dim: int, size: int, block_size: int, device: str = "cpu"
) -> robe.RobeEmbeddingBagCollection:
    """Return a collection with a virtual table for each feature, without bounds, on an array of ``size`` weights."""
    tables = [robe.EmbeddingBagConfig(f"cat_{i}", None, dim) for i in range(features)]
    return robe.RobeEmbeddingBagCollection(tables, robe_size=size, block_size=block_size, device=device)


def admitting_layer(
    features: int, dim: int, size: int, block_size: int, ids: list[Tensor]
) -> robe.RobeEmbeddingBagCollection:
    """Return a ``robe_layer`` with an admission: a filter an eighth of the array's size, full at 8 bits an id.

    Args:
        features: number of tables.
        dim: D.
        size: weights of the array.
        block_size: Z.
        ids: batches (B, F). The most frequent ids, which make half of all lookups, are let in.
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
    others = torch.randint(1 << 62, (admission.bytes - len(order),), device=device)  # never looked up
    admission.admit(others, keys[:1])
    layer.admission = admission
    return layer


def times_without_admission(times: dict[str, dict[str, float]], name: str) -> str:
    """Return the time of a candidate with an admission over that of the same without; "" for other candidates."""
    without = times.get(name.replace(ADMISSION, ""))
    return f"{times[name]['median'] / without['median']:.2f}" if without and ADMISSION in name else ""


def parse(
    description: str | None, seconds: float, devices: tuple[str, ...] = ("cpu",), tables: bool = True
) -> argparse.Namespace:
    """Parse the command line of a benchmark.

    Args:
        description: for --help.
        seconds: default for each table of figures.
        devices: where the benchmark can run; the first is the default.
        tables: whether it has full tables.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=("kaggle", "terabyte"),
        default=["kaggle", "terabyte"],
        help="model sizes (default: both)",
    )
    if tables:
        parser.add_argument(
            "--max-rows",
            type=int,
            default=3_000_000,
            metavar="N",
            help="limit of the rows of a full table (default: %(default)s)",
        )
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        metavar="X",
        help="seconds for each table of figures (default: %(default)g)",
    )
    parser.add_argument(
        "--instruction-set",
        choices=INSTRUCTION_SETS,
        help="kernels of another instruction set than the widest of this CPU",
    )
    if len(devices) > 1:
        parser.add_argument("--device", choices=devices, default=devices[0], help="default: %(default)s")
    args = parser.parse_args()
    if len(devices) > 1 and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, torch finds no CUDA device here")
    if args.instruction_set is not None:
        try:
            set_instruction_set(args.instruction_set)
        except ValueError as error:
            parser.error(f"--instruction-set: {error}")
    return args
