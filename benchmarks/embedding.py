"""The embeddings of a batch, all 26 features: ROBE against 26 nn.EmbeddingBag and fbgemm's table-batched embeddings.

    python -m benchmarks.embedding --output runs/embedding.json
    python -m benchmarks.embedding --device cuda --output runs/embedding_cuda.json

Forward only, one id per feature, float32, every candidate in every round. Tables have the rows of the presets, those of
`terabyte` capped at 3 million (9.8 GB; --max-rows). fbgemm is measured where it is installed (pip install .[bench]; on
CUDA fbgemm-gpu): "fbgemm TBE" is SplitTableBatchedEmbeddingBags, which trains; "fbgemm TBE inference"
IntNBitTableBatchedEmbeddingBags with float32 rows, on tables capped so that they fit beside the others. With "+
admission", a filter of an eighth of the array's memory lets in half of the lookups. On CUDA, where a call takes tens of
microseconds to launch, batches are larger.
"""

import importlib.metadata
import sys
import warnings

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import robe
from benchmarks.timing import (
    ADMISSION,
    COPIES_OF_IDS,
    LARGE,
    admitting_layer,
    cycle,
    make_ids,
    parse,
    robe_layer,
    save,
    side_by_side,
    times_without_admission,
)
from dlrm.presets import PRESETS

BATCHES = {"cpu": (1, 64, 2048), "cuda": (64, 2048, 65536)}
INFERENCE_ROWS = 300_000  # of a table of fbgemm's inference kernel


class Peers:
    """The tables ROBE is compared with: one set of weights that nn.EmbeddingBag and fbgemm both read."""

    def __init__(self, rows: tuple[int, ...], dim: int, device: str):
        self.rows, self.dim, self.device = rows, dim, device
        self.tbe = self.inference = None
        package = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}[device]
        if not _is_installed(package):
            print(f"{package} is not installed: fbgemm is left out", file=sys.stderr)
            weights = [torch.rand(n, dim, device=device) for n in rows]
        else:
            self.tbe, self.inference = _fbgemm(rows, dim, device)
            weights = self.tbe.split_embedding_weights()
        self.bags = [nn.EmbeddingBag.from_pretrained(weight, mode="sum") for weight in weights]

    def candidates(self, batches: list[np.ndarray]) -> dict:
        size, features = batches[0].shape
        starts = torch.arange(size, device=self.device)
        offsets = torch.arange(size * features + 1, device=self.device)
        columns = [[torch.from_numpy(column.copy()).to(self.device) for column in ids.T] for ids in batches]
        found = {
            "26 nn.EmbeddingBag": cycle(
                lambda ids: [bag(column, starts) for bag, column in zip(self.bags, ids)], columns
            )
        }
        if self.tbe is not None:
            values = [torch.cat(column) for column in columns]
            found["fbgemm TBE"] = cycle(lambda v: self.tbe(v, offsets), values)
            narrow = [torch.cat([c % INFERENCE_ROWS for c in column]).int() for column in columns]
            narrow_offsets = offsets.int()
            found["fbgemm TBE inference"] = cycle(lambda v: self.inference(v, narrow_offsets), narrow)
        return found


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _fbgemm(rows: tuple[int, ...], dim: int, device: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    cuda = device == "cuda"
    where = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(n, dim, where, ComputeDevice.CUDA if cuda else ComputeDevice.CPU) for n in rows],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=0.1,
        pooling_mode=PoolingMode.SUM,
    )
    for weight in tbe.split_embedding_weights():
        weight.fill_(0.01)  # pages that were never written would all be one page of zeros
    inference = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"t{i}", min(n, INFERENCE_ROWS), dim, SparseType.FP32, where) for i, n in enumerate(rows)],
        device=device,
        pooling_mode=PoolingMode.SUM,
        output_dtype=SparseType.FP32,
    )
    inference.fill_random_weights()
    return tbe, inference


