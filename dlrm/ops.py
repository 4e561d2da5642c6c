"""The model's own operators, ``torch.ops.dlrm.*``: schemas, fakes, autograd, and reference bodies in plain torch.

    dot_interaction(dense (B, D), embeddings (B, F, D)) -> (B, D + (F + 1) * F / 2)    dot products of all pairs
    dot_interaction_backward                                                           its gradients
    mlp(x (B, fan_in)) -> (B, width)                           linear layers with ReLU between them, without autograd
    make_plan(weight, ...) -> (1,) int64                       the number of a whole model, ready to predict
    run_plan(plan, dense (B, num_dense), ids (B, F) or embeddings (B, F, D)) -> (B,)     its probabilities
    drop_plan(plan)                                            frees it

B examples, F features, D = embedding_dim. The kernels for CPUs are in dlrm/csrc; ``robe.backends`` loads them.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robe import backends
from robe.ops.layout import require_tensors
from robe.ops.schema import TABLES_SCHEMA, refuse_second_derivative, register_fakes

PANEL = 32  # outputs of a dense layer whose weights lie together
BLOCKS = (32, 16)  # outputs of a block of a sparse layer

_LAYERS = "Tensor[] weights, Tensor[] biases, Tensor[] inputs, Tensor[] starts"

for _schema in (
    "dot_interaction(Tensor dense, Tensor embeddings) -> Tensor",
    "dot_interaction_backward(Tensor grad, Tensor dense, Tensor embeddings) -> (Tensor, Tensor)",
    f"mlp(Tensor x, {_LAYERS}, int width, bool relu_last) -> Tensor",
    f"make_plan(Tensor weight, {TABLES_SCHEMA}, Tensor? scale, Tensor? filter, "
    f"{_LAYERS}, int[] widths, int[] layers) -> Tensor",
    "run_plan(Tensor plan, Tensor dense, Tensor? ids, Tensor? embeddings=None) -> Tensor",
    "drop_plan(Tensor plan) -> ()",
):
    _name, _signature = _schema.split("(", 1)
    torch.library.define(f"dlrm::{_name}", f"({_signature}", tags=torch.Tag.pt2_compliant_tag)


def _vectors(dense: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All vectors (B, F + 1, D), and the two of each pair."""
    require_tensors(dense=dense, embeddings=embeddings)
    if dense.dim() != 2 or embeddings.dim() != 3 or dense.shape != embeddings.shape[::2]:
        raise ValueError(
            "dense and embeddings: expected (B, D) and (B, F, D), "
            f"got {tuple(dense.shape)} and {tuple(embeddings.shape)}"
        )
    if dense.dtype != embeddings.dtype or not dense.is_floating_point():
        raise ValueError(
            f"dense and embeddings: expected one floating-point dtype, got {dense.dtype} and {embeddings.dtype}"
        )
    count = embeddings.shape[1] + 1
    first, second = torch.tril_indices(count, count, offset=-1, device=dense.device)
    return torch.cat([dense.unsqueeze(1), embeddings], dim=1), first, second  # (B, F + 1, D)


def _dot_interaction(dense: Tensor, embeddings: Tensor) -> Tensor:
    vectors, first, second = _vectors(dense, embeddings)
    dots = torch.bmm(vectors, vectors.transpose(1, 2))
    return torch.cat([dense, dots[:, first, second]], dim=1)


def _dot_interaction_backward(grad: Tensor, dense: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    vectors, first, second = _vectors(dense, embeddings)
    width = dense.shape[1] + len(first)
    if grad.shape != (len(dense), width):
        raise ValueError(f"grad: expected shape {(len(dense), width)}, got {tuple(grad.shape)}")
    if not grad.is_floating_point():
        raise ValueError(f"grad: expected floating-point numbers, got {grad.dtype}")
    grad = grad.to(vectors.dtype)
    dots = vectors.new_zeros(len(vectors), vectors.shape[1], vectors.shape[1])
    dots[:, first, second] = grad[:, dense.shape[1] :]
    grad_vectors = torch.bmm(dots + dots.transpose(1, 2), vectors)
    return grad_vectors[:, 0] + grad[:, : dense.shape[1]], grad_vectors[:, 1:].contiguous()


class PackedLinear(NamedTuple):
    """A linear layer as ``mlp`` takes it. Its outputs come in blocks; those past its end have zeros.

    Attributes:
        weights: dense: (panels, fan_in, PANEL); sparse: (n, block), for one input and the outputs of a block each.
        bias: (blocks * block,).
        inputs: sparse: (n,) int32, the input of each; dense: empty.
        starts: sparse: (blocks + 2,) int64, where the weights of each block start; then n; then fan_in. Dense: empty.
    """

    weights: Tensor
    bias: Tensor
    inputs: Tensor
    starts: Tensor


def pack_linear(weight: Tensor, bias: Tensor | None, block: int | None = None) -> PackedLinear:
    """Lay out the weights of a linear layer as ``mlp`` takes them.

    Args:
        weight: (fan_out, fan_in) float32.
        bias: (fan_out,) or None.
        block: one of BLOCKS, to leave out the weights of this many outputs that begin at a multiple of it for an input,
            where all are zero; None: leave out none. The first block keeps those of inputs that no other block has.
    """
    fan_out, fan_in = weight.shape
    size = PANEL if block is None else block
    more = -fan_out % size
    panels = torch.nn.functional.pad(weight, (0, 0, 0, more)).view(-1, size, fan_in).transpose(1, 2).contiguous()
    bias = weight.new_zeros(fan_out) if bias is None else bias
    bias = torch.nn.functional.pad(bias, (0, more)).contiguous()
    if block is None:
        return PackedLinear(panels, bias, torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64))
    kept = (panels != 0).any(2)  # (blocks, fan_in)
    kept[0] |= ~kept.any(0)  # so that NaN and infinity of any input are seen
    ends = kept.sum(1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([fan_in])])
    return PackedLinear(panels[kept], bias, kept.nonzero()[:, 1].int(), starts)


