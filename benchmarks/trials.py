"""Training runs of methods at equal memory, for benchmarks.accuracy to compare.

Not a program: benchmarks.accuracy runs the trials.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.peers import HashTrick, QuotientRemainder
from benchmarks.variants import Counts, Variant, project
from data.batches import split_rows
from data.formats.opening import open_source
from data.rows import Batch, to_batch
from data.synthetic import Signal
from dlrm.config import TrainingConfig
from dlrm.embeddings import VocabularyTables
from dlrm.inference.predictor import array_bytes
from dlrm.metrics import evaluate
from dlrm.model import DLRM
from dlrm.presets import PRESETS
from dlrm.training.optimizers import make_optimizers
from dlrm.training.trainer import Progress, Stopped, Trainer
from robe import Admission, EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.array import INIT_STD
from robe.hashing import table_key
from robe.optim import Adam as RobeAdam

DIM = 16  # the kaggle preset
EPOCHS = 6
INT8_GROUP = 64  # weights that share a scale in an int8 array
FILTER_SHARE = 0.125  # most of the memory that the filter of an admission takes


class Parts(NamedTuple):
    """Ranges of rows."""

    train: range
    validation: range
    test: range


class TrialData:
    """Labelled rows in memory, and the facts about the training part that methods are told.

    Args:
        batch: all rows as one batch.
        best: AUC of the true probabilities on the test rows; None if they are not known.

    Attributes:
        parts: 5/7 of the rows to train, 1/7 to validate, 1/7 to test.
        counts: of the ids in the training rows.
        vocabulary: the ids of each feature in the training rows.
        table_rows: rows of each full table: one for each of these ids, and one for all others.
        full_bytes: memory of the full tables.
    """

    def __init__(self, batch: Batch, best: float | None):
        self.batch, self.best = batch, best
        self.parts = Parts(*split_rows(len(batch)))
        for part in (self.parts.validation, self.parts.test):
            if len(np.unique(batch.labels[part.start : part.stop])) < 2:
                raise ValueError(
                    f"rows: expected both labels to compare AUC, got one in rows {part.start} to {part.stop}"
                )
        self.counts = Counts(torch.from_numpy(batch.sparse[: len(self.parts.train)]))
        self.vocabulary = self.counts.ids
        self.table_rows = tuple(len(ids) + 1 for ids in self.vocabulary)
        self.full_bytes = 4 * DIM * sum(self.table_rows)

    @classmethod
    def read(cls, path: Path) -> "TrialData":
        """Read all rows of a file or folder."""
        source = open_source(path)
        return cls(Batch.concatenate(list(tqdm(source.read(0, None), desc=path.name, leave=False))), None)

    @classmethod
    def generate(cls, rows: int) -> "TrialData":
        """Generate rows."""
        signal = Signal(0)
        pieces = [to_batch(some) for some in tqdm(signal.records(rows), desc="generating", leave=False)]
        batch = Batch.concatenate(pieces)
        test = batch[Parts(*split_rows(rows)).test.start :]
        assert test.labels is not None
        return cls(batch, float(roc_auc_score(test.labels, signal.logits(test.dense, test.sparse))))

    def batches(self, rows: range, size: int) -> Iterator[Batch]:
        """Yield batches of at most ``size`` rows, in order."""
        for start in range(rows.start, rows.stop, size):
            yield self.batch[start : min(start + size, rows.stop)]

    def train_batches(self, size: int, seed: int, epoch: int, rows: int) -> Iterator[Batch]:
        """Yield batches of training rows in random order, each once before any comes again.

        Args:
            size: rows of a batch.
            seed: of the order.
            epoch: a number that changes the order.
            rows: in all batches together.
        """
        count = len(self.parts.train)
        orders = [np.random.default_rng([seed, epoch + k]).permutation(count) for k in range(-(-rows // count))]
        order = np.concatenate(orders)[:rows]
        for start in range(0, rows, size):
            yield self.batch[order[start : start + size]]


@dataclass(frozen=True)
class Trial:
    """The options of a training run. With the rows and the seed, they determine its result.

    Attributes:
        method: one of METHODS.
        compression: times less memory than the full tables.
        rate: learning rate.
        init: times the method's own initial scale.
        decay: L2 decay of the weights of MLPs and arrays, as in torch.optim.Adam.
        averaging: steps of the moving average of the weights; 0: none.
        epochs: at most. Below 2, training is one piece with two evaluations.
        options: of the embeddings, beyond the method's own.
    """

    method: str
    compression: float = 1.0
    rate: float = 1e-3
    init: float = 1.0
    decay: float = 0.0
    averaging: int = 500
    epochs: float = EPOCHS
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """The options as JSON: the name of the trial in files."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["epochs"] = int(self.epochs) if self.epochs == int(self.epochs) else self.epochs
        return json.dumps(values, sort_keys=True)


