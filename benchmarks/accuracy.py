"""How much AUC does compression cost? Full tables, the hashing trick, quotient-remainder and ROBE at equal memory.

    python -m benchmarks.accuracy --data rows.tsv --output runs/accuracy
    python -m benchmarks.accuracy --generate 5000000 --compressions 1000 --batch-size 2048 --epochs 1 \\
        --searches 1 --changes rate --output runs/generated

The rows in their order: 5/7 train, 1/7 validates, 1/7 tests. Memory is counted in bytes and in all that a trained model
keeps: arrays, tables, and the filter of an admission; compression is against tables with a row for each id of the
training rows. Each method has the same search on validation rows before (SEARCH: a change at a time, kept where it
helps), at each compression, on seeds that are not tested; all Z have that of Z = 16. Epochs end where validation AUC
falls; the best evaluation is tested. All methods are trained on averaged weights. Those in int8 are trained in float32,
with as many weights as have room in int8, and rounded before the test. Differences are paired by seed.

Every run that ended is a line of runs.jsonl: a program that is started again goes on. Writes accuracy.json, accuracy.md
and accuracy.png. ``--methods`` and ``--study`` choose what is run.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.peers import HashTrick, QuotientRemainder
from benchmarks.variants import Counts, Variant, project
from data.batches import split_rows
from data.formats import open_source
from data.rows import Batch, to_batch
from data.synthetic import Signal
from dlrm.checkpoint import whole_file, write_json
from dlrm.config import PRESETS
from dlrm.embeddings import VocabularyTables
from dlrm.metrics import environment, evaluate
from dlrm.model import DLRM
from dlrm.trainer import Progress, Stopped, Trainer, make_optimizers
from robe import Admission, EmbeddingBagConfig, RobeEmbeddingBagCollection
from robe.array import INIT_STD
from robe.hashing import table_key
from robe.optim import Adam as RobeAdam

DIM = 16  # the kaggle preset
EPOCHS = 6
SEARCH_SEED = 1000  # and on; those of tests are 0 and on
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
            takes at the most, ``labelled``, whether ids are chosen by labels or counts, ``times`` as in its choose.
    """
    options |= {name: value for name, value in trial.options if name not in OF_TRAINING}
    variant = {name: options.pop(name) for name in list(options) if name in OF_VARIANTS}
    memory = rows.full_bytes / trial.compression
    share, labelled, times = options.pop("admit", 0.0), options.pop("labelled", True), options.pop("times", 10)
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
        admission = Admission.choose(read, keys, int(memory * share), times=times)
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
SEARCHED_AS = {
    **{f"ROBE, Z={z}": "ROBE, Z=16" for z in (1, 4, 8)},
    f"{ADMISSION}, Z=1": ADMISSION,
    f"{ADMISSION}, int8": ADMISSION,
    "ROBE, authors', int8": "ROBE, authors'",
}
_ADMITTED = Trial(ADMISSION)


def _with(**options: Any) -> Trial:
    return replace(_ADMITTED, options=tuple(options.items()))


STUDIES: dict[str, list[Trial]] = {
    "choice": [
        _with(),
        _with(admit=1 / 16),
        _with(admit=1 / 4),
        _with(times=1),
        _with(times=20),
        _with(labelled=False),
        _with(labelled=False, zero=True),
        Trial("ROBE, Z=16", options=(("soft", 10.0),)),
        Trial("ROBE, Z=16"),
    ],
    "averaging": [
        replace(trial, averaging=steps)
        for steps in (0, 100, 500, 2000)
        for trial in (Trial(FULL), Trial("ROBE, Z=16"), Trial(ADMISSION))
    ],
    "layout": [_with(block_size=z) for z in (1, 4, 8, 16, 32)] + [_with(sign=True), _with(twice=True)],
    "scale": [replace(_ADMITTED, init=x) for x in (0.1, 1.0, 3.0, 10.0)] + [_with(gain=True), _with(table_scale=0.25)],
    "optimizer": [
        *(_with(array_rate=x) for x in (0.3, 1.0, 3.0)),
        _with(touched=True),
        replace(_with(optimizer="adagrad"), rate=0.01),
        _with(sharing=0.5),
        _with(sharing=1.0),
    ],
    "tiers": [
        *(_with(), _with(tier=0.25), _with(tier=0.5), _with(small_tables=5), _with(small_tables=30)),
        _with(project=True),
    ],
}
# Each changes one thing, and is kept if validation AUC is better; the next ones go on from there.
SEARCH: tuple[dict[str, float], ...] = ({"rate": 2.0}, {"rate": 0.5}, {"init": 0.1}, {"decay": 1e-6})


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
        memory = sum(x.numel() * x.element_size() for x in embeddings.array.read() if x is not None)
    else:
        memory = 4 * sum(p.numel() for p in embeddings.parameters())
    if getattr(embeddings, "admission", None) is not None:
        memory += embeddings.admission.bytes
    scores = evaluate(model, rows.part(rows.parts[2], 4096))
    return {
        "auc": scores["auc"],
        "log_loss": scores["log_loss"],
        "validation_auc": progress.best["auc"],
        "best_epoch": progress.best["epoch"],
        "history": [(point["epoch"], point["auc"]) for point in progress.history],
        "bytes": memory,
        "seconds": time.perf_counter() - start,
    }


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


