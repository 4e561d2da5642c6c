"""The candidates that are timed, the bookkeeping of times, and the report. Speed itself is for benchmarks."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.rows import Batch
from dlrm import plots
from dlrm.inference import throughput
from dlrm.inference.throughput import (
    STAGES,
    Candidate,
    TensorBatch,
    cut,
    eager,
    full_tables,
    make_candidates,
    measure,
    measure_all,
    report,
    score_all,
    table_rows,
)
from dlrm.machine import available_memory
from dlrm.metrics import score
from dlrm.sparsity import BlockPruner, prunable_of, sparsity
from tests.dlrm.inference.test_predictor import CONFIG, CONFIGS, HOTS, expected, make, rows_of


class Clock:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(throughput.time, "sleep", lambda seconds: None)

    def spend(self, *seconds):
        """A candidate whose calls take these seconds, one after another: embedding a third, the MLPs the rest."""
        turn = itertools.cycle(seconds)

        def run(dense, sparse, clock):
            took = next(turn) if clock is None else seconds[0]
            self.now += took / 3
            heard = clock or (lambda stage: None)
            heard("embedding")
            heard("interaction")
            self.now += took * 2 / 3
            heard("mlp")

        return Candidate(run, "")


def batches(count=4, size=10):
    return [TensorBatch(*rows_of(CONFIG, size, seed)) for seed in range(count)]


def test_times_are_those_that_calls_took(monkeypatch):
    clock = Clock(monkeypatch)
    candidates = {"steady": clock.spend(0.004), "uneven": clock.spend(*[0.001] * 19, 0.101)}
    results = measure(candidates, batches(), seconds=3)
    steady, uneven = results["steady"], results["uneven"]
    assert steady["milliseconds"] == pytest.approx({"p50": 4, "p90": 4, "p99": 4, "mean": 4})
    assert steady["rows_per_second"] == pytest.approx(10 / 0.004)
    assert steady["stages"] == pytest.approx({"embedding": 4 / 3, "interaction": 0, "mlp": 8 / 3})
    assert uneven["milliseconds"]["p50"] == pytest.approx(1)
    assert uneven["milliseconds"]["p99"] == pytest.approx(101)
    assert uneven["milliseconds"]["mean"] == pytest.approx(6, rel=0.2)
    assert 2.9 < clock.now < 4, "the seconds asked for"


def test_all_sizes_are_measured_on_batches_cut_from_the_rows(monkeypatch):
    clock = Clock(monkeypatch)
    dense, sparse = (x.numpy() for x in rows_of(CONFIG, 50))
    candidates = {"a": clock.spend(0.01), "b": clock.spend(0.02)}
    results = measure_all(candidates, Batch(dense, sparse, None), [1, 20], seconds=1)
    assert [(x["batch_size"], x["candidate"]) for x in results] == [(1, "a"), (1, "b"), (20, "a"), (20, "b")]
    assert [x["rows_per_second"] for x in results] == pytest.approx([100, 50, 2000, 1000])


def test_slow_candidates_have_the_least_number_of_calls(monkeypatch):
    clock = Clock(monkeypatch)
    results = measure({"slow": clock.spend(1.0), "other": clock.spend(0.5)}, batches(), seconds=1, least_calls=7)
    assert results["slow"]["calls"] == results["other"]["calls"] == 7


def test_batches_are_taken_in_turn_with_ids_within_the_tables(monkeypatch):
    clock = Clock(monkeypatch)
    seen = []
    num_embeddings = torch.tensor([9, 400, 5000, 3])

    def run(dense, sparse, of_stages):
        clock.now += 0.001
        seen.append(sparse)

    of = measure({"x": Candidate(run, "", num_embeddings)}, batches(), seconds=0.1)["x"]
    assert of["stages"] is None
    assert all(((sparse >= 0) & (sparse < num_embeddings)).all() for sparse in seen)
    assert len({sparse.data_ptr() for sparse in seen}) == 4


def test_candidates_and_their_predictions():
    model = make(CONFIG)
    candidates = make_candidates(model, "int8", "float32", ["eager", "full"], max_table_rows=1000)
    assert list(candidates) == [
        "ROBE 3x, array int8",
        "ROBE 3x",
        "ROBE 3x, eager",
        "full tables",
        "full tables, eager",
    ]
    dense, sparse = rows_of(CONFIG, 30)
    want = expected(model, dense, sparse)
    for name, tolerance in {"ROBE 3x, array int8": 0.01, "ROBE 3x": 1e-6, "ROBE 3x, eager": 1e-6}.items():
        torch.testing.assert_close(candidates[name].run(dense, sparse, lambda _: None), want, rtol=0, atol=tolerance)
    assert "1,412 rows of 5,412" in candidates["full tables"].note
    assert [len(make_candidates(model, "float32", "float32", x)) for x in ([], ["eager"])] == [1, 2]


@pytest.mark.parametrize("name", ["robe", "robe, several ids", "robe, synthetic ids", "cross", "full"])
def test_full_tables_have_the_same_mlps(name):
    model = make(CONFIGS[name])
    full, num_embeddings = full_tables(model, max_table_rows=100)
    assert full.bottom is model.bottom
    assert full.top is model.top
    assert [len(bag.weight) for bag in full.embeddings.bags] == [9, 100, 100, 3]
    dense, sparse = rows_of(model.config, 20)
    (inputs,) = Candidate(eager(full), "", num_embeddings).inputs([(dense, sparse)])
    with torch.no_grad():
        # All their weights are equal: so is every embedding of one id.
        hots = model.config.hots or (1,) * 4
        same = torch.full((20, 4, 8), 0.01) * torch.tensor(hots).unsqueeze(1)
        want = torch.sigmoid(model.top(model.interaction(model.bottom(dense), same))).squeeze(1)
    torch.testing.assert_close(eager(full)(*inputs, lambda _: None), want)
    from dlrm.inference.predictor import Predictor

    torch.testing.assert_close(Predictor(full)(*inputs), want)


def test_full_tables_stand_for_a_model_with_an_admission():
    full, _ = full_tables(make(CONFIGS["robe, admission"]), max_table_rows=100)
    assert full.config.admission_bytes == 0


def test_a_pruned_model_is_timed_against_dense_and_pruned_mlps():
    model = make(CONFIG)
    BlockPruner(prunable_of(model)).step(0.75)
    candidates = make_candidates(model, "float32", "float32", ["full", "full-pruned"], max_table_rows=100)
    dense, pruned = (candidates[f"full tables{which}"] for which in ("", ", pruned"))
    assert list(candidates)[1:] == [f"full tables{x}" for x in ("", ", eager", ", pruned", ", pruned, eager")]
    assert "MLPs of the same sizes with random weights, as the model's are pruned" in dense.note
    assert "random" not in pruned.note
    shares = [sparsity(full_tables(model, 100, dense_twin).model) for dense_twin in (True, False)]
    assert shares == [0, sparsity(model)]
    assert shares[1] > 0.5
    for candidate in (dense, pruned):
        (inputs,) = candidate.inputs([rows_of(CONFIG, 5)])
        assert candidate.run(*inputs, None).shape == (5,)


def test_tables_take_as_much_memory_as_there_is():
    rows = table_rows(CONFIG, budget=1000 * 8 * 4)
    assert sum(rows) <= 1000 < sum(min(n, max(rows) + 1) for n in CONFIG.table_rows)
    assert table_rows(CONFIG, budget=1e12) == list(CONFIG.table_rows)
    assert table_rows(CONFIG, budget=1e12, max_table_rows=50) == [9, 50, 50, 3]
    assert table_rows(CONFIG, budget=0) == [1, 1, 1, 1]
    assert 1e6 < available_memory() < 1e15


def test_bags_of_several_ids_are_summed():
    config = replace(CONFIGS["full, several ids"])
    model = make(config)
    tables = [table.clone() for table in model.embeddings.weight.detach().split(list(config.table_rows))]
    model.embeddings, own = throughput.EmbeddingBags(tables), model.embeddings
    dense, sparse = rows_of(config, 12)
    sparse = sparse.remainder(torch.tensor(config.table_rows).repeat_interleave(torch.tensor(HOTS)))
    got = expected(model, dense, sparse)
    model.embeddings = own
    torch.testing.assert_close(got, expected(model, dense, sparse))


@pytest.mark.parametrize("what", ["nothing", "FULL", ""])
def test_what_is_unknown_is_not_timed(what):
    with pytest.raises(
        ValueError, match=f"against: expected full, full-pruned, eager or a file that export made, got '{what}'"
    ):
        make_candidates(make(CONFIG), "float32", "float32", [what])


@pytest.mark.parametrize(("rows", "size", "count"), [(1000, 10, 100), (1000, 1, 256), (10, 64, 1), (100, 33, 3)])
def test_batches_are_cut_from_rows(rows, size, count):
    dense = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    sparse = np.arange(rows)[:, None]
    got = cut(dense, sparse, size)
    assert len(got) == count
    for i, (d, s) in enumerate(got):
        want = [(i * size + k) % rows for k in range(size)]
        assert s.squeeze(1).tolist() == want
        assert d[:, 0].tolist() == [2.0 * x for x in want]


def test_scores_are_those_of_the_candidates():
    model = make(CONFIG)
    candidates = make_candidates(model, "float32", "float32", ["eager", "full"], max_table_rows=50)
    dense, sparse = rows_of(CONFIG, 600)
    labels = (torch.rand(600) < 0.4).float().numpy()
    pieces = [
        Batch(d.numpy(), s.numpy(), x)
        for d, s, x in zip(dense.split(250), sparse.split(250), np.split(labels, [250, 500]))
    ]
    told = []
    score_all(candidates, pieces, told.append)
    assert told == [250, 250, 100]
    want = score(labels, expected(model, dense, sparse).numpy())
    for name in ("ROBE 3x", "ROBE 3x, eager"):
        assert candidates[name].scores == pytest.approx(want, abs=1e-5)
    assert candidates["full tables"].scores is None, "it was never trained"
    with pytest.raises(ValueError, match="labels: expected to score models, got none"):
        score_all(candidates, [Batch(dense.numpy(), sparse.numpy(), None)], told.append)


def results():
    def result(size, name, ms, stages):
        return {
            "batch_size": size,
            "candidate": name,
            "rows_per_second": size / ms * 1e3,
            "milliseconds": {"p50": ms, "p90": ms * 2, "p99": ms * 3, "mean": ms},
            "calls": 9,
            "stages": dict(zip(STAGES, (ms / 4, ms / 4, ms / 2))) if stages else None,
        }

    return [result(s, n, ms * s**0.5, n != "b") for s in (1, 16) for n, ms in (("a", 2.0), ("b", 3.0), ("c", 5.0))]


def test_report():
    lines = report(results(), against="b").splitlines()
    assert len(lines) == 7
    assert lines[0].split() == ["batch", "rows/s", "p50", "ms", "p90", "p99", "embedding", "interaction", "mlp"]
    assert lines[1].split() == ["1", "a", "500", "1.50x", "2.000", "4.000", "6.000", "0.500", "0.500", "1.000"]
    assert lines[2].split() == ["1", "b", "333", "1.00x", "3.000", "6.000", "9.000"]
    assert lines[6].split()[:4] == ["16", "c", "800", "0.60x"]


def test_picture(tmp_path):
    plots.throughput(tmp_path / "x.png", results(), STAGES)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps(results())
