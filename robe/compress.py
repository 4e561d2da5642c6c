"""compress: swaps the embedding tables of any model for ROBE layers on one shared array."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robe.admission import Admission
from robe.array import INIT_STD, RobeArray
from robe.layers.embedding import RobeEmbedding, RobeEmbeddingBag
from robe.layers.tables import COMPONENTS_AT_ONCE, project

TorchTable = nn.Embedding | nn.EmbeddingBag


@dataclass(frozen=True)
class Table:
    """One embedding table of a model.

    Attributes:
        names: of the modules that read it, as in ``named_modules``; several where modules share the weight.
        num_embeddings, embedding_dim: its shape.
        reason: why it was left as it was; None: it was swapped.
    """

    names: tuple[str, ...]
    num_embeddings: int
    embedding_dim: int
    reason: str | None = None

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
            lines.append(f"{', '.join(table.names):<{width}}  {shape}  {table.reason or 'swapped'}")
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
    RobeEmbeddingBag with the same size, dimension, mode, padding and training mode. Tables that share a weight still
    share one afterwards. Weights with the same device, dtype and ``requires_grad`` share one array, so usually there
    is one array. Make the optimizer after this call, and DistributedDataParallel too. Code that reads the ``weight``
    of a swapped table itself gets an error: there is no table any more.

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
        ValueError: an argument out of range, no table to swap, or too few weights left. The model is then unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(1_000_000, 16), nn.Linear(16, 1))
        >>> compress(model, 1000).compression_report.floats_after
        16000
    """
    if not ratio > 1:
        raise ValueError(f"ratio: expected more than 1, got {ratio}")
    if init not in ("random", "project"):
        raise ValueError(f"init: expected 'random' or 'project', got {init!r}")
    found = list(tables_of(model))
    wanted = [(modules, reason_to_leave(model, modules, min_rows, init)) for modules in found]
    swapped = [modules for modules, reason in wanted if reason is None]
    if not swapped:
        reasons = "; ".join(f"{_names(model, modules)[0] or 'it'}: {reason}" for modules, reason in wanted)
        raise ValueError(f"model: no table to swap: {reasons or 'there is no nn.Embedding or nn.EmbeddingBag in it'}")
    if init == "project" and any(modules[0].weight.is_meta for modules in swapped):
        raise ValueError("init='project': tables on the meta device have no weights to project")

    layers, arrays = _make_layers(swapped, ratio, init, block_size, sign, admission, seed, init_std, device)
    report = CompressionReport(
        tables=tuple(
            Table(_names(model, [module, *others]), module.num_embeddings, module.embedding_dim, reason)
            for (module, *others), reason in wanted
        ),
        array_floats=sum(array.size for array in arrays),
        admission_bytes=0 if admission is None else admission.bytes,
        notes=_notes(swapped, len(arrays)),
    )
    _swap(model, layers)
    model = layers.get(model, model)
    model.compression_report = report  # type: ignore[assignment]
    return model


def _make_layers(
    tables: list[list[TorchTable]],
    ratio: float,
    init: str,
    block_size: int | None,
    sign: bool,
    admission: Admission | None,
    seed: int,
    init_std: float | None,
    device,
) -> tuple[dict[nn.Module, RobeEmbedding | RobeEmbeddingBag], list[RobeArray]]:
    """The layer in the place of each module, and their arrays; arguments as in ``compress``."""
    options = {"block_size": block_size, "sign": sign, "admission": admission}
    layers: dict[nn.Module, RobeEmbedding | RobeEmbeddingBag] = {}
    arrays = []
    total = sum(modules[0].weight.numel() for modules in tables)
    for members in _by_kind(tables, device):
        weights = [tables[k][0].weight for k in members]
        bytes = 0.0 if admission is None else admission.bytes * sum(w.numel() for w in weights) / total
        array = _array_for(weights, ratio, bytes, block_size, seed=seed, init_std=init_std, device=device)
        arrays.append(array)
        for k in members:
            layers |= {module: _layer(module, array=array, table_id=k, **options) for module in tables[k]}
        if init == "project":
            project(array, [(layers[tables[k][0]], tables[k][0].weight) for k in members])
    return layers, arrays


