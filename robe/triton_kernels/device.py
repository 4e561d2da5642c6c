"""Functions of the device that kernels share: where embeddings lie, which ids count, what slots hold.

They follow robe/hashing.py and robe/sketches.py step by step. The first dimension of a tile are bags; an id of a lookup
is a bag of one.
"""

import triton
import triton.language as tl

from robe.hashing import GOLDEN, LINEAR, MULTIPLIERS, SHIFTS
from robe.sketches import BITS_OF_ID, BITS_OF_WORD, SHARED_ID

_GOLDEN, _SHARED_ID = tl.constexpr(GOLDEN), tl.constexpr(SHARED_ID)
_SHIFT_0, _SHIFT_1, _SHIFT_2 = map(tl.constexpr, SHIFTS)
_MULTIPLIER_0, _MULTIPLIER_1 = map(tl.constexpr, MULTIPLIERS)
_P, _C, _B, _A = map(tl.constexpr, LINEAR)
_BITS_OF_WORD, _BITS_OF_ID = tl.constexpr(BITS_OF_WORD), tl.constexpr(BITS_OF_ID)

# ---------------------------------------------------------------------------------------------------------------------
# From ids to slots


@triton.jit
def _mix64(x):
    x = (x ^ (x >> _SHIFT_0)) * _MULTIPLIER_0
    x = (x ^ (x >> _SHIFT_1)) * _MULTIPLIER_1
    return x ^ (x >> _SHIFT_2)


@triton.jit
def _row_hash(id, key):
    return _mix64(key.to(tl.uint64, bitcast=True) + id.to(tl.uint64, bitcast=True) * _GOLDEN)


@triton.jit
def _floor_mod(x, n):
    rest = x % n
    return tl.where(rest < 0, rest + n, rest)


@triton.jit
def hash_span(id, key, D: tl.constexpr, Z: tl.constexpr):
    """Return where embeddings (BAGS,) shorter than a block start in theirs, and the hashes of it and the next."""
    turns = id // Z - (id % Z < 0).to(tl.int64)  # % has the sign of id
    position = _floor_mod(id, Z) * D
    first = turns * D + position // Z
    return position % Z, _mix64(_row_hash(first, key)), _mix64(_row_hash(first + 1, key))


@triton.jit
def hash_blocks(id, key, block, choices, HASH: tl.constexpr):
    """Return the first slot of blocks (BLOCKS,) of ids (BAGS,), and whether it is negated: (BAGS, BLOCKS)."""
    block = block.to(tl.int64)[None, :]
    if HASH == "mix":
        hashed = _mix64(_row_hash(id, key)[:, None] + block.to(tl.uint64, bitcast=True) * _GOLDEN)
        offset = tl.umulhi(hashed, choices.to(tl.uint64)).to(tl.int64)
    else:
        row = (_floor_mod(id, _P) + _floor_mod(key, _P)) % _P
        value = (_A * row[:, None] + _B * (block % _P) % _P + _C) % _P
        offset = value % choices
        hashed = _mix64(value.to(tl.uint64, bitcast=True))
    return offset, (hashed & 1) != 0


@triton.jit
def find_slots(
    id, key, block, within, component, choices, HASH: tl.constexpr, D: tl.constexpr, Z: tl.constexpr
):  # fmt: skip
    """Return the slot of each component of a tile of ids (BAGS,), and whether it is negated there."""
    if HASH == "identity":
        first = tl.multiple_of(key + id * D, D & -D)  # _load_tables has looked
        return first[:, None, None] + component, component < 0
    elif HASH == "span":
        start, hash_0, hash_1 = hash_span(id, key, D, Z)
        offset_0 = tl.umulhi(hash_0, choices.to(tl.uint64)).to(tl.int64)
        offset_1 = tl.umulhi(hash_1, choices.to(tl.uint64)).to(tl.int64)
        place = start[:, None, None] + component
        beyond = place >= Z
        slot = tl.where(beyond, offset_1[:, None, None] - Z, offset_0[:, None, None]) + place
        return slot, (tl.where(beyond, hash_1[:, None, None], hash_0[:, None, None]) & 1) != 0
    else:
        offset, negative = hash_blocks(id, key, block, choices, HASH)
        return offset[:, :, None] + within, negative[:, :, None]


# ---------------------------------------------------------------------------------------------------------------------
# What a program works on


