"""JSON that others may have written, read into dataclasses: every value is checked before anybody uses it.

robe, dlrm and data read their files with it. It stands beside them for the reason that ``robe_files`` does.
"""

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

MOST_BYTES = 1 << 26  # of a text; the manifest of a terabyte has less than a hundredth of it
MOST_LEVELS = 64  # of lists and objects inside each other
MOST_DIGITS = 40  # of an integer: enough for 128 bits, the state of numpy's generators

T = TypeVar("T")

_WORDS = {bool: "true or false", int: "an integer of 64 bits", float: "a number", str: "text", NoneType: "null"}


def read_json(path: Path, kind: type[T], error: type[ValueError] = ValueError) -> T:
    """Read a JSON file.

    Args:
        path: of the file.
        kind: what it holds; see ``from_json``.
        error: the class of the error.

    Returns:
        The value, of type ``kind``.

    Raises:
        ValueError: of class ``error``: the file can't be read, is no JSON, or holds something else. Names the file, the
            key, what was expected and what is there.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise error(f"{path}: expected a file")
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}") from None
    return parse_json(text, kind, str(path), error)


def parse_json(text: str | bytes, kind: type[T], name: str, error: type[ValueError] = ValueError) -> T:
    """Parse a JSON text.

    Args:
        text: to parse.
        kind: what it holds; see ``from_json``.
        name: of the text, for messages.
        error: the class of the error.

    Returns:
        The value, of type ``kind``.

    Raises:
        ValueError: of class ``error``: the text is no JSON, or holds something else. Names the text, the key, what was
            expected and what is there.
    """
    try:
        return from_json(_loads(text), kind)
    except ValueError as problem:
        raise error(f"{name}: {problem}") from None


def from_json(value: Any, kind: type[T], key: str = "") -> T:
    """Return what JSON made of a value as the type that it was.

    Args:
        value: what ``json.loads`` returned, or a part of it.
        kind: a dataclass, bool, int (of 64 bits), float, str, None, Any, a Literal, a union of them, or list[...],
            tuple[...] or dict[str, ...] of them. The fields of a dataclass without a default have to be there, and
            there may be no others.
        key: under which the value stands, for messages.

    Returns:
        The value, of type ``kind``. An integer may stand for a float.

    Raises:
        ValueError: the value is of another type, or the dataclass refuses it. Names the key, what was expected and what
            is there.
    """
    if is_dataclass(kind):
        return _instance(value, kind, key)
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(value, of, key)
    if origin is Literal:
        fits = any(type(value) is type(x) and value == x for x in of)
    elif origin in (list, tuple):
        return _sequence(value, origin, of, key)
    elif origin is dict:
        _require(isinstance(value, dict), key, "an object", value)
        return {name: from_json(x, of[1], _join(key, name)) for name, x in value.items()}  # type: ignore[return-value]
    else:
        fits = _SIMPLE[kind](value)
    _require(fits, key, _in_words(kind), value)
    return value


def _instance(value: Any, kind: Any, key: str) -> Any:
    _require(isinstance(value, dict), key, f"an object, the fields of {kind.__name__}", value)
    known = {field.name: field for field in fields(kind) if field.init}
    types = _types(kind)
    given = {}
    for name, field in known.items():  # in their order: a version that stands first is judged before the rest
        if name in value:
            given[name] = from_json(value[name], types[name], _join(key, name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{_join(key, name)}: expected {_in_words(types[name])}, got nothing")
    for name in value:
        if name not in known:
            raise ValueError(f"{_join(key, name)}: not a field of {kind.__name__}")
    try:
        return kind(**given)
    except ValueError as problem:
        raise ValueError(f"{key}: {problem}" if key else str(problem)) from None


def _one_of(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    if len(others) == 1:
        return from_json(value, others[0], key)
    for kind in others:
        try:
            return from_json(value, kind, key)
        except ValueError:
            continue
    return _require(False, key, " or ".join(map(_in_words, kinds)), value)


def _sequence(value: Any, origin: type, of: tuple[Any, ...], key: str) -> Any:
    _require(isinstance(value, (list, tuple)), key, "a list", value)
    if origin is tuple and of[-1] is not ...:
        _require(len(value) == len(of), key, f"a list of {len(of)}", value)
        kinds = of
    else:
        kinds = (of[0],) * len(value)
    return origin(from_json(x, kind, f"{key}[{i}]") for i, (x, kind) in enumerate(zip(value, kinds)))


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be the name of a file; JSON may hold halves of characters."""
    try:
        return isinstance(value, str) and value.encode("utf-8", "surrogateescape") is not None
    except UnicodeEncodeError:
        return False


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    Any: lambda value: True,
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and -(1 << 63) <= value < 1 << 64,
    float: lambda value: (type(value) is float and math.isfinite(value)) or _SIMPLE[int](value),
    str: _is_text,
    NoneType: lambda value: value is None,
}


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _in_words(kind: Any) -> str:
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(option) for option in of)
    if origin is Literal:
        return " or ".join(map(json.dumps, of))
    return _WORDS.get(kind) or {list: "a list", tuple: "a list"}.get(origin, "an object")


def _require(fits: bool, key: str, expected: str, got: Any) -> None:
    if not fits:
        raise ValueError(f"{key}{': ' if key else ''}expected {expected}, got {reprlib.repr(got)}")


def _join(key: str, name: str) -> str:
    name = name if name.isidentifier() and len(name) < 80 else reprlib.repr(name)
    return f"{key}.{name}" if key else name


# ---------------------------------------------------------------------------------------------------------------------
# Text to values


def _loads(text: str | bytes) -> Any:
    """Parse JSON as the standard has it: no NaN, no key twice; and nothing that is too large for its reader."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"expected JSON of at most {MOST_BYTES} bytes")
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode(),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_number,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError(f"nested more than {MOST_LEVELS} deep") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"not JSON: {problem}") from None
    _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{_join('', name)}: there twice")
        values[name] = value
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"not JSON: {text}")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {text[:20]}")
    return value


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"expected integers of at most {MOST_DIGITS} digits, got one of {len(text)}")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list))]
        if not inner:
            return
        level = [x for values in inner for x in values]
    raise ValueError(f"nested more than {MOST_LEVELS} deep")