def _check_layers(weights: Sequence[Tensor], biases: Sequence[Tensor], inputs: Sequence[Tensor], starts) -> None:
    if not weights or not len(weights) == len(biases) == len(inputs) == len(starts):
        raise ValueError("weights, biases, inputs and starts: expected one of each for each layer")


def _fan_in(w: Tensor, starts: Tensor) -> int:
    return int(starts[-1]) if w.dim() == 2 else w.shape[1]


def _check_layer(w: Tensor, b: Tensor, inputs: Tensor, starts: Tensor, most: int | None) -> int:
    """Check a layer; most: the inputs that it may have, None: any number. Returns its outputs, rounded up to blocks."""
    got = f"{w.dtype} {tuple(w.shape)}"
    fits = w.dtype == torch.float32 and w.is_contiguous()
    if w.dim() == 2 or inputs.numel():
        if not fits or w.dim() != 2 or w.shape[1] not in BLOCKS:
            raise ValueError(f"weights: expected contiguous float32 (n, 16) or (n, 32), got {got}")
        if inputs.shape != w.shape[:1] or inputs.dtype != torch.int32 or not inputs.is_contiguous():
            raise ValueError(f"inputs: expected contiguous int32 ({len(w)},), got {inputs.dtype} {tuple(inputs.shape)}")
        if starts.dim() != 1 or len(starts) < 2 or starts.dtype != torch.int64 or not starts.is_contiguous():
            raise ValueError(
                f"starts: expected contiguous int64 (blocks + 2,), got {starts.dtype} {tuple(starts.shape)}"
            )
        fan_in, bounds = int(starts[-1]), starts[:-1]
        if not 0 <= fan_in < 2**31 or (most is not None and fan_in > most):
            raise ValueError(f"starts: expected at most {most} inputs, got {fan_in}")
        if bounds[0] != 0 or bounds[-1] != len(w) or (bounds.diff() < 0).any():
            raise ValueError(f"starts: expected to rise from 0 to {len(w)}, the number of weights")
        if ((inputs < 0) | (inputs >= fan_in)).any():
            raise ValueError(f"inputs: expected 0 to {fan_in - 1}")
        outputs = (len(starts) - 2) * w.shape[1]
    else:
        if not fits or w.dim() != 3 or w.shape[2] != PANEL or (most is not None and w.shape[1] > most):
            fan_in_text = "fan_in" if most is None else most
            raise ValueError(f"weights: expected contiguous float32 (panels, {fan_in_text}, {PANEL}), got {got}")
        outputs = w.shape[0] * PANEL
    if b.shape != (outputs,) or b.dtype != torch.float32 or not b.is_contiguous():
        raise ValueError(f"biases: expected contiguous float32 ({outputs},), got {b.dtype} {tuple(b.shape)}")
    return outputs


def _check_mlp(x: Tensor, layers: Sequence[Sequence[Tensor]], width: int) -> None:
    require_tensors(x=x)
    if x.dim() != 2 or x.dtype != torch.float32:
        raise ValueError(f"x: expected a float32 matrix (B, fan_in), got {x.dtype} {tuple(x.shape)}")
    _check_layers(*layers)
    before = None
    for w, b, inputs, starts in zip(*layers):
        before = _check_layer(w, b, inputs, starts, before)
    assert before is not None
    if not 1 <= width <= before:
        raise ValueError(f"width: expected 1 to {before}, got {width}")
    fan_in = _fan_in(layers[0][0], layers[3][0])
    if x.shape[1] != fan_in:
        raise ValueError(f"x: expected (B, {fan_in}), got {tuple(x.shape)}")


def _matrix(w: Tensor, inputs: Tensor, starts: Tensor) -> Tensor:
    """The weights of a layer, (fan_in, outputs)."""
    if w.dim() == 3:
        return w.transpose(0, 1).reshape(w.shape[1], -1)
    bounds, fan_in = starts[:-1], int(starts[-1])
    block_of = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
    panels = w.new_zeros(fan_in, len(bounds) - 1, w.shape[1])
    return panels.index_put_((inputs.long(), block_of), w, accumulate=True).flatten(1)


