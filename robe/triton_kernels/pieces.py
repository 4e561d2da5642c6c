"""The gradient of the array, and its sums in a fixed order.

Atomics add in an order that changes from run to run. The fixed order takes a list of pieces: runs of slots, each with
the place in the gradient of the embeddings that is added there. Pieces are sorted by slot. Then the array is cut into
segments, and one program sums what falls into a segment, in the order of the list.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from robe.ops.layout import accumulation_dtype
from robe.triton_kernels.device import (
    count_ids,
    divide,
    find_largest,
    hash_blocks,
    hash_span,
    open_bags,
    open_lookup,
    take_ids,
    tile,
)
from robe.triton_kernels.launch import NUMBERS, OPTIONS, TILE, LaunchPlan

RUN_LENGTH = 64  # pieces for the same slots that are summed by a program of their own
_TILE_OF_PIECES = 2048  # elements of a program that sums pieces

# ---------------------------------------------------------------------------------------------------------------------
# The list of a call


class Pieces(NamedTuple):
    """Pieces (n,). Those that do not count lie behind the array.

    Attributes:
        slots: the first slot of each.
        sources: where its gradient begins, in that of the embeddings; or -1 - r for the sum of run r.
        lengths: how many slots it covers, int32.
        multipliers: factors of the gradient.
    """

    slots: Tensor
    sources: Tensor
    lengths: Tensor
    multipliers: Tensor


@triton.jit
def _list_piece(number, slot, source, length, multiplier, exists, slots, sources, lengths, multipliers):
    tl.store(slots + number, slot.to(slots.dtype.element_ty), exists)
    tl.store(sources + number, source.to(sources.dtype.element_ty), exists)
    tl.store(lengths + number, length.to(tl.int32), exists)
    tl.store(multipliers + number, multiplier, exists)


@triton.jit
def _list_embeddings(
    id, key, at, source, factor, counts, choices, slots, sources, lengths, multipliers,
    HASH: tl.constexpr, SIGN: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, STEP: tl.constexpr, BAGS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """List the pieces of ids (BAGS,) at places ``at``: one for each block that an embedding is read from."""
    if HASH == "span":
        first, hash_0, hash_1 = hash_span(id, key, D, Z)
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
        length = tl.full((BAGS,), D, tl.int64)
        _list_piece(at, key + id * D, source, length, factor, counts, slots, sources, lengths, multipliers)
    else:
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        slot, negative = hash_blocks(id, key, block, choices, HASH)
        per_id: tl.constexpr = (D + STEP - 1) // STEP
        first = (block * STEP).to(tl.int64)[None, :]
        multiplier = tl.broadcast_to(factor[:, None], (BAGS, BLOCKS))
        _list_piece(
            (at * per_id)[:, None] + block[None, :], slot, source[:, None] + first,
            tl.minimum(STEP, tl.broadcast_to(D - first, (BAGS, BLOCKS))),
            tl.where(negative, -multiplier, multiplier) if SIGN else multiplier,
            counts[:, None] & (block < per_id)[None, :], slots, sources, lengths, multipliers,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _list_lookup_kernel(
    weight, choices, ids, table_keys, num_embeddings, filter, words, padding, n_bags, slots, sources, lengths,
    multipliers,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, STEP: tl.constexpr, BAGS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """List the pieces of a lookup."""
    at, _, key, bound, reads = open_lookup(table_keys, num_embeddings, choices, n_bags, HASH, F, D, Z, BAGS)
    id, counts = take_ids(ids, at, reads, key, bound, padding, filter, words, PADDED)
    _list_embeddings(
        id, key, at, at * D, tl.full((BAGS,), 1, SUM), counts, choices, slots, sources, lengths, multipliers,
        HASH, SIGN, D, Z, STEP, BAGS, BLOCKS,
    )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _list_bags_kernel(
    weight, choices, ids, offsets, per_sample_weights, table_keys, num_embeddings, filter, words, padding, n_values,
    n_bags, batch_size, slots, sources, lengths, multipliers,
    POOLING: tl.constexpr,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, STEP: tl.constexpr, BAGS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """List the pieces of bags pooled by sum or mean."""
    example, feature, _, key, bound, start, end, longest = open_bags(
        offsets, table_keys, num_embeddings, choices, n_values, n_bags, batch_size, HASH, D, Z, BAGS
    )
    source = (example * F + feature) * D
    factor = tl.full((BAGS,), 1, SUM)
    if POOLING == "mean":
        count = count_ids(ids, start, end, longest, key, bound, padding, filter, words, PADDED)
        factor = divide(factor, tl.maximum(count, 1).to(SUM))
    for j in range(0, longest):
        at = start + j
        id, counts = take_ids(ids, at, at < end, key, bound, padding, filter, words, PADDED)
        if per_sample_weights is not None:
            factor = tl.load(per_sample_weights + at, counts, 0).to(SUM)
        _list_embeddings(
            id, key, at, source, factor, counts, choices, slots, sources, lengths, multipliers,
            HASH, SIGN, D, Z, STEP, BAGS, BLOCKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def _list_largest_kernel(
    weight, choices, ids, offsets, table_keys, num_embeddings, filter, words, padding, n_values, n_bags, batch_size,
    slots, sources, lengths, multipliers,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, STEP: tl.constexpr, BAGS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """List the pieces of bags pooled by max: one for each component of a bag."""
    example, feature, _, key, bound, start, end, longest = open_bags(
        offsets, table_keys, num_embeddings, choices, n_values, n_bags, batch_size, HASH, D, Z, BAGS
    )
    block, within, component, inside = tile(tl.program_id(1), D, STEP, BLOCKS, WIDTH)
    slot, negative = find_largest(
        weight, choices, ids, start, end, longest, key, bound, padding, filter, words, block, within, component,
        inside, HASH, SIGN, PADDED, SUM, D, Z, BLOCKS, WIDTH, BAGS,
    )  # fmt: skip
    place = ((example * F + feature) * D)[:, None, None] + component
    length, multiplier = tl.full(slot.shape, 1, tl.int32), tl.full(slot.shape, 1, SUM)
    if SIGN:
        multiplier = tl.where(negative, -multiplier, multiplier)
    _list_piece(place, slot, place, length, multiplier, slot >= 0, slots, sources, lengths, multipliers)


def _index_dtype(size: int) -> torch.dtype:
    """The dtype of places below size. int32 is for half of what it holds, so that those next to it do not overflow."""
    return torch.int32 if size < 2**30 else torch.int64


def _list_pieces(weight: Tensor, plan: LaunchPlan, source_dtype: torch.dtype) -> Pieces:
    count = plan.n_bags * plan.shape[2] if plan.pooling == "max" else plan.n_values * plan.pieces_per_id
    size, device = weight.shape[0], weight.device
    pieces = Pieces(
        slots=torch.full((count,), size, dtype=_index_dtype(size), device=device),
        sources=torch.zeros(count, dtype=source_dtype, device=device),
        lengths=torch.zeros(count, dtype=torch.int32, device=device),
        multipliers=torch.zeros(count, dtype=accumulation_dtype(weight.dtype), device=device),
    )
    if plan.pooling == "max":
        plan.launch(_list_largest_kernel, weight, **pieces._asdict())
        return pieces
    # One element of a program is a whole block here.
    blocks = min(triton.next_power_of_2(plan.pieces_per_id), TILE)
    tile = {"BAGS": max(TILE // blocks // 4, 1), "BLOCKS": blocks}
    chunks = 1 if plan.constants["HASH"] in ("span", "identity") else triton.cdiv(plan.pieces_per_id, blocks)
    if plan.pooling == "none":
        plan.launch(_list_lookup_kernel, weight, chunks=chunks, tile=tile, **pieces._asdict())
    else:
        bags = {"per_sample_weights": plan.per_sample_weights, "POOLING": plan.pooling}
        plan.launch(_list_bags_kernel, weight, chunks=chunks, tile=tile, **bags, **pieces._asdict())
    return pieces


def _list_calls(weight: Tensor, calls: Sequence[tuple[Tensor, LaunchPlan]]) -> tuple[Tensor, Pieces]:
    """The gradients of calls one behind the other, and the pieces of all."""
    source_dtype = _index_dtype(sum(grad.numel() for grad, _ in calls))
    lists = [_list_pieces(weight, plan, source_dtype) for _, plan in calls]
    if len(calls) == 1:
        return calls[0][0].contiguous(), lists[0]
    before = 0
    for pieces, (grad, _) in zip(lists, calls):
        pieces.sources.add_(before)
        before += grad.numel()
    return torch.cat([grad.reshape(-1) for grad, _ in calls]), Pieces(*map(torch.cat, zip(*lists)))


# ---------------------------------------------------------------------------------------------------------------------
# Sorting


@triton.jit(do_not_specialize=["n", "size"])
def _sum_runs_kernel(
    slots, order, sources, lengths, multipliers, n, size, grad, sums, counts,
    SUM: tl.constexpr, RUN: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum RUN pieces in a row if all go to the same slots, and write how many pieces are left, 1 then."""
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
def _move_pieces_kernel(
    slots, order, sources, lengths, multipliers, n, ends, to_slots, to_sources, to_lengths, to_multipliers,
    RUN: tl.constexpr,
):  # fmt: skip
    """Put the pieces that are left of each run, sorted, behind those of the runs before."""
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


