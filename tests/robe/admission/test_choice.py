"""Admission against the formula in Python's own integers, and layers with one against tables without."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn

import robe
from robe.hashing import row_hash, signed, table_key
from robe.ops import REFERENCE
from robe.sketches import SHARED_ID
from tests.helpers.kernels import IS_NATIVE, needs_kernels

GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
KEYS = torch.tensor([table_key(7, k) for k in range(3)])


def mix64(x):
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK
    return x ^ (x >> 31)


def place(key, x, words):
    """The word of an id in the filter, and its bits there."""
    row = mix64((key + x * GOLDEN) & MASK)
    return (row * words) >> 64, 1 << row % 64 | 1 << row // 64 % 64 | 1 << row // 4096 % 64


def ids_of(*shape, seed=0, top=10**6):
    """Skewed ids, some of them negative or huge."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(shape, generator=generator) ** 4 * top).long()
    return ids.where(ids % 11 > 0, -(ids << 40))


# ---------------------------------------------------------------------------------------------------------------------
# The filter


@pytest.mark.parametrize("words", [1, 3, 64, 1000])
def test_the_filter_is_the_formula(words):
    admission = robe.Admission(8 * words)
    ids = ids_of(20, 3)
    admission.admit(ids, KEYS)
    want = [0] * words
    for row in ids.tolist():
        for key, x in zip(KEYS.tolist(), row):
            word, bits = place(key & MASK, x, words)
            want[word] |= bits
    assert [x & MASK for x in admission.filter.tolist()] == want
    others = ids_of(500, 3, seed=1)
    got = admission.admits(others, KEYS)
    assert got.dtype == torch.bool
    for row, of_row in zip(others.tolist(), got.tolist()):
        for key, x, inside in zip(KEYS.tolist(), row, of_row):
            word, bits = place(key & MASK, x, words)
            assert inside == (want[word] & bits == bits)


def test_the_filter_is_frozen():
    """Trained weights mean nothing under another filter: these numbers are never to change."""
    admission = robe.Admission(32)
    admission.admit(torch.tensor([0, 1, -1, 2**40]), torch.tensor(table_key(0, 0)))
    assert admission.filter.tolist() == FROZEN


FROZEN = [42958061568, 576478345303162881, 0, 288]


def test_who_was_let_in_is_in_whatever_comes_after():
    admission = robe.Admission(64)
    some = ids_of(50, 3)
    admission.admit(some, KEYS)
    for seed in range(1, 5):
        admission.admit(ids_of(50, 3, seed=seed), KEYS)
        assert admission.admits(some, KEYS).all()
    assert not robe.Admission(64).admits(some, KEYS).any()


