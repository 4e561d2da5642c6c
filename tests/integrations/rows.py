"""Generated rows for models of other libraries: features of up to 5,000 ids."""

from functools import cache

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from data.rows import Batch, to_batch
from data.synthetic import Signal

FEATURES, IDS = 26, 5000
TRAIN, TEST = 24_000, 6_000


@cache
def rows() -> Batch:
    """TRAIN + TEST rows."""
    batch = Batch.concatenate([to_batch(some) for some in Signal(0).records(TRAIN + TEST)])
    return Batch(batch.dense, batch.sparse % IDS, batch.labels)


def auc(scores: np.ndarray | torch.Tensor) -> float:
    """Of scores of the test rows."""
    return float(roc_auc_score(rows().labels[TRAIN:], np.asarray(scores).ravel()))


def check(compressed: float, full: float) -> None:
    """Both have learnt, and a tenth of the weights is not far behind."""
    assert full > 0.65
    assert compressed > full - 0.02
