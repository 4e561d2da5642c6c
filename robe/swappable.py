"""Which embedding tables of a model can be swapped for ROBE layers, and why others can't.

What a ROBE layer has no place for is never dropped: the table that has it is left.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from robe.layers.embedding import RobeEmbedding, RobeEmbeddingBag

TorchTable = nn.Embedding | nn.EmbeddingBag
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LOOKED_INTO = 1000  # entries of a list that may hold modules
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
    for module in modules:
        reason = _reason_of_module(module)
        if reason is not None:
            return reason
    if weight.dtype not in _DTYPES:
        return f"is of {weight.dtype}"
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__} of layout {str(weight.layout).removeprefix('torch.')}"
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "its weight has hooks, which would not run: the gradient is that of an array"
    if not weight.requires_grad and init == "random":
        return "is frozen, and nothing would train random values: init='project' keeps what it holds"
    return _reason_in_model(model, modules)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a table that torch's tables don't have."""
    return {name: value for name, value in vars(module).items() if name not in _attributes_of_torch()}


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
    for other in model.modules():
        if other in modules:
            continue
        if any(p is weight for p in other._parameters.values()):
            return f"its weight is also that of a {type(other).__name__}"
        for name, value in own_attributes(other).items():
            if any(one is module for one in _held(value) for module in modules):
                return f"is also in the attribute {name} of a {type(other).__name__}, which is no submodule"
    return None


def _held(value: Any, depth: int = 2) -> Iterator[nn.Module]:
    """The modules in an attribute, or in the lists, tuples, sets and dicts in it."""
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, set, dict)):
        entries: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for entry in islice(entries, _LOOKED_INTO):
            yield from _held(entry, depth - 1)
