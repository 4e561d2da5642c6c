"""The operators on a GPU, in Triton: the bodies of ``torch.ops.robe.*`` for CUDA tensors.

robe/native.py imports this at the first call with a CUDA tensor, where triton is installed. With TRITON_INTERPRET=1 set
beforehand the same kernels run on CPU tensors, one program after another: that is how they are tested without a GPU.

A program works on a tile (ROWS, BLOCKS, WIDTH): some rows or bags, the blocks of a row, the components of a block, so
that a block is hashed once and read side by side. Rows of more components than a tile take several programs. Embeddings
and their gradients start at multiples of D: they are read and written 16 bytes at a time where D allows, and so are
rows under the "identity" hash. Hashed blocks start at any weight, so that each of theirs is a load by itself.

Gradients are added with atomics, in float32 for half precision, in an order that changes from run to run. After
``torch.use_deterministic_algorithms(True)``, and in the optimizers' ``update_`` always (float64 is left to the
reference), they go another way: a list of the parts of rows and where each goes ("pieces", some 60 bytes each), sorted
by place; then each program sums what falls into one segment of the array, in the order of the list, and writes the
gradient, or applies the optimizer's rule, there. No gradient of the array is kept then.

As in torch's own kernels, an id out of range, or offsets that do not rise, trip an assertion on the device, which ends
the program's use of the GPU: to ask beforehand would mean to wait for the device in each call.
"""

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robe import ops
from robe.admission import BITS_OF_ID, BITS_OF_WORD, RARE
from robe.hashing import GOLDEN, LINEAR, MULTIPLIERS, SHIFTS

_GOLDEN, _RARE = tl.constexpr(GOLDEN), tl.constexpr(RARE)
_SHIFT_0, _SHIFT_1, _SHIFT_2 = map(tl.constexpr, SHIFTS)
_MULTIPLIER_0, _MULTIPLIER_1 = map(tl.constexpr, MULTIPLIERS)
_P, _C, _B, _A = map(tl.constexpr, LINEAR)
_BITS_OF_WORD, _BITS_OF_ID = tl.constexpr(BITS_OF_WORD), tl.constexpr(BITS_OF_ID)

_TILE = 1024  # elements of a program: 8 for each thread of 4 warps
_TILE_OF_PIECES = 2048  # of programs that sum pieces
_RUN = 64  # pieces for the same slots that are summed by a program of their own
# Sums are rounded as the reference rounds them, and ``debug`` keeps the assertions. Products of hashes overflow.
_OPTIONS = {"num_warps": 4, "debug": True, "sanitize_overflow": False, "enable_fp_fusion": False}

# ---------------------------------------------------------------------------------------------------------------------
# Where rows lie: robe/hashing.py and robe/admission.py once more


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
def _span(id, key, D: tl.constexpr, Z: tl.constexpr):
    """Of rows (ROWS,) shorter than a block: where the row starts in its block, and the hashes of it and the next."""
    turns = id // Z - (id % Z < 0).to(tl.int64)  # % has the sign of id
    position = _floor_mod(id, Z) * D
    first = turns * D + position // Z
    return position % Z, _mix64(_row_hash(first, key)), _mix64(_row_hash(first + 1, key))


@triton.jit
def _offsets(id, key, block, choices, HASH: tl.constexpr):
    """Of rows (ROWS,) and the numbers of blocks (BLOCKS,): first slot and whether negated, (ROWS, BLOCKS)."""
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
def _slots(
    id, key, block, within, component, choices, HASH: tl.constexpr, D: tl.constexpr, Z: tl.constexpr
):  # fmt: skip
    """Of rows (ROWS,): the slot of each component of a tile, and whether it is negated there."""
    if HASH == "identity":
        first = tl.multiple_of(key + id * D, D & -D)  # _tables has looked
        return first[:, None, None] + component, component < 0
    elif HASH == "span":
        start, hash_0, hash_1 = _span(id, key, D, Z)
        offset_0 = tl.umulhi(hash_0, choices.to(tl.uint64)).to(tl.int64)
        offset_1 = tl.umulhi(hash_1, choices.to(tl.uint64)).to(tl.int64)
        place = start[:, None, None] + component
        beyond = place >= Z
        slot = tl.where(beyond, offset_1[:, None, None] - Z, offset_0[:, None, None]) + place
        return slot, (tl.where(beyond, hash_1[:, None, None], hash_0[:, None, None]) & 1) != 0
    else:
        offset, negative = _offsets(id, key, block, choices, HASH)
        return offset[:, :, None] + within, negative[:, :, None]


