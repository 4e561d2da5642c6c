"""Variants of ROBE against their formulas."""

import pytest
import torch

from benchmarks.trials import kept_bytes
from benchmarks.variants import Counts, Variant, project
from robe import Admission, EmbeddingBagConfig, RobeEmbeddingBagCollection


def layer_and_ids(**options):
    torch.manual_seed(0)
    tables = [EmbeddingBagConfig(f"f{k}", None, 4) for k in range(2)]
    ids = (torch.rand(300, 2) ** 3 * 50).long()
    return RobeEmbeddingBagCollection(tables, robe_size=60, **options), ids, Counts(ids)


def test_counts():
    _, ids, counts = layer_and_ids()
    others = torch.tensor([[0, 1], [49, 1000]])
    want = [[int((ids[:, f] == x).sum()) for f, x in enumerate(row)] for row in others.tolist()]
    assert counts.of(others).tolist() == want


def test_variants_add_what_they_say():
    layer, ids, counts = layer_and_ids()
    plain, times = layer(ids), counts.of(ids).unsqueeze(2)
    torch.testing.assert_close(Variant(layer, counts, soft=5)(ids), plain * times / (times + 5))
    gained = Variant(layer, counts, gain=True)
    assert kept_bytes(gained) == 4 * 60 + 4 * 2
    with torch.no_grad():
        gained.gain.copy_(torch.tensor([[2.0], [3.0]]))
    torch.testing.assert_close(gained(ids), plain * torch.tensor([[2.0], [3.0]]))
    second = Variant(layer, counts, twice=True)(ids) - plain
    assert not torch.equal(second, plain)
    array = layer.array.weight.detach()
    assert all(any(torch.allclose(row, array[i : i + 4]) for i in range(57)) for row in second.view(-1, 4)[:20])


def test_a_tier_has_rows_of_its_own():
    layer, ids, counts = layer_and_ids()
    variant = Variant(layer, counts, tier=counts.most_frequent(6))
    times = sorted(torch.cat(counts.times).tolist(), reverse=True)
    assert len(variant.tier) == sum(n > times[6] for n in times) <= 6
    hot = counts.of(ids) > times[6]
    rows = variant(ids)
    assert torch.equal(rows[~hot], layer(ids)[~hot])
    assert {tuple(row) for row in rows[hot].tolist()} == {tuple(row) for row in variant.tier.tolist()}


def test_small_tables_can_have_all_their_rows():
    layer, ids, _ = layer_and_ids()
    ids[:, 1] %= 3
    counts = Counts(ids)
    variant = Variant(layer, counts, tier=counts.of_small_tables(3))
    assert len(variant.tier) == 3
    rows = variant(ids)
    assert torch.equal(rows[:, 0], layer(ids)[:, 0])
    assert torch.equal(rows[:, 1], variant.tier[ids[:, 1]])
    others = torch.tensor([[0, 3], [1, -1]])
    assert torch.equal(variant(others), layer(others))


def test_a_scale_of_tables():
    layer, ids, counts = layer_and_ids()
    sizes = [len(known) for known in counts.ids]
    mean = (sizes[0] * sizes[1]) ** 0.5
    factor = torch.tensor([[(n / mean) ** -0.25] for n in sizes])
    torch.testing.assert_close(Variant(layer, counts, table_scale=0.25)(ids), layer(ids) * factor)


def test_rows_that_are_not_let_in_can_be_zero():
    admission = Admission(16)
    layer, ids, counts = layer_and_ids(admission=admission)
    admission.admit(torch.arange(5).unsqueeze(1), layer.table_keys)
    inside = admission.admits(ids, layer.table_keys)
    rows = Variant(layer, counts, zero=True)(ids)
    assert torch.equal(rows[inside], layer(ids)[inside])
    assert not rows[~inside].any()
    assert 0 < inside.sum() < inside.numel()


@pytest.mark.parametrize("block_size", [1, 4])
def test_projection_is_least_squares(block_size):
    layer, _ids, counts = layer_and_ids(block_size=block_size)
    tables = [torch.randn(len(known), 4) for known in counts.ids]
    project(layer, counts, tables)
    weight = layer.array.weight.detach().clone().requires_grad_()
    layer.array.weight = torch.nn.Parameter(weight)

    def loss():
        total = 0
        for feature, (known, times, table) in enumerate(zip(counts.ids, counts.times, tables)):
            both = torch.stack([known, known], dim=1)
            total = total + (times.unsqueeze(1) * (layer(both)[:, feature] - table) ** 2).sum()
        return total

    (grad,) = torch.autograd.grad(loss(), layer.array.weight)
    torch.testing.assert_close(grad, torch.zeros(60), atol=1e-3, rtol=0)


def test_gradients_are_divided_by_sharing():
    layer, ids, counts = layer_and_ids(block_size=1)
    (layer(ids) ** 2).sum().backward()
    plain, layer.array.weight.grad = layer.array.weight.grad, None
    load = torch.zeros(60)
    for feature, known in enumerate(counts.ids):
        for x in known.tolist():
            both = torch.full((1, 2), x)
            (grad,) = torch.autograd.grad(layer(both)[0, feature].sum(), layer.array.weight)
            load += grad
    (Variant(layer, counts, sharing=0.5)(ids) ** 2).sum().backward()
    torch.testing.assert_close(layer.array.weight.grad, plain / load.clamp(min=1).sqrt())