@triton.jit
def tile(chunk, D: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the blocks (BLOCKS,) of a chunk of embeddings, places within and components, and which exist."""
    widths: tl.constexpr = (STEP + WIDTH - 1) // WIDTH
    block = chunk // widths * BLOCKS + tl.arange(0, BLOCKS)
    within = (chunk % widths * WIDTH + tl.arange(0, WIDTH))[None, None, :]
    component = block[None, :, None] * STEP + within
    return block, within, component, (within < STEP) & (component < D)


@triton.jit
def _load_tables(
    table_keys, num_embeddings, feature, exists, choices, HASH: tl.constexpr, D: tl.constexpr, Z: tl.constexpr
):  # fmt: skip
    """Return the keys and bounds of the tables of features, and which exist and lie within the array."""
    key, bound = tl.load(table_keys + feature, exists, 0), tl.load(num_embeddings + feature, exists, 0)
    fits = exists
    if HASH == "identity":
        size = choices + (Z - 1)
        fits = (bound > 0) & (key >= 0) & (key % (D & -D) == 0) & (key + bound * D <= size)
        tl.device_assert(
            fits | ~exists, "hash 'identity': a table does not lie within the array, at a multiple of D & -D"
        )
        fits = fits & exists
    return key, bound, fits


@triton.jit
def open_lookup(
    table_keys, num_embeddings, choices, n_bags,
    HASH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, BAGS: tl.constexpr,
):  # fmt: skip
    """Return a program's places in the ids, which exist, the keys and bounds of their tables, and which to read."""
    place = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    exists = place < n_bags
    key, bound, reads = _load_tables(table_keys, num_embeddings, place % F, exists, choices, HASH, D, Z)
    return place, exists, key, bound, reads


@triton.jit
def open_bags(
    offsets, table_keys, num_embeddings, choices, n_values, n_bags, batch_size,
    HASH: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, BAGS: tl.constexpr,
):  # fmt: skip
    """Return example and feature of a program's bags, which exist, key and bound; start, end and most of their ids.

    A bag whose table does not lie within the array has no ids.
    """
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    exists = bag < n_bags
    start = tl.load(offsets + bag, exists, 0).to(tl.int64)
    end = tl.load(offsets + bag + 1, exists, 0).to(tl.int64)
    in_order = (start >= 0) & (start <= end) & (end <= n_values) & ((bag > 0) | (start == 0))
    tl.device_assert(in_order | ~exists, "offsets: expected to rise from 0 to at most the number of values")
    end = tl.where(in_order, end, start)
    longest = tl.max(end - start)
    feature = bag // batch_size
    key, bound, fits = _load_tables(table_keys, num_embeddings, feature, exists, choices, HASH, D, Z)
    if HASH == "identity":
        end = tl.where(fits, end, start)
    return bag % batch_size, feature, exists, key, bound, start, end, longest


@triton.jit
def take_ids(ids, at, exists, key, bound, padding, filter, words, PADDED: tl.constexpr):
    """Return the ids at places (BAGS,), SHARED_ID where the filter lacks them, and which of them count."""
    id = tl.load(ids + at, exists, 0).to(tl.int64)
    counts = exists
    if PADDED:
        counts = counts & (id != padding)
    in_range = (bound == 0) | ((id >= 0) & (id < bound))
    tl.device_assert(in_range | ~counts, "index out of range: an id is not below num_embeddings of its table")
    counts = counts & in_range
    if filter is not None:
        row = _row_hash(id, key)
        word = tl.load(filter + tl.umulhi(row, words.to(tl.uint64)).to(tl.int64), counts, 0).to(tl.uint64, bitcast=True)
        missing = row != row
        for k in tl.static_range(_BITS_OF_ID):
            missing = missing | (((word >> (row >> (k * _BITS_OF_WORD) & 63)) & 1) == 0)
        id = tl.where(missing, _SHARED_ID, id)
    return id, counts


@triton.jit
def count_ids(ids, start, end, longest, key, bound, padding, filter, words, PADDED: tl.constexpr):
    """Return how many ids of each bag count."""
    count = (end - start).to(tl.int32)
    if PADDED:
        count = tl.zeros_like(count)
        for j in range(0, longest):
            _, counts = take_ids(ids, start + j, start + j < end, key, bound, padding, None, words, PADDED)
            count += counts.to(tl.int32)
    return count


# ---------------------------------------------------------------------------------------------------------------------
# Values


@triton.jit
def divide(x, y):
    """Return x / y rounded as in IEEE 754, which ``/`` of float32 is not."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def read_slots(weight, scale, slot, mask, negative, SHIFT: tl.constexpr, SIGN: tl.constexpr, SUM: tl.constexpr):
    """Return the values of slots under a mask, scaled and signed; 0 elsewhere."""
    value = tl.load(weight + slot, mask, 0).to(SUM)
    if scale is not None:
        value = value * tl.load(scale + (slot >> SHIFT), mask, 0)
    if SIGN:
        value = tl.where(negative, -value, value)
    return value


@triton.jit
def find_largest(
    weight, choices, ids, start, end, longest, key, bound, padding, filter, words, block, within, component, inside,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BAGS: tl.constexpr,
):  # fmt: skip
    """Return the slot of the first of the largest values of each component of bags, and whether it is negated.

    The slot is -1 where there is none: in empty bags, and where the largest is not a number.
    """
    largest = tl.full((BAGS, BLOCKS, WIDTH), float("-inf"), SUM)
    best = tl.full((BAGS, BLOCKS, WIDTH), -1, tl.int64)
    negated = best > 0
    for j in range(0, longest):
        id, counts = take_ids(ids, start + j, start + j < end, key, bound, padding, filter, words, PADDED)
        slot, negative = find_slots(id, key, block, within, component, choices, HASH, D, Z)
        reads = inside & counts[:, None, None]
        value = read_slots(weight, None, slot, reads, negative, 0, SIGN, SUM)
        # Not a number stays the largest from then on.
        larger = reads & ((value > largest) | (best < 0) | ((value != value) & (largest == largest)))
        largest = tl.where(larger, value, largest)
        best = tl.where(larger, slot, best)
        negated = tl.where(larger, negative, negated)
    return tl.where(largest == largest, best, -1), negated  # nothing equals not-a-number
