"""The metadata of saved files: how ROBE layers were made, and a checksum of where their rows lie.

It is JSON:

    {"version": 1,
     "arrays": [{"size": m, "seed": 0, "init_mean": 0.0, "init_std": 0.01, "dtype": "float32", "requires_grad": true,
                 "group_size": null}],
     "admissions": [{"bytes": n, "threshold": null, "counter_bytes": null}],
     "layers": {"name of the module": {"class": "RobeEmbedding", "type": null, "array": 0, "admission": null,
                                       "config": {...}}},
     "checksum": "..."}

"type" names the user's own subclass of "class", and "config" holds its arguments. The checksum covers all that decides
where rows lie: without it, another seed would load and read noise. Files of 0.8.0 have none.

Files come from anywhere, so nothing is made from a text before all of its values are checked, and their sum of bytes.
"""

import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from inspect import Parameter, signature
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from robe.admission import Admission
from robe.array import Int8RobeArray, RobeArray
from robe.layers.collection import EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.layers.embedding import RobeEmbedding, RobeEmbeddingBag
from robe.layers.keyed import RobeKeyedEmbeddingBagCollection
from robe_json import from_json, parse_json

VERSION = 1
RobeLayer = RobeEmbedding | RobeEmbeddingBag | RobeEmbeddingBagCollection | RobeKeyedEmbeddingBagCollection
LAYERS: dict[str, Any] = {layer.__name__: layer for layer in get_args(RobeLayer)}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_MOST_IN_GROUP = 1 << 40


