"""Lookups: one id per feature, forward and backward."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from robe.ops.layout import check_array, take_out, unpack_lookup, unpack_lookup_backward
from robe.triton_kernels.device import find_slots, open_lookup, read_slots, take_ids, tile
from robe.triton_kernels.launch import NUMBERS, LaunchPlan
from robe.triton_kernels.pieces import array_gradient

# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit(do_not_specialize=NUMBERS)
def _lookup_kernel(
    weight, scale, choices, ids, table_keys, num_embeddings, filter, words, padding, n_bags, out, out_b, out_f,
    UNIT: tl.constexpr, SHIFT: tl.constexpr,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, STEP: tl.constexpr, BAGS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the embeddings of ids. Strides of out are in UNITs, so that alignment shows."""
    at, exists, key, bound, reads = open_lookup(table_keys, num_embeddings, choices, n_bags, HASH, F, D, Z, BAGS)
    block, within, component, inside = tile(tl.program_id(1), D, STEP, BLOCKS, WIDTH)
    id, counts = take_ids(ids, at, reads, key, bound, padding, filter, words, PADDED)
    slot, negative = find_slots(id, key, block, within, component, choices, HASH, D, Z)
    value = read_slots(weight, scale, slot, inside & counts[:, None, None], negative, SHIFT, SIGN, SUM)
    place = ((at // F * out_b + at % F * out_f) * UNIT)[:, None, None] + component
    tl.store(out + place, value.to(out.dtype.element_ty), inside & exists[:, None, None])


def _lookup(weight: Tensor, *arguments: Any) -> Tensor:
    call = unpack_lookup(arguments)
    check_array(weight, call.scale)
    return LaunchPlan(weight, call).embeddings(_lookup_kernel, weight)


def _lookup_out(weight: Tensor, *arguments: Any) -> None:
    arguments, out = take_out(arguments, 1)
    call = unpack_lookup(arguments)
    check_array(weight, call.scale)
    LaunchPlan(weight, call).write(_lookup_kernel, weight, out)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit(do_not_specialize=NUMBERS)
def _lookup_backward_kernel(
    grad, weight, choices, ids, table_keys, num_embeddings, filter, words, padding, n_bags, total,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, STEP: tl.constexpr, BAGS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the gradient of the array to total (m,), with atomics."""
    at, exists, key, bound, reads = open_lookup(table_keys, num_embeddings, choices, n_bags, HASH, F, D, Z, BAGS)
    block, within, component, inside = tile(tl.program_id(1), D, STEP, BLOCKS, WIDTH)
    upstream = tl.load(grad + (at * D)[:, None, None] + component, inside & exists[:, None, None], 0).to(SUM)
    id, counts = take_ids(ids, at, reads, key, bound, padding, filter, words, PADDED)
    slot, negative = find_slots(id, key, block, within, component, choices, HASH, D, Z)
    value = tl.where(negative, -upstream, upstream) if SIGN else upstream
    tl.atomic_add(total + slot, value, inside & counts[:, None, None], sem="relaxed")


def _lookup_backward(grad: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    check_array(weight)
    plan = LaunchPlan(weight, unpack_lookup_backward(arguments))
    return array_gradient(grad, weight, plan, _lookup_backward_kernel)


BODIES: dict[str, Callable[..., Any]] = {
    "lookup": _lookup,
    "lookup_forward": _lookup,
    "lookup_out": _lookup_out,
    "lookup_backward": _lookup_backward,
}
