"""The generated rows: reproducible, readable by the reader, and scored best by their own probabilities."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from data import synthetic
from data.formats.criteo_tsv import CriteoTSV
from data.rows import Batch
from data.synthetic import CARDINALITIES, DENSE_MISSING, POSITIVE_RATE, SPARSE_MISSING, Signal, write

ROWS = 60_000


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "rows.tsv"
    signal = write(path, ROWS, seed=3)
    return path, signal, Batch.concatenate(list(CriteoTSV(path).read()))


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path, generated):
    write(tmp_path / "again.tsv", ROWS, seed=3)
    assert (tmp_path / "again.tsv").read_bytes() == generated[0].read_bytes()
    write(tmp_path / "other.tsv", 100, seed=4)
    assert (tmp_path / "other.tsv").read_text().splitlines() != generated[0].read_text().splitlines()[:100]


def test_gzipped_and_unlabelled_hold_the_same_rows(tmp_path, generated):
    _, _, batch = generated
    write(tmp_path / "rows.tsv.gz", 1000, seed=3)
    rows = Batch.concatenate(list(CriteoTSV(tmp_path / "rows.tsv.gz").read()))
    write(tmp_path / "unlabelled.tsv", 1000, seed=3, labelled=False)
    file = CriteoTSV(tmp_path / "unlabelled.tsv")
    assert not file.labelled
    np.testing.assert_array_equal(rows.sparse, Batch.concatenate(list(file.read())).sparse)
    assert len(rows) == 1000
    assert len(batch) == ROWS


def test_columns_look_like_criteo(generated):
    _, _, batch = generated
    np.testing.assert_allclose((batch.sparse == 0).mean(0), SPARSE_MISSING, atol=0.01)
    assert (batch.dense == 0).mean(0)[0] > DENSE_MISSING[0]  # missing, and zeros besides
    for column, cardinality in enumerate(CARDINALITIES):
        ids, counts = np.unique(batch.sparse[:, column][batch.sparse[:, column] != 0], return_counts=True)
        assert len(ids) <= cardinality
        if cardinality > 100:
            # Zipf: the most frequent id is far above the mean, and large tables are far from exhausted.
            assert counts.max() > 10 * counts.mean()
    assert len(np.unique(batch.sparse)) > 50_000


def test_permutation_is_one_to_one():
    x = np.concatenate([np.arange(1 << 16), 2**32 - 1 - np.arange(1 << 16)]).astype(np.uint32)
    np.testing.assert_array_equal(synthetic._unpermute32(synthetic._permute32(x)), x)


def test_effects_are_standard_normal():
    effects = synthetic._normal(7, np.arange(200_000))
    assert abs(effects.mean()) < 0.01
    assert abs(effects.std() - 1) < 0.01
    assert abs((effects > 1.96).mean() - 0.025) < 0.002
    assert abs(np.corrcoef(effects, synthetic._normal(8, np.arange(200_000)))[0, 1]) < 0.01


def test_labels_follow_the_true_probabilities(generated):
    """Calibrated in every tenth of the probabilities: within 4 standard errors of the mean probability."""
    _, signal, batch = generated
    probability = expit(signal.logits(batch.dense, batch.sparse))
    assert abs(batch.labels.mean() - POSITIVE_RATE) < 0.01
    for part in np.array_split(np.argsort(probability), 10):
        error = batch.labels[part].mean() - probability[part].mean()
        assert abs(error) < 4 * np.sqrt((probability[part] * (1 - probability[part])).mean() / len(part))


def test_bayes_auc_is_that_of_the_probabilities(generated):
    """The expected AUC by its definition, sum over pairs of p (1 - q) [p > q], against fresh and against read rows."""
    _, signal, batch = generated
    logits = signal.logits(batch.dense, batch.sparse)
    p = np.sort(expit(logits))
    expected = (p * np.concatenate([[0], np.cumsum(1 - p)[:-1]])).sum() / (
        p.sum() * (1 - p).sum() - (p * (1 - p)).sum()
    )
    assert signal.bayes_auc(200_000) == pytest.approx(expected, abs=0.005)
    assert roc_auc_score(batch.labels, logits) == pytest.approx(expected, abs=0.008)
    assert 0.75 < expected < 0.85


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Signal, "records", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "rows.tsv", 10)
    assert list(tmp_path.iterdir()) == []


def test_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Signal, "bayes_auc", lambda self: 0.8)
    path = tmp_path / "new" / "rows.tsv"
    monkeypatch.setattr("sys.argv", ["synthetic", "--rows", "50", "--output", str(path)])
    assert synthetic.main() == 0
    assert len(path.read_text().splitlines()) == 50
    assert "50 rows, best possible AUC 0.8000" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["synthetic", "--rows", "50", "--output", str(path / "below.tsv")])
    assert synthetic.main() == 2
    assert "error: " in capsys.readouterr().err
