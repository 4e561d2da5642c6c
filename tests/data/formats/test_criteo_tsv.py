"""Both parsers of logs against a reading in plain Python."""

import gzip
import lzma
import math

import numpy as np
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

import data.formats.criteo_tsv
from data.formats.criteo_tsv import CriteoTSV, fault, parse
from data.rows import Batch, transform_dense
from data.schema import MISSING, DataError
from tests.helpers.criteo import make_lines, write_lines


def zstd_compress(content):
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})  # as the program does


COMPRESS = [gzip.compress, lzma.compress, zstd_compress]


def expected(lines, labelled=True):
    """Read lines: an integer x is log(max(x, 0) + 1), a category its number, an empty field 0."""
    fields = [line.split("\t") for line in lines]
    labels = [float(f.pop(0)) for f in fields] if labelled else None
    dense = [[math.log1p(max(int(x), 0)) if x else 0.0 for x in f[:13]] for f in fields]
    sparse = [[int(x, 16) if x else 0 for x in f[13:]] for f in fields]
    return np.array(dense), np.array(sparse), labels


def read(path, *args):
    return Batch.concatenate(list(CriteoTSV(path).read(*args)))


@pytest.fixture(autouse=True, params=["native", "polars"])
def reader(request, monkeypatch):
    """Every test with both readers."""
    if request.param == "polars":
        monkeypatch.setattr(data.formats.criteo_tsv, "NATIVE", None)
    elif data.formats.criteo_tsv.NATIVE is None:
        pytest.skip("the compiled reader is not built")
    return request.param


@pytest.fixture(params=[1 << 22, 5000], ids=["one piece", "small pieces"])
def piece_bytes(request, monkeypatch):
    """Every test of content also runs with pieces that end in the middle of lines."""
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", request.param)


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("end", ["\n", ""])
def test_values_are_those_of_the_lines(tmp_path, labelled, end):
    lines = make_lines(200, labelled)
    file = CriteoTSV(write_lines(tmp_path / "rows.tsv", lines, end))
    assert file.labelled == labelled
    batch = Batch.concatenate(list(file.read()))
    dense, sparse, labels = expected(lines, labelled)
    assert batch.dense.dtype == np.float32
    assert batch.sparse.dtype == np.int64
    np.testing.assert_allclose(batch.dense, dense, rtol=1e-6)
    np.testing.assert_array_equal(batch.sparse, sparse)
    if labelled:
        np.testing.assert_array_equal(batch.labels, np.array(labels, dtype=np.float32))
    else:
        assert batch.labels is None


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("name", ["rows.tsv.gz", "rows.tsv.xz", "rows.txt"])
def test_compression_is_told_by_content(tmp_path, name):
    lines = make_lines(100)
    text = ("\n".join(lines) + "\n").encode()
    for compress in (bytes, *COMPRESS):
        (tmp_path / name).write_bytes(compress(text))
        np.testing.assert_array_equal(read(tmp_path / name).sparse, expected(lines)[1])


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (57, 58), (90, None), (100, 100), (30, 500)])
def test_a_range_of_rows(tmp_path, start, stop):
    lines = make_lines(120)
    pieces = list(CriteoTSV(write_lines(tmp_path / "rows.tsv", lines)).read(start, stop))
    rows = expected(lines)[1][start:stop]
    assert sum(map(len, pieces)) == len(rows)
    if len(rows):
        np.testing.assert_array_equal(Batch.concatenate(pieces).sparse, rows)