@pytest.mark.parametrize(("bits", "rate"), [(4, 0.16), (6, 0.07), (8, 0.04)])
def test_false_positives_are_as_many_as_the_docs_say(bits, rate):
    admission = robe.Admission(8 * 2000)
    admission.admit(torch.arange(2000 * 64 // bits), KEYS[0])
    wrong = admission.admits(torch.arange(10**6, 2 * 10**6), KEYS[0]).float().mean().item()
    assert wrong == pytest.approx(rate, abs=0.01)
    assert admission.false_positive_rate() == pytest.approx(wrong, abs=0.003)
    # The same id of another table is another id.
    assert admission.admits(torch.arange(2000 * 64 // bits), KEYS[1]).float().mean() < 1.2 * rate + 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def test_counts_are_exact_where_there_is_room():
    counter, want = robe.IdCounter(1 << 22), Counter()
    for seed in range(5):
        ids = ids_of(400, 3, seed=seed, top=300)
        counter.add(ids, KEYS)
        want.update((k, x) for row in ids.tolist() for k, x in enumerate(row))
    tables, values = map(torch.tensor, zip(*want))
    assert counter.count(values, KEYS[tables]).tolist() == list(want.values())
    assert not counter.count(torch.tensor([12345, -12345]), KEYS[0]).any()


def test_counts_are_never_too_low_where_there_is_none():
    counter, want = robe.IdCounter(1024), Counter()
    for seed in range(5):
        ids = ids_of(400, seed=seed, top=300)
        counter.add(ids, KEYS[0])
        want.update(ids.tolist())
    got = counter.count(torch.tensor(list(want)), KEYS[0])
    assert (got >= torch.tensor(list(want.values()))).all()
    assert (got > torch.tensor(list(want.values()))).any()


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


WIDE = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 2**40])
SHAPES = {
    "(B, F)": (ids_of(300, 3, top=300), KEYS),
    "int32": (ids_of(300, 3, top=300).clamp(-(2**31), 2**31 - 1).int(), KEYS),
    "one key": (ids_of(300, 3, top=300), KEYS[:1]),
    "a key without dimension": (ids_of(500, top=300), KEYS[0]),
    "a key each": (ids_of(400, top=300), KEYS.repeat_interleave(torch.tensor([100, 250, 50]))),
    "keys of rows": (ids_of(3, 50, top=300), KEYS.unsqueeze(1)),
    "transposed": (ids_of(3, 300, top=300).T, KEYS),
    "every second": (ids_of(300, 6, top=300)[::3, ::2], KEYS),
    "every second of int32": (ids_of(600, top=300).int()[::2], KEYS[:1]),
    "three dimensions": (ids_of(10, 20, 6, top=300)[:, 3:].transpose(0, 1)[..., ::2], KEYS),
    "spread keys": (ids_of(300, 2, top=300), KEYS[::2]),
    "extremes": (WIDE.repeat(3, 1), KEYS.unsqueeze(1)),
    "one": (torch.tensor(7), KEYS[1]),
    "none": (torch.empty(0, 3, dtype=torch.int64), KEYS),
    "none in each": (torch.empty(5, 0, dtype=torch.int64), KEYS[:1]),
}


def rows_of(ids, keys):
    """Python's row hashes, in order."""
    pairs = zip(keys.expand_as(ids).flatten().tolist(), ids.flatten().tolist())
    return [mix64((key + x * GOLDEN) & MASK) for key, x in pairs]


def places_of(row, width):
    return [mix64((row + k * 0xD1B54A32D192ED03) & MASK) * width >> 64 for k in range(1, 5)]


def add_one(counters, row):
    """The sequential rule on lists; the id's count afterwards."""
    places = places_of(row, len(counters[0]))
    count = min(of_row[place] for of_row, place in zip(counters, places)) + 1
    for of_row, place in zip(counters, places):
        of_row[place] = max(of_row[place], count)
    return count


def empty_counters(width):
    return torch.zeros(4, width, dtype=torch.int32)


def bodies(name):
    """What is called, by the name of what it runs."""
    return {"operator": getattr(torch.ops.robe, name), "reference": REFERENCE[name]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("body", ["operator", "reference"])
def test_each_id_is_counted_with_its_key(shape, body):
    ids, keys = SHAPES[shape]
    counters, want = empty_counters(1 << 20), Counter(rows_of(ids, keys))
    for _ in range(2):
        bodies("count_ids_")[body](counters, ids, keys)
    rows = torch.tensor([signed(row) for row in want], dtype=torch.int64)
    got = bodies("id_counts")[body](counters, rows)
    assert got.dtype == torch.int64
    assert got.tolist() == [2 * n for n in want.values()]
    for row in want:  # in the right places
        assert min(int(of_row[place]) for of_row, place in zip(counters, places_of(row, 1 << 20))) == 2 * want[row]
    assert int(counters.sum()) <= 8 * ids.numel()


@needs_kernels
@pytest.mark.parametrize("width", [1, 3, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_counts_one_id_after_another(shape, width):
    ids, keys = SHAPES[shape]
    counters, want = empty_counters(width), [[0] * width for _ in range(4)]
    torch.ops.robe.count_ids_(counters, ids, keys)
    for row in rows_of(ids, keys):
        add_one(want, row)
    assert counters.tolist() == want
    at_once = empty_counters(width)
    REFERENCE["count_ids_"](at_once, ids, keys)
    assert (at_once <= counters).all()


@pytest.mark.parametrize("wide_labels", [False, True])
@pytest.mark.parametrize("body", ["operator", "reference"])
def test_clicks_are_counted_beside(wide_labels, body):
    ids = ids_of(300, 3, top=300)
    labels = torch.rand(300, 3 if wide_labels else 1, generator=torch.Generator().manual_seed(0)) < 0.3
    counters, clicks, want = empty_counters(1 << 18), empty_counters(1 << 18), empty_counters(1 << 18)
    alone = empty_counters(1 << 18)
    bodies("count_ids_")[body](counters, ids, KEYS, clicks, labels)
    bodies("count_ids_")[body](alone, ids, KEYS)
    kept = labels.expand_as(ids)
    bodies("count_ids_")[body](want, ids[kept], KEYS.expand_as(ids)[kept])
    assert torch.equal(counters, alone)
    assert torch.equal(clicks, want)
    assert 0 < int(clicks.sum()) < int(counters.sum())


@pytest.mark.parametrize("body", ["operator", "reference"])
def test_counts_stop_at_the_largest(body):
    counters = torch.full((4, 5), 2**31 - 3, dtype=torch.int32)
    for want in (2**31 - 2, 2**31 - 1, 2**31 - 1):
        bodies("count_ids_")[body](counters, torch.tensor([9]), KEYS[:1])
        assert int(counters.max()) == want
    bodies("count_ids_")[body](counters, torch.tensor([8] * 7), KEYS[:1])
    assert int(counters.max()) == 2**31 - 1
    assert int(counters.min()) >= 2**31 - 3


@pytest.mark.parametrize("places", [2, 3, 1000])
@pytest.mark.parametrize("body", ["operator", "reference"])
def test_frequent_rows(places, body):
    """Every row that is there often enough, some of them twice, and no other; a row is not given again for long."""
    counters = empty_counters(1 << 18)
    ids = ids_of(400, 3, top=300)
    ids[::50] = 0
    keys = torch.tensor([0, *KEYS[1:].tolist()])  # the row of id 0 with key 0 is 0
    bodies("count_ids_")[body](counters, ids, keys)
    recent = torch.zeros(places, dtype=torch.int64)
    recent[0] = -1
    often = {signed(row) for row, n in Counter(rows_of(ids, keys)).items() if n >= 4}
    assert 0 in often
    got = bodies("frequent_rows_")[body](counters, ids, keys, 4, recent)
    assert set(got.tolist()) == often
    nothing = bodies("frequent_rows_")[body](counters, ids[:0], keys, 4, recent)
    assert nothing.shape == (0,)
    assert nothing.dtype == torch.int64


@needs_kernels
def test_a_row_is_not_given_again_while_it_is_remembered():
    counters, recent = empty_counters(1 << 18), torch.tensor([-1] + [0] * 99_999)
    ids = torch.arange(10).repeat(5)
    torch.ops.robe.count_ids_(counters, ids, KEYS[:1])
    got = torch.ops.robe.frequent_rows_(counters, ids, KEYS[:1], 5, recent)
    assert sorted(got.tolist()) == sorted(row_hash(torch.arange(10), KEYS[:1]).tolist())
    assert not len(torch.ops.robe.frequent_rows_(counters, ids, KEYS[:1], 5, recent))


@needs_kernels
@pytest.mark.parametrize("width", [7, 64, 1 << 18])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_observes_one_id_after_another(shape, width):
    ids, keys = SHAPES[shape]
    admission = robe.Admission(80)
    admission.admit(torch.arange(0, 300, 20), KEYS[0])
    counters, want, reached = empty_counters(width), [[0] * width for _ in range(4)], []
    inside = admission.admits(ids, keys).flatten().tolist()
    got = torch.ops.robe.observe_ids_(counters, ids, keys, admission.filter, 3)
    for row, skipped in zip(rows_of(ids, keys), inside):
        if not skipped and add_one(want, row) >= 3:
            reached.append(signed(row))
    assert counters.tolist() == want
    assert got.tolist() == reached


@pytest.mark.parametrize("body", ["operator", "reference"])
def test_observe_counts_who_is_not_in(body):
    ids = ids_of(300, 3, top=300)
    admission = robe.Admission(1 << 12)
    admission.admit(ids[:20], KEYS)
    inside = admission.admits(ids, KEYS).flatten().tolist()
    counters = empty_counters(1 << 18)
    want = Counter(row for row, skipped in zip(rows_of(ids, KEYS), inside) if not skipped)
    got = bodies("observe_ids_")[body](counters, ids, KEYS, admission.filter, 3)
    assert set(got.tolist()) == {signed(row) for row, n in want.items() if n >= 3}
    rows = torch.tensor([signed(row) for row in want])
    assert bodies("id_counts")[body](counters, rows).tolist() == list(want.values())
    assert int(counters.sum()) <= 4 * sum(want.values())
    before = counters.clone()
    assert not len(bodies("observe_ids_")[body](counters, ids[:0], KEYS, admission.filter, 1))
    assert torch.equal(counters, before)


IDS, COUNTERS, FILTER = torch.tensor([[1, 2, 3], [4, 5, 6]]), empty_counters(8), torch.zeros(4, dtype=torch.int64)
CLICKED = IDS > 2
BAD = {
    "counters of int64": ("count_ids_", 0, COUNTERS.long(), r"counters: expected contiguous int32 \(4, W\), got"),
    "three rows of counters": ("count_ids_", 0, COUNTERS[:3], "counters: expected contiguous"),
    "counters of one dimension": ("count_ids_", 0, COUNTERS[0], "counters: expected contiguous"),
    "no counters": ("count_ids_", 0, COUNTERS[:, :0], "counters: expected contiguous"),
    "every second counter": ("count_ids_", 0, COUNTERS[:, ::2], "counters: expected contiguous"),
    "ids of floats": ("count_ids_", 1, IDS.float(), "ids: expected int32 or int64, got torch.float32"),
    "ids of bools": ("count_ids_", 1, CLICKED, "ids: expected int32 or int64, got torch.bool"),
    "two keys": ("count_ids_", 2, KEYS[:2], r"keys: expected torch.int64, broadcastable to ids \(2, 3\), got"),
    "int32 keys": ("count_ids_", 2, KEYS.int(), r"keys: expected .*, got torch.int32 \(3,\)"),
    "keys of more dimensions": ("count_ids_", 2, KEYS.view(1, 1, 3), "keys: expected"),
    "clicks alone": ("count_ids_", 4, None, "clicks and labels: expected both or neither"),
    "labels alone": ("count_ids_", 3, None, "clicks and labels: expected both or neither"),
    "other clicks": ("count_ids_", 3, empty_counters(9), r"clicks: expected the shape of counters, \(4, 8\), got"),
    "clicks of int64": ("count_ids_", 3, COUNTERS.long(), "clicks: expected contiguous int32"),
    "labels of floats": ("count_ids_", 4, CLICKED.float(), "labels: expected torch.bool, broadcastable to ids"),
    "three labels": ("count_ids_", 4, CLICKED.view(3, 2)[:, :1], r"labels: expected .*, got torch.bool \(3, 1\)"),
    "rows of int32": ("id_counts", 1, KEYS.int(), r"rows: expected an int64 vector \(n,\), got torch.int32 \(3,\)"),
    "rows of two dimensions": ("id_counts", 1, IDS, "rows: expected an int64 vector"),
    "counters to look up": ("id_counts", 0, COUNTERS.float(), "counters: expected contiguous"),
    "frequent ids of int16": ("frequent_rows_", 1, IDS.short(), "ids: expected int32 or int64, got torch.int16"),
    "recent of one": ("frequent_rows_", 4, FILTER[:1], "recent: expected a contiguous int64 vector of 2 or more, got"),
    "recent of int32": ("frequent_rows_", 4, FILTER.int(), "recent: expected a contiguous int64"),
    "recent with gaps": ("frequent_rows_", 4, FILTER[::2], "recent: expected a contiguous int64"),
    "no filter": ("observe_ids_", 3, FILTER[:0], r"filter: expected an int64 vector \(W,\), got torch.int64 \(0,\)"),
    "a filter of int32": ("observe_ids_", 3, FILTER.int(), "filter: expected an int64 vector"),
    "keys observed": ("observe_ids_", 2, KEYS[:2], "keys: expected"),
}


def arguments_of(name):
    return {
        "count_ids_": [empty_counters(8), IDS, KEYS, empty_counters(8), CLICKED],
        "id_counts": [empty_counters(8), KEYS],
        "frequent_rows_": [empty_counters(8), IDS, KEYS, 1, FILTER.clone()],
        "observe_ids_": [empty_counters(8), IDS, KEYS, FILTER, 1],
    }[name]


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_alike_and_change_nothing(case):
    name, position, value, message = BAD[case]
    messages = set()
    for body in bodies(name).values():
        arguments = arguments_of(name)
        arguments[position] = value
        with pytest.raises(ValueError, match=message) as raised:
            body(*arguments)
        messages.add(str(raised.value))
        for argument, before in zip(arguments, arguments_of(name)):
            if argument is not value and isinstance(argument, torch.Tensor):
                assert torch.equal(argument, before)
    assert len(messages) == 1


@pytest.mark.parametrize("name", ["count_ids_", "id_counts", "frequent_rows_", "observe_ids_"])
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.robe, name), arguments_of(name))


def test_counters_refuse_other_ids():
    counter = robe.IdCounter(1024)
    for ids, keys in ((IDS.float(), KEYS), (IDS, KEYS[:2])):
        with pytest.raises(ValueError, match="expected"):
            counter.add(ids, keys)
    assert not counter.counters.any()


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


def test_decay():
    counter = robe.IdCounter(1 << 16)
    counter.add(torch.tensor([5] * 9 + [6]), KEYS[0])
    counter.decay(0.5)
    assert counter.count(torch.tensor([5, 6]), KEYS[0]).tolist() == [4, 0]
    for factor in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="factor: expected 0 to 1, got"):
            counter.decay(factor)


def test_an_id_is_let_in_when_it_was_seen_often_enough():
    admission, seen = robe.Admission(1 << 16, threshold=4, counter_bytes=1 << 22), Counter()
    for seed in range(30):
        ids = ids_of(60, 3, seed=seed, top=300)
        admission.observe(ids, KEYS)
        seen.update((k, x) for row in ids.tolist() for k, x in enumerate(row))
        tables, values = map(torch.tensor, zip(*seen))
        want = torch.tensor([n >= 4 for n in seen.values()])
        assert torch.equal(admission.admits(values, KEYS[tables]), want)
    assert 20 < want.sum() < len(want) - 20


def test_no_more_are_let_in_than_the_filter_has_room_for():
    admission = robe.Admission(80, threshold=2, counter_bytes=1 << 20)
    for start in range(0, 1000, 10):
        admission.observe(torch.arange(start, start + 10).repeat(2), KEYS[0])
        twin = copy.deepcopy(admission)
        twin.load_state_dict(admission.state_dict())
        twin.observe(torch.arange(5000, 5010).repeat(2), KEYS[0])
    bits = sum((x & MASK).bit_count() for x in admission.filter.tolist())
    assert 320 <= bits < 320 + 3 * 10
    assert torch.equal(twin.filter, admission.filter)
    assert admission.admits(torch.arange(120), KEYS[0]).all()
    assert admission.admits(torch.arange(300, 1000), KEYS[0]).float().mean() < 0.3


def test_freeze():
    admission = robe.Admission(1 << 10, threshold=2, counter_bytes=1 << 16)
    assert sorted(admission.state_dict()) == ["counter.counters", "filter"]
    admission.observe(torch.tensor([1, 1, 2]), KEYS[0])
    admission.freeze()
    assert list(admission.state_dict()) == ["filter"]
    assert admission.admits(torch.tensor([1, 2]), KEYS[0]).tolist() == [True, False]
    with pytest.raises(ValueError, match="does not count: it was made without a threshold, or is frozen"):
        admission.observe(torch.tensor([2, 2]), KEYS[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: robe.Admission(0), "bytes: expected a positive multiple of 8"),
        (lambda: robe.Admission(12), "bytes: expected a positive multiple of 8"),
        (lambda: robe.Admission(64, threshold=0), "threshold: expected at least 1, got 0"),
        (lambda: robe.Admission.choose(list, KEYS, 7), "bytes: expected at least 8, got 7"),
        (lambda: robe.Admission.choose(list, KEYS, 8, times=0), "times: expected at least 1, got 0"),
        (lambda: robe.Admission.choose(list, KEYS, 8, rounds=0), "rounds: expected at least 1, got 0"),
        (lambda: robe.IdCounter(100), "bytes: expected at least 1024 of an IdCounter, got 100"),
        (
            lambda: robe.RobeEmbedding(9, 4, robe_size=8, hash="linear", admission=robe.Admission(8)),
            "admission: expected hash='mix' with it, got 'linear'",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def collection(admission=None, **options):
    tables = [robe.EmbeddingBagConfig(f"f{k}", rows, 8) for k, rows in enumerate((None, 900, None))]
    torch.manual_seed(3)
    return robe.RobeEmbeddingBagCollection(tables, robe_size=5000, seed=7, admission=admission, **options)


BOUNDED = ids_of(80, 3).clamp(min=0) % 900


@pytest.mark.cpu_only("not of the kernels in Triton")
@pytest.mark.parametrize("block_size", [8, 4, 3, 11])
@pytest.mark.parametrize("sign", [False, True])
def test_ids_outside_read_the_row_of_one(block_size, sign):
    admission = robe.Admission(512)
    layer = collection(admission, block_size=block_size, sign=sign)
    plain = collection(block_size=block_size, sign=sign)
    assert torch.equal(layer.array.weight, plain.array.weight)
    admission.admit(BOUNDED[:30], layer.table_keys)
    inside = admission.admits(BOUNDED, layer.table_keys)
    assert 30 < inside.sum() < inside.numel() - 30
    every = plain(BOUNDED)
    # The second table is bounded, so its layer would refuse the id; a row of it is a row of the same key unbounded.
    rare = plain._lookup(torch.tensor([[SHARED_ID, 0, SHARED_ID]])).clone()
    wide = robe.RobeEmbedding(None, 8, array=plain.array, table_id=1, block_size=block_size, sign=sign)
    rare[:, 1] = wide(torch.tensor([SHARED_ID]))
    assert torch.equal(layer(BOUNDED), torch.where(inside.unsqueeze(-1), every, rare))
    assert torch.equal(layer.full_weight("f1")[BOUNDED[:, 1]], layer(BOUNDED)[:, 1])


def test_the_filter_is_part_of_what_compression_leaves():
    admission = robe.Admission(200)
    layer = robe.RobeEmbedding(1000, 8, compression=10, admission=admission)
    assert 4 * layer.array.size + admission.bytes == 4 * 1000 * 8 // 10
    half = robe.RobeEmbedding(1000, 8, compression=10, admission=admission, dtype=torch.float16)
    assert half.array.size == 1000 * 8 // 10 - 100
    with pytest.raises(ValueError, match="compressed 1000 times leave none beside the 200 bytes of the admission"):
        robe.RobeEmbedding(1000, 8, compression=1000, admission=admission)


def test_gradients_go_where_the_rows_are_read():
    admission = robe.Admission(512)
    layer = collection(admission).double()
    admission.admit(BOUNDED[:30], layer.table_keys)
    lengths = torch.tensor([2, 0, 3] * 16)
    values = BOUNDED.T[:, :80].reshape(-1)[: int(lengths.sum())]
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    with torch.no_grad():
        layer.array.weight.copy_(torch.randn(5000, dtype=torch.float64))
    factors = torch.rand(len(values), dtype=torch.float64, requires_grad=True)
    of_feature = torch.arange(3).repeat_interleave(lengths.view(3, -1).sum(1))
    rows = torch.stack([layer._lookup(values[k].expand(1, 3))[0, f] for k, f in enumerate(of_feature)])
    bag = torch.arange(48).repeat_interleave(lengths)
    want = torch.zeros(48, 8, dtype=torch.float64).index_add(0, bag, rows * factors.unsqueeze(1))
    upstream = torch.randn(16, 3, 8, dtype=torch.float64)
    want_grads = torch.autograd.grad(
        (want.view(3, 16, 8).transpose(0, 1) * upstream).sum(), [layer.array.weight, factors]
    )
    output = layer(values, offsets, factors)
    torch.testing.assert_close(output, want.view(3, 16, 8).transpose(0, 1))
    grads = torch.autograd.grad((output * upstream).sum(), [layer.array.weight, factors])
    for got, wanted in zip(grads, want_grads):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("optimizer", [robe.optim.SGD, robe.optim.Adagrad, robe.optim.Adam])
def test_optimizers_of_touched_slots_see_the_admission(optimizer):
    admission = robe.Admission(512)
    layer = collection(admission).double()
    admission.admit(BOUNDED[:30], layer.table_keys)
    dense = copy.deepcopy(layer)
    own = optimizer(layer, lr=0.1)
    upstream = torch.randn(80, 3, 8, dtype=torch.float64)
    (layer(BOUNDED) * upstream).sum().backward()
    own.step()  # in the first step torch's leave slots without a gradient as they are, Adam too
    (dense(BOUNDED) * upstream).sum().backward()
    getattr(torch.optim, optimizer.__name__)([dense.array.weight], lr=0.1).step()
    torch.testing.assert_close(layer.array.weight, dense.array.weight)


@pytest.mark.cpu_only("a GPU trips an assertion instead")
def test_padding_and_ranges_are_about_the_ids_given():
    admission = robe.Admission(64)
    layer = robe.RobeEmbedding(10, 4, padding_idx=3, robe_size=50, admission=admission)
    rows = layer(torch.tensor([3, 4, 5]))
    assert not rows[0].any()
    assert torch.equal(rows[1], rows[2])
    assert rows[1].any()
    with pytest.raises(IndexError, match="id 10 of feature 0, whose table has 10 rows"):
        layer(torch.tensor([10]))
    with pytest.raises(IndexError):
        layer(torch.tensor([SHARED_ID]))


def test_layers_count_while_they_train_only():
    admission = robe.Admission(256, threshold=2, counter_bytes=1 << 16)
    bag = robe.RobeEmbeddingBag(
        None, 4, mode="sum", padding_idx=9, table_id=2, robe_size=50, admission=admission, seed=7
    )
    key = bag.table_keys
    bag.eval()
    for _ in range(3):
        bag(torch.tensor([[5, 6], [5, 9]]))
    assert not admission.counter.count(torch.tensor([5]), key).any()
    bag.train()
    bag(torch.tensor([[5, 6], [5, 9]]))
    bag(torch.tensor([5, 9, 8, 8, 8]), torch.tensor([0, 1]))
    with torch.no_grad():
        bag(torch.tensor([[6, 9]]))
    assert admission.admits(torch.tensor([5, 6, 7, 8, 9]), key).tolist() == [True, True, False, True, False]
    assert admission.counter.count(torch.tensor([9]), key).item() == 0


def test_an_admission_is_saved_copied_and_moved_with_its_layer():
    layer = collection(robe.Admission(512))
    layer.admission.admit(BOUNDED[:30], layer.table_keys)
    other = collection(robe.Admission(512))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(BOUNDED), layer(BOUNDED))
    twin = copy.deepcopy(layer)
    twin.admission.admit(BOUNDED, layer.table_keys)
    assert not torch.equal(twin(BOUNDED), layer(BOUNDED))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.admission.filter.dtype == torch.int64
    assert torch.equal(half(BOUNDED), layer(BOUNDED).bfloat16())
    int8 = copy.deepcopy(layer)
    int8.array = int8.array.quantized(8)
    torch.testing.assert_close(int8(BOUNDED), layer(BOUNDED).detach(), rtol=0, atol=3e-4)


def test_compiled():
    layer = collection(robe.Admission(512)).eval()
    layer.admission.admit(BOUNDED[:30], layer.table_keys)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(BOUNDED), layer(BOUNDED))


def test_what_runs():
    """Of the tests above, that they are of the kernels where there are some."""
    assert robe.backend()["cpu"].startswith("native") == IS_NATIVE
