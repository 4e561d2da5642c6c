"""The Criteo reader against a reading written by hand in plain Python."""

import gzip
import lzma
import math

import numpy as np
import pytest

import data.tsv
from data.rows import Batch, DataError, transform_dense
from data.tsv import CriteoTSV


def make_lines(rows, labelled=True, seed=0):
    """Rows as text: random, with empty fields and negative integers."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(rows):
        integers = ["" if rng.random() < 0.3 else str(rng.integers(-3, 10**6)) for _ in range(13)]
        categories = ["" if rng.random() < 0.2 else f"{rng.integers(0, 2**32):08x}" for _ in range(26)]
        lines.append("\t".join([str(rng.integers(0, 2))] * labelled + integers + categories))
    return lines


def expected(lines, labelled=True):
    """What the lines mean: integer x is log(max(x, 0) + 1), a category its number, nothing is 0."""
    fields = [line.split("\t") for line in lines]
    labels = [float(f.pop(0)) for f in fields] if labelled else None
    dense = [[math.log1p(max(int(x), 0)) if x else 0.0 for x in f[:13]] for f in fields]
    sparse = [[int(x, 16) if x else 0 for x in f[13:]] for f in fields]
    return np.array(dense), np.array(sparse), labels


def write(path, lines, end="\n"):
    path.write_bytes(("\n".join(lines) + end).encode())
    return path


def read(path, *args):
    return Batch.concatenate(list(CriteoTSV(path).read(*args)))


@pytest.fixture(params=[1 << 22, 5000], ids=["one piece", "small pieces"])
def piece_bytes(request, monkeypatch):
    """Every test of content also runs with pieces that end in the middle of lines."""
    monkeypatch.setattr(data.tsv, "_PIECE_BYTES", request.param)


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("end", ["\n", ""])
def test_values_are_those_of_the_lines(tmp_path, labelled, end):
    lines = make_lines(200, labelled)
    file = CriteoTSV(write(tmp_path / "rows.tsv", lines, end))
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
    for compress in (bytes, gzip.compress, lzma.compress):
        (tmp_path / name).write_bytes(compress(text))
        np.testing.assert_array_equal(read(tmp_path / name).sparse, expected(lines)[1])


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (57, 58), (90, None), (100, 100), (30, 500)])
def test_a_range_of_rows(tmp_path, start, stop):
    lines = make_lines(120)
    pieces = list(CriteoTSV(write(tmp_path / "rows.tsv", lines)).read(start, stop))
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
    path = write(tmp_path / "rows.tsv", lines)
    with pytest.raises(DataError, match=rf"rows.tsv:71: {cause}"):
        read(path)


@pytest.mark.usefixtures("piece_bytes")
def test_bad_numbers_of_fields_are_named_even_if_they_add_up(tmp_path):
    lines = make_lines(100)
    short = lines[10].rsplit("\t", 1)[0]
    for bad in ([short], [""], [lines[10] + "\t", short]):
        path = write(tmp_path / "rows.tsv", lines[:10] + bad + lines[11:])
        got = bad[0].count("\t") + 1
        with pytest.raises(DataError, match=f"rows.tsv:11: expected 40 tab-separated fields, got {got}"):
            read(path)


def test_files_that_are_not_rows(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.tsv: No such file"):
        CriteoTSV(tmp_path / "nowhere.tsv")
    with pytest.raises(DataError, match="Is a directory"):
        CriteoTSV(tmp_path)
    for content in (b"", gzip.compress(b""), lzma.compress(b"")):
        (tmp_path / "empty").write_bytes(content)
        with pytest.raises(DataError, match="empty: the file is empty"):
            CriteoTSV(tmp_path / "empty")
    for content in (b"PAR1" + bytes(100), b"a,b,c\n1,2,3\n", b"\n", b"PK\x03\x04"):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(DataError, match=r"other:1: not a Criteo row: expected 40 tab-separated fields"):
            CriteoTSV(tmp_path / "other")


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data.tsv, "_PIECE_BYTES", 1 << 16)
    path = tmp_path / "rows.tsv"
    path.write_bytes((make_lines(1)[0] + "\n").encode() + b"7" * (1 << 20))
    with pytest.raises(DataError, match=r"rows.tsv:2: not a Criteo row: a line of over 65536 bytes"):
        read(path)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_broken_archives(tmp_path, compress, monkeypatch):
    monkeypatch.setattr(data.tsv, "_PIECE_BYTES", 5000)
    whole = compress("\n".join(make_lines(500)).encode())
    path = tmp_path / "rows"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=r"rows: truncated: the archive ends early, after line \d+"):
        read(path)
    path.write_bytes(whole[:2000] + bytes(200) + whole[2200:])
    with pytest.raises(DataError, match=r"rows: corrupt archive after line \d+"):
        read(path)


def test_transform_dense():
    np.testing.assert_allclose(
        transform_dense(np.array([-3, 0, 1, 10**12])), [0, 0, math.log(2), math.log(10**12 + 1)], rtol=1e-6
    )
