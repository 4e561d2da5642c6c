"""Training runs that benchmarks start."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import runs


@pytest.mark.parametrize("code", [0, 3])
def test_a_run_returns_its_metrics_or_ends_the_program(tmp_path, monkeypatch, code):
    asked = []

    def run(command, check):
        asked.append(command)
        (tmp_path / "metrics.json").write_text(json.dumps({"auc": 0.75}))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    if code:
        with pytest.raises(SystemExit) as end:
            runs.train(tmp_path / "rows", tmp_path)
        assert end.value.code == code
    else:
        assert runs.train(tmp_path / "rows", tmp_path, "--compression", 10) == {"auc": 0.75}
        assert asked[0][2:] == ["--data", tmp_path / "rows", "--output", tmp_path, "--compression", "10"]
