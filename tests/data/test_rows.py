"""Batches and columns made of records, value by value in plain Python."""

import math

import numpy as np
import pytest

from data.rows import Batch, feature_ids, to_batch, to_frame, transform_dense
from data.schema import DENSE_NAMES, MISSING, SPARSE_NAMES, Layout
from tests.helpers.sources import HOTS, LAYOUTS, fill


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


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.hots], ids=Layout.describe)
def test_to_frame(layout):
    records = fill(layout, 20)
    frame = to_frame(records)
    assert frame.columns == ["label"] * layout.labelled + DENSE_NAMES + SPARSE_NAMES
    dense = [tuple(None if x == MISSING else x for x in row["dense"].tolist()) for row in records]
    assert frame.select(DENSE_NAMES).rows() == dense
    assert frame.select(SPARSE_NAMES).rows() == [tuple(row["sparse"].tolist()) for row in records]
    if layout.labelled:
        assert frame["label"].to_list() == records["label"].tolist()
