"""What do the embeddings cost beside the MLPs, in whole training steps and forwards of the DLRM?

    python -m benchmarks.step --output runs/step.json

Takes 10 tables of figures of --seconds each, and the time to fill the full tables: about 3 minutes, and 11 GB of
memory. Prints a table for each preset and batch size, and writes the same as JSON.

A training step is forward, loss, backward and SGD. "embeddings constant" is the same step with a constant tensor in
place of the embeddings: MLPs and interaction alone, the floor. Forwards are compared with 26 nn.EmbeddingBag on full
tables (the presets' rows, at most 3 million each: --max-rows) and with the MLPs alone. Every candidate is measured in
every round. With "+ admission", a filter of an eighth of the array's memory lets in half of the lookups.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import robe
from benchmarks.results import save
from benchmarks.timing import (
    ADMISSION,
    COPIES_OF_IDS,
    LARGE,
    admitting_layer,
    cycle,
    make_ids,
    parse,
    robe_layer,
    side_by_side,
    times_without_admission,
)
from dlrm import DLRM
from dlrm.config import DLRMConfig
from dlrm.embeddings import EmbeddingBags
from dlrm.presets import PRESETS

STEP_BATCHES, FORWARD_BATCHES = (256, 2048), (1, 64, 2048)


class LabelledBatch(NamedTuple):
    """Inputs of a training step: dense (B, num_dense), sparse (B, F) and labels (B,)."""

    dense: Tensor
    sparse: Tensor
    labels: Tensor


class Constant(nn.Module):
    """Embeddings that are the same for all ids."""

    def __init__(self, batch_size: int, features: int, dim: int):
        super().__init__()
        self.register_buffer("embeddings", torch.rand(batch_size, features, dim) * 0.01)

    def forward(self, sparse: Tensor) -> Tensor:
        """Return (B, F, D)."""
        return self.embeddings


def with_embeddings(config: DLRMConfig, embeddings: nn.Module) -> DLRM:
    """Return a DLRM with the same MLPs each time."""
    torch.manual_seed(0)
    return DLRM(config, embeddings)


def stepper(model: DLRM, optimizers: list[torch.optim.Optimizer]) -> Callable[[LabelledBatch], None]:
    """Return a function that makes a training step."""

    def step(batch: LabelledBatch) -> None:
        dense, sparse, labels = batch
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        functional.binary_cross_entropy_with_logits(model(dense, sparse), labels).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def mlps_only(model: DLRM, batch_size: int) -> Callable[[LabelledBatch], None]:
    """Return a function that computes the MLPs of a model, without embeddings and interaction."""
    width = model.top[0].in_features
    joined = torch.rand(batch_size, width)

    def forward(batch: LabelledBatch) -> None:
        model.bottom(batch.dense)
        model.top(joined)

    return forward


def training(config: DLRMConfig, full: list[Tensor], batch_size: int, seconds: float) -> dict:
    """Return the times of training steps in microseconds, by name of the candidate."""
    dim = config.embedding_dim
    rng = np.random.default_rng(0)
    inputs = batches(config, [len(w) for w in full], batch_size, rng)
    candidates = {}

    def add(name: str, embeddings: nn.Module, fused: bool = False):
        model = with_embeddings(config, embeddings)
        inside = list(model.embeddings.parameters())
        others = [p for p in model.parameters() if all(p is not q for q in inside)]
        optimizers: list = [torch.optim.SGD(others, lr=0.01)]
        if fused:
            optimizers.append(robe.optim.SGD(model.embeddings, lr=0.01))
        elif inside:
            optimizers.append(torch.optim.SGD(inside, lr=0.01))
        candidates[name] = cycle(stepper(model, optimizers), inputs)

    add("embeddings constant", Constant(batch_size, len(full), dim))
    for label, size in {"1000x": config.full_floats // 1000, "100 MB": LARGE}.items():
        for block in sorted({8, dim}):
            add(f"ROBE {label}, Z={block}", robe_layer(len(full), dim, size, block), fused=True)
            if label == "1000x":
                filtered = admitting_layer(len(full), dim, size, block, [batch.sparse for batch in inputs])
                add(f"ROBE {label}{ADMISSION}, Z={block}", filtered, fused=True)
        add(f"ROBE {label}, Z={dim}, dense gradient", robe_layer(len(full), dim, size, dim))
    add("26 nn.EmbeddingBag, sparse gradients", EmbeddingBags(full, sparse=True))
    return side_by_side(candidates, seconds)


def forwards(config: DLRMConfig, full: list[Tensor], batch_size: int, seconds: float) -> dict:
    """Return the times of forwards in microseconds, by name of the candidate."""
    dim = config.embedding_dim
    rng = np.random.default_rng(0)
    inputs = batches(config, [len(w) for w in full], batch_size, rng)
    models = {
        f"ROBE 1000x, Z={dim}": with_embeddings(config, robe_layer(len(full), dim, config.full_floats // 1000, dim)),
        f"ROBE 100 MB, Z={dim}": with_embeddings(config, robe_layer(len(full), dim, LARGE, dim)),
        "26 nn.EmbeddingBag": with_embeddings(config, EmbeddingBags(full, sparse=False)),
    }
    candidates = {name: cycle(lambda batch, m=m: m(batch.dense, batch.sparse), inputs) for name, m in models.items()}
    candidates["MLPs alone"] = cycle(mlps_only(next(iter(models.values())), batch_size), inputs)
    with torch.inference_mode():
        return side_by_side(candidates, seconds)


def batches(
    config: DLRMConfig, table_rows: list[int], batch_size: int, rng: np.random.Generator
) -> list[LabelledBatch]:
    """Draw batches with Zipf ids."""
    return [
        LabelledBatch(
            torch.from_numpy(rng.random((batch_size, config.num_dense), dtype=np.float32)),
            torch.from_numpy(make_ids(tuple(table_rows), batch_size, "zipf", rng)),
            torch.from_numpy((rng.random(batch_size) < 0.25).astype(np.float32)),
        )
        for _ in range(COPIES_OF_IDS[batch_size])
    ]


def report(results: list[dict]) -> str:
    """Return results as tables of text."""
    lines = []
    for result in results:
        times = result["milliseconds"]
        base = times[result["against"]]["median"]
        lines.append(f"\n{result['preset']}, {result['what']}, B={result['batch_size']}")
        lines.append(f"  {'':42}{'median ms':>11}{'p20':>9}{'p80':>9}  against {result['against']}, without admission")
        for name, time in times.items():
            lines.append(
                f"  {name:42}{time['median']:11.3f}{time['p20']:9.3f}{time['p80']:9.3f}{time['median'] / base:9.3f}"
                f"{times_without_admission(times, name):>9}"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the program."""
    args = parse(__doc__, seconds=10)
    results = []
    with tqdm(total=5 * len(args.presets), unit="table") as bar:
        for name in args.presets:
            preset = PRESETS[name].model
            table_rows = tuple(min(n, args.max_rows) for n in preset.table_rows)
            config = replace(preset, table_rows=table_rows)
            full = [torch.full((n, config.embedding_dim), 0.01) for n in table_rows]
            for what, sizes, run, against in (
                ("forward", FORWARD_BATCHES, forwards, "MLPs alone"),
                ("training step", STEP_BATCHES, training, "embeddings constant"),
            ):
                for batch_size in sizes:
                    bar.set_description(f"{name}, {what}, B={batch_size}")
                    times = run(config, full, batch_size, args.seconds)
                    milliseconds = {
                        label: {k: v / 1e3 if k != "rounds" else v for k, v in time.items()}
                        for label, time in times.items()
                    }
                    results.append(
                        {
                            "preset": name,
                            "what": what,
                            "batch_size": batch_size,
                            "against": against,
                            "milliseconds": milliseconds,
                        }
                    )
                    bar.update()
            del full
    print(report(results))
    save(args.output, results)


if __name__ == "__main__":
    main()