def test_windows_line_ends_and_upper_case(tmp_path):
    lines = make_lines(20)
    path = tmp_path / "rows.tsv"
    path.write_bytes("\r\n".join(line.upper() for line in lines).encode() + b"\r\n")
    np.testing.assert_array_equal(read(path).sparse, expected(lines)[1])


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize(
    ("field", "text", "cause"),
    [
        (0, "2", r"field 1 \(label\): expected 0 or 1, got '2'"),
        (0, "", r"field 1 \(label\): expected 0 or 1, got ''"),
        (3, "1.5", r"field 4 \(int_2\): expected an integer of 32 bits, got '1.5'"),
        (3, "+1", r"field 4 \(int_2\): expected an integer"),
        (3, " 1", r"field 4 \(int_2\): expected an integer"),
        (3, "9" * 30, r"field 4 \(int_2\): expected an integer"),
        (20, "xyz", r"field 21 \(cat_6\): expected up to 8 hexadecimal digits, got 'xyz'"),
        (20, "-1", r"field 21 \(cat_6\): expected up to 8 hexadecimal"),
        (20, "+1", r"field 21 \(cat_6\): expected up to 8 hexadecimal"),
        (20, "123456789", r"field 21 \(cat_6\): expected up to 8 hexadecimal"),
        (3, "-", r"field 4 \(int_2\): expected an integer of 32 bits, got '-'"),
        (3, "--1", r"field 4 \(int_2\): expected an integer"),
        (3, "1-", r"field 4 \(int_2\): expected an integer"),
        (3, "2147483648", r"field 4 \(int_2\): expected an integer"),
        (13, "-2147483648", r"field 14 \(int_12\): expected an integer"),
        (3, "1\r", r"field 4 \(int_2\): expected an integer"),
        (20, "a\r", r"field 21 \(cat_6\): expected up to 8 hexadecimal digits, got 'a\\r'"),
        (39, "a\r\r", r"field 40 \(cat_25\): expected up to 8 hexadecimal"),
        (39, "a ", r"field 40 \(cat_25\): expected up to 8 hexadecimal"),
        (39, "1\t2", "expected 40 tab-separated fields, got 41"),
        (20, '"a', r"field 21 \(cat_6\): expected up to 8 hexadecimal"),
        (20, "\x00", r"field 21 \(cat_6\): expected up to 8 hexadecimal"),
    ],
)
def test_a_bad_field_is_named(tmp_path, field, text, cause):
    lines = make_lines(100)
    fields = lines[70].split("\t")
    fields[field] = text
    lines[70] = "\t".join(fields)
    path = write_lines(tmp_path / "rows.tsv", lines)
    with pytest.raises(DataError, match=rf"rows.tsv:71: {cause}"):
        read(path)


@pytest.mark.usefixtures("piece_bytes")
def test_bad_numbers_of_fields_are_named_even_if_they_add_up(tmp_path):
    lines = make_lines(100)
    short = lines[10].rsplit("\t", 1)[0]
    for bad in ([short], [""], [lines[10] + "\t", short]):
        path = write_lines(tmp_path / "rows.tsv", lines[:10] + bad + lines[11:])
        got = bad[0].count("\t") + 1
        with pytest.raises(DataError, match=f"rows.tsv:11: expected 40 tab-separated fields, got {got}"):
            read(path)