class Segments(NamedTuple):
    """The pieces of calls in the order of their slots, ready to be summed segment by segment.

    Attributes:
        pieces: sorted; of those that were RUN_LENGTH in a row for the same slots one is left, with their sum.
        first, last: (segments,) the pieces that reach into each segment.
        grad: the gradients of the embeddings.
        sums: (runs, longest piece), the sums of runs.
        constants: for the kernels; WIDTH is the number of slots of a segment.
    """

    pieces: Pieces
    first: Tensor
    last: Tensor
    grad: Tensor
    sums: Tensor
    constants: dict[str, Any]

    def launch(self, kernel: Any, **more: Any) -> None:
        """Launch a kernel with one program for each segment."""
        _, first, last, grad, sums, constants = self
        arguments = {"first": first, "last": last, "grad": grad, "sums": sums}
        with torch.cuda.device_of(grad):
            kernel[(len(first),)](**self.pieces._asdict(), **arguments, **more, **constants)


def sort_pieces(weight: Tensor, calls: Sequence[tuple[Tensor, LaunchPlan]]) -> Segments:
    """The pieces of calls, each given with the gradient of its embeddings, in the order of their slots.

    An id that half of the examples have would leave all of its pieces to the few programs of its slots. So runs of
    pieces for the same slots are summed beforehand.
    """
    grad, (slots, *others) = _list_calls(weight, calls)
    longest = max(1 if plan.pooling == "max" else plan.longest_piece for _, plan in calls)
    n, size, device = len(slots), weight.shape[0], slots.device
    width = min(max(triton.next_power_of_2(longest), 32), TILE)
    pieces_at_once = _TILE_OF_PIECES // width
    constants = {"SUM": calls[0][1].constants["SUM"], "STRIDE": longest, "WIDTH": width} | OPTIONS
    with torch.cuda.device_of(weight):
        slots, order = slots.sort(stable=True)
        runs = triton.cdiv(n, RUN_LENGTH)
        sums = torch.empty(runs, longest, dtype=others[2].dtype, device=device)
        moved = Pieces(slots.new_full((n,), size), *(x.new_zeros(n) for x in others))
        if n:
            counts = torch.empty(runs, dtype=torch.int32, device=device)
            run = {"RUN": RUN_LENGTH, "PIECES": min(pieces_at_once, RUN_LENGTH)}
            _sum_runs_kernel[runs, triton.cdiv(longest, width)](
                slots, order, *others, n, size, grad, sums, counts, **run, **constants
            )
            _move_pieces_kernel[(runs,)](slots, order, *others, n, counts.cumsum(0), *moved, RUN=RUN_LENGTH, **OPTIONS)
        starts = torch.arange(0, size, width, dtype=slots.dtype, device=device)
        first = torch.searchsorted(moved.slots, starts - longest + 1)
        last = torch.searchsorted(moved.slots, (starts + width).clamp(max=size))
    return Segments(moved, first, last, grad, sums, constants | {"PIECES": pieces_at_once})


