"""The arguments that every operator call carries: named, packed, unpacked and checked.

The operators of ``torch.ops.robe`` take flat lists of arguments, since that is what torch's dispatcher passes on. Here
these lists become NamedTuples, in the order of the schemas (robe/ops/schema.py), and one function checks each kind.
Layers, optimizers, reference bodies and Triton kernels go through this module, so a new argument has one place.
"""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robe.hashing import HASHES, TRAITS

POOLINGS = ("sum", "mean", "max")
RULES = ("sgd", "adagrad", "adam")
LARGEST_DIM = 2**31 - 1
LARGEST_FILTER = 2**32 - 1  # words


class Tables(NamedTuple):
    """The virtual tables of a call and their layout in the array.

    Attributes:
        table_keys: (F,) int64, the hash key of each feature's table (``hashing.slots``).
        num_embeddings: (F,) int64, the bound of each feature's ids; 0: any id is legal.
        embedding_dim: D.
        block_size: Z.
        hash: one of ``hashing.HASHES``.
        sign: whether blocks have a hashed sign.
        padding_idx: the id that reads zeros, or that bags leave out.
    """

    table_keys: Tensor
    num_embeddings: Tensor
    embedding_dim: int
    block_size: int
    hash: str
    sign: bool
    padding_idx: int | None


class Bags(NamedTuple):
    """The bags that a call's ids form.

    Attributes:
        offsets: (F * B + 1,): bag k = f * B + b of feature f and example b is ids[offsets[k] : offsets[k + 1]].
        per_sample_weights: (n,) factors of the embeddings, or None.
        pooling: one of ``POOLINGS``.
    """

    offsets: Tensor
    per_sample_weights: Tensor | None
    pooling: str


class Call(NamedTuple):
    """One call of ``lookup`` or ``bag``, without the array.

    Attributes:
        ids: (B, F) of a lookup; (n,), features major, of bags.
        bags: None for a lookup.
        tables: the virtual tables.
        filter: (W,) int64 of an admission, or None.
        scale: float32, of an int8 array; None of others, and in every backward.
    """

    ids: Tensor
    bags: Bags | None
    tables: Tables
    filter: Tensor | None = None
    scale: Tensor | None = None

    def pack(self) -> tuple[Any, ...]:
        """The arguments of the operators from the ids to padding_idx, in the order of the schemas."""
        if self.bags is None:
            return self.ids, *self.tables
        return self.ids, *self.bags, *self.tables

    def check(self, weight: Tensor) -> None:
        """Check types and shapes of everything but the array.

        Raises:
            ValueError: an argument does not fit the schema or another argument.
        """
        if self.bags is None:
            check_lookup(weight, self.ids, self.tables, self.filter)
        else:
            check_bags(weight, self.ids, self.bags, self.tables, self.filter)


def _tables_and_rest(arguments: Sequence[Any], count: int) -> tuple[Any, ...]:
    """The tables and ``count`` arguments after them; torch drops trailing arguments that have their default, None."""
    size = len(Tables._fields)
    rest = (*arguments[size:], *[None] * count)[:count]
    return Tables(*arguments[:size]), *rest


def unpack_lookup(arguments: Sequence[Any]) -> Call:
    """A forward call from ids, the tables, scale and filter."""
    ids, *others = arguments
    tables, scale, filter = _tables_and_rest(others, 2)
    return Call(ids, None, tables, filter, scale)


def unpack_bag(arguments: Sequence[Any]) -> Call:
    """A forward call from values, offsets, per_sample_weights, pooling, the tables, scale and filter."""
    ids, offsets, per_sample_weights, pooling, *others = arguments
    tables, scale, filter = _tables_and_rest(others, 2)
    return Call(ids, Bags(offsets, per_sample_weights, pooling), tables, filter, scale)


def unpack_lookup_backward(arguments: Sequence[Any]) -> Call:
    """A backward call from ids, the tables and filter."""
    ids, *others = arguments
    tables, filter = _tables_and_rest(others, 1)
    return Call(ids, None, tables, filter)


def unpack_bag_backward(arguments: Sequence[Any]) -> Call:
    """A backward call from values, offsets, per_sample_weights, pooling, the tables and filter."""
    ids, offsets, per_sample_weights, pooling, *others = arguments
    tables, filter = _tables_and_rest(others, 1)
    return Call(ids, Bags(offsets, per_sample_weights, pooling), tables, filter)


