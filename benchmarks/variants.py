"""Variants of ROBE that the library does not have, because they were tried and are not worth it: docs/accuracy.md."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from robe import RobeEmbeddingBagCollection
from robe.admission import RARE
from robe.hashing import slots, table_key


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
        columns = []
        for column, ids, times in zip(sparse.T, self.ids, self.times):
            place = torch.searchsorted(ids, column.contiguous()).clamp(max=len(ids) - 1)
            columns.append(torch.where(ids[place] == column, times[place], 0))
        return torch.stack(columns, dim=1)


class Variant(nn.Module):
    """A collection with something added.

    Args:
        layer: what it is added to.
        counts: of ids, for the options that need them; their memory is not counted.
        gain: whether each feature's embeddings are multiplied by a learned number.
        soft: k: embeddings are multiplied by n / (n + k), n times the id was seen; 0: no.
        zero: ids without a row of their own read zeros, not the row that they share.
        twice: a second lookup is added.
        tier: so many of the most frequent ids have a row in a table, and no part in the array.
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
        tier: int = 0,
        sharing: float = 0.0,
    ):
        super().__init__()
        self.layer, self.counts, self.soft, self.zero, self.twice = layer, counts, soft, zero, twice
        self.gain = nn.Parameter(torch.ones(len(layer.table_keys), 1)) if gain else None
        self.admission = layer.admission
        self.keys = torch.tensor([table_key(layer.array.seed, 1000 + i) for i in range(len(layer.table_keys))])
        self.least = 0
        if tier:
            times = torch.cat(counts.times)
            self.least = int(times.topk(tier + 1).values[-1]) + 1  # so many or, where several are as frequent, fewer
            self.tier_ids = [ids[n >= self.least] for ids, n in zip(counts.ids, counts.times)]
            rows = [len(ids) for ids in self.tier_ids]
            self.first = torch.tensor([0, *rows[:-1]]).cumsum(0)
            self.tier = nn.Parameter(torch.randn(sum(rows), layer.embedding_dim) * layer.array.init_std)
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
        if self.least:
            place = [
                torch.searchsorted(ids, column.contiguous()).clamp(max=max(len(ids) - 1, 0))
                for ids, column in zip(self.tier_ids, sparse.T)
            ]
            inside = torch.stack(
                [
                    (ids[p] == column) if len(ids) else torch.zeros_like(column, dtype=torch.bool)
                    for ids, p, column in zip(self.tier_ids, place, sparse.T)
                ],
                dim=1,
            )
            own = functional.embedding((torch.stack(place, dim=1) + self.first) * inside, self.tier)
            rows = torch.where(inside.unsqueeze(2), own, rows)
        return rows if self.gain is None else rows * self.gain


def _slots(layer: RobeEmbeddingBagCollection, feature: int, ids: Tensor) -> Tensor:
    """(n, D): the slots that rows are read at, those of an id that is not let in among them."""
    key = layer.table_keys[feature]
    if layer.admission is not None:
        ids = ids.where(layer.admission.admits(ids, key), RARE)
    place, _ = slots(
        ids, key, size=layer.array.size, embedding_dim=layer.embedding_dim, block_size=layer.block_size, hash="mix"
    )
    return place


def _load(layer: RobeEmbeddingBagCollection, counts: Counts) -> Tensor:
    """Of each weight, how many components of rows of training ids read it."""
    load = torch.zeros(layer.array.size)
    for feature, ids in enumerate(counts.ids):
        place = _slots(layer, feature, ids).flatten()
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
        place, times = _slots(layer, feature, ids).flatten(), times.float().repeat_interleave(layer.embedding_dim)
        total.index_add_(0, place, rows.flatten() * times)
        load.index_add_(0, place, times)
    layer.array.weight.copy_(torch.where(load > 0, total / load.clamp(min=1), layer.array.weight))
