"""compress: swaps the embedding tables of any model for ROBE layers on one shared array."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robe.admission import Admission
from robe.array import INIT_STD, RobeArray
from robe.layers.embedding import RobeEmbedding, RobeEmbeddingBag
from robe.layers.tables import COMPONENTS_AT_ONCE, check_finite, project
from robe.swappable import TorchTable, holds_optimizer, own_attributes, reason_to_leave, tables_of


class Values(NamedTuple):
    """The mean and the standard deviation of a table's components, those of a padding row left out."""

    mean: float
    std: float


@dataclass(frozen=True)
class Table:
    """One embedding table of a model.

    Attributes:
        names: of the modules that read it, as in ``named_modules``; several where modules share the weight.
        num_embeddings, embedding_dim: its shape.
        reason: why it was left as it was; None: it was swapped.
        before: the values that it held; None: it was left, or on the meta device.
        after: the values that its array begins with; None: it was left, or projected.
    """

    names: tuple[str, ...]
    num_embeddings: int
    embedding_dim: int
    reason: str | None = None
    before: Values | None = field(default=None, compare=False)
    after: Values | None = field(default=None, compare=False)

    @property
    def floats(self) -> int:
        """The number of its weights."""
        return self.num_embeddings * self.embedding_dim


@dataclass(frozen=True)
class CompressionReport:
    """The report of ``compress``; its ``str`` is a table for people.

    Attributes:
        tables: all embedding tables of the model.
        array_floats: the number of weights in the arrays that replace the swapped tables.
        admission_bytes: memory of the filter; 0 without one.
        notes: sentences that a user should read.
    """

    tables: tuple[Table, ...]
    array_floats: int
    admission_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[Table, ...]:
        """The tables that were swapped."""
        return tuple(table for table in self.tables if table.reason is None)

    @property
    def left(self) -> tuple[Table, ...]:
        """The tables that were left, each with its reason."""
        return tuple(table for table in self.tables if table.reason is not None)

    @property
    def floats_before(self) -> int:
        """The number of weights in all tables before."""
        return sum(table.floats for table in self.tables)

    @property
    def floats_after(self) -> int:
        """The number of weights in the arrays and in the tables that were left."""
        return self.array_floats + sum(table.floats for table in self.left)

    def __str__(self) -> str:
        width = max([len(", ".join(table.names)) for table in self.tables] + [5])
        lines = [f"{'table':<{width}}  {'rows':>13}  {'dim':>5}"]
        for table in self.tables:
            shape = f"{table.num_embeddings:>13,}  {table.embedding_dim:>5}"
            lines.append(f"{', '.join(table.names):<{width}}  {shape}  {table.reason or _swapped(table)}")
        lines.append(
            f"{len(self.swapped)} of {len(self.tables)} tables swapped; floats of embeddings: "
            f"{self.floats_before:,} before, {self.floats_after:,} after, {self.array_floats:,} of them shared"
        )
        if self.admission_bytes:
            lines[-1] += f", and an admission of {self.admission_bytes:,} bytes"
        return "\n".join([*lines, *self.notes])


