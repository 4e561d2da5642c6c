"""What is in Criteo data: how many rows, how many clicks, what is missing, how many ids and how often they occur."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.counts import TOP_IDS, IdCounts
from data.rows import DENSE_NAMES, MISSING, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES
from data.sources import Source

SAMPLED_IDS = 1 << 16  # of each feature: numbers of different ids above this are estimated, to half a percent or so


@dataclass
class Description:
    """Of rows.

    Attributes:
        positives: None without labels.
        missing: share of rows without a value, by column; floating-point columns have no way to tell.
        smallest, largest: values of the 13 dense columns that are not missing.
        ids: the counts of the 26 features' ids.
        zeros: how often each feature has id 0, that is, none.
    """

    path: Path
    rows: int = 0
    positives: int | None = None
    missing_dense: np.ndarray = field(default_factory=lambda: np.zeros(NUM_DENSE, np.int64))
    smallest: np.ndarray = field(default_factory=lambda: np.full(NUM_DENSE, np.inf))
    largest: np.ndarray = field(default_factory=lambda: np.full(NUM_DENSE, -np.inf))
    zeros: np.ndarray = field(default_factory=lambda: np.zeros(NUM_SPARSE, np.int64))
    ids: IdCounts | None = None
    ids_a_row: list[int] = field(default_factory=lambda: [1] * NUM_SPARSE)


def describe(source: Source, progress: Callable[[int], object] = lambda _: None) -> Description:
    """Read all rows once, in bounded memory."""
    features = source.layout.features
    counts = IdCounts(features, SAMPLED_IDS)
    found = Description(source.path, positives=0 if source.labelled else None, ids=counts)
    found.ids_a_row = [ids.stop - ids.start for ids in features]
    for records in source.records():
        found.rows += len(records)
        if found.positives is not None:
            found.positives += int(records["label"].sum())
        dense = records["dense"].astype(np.float64)
        missing = dense == MISSING
        found.missing_dense += missing.sum(0)
        if len(records):
            found.smallest = np.minimum(found.smallest, np.where(missing, np.inf, dense).min(0))
            found.largest = np.maximum(found.largest, np.where(missing, -np.inf, dense).max(0))
        zeros = records["sparse"] == 0
        found.zeros += [int(zeros[:, ids].sum()) for ids in features]
        counts.add(records)
        progress(len(records))
    return found


def table(found: Description) -> str:
    """As text. Ids: how many different ones (~: estimated), and how many rows the most frequent one is in."""
    assert found.ids is not None
    rate = "no labels" if found.positives is None else f"{found.positives / max(found.rows, 1):.4%} positive"
    lines = [f"{found.path}: {found.rows:,} rows, {rate}", "", f"{'':8}{'missing':>9}{'smallest':>14}{'largest':>14}"]
    for name, missing, low, high in zip(DENSE_NAMES, found.missing_dense, found.smallest, found.largest):
        values = f"{low:14.6g}{high:14.6g}" if low <= high else f"{'-':>14}{'-':>14}"
        lines.append(f"{name:8}{missing / max(found.rows, 1):9.2%}{values}")
    lines += ["", f"{'':8}{'missing':>9}{'ids':>14}{'most frequent':>16}{'seen once':>11}"]
    for feature, name in enumerate(SPARSE_NAMES):
        occurrences = max(found.rows * found.ids_a_row[feature], 1)
        _, counts = found.ids.counts(feature)
        sample, share = found.ids.sampled(feature)
        top = counts[0] if len(counts) else 0
        different = f"{'~' if share < 1 else ''}{found.ids.distinct(feature):,}"
        once = (sample == 1).mean() if len(sample) else 0
        lines.append(
            f"{name:8}{found.zeros[feature] / occurrences:9.2%}{different:>14}{top / occurrences:16.2%}{once:11.1%}"
        )
    return "\n".join(lines)


def plot_frequencies(found: Description, path: Path) -> None:
    """Draw, for each feature, the share of rows of an id against its rank; a PNG."""
    import matplotlib  # imported where it is used: it takes half a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    assert found.ids is not None
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    order = sorted(range(NUM_SPARSE), key=found.ids.distinct, reverse=True)
    for place, feature in enumerate(order):
        ranks, shares = frequency_curve(found, feature)
        color = pyplot.get_cmap("viridis")(place / NUM_SPARSE)
        label = f"{SPARSE_NAMES[feature]} ({found.ids.distinct(feature):,})"
        axes.loglog(ranks, shares, color=color, linewidth=1.2, marker="." if len(ranks) < 30 else "", label=label)
    axes.set(
        xlabel="rank of the id, most frequent first",
        ylabel="share of rows that have it",
        title=f"How often ids occur: {found.path.name}, {found.rows:,} rows",
    )
    axes.grid(alpha=0.3)
    axes.legend(title="feature (different ids)", ncols=2, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def frequency_curve(found: Description, feature: int) -> tuple[np.ndarray, np.ndarray]:
    """(ranks, share of rows): the most frequent ids one by one, the others by the sample."""
    assert found.ids is not None
    _, counts = found.ids.counts(feature)
    sample, share = found.ids.sampled(feature)
    if share < 1:
        # The first ones are among those that are always kept; below them, each of the sample stands for 1 / share ids.
        top = counts[: TOP_IDS // 2]
        ranks = np.arange(1, len(sample) + 1) / share
        below = ranks > len(top)
        rest = np.minimum(sample[below], top[-1])
        return np.concatenate([np.arange(1, len(top) + 1), ranks[below]]), np.concatenate([top, rest]) / found.rows
    return np.arange(1, len(counts) + 1), counts / found.rows
