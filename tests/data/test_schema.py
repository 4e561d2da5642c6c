"""Layouts of records: fields without gaps, words and JSON."""

import json
import os
import pickle
from pathlib import Path

import pytest

from data.schema import DataError, Layout, printable
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain name é 日", "plain name é 日"),
        ("a\nb\tc", r"a\nb\tc"),
        (os.fsdecode(b"tr\xe9in"), r"tr\xe9in"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u2028", r"\u2028"),
        ("\ud800", r"\ud800"),
    ],
)
def test_names_are_printed_on_one_line(text, expected):
    assert printable(text) == expected
    assert printable(Path(text)) == expected
    printable(text).encode()


def test_an_error_is_one_line_whatever_names_are_in_it():
    error = DataError("day\n0: expected a number, got \x1b[2J")
    assert str(error) == r"day\n0: expected a number, got \x1b[2J"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
