"""Descriptions of data against Counter and plain loops."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.counts import IdCounts
from data.describe import Description, describe, frequency_curve, plot_frequencies, table
from data.schema import MISSING, Layout
from tests.helpers.sources import HOTS, LAYOUTS, InMemory, fill, records_of


def small(layout, rows=400):
    records = fill(layout, rows)
    records["sparse"] = np.abs(records["sparse"].astype(np.int64)) % 17
    if layout.dense == "i4":
        records["dense"][::3, 1] = MISSING
        records["dense"][:, 5] = MISSING
    return records


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_describe(layout, monkeypatch):
    monkeypatch.setattr("data.sources.PIECE_ROWS", 150)
    records = small(layout)
    read = []
    found = describe(InMemory(records, layout), read.append)
    assert (found.rows, sum(read), len(read)) == (400, 400, 3)
    assert found.positives == (sum(records["label"].tolist()) if layout.labelled else None)
    for column in range(13):
        values = [x for x in records["dense"][:, column].tolist() if x != MISSING]
        assert found.missing_dense[column] == 400 - len(values)
        assert found.smallest[column] == min(values, default=np.inf)
        assert found.largest[column] == max(values, default=-np.inf)
    assert found.ids_a_row == list(layout.hots or (1,) * 26)
    for feature, ids in enumerate(layout.features):
        times = Counter(records["sparse"][:, ids].reshape(-1).tolist())
        assert found.zeros[feature] == times.pop(0)
        assert dict(zip(*(some.tolist() for some in found.ids.counts(feature)))) == times


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_table(layout):
    records = small(layout)
    lines = table(describe(InMemory(records, layout))).splitlines()
    labels = f"{sum(records['label'].tolist()) / 4:.4f}% positive" if layout.labelled else "no labels"
    assert lines[0] == f"mine: 400 rows, {labels}"
    assert lines[2].split() == ["missing", "smallest", "largest"]
    for column, line in enumerate(lines[3:16]):
        values = [x for x in records["dense"][:, column].tolist() if x != MISSING]
        ends = [f"{min(values):.6g}", f"{max(values):.6g}"] if values else ["-", "-"]
        assert line.split() == [f"int_{column}", f"{100 * (1 - len(values) / 400):.2f}%", *ends]
    for feature, (line, ids) in enumerate(zip(lines[18:], layout.features)):
        times = Counter(records["sparse"][:, ids].reshape(-1).tolist())
        all_ids = times.total()
        missing = times.pop(0) / all_ids
        once, top = sum(t == 1 for t in times.values()) / len(times), max(times.values()) / all_ids
        assert line.split() == [f"cat_{feature}", f"{missing:.2%}", f"{len(times)}", f"{top:.2%}", f"{once:.1%}"]
    assert len(lines) == 18 + 26


def test_table_of_estimates():
    counts = IdCounts([slice(i, i + 1) for i in range(26)], 1000)
    counts.add(records_of(np.arange(50_000)))
    found = Description(Path("mine"), rows=50_000, ids=counts)
    fields = table(found).splitlines()[18].split()
    assert re.fullmatch(r"~\d\d,\d{3}", fields[2])
    assert fields[4] == "100.0%"


def test_table_of_no_rows():
    text = table(Description(Path("mine"), positives=0, ids=IdCounts(Layout().features)))
    assert "mine: 0 rows, 0.0000% positive" in text


@pytest.mark.parametrize("hots", [None, HOTS])
def test_the_curve_of_all_ids(hots):
    layout = Layout(hots=hots)
    records = small(layout)
    found = describe(InMemory(records, layout))
    for feature, ids in enumerate(layout.features):
        counts = Counter(records["sparse"][:, ids].reshape(-1).tolist())
        assert counts.pop(0) > 0
        times = sorted(counts.values(), reverse=True)
        ranks, shares = frequency_curve(found, feature)
        assert ranks.tolist() == list(range(1, len(times) + 1))
        assert shares.tolist() == [t / 400 for t in times]


@pytest.mark.parametrize("sample", [30, 500, 4096])
@pytest.mark.parametrize("kind", ["zipf", "all once", "all three times", "some often, the others once"])
def test_the_curve_of_a_sample(kind, sample):
    times = {
        "zipf": np.maximum(20_000 // np.arange(1, 40_000), 1),
        "all once": np.ones(100_000, int),
        "all three times": np.full(50_000, 3),
        "some often, the others once": np.repeat([40, 1], [500, 60_000]),
    }[kind]
    ids = np.repeat(np.arange(1, len(times) + 1), times)
    counts = IdCounts([slice(0, 1)], sample)
    counts.add(records_of(np.random.default_rng(0).permutation(ids)))
    ranks, shares = frequency_curve(Description(Path("mine"), rows=len(ids), ids=counts), 0)
    assert (np.diff(ranks) > 0).all()
    assert (np.diff(shares) <= 0).all()
    assert ranks[-1] == pytest.approx(len(times), rel=4 / sample**0.5)
    np.testing.assert_allclose(shares[:10] * len(ids), times[:10])
    for rank in np.geomspace(1, len(times) * (1 - 4 / sample**0.5), 20).astype(int) if sample >= 500 else []:
        estimate = np.interp(rank, ranks, shares * len(ids))
        in_sample = rank * counts.sampled(0)[1]
        slack = 1 + 5 / in_sample**0.5 if in_sample > 1 else 1.0
        low, high = min(int(rank * slack) + 1, len(times) - 1), max(int(rank / slack) - 2, 0)
        assert times[low] - 1 <= estimate <= times[high] + 1


def test_the_plot_is_a_png(tmp_path):
    layout = Layout(labelled=False, hots=HOTS)
    plot_frequencies(describe(InMemory(small(layout), layout)), tmp_path / "ids.png")
    assert (tmp_path / "ids.png").read_bytes().startswith(b"\x89PNG")
