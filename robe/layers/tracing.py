"""torch.fx: a layer is a leaf of a traced model, as torch's own layers are."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Proxy


def is_traced(*inputs: Any) -> bool:
    """Return whether an input, or one inside a list or a mapping, stands for a value that torch.fx will have later."""
    for x in inputs:
        if isinstance(x, Proxy):
            return True
        if isinstance(x, Mapping) and is_traced(*x.values()):
            return True
        if isinstance(x, (list, tuple)) and is_traced(*x):
            return True
    return False


def record_call(layer: nn.Module, *inputs: Any, **options: Any) -> Proxy:
    """Record the call of a layer in the graph that torch.fx is making.

    torch.fx follows the calls of every module but torch's own to the end. The call of a layer depends on the shape of
    its ids, on its training mode and on its optimizer, which are not known yet.

    Args:
        layer: it is called when the graph runs.
        inputs, options: arguments of its ``forward``; one of them is_traced.
    """
    tracer = _tracer_of([*inputs, *options.values()])
    if tracer.root is layer:  # alone: it becomes the child of the traced module
        tracer.root = nn.ModuleDict({"layer": layer}).train(layer.training)
        tracer.submodule_paths = {module: name for name, module in tracer.root.named_modules()}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), inputs, options)


def _tracer_of(x: Any) -> Any:
    if isinstance(x, Proxy):
        return x.tracer
    inner = x.values() if isinstance(x, Mapping) else x
    return _tracer_of(next(y for y in inner if is_traced(y)))
