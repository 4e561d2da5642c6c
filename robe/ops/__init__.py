"""The operators ``torch.ops.robe.*``: schema, shape checks (fakes), autograd, and the reference bodies in plain torch.

    lookup(weight, ids (B, F)) -> (B, F, D)                   one id per feature
    bag(weight, values (n,), offsets (F*B + 1,)) -> (B, F, D)  a bag of ids per feature, pooled
    lookup_forward, bag_forward                                the same, quicker to call: they have no autograd
    lookup_out, bag_out                                        the same, written into a tensor
    update_(weight, ...)                                       an optimizer's rule on the slots that lookups touched
    dot_interaction(dense (B, D), embeddings (B, F, D)) -> (B, D + (F + 1) * F / 2)    what a DLRM does with them
    mlp(x (B, fan_in)) -> (B, width)                           linear layers with ReLU between them, without autograd
    count_ids_, id_counts, frequent_rows_, observe_ids_        counting for an admission (robe/admission.py)

B examples, F features, D = embedding_dim, m = number of weights. Values are features major: feature f of example b is
bag k = f * B + b, values[offsets[k] : offsets[k + 1]]. Both take, per feature, the table's hash key (``hashing.slots``)
and its number of rows (0: unbounded), so that any number of tables costs one call.

Autograd keeps ids and the weight, never an index: the backward operators hash again.

weight is a vector (m,) of floats; or of int8 with ``scale``, float32, one factor for each group of weights. Groups are
runs of G weights, G the smallest power of two with which the scales cover the array; the embeddings are then float32.

filter, (W,) int64, with "mix" only, holds the ids that have a row of their own (robe/admission.py); the others of a
table read the row of one id. Ranges and padding_idx are about the ids as they are given.

Counting is of ids of any shape, with int64 keys and bool labels broadcastable to them, in counters (4, W) int32 that
are contiguous. Rows are what ``hashing.row_hash`` makes of ids and keys.

On a CPU the bodies in csrc/robe_cpu.cpp take over where ``backend`` could load them; those here are their
specification.
"""

import torch

from robe.admission import RARE, admits, counters_of
from robe.hashing import HASHES, row_hash, slots

MODES = ("sum", "mean", "max")

