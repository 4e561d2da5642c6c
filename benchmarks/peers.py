"""Embeddings that ROBE is compared with: small tables, trained like ROBE by Adam on dense gradients.

Not a program: benchmarks.accuracy compares them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.embeddings import capped_rows

_SMALL = 200  # rows; smaller tables are kept whole


class HashTrick(nn.Module):
    """The hashing trick (Weinberger et al. 2009): row id % n of a table of n rows for each feature.

    Tables with more rows than a common cap are cut to it.

    Args:
        table_rows: rows of each feature's table.
        embedding_dim: D.
        compression: at least so many times fewer weights than the tables have.

    Attributes:
        weight: (rows kept, D). Initially uniform within +-1/sqrt(n) in a table of n rows.
    """

    def __init__(self, table_rows: Sequence[int], embedding_dim: int, compression: float):
        super().__init__()
        kept = capped_rows(table_rows, compression)
        self.register_buffer("table_rows", torch.tensor(kept), persistent=False)
        self.register_buffer("first_rows", self.table_rows.cumsum(0) - self.table_rows, persistent=False)
        self.weight = nn.Parameter(torch.empty(sum(kept), embedding_dim))
        with torch.no_grad():
            for table in self.weight.split(kept):
                table.uniform_(-(len(table) ** -0.5), len(table) ** -0.5)

    def forward(self, sparse: Tensor) -> Tensor:
        """Look up the embeddings (B, F, D) of ids (B, F)."""
        return functional.embedding(torch.remainder(sparse, self.table_rows) + self.first_rows, self.weight)


class QuotientRemainder(nn.Module):
    """Quotient-remainder embeddings (Shi et al. 2019): the product of a row for id // c and a row for id % c.

    Small tables are kept whole. Of the others, two tables of ceil(n / c) and c rows are kept. No c makes these less
    than about 2 * sqrt(n) rows, so if there is less memory, ids are first taken modulo a smaller n.

    Args:
        table_rows: rows of each feature's table.
        embedding_dim: D.
        compression: at least so many times fewer weights than the tables have.

    Attributes:
        weight: (rows kept, D). Initially as in facebookresearch/dlrm: uniform within +-1/sqrt(n) in a whole table,
            and from sqrt(1/n) to 1 in each of two.
    """

    def __init__(self, table_rows: Sequence[int], embedding_dim: int, compression: float):
        super().__init__()
        plans = _plans(table_rows, sum(table_rows) / compression)
        first = [0]
        for plan in plans:
            first.append(first[-1] + _kept(*plan))
        self.register_buffer("table_rows", torch.tensor([plan.rows for plan in plans]), persistent=False)
        self.register_buffer("divisors", torch.tensor([plan.divisor for plan in plans]), persistent=False)
        self.register_buffer("first_rows", torch.tensor(first[:-1]), persistent=False)
        self.weight = nn.Parameter(torch.empty(first[-1], embedding_dim))
        with torch.no_grad():
            for (n, c), start, end in zip(plans, first, first[1:]):
                low, high = (n**-0.5, 1.0) if c else (-(n**-0.5), n**-0.5)
                self.weight[start:end].uniform_(low, high)

    def forward(self, sparse: Tensor) -> Tensor:
        """Look up the embeddings (B, F, D) of ids (B, F)."""
        x = torch.remainder(sparse, self.table_rows)
        c = self.divisors.clamp(min=1)
        quotients = -(-self.table_rows // c)
        whole = self.divisors == 0
        first = functional.embedding(self.first_rows + torch.where(whole, x, x // c), self.weight)
        second = functional.embedding(self.first_rows + torch.where(whole, 0, quotients + x % c), self.weight)
        return torch.where(whole.unsqueeze(1), first, first * second)


class _Plan(NamedTuple):
    rows: int  # after the modulo
    divisor: int  # 0: a whole table


def _plans(table_rows: Sequence[int], budget: float) -> list[_Plan]:
    """Return the plan of each table, the least compressed that fit into a budget of rows."""

    def plan(n: int, cap: int, collisions: int, small: int) -> _Plan:
        n = min(n, cap)
        c = min(collisions, math.isqrt(n))  # more would only cost memory
        return _Plan(n, 0 if n <= small or c <= 1 or n <= _kept(n, c) else c)

    def fits(cap: int, collisions: int, small: int) -> bool:
        return sum(_kept(*plan(n, cap, collisions, small)) for n in table_rows) <= budget

    most = max(table_rows)
    # As few collisions as fit, as with facebookresearch/dlrm's qr_collisions, and with its threshold of small tables if
    # there is room for them. If nothing fits, fewer rows.
    for small in (_SMALL, 0):
        collisions = next((c for c in range(1, math.isqrt(most) + 1) if fits(most, c, small)), 0)
        if collisions:
            return [plan(n, most, collisions, small) for n in table_rows]
    cap = next(cap for cap in range(most, 0, -1) if fits(cap, most, 0) or cap == 1)
    return [plan(n, cap, most, 0) for n in table_rows]


def _kept(n: int, c: int) -> int:
    return -(-n // c) + c if c else n