class Runs:
    """Runs in processes of one thread each, and a file of those that ended.

    Args:
        path: a line of JSON a run.
        rows: of all runs.
        batch_size: likewise.
        processes: how many at a time.
    """

    def __init__(self, path: Path, rows: Rows, batch_size: int, processes: int):
        self.path = path
        self._done: dict[tuple[str, int], dict[str, Any]] = {}
        self._cut_off = False  # the last line, of a program that was killed
        if path.exists():
            text = path.read_text()
            self._cut_off = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                with suppress(ValueError):  # a line that was cut off
                    run = json.loads(line)
                    self._done[run["trial"], run["seed"]] = run["result"]
        global _work
        _work = rows, batch_size
        # Forked, so that all read the same rows.
        self._pool = multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,))
        self.bar = tqdm(unit="run", file=sys.stderr)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.terminate()
        self._pool.join()
        self.bar.close()

    def results(self, jobs: list[tuple[Trial, int]]) -> dict[tuple[Trial, int], dict[str, Any]]:
        """Of each trial and seed."""
        jobs = list(dict.fromkeys(jobs))
        missing = [(trial, seed) for trial, seed in jobs if (trial.key, seed) not in self._done]
        self.bar.total = self.bar.n + len(missing)
        with self.path.open("a") as file:
            if self._cut_off:
                file.write("\n")
                self._cut_off = False
            for trial, seed, result in self._pool.imap_unordered(_run, missing):
                self._done[trial.key, seed] = result
                file.write(json.dumps({"trial": trial.key, "seed": seed, "result": result}) + "\n")
                file.flush()
                self.bar.set_postfix_str(f"{trial.method} {trial.compression:g}x: {result['auc']:.4f}")
                self.bar.update()
        return {(trial, seed): self._done[trial.key, seed] for trial, seed in jobs}


_work: tuple[Rows, int]  # of the processes of a pool


def _run(job: tuple[Trial, int]) -> tuple[Trial, int, dict[str, Any]]:
    return *job, run(_work[0], *job, _work[1])


