"""Counts of ids in bounded memory.

Ids are counted in a count-min sketch (Cormode and Muthukrishnan 2005) with conservative update (Estan and Varghese
2002). A count is never too low, and too high only for an id that shares all its counters. It stops at 2**31 - 1. The
kernels for CPUs count one id after another. Elsewhere torch counts all ids of a call at once, which gives the same, or
less where different ids of the call share counters.
"""

import torch
from torch import Tensor, nn

from robe.hashing import row_hash
from robe.sketches import COUNTERS


def moved(before: Tensor, after: Tensor) -> Tensor:
    """Return a sketch that ``_apply`` has moved, with its values.

    ``to_empty`` leaves memory unset, and ids would be counted or let in by chance.

    Args:
        before: the buffer as it was.
        after: the buffer in its new place.

    Returns:
        ``after``, with the values of ``before``; zeros, as when it was made, if that was on the meta device.
    """
    if after is before or after.is_meta:
        return after
    return after.zero_() if before.is_meta else after.copy_(before)


class IdCounter(nn.Module):
    """Counts how often each id was seen, approximately, in bounded memory.

    Args:
        bytes: memory of the counters. Counts are close up to about bytes / 64 different ids.
        device: where the counters lie.

    Attributes:
        counters: buffer (4, bytes // 16) int32.

    Raises:
        ValueError: bytes below 1024.
    """

    counters: Tensor

    def __init__(self, bytes: int = 1 << 28, device=None):
        super().__init__()
        if bytes < 1024:
            raise ValueError(f"bytes: expected at least 1024 of an IdCounter, got {bytes}")
        self.register_buffer("counters", torch.zeros(COUNTERS, bytes // 16, dtype=torch.int32, device=device))

    def _apply(self, fn, recurse=True):
        before = self.counters
        super()._apply(fn, recurse)
        self.counters = moved(before, self.counters)
        return self

    @torch.no_grad()
    def add(self, ids: Tensor, keys: Tensor) -> None:
        """Count ids; arguments as in ``hashing.row_hash``.

        Raises:
            ValueError: ids are not integers, or keys don't broadcast to them; nothing was counted.
        """
        torch.ops.robe.count_ids_(self.counters, ids, keys)

    def count(self, ids: Tensor, keys: Tensor) -> Tensor:
        """Return how often each id was seen, int64 (...), never too low. Arguments as in ``hashing.row_hash``."""
        row = row_hash(ids, keys)
        return self.count_rows(row.flatten()).view(row.shape)

    def count_rows(self, row: Tensor) -> Tensor:
        """Return how often the ids with these row hashes (n,) were seen, int64 (n,)."""
        return torch.ops.robe.id_counts(self.counters, row)

    @torch.no_grad()
    def decay(self, factor: float) -> None:
        """Multiply all counts by a factor, so that older ids count less.

        Raises:
            ValueError: factor is not within 0 to 1.
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"factor: expected 0 to 1, got {factor}")
        self.counters.copy_((self.counters * factor).int())
