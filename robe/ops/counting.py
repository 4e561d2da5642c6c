"""The operators that count ids for an admission, in plain torch.

Counting is of ids of any shape, with int64 keys and bool labels that broadcast to them, in counters (4, W) int32 that
are contiguous (robe/sketches.py). Rows are what ``hashing.row_hash`` makes of ids and keys.
"""

from collections.abc import Callable
from typing import Any

import torch

from robe.hashing import row_hash
from robe.ops.layout import check_apart, check_filter, check_ids
from robe.sketches import COUNTERS, admits, counters_of


def _check_counters(name, counters):
    good = counters.dim() == 2 and counters.shape[0] == COUNTERS and counters.shape[1] > 0
    if not good or counters.dtype != torch.int32 or not counters.is_contiguous():
        raise ValueError(f"{name}: expected contiguous int32 (4, W), got {counters.dtype} {tuple(counters.shape)}")


def _check_broadcast(name, tensor, dtype, ids):
    fits = tensor.dim() <= ids.dim() and all(
        size in (1, whole) for size, whole in zip(reversed(tensor.shape), reversed(ids.shape))
    )
    if not fits or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: expected {dtype}, broadcastable to ids {tuple(ids.shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _check_counting(counters, ids, keys):
    _check_counters("counters", counters)
    check_ids("ids", ids, ids.dim())
    _check_broadcast("keys", keys, torch.int64, ids)


def _check_row_hashes(row_hashes):
    if row_hashes.dim() != 1 or row_hashes.dtype != torch.int64:
        raise ValueError(f"row_hashes: expected an int64 vector (n,), got {row_hashes.dtype} {tuple(row_hashes.shape)}")


def _add(counters, row):
    """Each row as often as it is there, all at once: as one by one, or less where different ids share counters."""
    different, times = row.unique(return_counts=True)
    places = counters_of(different, counters.shape[1])
    after = counters.gather(1, places).amin(0) + times
    after = after.clamp(max=torch.iinfo(torch.int32).max).int()
    counters.scatter_reduce_(1, places, after.expand_as(places), "amax")


def _count_ids(counters, ids, keys, clicks=None, labels=None):
    _check_counting(counters, ids, keys)
    if (clicks is None) != (labels is None):
        raise ValueError("clicks and labels: expected both or neither")
    row = row_hash(ids, keys)
    if clicks is not None:
        _check_counters("clicks", clicks)
        if clicks.shape != counters.shape:
            raise ValueError(
                f"clicks: expected the shape of counters, {tuple(counters.shape)}, got {tuple(clicks.shape)}"
            )
        check_apart("clicks", clicks, "counters", counters)
        _check_broadcast("labels", labels, torch.bool, ids)
        _add(clicks, row[labels.expand_as(row)])
    _add(counters, row.flatten())


def _id_counts(counters, row_hashes):
    _check_counters("counters", counters)
    _check_row_hashes(row_hashes)
    return counters.gather(1, counters_of(row_hashes, counters.shape[1])).amin(0).long()


def _frequent_rows(counters, ids, keys, times, recent):
    """recent is for the kernel, which asks it whether it gave a row already."""
    _check_counting(counters, ids, keys)
    if recent.dim() != 1 or recent.shape[0] < 2 or recent.dtype != torch.int64 or not recent.is_contiguous():
        raise ValueError(
            f"recent: expected a contiguous int64 vector of 2 or more, got {recent.dtype} {tuple(recent.shape)}"
        )
    row_hashes = row_hash(ids, keys).unique()
    return row_hashes[_id_counts(counters, row_hashes) >= times]


def _observe_ids(counters, ids, keys, filter, threshold):
    _check_counting(counters, ids, keys)
    check_filter(filter)
    row_hashes = row_hash(ids, keys)[~admits(filter, ids, keys)]
    _add(counters, row_hashes)
    row_hashes = row_hashes.unique()
    return row_hashes[_id_counts(counters, row_hashes) >= threshold]


BODIES: dict[str, Callable[..., Any]] = {
    "count_ids_": _count_ids,
    "id_counts": _id_counts,
    "frequent_rows_": _frequent_rows,
    "observe_ids_": _observe_ids,
}
