"""The ROBE hash, which says where a weight lies: its one definition, in plain torch.

The row of a virtual table is cut into blocks of Z = ``block_size`` consecutive components, and every block is read from
an array of m = ``size`` weights at a hashed offset (Desai et al., "Random Offset Block Embedding Array for CriteoTB
Benchmark MLPerf DLRM Model", 2021):

    slot(table, x, i) = offset(table, x, i // Z) + i % Z        0 <= offset <= m - Z

Three hash versions. Each is frozen: trained weights mean nothing under another one, so a change gets a new name.

``"mix"``: three rounds of a 64-bit mixer, arithmetic modulo 2**64, G = 0x9E3779B97F4A7C15:

    key    = mix64(mix64(seed + G) + table_id * G)              once per table
    row    = mix64(key + x * G)                                 once per row
    hash   = mix64(row + block * G)                             once per block
    offset = (hash * (m - Z + 1)) >> 64                         the high half of the 128-bit product
    sign   = +1 if the lowest bit of hash is 0, else -1         only where signs are asked for

mix64 is the finaliser of SplitMix64 (Steele et al. 2014; constants: Stafford's "Mix13"), a bijection, so no two rows of
a table have the same ``row``; their offsets are as good as independent, block by block. With Z > d a block spans rows:
x * d + i is the position along the table, its block number (x * d + i) // Z takes the place of x above, and ``block``
is 0.

``"linear"``: the formula of the authors' code, for weights trained with it. P = 2038074743, A = 871205356,
B = 1825252241, C = 634329019; key is the number of rows in the tables before this one:

    offset = ((A * (x + key) + B * block + C) mod P) mod (m - Z + 1)

computed without overflow (so ids above ~1e10 are right here and are not there), with block = i // Z for Z > d too.
The blocks of a row are a constant apart modulo P, so a row's first address all but fixes the others. The sign is the
lowest bit of mix64 of the value before the last mod.

``"identity"``: every weight has its own slot, slot = key + x * d + i; the array is then the tables, one after another.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Traits(NamedTuple):
    """The traits of a hash version that layers and operators depend on.

    Attributes:
        key: the kind of a table's hash key: "table", ``table_key`` of the array's seed and the table_id; "row", the
            number of rows in the tables before it; or "slot", the number of slots before it.
        has_admission: whether a filter can keep ids out; it is read at the row hash of "mix".
        is_exact: whether every weight has its own slot, so that tables must lie within the array.
    """

    key: str
    has_admission: bool = False
    is_exact: bool = False


TRAITS = {
    "mix": Traits(key="table", has_admission=True),
    "linear": Traits(key="row"),
    "identity": Traits(key="slot", is_exact=True),
}
HASHES = tuple(TRAITS)

_MASK_32 = (1 << 32) - 1
_MASK_64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
LINEAR = _P, _C, _B, _A = 2038074743, 634329019, 1825252241, 871205356  # in the order of the authors' checkpoints


def signed(value: int) -> int:
    """The int64 with the same 64 bits as ``value`` modulo 2**64; torch has no unsigned 64-bit arithmetic."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Logical shift: torch's >> copies the sign bit in."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _mix64_int(x: int) -> int:
    x &= _MASK_64
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS):
        x = ((x ^ (x >> shift)) * multiplier) & _MASK_64
    return x ^ (x >> SHIFTS[2])


