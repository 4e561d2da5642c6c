"""RobeTables: what the layers have in common, an array and the places of virtual tables in it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import robe.ops  # noqa: F401  (registers torch.ops.robe)
from robe.admission import RARE, Admission
from robe.array import Int8RobeArray, RobeArray
from robe.hashing import HASHES, slots, table_key

COMPONENTS_AT_ONCE = 1 << 22  # of tables that are gone through
_WITH_AUTOGRAD = {"lookup": torch.ops.robe.lookup.default, "bag": torch.ops.robe.bag.default}
_FORWARD = {"lookup": torch.ops.robe.lookup_forward.default, "bag": torch.ops.robe.bag_forward.default}
_OUT = {"lookup": torch.ops.robe.lookup_out.default, "bag": torch.ops.robe.bag_out.default}


class RobeTables(nn.Module):
    """An array, and where each feature's table lies in it. Subclasses pass ``*self._tables()`` on to an operator.

    Args:
        num_embeddings: rows of each table; None: unbounded.
        embedding_dim: of all tables.
        table_of_feature: for each feature the index of its table.
        table_ids: of each table, for "mix".
        first_rows: of each table, for "linear" and "identity".
        array, robe_size, compression, block_size, sign, hash, admission, seed, init_std, device, dtype: as in
            RobeEmbedding.
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
        array: RobeArray | None,
        robe_size: int | None,
        compression: float | None,
        block_size: int | None,
        sign: bool,
        hash: str,
        admission: Admission | None,
        seed: int | None,
        init_std: float | None,
        device,
        dtype,
    ):
        super().__init__()
        block_size = embedding_dim if block_size is None else block_size
        _check(num_embeddings, embedding_dim, block_size, hash)
        rows = [n or 0 for n in num_embeddings]  # 0 stands for unbounded in the operators
        table_weights = None if 0 in rows else sum(rows) * embedding_dim
        array = resolve_array(
            array,
            robe_size,
            compression,
            table_weights=table_weights,
            filter_bytes=0 if admission is None else admission.bytes,
            seed=seed,
            init_std=init_std,
            dtype=dtype,
            device=device,
        )
        own = robe_size is not None or compression is not None
        if admission is not None and hash != "mix":
            raise ValueError(f"admission: expected hash='mix' with it, got {hash!r}")
        if own and admission is None and hash == "mix" and table_weights is not None and array.size >= table_weights:
            # Room for every weight: no hash can do better than a slot for each.
            hash, first_rows = "identity", [0, *accumulate(rows)][:-1]
        if hash == "mix":
            keys = [table_key(array.seed, table_id) for table_id in table_ids]
        else:
            keys = [first * embedding_dim if hash == "identity" else first for first in first_rows]
        _check_room(array, keys, rows, embedding_dim, block_size, hash)

        self.array, self.admission = array, admission
        self.embedding_dim, self.block_size, self.sign, self.hash = embedding_dim, block_size, sign, hash
        self._keys = [keys[table] for table in table_of_feature]
        self._rows = [rows[table] for table in table_of_feature]
        for name, values in (("table_keys", self._keys), ("num_embeddings_per_feature", self._rows)):
            self.register_buffer(name, torch.tensor(values, device=array.weight.device), persistent=False)

    def _config(self) -> dict[str, Any]:
        """The arguments, in JSON's types, that make this layer again on the same array and admission."""
        return {
            "embedding_dim": self.embedding_dim,
            "block_size": self.block_size,
            "sign": self.sign,
            "hash": self.hash,
        }

    def _tables(self, padding_idx: int | None = None) -> tuple:
        buffers = self._buffers  # past nn.Module.__getattr__, which costs as much as reading a batch of one
        keys, rows = buffers["table_keys"], buffers["num_embeddings_per_feature"]
        return keys, rows, self.embedding_dim, self.block_size, self.hash, self.sign, padding_idx

    def _lookup(self, ids: Tensor, padding_idx: int | None = None, out: Tensor | None = None) -> Tensor:
        """(B, F) ids, one per feature, to (B, F, D)."""
        return self._read("lookup", (ids,), padding_idx, out)

    def _bag(
        self,
        values: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        mode: str,
        padding_idx: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Bags of ids, features major, to (B, F, D)."""
        return self._read("bag", (values, offsets, per_sample_weights, mode), padding_idx, out)

    def _read(self, name: str, ids: tuple, padding_idx: int | None, out: Tensor | None) -> Tensor:
        array: RobeArray | Int8RobeArray = self._modules["array"]  # type: ignore[assignment]
        weight, scale = array.read()
        tables = self._tables(padding_idx)
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
        if graph and weight.requires_grad:
            optimizer = array._optimizer and array._optimizer()
            if optimizer and optimizer.owns(weight):
                return optimizer.record(name, weight, (*arguments, filter))
        whole = graph or torch.compiler.is_compiling() or torch.jit.is_tracing()
        read = (_WITH_AUTOGRAD if whole else _FORWARD)[name]
        return read(weight, *arguments, scale, filter)

    def _observe(self, ids: tuple, padding_idx: int | None, admission: Admission) -> None:
        """Show the admission what is about to be read: (ids,), or (values, offsets, ...)."""
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
        keys, rows, *layout = self._tables(padding_idx)
        table = slice(feature, feature + 1)
        filter = None if self.admission is None else self.admission.filter
        return torch.ops.robe.lookup(weight, ids, keys[table], rows[table], *layout, scale, filter).squeeze(1)

    def _slots(self, feature: int, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """What rows (n,) of a feature's table read, and their signs, (n, D) each; those of ids not let in too."""
        key = self.table_keys[feature]
        if self.admission is not None:
            ids = ids.where(self.admission.admits(ids, key), RARE)
        size, dim, block = self.array.size, self.embedding_dim, self.block_size
        return slots(ids, key, size=size, embedding_dim=dim, block_size=block, hash=self.hash, sign=self.sign)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # to_empty leaves buffers unset, and these are in no state_dict: other keys would silently read other rows.
        self.table_keys.copy_(torch.tensor(self._keys))
        self.num_embeddings_per_feature.copy_(torch.tensor(self._rows))
        return self

    def reset_parameters(self) -> None:
        """Draw the array's initial values again."""
        self.array.reset_parameters()


@torch.no_grad()
def project(array: RobeArray, tables: Sequence[tuple[RobeTables, Tensor]]) -> None:
    """Set an array to the least squares approximation of tables: of layers of one feature on it, each (rows, D).

    Each component of a row is one slot times its sign, so the sum of squares is least where each slot is the mean of
    the components (times sign) that it serves.
    """
    total, load = torch.zeros(2, array.size, dtype=torch.float64, device=array.weight.device)
    for layer, weight in tables:
        some = max(1, COMPONENTS_AT_ONCE // layer.embedding_dim)
        padding_idx = getattr(layer, "padding_idx", None)
        for start in range(0, len(weight), some):
            rows = weight[start : start + some].to(total.device)
            ids = torch.arange(start, start + len(rows), device=total.device)
            if padding_idx is not None:
                rows, ids = rows[ids != padding_idx], ids[ids != padding_idx]
            place, signs = layer._slots(0, ids)
            values = rows.double() if signs is None else rows * signs.double()
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
    for rows in num_embeddings:
        if rows is not None and rows < 1:
            raise ValueError(f"num_embeddings: expected at least 1, or None for any int64 id, got {rows}")
    if hash not in HASHES:
        raise ValueError(f"hash: expected one of {', '.join(HASHES)}, got {hash!r}")
    if hash == "identity" and None in num_embeddings:
        raise ValueError("hash='identity': every table needs num_embeddings")


def _check_room(
    array: RobeArray, keys: list[int], rows: list[int], embedding_dim: int, block_size: int, hash: str
) -> None:
    if hash == "identity":
        last = max(key + n * embedding_dim for key, n in zip(keys, rows))
        if min(keys) < 0:
            raise ValueError(f"first_row: expected at least 0 with hash='identity', got {min(keys) // embedding_dim}")
        if last > array.size:
            raise ValueError(f"hash='identity': the tables take {last} slots, the array has {array.size}")
    elif array.size < block_size:
        raise ValueError(
            f"block_size: an array of {array.size} weights does not hold one block of {block_size}; "
            "take a larger array (share one between tables), or a smaller block"
        )


def resolve_array(
    array: RobeArray | None,
    robe_size: int | None,
    compression: float | None,
    *,
    table_weights: int | None,
    filter_bytes: int,
    seed: int | None,
    init_std: float | None,
    dtype,
    device,
) -> RobeArray:
    """The array of a layer: exactly one of array, robe_size, compression is given.

    Args:
        table_weights: weights that the layer's tables would have; None where a table is unbounded.
        filter_bytes: of the memory that compression leaves, those of an admission.
    """
    given = {"array": array, "robe_size": robe_size, "compression": compression}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            "expected exactly one of array= (a RobeArray to share), robe_size= (number of weights) and compression= "
            f"(times smaller than the tables), got {' and '.join(names) or 'none'}"
        )
    if array is not None:
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
        robe_size -= filter_bytes // (torch.empty(0, dtype=dtype).element_size())
        if robe_size < 1:
            beside = f" beside the {filter_bytes} bytes of the admission" if filter_bytes else ""
            raise ValueError(
                f"compression: {table_weights} weights compressed {compression} times leave none{beside}; "
                "share one array= between the tables, or compress less"
            )
    assert robe_size is not None
    return RobeArray(robe_size, seed=seed or 0, init_std=init_std, dtype=dtype, device=device)
