"""Scores against their definitions."""

import numpy as np
import pytest
import torch

from data.rows import Batch
from dlrm.metrics import Scores, describe_auc, evaluate, predict, score


class Linear(torch.nn.Module):
    """Logit: the first dense value."""

    def forward(self, dense, sparse):
        return dense[:, 0]


def make_batches(rows, sizes, seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(rows, 13)).astype(np.float32)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-dense[:, 0]))).astype(np.float32)
    batch = Batch(dense, np.zeros((rows, 26), dtype=np.int64), labels)
    return batch, [batch[a:b] for a, b in zip([0, *sizes], [*sizes, rows])]


def test_scores_are_those_of_the_definitions():
    whole, batches = make_batches(300, [100, 101])
    p = 1 / (1 + np.exp(-whole.dense[:, 0].astype(np.float64)))
    positive, negative = p[whole.labels == 1], p[whole.labels == 0]
    wins = (positive[:, None] > negative[None]).mean() + (positive[:, None] == negative[None]).mean() / 2
    scores = evaluate(Linear(), batches)
    assert scores["auc"] == pytest.approx(wins, abs=1e-9)
    entropy = -np.mean(whole.labels * np.log(p) + (1 - whole.labels) * np.log(1 - p))
    assert scores["log_loss"] == pytest.approx(entropy, rel=1e-5)
    assert scores["rows"] == 300


def test_predict_does_not_train():
    model = torch.nn.Dropout()
    model.forward = lambda dense, sparse: dense[:, 0]
    whole, batches = make_batches(10, [4])
    values = list(predict(model, batches))
    assert [v.shape for v in values] == [(4,), (6,)]
    assert not model.training
    np.testing.assert_allclose(np.concatenate(values), 1 / (1 + np.exp(-whole.dense[:, 0])), rtol=1e-5)


def test_what_has_no_score_is_refused():
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate(Linear(), [])
    with pytest.raises(ValueError, match="NaN"):
        score(np.array([0, 1]), np.array([0.5, np.nan]))


def random_predictions(rows, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1.2, rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return labels, (1 / (1 + np.exp(-logits - rng.normal(0, 1, rows)))).astype(np.float32)


def added(labels, probabilities, pieces=7):
    scores = Scores()
    for piece in zip(np.array_split(labels, pieces), np.array_split(probabilities, pieces)):
        scores.add(*piece)
    return scores.result()


@pytest.mark.parametrize("rows", [50, 20_000, 300_000])
def test_scores_of_a_stream_are_those_of_scikit_learn(rows):
    labels, probabilities = random_predictions(rows)
    got, want = added(labels, probabilities), score(labels, probabilities)
    assert got["auc"] == pytest.approx(want["auc"], abs=3e-7)
    assert got["log_loss"] == pytest.approx(want["log_loss"], rel=1e-12)
    assert got["rows"] == want["rows"] == rows


def test_equal_predictions_are_ties():
    labels, probabilities = random_predictions(5000)
    probabilities = probabilities.round(1)
    assert added(labels, probabilities)["auc"] == pytest.approx(score(labels, probabilities)["auc"], abs=1e-12)


def test_scores_at_the_ends():
    labels = np.array([0, 1, 1, 0, 1], np.float32)
    probabilities = np.array([0, 1, 1, -0.0, 1e-30], np.float32)
    got, want = added(labels, probabilities, pieces=2), score(labels, probabilities)
    assert got["auc"] == want["auc"] == 1
    assert got["log_loss"] == pytest.approx(want["log_loss"], rel=1e-9)


@pytest.mark.parametrize("label", [0, 1])
def test_rows_of_one_label_have_a_log_loss_and_no_auc(label):
    probabilities = np.array([0.1, 0.2, 0.9], np.float32)
    of_label = probabilities.astype(float) if label else 1 - probabilities.astype(float)
    want = {"auc": None, "log_loss": pytest.approx(-np.log(of_label).mean(), rel=1e-12), "rows": 3}
    assert score(np.full(3, float(label)), probabilities) == want
    assert added(np.full(3, label, np.float32), probabilities) == want
    assert (describe_auc(None), describe_auc(0.75)) == ("undefined", "0.7500")


def test_scores_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no rows to evaluate"):
        Scores().result()


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.0001, np.inf])
def test_scores_of_what_is_no_probability_are_refused(bad):
    scores = Scores()
    with pytest.raises(ValueError, match="probabilities: expected numbers from 0 to 1"):
        scores.add(np.zeros(2, np.float32), np.array([0.5, bad], np.float32))
    assert not scores.rows
