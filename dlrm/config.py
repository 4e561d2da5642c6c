"""The hyperparameters of a DLRM and of its training."""

import reprlib
from dataclasses import asdict, dataclass
from typing import Any

from robe_json import from_json

EMBEDDINGS = ("robe", "full", "hash")
OPTIMIZERS = ("sgd", "adagrad", "adam")
INTERACTIONS = ("dot", "cross")
# Ids of each feature in MLPerf's DLRM-DCNv2, 214 in all.
MLPERF_HOTS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)

# Beyond any use. A config that was damaged, or is an attack, must not make torch count beyond 64 bits or for hours.
_MOST_WIDTH, _MOST_LAYERS, _MOST_TABLES, _MOST_FLOATS = 1 << 20, 1000, 1 << 16, 1 << 60
_LEAST_RATE = 1e-7  # where the decay ends, as in facebookresearch/dlrm


@dataclass(frozen=True)
class DLRMConfig:
    """The hyperparameters of a model, from which alone it is rebuilt; every checkpoint has them.

    ``compression`` is relative to the weights of the full tables, sum(table_rows) * embedding_dim. "full" and "hash"
    have a table per feature, read at row ``id % rows``. "hash" caps the rows of all tables at one number, the largest
    that reaches the compression.
    """

    embedding_dim: int  # D; also the width of the bottom MLP's output, which interacts with the embeddings
    bottom_mlp: tuple[int, ...]  # width after each layer
    top_mlp: tuple[int, ...]  # width after each layer; the last one is 1, the logit
    table_rows: tuple[int, ...]  # rows of the full table of each categorical feature
    num_dense: int = 13
    interaction: str = "dot"  # "dot": the products of all pairs; "cross": DCNv2's low-rank cross net
    cross_layers: int = 3  # cross: the number of layers
    cross_rank: int = 512  # cross: the rank of their matrices
    hots: tuple[int, ...] | None = None  # ids of each feature in a row, whose embeddings are summed; None: one each
    synthetic_hots: bool = False  # the data has one id a feature, and the model makes the others from it
    embedding: str = "robe"  # "robe", "full" or "hash"
    compression: float | None = 1000.0  # robe, hash: full weights over weights kept; None with robe_size
    robe_size: int | None = None  # robe: weights in the array, instead of compression
    block_size: int | None = None  # robe: Z; None: embedding_dim, so that an id is one read
    sign: bool = False  # robe: hashed signs
    hash_seed: int = 0  # robe: seed of the hash
    admission_bytes: int = 0  # robe: size of the admission's filter (robe.Admission); 0: no admission
    init_std: float | None = None  # robe: standard deviation of the initial weights; None: RobeArray's default
    vocabulary: bool = False  # full: a row for each id in the training data, and one for all other ids

    def __post_init__(self):
        self._check_layers()
        self._check_ids()
        self._check_embedding()
        self._check_admission()

    def _check_layers(self) -> None:
        _check_width("embedding_dim", self.embedding_dim)
        _check_width("num_dense", self.num_dense)
        for name in ("bottom_mlp", "top_mlp"):
            widths = getattr(self, name)
            _check(len(widths) <= _MOST_LAYERS, name, f"at most {_MOST_LAYERS} layers", len(widths))
            for width in widths:
                _check_width(name, width)
        _check(
            len(self.bottom_mlp) >= 1 and self.bottom_mlp[-1] == self.embedding_dim,
            "bottom_mlp",
            f"widths that end with embedding_dim {self.embedding_dim}",
            self.bottom_mlp,
        )
        _check(len(self.top_mlp) >= 1 and self.top_mlp[-1] == 1, "top_mlp", "widths that end with 1", self.top_mlp)
        _check(self.interaction in INTERACTIONS, "interaction", f"one of {', '.join(INTERACTIONS)}", self.interaction)
        _check(self.cross_layers >= 1, "cross_layers", "at least 1", self.cross_layers)
        _check(self.cross_layers <= _MOST_LAYERS, "cross_layers", f"at most {_MOST_LAYERS}", self.cross_layers)
        _check_width("cross_rank", self.cross_rank)

    def _check_ids(self) -> None:
        tables = len(self.table_rows)
        _check(
            tables >= 1 and min(self.table_rows) >= 1, "table_rows", "tables of at least 1 row each", self.table_rows
        )
        _check(tables <= _MOST_TABLES, "table_rows", f"at most {_MOST_TABLES} tables", tables)
        _check(self.full_floats < _MOST_FLOATS, "table_rows", f"less than {_MOST_FLOATS} weights", self.full_floats)
        most_hots = max(self.hots or (1,))
        _check(most_hots <= _MOST_WIDTH, "hots", f"at most {_MOST_WIDTH} ids a feature", most_hots)
        _check(
            self.hots is None or (len(self.hots) == tables and min(self.hots) >= 1),
            "hots",
            f"{tables} numbers from 1",
            self.hots,
        )
        _check(
            not self.synthetic_hots or (self.hots is not None and not self.vocabulary),
            "synthetic_hots",
            "hots with it, and no vocabulary",
            self.hots,
        )

    def _check_embedding(self) -> None:
        robe = self.embedding == "robe"
        _check(self.embedding in EMBEDDINGS, "embedding", f"one of {', '.join(EMBEDDINGS)}", self.embedding)
        if self.embedding != "full":
            sizes = (self.compression is not None) + (self.robe_size is not None)
            _check(sizes == 1, "compression and robe_size", "exactly one of them", sizes or "neither")
        _check(self.compression is None or self.compression > 0, "compression", "a positive number", self.compression)
        _check(
            not robe or self.compression is None or self.compression > 1,
            "compression",
            "more than 1 (at 1 ROBE is the full tables: embedding='full')",
            self.compression,
        )
        _check(self.robe_size is None or 1 <= self.robe_size < _MOST_FLOATS, "robe_size", "at least 1", self.robe_size)
        _check(self.init_std is None or self.init_std >= 0, "init_std", "at least 0", self.init_std)
        _check(
            self.block_size is None or 1 <= self.block_size < _MOST_FLOATS, "block_size", "at least 1", self.block_size
        )
        _check(robe or self.robe_size is None, "robe_size", "embedding='robe' with it", self.embedding)
        _check(
            not self.vocabulary or self.embedding == "full", "vocabulary", "embedding='full' with it", self.embedding
        )

    def _check_admission(self) -> None:
        count = self.admission_bytes
        _check(count >= 0 and count % 8 == 0, "admission_bytes", "a multiple of 8", count)
        _check(count < _MOST_FLOATS, "admission_bytes", f"less than {_MOST_FLOATS}", count)
        _check(self.embedding == "robe" or not count, "admission_bytes", "embedding='robe' with it", self.embedding)
        if count:
            left = int(self.full_floats / (self.compression or 1)) * 4
            expected = f"less than the {left} bytes that compression leaves"
            _check(self.array_floats >= 1, "admission_bytes", expected, count)

    @property
    def data_hots(self) -> tuple[int, ...] | None:
        """Ids of each feature in a row of the data; None: one each."""
        return None if self.synthetic_hots else self.hots

    @property
    def num_ids(self) -> int:
        """H, the ids in a row of the data."""
        return len(self.table_rows) if self.data_hots is None else sum(self.data_hots)

    @property
    def feature_of_id(self) -> list[int]:
        """The feature of each id that is embedded in a row, in the order of the ids."""
        hots = self.hots or (1,) * len(self.table_rows)
        return [feature for feature, hot in enumerate(hots) for _ in range(hot)]

    @property
    def full_floats(self) -> int:
        """Weights in the full tables."""
        return sum(self.table_rows) * self.embedding_dim

    @property
    def array_floats(self) -> int:
        """robe: weights in the array. The array and the filter share what compression leaves."""
        if self.robe_size is not None:
            return self.robe_size
        return int(self.full_floats / (self.compression or 1)) - self.admission_bytes // 4

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DLRMConfig":
        """Return the config of ``to_dict``, also after JSON.

        Raises:
            ValueError: values are unknown, missing or impossible.
        """
        return _from_dict(cls, values)


