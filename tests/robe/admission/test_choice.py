"""The choice of ids before training, against the rules written out in Python."""

import math
from collections import Counter

import pytest
import torch

import robe
from robe.hashing import signed
from tests.helpers.admitted import KEYS, ids_of, rows_of


@pytest.mark.parametrize("labelled", [False, True])
def test_the_best_ids_are_let_in(labelled):
    data = [(ids_of(300, 3, seed=seed, top=500), torch.rand(300, 1).round()) for seed in range(4)]
    data = [(ids, labels if labelled else None) for ids, labels in data]
    seen, clicked = Counter(), Counter()
    for ids, labels in data:
        for row, (label,) in zip(ids.tolist(), (torch.zeros(300, 1) if labels is None else labels).tolist()):
            for k, x in enumerate(row):
                seen[k, x] += 1
                clicked[k, x] += label
    rate = sum(clicked.values()) / sum(seen.values())

    def score(pair):
        if seen[pair] < 3:
            return -1
        if not labelled:
            return seen[pair]
        information = seen[pair] * rate * (1 - rate)
        effect = (clicked[pair] - seen[pair] * rate) / information
        return information / 2 * (effect * 0.25 / (0.25 + 1 / information)) ** 2

    def choose(bytes):
        return robe.Admission.choose(lambda: iter(data), KEYS, bytes, times=3, rounds=1, counter_bytes=1 << 22)

    admission = choose(64)
    assert admission.bytes == 64
    ranked = sorted(seen, key=score, reverse=True)
    sure = [pair for pair in ranked if score(pair) > score(ranked[64]) + 1e-9]
    assert len(sure) > 40  # others have the same score as the first that is not in
    tables, values = map(torch.tensor, zip(*sure))
    assert admission.admits(values, KEYS[tables]).all()
    # And no more than 64: bits that the sure ones have not set are of ids with the score of the last.
    want = robe.Admission(64)
    want.admit(values, KEYS[tables])
    last = [pair for pair in ranked if abs(score(pair) - score(ranked[63])) <= 1e-9]
    tables, values = map(torch.tensor, zip(*last))
    want.admit(values, KEYS[tables])
    assert torch.equal(want.filter | admission.filter, want.filter)
    # With room for all, all that are there often enough are in, and the filter is no larger than they need.
    often = [pair for pair, n in seen.items() if n >= 3]
    everyone = choose(1 << 20)
    assert everyone.bytes == 8 * -(-len(often) // 8)
    want = robe.Admission(everyone.bytes)
    tables, values = map(torch.tensor, zip(*often))
    want.admit(values, KEYS[tables])
    assert torch.equal(everyone.filter, want.filter)


def chosen(ids, labels, most, times, rounds, piece):
    """The rows that choose is to let in, by Python's floats; of equal gains the lowest."""
    samples = [[signed(row) for row in rows_of(sample, KEYS)] for sample in ids.unsqueeze(1)]
    seen = Counter(row for sample in samples for row in sample)
    often = [row for row, n in seen.items() if n >= times]
    if labels is None:
        return sorted(often, key=lambda row: (-seen[row], row))[:most]
    labels = labels.flatten().tolist()
    clicks = Counter(row for sample, label in zip(samples, labels) if label for row in sample)
    rate = sum(labels) / len(labels)

    def gain(residual, information):
        mean = residual / (information + 4)
        return information * (mean * mean) / 2

    def first(row):
        return gain(clicks[row] - seen[row] * rate, seen[row] * (rate * (1 - rate)))

    candidates = sorted(often, key=lambda row: (-first(row), row))[: most if rounds == 1 else 8 * most]
    if len(candidates) <= most:
        return candidates
    inside, weight, before = candidates[: most // rounds], Counter(), Counter()
    bias, bias_before = math.log(rate / (1 - rate)), 0.0
    for k in range(2, rounds + 1):
        residual, information = Counter(), Counter()
        for start in range(0, len(samples), piece):
            slope, curve, bound, here = Counter(), Counter(), Counter(), Counter()
            for sample, label in list(zip(samples, labels))[start : start + piece]:
                p = 1 / (1 + math.exp(-bias - sum(weight[row] for row in sample)))
                known = 1 + sum(row in inside for row in sample)
                for row in [None, *sample]:
                    slope[row] += label - p
                    curve[row] += p * (1 - p)
                    bound[row] += p * (1 - p) * known
                    here[row] += 1
            for row in candidates:
                residual[row] += slope[row]
                information[row] += curve[row]
            for row in inside:
                prior = weight[row] * 4 * here[row] / seen[row]
                weight[row] += (slope[row] - prior) / (4 + before[row] + bound[row])
                before[row] += curve[row]
            bias += slope[None] / (bias_before + bound[None])
            bias_before += curve[None]
        others = sorted(set(candidates) - set(inside), key=lambda row: (-gain(residual[row], information[row]), row))
        inside = inside + others[: k * most // rounds - len(inside)]
    return inside


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
@pytest.mark.parametrize("most", [8, 64, 100_000])
def test_what_is_chosen_does_not_depend_on_how_the_data_is_cut(rounds, most, monkeypatch):
    ids = torch.cat([ids_of(700, 3, top=700), torch.arange(100, 160).repeat(5, 1).T.reshape(-1, 3)])
    ids[::3, 1] = ids[::3, 0] % 20  # which then tells nothing more
    labels = (
        torch.rand(len(ids), 1, generator=torch.Generator().manual_seed(1)) < 0.1 + 0.6 * (ids[:, :1] % 7 < 3)
    ).float()
    labelled, rounds = rounds > 0, max(rounds, 1)
    want = chosen(ids, labels if labelled else None, most, 3, rounds, 64)
    assert len(set(want)) == most or 100 < len(set(want)) < most
    filter = robe.Admission(8 * max(-(-len(want) * 8 // 64), 1))
    filter._admit(torch.tensor(want))
    monkeypatch.setattr("robe.admission.choice._SAMPLES", 64)
    for sizes, waiting, recent, few in (
        ([len(ids)], 1 << 20, 1 << 18, 1 << 20),
        ([len(ids)], 1, 2, 0),
        ([1] * len(ids), 10, 2, 0),
        ([0, 100, 0, 17, 250, len(ids) - 367, 0], 20, 16, 0),
        ([len(ids) // 2, len(ids) - len(ids) // 2], 1, 1 << 10, 1 << 20),
    ):
        monkeypatch.setattr("robe.admission.choice._FEW", few)
        monkeypatch.setattr("robe.admission.choice._WAITING", waiting)
        monkeypatch.setattr("robe.admission.choice._RECENT", recent)
        batches = list(zip(ids.split(sizes), labels.split(sizes) if labelled else [None] * len(sizes)))
        admission = robe.Admission.choose(
            lambda batches=batches: batches, KEYS, most, times=3, bits=8, rounds=rounds, counter_bytes=1 << 22
        )
        assert torch.equal(admission.filter, filter.filter)


def test_rounds_leave_out_what_others_tell():
    """The second table has the first one's ids, but for a fifth of the rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (20_000, 2), generator=generator)
    same = torch.rand(len(ids), generator=generator) < 0.8
    ids[:, 1] = ids[:, 0].where(same, ids[:, 1])
    labels = (torch.rand(len(ids), 1, generator=generator) < torch.rand(60, generator=generator)[ids[:, :1]]).float()

    def known(rounds):
        admission = robe.Admission.choose(lambda: [(ids, labels)], KEYS[:2], 60, rounds=rounds, counter_bytes=1 << 20)
        return admission.admits(torch.arange(60).unsqueeze(1), KEYS[:2]).sum(0).tolist()

    one_by_one, in_rounds = known(1), known(6)
    assert one_by_one[0] < 37 < 44 < in_rounds[0]
    assert one_by_one[1] > 23 > 15 > in_rounds[1]


def test_an_id_with_a_label_of_its_own_is_a_sample():
    ids, labels = ids_of(4000, 3, top=400), torch.rand(4000, 3, generator=torch.Generator().manual_seed(1)).round()

    def filter(ids, labels, keys):
        return robe.Admission.choose(lambda: [(ids, labels)], keys, 24, counter_bytes=1 << 20).filter

    each = filter(ids.reshape(-1, 1), labels.reshape(-1, 1), KEYS.repeat(4000).unsqueeze(1))
    assert torch.equal(filter(ids, labels, KEYS), each)
    assert torch.equal(filter(ids.flatten(), labels.flatten(), KEYS.repeat(4000)), each)
    assert torch.equal(filter(ids.view(2, 2000, 3), labels.view(2, 2000, 3), KEYS), each)
    one = filter(ids, labels[:, :1], KEYS)
    assert not torch.equal(one, each)
    assert torch.equal(filter(ids.view(2, 2000, 3), labels[:, :1].view(2, 2000, 1), KEYS), one)
    # Batches of one dimension, or none.
    of_rows = robe.Admission.choose(lambda: zip(ids, labels[:, :1]), KEYS, 24, counter_bytes=1 << 20)
    assert torch.equal(of_rows.filter, one)
    of_ids = robe.Admission.choose(lambda: zip(ids[:, 0], labels[:, 0]), KEYS[0], 24, counter_bytes=1 << 20)
    assert torch.equal(of_ids.filter, filter(ids[:, :1], labels[:, :1], KEYS[:1]))


def test_nothing_to_choose_from():
    none = torch.empty(0, 3, dtype=torch.int64)
    for batches in ([], [(none, None)], [(none, torch.empty(0, 1))]):
        admission = robe.Admission.choose(lambda batches=batches: batches, KEYS, 100, counter_bytes=1024)
        assert admission.bytes == 8
        assert not admission.filter.any()
    data = [(torch.ones(99, 3, dtype=torch.int64), None)]
    assert robe.Admission.choose(lambda: data, KEYS, 8, bits=64, counter_bytes=1024).filter.any()
    assert not robe.Admission.choose(lambda: data, KEYS, 8, bits=65, counter_bytes=1024).filter.any()
    for labels, message in ((torch.ones(3, 1), "labels: expected"), (torch.ones(99, 2), "labels: expected")):
        with pytest.raises(ValueError, match=message):
            robe.Admission.choose(lambda y=labels: [(data[0][0], y)], KEYS, 8, counter_bytes=1024)


DATA = [(ids_of(100, 3, seed=seed, top=50), torch.rand(100, 1).round()) for seed in range(4)]


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ([], "got 1,200 ids in the first pass and 0 in pass 2"),
        (DATA[:3], "got 1,200 ids in the first pass and 900 in pass 2"),
        ([*DATA[:3], DATA[0]], "got 1,200 ids in the first pass and 1,200 in pass 2, other ones"),
        ([(ids, 1 - labels) for ids, labels in DATA], "1,200 in pass 2, other ones"),
        ([(ids, None) for ids, _ in DATA], "1,200 in pass 2, other ones"),
    ],
)
def test_passes_that_read_other_data_are_refused(later, message):
    passes = iter([DATA, later])
    with pytest.raises(ValueError, match=message):
        robe.Admission.choose(lambda: next(passes), KEYS, 100, counter_bytes=1 << 14)


@pytest.mark.parametrize("used", [0, 1, 4])
def test_an_iterator_that_can_be_read_once_is_refused(used):
    once = iter(DATA)
    for _ in range(used):
        next(once)
    with pytest.raises(ValueError, match=r"read: expected .*used up"):
        robe.Admission.choose(lambda: once, KEYS, 100, counter_bytes=1 << 14)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2, 3), "expected pairs .* got a Tensor in batch 1"),
        ((DATA[0][0],), "expected pairs .* got a tuple of 1 in batch 1"),
        ({"ids": 1, "labels": 2}, "expected pairs .* got a dict in batch 1"),
        ((DATA[0][0].numpy(), DATA[0][1]), "expected tensors, got ndarray and Tensor in batch 1"),
        ((DATA[0][0], None), "expected labels in every batch or in none, got none in batch 1"),
        ((DATA[0][0], DATA[0][1] * float("nan")), "expected labels that are numbers, got nan in batch 1"),
    ],
)
def test_batches_of_another_kind_are_refused(batch, message):
    with pytest.raises(ValueError, match=f"read: {message}"):
        robe.Admission.choose(lambda: [DATA[0], batch], KEYS, 100, counter_bytes=1 << 14)


def test_data_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match=r"read: expected a function .* got a list"):
        robe.Admission.choose(DATA, KEYS, 100, counter_bytes=1 << 14)


def test_every_pass_may_be_shuffled_and_cut_anew():
    ids, labels = (torch.cat(part) for part in zip(*DATA))

    def read():
        order = torch.randperm(len(ids))
        return zip(ids[order].split(37), labels[order].split(37))

    options = {"times": 2, "rounds": 1, "counter_bytes": 1 << 20}
    want = robe.Admission.choose(lambda: DATA, KEYS, 16, **options)
    assert want.filter.any()
    assert torch.equal(robe.Admission.choose(read, KEYS, 16, **options).filter, want.filter)