def search(runs: Runs, trials: list[Trial], changes: Sequence[dict[str, float]], seeds: int) -> list[Trial]:
    """The best trial found from each on; all are searched side by side."""
    validation: dict[Trial, float] = {}
    of_seeds = range(SEARCH_SEED, SEARCH_SEED + seeds)

    def measure(tried: list[Trial]) -> None:
        results = runs.results([(trial, seed) for trial in tried for seed in of_seeds])
        for trial in tried:
            validation[trial] = mean(results[trial, seed]["validation_auc"] for seed in of_seeds)

    best = list(trials)
    measure(best)
    for change in changes:
        (name, value), *_ = change.items()
        changed = [
            replace(trial, **{name: value if name == "decay" else value * getattr(start, name)})
            for trial, start in zip(best, trials)
        ]
        measure(changed)
        best = [max(old, new, key=validation.__getitem__) for old, new in zip(best, changed)]
    return best


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (Student's t, paired)."""
    n = len(differences)
    return mean(differences), float(student.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)


def compare(runs: Runs, args: argparse.Namespace) -> list[dict]:
    """Search, then test; a row for each method and compression."""

    def start(method: str, compression: float) -> Trial:
        method = SEARCHED_AS.get(method, method)
        return Trial(method, 1.0 if method == FULL else compression, epochs=args.epochs)

    places = [(m, c) for m in args.methods for c in args.compressions[: 1 if m == FULL else None]]
    searched = list(dict.fromkeys(start(*place) for place in places))
    changes = [change for change in SEARCH if set(change) <= set(args.changes)]
    found = dict(zip(searched, search(runs, searched, changes, args.searches) if args.searches else searched))
    best = [replace(found[start(method, compression)], method=method) for method, compression in places]
    return tested(runs, best, args.seeds)


def tested(runs: Runs, trials: list[Trial], seeds: int) -> list[dict]:
    """Rows of the table: the first trial is what the others are compared with."""
    results = runs.results([(trial, seed) for trial in trials for seed in range(seeds)])
    table = []
    for trial in trials:
        of_seed = [results[trial, seed] for seed in range(seeds)]
        auc = [result["auc"] for result in of_seed]
        against, half = interval([result["auc"] - results[trials[0], s]["auc"] for s, result in enumerate(of_seed)])
        table.append(
            {
                "trial": json.loads(trial.key),
                "bytes": of_seed[0]["bytes"],
                "auc": auc,
                "mean": mean(auc),
                "sd": stdev(auc),
                "against": against,
                "interval": half,
                "validation_auc": mean(result["validation_auc"] for result in of_seed),
                "log_loss": mean(result["log_loss"] for result in of_seed),
                "best_epoch": mean(result["best_epoch"] for result in of_seed),
            }
        )
    return table


def label(row: dict) -> str:
    trial = row["trial"]
    name = trial["method"]
    if trial["method"] != FULL:
        name += f" {trial['compression']:g}x"
    changed = {k: v for k, v in trial.items() if k not in ("method", "compression") and v != getattr(Trial(""), k)}
    options = changed | dict(changed.pop("options", ()))
    return name + "".join(f", {k} {v:g}" if isinstance(v, float) else f", {k} {v}" for k, v in options.items())


def markdown(table: list[dict], seeds: int) -> str:
    lines = [
        f"| {seeds} seeds | bytes | test AUC | sd | against the first, 95 % | validation AUC | log loss | best epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        against = f"{row['against']:+.4f} ± {row['interval']:.4f}" if row is not table[0] else ""
        lines.append(
            f"| {label(row)} | {row['bytes']:,} | {row['mean']:.4f} | {row['sd']:.4f} | {against} "
            f"| {row['validation_auc']:.4f} | {row['log_loss']:.4f} | {row['best_epoch']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(path: Path, table: list[dict], best_possible: float | None) -> None:
    """AUC against memory, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    methods: dict[str, list[dict]] = {}
    for row in table:
        methods.setdefault(row["trial"]["method"], []).append(row)
    for method, points in methods.items():
        if method == FULL:
            axes.axhline(points[0]["mean"], color="black", linewidth=1, label=FULL)
            continue
        points = sorted(points, key=lambda row: row["bytes"])
        spread = [row["sd"] for row in points]
        width = 2.5 if method == ADMISSION else 1.2
        axes.errorbar(
            [row["bytes"] for row in points],
            [row["mean"] for row in points],
            yerr=spread,
            label=method,
            linewidth=width,
            marker="o",
            markersize=2 * width,
            capsize=2,
        )
    if best_possible is not None:
        axes.axhline(best_possible, color="grey", linestyle=":", label="best possible")
    axes.set(xscale="log", xlabel="memory of the embeddings, bytes", ylabel="test AUC")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--data", type=Path, metavar="PATH", help="any format of data/")
    rows.add_argument("--generate", type=int, metavar="N", help="rows with a known best AUC")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--searches", type=int, default=2, metavar="N", help="seeds of a search; 0: none")
    changes = sorted({name for change in SEARCH for name in change})
    parser.add_argument("--changes", nargs="+", choices=changes, default=changes, help="what is searched (default all)")
    parser.add_argument("--compressions", type=float, nargs="+", default=[10.0, 100.0, 1000.0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--study", choices=STUDIES, help="instead of methods, variants of ROBE")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help=f"at the most (default {EPOCHS})")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds: expected at least 2, for a standard deviation")
    return args


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = Rows.generate(args.generate) if args.data is None else Rows.read(args.data)
    with Runs(args.output / "runs.jsonl", rows, args.batch_size, args.processes) as runs:
        if args.study:
            study = STUDIES[args.study]
            compressed = [
                t if t.method == FULL else replace(t, compression=c) for c in args.compressions for t in study
            ]
            trials = list(dict.fromkeys([Trial(FULL), *compressed]))
            name, table = args.study, tested(runs, trials, args.seeds)
        else:
            name, table = "accuracy", compare(runs, args)
    write_json(
        args.output / f"{name}.json",
        {
            "table": table,
            "rows": len(rows.batch),
            "full_bytes": rows.full_bytes,
            "best_possible_auc": rows.best,
            "batch_size": args.batch_size,
            "environment": environment(),
        },
    )
    text = markdown(table, args.seeds)
    if rows.best is not None:
        text += f"\nBest possible AUC of the test rows: {rows.best:.4f}\n"
    (args.output / f"{name}.md").write_text(text)
    plot(args.output / f"{name}.png", table, rows.best)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