def compress(
    model: nn.Module,
    ratio: float = 1000,
    *,
    block_size: int | None = None,
    min_rows: int = 1000,
    init: str = "random",
    init_std: float | None = None,
    sign: bool = False,
    seed: int = 0,
    admission: Admission | None = None,
    device=None,
) -> nn.Module:
    """Swap the embedding tables of a model for ROBE layers on one shared array.

    Every nn.Embedding and nn.EmbeddingBag with enough rows, wherever it is in the model (torchrec's
    EmbeddingBagCollection holds such modules too), is replaced in place, under its name, by a RobeEmbedding or
    RobeEmbeddingBag with the same size, dimension, mode, padding, training mode and attributes. Tables that share a
    weight still share one afterwards. Weights with the same device, dtype and ``requires_grad`` share one array, so
    usually there is one array. Tables whose values are all equal, or whose mean is more than half of their standard
    deviation, get an array of their own that begins there. What can't be carried over, such as a hook, or a weight
    that the model also keeps elsewhere, leaves a table as it is. Make the optimizer after this call, and
    DistributedDataParallel too. Code that reads the ``weight`` of a swapped table itself gets an error: there is no
    table any more.

    Args:
        model: changed in place.
        ratio: how many times smaller the arrays are than the tables they replace, together with the filter of an
            admission.
        block_size, sign, admission: as in RobeEmbedding. The tables get the table_ids 0, 1, 2 ... in the order of
            ``CompressionReport.swapped``.
        min_rows: tables with fewer rows are left as they are.
        init: initial values of the arrays: "random", for tables that will be trained, so frozen ones are left; or
            "project", the least squares approximation of trained tables: each slot is the mean of the components that
            are read there.
        init_std: of the arrays, see RobeArray. None: the median of the tables' standard deviations, so that the model
            starts as it did, but at most RobeArray's default.
        seed: of the arrays; see RobeArray.
        device: of the arrays; None: where the tables are. Tables on the "meta" device take no memory, so a model can
            be built whose tables would not fit.

    Returns:
        The model; if it was a table itself, the layer in its place. Its attribute ``compression_report`` is a
        CompressionReport.

    Raises:
        ValueError: an argument out of range, no table to swap, too few weights left, or a table with a value that is
            not finite. The model is then unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(1_000_000, 16), nn.Linear(16, 1))
        >>> compress(model, 1000).compression_report.floats_after
        16000
    """
    if not ratio > 1:
        raise ValueError(f"ratio: expected more than 1, got {ratio}")
    if init not in ("random", "project"):
        raise ValueError(f"init: expected 'random' or 'project', got {init!r}")
    options = _Options(ratio, block_size, init, init_std, sign, seed, admission, device)
    found = [(_names(model, modules), modules) for modules in tables_of(model)]
    reasons = {names: reason_to_leave(model, modules, min_rows, init) for names, modules in found}
    tables = [_Swap(names, modules, _values(names, modules)) for names, modules in found if reasons[names] is None]
    if init == "project" and any(table.values is None for table in tables):
        raise ValueError("init='project': tables on the meta device have no weights to project")
    for group in _groups(tables, options):
        reason = _reason_to_leave_apart(group, tables, options) if group.is_apart else None
        reasons |= {table.names: reason for table in group.tables}
    tables = [table for table in tables if reasons[table.names] is None]
    if not tables:
        why = "; ".join(f"{names[0] or 'it'}: {reason}" for names, reason in reasons.items())
        raise ValueError(f"model: no table to swap: {why or 'there is no nn.Embedding or nn.EmbeddingBag in it'}")
    layers, arrays = _make_layers(tables, options)
    report = _report(found, reasons, tables, arrays, options, holds_optimizer(model))
    _swap(model, layers)
    model = layers.get(model, model)
    model.compression_report = report  # type: ignore[assignment]
    return model


class _Options(NamedTuple):
    """The arguments of ``compress`` that say how arrays and layers are made."""

    ratio: float
    block_size: int | None
    init: str
    init_std: float | None
    sign: bool
    seed: int
    admission: Admission | None
    device: Any

    @property
    def of_layers(self) -> dict[str, Any]:
        """The keywords of the layers."""
        return {"block_size": self.block_size, "sign": self.sign, "admission": self.admission}


# ---------------------------------------------------------------------------------------------------------------------
# Tables, and what they hold


class _Swap(NamedTuple):
    """A table that is swapped."""

    names: tuple[str, ...]
    modules: list[TorchTable]
    values: Values | None  # None: on the meta device

    @property
    def weight(self) -> Tensor:
        return self.modules[0].weight

    @property
    def padding_idx(self) -> int | None:
        """The row that no module of the table trains."""
        padding = {module.padding_idx for module in self.modules}
        return padding.pop() if len(padding) == 1 else None


