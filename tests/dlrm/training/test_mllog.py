"""MLPerf's log of runs, held against MLPerf's own checker."""

import json
import logging
import time
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from mlperf_logging.compliance_checker import mlp_compliance

from data.rows import Batch
from dlrm import DLRM, PRESETS, DLRMConfig
from dlrm.training.mllog import MLLog
from dlrm.training.trainer import Progress, Stopped, Trainer

RNG = np.random.default_rng(0)
ROWS = Batch(
    RNG.normal(size=(70, 13)).astype(np.float32),
    RNG.integers(0, 2**32, (70, 2)),
    RNG.integers(0, 2, 70).astype(np.float32),
)
# The layers of the presets, as the checker counts them; but narrow.
SMALL = {"embedding_dim": 4, "bottom_mlp": (8, 8, 4), "top_mlp": (8, 8, 8, 8, 1), "table_rows": (10, 20)}
RULES = {"terabyte": "2.1.0", "terabyte-32768": "2.1.0", "dcnv2": "5.1.0"}


def complies(path, ruleset):
    mlp_compliance.enqueued_configs.clear()  # of a check that failed halfway
    checker = mlp_compliance.make_checker("training", ruleset, quiet=False, werror=True)
    valid, *_ = mlp_compliance.main(str(path), f"training_{ruleset}/common.yaml", checker)
    return valid


class Run:
    """A run with its log, as train.py has it."""

    def __init__(self, path, preset="terabyte", target=None, aucs=(0.5, 0.6, 0.7, 0.8), stop_at=None, goes_on=None):
        model = DLRMConfig(**SMALL, compression=3)
        if preset == "dcnv2":
            model = replace(model, interaction="cross", cross_layers=2, cross_rank=3)
        training = replace(
            PRESETS[preset].training,
            batch_size=16,
            learning_rate=0.01,
            epochs=2,
            evaluations_per_epoch=2,
            target_auc=target,
        )
        torch.manual_seed(0)
        self.log = MLLog(path, goes_on["position"] if goes_on else 0)
        self.log.begin(model, training, 70, 30, int(time.time() * 1e3))
        self.saved = {}
        self.scores = dict(zip((3, 5, 8, 10), aucs))
        self.stop_at = stop_at
        self.trainer = Trainer(
            DLRM(model),
            training,
            lambda epoch, start: [ROWS[a : a + 16] for a in range(16 * start, 70, 16)],
            70,
            self.evaluate,
            save=self.save,
            wants_to_stop=lambda: self.trainer.progress.step == stop_at,
            progress=Progress(**goes_on["progress"]) if goes_on else Progress(),
            mllog=self.log,
            show=False,
        )

    def evaluate(self):
        if self.stop_at == ("evaluation", self.trainer.progress.step):
            raise Stopped
        return {"auc": self.scores[self.trainer.progress.step], "log_loss": 0.5}

    def save(self, progress):
        self.saved[progress.step] = json.loads(
            json.dumps({"position": self.log.position(), "progress": asdict(progress)})
        )

    def train(self):
        try:
            self.trainer.train()
            target = self.trainer.config.target_auc
            self.log.run_stop(target is None or self.trainer.reached is not None)
        except Stopped:
            pass
        finally:
            self.log.close()
        return self


def events(path):
    lines = [json.loads(line.removeprefix(":::MLLOG ")) for line in path.read_text().splitlines()]
    return [(line["key"], line["value"], line["metadata"]) for line in lines]


def shape(path):
    """Keys from run_start on, with the epoch of each."""
    named = [
        (key, next((m[n] for n in ("epoch_num", "first_epoch_num") if n in m), None)) for key, _, m in events(path)
    ]
    return named[[key for key, _ in named].index("run_start") :]


WHOLE = [
    ("run_start", None),
    ("block_start", 1), ("epoch_start", 1),
    ("eval_start", 0.6), ("eval_accuracy", 0.6), ("eval_stop", 0.6),
    ("eval_start", 1.0), ("eval_accuracy", 1.0), ("eval_stop", 1.0),
    ("epoch_stop", 1), ("block_stop", 1),
    ("block_start", 2), ("epoch_start", 2),
    ("eval_start", 1.6), ("eval_accuracy", 1.6), ("eval_stop", 1.6),
    ("eval_start", 2.0), ("eval_accuracy", 2.0), ("eval_stop", 2.0),
    ("epoch_stop", 2), ("block_stop", 2),
    ("run_stop", None),
]  # fmt: skip


