"""SlotGradient: the gradient of an array for robe.optim, kept as the gradients of the embeddings that were read.

A dense gradient is as large as the array. A SlotGradient keeps the gradients (B, F, D) of the embeddings as the
backward pass brings them, each with the call that read them. It is a tensor (m,) in ``weight.grad`` like any other, so
torch's own rules hold: ``model.zero_grad()`` and ``weight.grad = None`` forget it, backward passes add to it,
``torch.autograd.grad`` returns it, hooks see it, ``clip_grad_norm_`` and GradScaler measure and scale it.

Sums, and products with a number, keep it as it is. Norms sum what each slot gets, for the slots that were read. Every
other operation of torch turns it into the dense gradient, and runs on that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robe.ops.layout import Call, Tables, UpdateLists

# Gradients add up as long as nobody clears them. They are summed once they hold this many times the array's numbers,
# and at least so many.
_SUM_BEYOND_ARRAYS = 8
_SUM_BEYOND_NUMBERS = 1 << 26

_aten = torch.ops.aten


class Pieces:
    """What a gradient consists of.

    Args:
        weight: the array's weights (m,), detached: with the parameter itself, it and its gradient would never be freed.
        calls: gradients (B, F, D), each with the call that read the embeddings.
        group: the processes over which the gradient is still to be averaged, or None.

    Attributes:
        weight, group: as given.
    """

    __slots__ = ("_calls", "_dense", "_is_summed", "_slots", "_version", "group", "weight")

    def __init__(self, weight: Tensor, calls: Sequence[tuple[Tensor, Call]], group: Any = None):
        self.weight, self.group, self._version = weight, group, weight._version
        self._calls = list(calls)
        self._is_summed = False  # there is one call, and it reads no slot twice
        # Once the dense gradient is built, it holds the values, and _slots says what was read.
        self._dense: Tensor | None = None
        self._slots = weight.new_empty(0, dtype=torch.int64)

    def copy(self) -> "Pieces":
        """Return the same gradient, that changes apart from this one."""
        other = Pieces(self.weight, self._calls, self.group)
        other._version, other._is_summed, other._slots = self._version, self._is_summed, self._slots
        other._dense = None if self._dense is None else self._dense.clone()
        return other

    def calls(self) -> list[tuple[Tensor, Call]]:
        """Return gradients (B, F, D), each with a call, whose sum is this gradient.

        Raises:
            RuntimeError: the weights have changed since the backward pass, and "max" bags compare them.
        """
        if self._dense is not None:
            touched = self._dense != 0
            touched[self._slots] = True
            slots = touched.nonzero().squeeze(1)
            return [_of_slots(slots, self._dense[slots], self.weight)]
        if self.weight._version != self._version and any(_compares(call) for _, call in self._calls):
            raise RuntimeError(
                "weight: changed in place since the backward pass, and the gradient of a 'max' bag needs it as it was; "
                "call zero_grad() after every step"
            )
        return self._calls

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the slots that were read, (n,) int64 without repetition, and the gradient of each, (n,).

        Raises:
            RuntimeError: as in ``calls``, or the gradient is not averaged yet.
        """
        if self.group is not None:
            raise RuntimeError(
                "weight.grad: only this process's part, until robe.optim averages it in step(); to clip or read it "
                "before, call the optimizer's synchronize() in every process"
            )
        calls = self.calls()
        if self._dense is None and not self._is_summed:
            slots, values = torch.ops.robe.sum_gradients(self.weight, *UpdateLists.pack(calls))
            calls = self._calls = [_of_slots(slots, values, self.weight)]
            self._is_summed = True
        ((grad, call),) = calls
        return call.ids.squeeze(1), grad.flatten()

    def dense(self) -> Tensor:
        """Return the gradient as a tensor (m,) which holds it from now on: a change of one is a change of the other."""
        if self._dense is None:
            self._slots, values = self.sums()
            self._dense = torch.zeros_like(self.weight).index_copy_(0, self._slots, values.to(self.weight.dtype))
            self._calls = []
        return self._dense

    def add(self, other: "Pieces") -> None:
        """Add another gradient of the array."""
        if self._dense is not None:
            slots, values = other.sums()
            self._dense.index_add_(0, slots, values.to(self.weight.dtype))
            self._slots = torch.cat([self._slots, slots])
            return
        self._calls = [*self.calls(), *other.calls()]
        self._version, self._is_summed, self.group = other._version, False, self.group or other.group
        held = sum(grad.numel() for grad, _ in self._calls)
        if self.group is None and held > max(_SUM_BEYOND_ARRAYS * self.weight.numel(), _SUM_BEYOND_NUMBERS):
            self.sums()

    def scale(self, factor: Any) -> None:
        """Multiply the gradient by a number, or by a tensor with one."""
        if self._dense is not None:
            self._dense.mul_(factor)
        else:
            self._calls = [(grad * factor, call) for grad, call in self.calls()]

    def clear(self) -> None:
        """Forget everything."""
        self._calls, self._is_summed, self._dense, self.group = [], False, None, None

    def unscale(self, inverse: Tensor, found_inf: Tensor) -> None:
        """Do GradScaler's work: multiply by a number, and set ``found_inf`` where a gradient is not finite."""
        values = [self.dense()] if self._dense is not None else [grad.clone() for grad, _ in self.calls()]
        torch._amp_foreach_non_finite_check_and_unscale_(values, found_inf, inverse)
        if self._dense is None:
            self._calls = [(grad, call) for grad, (_, call) in zip(values, self._calls)]