def robe(data: TrialData, trial: Trial, seed: int, **options: Any) -> nn.Module:
    """Build ROBE in data.full_bytes / compression bytes, the filter of an admission included.

    Args:
        data: the rows.
        trial: names the compression and more options.
        seed: of the hash and the initial weights.
        options: of RobeEmbeddingBagCollection and of Variant; and ``int8``, for an array that will be rounded;
            ``admit``, the share of the memory that an admission's filter takes at most; ``labelled``, whether its ids
            are chosen by labels rather than counts; ``times`` and ``rounds`` of Admission.choose.
    """
    options |= {name: value for name, value in trial.options if name not in OF_TRAINING}
    variant = {name: options.pop(name) for name in list(options) if name in OF_VARIANTS}
    memory = data.full_bytes / trial.compression
    weight_bytes = 1 + 4 / INT8_GROUP if options.pop("int8", False) else 4
    linear = options.get("hash") == "linear"  # its tables lie one behind the other, so they must end
    tables = [EmbeddingBagConfig(f"cat_{i}", 1 << 32 if linear else None, DIM) for i in range(len(data.table_rows))]
    choice = {name: options.pop(name) for name in ("admit", "labelled", "times", "rounds") if name in options}
    admission = None
    if choice.get("admit"):
        admission = choose_ids(data, seed, int(memory * choice.pop("admit")), **choice)
        memory -= admission.bytes
    if "tier" in options:
        variant["tier"] = data.counts.most_frequent(int(memory * options.pop("tier")) // (4 * DIM))
    if "small_tables" in options:
        variant["tier"] = data.counts.of_small_tables(options.pop("small_tables"))
    memory -= 4 * DIM * sum(map(len, variant.get("tier", ())))
    layer = RobeEmbeddingBagCollection(
        tables,
        robe_size=int((memory - (4 if weight_bytes < 4 else 0)) / weight_bytes),  # the last group has a scale too
        seed=seed,
        init_std=INIT_STD * trial.init,
        admission=admission,
        **options,
    )
    if linear:  # the authors' initial values
        bound = trial.init * max(data.table_rows) ** -0.5
        nn.init.uniform_(layer.array.weight, -bound, bound)
    return Variant(layer, data.counts, **variant) if variant else layer


def choose_ids(data: TrialData, seed: int, filter_bytes: int, labelled: bool = True, **choice: Any) -> Admission:
    """Choose the ids that get embeddings of their own, from the training rows."""

    def read() -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in data.batches(data.parts.train, 1 << 16):
            assert batch.labels is not None
            labels = torch.from_numpy(batch.labels).unsqueeze(1) if labelled else None
            yield torch.from_numpy(batch.sparse), labels

    keys = torch.tensor([table_key(seed, i) for i in range(len(data.table_rows))])
    return Admission.choose(read, keys, filter_bytes, **choice)


def full_tables(data: TrialData, trial: Trial, seed: int) -> nn.Module:
    """Build a table for each feature, with a row for each id of the training rows."""
    return scaled(VocabularyTables(data.table_rows, DIM, data.vocabulary), trial)


def hash_trick(data: TrialData, trial: Trial, seed: int) -> nn.Module:
    """Build tables of the hashing trick."""
    return scaled(HashTrick(data.table_rows, DIM, trial.compression), trial)


def quotient_remainder(data: TrialData, trial: Trial, seed: int) -> nn.Module:
    """Build tables of quotients and remainders."""
    return scaled(QuotientRemainder(data.table_rows, DIM, trial.compression), trial)


def scaled(layer: nn.Module, trial: Trial) -> nn.Module:
    """Multiply the initial weights of a layer by trial.init."""
    with torch.no_grad():
        for weight in layer.parameters():
            weight *= trial.init
    return layer


# Options of a trial that go to Variant, and to the training; the others go to the collection.
OF_VARIANTS = ("gain", "soft", "zero", "twice", "table_scale", "sharing")
OF_TRAINING = ("array_rate", "touched", "optimizer", "project")
FULL, ADMISSION = "full tables", "ROBE + admission"
METHODS: dict[str, Callable[[TrialData, Trial, int], nn.Module]] = {
    FULL: full_tables,
    "hash trick": hash_trick,
    "QR": quotient_remainder,
    "ROBE, authors'": partial(robe, hash="linear"),
    **{f"ROBE, Z={z}": partial(robe, block_size=z) for z in (1, 4, 8, 16)},
    ADMISSION: partial(robe, admit=FILTER_SHARE),
    f"{ADMISSION}, Z=1": partial(robe, admit=FILTER_SHARE, block_size=1),
    f"{ADMISSION}, int8": partial(robe, admit=2 * FILTER_SHARE, int8=True),
    "ROBE, authors', int8": partial(robe, hash="linear", int8=True),
}


def run(data: TrialData, trial: Trial, seed: int, batch_size: int) -> dict[str, Any]:
    """Train once, and score the weights with the best validation AUC on the test rows.

    Returns:
        auc, log_loss, validation_auc, best_epoch, history (epoch and validation AUC of each evaluation), bytes of the
        embeddings, and seconds.
    """
    start = time.perf_counter()
    before = None
    if dict(trial.options).get("project"):
        before, _ = fit(data, Trial(FULL, averaging=trial.averaging), seed, batch_size)
    model, progress = fit(data, trial, seed, batch_size, before)
    embeddings = model.embeddings
    if "int8" in trial.method:
        embeddings.array = embeddings.array.quantized(INT8_GROUP)
    scores = evaluate(model, data.batches(data.parts.test, 4096))
    return {
        "auc": scores["auc"],
        "log_loss": scores["log_loss"],
        "validation_auc": progress.best["auc"],
        "best_epoch": progress.best["epoch"],
        "history": [(point["epoch"], point["auc"]) for point in progress.history],
        "bytes": kept_bytes(embeddings),
        "seconds": time.perf_counter() - start,
    }


def kept_bytes(embeddings: nn.Module) -> int:
    """Return the memory of all that is kept of embeddings, except the dictionary of full tables."""
    layer = embeddings.layer if isinstance(embeddings, Variant) else embeddings
    if not isinstance(layer, RobeEmbeddingBagCollection):
        return 4 * sum(p.numel() for p in embeddings.parameters())
    added = sum(p.numel() for p in embeddings.parameters()) - sum(p.numel() for p in layer.parameters())
    return array_bytes(layer) + 4 * added


def fit(data: TrialData, trial: Trial, seed: int, batch_size: int, before: DLRM | None = None) -> tuple[DLRM, Progress]:
    """Train once. Returns the model with the weights of the best validation AUC, and the trainer's progress.

    Args:
        data: the rows.
        trial: how to train.
        seed: of hash, initial weights and order of the rows.
        batch_size: rows in a step.
        before: a trained model with full tables to start from.
    """
    torch.manual_seed(seed)
    preset = PRESETS["kaggle"]
    config = replace(preset.model, table_rows=data.table_rows, embedding="full", compression=None)
    model = DLRM(config, METHODS[trial.method](data, trial, seed))
    if before is not None:
        start_from(model, before, data)
    unit = trial.epochs if trial.epochs < 2 else 1.0  # epochs of the data in one of the trainer's
    rows_in_unit = round(unit * len(data.parts.train))
    training = replace(
        preset.training,
        batch_size=batch_size,
        learning_rate=trial.rate,
        optimizer=dict(trial.options).get("optimizer", "adam"),
        epochs=round(trial.epochs / unit),
        evaluations_per_epoch=2,
        averaging_steps=trial.averaging,
        seed=seed,
    )
    best: dict[str, Tensor] = {}
    trainer = Trainer(
        model,
        training,
        lambda epoch, start: data.train_batches(batch_size, seed, epoch, rows_in_unit),
        rows_in_unit,
        evaluate=lambda: evaluate(model, data.batches(data.parts.validation, 4096)),
        keep=lambda: best.update({name: p.detach().clone() for name, p in model.named_parameters()}),
        optimizers=trial_optimizers(model, training, trial),
        show=False,
        wants_to_stop=lambda: is_past_its_best(trainer.progress.history),
    )
    with suppress(Stopped):
        trainer.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(best[name])
    for point in trainer.progress.history:
        point["epoch"] *= unit
    return model, trainer.progress


def start_from(model: DLRM, before: DLRM, data: TrialData) -> None:
    """Copy the MLPs of a model with full tables, and project its tables onto the array."""
    tables = [table[:-1] for table in before.embeddings.weight.detach().split(list(data.table_rows))]
    project(model.embeddings, data.counts, tables)
    model.bottom.load_state_dict(before.bottom.state_dict())
    model.top.load_state_dict(before.top.state_dict())


def trial_optimizers(model: DLRM, training: TrainingConfig, trial: Trial) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a trial: the program's, or those of its options."""
    options = dict(trial.options)
    if "array_rate" in options:
        arrays = {id(p) for p in model.embeddings.parameters()}
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in arrays]},
            {"params": list(model.embeddings.parameters()), "lr": options["array_rate"] * trial.rate},
        ]
        return [torch.optim.Adam(groups, lr=trial.rate)]
    if options.get("touched"):
        array = model.embeddings.array
        rest = [p for p in model.parameters() if p is not array.weight]
        return [torch.optim.Adam(rest, lr=trial.rate), RobeAdam(array, lr=trial.rate)]
    optimizers = make_optimizers(model, training)
    optimizers[0].param_groups[0]["weight_decay"] = trial.decay
    return optimizers


def is_past_its_best(history: list[dict[str, float]]) -> bool:
    """Return whether the last epoch's two evaluations are both below the best one before."""
    aucs = [point["auc"] for point in history]
    return len(aucs) > 2 and max(aucs[-2:]) < max(aucs[:-2])
