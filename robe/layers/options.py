"""The keywords that all layers share, typed once.

Layers take them as ``**options: Unpack[LayerOptions]`` and pass them on to RobeTables, so a new keyword is an entry
here and its use in robe/layers/tables.py. Type checkers refuse a misspelt keyword; ``check_options`` does at run time.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypedDict

from robe.admission import Admission
from robe.array import RobeArray


class SharedOptions(TypedDict, total=False):
    """The keywords of every layer.

    Attributes:
        array: the RobeArray to read from, shared with other layers.
        robe_size: instead of array: the number of weights of the layer's own array.
        compression: instead of array: how many times smaller than the tables the layer's own array is, together with
            the filter of an admission. Where the array has room for every weight, the layer equals its torch
            counterpart exactly.
        block_size: Z, consecutive weights read at one hashed offset; None: embedding_dim.
        sign: whether blocks are multiplied by a hashed +1 or -1.
        admission: the ids that have an embedding of their own; None: all have.
        seed, init_std: of the layer's own array; see RobeArray.
    """

    array: RobeArray | None
    robe_size: int | None
    compression: float | None
    block_size: int | None
    sign: bool
    admission: Admission | None
    seed: int | None
    init_std: float | None


class LayerOptions(SharedOptions, total=False):
    """The keywords of layers with a choice of hash.

    Attributes:
        hash: one of ``hashing.HASHES``; "mix" by default.
    """

    hash: str


def check_options(layer: type, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keywords that a layer doesn't have.

    Args:
        layer: its class, named in the error.
        options: the keywords.
        known: the names that it has.

    Raises:
        TypeError: an unknown keyword; names the most similar one.
    """
    known = list(known)
    for name in options:
        if name not in known:
            similar = get_close_matches(name, known, 1)
            hint = f"; did you mean {similar[0]!r}?" if similar else ""
            raise TypeError(f"{layer.__name__}: got an unexpected keyword argument {name!r}{hint}")
