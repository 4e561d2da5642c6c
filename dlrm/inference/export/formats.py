"""A DLRM as one file that needs neither this project nor Python: ONNX, or a library that torch compiles ahead of time.

Both take "dense" (B, num_dense) float32 and "sparse" (B, H) int64, the ids as DLRM takes them, and give "probability"
(B,) float32, for any B from 1. Weights are in the file; the hash is spelled out in the formats' own operators.
"""

import copy
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.embeddings import Tables, VocabularyTables
from dlrm.inference.export.aoti import quiet, write_aoti
from dlrm.inference.export.onnx_graph import optional_package, write_onnx
from dlrm.inference.predictor import with_array_dtype
from dlrm.model import DLRM
from robe import RobeEmbeddingBagCollection
from robe.saving import whole_file

FORMATS = {"onnx": ".onnx", "aoti": ".pt2"}  # with the suffix of their files
VERIFIED_ROWS = 10_000
TOLERANCE = 1e-5  # of a probability

_SIZES = (1, 2048, 3, 512, 1, 100)  # of the batches that a file is verified with, again and again

Rows = tuple[np.ndarray, np.ndarray]  # dense (B, num_dense) float32, sparse (B, H) int64


@dataclass
class Export:
    """A file that was written and verified.

    Attributes:
        rows: that it was compared with the model on.
        difference: the largest of a probability there.
        bytes: size of the file.
        seconds: that all of it took.
    """

    rows: int
    difference: float
    bytes: int
    seconds: float


def export(
    model: DLRM,
    path: str | Path,
    *,
    format: str,
    array_dtype: str = "float32",
    batches: Iterable[Rows] | None = None,
) -> Export:
    """Write a model as one file, load it again, and compare it with the model in torch.

    A file of that name is replaced once the new one has passed.

    Args:
        model: a DLRM on the CPU, with the embeddings of its config.
        path: of the file, ending with the format's suffix.
        format: "onnx", for ONNX Runtime and others; or "aoti", compiled for the CPU it is written on, for torch.
        array_dtype: the ROBE array is kept in, as for Predictor. Sums of several bfloat16 rows are not rounded.
        batches: rows to compare on, of which the first 10,000 count; None: random ones.

    Raises:
        ValueError: a format, suffix, dtype or model that does not fit; a package or the compiler is missing; or
            probabilities that differ from the model's by more than 1e-5.
        OSError: the file can't be written.
    """
    start = time.perf_counter()
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"path: expected a name that ends with {FORMATS[format]} for format {format}, got {path}")
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder; expected the name of a file")
    _check_embeddings(model.embeddings)
    rows = _random_rows(model) if batches is None else _first_rows(batches)
    embeddings = with_array_dtype(model.embeddings, array_dtype)
    write = {"onnx": write_onnx, "aoti": write_aoti}[format]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Both are loaded by a name with their suffix, so the temporary name is one in a folder of its own.
    with whole_file(path) as part, TemporaryDirectory(prefix=path.name, dir=path.parent) as folder:
        file = Path(folder) / path.name
        write(model, embeddings, file)
        difference = _largest_difference(load(file), _in_torch(model, embeddings), rows)
        if not difference <= TOLERANCE:  # nor NaN
            raise ValueError(
                f"{path}: not written: its probabilities differ from the model's by {difference:.2g}, "
                f"expected at most {TOLERANCE:.0e}"
            )
        size = file.stat().st_size
        os.replace(file, part)
    return Export(len(rows[0]), difference, size, time.perf_counter() - start)


