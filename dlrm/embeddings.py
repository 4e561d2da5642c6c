"""The embeddings of a DLRM: ROBE, or the tables it is compared with.

Each is a module with forward(ids (B, F) int64) -> (B, F, D), and forward(values, offsets) -> (B, F, D), which sums
several ids of a feature; the ids of the first feature come first. ROBE's module is robe.RobeEmbeddingBagCollection.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.config import DLRMConfig
from robe import Admission, EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.hashing import mix64, multiply_high, table_key

_ID_BITS = 32
SYNTHETIC = 0x484F5453  # seed of synthetic ids, which should not be the hashes that ROBE reads at


class Tables(nn.Module):
    """A table per feature, read at row ``id % rows``. Gradients are sparse.

    Args:
        table_rows: rows of each feature's table.
        embedding_dim: D.

    Attributes:
        weight: (sum(table_rows), D), the tables one after the other. Initially uniform within +-1/sqrt(rows) of a
            table, as in facebookresearch/dlrm.
    """

    _beside_weight: tuple[str, ...] = ("table_rows", "first_rows")  # tensors that go where it goes

    def __init__(self, table_rows: Sequence[int], embedding_dim: int):
        super().__init__()
        # No buffers, which could be left unset: they follow from the arguments. Real even in a model made on meta.
        self.table_rows = torch.tensor(table_rows, device="cpu")
        self.first_rows = self.table_rows.cumsum(0) - self.table_rows
        self.weight = nn.Parameter(torch.empty(sum(table_rows), embedding_dim))
        with torch.no_grad():
            for table in self.weight.split(list(table_rows)):
                table.uniform_(-(len(table) ** -0.5), len(table) ** -0.5)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not self.weight.is_meta:
            for name in self._beside_weight:
                setattr(self, name, getattr(self, name).to(self.weight.device))
        return self

    def rows(self, ids: Tensor, feature: Tensor | slice = slice(None)) -> Tensor:
        """Return the row of each id in its table.

        Args:
            ids: (..., F) int64; any shape with ``feature``.
            feature: the feature of each id; by default the last dimension of ids has one id of each.
        """
        return torch.remainder(ids, self.table_rows[feature])

    def forward(self, sparse: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Look up the embeddings, (B, F, D).

        Args:
            sparse: (B, F) int64 ids; with offsets, the values of ``bags``.
            offsets: (F * B + 1,), as ``bags`` returns them.
        """
        if offsets is None:
            return functional.embedding(self.rows(sparse) + self.first_rows, self.weight, sparse=True)
        features = len(self.table_rows)
        lengths = offsets.diff().view(features, -1).sum(1)
        feature = torch.arange(features, device=sparse.device).repeat_interleave(lengths)
        rows = self.rows(sparse, feature) + self.first_rows[feature]
        sums = functional.embedding_bag(
            rows, self.weight, offsets, mode="sum", sparse=True, include_last_offset=True
        )  # (F * B, D)
        return sums.view(features, -1, self.weight.shape[1]).transpose(0, 1)


