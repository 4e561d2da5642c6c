"""save and load: a model with its ROBE layers in one safetensors file, which also says how the layers were made.

A ``state_dict`` holds the weights of an array, but not where embeddings lie in it: seed, block sizes, table_ids. The
file has these in its metadata, under "robe" (robe/metadata.py). The tensors are those of the ``state_dict``, in their
dtypes. Tensors that are one, such as tied weights, stand once; the metadata has the other names, each with the name
that it stands under. Tensors that lie in each other's memory otherwise are written one by one.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from robe.compress import reason_to_leave, tables_of
from robe.layers.collection import own_config
from robe.metadata import (
    LAYERS,
    Metadata,
    RobeLayer,
    SavedLayer,
    checksum,
    describe,
    in_json,
    layers_of,
    own_type,
    parse,
    parts_of,
)
from robe_files import whole_file

_KEY, _FORMAT = "robe", "format"
_RESERVED = "__metadata__"  # of the header of safetensors
_EXTRA_STATE = "_extra_state"  # torch's name of what get_extra_state returns
_TABLES: dict[str, Any] = {"RobeEmbedding": nn.Embedding, "RobeEmbeddingBag": nn.EmbeddingBag}
_OF_TABLES = ("num_embeddings", "embedding_dim", "padding_idx", "mode", "include_last_offset")
# The names of safetensors.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def save(module: nn.Module, file: str | os.PathLike) -> None:
    """Write a ROBE layer, or a model that holds some, as a safetensors file.

    What is written loads again, to the same values and dtypes.

    Args:
        module: its ``state_dict`` is written, with the arguments of its ROBE layers.
        file: the path. An existing file is replaced in one step, once the new one is whole.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file can't be written; names it.
        ValueError: the module holds no ROBE layer, or one that was changed after it was made, so that its arguments
            would make another; or its ``state_dict`` holds something that the file can't: a tensor that is sparse,
            quantized, nested, without memory or of another dtype, or what is no tensor. Names it.
    """
    from safetensors.torch import save_file

    layers = dict(layers_of(module))
    if not layers:
        raise ValueError(f"module: no ROBE layer in this {type(module).__name__}; safetensors alone can write it")
    tensors, names = _once(_state(module))
    text = describe(layers)
    made = parse(text, "module").make(lambda name: torch.device("meta"))
    for name, layer in layers.items():
        if _reads(made[name]) != _reads(layer):
            raise ValueError(
                f"module: {name or 'it'} was changed after it was made, and its arguments would make another layer; "
                "was its array replaced by one with another seed, or parametrized?"
            )
    with whole_file(Path(file)) as part:
        save_file(tensors, part, metadata=names | {_FORMAT: "pt", _KEY: text})


def load(file: str | os.PathLike, module: nn.Module | None = None, *, device=None) -> nn.Module:
    """Read a file that ``save`` wrote.

    Make optimizers after this call: the module has new arrays then.

    Args:
        file: the path.
        module: a model like the one that was saved, with its tables, or after ``robe.compress`` with any options. Its
            tables are swapped for the layers of the file, and all weights are read. Every tensor gets the dtype that it
            has in the file. None: the file holds one ROBE layer, which is made anew.
        device: of the arrays; None: that of the swapped tables, or the CPU where they are on the meta device.

    Returns:
        The module, changed in place, or the layer.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file can't be read, or there is none; names it.
        ValueError: the file is of another kind, or damaged; or the module doesn't fit: something else stands in the
            place of a layer, such as a table with another shape, mode or padding, or other weights differ. The module
            is then unchanged.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(file)
    if os.path.exists(name) and not os.path.isfile(name):  # a pipe would wait for ever
        raise ValueError(f"{name}: expected a file")
    with open(name, "rb"):  # whose errors name the file
        pass
    try:
        with safe_open(name, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if _KEY not in metadata:
                raise ValueError(f"{name}: not written by robe.save: its metadata has no {_KEY!r}")
            about = parse(metadata[_KEY], name)
            if about.bytes > os.path.getsize(name):
                raise ValueError(f"{name}: has arrays and admissions of {about.bytes} bytes, more than the file")
            stored = _Stored(name, opened, metadata)
            return _load_alone(about, stored, device) if module is None else _load_into(module, about, stored, device)
    except SafetensorError as error:
        raise ValueError(f"{name}: not a safetensors file, or damaged: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tensors to write


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` as a file can hold it: contiguous, every tensor of a kind that comes back as it was.

    Raises:
        ValueError: a tensor of another kind; names it.
    """
    tensors = {}
    for name, tensor in module.state_dict().items():
        reason = _reason_to_refuse(name, tensor)
        if reason:
            raise ValueError(
                f"module: {name if name.isprintable() else ascii(name)} {reason}, which a safetensors file can't hold"
            )
        tensors[name] = tensor.detach()
    return tensors


def _reason_to_refuse(name: str, tensor: Any) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, no tensor"
    if name == _RESERVED or not name.isprintable():
        return "has a name of the format's own, or one with letters that are not printable"
    if is_lazy(tensor):
        return "is not initialized yet"
    if is_traceable_wrapper_subclass(tensor) or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}"
    if tensor.is_meta:
        return "is on the meta device, without values"
    if tensor.is_nested:
        return "is a nested tensor"
    if tensor.layout != torch.strided:
        return f"has the layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.dtype not in _DTYPES.values():
        return f"is of {tensor.dtype}"
    return None


def _once(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under one name, contiguous; and the others of its names with that one."""
    kept: dict[tuple, str] = {}
    written, names = {}, {}
    for name in sorted(tensors):
        tensor = tensors[name]
        place = _place(tensor)
        if place in kept and tensor.numel() and name not in (_KEY, _FORMAT):
            names[name] = kept[place]
        else:
            kept.setdefault(place, name)
            # Tensors that overlap are copied, since the writer refuses them.
            written[name] = tensor.resolve_conj().resolve_neg().contiguous()
    return _apart(written), names


def _place(tensor: Tensor) -> tuple:
    """Where the values of a tensor lie, and how they are read: equal for tensors that are one."""
    # torch conjugates and negates complex numbers when it reads them.
    lazy = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), lazy


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those copied that share memory with one before."""
    seen: set[tuple] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.device, tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of a file


class _Stored:
    """The tensors of an open file, by the names of a ``state_dict``."""

    def __init__(self, file: str, opened: Any, metadata: dict[str, str]):
        self.file, self._opened, self._names = file, opened, metadata
        self._there = set(opened.keys())

    def read_for(self, module: nn.Module) -> dict[str, Tensor]:
        """Read what a module needs; shared tensors under each of their names.

        Raises:
            ValueError: the file has other tensors than the module, or of other shapes or kinds of dtype.
        """
        kind = f"this {type(module).__name__}"
        names = {}
        for name, tensor in module.state_dict().items():
            kept = name if name in self._there else self._names.get(name)
            if kept not in self._there:
                raise ValueError(f"{self.file}: has no {name}, which {kind} has")
            if not isinstance(tensor, Tensor) or is_lazy(tensor):
                raise ValueError(f"module: {name} is no tensor that has its shape; {self.file} holds one")
            piece = self._opened.get_slice(kept)
            shape, dtype = tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype())
            if shape != tuple(tensor.shape) and name.rpartition(".")[2] != _EXTRA_STATE:
                raise ValueError(f"{self.file}: {name} has the shape {shape}, in {kind} {tuple(tensor.shape)}")
            if dtype is None or _kind(dtype) != _kind(tensor.dtype):
                raise ValueError(f"{self.file}: {name} is of {dtype or piece.get_dtype()}, in {kind} of {tensor.dtype}")
            names[name] = kept
        more = self._there - set(names.values())
        if more:
            raise ValueError(f"{self.file}: has {min(more)}, which {kind} has not")
        read = {kept: self._opened.get_tensor(kept) for kept in set(names.values())}
        return {name: read[kept] for name, kept in names.items()}


def _kind(dtype: torch.dtype) -> str:
    """What kind of numbers a dtype holds; those of one kind can stand for each other."""
    if dtype == torch.bool:
        return "truth values"
    return "complex" if dtype.is_complex else "floating point" if dtype.is_floating_point else "integers"


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def _load_alone(about: Metadata, stored: _Stored, device) -> nn.Module:
    """The one layer of a file."""
    file = stored.file
    if list(about.layers) != [""]:
        names = ", ".join(about.layers)
        raise ValueError(f"{file}: a model with the layers {names}, not one layer; give load() such a model")
    saved = about.layers[""]
    if saved.type:
        raise ValueError(f"{file}: of a {saved.type}, which is more than a {saved.kind}; save a model that has it")
    new = _make(about, file, lambda name: torch.device("cpu" if device is None else device))
    tensors = stored.read_for(new[""])
    _check_dtypes(new, tensors, file)
    new[""].load_state_dict(tensors)
    _check_layout(new, about, file)
    return new[""]


def _load_into(module: nn.Module, about: Metadata, stored: _Stored, device) -> nn.Module:
    old = {name: _checked(module, name, saved, stored.file) for name, saved in about.layers.items()}
    _check_one_layer_each(old, about, stored.file)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_meta and not any(name.startswith(f"{layer}.") for layer in old):
            raise ValueError(f"module: {name} is on the meta device; only tables that are swapped can be there")

    def where(name: str) -> torch.device:
        return _device(old[name]) if device is None else torch.device(device)

    new = _make(about, stored.file, where)
    with _unchanged_on_error(module) as changed:
        kept = _swap(module, about, old, new)
        tensors = stored.read_for(module)
        _check_dtypes(new, tensors, stored.file)
        changed.extend(_own_tensors(module, new))
        _take_dtypes(module, tensors)
        module.load_state_dict(tensors)
        _check_tied(module, tensors, stored.file)
        _check_layout(new, about, stored.file)
    for name in kept:
        for there, made in zip(parts_of(old[name]), parts_of(new[name])):
            there.take_keys(made)
    return module


def _make(about: Metadata, file: str, device_of) -> dict[str, RobeLayer]:
    try:
        return about.make(device_of)
    except ValueError as error:
        raise ValueError(f"{file}: metadata: {error}") from None


def _swap(module: nn.Module, about: Metadata, old: dict[str, nn.Module], new: dict[str, RobeLayer]) -> list[str]:
    """Put the new layers in the place of the old ones; return the names of the user's own, which stay."""
    swapped: dict[nn.Module, Any] = {}
    kept = []
    for name, layer in new.items():
        there = old[name]
        swapped[there] = swapped.get(there, layer)  # one layer may have two names
        if about.layers[name].type:  # the user's own layer stays, on another array
            swapped[there] = there
            kept.append(name)
        else:
            layer.train(there.training)
        for what in ("array", "admission"):  # a model may hold these itself
            if isinstance(getattr(there, what, None), nn.Module):
                swapped[getattr(there, what)] = getattr(layer, what)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in swapped and swapped.get(parent, parent) is parent:
                parent._modules[name] = swapped[child]
    return kept


@contextmanager
def _unchanged_on_error(module: nn.Module) -> Iterator[list[Tensor]]:
    """Put the children of a module, and the values of the tensors that the list gets, back if the body fails."""
    children = [(parent, dict(parent._modules)) for parent in module.modules()]
    before = _Before()
    try:
        yield before
    except BaseException:
        for parent, modules in children:
            parent._modules.clear()
            parent._modules.update(modules)
        before.restore()
        raise


class _Before(list[Tensor]):
    """Tensors, with the values that they had when they were added."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[tuple[Tensor, Tensor]] = []  # the memory of each, and a copy

    def extend(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors."""
        for tensor in tensors:
            self.append(tensor)
            self._values.append((tensor.data, tensor.detach().clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Give all tensors their memory and values back."""
        for tensor, (memory, values) in zip(self, self._values):
            tensor.data = memory
            if not _repeats(memory):  # then it was not written to
                memory.copy_(values)


def _own_tensors(module: nn.Module, new: dict[str, RobeLayer]) -> list[Tensor]:
    """The tensors of a module that are not those of the new layers."""
    of_new = {id(x) for layer in new.values() for x in layer.state_dict(keep_vars=True).values()}
    return [x for x in module.state_dict(keep_vars=True).values() if id(x) not in of_new]


def _take_dtypes(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the tensors of a module the dtypes of those that will be copied into them, and memory for each number."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        dtype = tensors[name].dtype
        if tensor.dtype != dtype or _repeats(tensor):
            tensor.data = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def _repeats(tensor: Tensor) -> bool:
    """Whether several entries of a tensor are one number in memory, as in an expanded one; it can't be written to."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


def _check_dtypes(new: dict[str, RobeLayer], tensors: dict[str, Tensor], file: str) -> None:
    for name, layer in new.items():
        for inner, tensor in layer.state_dict().items():
            full = f"{name}.{inner}" if name else inner
            if full in tensors and tensors[full].dtype != tensor.dtype:
                raise ValueError(f"{file}: {full} is of {tensors[full].dtype}, and its layer of {tensor.dtype}")


def _check_layout(new: dict[str, RobeLayer], about: Metadata, file: str) -> None:
    if about.checksum is not None and about.checksum != checksum(new):
        raise ValueError(
            f"{file}: its rows do not lie where they lay when it was written: the checksum of seed, table_ids, sizes "
            "and filters differs; the file is damaged, or was edited"
        )


def _check_tied(module: nn.Module, tensors: dict[str, Tensor], file: str) -> None:
    """Check that tensors of a module that share memory were given values that agree."""
    names: dict[tuple, list[str]] = {}
    state = module.state_dict()
    for name, tensor in state.items():
        if tensor.numel():
            names.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(name)
    for shared in names.values():
        if len({(_place(state[name]), id(tensors[name])) for name in shared}) == 1:
            continue  # one tensor in the module, and one in the file
        for name in shared:
            if not _same_bits(state[name].cpu(), tensors[name]):
                others = ", ".join(other for other in shared if other != name)
                raise ValueError(
                    f"{file}: {name} has values of its own, and in this module it shares those of {others}"
                )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(x.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8) for x in (one, other)))


def _check_one_layer_each(old: dict[str, nn.Module], about: Metadata, file: str) -> None:
    """Check that the names of a layer of the module are those of one layer in the file."""
    first: dict[nn.Module, str] = {}
    for name, there in old.items():
        other = first.setdefault(there, name)
        if about.layers[name] != about.layers[other]:
            raise ValueError(f"{file}: {name!r} and {other!r} are two layers, and in this module they are one")


def _checked(module: nn.Module, name: str, saved: SavedLayer, file: str) -> nn.Module:
    """The module that a layer of the file replaces, checked."""
    kind, config = saved.kind, saved.config
    if not name:
        raise ValueError(f"{file}: of one {kind}; load() makes it without a module")
    try:
        there = module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{file}: has a layer {name!r}, and there is none in this {type(module).__name__}") from None
    reason, own = None, dict[str, Any]()
    compared: tuple[str, ...] = ("tables", "is_weighted", *_OF_TABLES)
    if isinstance(there, get_args(RobeLayer)):
        own = there.arguments()
        if not isinstance(there, LAYERS[kind]) or own_type(there) != saved.type:
            reason = f"is a {saved.type or kind} there"
        elif saved.type:  # it stays as it is, so all has to be the same
            compared = tuple(config)
            if (there.admission is None) != (saved.admission is None):
                reason = "has an admission in one of them"
    elif kind in _TABLES and isinstance(there, _TABLES[kind]):
        same = next(modules for modules in tables_of(module) if there in modules)
        reason = reason_to_leave(module, same, min_rows=0, init="project")
        own = {what: getattr(there, what, None) for what in _OF_TABLES}
    elif kind == "RobeKeyedEmbeddingBagCollection" and hasattr(there, "embedding_bag_configs"):  # torchrec's
        own = {"tables": [asdict(own_config(table)) for table in there.embedding_bag_configs()]}  # type: ignore[operator]
        own["is_weighted"] = there.is_weighted()  # type: ignore[operator]
    else:
        reason = f"is a {kind} there"
    for what in compared:
        if reason is None and what in config and config[what] != in_json(own.get(what)):
            reason = f"has {what}={config[what]} there, and here {own.get(what)}"
    if reason:
        raise ValueError(f"{file}: the module's {name!r}, a {type(there).__name__}, can't be swapped: it {reason}")
    return there


def _device(module: nn.Module) -> torch.device:
    device = next((x.device for x in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _reads(layer: Any) -> tuple:
    """The places that a layer reads, and the names of its tensors."""
    return [part.keys_and_bounds() for part in parts_of(layer)], list(layer.state_dict())