@dataclass(frozen=True)
class TrainingConfig:
    """The hyperparameters of training."""

    batch_size: int  # rows of a step, in all processes together
    learning_rate: float
    optimizer: str  # "sgd", "adagrad" or "adam"
    epochs: int  # one too many does no harm: the weights with the best validation AUC are kept
    evaluations_per_epoch: int = 4
    target_auc: float | None = None  # training ends with the first evaluation above it
    warmup_steps: int = 0  # steps over which the learning rate grows linearly
    decay_start: int = 0  # step after which the learning rate falls quadratically
    decay_steps: int = 0  # steps over which it falls; 0: it stays constant
    adagrad_eps: float = 1e-10  # torch's; MLPerf's DCNv2 has 1e-8
    seed: int = 0  # of initial values and shuffling
    averaging_steps: int = 0  # steps over which the weights are averaged to evaluate and keep them; 0: the last weights
    prune: float = 0.0  # share of the blocks of the MLPs' and the cross net's weights that become zero
    prune_block: int = 16  # outputs of a block; the Predictor leaves out zeros of 16 and of 32
    prune_schedule: tuple[float, ...] = (0.2, 0.6)  # epochs after which pruning starts, and is done

    def __post_init__(self):
        _check(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}", self.optimizer)
        _check(self.learning_rate > 0, "learning_rate", "a positive number", self.learning_rate)
        _check(self.adagrad_eps > 0, "adagrad_eps", "a positive number", self.adagrad_eps)
        for name in ("batch_size", "epochs", "evaluations_per_epoch"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("warmup_steps", "decay_start", "decay_steps", "averaging_steps"):
            _check(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _check(
            not self.decay_steps or self.decay_start >= self.warmup_steps,
            "decay_start",
            f"at least warmup_steps {self.warmup_steps}",
            self.decay_start,
        )
        _check(0 <= self.prune < 1, "prune", "0 or more, and below 1", self.prune)
        _check(self.prune_block >= 1, "prune_block", "at least 1", self.prune_block)
        schedule = self.prune_schedule
        _check(
            len(schedule) == 2 and 0 <= schedule[0] < schedule[1],
            "prune_schedule",
            "two numbers of epochs, the first at least 0 and below the second",
            schedule,
        )
        _check(
            not self.prune or schedule[1] <= self.epochs,
            "prune_schedule",
            f"its end within the {self.epochs} epochs",
            schedule[1],
        )
        _check(self.target_auc is None or 0 < self.target_auc < 1, "target_auc", "between 0 and 1", self.target_auc)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step.

        The schedule of MLPerf's large-batch DLRM: learning_rate times step / warmup_steps, then times 1, then times
        ((decay_start + decay_steps - step) / decay_steps) ** 2. It stays at the last value above zero.

        Args:
            step: counted from 1.
        """
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.decay_steps and step >= self.decay_start:
            left = max(self.decay_start + self.decay_steps - step, 1)
            return max(self.learning_rate * (left / self.decay_steps) ** 2, _LEAST_RATE)
        return self.learning_rate

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingConfig":
        """Return the config of ``to_dict``, also after JSON.

        Raises:
            ValueError: values are unknown, missing or impossible.
        """
        return _from_dict(cls, values)


def _check_width(name: str, width: int) -> None:
    _check(width >= 1, name, "at least 1", width)
    _check(width <= _MOST_WIDTH, name, f"at most {_MOST_WIDTH}", width)


def _check(holds: bool, name: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _from_dict(cls, values):
    if not isinstance(values, dict):
        raise ValueError(f"expected the fields of {cls.__name__}, got {reprlib.repr(values)}")
    return from_json(values, cls)