@torch.no_grad()
def _values(names: tuple[str, ...], modules: list[TorchTable]) -> Values | None:
    """What a table holds, refused where it is not finite; constant values are found in all of it."""
    table = _Swap(names, modules, None)
    weight = table.weight.detach()
    if weight.is_meta:
        return None
    low, high = torch.aminmax(weight)
    if not (low.isfinite() and high.isfinite()):
        check_finite(f"model: the table {names[0] or 'itself'}", weight)
    parts = [weight]
    if table.padding_idx is not None and len(weight) > 1:
        parts = [part for part in (weight[: table.padding_idx], weight[table.padding_idx + 1 :]) if len(part)]
        low, high = (min(part.amin() for part in parts), max(part.amax() for part in parts))
    if low == high:
        return Values(float(low), 0.0)
    step = ceil(weight.numel() / COMPONENTS_AT_ONCE)
    sample = torch.cat([part[::step] for part in parts]).double()
    return Values(float(sample.mean()), float(sample.std(correction=0)))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


class _Group(NamedTuple):
    """Tables that share an array, whose values begin around ``mean``.

    They are apart from others of their kind where all values of a table are equal, or their mean is not 0.
    """

    tables: list[_Swap]
    mean: float
    is_apart: bool


def _groups(tables: list[_Swap], options: _Options) -> list[_Group]:
    """Tables that can share an array: of one device, dtype, requires_grad and attributes, and around one mean.

    A shared array has one mean and one scale of initial values. Around 0 the scale may differ from a table's, but where
    all values of a table are equal, or its mean is more than half of its standard deviation, they are meant: zeros of
    biases, ones of gates. An array of zeros, in turn, would not train factors.
    """
    groups: dict[tuple, list[_Swap]] = {}
    for table in tables:
        weight, values = table.weight, table.values
        attributes = tuple(
            (name, value if isinstance(value, (bool, int, float, str)) else id(value))
            for name, value in sorted(vars(weight).items())
        )
        center = None
        if values is not None and values.std == 0 and (values.mean or options.init_std is None):
            center = values.mean
        elif values is not None and abs(values.mean) > values.std / 2:
            center = float(f"{values.mean:.2g}")
        constant = values is not None and values.std == 0
        kind = options.device or weight.device, weight.dtype, weight.requires_grad, attributes
        groups.setdefault((*kind, center, center is not None and constant), []).append(table)
    return [
        _Group(of_kind, 0.0 if center is None else _median(of_kind, "mean"), center is not None)
        for (*_, center, _), of_kind in groups.items()
    ]


def _median(tables: list[_Swap], what: str) -> float:
    return median(getattr(table.values, what) for table in tables if table.values is not None)


def _size(group: _Group, tables: list[_Swap], options: _Options) -> tuple[int, int]:
    """The size of a group's array, and the least that it needs, a block.

    Together with its share of a filter it is smaller than the tables by the ratio.
    """
    floats, all_floats = (sum(table.weight.numel() for table in some) for some in (group.tables, tables))
    filter_bytes = 0.0 if options.admission is None else options.admission.bytes * floats / all_floats
    size = int(floats / options.ratio) - ceil(filter_bytes / group.tables[0].weight.dtype.itemsize)
    return max(size, 0), max(options.block_size or table.weight.shape[1] for table in group.tables)


def _reason_to_leave_apart(group: _Group, tables: list[_Swap], options: _Options) -> str | None:
    """Why tables that need an array of their own can't have one."""
    if group.mean and options.sign and options.init == "random":
        return f"its values are around {group.mean:.2g}, and sign=True would turn half of them round"
    size, least = _size(group, tables, options)
    if size < least:
        return f"its values are around {group.mean:.2g}, and an array of such tables would be smaller than a block"
    return None


