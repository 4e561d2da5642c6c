"""The plot of AUC against compression, and the figures in docs/ that it is drawn from."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import accuracy_plot
from benchmarks.accuracy import markdown
from benchmarks.accuracy_plot import SHOWN, plot, spread
from benchmarks.trials import FULL, METHODS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "accuracy.json"


def line(method, compression, auc):
    return {"trial": {"method": method, "compression": compression}, "mean": auc, "sd": 0.001}


@pytest.mark.parametrize("best", [None, 0.8])
@pytest.mark.parametrize("compressions", [(1000.0,), (10.0, 100.0, 1000.0)])
def test_any_results_are_drawn(tmp_path, compressions, best):
    table = [
        line(FULL, 1.0, 0.76),
        *(line(method, x, 0.75) for method in METHODS if method != FULL for x in compressions),
    ]
    plot(tmp_path / "x.png", {"table": table, "full_bytes": 1e7, "best_possible_auc": best})
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_methods_that_are_drawn_exist():
    assert set(SHOWN) <= set(METHODS)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.1, 2.95, 0.2, 9.0], [0.0, 0.5, 1.0, 1.5]])
def test_labels_are_spread_in_order(values):
    places = spread(values, 0.4)
    ordered = sorted(range(len(values)), key=values.__getitem__)
    assert all(places[b] - places[a] >= 0.4 - 1e-9 for a, b in pairwise(ordered))
    assert sum(places) == pytest.approx(sum(values)), "as much up as down"
    if values == [0.0, 0.5, 1.0, 1.5]:
        assert places == values, "there was room"


def test_the_figures_in_the_docs_are_those_of_the_page():
    results = json.loads(RESULTS.read_text())
    page = (ROOT / "docs" / "accuracy.md").read_text()
    for ours in markdown(results["table"], results["seeds"]).splitlines()[2:]:
        numbers = ours.split("|")[2:]
        assert any(theirs.split("|")[2:] == numbers for theirs in page.splitlines()), ours
    assert results["machine"]["torch"] in page


def test_the_picture_in_the_docs_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["accuracy_plot", str(RESULTS), str(tmp_path / "x.png")])
    accuracy_plot.main()
    assert (tmp_path / "x.png").stat().st_size < 100_000
    assert (ROOT / "docs" / "images" / "accuracy.png").stat().st_size < 100_000
