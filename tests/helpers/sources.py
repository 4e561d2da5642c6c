"""Sources, records and prepared folders for tests."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data import prepare
from data.formats.opening import open_source
from data.schema import MISSING, DataError, Layout
from data.sources import RandomAccess, Source

HOTS = tuple(1 + i % 3 for i in range(26))


LAYOUTS = [Layout(*values) for values in product((True, False), ("i4", "f4"), ("u4", "i8"), (None, HOTS))]


def fill(layout, rows, seed=0):
    """Return records of random values, among them the limits of their types."""
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


def records_of(ids):
    """Return records whose first feature has these ids; the others have id 0."""
    records = np.zeros(len(ids), Layout().dtype)
    records["sparse"][:, 0] = ids
    return records


class Numbered(RandomAccess):
    """Rows whose ids are their numbers, from ``first`` on."""

    def __init__(self, rows, first=0, layout=Layout(), fail_at=None):  # noqa: B008
        self.path, self.name, self.layout = Path(f"from_{first}"), f"from_{first}", layout
        self.rows, self._first, self._fail_at = rows, first, fail_at
        self.calls = []

    def fill(self, records, start):
        assert 0 <= start <= start + len(records) <= self.rows, "asked for rows that are not there"
        if self._fail_at is not None and start <= self._fail_at < start + len(records):
            raise DataError(f"row {self._fail_at} is broken")
        self.calls.append((start, len(records)))
        numbers = np.arange(start, start + len(records)) + self._first
        if self.layout.labelled:
            records["label"] = numbers % 2
        records["dense"] = numbers[:, None] % 1000
        records["sparse"] = numbers[:, None]


class InMemory(RandomAccess):
    """Rows of an array."""

    def __init__(self, records, layout):
        self.path, self.name, self.layout, self.rows, self._records = (
            Path("mine"),
            "mine",
            layout,
            len(records),
            records,
        )

    def fill(self, records, start):
        records[:] = self._records[start : start + len(records)]


def read(source, *args):
    """Return rows of a source, or all of a path, as one array of records."""
    if not isinstance(source, Source):
        source = open_source(source)
    return np.concatenate([source.layout.records(0), *source.records(*args)])


def compare(records, rows, dense=None):
    """Check that records have the values of rows; dense, if given, in place of the rows' integers."""
    np.testing.assert_array_equal(records["label"], rows.labels)
    np.testing.assert_array_equal(records["dense"], rows.dense if dense is None else dense)
    np.testing.assert_array_equal(records["sparse"].astype(np.int64), rows.ids)


def run(*args):
    """Run data.prepare, and return its exit code."""
    return prepare.main([str(arg) for arg in args])


def converted(source, kind, folder, *options):
    """Convert a source to another format in shards of 100 rows, and return the folder."""
    assert run(source, "--output", folder, "--format", kind, "--shard-rows", 100, *options) == 0
    return folder


def names(folder):
    """Return the names of the files in a folder, without manifests."""
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".json"))


def check_refused(folder, name, make, message):
    """Check that reading a file that ``make`` writes is one error of one line, which begins with the path."""
    make(folder / name)
    with pytest.raises(DataError) as error:
        read(folder / name)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))
    assert re.search(message, str(error.value)), str(error.value)
