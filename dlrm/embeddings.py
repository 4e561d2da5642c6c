"""The embeddings a DLRM can be given: ROBE, or the tables it is compared with.

Each is a module with forward(sparse (B, F) int64) -> (B, F, D), and with forward(values, offsets) for sums of several
ids, features major. ROBE's is robe.RobeEmbeddingBagCollection.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.config import DLRMConfig
from robe import Admission, EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.hashing import mix64, multiply_high, table_key

_ID_BITS = 32
SYNTHETIC = 0x484F5453  # the seed of synthetic ids, so that they are not the hashes an array is read at


class Tables(nn.Module):
    """A table per feature, one behind the other in one weight; row ``id % rows`` of each. Gradients are sparse.

    Args:
        table_rows: rows of each feature's table.
        embedding_dim: D.

    Attributes:
        weight: (sum(table_rows), D), initially uniform within +-1/sqrt(rows) of a table, as in facebookresearch/dlrm.
    """

    table_rows: Tensor
    first_rows: Tensor

    def __init__(self, table_rows: Sequence[int], embedding_dim: int):
        super().__init__()
        rows = torch.tensor(table_rows)
        self.register_buffer("table_rows", rows, persistent=False)
        self.register_buffer("first_rows", rows.cumsum(0) - rows, persistent=False)
        self.weight = nn.Parameter(torch.empty(sum(table_rows), embedding_dim))
        with torch.no_grad():
            for table in self.weight.split(list(table_rows)):
                table.uniform_(-(len(table) ** -0.5), len(table) ** -0.5)

    def rows(self, ids: Tensor, feature: Tensor | slice = slice(None)) -> Tensor:
        """Each id's row in its table; feature: of each id, by default one id for each in the last dimension."""
        return torch.remainder(ids, self.table_rows[feature])

    def forward(self, sparse: Tensor, offsets: Tensor | None = None) -> Tensor:
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
    """An nn.EmbeddingBag for each feature, as facebookresearch/dlrm has them: what ROBE is timed against.

    Args:
        weights: of each table, (rows, D).
        sparse: whether gradients are.
    """

    def __init__(self, weights: Sequence[Tensor], sparse: bool = False):
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(w, mode="sum", freeze=False, sparse=sparse) for w in weights
        )

    def forward(self, sparse: Tensor, offsets: Tensor | None = None) -> Tensor:
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
    """Tables with a row for each id of the training data, and one more, the last, for all other ids.

    Args:
        table_rows: number of known ids of each feature, plus one.
        embedding_dim: D.
        vocabulary: the known ids of each feature, ascending, in [0, 2**32); None: to be loaded from a state_dict.
    """

    features: Tensor
    keys: Tensor

    def __init__(self, table_rows: Sequence[int], embedding_dim: int, vocabulary: Sequence[Tensor] | None):
        super().__init__(table_rows, embedding_dim)
        features = torch.arange(len(table_rows)) << _ID_BITS
        if vocabulary is None:
            keys = torch.zeros(sum(table_rows) - len(table_rows), dtype=torch.int64)
        else:
            keys = torch.cat([feature | ids for feature, ids in zip(features, vocabulary)])
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("keys", keys)  # feature << 32 | id, ascending over all features

    def rows(self, ids: Tensor, feature: Tensor | slice = slice(None)) -> Tensor:
        keys = self.features[feature] | (ids & ((1 << _ID_BITS) - 1))
        place = torch.searchsorted(self.keys, keys)
        known = self.keys[place.clamp(max=len(self.keys) - 1)] == keys
        known &= ids >> _ID_BITS == 0
        before = self.first_rows - torch.arange(
            len(self.table_rows), device=ids.device
        )  # known ids of earlier features
        return torch.where(known, place - before[feature], self.table_rows[feature] - 1)


def bags(sparse: Tensor, hots: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Several ids a feature as (values, offsets), features major.

    Args:
        sparse: (B, sum(hots)) int64, the ids of the first feature first.
        hots: ids of each feature.

    Returns:
        values (B * sum(hots),), offsets (F * B + 1,): bag f * B + b has the ids of feature f of example b.
    """
    values = torch.cat([ids.reshape(-1) for ids in sparse.split(list(hots), dim=1)])
    lengths = torch.tensor(hots, device=sparse.device).repeat_interleave(len(sparse))
    return values, functional.pad(lengths.cumsum(0), (1, 0))


def synthetic_ids(sparse: Tensor, hots: Sequence[int], table_rows: Sequence[int]) -> Tensor:
    """Several ids a feature, of one each: the first is the id itself, the others depend on it and are uniform.

    So is the data of MLPerf's DLRM-DCNv2, whose other ids come from one random table for each feature, with a row for
    each id. Here they are hashes of the id, which need no table; they are not the same numbers.

    Args:
        sparse: (B, F) int64.
        hots: ids of each feature, from 1.
        table_rows: of each feature; its other ids are in [0, table_rows).

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
    """The rows of hash-trick tables: min(rows, cap), with the largest cap that compresses all tables together so much.

    At least one row a table, so that tables of few rows can't be compressed further.
    """
    budget = sum(table_rows) / compression
    low, high = 1, max(table_rows)
    while low < high:
        cap = (low + high + 1) // 2
        low, high = (cap, high) if sum(min(rows, cap) for rows in table_rows) <= budget else (low, cap - 1)
    return [min(rows, low) for rows in table_rows]


def build_embeddings(config: DLRMConfig, vocabulary: Sequence[Tensor] | None = None) -> nn.Module:
    """The embeddings that a config asks for.

    Args:
        vocabulary: with config.vocabulary: the known ids of each feature, or None before loading a state_dict.
    """
    if config.embedding == "robe":
        # Ids go in as they are: no dictionary, no modulo, so the tables have no end.
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