def test_files_that_are_not_rows(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.tsv: No such file"):
        CriteoTSV(tmp_path / "nowhere.tsv")
    with pytest.raises(DataError, match="Is a directory"):
        CriteoTSV(tmp_path)
    for content in (b"", *(compress(b"") for compress in COMPRESS)):
        (tmp_path / "empty").write_bytes(content)
        with pytest.raises(DataError, match="empty: the file is empty"):
            CriteoTSV(tmp_path / "empty")
    for content in (b"a,b,c\n1,2,3\n", b"\n"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(DataError, match=r"other:1: not a Criteo row: expected 40 tab-separated fields"):
            CriteoTSV(tmp_path / "other")


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", 1 << 16)
    path = tmp_path / "rows.tsv"
    path.write_bytes((make_lines(1)[0] + "\n").encode() + b"7" * (1 << 20))
    with pytest.raises(DataError, match=r"rows.tsv:2: not a Criteo row: a line of over 65536 bytes"):
        read(path)


@pytest.mark.parametrize("compress", COMPRESS)
def test_broken_archives(tmp_path, compress, monkeypatch):
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", 5000)
    whole = compress("\n".join(make_lines(500)).encode())
    path = tmp_path / "rows"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=r"rows: truncated: the archive ends early, after line \d+"):
        read(path)
    if compress == zstd_compress:  # has no check before its end
        path.write_bytes(whole[:-2] + b"xx")
    else:
        path.write_bytes(whole[:2000] + bytes(200) + whole[2200:])
    with pytest.raises(DataError, match=r"rows: corrupt archive after line \d+"):
        read(path)


def test_transform_dense():
    np.testing.assert_allclose(
        transform_dense(np.array([-3, 0, 1, 10**12])), [0, 0, math.log(2), math.log(10**12 + 1)], rtol=1e-6
    )


def test_the_compiled_reader_runs_where_it_is_built(reader, monkeypatch):
    assert data.formats.criteo_tsv.reader() == reader
    used = {"native": "_parse_native", "polars": "_parse_polars"}[reader]
    calls, original = [], getattr(data.formats.criteo_tsv, used)
    monkeypatch.setattr(data.formats.criteo_tsv, used, lambda *args: calls.append(args) or original(*args))
    parse((make_lines(1)[0] + "\n").encode(), 1, "rows.tsv", 0, True)
    assert len(calls) == 1


# -- The readers against the specification, line by line --------------------------------------------------------------


def values_of(line, labelled):
    """Return label, integers and ids of a row, in plain Python."""
    fields = line.decode().removesuffix("\r").split("\t")
    label = [int(fields.pop(0))] if labelled else []
    return label + [int(x) if x else MISSING for x in fields[:13]] + [int(x, 16) if x else 0 for x in fields[13:]]


def is_row(line, labelled):
    """Return whether a line is a row, without data.formats.criteo_tsv."""
    fields = line.removesuffix(b"\r").split(b"\t")
    if len(fields) != 39 + labelled or (labelled and fields.pop(0) not in (b"0", b"1")):
        return False
    for text in fields[:13]:
        digits = text[text[:1] == b"-" :]
        if text and (not digits or set(digits) - set(b"0123456789") or int(digits) > 2147483647):
            return False
    return all(len(text) <= 8 and not set(text) - set(b"0123456789abcdefABCDEF") for text in fields[13:])


def check(text, labelled=True):
    """Check that the parser takes the rows of text, and names the other lines."""
    lines = text.split(b"\n")[:-1]
    piece = parse(text, len(lines), "rows.tsv", 100, labelled)
    rows = [line for line in lines if is_row(line, labelled)]
    bad = [i for i, line in enumerate(lines) if not is_row(line, labelled)]
    assert [f.line - 100 for f in piece.faults] == bad
    for found in piece.faults:
        assert found.text == lines[found.line - 100]
        assert found.cause == fault(found.text, labelled) is not None
    assert not any(fault(line, labelled) for line in rows)
    assert (piece.path, piece.first, piece.lines) == ("rows.tsv", 100, len(lines))
    records = piece.records
    label = [records["label"][:, None]] if labelled else []
    got = np.concatenate([*label, records["dense"], records["sparse"]], axis=1)
    np.testing.assert_array_equal(got, np.array([values_of(row, labelled) for row in rows]).reshape(-1, 39 + labelled))


STRANGE = sorted({*b'\t\n\r- +/:@G`g\x00\x0b\x0c"', *(b ^ x for b in b"059afAF" for x in (0x20, 0x80)), 0x85, 0xFF})
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete"]),
        st.integers(0, 10**4),
        st.sampled_from(STRANGE) | st.integers(0, 255),
    ),
    min_size=1,
    max_size=5,
)