def take_out(arguments: Sequence[Any], ids: int) -> tuple[tuple[Any, ...], Tensor]:
    """The arguments of an operator that writes into a tensor, without that tensor; and the tensor.

    Args:
        arguments: from the ids on: ``ids`` arguments, the tables, scale, out, filter.
        ids: 1 of a lookup; 4 of a bag.
    """
    place = ids + len(Tables._fields) + 1
    return (*arguments[:place], *arguments[place + 1 :]), arguments[place]


# ---------------------------------------------------------------------------------------------------------------------
# Calls of update_


class LayoutCode(NamedTuple):
    """The options of a call as the integers that ``update_`` takes.

    Attributes:
        pooling: 0: a lookup; else 1 + its place in ``POOLINGS``.
        embedding_dim, block_size: as in Tables.
        hash: its place in ``hashing.HASHES``.
        sign, is_padded: 0 or 1.
        padding_idx: 0 without one.
    """

    pooling: int
    embedding_dim: int
    block_size: int
    hash: int
    sign: int
    is_padded: int
    padding_idx: int


class UpdateLists(NamedTuple):
    """The calls whose gradients ``update_`` applies, in the order of its schema: an entry per call in each list.

    Where a call has no offsets, per_sample_weights or filter, its entry is an empty tensor. ``layouts`` holds a
    LayoutCode per call, one behind the other.
    """

    grads: list[Tensor]
    ids: list[Tensor]
    offsets: list[Tensor]
    per_sample_weights: list[Tensor]
    table_keys: list[Tensor]
    num_embeddings: list[Tensor]
    filters: list[Tensor]
    layouts: list[int]

    @classmethod
    def pack(cls, calls: Sequence[tuple[Tensor, Call]]) -> "UpdateLists":
        """The lists of some calls and the gradients (B, F, D) of their embeddings."""
        lists = cls([], [], [], [], [], [], [], [])
        for grad, (ids, bags, tables, filter, _) in calls:
            none = grad.new_empty(0)
            lists.grads.append(grad)
            lists.ids.append(ids)
            lists.offsets.append(none if bags is None else bags.offsets)
            factors = None if bags is None else bags.per_sample_weights
            lists.per_sample_weights.append(none if factors is None else factors)
            lists.table_keys.append(tables.table_keys)
            lists.num_embeddings.append(tables.num_embeddings)
            lists.filters.append(none.long() if filter is None else filter)
            lists.layouts.extend(
                LayoutCode(
                    pooling=0 if bags is None else 1 + POOLINGS.index(bags.pooling),
                    embedding_dim=tables.embedding_dim,
                    block_size=tables.block_size,
                    hash=HASHES.index(tables.hash),
                    sign=int(tables.sign),
                    is_padded=int(tables.padding_idx is not None),
                    padding_idx=tables.padding_idx or 0,
                )
            )
        return lists

    def unpack(self) -> Iterator[tuple[Tensor, Call]]:
        """Each call with its gradient.

        Raises:
            ValueError: lists of different lengths, or a layout that means nothing.
        """
        size = len(LayoutCode._fields)
        for name, entries in zip(self._fields[1:-1], self[1:-1]):
            if len(entries) != len(self.grads):
                raise ValueError(f"{name}: expected one for each gradient, {len(self.grads)}, got {len(entries)}")
        if len(self.layouts) != size * len(self.grads):
            raise ValueError(
                f"layouts: expected {size} entries for each gradient, {size * len(self.grads)}, got {len(self.layouts)}"
            )
        for k, grad in enumerate(self.grads):
            code = LayoutCode(*self.layouts[size * k : size * (k + 1)])
            if not 0 <= code.pooling <= len(POOLINGS) or not 0 <= code.hash < len(HASHES):
                raise ValueError("layouts: unknown pooling or hash")
            tables = Tables(
                table_keys=self.table_keys[k],
                num_embeddings=self.num_embeddings[k],
                embedding_dim=code.embedding_dim,
                block_size=code.block_size,
                hash=HASHES[code.hash],
                sign=bool(code.sign),
                padding_idx=code.padding_idx if code.is_padded else None,
            )
            bags = None
            if code.pooling:
                pooling = POOLINGS[code.pooling - 1]
                factors = self.per_sample_weights[k]
                bags = Bags(self.offsets[k], factors if pooling == "sum" and len(factors) else None, pooling)
            yield grad, Call(self.ids[k], bags, tables, self.filters[k] if self.filters[k].numel() else None)


