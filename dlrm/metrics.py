"""How good a model's predictions are: AUC and log loss, by scikit-learn."""

import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

EVALUATION_BATCH = 2048  # rows; large enough for the full speed of the MLPs


def predict(model: nn.Module, batches: Iterable) -> Iterator[np.ndarray]:
    """Click probabilities, float32 (B,) for each batch; batches have ``dense`` and ``sparse`` as data.rows.Batch."""
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            logits = model(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse))
            yield torch.sigmoid(logits).numpy()


def evaluate(model: nn.Module, batches: Iterable) -> dict[str, float]:
    """Score a model on labelled batches.

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
    probabilities = list(predict(model, remember(batches)))
    if not labels:
        raise ValueError("no rows to evaluate")
    scores = score(np.concatenate(labels), np.concatenate(probabilities))
    return {**scores, "seconds": time.perf_counter() - start}


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


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, Any]:
    """Machine, versions and command: what every reported number carries."""
    return {
        "command": " ".join(sys.argv),
        "machine": f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
