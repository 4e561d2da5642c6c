"""Variants of ROBE that the library does not have, because they were tried and are not worth it: docs/accuracy.md."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from robe import RobeEmbeddingBagCollection
from robe.hashing import table_key


class Counts:
    """How often each id of each feature is in the training rows, exactly.

    Args:
        sparse: (B, F) int64.
    """

    def __init__(self, sparse: Tensor):
        found = [column.unique(return_counts=True) for column in sparse.T]
        self.ids = [ids for ids, _ in found]
        self.times = [times for _, times in found]

    def of(self, sparse: Tensor) -> Tensor:
        """(B, F) ids to (B, F) int64."""
        found = [_find(ids, column) for ids, column in zip(self.ids, sparse.T)]
        return torch.stack([times[place] * inside for times, (place, inside) in zip(self.times, found)], dim=1)

    def most_frequent(self, most: int) -> list[Tensor]:
        """Of each feature, its ids among so many of all features; or fewer, where several are as frequent."""
        least = torch.cat(self.times).topk(most + 1).values[-1]
        return [ids[times > least] for ids, times in zip(self.ids, self.times)]

    def of_small_tables(self, rows: int) -> list[Tensor]:
        """All ids of features that have at most so many, none of the others."""
        return [ids if len(ids) <= rows else ids[:0] for ids in self.ids]


def _find(ids: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """(n,): where in ids, ascending, each is, and whether; 0 and False where there are none."""
    if not len(ids):
        return torch.zeros_like(column), torch.zeros_like(column, dtype=torch.bool)
    place = torch.searchsorted(ids, column.contiguous()).clamp(max=len(ids) - 1)
    return place, ids[place] == column


class Variant(nn.Module):
    """A collection with something added.

    Args:
        layer: what it is added to.
        counts: of ids, for the options that need them; their memory is not counted.
        gain: whether each feature's embeddings are multiplied by a learned number.
        soft: k: embeddings are multiplied by n / (n + k), n times the id was seen; 0: no.
        zero: ids without a row of their own read zeros, not the row that they share.
        twice: a second lookup is added.
        tier: of each feature, the ids that have a row in a table, and no part in the array.
        table_scale: embeddings of a table of n ids are multiplied by n to minus this power, on geometric average by 1.
        sharing: the gradient of a weight is divided by the number of components that read it, to this power.
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
        self.layer, self.counts, self.soft, self.zero, self.twice = layer, counts, soft, zero, twice
        self.gain = nn.Parameter(torch.ones(len(layer.table_keys), 1)) if gain else None
        self.admission = layer.admission
        self.keys = torch.tensor([table_key(layer.array.seed, 1000 + i) for i in range(len(layer.table_keys))])
        self.tier_ids = tier
        if tier is not None:
            rows = [len(ids) for ids in tier]
            self.first = torch.tensor([0, *rows[:-1]]).cumsum(0)
            self.tier = nn.Parameter(torch.randn(sum(rows), layer.embedding_dim) * layer.array.init_std)
        logs = torch.tensor([len(ids) for ids in counts.ids]).log()
        self.scale = (-table_scale * (logs - logs.mean())).exp().unsqueeze(1) if table_scale else None
        if sharing:
            load = _load(layer, counts).clamp(min=1) ** sharing
            layer.array.weight.register_hook(lambda grad: grad / load)

    def forward(self, sparse: Tensor) -> Tensor:
        rows = self.layer(sparse)
        if self.twice:
            _, bounds, *layout = self.layer._tables()
            filter = None if self.admission is None else self.admission.filter
            weight = self.layer.array.weight
            again = torch.ops.robe.lookup(weight, sparse, self.keys, bounds, *layout, None, filter)
            rows = rows + again
        if self.zero and self.admission is not None:
            rows = rows * self.admission.admits(sparse, self.layer.table_keys).unsqueeze(2)
        if self.soft:
            times = self.counts.of(sparse).float().unsqueeze(2)
            rows = rows * (times / (times + self.soft))
        if self.tier_ids is not None:
            places, inside = zip(*(_find(ids, column) for ids, column in zip(self.tier_ids, sparse.T)))
            hot = torch.stack(inside, dim=1)
            own = functional.embedding((torch.stack(places, dim=1) + self.first) * hot, self.tier)
            rows = torch.where(hot.unsqueeze(2), own, rows)
        if self.scale is not None:
            rows = rows * self.scale
        return rows if self.gain is None else rows * self.gain


def _load(layer: RobeEmbeddingBagCollection, counts: Counts) -> Tensor:
    """Of each weight, how many components of rows of training ids read it."""
    load = torch.zeros(layer.array.size)
    for feature, ids in enumerate(counts.ids):
        place = layer._slots(feature, ids)[0].flatten()
        load.index_add_(0, place, torch.ones(len(place)))
    return load


@torch.no_grad()
def project(layer: RobeEmbeddingBagCollection, counts: Counts, tables: list[Tensor]) -> None:
    """Set an array to the least squares approximation of trained tables, each id weighted by how often it was seen.

    Every component reads one weight, so the solution is the weighted mean of what reads it.

    Args:
        tables: of each feature, the rows of its training ids, in the order of ``counts.ids``.
    """
    total, load = torch.zeros(2, layer.array.size)
    for feature, (ids, times, rows) in enumerate(zip(counts.ids, counts.times, tables)):
        place, times = layer._slots(feature, ids)[0].flatten(), times.float().repeat_interleave(layer.embedding_dim)
        total.index_add_(0, place, rows.flatten() * times)
        load.index_add_(0, place, times)
    layer.array.weight.copy_(torch.where(load > 0, total / load.clamp(min=1), layer.array.weight))
