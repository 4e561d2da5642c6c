"""Bags of ids per feature, pooled: forward, and backward to the array and to per_sample_weights."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robe.ops.layout import check_array, take_out, unpack_bag, unpack_bag_backward
from robe.triton_kernels.device import (
    count_ids,
    divide,
    find_largest,
    find_slots,
    open_bags,
    read_slots,
    take_ids,
    tile,
)
from robe.triton_kernels.launch import NUMBERS, LaunchPlan
from robe.triton_kernels.pieces import array_gradient

# ---------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit(do_not_specialize=NUMBERS)
def _bag_kernel(
    weight, scale, choices, ids, offsets, per_sample_weights, table_keys, num_embeddings, filter, words, padding,
    n_values, n_bags, batch_size, out, out_b, out_f,
    UNIT: tl.constexpr, SHIFT: tl.constexpr, POOLING: tl.constexpr,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, STEP: tl.constexpr, BAGS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the pooled embeddings of bags. Strides of out are in UNITs, so that alignment shows."""
    example, feature, exists, key, bound, start, end, longest = open_bags(
        offsets, table_keys, num_embeddings, choices, n_values, n_bags, batch_size, HASH, D, Z, BAGS
    )
    block, within, component, inside = tile(tl.program_id(1), D, STEP, BLOCKS, WIDTH)
    result = tl.zeros((BAGS, BLOCKS, WIDTH), SUM)
    if POOLING == "max":
        result = result - float("inf")
    count = tl.zeros((BAGS,), tl.int32)
    for j in range(0, longest):
        id, counts = take_ids(ids, start + j, start + j < end, key, bound, padding, filter, words, PADDED)
        slot, negative = find_slots(id, key, block, within, component, choices, HASH, D, Z)
        reads = inside & counts[:, None, None]
        value = read_slots(weight, scale, slot, reads, negative, SHIFT, SIGN, SUM)
        if per_sample_weights is not None:
            value = value * tl.load(per_sample_weights + start + j, counts, 0).to(SUM)[:, None, None]
        if POOLING == "max":
            larger = tl.maximum(result, value, propagate_nan=tl.PropagateNan.ALL)
            result = tl.where(reads, larger, result)
        else:
            result += tl.where(reads, value, 0)
        count += counts.to(tl.int32)
    if POOLING == "mean":
        result = divide(result, tl.maximum(count, 1).to(SUM)[:, None, None])
    if POOLING == "max":
        result = tl.where((count > 0)[:, None, None], result, 0)
    place = ((example * out_b + feature * out_f) * UNIT)[:, None, None] + component
    tl.store(out + place, result.to(out.dtype.element_ty), inside & exists[:, None, None])


def _bag(weight: Tensor, *arguments: Any) -> Tensor:
    call = unpack_bag(arguments)
    check_array(weight, call.scale)
    plan = LaunchPlan(weight, call)
    return plan.embeddings(_bag_kernel, weight, per_sample_weights=plan.per_sample_weights, POOLING=plan.pooling)


