"""Admission: which ids have an embedding of their own.

Most ids in a recommender's logs are rare. A table leaves their embeddings near the initial values. A shared array gives
a rare id somebody else's weights, and training on it disturbs those (docs/accuracy.md has figures). With an Admission,
ids that were seen often enough read embeddings of their own; all others of a table read one embedding together, that of
SHARED_ID.

The ids let in are kept in a Bloom filter (robe/sketches.py). An id that was let in always is in. Another id is in by
chance, the more likely the fuller the filter: in 4 of 100 cases at 8 bits for each id let in, 7 at 6, 16 at 4.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from robe.admission.choice import choose_rows
from robe.admission.counter import IdCounter, moved
from robe.hashing import row_hash
from robe.sketches import BITS_OF_ID, admits, filter_places

_FULL = 0.5  # the share of bits set at which counting lets no more ids in: then 1 of 8 others is in by chance


def _count_bits(words: np.ndarray) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


class Admission(nn.Module):
    """The ids that have an embedding of their own. Give it to layers as ``admission=``; several may share one.

    ``choose`` picks the ids from the data before training. With a threshold, an Admission counts the ids that its
    layers read while they train, and lets an id in once it was seen that often. Without either, ``admit`` lets ids in.

    Args:
        bytes: memory of the filter, a multiple of 8. Take 4 to 8 bits for each id that is to be let in.
        threshold: times an id has to be seen; None: no counting.
        counter_bytes: memory of the counters that a threshold needs, during training only; see IdCounter.
        device: where the filter lies.

    Attributes:
        filter: buffer (bytes // 8,) int64.
        counter: the IdCounter, or None. While there is one, its counts are in the ``state_dict``.
        threshold: times an id has to be seen, or None.

    Raises:
        ValueError: bytes is not a positive multiple of 8, or threshold is below 1.

    Examples:
        >>> admission = Admission(1 << 20, threshold=10)
        >>> layer = RobeEmbedding(None, 16, robe_size=1 << 20, admission=admission)
    """

    filter: Tensor
    counter: IdCounter | None
    threshold: int | None

    def __init__(self, bytes: int, *, threshold: int | None = None, counter_bytes: int = 1 << 28, device=None):
        super().__init__()
        if bytes < 8 or bytes % 8:
            raise ValueError(f"bytes: expected a positive multiple of 8 for an Admission, got {bytes}")
        self.register_buffer("filter", torch.zeros(bytes // 8, dtype=torch.int64, device=device))
        self.threshold, self.counter = None, None
        self._bits_set: int | None = None  # of the filter; None: not counted yet
        if threshold is not None:
            self.start_counting(threshold, counter_bytes)

    @property
    def bytes(self) -> int:
        """Memory of the filter, in bytes."""
        return 8 * len(self.filter)

    def admits(self, ids: Tensor, keys: Tensor) -> Tensor:
        """Return whether each id is in, bool (...). Arguments as in ``hashing.row_hash``."""
        return admits(self.filter, ids, keys)

    def admit(self, ids: Tensor, keys: Tensor) -> None:
        """Let ids in for good. Arguments as in ``hashing.row_hash``."""
        self._admit(row_hash(ids, keys).flatten())

    def _admit(self, row: Tensor) -> None:
        word, bits = (x.cpu().numpy() for x in filter_places(row.unique(), len(self.filter)))
        # Gradients of what was read with the filter as it was still need that one.
        filter = self.filter.to("cpu", copy=True)
        touched = np.unique(word)
        before = _count_bits(filter.numpy()[touched])
        np.bitwise_or.at(filter.numpy(), word, bits)
        if self._bits_set is not None:
            self._bits_set += _count_bits(filter.numpy()[touched]) - before
        self.filter = filter.to(self.filter.device)

    def _is_full(self) -> bool:
        if self._bits_set is None:
            self._bits_set = _count_bits(self.filter.cpu().numpy())
        return self._bits_set >= _FULL * 64 * len(self.filter)

    def _apply(self, fn, recurse=True):
        before = self.filter
        super()._apply(fn, recurse)
        self.filter = moved(before, self.filter)
        return self

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._bits_set = None

    @classmethod
    @torch.no_grad()
    def choose(
        cls,
        read: Callable[[], Iterable[tuple[Tensor, Tensor | None]]],
        keys: Tensor,
        bytes: int,
        *,
        times: int = 10,
        bits: int = 8,
        rounds: int = 6,
        counter_bytes: int = 1 << 28,
    ) -> "Admission":
        """Make an Admission of the ids of a data set that gain most from an embedding of their own.

        Of the ids seen at least ``times`` times, it takes those with the largest ``expected_gain``, or without labels
        the most frequent, as many as the filter has room for. Of equal ones it takes those with the lowest
        ``row_hash``, so the cut of the data into batches does not matter. ``times`` keeps rare ids out: letting one in
        because of its few labels tells the model these labels, and it would learn to trust them.

        Ids of different tables often carry the same information. So they are chosen in rounds, an equal share in each:
        those with the largest gain beyond the prediction of a logistic regression on the ids chosen before, which is
        trained along the way (forward selection by the gradient, as in grafting: Perkins, Lacker and Theiler 2003).

        The data is read twice, to count and to find candidates. Where there are more candidates than room, it is read
        again for each round after the first. Memory does not grow with the data: it is that of the counters, and about
        80 bytes for each of 8 times as many ids as have room.

        Args:
            read: gives the same data anew at each call, in any order, as pairs: ids, and the label of each, 0 or 1, or
                None. ids are as in ``row_hash`` with keys; labels broadcast to them. Ids (..., F) with labels (..., 1)
                are samples of F ids; with other labels each id is a sample.
            keys: ``table_keys`` of the layer that gets the Admission; before there is one, ``hashing.table_key`` of
                the array's seed and each table_id.
            bytes: memory of the filter at most; it is made no larger than the ids need.
            times: the least number of times an id has to be seen.
            bits: of the filter, for each id.
            rounds: 1: each id is judged by itself, as always without labels.
            counter_bytes: memory of each of two counters, freed at the end; see IdCounter.

        Returns:
            the Admission, on the device of keys.

        Raises:
            ValueError: bytes below 8; times, bits or rounds below 1; ids or labels not as above; or a pass that reads
                other data than the first, such as an iterator that is used up.
        """
        for name, value, least in (("bytes", bytes, 8), ("times", times, 1), ("bits", bits, 1), ("rounds", rounds, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        best = choose_rows(read, keys, 8 * bytes // bits, times=times, rounds=rounds, counter_bytes=counter_bytes)
        admission = cls(8 * max(-(-len(best) * bits // 64), 1), device=keys.device)
        admission._admit(best)
        return admission

    @torch._disable_dynamo
    @torch.no_grad()
    def observe(self, ids: Tensor, keys: Tensor) -> None:
        """Count ids that are not in, and let in those seen ``threshold`` times. Layers call it with the ids they read.

        Once half of the filter's bits are set, at 4 to 5 bits for each id that is in, no more ids are let in.

        Raises:
            ValueError: there is no counter, ids are not integers, or keys don't broadcast to them.
        """
        if self.counter is None or self.threshold is None:
            raise ValueError("observe: this Admission does not count: it was made without a threshold, or is frozen")
        if self._is_full():
            return
        row = torch.ops.robe.observe_ids_(self.counter.counters, ids, keys, self.filter, self.threshold)
        if len(row):
            self._admit(row)

    def start_counting(self, threshold: int, counter_bytes: int = 1 << 28) -> None:
        """Start to count the ids that layers read, and to let in those read ``threshold`` times.

        Raises:
            ValueError: threshold below 1, or too few counter_bytes.
        """
        if threshold < 1:
            raise ValueError(f"threshold: expected at least 1, got {threshold}")
        self.counter, self.threshold = IdCounter(counter_bytes, self.filter.device), threshold

    def freeze(self) -> None:
        """Stop counting and drop the counters: ids that are in stay in, the others stay out."""
        self.counter = self.threshold = None

    def false_positive_rate(self) -> float:
        """Return the share of other ids that are in by chance, estimated from the bits that are set."""
        full = np.unpackbits(self.filter.cpu().numpy().view(np.uint8).reshape(-1, 8), axis=1).mean(axis=1)
        return float((full**BITS_OF_ID).mean())

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        return f"{self.bytes} bytes" + ("" if self.threshold is None else f", threshold={self.threshold}")