@dataclass(frozen=True)
class SavedArray:
    """A RobeArray; with a group_size an Int8RobeArray."""

    size: int
    seed: Any  # any integer, of more than 64 bits too
    init_std: float | None
    dtype: Literal["float16", "bfloat16", "float32", "float64", "int8"]
    requires_grad: bool
    group_size: int | None
    init_mean: float = 0.0

    def __post_init__(self) -> None:
        if type(self.seed) is not int:
            raise ValueError(f"seed: expected an integer, got {self.seed!r:.50}")
        if (self.group_size is None) != (self.dtype != "int8") or not 0 <= (self.group_size or 0) <= _MOST_IN_GROUP:
            raise ValueError(f"group_size: expected one with int8, and only there, got {self.group_size}")
        if self.size < 1:
            raise ValueError(f"size: expected at least 1 weight, got {self.size}")

    @classmethod
    def of(cls, array: RobeArray | Int8RobeArray) -> "SavedArray":
        """Describe an array."""
        return cls(
            size=array.size,
            seed=operator.index(array.seed),
            init_std=array.init_std if isinstance(array, RobeArray) else None,
            dtype=str(array.weight.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            requires_grad=array.weight.requires_grad,
            group_size=array.group_size if isinstance(array, Int8RobeArray) else None,
            init_mean=array.init_mean if isinstance(array, RobeArray) else 0.0,
        )

    @property
    def bytes(self) -> int:
        """The least memory that it takes."""
        return self.size * (1 if self.group_size else _DTYPES[self.dtype].itemsize)

    def make(self, device: torch.device) -> RobeArray | Int8RobeArray:
        """Make the array without initial values, which would take memory and advance torch's generator."""
        dtype = torch.float32 if self.group_size else _DTYPES[self.dtype]
        options = {"seed": self.seed, "init_std": self.init_std, "init_mean": self.init_mean}
        array = RobeArray(self.size, dtype=dtype, device="meta", **options)
        if self.group_size:
            int8 = array.quantized(self.group_size)
            int8.weight = torch.empty(self.size, dtype=torch.int8, device=device)
            int8.scale = torch.empty(len(int8.scale), device=device)
            return int8
        array.to_empty(device=device)
        array.weight.requires_grad_(self.requires_grad)
        return array


@dataclass(frozen=True)
class SavedAdmission:
    """An Admission; counter_bytes only while it counts."""

    bytes: int
    threshold: int | None
    counter_bytes: int | None

    def __post_init__(self) -> None:
        if (self.threshold is None) != (self.counter_bytes is None):
            raise ValueError(f"counter_bytes: expected with a threshold, and only there, got {self.counter_bytes}")
        if self.bytes < 8 or (self.counter_bytes or 0) < 0:
            raise ValueError(f"bytes: expected at least 8, got {self.bytes}")

    @classmethod
    def of(cls, admission: Admission) -> "SavedAdmission":
        """Describe an admission."""
        counter = admission.counter
        counter_bytes = None if counter is None else counter.counters.numel() * counter.counters.element_size()
        return cls(admission.bytes, admission.threshold, counter_bytes)

    def make(self, device: torch.device) -> Admission:
        """Make the admission, with no ids in it."""
        options = {} if self.counter_bytes is None else {"counter_bytes": self.counter_bytes}
        return Admission(self.bytes, threshold=self.threshold, device=device, **options)


@dataclass(frozen=True)
class SavedLayer:
    """A layer: its class, the user's own type or None, the places of array and admission, and its arguments."""

    kind: Literal[tuple(LAYERS)]  # type: ignore[valid-type]  # "class" in the file
    type: str | None
    array: int
    admission: int | None
    config: dict[str, Any]

    def __post_init__(self) -> None:
        types, needed = _types_of_arguments(LAYERS[self.kind])
        for name in needed:
            if name not in self.config:
                raise ValueError(f"config: expected {name}, which a {self.kind} needs")
        for name, value in self.config.items():
            if name not in types:
                raise ValueError(f"config.{name!r:.50}: not an argument of {self.kind} that is saved")
            from_json(value, types[name], f"config.{name}")

    def make(self, array: RobeArray | Int8RobeArray, admission: Admission | None) -> RobeLayer:
        """Make the layer on an array and an admission."""
        arguments = {
            name: from_json(x, _types_of_arguments(LAYERS[self.kind])[0][name]) for name, x in self.config.items()
        }
        return LAYERS[self.kind](array=array, admission=admission, **arguments)


@dataclass(frozen=True)
class Metadata:
    """What a file says about its layers; see the top of this module."""

    version: Literal[1]
    arrays: list[SavedArray]
    admissions: list[SavedAdmission]
    layers: dict[str, SavedLayer]
    checksum: str | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: expected at least one")
        for name, layer in self.layers.items():
            for what, place, several in (
                ("array", layer.array, self.arrays),
                ("admission", layer.admission, self.admissions),
            ):
                if place is not None and not 0 <= place < len(several):
                    raise ValueError(f"layers.{name!r:.80}.{what}: expected below {len(several)}, got {place}")
            parents = [name[:k] for k, letter in enumerate(name) if letter == "."] + [""] * bool(name)
            if any(parent in self.layers for parent in parents):
                raise ValueError(f"layers.{name!r:.80}: lies inside another layer")

    @property
    def bytes(self) -> int:
        """The least memory that arrays and admissions take."""
        return sum(x.bytes for x in self.arrays) + sum(x.bytes + (x.counter_bytes or 0) for x in self.admissions)

    def make(self, device_of: Callable[[str], torch.device]) -> dict[str, RobeLayer]:
        """Make the layers, with unset weights.

        Args:
            device_of: the device of a layer's array, from its name.

        Raises:
            ValueError: arguments that a layer refuses.
        """
        arrays: dict[int, Any] = {}
        admissions: dict[int | None, Admission | None] = {None: None}
        layers = {}
        for name, saved in self.layers.items():
            k, filter = saved.array, saved.admission
            try:
                if k not in arrays:
                    arrays[k] = self.arrays[k].make(device_of(name))
                if filter is not None and filter not in admissions:
                    admissions[filter] = self.admissions[filter].make(device_of(name))
                layers[name] = saved.make(arrays[k], admissions[filter])
            except (ValueError, OverflowError) as error:
                raise ValueError(f"layers.{name!r:.80}: {error}") from None
            except RuntimeError as error:
                if "overflow" not in str(error).lower():
                    raise
                raise ValueError(f"layers.{name!r:.80}: expected integers of 64 bits: {error}") from None
        return layers


def describe(layers: Mapping[str, RobeLayer]) -> str:
    """Return the metadata of some layers as JSON.

    Raises:
        ValueError: a value that can't be written so that it is read again.
    """
    arrays: list[Any] = []
    admissions: list[Any] = []
    described = {
        name: {
            "class": next(known for known, kind in LAYERS.items() if isinstance(layer, kind)),
            "type": own_type(layer),
            "array": _place(layer.array, arrays),
            "admission": None if layer.admission is None else _place(layer.admission, admissions),
            "config": layer.arguments(),
        }
        for name, layer in layers.items()
    }
    about = {
        "version": VERSION,
        "arrays": [asdict(SavedArray.of(array)) for array in arrays],
        "admissions": [asdict(SavedAdmission.of(admission)) for admission in admissions],
        "layers": described,
        "checksum": checksum(layers),
    }
    return json.dumps(in_json(about))


def in_json(x: Any) -> Any:
    """Return a value as it comes back from JSON; numpy's integers become numbers."""
    return json.loads(json.dumps(x, default=operator.index))


def parse(text: str, name: str) -> Metadata:
    """Read metadata.

    Args:
        text: JSON.
        name: of the file, for messages.

    Raises:
        ValueError: it is no JSON, of another version, or holds something else than it should; says what and where.
    """
    about = parse_json(text, dict[str, Any], name)
    if about.get("version") != VERSION:
        raise ValueError(f"{name}: expected version {VERSION} of robe.save's format, got {about.get('version')!r:.50}")
    layers = about.get("layers")
    if isinstance(layers, dict):  # no field of a dataclass can be called class
        about["layers"] = {layer: _with_kind(saved) for layer, saved in layers.items()}
    try:
        return from_json(about, Metadata)
    except ValueError as error:
        raise ValueError(f"{name}: metadata: {error}") from None


def checksum(layers: Mapping[str, RobeLayer]) -> str:
    """Return the SHA-256, in hexadecimal, of everything that decides where the rows of some layers lie."""
    digest = hashlib.sha256()
    filters: dict[int, str] = {}
    for name, layer in sorted(layers.items()):
        for part in parts_of(layer):
            admission = part.admission
            if admission is not None and id(admission) not in filters:
                filters[id(admission)] = hashlib.sha256(admission.filter.cpu().contiguous().numpy()).hexdigest()
            where = {
                "name": name,
                "hash": part.hash,
                "block_size": part.block_size,
                "embedding_dim": part.embedding_dim,
                "sign": part.sign,
                "keys_and_bounds": part.keys_and_bounds(),
                "size": part.array.size,
                "group_size": getattr(part.array, "group_size", None),
                "padding_idx": getattr(part, "padding_idx", None),
                "pooling": getattr(part, "pooling", getattr(part, "mode", None)),
                "filter": None if admission is None else filters[id(admission)],
            }
            digest.update(json.dumps(where, sort_keys=True, default=operator.index).encode())
    return digest.hexdigest()


def parts_of(layer: Any) -> list[Any]:
    """Return the layers that a layer reads through: its collections, or itself."""
    return list(layer.collections) if isinstance(layer, RobeKeyedEmbeddingBagCollection) else [layer]


def layers_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, RobeLayer]]:
    """Yield the outermost ROBE layers of a module, under every name they have."""
    if isinstance(module, get_args(RobeLayer)):
        yield name, module
    else:
        for child, inner in module._modules.items():
            if inner is not None:
                yield from layers_of(inner, f"{name}.{child}" if name else child)


