"""Admission: which ids have an embedding of their own.

Most ids in a recommender's logs are rare. A table leaves them near their initial values; a shared array gives a rare id
somebody else's weights, and training on it disturbs those (docs/accuracy.md has figures). With an Admission, ids that
were seen often enough read their own row; all others of a table read one row together, that of the id RARE.

The ids let in are kept in a Bloom filter whose bits for an id lie in one word ("blocked": Putze, Sanders and Singler
2009), W words of 64 bits, arithmetic modulo 2**64, mix64 and G as in robe/hashing.py, key that of the id's table:

    row  = mix64(key + x * G)                 as in the "mix" hash, which mixes it again before it reads there
    word = (row * W) >> 64
    bits = 2**(row % 64) | 2**(row // 64 % 64) | 2**(row // 4096 % 64)

Id x is in if all of ``bits`` are set in the word. One that was let in always is; another one is by chance, the more
likely the fuller the filter: in 4 of 100 cases at 8 bits for each id let in, 7 at 6, 16 at 4.

Ids are counted in a count-min sketch (Cormode and Muthukrishnan 2005) with conservative update (Estan and Varghese
2002), in bounded memory: a count is never too low, and too high only for an id that shares all its counters.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from robe.hashing import GOLDEN, mix64, multiply_high, signed

RARE = -(1 << 63)  # the id whose row all ids read that were not let in
SPREAD = 0.5  # of the effects of ids on the log-odds of a click
_SALT = 0xD1B54A32D192ED03  # of the counters, which are not read at the hashes of blocks
BITS_OF_WORD = 6  # log2
BITS_OF_ID = 3
_DEPTH = 4  # counters of an id


def row_hash(ids: Tensor, keys: Tensor) -> Tensor:
    """int64 that stands for an id of a table, the same as in the "mix" hash; a bijection of the ids of a table.

    Args:
        ids: (...) int32 or int64.
        keys: hash keys of the tables (``hashing.table_key``), broadcastable to ids.
    """
    return mix64(keys + ids.long() * signed(GOLDEN))


def _places(row: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """The word of each id in the filter, and its bits there."""
    one, bits = torch.ones_like(row), torch.zeros_like(row)
    for k in range(BITS_OF_ID):
        bits |= one << ((row >> (k * BITS_OF_WORD)) & 63)
    return multiply_high(row, words), bits


def admits(filter: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
    """Whether each id was let in, bool (...); filter: (W,) int64, the others as in ``row_hash``."""
    word, bits = _places(row_hash(ids, keys), len(filter))
    return filter[word] & bits == bits


def expected_gain(times: Tensor, clicks: Tensor, rate: float) -> Tensor:
    """How much log likelihood an embedding of its own is expected to gain by an id's effect on the click rate.

    The effect is one on the log-odds, with the prior N(0, SPREAD**2). Around no effect the log likelihood of the
    id's clicks is about a parabola (Laplace's approximation) with information I and maximum at e:

        I = times * rate * (1 - rate),    e = (clicks - times * rate) / I
        gain = I * mean**2 / 2,    mean = e * SPREAD**2 / (SPREAD**2 + 1 / I), the posterior mean

    Args:
        times, clicks: float, how often an id was seen, and how often with label 1.
        rate: of label 1 in all.
    """
    information = times * (rate * (1 - rate))
    mean = (clicks - times * rate) / (information + SPREAD**-2)
    return information * mean**2 / 2


class IdCounter(nn.Module):
    """How often each id was seen, about, in bounded memory.

    Args:
        bytes: of the counters. Counts are close while different ids are fewer than a quarter of bytes / 16 or so.
        device: of the counters.

    Attributes:
        counters: buffer (4, bytes // 16) int32.

    Raises:
        ValueError: bytes too few.
    """

    counters: Tensor

    def __init__(self, bytes: int = 1 << 28, device=None):
        super().__init__()
        if bytes < 1024:
            raise ValueError(f"bytes: expected at least 1024 of an IdCounter, got {bytes}")
        self.register_buffer("counters", torch.zeros(_DEPTH, bytes // 16, dtype=torch.int32, device=device))

    def _counters_of(self, row: Tensor) -> Tensor:
        """(4, n): of each id, the place in each row of counters."""
        salts = torch.arange(1, _DEPTH + 1, device=row.device).unsqueeze(1) * signed(_SALT)
        return multiply_high(mix64(row + salts), self.counters.shape[1])

    @torch.no_grad()
    def add(self, ids: Tensor, keys: Tensor) -> None:
        """Count ids; arguments as in ``row_hash``."""
        self._add(row_hash(ids, keys).flatten())

    def _add(self, row: Tensor) -> None:
        different, times = row.unique(return_counts=True)
        places = self._counters_of(different)
        before = self.counters.gather(1, places).amin(0)
        after = before + times.int()
        self.counters.scatter_reduce_(1, places, after.expand_as(places), "amax")

    def count(self, ids: Tensor, keys: Tensor) -> Tensor:
        """How often each id was seen, int64 (...); never too low. Arguments as in ``row_hash``."""
        row = row_hash(ids, keys)
        return self._count(row.flatten()).view(row.shape)

    def _count(self, row: Tensor) -> Tensor:
        return self.counters.gather(1, self._counters_of(row)).amin(0).long()

    @torch.no_grad()
    def decay(self, factor: float) -> None:
        """Multiply all counts, so that what was seen long ago counts less.

        Raises:
            ValueError: factor is not within 0 to 1.
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"factor: expected 0 to 1, got {factor}")
        self.counters.copy_((self.counters * factor).int())


