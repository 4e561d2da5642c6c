"""RobeTables: an array, and the places of virtual tables in it. All layers stand on it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from robe.admission import Admission
from robe.array import Int8RobeArray, RobeArray, checked_integer
from robe.hashing import HASHES, TRAITS, slots, table_key
from robe.layers.options import LayerOptions, SharedOptions, check_options
from robe.ops import for_torchscript  # importing it registers torch.ops.robe
from robe.ops.layout import Bags, Call, Tables
from robe.sketches import SHARED_ID

COMPONENTS_AT_ONCE = 1 << 22  # of tables that are read in pieces
_WITH_AUTOGRAD = {"lookup": torch.ops.robe.lookup.default, "bag": torch.ops.robe.bag.default}
_FORWARD = {"lookup": torch.ops.robe.lookup_forward.default, "bag": torch.ops.robe.bag_forward.default}
_OUT = {"lookup": torch.ops.robe.lookup_out.default, "bag": torch.ops.robe.bag_out.default}


class RobeTables(nn.Module):
    """An array, and the place of each feature's table in it.

    Args:
        num_embeddings: of each table; None: unbounded.
        embedding_dim: of all tables.
        table_of_feature: for each feature the index of its table.
        table_ids: of each table, for "mix".
        first_rows: of each table, for "linear" and "identity".
        first_slot: where the first of the tables begins in the array, for "identity".
        device, dtype: of the layer's own array.
        options: see LayerOptions.

    Attributes:
        array: the RobeArray, or its Int8RobeArray.
        admission: the Admission, or None.
        table_keys: (F,) int64, the hash key of each feature's table.
        num_embeddings_per_feature: (F,) int64, 0 for an unbounded table.

    These two tensors follow from the arguments, so they are no buffers: whatever fills a module's buffers, or leaves
    them on the meta device, would set them to other keys, and rows would be read elsewhere. They lie where the array
    lies, or on the CPU while it is on the meta device.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument out of range.
    """

    table_keys: Tensor
    num_embeddings_per_feature: Tensor

    def __init__(
        self,
        num_embeddings: Sequence[int | None],
        embedding_dim: int,
        *,
        table_of_feature: Sequence[int],
        table_ids: Sequence[int],
        first_rows: Sequence[int],
        first_slot: int = 0,
        device=None,
        dtype=None,
        **options: Unpack[LayerOptions],
    ):
        super().__init__()
        check_options(type(self), options, LayerOptions.__annotations__)
        block_size, hash, admission = options.get("block_size"), options.get("hash", "mix"), options.get("admission")
        num_embeddings = [n if n is None else checked_integer("num_embeddings", n) for n in num_embeddings]
        embedding_dim = checked_integer("embedding_dim", embedding_dim)
        block_size = embedding_dim if block_size is None else checked_integer("block_size", block_size)
        table_ids = [checked_integer("table_id", table_id, bits=None) for table_id in table_ids]
        first_rows = [checked_integer("first_row", first_row, bits=None) for first_row in first_rows]
        first_slot = checked_integer("first_slot", first_slot)
        _check(num_embeddings, embedding_dim, block_size, hash)
        sign = options.get("sign", False)
        if sign not in (True, False):
            raise ValueError(f"sign: expected True or False, got {sign!r:.50}")
        if admission is not None and not isinstance(admission, Admission):
            raise ValueError(f"admission: expected an Admission, got a {type(admission).__name__}")
        bounds = [n or 0 for n in num_embeddings]  # 0 stands for unbounded in the operators
        table_weights = None if 0 in bounds else sum(bounds) * embedding_dim
        array = resolve_array(options, table_weights=table_weights, device=device, dtype=dtype)
        if admission is not None and not TRAITS[hash].has_admission:
            raise ValueError(f"admission: expected hash='mix' with it, got {hash!r}")
        if TRAITS[hash].key == "table" and has_room(options, array, table_weights):
            hash, first_rows = "identity", [0, *accumulate(bounds)][:-1]
        if first_slot and TRAITS[hash].key != "slot":
            raise ValueError(
                f"first_slot: expected 0 with hash={hash!r}, which has no order of slots, got {first_slot}"
            )
        aligned = embedding_dim & -embedding_dim
        if first_slot % aligned:
            raise ValueError(
                f"first_slot: expected a multiple of {aligned}, the power of two in embedding_dim={embedding_dim}, "
                f"got {first_slot}"
            )
        if TRAITS[hash].key == "table":
            keys = [table_key(array.seed, table_id) for table_id in table_ids]
        else:
            slots_each = embedding_dim if TRAITS[hash].key == "slot" else 1
            keys = [checked_integer("first_row", first_slot + first * slots_each) for first in first_rows]
        _check_room(array, keys, bounds, embedding_dim, block_size, hash)

        self.array, self.admission = array, admission
        self.embedding_dim, self.block_size, self.hash = embedding_dim, block_size, hash
        self.sign = bool(sign)
        # Whole models that 0.8.0 pickled have these two names.
        self._keys = [keys[table] for table in table_of_feature]
        self._rows = [bounds[table] for table in table_of_feature]
        self._place_tables()

    def arguments(self) -> dict[str, Any]:
        """Return the arguments, in JSON's types, that make this layer again on the same array and admission."""
        return {
            "embedding_dim": self.embedding_dim,
            "block_size": self.block_size,
            "sign": self.sign,
            "hash": self.hash,
        }

    def keys_and_bounds(self) -> tuple[list[int], list[int]]:
        """Return table_keys and num_embeddings_per_feature as they were made, whatever device the buffers are on."""
        return self._keys, self._rows

    def take_keys(self, other: "RobeTables") -> None:
        """Read where another layer of the same tables reads: take the hash keys, which stand for its array's seed."""
        self._keys = other._keys
        self._place_tables()

    def _place_tables(self) -> None:
        """Make the tensors of keys and bounds where the array is now."""
        weight, _ = self.array.read()
        device = torch.device("cpu") if weight.is_meta else weight.device
        self._device_index = weight.get_device()
        self.table_keys = torch.tensor(self._keys, device=device)
        self.num_embeddings_per_feature = torch.tensor(self._rows, device=device)

    def _tables(self, weight: Tensor, padding_idx: int | None = None) -> tuple:
        """The fields of ``layout.Tables``; a plain tuple, since making a NamedTuple takes as long as hashing a row."""
        if weight.get_device() != self._device_index:  # an integer, quicker to compare than devices
            self._place_tables()
        keys, bounds = self.table_keys, self.num_embeddings_per_feature
        return keys, bounds, self.embedding_dim, self.block_size, self.hash, self.sign, padding_idx

    def _lookup(self, ids: Tensor, padding_idx: int | None = None, out: Tensor | None = None) -> Tensor:
        """(B, F) ids, one per feature, to (B, F, D)."""
        return self._read("lookup", (ids,), padding_idx, out)

    def _bag(
        self,
        values: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        pooling: str,
        padding_idx: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Bags of ids, features major, to (B, F, D)."""
        return self._read("bag", (values, offsets, per_sample_weights, pooling), padding_idx, out)

    def _read(self, name: str, ids: tuple, padding_idx: int | None, out: Tensor | None) -> Tensor:
        array: RobeArray | Int8RobeArray = self._modules["array"]  # type: ignore[assignment]
        weight, scale = array.read()
        tables = self._tables(weight, padding_idx)
        arguments = (*ids, *tables)
        admission: Admission | None = self._modules.get("admission")  # type: ignore[assignment]
        filter = None
        if admission is not None:
            if self.training and admission.threshold is not None:
                self._observe(ids, padding_idx, admission)
            filter = admission._buffers["filter"]
        graph = torch.is_grad_enabled() and (
            weight.requires_grad or (len(ids) > 2 and ids[2] is not None and ids[2].requires_grad)
        )
        if out is not None:
            if graph:
                raise RuntimeError(
                    "out: has no gradient, and the array or the per_sample_weights require one; use torch.no_grad()"
                )
            _OUT[name](weight, *arguments, scale, out, filter)
            return out
        if forward_ad._current_level >= 0:
            _refuse_tangents(weight, *ids)
        is_tracing = torch.jit.is_tracing()
        if is_tracing and torch.onnx.is_in_onnx_export():
            return for_torchscript(name, weight, *arguments, scale, filter)
        if graph and weight.requires_grad:
            optimizer = array.optimizer()
            if optimizer and optimizer.owns(weight):
                bags = Bags(*ids[1:]) if name == "bag" else None
                return optimizer.record(weight, Call(ids[0], bags, Tables(*tables), filter))
        if graph or is_tracing or torch.compiler.is_compiling():
            return _WITH_AUTOGRAD[name](weight, *arguments, scale, filter)
        return _FORWARD[name](weight, *arguments, scale, filter)

    def _observe(self, ids: tuple, padding_idx: int | None, admission: Admission) -> None:
        """Show the admission the ids that are about to be read: (ids,), or (values, offsets, ...)."""
        values, keys = ids[0], self.table_keys
        if len(ids) > 1:
            offsets = ids[1]
            of_feature = offsets.diff().view(len(keys), -1).sum(1)
            values, keys = values[: offsets[-1]], keys.repeat_interleave(of_feature)
        if padding_idx is not None:
            kept = values != padding_idx
            values, keys = values[kept], keys.expand_as(values)[kept]
        admission.observe(values, keys)

    def _feature_rows(self, feature: int, padding_idx: int | None = None) -> Tensor:
        """The virtual table of a feature, (num_embeddings, embedding_dim), with autograd."""
        if not self._rows[feature]:
            raise ValueError("full_weight: a table without num_embeddings has no end")
        weight, scale = self.array.read()
        ids = torch.arange(self._rows[feature], device=weight.device).unsqueeze(1)
        keys, bounds, *layout = self._tables(weight, padding_idx)
        table = slice(feature, feature + 1)
        filter = None if self.admission is None else self.admission.filter
        optimizer = self.array.optimizer() if torch.is_grad_enabled() and weight.requires_grad else None
        if optimizer and optimizer.owns(weight):
            call = Call(ids, None, Tables(keys[table], bounds[table], *layout), filter)
            return optimizer.record(weight, call).squeeze(1)
        return torch.ops.robe.lookup(weight, ids, keys[table], bounds[table], *layout, scale, filter).squeeze(1)

    def _slots(self, feature: int, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The slots that ids (n,) of a feature read, and their signs, (n, D) each."""
        key = self.table_keys[feature]
        if self.admission is not None:
            ids = ids.where(self.admission.admits(ids, key), SHARED_ID)
        size, dim, block = self.array.size, self.embedding_dim, self.block_size
        return slots(ids, key, size=size, embedding_dim=dim, block_size=block, hash=self.hash, sign=self.sign)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place_tables()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("table_keys", "num_embeddings_per_feature"):  # 0.8.0 had them as buffers
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self._place_tables()

    def reset_parameters(self) -> None:
        """Draw the array's initial values again."""
        self.array.reset_parameters()


def check_finite(name: str, table: Tensor) -> None:
    """Refuse a table with a value that would spread to all that share its slots.

    Args:
        name: of the table, in the error.
        table: (num_embeddings, D).

    Raises:
        ValueError: a value is infinite or not a number; says where.
    """
    for start in range(0, len(table), rows := max(1, COMPONENTS_AT_ONCE // table.shape[1])):
        piece = table[start : start + rows]
        bad = (~piece.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            value = piece[row, column].item()
            raise ValueError(f"{name}: expected finite values, got {value} in row {start + row}, component {column}")


@torch.no_grad()
def project(array: RobeArray, tables: Sequence[tuple[RobeTables, Tensor]]) -> None:
    """Set an array to the least squares approximation of tables.

    Each component of a row is one slot times its sign, so the sum of squares is least where each slot is the mean of
    the components (times sign) that it serves.

    Args:
        array: changed in place.
        tables: layers of one feature on this array, each with the table (num_embeddings, D) to approximate.
    """
    total, load = torch.zeros(2, array.size, dtype=torch.float64, device=array.weight.device)
    for layer, weight in tables:
        some = max(1, COMPONENTS_AT_ONCE // layer.embedding_dim)
        padding_idx = getattr(layer, "padding_idx", None)
        for start in range(0, len(weight), some):
            piece = weight[start : start + some].to(total.device)
            ids = torch.arange(start, start + len(piece), device=total.device)
            if padding_idx is not None:
                piece, ids = piece[ids != padding_idx], ids[ids != padding_idx]
            place, signs = layer._slots(0, ids)
            values = piece.double() if signs is None else piece * signs.double()
            total.index_add_(0, place.flatten(), values.flatten())
            load.index_add_(0, place.flatten(), torch.ones_like(values).flatten())
    array.weight.copy_(torch.where(load > 0, total / load.clamp(min=1), array.weight))


def _refuse_tangents(*tensors) -> None:
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("robe: derivatives in forward mode are not supported; use torch.autograd.grad or backward()")


def _check(num_embeddings: Sequence[int | None], embedding_dim: int, block_size: int, hash: str) -> None:
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim: expected at least 1, got {embedding_dim}")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    for n in num_embeddings:
        if n is not None and n < 1:
            raise ValueError(f"num_embeddings: expected at least 1, or None for any int64 id, got {n}")
    if hash not in HASHES:
        raise ValueError(f"hash: expected one of {', '.join(HASHES)}, got {hash!r}")
    if TRAITS[hash].is_exact and None in num_embeddings:
        raise ValueError(f"hash={hash!r}: every table needs num_embeddings")


def _check_room(
    array: RobeArray, keys: list[int], bounds: list[int], embedding_dim: int, block_size: int, hash: str
) -> None:
    if TRAITS[hash].is_exact:
        last = max(key + n * embedding_dim for key, n in zip(keys, bounds))
        if min(keys) < 0:
            raise ValueError(f"first_row: expected at least 0 with hash={hash!r}, got {min(keys) // embedding_dim}")
        if last > array.size:
            raise ValueError(f"hash={hash!r}: the tables take {last} slots, the array has {array.size}")
    elif array.size < block_size:
        raise ValueError(
            f"block_size: an array of {array.size} weights does not hold one block of {block_size}; "
            "take a larger array (share one between tables), or a smaller block"
        )


def has_room(options: SharedOptions, array: RobeArray, table_weights: int | None) -> bool:
    """Return whether a layer's own array holds every weight: then no hash does better than a slot for each.

    Args:
        options: of the layer; a filter needs a hash.
        array: that ``resolve_array`` returned.
        table_weights: as there.
    """
    own = options.get("array") is None and options.get("admission") is None
    return own and table_weights is not None and array.size >= table_weights


def resolve_array(options: SharedOptions, *, table_weights: int | None, device, dtype) -> RobeArray:
    """Return the array that the options ask for.

    Args:
        options: exactly one of array, robe_size and compression is given.
        table_weights: the number of weights in the layer's tables; None where a table is unbounded.
        device, dtype: of the layer's own array.

    Raises:
        ValueError: none or several of the three, or options that don't fit together.
    """
    array, robe_size, compression = options.get("array"), options.get("robe_size"), options.get("compression")
    admission, seed, init_std = options.get("admission"), options.get("seed"), options.get("init_std")
    given = {"array": array, "robe_size": robe_size, "compression": compression}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            "expected exactly one of array= (a RobeArray to share), robe_size= (number of weights) and compression= "
            f"(times smaller than the tables), got {' and '.join(names) or 'none'}"
        )
    if array is not None:
        if not isinstance(array, (RobeArray, Int8RobeArray)):
            raise ValueError(f"array: expected a RobeArray, got a {type(array).__name__}")
        if any(option is not None for option in (seed, init_std, dtype, device)):
            raise ValueError(
                "seed, init_std, dtype and device belong to the array: give them to RobeArray, not beside array="
            )
        return array
    if compression is not None:
        if not compression > 0:
            raise ValueError(f"compression: expected a positive number, got {compression}")
        if table_weights is None:
            raise ValueError("compression: tables without num_embeddings have no size to compress; give robe_size=")
        # At compression 1 or below, more slots than weights would stay empty.
        robe_size = table_weights if compression <= 1 else int(table_weights / compression)
        filter_bytes = 0 if admission is None else admission.bytes
        robe_size -= filter_bytes // (torch.empty(0, dtype=dtype).element_size())
        if robe_size < 1:
            beside = f" beside the {filter_bytes} bytes of the admission" if filter_bytes else ""
            raise ValueError(
                f"compression: {table_weights} weights compressed {compression} times leave none{beside}; "
                "share one array= between the tables, or compress less"
            )
    assert robe_size is not None
    robe_size = checked_integer("robe_size", robe_size)
    return RobeArray(robe_size, seed=seed or 0, init_std=init_std, dtype=dtype, device=device)