def own_type(layer: nn.Module) -> str | None:
    """Return the name of a user's own subclass of a layer; None for the classes of robe and robe.hub."""
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return None if kind in LAYERS.values() or kind.__module__ == "robe.hub" else name


def _with_kind(saved: Any) -> Any:
    if not isinstance(saved, dict) or "kind" in saved:
        return saved
    return {"kind" if name == "class" else name: value for name, value in saved.items()}


def _place(one: Any, several: list) -> int:
    """The index of this very object in a list; it is appended if it is not there."""
    for k, other in enumerate(several):
        if one is other:
            return k
    several.append(one)
    return len(several) - 1


@cache
def _types_of_arguments(layer: type) -> tuple[dict[str, Any], list[str]]:
    """The arguments of a layer that JSON can hold, with their types; and the names of those without a default."""
    parameters = signature(layer.__init__).parameters  # type: ignore[misc]
    types = get_type_hints(layer.__init__)  # type: ignore[misc]
    for name, parameter in parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            types |= get_type_hints(get_args(types.pop(name))[0])
    if "tables" in types:
        types["tables"] = list[EmbeddingBagConfig]
    types = {name: _as_list(kind) for name, kind in types.items()}
    types = {name: kind for name, kind in types.items() if _is_of_json(kind)}
    return types, [name for name, x in parameters.items() if name in types and x.default is Parameter.empty]


def _as_list(kind: Any) -> Any:
    """The type as JSON holds it: each Sequence as a list; of several types, the first that JSON can hold."""
    if get_origin(kind) is Sequence:
        return list[get_args(kind)[0]]  # type: ignore[misc]
    options = get_args(kind)
    if NoneType not in options:
        return kind
    lists = [_as_list(option) for option in options if option is not NoneType]
    return next((option for option in lists if _is_of_json(option)), lists[0]) | None


def _is_of_json(kind: Any) -> bool:
    simple = {bool, int, float, str, NoneType, EmbeddingBagConfig}
    return kind in simple or (bool(get_args(kind)) and all(_is_of_json(option) for option in get_args(kind)))