# ---------------------------------------------------------------------------------------------------------------------
# Sums


@triton.jit
def sum_segment(
    slots, sources, lengths, multipliers, first, last, grad, sums,
    SUM: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the slots (WIDTH,) of a program's segment, the sums of the pieces there, and where there are any."""
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
            run = -1 - source
            upstream += tl.load(sums + run[:, None] * STRIDE + place, covered & (source < 0)[:, None], 0)
        value += tl.sum(upstream, 0)
        touched = tl.maximum(touched, tl.max(covered.to(tl.int32), 0))
    return slot, value, touched > 0


@triton.jit(do_not_specialize=["size"])
def _sum_pieces_kernel(
    slots, sources, lengths, multipliers, first, last, grad, sums, total, size,
    SUM: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the array to total (m,)."""
    slot, value, _ = sum_segment(
        slots, sources, lengths, multipliers, first, last, grad, sums, SUM, STRIDE, PIECES, WIDTH
    )
    tl.store(total + slot, value.to(total.dtype.element_ty), slot < size)


def array_gradient(grad: Tensor, weight: Tensor, plan: LaunchPlan, kernel: Any, **more: Any) -> Tensor:
    """The gradient (m,) of the array: in a fixed order if torch asks for one, else by a kernel that adds with atomics.

    Raises:
        ValueError: the gradient of the embeddings is of another shape, dtype or device than they are.
    """
    plan.check_grad(grad, weight)
    if torch.are_deterministic_algorithms_enabled():
        total = torch.empty_like(weight, memory_format=torch.contiguous_format)
        sort_pieces(weight, [(grad, plan)]).launch(_sum_pieces_kernel, total=total, size=weight.shape[0])
        return total
    total = torch.zeros(weight.shape, dtype=accumulation_dtype(weight.dtype), device=weight.device)
    plan.launch(kernel, weight, grad=grad.contiguous(), total=total, **more)
    return total.to(weight.dtype)
