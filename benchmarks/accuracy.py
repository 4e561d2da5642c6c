"""How much AUC does compression cost? Full tables, the hashing trick, quotient-remainder and ROBE at equal memory.

    python -m benchmarks.accuracy --data rows.tsv --output runs/accuracy
    python -m benchmarks.accuracy --generate 5000000 --compressions 1000 --batch-size 2048 --output runs/generated

The rows in their order: 5/7 train, 1/7 validates, 1/7 tests. Memory is counted in bytes and in all that a trained model
keeps: arrays, tables, and the filter of an admission; compression is against tables with a row for each id of the
training rows. Each method has the same search on validation rows before (SEARCH: a change at a time, kept where it
helps), at each compression, on seeds that are not tested; all Z have that of Z = 16. Epochs end where validation AUC
falls; the best evaluation is tested. All methods are trained on averaged weights. Differences are paired by seed.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.peers import QuotientRemainder
from data.batches import split_rows
from data.formats import open_source
from data.rows import Batch
from data.synthetic import Signal
from dlrm.checkpoint import whole_file, write_json
from dlrm.config import PRESETS, DLRMConfig, TrainingConfig
from dlrm.embeddings import Tables, VocabularyTables, capped_rows
from dlrm.metrics import environment, evaluate
from dlrm.model import DLRM
from dlrm.trainer import Trainer, make_optimizers
from robe import Admission, EmbeddingBagConfig, IdCounter, RobeEmbeddingBagCollection

DIM = 16


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
        self.vocabulary = [torch.from_numpy(np.unique(column)) for column in train.T]
        self.table_rows = tuple(len(ids) + 1 for ids in self.vocabulary)
        self.full_bytes = 4 * DIM * sum(self.table_rows)

    @classmethod
    def read(cls, path: Path) -> "Rows":
        source = open_source(path)
        return cls(Batch.concatenate(list(tqdm(source.read(0, None), desc=path.name, leave=False))), None)

    @classmethod
    def generate(cls, rows: int) -> "Rows":
        from data.rows import to_batch

        signal = Signal(0)
        pieces = [to_batch(some) for some in tqdm(signal.records(rows), desc="generating", leave=False)]
        batch = Batch.concatenate(pieces)
        test = batch[split_rows(rows)[2].start :]
        assert test.labels is not None
        return cls(batch, float(roc_auc_score(test.labels, signal.logits(test.dense, test.sparse))))

    def part(self, rows: range, size: int) -> Iterator[Batch]:
        for start in range(rows.start, rows.stop, size):
            yield self.batch[start : min(start + size, rows.stop)]

    def train_batches(self, size: int, seed: int, epoch: int) -> Iterator[Batch]:
        order = np.random.default_rng([seed, epoch]).permutation(len(self.parts[0]))
        for start in range(0, len(order), size):
            yield self.batch[order[start : start + size]]
