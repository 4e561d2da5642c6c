"""Predictions and their quality: AUC and log loss, exact by scikit-learn, or in bounded memory by Scores."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from dlrm.batch import Batch
from dlrm.distributed import World

EVALUATION_BATCH = 2048  # rows; large enough for the full speed of the MLPs

_ONE = 0x3F800000  # the bits of 1.0
_BITS_IGNORED = 6
_BINS_AT_ONCE = 1 << 20


def predict(model: nn.Module, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Yield click probabilities, (B,) float32 for each batch.

    Args:
        model: (dense, sparse) -> logits; it is put into evaluation mode.
        batches: labels are not used.
    """
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        for batch in batches:
            logits = model(torch.from_numpy(batch.dense).to(device), torch.from_numpy(batch.sparse).to(device))
            yield torch.sigmoid(logits).cpu().numpy()


def evaluate(model: nn.Module, batches: Iterable[Batch], world: World | None = None) -> dict[str, Any]:
    """Score a model on labelled batches.

    Args:
        model: (dense, sparse) -> logits.
        batches: this process's rows.
        world: the processes. Each gets the exact scores of the rows of all; None: this one alone.

    Returns:
        auc (None where all labels are the same), log_loss (natural logarithm), rows, seconds.

    Raises:
        ValueError: there are no rows or no labels, or the model predicts NaN.
    """
    labels: list[np.ndarray] = []

    def remember(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if batch.labels is None:
                raise ValueError("labels: expected to evaluate a model, got none")
            labels.append(batch.labels)
            yield batch

    start = time.perf_counter()
    world = world or World()
    none = [np.empty(0, np.float32)]
    probabilities = list(predict(model, remember(batches)))
    pairs = torch.from_numpy(np.stack([np.concatenate(none + labels), np.concatenate(none + probabilities)], axis=1))
    pairs_of_all = world.gather_in_first(pairs)

    def scores() -> dict[str, Any]:
        assert pairs_of_all is not None
        if not len(pairs_of_all):
            raise ValueError("no rows to evaluate")
        return score(*pairs_of_all.cpu().numpy().T)

    return {**world.first(scores), "seconds": time.perf_counter() - start}


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Return auc (None where all labels are the same), log_loss (natural logarithm) and rows of predictions.

    Args:
        labels: (n,), 0 or 1.
        probabilities: (n,).

    Raises:
        ValueError: as in ``evaluate``.
    """
    if not np.isfinite(probabilities).all():
        raise ValueError("the model predicts NaN")
    both = labels.min() != labels.max()
    return {
        "auc": float(roc_auc_score(labels, probabilities)) if both else None,
        "log_loss": float(log_loss(labels, probabilities.astype(np.float64), labels=[0, 1])),
        "rows": len(labels),
    }


def describe_auc(auc: float | None) -> str:
    """Return an AUC as text."""
    return "undefined" if auc is None else f"{auc:.4f}"


class Scores:
    """AUC and log loss of any number of predictions, in bounded memory.

    Labels are counted in bins of probability, each 2**-17 of the probability wide: the float32 bits without the last 6.
    Pairs within a bin count as ties. This changes the AUC by less than 1e-6, unless a large part of all predictions is
    nearly the same. Sums are in float64.

    Attributes:
        rows: predictions so far.
    """

    def __init__(self) -> None:
        # Only pages that are written to take memory: 2**17 bins for each halving of the probability.
        self._counts = np.zeros((2, (_ONE >> _BITS_IGNORED) + 1), np.uint32)
        self._loss = 0.0
        self.rows = 0

    def add(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Count predictions.

        Args:
            labels: (B,), 0 or 1.
            probabilities: (B,) float32.

        Raises:
            ValueError: a probability is not within 0 and 1.
        """
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError("probabilities: expected numbers from 0 to 1")
        # Floats from 0 to 1 have the same order as their bits.
        bins = np.maximum(probabilities, np.float32(0)).view(np.uint32) >> _BITS_IGNORED
        clicked = labels > 0.5
        for label, chosen in enumerate((~clicked, clicked)):
            np.add.at(self._counts[label], bins[chosen], 1)
        wide = probabilities.astype(np.float64)
        of_label = np.where(clicked, wide, 1 - wide).clip(np.finfo(np.float64).eps)  # as scikit-learn
        self._loss -= float(np.log(of_label).sum())
        self.rows += len(labels)

    def result(self) -> dict[str, Any]:
        """Return auc (None where all labels are the same), log_loss (natural logarithm) and rows.

        Raises:
            ValueError: there are no rows.
        """
        if not self.rows:
            raise ValueError("no rows to evaluate")
        lower, ordered = 0, 0.0  # negatives in the bins so far; pairs in the right order, where ties count one half
        for start in range(0, self._counts.shape[1], _BINS_AT_ONCE):
            negatives, positives = self._counts[:, start : start + _BINS_AT_ONCE].astype(np.int64)
            before = lower + negatives.cumsum() - negatives
            ordered += float((positives * (before + negatives / 2)).sum())
            lower += int(negatives.sum())
        clicks = self.rows - lower
        pairs = clicks * lower
        return {"auc": ordered / pairs if pairs else None, "log_loss": self._loss / self.rows, "rows": self.rows}