def load(path: str | Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Load a file that ``export`` wrote.

    Args:
        path: ending with .onnx or .pt2; a .pt2 runs code that is in it, so it has to come from someone you trust.

    Returns:
        A function of dense (B, num_dense) float32 and sparse (B, H) int64 that returns probabilities (B,) float32. It
        computes with torch.get_num_threads() threads: for ONNX as many as there were when it was loaded.

    Raises:
        ValueError: another suffix, or ONNX Runtime is missing.
    """
    path = Path(path)
    if path.suffix not in FORMATS.values():
        raise ValueError(f"path: expected a name that ends with {' or '.join(FORMATS.values())}, got {path}")
    if path.suffix == FORMATS["aoti"]:
        from torch._inductor import aoti_load_package

        with quiet():
            package = aoti_load_package(str(path))
        return lambda dense, sparse: package(dense, sparse)
    runtime = optional_package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(dense: Tensor, sparse: Tensor) -> Tensor:
        inputs = {"dense": dense.numpy(), "sparse": sparse.numpy()}
        return torch.from_numpy(session.run(["probability"], inputs)[0])

    return run


def _check_embeddings(embeddings: nn.Module) -> None:
    if isinstance(embeddings, RobeEmbeddingBagCollection):
        bounded = bool(embeddings.num_embeddings_per_feature.any())
        if embeddings.hash != "mix" or embeddings.pooling != "sum" or bounded:
            raise ValueError(
                "embeddings: expected tables without num_embeddings, hash 'mix' and pooling 'sum', as DLRMConfig "
                f"makes them, got hash {embeddings.hash!r} and pooling {embeddings.pooling!r}"
            )
    elif not isinstance(embeddings, Tables):
        raise ValueError(f"embeddings: expected those of a DLRMConfig, got {type(embeddings).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# Verification


def _random_rows(model: DLRM) -> Rows:
    """Rows with every kind of id: small, of 32 bits, beyond, zero, negative, and known ones of a vocabulary."""
    config, rng = model.config, np.random.default_rng(0)
    dense = np.log1p(rng.geometric(0.05, (VERIFIED_ROWS, config.num_dense)) - 1).astype(np.float32)
    shape = VERIFIED_ROWS, config.num_ids
    known = rng.integers(0, 1 << 32, shape)
    if isinstance(model.embeddings, VocabularyTables):
        known = rng.choice(model.embeddings.keys.numpy(), shape) & 0xFFFFFFFF
    kinds = np.stack(
        [
            known,
            rng.integers(0, 1 << 32, shape),
            rng.integers(0, 100, shape),
            np.zeros(shape, np.int64),
            rng.integers(1 << 32, np.iinfo(np.int64).max, shape, endpoint=True),
            rng.integers(np.iinfo(np.int64).min, 0, shape),
            rng.integers(-100, 0, shape),
        ]
    )
    kind = rng.integers(0, len(kinds), shape)
    return dense, np.take_along_axis(kinds, kind[None], 0)[0]


def _first_rows(batches: Iterable[Rows]) -> Rows:
    parts: list[Rows] = []
    missing = VERIFIED_ROWS
    for dense, sparse in batches:
        parts.append((dense[:missing], sparse[:missing]))
        missing -= len(parts[-1][0])
        if not missing:
            break
    if missing == VERIFIED_ROWS:
        raise ValueError("batches: expected at least one row to compare on, got none")
    dense, sparse = (np.concatenate(arrays) for arrays in zip(*parts))
    return dense, sparse


def _in_torch(model: DLRM, embeddings: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What a file is compared with: DLRM.forward in float32, on the values of the array as it is kept."""
    if isinstance(embeddings, RobeEmbeddingBagCollection) and embeddings.array.weight.dtype == torch.bfloat16:
        exact = with_array_dtype(embeddings, "bfloat16")  # a copy
        assert isinstance(exact, RobeEmbeddingBagCollection)
        exact.array.weight = nn.Parameter(exact.array.weight.float(), requires_grad=False)
        embeddings = exact
    other = copy.copy(model)
    other._modules = {**model._modules, "embeddings": embeddings}

    def run(dense: Tensor, sparse: Tensor) -> Tensor:
        with torch.inference_mode():
            return other(dense, sparse).sigmoid()

    return run


def _largest_difference(
    exported: Callable[[Tensor, Tensor], Tensor], expected: Callable[[Tensor, Tensor], Tensor], rows: Rows
) -> float:
    dense, sparse = (torch.from_numpy(x) for x in rows)
    differences, start = [], 0
    for size in cycle(_SIZES):
        batch = dense[start : start + size].contiguous(), sparse[start : start + size].contiguous()
        differences.append((exported(*batch) - expected(*batch)).abs().max())
        start += size
        if start >= len(dense):
            return float(torch.stack(differences).max())  # NaN where there is one
    raise AssertionError
