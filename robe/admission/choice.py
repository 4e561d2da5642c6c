"""The choice of the ids of a data set that gain most from an embedding of their own, made before training."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robe.admission.counter import IdCounter
from robe.hashing import row_hash

SPREAD = 0.5  # of the effects of ids on the log-odds of a click
_RECENT = 1 << 18  # rows that the kernel remembers to have found frequent
_WAITING = 1 << 20  # rows compared at a time, at least
_CANDIDATES = 8  # times as many ids as have room are compared in rounds
_FEW = 1 << 17  # candidates; of more, only those in the samples at hand are gone through
_SAMPLES = 1024  # between two updates of the model that is trained meanwhile

Batches = Callable[[], Iterable[tuple[Tensor, Tensor | None]]]


def expected_gain(times: Tensor, clicks: Tensor, rate: float) -> Tensor:
    """Estimate the log likelihood that ids gain from embeddings of their own, through their effect on the click rate.

    The effect is one on the log-odds, with the prior N(0, SPREAD**2). Near no effect the log likelihood of an id's
    clicks is about a parabola (Laplace's approximation) with information I and its maximum at e:

        I = times * rate * (1 - rate),    e = (clicks - times * rate) / I
        gain = I * mean**2 / 2,    mean = e * SPREAD**2 / (SPREAD**2 + 1 / I), the posterior mean

    Args:
        times, clicks: float (n,), how often each id was seen, and how often with label 1.
        rate: the share of label 1 in all the data.

    Returns:
        (n,), in nats.
    """
    return _gain(clicks - times * rate, times * (rate * (1 - rate)))


def _gain(residual: Tensor, information: Tensor) -> Tensor:
    """``expected_gain`` from the clicks beyond those expected."""
    return information * (residual / (information + SPREAD**-2)) ** 2 / 2


def choose_rows(read: Batches, keys: Tensor, most: int, *, times: int, rounds: int, counter_bytes: int) -> Tensor:
    """Choose the ids to let in, as ``Admission.choose`` describes.

    Args:
        read, keys, times, rounds, counter_bytes: as there.
        most: ids to choose at most.

    Returns:
        their row hashes, at most (most,) int64.
    """
    read = _SameData(read)
    counts = _count(read, keys, counter_bytes)
    in_rounds = rounds > 1 and 0 < counts.rate < 1
    best = _candidates(read, keys, counts, times, _CANDIDATES * most if in_rounds else most)
    if len(best) <= most:
        return best
    best = best.sort().values
    gain = counts.gain(best).cpu()
    model = _Regression(best.cpu(), counts.seen.count_rows(best).double().cpu(), counts.rate)
    for k in range(1, rounds + 1):
        model.choose(gain, k * most // rounds)
        if k < rounds:
            gain = model.train(_samples(read(), keys))
    return best[model.chosen.to(best.device)]


class _SameData:
    """Passes over a data set, each compared with the first at its end.

    They agree in the number of ids and of labels, and in sums over ids and over those with label 1, modulo 2**64. So
    the order of the samples and the cut into batches are free.
    """

    def __init__(self, read: Batches):
        if not callable(read):
            raise ValueError(
                f"read: expected a function that gives the data anew at each call, got a {type(read).__name__}; "
                "of a list or a DataLoader, lambda: it"
            )
        self._read, self._passes = read, 0
        self._first: _Content | None = None

    def __call__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        self._passes += 1
        batches = self._read()
        found = _Content(0, 0, 0, 0)
        has_labels: bool | None = None
        for k, batch in enumerate(batches):
            ids, labels = _checked(batch, k, has_labels)
            has_labels = labels is not None
            yield ids, labels
            found = found.and_those(ids, labels)  # which by now are known to be of the right types and shapes
        if self._first is None:
            self._first = found
            if not found.ids and isinstance(batches, Iterator) and iter(batches) is batches:
                # A list may be empty; of an iterator, nobody could tell that from used up.
                raise ValueError("read: expected an iterator over the data, got one that is empty or used up")
        elif found != self._first:
            raise ValueError(
                f"read: expected the same data at each call, got {self._first.ids:,} ids in the first pass and "
                f"{found.ids:,} in pass {self._passes}"
                + (", other ones" if found.ids == self._first.ids else "")
                + "; an iterator is used up after one pass, so make it in the function"
            )


def _checked(batch: Any, k: int, has_labels: bool | None) -> tuple[Tensor, Tensor | None]:
    """Batch k, in which everything is as it should be; has_labels says whether those before had labels."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            f"read: expected pairs (ids, labels or None), got a {type(batch).__name__}{length} in batch {k}"
        )
    ids, labels = batch
    if not isinstance(ids, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        kinds = type(ids).__name__, type(labels).__name__
        raise ValueError(f"read: expected tensors, got {kinds[0]} and {kinds[1]} in batch {k}")
    if has_labels not in (None, labels is not None):
        raise ValueError(
            f"read: expected labels in every batch or in none, got {'none' if has_labels else 'some'} in batch {k}"
        )
    if labels is not None and labels.is_floating_point() and labels.isnan().any():
        raise ValueError(f"read: expected labels that are numbers, got nan in batch {k}")
    return ids, labels


class _Content(NamedTuple):
    """What is compared of two passes."""

    ids: int
    labels: int
    sum: int
    clicked: int

    def and_those(self, ids: Tensor, labels: Tensor | None) -> "_Content":
        """The content with one more batch."""
        mixed = ids.long() * ids  # of ids alone, sums of small ones are soon equal
        clicked = 0 if labels is None else int((mixed * (labels > 0.5)).sum())
        wrap = (1 << 64) - 1
        return _Content(
            self.ids + ids.numel(),
            self.labels + (0 if labels is None else labels.numel()),
            (self.sum + int(mixed.sum()) + int(ids.sum())) & wrap,
            (self.clicked + clicked) & wrap,
        )


class _Counts(NamedTuple):
    """The counts of a data set's ids, and of those with label 1; without labels there are no clicks."""

    seen: IdCounter
    clicks: IdCounter | None
    rate: float

    def gain(self, rows: Tensor) -> Tensor:
        """The expected gain of each row hash (n,); without labels its count."""
        times = self.seen.count_rows(rows).double()
        if self.clicks is None:
            return times
        return expected_gain(times, self.clicks.count_rows(rows).double(), self.rate)


def _count(read: Batches, keys: Tensor, counter_bytes: int) -> _Counts:
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
    return _Counts(seen, clicks, clicked / max(total, 1))


def _candidates(read: Batches, keys: Tensor, counts: _Counts, times: int, most: int) -> Tensor:
    """The ``most`` row hashes with the largest gains among those seen at least ``times`` times."""
    # Rows to compare: the best so far and others, some of these twice; and the gain that others need.
    waiting, others, floor = [keys.new_empty(0)], 0, 0.0
    recent = keys.new_zeros(_RECENT)
    recent[0] = -1  # a row that is never looked for there, unlike 0
    for ids, _ in read():
        rows = torch.ops.robe.frequent_rows_(counts.seen.counters, ids, keys, times, recent)
        if floor:
            rows = rows[counts.gain(rows) >= floor]
        if len(rows):
            waiting.append(rows)
            others += len(rows)
        if others > max(len(waiting[0]), _WAITING):
            best, floor = _best(torch.cat(waiting), counts.gain, most)
            waiting, others = [best], 0
    return _best(torch.cat(waiting), counts.gain, most)[0]


def _best(rows: Tensor, gain_of: Callable[[Tensor], Tensor], most: int) -> tuple[Tensor, float]:
    """The ``most`` rows with the largest gains, the lowest of equal ones; and the gain others need to be as good."""
    rows = rows.unique()
    if len(rows) <= most:
        return rows, 0.0
    gain = gain_of(rows)
    least = float(gain.topk(most).values[-1]) if most else math.inf
    above, equal = rows[gain > least], rows[gain == least]
    return torch.cat([above, equal[: most - len(above)]]), least


def _samples(batches: Iterable[tuple[Tensor, Tensor | None]], keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row hashes (n, ids) and labels (n,) float64; n = _SAMPLES except in the last, however the batches are cut."""
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
    """A logistic regression on the presence of chosen ids, and the gain each other id would add to it.

    Weights have the prior N(0, SPREAD**2). Each piece of samples updates them by a damped Newton step on the diagonal.
    With p the predicted click rates, k the number of chosen ids in a sample plus 1, and sums over the samples of the
    piece that have the id:

        step = (sum(label - p) - gradient of the prior) / (information before + sum(p (1 - p) k))

    The steps of all ids together cannot go too far, since k bounds their sum (De Pierro 1995). The information of the
    prior and of all earlier samples makes later steps smaller.

    Args:
        candidates: (C,) row hashes, ascending.
        times: (C,) how often each is in the data.
        rate: the share of label 1.
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
        """Train on one pass; return each candidate's expected gain from the clicks that the model did not predict."""
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
        """The sample and the index of each candidate among row hashes (n, ids)."""
        place = self.first[(rows >> self.shift) + self.half]
        for _ in range(self.steps):
            place += self.candidates[place] < rows
        known = (self.candidates[place] == rows) & (place < len(self.weight))
        return known.nonzero(as_tuple=True)[0], place[known]

    def choose(self, gain: Tensor, most: int) -> None:
        """Choose the best of the rest, the first of equal ones, until ``most`` are chosen."""
        order = gain.masked_fill(self.chosen, -math.inf).sort(descending=True, stable=True).indices
        self.chosen[order[: most - int(self.chosen.sum())]] = True
