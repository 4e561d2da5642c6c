"""benchmarks.kills with a program in place of train.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kills

ROOT = Path(__file__).parents[2]

# Makes a checkpoint, takes a while, and writes its results. The weights depend on kills if --bad is given.
PROGRAM = """
import json, sys, time
from pathlib import Path

folder = Path(sys.argv[1])
checkpoints = folder / "checkpoints"
resumed = checkpoints.exists()
(checkpoints / f"step-{len(list(checkpoints.glob('*'))):09}").mkdir(parents=True)
time.sleep(float(sys.argv[2]))
measured = dict.fromkeys(("seconds", "samples_per_second", "peak_rss_bytes"), time.time())
(folder / "metrics.json").write_text(json.dumps({"auc": 0.7, "environment": {"command": str(folder)}} | measured))
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/samples_per_second": time.time()}) + "\\n")
(folder / "model.safetensors").write_bytes(b"resumed" if resumed and "--bad" in sys.argv else b"weights")
"""


@pytest.mark.parametrize("options", [[], ["--bad"]])
def test_a_killed_run_is_compared_with_an_undisturbed_one(tmp_path, monkeypatch, capsys, options):
    starts = []

    def start(data, folder, options):
        starts.append(folder.name)
        seconds = "30" if starts.count("killed") in (1, 2) else "0"  # the first two are killed
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), seconds, *options])

    monkeypatch.setattr(kills, "start", start)
    output = tmp_path / "runs"
    arguments = ["--data", "rows", "--output", str(output), "--kills", "2", "--within", "3", "--seed", "1", *options]
    monkeypatch.setattr(sys, "argv", ["kills", *arguments])
    with pytest.raises(SystemExit) as end:
        kills.main()
    assert end.value.code == bool(options)
    result = json.loads((output / "kills.json").read_text())
    assert result["seed"] == 1
    assert result["results"]["different"] == (["model.safetensors"] if options else [])
    assert len(result["results"]["checkpoints"]) == 2
    assert ("the same" in capsys.readouterr().out) == (not options)


def test_an_old_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kills", "--data", "rows", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        kills.main()
    assert "exists; expected a new name" in capsys.readouterr().err


def test_the_command_resumes(monkeypatch):
    asked = []
    monkeypatch.setattr(kills.subprocess, "Popen", lambda command, **options: asked.append(command))
    kills.start(Path("rows"), Path("out"), ["--epochs", "2"])
    assert asked[0][1:] == [str(ROOT / "train.py"), "--data", "rows", "--output", "out", "--resume", "--epochs", "2"]
