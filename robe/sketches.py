"""The places of an id's filter bits and counters: the ground floor of admission, and of kernels that read filters.

An admission keeps the ids that have an embedding of their own in a Bloom filter whose bits for an id lie in one word
("blocked": Putze, Sanders and Singler 2009). With W words of 64 bits, arithmetic modulo 2**64, mix64 and G as in
robe/hashing.py, and the key of the id's table:

    row  = mix64(key + x * G)                 as in the "mix" hash, which mixes it again before it reads there
    word = (row * W) >> 64
    bits = 2**(row % 64) | 2**(row // 64 % 64) | 2**(row // 4096 % 64)

Id x is in if all of ``bits`` are set in the word.

Ids are counted in a count-min sketch (Cormode and Muthukrishnan 2005): COUNTERS rows of counters, one counter a row for
each id, at places hashed from ``row`` and a salt.
"""

import torch
from torch import Tensor

from robe.hashing import mix64, multiply_high, row_hash, signed

SHARED_ID = -(1 << 63)  # the id whose embedding all ids of a table read that were not let in
BITS_OF_WORD = 6  # log2
BITS_OF_ID = 3
COUNTERS = 4  # of an id
_SALT = 0xD1B54A32D192ED03  # keeps counters apart from the hashes of blocks


def filter_places(row: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """The word of each row hash in a filter of ``words`` words, and its bits there, both int64 of row's shape."""
    one, bits = torch.ones_like(row), torch.zeros_like(row)
    for k in range(BITS_OF_ID):
        bits = bits | torch.bitwise_left_shift(one, (row >> (k * BITS_OF_WORD)) & 63)
    return multiply_high(row, words), bits


def admits(filter: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
    """Return whether each id was let in.

    Args:
        filter: (W,) int64.
        ids, keys: as in ``hashing.row_hash``.

    Returns:
        bool, the shape of ids.
    """
    word, bits = filter_places(row_hash(ids, keys), len(filter))
    return filter[word] & bits == bits


def counters_of(row: Tensor, width: int) -> Tensor:
    """The places of row hashes (n,) in counters (COUNTERS, width): (COUNTERS, n) int64, a column index for each row."""
    salts = torch.arange(1, COUNTERS + 1, device=row.device).unsqueeze(1) * signed(_SALT)
    return multiply_high(mix64(row + salts), width)
