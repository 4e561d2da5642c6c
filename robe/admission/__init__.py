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
2002), in bounded memory: a count is never too low, and too high only for an id that shares all its counters. It stops
at 2**31 - 1. The kernels for CPUs count one id after another; elsewhere torch counts all of a call at once, which comes
to the same, or to less where different ids of the call share counters.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from robe.hashing import mix64, multiply_high, row_hash, signed

RARE = -(1 << 63)  # the id whose row all ids read that were not let in
SPREAD = 0.5  # of the effects of ids on the log-odds of a click
_SALT = 0xD1B54A32D192ED03  # of the counters, which are not read at the hashes of blocks
BITS_OF_WORD = 6  # log2
BITS_OF_ID = 3
_FULL = 0.5  # the share of bits set at which counting lets no more ids in: then 1 of 8 others is in by chance
_DEPTH = 4  # counters of an id
_RECENT = 1 << 18  # rows that the kernel remembers to have found frequent
_WAITING = 1 << 20  # rows that ``choose`` compares at a time, at least
_CANDIDATES = 8  # times as many ids as have room are compared in rounds
_FEW = 1 << 17  # candidates; of more, only those in the samples at hand are gone through
_SAMPLES = 1024  # between two updates of the model that is trained meanwhile


def _places(row: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """The word of each id in the filter, and its bits there."""
    one, bits = torch.ones_like(row), torch.zeros_like(row)
    for k in range(BITS_OF_ID):
        bits |= one << ((row >> (k * BITS_OF_WORD)) & 63)
    return multiply_high(row, words), bits


def admits(filter: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
    """Whether each id was let in, bool (...); filter: (W,) int64, the others as in ``hashing.row_hash``."""
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
    return _gain(clicks - times * rate, times * (rate * (1 - rate)))


def _gain(residual: Tensor, information: Tensor) -> Tensor:
    """``expected_gain`` of ids with so many clicks more than expected."""
    return information * (residual / (information + SPREAD**-2)) ** 2 / 2


def counters_of(row: Tensor, width: int) -> Tensor:
    """(4, n): the place of each row hash in each row of counters (4, width)."""
    salts = torch.arange(1, _DEPTH + 1, device=row.device).unsqueeze(1) * signed(_SALT)
    return multiply_high(mix64(row + salts), width)


def _best(rows: Tensor, gain_of: Callable[[Tensor], Tensor], most: int) -> tuple[Tensor, float]:
    """The rows with most to gain, of equal ones the lowest, and the gain that others need to be as good."""
    rows = rows.unique()
    if len(rows) <= most:
        return rows, 0.0
    gain = gain_of(rows)
    least = float(gain.topk(most).values[-1]) if most else math.inf
    above, equal = rows[gain > least], rows[gain == least]
    return torch.cat([above, equal[: most - len(above)]]), least


def _samples(batches: Iterable[tuple[Tensor, Tensor | None]], keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row hashes (n, ids) and labels (n,), float64, n = _SAMPLES but for the last, however the data is cut."""
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    waiting = 0
    for ids, label in batches:
        if label is None or not ids.numel():
            continue
        row, label = row_hash(ids, keys).cpu(), (label > 0.5).cpu().double()
        if label.dim() < max(row.dim(), 1) or label.shape[-1] > 1:  # each id has a label of its own
            row, label = row.unsqueeze(-1), label.expand_as(row).unsqueeze(-1)
        row, label = row.reshape(-1, row.shape[-1]), label.expand(*row.shape[:-1], 1).flatten()
        rows, labels, waiting = [*rows, row], [*labels, label], waiting + len(row)
        if waiting >= _SAMPLES:
            row, label = torch.cat(rows), torch.cat(labels)
            whole = waiting // _SAMPLES * _SAMPLES
            yield from zip(row[:whole].split(_SAMPLES), label[:whole].split(_SAMPLES))
            rows, labels, waiting = [row[whole:]], [label[whole:]], waiting - whole
    if waiting:
        yield torch.cat(rows), torch.cat(labels)


class _Regression:
    """A logistic regression on the presence of chosen ids, and what each of the others would add to it.

    Weights have the prior N(0, SPREAD**2) and are updated after each piece of samples, by a damped Newton step on their
    diagonal: with p the click rates that are predicted, k the number of chosen ids in a sample plus 1, and sums over
    the samples of the piece that have the id,

        step = (sum(label - p) - gradient of the prior) / (information before + sum(p (1 - p) k))

    Steps of all ids together cannot go too far, k being a bound of what they add up to (De Pierro 1995); information,
    the prior's and that of all samples before, makes later ones smaller.

    Args:
        candidates: (C,) row hashes, ascending.
        times: (C,) how often each is in the data.
        rate: of label 1.
    """

    def __init__(self, candidates: Tensor, times: Tensor, rate: float):
        self.times = times
        # Hashes are uniform, so that those with the same first bits are few, and a candidate is found in a few steps.
        bits = (2 * len(candidates)).bit_length()
        self.shift, self.half = 64 - bits, 1 << (bits - 1)
        same = torch.bincount((candidates >> self.shift) + self.half, minlength=1 << bits)
        self.first, self.steps = same.cumsum(0) - same, int(same.max())
        self.candidates = torch.cat([candidates, candidates.new_tensor([(1 << 63) - 1])])
        self.chosen = torch.zeros(len(candidates), dtype=torch.bool)
        self.weight = torch.zeros(len(candidates), dtype=torch.float64)
        self.information = torch.full_like(self.weight, SPREAD**-2)
        self.bias, self.bias_information = math.log(rate / (1 - rate)), 0.0

    def train(self, samples: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """One pass; the expected gain of each candidate from what the model had not predicted meanwhile."""
        residual, information = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        few = len(self.weight) <= _FEW
        for rows, labels in samples:
            sample, place = self._find(rows)
            ids, local = (slice(None), place) if few else place.unique(return_inverse=True)
            chosen, weight = self.chosen[ids].double(), self.weight[ids]
            log_odds = self.bias + torch.bincount(sample, (weight * chosen)[local], len(labels))
            p = log_odds.sigmoid()
            error, variance = labels - p, p * (1 - p)
            bound = variance * (1 + torch.bincount(sample, chosen[local], len(labels)))
            errors, variances, bounds = (
                torch.bincount(local, x[sample], len(weight)) for x in (error, variance, bound)
            )
            residual[ids] += errors
            information[ids] += variances
            # A pass over the data adds up to one gradient of the prior.
            errors -= weight * SPREAD**-2 * torch.bincount(local, minlength=len(weight)) / self.times[ids]
            self.weight[ids] += chosen * errors / (self.information[ids] + bounds)
            self.information[ids] += chosen * variances
            self.bias += float(error.sum() / (self.bias_information + bound.sum()))
            self.bias_information += float(variance.sum())
        return _gain(residual, information)

    def _find(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the row hashes (n, ids) that are candidates: the sample of each, and which one it is."""
        place = self.first[(rows >> self.shift) + self.half]
        for _ in range(self.steps):
            place += self.candidates[place] < rows
        known = (self.candidates[place] == rows) & (place < len(self.weight))
        return known.nonzero(as_tuple=True)[0], place[known]

    def choose(self, gain: Tensor, most: int) -> None:
        """Choose the best of the others, of equal ones the first, until ``most`` are chosen."""
        order = gain.masked_fill(self.chosen, -math.inf).sort(descending=True, stable=True).indices
        self.chosen[order[: most - int(self.chosen.sum())]] = True


def _count_bits(words: np.ndarray) -> int:
    return int(np.unpackbits(words.view(np.uint8)).sum())


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

    @torch.no_grad()
    def add(self, ids: Tensor, keys: Tensor) -> None:
        """Count ids; arguments as in ``hashing.row_hash``.

        Raises:
            ValueError: ids are no integers, or keys not broadcastable to them; nothing was counted.
        """
        torch.ops.robe.count_ids_(self.counters, ids, keys)

    def count(self, ids: Tensor, keys: Tensor) -> Tensor:
        """How often each id was seen, int64 (...); never too low. Arguments as in ``hashing.row_hash``."""
        row = row_hash(ids, keys)
        return self._count(row.flatten()).view(row.shape)

    def _count(self, row: Tensor) -> Tensor:
        return torch.ops.robe.id_counts(self.counters, row)

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

    ``choose`` makes one of ids that are chosen from the data before training. With a threshold it counts what its
    layers read while they train, and lets an id in when it has been seen that often. Else ids are let in by ``admit``.

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
        """Memory of the filter."""
        return 8 * len(self.filter)

    def admits(self, ids: Tensor, keys: Tensor) -> Tensor:
        """Whether each id is let in, bool (...); arguments as in ``hashing.row_hash``."""
        return admits(self.filter, ids, keys)

    def admit(self, ids: Tensor, keys: Tensor) -> None:
        """Let ids in for good; arguments as in ``hashing.row_hash``."""
        self._admit(row_hash(ids, keys).flatten())

    def _admit(self, row: Tensor) -> None:
        word, bits = (x.cpu().numpy() for x in _places(row.unique(), len(self.filter)))
        filter = self.filter.cpu()
        touched = np.unique(word)
        before = _count_bits(filter.numpy()[touched])
        np.bitwise_or.at(filter.numpy(), word, bits)
        if self._bits_set is not None:
            self._bits_set += _count_bits(filter.numpy()[touched]) - before
        self.filter.copy_(filter)

    def _is_full(self) -> bool:
        if self._bits_set is None:
            self._bits_set = _count_bits(self.filter.cpu().numpy())
        return self._bits_set >= _FULL * 64 * len(self.filter)

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
        """An Admission of those ids of some data from which most is to be gained.

        Of the ids that are there often enough, those with the largest ``expected_gain``, or without labels those that
        are there most often, as many as the filter has room for; of equal ones those with the lowest ``row_hash``, so
        that it does not matter how the data is cut into batches. Labels say little about rare ids, and letting in a
        rare id because of its labels tells the model what they are: it would learn to trust that.

        Ids of different tables often tell the same. So they are chosen in rounds, an equal part in each: those from
        which most is to be gained beyond what a logistic regression on the ids chosen before predicts, which is
        trained meanwhile (forward selection by the gradient, as in grafting: Perkins, Lacker and Theiler 2003).

        The data is read twice, to count and to find candidates, and where there are more of these than have room,
        again for each round but the first. Memory does not grow with it: it is that of the counters and some 80 bytes
        for each of 8 times as many ids as have room.

        Args:
            read: gives the data anew at each call, as pairs: ids, and the label of each, 0 or 1, or None. ids are as in
                ``row_hash`` with keys; labels are broadcastable to them. Ids (..., F) with labels (..., 1) are samples
                of F ids; with labels otherwise each id is a sample.
            keys: of the layer that is to have it: ``layer.table_keys``, or before there is one, ``hashing.table_key``
                of the array's seed and each table_id.
            bytes: of the filter at the most; it is made no larger than the ids need.
            times: an id has to be there, at least.
            bits: of the filter, for each id.
            rounds: 1: each id by itself. Without labels there are none.
            counter_bytes: of each of two counters, there for the time being; see IdCounter.

        Raises:
            ValueError: bytes below 8, times, bits or rounds below 1, or ids or labels that are not as above.
        """
        for name, value, least in (("bytes", bytes, 8), ("times", times, 1), ("bits", bits, 1), ("rounds", rounds, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        seen, clicks = IdCounter(counter_bytes, keys.device), None
        total = clicked = 0
        for ids, labels in read():
            if labels is None:
                seen.add(ids, keys)
                continue
            clicks = clicks or IdCounter(counter_bytes, keys.device)
            labels = labels > 0.5
            torch.ops.robe.count_ids_(seen.counters, ids, keys, clicks.counters, labels)
            total, clicked = total + ids.numel(), clicked + int(labels.expand_as(ids).sum())
        rate = clicked / max(total, 1)

        def gain_of(row: Tensor) -> Tensor:
            count = seen._count(row).double()
            return count if clicks is None else expected_gain(count, clicks._count(row).double(), rate)

        most = 8 * bytes // bits
        in_rounds = rounds > 1 and 0 < rate < 1
        compared = _CANDIDATES * most if in_rounds else most
        # Rows to compare: the best so far and others, some of these twice; and the gain that others need.
        waiting, others, floor = [keys.new_empty(0)], 0, 0.0
        recent = keys.new_zeros(_RECENT)
        recent[0] = -1  # a row that is never looked for there, unlike 0
        for ids, _ in read():
            row = torch.ops.robe.frequent_rows_(seen.counters, ids, keys, times, recent)
            if floor:
                row = row[gain_of(row) >= floor]
            if len(row):
                waiting.append(row)
                others += len(row)
            if others > max(len(waiting[0]), _WAITING):
                best, floor = _best(torch.cat(waiting), gain_of, compared)
                waiting, others = [best], 0
        best, _ = _best(torch.cat(waiting), gain_of, compared)
        if len(best) > most:
            best = best.sort().values
            gain = gain_of(best).cpu()
            model = _Regression(best.cpu(), seen._count(best).double().cpu(), rate)
            for k in range(1, rounds + 1):
                model.choose(gain, k * most // rounds)
                if k < rounds:
                    gain = model.train(_samples(read(), keys))
            best = best[model.chosen.to(best.device)]
        admission = cls(8 * max(-(-len(best) * bits // 64), 1), device=keys.device)
        admission._admit(best)
        return admission

    @torch._disable_dynamo
    @torch.no_grad()
    def observe(self, ids: Tensor, keys: Tensor) -> None:
        """Count ids that are not in, and let in those seen ``threshold`` times. Layers call it with what they read.

        Once half of the filter's bits are set, at 4 to 5 bits for each id that is in, no more are let in.

        Raises:
            ValueError: there is no counter, or ids are no integers, or keys not broadcastable to them.
        """
        if self.counter is None or self.threshold is None:
            raise ValueError("observe: this Admission does not count; it was made without threshold, or is frozen")
        if self._is_full():
            return
        row = torch.ops.robe.observe_ids_(self.counter.counters, ids, keys, self.filter, self.threshold)
        if len(row):
            self._admit(row)

    def start_counting(self, threshold: int, counter_bytes: int = 1 << 28) -> None:
        """Count what layers read from now on, and let in what they have read ``threshold`` times.

        Raises:
            ValueError: threshold below 1, or too few counter_bytes.
        """
        if threshold < 1:
            raise ValueError(f"threshold: expected at least 1, got {threshold}")
        self.counter, self.threshold = IdCounter(counter_bytes, self.filter.device), threshold

    def freeze(self) -> None:
        """Stop counting and drop the counters: what is in stays in, what is not stays out."""
        self.counter = self.threshold = None

    def false_positive_rate(self) -> float:
        """The share of ids never let in that are in by chance, from the bits that are set."""
        full = np.unpackbits(self.filter.cpu().numpy().view(np.uint8).reshape(-1, 8), axis=1).mean(axis=1)
        return float((full**BITS_OF_ID).mean())

    def extra_repr(self) -> str:
        return f"{self.bytes} bytes" + ("" if self.threshold is None else f", threshold={self.threshold}")
