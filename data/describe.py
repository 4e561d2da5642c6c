"""Description of data: rows, clicks, missing values, ids and their frequencies, as a table and as a plot."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.counts import TOP_IDS, IdCounts
from data.schema import DENSE_NAMES, MISSING, NUM_DENSE, NUM_SPARSE, SPARSE_NAMES, printable
from data.sources import Source

# Distinct ids of each feature that are counted. The number of distinct ids is exact up to this, above it is estimated
# with an error of half a percent or so.
SAMPLED_IDS = 1 << 16


@dataclass
class Description:
    """Numbers that describe rows.

    Attributes:
        path: of the data.
        rows: how many there are.
        positives: how many were clicked; None without labels.
        missing_dense: (13,), rows without a value, by column; 0 for floating-point columns, which can't be missing.
        smallest: (13,), the smallest value that is not missing, by column.
        largest: (13,), the largest one.
        zeros: (26,), how often a feature has id 0, a missing value.
        ids: counts of the features' ids.
        ids_a_row: the number of ids of each feature in a row.
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
    """Describe the rows of a source, which are read once, in bounded memory.

    Args:
        source: of the rows.
        progress: called with the number of rows after each piece.

    Raises:
        DataError: a row can't be read.
    """
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
    """Return a description as a table of text.

    For each category it has the share of missing values, the number of distinct ids (~ if estimated), the share of the
    most frequent id, and the share of ids that occur once.
    """
    assert found.ids is not None
    rate = "no labels" if found.positives is None else f"{found.positives / max(found.rows, 1):.4%} positive"
    lines = [
        f"{printable(found.path)}: {found.rows:,} rows, {rate}",
        "",
        f"{'':8}{'missing':>9}{'smallest':>14}{'largest':>14}",
    ]
    for name, missing, low, high in zip(DENSE_NAMES, found.missing_dense, found.smallest, found.largest):
        values = f"{low:14.6g}{high:14.6g}" if low <= high else f"{'-':>14}{'-':>14}"
        lines.append(f"{name:8}{missing / max(found.rows, 1):9.2%}{values}")
    lines += ["", f"{'':8}{'missing':>9}{'ids':>14}{'most frequent':>16}{'seen once':>11}"]
    for feature, name in enumerate(SPARSE_NAMES):
        occurrences = max(found.rows * found.ids_a_row[feature], 1)
        _, counts = found.ids.counts(feature)
        sample, fraction = found.ids.sampled(feature)
        top = counts[0] if len(counts) else 0
        distinct = f"{'~' if fraction < 1 else ''}{found.ids.distinct(feature):,}"
        once = (sample == 1).mean() if len(sample) else 0
        lines.append(
            f"{name:8}{found.zeros[feature] / occurrences:9.2%}{distinct:>14}{top / occurrences:16.2%}{once:11.1%}"
        )
    return "\n".join(lines)


def plot_frequencies(found: Description, path: Path) -> None:
    """Draw the share of rows that have an id against its rank, a curve for each feature, into a PNG file.

    Args:
        found: the description.
        path: of the PNG.
    """
    import matplotlib  # here because it takes half a second

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
    axes.legend(title="feature (distinct ids)", ncols=2, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def frequency_curve(found: Description, feature: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the curve of a feature: ranks from 1, and the share of rows that have the id of each rank.

    The most frequent ids are there one by one. The others are represented by the sample, if there is one.
    """
    assert found.ids is not None
    _, counts = found.ids.counts(feature)
    sample, fraction = found.ids.sampled(feature)
    if fraction < 1:
        # The first ids are always kept. Below them, an id of the sample stands for 1 / fraction ids.
        top = counts[: TOP_IDS // 2]
        ranks = np.arange(1, len(sample) + 1) / fraction
        below = ranks > len(top)
        rest = np.minimum(sample[below], top[-1])
        return np.concatenate([np.arange(1, len(top) + 1), ranks[below]]), np.concatenate([top, rest]) / found.rows
    return np.arange(1, len(counts) + 1), counts / found.rows
