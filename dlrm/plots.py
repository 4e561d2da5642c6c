"""Pictures of training runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def learning_curves(
    path: Path, runs: Mapping[str, Sequence[dict[str, float]]], best_possible: float | None = None
) -> None:
    """Draw validation AUC, and the loss in training and validation, against epochs.

    Args:
        path: of the PNG.
        runs: label -> history, as in dlrm.trainer.Progress.
        best_possible: the AUC of the true probabilities on the test rows, to draw as a line.
    """
    import matplotlib  # imported where it is used: it takes half a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for label, history in runs.items():
        epochs = [point["epoch"] for point in history]
        (line,) = left.plot(epochs, [point["auc"] for point in history], marker="o", markersize=3, label=label)
        for what, style in (("train_loss", "-"), ("log_loss", "--")):
            losses = [point[what] for point in history]
            right.plot(epochs, losses, style, marker="o", markersize=3, color=line.get_color())
    if best_possible is not None:
        left.axhline(best_possible, color="black", linestyle="--", linewidth=1, label="best possible, test rows")
    left.set(xlabel="epoch", ylabel="AUC", title="Validation AUC")
    right.set(xlabel="epoch", ylabel="log loss", title="Training loss (epoch so far); dashed: validation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
