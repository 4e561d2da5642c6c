"""Plots of training runs and of measurements."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def learning_curves(
    path: Path, runs: Mapping[str, Sequence[dict[str, Any]]], best_possible: float | None = None
) -> None:
    """Plot validation AUC, and the loss in training and validation, against epochs.

    Args:
        path: of the PNG file.
        runs: label -> history, as in dlrm.training.trainer.Progress.
        best_possible: the AUC of the true probabilities on the test rows, drawn as a line.
    """
    import matplotlib  # here, since it takes half a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for label, history in runs.items():
        epochs = [point["epoch"] for point in history]
        (line,) = left.plot(epochs, [_or_nan(point["auc"]) for point in history], marker="o", markersize=3, label=label)
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


def _or_nan(value: float | None) -> float:
    """Return what matplotlib leaves out of a line for None."""
    return math.nan if value is None else value


def throughput(path: Path, results: Sequence[dict[str, Any]], stages: Sequence[str]) -> None:
    """Plot rows per second against the batch size, and the share of time that each stage takes.

    Args:
        path: of the PNG file.
        results: as in dlrm.inference.throughput.report.
        stages: in the order in which they are stacked.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["candidate"] for result in results))
    sizes = sorted({result["batch_size"] for result in results})
    of = {(result["candidate"], result["batch_size"]): result for result in results}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for name in names:
        left.plot([of[name, size]["rows_per_second"] for size in sizes], marker="o", markersize=3, label=name)
    left.set(yscale="log", xlabel="batch size", ylabel="rows a second", title="Throughput")
    left.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    left.grid(alpha=0.3)
    left.legend(fontsize="small")

    told = [name for name in names if of[name, sizes[0]]["stages"]]
    longest = [max(sum(of[name, size]["stages"].values()) for name in told) for size in sizes]
    width = 0.8 / len(told)
    for i, name in enumerate(told):
        places = [x + (i - (len(told) - 1) / 2) * width for x in range(len(sizes))]
        bottom = [0.0] * len(sizes)
        for stage, colour in zip(stages, ("tab:orange", "tab:green", "tab:gray")):
            heights = [of[name, size]["stages"][stage] / whole * 100 for size, whole in zip(sizes, longest)]
            right.bar(places, heights, width * 0.92, bottom, color=colour, label=None if i else stage)
            bottom = [x + y for x, y in zip(bottom, heights)]
        for x, y in zip(places, bottom):
            right.annotate(str(i + 1), (x, y), ha="center", va="bottom", fontsize="x-small")
    right.set(
        xlabel="batch size", ylabel="% of the longest at that batch size", title="Where the time goes", ylim=(0, 140)
    )
    right.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    right.grid(alpha=0.3, axis="y")
    key = "\n".join(f"{i + 1}: {name}" for i, name in enumerate(told))
    right.legend(title=key, fontsize="small", title_fontsize="small", ncols=len(stages), loc="upper center")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
