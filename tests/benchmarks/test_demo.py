"""`make train` in small: generated rows, both models, the comparison."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import demo
from data.synthetic import write

ROOT = Path(demo.__file__).parent.parent


@pytest.mark.slow
def test_demo_compares_full_tables_with_robe(tmp_path):
    command = [sys.executable, "-m", "benchmarks.demo", "--rows", "2000", "--output", tmp_path / "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    comparison = json.loads((tmp_path / "demo" / "comparison.json").read_text())
    full, *compressed = comparison["runs"].values()
    assert full["array_floats"] == full["full_floats"]
    for run, compression in zip(compressed, (10, 100, 1000), strict=True):
        kept = 4 * run["array_floats"] + run["admission_bytes"]
        assert 0 <= 4 * full["full_floats"] / compression - kept < 4
        assert run["admission_bytes"] > 0
    for value in (*(run["auc"] for run in comparison["runs"].values()), comparison["best_possible_auc"]):
        assert f"{value:.4f}" in done.stdout
    assert (tmp_path / "demo" / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_best_possible_auc_is_that_of_the_test_rows(tmp_path):
    signal = write(tmp_path / "rows.tsv", 7000, seed=1)
    lines = (tmp_path / "rows.tsv").read_text().splitlines()[6000:]
    labels = [int(line.split("\t")[0]) for line in lines]
    (tmp_path / "tail.tsv").write_text("\n".join(lines))
    batch = demo.Batch.concatenate(list(demo.CriteoTSV(tmp_path / "tail.tsv").read()))
    expected = roc_auc_score(labels, signal.logits(batch.dense, batch.sparse))
    assert demo.best_possible_auc(tmp_path / "rows.tsv", signal) == expected
