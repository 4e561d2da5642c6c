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

PANEL = 32  # outputs of a layer whose weights lie together

for _schema in (
    "dot_interaction(Tensor dense, Tensor embeddings) -> Tensor",
    "dot_interaction_backward(Tensor grad, Tensor dense, Tensor embeddings) -> (Tensor, Tensor)",
    "mlp(Tensor x, Tensor[] weights, Tensor[] biases, int width, bool relu_last) -> Tensor",
    f"make_plan(Tensor weight, {TABLES_SCHEMA}, Tensor? scale, Tensor? filter, "
    "Tensor[] weights, Tensor[] biases, int[] widths, int[] layers) -> Tensor",
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


def pack_linear(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lay out the weights of a linear layer as ``mlp`` takes them.

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


def _check_mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], width: int) -> None:
    require_tensors(x=x)
    if x.dim() != 2 or x.dtype != torch.float32:
        raise ValueError(f"x: expected a float32 matrix (B, fan_in), got {x.dtype} {tuple(x.shape)}")
    if not weights or len(weights) != len(biases):
        raise ValueError("weights and biases: expected one of each for each layer")
    before = 0
    for i, (w, b) in enumerate(zip(weights, biases)):
        fits = w.dim() == 3 and (i == 0 or w.shape[1] <= before)
        if not fits or w.shape[2] != PANEL or w.dtype != torch.float32 or not w.is_contiguous():
            fan_in = before if i else "fan_in"
            got = f"{w.dtype} {tuple(w.shape)}"
            raise ValueError(f"weights: expected contiguous float32 (panels, {fan_in}, {PANEL}), got {got}")
        before = w.shape[0] * PANEL
        if b.shape != (before,) or b.dtype != torch.float32 or not b.is_contiguous():
            raise ValueError(f"biases: expected contiguous float32 ({before},), got {b.dtype} {tuple(b.shape)}")
    if not 1 <= width <= before:
        raise ValueError(f"width: expected 1 to {before}, got {width}")
    if x.shape[1] != weights[0].shape[1]:
        raise ValueError(f"x: expected (B, {weights[0].shape[1]}), got {tuple(x.shape)}")


def _mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], width: int, relu_last: bool) -> Tensor:
    _check_mlp(x, weights, biases, width)
    for i, (w, b) in enumerate(zip(weights, biases)):
        x = torch.addmm(b, x[:, : w.shape[1]], w.transpose(0, 1).reshape(w.shape[1], -1))
        if i + 1 < len(weights) or relu_last:
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
    *tables, scale, filter, weights, biases, widths, layers = arguments
    if len(layers) < 2 or len(layers) % 2 or len(widths) != len(layers):
        raise ValueError("widths and layers: expected entries for bottom, top, and V and W of each layer of a cross")
    if min(layers) < 1 or not sum(layers) == len(weights) == len(biases):
        raise ValueError(f"weights and biases: expected {sum(layers)} of each, as layers says")
    ends = list(itertools.accumulate(layers))
    chains = [
        (weights[end - count : end], biases[end - count : end], width, i == 0)
        for i, (end, count, width) in enumerate(zip(ends, layers, widths))
    ]
    plan = _Plan(weight, tuple(tables), (scale, filter), chains)
    features = len(tables[0])
    _run(plan, torch.zeros(0, chains[0][0][0].shape[1]), tables[0].new_zeros(0, features), None)
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
def _(x, weights, biases, width, relu_last):
    _check_mlp(x, weights, biases, width)
    return x.new_empty(x.shape[0], width)


def _save_all(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dot_interaction_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dlrm.dot_interaction_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("dlrm::dot_interaction_backward", refuse_second_derivative)
torch.library.register_autograd("dlrm::dot_interaction", _dot_interaction_autograd, setup_context=_save_all)

backends.load_library(Path(__file__).parent)
