"""The batch that models are trained and evaluated on."""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Batch(Protocol):
    """B rows as arrays. Any object with these attributes can be trained on; data.rows.Batch is one."""

    @property
    def dense(self) -> np.ndarray:
        """(B, 13) float32: the integer features after log(x + 1)."""

    @property
    def sparse(self) -> np.ndarray:
        """(B, 26) int64: an id of each categorical feature; (B, sum(hots)) where features have several ids."""

    @property
    def labels(self) -> np.ndarray | None:
        """(B,) float32: 1 for a click, 0 for none. None where the rows have no labels."""

    def __len__(self) -> int:
        """Return B."""
