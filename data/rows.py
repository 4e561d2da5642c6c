"""Rows as arrays: the batch a model is given, and the record a row is kept as.

A record keeps what the log says: integers as they are, ids raw. What a model is given is made of it at the last moment,
as facebookresearch/dlrm's preprocessing does, but that ids stay raw: a missing or negative integer is 0, then
log(x + 1); a missing category is id 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

NUM_DENSE, NUM_SPARSE = 13, 26
MISSING = np.iinfo(np.int32).min  # of an integer, in a record
DENSE_NAMES = [f"int_{i}" for i in range(NUM_DENSE)]
SPARSE_NAMES = [f"cat_{i}" for i in range(NUM_SPARSE)]


class DataError(ValueError):
    """Data that can't be read as what it should be; the message says which file, where, and why."""


@dataclass
class Batch:
    """Rows as arrays. B rows, H ids each: one for each of 26 features, or with multi-hot features sum(layout.hots)."""

    dense: np.ndarray  # (B, 13) float32
    sparse: np.ndarray  # (B, H) int64
    labels: np.ndarray | None  # (B,) float32, 0 or 1; None where the data has none

    def __len__(self) -> int:
        return len(self.sparse)

    def __getitem__(self, rows) -> "Batch":
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.dense[rows], self.sparse[rows], labels)

    @staticmethod
    def concatenate(batches: "list[Batch]") -> "Batch":
        if len(batches) == 1:
            return batches[0]
        labels = [b.labels for b in batches if b.labels is not None]
        return Batch(
            np.concatenate([b.dense for b in batches]),
            np.concatenate([b.sparse for b in batches]),
            np.concatenate(labels) if labels else None,
        )


@dataclass(frozen=True)
class Layout:
    """What a record holds: a little-endian structure of label, dense and sparse, 160 bytes for Criteo's logs.

    Args:
        labelled: whether there is a label, int32.
        dense: "i4", the log's integers, MISSING where there is none; or "f4", numbers for the model as they are.
        ids: "u4", Criteo's 32-bit hashes or the numbers others give them; or "i8".
        hots: ids of each feature in a row, None for one each.
    """

    labelled: bool = True
    dense: str = "i4"
    ids: str = "u4"
    hots: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.dense not in ("i4", "f4") or self.ids not in ("u4", "i8"):
            raise ValueError(f"expected dense i4 or f4 and ids u4 or i8, got {self.dense} and {self.ids}")
        if self.hots is not None and (len(self.hots) != NUM_SPARSE or min(self.hots) < 1):
            raise ValueError(f"hots: expected {NUM_SPARSE} numbers from 1, got {self.hots}")

    @cached_property
    def dtype(self) -> np.dtype:
        label = [("label", "<i4")] if self.labelled else []
        return np.dtype(
            label + [("dense", "<" + self.dense, (NUM_DENSE,)), ("sparse", "<" + self.ids, (self.num_ids,))]
        )

    @property
    def num_ids(self) -> int:
        """H, the ids in a row."""
        return NUM_SPARSE if self.hots is None else sum(self.hots)

    @property
    def features(self) -> list[slice]:
        """The ids of each feature."""
        ends = np.cumsum(self.hots or (1,) * NUM_SPARSE).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends)]

    def records(self, rows: int) -> np.ndarray:
        """That many records, not yet filled."""
        return np.empty(rows, self.dtype)

    def describe(self) -> str:
        """In words, for messages."""
        return ", ".join(
            [
                "labels" if self.labelled else "no labels",
                {"i4": "integers", "f4": "floating-point numbers"}[self.dense],
                {"u4": "32-bit ids", "i8": "64-bit ids"}[self.ids],
                *([f"{self.num_ids} ids a row"] if self.hots else []),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        return {"labelled": self.labelled, "dense": self.dense, "ids": self.ids, "hots": self.hots}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Layout":
        """The inverse of to_dict, also after JSON."""
        return cls(**{**values, "hots": None if values.get("hots") is None else tuple(values["hots"])})


def transform_dense(integers: np.ndarray) -> np.ndarray:
    """log(max(x, 0) + 1) in float32, any shape."""
    dense = np.maximum(integers, 0).astype(np.float32)
    dense += 1  # exact for all but huge integers, and log is several times faster than log1p
    return np.log(dense, out=dense)


def to_batch(records: np.ndarray) -> Batch:
    """What a model is given of records of any Layout."""
    dense, sparse = records["dense"], records["sparse"]
    return Batch(
        transform_dense(dense) if dense.dtype.kind == "i" else dense.astype(np.float32, order="C"),
        sparse.astype(np.int64, order="C"),
        records["label"].astype(np.float32) if "label" in (records.dtype.names or ()) else None,
    )


def check_labels(labels: np.ndarray, path: Path, start: int) -> None:
    """Raise DataError for the first label that is not 0 or 1; they are those of rows ``start`` on."""
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{path}: row {start + row + 1}: label: expected 0 or 1, got {labels[row]}")


def feature_ids(records: np.ndarray, features: Sequence[slice]) -> list[np.ndarray]:
    """All ids of each feature, one array each."""
    return [records["sparse"][:, ids].reshape(-1) for ids in features]
