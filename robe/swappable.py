"""Which embedding tables of a model can be swapped for ROBE layers, and why others can't.

What a ROBE layer has no place for is never dropped: the table that has it is left.
"""

from collections import deque
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from robe.array import DTYPES
from robe.layers.embedding import RobeEmbedding, RobeEmbeddingBag

TorchTable = nn.Embedding | nn.EmbeddingBag
# Values that an attribute holds, directly or not, among which tables are looked for: a vocabulary may be large.
_LOOKED_INTO = 2000
_WITHOUT_CONTENT = (Tensor, Optimizer, type, ModuleType, FunctionType, str, bytes, int, float, type(None))
# What a subclass may define and still be a table like any other.
_HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__constants__", "__repr__"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__", "__annotate_func__", "__parameters__", "__orig_bases__"}
_HARMLESS |= {"__dict__", "__weakref__", "reset_parameters", "extra_repr"}


def tables_of(model: nn.Module) -> Iterator[list[TorchTable]]:
    """Yield the modules of each table: one, or several that share a weight."""
    of_weight: dict[int, list[TorchTable]] = {}
    for module in model.modules():
        if isinstance(module, TorchTable):
            # A parametrized module computes its weight anew each time.
            of_weight.setdefault(id(module._parameters.get("weight", module)), []).append(module)
    yield from of_weight.values()


def reason_to_leave(model: nn.Module, modules: list[TorchTable], min_rows: int, init: str) -> str | None:
    """Return why a table, given as the modules that share it, can't be swapped; None if it can."""
    weight = modules[0].weight
    if len(weight) < min_rows:
        return f"has fewer than {min_rows:,} rows"
    if not weight.numel():
        return "has no weights"
    for module in modules:
        reason = _reason_of_module(module)
        if reason is not None:
            return reason
    if weight.dtype not in DTYPES:
        return f"is of {weight.dtype}"
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__} of layout {str(weight.layout).removeprefix('torch.')}"
    for module in modules:
        expected = module.num_embeddings, module.embedding_dim
        if weight.shape != expected:
            return f"its weight was replaced by one of shape {tuple(weight.shape)}, and it is a table of {expected}"
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "its weight has hooks, which would not run: the gradient is that of an array"
    if not weight.requires_grad and init == "random":
        return "is frozen, and nothing would train random values: init='project' keeps what it holds"
    return _reason_in_model(model, modules)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a table that torch's tables don't have."""
    return {name: value for name, value in vars(module).items() if name not in _attributes_of_torch()}


def holds_optimizer(model: nn.Module) -> bool:
    """Return whether a model has an optimizer, which has the parameters that the model had when it was made."""
    inside = set(model.modules())
    held = (x for module in inside for value in own_attributes(module).values() for x in _held(value, inside))
    return any(isinstance(x, Optimizer) for x in held)


@cache
def _attributes_of_torch() -> set[str]:
    return set(vars(nn.Embedding(1, 1, device="meta"))) | set(vars(nn.EmbeddingBag(1, 1, device="meta")))


@cache
def _attributes_of_robe() -> set[str]:
    kinds = RobeEmbedding, RobeEmbeddingBag
    return {name for kind in kinds for name in (*dir(kind), *vars(kind(1, 1, robe_size=1, device="meta")))}


def _reason_of_module(module: TorchTable) -> str | None:
    """What a module has that a ROBE layer can't have."""
    kind = type(module).__name__
    if type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
        return f"is a {kind}, which has a forward of its own"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if any(value for name, value in vars(module).items() if name.endswith("_hooks")):
        return "has hooks"
    if module.max_norm is not None:
        return "max_norm: rows on an array share weights, so one can't be rescaled alone"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq: not supported by ROBE layers"
    torchs = (*nn.Embedding.__mro__, *nn.EmbeddingBag.__mro__)
    methods = {name for base in type(module).__mro__ if base not in torchs for name in vars(base)} - _HARMLESS
    if methods:
        return f"is a {kind}, which has {min(methods)} of its own"
    for what, several in (("parameter", "_parameters"), ("buffer", "_buffers"), ("module", "_modules")):
        others = [name for name in getattr(module, several) if name != "weight"]
        if others:
            return f"has a {what} of its own, {others[0]}"
    for name in own_attributes(module):
        if name in _attributes_of_robe():
            return f"has an attribute {name} of its own, which a ROBE layer has too"
    return None


def _reason_in_model(model: nn.Module, modules: list[TorchTable]) -> str | None:
    """What else in a model refers to a table, and would go on to use it."""
    weight = modules[0].weight
    inside = set(model.modules())
    for other in model.modules():
        if other in modules:
            continue
        for p in (*other._parameters.values(), *other._buffers.values()):
            if p is not None and _share_memory(p, weight):
                return f"its weight is also that of a {type(other).__name__}"
        for name, value in own_attributes(other).items():
            where = f"also in the attribute {name} of a {type(other).__name__}"
            for held in _held(value, inside):
                if isinstance(held, nn.Module) and held in modules:
                    return f"is {where}, which is no submodule"
                if isinstance(held, Tensor) and _share_memory(held, weight):
                    return f"its weight is {where}"
    return None


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether a change of one tensor could be one of the other; pieces of one storage may lie apart."""
    if one is other:
        return True
    if one.device != other.device or not (_has_memory(one) and _has_memory(other)):
        return False
    (first, end), (other_first, other_end) = _addresses(one), _addresses(other)
    return first < other_end and other_first < end


def _has_memory(x: Tensor) -> bool:
    """Whether a tensor is a plain one, whose numbers lie in memory by its strides."""
    is_plain = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ and not (x.is_meta or x.is_nested or is_lazy(x))
    return is_plain and x.layout is torch.strided and x.numel() > 0


def _addresses(x: Tensor) -> tuple[int, int]:
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


def _held(value: Any, inside: set[nn.Module]) -> Iterator[nn.Module | Tensor | Optimizer]:
    """Yield what an attribute holds, in lists and dicts, bound methods, and attributes of objects too.

    Args:
        value: of the attribute.
        inside: the modules of the model; what these hold is found where they are.
    """
    waiting, seen = deque([value]), set[int]()
    while waiting and len(seen) < _LOOKED_INTO:
        x = waiting.popleft()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, (nn.Module, Tensor, Optimizer)):
            yield x
        if isinstance(x, _WITHOUT_CONTENT) or (isinstance(x, nn.Module) and x in inside):
            continue
        if isinstance(x, partial):
            waiting.extend((x.func, x.args, x.keywords))
        elif isinstance(x, MethodType):
            waiting.append(x.__self__)
        elif isinstance(x, (list, tuple, set, frozenset, deque, dict)):
            waiting.extend(islice(x.values() if isinstance(x, dict) else x, _LOOKED_INTO))
        elif isinstance(getattr(x, "__dict__", None), dict):
            waiting.extend(vars(x).values())
