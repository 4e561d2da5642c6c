"""Steps of optimizers on the slots that lookups and bags touched: no gradient of the array is kept."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robe.ops import REFERENCE
from robe.ops.layout import UpdateLists, check_step
from robe.triton_kernels.device import divide
from robe.triton_kernels.launch import LaunchPlan
from robe.triton_kernels.pieces import sort_pieces, sum_segment


@triton.jit(do_not_specialize=["size"])
def _update_kernel(
    slots, sources, lengths, multipliers, first, last, grad, sums, weight, state_0, state_1, size,
    rate, decay, option_0, option_1, option_2, option_3, option_4,
    RULE: tl.constexpr, SUM: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of a segment of the array, and apply a rule where pieces touched it."""
    slot, value, touched = sum_segment(
        slots, sources, lengths, multipliers, first, last, grad, sums, SUM, STRIDE, PIECES, WIDTH
    )
    known = (slot < size) & touched
    w = tl.load(weight + slot, known, 0).to(SUM)
    value = value + decay * w
    if state_0 is not None:
        s = tl.load(state_0 + slot, known, 0).to(SUM)
    if RULE == "sgd":
        if state_0 is not None:
            value = option_0 * s + value
            s = value
        w = w - rate * value
    elif RULE == "adagrad":
        s = s + value * value
        w = w - divide(rate * value, tl.sqrt_rn(s) + option_0)
    else:
        v = tl.load(state_1 + slot, known, 0).to(SUM)
        s = option_0 * s + option_1 * value
        v = option_2 * v + option_3 * value * value
        w = w - divide(rate * s, tl.sqrt_rn(v) + option_4)
        tl.store(state_1 + slot, v.to(state_1.dtype.element_ty), known)
    if state_0 is not None:
        tl.store(state_0 + slot, s.to(state_0.dtype.element_ty), known)
    tl.store(weight + slot, w.to(weight.dtype.element_ty), known)


def _rule_options(rule: str, own: Sequence[float]) -> list[float]:
    """The options of a rule as the kernel takes them: five numbers."""
    if rule == "adam":
        beta1, beta2, eps = own
        return [beta1, 1 - beta1, beta2, 1 - beta2, eps]
    return [*own, *[0.0] * 5][:5]


def _update(weight: Tensor, state: Sequence[Tensor], rule: str, options: Sequence[float], *lists: Any) -> None:
    if weight.dtype == torch.float64 or not all(x.is_contiguous() for x in (weight, *state)):
        REFERENCE["update_"](weight, state, rule, options, *lists)  # numbers reach kernels as float32
        return
    check_step(weight, state, rule, options, lists[0])
    rate, decay, *own = options
    if rule == "sgd" and not own[0]:
        state = []
    numbers = _rule_options(rule, own)
    calls = []
    for grad, call in UpdateLists(*lists).unpack():
        plan = LaunchPlan(weight, call)
        plan.check_grad(grad, weight)
        calls.append((grad, plan))
    if not any(plan.n_bags for _, plan in calls):
        return
    state_0, state_1 = (*state, None, None)[:2]
    of_rule = {f"option_{k}": number for k, number in enumerate(numbers)}
    sort_pieces(weight, calls).launch(
        _update_kernel, weight=weight, state_0=state_0, state_1=state_1, size=weight.shape[0], rate=rate, decay=decay,
        **of_rule, RULE=rule,
    )  # fmt: skip


BODIES: dict[str, Callable[..., Any]] = {"update_": _update}
