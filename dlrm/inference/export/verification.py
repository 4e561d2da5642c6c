"""Comparison of an exported file with the model it was made from, on rows with ids of every kind."""

import copy
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dlrm.embeddings import VocabularyTables
from dlrm.inference.predictor import with_array_dtype
from dlrm.model import DLRM
from robe import RobeEmbeddingBagCollection

VERIFIED_ROWS = 10_000

_BATCH_SIZES = (1, 2048, 3, 512, 1, 100)  # used again and again


class Inputs(NamedTuple):
    """Rows without labels: dense (B, num_dense) float32 and sparse (B, H) int64."""

    dense: np.ndarray
    sparse: np.ndarray


def random_rows(model: DLRM) -> Inputs:
    """Return 10,000 rows with every kind of id: small, 32 bits, larger, zero, negative, and known to a vocabulary."""
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
    return Inputs(dense, np.take_along_axis(kinds, kind[None], 0)[0])


def first_rows(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Inputs:
    """Return the first 10,000 rows of batches (dense, sparse); fewer if there are no more.

    Raises:
        ValueError: there are no rows.
    """
    parts: list[Inputs] = []
    missing = VERIFIED_ROWS
    for dense, sparse in batches:
        parts.append(Inputs(dense[:missing], sparse[:missing]))
        missing -= len(parts[-1].dense)
        if not missing:
            break
    if missing == VERIFIED_ROWS:
        raise ValueError("batches: expected at least one row to compare on, got none")
    return Inputs(*(np.concatenate(arrays) for arrays in zip(*parts)))


def expected_probabilities(model: DLRM, embeddings: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what a file is compared with: DLRM.forward in float32, on the array's values as they are kept.

    Args:
        model: a DLRM.
        embeddings: what the file reads in place of the model's own embeddings.
    """
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


def largest_difference(
    exported: Callable[[Tensor, Tensor], Tensor], expected: Callable[[Tensor, Tensor], Tensor], inputs: Inputs
) -> float:
    """Return the largest absolute difference between two functions' probabilities, NaN if there is one.

    Args:
        exported: (dense, sparse) -> probabilities.
        expected: likewise.
        inputs: the rows to compare on, in batches of several sizes.
    """
    dense, sparse = (torch.from_numpy(x) for x in inputs)
    differences, start = [], 0
    for size in cycle(_BATCH_SIZES):
        batch = dense[start : start + size].contiguous(), sparse[start : start + size].contiguous()
        differences.append((exported(*batch) - expected(*batch)).abs().max())
        start += size
        if start >= len(dense):
            return float(torch.stack(differences).max())
    raise AssertionError