class EmbeddingBags(nn.Module):
    """An nn.EmbeddingBag for each feature, as in facebookresearch/dlrm. ROBE is timed against it.

    Args:
        weights: of each table, (rows, D).
        sparse: whether gradients are sparse.
    """

    def __init__(self, weights: Sequence[Tensor], sparse: bool = False):
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(w, mode="sum", freeze=False, sparse=sparse) for w in weights
        )

    def forward(self, sparse: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Look up the embeddings, (B, F, D); arguments as in Tables.forward."""
        if offsets is None:
            starts = torch.arange(len(sparse))
            return torch.stack([bag(ids, starts) for bag, ids in zip(self.bags, sparse.T)], dim=1)
        ends = offsets.view(-1)
        batch_size = (len(ends) - 1) // len(self.bags)
        sums = []
        for feature, bag in enumerate(self.bags):
            own = ends[feature * batch_size : (feature + 1) * batch_size + 1]
            sums.append(bag(sparse[own[0] : own[-1]], own[:-1] - own[0]))
        return torch.stack(sums, dim=1)


class VocabularyTables(Tables):
    """Tables with a row for each id in the training data. The last row of a table is for all other ids.

    Args:
        table_rows: the number of known ids of each feature, plus one.
        embedding_dim: D.
        vocabulary: the known ids of each feature, ascending, in [0, 2**32); None: they come from a state_dict.
    """

    keys: Tensor
    _beside_weight = (*Tables._beside_weight, "features")

    def __init__(self, table_rows: Sequence[int], embedding_dim: int, vocabulary: Sequence[Tensor] | None):
        super().__init__(table_rows, embedding_dim)
        features = torch.arange(len(table_rows), device="cpu") << _ID_BITS
        if vocabulary is None:
            keys = torch.zeros(sum(table_rows) - len(table_rows), dtype=torch.int64)
        else:
            keys = torch.cat([feature | ids for feature, ids in zip(features, vocabulary)])
        self.features = features
        self.register_buffer("keys", keys)  # feature << 32 | id, ascending over all features

    def rows(self, ids: Tensor, feature: Tensor | slice = slice(None)) -> Tensor:
        """Return the row of each id in its table; arguments as in Tables.rows."""
        keys = self.features[feature] | (ids & ((1 << _ID_BITS) - 1))
        place = torch.searchsorted(self.keys, keys)
        known = self.keys[place.clamp(max=len(self.keys) - 1)] == keys
        known &= ids >> _ID_BITS == 0
        # Known ids of earlier features.
        before = self.first_rows - torch.arange(len(self.table_rows), device=ids.device)
        return torch.where(known, place - before[feature], self.table_rows[feature] - 1)


def bags(sparse: Tensor, hots: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return several ids a feature as bags.

    Args:
        sparse: (B, sum(hots)) int64, the ids of the first feature first.
        hots: ids of each feature.

    Returns:
        values (B * sum(hots),) and offsets (F * B + 1,): bag f * B + b has the ids of feature f of example b.
    """
    values = torch.cat([ids.reshape(-1) for ids in sparse.split(list(hots), dim=1)])
    lengths = torch.tensor(hots, device=sparse.device).repeat_interleave(len(sparse))
    return values, functional.pad(lengths.cumsum(0), (1, 0))


def synthetic_ids(sparse: Tensor, hots: Sequence[int], table_rows: Sequence[int]) -> Tensor:
    """Make several ids a feature from one each: the id itself, and others that depend on it and are uniform.

    MLPerf's data for DLRM-DCNv2 is made likewise, but takes the other ids from a random table with a row for each id.
    Here they are hashes of the id, which need no table; they are other numbers.

    Args:
        sparse: (B, F) int64.
        hots: ids of each feature, from 1.
        table_rows: of each feature; the ids that are made are in [0, table_rows).

    Returns:
        (B, sum(hots)) int64.
    """
    columns = []
    for feature, (hot, rows) in enumerate(zip(hots, table_rows)):
        ids = sparse[:, feature : feature + 1]
        number = torch.arange(1, hot, device=sparse.device)
        mixed = mix64(mix64(ids + table_key(SYNTHETIC, feature)) + number)
        columns += [ids, multiply_high(mixed, rows)]
    return torch.cat(columns, dim=1)


def capped_rows(table_rows: Sequence[int], compression: float) -> list[int]:
    """Return the rows of hash-trick tables: min(rows, cap), with the largest cap that reaches a compression.

    Args:
        table_rows: of the full tables.
        compression: rows of all full tables together over rows kept. Each table keeps at least one row.
    """
    budget = sum(table_rows) / compression
    low, high = 1, max(table_rows)
    while low < high:
        cap = (low + high + 1) // 2
        low, high = (cap, high) if sum(min(rows, cap) for rows in table_rows) <= budget else (low, cap - 1)
    return [min(rows, low) for rows in table_rows]


def build_embeddings(config: DLRMConfig, vocabulary: Sequence[Tensor] | None = None) -> nn.Module:
    """Build the embeddings of a config.

    Args:
        config: of the model.
        vocabulary: with config.vocabulary, the known ids of each feature; None: they come from a state_dict.
    """
    if config.embedding == "robe":
        # Any id is legal, without a dictionary or a modulo, so the tables have no bounds.
        tables = [EmbeddingBagConfig(f"cat_{i}", None, config.embedding_dim) for i in range(len(config.table_rows))]
        return RobeEmbeddingBagCollection(
            tables,
            robe_size=config.array_floats,
            block_size=config.block_size,
            sign=config.sign,
            seed=config.hash_seed,
            init_std=config.init_std,
            admission=Admission(config.admission_bytes) if config.admission_bytes else None,
        )
    if config.embedding == "hash":
        assert config.compression is not None
        return Tables(capped_rows(config.table_rows, config.compression), config.embedding_dim)
    if config.vocabulary:
        return VocabularyTables(config.table_rows, config.embedding_dim, vocabulary)
    return Tables(config.table_rows, config.embedding_dim)
