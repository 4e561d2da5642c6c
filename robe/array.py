"""RobeArray: the one array of weights behind any number of virtual tables."""

import torch
from torch import Tensor, nn

import robe.ops  # noqa: F401  (registers torch.ops.robe)
from robe.hashing import HASHES

INIT_STD = 0.01


class RobeArray(nn.Module):
    """The shared weights. Hand one array to several layers and they share its memory.

    Args:
        size: m, the number of weights.
        seed: of the hash, any integer: arrays with the same seed lay the same tables out in the same way. It is not in
            the ``state_dict``: it belongs to the code that builds the model, as ``padding_idx`` does in torch.
        init_std: standard deviation of the initial values, N(0, init_std**2), drawn from torch's global generator.
            None: 0.01. Rows that training seldom sees keep reading these values, so a large scale is noise that never
            trains away; see docs/accuracy.md for the figures behind the choice.
        dtype, device: of the weights, as in torch.

    Attributes:
        weight: Parameter (size,), the only entry of the ``state_dict``.

    Raises:
        ValueError: size below 1, or init_std negative.
    """

    def __init__(self, size: int, *, seed: int = 0, init_std: float | None = None, dtype=None, device=None):
        super().__init__()
        if size < 1:
            raise ValueError(f"size: expected at least 1 weight, got {size}")
        if init_std is not None and init_std < 0:
            raise ValueError(f"init_std: expected at least 0, got {init_std}")
        self.seed = seed
        self.init_std = INIT_STD if init_std is None else init_std
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.reset_parameters()

    @property
    def size(self) -> int:
        """m, the number of weights."""
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        """Draw the initial values again."""
        nn.init.normal_(self.weight, std=self.init_std)

    def extra_repr(self) -> str:
        return f"{self.size}, seed={self.seed}, init_std={self.init_std}"


def resolve_array(
    array: RobeArray | None,
    robe_size: int | None,
    compression: float | None,
    *,
    table_weights: int | None,
    hash: str,
    seed: int | None,
    init_std: float | None,
    dtype=None,
    device=None,
) -> tuple[RobeArray, str]:
    """The array of a layer and the hash version that fits it: exactly one of array, robe_size, compression is given.

    Args:
        table_weights: weights that the layer's tables would have; None where a table is unbounded.

    Returns:
        (array, hash): hash is "identity" where "mix" was asked for and an array of the layer's own has room for every
        weight of the tables.
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
        return array, hash
    if compression is not None:
        if not compression > 0:
            raise ValueError(f"compression: expected a positive number, got {compression}")
        if table_weights is None:
            raise ValueError("compression: tables without num_embeddings have no size to compress; give robe_size=")
        # At compression 1 or below, more slots than weights would stay empty.
        robe_size = table_weights if compression <= 1 else int(table_weights / compression)
        if robe_size < 1:
            raise ValueError(
                f"compression: {table_weights} weights compressed {compression} times leave none; "
                "share one array= between the tables, or compress less"
            )
    assert robe_size is not None
    if hash == "mix" and table_weights is not None and robe_size >= table_weights:
        hash = "identity"
    return RobeArray(robe_size, seed=seed or 0, init_std=init_std, dtype=dtype, device=device), hash


class RobeTables(nn.Module):
    """What every ROBE layer has: an array, and where each of its features' tables lies in it.

    Subclasses call ``_lay_out`` once, and pass ``*self._tables()`` on to an operator of ``robe.ops``.
    """

    array: RobeArray
    table_keys: Tensor
    num_embeddings_per_feature: Tensor

    def _lay_out(
        self,
        array: RobeArray,
        *,
        keys: list[int],
        num_embeddings: list[int | None],
        embedding_dim: int,
        block_size: int | None,
        sign: bool,
        hash: str,
    ) -> None:
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim: expected at least 1, got {embedding_dim}")
        for rows in num_embeddings:
            if rows is not None and rows < 1:
                raise ValueError(f"num_embeddings: expected at least 1, or None for any int64 id, got {rows}")
        if hash not in HASHES:
            raise ValueError(f"hash: expected one of {', '.join(HASHES)}, got {hash!r}")
        block_size = embedding_dim if block_size is None else block_size
        if block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {block_size}")
        if hash == "identity":
            if None in num_embeddings:
                raise ValueError("hash='identity': every table needs num_embeddings")
            last = max(key + (rows or 0) * embedding_dim for key, rows in zip(keys, num_embeddings))
            if min(keys) < 0 or last > array.size:
                raise ValueError(f"hash='identity': the tables take {last} slots, the array has {array.size}")
        elif array.size < block_size:
            raise ValueError(
                f"block_size: an array of {array.size} weights does not hold one block of {block_size}; "
                "take a larger array (share one between tables), or a smaller block"
            )
        self.array = array
        self.embedding_dim, self.block_size, self.sign, self.hash = embedding_dim, block_size, sign, hash
        self._keys, self._rows = keys, [rows or 0 for rows in num_embeddings]  # 0 stands for unbounded in the operators
        for name, values in (("table_keys", self._keys), ("num_embeddings_per_feature", self._rows)):
            tensor = torch.tensor(values, dtype=torch.int64, device=array.weight.device)
            self.register_buffer(name, tensor, persistent=False)

    def _tables(self, padding_idx: int | None = None) -> tuple:
        rows = self.num_embeddings_per_feature
        return self.table_keys, rows, self.embedding_dim, self.block_size, self.hash, self.sign, padding_idx

    def _feature_rows(self, feature: int, padding_idx: int | None = None) -> Tensor:
        """The virtual table of a feature, (num_embeddings, embedding_dim), with autograd."""
        if not self._rows[feature]:
            raise ValueError("full_weight: a table without num_embeddings has no end")
        ids = torch.arange(self._rows[feature], device=self.array.weight.device).unsqueeze(1)
        keys, rows, *layout = self._tables(padding_idx)
        table = slice(feature, feature + 1)
        return torch.ops.robe.lookup(self.array.weight, ids, keys[table], rows[table], *layout).squeeze(1)

    def reset_parameters(self) -> None:
        """Draw the array's initial values again; also fills the layer in after ``to_empty``."""
        self.array.reset_parameters()
        self.table_keys.copy_(torch.tensor(self._keys))
        self.num_embeddings_per_feature.copy_(torch.tensor(self._rows))


def count_weights(num_embeddings: list[int | None], embedding_dim: int) -> int | None:
    """Weights in the tables; None where one is unbounded."""
    return None if None in num_embeddings else sum(rows or 0 for rows in num_embeddings) * embedding_dim
