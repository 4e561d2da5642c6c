"""The compiled reader, the one in polars and the specification agree on lines with anything in them."""

import random

import numpy as np
import pytest

from data.formats import criteo_tsv
from data.formats.criteo_tsv import fault, values
from data.schema import Layout

# What readers of text are apt to take in ways of their own.
PIECES = [
    *(b"\t", b"\r", b"-", b"-0", b"-00", b"+5", b" ", b"_", b"1_0", b'"', b"'", b"\x00", b"\x0b", b"\x0c", b"\x85"),
    *(b"\xef\xbb\xbf", b"\x1f\x8b", b"x\x9c", b"x\x01", b"(\xb5/\xfd", b"BZh9", b"\xfd7zXZ\x00", b"\x04\x22\x4d\x18"),
    *(b"0x", b"0b1", b"1e5", b"1E5", b"1.0", b"nan", b"inf", b"null", b"NULL", b"true", b"#", b",", b"\\N", b"\\t"),
    *("٣".encode(), "\uff11".encode(), "\u2028".encode(), "\u22121".encode(), b"\xff", b"\x80", b"\xc3"),
    *(b"2147483647", b"2147483648", b"-2147483647", b"-2147483648", b"4294967296", b"9" * 30, b"18446744073709551617"),
    *(b"0" * 8, b"0" * 9, b"fFfFfFfF", b"fffffffff", b"-fffffff", b"g", b"0" * 300),
]
LONG = [b"0" * 5000, b"-" + b"0" * 5000 + b"7", b"9" * 5000, b"f" * 5000]


def make_row(rng, labelled):
    def integer():
        return b"%d" % rng.randrange(-(2**31) + 1, 2**31) if rng.random() < 0.1 else b"%d" % rng.randrange(-3, 900)

    def category():
        return b"%08x" % rng.getrandbits(32)

    makers = [lambda: b"%d" % rng.randrange(2)] * labelled + [integer] * 13 + [category] * 26
    return b"\t".join(b"" if rng.random() < 0.15 and make != makers[0] else make() for make in makers)


def changed(rng, line):
    """Return a line that is probably no row: with changed bytes, or strange text in, before or after a field."""
    line = bytearray(line)
    for _ in range(rng.randrange(1, 4)):
        how, at = rng.randrange(6), rng.randrange(len(line) + 1)
        piece = rng.choice(LONG) if rng.random() < 0.01 else rng.choice(PIECES)
        if how == 0 and at < len(line):
            line[at] = rng.randrange(256)
        elif how == 1:
            del line[at : at + rng.randrange(1, 6)]
        elif how == 2:
            line[at:at] = piece
        elif how == 3:
            line[:] = piece + line if rng.random() < 0.5 else line + piece
        else:
            fields = bytes(line).split(b"\t")
            fields[rng.randrange(len(fields))] = piece
            line[:] = b"\t".join(fields)
    return bytes(line).replace(b"\n", b"")


def parsers():
    found = {"polars": criteo_tsv._parse_polars}
    return {"native": criteo_tsv._parse_native, **found} if criteo_tsv.NATIVE else found


def check(lines, labelled):
    """Check that both readers take the same lines as the specification, with its values."""
    text = b"".join(line + b"\n" for line in lines)
    bad = [i for i, line in enumerate(lines) if fault(line, labelled)]
    rows = [values(line, labelled) for i, line in enumerate(lines) if i not in bad]
    expected = np.array(rows, np.int64).reshape(-1, 39 + labelled).astype(np.uint32)
    for name, parse in parsers().items():
        records, found = parse(text, len(lines), labelled)
        assert list(found) == bad, name
        assert records.dtype == Layout(labelled).dtype, name
        np.testing.assert_array_equal(records.view(np.uint32).reshape(-1, 39 + labelled), expected, err_msg=name)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_on_changed_lines(labelled, seed):
    """Some together, so that a few of them are rows, and some alone: polars is asked until a line can't be a row."""
    rng = random.Random(f"{seed} {labelled}")
    good = [make_row(rng, labelled) for _ in range(10)]
    some = [changed(rng, rng.choice(good)) for _ in range(2_000)]
    check(good, labelled)
    alone = 200
    for first in range(alone, len(some), 100):
        check(some[first : first + 100] + good, labelled)
    for line in some[:alone]:
        check([good[0], line, good[1]], labelled)


@pytest.mark.parametrize("piece", [*PIECES, *LONG, b""], ids=lambda piece: repr(piece[:12]))
def test_on_strange_text_in_every_kind_of_field(piece):
    good = make_row(random.Random(0), True)
    for at in (0, 1, 13, 14, 39):
        fields = good.split(b"\t")
        for text in (piece, piece + fields[at], fields[at] + piece):
            check([b"\t".join([*fields[:at], text, *fields[at + 1 :]])], True)
    check([piece], True)
    check([good, piece], True)


@pytest.mark.parametrize(
    "integer", [b"-0", b"-" + b"0" * 20, b"0" * 5000, b"-" + b"0" * 5000 + b"12", b"0" * 20 + b"9"]
)
def test_integers_with_leading_zeros_are_rows(integer):
    fields = make_row(random.Random(0), True).split(b"\t")
    fields[5] = integer
    line = b"\t".join(fields)
    assert fault(line, True) is None
    digits = integer.lstrip(b"-").lstrip(b"0") or b"0"
    assert values(line, True)[5] == (-1 if integer.startswith(b"-") else 1) * int(digits)
    check([line], True)
