"""What a run reports."""

import pytest

from dlrm import DLRM, DLRMConfig, TrainingConfig
from dlrm.training.summary import compression, describe_model, describe_result, describe_rows, summary
from dlrm.training.trainer import Progress, Trainer

CONFIG = DLRMConfig(
    embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(8, 1), table_rows=(1000, 2000), compression=None, robe_size=100
)
ROWS = {"train": 70, "validation": 1000, "test": 2000}
HISTORY = [
    {"step": 5, "epoch": 1.0, "train_loss": 0.7, "auc": 0.6, "log_loss": 0.6},
    {"step": 7, "epoch": 1.4, "train_loss": 0.6, "auc": 0.7, "log_loss": 0.5},
]


def trainer(**changes):
    training = TrainingConfig(16, 0.1, "sgd", 2, seed=9, **changes)
    progress = Progress(step=7, history=HISTORY, seconds=2.0)
    return Trainer(DLRM(CONFIG), training, lambda *_: [], 70, dict, progress=progress, show=False)


def test_a_filter_counts_as_embeddings():
    model = DLRM(CONFIG)
    assert compression(model) == 12_000 / 100
    assert describe_model("kaggle", model) == "kaggle, robe: 100 floats of embeddings for 12,000 in full tables (120x)"
    model = DLRM(DLRMConfig(**(CONFIG.to_dict() | {"admission_bytes": 80})))
    assert compression(model) == 12_000 / 120
    assert "100 floats of embeddings and an admission of 80 bytes for 12,000" in describe_model("kaggle", model)


def test_rows_in_words():
    assert describe_rows(ROWS) == "70 rows train, 1,000 validate, 2,000 test"


def test_figures_of_a_finished_run():
    metrics = summary("kaggle", trainer(), {"auc": 0.65, "log_loss": 0.55, "rows": 2000}, ROWS)
    assert metrics.pop("peak_rss_bytes") > 1e6
    assert metrics == {
        "auc": 0.65, "log_loss": 0.55, "validation_auc": 0.7, "best_epoch": 1.4, "target_auc": None,
        "target_epoch": None, "samples_per_second": (70 + 2 * 16) / 2, "array_floats": 100, "admission_bytes": 0,
        "full_floats": 12_000, "compression": 120.0, "sparsity": 0.0, "epochs": 2, "steps": 7, "seed": 9,
        "preset": "kaggle", "embedding": "robe", "processes": 1, "rows": ROWS, "history": HISTORY,
    }  # fmt: skip
    line = "test AUC 0.6500, log loss 0.5500 (weights of epoch 1.40, validation AUC 0.7000); 51 samples/s"
    assert describe_result(metrics) == line
    pruned = describe_result(metrics | {"sparsity": 0.748})
    assert pruned == line.replace("51 samples", "75% of the MLPs' weights are zero; 51 samples")


@pytest.mark.parametrize(("target", "said"), [(0.65, "reached at epoch 1.40"), (0.9, "not reached")])
def test_a_target_has_a_line_of_its_own(target, said):
    metrics = summary("kaggle", trainer(target_auc=target), {"auc": 0.65, "log_loss": 0.55}, ROWS)
    assert describe_result(metrics).splitlines()[0] == f"AUC {target} {said}"
