"""The training loop against steps written out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from data.rows import Batch
from dlrm import DLRM, DLRMConfig, TrainingConfig
from dlrm.trainer import TrainingError, train

MODEL = DLRMConfig(embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(10, 20), compression=3)
TRAINING = TrainingConfig(batch_size=16, learning_rate=0.1, optimizer="sgd", epochs=2, evaluations_per_epoch=2)
RNG = np.random.default_rng(0)
ROWS = Batch(
    RNG.normal(size=(70, 13)).astype(np.float32),
    RNG.integers(0, 2**32, (70, 2)),
    RNG.integers(0, 2, 70).astype(np.float32),
)


def batches(epoch):
    return [ROWS[start : start + 16] for start in range(0, 70, 16)]


def run(model, config=TRAINING, evaluate=lambda: {"auc": 0.5, "log_loss": 1.0}, keep=lambda: None):
    return train(model, config, batches, len(ROWS), evaluate, keep, progress=False)


def build(embedding="robe"):
    torch.manual_seed(0)
    return DLRM(replace(MODEL, embedding=embedding))


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
@pytest.mark.parametrize("embedding", ["robe", "full"])
def test_steps_are_those_of_torch_optim(optimizer, embedding):
    trained = build(embedding)
    run(trained, replace(TRAINING, optimizer=optimizer, learning_rate=0.01))

    model = build(embedding)
    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}[optimizer]
    if optimizer == "adam" and embedding == "full":
        dense = [*model.bottom.parameters(), *model.top.parameters()]
        optimizers = [kind(dense, lr=0.01), torch.optim.SparseAdam([model.embeddings.weight], lr=0.03)]
    else:
        optimizers = [kind(model.parameters(), lr=0.01)]
    for _ in range(2):
        for batch in batches(0):
            model.zero_grad()
            probability = torch.sigmoid(model(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse)))
            functional.binary_cross_entropy(probability, torch.from_numpy(batch.labels)).backward()
            for o in optimizers:
                o.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(trained.named_parameters())[name], p, rtol=1e-4, atol=1e-6)


def test_evaluates_evenly_and_keeps_the_best():
    aucs = iter([0.5, 0.7, 0.6, 0.65])
    kept = []
    model = build()
    result = run(
        model,
        evaluate=lambda: {"auc": next(aucs), "log_loss": 0.4, "rows": 7},
        keep=lambda: kept.append(model.top[0].weight.detach().clone()),
    )
    assert [(h["step"], h["epoch"], h["auc"]) for h in result["history"]] == [
        (3, 0.6, 0.5), (5, 1.0, 0.7), (8, 1.6, 0.6), (10, 2.0, 0.65)
    ]  # fmt: skip
    assert result["best"] == result["history"][1]
    assert len(kept) == 2
    assert not torch.equal(kept[0], kept[1])
    assert result["samples_per_second"] > 0


def test_train_loss_is_the_mean_over_the_epoch_so_far():
    model = build()
    expected = []
    with torch.no_grad():
        for batch in batches(0):
            logits = model(torch.from_numpy(batch.dense), torch.from_numpy(batch.sparse))
            expected.append(functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.labels)).item())
    frozen = replace(TRAINING, learning_rate=1e-12, epochs=1)
    history = run(model, frozen)["history"]
    assert history[0]["train_loss"] == pytest.approx(np.mean(expected[:3]), rel=1e-5)
    assert history[1]["train_loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_training():
    model = build()
    with torch.no_grad():
        model.top[0].bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is nan by step 3 \(epoch 1\); a lower learning rate than 0.1"):
        run(model)


def test_learns_a_rule():
    """Labels that are a function of an id are learned to near certainty through the array."""
    rng = np.random.default_rng(1)
    sparse = rng.integers(0, 10, (2000, 2))
    rows = Batch(np.zeros((2000, 13), dtype=np.float32), sparse, (sparse[:, 0] % 2).astype(np.float32))
    torch.manual_seed(0)
    model = DLRM(replace(MODEL, compression=1.5))
    config = TrainingConfig(batch_size=50, learning_rate=0.01, optimizer="adam", epochs=5, evaluations_per_epoch=1)
    result = train(
        model,
        config,
        lambda epoch: [rows[a : a + 50] for a in range(0, 2000, 50)],
        2000,
        lambda: {"auc": 0.5, "log_loss": 1.0},
        lambda: None,
        progress=False,
    )
    assert result["history"][-1]["train_loss"] < 0.1
