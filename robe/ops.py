"""The operators ``torch.ops.robe.*``: schema, shape checks (fakes), autograd, and the reference bodies in plain torch.

    lookup(weight, ids (B, F)) -> (B, F, D)                   one id per feature
    bag(weight, values (n,), offsets (F*B + 1,)) -> (B, F, D)  a bag of ids per feature, pooled

B examples, F features, D = embedding_dim, m = number of weights. Values are features major: feature f of example b is
bag k = f * B + b, values[offsets[k] : offsets[k + 1]]. Both take, per feature, the table's hash key (``hashing.slots``)
and its number of rows (0: unbounded), so that any number of tables costs one call.

Autograd keeps ids and the weight, never an index: the backward operators hash again.
"""

import torch

from robe.hashing import HASHES, slots

MODES = ("sum", "mean", "max")

_TABLES = (
    "Tensor table_keys, Tensor num_embeddings, int embedding_dim, int block_size, str hash, bool sign, int? padding_idx"
)
_BAGS = "Tensor values, Tensor offsets, Tensor? per_sample_weights, str mode"
torch.library.define(
    "robe::lookup", f"(Tensor weight, Tensor ids, {_TABLES}) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "robe::lookup_backward",
    f"(Tensor grad, Tensor weight, Tensor ids, {_TABLES}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define("robe::bag", f"(Tensor weight, {_BAGS}, {_TABLES}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    "robe::bag_backward",
    f"(Tensor grad, Tensor weight, {_BAGS}, {_TABLES}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


# ---------------------------------------------------------------------------------------------------------------------
# Checks of shape and type: run by the fakes and by the bodies alike


def _check_tables(weight, table_keys, num_embeddings, embedding_dim, block_size, hash, sign, padding_idx):
    if weight.dim() != 1 or not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating-point vector (m,), got {weight.dtype} {tuple(weight.shape)}")
    if table_keys.dim() != 1 or table_keys.shape != num_embeddings.shape:
        raise ValueError(
            "table_keys and num_embeddings: expected one entry per feature in each, got shapes "
            f"{tuple(table_keys.shape)} and {tuple(num_embeddings.shape)}"
        )
    if hash not in HASHES:
        raise ValueError(f"hash: expected one of {', '.join(HASHES)}, got {hash!r}")
    if embedding_dim < 1 or block_size < 1:
        raise ValueError(f"embedding_dim and block_size: expected at least 1, got {embedding_dim} and {block_size}")
    if hash != "identity" and weight.shape[0] < block_size:
        raise ValueError(f"weight: {weight.shape[0]} weights do not hold one block of {block_size}")

    if table_keys.shape[0] == 0:
        raise ValueError("table_keys: expected at least one feature")


def _check_ids(name, ids, dim):
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {ids.dtype}")
    if ids.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimension{'s' * (dim > 1)}, got shape {tuple(ids.shape)}")


def _check_lookup(weight, ids, table_keys, *tables):
    _check_tables(weight, table_keys, *tables)
    _check_ids("ids", ids, 2)
    if ids.shape[1] != table_keys.shape[0]:
        raise ValueError(f"ids: expected (B, {table_keys.shape[0]}), one column per feature, got {tuple(ids.shape)}")


def _check_bags(weight, values, offsets, per_sample_weights, mode, table_keys, *tables):
    _check_tables(weight, table_keys, *tables)
    _check_ids("values", values, 1)
    _check_ids("offsets", offsets, 1)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    features = table_keys.shape[0]
    if offsets.shape[0] == 0 or (offsets.shape[0] - 1) % features:
        raise ValueError(f"offsets: expected (F * B + 1,) for F = {features} features, got {tuple(offsets.shape)}")
    if per_sample_weights is None:
        return
    if mode != "sum":
        raise ValueError(f"per_sample_weights: supported by mode 'sum' only, got mode {mode!r}")
    if per_sample_weights.shape != values.shape or per_sample_weights.dtype != weight.dtype:
        raise ValueError(
            f"per_sample_weights: expected {weight.dtype} {tuple(values.shape)} as the weights and values, "
            f"got {per_sample_weights.dtype} {tuple(per_sample_weights.shape)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reference bodies: the specification of every kernel, and what runs where there is no other


def _check_range(ids, features, num_embeddings, padding_idx):
    """Raise IndexError for the first id outside its table; ids and features have the same shape."""
    rows = num_embeddings[features]
    outside = ((ids < 0) | (ids >= rows)) & (rows > 0)
    if padding_idx is not None:
        outside &= ids != padding_idx
    if outside.any():
        where = outside.nonzero()[0].tolist()
        feature = features[tuple(where)].item()
        raise IndexError(
            f"index out of range: id {ids[tuple(where)].item()} of feature {feature}, "
            f"whose table has {num_embeddings[feature].item()} rows"
        )


def _accumulation_dtype(dtype):
    """Sums of half-precision values are taken in float32, as torch's own kernels do."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _read(weight, slot, sign):
    rows = weight.index_select(0, slot.flatten()).view(slot.shape)
    return rows if sign is None else rows * sign


def _scatter(grad_rows, slot, sign, weight):
    """The dense gradient (m,) of the array from that of the rows read from it."""
    if sign is not None:
        grad_rows = grad_rows * sign
    total = torch.zeros(weight.shape, dtype=_accumulation_dtype(weight.dtype), device=weight.device)
    # On a CPU scatter_add_ runs in order over a vector: the same bits on every run.
    return total.scatter_add_(0, slot.flatten(), grad_rows.to(total.dtype).flatten()).to(weight.dtype)


def _lookup_slots(weight, ids, table_keys, num_embeddings, *layout):
    _check_lookup(weight, ids, table_keys, num_embeddings, *layout)
    embedding_dim, block_size, hash, sign, padding_idx = layout
    ids = ids.long()
    _check_range(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), num_embeddings, padding_idx)
    kept = None
    if padding_idx is not None:
        kept = ids != padding_idx
        ids = ids.where(kept, 0)  # the padding row need not have slots of its own
    size = weight.shape[0]
    slot, signs = slots(
        ids, table_keys, size=size, embedding_dim=embedding_dim, block_size=block_size, hash=hash, sign=sign
    )
    return slot, signs, kept


def _lookup(weight, ids, *tables):
    slot, sign, kept = _lookup_slots(weight, ids, *tables)
    rows = _read(weight, slot, sign)
    return rows if kept is None else rows.where(kept.unsqueeze(-1), 0)


def _lookup_backward(grad, weight, ids, *tables):
    slot, sign, kept = _lookup_slots(weight, ids, *tables)
    return _scatter(grad if kept is None else grad.where(kept.unsqueeze(-1), 0), slot, sign, weight)


def _open_bags(weight, values, offsets, per_sample_weights, mode, table_keys, num_embeddings, *layout):
    """What both directions need, of every value that counts: its position, its bag, and its slots."""
    _check_bags(weight, values, offsets, per_sample_weights, mode, table_keys, num_embeddings, *layout)
    embedding_dim, block_size, hash, sign, padding_idx = layout
    offsets = offsets.long()
    counts = offsets.diff()
    if offsets[0] != 0 or (counts < 0).any() or offsets[-1] > values.shape[0]:
        raise ValueError(
            f"offsets: expected to rise from 0 to at most {values.shape[0]}, the number of values, "
            f"got {offsets[0].item()} ... {offsets[-1].item()}" + " and a fall between" * bool((counts < 0).any())
        )
    values = values[: offsets[-1]].long()
    bag = torch.repeat_interleave(torch.arange(counts.shape[0], device=values.device), counts)
    batch_size = counts.shape[0] // table_keys.shape[0]
    feature = torch.div(bag, max(batch_size, 1), rounding_mode="floor")
    _check_range(values, feature, num_embeddings, padding_idx)
    position = torch.arange(values.shape[0], device=values.device)
    if padding_idx is not None:
        position = (values != padding_idx).nonzero().squeeze(-1)
        values, bag, feature = values[position], bag[position], feature[position]
    slot, signs = slots(
        values,
        table_keys[feature],
        size=weight.shape[0],
        embedding_dim=embedding_dim,
        block_size=block_size,
        hash=hash,
        sign=sign,
    )
    return position, bag, slot, signs, counts.shape[0]


def _pool(rows, bag, bags, factors, mode):
    """(n, D) rows to (bags, D); an empty bag gives zeros."""
    if mode == "max":
        lowest = torch.full((bags, rows.shape[1]), -torch.inf, dtype=rows.dtype, device=rows.device)
        pooled = lowest.scatter_reduce(0, bag.unsqueeze(-1).expand_as(rows), rows, "amax")
        return pooled.where(_count(bag, bags).unsqueeze(-1) > 0, 0)
    if factors is not None:
        rows = rows * factors.unsqueeze(-1)
    pooled = torch.zeros(bags, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, bag, rows)
    return pooled / _count(bag, bags).clamp(min=1).unsqueeze(-1) if mode == "mean" else pooled


def _count(bag, bags):
    return torch.bincount(bag, minlength=bags)


def _bag(weight, values, offsets, per_sample_weights, mode, table_keys, *tables):
    position, bag, slot, sign, bags = _open_bags(weight, values, offsets, per_sample_weights, mode, table_keys, *tables)
    rows = _read(weight, slot, sign).to(_accumulation_dtype(weight.dtype))
    factors = None if per_sample_weights is None else per_sample_weights[position]
    pooled = _pool(rows, bag, bags, factors, mode).to(weight.dtype)
    features = table_keys.shape[0]
    return pooled.view(features, bags // features, pooled.shape[1]).transpose(0, 1).contiguous()


def _bag_backward(grad, weight, values, offsets, per_sample_weights, mode, table_keys, *tables):
    position, bag, slot, sign, bags = _open_bags(weight, values, offsets, per_sample_weights, mode, table_keys, *tables)
    rows = _read(weight, slot, sign).to(_accumulation_dtype(weight.dtype))
    grad = grad.transpose(0, 1).flatten(0, 1).to(rows.dtype)  # (B, F, D) -> (F * B, D)
    grad_rows = grad[bag]  # (n, D)
    grad_weights = weight.new_empty(0)
    if mode == "max":
        # The first of equal maxima takes the gradient, as in nn.EmbeddingBag.
        n = bag.shape[0]
        order = torch.arange(n, device=bag.device).unsqueeze(-1).expand_as(rows)
        won = rows == _pool(rows, bag, bags, None, mode)[bag]
        first = torch.full_like(grad, n, dtype=torch.long)
        first = first.scatter_reduce(0, bag.unsqueeze(-1).expand_as(rows), order.where(won, n), "amin")
        grad_rows = grad_rows * (order == first[bag])
    elif mode == "mean":
        grad_rows = grad_rows / _count(bag, bags)[bag].unsqueeze(-1)
    elif per_sample_weights is not None:
        grad_weights = torch.zeros_like(per_sample_weights)
        grad_weights[position] = (grad_rows * rows).sum(-1).to(grad_weights.dtype)
        grad_rows = grad_rows * per_sample_weights[position].unsqueeze(-1)
    return _scatter(grad_rows, slot, sign, weight), grad_weights


torch.library.impl("robe::lookup", "CompositeExplicitAutograd", _lookup)
torch.library.impl("robe::lookup_backward", "CompositeExplicitAutograd", _lookup_backward)
torch.library.impl("robe::bag", "CompositeExplicitAutograd", _bag)
torch.library.impl("robe::bag_backward", "CompositeExplicitAutograd", _bag_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Fakes: the shapes alone, for torch.compile and torch.export


@torch.library.register_fake("robe::lookup")
def _(weight, ids, table_keys, num_embeddings, embedding_dim, *layout):
    _check_lookup(weight, ids, table_keys, num_embeddings, embedding_dim, *layout)
    return weight.new_empty(*ids.shape, embedding_dim)


@torch.library.register_fake("robe::lookup_backward")
def _(grad, weight, ids, *tables):
    return torch.empty_like(weight)


@torch.library.register_fake("robe::bag")
def _(weight, values, offsets, per_sample_weights, mode, table_keys, num_embeddings, embedding_dim, *layout):
    _check_bags(weight, values, offsets, per_sample_weights, mode, table_keys, num_embeddings, embedding_dim, *layout)
    features = table_keys.shape[0]
    return weight.new_empty((offsets.shape[0] - 1) // features, features, embedding_dim)


@torch.library.register_fake("robe::bag_backward")
def _(grad, weight, values, offsets, per_sample_weights, *_):
    weights = weight.new_empty(0) if per_sample_weights is None else torch.empty_like(per_sample_weights)
    return torch.empty_like(weight), weights


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
    ctx.arguments = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]


def _arguments(ctx):
    saved = iter(ctx.saved_tensors)
    return [next(saved) if constant is None else constant[0] for constant in ctx.arguments]


def _lookup_autograd(ctx, grad):
    arguments = _arguments(ctx)
    return torch.ops.robe.lookup_backward(grad, *arguments), *[None] * (len(arguments) - 1)


def _bag_autograd(ctx, grad):
    arguments = _arguments(ctx)
    grad_weight, grad_per_sample_weights = torch.ops.robe.bag_backward(grad, *arguments)
    gradients = [grad_weight] + [None] * (len(arguments) - 1)
    if arguments[3] is not None:
        gradients[3] = grad_per_sample_weights
    return tuple(gradients)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("robe: second derivatives are not supported")


for _name in ("lookup_backward", "bag_backward"):
    torch.library.register_autograd(f"robe::{_name}", _no_second_derivative)
torch.library.register_autograd("robe::lookup", _lookup_autograd, setup_context=_save)
torch.library.register_autograd("robe::bag", _bag_autograd, setup_context=_save)
