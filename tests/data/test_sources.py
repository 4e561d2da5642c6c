"""Pieces and sources one behind the other, against lists in plain Python."""

from pathlib import Path

import numpy as np
import pytest

import data.formats.criteo_tsv
import data.sources
from data.formats.criteo_tsv import CriteoTSV
from data.rows import to_batch
from data.schema import DataError, Layout
from data.sources import PIECE_ROWS, Fault, Piece, Several, SeveralRandomAccess, files_read, require_one_layout
from tests.helpers.criteo import make_lines, write_lines
from tests.helpers.sources import Numbered


def numbers(records):
    return [row for some in records for row in some["sparse"][:, 0].tolist()]


def piece_of(lines, first):
    """Return a piece; lines says which of its lines are bad."""
    rows = [i for i, bad in enumerate(lines, first) if not bad]
    records = Layout().records(len(rows))
    records["sparse"] = np.array(rows).reshape(-1, 1)
    faults = [Fault(i, "bad", b"%d" % i) for i, bad in enumerate(lines, first) if bad]
    return Piece(Path("file"), first, len(lines), records, faults)


@pytest.mark.parametrize("first", [0, 100])
@pytest.mark.parametrize("lines", ["", ".", "x", "..x.xx...x", "xxx", "x..", "..x"])
def test_split_at_every_line(lines, first):
    bad = [line == "x" for line in lines]
    piece = piece_of(bad, first)
    for at in range(first - 2, first + len(lines) + 3):
        head, tail = piece.split(at)
        cut = min(max(at, first), first + len(lines))
        assert (head.path, head.first, head.lines) == (piece.path, first, cut - first)
        assert (tail.path, tail.first, tail.lines) == (piece.path, cut, first + len(lines) - cut)
        for part, wanted in ((head, range(first, cut)), (tail, range(cut, first + len(lines)))):
            assert numbers([part.records]) == [i for i in wanted if not bad[i - first]]
            assert [fault.line for fault in part.faults] == [i for i in wanted if bad[i - first]]


@pytest.fixture(params=[300, 1 << 20], ids=["small pieces", "one piece"])
def piece_bytes(request, monkeypatch):
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", request.param)


SIZES = [7, 1, 12]


@pytest.fixture
def files(tmp_path):
    """Log files, and the ids of their rows."""
    lines = [make_lines(size, seed=seed) for seed, size in enumerate(SIZES)]
    paths = [write_lines(tmp_path / f"day_{i}", some) for i, some in enumerate(lines)]
    return paths, [int(line.split("\t")[-1] or "0", 16) for some in lines for line in some]


@pytest.mark.usefixtures("piece_bytes")
def test_streams_one_behind_the_other(tmp_path, files):
    paths, last_ids = files
    for start in range(23):
        for stop in [*range(start, 23), None]:
            source = Several(tmp_path, [CriteoTSV(path) for path in paths])
            assert source.rows is None
            got = [row for records in source.records(start, stop) for row in records["sparse"][:, -1].tolist()]
            assert got == last_ids[start:stop]
            assert source.rows == (20 if stop is None else source.rows)


@pytest.mark.usefixtures("piece_bytes")
def test_streams_whose_rows_are_known_are_not_read_before_the_start(tmp_path, files, monkeypatch):
    paths, last_ids = files
    source = Several(tmp_path, [CriteoTSV(path) for path in paths])
    assert sum(map(len, source.records())) == source.rows == 20
    opened, original = [], CriteoTSV.pieces
    monkeypatch.setattr(CriteoTSV, "pieces", lambda self, start: opened.append(self.name) or original(self, start))
    pieces = [read() for read in source.pieces(8)]
    assert opened == ["day_2"]
    assert pieces[0].first == 8
    assert sum(piece.lines for piece in pieces) == 12
    assert [row for piece in pieces for row in piece.records["sparse"][:, -1].tolist()] == last_ids[8:]


@pytest.mark.usefixtures("piece_bytes")
def test_a_fault_in_a_later_file_has_the_line_of_that_file(tmp_path, files):
    paths, _ = files
    lines = paths[2].read_text().splitlines()
    paths[2].write_text("\n".join([*lines[:5], "x", *lines[6:]]) + "\n")
    source = Several(tmp_path, [CriteoTSV(path) for path in paths])
    with pytest.raises(DataError, match="day_2:6: expected 40 tab-separated fields, got 1"):
        list(source.records())
    pieces = [read() for read in source.pieces()]
    for at in range(22):
        split = [piece.split(at) for piece in pieces]
        assert sum(len(head.records) for head, _ in split) == at - (at > 13) - (at > 20)
        assert sum(len(head.faults) for head, _ in split) == (at > 13)
        assert sum(len(tail.faults) for _, tail in split) == (at <= 13)


