"""Optimizers of arrays, and models and batches for them."""

import numpy as np
import pytest
import torch
from torch import nn

import robe

SIZE, DIM = 97, 6


OPTIMIZERS = {
    "SGD": (robe.optim.SGD, {"lr": 0.3}),
    "SGD, momentum": (robe.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    "Adagrad": (robe.optim.Adagrad, {"lr": 0.2, "lr_decay": 0.1, "weight_decay": 0.05}),
    "Adam": (robe.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.05}),
}


every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def build(name, array):
    kind, options = OPTIMIZERS[name]
    return kind(array, **options)


def an_array(dtype=torch.float64, seed=0, size=SIZE):
    torch.manual_seed(seed)
    return robe.RobeArray(size, init_std=1.0, dtype=dtype)


def an_embedding(dtype=torch.float64, seed=0, **options):
    return robe.RobeEmbedding(None, DIM, array=an_array(dtype, seed), block_size=4, sign=True, **options)


def loss_of(output):
    """Another gradient for each component, that depends on the values."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return (output * weights).sum() + output.square().sum() / 2


def train(model, optimizer, batches):
    for inputs in batches:
        optimizer.zero_grad()
        loss_of(model(*inputs)).backward()
        optimizer.step()


def ids(n=8, *, seed=0, high=30):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, n))


def steps(count=4):
    return [(ids(seed=k),) for k in range(count)]


LAYOUT = {"hash": "mix", "size": SIZE, "embedding_dim": DIM, "block_size": 4, "sign": True}


class Two(nn.Module):
    """Two layers on one array, that read some slots both."""

    def __init__(self, array):
        super().__init__()
        self.one = robe.RobeEmbedding(None, DIM, array=array, block_size=4, sign=True)
        self.many = robe.RobeEmbeddingBag(None, DIM, mode="mean", array=array, table_id=1, block_size=3)

    def forward(self, x):
        return torch.cat([self.one(x), self.many(x.view(-1, 1)), self.one(x + 1)])