# ---------------------------------------------------------------------------------------------------------------------
# Types


def embedding_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the embeddings that an array gives: its own, or float32 for int8."""
    return torch.float32 if weight.dtype == torch.int8 else weight.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32 for half precision, as in torch's own kernels."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def group_bits(weight: Tensor, scale: Tensor) -> int:
    """log2 of the number of int8 weights that share a scale: the smallest with which the scales cover the array."""
    bits = 0
    while scale.shape[0] << bits < weight.shape[0]:
        bits += 1
    return bits


# ---------------------------------------------------------------------------------------------------------------------
# Checks of types and shapes. Fakes and bodies run the same ones; all raise ValueError.


def require_tensors(**given: Any) -> None:
    """Check that arguments are tensors: torch's dispatcher takes None for one."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {value!r}")


def check_array(weight: Tensor, scale: Tensor | None = None) -> None:
    """Check the array, and its scale where it is int8."""
    require_tensors(weight=weight)
    if weight.dim() != 1 or not (weight.is_floating_point() or weight.dtype == torch.int8):
        raise ValueError(f"weight: expected a floating-point vector (m,), got {weight.dtype} {tuple(weight.shape)}")
    if (scale is not None) != (weight.dtype == torch.int8):
        raise ValueError("scale: expected with an int8 weight, which has no gradient, and only with one")
    if scale is not None and (scale.dim() != 1 or scale.dtype != torch.float32 or scale.shape[0] == 0):
        raise ValueError(
            f"scale: expected a float32 vector, one entry per group of weights, got {scale.dtype} {tuple(scale.shape)}"
        )


def check_tables(weight: Tensor, tables: Tables, filter: Tensor | None = None) -> None:
    """Check the tables against the array, and the filter."""
    table_keys, num_embeddings, embedding_dim, block_size, hash, _, _ = tables
    if table_keys.dim() != 1 or table_keys.shape != num_embeddings.shape:
        raise ValueError(
            "table_keys and num_embeddings: expected one entry per feature in each, got shapes "
            f"{tuple(table_keys.shape)} and {tuple(num_embeddings.shape)}"
        )
    if table_keys.dtype != torch.int64 or num_embeddings.dtype != torch.int64:
        raise ValueError("table_keys and num_embeddings: expected int64")
    if hash not in HASHES:
        raise ValueError(f"hash: expected one of {', '.join(HASHES)}, got {hash!r}")
    if embedding_dim < 1 or block_size < 1:
        raise ValueError(f"embedding_dim and block_size: expected at least 1, got {embedding_dim} and {block_size}")
    if embedding_dim > LARGEST_DIM:
        raise ValueError(f"embedding_dim: expected at most {LARGEST_DIM}, got {embedding_dim}")
    if not TRAITS[hash].is_exact and weight.shape[0] < block_size:
        raise ValueError(f"weight: {weight.shape[0]} weights do not hold one block of {block_size}")
    if table_keys.shape[0] == 0:
        raise ValueError("table_keys: expected at least one feature")
    if filter is None:
        return
    check_filter(filter)
    if not TRAITS[hash].has_admission:
        raise ValueError(f"filter: expected hash 'mix' with it, got {hash!r}")


def check_filter(filter: Tensor) -> None:
    """Check the words of an admission's filter."""
    if filter.dim() != 1 or filter.dtype != torch.int64 or not 1 <= filter.shape[0] <= LARGEST_FILTER:
        raise ValueError(f"filter: expected an int64 vector (W,), got {filter.dtype} {tuple(filter.shape)}")


