"""The report of a training run: lines for the terminal, and the figures of metrics.json."""

from collections.abc import Mapping
from typing import Any

from dlrm.machine import peak_rss_bytes
from dlrm.metrics import describe_auc
from dlrm.model import DLRM
from dlrm.sparsity import sparsity
from dlrm.training.trainer import Trainer


def embedding_floats(model: DLRM) -> int:
    """Return the number of weights in a model's embeddings."""
    return sum(p.numel() for p in model.embeddings.parameters())


def compression(model: DLRM) -> float:
    """Return the bytes of the full tables over the bytes kept, an admission's filter included."""
    return 4 * model.config.full_floats / (4 * embedding_floats(model) + model.config.admission_bytes)


def describe_model(preset: str, model: DLRM) -> str:
    """Return a line on the size of a model's embeddings."""
    config = model.config
    admission = f" and an admission of {config.admission_bytes:,} bytes" if config.admission_bytes else ""
    return (
        f"{preset}, {config.embedding}: {embedding_floats(model):,} floats of embeddings{admission} for "
        f"{config.full_floats:,} in full tables ({compression(model):.4g}x)"
    )


def describe_rows(rows: Mapping[str, int]) -> str:
    """Return the numbers of rows in each part, in words."""
    return f"{rows['train']:,} rows train, {rows['validation']:,} validate, {rows['test']:,} test"


def describe_result(metrics: Mapping[str, Any]) -> str:
    """Return the result of a finished run in one or two lines.

    Args:
        metrics: as in ``summary``.
    """
    target, epoch = metrics["target_auc"], metrics["target_epoch"]
    reached = "not reached" if epoch is None else f"reached at epoch {epoch:.2f}"
    return (
        (f"AUC {target} {reached}\n" if target else "")
        + f"test AUC {describe_auc(metrics['auc'])}, log loss {metrics['log_loss']:.4f} (weights of epoch "
        f"{metrics['best_epoch']:.2f}, validation AUC {describe_auc(metrics['validation_auc'])}); "
        + (f"{metrics['sparsity']:.0%} of the MLPs' weights are zero; " if metrics["sparsity"] else "")
        + f"{metrics['samples_per_second']:,.0f} samples/s"
    )


def summary(preset: str, trainer: Trainer, test: Mapping[str, Any], rows: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures of a finished run.

    Args:
        preset: its name.
        trainer: after training.
        test: scores on the test rows, with "auc" (None where their labels are all the same) and "log_loss".
        rows: in the parts "train", "validation" and "test".
    """
    progress, config = trainer.progress, trainer.model.config
    return {
        "auc": test["auc"],
        "log_loss": test["log_loss"],
        "validation_auc": progress.best["auc"],
        "best_epoch": progress.best["epoch"],
        "target_auc": trainer.config.target_auc,
        "target_epoch": trainer.reached and trainer.reached["epoch"],
        "samples_per_second": trainer.trained_rows / progress.seconds,
        "array_floats": embedding_floats(trainer.model),
        "admission_bytes": config.admission_bytes,
        "full_floats": config.full_floats,
        "compression": compression(trainer.model),
        "sparsity": sparsity(trainer.model) if trainer.config.prune else 0.0,
        "epochs": trainer.config.epochs,
        "steps": progress.step,
        "peak_rss_bytes": peak_rss_bytes(),
        "seed": trainer.config.seed,
        "preset": preset,
        "embedding": config.embedding,
        "processes": trainer.world.size,
        "rows": dict(rows),
        "history": progress.history,
    }
