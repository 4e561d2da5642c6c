"""Latency and throughput of models by batch size, side by side, and the time that each stage takes."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlrm.batch import Batch
from dlrm.config import DLRMConfig
from dlrm.embeddings import EmbeddingBags
from dlrm.inference.export import FORMATS, load
from dlrm.inference.predictor import Predictor, array_bytes
from dlrm.machine import available_memory
from dlrm.metrics import Scores
from dlrm.model import DLRM
from dlrm.sparsity import is_pruned
from robe import RobeEmbeddingBagCollection

STAGES = ("embedding", "interaction", "mlp")
BATCH_SIZES = (1, 4, 16, 64, 256, 1024, 2048, 4096, 16384)

_TURN = 0.1  # seconds of calls of one candidate before the next one's turn
_PAUSE = 0.06  # seconds before a turn: ONNX Runtime's threads keep cores busy for 40 ms after their last work
_SHARE_OF_MEMORY = 0.6  # most of the available memory that full tables take

Clock = Callable[[str], None] | None


class TensorBatch(NamedTuple):
    """A batch without labels: dense (B, num_dense) float32 and sparse (B, H) int64."""

    dense: Tensor
    sparse: Tensor


class FullTables(NamedTuple):
    """A DLRM with a table for each feature, and the size (H,) of the table that each id is looked up in."""

    model: DLRM
    num_embeddings: Tensor


@dataclass
class Candidate:
    """A model to time.

    Attributes:
        run: (dense, sparse, clock) -> probabilities (B,). The clock is that of Predictor, or None, and
            need not be called.
        note: a remark for the report.
        num_embeddings: (H,), the size of each id's table, for models that take only ids below it; None: any id.
        scores: auc, log_loss and rows, once known.
    """

    run: Callable[[Tensor, Tensor, Clock], Tensor]
    note: str
    num_embeddings: Tensor | None = None
    scores: dict[str, Any] | None = None

    def inputs(self, batches: Sequence[TensorBatch]) -> list[TensorBatch]:
        """Return batches whose ids this model takes: modulo the size of their tables, where that is needed."""
        if self.num_embeddings is None:
            return list(batches)
        return [TensorBatch(dense, torch.remainder(sparse, self.num_embeddings)) for dense, sparse in batches]


def make_candidates(
    model: DLRM, array_dtype: str, mlp_dtype: str, against: Sequence[str], max_table_rows: int | None = None
) -> dict[str, Candidate]:
    """Return a model and its rivals, by name.

    The first is the model in the given dtypes. If these are not float32, the model in float32 comes next.

    Args:
        model: a DLRM on the CPU.
        array_dtype: as for Predictor.
        mlp_dtype: as for Predictor.
        against: the rivals. "full": the model with full tables and MLPs that were not pruned; "full-pruned": full
            tables with the model's MLPs, pruned as they are; "eager": the model as a torch module; or the path of an
            exported file.
        max_table_rows: limit of the rows of a full table.

    Raises:
        ValueError: an unknown rival, or dtypes as in Predictor.
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
        elif what in ("full", "full-pruned"):
            dense_twin = what == "full" and is_pruned(model)
            full, num_embeddings = full_tables(model, max_table_rows, dense_twin)
            used, all_rows = sum(full.config.table_rows), sum(model.config.table_rows)
            note = f"{used:,} rows of {all_rows:,}, {_megabytes(array_bytes(full.embeddings))}, ids modulo rows"
            if dense_twin:
                note += "; MLPs of the same sizes with random weights, as the model's are pruned"
            name = "full tables, pruned" if what == "full-pruned" else "full tables"
            candidates[name] = Candidate(Predictor(full), note, num_embeddings)
            candidates[f"{name}, eager"] = Candidate(eager(full), "the same", num_embeddings)
        elif Path(what).suffix in FORMATS.values() and Path(what).is_file():
            run = load(what)
            candidates[what] = Candidate(_without_clock(run), f"{Path(what).stat().st_size / 1e6:,.1f} MB in all")
        else:
            raise ValueError(f"against: expected full, full-pruned, eager or a file that export made, got {what!r}")
    return candidates


def _without_clock(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Clock], Tensor]:
    return lambda dense, sparse, clock: run(dense, sparse)


def _describe(model: DLRM) -> str:
    if isinstance(model.embeddings, RobeEmbeddingBagCollection):
        return f"ROBE {4 * model.config.full_floats / array_bytes(model.embeddings):.4g}x"
    return {"hash": "hash trick", "full": "trained tables"}.get(model.config.embedding, "model")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB of embeddings"


