"""The embeddings that ROBE is compared with, against their formulas."""

import math

import pytest
import torch

from benchmarks.peers import HashTrick, QuotientRemainder


def test_hash_trick_is_the_row_modulo_its_table():
    layer = HashTrick([3, 50, 900], 4, 10)
    kept = layer.table_rows.tolist()
    assert kept[0] == 3
    assert kept[1] == kept[2]
    assert sum(kept) <= 95 < sum(kept) + 2
    ids = torch.randint(0, 10**9, (40, 3))
    tables = layer.weight.split(kept)
    for row, vectors in zip(ids.tolist(), layer(ids)):
        for x, table, vector in zip(row, tables, vectors):
            assert torch.equal(vector, table[x % len(table)])
    assert all(table.abs().max() <= len(table) ** -0.5 for table in tables)


@pytest.mark.parametrize("compression", [1, 3, 10, 60, 400])
def test_quotient_remainder_is_the_product_of_two_rows(compression):
    table_rows = [3, 150, 5000, 40_000]
    layer = QuotientRemainder(table_rows, 4, compression)
    assert len(layer.weight) <= sum(table_rows) / compression
    weight = layer.weight.detach()
    ids = torch.randint(0, 2**32, (60, 4))
    first = layer.first_rows.tolist()
    for row, vectors in zip(ids.tolist(), layer(ids)):
        for x, n, c, start, vector in zip(row, layer.table_rows.tolist(), layer.divisors.tolist(), first, vectors):
            x %= n
            want = weight[start + x] if not c else weight[start + x // c] * weight[start + math.ceil(n / c) + x % c]
            assert torch.equal(vector, want)
    if compression <= 10:
        assert layer.table_rows.tolist() == table_rows, "no id is lost where there is room for quotients and remainders"
    if compression > 1:
        c, n = layer.divisors[-1], layer.table_rows[-1]
        pairs = torch.arange(n)
        assert len(set(zip((pairs // c).tolist(), (pairs % c).tolist()))) == n
