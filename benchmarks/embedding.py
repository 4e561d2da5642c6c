"""How fast are the embeddings of a batch? ROBE against nn.EmbeddingBag and fbgemm's table-batched embeddings.

    python -m benchmarks.embedding --output runs/embedding.json
    python -m benchmarks.embedding --device cuda --output runs/embedding_cuda.json

Takes 12 tables of figures of --seconds each, and the time to fill the tables: about 2 minutes, and 15 GB of memory.
Prints a table for each preset, kind of ids and batch size, and writes the same as JSON.

Forward of all 26 features, one id each, float32, every candidate in every round. Full tables have the presets' rows, at
most 3 million each (--max-rows; 9.8 GB for terabyte). "copy of the output" is the time to copy as much as is computed.
fbgemm is measured if it is installed (fbgemm-gpu-cpu; on CUDA fbgemm-gpu): "fbgemm TBE" is
SplitTableBatchedEmbeddingBags, which trains; "fbgemm TBE inference" is IntNBitTableBatchedEmbeddingBags with float32
rows, on smaller tables that fit beside the others. With "+ admission", a filter of an eighth of the array's memory lets
in half of the lookups. Batches are larger on CUDA, where it takes tens of microseconds to launch a call.
"""

import importlib.metadata
import sys
import warnings

import numpy as np
import torch
from torch import nn
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
from dlrm.presets import PRESETS
from robe.ops import REFERENCE
from robe.ops.layout import Tables

BATCHES = {"cpu": (1, 64, 2048), "cuda": (64, 2048, 65536)}
INFERENCE_ROWS = 300_000  # limit of a table of fbgemm's inference kernel


class Peers:
    """The full tables that ROBE is compared with, as one set of weights that nn.EmbeddingBag and fbgemm both read.

    Args:
        table_rows: rows of each table.
        dim: D.
        device: where they lie.
    """

    def __init__(self, table_rows: tuple[int, ...], dim: int, device: str):
        self.device = device
        self.tbe = self.inference = None
        package = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}[device]
        if not _is_installed(package):
            print(f"{package} is not installed: fbgemm is left out", file=sys.stderr)
            weights = [torch.rand(n, dim, device=device) for n in table_rows]
        else:
            self.tbe, self.inference = _fbgemm(table_rows, dim, device)
            weights = self.tbe.split_embedding_weights()
        self.bags = [nn.EmbeddingBag.from_pretrained(weight, mode="sum") for weight in weights]

    def candidates(self, batches: list[np.ndarray]) -> dict:
        """Return the calls to time, by name, on batches of ids (B, F)."""
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


def _fbgemm(table_rows: tuple[int, ...], dim: int, device: str):
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
        [(n, dim, where, ComputeDevice.CUDA if cuda else ComputeDevice.CPU) for n in table_rows],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=0.1,
        pooling_mode=PoolingMode.SUM,
    )
    for weight in tbe.split_embedding_weights():
        weight.fill_(0.01)  # or all pages would be the same page of zeros
    inference = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"t{i}", min(n, INFERENCE_ROWS), dim, SparseType.FP32, where) for i, n in enumerate(table_rows)],
        device=device,
        pooling_mode=PoolingMode.SUM,
        output_dtype=SparseType.FP32,
    )
    inference.fill_random_weights()
    return tbe, inference


def reference(layer: robe.RobeEmbeddingBagCollection):
    """Return the layer's lookup by the reference, in plain torch."""
    weight = layer.array.weight.detach()
    tables = Tables(
        table_keys=layer.table_keys,
        num_embeddings=layer.num_embeddings_per_feature,
        embedding_dim=layer.embedding_dim,
        block_size=layer.block_size,
        hash=layer.hash,
        sign=layer.sign,
        padding_idx=None,
    )
    return lambda ids: REFERENCE["lookup"](weight, ids, *tables)


def measure(name: str, max_rows: int, seconds: float, device: str, bar: tqdm) -> list[dict]:
    """Return the times of a preset, for each kind of ids and batch size."""
    preset = PRESETS[name].model
    table_rows, dim = tuple(min(n, max_rows) for n in preset.table_rows), preset.embedding_dim
    features = len(table_rows)
    peers = Peers(table_rows, dim, device)
    arrays = {"1000x": sum(table_rows) * dim // 1000, "100 MB": LARGE}
    layers = {
        f"ROBE {array}, Z={block}": robe_layer(features, dim, size, block, device)
        for array, size in arrays.items()
        for block in sorted({8, 16, 32, dim} - ({32} if dim < 32 else set()))
    }
    results = []
    for kind in ("uniform", "zipf"):
        for batch_size in BATCHES[device]:
            bar.set_description(f"{name}, {kind} ids, B={batch_size}")
            rng = np.random.default_rng(0)
            batches = [make_ids(table_rows, batch_size, kind, rng) for _ in range(COPIES_OF_IDS[batch_size])]
            candidates = peers.candidates(batches) | robe_candidates(layers, batches, kind == "uniform", device)
            with torch.no_grad():
                times = side_by_side(candidates, seconds, device=device)
            results.append({"preset": name, "ids": kind, "batch_size": batch_size, "microseconds": times})
            bar.update()
    return results


def robe_candidates(layers: dict, batches: list[np.ndarray], special: bool, device: str) -> dict:
    """Return the calls of ROBE to time, by name.

    Args:
        layers: by name.
        batches: ids (B, F).
        special: whether to add far ids and the reference, which do not depend on the kind of ids.
        device: where to compute.
    """
    ids = [torch.from_numpy(batch).to(device) for batch in batches]
    batch_size, features = ids[0].shape
    dim = next(iter(layers.values())).embedding_dim
    candidates = {}
    for label, layer in layers.items():
        candidates[label] = cycle(layer, ids)
        if label in (f"ROBE 1000x, Z={dim}", "ROBE 1000x, Z=8"):
            filtered = admitting_layer(features, dim, layer.array.size, layer.block_size, ids)
            candidates[label.replace(",", ADMISSION + ",")] = cycle(filtered, ids)
    source, target = torch.rand(2, batch_size, features, dim, device=device)
    candidates["copy of the output"] = lambda: target.copy_(source)
    if special:
        first = layers[f"ROBE 1000x, Z={dim}"]
        for power in (6, 12):  # rows of a virtual table
            far = [torch.randint_like(batch, 10**power) for batch in ids]
            candidates[f"ROBE 1000x, Z={dim}, 10^{power} rows"] = cycle(first, far)
        # Last: its allocations would slow down the next candidate.
        candidates[f"ROBE 1000x, Z={dim}, reference"] = cycle(reference(first), ids)
    return candidates


def report(results: list[dict]) -> str:
    """Return results as tables of text."""
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
    """Run the program."""
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