def _of_slots(slots: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor, Call]:
    """The gradients (n,) of slots (n,) as those of a call that reads each slot as a row of its own."""
    keys = slots.new_zeros(1)
    tables = Tables(keys, keys + weight.numel(), 1, 1, "identity", False, None)
    return values.view(-1, 1, 1), Call(slots.unsqueeze(1), None, tables)


def _compares(call: Call) -> bool:
    return call.bags is not None and call.bags.pooling == "max"


class SlotGradient(Tensor):
    """The gradient (m,) of an array's weights, kept as the gradients of the embeddings that were read.

    Args:
        pieces: what it consists of.
    """

    pieces: Pieces

    @staticmethod
    def __new__(cls, pieces: Pieces):
        """Make a tensor without memory of its own."""
        weight = pieces.weight
        self = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        self.pieces = pieces
        return self

    def __init__(self, pieces: Pieces):
        super().__init__()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        """Run an operation of torch: one of those below, or else on the dense gradient."""
        own = _OPERATIONS.get(func)
        result = NotImplemented if own is None else own(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = func(*_dense(args), **_dense(kwargs or {}))
            if args and isinstance(args[0], SlotGradient) and result is args[0].pieces.dense():
                return args[0]  # an operation in place returns the tensor it was called on
        return result

    @staticmethod
    def of(grad: Tensor, weight: Tensor) -> "SlotGradient":
        """Return a gradient of an array's weights as one of this class; a tensor's zeros are slots that were not read.

        Args:
            grad: (m,), dense or sparse, or of this class.
            weight: (m,).
        """
        if isinstance(grad, SlotGradient):
            return grad
        grad = grad.detach().to_dense()
        slots = grad.nonzero().squeeze(1)
        return SlotGradient(Pieces(weight.detach(), [_of_slots(slots, grad[slots], weight)]))

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """Return a copy as a tensor of torch, (m,), as large as the array."""
        return self.pieces.copy().dense().to(dtype or self.dtype)

    def numpy(self, *, force: bool = False) -> Any:
        """Return the dense gradient as an array of numpy, in the same memory."""
        return self.pieces.dense().numpy(force=force)

    def tolist(self) -> list[float]:
        """Return the dense gradient as a list."""
        return self.pieces.dense().tolist()

    @property
    def data(self) -> Tensor:
        """The gradient itself, which never requires one; what is assigned takes its place."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape:
            raise ValueError(f"data: expected the shape {tuple(self.shape)}, got {tuple(value.shape)}")
        taken = SlotGradient.of(value, value)
        Tensor.data.__set__(self, taken)  # type: ignore[attr-defined]  # the dtype and the device
        self.pieces = taken.pieces

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        """Return the size and the dtype; ``to_dense`` has the numbers."""
        return f"SlotGradient(size={self.numel()}, dtype={self.dtype})"

    def __deepcopy__(self, memo):
        """Return a dense copy: a copied array has no optimizer of robe.optim."""
        return self.to_dense()

    def __reduce_ex__(self, protocol):
        """Pickle the dense gradient."""
        return self.to_dense().__reduce_ex__(protocol)


def _dense(x: Any) -> Any:
    """Arguments of an operation, with the dense gradient for each SlotGradient."""
    if isinstance(x, SlotGradient):
        return x.pieces.dense()
    if isinstance(x, list | tuple):
        return type(x)(map(_dense, x))
    return {name: _dense(value) for name, value in x.items()} if isinstance(x, dict) else x


# ---------------------------------------------------------------------------------------------------------------------
# The operations that need no dense gradient. NotImplemented: this case needs it.


def _alias(grad):
    return grad  # it never requires a gradient, so there is nothing to detach


def _clone(grad, *, memory_format=None):
    return SlotGradient(grad.pieces.copy())


def _empty(grad, *_, **options):
    if any(options.get(name, value) not in (None, value) for name, value in _like(grad)):
        return NotImplemented
    return SlotGradient(Pieces(grad.pieces.weight, []))


def _like(grad):
    return ("dtype", grad.dtype), ("device", grad.device), ("layout", torch.strided)


def _copy_(grad, source, non_blocking=False):
    if not isinstance(grad, SlotGradient) or not isinstance(source, SlotGradient):
        return NotImplemented
    copied = source.pieces.copy()
    grad.pieces.clear()
    grad.pieces.add(copied)
    return grad


def _add_(grad, other, *, alpha=1):
    if not isinstance(grad, SlotGradient) or getattr(other, "shape", None) != grad.shape:
        return NotImplemented
    other = SlotGradient.of(other, grad.pieces.weight).pieces.copy()
    if alpha != 1:
        other.scale(alpha)
    grad.pieces.add(other)
    return grad


def _add(grad, other, *, alpha=1):
    return _add_(_clone(grad), other, alpha=alpha) if isinstance(grad, SlotGradient) else NotImplemented


def _mul_(grad, factor):
    if not isinstance(grad, SlotGradient) or not _is_number(factor):
        return NotImplemented
    grad.pieces.scale(factor)
    return grad


def _mul(a, b):
    if not isinstance(a, SlotGradient):
        a, b = b, a
    return _mul_(_clone(a), b) if _is_number(b) else NotImplemented


def _div_(grad, divisor):
    if not _is_number(divisor) or (not isinstance(divisor, Tensor) and divisor == 0):
        return NotImplemented  # by 0, slots that were not read become NaN
    return _mul_(grad, 1 / divisor)


def _div(grad, divisor):
    return _div_(_clone(grad), divisor) if isinstance(grad, SlotGradient) else NotImplemented


def _zero_(grad):
    grad.pieces.clear()
    return grad


def _norm(grad, ord=2, dim=None, keepdim=False, *, dtype=None):
    if ord <= 0 or keepdim:
        return NotImplemented  # the zeros of slots that were not read count
    return torch.linalg.vector_norm(grad.pieces.sums()[1], ord, dtype=dtype or grad.dtype)


def _unscale_(grads, found_inf, inverse):
    for grad in grads:
        if isinstance(grad, SlotGradient):
            grad.pieces.unscale(inverse, found_inf)
        else:
            torch._amp_foreach_non_finite_check_and_unscale_([grad], found_inf, inverse)


def _is_number(x):
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.numel() == 1 and x.dim() == 0)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten.new_empty_strided.default: _empty,
    _aten.copy_.default: _copy_,
    _aten.add_.Tensor: _add_,
    _aten.add.Tensor: _add,
    _aten.mul_.Tensor: _mul_,
    _aten.mul.Tensor: _mul,
    _aten.div_.Tensor: _div_,
    _aten.div.Tensor: _div,
    _aten.zero_.default: _zero_,
    _aten.linalg_vector_norm.default: _norm,
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale_,
}
