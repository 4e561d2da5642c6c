"""Rows as arrays: batches for a model, and columns for a file, both made of records.

A record keeps what the log says: integers as they are, ids raw. They become a model's input at the last moment. The
transformation is that of facebookresearch/dlrm's preprocessing, except that ids stay raw: a missing or negative integer
counts as 0, then log(x + 1); a missing category is id 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from data.schema import DENSE_NAMES, MISSING, SPARSE_NAMES, DataError


@dataclass
class Batch:
    """B rows for a model, with H ids each: 26, or sum(layout.hots) for multi-hot features.

    Attributes:
        dense: (B, 13) float32.
        sparse: (B, H) int64.
        labels: (B,) float32, 0 or 1; None for data without labels.
    """

    dense: np.ndarray
    sparse: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.sparse)

    def __getitem__(self, rows) -> "Batch":
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.dense[rows], self.sparse[rows], labels)

    @staticmethod
    def concatenate(batches: "list[Batch]") -> "Batch":
        """Return the rows of all batches as one batch."""
        if len(batches) == 1:
            return batches[0]
        labels = [b.labels for b in batches if b.labels is not None]
        return Batch(
            np.concatenate([b.dense for b in batches]),
            np.concatenate([b.sparse for b in batches]),
            np.concatenate(labels) if labels else None,
        )


def transform_dense(integers: np.ndarray) -> np.ndarray:
    """Return log(max(x, 0) + 1) in float32, of any shape."""
    dense = np.maximum(integers, 0).astype(np.float32)
    dense += 1  # exact for all but huge integers, and log is several times faster than log1p
    return np.log(dense, out=dense)


def to_batch(records: np.ndarray) -> Batch:
    """Convert records of any layout to a batch."""
    dense, sparse = records["dense"], records["sparse"]
    return Batch(
        transform_dense(dense) if dense.dtype.kind == "i" else dense.astype(np.float32, order="C"),
        sparse.astype(np.int64, order="C"),
        records["label"].astype(np.float32) if has_labels(records) else None,
    )


def to_frame(records: np.ndarray) -> pl.DataFrame:
    """Convert records with one id a feature to columns label, int_0 .. int_12 (null if missing), cat_0 .. cat_25."""
    columns = {"label": records["label"]} if has_labels(records) else {}
    columns |= {name: records["dense"][:, i] for i, name in enumerate(DENSE_NAMES)}
    columns |= {name: records["sparse"][:, i] for i, name in enumerate(SPARSE_NAMES)}
    frame = pl.DataFrame({name: np.ascontiguousarray(values) for name, values in columns.items()})
    if records["dense"].dtype.kind == "i":
        frame = frame.with_columns(pl.col(name).replace(MISSING, None) for name in DENSE_NAMES)
    return frame


def has_labels(records: np.ndarray) -> bool:
    """Return whether records have a label."""
    return "label" in (records.dtype.names or ())


def check_labels(labels: np.ndarray, path: Path, start: int) -> None:
    """Check the labels of rows ``start`` and following.

    Raises:
        DataError: a label is neither 0 nor 1. The message names the first such row, counted from 1.
    """
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{path}: row {start + row + 1}: label: expected 0 or 1, got {labels[row]}")


def feature_ids(records: np.ndarray, features: Sequence[slice]) -> list[np.ndarray]:
    """Return all ids of each feature, one flat array a feature."""
    return [records["sparse"][:, columns].reshape(-1) for columns in features]
