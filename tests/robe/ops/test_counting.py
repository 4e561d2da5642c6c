"""The operators that count ids, against the rule in Python's own integers."""

from collections import Counter

import pytest
import torch

import robe
from robe.hashing import row_hash, signed
from robe.ops import REFERENCE
from tests.helpers.admitted import KEYS, MASK, ids_of, mix64, rows_of
from tests.helpers.kernels import needs_kernels

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
    """Return the operator and its reference body, by name."""
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
    "rows of int32": (
        "id_counts",
        1,
        KEYS.int(),
        r"row_hashes: expected an int64 vector \(n,\), got torch.int32 \(3,\)",
    ),
    "rows of two dimensions": ("id_counts", 1, IDS, "row_hashes: expected an int64 vector"),
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