@pytest.mark.usefixtures("piece_bytes")
def test_a_fault_behind_the_rows_asked_for_does_no_harm(tmp_path):
    source = CriteoTSV(write_lines(tmp_path / "rows", [*make_lines(5), "x", *make_lines(5)]))
    assert sum(map(len, source.records(1, 5))) == 4
    assert sum(map(len, source.records(6, 9))) == 3
    for start, stop in ((0, 6), (5, 6), (0, None)):
        with pytest.raises(DataError, match="rows:6: expected 40"):
            list(source.records(start, stop))


@pytest.mark.parametrize("sizes", [[5], [3, 0, 4], [0, 1, 1, 0, 6, 0]])
def test_any_rows_of_several(sizes):
    starts = np.cumsum([0, *sizes]).tolist()
    source = SeveralRandomAccess(Path("all"), [Numbered(rows, first) for rows, first in zip(sizes, starts)])
    assert (source.rows, source.name) == (sum(sizes), "all")
    for start in range(source.rows + 1):
        for stop in range(start, source.rows + 1):
            expected = list(range(start, stop))
            assert numbers([source.take(start, stop)]) == expected
            assert numbers(source.records(start, stop)) == expected
            assert sum(map(len, source.read(start, stop))) == len(expected)
        assert numbers(source.records(start)) == list(range(start, source.rows))


class Shorter(Numbered):
    """Rows the last piece of which is lost."""

    def pieces(self, start=0):
        return iter(list(super().pieces(start))[:-1])


@pytest.mark.parametrize("around", [lambda x: x, lambda x: Several(Path("from_0"), [x])])
def test_rows_promised_and_rows_read_are_compared(around, monkeypatch):
    monkeypatch.setattr(data.sources, "PIECE_ROWS", 4)
    assert numbers(around(Shorter(10)).records(0, 8)) == list(range(8))
    for read in (lambda source: source.records(), lambda source: source.read(2, 9), lambda source: source.records(8)):
        with pytest.raises(DataError, match=r"from_0: expected (9|10) rows, as it says, got [68]"):
            list(read(around(Shorter(10))))
    assert numbers(around(Numbered(10)).records(0, 99)) == list(range(10))


def test_rows_lost_between_two_sources_are_missed(monkeypatch):
    monkeypatch.setattr(data.sources, "PIECE_ROWS", 4)
    source = Several(Path("all"), [Shorter(10), Numbered(3, 10)])
    with pytest.raises(DataError, match="all: expected 10 rows before those of from_10, got 9"):
        list(source.records(1))  # pieces of rows 1 to 4, 5 to 8, and 9, which is lost


def test_random_access_is_read_in_pieces():
    source = Numbered(2 * PIECE_ROWS + 5)
    pieces = [read() for read in source.pieces(3)]
    assert [(piece.first, piece.lines) for piece in pieces] == [
        (3, PIECE_ROWS), (3 + PIECE_ROWS, PIECE_ROWS), (3 + 2 * PIECE_ROWS, 2)
    ]  # fmt: skip
    assert numbers(piece.records for piece in pieces) == list(range(3, source.rows))


def test_read_gives_the_batches_of_the_records(tmp_path):
    source = CriteoTSV(write_lines(tmp_path / "rows", make_lines(9)))
    (records,), (batch,) = list(source.records(2, 6)), list(source.read(2, 6))
    np.testing.assert_array_equal(batch.dense, to_batch(records).dense)
    assert len(batch) == 4


@pytest.mark.parametrize("make", [lambda sources: Several(Path("all"), sources), require_one_layout])
def test_rows_of_two_kinds_are_refused(make):
    same = [Numbered(3, layout=Layout(ids="i8")), Numbered(3, 5, layout=Layout(ids="i8"))]
    assert getattr(make(same), "layout", Layout(ids="i8")) == Layout(ids="i8")
    message = (
        "from_8: its rows have labels, integers, 32-bit ids, those of from_0 have labels, integers, 64-bit ids; "
        "expected one layout"
    )
    with pytest.raises(DataError, match=message):
        make([*same, Numbered(3, 8)])


def test_the_files_read_are_named_in_their_order(tmp_path):
    paths = [write_lines(tmp_path / name, make_lines(2)) for name in ("day_2", "day_10", "two\nlines")]
    several = Several(tmp_path, [CriteoTSV(path) for path in paths])
    assert files_read(several) == rf"{tmp_path}: 3 files, in this order: day_2, day_10, two\nlines"
    assert files_read(CriteoTSV(paths[0])) is None