def cut(dense: np.ndarray, sparse: np.ndarray, batch_size: int) -> list[TensorBatch]:
    """Cut rows into at most 256 batches of one size. Rows are repeated if there are too few for one batch."""
    count = min(max(len(dense) // batch_size, 1), 256)
    places = np.arange(count * batch_size) % len(dense)
    tensors = torch.from_numpy(dense[places]), torch.from_numpy(sparse[places])
    return [TensorBatch(*pair) for pair in zip(*(x.split(batch_size) for x in tensors))]


def score_all(candidates: Mapping[str, Candidate], batches: Iterable[Batch], progress: Callable[[int], object]) -> None:
    """Set the scores of all candidates but full tables, which are not trained.

    Args:
        candidates: the models.
        batches: labelled rows.
        progress: called with the number of rows of each batch.

    Raises:
        ValueError: a batch has no labels, or a model predicts NaN.
    """
    trained = [(candidate, Scores()) for candidate in candidates.values() if candidate.num_embeddings is None]
    for batch in batches:
        if batch.labels is None:
            raise ValueError("labels: expected to score models, got none")
        for candidate, scores in trained:
            inputs = torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse)
            scores.add(batch.labels, candidate.run(*inputs, None).numpy())
        progress(len(batch.dense))
    for candidate, scores in trained:
        candidate.scores = scores.result()


def measure_all(
    candidates: Mapping[str, Candidate], rows: Batch, batch_sizes: Iterable[int], seconds: float
) -> list[dict[str, Any]]:
    """Time candidates at several batch sizes.

    Args:
        candidates: the models, by name.
        rows: to cut batches from; so many that their ids do not stay in the caches.
        batch_sizes: rows of a batch.
        seconds: for each batch size, about.

    Returns:
        A dictionary for each batch size and candidate: batch_size, candidate and what ``measure`` returns.
    """
    results = []
    for size in batch_sizes:
        times = measure(candidates, cut(rows.dense, rows.sparse, size), seconds)
        results += [{"batch_size": size, "candidate": name, **values} for name, values in times.items()]
    return results


def measure(
    candidates: Mapping[str, Candidate], batches: Sequence[TensorBatch], seconds: float, least_calls: int = 50
) -> dict[str, dict[str, Any]]:
    """Time candidates in turns, so that whatever disturbs the machine disturbs all of them.

    Args:
        candidates: the models, by name.
        batches: of one size, used again and again; so many that their ids do not stay in the caches.
        seconds: for all candidates together, about.
        least_calls: of each candidate.

    Returns:
        For each candidate: rows_per_second (from the median), milliseconds {p50, p90, p99, mean} of a call, calls, and
        stages, the mean milliseconds of each of STAGES, from calls of their own, in which the stages run one after the
        other; None for candidates that do not use the clock.
    """
    inputs = {name: candidate.inputs(batches) for name, candidate in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for name, candidate in candidates.items():
        for batch in inputs[name][:3]:
            candidate.run(*batch, None)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(next(iter(times.values()))) < least_calls:
        for name, own in inputs.items():
            time.sleep(_PAUSE)
            run = candidates[name].run
            run(*own[len(times[name]) % len(own)], None)  # refills the caches
            turn = time.perf_counter()
            while time.perf_counter() - turn < _TURN:
                batch = own[len(times[name]) % len(own)]
                start = time.perf_counter()
                run(*batch, None)
                times[name].append(time.perf_counter() - start)
            turn = time.perf_counter()
            while time.perf_counter() - turn < _TURN / 5 and {} not in stages[name]:
                stages[name].append(_stages_of(run, own[len(stages[name]) % len(own)]))
    return {name: _summary(times[name], stages[name], len(batches[0].dense)) for name in candidates}


def _stages_of(run: Callable[[Tensor, Tensor, Clock], Tensor], batch: TensorBatch) -> dict[str, float]:
    """Return the seconds of each stage of a call; {} if it does not use the clock."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def clock(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage] = seconds.get(stage, 0) + now - last
        last = now

    run(*batch, clock)
    return seconds


def _summary(seconds: list[float], stages: list[dict[str, float]], batch_size: int) -> dict[str, Any]:
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
        "stages": None
        if {} in stages
        else {stage: sum(x[stage] for x in stages) / len(stages) * 1e3 for stage in STAGES},
    }


def eager(model: DLRM) -> Callable[[Tensor, Tensor, Clock], Tensor]:
    """Return a function that runs the model as a torch module, as most programs do."""
    model.eval()

    def run(dense: Tensor, sparse: Tensor, clock: Clock) -> Tensor:
        with torch.inference_mode():
            return torch.sigmoid(model(dense, sparse))

    return run


def full_tables(model: DLRM, max_table_rows: int | None = None, dense_twin: bool = False) -> FullTables:
    """Return the same MLPs and interaction with a table for each feature, as large as memory allows.

    The weights of the tables are constants: the model is good for timing only.

    Args:
        model: a DLRM on the CPU.
        max_table_rows: limit of the rows of a table; None: as many as fit into 0.6 of the available memory.
        dense_twin: give it MLPs and an interaction of the same sizes with random weights, none of them zero.
    """
    config = model.config
    sizes = table_rows(config, _SHARE_OF_MEMORY * available_memory(), max_table_rows)
    tables = [torch.full((n, config.embedding_dim), 0.01) for n in sizes]
    own = replace(
        config,
        embedding="full",
        table_rows=tuple(sizes),
        compression=None,
        robe_size=None,
        vocabulary=False,
        admission_bytes=0,
    )
    if dense_twin:
        other = DLRM(own, torch.nn.Identity())
    else:
        with torch.device("meta"):  # no second copy of the MLPs
            other = DLRM(own, torch.nn.Identity())
        other.bottom, other.interaction, other.top = model.bottom, model.interaction, model.top
    other.embeddings = EmbeddingBags(tables)
    hots = config.data_hots or (1,) * len(sizes)
    return FullTables(other, torch.tensor(sizes).repeat_interleave(torch.tensor(hots)))


def table_rows(config: DLRMConfig, budget: float, max_table_rows: int | None = None) -> list[int]:
    """Return the rows of each full table under the largest common cap that makes them fit.

    Args:
        config: names the rows of each table without a cap.
        budget: bytes for all tables together.
        max_table_rows: limit of the cap.
    """
    low, high = 1, min(max(config.table_rows), max_table_rows or max(config.table_rows))
    while low < high:
        cap = (low + high + 1) // 2
        fits = sum(min(n, cap) for n in config.table_rows) * config.embedding_dim * 4 <= budget
        low, high = (cap, high) if fits else (low, cap - 1)
    return [min(n, low) for n in config.table_rows]


def report(results: Sequence[dict[str, Any]], against: str) -> str:
    """Return a table of results as text.

    Args:
        results: of ``measure_all``.
        against: the candidate by whose rows a second the others' are divided.
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
