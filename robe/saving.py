"""save and load: a model with its ROBE layers in one safetensors file, which also says how the layers were made.

A ``state_dict`` holds the weights of an array, but not where embeddings lie in it: seed, block sizes, table_ids. The
file has these in its metadata, under "robe", as JSON:

    {"version": 1,
     "arrays": [{"size": m, "seed": 0, "init_std": 0.01, "dtype": "float32", "requires_grad": true,
                 "group_size": null}],
     "admissions": [{"bytes": n, "threshold": null, "counter_bytes": null}],
     "layers": {"name of the module": {"class": "RobeEmbedding", "type": null, "array": 0, "admission": null,
                                       "config": {...}}}}

"type" names the user's own subclass of "class". The tensors are those of the ``state_dict``; shared ones stand once.
"""

import json
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robe.admission import Admission
from robe.array import Int8RobeArray, RobeArray
from robe.compress import reason_to_leave, tables_of
from robe.layers.collection import EmbeddingBagConfig, RobeEmbeddingBagCollection, own_config
from robe.layers.embedding import RobeEmbedding, RobeEmbeddingBag
from robe.layers.keyed import RobeKeyedEmbeddingBagCollection
from robe_files import whole_file

_KEY, _VERSION = "robe", 1
_LAYERS: dict[str, Any] = {
    layer.__name__: layer
    for layer in (RobeEmbedding, RobeEmbeddingBag, RobeEmbeddingBagCollection, RobeKeyedEmbeddingBagCollection)
}
_TABLES: dict[str, Any] = {"RobeEmbedding": nn.Embedding, "RobeEmbeddingBag": nn.EmbeddingBag}
_OF_TABLES = ("num_embeddings", "embedding_dim", "padding_idx", "mode", "include_last_offset")
RobeLayer = RobeEmbedding | RobeEmbeddingBag | RobeEmbeddingBagCollection | RobeKeyedEmbeddingBagCollection


def save(module: nn.Module, file: str | os.PathLike) -> None:
    """Write a ROBE layer, or a model that holds some, as a safetensors file.

    Args:
        module: its ``state_dict`` is written, with the arguments of its ROBE layers.
        file: the path. An existing file is replaced in one step, once the new one is whole.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file can't be written; names it.
        ValueError: the module holds no ROBE layer, or one that was changed after it was made, so that its arguments
            would make another.
    """
    from safetensors.torch import save_model

    layers = dict(_layers_of(module))
    if not layers:
        raise ValueError(f"module: no ROBE layer in this {type(module).__name__}; safetensors alone can write it")
    arrays: list[RobeArray | Int8RobeArray] = []
    admissions: list[Admission] = []
    described = {
        name: {
            "class": next(known for known, kind in _LAYERS.items() if isinstance(layer, kind)),
            "type": _own_type(layer),
            "array": _place(layer.array, arrays),
            "admission": None if layer.admission is None else _place(layer.admission, admissions),
            "config": layer.arguments(),
        }
        for name, layer in layers.items()
    }
    about = _in_json(
        {
            "version": _VERSION,
            "arrays": [_describe_array(array) for array in arrays],
            "admissions": [_describe_admission(admission) for admission in admissions],
            "layers": described,
        }
    )
    for name, made in _make(about, lambda name: torch.device("meta")).items():
        if _reads(made) != _reads(layers[name]):
            raise ValueError(
                f"module: {name or 'it'} was changed after it was made, and its arguments would make another layer; "
                "was its array replaced by one with another seed, or parametrized?"
            )
    with whole_file(Path(file)) as part:
        save_model(module, str(part), metadata={"format": "pt", _KEY: json.dumps(about)})


