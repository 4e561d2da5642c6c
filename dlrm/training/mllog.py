"""The log of a run in MLPerf's format, in the Open division, since ROBE changes the model.

It passes the compliance checker of the mlperf-logging package, with rulesets 2.1.0 (benchmark dlrm) and 5.1.0
(dlrm_dcnv2):

    python -m mlperf_logging.compliance_checker --usage training --ruleset 2.1.0 FILE
"""

import logging
import os
import platform
from pathlib import Path
from typing import Any

from dlrm.config import DLRMConfig, TrainingConfig
from dlrm.training.journal import open_at


class MLLog:
    """Writes the events of a run. Methods are called in the order in which they are defined, from ``begin`` on.

    Args:
        path: of the file.
        size: what ``position`` returned for the checkpoint that the run is resumed from; what was written after it is
            removed. 0: a new run.

    Raises:
        OSError: the file can't be written.
        ValueError: the file is not the log of that run.
    """

    def __init__(self, path: Path, size: int = 0):
        from mlperf_logging.mllog import constants
        from mlperf_logging.mllog.mllog import MLLogger

        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise ValueError(f"{path}: not the log of this run: expected at least {size} bytes, got {found}")
        self._file = open_at(path, size)
        logger = logging.Logger(__name__, logging.INFO)  # not getLogger's, which would outlive the file
        logger.addHandler(logging.StreamHandler(self._file))
        self._log, self._names = MLLogger(logger, root_dir=str(Path(__file__).parents[2])), constants
        self._goes_on = size > 0

    def position(self) -> int:
        """Flush everything to the disk, and return the size of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def begin(
        self, model: DLRMConfig, training: TrainingConfig, train_samples: int, eval_samples: int, init_start_ms: int
    ) -> None:
        """Log that model and data are ready, and training starts. A resumed run writes nothing.

        Args:
            model: what is trained.
            training: how.
            train_samples: training rows.
            eval_samples: validation rows.
            init_start_ms: when the program started, before it read any data; milliseconds since 1970.
        """
        if self._goes_on:
            return
        log, names = self._log, self._names
        dot = model.interaction == "dot"
        log.event(names.CACHE_CLEAR, True, time_ms=init_start_ms)
        log.start(names.INIT_START, time_ms=init_start_ms)
        log.event(names.SUBMISSION_BENCHMARK, "dlrm" if dot else "dlrm_dcnv2")
        log.event(names.SUBMISSION_ORG, "robe-dlrm")
        log.event(names.SUBMISSION_DIVISION, "open")
        log.event(names.SUBMISSION_STATUS, "research")
        log.event(names.SUBMISSION_PLATFORM, f"{platform.machine()} {platform.system()}")
        log.event(names.SEED, training.seed)
        log.event(names.GLOBAL_BATCH_SIZE, training.batch_size)
        log.event(names.GRADIENT_ACCUMULATION_STEPS, 1)
        log.event(names.TRAIN_SAMPLES, train_samples)
        log.event(names.EVAL_SAMPLES, eval_samples)
        log.event(names.OPT_NAME, training.optimizer)
        log.event(names.OPT_BASE_LR, training.learning_rate)
        log.event(names.OPT_LR_WARMUP_STEPS, training.warmup_steps)
        for name, value in self._schedule(dot, training).items():
            log.event(name, value)
        if dot:
            of_mlps = [
                f"{part}_mlp_dense{i + 1}"
                for part, widths in (("bottom", model.bottom_mlp), ("top", model.top_mlp))
                for i in range(len(widths))
            ]
            for tensor in ["embeddings", *of_mlps]:
                log.event(names.WEIGHTS_INITIALIZATION, None, {"tensor": tensor})
        log.end(names.INIT_STOP)
        log.start(names.RUN_START)

    def _schedule(self, dot: bool, training: TrainingConfig) -> dict[str, Any]:
        if dot:
            return {
                "lr_decay_start_steps": training.decay_start,
                "sgd_opt_base_learning_rate": training.learning_rate,
                "sgd_opt_learning_rate_decay_steps": training.decay_steps,
                "sgd_opt_learning_rate_decay_poly_power": 2,
            }
        return {
            "opt_adagrad_learning_rate_decay": 0,
            "opt_weight_decay": 0,
            "opt_adagrad_initial_accumulator_value": 0,
            "opt_adagrad_epsilon": training.adagrad_eps,
            "opt_learning_rate_decay_start_step": training.decay_start,
            "opt_learning_rate_decay_steps": training.decay_steps,
        }

    def epoch_start(self, epoch: int) -> None:
        """Log the start of an epoch.

        Args:
            epoch: counted from 1.
        """
        names = self._names
        self._log.start(names.BLOCK_START, None, {names.FIRST_EPOCH_NUM: epoch, names.EPOCH_COUNT: 1})
        self._log.start(names.EPOCH_START, None, {names.EPOCH_NUM: epoch})

    def evaluation(self, epoch: float, auc: float | None, start_ms: int) -> None:
        """Log an evaluation once it is done. One that was interrupted is not logged: a resumed run repeats it.

        Args:
            epoch: epochs done, with a fraction.
            auc: on the validation rows; None where their labels are all the same.
            start_ms: when it started; milliseconds since 1970.
        """
        self._log.start(self._names.EVAL_START, None, {self._names.EPOCH_NUM: epoch}, time_ms=start_ms)
        self._log.event(self._names.EVAL_ACCURACY, auc, {self._names.EPOCH_NUM: epoch})
        self._log.end(self._names.EVAL_STOP, None, {self._names.EPOCH_NUM: epoch})

    def epoch_stop(self, epoch: int) -> None:
        """Log the end of an epoch, after its last step or where the run ends.

        Args:
            epoch: counted from 1.
        """
        self._log.end(self._names.EPOCH_STOP, None, {self._names.EPOCH_NUM: epoch})
        self._log.end(self._names.BLOCK_STOP, None, {self._names.FIRST_EPOCH_NUM: epoch})

    def run_stop(self, success: bool) -> None:
        """Log the end of the run.

        Args:
            success: whether the target was reached, or there was none.
        """
        names = self._names
        self._log.end(names.RUN_STOP, None, {names.STATUS: names.SUCCESS if success else names.ABORTED})