def mix64(x: Tensor) -> Tensor:
    """Mix 64 bits: a bijection on int64 after which every input bit moves every output bit with probability 1/2."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS):
        x = (x ^ _shift_right(x, shift)) * signed(multiplier)
    return x ^ _shift_right(x, SHIFTS[2])


def multiply_high(x: Tensor, n: int) -> Tensor:
    """The high 64 bits of x * n with x read as unsigned: maps a uniform hash to 0..n-1, bias below n / 2**64.

    Args:
        x: int64, any shape.
        n: 1 <= n < 2**63.
    """
    # Schoolbook product of 32-bit halves: no partial sum passes 2**64.
    x_high, x_low = _shift_right(x, 32), x & _MASK_32
    n_high, n_low = n >> 32, n & _MASK_32
    middle = x_high * n_low + _shift_right(x_low * n_low, 32)
    high = _shift_right(middle, 32)
    if n_high:
        high = high + x_high * n_high + _shift_right((middle & _MASK_32) + x_low * n_high, 32)
    return high


def table_key(seed: int, table_id: int) -> int:
    """Return the int64 that stands for a table in the "mix" hash.

    Args:
        seed: of the array; any integer, taken modulo 2**64.
        table_id: tells the tables of one array apart; any integer, taken modulo 2**64.
    """
    return signed(_mix64_int(_mix64_int(seed + GOLDEN) + table_id * GOLDEN))


def row_hash(ids: Tensor, keys: Tensor) -> Tensor:
    """Return ``row`` of the "mix" hash, int64, which stands for an id of a table: a bijection for each table.

    Args:
        ids: (...) int32 or int64.
        keys: hash keys of the tables (``table_key``), broadcastable to ids.
    """
    return mix64(keys + ids.long() * signed(GOLDEN))


def _hash_mix(rows: Tensor, keys: Tensor, blocks: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    hashed = mix64(row_hash(rows, keys) + blocks * signed(GOLDEN))
    return multiply_high(hashed, choices), hashed


def _hash_linear(rows: Tensor, keys: Tensor, blocks: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    # Residues first: each product stays below 2**62 for every int64 row.
    row = (torch.remainder(rows, _P) + torch.remainder(keys, _P)) % _P
    value = (_A * row + torch.remainder(_B * (blocks % _P), _P) + _C) % _P
    return value % choices, mix64(value)


def slots(
    ids: Tensor, keys: Tensor, *, size: int, embedding_dim: int, block_size: int, hash: str, sign: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the slot of every component of the embeddings of some ids.

    Args:
        ids: (...) int64.
        keys: int64, broadcastable to ids, the hash key of each id's table: ``table_key`` for "mix", the number of rows
            before the table for "linear", the number of slots before it, a multiple of d, for "identity".
        size: m, the number of weights in the array, at least ``block_size``.
        embedding_dim: d.
        block_size: Z.
        hash: one of ``HASHES``.
        sign: whether to return signs; "identity" has none.

    Returns:
        (slots, signs): slots (..., d) int64 in [0, m); signs (..., d) int64 of +1 and -1, or None for all +1.
    """
    component = torch.arange(embedding_dim, device=ids.device)
    ids, keys = ids.unsqueeze(-1), keys.unsqueeze(-1)
    if hash == "identity":
        return keys + ids * embedding_dim + component, None

    choices = size - block_size + 1
    if hash == "mix" and block_size > embedding_dim:
        # A row lies in one block or in two neighbours. x = Z * (x // Z) + x % Z keeps x * d from overflowing.
        position = torch.remainder(ids, block_size) * embedding_dim
        first = ids // block_size * embedding_dim + position // block_size
        component = position % block_size + component
        block = component // block_size
        neighbours = torch.arange(2, device=ids.device)
        offset, hashed = _hash_mix(first + neighbours, keys, torch.zeros_like(neighbours), choices)
        slot = offset.gather(-1, block) + component % block_size
        return slot, 1 - 2 * (hashed & 1).gather(-1, block) if sign else None

    blocks = torch.arange((embedding_dim - 1) // block_size + 1, device=ids.device)
    offset, hashed = (_hash_mix if hash == "mix" else _hash_linear)(ids, keys, blocks, choices)
    width = min(block_size, embedding_dim)
    slot = (offset.unsqueeze(-1) + component[:width]).flatten(-2)[..., :embedding_dim]
    return slot, (1 - 2 * (hashed & 1)).repeat_interleave(width, -1)[..., :embedding_dim] if sign else None
