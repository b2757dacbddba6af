"""The comparison's pictures, from the rows of data/comparison.csv; each says one thing.

python tests/tools/draw.py .github/frontier.svg     # the README's
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare

COLORS = {
    "V2": "#c8553d",
    "V1": "#e8a33d",
    "RLOO": "#2a6f97",
    "GRPO": "#7b5ea7",
    "online DPO": "#4a9d6e",
    "REBEL": "#c47ba9",
    "PPO": "#222222",
    "DPO": "#8a8a8a",
}
LINES = {"V2": "-", "V1": "-", "PPO": "-", "DPO": ":"}  # of the others: dashed
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "p3o",  # the same bytes each time
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def curve(axis: Axes, rows: pandas.DataFrame, method: str, x: str, y: str, column: str) -> None:
    """Means over seeds of y against x, a point a value of `column`, with a 95 % band of y."""
    xs, ys, halves = [], [], []
    for _, found in rows[rows.method == method].groupby(column):
        mean, half = compare.interval(found[y])
        xs.append(found[x].mean())
        ys.append(mean)
        halves.append(half if math.isfinite(half) else 0)
    order = sorted(range(len(xs)), key=xs.__getitem__)
    xs, ys, halves = ([values[i] for i in order] for values in (xs, ys, halves))
    width = 2.2 if method == "V2" else 1.4
    style = LINES.get(method, "--")
    axis.plot(xs, ys, style, color=COLORS[method], linewidth=width, marker=".", label=method)
    low = [value - half for value, half in zip(ys, halves, strict=True)]
    high = [value + half for value, half in zip(ys, halves, strict=True)]
    axis.fill_between(xs, low, high, color=COLORS[method], alpha=0.1, linewidth=0)


def frontier(rows: pandas.DataFrame, figures: tuple[str, ...] = ("gold", "score")) -> Figure:
    """Reward against KL, a point for each β."""
    rows = rows[rows.part == "frontier"]
    figure, axes = plt.subplots(1, len(figures), figsize=(4.5 * len(figures), 3.6), squeeze=False)
    labels = {"gold": "gold reward, nats", "score": "score of the reward model"}
    for axis, name in zip(axes[0], figures, strict=True):
        for method in compare.METHODS:
            curve(axis, rows, method, "kl", name, "beta")
        axis.set(xlabel="KL to SFT, nats", ylabel=labels[name], xscale="log")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    return figure


def sensitivity(rows: pandas.DataFrame) -> Figure:
    """What is left of score − β KL, away from the tuned rate, on stale samples, under an offset."""
    rows = rows.assign(reached=compare.reached(rows))
    best = {method: lr for method, (lr, _) in compare.tuned(rows).items()}
    rows = rows.assign(factor=rows.lr / rows.method.map(best))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for axis, part, column, label in (
        (axes[0], "rate", "factor", "learning rate, times the tuned one"),
        (axes[1], "staleness", "epochs", "passes over the same samples"),
        (axes[2], "offset", "offset", "standard deviation of δ(x)"),
    ):
        for method in compare.METHODS:
            found = rows[rows.part == part].round({"factor": 4})
            curve(axis, found, method, column, "reached", column)
        axis.set_xlabel(label)
        axis.set_xscale("symlog" if part == "offset" else "log", base=2)
    axes[0].set_ylabel("score − β KL")
    axes[0].set_ylim(-1, None)
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    return figure


def head_to_head(rows: pandas.DataFrame, kl: float = 2.0) -> Figure:
    """How often a method's answer beats another's to the same prompt, at about the same KL."""
    wins = compare.head_to_head(rows, kl)
    methods = list(compare.METHODS)
    figure, axis = plt.subplots(figsize=(6, 5))
    means = [[statistics.mean(wins[a, b]) for b in methods] for a in methods]
    axis.imshow(means, cmap="RdBu", vmin=0.3, vmax=0.7)
    for i, a in enumerate(methods):
        for j, b in enumerate(methods):
            mean, half = compare.interval(wins[a, b])
            text = "" if a == b else f"{mean:.2f}\n±{half:.2f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(methods)), methods, rotation=45, ha="right")
    axis.set_yticks(range(len(methods)), methods)
    axis.set_title(f"win rate of the row over the column, at a KL near {kl:g} nats", fontsize=9)
    figure.tight_layout()
    return figure


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("svg", type=Path, help="where to write the frontier")
    args = parser.parse_args()
    with matplotlib.rc_context(STYLE):
        frontier(compare.read_rows()).savefig(args.svg, metadata={"Date": None})


if __name__ == "__main__":
    main()
