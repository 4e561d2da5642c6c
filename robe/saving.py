"""save and load: a model with its ROBE layers in one safetensors file that needs no code to say how they were made.

A ``state_dict`` has the weights of an array, but not where rows lie in them: the seed, block sizes, table_ids. Here
these are in the file's metadata, under "robe", as JSON:

    {"version": 1,
     "arrays": [{"size": m, "seed": 0, "init_std": 0.01, "dtype": "float32", "group_size": null}],
     "admissions": [{"bytes": n, "threshold": null, "counter_bytes": null}],
     "layers": {"name of the module": {"class": "RobeEmbedding", "array": 0, "admission": null, "config": {...}}}}

The tensors are those of the ``state_dict``, each once, whatever number of layers share it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robe.admission import Admission
from robe.array import Int8RobeArray, RobeArray
from robe.collection import EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.embedding import RobeEmbedding, RobeEmbeddingBag
from robe.keyed import RobeKeyedEmbeddingBagCollection

_KEY, _VERSION = "robe", 1
_LAYERS: dict[str, Any] = {
    layer.__name__: layer
    for layer in (RobeEmbedding, RobeEmbeddingBag, RobeEmbeddingBagCollection, RobeKeyedEmbeddingBagCollection)
}
_TABLES = {"RobeEmbedding": (nn.Embedding, RobeEmbedding), "RobeEmbeddingBag": (nn.EmbeddingBag, RobeEmbeddingBag)}
Layer = RobeEmbedding | RobeEmbeddingBag | RobeEmbeddingBagCollection | RobeKeyedEmbeddingBagCollection


def save(module: nn.Module, file: str | os.PathLike) -> None:
    """Write a ROBE layer, or a model with some in it, as safetensors; a file in place is replaced once it is whole.

    Args:
        module: its ``state_dict`` is written, and how its ROBE layers were made.
        file: its path.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file can't be written; names it.
        ValueError: there is no ROBE layer in the module.
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
            "array": _place(layer.array, arrays),
            "admission": None if layer.admission is None else _place(layer.admission, admissions),
            "config": layer._config(),
        }
        for name, layer in layers.items()
    }
    about = {
        "version": _VERSION,
        "arrays": [_describe_array(array) for array in arrays],
        "admissions": [_describe_admission(admission) for admission in admissions],
        "layers": described,
    }
    with whole_file(Path(file)) as part:
        save_model(module, str(part), metadata={"format": "pt", _KEY: json.dumps(about)})


def load(file: str | os.PathLike, module: nn.Module | None = None, *, device=None) -> nn.Module:
    """Read what ``save`` wrote.

    Args:
        file: its path.
        module: a model like the one that was written, with its tables or after ``robe.compress``, whatever the options
            of that were: its tables are swapped for the layers of the file, and all weights are read. None: the file
            is of one ROBE layer, which is made anew.
        device: of the arrays; None: of the tables that are swapped, or the CPU where they are on the meta device.

    Returns:
        The module, changed in place, or the layer.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or damaged; a module without a table where the file has a layer, or with one
            of another shape. The module is then as it was.
        RuntimeError: the other weights of the module are not those of the file, as in ``load_state_dict``. The tables
            are then as they were.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file, or damaged: {error}") from None
    if _KEY not in metadata:
        raise ValueError(f"{file}: not written by robe.save: its metadata has no {_KEY!r}")
    about = json.loads(metadata[_KEY])
    if about["version"] != _VERSION:
        raise ValueError(f"{file}: expected version {_VERSION} of robe.save's format, got {about['version']}")

    if module is None:
        if list(about["layers"]) != [""]:
            names = ", ".join(about["layers"])
            raise ValueError(f"{file}: a model with the layers {names}, not one layer; give load() such a model")
        layer = _make(about, lambda name: torch.device(device or "cpu"))[""]
        load_model(layer, file)
        return layer
    old = {}
    for name, described in about["layers"].items():
        old[name] = _table(module, name, described, str(file))
    layers = _make(about, lambda name: torch.device(device) if device else _device(old[name]))
    _swap(module, layers)
    try:
        load_model(module, file)
    except Exception:
        _swap(module, old)
        raise
    return module


def _layers_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, Layer]]:
    """The outermost ROBE layers, under every name they have."""
    if isinstance(module, tuple(_LAYERS.values())):
        yield name, module  # type: ignore[misc]
    else:
        for child, inner in module._modules.items():
            if inner is not None:
                yield from _layers_of(inner, f"{name}.{child}" if name else child)


def _place(one: Any, several: list) -> int:
    """Which of several this very object is; it is put behind them if it is none."""
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
        "group_size": array.group_size if is_int8 else None,
    }


def _make_array(about: dict[str, Any], device: torch.device) -> RobeArray | Int8RobeArray:
    if about["group_size"]:
        return RobeArray(about["size"], seed=about["seed"], device=device).quantized(about["group_size"])
    dtype = getattr(torch, about["dtype"])
    return RobeArray(about["size"], seed=about["seed"], init_std=about["init_std"], dtype=dtype, device=device)


def _describe_admission(admission: Admission) -> dict[str, Any]:
    counter = admission.counter
    counter_bytes = None if counter is None else counter.counters.numel() * counter.counters.element_size()
    return {"bytes": admission.bytes, "threshold": admission.threshold, "counter_bytes": counter_bytes}


def _make_admission(about: dict[str, Any], device: torch.device) -> Admission:
    options = {} if about["threshold"] is None else {"counter_bytes": about["counter_bytes"]}
    return Admission(about["bytes"], threshold=about["threshold"], device=device, **options)


def _make(about: dict[str, Any], device_of) -> dict[str, nn.Module]:
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


def _table(module: nn.Module, name: str, described: dict[str, Any], file: str) -> nn.Module:
    """What is to be swapped for a layer of the file."""
    try:
        table = module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{file}: has a layer {name!r}, and there is none in this {type(module).__name__}") from None
    if not name:
        raise ValueError(f"{file}: of one {described['class']}; load() makes it without a module")
    config, kind = described["config"], described["class"]
    if kind in _TABLES:
        shape = config["num_embeddings"], config["embedding_dim"]
        own = getattr(table, "num_embeddings", None), getattr(table, "embedding_dim", None)
        if own != shape or not isinstance(table, _TABLES[kind]):
            raise ValueError(
                f"{file}: {name!r} is a {kind} of {shape[0]} rows of {shape[1]}; it can't take the place of {table}"
            )
    return table


def _device(module: nn.Module) -> torch.device:
    device = next((x.device for x in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _swap(module: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        layer.train(module.get_submodule(name).training)
        module.get_submodule(parent)._modules[child] = layer


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write the file that this yields; it takes the name ``path`` when all went well, else nothing is left of it.

    Raises:
        OSError: it can't be written; names ``path``.
    """
    from safetensors import SafetensorError

    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; safetensors makes files that only their owner reads
        yield part
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:  # the latter also stands for a full disk
        raise OSError(
            getattr(error, "errno", None), getattr(error, "strerror", None) or str(error), str(path)
        ) from None
    finally:
        part.unlink(missing_ok=True)