def _array_of(group: _Group, tables: list[_Swap], options: _Options) -> RobeArray:
    """The array in the place of a group's tables."""
    first = group.tables[0].weight
    size, least = _size(group, tables, options)
    if size < least:
        floats = sum(table.weight.numel() for table in group.tables)
        raise ValueError(
            f"ratio: {floats} weights compressed {options.ratio:g} times leave {size}, fewer than one block of "
            f"{least}; compress less"
        )
    std = options.init_std
    if std is None:
        # torch's N(0, 1) would be noise that never trains away (docs/accuracy.md).
        measured = any(table.values is not None for table in group.tables)
        std = min(_median(group.tables, "std"), INIT_STD) if measured else INIT_STD
    device = options.device or first.device
    array = RobeArray(size, seed=options.seed, init_std=std, init_mean=group.mean, dtype=first.dtype, device=device)
    array.weight.requires_grad_(first.requires_grad)
    vars(array.weight).update(vars(first))
    return array


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def _make_layers(
    tables: list[_Swap], options: _Options
) -> tuple[dict[nn.Module, RobeEmbedding | RobeEmbeddingBag], dict[tuple[str, ...], RobeArray]]:
    """The layer in the place of each module, and the array of each table, by its names."""
    layers: dict[nn.Module, RobeEmbedding | RobeEmbeddingBag] = {}
    arrays = {}
    ids = {table.names: k for k, table in enumerate(tables)}
    for group in _groups(tables, options):
        array = _array_of(group, tables, options)
        readers = []
        for table in group.tables:
            own = {"array": array, "table_id": ids[table.names], **options.of_layers}
            layers |= {module: _layer(module, **own) for module in table.modules}
            arrays[table.names] = array
            # Rows count that any of a table's modules trains.
            rows, dim = table.weight.shape
            readers.append((RobeEmbedding(rows, dim, table.padding_idx, **own), table.weight))
        if options.init == "project":
            project(array, readers)
    return layers, arrays


def _names(model: nn.Module, modules: list[TorchTable]) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules(remove_duplicate=False) if module in modules)


def _layer(module: TorchTable, **options: Any) -> RobeEmbedding | RobeEmbeddingBag:
    make: Callable[..., RobeEmbedding | RobeEmbeddingBag] = RobeEmbedding
    if isinstance(module, nn.EmbeddingBag):
        make = RobeEmbeddingBag
        options = options | {"mode": module.mode, "include_last_offset": module.include_last_offset}
    elif module.padding_idx is not None and not module.weight.is_meta:
        options = options | {"padding_row": module.weight[module.padding_idx]}
    layer = make(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, **options)
    vars(layer).update(own_attributes(module))
    return layer.train(module.training)


def _swap(model: nn.Module, layers: dict[nn.Module, RobeEmbedding | RobeEmbeddingBag]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]


# ---------------------------------------------------------------------------------------------------------------------
# The report


def _report(
    found: list[tuple[tuple[str, ...], list[TorchTable]]],
    reasons: dict[tuple[str, ...], str | None],
    tables: list[_Swap],
    arrays: dict[tuple[str, ...], RobeArray],
    options: _Options,
    has_optimizer: bool,
) -> CompressionReport:
    before = {table.names: table.values for table in tables}
    after = {}
    if options.init == "random":
        after = {names: Values(array.init_mean, array.init_std) for names, array in arrays.items()}
    sizes = {id(array): array.size for array in arrays.values()}
    return CompressionReport(
        tables=tuple(
            Table(
                names,
                module.num_embeddings,
                module.embedding_dim,
                reasons[names],
                before=before.get(names),
                after=after.get(names),
            )
            for names, (module, *_) in found
        ),
        array_floats=sum(sizes.values()),
        admission_bytes=0 if options.admission is None else options.admission.bytes,
        notes=_notes(tables, len(sizes), has_optimizer),
    )


def _swapped(table: Table) -> str:
    if table.after is None:
        return "swapped"
    before = "" if table.before is None else f"from mean {table.before.mean:.2g}, std {table.before.std:.2g} "
    return f"swapped, {before}to mean {table.after.mean:.2g}, std {table.after.std:.2g}"


def _notes(swapped: list[_Swap], arrays: int, has_optimizer: bool) -> tuple[str, ...]:
    notes = []
    if any(module.sparse for table in swapped for module in table.modules):
        notes.append(
            "some tables had sparse=True: the gradient of an array is dense, which torch.optim.SparseAdam refuses; "
            "use robe.optim, or an optimizer for dense gradients"
        )
    if has_optimizer:
        notes.append("the model holds an optimizer, which trains what was there before: make it again")
    if arrays > 1:
        notes.append(
            f"tables with different device, dtype, requires_grad or mean can't share: there are {arrays} arrays"
        )
    return tuple(notes)
