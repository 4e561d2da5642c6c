"""benchmarks.accuracy on a few generated rows."""

import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks import accuracy
from benchmarks.trials import ADMISSION, FULL, Trial

ROWS = 2000


def test_interval_is_that_of_a_paired_t_test():
    first, second = np.random.default_rng(0).normal(size=(2, 7))
    mean, half = accuracy.interval((first - second).tolist())
    low, high = ttest_rel(first, second).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))


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


@pytest.mark.slow
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
    assert [line["trial"]["method"] for line in table] == [FULL, "hash trick", ADMISSION]
    for line in table:
        of_trial = [json.loads(line) for line in lines]
        auc = [x["result"]["auc"] for x in of_trial if json.loads(x["trial"]) == line["trial"] and x["seed"] < 2]
        assert sorted(auc) == sorted(line["auc"])
        assert line["mean"] == pytest.approx(np.mean(auc))
        assert line["against"] == pytest.approx(line["mean"] - table[0]["mean"])
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
    assert [line["trial"]["epochs"] for line in longer] == [1, 1.5, 1.5]