class Admission(nn.Module):
    """The ids that have an embedding of their own; given to layers as ``admission=``, to several if they share it.

    With a threshold it counts what its layers read while they train, and lets an id in when it has been seen that
    often. Without one, ids are let in by ``admit``, such as after counting them in a pass over the data.

    Args:
        bytes: of the filter, a multiple of 8; 4 to 8 bits for each id that is let in are good.
        threshold: times an id has to be seen; None: no counting.
        counter_bytes: with threshold, of the counters, which are there during training only; see IdCounter.
        device: of the filter.

    Attributes:
        filter: buffer (bytes // 8,) int64.
        counter: the IdCounter, None without one. While it is there, its counts are in the ``state_dict``.

    Raises:
        ValueError: bytes no positive multiple of 8, or threshold below 1.
    """

    filter: Tensor
    counter: IdCounter | None

    def __init__(self, bytes: int, *, threshold: int | None = None, counter_bytes: int = 1 << 28, device=None):
        super().__init__()
        if bytes < 8 or bytes % 8:
            raise ValueError(f"bytes: expected a positive multiple of 8 for an Admission, got {bytes}")
        if threshold is not None and threshold < 1:
            raise ValueError(f"threshold: expected at least 1, got {threshold}")
        self.threshold = threshold
        self.register_buffer("filter", torch.zeros(bytes // 8, dtype=torch.int64, device=device))
        self.counter = None if threshold is None else IdCounter(counter_bytes, device)

    @property
    def bytes(self) -> int:
        """Memory of the filter."""
        return 8 * len(self.filter)

    def admits(self, ids: Tensor, keys: Tensor) -> Tensor:
        """Whether each id is let in, bool (...); arguments as in ``row_hash``."""
        return admits(self.filter, ids, keys)

    def admit(self, ids: Tensor, keys: Tensor) -> None:
        """Let ids in for good; arguments as in ``row_hash``."""
        self._admit(row_hash(ids, keys).flatten())

    def _admit(self, row: Tensor) -> None:
        word, bits = _places(row.unique(), len(self.filter))
        filter = self.filter.cpu()
        np.bitwise_or.at(filter.numpy(), word.cpu().numpy(), bits.cpu().numpy())
        self.filter.copy_(filter)

    @torch.no_grad()
    def admit_best(
        self,
        read: Callable[[], Iterable[tuple[Tensor, Tensor | None]]],
        keys: Tensor,
        *,
        bits: float = 8,
        counter_bytes: int = 1 << 28,
    ) -> int:
        """Let in those ids of some data from which most is to be gained, as many as the filter is made for.

        With labels of 0 and 1 that is ``expected_gain``, without how often an id is there. The data is read twice: to
        count, and to choose; memory does not grow with it.

        Args:
            read: gives the data anew at each call, as pairs: ids, and the label of each or None. ids are as in
                ``row_hash`` with keys; labels are broadcastable to them.
            bits: of the filter, for each id.
            counter_bytes: of each of two counters, there for the time being; see IdCounter.

        Returns:
            how many were let in.
        """
        device = self.filter.device
        times, clicks = IdCounter(counter_bytes, device), None
        seen = clicked = 0
        for ids, labels in read():
            row = row_hash(ids, keys)
            times._add(row.flatten())
            if labels is not None:
                clicks = clicks or IdCounter(counter_bytes, device)
                with_click = row[labels.expand_as(row) > 0.5]
                clicks._add(with_click)
                seen, clicked = seen + row.numel(), clicked + len(with_click)
        most = int(8 * self.bytes / bits)
        best, scores = row_hash(torch.empty(0, dtype=torch.int64, device=device), keys.flatten()[:0]), None
        for ids, _ in read():
            row = torch.cat([best, row_hash(ids, keys).flatten()]).unique()
            scores = times._count(row).double()
            if clicks is not None:
                scores = expected_gain(scores, clicks._count(row).double(), clicked / seen)
            best = row[scores.topk(min(most, len(row))).indices]
        self._admit(best)
        return len(best)

    @torch._disable_dynamo
    @torch.no_grad()
    def observe(self, ids: Tensor, keys: Tensor) -> None:
        """Count ids that are not in, and let in those seen ``threshold`` times. Layers call it with what they read.

        Raises:
            ValueError: there is no counter.
        """
        if self.counter is None or self.threshold is None:
            raise ValueError("observe: this Admission does not count; it was made without threshold, or is frozen")
        row = row_hash(ids, keys).flatten()
        word, bits = _places(row, len(self.filter))
        row = row[self.filter[word] & bits != bits]
        if not len(row):
            return
        self.counter._add(row)
        row = row.unique()
        often = self.counter._count(row) >= self.threshold
        if often.any():
            self._admit(row[often])

    def freeze(self) -> None:
        """Stop counting and drop the counters: what is in stays in, what is not stays out."""
        self.counter = self.threshold = None

    def false_positive_rate(self) -> float:
        """The share of ids never let in that are in by chance, from the bits that are set."""
        words = self.filter.cpu().numpy().view(np.uint8).reshape(-1, 8)
        full = np.unpackbits(words, axis=1).mean(axis=1)
        return float((full**BITS_OF_ID).mean())

    def extra_repr(self) -> str:
        return f"{self.bytes} bytes" + ("" if self.threshold is None else f", threshold={self.threshold}")
