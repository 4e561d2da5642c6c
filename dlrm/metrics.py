"""How good a model's predictions are: AUC and log loss, by scikit-learn; of any number of rows by Scores."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from dlrm.distributed import World

EVALUATION_BATCH = 2048  # rows; large enough for the full speed of the MLPs

_ONE = 0x3F800000  # the bits of 1.0
_BITS_IGNORED = 6
_BINS_AT_ONCE = 1 << 20


def predict(model: nn.Module, batches: Iterable) -> Iterator[np.ndarray]:
    """Click probabilities, float32 (B,) for each batch; batches have ``dense`` and ``sparse`` as data.rows.Batch."""
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        for batch in batches:
            logits = model(torch.from_numpy(batch.dense).to(device), torch.from_numpy(batch.sparse).to(device))
            yield torch.sigmoid(logits).cpu().numpy()


def evaluate(model: nn.Module, batches: Iterable, world: World | None = None) -> dict[str, float]:
    """Score a model on labelled batches.

    Args:
        world: of several processes, each scores its own rows: the result is that of all rows, exact, in all of them.

    Returns:
        auc, log_loss (natural logarithm), rows, seconds.

    Raises:
        ValueError: no rows, labels of one kind only (AUC is then undefined), or predictions that are not finite.
    """
    labels: list[np.ndarray] = []

    def remember(batches):
        for batch in batches:
            labels.append(batch.labels)
            yield batch

    start = time.perf_counter()
    world = world or World()
    none = [np.empty(0, np.float32)]
    probabilities = list(predict(model, remember(batches)))
    pairs = torch.from_numpy(np.stack([np.concatenate(none + labels), np.concatenate(none + probabilities)], axis=1))
    pairs_of_all = world.gather_in_first(pairs)

    def scores() -> dict[str, float]:
        assert pairs_of_all is not None
        if not len(pairs_of_all):
            raise ValueError("no rows to evaluate")
        return score(*pairs_of_all.cpu().numpy().T)

    return {**world.first(scores), "seconds": time.perf_counter() - start}


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """auc, log_loss and rows of predictions; Raises ValueError as evaluate."""
    if not np.isfinite(probabilities).all():
        raise ValueError("the model predicts NaN")
    if labels.min() == labels.max():
        raise ValueError(f"all {len(labels)} rows to evaluate have label {labels[0]:.0f}: AUC needs both")
    return {
        "auc": float(roc_auc_score(labels, probabilities)),
        "log_loss": float(log_loss(labels, probabilities.astype(np.float64))),
        "rows": len(labels),
    }


class Scores:
    """AUC and log loss of any number of predictions, in bounded memory.

    Labels are counted by probability, in bins of a width of 2**-17 of it (the probability's bits as float32, but for
    the last 6): pairs within a bin count as ties. What that can change in the AUC is below 1e-6 unless a great part of
    all predictions is nearly the same. Sums are in float64.
    """

    def __init__(self) -> None:
        # Untouched memory is not taken: the bins in use are some of 2**17 for each halving of the probability.
        self._counts = np.zeros((2, (_ONE >> _BITS_IGNORED) + 1), np.uint32)
        self._loss = 0.0
        self.rows = 0

    def add(self, labels: np.ndarray, probabilities: np.ndarray) -> None:
        """Count predictions.

        Args:
            labels: (B,), 0 or 1.
            probabilities: (B,) float32.

        Raises:
            ValueError: a probability that is none.
        """
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError("probabilities: expected numbers from 0 to 1")
        # Floats from 0 to 1 are in the order of their bits.
        bins = np.maximum(probabilities, np.float32(0)).view(np.uint32) >> _BITS_IGNORED
        clicked = labels > 0.5
        for label, chosen in enumerate((~clicked, clicked)):
            np.add.at(self._counts[label], bins[chosen], 1)
        wide = probabilities.astype(np.float64)
        of_label = np.where(clicked, wide, 1 - wide).clip(np.finfo(np.float64).eps)  # as scikit-learn
        self._loss -= float(np.log(of_label).sum())
        self.rows += len(labels)

    def result(self) -> dict[str, Any]:
        """auc, None where all labels are the same; log_loss (natural logarithm), rows.

        Raises:
            ValueError: no rows.
        """
        if not self.rows:
            raise ValueError("no rows to evaluate")
        lower, ordered = 0, 0.0  # negatives in the bins before; pairs in order, ties counting one half
        for start in range(0, self._counts.shape[1], _BINS_AT_ONCE):
            negatives, positives = self._counts[:, start : start + _BINS_AT_ONCE].astype(np.int64)
            before = lower + negatives.cumsum() - negatives
            ordered += float((positives * (before + negatives / 2)).sum())
            lower += int(negatives.sum())
        clicks = self.rows - lower
        pairs = clicks * lower
        return {"auc": ordered / pairs if pairs else None, "log_loss": self._loss / self.rows, "rows": self.rows}