def load(file: str | os.PathLike, module: nn.Module | None = None, *, device=None) -> nn.Module:
    """Read a file that ``save`` wrote.

    Make optimizers after this call: the module has new arrays then.

    Args:
        file: the path.
        module: a model like the one that was saved, with its tables, or after ``robe.compress`` with any options. Its
            tables are swapped for the layers of the file, and all weights are read. None: the file holds one ROBE
            layer, which is made anew.
        device: of the arrays; None: that of the swapped tables, or the CPU where they are on the meta device.

    Returns:
        The module, changed in place, or the layer.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, or damaged; or the module doesn't fit: something else stands in the
            place of a layer, such as a table with another shape, mode or padding, or other weights differ. The module
            is then unchanged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            if _KEY not in metadata:
                raise ValueError(f"{file}: not written by robe.save: its metadata has no {_KEY!r}")
            about = json.loads(metadata[_KEY])
            if about.get("version") != _VERSION:
                raise ValueError(
                    f"{file}: expected version {_VERSION} of robe.save's format, got {about.get('version')}"
                )
            if module is not None:
                _load_into(module, about, opened, metadata, str(file), device)
                return module
            layer = _alone(about, str(file), device)
            layer.load_state_dict(_tensors_for(layer, opened, metadata, str(file)))
            return layer
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file, or damaged: {error}") from None


def _alone(about: dict[str, Any], file: str, device) -> nn.Module:
    """The one layer of a file."""
    if list(about["layers"]) != [""]:
        names = ", ".join(about["layers"])
        raise ValueError(f"{file}: a model with the layers {names}, not one layer; give load() such a model")
    described = about["layers"][""]
    if described["type"]:
        raise ValueError(
            f"{file}: of a {described['type']}, which is more than a {described['class']}; save a model that has it"
        )
    return _make(about, lambda name: torch.device("cpu" if device is None else device))[""]


def _load_into(module: nn.Module, about: dict[str, Any], opened, metadata: dict[str, str], file: str, device) -> None:
    old = {name: _checked(module, name, described, file) for name, described in about["layers"].items()}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta and not any(name.startswith(f"{layer}.") for layer in old):
            raise ValueError(f"module: {name} is on the meta device; only tables that are swapped can be there")

    def where(name: str) -> torch.device:
        return _device(old[name]) if device is None else torch.device(device)

    new = _make(about, where)
    swapped: dict[nn.Module, Any] = {}
    for name, layer in new.items():
        described, there = about["layers"][name], old[name]
        swapped[there] = swapped.get(there, layer)  # one layer may have two names
        if described["type"]:  # the user's own layer stays, on another array
            swapped[there] = there
        else:
            layer.train(there.training)
        for what in ("array", "admission"):  # a model may hold these itself
            if isinstance(getattr(there, what, None), nn.Module):
                swapped[getattr(there, what)] = getattr(layer, what)
    undo = [(parent, name, child) for parent in module.modules() for name, child in parent._modules.items()]
    for parent, name, child in undo:
        if child in swapped and swapped.get(parent, parent) is parent:
            parent._modules[name] = swapped[child]
    try:
        tensors = _tensors_for(module, opened, metadata, file)
    except ValueError:
        for parent, name, child in undo:
            parent._modules[name] = child
        raise
    for name, layer in new.items():
        if swapped[old[name]] is old[name]:
            for there, made in zip(_parts(old[name]), _parts(layer)):
                there.take_keys(made)
    module.load_state_dict(tensors)


def _tensors_for(module: nn.Module, opened, metadata: dict[str, str], file: str) -> dict[str, torch.Tensor]:
    """The file's tensors by the names of a ``state_dict``; shared ones under each of their names."""
    there, tensors, used = set(opened.keys()), {}, set()
    for name, tensor in module.state_dict().items():
        kept = name if name in there else metadata.get(name)
        if kept not in there:
            raise ValueError(f"{file}: has no {name}, which this {type(module).__name__} has")
        shape = tuple(opened.get_slice(kept).get_shape())
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"{file}: {name} has the shape {shape}, in this {type(module).__name__} {tuple(tensor.shape)}"
            )
        used.add(kept)
        tensors[name] = kept
    if there - used:
        raise ValueError(f"{file}: has {min(there - used)}, which this {type(module).__name__} has not")
    read = {kept: opened.get_tensor(kept) for kept in used}
    return {name: read[kept] for name, kept in tensors.items()}


def _layers_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, RobeLayer]]:
    """Yield the outermost ROBE layers, under every name they have."""
    if isinstance(module, tuple(_LAYERS.values())):
        yield name, module  # type: ignore[misc]
    else:
        for child, inner in module._modules.items():
            if inner is not None:
                yield from _layers_of(inner, f"{name}.{child}" if name else child)


def _own_type(layer: nn.Module) -> str | None:
    """The name of a user's own subclass of a layer; None for the classes of robe and robe.hub."""
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return None if kind in _LAYERS.values() or kind.__module__ == "robe.hub" else name


def _in_json(x: Any) -> Any:
    """The value as it comes back from JSON; numpy's integers become numbers."""
    return json.loads(json.dumps(x, default=operator.index))


def _parts(layer: Any) -> list[Any]:
    return list(layer.collections) if isinstance(layer, RobeKeyedEmbeddingBagCollection) else [layer]


def _reads(layer: Any) -> tuple:
    """The places that a layer reads, and the names of its tensors."""
    return [part.keys_and_bounds() for part in _parts(layer)], list(layer.state_dict())