def _bag_out(weight: Tensor, *arguments: Any) -> None:
    arguments, out = take_out(arguments, 4)
    call = unpack_bag(arguments)
    check_array(weight, call.scale)
    plan = LaunchPlan(weight, call)
    plan.write(_bag_kernel, weight, out, per_sample_weights=plan.per_sample_weights, POOLING=plan.pooling)


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit(do_not_specialize=NUMBERS)
def _bag_backward_kernel(
    grad, weight, choices, ids, offsets, per_sample_weights, table_keys, num_embeddings, filter, words, padding,
    n_values, n_bags, batch_size, total,
    POOLING: tl.constexpr,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, STEP: tl.constexpr, BAGS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the gradient of the array to total (m,), with atomics."""
    example, feature, exists, key, bound, start, end, longest = open_bags(
        offsets, table_keys, num_embeddings, choices, n_values, n_bags, batch_size, HASH, D, Z, BAGS
    )
    block, within, component, inside = tile(tl.program_id(1), D, STEP, BLOCKS, WIDTH)
    place = ((example * F + feature) * D)[:, None, None] + component
    upstream = tl.load(grad + place, inside & exists[:, None, None], 0).to(SUM)
    if POOLING == "max":
        slot, negative = find_largest(
            weight, choices, ids, start, end, longest, key, bound, padding, filter, words, block, within, component,
            inside, HASH, SIGN, PADDED, SUM, D, Z, BLOCKS, WIDTH, BAGS,
        )  # fmt: skip
        value = tl.where(negative, -upstream, upstream) if SIGN else upstream
        tl.atomic_add(total + slot, value, slot >= 0, sem="relaxed")
    else:
        if POOLING == "mean":
            count = count_ids(ids, start, end, longest, key, bound, padding, filter, words, PADDED)
            upstream = divide(upstream, tl.maximum(count, 1).to(SUM)[:, None, None])
        for j in range(0, longest):
            id, counts = take_ids(ids, start + j, start + j < end, key, bound, padding, filter, words, PADDED)
            slot, negative = find_slots(id, key, block, within, component, choices, HASH, D, Z)
            value = tl.where(negative, -upstream, upstream) if SIGN else upstream
            if per_sample_weights is not None:
                value = value * tl.load(per_sample_weights + start + j, counts, 0).to(SUM)[:, None, None]
            tl.atomic_add(total + slot, value, inside & counts[:, None, None], sem="relaxed")


def _bag_backward(grad: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    check_array(weight)
    plan = LaunchPlan(weight, unpack_bag_backward(arguments))
    bags = {"per_sample_weights": plan.per_sample_weights, "POOLING": plan.pooling}
    return array_gradient(grad, weight, plan, _bag_backward_kernel, **bags)


# ---------------------------------------------------------------------------------------------------------------------
# Backward to per_sample_weights


@triton.jit(do_not_specialize=NUMBERS)
def _bag_weights_backward_kernel(
    grad, weight, choices, ids, offsets, table_keys, num_embeddings, filter, words, padding, n_values, n_bags,
    batch_size, result,
    HASH: tl.constexpr, SIGN: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    Z: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, BAGS: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Write for each id the product of its embedding with the gradient of its bag."""
    example, feature, _, key, bound, start, end, longest = open_bags(
        offsets, table_keys, num_embeddings, choices, n_values, n_bags, batch_size, HASH, D, Z, BAGS
    )
    for j in range(0, longest):
        id, counts = take_ids(ids, start + j, start + j < end, key, bound, padding, filter, words, PADDED)
        product = tl.zeros((BAGS,), SUM)
        for chunk in range(0, CHUNKS):
            block, within, component, inside = tile(chunk, D, STEP, BLOCKS, WIDTH)
            slot, negative = find_slots(id, key, block, within, component, choices, HASH, D, Z)
            reads = inside & counts[:, None, None]
            value = read_slots(weight, None, slot, reads, negative, 0, SIGN, SUM)
            place = ((example * F + feature) * D)[:, None, None] + component
            upstream = tl.load(grad + place, reads, 0).to(SUM)
            product += tl.sum(tl.sum(tl.where(reads, upstream * value, 0), 2), 1)
        tl.store(result + start + j, product.to(result.dtype.element_ty), counts)


def _bag_weights_backward(grad: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    check_array(weight)
    plan = LaunchPlan(weight, unpack_bag_backward(arguments))
    if plan.per_sample_weights is None:
        raise ValueError("per_sample_weights: expected a tensor, got None")
    plan.check_grad(grad, weight)
    result = torch.zeros_like(plan.per_sample_weights)
    plan.launch(
        _bag_weights_backward_kernel, weight, chunks=1, grad=grad.contiguous(), result=result, CHUNKS=plan.chunks
    )
    return result


BODIES: dict[str, Callable[..., Any]] = {
    "bag": _bag,
    "bag_forward": _bag,
    "bag_out": _bag_out,
    "bag_backward": _bag_backward,
    "bag_weights_backward": _bag_weights_backward,
}
