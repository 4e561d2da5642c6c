"""Schemas, fakes and autograd of the operators ``torch.ops.robe.*``.

    lookup(weight, ids (B, F)) -> (B, F, D)                    one id per feature
    bag(weight, values (n,), offsets (F * B + 1,)) -> (B, F, D)  a bag of ids per feature, pooled
    lookup_forward, bag_forward                                the same without autograd, quicker to call
    lookup_out, bag_out                                        the same, written into a tensor
    lookup_backward, bag_backward -> (m,)                      the dense gradient of the array
    bag_weights_backward -> (n,)                               the gradient of per_sample_weights
    update_(weight, ...)                                       an optimizer's rule on the slots that lookups touched
    sum_gradients(weight, ...) -> (n,), (n,)                   the slots that lookups touched, and their gradients
    count_ids_, id_counts, frequent_rows_, observe_ids_        counting for an admission (robe/ops/counting.py)

B examples, F features, D = embedding_dim, m = number of weights. Values are features major: feature f of example b is
bag k = f * B + b, values[offsets[k] : offsets[k + 1]]. Both take, per feature, the table's hash key (``hashing.slots``)
and its num_embeddings (0: unbounded), so that any number of tables costs one call.

Autograd keeps ids and the weight, never an index: the backward operators hash again.

weight is a vector (m,) of floats; or of int8 with ``scale``, float32, one factor for each group of weights. Groups are
runs of G weights, G the smallest power of two with which the scales cover the array; the embeddings are then float32.

filter, (W,) int64, with "mix" only, holds the ids that have an embedding of their own (robe/sketches.py); the others of
a table read that of SHARED_ID. Bounds and padding_idx are about the ids as they are given.

Bodies register themselves: those in plain torch here, kernels in robe/backends.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robe.ops import counting, reference
from robe.ops.layout import (
    Call,
    UpdateLists,
    accumulation_dtype,
    check_array,
    embedding_dtype,
    unpack_bag,
    unpack_lookup,
)

REFERENCE = {**reference.BODIES, **counting.BODIES}

_LAYOUT = "int embedding_dim, int block_size, str hash, bool sign, int? padding_idx"
TABLES_SCHEMA = f"Tensor table_keys, Tensor num_embeddings, {_LAYOUT}"
_BAGS = "Tensor values, Tensor offsets, Tensor? per_sample_weights, str pooling"
_FILTER = "Tensor? filter=None"
_LISTS = ", ".join(f"Tensor[] {name}" for name in UpdateLists._fields if name != "layouts")
SCHEMAS = (
    f"lookup(Tensor weight, Tensor ids, {TABLES_SCHEMA}, Tensor? scale=None, {_FILTER}) -> Tensor",
    f"lookup_forward(Tensor weight, Tensor ids, {TABLES_SCHEMA}, Tensor? scale=None, {_FILTER}) -> Tensor",
    f"lookup_out(Tensor weight, Tensor ids, {TABLES_SCHEMA}, Tensor? scale, Tensor(a!) out, {_FILTER}) -> ()",
    f"lookup_backward(Tensor grad, Tensor weight, Tensor ids, {TABLES_SCHEMA}, {_FILTER}) -> Tensor",
    f"bag(Tensor weight, {_BAGS}, {TABLES_SCHEMA}, Tensor? scale=None, {_FILTER}) -> Tensor",
    f"bag_forward(Tensor weight, {_BAGS}, {TABLES_SCHEMA}, Tensor? scale=None, {_FILTER}) -> Tensor",
    f"bag_out(Tensor weight, {_BAGS}, {TABLES_SCHEMA}, Tensor? scale, Tensor(a!) out, {_FILTER}) -> ()",
    f"bag_backward(Tensor grad, Tensor weight, {_BAGS}, {TABLES_SCHEMA}, {_FILTER}) -> Tensor",
    f"bag_weights_backward(Tensor grad, Tensor weight, {_BAGS}, {TABLES_SCHEMA}, {_FILTER}) -> Tensor",
    "count_ids_(Tensor(a!) counters, Tensor ids, Tensor keys, Tensor(b!)? clicks=None, Tensor? labels=None) -> ()",
    "id_counts(Tensor counters, Tensor row_hashes) -> Tensor",
    "frequent_rows_(Tensor counters, Tensor ids, Tensor keys, int times, Tensor(a!) recent) -> Tensor",
    "observe_ids_(Tensor(a!) counters, Tensor ids, Tensor keys, Tensor filter, int threshold) -> Tensor",
    f"update_(Tensor(a!) weight, Tensor(b!)[] state, str rule, float[] options, {_LISTS}, int[] layouts) -> ()",
    f"sum_gradients(Tensor weight, {_LISTS}, int[] layouts) -> (Tensor, Tensor)",
)
for _schema in SCHEMAS:
    _name, _signature = _schema.split("(", 1)
    torch.library.define(f"robe::{_name}", f"({_signature}", tags=torch.Tag.pt2_compliant_tag)
for _name, _body in REFERENCE.items():
    torch.library.impl(f"robe::{_name}", "CompositeExplicitAutograd", _body)


# ---------------------------------------------------------------------------------------------------------------------
# Fakes: the shapes alone, for torch.compile and torch.export


def register_fakes(*names: str) -> Callable[[Callable[..., Any]], None]:
    """Register a fake for operators such as "robe::lookup", which refuses meta tensors beside real ones, and None.

    torch calls the fake as soon as one argument is a meta tensor. What it returns holds no values, or has the device of
    a real argument and unset memory. The tables alone may be real: a layer keeps them so while its array is on meta.

    Raises:
        ValueError: by the fake: its arguments are mixed, or there is none for a tensor; names the argument.
    """

    def register(fake: Callable[..., Any]) -> None:
        for name in names:
            torch.library.register_fake(name, _whole(name, fake))

    return register


def _whole(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    namespace, operator = name.split("::")
    arguments_of = getattr(getattr(torch.ops, namespace), operator).default._schema.arguments
    parameters = [argument.name for argument in arguments_of]
    needed = {argument.name for argument in arguments_of if str(argument.type) == "Tensor"}

    def checked(*arguments: Any, **named: Any) -> Any:
        given = {**dict(zip(parameters, arguments)), **named}
        for parameter in needed:
            if given.get(parameter) is None:
                raise ValueError(f"{parameter}: expected a tensor, got None")
        result = fake(*arguments, **named)  # which may have more to say of the arguments
        real, meta = [], []
        for parameter, value in given.items():
            tensors = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, Tensor)]
            meta += [parameter for x in tensors if x.is_meta]
            real += [parameter for x in tensors if not x.is_meta and parameter not in ("table_keys", "num_embeddings")]
        if real and meta:
            raise ValueError(
                f"{meta[0]}: expected a tensor with values, as {real[0]} is, got one on the meta device; was a part of "
                "the model left on the meta device?"
            )
        return result

    return checked


def _checked(weight: Tensor, call: Call) -> Call:
    check_array(weight, call.scale)
    call.check(weight)
    return call


@register_fakes("robe::lookup", "robe::lookup_forward")
def _(weight, *arguments):
    call = _checked(weight, unpack_lookup(arguments))
    return weight.new_empty(*call.ids.shape, call.tables.embedding_dim, dtype=embedding_dtype(weight))


@register_fakes("robe::bag", "robe::bag_forward")
def _(weight, *arguments):
    call = _checked(weight, unpack_bag(arguments))
    assert call.bags is not None
    features = call.tables.table_keys.shape[0]
    shape = (call.bags.offsets.shape[0] - 1) // features, features, call.tables.embedding_dim
    return weight.new_empty(shape, dtype=embedding_dtype(weight))


@register_fakes("robe::lookup_backward", "robe::bag_backward")
def _(grad, weight, *_):
    return torch.empty_like(weight)


@register_fakes("robe::bag_weights_backward")
def _(grad, weight, values, offsets, per_sample_weights, *_):
    return torch.empty_like(per_sample_weights)


@register_fakes("robe::id_counts")
def _(counters, row_hashes):
    return torch.empty_like(row_hashes)


@register_fakes("robe::frequent_rows_", "robe::observe_ids_")
def _(counters, ids, *_):
    return ids.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@register_fakes("robe::sum_gradients")
def _(weight, *_):
    sums = weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=accumulation_dtype(weight.dtype))
    return torch.empty_like(sums, dtype=torch.int64), sums


@register_fakes("robe::count_ids_", "robe::lookup_out", "robe::bag_out", "robe::update_")
def _(*_, **__):
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs, reads_weight=False)


def _save_bag(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, per_sample_weights, pooling, *_ = inputs
    _save(ctx, inputs, reads_weight=pooling == "max" or per_sample_weights is not None)


def _save(ctx: Any, inputs: tuple[Any, ...], reads_weight: bool) -> None:
    weight, *others = inputs
    # Other gradients depend on the size of the weights only: as in torch, they may change before the backward pass.
    ctx.weight = None if reads_weight else weight.detach()
    inputs = (weight if reads_weight else None, *others)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.arguments = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _arguments(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    arguments = [next(saved) if constant is None else constant[0] for constant in ctx.arguments]
    return arguments if ctx.weight is None else [ctx.weight, *arguments[1:]]


def _lookup_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *arguments, _scale, filter = _arguments(ctx)
    return torch.ops.robe.lookup_backward(grad, *arguments, filter), *[None] * (len(arguments) + 1)


def _bag_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *arguments, _scale, filter = _arguments(ctx)
    gradients: list[Tensor | None] = [None] * (len(arguments) + 2)
    if ctx.needs_input_grad[0]:
        gradients[0] = torch.ops.robe.bag_backward(grad, *arguments, filter)
    if ctx.needs_input_grad[3]:
        gradients[3] = torch.ops.robe.bag_weights_backward(grad, *arguments, filter)
    return tuple(gradients)


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """Refuse to be the backward of a backward operator, of robe's and of the model's.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("robe: second derivatives are not supported")


for _name in ("lookup_backward", "bag_backward", "bag_weights_backward"):
    torch.library.register_autograd(f"robe::{_name}", refuse_second_derivative)
torch.library.register_autograd("robe::lookup", _lookup_autograd, setup_context=_save_lookup)
torch.library.register_autograd("robe::bag", _bag_autograd, setup_context=_save_bag)