def _place(one: Any, several: list) -> int:
    """The index of this very object in a list; it is appended if it is not there."""
    for k, other in enumerate(several):
        if one is other:
            return k
    several.append(one)
    return len(several) - 1


def _describe_array(array: RobeArray | Int8RobeArray) -> dict[str, Any]:
    is_int8 = isinstance(array, Int8RobeArray)
    return {
        "size": array.size,
        "seed": array.seed,
        "init_std": None if is_int8 else array.init_std,
        "dtype": str(array.weight.dtype).removeprefix("torch."),
        "requires_grad": array.weight.requires_grad,
        "group_size": array.group_size if is_int8 else None,
    }


def _make_array(about: dict[str, Any], device: torch.device) -> RobeArray | Int8RobeArray:
    """Make an array without initial values, which would take memory and advance torch's generator."""
    size, group_size = about["size"], about["group_size"]
    dtype = torch.float32 if group_size else getattr(torch, about["dtype"])
    array = RobeArray(size, seed=about["seed"], init_std=about["init_std"], dtype=dtype, device="meta")
    if group_size:
        int8 = array.quantized(group_size)
        int8.weight = torch.empty(size, dtype=torch.int8, device=device)
        int8.scale = torch.empty(len(int8.scale), device=device)
        return int8
    array.to_empty(device=device)
    array.weight.requires_grad_(about["requires_grad"])
    return array


def _describe_admission(admission: Admission) -> dict[str, Any]:
    counter = admission.counter
    counter_bytes = None if counter is None else counter.counters.numel() * counter.counters.element_size()
    return {"bytes": admission.bytes, "threshold": admission.threshold, "counter_bytes": counter_bytes}


def _make_admission(about: dict[str, Any], device: torch.device) -> Admission:
    options = {} if about["threshold"] is None else {"counter_bytes": about["counter_bytes"]}
    return Admission(about["bytes"], threshold=about["threshold"], device=device, **options)


def _make(about: dict[str, Any], device_of: Callable[[str], torch.device]) -> dict[str, nn.Module]:
    """The layers that a file describes, with initial weights."""
    arrays: dict[int, Any] = {}
    admissions: dict[int | None, Admission | None] = {None: None}
    layers = {}
    for name, described in about["layers"].items():
        k, filter = described["array"], described["admission"]
        if k not in arrays:
            arrays[k] = _make_array(about["arrays"][k], device_of(name))
        if filter not in admissions:
            admissions[filter] = _make_admission(about["admissions"][filter], device_of(name))
        config = described["config"]
        if "tables" in config:
            config = config | {"tables": [EmbeddingBagConfig(**table) for table in config["tables"]]}
        kind = _LAYERS[described["class"]]
        layers[name] = kind(array=arrays[k], admission=admissions[filter], **config)
    return layers


def _checked(module: nn.Module, name: str, described: dict[str, Any], file: str) -> nn.Module:
    """The module that a layer of the file replaces, checked."""
    kind, config = described["class"], described["config"]
    if not name:
        raise ValueError(f"{file}: of one {kind}; load() makes it without a module")
    try:
        there = module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{file}: has a layer {name!r}, and there is none in this {type(module).__name__}") from None
    reason, compared = None, ("tables", *_OF_TABLES)
    if isinstance(there, tuple(_LAYERS.values())):
        own = _in_json(there.arguments())  # type: ignore[operator]
        if not isinstance(there, _LAYERS[kind]) or _own_type(there) != described["type"]:
            reason = f"is a {described['type'] or kind} there"
        elif described["type"]:  # it stays as it is, so all has to be the same
            compared = tuple(config)
            if (there.admission is None) != (described["admission"] is None):
                reason = "has an admission in one of them"
    elif kind in _TABLES and isinstance(there, _TABLES[kind]):
        same = next(modules for modules in tables_of(module) if there in modules)
        reason = reason_to_leave(module, same, min_rows=0, init="project")
        own = {what: getattr(there, what, None) for what in _OF_TABLES}
    elif kind == "RobeKeyedEmbeddingBagCollection" and hasattr(there, "embedding_bag_configs"):  # torchrec's
        own = {"tables": [asdict(own_config(table)) for table in there.embedding_bag_configs()]}  # type: ignore[operator]
    else:
        reason, own = f"is a {kind} there", {}
    for what in compared:
        if reason is None and what in config and config[what] != own.get(what):
            reason = f"has {what}={config[what]} there, and here {own.get(what)}"
    if reason:
        raise ValueError(f"{file}: the module's {name!r}, a {type(there).__name__}, can't be swapped: it {reason}")
    return there


def _device(module: nn.Module) -> torch.device:
    device = next((x.device for x in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
