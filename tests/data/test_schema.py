"""Layouts of records: fields without gaps, words and JSON."""

import json

import pytest

from data.schema import Layout
from tests.helpers.sources import HOTS, LAYOUTS, fill


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