@triton.jit
def _tile(chunk, D: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Of a chunk of rows: numbers of blocks (BLOCKS,), places within, components, which exist (1, BLOCKS, WIDTH)."""
    widths: tl.constexpr = (STEP + WIDTH - 1) // WIDTH
    block = chunk // widths * BLOCKS + tl.arange(0, BLOCKS)
    within = (chunk % widths * WIDTH + tl.arange(0, WIDTH))[None, None, :]
    component = block[None, :, None] * STEP + within
    return block, within, component, (within < STEP) & (component < D)


@triton.jit
def _bags(
    number, offsets, n_values, n_rows, batch_size, F: tl.constexpr, ROWS: tl.constexpr, ONE: tl.constexpr
):  # fmt: skip
    """Of a program: example, feature, which rows exist, where their ids begin and end, and of how many is the most."""
    row = number.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    if ONE:
        return row // F, row % F, exists, row, row + exists.to(tl.int64), 1
    else:
        start = tl.load(offsets + row, exists, 0).to(tl.int64)
        end = tl.load(offsets + row + 1, exists, 0).to(tl.int64)
        in_order = (start >= 0) & (start <= end) & (end <= n_values) & ((row > 0) | (start == 0))
        tl.device_assert(in_order | ~exists, "offsets: expected to rise from 0 to at most the number of values")
        end = tl.where(in_order, end, start)
        return row % batch_size, row // batch_size, exists, start, end, tl.max(end - start)


@triton.jit
def _tables(
    keys, num_embeddings, feature, exists, start, end, choices, HASH: tl.constexpr, D: tl.constexpr, Z: tl.constexpr
):  # fmt: skip
    """Keys and rows of the tables of features, and where their ids end: where they begin, of tables that do not fit."""
    key, rows = tl.load(keys + feature, exists, 0), tl.load(num_embeddings + feature, exists, 0)
    if HASH == "identity":
        size = choices + (Z - 1)
        fits = (rows > 0) & (key >= 0) & (key % D == 0) & (key + rows * D <= size)
        tl.device_assert(fits | ~exists, "hash 'identity': a table does not lie within the array, at a multiple of D")
        end = tl.where(fits, end, start)
    return key, rows, end


@triton.jit
def _take(
    ids, at, exists, key, rows, padding, filter, words, PADDED: tl.constexpr
):  # fmt: skip
    """The ids at places (ROWS,), those not let in replaced, and which of them count."""
    id = tl.load(ids + at, exists, 0).to(tl.int64)
    counts = exists
    if PADDED:
        counts = counts & (id != padding)
    in_range = (rows == 0) | ((id >= 0) & (id < rows))
    tl.device_assert(in_range | ~counts, "index out of range: an id is not below num_embeddings of its table")
    counts = counts & in_range
    if filter is not None:
        row = _row_hash(id, key)
        word = tl.load(filter + tl.umulhi(row, words.to(tl.uint64)).to(tl.int64), counts, 0).to(tl.uint64, bitcast=True)
        missing = row != row
        for k in tl.static_range(_BITS_OF_ID):
            missing = missing | (((word >> (row >> (k * _BITS_OF_WORD) & 63)) & 1) == 0)
        id = tl.where(missing, _RARE, id)
    return id, counts


@triton.jit
def _divide(x, y):
    """Rounded as IEEE 754 has it: of float32, ``/`` is not."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _count(ids, start, end, longest, key, rows, padding, filter, words, PADDED: tl.constexpr):
    """How many ids of each bag count."""
    count = (end - start).to(tl.int32)
    if PADDED:
        count = tl.zeros_like(count)
        for j in range(0, longest):
            _, counts = _take(ids, start + j, start + j < end, key, rows, padding, None, words, PADDED)
            count += counts.to(tl.int32)
    return count


@triton.jit
def _read(weight, scale, slot, mask, negative, SHIFT: tl.constexpr, SIGN: tl.constexpr, SUM: tl.constexpr):
    value = tl.load(weight + slot, mask, 0).to(SUM)
    if scale is not None:
        value = value * tl.load(scale + (slot >> SHIFT), mask, 0)
    if SIGN:
        value = tl.where(negative, -value, value)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. ids and, of bags, factors are vectors; embeddings and gradients (B, F, D) with D contiguous.


_NUMBERS = ["choices", "words", "padding", "n_values", "n_rows", "batch_size", "out_b", "out_f"]


@triton.jit(do_not_specialize=_NUMBERS)
def _forward(
    weight, scale, choices, ids, offsets, factors, keys, num_embeddings, filter, words, padding, n_values, n_rows,
    batch_size, out, out_b, out_f, UNIT: tl.constexpr,
    MODE: tl.constexpr, HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr,
    SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Embeddings (B, F, D): the rows of ids, or of bags pooled. Strides are in UNITs, so that alignment shows."""
    example, feature, exists, start, end, longest = _bags(
        tl.program_id(0), offsets, n_values, n_rows, batch_size, F, ROWS, MODE == "one"
    )
    block, within, component, inside = _tile(tl.program_id(1), D, STEP, BLOCKS, WIDTH)
    key, rows, end = _tables(keys, num_embeddings, feature, exists, start, end, choices, HASH, D, Z)
    result = tl.zeros((ROWS, BLOCKS, WIDTH), SUM)
    if MODE == "one":
        id, counts = _take(ids, start, start < end, key, rows, padding, filter, words, PADDED)
        slot, negative = _slots(id, key, block, within, component, choices, HASH, D, Z)
        result = _read(weight, scale, slot, inside & counts[:, None, None], negative, SHIFT, SIGN, SUM)
    else:
        if MODE == "max":
            result = result - float("inf")
        count = tl.zeros((ROWS,), tl.int32)
        for j in range(0, longest):
            id, counts = _take(ids, start + j, start + j < end, key, rows, padding, filter, words, PADDED)
            slot, negative = _slots(id, key, block, within, component, choices, HASH, D, Z)
            reads = inside & counts[:, None, None]
            value = _read(weight, scale, slot, reads, negative, SHIFT, SIGN, SUM)
            if factors is not None:
                value = value * tl.load(factors + start + j, counts, 0).to(SUM)[:, None, None]
            if MODE == "max":
                larger = tl.maximum(result, value, propagate_nan=tl.PropagateNan.ALL)
                result = tl.where(reads, larger, result)
            else:
                result += tl.where(reads, value, 0)
            count += counts.to(tl.int32)
        if MODE == "mean":
            result = _divide(result, tl.maximum(count, 1).to(SUM)[:, None, None])
        if MODE == "max":
            result = tl.where((count > 0)[:, None, None], result, 0)
    place = ((example * out_b + feature * out_f) * UNIT)[:, None, None] + component
    tl.store(out + place, result.to(out.dtype.element_ty), inside & exists[:, None, None])


@triton.jit
def _largest(
    weight, choices, ids, start, end, longest, key, rows, padding, filter, words, block, within, component, inside,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each component of bags: the slot of the first of its largest values and whether that is negated; -1: none."""
    largest = tl.full((ROWS, BLOCKS, WIDTH), float("-inf"), SUM)
    best = tl.full((ROWS, BLOCKS, WIDTH), -1, tl.int64)
    negated = best > 0
    for j in range(0, longest):
        id, counts = _take(ids, start + j, start + j < end, key, rows, padding, filter, words, PADDED)
        slot, negative = _slots(id, key, block, within, component, choices, HASH, D, Z)
        reads = inside & counts[:, None, None]
        value = _read(weight, None, slot, reads, negative, 0, SIGN, SUM)
        # Not a number stays the largest from then on.
        larger = reads & ((value > largest) | (best < 0) | ((value != value) & (largest == largest)))
        largest = tl.where(larger, value, largest)
        best = tl.where(larger, slot, best)
        negated = tl.where(larger, negative, negated)
    return tl.where(largest == largest, best, -1), negated  # nothing equals not-a-number


@triton.jit(do_not_specialize=_NUMBERS)
def _backward(
    grad, weight, choices, ids, offsets, factors, keys, num_embeddings, filter, words, padding, n_values, n_rows,
    batch_size, total,
    MODE: tl.constexpr, HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of the array to total (m,), with atomics."""
    example, feature, exists, start, end, longest = _bags(
        tl.program_id(0), offsets, n_values, n_rows, batch_size, F, ROWS, MODE == "one"
    )
    block, within, component, inside = _tile(tl.program_id(1), D, STEP, BLOCKS, WIDTH)
    key, rows, end = _tables(keys, num_embeddings, feature, exists, start, end, choices, HASH, D, Z)
    place = ((example * F + feature) * D)[:, None, None] + component
    upstream = tl.load(grad + place, inside & exists[:, None, None], 0).to(SUM)
    if MODE == "max":
        slot, negative = _largest(
            weight, choices, ids, start, end, longest, key, rows, padding, filter, words, block, within, component,
            inside, HASH, SIGN, PADDED, SUM, D, Z, BLOCKS, WIDTH, ROWS,
        )  # fmt: skip
        value = tl.where(negative, -upstream, upstream) if SIGN else upstream
        tl.atomic_add(total + slot, value, slot >= 0, sem="relaxed")
    else:
        if MODE == "mean":
            count = _count(ids, start, end, longest, key, rows, padding, filter, words, PADDED)
            upstream = _divide(upstream, tl.maximum(count, 1).to(SUM)[:, None, None])
        for j in range(0, longest):
            id, counts = _take(ids, start + j, start + j < end, key, rows, padding, filter, words, PADDED)
            slot, negative = _slots(id, key, block, within, component, choices, HASH, D, Z)
            value = tl.where(negative, -upstream, upstream) if SIGN else upstream
            if factors is not None:
                value = value * tl.load(factors + start + j, counts, 0).to(SUM)[:, None, None]
            tl.atomic_add(total + slot, value, inside & counts[:, None, None], sem="relaxed")


@triton.jit(do_not_specialize=_NUMBERS)
def _weights_backward(
    grad, weight, choices, ids, offsets, keys, num_embeddings, filter, words, padding, n_values, n_rows, batch_size,
    result,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr,
    D: tl.constexpr, Z: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of the factors of ids (n,): the product of each row with the gradient of its bag."""
    example, feature, exists, start, end, longest = _bags(
        tl.program_id(0), offsets, n_values, n_rows, batch_size, F, ROWS, False
    )
    key, rows, end = _tables(keys, num_embeddings, feature, exists, start, end, choices, HASH, D, Z)
    for j in range(0, longest):
        id, counts = _take(ids, start + j, start + j < end, key, rows, padding, filter, words, PADDED)
        product = tl.zeros((ROWS,), SUM)
        for chunk in range(0, CHUNKS):
            block, within, component, inside = _tile(chunk, D, STEP, BLOCKS, WIDTH)
            slot, negative = _slots(id, key, block, within, component, choices, HASH, D, Z)
            reads = inside & counts[:, None, None]
            value = _read(weight, None, slot, reads, negative, 0, SIGN, SUM)
            place = ((example * F + feature) * D)[:, None, None] + component
            upstream = tl.load(grad + place, reads, 0).to(SUM)
            product += tl.sum(tl.sum(tl.where(reads, upstream * value, 0), 2), 1)
        tl.store(result + start + j, product.to(result.dtype.element_ty), counts)


@triton.jit(do_not_specialize=_NUMBERS)
def _list_pieces(
    weight, choices, ids, offsets, factors, keys, num_embeddings, filter, words, padding, n_values, n_rows,
    batch_size, slots, sources, lengths, multipliers,
    MODE: tl.constexpr, HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Lists what goes to the array: runs of its slots, each with the place in the gradient of what is added there.

    Of an id, one for each of its blocks; of "max", one for each component of a bag.
    """
    example, feature, exists, start, end, longest = _bags(
        tl.program_id(0), offsets, n_values, n_rows, batch_size, F, ROWS, MODE == "one"
    )
    key, rows, end = _tables(keys, num_embeddings, feature, exists, start, end, choices, HASH, D, Z)
    source = (example * F + feature) * D
    if MODE == "max":
        block, within, component, inside = _tile(tl.program_id(1), D, STEP, BLOCKS, WIDTH)
        slot, negative = _largest(
            weight, choices, ids, start, end, longest, key, rows, padding, filter, words, block, within, component,
            inside, HASH, SIGN, PADDED, SUM, D, Z, BLOCKS, WIDTH, ROWS,
        )  # fmt: skip
        place = source[:, None, None] + component
        found = slot >= 0
        tl.store(slots + place, slot.to(slots.dtype.element_ty), found)
        tl.store(sources + place, place.to(sources.dtype.element_ty), found)
        tl.store(lengths + place, tl.full(slot.shape, 1, tl.int32), found)
        multiplier = tl.full(slot.shape, 1, SUM)
        tl.store(multipliers + place, tl.where(negative, -multiplier, multiplier) if SIGN else multiplier, found)
    else:
        factor = tl.full((ROWS,), 1, SUM)
        if MODE == "mean":
            count = _count(ids, start, end, longest, key, rows, padding, filter, words, PADDED)
            factor = _divide(factor, tl.maximum(count, 1).to(SUM))
        for j in range(0, longest):
            id, counts = _take(ids, start + j, start + j < end, key, rows, padding, filter, words, PADDED)
            at = start + j
            if factors is not None:
                factor = tl.load(factors + at, counts, 0).to(SUM)
            if HASH == "span":
                first, hash_0, hash_1 = _span(id, key, D, Z)
                length = tl.minimum(D, Z - first)
                for k in tl.static_range(2):
                    hashed = hash_1 if k else hash_0
                    slot = tl.umulhi(hashed, choices.to(tl.uint64)).to(tl.int64)
                    _list_piece(
                        at * 2 + k, slot if k else slot + first, source + length if k else source,
                        D - length if k else length, tl.where((hashed & 1) != 0, -factor, factor) if SIGN else factor,
                        counts & (length < D) if k else counts, slots, sources, lengths, multipliers,
                    )  # fmt: skip
            elif HASH == "identity":
                _list_piece(
                    at, key + id * D, source, tl.full((ROWS,), D, tl.int64), factor, counts, slots, sources, lengths,
                    multipliers,
                )  # fmt: skip
            else:
                block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
                slot, negative = _offsets(id, key, block, choices, HASH)
                per_id: tl.constexpr = (D + STEP - 1) // STEP
                first = (block * STEP).to(tl.int64)[None, :]
                multiplier = tl.broadcast_to(factor[:, None], (ROWS, BLOCKS))
                _list_piece(
                    (at * per_id)[:, None] + block[None, :], slot, source[:, None] + first,
                    tl.minimum(STEP, tl.broadcast_to(D - first, (ROWS, BLOCKS))),
                    tl.where(negative, -multiplier, multiplier) if SIGN else multiplier,
                    counts[:, None] & (block < per_id)[None, :], slots, sources, lengths, multipliers,
                )  # fmt: skip


@triton.jit
def _list_piece(number, slot, source, length, multiplier, exists, slots, sources, lengths, multipliers):
    tl.store(slots + number, slot.to(slots.dtype.element_ty), exists)
    tl.store(sources + number, source.to(sources.dtype.element_ty), exists)
    tl.store(lengths + number, length.to(tl.int32), exists)
    tl.store(multipliers + number, multiplier, exists)


@triton.jit(do_not_specialize=["n", "size"])
def _sum_runs(
    slots, order, sources, lengths, multipliers, n, size, grad, sums, counts,
    SUM: tl.constexpr, RUN: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of RUN pieces in a row: if all go to the same slots, their sum; and how many pieces are left, 1 then."""
    run = tl.program_id(0).to(tl.int64)
    k = run * RUN + tl.arange(0, RUN)
    slot = tl.load(slots + k, k < n, -1)
    length = tl.load(lengths + tl.load(order + k, k < n, 0), k < n, 0)
    longest = tl.max(length)
    first, last = tl.min(slot), tl.max(slot)
    same = (first >= 0) & (first == last) & (last < size) & (tl.min(length) == longest)
    if tl.program_id(1) == 0:
        tl.store(counts + run, tl.where(same, 1, tl.minimum(RUN, n - run * RUN)).to(tl.int32))
    if same:
        within = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = within < longest
        value = tl.zeros((WIDTH,), SUM)
        for start in tl.static_range(0, RUN, PIECES):
            piece = tl.load(order + run * RUN + start + tl.arange(0, PIECES))
            place = tl.load(sources + piece).to(tl.int64)[:, None] + within[None, :]
            upstream = tl.load(grad + place, inside[None, :], 0).to(SUM)
            value += tl.sum(upstream * tl.load(multipliers + piece)[:, None], 0)
        tl.store(sums + run * STRIDE + within, value, inside)


@triton.jit(do_not_specialize=["n"])
def _move_pieces(
    slots, order, sources, lengths, multipliers, n, ends, to_slots, to_sources, to_lengths, to_multipliers,
    RUN: tl.constexpr,
):  # fmt: skip
    """Puts the pieces that are left of each run, sorted, behind those of the runs before."""
    run = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(ends + run - 1, run > 0, 0), tl.load(ends + run)
    turn = tl.arange(0, RUN)
    k = run * RUN + turn
    kept = (k < n) & (turn < end - begin)
    summed = (end - begin == 1) & (n - run * RUN > 1)
    piece = tl.load(order + k, kept, 0)
    source = tl.load(sources + piece, kept, 0)
    source = tl.where(summed, (-1 - run).to(source.dtype), source)
    tl.store(to_slots + begin + turn, tl.load(slots + k, kept, 0), kept)
    tl.store(to_sources + begin + turn, source, kept)
    tl.store(to_lengths + begin + turn, tl.load(lengths + piece, kept, 0), kept)
    tl.store(to_multipliers + begin + turn, tl.load(multipliers + piece, kept, 0), kept)


@triton.jit(do_not_specialize=["size"])
def _sum_pieces(
    slots, sources, lengths, multipliers, first, last, grad, sums, total, weight, state_0, state_1, size,
    rate, decay, option_0, option_1, option_2, option_3, option_4,
    RULE: tl.constexpr, SUM: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums the pieces first to last of a segment of WIDTH slots, into total, or for an optimizer's rule.

    Their sources are places in grad, or -1 - the number of a run.
    """
    segment = tl.program_id(0).to(tl.int64)
    slot = segment * WIDTH + tl.arange(0, WIDTH)
    begin, end = tl.load(first + segment), tl.load(last + segment)
    value = tl.zeros((WIDTH,), SUM)
    touched = tl.zeros((WIDTH,), tl.int32)
    for start in range(begin, end, PIECES):
        k = start + tl.arange(0, PIECES)
        exists = k < end
        source = tl.load(sources + k, exists, 0).to(tl.int64)
        place = slot[None, :] - tl.load(slots + k, exists, 0).to(tl.int64)[:, None]
        covered = (place >= 0) & (place < tl.load(lengths + k, exists, 0)[:, None])
        own = covered & (source >= 0)[:, None]
        upstream = tl.load(grad + source[:, None] + place, own, 0).to(SUM)
        upstream = tl.where(own, upstream * tl.load(multipliers + k, exists, 0)[:, None], 0)
        if tl.min(source) < 0:
            number = -1 - source
            upstream += tl.load(sums + number[:, None] * STRIDE + place, covered & (source < 0)[:, None], 0)
        value += tl.sum(upstream, 0)
        touched = tl.maximum(touched, tl.max(covered.to(tl.int32), 0))
    if RULE == "none":
        tl.store(total + slot, value.to(total.dtype.element_ty), slot < size)
    else:
        known = (slot < size) & (touched > 0)
        w = tl.load(weight + slot, known, 0).to(SUM)
        value = value + decay * w
        if state_0 is not None:
            s = tl.load(state_0 + slot, known, 0).to(SUM)
        if RULE == "sgd":
            if state_0 is not None:
                value = option_0 * s + value
                s = value
            w = w - rate * value
        elif RULE == "adagrad":
            s = s + value * value
            w = w - _divide(rate * value, tl.sqrt_rn(s) + option_0)
        else:
            v = tl.load(state_1 + slot, known, 0).to(SUM)
            s = option_0 * s + option_1 * value
            v = option_2 * v + option_3 * value * value
            w = w - _divide(rate * s, tl.sqrt_rn(v) + option_4)
            tl.store(state_1 + slot, v.to(state_1.dtype.element_ty), known)
        if state_0 is not None:
            tl.store(state_0 + slot, s.to(state_0.dtype.element_ty), known)
        tl.store(weight + slot, w.to(weight.dtype.element_ty), known)


# ---------------------------------------------------------------------------------------------------------------------
# Bodies of the operators


class _Rows:
    """The rows that a lookup or bags read: the arguments of the kernels."""

    def __init__(self, weight, ids, offsets, factors, mode, table_keys, num_embeddings, *layout):
        embedding_dim, block_size, hash, sign, padding_idx, filter = (*layout, None)[:6]
        if mode == "one":
            ops._check_lookup(weight, ids, table_keys, num_embeddings, *layout)
        else:
            ops._check_bags(weight, ids, offsets, factors, mode, table_keys, num_embeddings, *layout)
        features = len(table_keys)
        self.n_rows = ids.numel() if mode == "one" else len(offsets) - 1
        self.batch_size, self.n_values, self.mode = self.n_rows // features, ids.numel(), mode
        self.shape = self.batch_size, features, embedding_dim
        ids, offsets, factors, table_keys, num_embeddings, filter = (
            x if x is None else x.contiguous()
            for x in (ids.reshape(-1), offsets, factors, table_keys, num_embeddings, filter)
        )
        self.arguments = {
            "choices": weight.shape[0] - block_size + 1,
            "ids": ids,
            "offsets": offsets,
            "factors": factors,
            "keys": table_keys.long(),
            "num_embeddings": num_embeddings.long(),
            "filter": filter,
            "words": 0 if filter is None else len(filter),
            "padding": padding_idx or 0,
            "n_values": self.n_values,
            "n_rows": self.n_rows,
            "batch_size": self.batch_size,
        }
        for name, x in self.arguments.items():
            if isinstance(x, Tensor) and x.device != weight.device:
                raise ValueError(f"{name}: expected on {weight.device}, where the weights are, got {x.device}")
        hash = "span" if hash == "mix" and block_size > embedding_dim else hash
        step = min(block_size, embedding_dim) if hash in ("mix", "linear") else embedding_dim
        self.per_id = 2 if hash == "span" else triton.cdiv(embedding_dim, step)
        self.longest = step
        width = min(triton.next_power_of_2(step), _TILE)
        blocks = min(triton.next_power_of_2(triton.cdiv(embedding_dim, step)), _TILE // width)
        self.chunks = triton.cdiv(step, width) * triton.cdiv(triton.cdiv(embedding_dim, step), blocks)
        self.constants = {
            "HASH": hash,
            "SIGN": sign and hash != "identity",
            "PADDED": padding_idx is not None,
            "SUM": tl.float64 if weight.dtype == torch.float64 else tl.float32,
            "F": features,
            "D": embedding_dim,
            "Z": block_size,
            "STEP": step,
            "BLOCKS": blocks,
            "WIDTH": width,
            "ROWS": _TILE // (width * blocks),
        }

    def launch(self, kernel, weight, chunks=None, **more):
        if self.n_rows:
            arguments = self.arguments | self.constants | more | _OPTIONS
            grid = triton.cdiv(self.n_rows, arguments["ROWS"]), self.chunks if chunks is None else chunks
            with torch.cuda.device_of(weight):
                kernel[grid](weight=weight.contiguous(), **arguments)


def _of_lookup(weight, ids, *tables):
    return _Rows(weight, ids, None, None, "one", *tables)


def _write(weight, rows: _Rows, scale, out: Tensor) -> None:
    ops._check_out(out, rows.shape, ops._embedding_dtype(weight))
    shift = 0 if scale is None else ops._group_bits(weight, scale)
    scale = scale if scale is None else scale.contiguous()
    direct = out if out.stride(2) == 1 else out.new_empty(out.shape)
    unit = gcd(direct.stride(0), direct.stride(1), 16)
    strides = {"out_b": direct.stride(0) // unit, "out_f": direct.stride(1) // unit, "UNIT": unit}
    rows.launch(_forward, weight, scale=scale, SHIFT=shift, MODE=rows.mode, out=direct, **strides)
    if direct is not out:
        out.copy_(direct)


def _embeddings(weight, rows: _Rows, scale) -> Tensor:
    out = weight.new_empty(rows.shape, dtype=ops._embedding_dtype(weight))
    _write(weight, rows, scale, out)
    return out


def _lookup(weight, ids, *tables_and_scale):
    tables, scale = ops._split(tables_and_scale)
    ops._check_array(weight, scale)
    return _embeddings(weight, _of_lookup(weight, ids, *tables), scale)


def _bag(weight, values, offsets, factors, mode, *tables_and_scale):
    tables, scale = ops._split(tables_and_scale)
    ops._check_array(weight, scale)
    return _embeddings(weight, _Rows(weight, values, offsets, factors, mode, *tables), scale)


def _lookup_out(weight, ids, *rest):
    *tables, scale, out, filter = (*rest, None)[: ops._TABLE_ARGUMENTS + 3]
    ops._check_array(weight, scale)
    _write(weight, _of_lookup(weight, ids, *tables, filter), scale, out)


def _bag_out(weight, values, offsets, factors, mode, *rest):
    *tables, scale, out, filter = (*rest, None)[: ops._TABLE_ARGUMENTS + 3]
    ops._check_array(weight, scale)
    _write(weight, _Rows(weight, values, offsets, factors, mode, *tables, filter), scale, out)


def _check_grad(grad, weight, rows: _Rows) -> None:
    if grad.shape != rows.shape or grad.dtype != weight.dtype or grad.device != weight.device:
        raise ValueError(
            f"grad: expected {weight.dtype} {rows.shape} on {weight.device}, "
            f"got {grad.dtype} {tuple(grad.shape)} on {grad.device}"
        )


def _gradient(grad, weight, rows: _Rows):
    """The gradient of the array (m,)."""
    _check_grad(grad, weight, rows)
    if torch.are_deterministic_algorithms_enabled():
        total = torch.empty_like(weight, memory_format=torch.contiguous_format)
        _sum(weight, [(grad, rows)], total=total)
        return total
    total = torch.zeros(weight.shape, dtype=ops._accumulation_dtype(weight.dtype), device=weight.device)
    rows.launch(_backward, weight, grad=grad.contiguous(), total=total, MODE=rows.mode)
    return total.to(weight.dtype)


def _lookup_backward(grad, weight, ids, *tables):
    ops._check_array(weight)
    return _gradient(grad, weight, _of_lookup(weight, ids, *tables))


def _bag_backward(grad, weight, values, offsets, factors, mode, *tables):
    ops._check_array(weight)
    return _gradient(grad, weight, _Rows(weight, values, offsets, factors, mode, *tables))


def _bag_weights_backward(grad, weight, values, offsets, factors, mode, *tables):
    ops._check_array(weight)
    rows = _Rows(weight, values, offsets, factors, mode, *tables)
    _check_grad(grad, weight, rows)
    del rows.arguments["factors"]
    result = torch.zeros_like(factors, memory_format=torch.contiguous_format)
    rows.launch(_weights_backward, weight, 1, grad=grad.contiguous(), result=result, CHUNKS=rows.chunks)
    return result


def _pieces(weight, rows: _Rows, of_sources: torch.dtype) -> tuple[Tensor, ...]:
    """Slots, sources, lengths and multipliers of the pieces of a call; those that do not count lie behind the array."""
    count = rows.n_rows * rows.shape[2] if rows.mode == "max" else rows.n_values * rows.per_id
    size, device = weight.shape[0], weight.device
    slots = torch.full((count,), size, dtype=_index_dtype(size), device=device)
    sources = torch.zeros(count, dtype=of_sources, device=device)
    lengths = torch.zeros(count, dtype=torch.int32, device=device)
    multipliers = torch.zeros(count, dtype=ops._accumulation_dtype(weight.dtype), device=device)
    chunks, tile = None, {}
    if rows.mode != "max":
        # A block is one element here.
        blocks = min(triton.next_power_of_2(rows.per_id), _TILE)
        tile = {"WIDTH": 1, "BLOCKS": blocks, "ROWS": max(_TILE // blocks // 4, 1)}
        chunks = 1 if rows.constants["HASH"] in ("span", "identity") else triton.cdiv(rows.per_id, blocks)
    lists = {"slots": slots, "sources": sources, "lengths": lengths, "multipliers": multipliers}
    rows.launch(_list_pieces, weight, chunks, MODE=rows.mode, **lists, **tile)
    return slots, sources, lengths, multipliers


def _index_dtype(size: int) -> torch.dtype:
    """For places below size; half of what int32 holds, so that those next to it do not overflow."""
    return torch.int32 if size < 2**30 else torch.int64


def _sum(weight, calls, total=None, rule="none", state=(), options=(0.0,) * 7) -> None:
    """The gradients of calls, [(gradient, rows)]: written to total, or taken by the rule of an optimizer."""
    of_sources = _index_dtype(sum(grad.numel() for grad, _ in calls))
    lists = [_pieces(weight, rows, of_sources) for _, rows in calls]
    grad = calls[0][0].contiguous()
    if len(calls) > 1:
        grad = torch.cat([of_call.reshape(-1) for of_call, _ in calls])
        before = 0
        for (_, sources, _, _), (of_call, _) in zip(lists, calls):
            sources += before
            before += of_call.numel()
    pieces = [x[0] if len(calls) == 1 else torch.cat(x) for x in zip(*lists)]
    del lists
    longest = max(1 if rows.mode == "max" else rows.longest for _, rows in calls)
    size = weight.shape[0]
    width = min(max(triton.next_power_of_2(longest), 32), _TILE)
    constants = {"SUM": calls[0][1].constants["SUM"], "STRIDE": longest, "WIDTH": width}
    constants |= {"PIECES": _TILE_OF_PIECES // width} | _OPTIONS
    with torch.cuda.device_of(weight):
        slots, *others, sums = _sort(pieces, grad, size, longest, constants)
        starts = torch.arange(0, size, width, dtype=slots.dtype, device=slots.device)
        first = torch.searchsorted(slots, starts - longest + 1)
        last = torch.searchsorted(slots, (starts + width).clamp(max=size))
        state_0, state_1 = (*state, None, None)[:2]
        _sum_pieces[(len(starts),)](
            slots, *others, first, last, grad, sums, total, weight, state_0, state_1, size, *options, RULE=rule,
            **constants,
        )  # fmt: skip


def _sort(pieces: list[Tensor], grad, size: int, longest: int, constants: dict[str, Any]) -> tuple[Tensor, ...]:
    """Pieces in the order of their slots, and the sums of those that were _RUN in a row for the same slots.

    An id that half of the examples have would leave all of its pieces to the few programs of its slots.
    """
    slots, *others = pieces
    pieces.clear()
    n = len(slots)
    slots, order = slots.sort(stable=True)
    runs = triton.cdiv(n, _RUN)
    sums = torch.empty(runs, longest, dtype=others[2].dtype, device=slots.device)
    moved = slots.new_full((n,), size), *(x.new_zeros(n) for x in others)
    if n:
        counts = torch.empty(runs, dtype=torch.int32, device=slots.device)
        constants = constants | {"RUN": _RUN, "PIECES": min(constants["PIECES"], _RUN)}
        _sum_runs[runs, triton.cdiv(longest, constants["WIDTH"])](
            slots, order, *others, n, size, grad, sums, counts, **constants
        )
        _move_pieces[(runs,)](slots, order, *others, n, counts.cumsum(0), *moved, RUN=_RUN, **_OPTIONS)
    return *moved, sums


def _update(weight, state, rule, options, *lists):
    if weight.dtype == torch.float64 or not all(x.is_contiguous() for x in (weight, *state)):
        return ops.REFERENCE["update_"](weight, state, rule, options, *lists)  # numbers reach kernels as float32
    ops._check_array(weight)
    rate, decay, *options = options
    needed = {"sgd": int(options[0] != 0), "adagrad": 1, "adam": 2}.get(rule, 0)
    if len(state) < needed or any(x.shape != weight.shape or x.device != weight.device for x in state):
        raise ValueError(f"state: expected {needed} tensors like the weights {tuple(weight.shape)}, got {len(state)}")
    if rule == "sgd":
        state = state if options[0] else []
    elif rule == "adam":
        beta1, beta2, eps = options
        options = [beta1, 1 - beta1, beta2, 1 - beta2, eps]
    elif rule != "adagrad":
        raise ValueError(f"rule: expected one of sgd, adagrad, adam, got {rule!r}")
    calls = []
    for grad, mode, ids, offsets, factors, tables in ops._calls(*lists):
        rows = _Rows(weight, ids, offsets, factors, mode or "one", *tables)
        _check_grad(grad, weight, rows)
        calls.append((grad, rows))
    if any(rows.n_rows for _, rows in calls):
        options = (rate, decay, *options, *[0.0] * 5)[:7]
        _sum(weight, calls, rule=rule, state=state, options=options)


KERNELS: dict[str, Callable[..., Any]] = {
    "lookup": _lookup,
    "lookup_forward": _lookup,
    "lookup_out": _lookup_out,
    "lookup_backward": _lookup_backward,
    "bag": _bag,
    "bag_forward": _bag,
    "bag_out": _bag_out,
    "bag_backward": _bag_backward,
    "bag_weights_backward": _bag_weights_backward,
    "update_": _update,
}
