"""The options of a training run, and the configs that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from dlrm.config import MLPERF_HOTS, DLRMConfig, TrainingConfig
from dlrm.presets import PRESETS
from robe_json import from_json

# Options that may change when a run is resumed.
_FREE = {"data", "eval_data", "epochs", "learning_rate", "target_auc"}
_PATHS = ("data", "eval_data", "mllog")
_TRAINING = (
    "epochs", "target_auc", "batch_size", "learning_rate", "warmup_steps", "decay_start", "decay_steps", "optimizer",
    "averaging_steps", "evaluations_per_epoch", "prune", "prune_block", "prune_schedule",
)  # fmt: skip
_VOCABULARY_BITS = 32


@dataclass(frozen=True)
class RunOptions:
    """The options of train.py that say what is trained and how. None: as the preset has it, or not used."""

    data: Path
    eval_data: Path | None = None
    preset: str = "kaggle"
    embedding: str = "robe"
    compression: float | None = None
    robe_size: int | None = None
    block_size: int | None = None
    init_std: float | None = None
    admission: float | None = None
    admit_after: int | None = None
    table_rows: str = "preset"  # "preset" or "data"
    synthetic_hots: bool | None = None
    seed: int = 0
    epochs: int | None = None
    target_auc: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    decay_start: int | None = None
    decay_steps: int | None = None
    averaging_steps: int | None = None
    optimizer: str | None = None
    evaluations_per_epoch: int | None = None
    prune: float | None = None
    prune_block: int | None = None
    prune_schedule: tuple[float, ...] | None = None
    mllog: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the options for JSON; paths are absolute, so that a run can be resumed from another folder."""
        return {name: str(x.absolute()) if isinstance(x, Path) else x for name, x in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunOptions":
        """Return the inverse of ``to_dict``. Options that were added since are taken as not given.

        Raises:
            ValueError: an option is unknown or of another type.
        """
        types: dict[str, Any] = get_type_hints(cls)
        given: dict[str, Any] = {}
        for name, value in values.items():
            if name not in types:
                raise ValueError(f"{name}: not an option of a run")
            value = from_json(value, str | None if name in _PATHS else types[name], name)  # type: ignore[arg-type]
            given[name] = Path(value) if name in _PATHS and value else value
        if not given.get("data"):
            raise ValueError("data: expected text, got nothing")
        return cls(**given)


def merge_options(given: Mapping[str, Any], started: RunOptions | None) -> RunOptions:
    """Return the options of a run.

    Args:
        given: options by name; None: not given.
        started: the options that the run was started with; None: it starts now.

    Raises:
        ValueError: the run needs an option that is not given, or a given one differs from what it was started with.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if started is None:
        if "data" not in given:
            raise ValueError("--data: expected to start a run, and there is no checkpoint to resume from")
        return RunOptions(**given)
    for name, value in given.items():
        before = getattr(started, name)
        free = name in _FREE or (name == "mllog" and before)  # the log may have moved, but not begin in the middle
        if not free and value != before:
            was = "was not given" if before is None else f"was {before}"
            raise ValueError(
                f"--{name.replace('_', '-')}: {value}, but {was} when this run was started; leave it out, or start "
                "another run"
            )
    return replace(started, **given)


def training_config(options: RunOptions, started: TrainingConfig | None) -> TrainingConfig:
    """Return how a run is trained.

    Args:
        options: of the run.
        started: the config of a run that is resumed; None: the preset's is the base.
    """
    changes = {name: getattr(options, name) for name in _TRAINING if getattr(options, name) is not None}
    return replace(started or PRESETS[options.preset].training, seed=options.seed, **changes)


def model_config(
    options: RunOptions, hots: tuple[int, ...] | None, vocabulary: Sequence[np.ndarray] | None
) -> DLRMConfig:
    """Return the model of a new run. Its admission has all the bytes it may take.

    Args:
        options: of the run.
        hots: ids of each feature in a row of the data; None: one each.
        vocabulary: the ids of each feature in the training rows, ascending, with --table-rows data; otherwise None.

    Raises:
        ValueError: options do not fit together, or not the data.
    """
    _check_options(options, hots)
    changes: dict[str, Any] = {
        "embedding": options.embedding,
        "block_size": options.block_size,
        "init_std": options.init_std,
        "hash_seed": options.seed,
        "hots": hots,
    }
    if options.synthetic_hots:
        changes |= {"hots": MLPERF_HOTS, "synthetic_hots": True}
    if options.embedding == "full":
        changes["compression"] = None
    elif options.robe_size is not None:
        changes |= {"compression": None, "robe_size": options.robe_size}
    elif options.compression is not None:
        changes["compression"] = options.compression
    if vocabulary is not None:
        changes["table_rows"] = tuple(len(ids) + 1 for ids in vocabulary)  # one more for ids that are not in them
        changes["vocabulary"] = options.embedding == "full"
        if changes["vocabulary"] and max(int(ids[-1]) for ids in vocabulary) >= 1 << _VOCABULARY_BITS:
            raise ValueError(f"--table-rows data: expected ids of {_VOCABULARY_BITS} bits for --embedding full")
    config = replace(PRESETS[options.preset].model, **changes)
    if options.admission is not None:
        words = max(int(4 * options.admission * config.array_floats) // 8, 1)
        config = replace(config, admission_bytes=8 * words)
    return config


def _check_options(options: RunOptions, hots: tuple[int, ...] | None) -> None:
    if options.embedding == "full" and (options.compression is not None or options.robe_size is not None):
        raise ValueError("--compression and --robe-size: the full tables are not compressed; leave them out")
    share = options.admission
    if share is not None and (options.embedding != "robe" or not 0 < share < 1):
        raise ValueError(f"--admission: expected a share between 0 and 1, of --embedding robe, got {share}")
    if share is None and options.admit_after is not None:
        raise ValueError("--admit-after: expected --admission with it, which sets the memory of the filter")
    if options.synthetic_hots and hots is not None:
        raise ValueError("--synthetic-hots: the data has several ids a feature already; leave it out")
