"""Lookups and bags in tensor operators that every exporter knows, so that a model with ROBE layers runs anywhere.

torch.export's ``run_decompositions`` finds them in torch's table of decompositions, and so does ``torch.onnx.export``.
They compute what the bodies in robe/ops/reference.py compute, with the one definition of the hash, but no shape depends
on values: ids that don't count go into a bag of their own, which is dropped, and an id outside its table reads behind
the array, which ends in an error when the exported model runs, as with torch's own tables.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.overrides import TorchFunctionMode

import robe.ops.schema  # noqa: F401  (registers the operators)
from robe.hashing import TRAITS, signed, slots
from robe.ops.layout import Call, accumulation_dtype, embedding_dtype, group_bits, unpack_bag, unpack_lookup
from robe.ops.reference import pool
from robe.sketches import SHARED_ID, admits


def lookup(weight: Tensor, *arguments: Any) -> Tensor:
    """Compute torch.ops.robe.lookup."""
    call = unpack_lookup(arguments)
    ids, padding_idx = call.ids.long(), call.tables.padding_idx
    kept = None if padding_idx is None else ids != padding_idx
    embeddings = _read(weight, ids, call.tables.table_keys, call.tables.num_embeddings, kept, call)
    if kept is not None:
        embeddings = torch.where(kept.unsqueeze(-1), embeddings, torch.zeros_like(embeddings))
    return embeddings


def bag(weight: Tensor, *arguments: Any) -> Tensor:
    """Compute torch.ops.robe.bag."""
    call = unpack_bag(arguments)
    bags, tables = call.bags, call.tables
    assert bags is not None
    ids, offsets = call.ids.long(), bags.offsets.long()
    features, count = tables.table_keys.shape[0], offsets.shape[0] - 1
    # The bag of an id is the number of bags that end before it; those behind the last one end in bag ``count``.
    ends = torch.zeros_like(torch.cat([ids, offsets[:1]])).scatter_add(0, offsets[1:], torch.ones_like(offsets[1:]))
    bag = ends.cumsum(0)[:-1]
    kept = bag < count
    if tables.padding_idx is not None:
        kept = kept & (ids != tables.padding_idx)
    if features == 1:
        keys, bounds = tables.table_keys, tables.num_embeddings
    else:
        feature = (bag * features // count).clamp(max=features - 1)
        keys, bounds = tables.table_keys[feature], tables.num_embeddings[feature]
    embeddings = _read(weight, ids, keys, bounds, kept, call)
    dtype = embedding_dtype(weight)
    embeddings = embeddings.to(accumulation_dtype(dtype))
    pooled = pool(embeddings, bag.where(kept, count), count + 1, bags.per_sample_weights, bags.pooling)[:-1].to(dtype)
    return pooled.view(features, -1, tables.embedding_dim).transpose(0, 1)


def _read(weight: Tensor, ids: Tensor, keys: Tensor, bounds: Tensor, kept: Tensor | None, call: Call) -> Tensor:
    """The embeddings of ids, of shape ids.shape + (D,); anything where an id is not kept."""
    tables, size = call.tables, weight.shape[0]
    outside = ((ids < 0) | (ids >= bounds)) & (bounds > 0)
    if kept is not None:
        ids, outside = ids.where(kept, 0), outside & kept
    if call.filter is not None:
        ids = ids.where(admits(call.filter, ids, keys), SHARED_ID)
    if TRAITS[tables.hash].is_exact:  # then ids outside could lie behind what int64 holds
        ids = ids.where(outside.logical_not(), 0)
    slot, sign = slots(
        ids,
        keys,
        size=size,
        embedding_dim=tables.embedding_dim,
        block_size=tables.block_size,
        hash=tables.hash,
        sign=tables.sign,
    )
    slot = slot.masked_fill(outside.unsqueeze(-1), size)
    embeddings = weight.index_select(0, slot.flatten()).view(slot.shape)
    if call.scale is not None:
        group = slot // (1 << group_bits(weight, call.scale))
        embeddings = embeddings * call.scale.index_select(0, group.flatten()).view(slot.shape)
    return embeddings if sign is None else embeddings * sign


DECOMPOSITIONS = {"lookup": lookup, "lookup_forward": lookup, "bag": bag, "bag_forward": bag}
for _name, _body in DECOMPOSITIONS.items():
    register_decomposition(getattr(torch.ops.robe, _name).default)(_body)


# ---------------------------------------------------------------------------------------------------------------------
# torch.onnx.export(..., dynamo=False)


def for_torchscript(name: str, weight: Tensor, *arguments: Any) -> Tensor:
    """Compute an operator by its decomposition, in what the exporter of TorchScript can write; it has no table."""
    with _ArithmeticForBits(), warnings.catch_warnings():
        # The sizes of array and filter become constants, and those of the batch stay variables.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return DECOMPOSITIONS[name](weight, *arguments)


class _ArithmeticForBits(TorchFunctionMode):
    """Computes shifts, "or" and "xor" of int64 by sums, products and quotients modulo 2**64.

    That exporter has no "or" and "xor" of integers, writes shifts as divisions and powers of float32, and rounds
    quotients towards 0. Of bits it has "and", from opset 18 on.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rewrite = _ARITHMETIC.get(func)
        if rewrite and isinstance(args[0], Tensor) and args[0].dtype == torch.int64:
            return rewrite(*args)
        return func(*args, **(kwargs or {}))


def _xor(x: Tensor, y: Tensor) -> Tensor:
    return x + y - 2 * (x & y)


def _or(x: Tensor, y: Tensor) -> Tensor:
    return x + y - (x & y)


def _shift_right(x: Tensor, count: int) -> Tensor:
    return _floor_divide(x, 1 << count)


def _floor_divide(x: Tensor, y: Any) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")  # the other exporter writes this as a division of float32


def _shift_left(x: Tensor, count: Tensor | int) -> Tensor:
    if isinstance(count, int):
        return x * signed(1 << count)
    powers = torch.tensor([signed(1 << k) for k in range(64)], device=x.device)
    return x * powers.index_select(0, count.flatten()).view(count.shape)


_ARITHMETIC: dict[Any, Callable[..., Tensor]] = {
    Tensor.__xor__: _xor,
    Tensor.__or__: _or,
    Tensor.__floordiv__: _floor_divide,
    Tensor.__rshift__: _shift_right,
    Tensor.__lshift__: _shift_left,
    torch.bitwise_left_shift: _shift_left,
}
