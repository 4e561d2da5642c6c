"""Plots: the files are images, and hold what they are to show."""

import pytest
from matplotlib import pyplot

from dlrm import plots

HISTORY = [
    {"step": 5 * i, "epoch": i / 2, "train_loss": 0.7 - i / 50, "auc": 0.5 + i / 20, "log_loss": 0.6 - i / 40}
    for i in range(1, 5)
]
STAGES = ("embedding", "interaction", "mlp")
RESULTS = [
    {
        "candidate": name,
        "batch_size": size,
        "rows_per_second": 1000.0 * size,
        "stages": dict.fromkeys(STAGES, 0.1) if name != "eager" else None,
    }
    for size in (1, 64)
    for name in ("ROBE 1000x", "full tables", "eager")
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures, which are closed once they are written."""
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 10_000


def test_learning_curves(tmp_path, drawn):
    plots.learning_curves(tmp_path / "curve.png", {"robe": HISTORY, "full": HISTORY[:2]}, best_possible=0.8)
    assert is_png(tmp_path / "curve.png")
    left, right = drawn[0].axes
    aucs = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert aucs["robe"] == [point["auc"] for point in HISTORY]
    assert len(aucs["full"]) == 2
    assert aucs["best possible, test rows"] == [0.8, 0.8]
    assert len(right.lines) == 4, "training and validation loss of each run"


def test_throughput(tmp_path, drawn):
    plots.throughput(tmp_path / "throughput.png", RESULTS, STAGES)
    assert is_png(tmp_path / "throughput.png")
    left, right = drawn[0].axes
    assert {line.get_label() for line in left.lines} == {"ROBE 1000x", "full tables", "eager"}
    assert [list(line.get_ydata()) for line in left.lines] == [[1000.0, 64_000.0]] * 3
    assert len(right.patches) == 2 * 2 * len(STAGES), "eager tells no stages"
