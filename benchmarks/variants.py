"""Variants of ROBE that were tried and are not in the library, because they gain nothing: see docs/accuracy.md.

Not a program: benchmarks.accuracy --study compares them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from robe import RobeEmbeddingBagCollection
from robe.hashing import slots
from robe.sketches import SHARED_ID

_SECOND_TABLE_ID = 1000  # of the second lookup; far above those of the first


class Counts:
    """Exact counts of the ids of each feature in the training rows.

    Args:
        sparse: (B, F) int64, all training rows.

    Attributes:
        ids: of each feature, its different ids in ascending order.
        times: of each feature, how often these occur.
    """

    def __init__(self, sparse: Tensor):
        found = [column.unique(return_counts=True) for column in sparse.T]
        self.ids = [ids for ids, _ in found]
        self.times = [times for _, times in found]

    def of(self, sparse: Tensor) -> Tensor:
        """Return how often ids (B, F) occur in the training rows, int64 (B, F)."""
        found = [find(ids, column) for ids, column in zip(self.ids, sparse.T)]
        return torch.stack([times[place] * inside for times, (place, inside) in zip(self.times, found)], dim=1)

    def most_frequent(self, most: int) -> list[Tensor]:
        """Return, for each feature, its ids among the ``most`` most frequent of all; fewer where the last ones tie."""
        least = torch.cat(self.times).topk(most + 1).values[-1]
        return [ids[times > least] for ids, times in zip(self.ids, self.times)]

    def of_small_tables(self, most: int) -> list[Tensor]:
        """Return all ids of features that have at most ``most`` different ones, and none of the other features."""
        return [ids if len(ids) <= most else ids[:0] for ids in self.ids]


class Found(NamedTuple):
    """The place (n,) of each of some ids in a list, and whether (n,) it is there. Other places mean nothing."""

    place: Tensor
    inside: Tensor


def find(ids: Tensor, column: Tensor) -> Found:
    """Look up the ids of a column (n,) in ids, ascending."""
    if not len(ids):
        return Found(torch.zeros_like(column), torch.zeros_like(column, dtype=torch.bool))
    place = torch.searchsorted(ids, column.contiguous()).clamp(max=len(ids) - 1)
    return Found(place, ids[place] == column)


class Variant(nn.Module):
    """A collection with something added.

    Args:
        layer: the collection.
        counts: of ids, for the options that need them; their memory is not counted.
        gain: multiply the embeddings of each feature by a learned number.
        soft: k: multiply embeddings by n / (n + k), where the id occurs n times; 0: do not.
        zero: give zeros to ids that were not let in, rather than the embedding that they share.
        twice: add a second lookup, at other places of the array.
        tier: for each feature, the ids that have a row in a table and do not use the array.
        table_scale: multiply the embeddings of a table of n ids by n to minus this power; the geometric mean of these
            factors is 1.
        sharing: divide the gradient of a weight by the number of components that read it, to this power.
    """

    def __init__(
        self,
        layer: RobeEmbeddingBagCollection,
        counts: Counts,
        *,
        gain: bool = False,
        soft: float = 0.0,
        zero: bool = False,
        twice: bool = False,
        tier: Sequence[Tensor] | None = None,
        table_scale: float = 0.0,
        sharing: float = 0.0,
    ):
        super().__init__()
        self.layer, self.counts, self.soft, self.zero = layer, counts, soft, zero
        self.gain = nn.Parameter(torch.ones(len(layer.table_keys), 1)) if gain else None
        self.admission = layer.admission
        self.second = second_lookup(layer) if twice else None
        self.tier_ids = tier
        if tier is not None:
            rows = [len(ids) for ids in tier]
            self.first = torch.tensor([0, *rows[:-1]]).cumsum(0)
            self.tier = nn.Parameter(torch.randn(sum(rows), layer.embedding_dim) * layer.array.init_std)
        logs = torch.tensor([len(ids) for ids in counts.ids]).log()
        self.scale = (-table_scale * (logs - logs.mean())).exp().unsqueeze(1) if table_scale else None
        if sharing:
            load = readers(layer, counts).clamp(min=1) ** sharing
            layer.array.weight.register_hook(lambda grad: grad / load)

    def forward(self, sparse: Tensor) -> Tensor:
        """Look up the embeddings (B, F, D) of ids (B, F)."""
        embeddings = self.layer(sparse)
        if self.second is not None:
            embeddings = embeddings + self.second(sparse)
        if self.zero and self.admission is not None:
            embeddings = embeddings * self.admission.admits(sparse, self.layer.table_keys).unsqueeze(2)
        if self.soft:
            times = self.counts.of(sparse).float().unsqueeze(2)
            embeddings = embeddings * (times / (times + self.soft))
        if self.tier_ids is not None:
            places, inside = zip(*(find(ids, column) for ids, column in zip(self.tier_ids, sparse.T)))
            hot = torch.stack(inside, dim=1)
            own = functional.embedding((torch.stack(places, dim=1) + self.first) * hot, self.tier)
            embeddings = torch.where(hot.unsqueeze(2), own, embeddings)
        if self.scale is not None:
            embeddings = embeddings * self.scale
        return embeddings if self.gain is None else embeddings * self.gain


def second_lookup(layer: RobeEmbeddingBagCollection) -> RobeEmbeddingBagCollection:
    """Return the same tables on the same array, at other places."""
    ids = range(_SECOND_TABLE_ID, _SECOND_TABLE_ID + len(layer.tables))
    return RobeEmbeddingBagCollection(
        layer.tables,
        array=layer.array,
        table_ids=ids,
        block_size=layer.block_size,
        sign=layer.sign,
        hash=layer.hash,
        admission=layer.admission,
    )


def places(layer: RobeEmbeddingBagCollection, feature: int, ids: Tensor) -> Tensor:
    """Return the places in the array that ids (n,) of a feature read, (n * D,)."""
    key = layer.table_keys[feature]
    if layer.admission is not None:
        ids = ids.where(layer.admission.admits(ids, key), SHARED_ID)
    found, _ = slots(
        ids,
        key,
        size=layer.array.size,
        embedding_dim=layer.embedding_dim,
        block_size=layer.block_size,
        hash=layer.hash,
    )
    return found.flatten()


def readers(layer: RobeEmbeddingBagCollection, counts: Counts) -> Tensor:
    """Return, for each weight (m,), the number of components of training ids that read it."""
    load = torch.zeros(layer.array.size)
    for feature, ids in enumerate(counts.ids):
        place = places(layer, feature, ids)
        load.index_add_(0, place, torch.ones(len(place)))
    return load


@torch.no_grad()
def project(layer: RobeEmbeddingBagCollection, counts: Counts, tables: list[Tensor]) -> None:
    """Set an array to the least squares approximation of trained tables, with ids weighted by how often they occur.

    Every component reads one weight, so the solution is the weighted mean of the components that read it.

    Args:
        layer: whose array is set. Without signs.
        counts: of the training ids.
        tables: for each feature, the rows of its training ids, in the order of ``counts.ids``.
    """
    total, load = torch.zeros(2, layer.array.size)
    for feature, (ids, times, rows) in enumerate(zip(counts.ids, counts.times, tables)):
        place, times = places(layer, feature, ids), times.float().repeat_interleave(layer.embedding_dim)
        total.index_add_(0, place, rows.flatten() * times)
        load.index_add_(0, place, times)
    layer.array.weight.copy_(torch.where(load > 0, total / load.clamp(min=1), layer.array.weight))
