"""Damage to JSON, of its bytes and of its values, by a seeded generator."""

import copy
import json

# What a value becomes.
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 53, 160, 3200, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**39, 0.5, -0.0, 1e308),
    *("", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "\udcff", "x" * 300, "\n", "rows", "npz", "days"),
    *("files", "f4", "i8", "day_0", "day_0-00000.rows", "day_1-00000.rows", "link", [], {}, [[]], [None], {"a": 1}),
]
# What is written over bytes, or between them.
BYTES = [
    *(b"", b"[", b"]", b"{", b"}", b":", b",", b'"', b"\\", b"\\u0000", b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"\0"),
    *(b"NaN", b"-Infinity", b"1e999", b"-", b".", b"0", b"9", b"9" * 50, b"9" * 5000, b"null", b"true", b"/*", b"'"),
    *(b"[" * 100, b'{"a":' * 100, b"[" * 100_000),
]


def mutated(text, generator):
    """Return the bytes of a JSON text with something changed.

    Args:
        text: bytes of a good one.
        generator: a random.Random.
    """
    if generator.random() < 0.5:
        return mutated_bytes(text, generator)
    values = json.loads(text)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        mutate_value(values, generator)
    return json.dumps(values).encode()


def mutated_bytes(text, generator):
    """Return a text with some bytes replaced, removed, added or moved."""
    damaged = bytearray(text)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        start = generator.randrange(len(damaged) + 1)
        stop = start + generator.choice((0, 0, 1, 1, 2, 10, 100))
        how = generator.random()
        if how < 0.4:
            damaged[start:stop] = generator.choice(BYTES[:-3] if how < 0.39 else BYTES)
        elif how < 0.6:
            damaged[start:stop] = generator.randbytes(stop - start)
        elif how < 0.8:
            from_ = generator.randrange(len(damaged) + 1)
            damaged[start:stop] = damaged[from_ : from_ + generator.choice((1, 10, 100))]
        elif start < len(damaged):
            damaged[start] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def mutate_value(values, generator):
    """Change, remove, add or repeat one value somewhere in a JSON value, in place."""
    places = list(_places(values))
    if not places:
        return
    holder, key = generator.choice(places)
    how = generator.random()
    if how < 0.55:
        holder[key] = copy.deepcopy(generator.choice(VALUES))
    elif how < 0.7:
        other, other_key = generator.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    elif how < 0.8:
        del holder[key]
    elif isinstance(holder, dict):
        holder[generator.choice(["a", "", "x\n", *holder])] = copy.deepcopy(holder[key])
    else:
        holder.insert(key, copy.deepcopy(holder[key]))


def _places(value):
    items = (
        list(value.items() if isinstance(value, dict) else enumerate(value)) if isinstance(value, dict | list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner)
