"""The reference bodies of lookups, bags and updates, in plain torch.

They are the specification of every kernel, and they run where there is no other. Each takes the operator's arguments
in the order of its schema.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robe.hashing import TRAITS, slots
from robe.ops.layout import (
    RULES,
    Bags,
    Call,
    Tables,
    UpdateLists,
    accumulation_dtype,
    check_array,
    check_grad,
    check_out,
    check_step,
    embedding_dtype,
    group_bits,
    take_out,
    unpack_bag,
    unpack_bag_backward,
    unpack_lookup,
    unpack_lookup_backward,
)
from robe.sketches import SHARED_ID, admits


class Places(NamedTuple):
    """The slots that the ids of a lookup read.

    Attributes:
        slots: (B, F, D).
        signs: (B, F, D) of +1 and -1, or None for all +1.
        kept: (B, F), False where the id is padding; None: all are kept.
    """

    slots: Tensor
    signs: Tensor | None
    kept: Tensor | None


class OpenBags(NamedTuple):
    """The ids of bags that count, n of them, padding left out.

    Attributes:
        position: (n,) in the values of the call.
        bag: (n,) the bag of each.
        slots, signs: (n, D), as in Places.
        bag_count: the number of bags.
    """

    position: Tensor
    bag: Tensor
    slots: Tensor
    signs: Tensor | None
    bag_count: int


# ---------------------------------------------------------------------------------------------------------------------
# From ids to slots


def _check_range(ids: Tensor, features: Tensor, tables: Tables) -> None:
    """Raise IndexError for the first id outside its table; ids and features have the same shape."""
    bounds = tables.num_embeddings[features]
    outside = ((ids < 0) | (ids >= bounds)) & (bounds > 0)
    if tables.padding_idx is not None:
        outside &= ids != tables.padding_idx
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        feature = int(features[where].item())
        raise IndexError(
            f"index out of range: id {ids[where].item()} of feature {feature}, "
            f"whose table has {tables.num_embeddings[feature].item()} rows"
        )


def _check_tables_fit(weight: Tensor, tables: Tables) -> None:
    """Raise ValueError for a negative bound, or a table of weights of its own that ends outside the array."""
    size = weight.shape[0]
    for feature, (key, rows) in enumerate(zip(tables.table_keys.tolist(), tables.num_embeddings.tolist())):
        if rows < 0:
            raise ValueError(f"num_embeddings: expected 0 or more, got {rows} for feature {feature}")
        exact = TRAITS[tables.hash].is_exact
        if exact and not (rows > 0 and 0 <= key <= size - rows * tables.embedding_dim):
            raise ValueError(
                f"hash={tables.hash!r}: the table of feature {feature} does not lie within the array's {size} slots"
            )


def _slots(weight: Tensor, ids: Tensor, keys: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    if call.filter is not None:
        ids = ids.where(admits(call.filter, ids, keys), SHARED_ID)
    _, _, embedding_dim, block_size, hash, sign, _ = call.tables
    size = weight.shape[0]
    return slots(ids, keys, size=size, embedding_dim=embedding_dim, block_size=block_size, hash=hash, sign=sign)


def _places(weight: Tensor, call: Call) -> Places:
    call.check(weight)
    tables = call.tables
    _check_tables_fit(weight, tables)
    ids = call.ids.long()
    _check_range(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), tables)
    kept = None
    if tables.padding_idx is not None:
        kept = ids != tables.padding_idx
        ids = ids.where(kept, 0)  # the padding row need not have slots of its own
    return Places(*_slots(weight, ids, tables.table_keys, call), kept)


def _open_bags(weight: Tensor, call: Call, bags: Bags) -> OpenBags:
    call.check(weight)
    tables, values = call.tables, call.ids
    _check_tables_fit(weight, tables)
    offsets = bags.offsets.long()
    counts = offsets.diff()
    if offsets[0] != 0 or (counts < 0).any() or offsets[-1] > values.shape[0]:
        raise ValueError(
            f"offsets: expected to rise from 0 to at most {values.shape[0]}, the number of values, "
            f"got {offsets[0].item()} ... {offsets[-1].item()}" + " and a fall between" * bool((counts < 0).any())
        )
    values = values[: offsets[-1]].long()
    bag = torch.repeat_interleave(torch.arange(counts.shape[0], device=values.device), counts)
    batch_size = counts.shape[0] // tables.table_keys.shape[0]
    feature = torch.div(bag, max(batch_size, 1), rounding_mode="floor")
    _check_range(values, feature, tables)
    position = torch.arange(values.shape[0], device=values.device)
    if tables.padding_idx is not None:
        position = (values != tables.padding_idx).nonzero().squeeze(-1)
        values, bag, feature = values[position], bag[position], feature[position]
    return OpenBags(position, bag, *_slots(weight, values, tables.table_keys[feature], call), counts.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# Lookups and bags


def _read(weight: Tensor, slot: Tensor, sign: Tensor | None, scale: Tensor | None = None) -> Tensor:
    # Autograd would not let users change a view in place.
    embeddings = torch.ops.aten._unsafe_view(weight.index_select(0, slot.flatten()), slot.shape)
    if scale is not None:
        embeddings = embeddings * scale[slot >> group_bits(weight, scale)]
    return embeddings if sign is None else embeddings * sign


def _lookup(weight: Tensor, *arguments: Any) -> Tensor:
    call = unpack_lookup(arguments)
    check_array(weight, call.scale)
    places = _places(weight, call)
    embeddings = _read(weight, places.slots, places.signs, call.scale)
    return embeddings if places.kept is None else embeddings.where(places.kept.unsqueeze(-1), 0)


def pool(embeddings: Tensor, bag: Tensor, bags: int, per_sample_weights: Tensor | None, pooling: str) -> Tensor:
    """Pool embeddings (n, D), of bags ``bag`` (n,), to (bags, D); an empty bag gives zeros."""
    place = bag.unsqueeze(-1).expand_as(embeddings)
    start = embeddings.new_zeros(bags, embeddings.shape[1])
    number = start[:, 0].scatter_add(0, bag, torch.ones_like(embeddings[:, 0])).unsqueeze(-1)
    if pooling == "max":
        pooled = (start - torch.inf).scatter_reduce(0, place, embeddings, "amax")
        return torch.where(number > 0, pooled, torch.zeros_like(pooled))
    if per_sample_weights is not None:
        embeddings = embeddings * per_sample_weights.unsqueeze(-1)
    pooled = start.scatter_add(0, place, embeddings)
    return pooled / number.clamp(min=1) if pooling == "mean" else pooled


def _bag(weight: Tensor, *arguments: Any) -> Tensor:
    call = unpack_bag(arguments)
    assert call.bags is not None
    check_array(weight, call.scale)
    opened = _open_bags(weight, call, call.bags)
    dtype = embedding_dtype(weight)
    embeddings = _read(weight, opened.slots, opened.signs, call.scale).to(accumulation_dtype(dtype))
    factors = call.bags.per_sample_weights
    factors = None if factors is None else factors[opened.position]
    pooled = pool(embeddings, opened.bag, opened.bag_count, factors, call.bags.pooling).to(dtype)
    features = call.tables.table_keys.shape[0]
    pooled = pooled.view(features, opened.bag_count // features, pooled.shape[1]).transpose(0, 1)
    return torch.ops.aten._unsafe_view(pooled.contiguous(), pooled.shape)


def _writes_out(body: Callable[..., Tensor], ids: int) -> Callable[..., None]:
    def write(weight: Tensor, *arguments: Any) -> None:
        arguments, out = take_out(arguments, ids)
        embeddings = body(weight, *arguments)
        call = unpack_lookup(arguments) if ids == 1 else unpack_bag(arguments)
        check_out(out, embeddings.shape, embeddings.dtype, weight, call)
        out.copy_(embeddings)

    return write


# ---------------------------------------------------------------------------------------------------------------------
# Backward


def _gradients(grad: Tensor, weight: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The slots that a call's gradient goes to and its values there, of equal shape."""
    check_array(weight)
    if call.bags is not None:
        return _bag_gradients(grad, weight, call, call.bags)
    places = _places(weight, call)
    check_grad(grad, places.slots.shape)
    value = grad if places.signs is None else grad * places.signs
    return (places.slots, value) if places.kept is None else (places.slots[places.kept], value[places.kept])


