"""A DLRM as one file that needs neither this project nor Python: ONNX, or a library that torch compiles ahead of time.

Both take "dense" (B, num_dense) float32 and "sparse" (B, H) int64, the ids that DLRM takes, and return "probability"
(B,) float32, for any B from 1. The weights are in the file. The hash is spelled out in each format's own operators.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor, nn

from dlrm.embeddings import Tables
from dlrm.inference.export.aoti import load_aoti, write_aoti
from dlrm.inference.export.onnx_model import HASHES, load_onnx, write_onnx
from dlrm.inference.export.verification import expected_probabilities, first_rows, largest_difference, random_rows
from dlrm.inference.predictor import with_array_dtype
from dlrm.model import DLRM
from robe import RobeEmbeddingBagCollection
from robe_files import whole_file

FORMATS = {"onnx": ".onnx", "aoti": ".pt2"}  # suffix of each format's files
TOLERANCE = 1e-5  # largest accepted difference of a probability

_WRITERS = {"onnx": write_onnx, "aoti": write_aoti}
_LOADERS = {"onnx": load_onnx, "aoti": load_aoti}


@dataclass
class Export:
    """Facts about a file that was written and verified.

    Attributes:
        rows: on which the file was compared with the model.
        difference: the largest difference of a probability on these rows.
        bytes: size of the file.
        seconds: time that writing and comparing took.
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
    batches: Iterable[tuple[np.ndarray, np.ndarray]] | None = None,
) -> Export:
    """Write a model as one file, load it again, and compare it with the model in torch.

    An old file of that name is replaced only after the new one has passed.

    Args:
        model: a DLRM on the CPU, with the embeddings of its config.
        path: the file to write; ends with the format's suffix.
        format: "onnx", for ONNX Runtime and others; or "aoti", compiled by torch for the CPU that it is written on.
        array_dtype: dtype of the ROBE array in the file, as for Predictor. Sums of several bfloat16 embeddings are not
            rounded.
        batches: (dense, sparse) of rows to compare on; the first 10,000 rows are used. None: random rows.

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
    inputs = random_rows(model) if batches is None else first_rows(batches)
    embeddings = with_array_dtype(model.embeddings, array_dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Loaders go by the suffix, so the temporary file has the final name, in a folder of its own.
    with whole_file(path) as part, TemporaryDirectory(prefix=path.name, dir=path.parent) as folder:
        file = Path(folder) / path.name
        _WRITERS[format](model, embeddings, file)
        difference = largest_difference(load(file), expected_probabilities(model, embeddings), inputs)
        if not difference <= TOLERANCE:  # NaN fails too
            raise ValueError(
                f"{path}: not written: its probabilities differ from the model's by {difference:.2g}, "
                f"expected at most {TOLERANCE:.0e}"
            )
        size = file.stat().st_size
        os.replace(file, part)
    return Export(len(inputs.dense), difference, size, time.perf_counter() - start)


def load(path: str | Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Load a file that ``export`` wrote.

    Args:
        path: ends with .onnx or .pt2. A .pt2 contains code that will run, so load only files that you trust.

    Returns:
        A function of dense (B, num_dense) float32 and sparse (B, H) int64 that returns probabilities (B,) float32. It
        uses torch.get_num_threads() threads; for ONNX, that number is read when the file is loaded.

    Raises:
        ValueError: another suffix, or ONNX Runtime is missing.
    """
    path = Path(path)
    for format, suffix in FORMATS.items():
        if path.suffix == suffix:
            return _LOADERS[format](path)
    raise ValueError(f"path: expected a name that ends with {' or '.join(FORMATS.values())}, got {path}")


def _check_embeddings(embeddings: nn.Module) -> None:
    if isinstance(embeddings, RobeEmbeddingBagCollection):
        bounded = bool(embeddings.num_embeddings_per_feature.any())
        if embeddings.hash not in HASHES or embeddings.pooling != "sum" or bounded:
            raise ValueError(
                "embeddings: expected tables without num_embeddings, hash 'mix' and pooling 'sum', as DLRMConfig "
                f"makes them, got hash {embeddings.hash!r} and pooling {embeddings.pooling!r}"
            )
    elif not isinstance(embeddings, Tables):
        raise ValueError(f"embeddings: expected those of a DLRMConfig, got {type(embeddings).__name__}")
