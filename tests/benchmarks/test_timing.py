"""The bookkeeping of times, ids and layers that benchmarks share."""

import numpy as np
import pytest
import torch

from benchmarks import timing
from benchmarks.timing import (
    ADMISSION,
    admitting_layer,
    cycle,
    make_ids,
    parse,
    quantiles,
    side_by_side,
    times_without_admission,
)


def test_candidates_have_the_same_number_of_rounds():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    times = side_by_side({name: lambda name=name: count(name) for name in calls}, seconds=0, least_rounds=3)
    assert times["a"]["rounds"] == times["b"]["rounds"] >= 3
    assert all(0 < time["p20"] <= time["median"] <= time["p80"] for time in times.values())
    assert min(calls.values()) > 3 * 1.5


def test_candidates_are_divided_by_another_round_by_round(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    times = side_by_side({"a": int, "b": int}, seconds=0, least_rounds=3, against="a")
    for time in times.values():
        assert time["times_faster"] == time["times_faster_p20"] == time["times_faster_p80"] == 1
    assert "times_faster" not in side_by_side({"a": int}, seconds=0)["a"]


def test_quantiles():
    assert quantiles(list(range(101))) == {"p20": 20, "median": 50, "p80": 80}


def test_inputs_are_used_in_turn():
    step = cycle(lambda x: x, [1, 2, 3])
    assert [step() for _ in range(7)] == [2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_ids_are_within_their_tables(kind):
    table_rows = (1, 7, 100_000)
    ids = make_ids(table_rows, 20_000, kind, np.random.default_rng(0))
    assert ids.dtype == np.int64
    assert (ids >= 0).all()
    assert (ids < table_rows).all()
    _, times = np.unique(ids[:, 2], return_counts=True)
    share = times.max() / len(ids)
    if kind == "zipf":
        # The ranks are drawn as floor(exp(u * ln(n + 1))): the first has ln 2 / ln(n + 1) of them.
        assert share == pytest.approx(np.log(2) / np.log(100_001), rel=0.1)
    else:
        assert share < 0.001


def test_an_admission_lets_in_half_of_the_lookups():
    ids = [torch.from_numpy(make_ids((1000, 5000), 512, "zipf", np.random.default_rng(k))) for k in range(8)]
    layer = admitting_layer(2, 8, 40_000, 8, ids)
    inside = torch.cat([layer.admission.admits(batch, layer.table_keys) for batch in ids])
    assert layer.admission.bytes == 40_000 // 16 * 8
    assert 0.45 < inside.float().mean() < 0.6


def test_times_are_compared_with_those_without_an_admission():
    times = {"ROBE, Z=8": {"median": 2.0}, f"ROBE{ADMISSION}, Z=8": {"median": 3.0}, f"x{ADMISSION}": {"median": 1.0}}
    assert [times_without_admission(times, name) for name in times] == ["", "1.50", ""]


def test_options(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--output", "x.json", "--presets", "kaggle"])
    args = parse("text", seconds=7)
    assert (args.seconds, args.presets, args.max_rows) == (7, ["kaggle"], 3_000_000)
    assert not hasattr(args, "device")
    assert parse("text", 7, ("cpu", "cuda")).device == "cpu"
