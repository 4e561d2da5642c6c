"""Which optimizers a config gets, and which of a model's weights each of them updates."""

from dataclasses import replace

import pytest
import torch

import robe.optim
from dlrm import DLRM, DLRMConfig, TrainingConfig
from dlrm.config import OPTIMIZERS
from dlrm.distributed import World
from dlrm.training.optimizers import NUMBERS_A_WEIGHT, make_optimizers, sends_touched_slots

MODEL = DLRMConfig(
    embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20), compression=None, robe_size=97
)
TRAINING = TrainingConfig(batch_size=16, learning_rate=0.1, optimizer="sgd", epochs=1)
HASH = {"embedding": "hash", "robe_size": None, "compression": 2.0}
KINDS = {
    ("sgd", "robe"): (torch.optim.SGD, robe.optim.SGD),
    ("sgd", "hash"): (torch.optim.SGD, torch.optim.SGD),
    ("adagrad", "robe"): (torch.optim.Adagrad, robe.optim.Adagrad),
    ("adagrad", "hash"): (torch.optim.Adagrad, torch.optim.Adagrad),
    ("adam", "robe"): (torch.optim.Adam, torch.optim.Adam),
    ("adam", "hash"): (torch.optim.Adam, torch.optim.SparseAdam),
}


def optimizer_of(optimizers, parameter):
    (found,) = [o for o in optimizers for group in o.param_groups if any(p is parameter for p in group["params"])]
    return found


@pytest.mark.parametrize(("name", "embedding"), KINDS)
def test_every_weight_has_one_optimizer(name, embedding):
    model = DLRM(replace(MODEL, **HASH) if embedding == "hash" else MODEL)
    optimizers = make_optimizers(model, replace(TRAINING, optimizer=name))
    of_mlps, of_embeddings = KINDS[name, embedding]
    inside = {id(p) for p in model.embeddings.parameters()}
    for p in model.parameters():
        optimizer = optimizer_of(optimizers, p)
        assert type(optimizer) is (of_embeddings if id(p) in inside else of_mlps)
        times = 3 if isinstance(optimizer, torch.optim.SparseAdam) else 1
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * times)


def test_epsilon_of_adagrad_is_that_of_the_config():
    optimizers = make_optimizers(DLRM(MODEL), replace(TRAINING, optimizer="adagrad", adagrad_eps=1e-8))
    assert [optimizer.param_groups[0]["eps"] for optimizer in optimizers] == [1e-8, 1e-8]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_kept_for_a_weight_are_those_that_are_counted(name):
    """The check of memory relies on them."""
    model = DLRM(MODEL)
    optimizers = make_optimizers(model, replace(TRAINING, optimizer=name))
    model(torch.randn(5, 13), torch.randint(0, 2**32, (5, 2))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    for parameter in (model.embeddings.array.weight, model.top[0].weight):
        state = optimizer_of(optimizers, parameter).state.get(parameter, {})
        tensors = [x for x in state.values() if isinstance(x, torch.Tensor) and x.shape == parameter.shape]
        assert 1 + len(tensors) == NUMBERS_A_WEIGHT[name]


def test_what_is_less_to_send_is_sent():
    """2 features of dimension 4, each with an id of 64 bits, are 12 numbers a row."""
    model = DLRM(replace(MODEL, robe_size=193))
    assert sends_touched_slots(model, 16)
    assert not sends_touched_slots(model, 17)
    assert not sends_touched_slots(DLRM(replace(MODEL, robe_size=192)), 16)
    assert not sends_touched_slots(DLRM(replace(MODEL, robe_size=193, hots=(1, 2))), 16)
    config = TrainingConfig(17, 0.1, "sgd", 1)
    assert len(make_optimizers(model, config)) == 2, "one process has nothing to send"
    assert len(make_optimizers(model, config, World(size=2))) == 1
    assert len(make_optimizers(model, replace(config, batch_size=16), World(size=2))) == 2