def _mlp(x: Tensor, *arguments: Any) -> Tensor:
    *layers, width, relu_last = arguments
    _check_mlp(x, layers, width)
    for i, (w, b, inputs, starts) in enumerate(zip(*layers)):
        matrix = _matrix(w, inputs, starts)
        x = torch.addmm(b, x[:, : len(matrix)], matrix)
        if i + 1 < len(layers[0]) or relu_last:
            x = x.relu()
    return x[:, :width].contiguous()


class _Plan(NamedTuple):
    """What make_plan was given: a lookup without its ids, and chains as arguments of mlp: bottom, top, cross net."""

    weight: Tensor
    tables: tuple[Any, ...]
    rest: tuple[Tensor | None, Tensor | None]
    chains: list[tuple[Any, ...]]


_plans: dict[int, _Plan] = {}
_numbers = itertools.count(1)


def _make_plan(weight: Tensor, *arguments: Any) -> Tensor:
    *tables, scale, filter, weights, biases, inputs, starts, widths, layers = arguments
    _check_layers(weights, biases, inputs, starts)
    if len(layers) < 2 or len(layers) % 2 or len(widths) != len(layers):
        raise ValueError("widths and layers: expected entries for bottom, top, and V and W of each layer of a cross")
    if min(layers) < 1 or sum(layers) != len(weights):
        raise ValueError(f"weights: expected {sum(layers)}, as layers says")
    ends = list(itertools.accumulate(layers))
    chains = [
        (*(x[end - count : end] for x in (weights, biases, inputs, starts)), width, i == 0)
        for i, (end, count, width) in enumerate(zip(ends, layers, widths))
    ]
    plan = _Plan(weight, tuple(tables), (scale, filter), chains)
    features = len(tables[0])
    _run(plan, torch.zeros(0, _fan_in(weights[0], starts[0])), tables[0].new_zeros(0, features), None)
    number = next(_numbers)
    _plans[number] = plan
    return torch.tensor([number])


def _run(plan: _Plan, dense: Tensor, ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
    if embeddings is None:
        embeddings = torch.ops.robe.lookup_forward(plan.weight, ids, *plan.tables, *plan.rest).float()
    bottom, top, *cross = plan.chains
    x = torch.ops.dlrm.mlp(dense, *bottom)
    if cross:
        x = x0 = torch.cat([x, embeddings.flatten(1)], dim=1)
        for v, w in zip(cross[::2], cross[1::2]):
            x = torch.addcmul(x, x0, torch.ops.dlrm.mlp(torch.ops.dlrm.mlp(x, *v), *w))
    else:
        x = torch.ops.dlrm.dot_interaction(x, embeddings)
    return torch.ops.dlrm.mlp(x, *top).sigmoid().squeeze(1)


def _number(plan: Tensor) -> int:
    require_tensors(plan=plan)
    if plan.dtype != torch.int64 or plan.shape != (1,):
        raise ValueError(f"plan: expected int64 (1,), got {plan.dtype} {tuple(plan.shape)}")
    return int(plan)


def _run_plan(plan: Tensor, dense: Tensor, ids: Tensor | None, embeddings: Tensor | None = None) -> Tensor:
    require_tensors(dense=dense)
    if _number(plan) not in _plans:
        raise ValueError(f"plan: expected one that make_plan returned, got {_number(plan)}")
    if (ids is None) == (embeddings is None):
        raise ValueError("ids and embeddings: expected one of them")
    return _run(_plans[_number(plan)], dense, ids, embeddings)


def _drop_plan(plan: Tensor) -> None:
    _plans.pop(_number(plan), None)


REFERENCE: dict[str, Callable[..., Any]] = {
    "dot_interaction": _dot_interaction,
    "dot_interaction_backward": _dot_interaction_backward,
    "mlp": _mlp,
    "make_plan": _make_plan,
    "run_plan": _run_plan,
    "drop_plan": _drop_plan,
}
for _name, _body in REFERENCE.items():
    torch.library.impl(f"dlrm::{_name}", "CompositeExplicitAutograd", _body)


@register_fakes("dlrm::dot_interaction")
def _(dense, embeddings):
    count = embeddings.shape[1] + 1
    return dense.new_empty(dense.shape[0], dense.shape[1] + count * (count - 1) // 2)


@register_fakes("dlrm::dot_interaction_backward")
def _(grad, dense, embeddings):
    return dense.new_empty(dense.shape), embeddings.new_empty(embeddings.shape)


@register_fakes("dlrm::make_plan")
def _(weight, *_):
    return weight.new_empty(1, dtype=torch.int64)


@register_fakes("dlrm::drop_plan")
def _(plan):
    return None


@register_fakes("dlrm::run_plan")
def _(plan, dense, ids, embeddings=None):
    return dense.new_empty(dense.shape[0])


@register_fakes("dlrm::mlp")
def _(x, weights, biases, inputs, starts, width, relu_last):
    return x.new_empty(x.shape[0], width)


def _save_all(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dot_interaction_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dlrm.dot_interaction_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("dlrm::dot_interaction_backward", refuse_second_derivative)
torch.library.register_autograd("dlrm::dot_interaction", _dot_interaction_autograd, setup_context=_save_all)

backends.load_library(Path(__file__).parent)
