"""Draw AUC against compression from the results of benchmarks.accuracy.

    python -m benchmarks.accuracy_plot docs/results/accuracy.json docs/images/accuracy.png

Takes a second. Reads the JSON that benchmarks.accuracy writes, and writes a PNG of 1200 x 675 pixels. A line is drawn
for each method of SHOWN that the results have, labelled at its end; the other methods are in the table only.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trials import ADMISSION, FULL
from robe_files import whole_file


@dataclass(frozen=True)
class Line:
    """How a method is drawn."""

    label: str
    color: str
    style: str = "-"
    width: float = 2.0


# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
SHOWN = {
    f"{ADMISSION}, int8": Line("ROBE + admission, int8", "#0072B2", width=4.0),
    ADMISSION: Line("ROBE + admission", "#56B4E9", width=3.0),
    "ROBE, authors'": Line("ROBE, authors' hash", "#D55E00"),
    "QR": Line("quotient-remainder", "#CC79A7"),
    "hash trick": Line("hash trick", "#009E73", "--"),
}

_LABEL_SPACE = 0.058  # of the height of the axes, between the centres of two labels


def plot(path: Path, results: dict[str, Any]) -> None:
    """Draw a method's mean test AUC against compression, with bars of one standard deviation over the seeds.

    Args:
        path: of the PNG.
        results: the content of accuracy.json: table, full_bytes and best_possible_auc are used.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    compressions = sorted({x["trial"]["compression"] for x in results["table"] if x["trial"]["method"] != FULL})
    ends: list[tuple[float, Line]] = []  # AUC and line
    for method, line in reversed(SHOWN.items()):  # the winner on top
        points = sorted(
            (x for x in results["table"] if x["trial"]["method"] == method), key=lambda x: x["trial"]["compression"]
        )
        if points:
            axes.errorbar(
                [x["trial"]["compression"] for x in points],
                [x["mean"] for x in points],
                yerr=[x["sd"] for x in points],
                color=line.color,
                linestyle=line.style,
                linewidth=line.width,
                elinewidth=1.2,
                capsize=3,
                marker="o",
                markersize=3 + line.width,
            )
            ends.append((points[-1]["mean"], line))
    full_line = Line(f"full tables, {size(results['full_bytes'])}", "#222222")
    levels = [(x["mean"], full_line) for x in results["table"] if x["trial"]["method"] == FULL]
    if results["best_possible_auc"] is not None:
        levels.append((results["best_possible_auc"], Line("best possible", "#666666")))
    for auc, line in levels:
        axes.axhline(auc, color=line.color, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(compressions[0] / 1.6, compressions[-1] * 1.15)
    axes.set_xticks(compressions, [f"{x:,.0f}x\n{size(results['full_bytes'] / x)}" for x in compressions])
    axes.minorticks_off()
    axes.margins(y=0.08)
    axes.set_xlabel("compression, and memory of the embeddings")
    axes.set_ylabel("test AUC")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, levels + ends)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150)


def label_ends(axes: Any, ends: list[tuple[float, Line]]) -> None:
    """Write the labels of lines to the right of the axes, each at its line's end or as near as there is room.

    Args:
        axes: of the plot, with its final limits.
        ends: AUC and line of each label.
    """
    from matplotlib.colors import to_rgb

    low, high = axes.get_ylim()
    for place, (_, line) in zip(spread([auc for auc, _ in ends], _LABEL_SPACE * (high - low)), ends):
        axes.annotate(
            line.label,
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            color=[0.75 * x for x in to_rgb(line.color)],  # thin letters look paler than lines
            fontsize=11,
            fontweight="bold" if line.width > 2 else "normal",
            annotation_clip=False,
        )


def spread(values: list[float], space: float) -> list[float]:
    """Move values apart, as little as possible, so that neighbours differ by at least ``space``."""
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []  # neighbours that touch, lowest first

    def bottom(group: list[int]) -> float:
        return sum(values[i] for i in group) / len(group) - space * (len(group) - 1) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and bottom(groups[-2]) + space * len(groups[-2]) > bottom(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    places = {i: bottom(group) + space * k for group in groups for k, i in enumerate(group)}
    return [places[i] for i in range(len(values))]


def size(count: float) -> str:
    """Return bytes with a unit."""
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="FILE.json", help="written by benchmarks.accuracy")
    parser.add_argument("picture", type=Path, metavar="FILE.png", help="the plot to write")
    args = parser.parse_args()
    plot(args.picture, json.loads(args.results.read_text()))


if __name__ == "__main__":
    main()
