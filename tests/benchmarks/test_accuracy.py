"""benchmarks.accuracy on a few generated rows, and what it compares ROBE with against formulas."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from benchmarks import accuracy
from benchmarks.peers import HashTrick, QuotientRemainder
from benchmarks.trials import ADMISSION, FULL, METHODS, Rows, Trial, fit, is_past_its_best, kept_bytes
from benchmarks.variants import Counts, Variant, project
from robe import Admission, EmbeddingBagConfig, RobeEmbeddingBagCollection

ROWS = 2000


@pytest.fixture(scope="module")
def rows():
    return Rows.generate(ROWS)


def test_hash_trick_is_the_row_modulo_its_table():
    layer = HashTrick([3, 50, 900], 4, 10)
    kept = layer.rows.tolist()
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
    first = layer.first.tolist()
    for row, vectors in zip(ids.tolist(), layer(ids)):
        for x, n, c, start, vector in zip(row, layer.rows.tolist(), layer.divisors.tolist(), first, vectors):
            x %= n
            want = weight[start + x] if not c else weight[start + x // c] * weight[start + math.ceil(n / c) + x % c]
            assert torch.equal(vector, want)
    if compression <= 10:
        assert layer.rows.tolist() == table_rows, "no id is lost where there is room for quotients and remainders"
    if compression > 1:
        c, n = layer.divisors[-1], layer.rows[-1]
        pairs = torch.arange(n)
        assert len(set(zip((pairs // c).tolist(), (pairs % c).tolist()))) == n


def test_every_method_keeps_to_its_memory(rows):
    for method in METHODS:
        if method == FULL:
            continue
        for compression in (10.0, 100.0):
            layer = METHODS[method](rows, Trial(method, compression), 0)
            bytes = 4 * sum(p.numel() for p in layer.parameters())
            if "int8" in method:  # it becomes so after training
                bytes = sum(x.numel() * x.element_size() for x in layer.array.quantized(64).read())
            if getattr(layer, "admission", None):
                bytes += layer.admission.bytes
            if "int8" in method:
                layer.array = layer.array.quantized(64)
            assert kept_bytes(layer) == bytes
            assert 0.4 < bytes / (rows.full_bytes / compression) <= 1, method


def test_interval_is_that_of_a_paired_t_test():
    first, second = np.random.default_rng(0).normal(size=(2, 7))
    mean, half = accuracy.interval((first - second).tolist())
    low, high = ttest_rel(first, second).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_epochs_can_be_parts(rows):
    size = len(rows.parts[0])
    batches = list(rows.train_batches(100, 0, 0, round(1.5 * size)))
    assert sum(map(len, batches)) == round(1.5 * size)
    dense = np.concatenate([batch.dense for batch in batches])
    train = rows.batch.dense[:size]
    in_order = [np.unique(part, axis=0) for part in (dense[:size], train)]
    assert np.array_equal(*in_order), "every row once before any comes again"
    assert not np.array_equal(dense[:size], train)
    _, progress = fit(rows, Trial("hash trick", 10.0, epochs=1.5), 0, 100)
    assert [point["epoch"] for point in progress.history] == pytest.approx([0.75, 1.5], abs=0.05)
    assert Trial("x", epochs=6.0).key == Trial("x", epochs=6).key


def test_training_ends_where_validation_falls():
    def history(*aucs):
        return [{"auc": auc} for auc in aucs]

    assert not is_past_its_best(history(0.7, 0.6))
    assert not is_past_its_best(history(0.7, 0.6, 0.71))
    assert not is_past_its_best(history(0.6, 0.7, 0.65))
    assert is_past_its_best(history(0.6, 0.7, 0.65, 0.69))


def test_search_keeps_what_helps():
    """With a validation AUC that is a formula of the trial: the best rate is twice the first, decay does no good."""

    class Formula:
        def results(self, jobs):
            return {
                (trial, seed): {"validation_auc": 1 - abs(trial.rate - 2e-3) - trial.decay + trial.init / 1e4}
                for trial, seed in jobs
            }

    (found,) = accuracy.search(Formula(), [Trial("x", 10.0)], accuracy.SEARCH, 2)
    assert found == Trial("x", 10.0, rate=2e-3)


def test_a_run_from_the_command_line_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    argv = ["accuracy", "--generate", str(ROWS), "--output", str(tmp_path), "--seeds", "2", "--searches", "1"]
    argv += [
        "--changes",
        "rate",
        "--compressions",
        "100",
        "--methods",
        FULL,
        "hash trick",
        ADMISSION,
        "--processes",
        "1",
    ]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(accuracy, "SEARCH", ({"rate": 2.0},))
    accuracy.main()
    table = json.loads((tmp_path / "accuracy.json").read_text())["table"]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 2 + 3 * 2, "a seed of each of 2 trials, 2 seeds of the best, of 3 methods"
    assert [row["trial"]["method"] for row in table] == [FULL, "hash trick", ADMISSION]
    for row in table:
        of_trial = [json.loads(line) for line in lines]
        auc = [x["result"]["auc"] for x in of_trial if json.loads(x["trial"]) == row["trial"] and x["seed"] < 2]
        assert sorted(auc) == sorted(row["auc"])
        assert row["mean"] == pytest.approx(np.mean(auc))
        assert row["against"] == pytest.approx(row["mean"] - table[0]["mean"])
    assert table[2]["bytes"] <= table[0]["bytes"] / 100
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "| hash trick 100x" in capsys.readouterr().out
    # A line that a kill cut off is run again, the others are not.
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])
    accuracy.main()
    assert json.loads((tmp_path / "accuracy.json").read_text())["table"] == table
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(lines) + 1
    monkeypatch.setattr("sys.argv", [*argv, "--longer", "1.5", "--epochs", "1"])
    accuracy.main()
    longer = json.loads((tmp_path / "accuracy.json").read_text())["table"]
    assert [row["trial"]["epochs"] for row in longer] == [1, 1.5, 1.5]


# -- Variants ---------------------------------------------------------------------------------------------------------


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
