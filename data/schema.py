"""Definition of a row: the names of its columns, the value of a missing integer, and the layout of a record."""

import reprlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from robe_json import from_json

NUM_DENSE, NUM_SPARSE = 13, 26
MOST_IDS = 1 << 27  # in a row: numpy takes records of less than 2 GiB
MISSING = np.iinfo(np.int32).min  # a missing integer in a record
DENSE_NAMES = [f"int_{i}" for i in range(NUM_DENSE)]
SPARSE_NAMES = [f"cat_{i}" for i in range(NUM_SPARSE)]


def printable(text: str | Path) -> str:
    r"""Return text as one line that can be printed: a newline as \n, a byte of a name that is not UTF-8 as \xe9."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else repr(character)[1:-1]


class DataError(ValueError):
    """Data that can't be read. The message names the file and the place, and says what was expected and found.

    Args:
        message: shown as one line, whatever characters names and values in it have.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(frozen=True)
class Layout:
    """Fields of a record: a little-endian structure of label, dense and sparse, 160 bytes for Criteo's logs.

    Args:
        labelled: whether there is a label, int32.
        dense: "i4" for the integers of a log, MISSING where there is none; "f4" for numbers that the model gets as they
            are.
        ids: "u4" for Criteo's 32-bit hashes and for numbers that other tools give them; "i8" for 64-bit ids.
        hots: the number of ids of each feature in a row; None: one each.
    """

    labelled: bool = True
    dense: str = "i4"
    ids: str = "u4"
    hots: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.dense not in ("i4", "f4") or self.ids not in ("u4", "i8"):
            got = f"{reprlib.repr(self.dense)} and {reprlib.repr(self.ids)}"
            raise ValueError(f"expected dense i4 or f4 and ids u4 or i8, got {got}")
        if self.hots is not None and (len(self.hots) != NUM_SPARSE or min(self.hots) < 1):
            raise ValueError(f"hots: expected {NUM_SPARSE} numbers of at least 1, got {reprlib.repr(self.hots)}")
        if self.num_ids > MOST_IDS:
            raise ValueError(f"hots: expected at most {MOST_IDS} ids a row, got {self.num_ids}")

    @cached_property
    def dtype(self) -> np.dtype:
        """Return the numpy type of a record."""
        label = [("label", "<i4")] if self.labelled else []
        return np.dtype(
            label + [("dense", "<" + self.dense, (NUM_DENSE,)), ("sparse", "<" + self.ids, (self.num_ids,))]
        )

    @property
    def num_ids(self) -> int:
        """H, the number of ids in a row."""
        return NUM_SPARSE if self.hots is None else sum(self.hots)

    @property
    def features(self) -> list[slice]:
        """The columns of `sparse` that hold each feature's ids."""
        ends = np.cumsum(self.hots or (1,) * NUM_SPARSE).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends)]

    def records(self, rows: int) -> np.ndarray:
        """Return an array of ``rows`` records whose values are not set."""
        return np.empty(rows, self.dtype)

    def describe(self) -> str:
        """Return the layout in words, for messages."""
        return ", ".join(
            [
                "labels" if self.labelled else "no labels",
                {"i4": "integers", "f4": "floating-point numbers"}[self.dense],
                {"u4": "32-bit ids", "i8": "64-bit ids"}[self.ids],
                *([f"{self.num_ids} ids a row"] if self.hots else []),
            ]
        )

    def inputs(self) -> dict[str, Any]:
        """Return what a model gets of such rows, ready for JSON. A model takes rows of the inputs it was trained on."""
        dense = {"i4": "log(x + 1) of integers", "f4": "numbers as they are"}[self.dense]
        return {"dense": dense, "num_dense": NUM_DENSE, "num_features": NUM_SPARSE}

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments, ready for JSON."""
        return {"labelled": self.labelled, "dense": self.dense, "ids": self.ids, "hots": self.hots}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Layout":
        """Return the layout that `to_dict` described, also after a trip through JSON.

        Raises:
            ValueError: it is no such description.
        """
        return from_json(values, cls)
