"""Layouts of records, and the batches made of them, value by value in plain Python."""

import json
import math
from itertools import product

import numpy as np
import pytest

from data.rows import Batch, feature_ids, to_batch, transform_dense
from data.schema import MISSING, Layout

HOTS = tuple(1 + i % 3 for i in range(26))
LAYOUTS = [Layout(*values) for values in product((True, False), ("i4", "f4"), ("u4", "i8"), (None, HOTS))]


def fill(layout, rows, seed=0):
    """Records of random values, the borders of their types among them."""
    rng = np.random.default_rng(seed)
    records = layout.records(rows)
    if layout.labelled:
        records["label"] = rng.integers(0, 2, rows)
    if layout.dense == "i4":
        records["dense"] = rng.integers(-3, 10**6, (rows, 13))
        records["dense"].reshape(-1)[:5] = 0
        records["dense"][0, :6] = MISSING, -(2**31) + 1, -1, 0, 1, 2**31 - 1
    else:
        records["dense"] = rng.normal(size=(rows, 13))
    low, high = (0, 2**32) if layout.ids == "u4" else (-(2**63), 2**63)
    records["sparse"] = rng.integers(low, high, (rows, layout.num_ids), dtype=np.int64)
    records["sparse"][0, :2] = high - 1, 0
    return records


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_a_record_has_no_gaps_and_little_endian_fields(layout):
    ids = sum(HOTS) if layout.hots else 26
    assert layout.num_ids == ids
    assert layout.dtype.itemsize == 4 * layout.labelled + 13 * 4 + ids * (4 if layout.ids == "u4" else 8)
    assert layout.dtype.names == ("label",) * layout.labelled + ("dense", "sparse")
    records = fill(layout, 3)
    expected = b"".join(
        (row["label"].astype("<i4").tobytes() if layout.labelled else b"")
        + row["dense"].astype("<" + layout.dense).tobytes()
        + row["sparse"].astype("<" + layout.ids).tobytes()
        for row in records
    )
    assert records.tobytes() == expected


def test_a_row_of_the_log_is_160_bytes():
    assert Layout().dtype.itemsize == 160
    assert Layout(labelled=False).dtype.itemsize == 156


@pytest.mark.parametrize("hots", [None, HOTS, (1,) * 26, (5,) + (1,) * 25])
def test_features_are_the_columns_in_their_order(hots):
    layout = Layout(hots=hots)
    columns = [list(range(ids.start, ids.stop)) for ids in layout.features]
    assert [len(c) for c in columns] == list(hots or (1,) * 26)
    assert [i for c in columns for i in c] == list(range(layout.num_ids))
    records = fill(layout, 7)
    for got, own in zip(feature_ids(records, layout.features), columns):
        assert got.tolist() == [int(row["sparse"][i]) for row in records for i in own]


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_a_layout_comes_back_from_json(layout):
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert hash(Layout.from_dict(layout.to_dict())) == hash(layout)
    assert layout.dtype == Layout.from_dict(layout.to_dict()).dtype


def test_layouts_are_told_apart_in_words():
    assert len({layout.describe() for layout in LAYOUTS}) == len(LAYOUTS)
    assert Layout().describe() == "labels, integers, 32-bit ids"
    assert Layout(False, "f4", "i8", HOTS).describe() == "no labels, floating-point numbers, 64-bit ids, 51 ids a row"


@pytest.mark.parametrize(
    "values", [{"dense": "f8"}, {"ids": "i4"}, {"hots": ()}, {"hots": (1,) * 25}, {"hots": (0,) + (1,) * 25}]
)
def test_impossible_layouts(values):
    with pytest.raises(ValueError, match="expected"):
        Layout(**values)


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_to_batch(layout):
    records = fill(layout, 50)
    before = records.tobytes()
    batch = to_batch(records)
    assert len(batch) == 50
    assert (batch.dense.dtype, batch.sparse.dtype) == (np.float32, np.int64)
    assert batch.dense.flags.c_contiguous
    assert batch.sparse.flags.c_contiguous
    assert batch.sparse.tolist() == [[int(x) for x in row["sparse"]] for row in records]
    if layout.dense == "f4":
        assert batch.dense.tolist() == [row["dense"].tolist() for row in records]
    else:
        expected = [[math.log(x + 1) if x > 0 else 0.0 for x in row["dense"].tolist()] for row in records]
        np.testing.assert_allclose(batch.dense, expected, rtol=1e-6)
    if layout.labelled:
        assert batch.labels.dtype == np.float32
        assert batch.labels.tolist() == records["label"].tolist()
    else:
        assert batch.labels is None
    for array in (batch.dense, batch.sparse):
        array[:] = 7
    assert records.tobytes() == before, "a batch has memory of its own"


def test_to_batch_of_no_rows():
    batch = to_batch(Layout(hots=HOTS).records(0))
    assert (batch.dense.shape, batch.sparse.shape, batch.labels.shape) == ((0, 13), (0, 51), (0,))


def test_transform_dense_of_every_power_of_two():
    values = [x + d for x in (2**i for i in range(31)) for d in (-1, 0, 1) if x + d < 2**31]
    got = transform_dense(np.array(values, np.int32))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [math.log1p(x) for x in values], rtol=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_batches_are_cut_and_joined(labelled):
    whole = to_batch(fill(Layout(labelled), 10))
    cut = [whole[:3], whole[3:3], whole[3:9], whole[np.array([9])]]
    assert [len(batch) for batch in cut] == [3, 0, 6, 1]
    joined = Batch.concatenate(cut)
    np.testing.assert_array_equal(joined.dense, whole.dense)
    np.testing.assert_array_equal(joined.sparse, whole.sparse)
    assert (joined.labels is None) != labelled
    if labelled:
        np.testing.assert_array_equal(joined.labels, whole.labels)
        assert whole[[4, 2]].labels.tolist() == [whole.labels[4], whole.labels[2]]
