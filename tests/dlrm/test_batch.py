"""The Protocol of a batch, and who satisfies it."""

import numpy as np
import pytest
import torch

import data.rows
from dlrm import TrainingConfig
from dlrm.batch import Batch
from dlrm.model import DLRM, DLRMConfig
from dlrm.training.optimizers import make_optimizers
from dlrm.training.trainer import train_step


class Bare:
    """No more than the Protocol asks for."""

    dense = np.ones((3, 13), np.float32)
    sparse = np.arange(6).reshape(3, 2)
    labels = np.array([0, 1, 1], np.float32)

    def __len__(self):
        return 3


@pytest.mark.parametrize("labels", [None, np.ones(2, np.float32)], ids=["no labels", "labels"])
def test_rows_of_data_are_batches(labels):
    batch: Batch = data.rows.Batch(np.ones((2, 13), np.float32), np.ones((2, 26), np.int64), labels)
    assert isinstance(batch, Batch)
    assert len(batch) == 2


def test_what_has_no_labels_attribute_is_no_batch():
    assert isinstance(Bare(), Batch)
    assert not isinstance((Bare.dense, Bare.sparse), Batch)


def test_a_model_trains_on_whatever_satisfies_the_protocol():
    config = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20), compression=3)
    model = DLRM(config)
    optimizers = make_optimizers(model, TrainingConfig(3, 0.1, "sgd", 1))
    before = model.embeddings.array.weight.detach().clone()
    assert torch.isfinite(train_step(model, optimizers, Bare())).all()
    assert not torch.equal(model.embeddings.array.weight, before)