@pytest.mark.parametrize("preset", RULES)
def test_a_run_complies(tmp_path, preset, capsys):
    path = tmp_path / "logs" / "result_0.txt"
    Run(path, preset).train()
    assert complies(path, RULES[preset])
    assert shape(path) == WHOLE
    assert [value for key, value, _ in events(path) if key == "eval_accuracy"] == [0.5, 0.6, 0.7, 0.8]
    said = {key: value for key, value, _ in events(path)}
    assert said["submission_benchmark"] == ("dlrm_dcnv2" if preset == "dcnv2" else "dlrm")
    assert said["submission_division"] == "open"
    assert (said["train_samples"], said["eval_samples"], said["global_batch_size"]) == (70, 30, 16)
    training = PRESETS[preset].training
    assert said["opt_learning_rate_warmup_steps"] == training.warmup_steps
    if preset != "dcnv2":
        assert said["lr_decay_start_steps"] == training.decay_start
        assert said["sgd_opt_learning_rate_decay_steps"] == training.decay_steps
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("preset", ["terabyte", "dcnv2"])
def test_the_checker_finds_what_is_missing(tmp_path, preset, caplog):
    """So that complying says something."""
    caplog.set_level(logging.CRITICAL)
    path = tmp_path / "log.txt"
    Run(path, preset).train()
    lines = path.read_text().splitlines(keepends=True)
    needed = [
        "submission_benchmark", "submission_org", "submission_division", "submission_platform", "cache_clear",
        "init_start", "init_stop", "run_start", "run_stop", "eval_accuracy", "train_samples", "eval_samples",
    ]  # fmt: skip
    for key in needed:
        path.write_text("".join(line for line in lines if f'"key": "{key}"' not in line))
        assert not complies(path, RULES[preset]), key
    path.write_text("".join([*lines, lines[-1]]))
    assert not complies(path, RULES[preset]), "run_stop twice"


@pytest.mark.parametrize(
    ("target", "status", "last"),
    [(None, "success", (2.0, 2)), (0.55, "success", (1.0, 1)), (0.65, "success", (1.6, 2)), (0.9, "aborted", (2.0, 2))],
)
def test_the_end_says_whether_the_target_was_reached(tmp_path, target, status, last):
    path = tmp_path / "log.txt"
    Run(path, target=target).train()
    assert complies(path, "2.1.0")
    assert events(path)[-1][0] == "run_stop"
    assert events(path)[-1][2]["status"] == status
    epoch, block = last
    assert shape(path)[-4:-1] == [("eval_stop", epoch), ("epoch_stop", block), ("block_stop", block)]
    counts = Counter(key for key, _ in shape(path))
    assert counts["block_start"] == counts["block_stop"] == counts["epoch_start"] == counts["epoch_stop"] == block


STOPS = [1, 3, 5, 6, 10, ("evaluation", 3), ("evaluation", 5), ("evaluation", 10)]


@pytest.mark.parametrize("stop_at", STOPS, ids=str)
def test_a_run_that_was_stopped_has_the_log_of_one_that_was_not(tmp_path, stop_at):
    path = tmp_path / "log.txt"
    stopped = Run(path, stop_at=stop_at).train()
    step = stopped.trainer.progress.step
    assert "run_stop" not in dict(shape(path))
    Run(path, goes_on=stopped.saved[step]).train()
    assert complies(path, "2.1.0")
    assert shape(path) == WHOLE


@pytest.mark.parametrize("back_to", [0, 3, 5, 10])
def test_a_run_that_was_killed_has_the_log_of_one_that_was_not(tmp_path, back_to):
    """It goes on from a checkpoint after which more was logged, and half a line."""
    path = tmp_path / "log.txt"
    saved = Run(path).train().saved
    with open(path, "a") as file:
        file.write(':::MLLOG {"names')
    Run(path, goes_on=saved[back_to]).train()
    assert complies(path, "2.1.0")
    assert shape(path) == WHOLE


def test_a_new_run_has_nothing_of_the_old(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("an old log\n")
    Run(path).train()
    Run(path).train()
    assert shape(path) == WHOLE
    assert Counter(key for key, _, _ in events(path))["init_start"] == 1


def test_a_file_that_is_not_the_log_of_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"log.txt: not the log of this run: expected at least 500 bytes, got 0"):
        MLLog(tmp_path / "log.txt", 500)
    assert not (tmp_path / "log.txt").exists()
