"""A training run of a method at equal memory: what benchmarks.accuracy compares."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
INT8_GROUP = 64  # weights of an array in int8 that have a scale in common
SHARE = 0.125  # of the memory, of the filter of an admission


class Rows:
    """The rows in memory, and what methods are told of the training part.

    Attributes:
        table_rows: of each feature, its ids in the training rows and one more for all others.
        best: AUC of the true probabilities on the test rows, where the rows are generated.
    """

    def __init__(self, batch: Batch, best: float | None):
        self.batch, self.best = batch, best
        self.parts = split_rows(len(batch))
        train = batch.sparse[: len(self.parts[0])]
        self.counts = Counts(torch.from_numpy(train))
        self.vocabulary = self.counts.ids
        self.table_rows = tuple(len(ids) + 1 for ids in self.vocabulary)
        self.full_bytes = 4 * DIM * sum(self.table_rows)

    @classmethod
    def read(cls, path: Path) -> "Rows":
        source = open_source(path)
        return cls(Batch.concatenate(list(tqdm(source.read(0, None), desc=path.name, leave=False))), None)

    @classmethod
    def generate(cls, rows: int) -> "Rows":
        signal = Signal(0)
        pieces = [to_batch(some) for some in tqdm(signal.records(rows), desc="generating", leave=False)]
        batch = Batch.concatenate(pieces)
        test = batch[split_rows(rows)[2].start :]
        assert test.labels is not None
        return cls(batch, float(roc_auc_score(test.labels, signal.logits(test.dense, test.sparse))))

    def part(self, rows: range, size: int) -> Iterator[Batch]:
        for start in range(rows.start, rows.stop, size):
            yield self.batch[start : min(start + size, rows.stop)]

    def train_batches(self, size: int, seed: int, epoch: int, rows: int) -> Iterator[Batch]:
        """Batches of so many rows: all training rows in random order, again and again."""
        again = -(-rows // len(self.parts[0]))
        orders = [np.random.default_rng([seed, epoch + k]).permutation(len(self.parts[0])) for k in range(again)]
        order = np.concatenate(orders)[:rows]
        for start in range(0, rows, size):
            yield self.batch[order[start : start + size]]


@dataclass(frozen=True)
class Trial:
    """One training run: all that a result depends on, with the rows and the seed."""

    method: str
    compression: float = 1.0
    rate: float = 1e-3
    init: float = 1.0  # times the method's own initial scale
    decay: float = 0.0  # of the weights of MLPs and arrays, as torch.optim.Adam has it
    averaging: int = 500
    epochs: float = EPOCHS  # below 2 as one piece with two evaluations
    options: tuple[tuple[str, Any], ...] = ()  # of the embeddings, beyond the method's

    @property
    def key(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["epochs"] = int(self.epochs) if self.epochs == int(self.epochs) else self.epochs
        return json.dumps(values, sort_keys=True)


def robe(rows: Rows, trial: Trial, seed: int, **options: Any) -> nn.Module:
    """ROBE in rows.full_bytes / compression bytes, the filter of an admission among them.

    Args:
        options: of RobeEmbeddingBagCollection; and ``admit``, the share of the memory that the filter of an Admission
            takes at the most, ``labelled``, whether ids are chosen by labels or counts, ``times`` and ``rounds`` of
            its choose.
    """
    options |= {name: value for name, value in trial.options if name not in OF_TRAINING}
    variant = {name: options.pop(name) for name in list(options) if name in OF_VARIANTS}
    memory = rows.full_bytes / trial.compression
    share, labelled = options.pop("admit", 0.0), options.pop("labelled", True)
    choice = {name: options.pop(name) for name in ("times", "rounds") if name in options}
    weight_bytes = 1 + 4 / INT8_GROUP if options.pop("int8", False) else 4
    linear = options.get("hash") == "linear"  # whose tables lie one behind the other, and so have an end
    tables = [EmbeddingBagConfig(f"cat_{i}", 1 << 32 if linear else None, DIM) for i in range(len(rows.table_rows))]
    admission = None
    if share:

        def read() -> Iterator[tuple[Tensor, Tensor | None]]:
            for batch in rows.part(rows.parts[0], 1 << 16):
                assert batch.labels is not None
                labels = torch.from_numpy(batch.labels).unsqueeze(1) if labelled else None
                yield torch.from_numpy(batch.sparse), labels

        keys = torch.tensor([table_key(seed, i) for i in range(len(tables))])
        admission = Admission.choose(read, keys, int(memory * share), **choice)
        memory -= admission.bytes
    if "tier" in options:
        variant["tier"] = rows.counts.most_frequent(int(memory * options.pop("tier")) // (4 * DIM))
    if "small_tables" in options:
        variant["tier"] = rows.counts.of_small_tables(options.pop("small_tables"))
    memory -= 4 * DIM * sum(map(len, variant.get("tier", ())))
    layer = RobeEmbeddingBagCollection(
        tables,
        robe_size=int((memory - (4 if weight_bytes < 4 else 0)) / weight_bytes),  # the last scale is of a part
        seed=seed,
        init_std=INIT_STD * trial.init,
        admission=admission,
        **options,
    )
    if linear:  # the authors' initial values
        bound = trial.init * max(rows.table_rows) ** -0.5
        nn.init.uniform_(layer.array.weight, -bound, bound)
    return Variant(layer, rows.counts, **variant) if variant else layer


def tables(rows: Rows, trial: Trial, seed: int) -> nn.Module:
    return scaled(VocabularyTables(rows.table_rows, DIM, rows.vocabulary), trial)


def hash_trick(rows: Rows, trial: Trial, seed: int) -> nn.Module:
    return scaled(HashTrick(rows.table_rows, DIM, trial.compression), trial)


def quotient_remainder(rows: Rows, trial: Trial, seed: int) -> nn.Module:
    return scaled(QuotientRemainder(rows.table_rows, DIM, trial.compression), trial)


def scaled(layer: nn.Module, trial: Trial) -> nn.Module:
    with torch.no_grad():
        for weight in layer.parameters():
            weight *= trial.init
    return layer


# Options of a trial that are not the collection's: of Variant, and of the training.
OF_VARIANTS = ("gain", "soft", "zero", "twice", "table_scale", "sharing")
OF_TRAINING = ("array_rate", "touched", "optimizer", "project")
FULL, ADMISSION = "full tables", "ROBE + admission"
METHODS: dict[str, Callable[[Rows, Trial, int], nn.Module]] = {
    FULL: tables,
    "hash trick": hash_trick,
    "QR": quotient_remainder,
    "ROBE, authors'": partial(robe, hash="linear"),
    **{f"ROBE, Z={z}": partial(robe, block_size=z) for z in (1, 4, 8, 16)},
    ADMISSION: partial(robe, admit=SHARE),
    f"{ADMISSION}, Z=1": partial(robe, admit=SHARE, block_size=1),
    f"{ADMISSION}, int8": partial(robe, admit=2 * SHARE, int8=True),
    "ROBE, authors', int8": partial(robe, hash="linear", int8=True),
}


def run(rows: Rows, trial: Trial, seed: int, batch_size: int) -> dict[str, Any]:
    """Train once; the scores of the weights with the best validation AUC."""
    start = time.perf_counter()
    before = None
    if dict(trial.options).get("project"):
        before, _ = fit(rows, Trial(FULL, averaging=trial.averaging), seed, batch_size)
    model, progress = fit(rows, trial, seed, batch_size, before)
    embeddings = model.embeddings
    if "int8" in trial.method:
        embeddings.array = embeddings.array.quantized(INT8_GROUP)
    scores = evaluate(model, rows.part(rows.parts[2], 4096))
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
    """Memory of all that is kept of embeddings, but for the dictionary of full tables."""
    layer = embeddings.layer if isinstance(embeddings, Variant) else embeddings
    if not isinstance(layer, RobeEmbeddingBagCollection):
        return 4 * sum(p.numel() for p in embeddings.parameters())
    added = sum(p.numel() for p in embeddings.parameters()) - sum(p.numel() for p in layer.parameters())
    return array_bytes(layer) + 4 * added


def fit(rows: Rows, trial: Trial, seed: int, batch_size: int, before: DLRM | None = None) -> tuple[DLRM, Progress]:
    """Train once; the model with the weights of the best validation AUC.

    Args:
        before: a trained model with full tables to start from.
    """
    torch.manual_seed(seed)
    preset, options = PRESETS["kaggle"], dict(trial.options)
    config = replace(preset.model, table_rows=rows.table_rows, embedding="full", compression=None)
    model = DLRM(config, METHODS[trial.method](rows, trial, seed))
    if before is not None:
        tables = [table[:-1] for table in before.embeddings.weight.detach().split(list(rows.table_rows))]
        project(model.embeddings, rows.counts, tables)
        model.bottom.load_state_dict(before.bottom.state_dict())
        model.top.load_state_dict(before.top.state_dict())
    unit = trial.epochs if trial.epochs < 2 else 1.0  # epochs of the data in one of the trainer's
    in_unit = round(unit * len(rows.parts[0]))
    training = replace(
        preset.training,
        batch_size=batch_size,
        learning_rate=trial.rate,
        optimizer=options.get("optimizer", "adam"),
        epochs=round(trial.epochs / unit),
        evaluations_per_epoch=2,
        averaging_steps=trial.averaging,
        seed=seed,
    )
    optimizers = make_optimizers(model, training)
    optimizers[0].param_groups[0]["weight_decay"] = trial.decay
    if "array_rate" in options:
        rate = options["array_rate"] * trial.rate
        arrays = {id(p) for p in model.embeddings.parameters()}
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in arrays]},
            {"params": list(model.embeddings.parameters()), "lr": rate},
        ]
        optimizers = [torch.optim.Adam(groups, lr=trial.rate)]
    if options.get("touched"):
        array = model.embeddings.array
        rest = [p for p in model.parameters() if p is not array.weight]
        optimizers = [torch.optim.Adam(rest, lr=trial.rate), RobeAdam(array, lr=trial.rate)]
    best: dict[str, Tensor] = {}
    trainer = Trainer(
        model,
        training,
        lambda epoch, start: rows.train_batches(batch_size, seed, epoch, in_unit),
        in_unit,
        evaluate=lambda: evaluate(model, rows.part(rows.parts[1], 4096)),
        keep=lambda: best.update({name: p.detach().clone() for name, p in model.named_parameters()}),
        optimizers=optimizers,
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


def is_past_its_best(history: list[dict[str, float]]) -> bool:
    """Whether the last epoch's evaluations are all below the best one before."""
    aucs = [point["auc"] for point in history]
    return len(aucs) > 2 and max(aucs[-2:]) < max(aucs[:-2])
