"""Parts of a run's data, and the check of all rows before it."""

from pathlib import Path

import pytest

from data.formats.opening import open_source
from data.parts import check, halves, split
from data.schema import DataError, Layout
from tests.helpers.criteo import make_rows, write_bin, write_log
from tests.helpers.sources import Numbered, run


@pytest.mark.parametrize("rows", [0, 5, 40_000])
def test_every_row_is_read_and_counted(rows):
    source = Numbered(rows)
    assert check(source) == rows
    assert sum(count for _, count in source.calls) == rows


def test_check_stops_at_a_row_that_cannot_be_read():
    with pytest.raises(DataError, match="row 7 is broken"):
        check(Numbered(20, fail_at=7))


def test_check_refuses_rows_without_labels():
    with pytest.raises(DataError, match="from_0: has no labels; training needs them"):
        check(Numbered(20, layout=Layout(labelled=False)))


def test_check_reads_no_row_of_a_prepared_folder(tmp_path, monkeypatch):
    run(write_log(tmp_path / "day_0", make_rows(50)), "--output", tmp_path / "out")
    source = open_source(tmp_path / "out")
    monkeypatch.setattr(type(source), "fill", lambda *_: pytest.fail("read"))
    assert check(source) == 50
    shard = tmp_path / "out" / "day_0-00000.rows"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"day_0-00000.rows: changed since it was written"):
        check(source)


def test_rows_are_split_in_their_order():
    source = Numbered(70)
    parts = split(Path("rows"), source, 70)
    assert {name: part.rows for name, part in parts.items()} == {
        "train": range(50),
        "validation": range(50, 60),
        "test": range(60, 70),
    }
    assert [len(part) for part in parts.values()] == [50, 10, 10]
    assert all(part.source is source for part in parts.values())


def test_a_split_that_the_data_defines(tmp_path):
    days = [write_log(tmp_path / f"day_{i}", make_rows(count)) for i, count in enumerate((30, 10))]
    run(*days, "--output", tmp_path / "out", "--split", "days")
    source = open_source(tmp_path / "out")
    assert {name: part.rows for name, part in split(tmp_path / "out", source, 40).items()} == source.parts()


def test_too_few_rows_to_split(tmp_path):
    source = open_source(write_bin(tmp_path / "a.bin", make_rows(6)))
    with pytest.raises(DataError, match=r"a.bin: expected at least 7 rows to split"):
        split(tmp_path / "a.bin", source, 6)
    days = [write_log(tmp_path / f"day_{i}", make_rows(count)) for i, count in enumerate((30, 1))]
    run(*days, "--output", tmp_path / "out", "--split", "days")
    with pytest.raises(DataError, match=r"out: no rows for validation"):
        split(tmp_path / "out", open_source(tmp_path / "out"), 31)


@pytest.mark.parametrize("rows", [2, 3, 10])
def test_halves_of_another_source(rows):
    source, other = Numbered(20), Numbered(rows)
    parts = halves(Path("other"), source, 20, other, rows)
    assert [(part.source, part.rows) for part in parts.values()] == [
        (source, range(20)),
        (other, range(rows // 2)),
        (other, range(rows // 2, rows)),
    ]


def test_another_source_that_does_not_fit():
    with pytest.raises(DataError, match="other: expected at least 2 rows to validate and to test on, got 1"):
        halves(Path("other"), Numbered(20), 20, Numbered(1), 1)
    with pytest.raises(DataError, match="expected one layout"):
        halves(Path("other"), Numbered(20), 20, Numbered(9, layout=Layout(ids="i8")), 9)