def reference(layer: robe.RobeEmbeddingBagCollection):
    """The layer's lookup by the reference body, in plain torch."""
    weight, tables = layer.array.weight.detach(), layer._tables()
    return lambda ids: robe.ops.REFERENCE["lookup"](weight, ids, *tables)


def measure(name: str, max_rows: int, seconds: float, device: str, bar: tqdm) -> list[dict]:
    preset = PRESETS[name].model
    rows, dim = tuple(min(n, max_rows) for n in preset.table_rows), preset.embedding_dim
    peers = Peers(rows, dim, device)
    arrays = {"1000x": sum(rows) * dim // 1000, "100 MB": LARGE}
    layers = {
        f"ROBE {array}, Z={block}": robe_layer(len(rows), dim, size, block, device)
        for array, size in arrays.items()
        for block in sorted({8, 16, 32, dim} - ({32} if dim < 32 else set()))
    }
    results = []
    for kind in ("uniform", "zipf"):
        for batch_size in BATCHES[device]:
            bar.set_description(f"{name}, {kind} ids, B={batch_size}")
            rng = np.random.default_rng(0)
            batches = [make_ids(rows, batch_size, kind, rng) for _ in range(COPIES_OF_IDS[batch_size])]
            ids = [torch.from_numpy(batch).to(device) for batch in batches]
            candidates = peers.candidates(batches)
            for label, layer in layers.items():
                candidates[label] = cycle(layer, ids)
                if label in (f"ROBE 1000x, Z={dim}", "ROBE 1000x, Z=8"):
                    filtered = admitting_layer(len(rows), dim, layer.array.size, layer.block_size, ids)
                    candidates[label.replace(",", ADMISSION + ",")] = cycle(filtered, ids)
            source, target = torch.rand(2, batch_size, len(rows), dim, device=device)
            candidates["copy of the output"] = lambda s=source, t=target: t.copy_(s)
            if kind == "uniform":
                first = layers[f"ROBE 1000x, Z={dim}"]
                for power in (6, 12):  # rows of a virtual table
                    far = [torch.randint_like(batch, 10**power) for batch in ids]
                    candidates[f"ROBE 1000x, Z={dim}, 10^{power} rows"] = cycle(first, far)
                # Last: what it allocates and frees would slow down the next one.
                candidates[f"ROBE 1000x, Z={dim}, reference"] = cycle(reference(first), ids)
            with torch.no_grad():
                times = side_by_side(candidates, seconds, device=device)
            results.append({"preset": name, "ids": kind, "batch_size": batch_size, "microseconds": times})
            bar.update()
    return results


def report(results: list[dict]) -> str:
    lines = []
    for result in results:
        times = result["microseconds"]
        best = min(times[name]["median"] for name in ("26 nn.EmbeddingBag", "fbgemm TBE") if name in times)
        copy = times["copy of the output"]["median"]
        lines.append(f"\n{result['preset']}, {result['ids']} ids, B={result['batch_size']}")
        lines.append(f"  {'':34}{'median us':>11}{'p20':>10}{'p80':>10}{'times faster':>14}{'copies':>8}{'without':>9}")
        for name, time in times.items():
            lines.append(
                f"  {name:34}{time['median']:11.1f}{time['p20']:10.1f}{time['p80']:10.1f}"
                f"{best / time['median']:14.2f}{time['median'] / copy:8.2f}{times_without_admission(times, name):>9}"
            )
    return "\n".join(lines)


def main() -> None:
    args = parse(__doc__, seconds=5, devices=("cpu", "cuda"))
    results = []
    with tqdm(total=6 * len(args.presets), unit="table") as bar:
        for name in args.presets:
            results += measure(name, args.max_rows, args.seconds, args.device, bar)
    print(report(results))
    print(
        "\ntimes faster: than the faster of nn.EmbeddingBag and fbgemm TBE; copies: of the time to copy the output;\n"
        "without: of the time without an admission"
    )
    save(args.output, results, args.device)


if __name__ == "__main__":
    main()