def _by_kind(tables: list[list[TorchTable]], device) -> Iterable[list[int]]:
    """The indices of tables whose weights can share an array: of one device, dtype and requires_grad."""
    kinds: dict[tuple, list[int]] = {}
    for k, (module, *_) in enumerate(tables):
        weight = module.weight
        kinds.setdefault((device or weight.device, weight.dtype, weight.requires_grad), []).append(k)
    return kinds.values()


def _array_for(
    weights: list[Tensor], ratio: float, filter_bytes: float, block_size: int | None, *, seed, init_std, device
) -> RobeArray:
    """The array in the place of some tables, smaller by ``ratio`` together with its share of a filter."""
    first = weights[0]
    floats = sum(weight.numel() for weight in weights)
    size = int(floats / ratio) - ceil(filter_bytes / first.dtype.itemsize)
    widest = max(block_size or weight.shape[1] for weight in weights)
    if size < widest:
        raise ValueError(
            f"ratio: {floats} weights compressed {ratio:g} times leave {max(size, 0)}, fewer than one block of "
            f"{widest}; compress less"
        )
    std = _scale(weights) if init_std is None else init_std
    array = RobeArray(size, seed=seed, init_std=std, dtype=first.dtype, device=device or first.device)
    array.weight.requires_grad_(first.requires_grad)
    return array


def tables_of(model: nn.Module) -> Iterator[list[TorchTable]]:
    """Yield the modules of each table: one, or several that share a weight."""
    of_weight: dict[int, list[TorchTable]] = {}
    for module in model.modules():
        if isinstance(module, TorchTable):
            # A parametrized module computes its weight anew each time.
            of_weight.setdefault(id(module._parameters.get("weight", module)), []).append(module)
    yield from of_weight.values()


def _names(model: nn.Module, modules: list[TorchTable]) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules(remove_duplicate=False) if module in modules)


def reason_to_leave(model: nn.Module, modules: list[TorchTable], min_rows: int, init: str) -> str | None:
    """Return why a table, given as the modules that share it, can't be swapped; None if it can."""
    weight = modules[0].weight
    if len(weight) < min_rows:
        return f"has fewer than {min_rows:,} rows"
    if not weight.is_floating_point():
        return f"is of {weight.dtype}"
    if not weight.requires_grad and init == "random":
        return "is frozen, and nothing would train random values: init='project' keeps what it holds"
    for other in model.modules():
        if other not in modules and any(p is weight for p in other._parameters.values()):
            return f"its weight is also that of a {type(other).__name__}"
    for module in modules:
        if type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
            return f"is a {type(module).__name__}, which has a forward of its own"
        if parametrize.is_parametrized(module):
            return "is parametrized"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return "has hooks"
        if module.max_norm is not None:
            return "max_norm: rows on an array share weights, so one can't be rescaled alone"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq: not supported by ROBE layers"
    return None


def _layer(module: TorchTable, **options: Any) -> RobeEmbedding | RobeEmbeddingBag:
    make: Callable[..., RobeEmbedding | RobeEmbeddingBag] = RobeEmbedding
    if isinstance(module, nn.EmbeddingBag):
        make = RobeEmbeddingBag
        options = options | {"mode": module.mode, "include_last_offset": module.include_last_offset}
    layer = make(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, **options)
    return layer.train(module.training)


def _swap(model: nn.Module, layers: dict[nn.Module, RobeEmbedding | RobeEmbeddingBag]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]


@torch.no_grad()
def _scale(weights: list[Tensor]) -> float:
    """The scale of initial values; torch's N(0, 1) would be noise that never trains away (docs/accuracy.md)."""
    there = [weight.flatten()[:COMPONENTS_AT_ONCE].float() for weight in weights if not weight.is_meta]
    return min(median(float(weight.std(correction=0)) for weight in there), INIT_STD) if there else INIT_STD


def _notes(swapped: list[list[TorchTable]], arrays: int) -> tuple[str, ...]:
    notes = []
    if any(module.sparse for modules in swapped for module in modules):
        notes.append(
            "some tables had sparse=True: the gradient of an array is dense, which torch.optim.SparseAdam refuses; "
            "use robe.optim, or an optimizer for dense gradients"
        )
    if arrays > 1:
        notes.append(f"tables with different device, dtype or requires_grad can't share: there are {arrays} arrays")
    return tuple(notes)