@given(edits=EDITS, seed=st.integers(0, 5), labelled=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_any_changed_bytes(edits, seed, labelled, end):
    text = bytearray("".join(line + end for line in make_lines(4, labelled, seed)).encode())
    for how, at, byte in edits:
        at %= len(text)
        if how == "insert":
            text.insert(at, byte)
        elif how == "replace":
            text[at] = byte
        elif len(text) > 1:
            del text[at]
    check(bytes(text).removesuffix(b"\n") + b"\n", labelled)


def with_field(field, text, labelled=True):
    fields = make_lines(1, labelled)[0].encode().split(b"\t")
    fields[field] = text
    return b"\t".join(fields) + b"\n"


def check_each(rows):
    """Also one by one: polars is asked about lines only if something is wrong with the text."""
    rows = list(rows)
    check(b"".join(rows))
    for row in rows:
        check(row)


@pytest.mark.parametrize(("before", "after"), [(b"", b""), (b"1", b"0")])
def test_any_byte_in_a_field_of_each_kind(before, after):
    texts = [before + bytes([byte]) + after for byte in range(256) if byte != ord("\n")]
    check_each(with_field(field, text) for text in texts for field in (0, 13, 14, 39))


@pytest.mark.parametrize("sign", [b"", b"-"])
@pytest.mark.parametrize("zeros", [0, 1, 3, 7, 8, 20])
def test_integers_of_all_lengths(sign, zeros):
    numbers = [2147483647, 2147483648, 2147483649, 4294967296, 4294967297, 9999999999, 10**19, 2**64 + 5]
    numbers += [int("1234567890123456789012"[:n]) for n in range(1, 22)] + [0, 9, 99999999]
    check_each(with_field(1 + i % 13, sign + b"0" * zeros + b"%d" % x) for i, x in enumerate(numbers))


def test_categories_of_all_lengths():
    texts = [text[:n] for text in (b"9aBcDeF0123456789", b"f" * 17, b"0" * 20, b"0a" * 6) for n in range(20)]
    check_each(with_field(field, text) for text in texts for field in (14, 39))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("labelled", [True, False])
def test_rows_of_empty_fields(labelled, end):
    empty = "1" * labelled + "\t" * (38 + labelled)
    check(
        (end.join([*make_lines(2, labelled), empty, *make_lines(2, labelled, seed=1), empty]) + end).encode(), labelled
    )


@pytest.mark.parametrize(
    "bad",
    [[b""], [b"\r"], [b"", b"", b"x"], [b"\t" * 39], [b"1\t" * 39, b"0"], [b"2" + b"\t" * 39] * 3, [b"\xff" * 100]],
)
def test_only_bad_lines(bad):
    check(b"\n".join(bad) + b"\n")


@pytest.mark.parametrize("labelled", [True, False])
def test_rows_with_and_without_labels_are_not_each_others(labelled):
    check((make_lines(1, not labelled)[0] + "\n").encode(), labelled)


def mixed_file(path, end=b"\n"):
    """(path, its lines): rows and bad lines, the last one without its end."""
    lines = [line.encode() for line in make_lines(24)]
    for at in (1, 2, 17, 22):
        lines[at] = lines[at][:-20] + b"\txyz"
    lines[20] = b""
    path.write_bytes(end.join(lines))
    return path, [line + end.removesuffix(b"\n") for line in lines[:-1]] + lines[-1:]


@pytest.mark.parametrize("size", [1, 300, 1000, 1 << 20])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_pieces_from_any_line(tmp_path, monkeypatch, size, end):
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", size)
    path, lines = mixed_file(tmp_path / "rows.tsv", end)
    source = CriteoTSV(path)
    assert source.rows is None
    for start in range(len(lines) + 2):
        pieces = [read() for read in source.pieces(start)]
        ends = [start, *(piece.first + piece.lines for piece in pieces)]
        assert [piece.first for piece in pieces] == ends[:-1]
        assert ends[-1] == max(start, len(lines))
        faults = [f for piece in pieces for f in piece.faults]
        assert [f.line for f in faults] == [i for i in range(start, len(lines)) if not is_row(lines[i], True)]
        assert [f.text for f in faults] == [lines[f.line] for f in faults]
        records = [row for piece in pieces for row in piece.records]
        rows = [values_of(line, True) for line in lines[start:] if is_row(line, True)]
        assert [[row["label"], *row["dense"], *row["sparse"]] for row in records] == rows
    assert source.rows == len(lines)


def test_pieces_may_be_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", 1000)
    source = CriteoTSV(write_lines(tmp_path / "rows.tsv", make_lines(50)))
    calls = list(source.pieces())
    assert len(calls) > 5
    backwards = [read().records for read in calls[::-1]][::-1]
    np.testing.assert_array_equal(np.concatenate(backwards), np.concatenate([read().records for read in calls]))


def test_a_fault_says_file_and_line(tmp_path):
    path, _ = mixed_file(tmp_path / "rows.tsv")
    (piece,) = [read() for read in CriteoTSV(path).pieces()]
    assert piece.faults[3].describe(path) == f"{path}:21: expected 40 tab-separated fields, got 1"


@pytest.mark.parametrize(
    ("name", "stem"),
    [("day_3.gz", "day_3"), ("day_3", "day_3"), ("a.b.tsv.zst", "a.b"), ("x.csv.xz", "x"), ("t.txt", "t")],
)
def test_rows_are_named_as_their_file(tmp_path, name, stem):
    assert CriteoTSV(write_lines(tmp_path / name, make_lines(1))).name == stem


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("kept", [7, 30, -1, -3, -9])
def test_an_archive_cut_anywhere_is_refused(tmp_path, compress, kept):
    path = tmp_path / "rows"
    path.write_bytes(compress("\n".join(make_lines(200)).encode())[:kept])
    with pytest.raises(DataError, match=r"rows: (truncated: the archive ends early|corrupt archive)"):
        read(path)


@pytest.mark.parametrize("compress", COMPRESS)
def test_members_of_an_archive_are_read_one_after_the_other(tmp_path, compress):
    lines = make_lines(60)
    path = tmp_path / "rows"
    path.write_bytes(b"".join(compress(("\n".join(lines[a : a + 20]) + "\n").encode()) for a in (0, 20, 40)))
    np.testing.assert_array_equal(read(path).sparse, expected(lines)[1])


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_long_line_in_a_cut_archive(tmp_path, compress, monkeypatch):
    monkeypatch.setattr(data.formats.criteo_tsv, "PIECE_BYTES", 1000)
    monkeypatch.setattr(data.formats.criteo_tsv, "MAX_LINE_BYTES", 10**5)
    row = (make_lines(1)[0] + "\n").encode()
    rest = np.random.default_rng(0).choice([*b"0123456789"], 10**6).astype(np.uint8).tobytes()
    whole = compress(row + rest)
    for kept in range(40_000, 52_000, 499):
        (tmp_path / "rows").write_bytes(whole[:kept])
        with pytest.raises(DataError, match="rows:"):
            read(tmp_path / "rows")


# -- The layout of a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("damaged", [[0], [0, 1, 2], [99], range(49), range(150, 200)])
def test_the_layout_is_that_of_most_of_the_first_lines(tmp_path, labelled, damaged):
    lines, others = make_lines(200, labelled), make_lines(200, not labelled)
    for at in damaged:
        lines[at] = others[at]
    source = CriteoTSV(write_lines(tmp_path / "rows.tsv", lines))
    assert source.labelled == labelled
    pieces = [read() for read in source.pieces()]
    assert sum(len(piece.records) for piece in pieces) == 200 - len(damaged)
    assert [f.line for piece in pieces for f in piece.faults] == list(damaged)


def test_junk_before_the_rows_is_bad_rows(tmp_path):
    source = CriteoTSV(write_lines(tmp_path / "rows.tsv", ["", "junk", "\t" * 5, *make_lines(20)]))
    (piece,) = [read() for read in source.pieces()]
    assert (len(piece.records), [f.line for f in piece.faults]) == (20, [0, 1, 2])


def test_a_file_of_as_many_rows_of_both_kinds_is_refused(tmp_path):
    path = write_lines(tmp_path / "rows.tsv", [*make_lines(2), *make_lines(2, False)])
    with pytest.raises(DataError, match=r"rows.tsv: .* got as many of 40 fields as of 39 .* in the first 4 lines"):
        CriteoTSV(path)


def test_a_file_that_changes_while_it_is_in_use_is_refused(tmp_path):
    source = CriteoTSV(write_lines(tmp_path / "rows.tsv", make_lines(20)))
    list(source.pieces())
    for rows in (10, 30):
        write_lines(tmp_path / "rows.tsv", make_lines(rows))
        with pytest.raises(DataError, match=rf"rows.tsv: changed while it was read: it had 20 lines, and has {rows}"):
            list(source.pieces())
