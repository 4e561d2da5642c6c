"""Optimizers of RobeArrays that never build the array's gradient: SGD, Adagrad and Adam on the slots that were read.

    array = model.embeddings.array
    optimizer = robe.optim.Adam(array, lr=1e-3)          # other parameters need another optimizer
    ...
    optimizer.zero_grad(); loss.backward(); optimizer.step()

A dense gradient is as large as the array, and torch's optimizers go through all of it in every step. Once an optimizer
of this module has an array, backward passes leave a SlotGradient in ``weight.grad``: the gradients of the embeddings,
(B, F, D), as they come (robe/gradient.py). ``step`` sums the part of each slot and applies the rule to the slots that
were read, and to no others. Everything else is as in torch: gradients add up until ``zero_grad``, of the optimizer or
the model; clip_grad_norm_ and GradScaler work; ``weight.grad.to_dense()`` has the numbers.

The result does not depend on the number of threads, to the bit: gradients are sorted by the segment of the array they
go to, in the order of the ids within a segment, and one thread sums and updates a segment.

Two things differ from torch's optimizers on a dense gradient. Weight decay, momentum and Adam's moments act on a slot
only in steps that touch it, as in torch.optim.SparseAdam. Adam's bias correction counts the array's steps. Without
these (SGD or Adagrad without decay) the results are equal except for rounding. Slots of bf16 and fp16 arrays are
updated in float32.

With ``process_group``, several processes train one array, each on its part of a batch. ``step`` gathers the gradients
of all of them, and applies their average in each, as DistributedDataParallel does for other parameters. That transfers
(B, F, D) numbers a step for the batch of all processes. Where this is more than a dense gradient, let
DistributedDataParallel reduce the dense one, with an optimizer of torch.optim. To clip or unscale gradients, call
``synchronize`` of the optimizer before.

torch.compile breaks its graph where a layer is read for such an optimizer.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from robe.array import RobeArray
from robe.gradient import Pieces, SlotGradient
from robe.ops.layout import Call, UpdateLists, unpack_bag_backward, unpack_lookup_backward

# Options of torch's optimizers that another rule would be needed for. A state taken over from torch may have them on.
_OTHER_RULES = ("amsgrad", "nesterov", "maximize", "dampening", "decoupled_weight_decay")


class _Recorded(torch.autograd.Function):
    """A lookup or bag that gives the array a SlotGradient."""

    @staticmethod
    def forward(ctx, weight, per_sample_weights, group, call):
        ctx.group, ctx.is_lookup = group, call.bags is None
        arguments = (*call.pack(), call.filter)
        # A lookup's gradient depends on the size of the weights only: as in torch, they may change before the backward.
        compared = call.bags is not None and (call.bags.pooling == "max" or per_sample_weights is not None)
        ctx.weight = None if compared else weight.detach()
        ctx.save_for_backward(weight if compared else None, *(x for x in arguments if isinstance(x, Tensor)))
        ctx.arguments = [None if isinstance(x, Tensor) else (x,) for x in arguments]
        forward = torch.ops.robe.lookup_forward if ctx.is_lookup else torch.ops.robe.bag_forward
        return forward.default(weight, *arguments[:-1], None, call.filter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, *saved = ctx.saved_tensors
        weight = ctx.weight if weight is None else weight.detach()
        tensors = iter(saved)
        arguments = [next(tensors) if constant is None else constant[0] for constant in ctx.arguments]
        grad_weight = grad_factors = None
        if ctx.needs_input_grad[1]:
            grad_factors = torch.ops.robe.bag_weights_backward(grad, weight, *arguments)
        if ctx.needs_input_grad[0]:
            # Whoever made the ids may fill them anew before the step.
            of_ids = 1 if ctx.is_lookup else 3
            arguments[:of_ids] = [x if x is None else x.clone() for x in arguments[:of_ids]]
            call = unpack_lookup_backward(arguments) if ctx.is_lookup else unpack_bag_backward(arguments)
            grad_weight = SlotGradient(Pieces(weight, [(grad, call)], ctx.group))
        return grad_weight, grad_factors, None, None


class _TouchedSlots(torch.optim.Optimizer):
    """The base of the optimizers."""

    _rule: str
    _state_names: tuple[str, ...]

    def __init__(self, arrays: nn.Module | Iterable, defaults: dict[str, Any], process_group):
        for name in ("lr", "weight_decay", "eps", "momentum", "lr_decay", "initial_accumulator_value"):
            if not 0 <= defaults.get(name, 0) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {defaults[name]}")
        self._process_group = process_group
        # add_param_group takes the weights out of the modules.
        super().__init__([arrays] if isinstance(arrays, nn.Module) else arrays, defaults)  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_process_group", None)  # load_state_dict comes here too, and leaves it as it is

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch, with RobeArrays, or modules that hold some, as its "params".

        Args:
            param_group: "params", and options that differ from the optimizer's.

        Raises:
            ValueError: "params" holds something else, or no array.
        """
        modules = param_group["params"]
        modules = [modules] if isinstance(modules, nn.Module) else list(modules)
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"arrays: expected RobeArrays, or modules that hold some, got {type(module).__name__}; parameters "
                    "that are not an array's need an optimizer of torch.optim"
                )
        arrays = {id(m): m for module in modules for m in module.modules() if isinstance(m, RobeArray)}
        if not arrays:
            raise ValueError("arrays: expected RobeArrays, or modules that hold some; there is none in what was given")
        super().add_param_group({**param_group, "params": [array.weight for array in arrays.values()]})
        for array in arrays.values():
            array.set_optimizer(self)

    def owns(self, weight: Tensor) -> bool:
        """Return whether this optimizer updates a weight."""
        return any(weight is own for group in self.param_groups for own in group["params"])

    # torch.compile leaves this call out of its graphs; torch.compiler.disable would import the compiler to say so.
    @torch._disable_dynamo
    def record(self, weight: Tensor, call: Call) -> Tensor:
        """Return the embeddings of a call, which will give the array a SlotGradient. Layers call this.

        Args:
            weight: of the array, (m,).
            call: a lookup or bag.

        Returns:
            (B, F, D).
        """
        factors = None if call.bags is None else call.bags.per_sample_weights
        return _Recorded.apply(weight, factors, self._process_group, call)

    def synchronize(self) -> None:
        """Average the gradients over the process group before ``step`` does, to clip or look at them.

        All processes call this together.
        """
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    pieces = SlotGradient.of(weight.grad, weight).pieces
                    weight.grad = SlotGradient(Pieces(weight.detach(), self._averaged(pieces)))

    def _averaged(self, pieces: Pieces) -> list[tuple[Tensor, Call]]:
        return pieces.calls() if pieces.group is None else _of_all_processes(pieces.calls(), pieces.group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        """Update the slots that were read since the last zero_grad.

        Args:
            closure: computes the loss and its gradients again, as in torch.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: the weights have changed since the backward pass, and "max" bags compare them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                calls = self._averaged(SlotGradient.of(weight.grad, weight).pieces)
                if not calls:
                    continue
                state = self.state[weight]
                state["step"] = int(state.get("step", 0)) + 1  # torch counts in float32
                for name in self._state_names:
                    if state.get(name) is None:
                        state[name] = torch.full_like(weight, group.get("initial_accumulator_value", 0))
                options = self._options(group, state["step"])
                tensors = [state[name] for name in self._state_names]
                torch.ops.robe.update_(weight, tensors, self._rule, options, *UpdateLists.pack(calls))
                torch.autograd.graph.increment_version(weight)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over, as in torch; one of torch's optimizer of the same name too.

        Args:
            state_dict: as ``state_dict`` returns it.

        Raises:
            ValueError: a group has an option on that is not supported here, or as in torch.
        """
        for group in state_dict["param_groups"]:
            for name in _OTHER_RULES:
                if group.get(name):
                    raise ValueError(f"{name}: expected it off, got {group[name]}; {type(self).__name__} has it not")
        super().load_state_dict(state_dict)

    def _options(self, group: dict[str, Any], step: int) -> list[float]:
        """The five numbers of the rule: its rate, weight decay, and three of its own."""
        raise NotImplementedError


def _of_all_processes(calls: list[tuple[Tensor, Call]], group) -> list[tuple[Tensor, Call]]:
    """The same calls of every process, with gradients whose sum is the average."""
    from robe.gather import gather  # torch.distributed is for those who use it

    own = [x for grad, call in calls for x in (grad, *_of_process(call))]
    together = []
    for tensors in gather(own, group):
        waiting = iter(tensors)
        for _, call in calls:
            grad = next(waiting) / torch.distributed.get_world_size(group)
            ids, bags = next(waiting), call.bags
            if bags is not None:
                bags = bags._replace(offsets=next(waiting))
                if bags.per_sample_weights is not None:
                    bags = bags._replace(per_sample_weights=next(waiting))
            together.append((grad, call._replace(ids=ids, bags=bags)))
    return together


def _of_process(call: Call) -> list[Tensor]:
    """The tensors of a call that differ between processes; its tables and filter are the same everywhere."""
    tensors = [call.ids]
    if call.bags is not None:
        tensors += [x for x in (call.bags.offsets, call.bags.per_sample_weights) if x is not None]
    return tensors


class SGD(_TouchedSlots):
    """torch.optim.SGD on touched slots: v = momentum * v + g, w -= lr * v, with g = gradient + weight_decay * w.

    Args:
        arrays: a RobeArray; a module that holds some; an iterable of these; or param groups as in torch, with such an
            iterable as "params".
        lr: learning rate; a scheduler may change it.
        process_group: the torch.distributed processes that train the same arrays; all make the same calls of layers.
        momentum, weight_decay: as in torch, but only on the slots that a step touches.

    Raises:
        ValueError: a number out of range, or arrays without a RobeArray.
    """

    _rule = "sgd"

    def __init__(
        self, arrays, lr: float = 1e-3, momentum: float = 0.0, *, weight_decay: float = 0.0, process_group=None
    ):
        super().__init__(arrays, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, process_group)

    @property
    def _state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("momentum_buffer",) if any(group["momentum"] for group in self.param_groups) else ()

    def _options(self, group: dict[str, Any], step: int) -> list[float]:
        return [group["lr"], group["weight_decay"], group["momentum"], 0.0, 0.0]


class Adagrad(_TouchedSlots):
    """torch.optim.Adagrad on touched slots: s += g * g, w -= lr / (1 + (step - 1) * lr_decay) * g / (sqrt(s) + eps).

    Args:
        arrays, lr, process_group: as in SGD.
        lr_decay, weight_decay, initial_accumulator_value, eps: as in torch.
    """

    _rule = "adagrad"
    _state_names = ("sum",)

    def __init__(
        self,
        arrays,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        process_group=None,
    ):
        options = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        super().__init__(arrays, options | {"initial_accumulator_value": initial_accumulator_value}, process_group)

    def _options(self, group: dict[str, Any], step: int) -> list[float]:
        rate = group["lr"] / (1 + (step - 1) * group["lr_decay"])
        return [rate, group["weight_decay"], group["eps"], 0.0, 0.0]


class Adam(_TouchedSlots):
    """torch.optim.SparseAdam's rule on touched slots: the moments of a slot move only in steps that touch it.

    m = b1 * m + (1 - b1) * g, v = b2 * v + (1 - b2) * g * g, and with t steps taken,
    w -= lr * m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps).

    Args:
        arrays, lr, process_group: as in SGD.
        betas, eps, weight_decay: as in torch.optim.Adam.
    """

    _rule = "adam"
    _state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        arrays,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        process_group=None,
    ):
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}]: expected at least 0 and below 1, got {beta}")
        super().__init__(arrays, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, process_group)

    def _options(self, group: dict[str, Any], step: int) -> list[float]:
        beta1, beta2 = group["betas"]
        # sqrt(v / c) + eps = (sqrt(v) + eps * sqrt(c)) / sqrt(c): both corrections go into the numbers.
        correction = math.sqrt(1 - beta2**step)
        return [
            group["lr"] * correction / (1 - beta1**step),
            group["weight_decay"],
            beta1,
            beta2,
            group["eps"] * correction,
        ]