def check_ids(name: str, ids: Tensor, dim: int) -> None:
    """Check a tensor of ids or offsets, called ``name`` in the error."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {ids.dtype}")
    if ids.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimension{'s' * (dim > 1)}, got shape {tuple(ids.shape)}")


def check_lookup(weight: Tensor, ids: Tensor, tables: Tables, filter: Tensor | None) -> None:
    """Check everything of a lookup but the array."""
    check_tables(weight, tables, filter)
    check_ids("ids", ids, 2)
    features = tables.table_keys.shape[0]
    if ids.shape[1] != features:
        raise ValueError(f"ids: expected (B, {features}), one column per feature, got {tuple(ids.shape)}")


def check_bags(weight: Tensor, values: Tensor, bags: Bags, tables: Tables, filter: Tensor | None) -> None:
    """Check everything of a bag but the array."""
    offsets, per_sample_weights, pooling = bags
    check_tables(weight, tables, filter)
    check_ids("values", values, 1)
    check_ids("offsets", offsets, 1)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    features = tables.table_keys.shape[0]
    if offsets.shape[0] == 0 or (offsets.shape[0] - 1) % features:
        raise ValueError(f"offsets: expected (F * B + 1,) for F = {features} features, got {tuple(offsets.shape)}")
    if per_sample_weights is None:
        return
    if pooling != "sum":
        raise ValueError(f"per_sample_weights: supported with pooling 'sum' only, got pooling {pooling!r}")
    dtype = embedding_dtype(weight)
    if per_sample_weights.shape != values.shape or per_sample_weights.dtype != dtype:
        raise ValueError(
            f"per_sample_weights: expected {dtype} {tuple(values.shape)} as the weights and values, "
            f"got {per_sample_weights.dtype} {tuple(per_sample_weights.shape)}"
        )


def check_grad(grad: Tensor, shape: Sequence[int]) -> None:
    """Check the gradient of embeddings of a shape (B, F, D)."""
    if tuple(grad.shape) != tuple(shape):
        raise ValueError(f"grad: expected shape {tuple(shape)}, got {tuple(grad.shape)}")
    if not grad.is_floating_point():
        raise ValueError(f"grad: expected floating-point numbers, got {grad.dtype}")


def check_out(out: Tensor, shape: Sequence[int], dtype: torch.dtype, weight: Tensor, call: Call) -> None:
    """Check a tensor to write embeddings into: its type, and that it shares no memory with itself or an input."""
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype:
        raise ValueError(f"out: expected {dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")
    end = 1  # of what has been laid out so far, from the shortest stride to the longest
    for stride, size in sorted((s, n) for s, n in zip(out.stride(), out.shape) if n > 1):
        if stride < end and out.numel():
            raise ValueError("out: expected each entry to have memory of its own")
        end += (size - 1) * stride
    bags = call.bags
    inputs: dict[str, Any] = {"weight": weight, "ids": call.ids, "table_keys": call.tables.table_keys}
    inputs |= {"num_embeddings": call.tables.num_embeddings, "scale": call.scale, "filter": call.filter}
    inputs |= {} if bags is None else bags._asdict()
    for name, tensor in inputs.items():
        if isinstance(tensor, Tensor):
            check_apart("out", out, name, tensor)


def check_step(
    weight: Tensor, state: Sequence[Tensor], rule: str, options: Sequence[float], grads: Sequence[Tensor]
) -> None:
    """Check what ``update_`` writes, its rule and its options."""
    require_tensors(weight=weight)
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if len(options) != 5:
        raise ValueError(f"options: expected 5, got {len(options)}")
    if not all(map(isfinite, options)):
        raise ValueError("options: expected finite numbers")
    if weight.dim() != 1 or not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating-point vector (m,), got {weight.dtype} {tuple(weight.shape)}")
    needed = {"sgd": int(options[2] != 0), "adagrad": 1, "adam": 2}[rule]
    if not needed <= len(state) <= 2:
        raise ValueError(f"state: expected {needed} tensors for {rule}, got {len(state)}")
    for tensor in state:
        if tensor.shape != weight.shape or tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise ValueError("state: expected tensors like weight")
        check_apart("state", tensor, "weight", weight)
    if len(state) == 2:
        check_apart("state", state[0], "the other state", state[1])
    for grad in grads:
        check_apart("weight", weight, "grads", grad)
        for tensor in state:
            check_apart("state", tensor, "grads", grad)


def _memory(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and behind its last."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()


def check_apart(written: str, tensor: Tensor, read: str, other: Tensor) -> None:
    """Check that a tensor that is written shares no memory with another."""
    (begin, end), (first, last) = _memory(tensor), _memory(other)
    if begin < last and first < end and tensor.device == other.device:
        raise ValueError(f"{written}: expected memory of its own, but it shares some with {read}")