_LAYOUT = "int embedding_dim, int block_size, str hash, bool sign, int? padding_idx"
_TABLES = f"Tensor table_keys, Tensor num_embeddings, {_LAYOUT}"
_BAGS = "Tensor values, Tensor offsets, Tensor? per_sample_weights, str pooling"
_FILTER = "Tensor? filter=None"
_LISTS = ("grads", "ids", "offsets", "per_sample_weights", "table_keys", "num_embeddings", "filters")
for _schema in (
    f"lookup(Tensor weight, Tensor ids, {_TABLES}, Tensor? scale=None, {_FILTER}) -> Tensor",
    f"lookup_forward(Tensor weight, Tensor ids, {_TABLES}, Tensor? scale=None, {_FILTER}) -> Tensor",
    f"lookup_out(Tensor weight, Tensor ids, {_TABLES}, Tensor? scale, Tensor(a!) out, {_FILTER}) -> ()",
    f"lookup_backward(Tensor grad, Tensor weight, Tensor ids, {_TABLES}, {_FILTER}) -> Tensor",
    f"bag(Tensor weight, {_BAGS}, {_TABLES}, Tensor? scale=None, {_FILTER}) -> Tensor",
    f"bag_forward(Tensor weight, {_BAGS}, {_TABLES}, Tensor? scale=None, {_FILTER}) -> Tensor",
    f"bag_out(Tensor weight, {_BAGS}, {_TABLES}, Tensor? scale, Tensor(a!) out, {_FILTER}) -> ()",
    f"bag_backward(Tensor grad, Tensor weight, {_BAGS}, {_TABLES}, {_FILTER}) -> Tensor",
    f"bag_weights_backward(Tensor grad, Tensor weight, {_BAGS}, {_TABLES}, {_FILTER}) -> Tensor",
    "dot_interaction(Tensor dense, Tensor embeddings) -> Tensor",
    "dot_interaction_backward(Tensor grad, Tensor dense, Tensor embeddings) -> (Tensor, Tensor)",
    "count_ids_(Tensor(a!) counters, Tensor ids, Tensor keys, Tensor(b!)? clicks=None, Tensor? labels=None) -> ()",
    "id_counts(Tensor counters, Tensor rows) -> Tensor",
    "frequent_rows_(Tensor counters, Tensor ids, Tensor keys, int times, Tensor(a!) recent) -> Tensor",
    "observe_ids_(Tensor(a!) counters, Tensor ids, Tensor keys, Tensor filter, int threshold) -> Tensor",
    "mlp(Tensor x, Tensor[] weights, Tensor[] biases, int width, bool relu_last) -> Tensor",
    "update_(Tensor(a!) weight, Tensor(b!)[] state, str rule, float[] options, "
    f"{', '.join(f'Tensor[] {name}' for name in _LISTS)}, int[] layouts) -> ()",
):
    torch.library.define(
        f"robe::{_schema.split('(')[0]}", _schema[_schema.index("(") :], tags=torch.Tag.pt2_compliant_tag
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks of shape and type: run by the fakes and by the bodies alike


_TABLE_ARGUMENTS = 7


def _split(arguments):
    """The arguments of the tables with their filter, and scale; torch leaves out the last ones where they are None."""
    scale, filter = (*arguments[_TABLE_ARGUMENTS:], None, None)[:2]
    return (*arguments[:_TABLE_ARGUMENTS], filter), scale


def _check_array(weight, scale=None):
    if weight.dim() != 1 or not (weight.is_floating_point() or weight.dtype == torch.int8):
        raise ValueError(f"weight: expected a floating-point vector (m,), got {weight.dtype} {tuple(weight.shape)}")
    if (scale is not None) != (weight.dtype == torch.int8):
        raise ValueError("scale: expected with an int8 weight, which has no gradient, and only with one")
    if scale is not None and (scale.dim() != 1 or scale.dtype != torch.float32 or scale.shape[0] == 0):
        raise ValueError(
            f"scale: expected a float32 vector, one entry per group of weights, got {scale.dtype} {tuple(scale.shape)}"
        )


def _check_tables(weight, table_keys, num_embeddings, embedding_dim, block_size, hash, sign, padding_idx, filter=None):
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
    if filter is None:
        return
    _check_filter(filter)
    if hash != "mix":
        raise ValueError(f"filter: expected hash 'mix' with it, got {hash!r}")


def _check_filter(filter):
    if filter.dim() != 1 or filter.dtype != torch.int64 or filter.shape[0] == 0:
        raise ValueError(f"filter: expected an int64 vector (W,), got {filter.dtype} {tuple(filter.shape)}")


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
    dtype = _embedding_dtype(weight)
    if per_sample_weights.shape != values.shape or per_sample_weights.dtype != dtype:
        raise ValueError(
            f"per_sample_weights: expected {dtype} {tuple(values.shape)} as the weights and values, "
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


def _embedding_dtype(weight):
    return torch.float32 if weight.dtype == torch.int8 else weight.dtype


def _group_bits(weight, scale):
    """log2 of the number of weights that share a scale."""
    bits = 0
    while scale.shape[0] << bits < weight.shape[0]:
        bits += 1
    return bits


def _accumulation_dtype(dtype):
    """Sums of half-precision values are taken in float32, as torch's own kernels do."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _read(weight, slot, sign, scale=None):
    # Autograd would not let users change a view in place.
    rows = torch.ops.aten._unsafe_view(weight.index_select(0, slot.flatten()), slot.shape)
    if scale is not None:
        rows = rows * scale[slot >> _group_bits(weight, scale)]
    return rows if sign is None else rows * sign


def _scatter(slot, value, weight):
    """The dense gradient (m,) of the array from the values that go to its slots."""
    total = torch.zeros(weight.shape, dtype=_accumulation_dtype(weight.dtype), device=weight.device)
    # On a CPU scatter_add_ runs in order over a vector: the same bits on every run.
    return total.scatter_add_(0, slot.flatten(), value.to(total.dtype).flatten()).to(weight.dtype)


def _let_in(ids, keys, filter):
    return ids if filter is None else ids.where(admits(filter, ids, keys), RARE)


def _lookup_slots(weight, ids, table_keys, num_embeddings, *layout):
    _check_lookup(weight, ids, table_keys, num_embeddings, *layout)
    embedding_dim, block_size, hash, sign, padding_idx, filter = (*layout, None)[:6]
    ids = ids.long()
    _check_range(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), num_embeddings, padding_idx)
    kept = None
    if padding_idx is not None:
        kept = ids != padding_idx
        ids = ids.where(kept, 0)  # the padding row need not have slots of its own
    ids = _let_in(ids, table_keys, filter)
    size = weight.shape[0]
    slot, signs = slots(
        ids, table_keys, size=size, embedding_dim=embedding_dim, block_size=block_size, hash=hash, sign=sign
    )
    return slot, signs, kept


def _lookup(weight, ids, *tables_and_scale):
    tables, scale = _split(tables_and_scale)
    _check_array(weight, scale)
    slot, sign, kept = _lookup_slots(weight, ids, *tables)
    rows = _read(weight, slot, sign, scale)
    return rows if kept is None else rows.where(kept.unsqueeze(-1), 0)


def _lookup_gradients(grad, weight, ids, *tables):
    """The slots that the gradient goes to, (n, D), and its values there."""
    _check_array(weight)
    slot, sign, kept = _lookup_slots(weight, ids, *tables)
    value = grad if sign is None else grad * sign
    return (slot, value) if kept is None else (slot[kept], value[kept])


def _lookup_backward(grad, weight, ids, *tables):
    slot, value = _lookup_gradients(grad, weight, ids, *tables)
    return _scatter(slot, value, weight)


def _open_bags(weight, values, offsets, per_sample_weights, mode, table_keys, num_embeddings, *layout):
    """What both directions need, of every value that counts: its position, its bag, and its slots."""
    _check_bags(weight, values, offsets, per_sample_weights, mode, table_keys, num_embeddings, *layout)
    embedding_dim, block_size, hash, sign, padding_idx, filter = (*layout, None)[:6]
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
    keys = table_keys[feature]
    slot, signs = slots(
        _let_in(values, keys, filter),
        keys,
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


def _bag(weight, values, offsets, per_sample_weights, mode, *tables_and_scale):
    tables, scale = _split(tables_and_scale)
    _check_array(weight, scale)
    position, bag, slot, sign, bags = _open_bags(weight, values, offsets, per_sample_weights, mode, *tables)
    dtype = _embedding_dtype(weight)
    rows = _read(weight, slot, sign, scale).to(_accumulation_dtype(dtype))
    factors = None if per_sample_weights is None else per_sample_weights[position]
    pooled = _pool(rows, bag, bags, factors, mode).to(dtype)
    features = tables[0].shape[0]
    pooled = pooled.view(features, bags // features, pooled.shape[1]).transpose(0, 1)
    return torch.ops.aten._unsafe_view(pooled.contiguous(), pooled.shape)


def _bag_gradients(grad, weight, values, offsets, per_sample_weights, mode, table_keys, *tables):
    """The slots that the gradient goes to, (n, D) or flat, and its values there."""
    _check_array(weight)
    position, bag, slot, sign, bags = _open_bags(weight, values, offsets, per_sample_weights, mode, table_keys, *tables)
    grad = grad.transpose(0, 1).flatten(0, 1).to(_accumulation_dtype(weight.dtype))  # (B, F, D) -> (F * B, D)
    value = grad[bag] if sign is None else grad[bag] * sign  # (n, D)
    if mode == "max":
        # The first of equal maxima takes the gradient, as in nn.EmbeddingBag.
        rows = _read(weight, slot, sign).to(value.dtype)
        n = bag.shape[0]
        order = torch.arange(n, device=bag.device).unsqueeze(-1).expand_as(rows)
        equal = rows == _pool(rows, bag, bags, None, mode)[bag]
        first = torch.full_like(grad, n, dtype=torch.long)
        first = first.scatter_reduce(0, bag.unsqueeze(-1).expand_as(rows), order.where(equal, n), "amin")
        won = order == first[bag]
        return slot[won], value[won]
    if mode == "mean":
        value = value / _count(bag, bags)[bag].unsqueeze(-1)
    elif per_sample_weights is not None:
        value = value * per_sample_weights[position].unsqueeze(-1)
    return slot, value


def _bag_backward(grad, weight, values, *bags_and_tables):
    slot, value = _bag_gradients(grad, weight, values, *bags_and_tables)
    return _scatter(slot, value, weight)


def _bag_weights_backward(grad, weight, values, offsets, per_sample_weights, mode, table_keys, *tables):
    _check_array(weight)
    position, bag, slot, sign, _ = _open_bags(weight, values, offsets, per_sample_weights, mode, table_keys, *tables)
    rows = _read(weight, slot, sign).to(_accumulation_dtype(weight.dtype))
    grad = grad.transpose(0, 1).flatten(0, 1).to(rows.dtype)
    result = torch.zeros_like(per_sample_weights)
    result[position] = (grad[bag] * rows).sum(-1).to(result.dtype)
    return result


LAYOUT_ENTRIES = 7  # mode (0: lookup, else 1 + its place in MODES), D, Z, hash (its place in HASHES), sign, padded, id


def _calls(grads, ids, offsets, per_sample_weights, table_keys, num_embeddings, filters, layouts):
    """Of the lists that ``update_`` takes, each call's gradient, mode or None, ids, offsets, factors and tables."""
    for k, grad in enumerate(grads):
        mode, embedding_dim, block_size, hash, sign, padded, padding_idx = layouts[LAYOUT_ENTRIES * k :][
            :LAYOUT_ENTRIES
        ]
        layout = (embedding_dim, block_size, HASHES[hash], bool(sign), padding_idx if padded else None)
        tables = (table_keys[k], num_embeddings[k], *layout, filters[k] if len(filters[k]) else None)
        if mode == 0:
            yield grad, None, ids[k], None, None, tables
        else:
            factors = per_sample_weights[k] if mode == 1 and len(per_sample_weights[k]) else None
            yield grad, MODES[mode - 1], ids[k], offsets[k], factors, tables


def _update(weight, state, rule, options, *lists):
    slot, value = [], []
    for grad, mode, ids, offsets, factors, tables in _calls(*lists):
        if mode is None:
            places, values = _lookup_gradients(grad, weight, ids, *tables)
        else:
            places, values = _bag_gradients(grad, weight, ids, offsets, factors, mode, *tables)
        slot.append(places.flatten())
        value.append(values.flatten())
    if not slot:
        return
    dtype = _accumulation_dtype(weight.dtype)
    touched, inverse = torch.cat(slot).unique(return_inverse=True)
    grad = torch.zeros(touched.shape, dtype=dtype, device=weight.device)
    grad.index_add_(0, inverse, torch.cat(value).to(dtype))
    w, *s = (tensor[touched].to(dtype) for tensor in (weight, *state))
    rate, decay, *options = options
    grad = grad + decay * w
    if rule == "sgd":
        (momentum, *_) = options
        if momentum:
            grad = s[0] = momentum * s[0] + grad
        w = w - rate * grad
    elif rule == "adagrad":
        (eps, *_) = options
        s[0] = s[0] + grad * grad
        w = w - rate * grad / (s[0].sqrt() + eps)
    elif rule == "adam":
        beta1, beta2, eps = options
        s[0] = beta1 * s[0] + (1 - beta1) * grad
        s[1] = beta2 * s[1] + (1 - beta2) * grad * grad
        w = w - rate * s[0] / (s[1].sqrt() + eps)
    else:
        raise ValueError(f"rule: expected one of sgd, adagrad, adam, got {rule!r}")
    for tensor, values in zip((weight, *state), (w, *s)):
        tensor[touched] = values.to(tensor.dtype)


def _vectors(dense, embeddings):
    if dense.dim() != 2 or embeddings.dim() != 3 or dense.shape != embeddings.select(1, 0).shape:
        raise ValueError(
            "dense and embeddings: expected (B, D) and (B, F, D), "
            f"got {tuple(dense.shape)} and {tuple(embeddings.shape)}"
        )
    count = embeddings.shape[1] + 1
    rows, columns = torch.tril_indices(count, count, offset=-1, device=dense.device)
    return torch.cat([dense.unsqueeze(1), embeddings], dim=1), rows, columns  # (B, F + 1, D)


def _dot_interaction(dense, embeddings):
    vectors, rows, columns = _vectors(dense, embeddings)
    dots = torch.bmm(vectors, vectors.transpose(1, 2))
    return torch.cat([dense, dots[:, rows, columns]], dim=1)


def _dot_interaction_backward(grad, dense, embeddings):
    vectors, rows, columns = _vectors(dense, embeddings)
    dots = vectors.new_zeros(len(vectors), vectors.shape[1], vectors.shape[1])
    dots[:, rows, columns] = grad[:, dense.shape[1] :]
    grad_vectors = torch.bmm(dots + dots.transpose(1, 2), vectors)
    return grad_vectors[:, 0] + grad[:, : dense.shape[1]], grad_vectors[:, 1:].contiguous()


PANEL = 32  # outputs of a layer whose weights lie together


def pack_linear(weight, bias):
    """The weights of a linear layer as ``mlp`` takes them.

    Args:
        weight: (fan_out, fan_in) float32.
        bias: (fan_out,) or None.

    Returns:
        (weights, bias): (panels, fan_in, PANEL) and (panels * PANEL,); outputs past fan_out have zeros.
    """
    fan_out, fan_in = weight.shape
    more = -fan_out % PANEL
    panels = torch.nn.functional.pad(weight, (0, 0, 0, more)).view(-1, PANEL, fan_in).transpose(1, 2).contiguous()
    bias = weight.new_zeros(fan_out) if bias is None else bias
    return panels, torch.nn.functional.pad(bias, (0, more)).contiguous()


def _check_mlp(x, weights, biases, width):
    if x.dim() != 2 or x.dtype != torch.float32:
        raise ValueError(f"x: expected a float32 matrix (B, fan_in), got {x.dtype} {tuple(x.shape)}")
    if not weights or len(weights) != len(biases):
        raise ValueError("weights and biases: expected one of each for each layer")
    before = x.shape[1]
    for i, (w, b) in enumerate(zip(weights, biases)):
        fits = w.dim() == 3 and (w.shape[1] <= before if i else w.shape[1] == before)
        if not fits or w.shape[2] != PANEL or w.dtype != torch.float32 or not w.is_contiguous():
            raise ValueError(
                f"weights: expected contiguous float32 (panels, {before}, {PANEL}), got {w.dtype} {tuple(w.shape)}"
            )
        before = w.shape[0] * PANEL
        if b.shape != (before,) or b.dtype != torch.float32 or not b.is_contiguous():
            raise ValueError(f"biases: expected contiguous float32 ({before},), got {b.dtype} {tuple(b.shape)}")
    if not 1 <= width <= before:
        raise ValueError(f"width: expected 1 to {before}, got {width}")


def _mlp(x, weights, biases, width, relu_last):
    _check_mlp(x, weights, biases, width)
    for i, (w, b) in enumerate(zip(weights, biases)):
        x = torch.addmm(b, x[:, : w.shape[1]], w.transpose(0, 1).reshape(w.shape[1], -1))
        if i + 1 < len(weights) or relu_last:
            x = x.relu()
    return x[:, :width].contiguous()


def _check_counters(name, counters):
    good = counters.dim() == 2 and counters.shape[0] == 4 and counters.shape[1] > 0
    if not good or counters.dtype != torch.int32 or not counters.is_contiguous():
        raise ValueError(f"{name}: expected contiguous int32 (4, W), got {counters.dtype} {tuple(counters.shape)}")


def _check_broadcast(name, tensor, dtype, ids):
    fits = tensor.dim() <= ids.dim() and all(
        size in (1, whole) for size, whole in zip(reversed(tensor.shape), reversed(ids.shape))
    )
    if not fits or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: expected {dtype}, broadcastable to ids {tuple(ids.shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _check_counting(counters, ids, keys):
    _check_counters("counters", counters)
    _check_ids("ids", ids, ids.dim())
    _check_broadcast("keys", keys, torch.int64, ids)


def _check_rows(rows):
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows: expected an int64 vector (n,), got {rows.dtype} {tuple(rows.shape)}")


def _add(counters, row):
    """Each row as often as it is there, all at once: as one by one, or less where different rows share counters."""
    different, times = row.unique(return_counts=True)
    places = counters_of(different, counters.shape[1])
    after = counters.gather(1, places).amin(0) + times
    after = after.clamp(max=torch.iinfo(torch.int32).max).int()
    counters.scatter_reduce_(1, places, after.expand_as(places), "amax")


def _count_ids(counters, ids, keys, clicks=None, labels=None):
    _check_counting(counters, ids, keys)
    if (clicks is None) != (labels is None):
        raise ValueError("clicks and labels: expected both or neither")
    row = row_hash(ids, keys)
    if clicks is not None:
        _check_counters("clicks", clicks)
        if clicks.shape != counters.shape:
            raise ValueError(
                f"clicks: expected the shape of counters, {tuple(counters.shape)}, got {tuple(clicks.shape)}"
            )
        _check_broadcast("labels", labels, torch.bool, ids)
        _add(clicks, row[labels.expand_as(row)])
    _add(counters, row.flatten())


def _id_counts(counters, rows):
    _check_counters("counters", counters)
    _check_rows(rows)
    return counters.gather(1, counters_of(rows, counters.shape[1])).amin(0).long()


def _frequent_rows(counters, ids, keys, times, recent):
    """recent is for the kernel, which asks it whether it gave a row already."""
    _check_counting(counters, ids, keys)
    if recent.dim() != 1 or recent.shape[0] < 2 or recent.dtype != torch.int64 or not recent.is_contiguous():
        raise ValueError(
            f"recent: expected a contiguous int64 vector of 2 or more, got {recent.dtype} {tuple(recent.shape)}"
        )
    rows = row_hash(ids, keys).unique()
    return rows[_id_counts(counters, rows) >= times]


def _observe_ids(counters, ids, keys, filter, threshold):
    _check_counting(counters, ids, keys)
    _check_filter(filter)
    rows = row_hash(ids, keys)[~admits(filter, ids, keys)]
    _add(counters, rows)
    rows = rows.unique()
    return rows[_id_counts(counters, rows) >= threshold]


def _check_out(out, shape, dtype):
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out: expected {dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")


def _out(body, inputs):
    def write(*arguments):
        out = arguments[inputs]
        embeddings = body(*arguments[:inputs], *arguments[inputs + 1 :])
        _check_out(out, embeddings.shape, embeddings.dtype)
        out.copy_(embeddings)

    return write


REFERENCE = {
    "lookup": _lookup,
    "lookup_forward": _lookup,
    "lookup_out": _out(_lookup, 2 + _TABLE_ARGUMENTS + 1),
    "lookup_backward": _lookup_backward,
    "bag": _bag,
    "bag_forward": _bag,
    "bag_out": _out(_bag, 5 + _TABLE_ARGUMENTS + 1),
    "bag_backward": _bag_backward,
    "bag_weights_backward": _bag_weights_backward,
    "update_": _update,
    "dot_interaction": _dot_interaction,
    "dot_interaction_backward": _dot_interaction_backward,
    "mlp": _mlp,
    "count_ids_": _count_ids,
    "id_counts": _id_counts,
    "frequent_rows_": _frequent_rows,
    "observe_ids_": _observe_ids,
}
for _name, _body in REFERENCE.items():
    torch.library.impl(f"robe::{_name}", "CompositeExplicitAutograd", _body)


# ---------------------------------------------------------------------------------------------------------------------
# Fakes: the shapes alone, for torch.compile and torch.export


@torch.library.register_fake("robe::lookup")
@torch.library.register_fake("robe::lookup_forward")
def _(weight, ids, *tables_and_scale):
    tables, scale = _split(tables_and_scale)
    _check_array(weight, scale)
    _check_lookup(weight, ids, *tables)
    return weight.new_empty(*ids.shape, tables[2], dtype=_embedding_dtype(weight))


@torch.library.register_fake("robe::bag")
@torch.library.register_fake("robe::bag_forward")
def _(weight, values, offsets, factors, mode, *tables_and_scale):
    tables, scale = _split(tables_and_scale)
    _check_array(weight, scale)
    _check_bags(weight, values, offsets, factors, mode, *tables)
    features, embedding_dim = tables[0].shape[0], tables[2]
    shape = (offsets.shape[0] - 1) // features, features, embedding_dim
    return weight.new_empty(shape, dtype=_embedding_dtype(weight))


@torch.library.register_fake("robe::lookup_backward")
@torch.library.register_fake("robe::bag_backward")
def _(grad, weight, *_):
    return torch.empty_like(weight)


@torch.library.register_fake("robe::bag_weights_backward")
def _(grad, weight, values, offsets, per_sample_weights, *_):
    return torch.empty_like(per_sample_weights)


@torch.library.register_fake("robe::dot_interaction")
def _(dense, embeddings):
    count = embeddings.shape[1] + 1
    return dense.new_empty(dense.shape[0], dense.shape[1] + count * (count - 1) // 2)


@torch.library.register_fake("robe::dot_interaction_backward")
def _(grad, dense, embeddings):
    return dense.new_empty(dense.shape), embeddings.new_empty(embeddings.shape)


@torch.library.register_fake("robe::mlp")
def _(x, weights, biases, width, relu_last):
    _check_mlp(x, weights, biases, width)
    return x.new_empty(x.shape[0], width)


@torch.library.register_fake("robe::id_counts")
def _(counters, rows):
    return torch.empty_like(rows)


@torch.library.register_fake("robe::frequent_rows_")
@torch.library.register_fake("robe::observe_ids_")
def _(counters, ids, *_):
    return ids.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.register_fake("robe::count_ids_")
@torch.library.register_fake("robe::lookup_out")
@torch.library.register_fake("robe::bag_out")
@torch.library.register_fake("robe::update_")
def _(*_, **__):
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
    ctx.arguments = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]


def _arguments(ctx):
    saved = iter(ctx.saved_tensors)
    return [next(saved) if constant is None else constant[0] for constant in ctx.arguments]


def _lookup_autograd(ctx, grad):
    *arguments, _scale, filter = _arguments(ctx)
    return torch.ops.robe.lookup_backward(grad, *arguments, filter), *[None] * (len(arguments) + 1)


def _bag_autograd(ctx, grad):
    *arguments, _scale, filter = _arguments(ctx)
    gradients = [None] * (len(arguments) + 2)
    if ctx.needs_input_grad[0]:
        gradients[0] = torch.ops.robe.bag_backward(grad, *arguments, filter)
    if ctx.needs_input_grad[3]:
        gradients[3] = torch.ops.robe.bag_weights_backward(grad, *arguments, filter)
    return tuple(gradients)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("robe: second derivatives are not supported")


def _save_all(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _dot_interaction_autograd(ctx, grad):
    return torch.ops.robe.dot_interaction_backward(grad, *ctx.saved_tensors)


for _name in ("lookup_backward", "bag_backward", "bag_weights_backward", "dot_interaction_backward"):
    torch.library.register_autograd(f"robe::{_name}", _no_second_derivative)
torch.library.register_autograd("robe::lookup", _lookup_autograd, setup_context=_save)
torch.library.register_autograd("robe::bag", _bag_autograd, setup_context=_save)
torch.library.register_autograd("robe::dot_interaction", _dot_interaction_autograd, setup_context=_save_all)

import robe.backends  # noqa: E402, F401  (the CPU kernels, now that the operators are there)