def _bag_gradients(grad: Tensor, weight: Tensor, call: Call, bags: Bags) -> tuple[Tensor, Tensor]:
    position, bag, slot, sign, count = _open_bags(weight, call, bags)
    features = call.tables.table_keys.shape[0]
    check_grad(grad, (count // features, features, call.tables.embedding_dim))
    grad = grad.transpose(0, 1).flatten(0, 1).to(accumulation_dtype(weight.dtype))  # (B, F, D) -> (F * B, D)
    value = grad[bag] if sign is None else grad[bag] * sign  # (n, D)
    if bags.pooling == "max":
        # The first of equal maxima takes the gradient, as in nn.EmbeddingBag.
        embeddings = _read(weight, slot, sign).to(value.dtype)
        n = bag.shape[0]
        order = torch.arange(n, device=bag.device).unsqueeze(-1).expand_as(embeddings)
        equal = embeddings == pool(embeddings, bag, count, None, "max")[bag]
        first = torch.full_like(grad, n, dtype=torch.long)
        first = first.scatter_reduce(0, bag.unsqueeze(-1).expand_as(embeddings), order.where(equal, n), "amin")
        won = order == first[bag]
        return slot[won], value[won]
    if bags.pooling == "mean":
        value = value / torch.bincount(bag, minlength=count)[bag].unsqueeze(-1)
    elif bags.per_sample_weights is not None:
        value = value * bags.per_sample_weights[position].unsqueeze(-1)
    return slot, value


def _array_gradient(grad: Tensor, weight: Tensor, call: Call) -> Tensor:
    """The dense gradient (m,) of the array."""
    slot, value = _gradients(grad, weight, call)
    total = torch.zeros(weight.shape, dtype=accumulation_dtype(weight.dtype), device=weight.device)
    # On a CPU scatter_add_ runs in order over a vector: the same bits on every run.
    return total.scatter_add_(0, slot.flatten(), value.to(total.dtype).flatten()).to(weight.dtype)


def _lookup_backward(grad: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return _array_gradient(grad, weight, unpack_lookup_backward(arguments))


def _bag_backward(grad: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return _array_gradient(grad, weight, unpack_bag_backward(arguments))


def _bag_weights_backward(grad: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    call = unpack_bag_backward(arguments)
    bags = call.bags
    check_array(weight)
    if bags is None or bags.per_sample_weights is None:
        raise ValueError("per_sample_weights: expected a tensor, got None")
    opened = _open_bags(weight, call, bags)
    features = call.tables.table_keys.shape[0]
    check_grad(grad, (opened.bag_count // features, features, call.tables.embedding_dim))
    embeddings = _read(weight, opened.slots, opened.signs).to(accumulation_dtype(weight.dtype))
    grad = grad.transpose(0, 1).flatten(0, 1).to(embeddings.dtype)
    result = torch.zeros_like(bags.per_sample_weights)
    result[opened.position] = (grad[opened.bag] * embeddings).sum(-1).to(result.dtype)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


def _sum_gradients(weight: Tensor, *lists: Any) -> tuple[Tensor, Tensor]:
    check_array(weight)
    slot = [torch.empty(0, dtype=torch.int64, device=weight.device)]
    value = [torch.empty(0, dtype=accumulation_dtype(weight.dtype), device=weight.device)]
    for grad, call in UpdateLists(*lists).unpack():
        slots, values = _gradients(grad, weight, call)
        slot.append(slots.flatten())
        value.append(values.flatten().to(value[0].dtype))
    touched, inverse = torch.cat(slot).unique(return_inverse=True)
    return touched, value[0].new_zeros(touched.shape).index_add_(0, inverse, torch.cat(value))


def _update(weight: Tensor, state: Sequence[Tensor], rule: str, options: Sequence[float], *lists: Any) -> None:
    check_step(weight, state, rule, options, lists[0])
    touched, grad = _sum_gradients(weight, *lists)
    before = [tensor[touched].to(grad.dtype) for tensor in (weight, *state)]
    for tensor, values in zip((weight, *state), _apply_rule(rule, options, grad, before)):
        tensor[touched] = values.to(tensor.dtype)


def _apply_rule(rule: str, options: Sequence[float], grad: Tensor, before: list[Tensor]) -> list[Tensor]:
    """The weights and states of some slots after a step of a rule."""
    w, *s = before
    rate, decay, *own = options
    grad = grad + decay * w
    if rule == "sgd":
        (momentum, *_) = own
        if momentum:
            grad = s[0] = momentum * s[0] + grad
        return [w - rate * grad, *s]
    if rule == "adagrad":
        (eps, *_) = own
        s[0] = s[0] + grad * grad
        return [w - rate * grad / (s[0].sqrt() + eps), *s]
    if rule == "adam":
        beta1, beta2, eps = own
        s[0] = beta1 * s[0] + (1 - beta1) * grad
        s[1] = beta2 * s[1] + (1 - beta2) * grad * grad
        return [w - rate * s[0] / (s[1].sqrt() + eps), *s]
    raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")


BODIES: dict[str, Callable[..., Any]] = {
    "lookup": _lookup,
    "lookup_forward": _lookup,
    "lookup_out": _writes_out(_lookup, 1),
    "lookup_backward": _lookup_backward,
    "bag": _bag,
    "bag_forward": _bag,
    "bag_out": _writes_out(_bag, 4),
    "bag_backward": _bag_backward,
    "bag_weights_backward": _bag_weights_backward,
    "update_": _update,
    "sum_gradients": _sum_gradients,
}
