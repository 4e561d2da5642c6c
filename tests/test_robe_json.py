"""JSON of others is read into checked dataclasses, or refused in one line that says what is wrong and where."""

import json
import os
import random
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from robe_json import MOST_LEVELS, from_json, parse_json, read_json


@dataclass
class Inner:
    name: str
    size: int = 0

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size: expected at least 0, got {self.size}")


@dataclass
class Outer:
    version: Literal[1]
    rate: float
    inner: Inner
    several: list[Inner] = field(default_factory=list)
    widths: tuple[int, ...] = ()
    pair: tuple[str, int] = ("", 0)
    by_name: dict[str, int] = field(default_factory=dict)
    maybe: int | None = None
    either: int | str = 0
    flag: bool = False
    rest: Any = None


GOOD = Outer(1, 0.5, Inner("a"), [Inner("b", 2)], (1, 2), ("c", 3), {"d": 4}, 5, "e", True, {"f": [None, 1.5]})


class OurError(ValueError):
    pass


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(asdict(GOOD)))
    assert read_json(path, Outer) == GOOD
    assert parse_json('{"version": 1, "rate": 2, "inner": {"name": "x"}}', Outer, "text") == Outer(1, 2, Inner("x"))
    assert from_json([[1], []], list[list[int]]) == [[1], []]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: expected 1, got 2"),
        ({"version": True}, "version: expected 1, got True"),
        ({"version": 2, "new": 1}, "version: expected 1, got 2"),
        ({"new": 1}, "new: not a field of Outer"),
        ({"rate": "fast"}, "rate: expected a number, got 'fast'"),
        ({"rate": True}, "rate: expected a number, got True"),
        ({"inner": 3}, "inner: expected an object, the fields of Inner, got 3"),
        ({"inner": {}}, "inner.name: expected text, got nothing"),
        ({"inner": {"name": "a", "size": -1}}, "inner: size: expected at least 0, got -1"),
        ({"inner": {"name": "\ud800"}}, r"inner.name: expected text, got '\\ud800'"),
        ({"several": {}}, "several: expected a list, got {}"),
        ({"several": [{"name": "a"}, {"name": 1}]}, r"several\[1\].name: expected text, got 1"),
        ({"widths": [1, 2.5]}, r"widths\[1\]: expected an integer of 64 bits, got 2.5"),
        ({"widths": [1, 1 << 64]}, r"widths\[1\]: expected an integer of 64 bits, got 18446744073709551616"),
        ({"pair": ["a"]}, r"pair: expected a list of 2, got \['a'\]"),
        ({"by_name": {"x": None}}, "by_name.x: expected an integer of 64 bits, got None"),
        ({"by_name": {"x y\n": "1"}}, r"by_name.'x y\\n': expected an integer of 64 bits, got '1'"),
        ({"maybe": "a"}, "maybe: expected an integer of 64 bits, got 'a'"),
        ({"either": []}, r"either: expected an integer of 64 bits or text, got \[\]"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(tmp_path, change, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(asdict(GOOD) | change))
    with pytest.raises(OurError, match=f"/a.json: {message}$"):
        read_json(path, Outer, OurError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: Expecting value"),
        ("{", "not JSON: Expecting property name"),
        ("\ufeff{}", "not JSON: Unexpected UTF-8 BOM"),
        (b"\xff{}", "not JSON: 'utf-8' codec"),
        ("NaN", "not JSON: NaN"),
        ("[-Infinity]", "not JSON: -Infinity"),
        ("1e999", "expected a finite number, got 1e999"),
        ("9" * 5000, "expected integers of at most 40 digits, got one of 5000"),
        ('{"a": 1, "a": 1}', "a: there twice"),
        ("[" * 100_000, f"nested more than {MOST_LEVELS} deep"),
        ('{"a":' * 100_000, f"nested more than {MOST_LEVELS} deep"),
        ("[" * 65 + "]" * 65, f"nested more than {MOST_LEVELS} deep"),
    ],
)
def test_what_is_no_plain_json_is_refused(text, message):
    with pytest.raises(OurError, match=f"^text: {message}") as error:
        parse_json(text, Any, "text", OurError)
    assert "\n" not in str(error.value)


def test_values_at_the_limits_are_read():
    assert parse_json("[" * MOST_LEVELS + "]" * MOST_LEVELS, Any, "text") is not None
    assert parse_json(str(2**127), Any, "text") == 2**127  # the state of numpy's generators
    assert parse_json("[-9223372036854775808, 18446744073709551615]", list[int], "text") == [-(2**63), 2**64 - 1]
    assert parse_json('"\\udcff"', str, "text") == "\udcff"  # from a file name that is not UTF-8


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(OurError, match=r"nowhere.json: No such file"):
        read_json(tmp_path / "nowhere.json", Outer, OurError)
    with pytest.raises(OurError, match="expected a file"):
        read_json(tmp_path, Outer, OurError)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OurError, match="expected a file"):
        read_json(tmp_path / "pipe", Outer, OurError)


def test_a_text_too_large_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("robe_json.MOST_BYTES", 100)
    path = tmp_path / "a.json"
    path.write_text("1" + " " * 99)
    assert read_json(path, int) == 1
    path.write_text("1" + " " * 100)
    with pytest.raises(OurError, match=r"a.json: expected JSON of at most 100 bytes"):
        read_json(path, int, OurError)


def parsed(text):
    """The value, or the error."""
    try:
        return parse_json(text, Outer, "text", OurError)
    except OurError as error:
        return error


def test_any_mutation_is_read_or_refused_in_one_line():
    random_ = random.Random(0)
    text = json.dumps(asdict(GOOD)).encode()
    read = 0
    for _ in range(3000):
        damaged = bytearray(text)
        for _ in range(random_.randint(1, 3)):
            place = random_.randrange(len(damaged))
            damaged[place : place + random_.randint(0, 3)] = random_.choices(
                b'[]{}",:-0179eEtrue\\\xff', k=random_.randint(0, 3)
            )
        value = parsed(bytes(damaged))
        if isinstance(value, Outer):
            assert from_json(json.loads(json.dumps(asdict(value))), Outer) == value
            read += 1
        else:
            assert "\n" not in str(value)
    assert 30 < read < 1500
