"""The comparison's pictures, from the rows of data/comparison.csv.

python tests/comparison/pictures.py .github     # the README's two
"""

import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy
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
JOINT_COLORS = dict(zip(compare.JOINT, ("#222222", "#8a8a8a", "#c8553d", "#e8a33d"), strict=True))
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "p3o",  # the same bytes each time
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def line(axis: Axes, name: str, xs: list[float], samples: list[list[float]]) -> None:
    """Means over seeds, a point an x, with the 95 % band of those that have three seeds or more."""
    color = COLORS[name]
    width = 2.2 if name == "V2" else 1.3
    style = LINES.get(name, "--")
    means, halves = zip(*map(compare.interval, samples), strict=True)
    axis.plot(xs, means, style, color=color, linewidth=width, marker=".", label=name)
    known = [len(values) >= 3 for values in samples]
    low = numpy.subtract(means, halves)
    high = numpy.add(means, halves)
    axis.fill_between(
        numpy.array(xs)[known], low[known], high[known], color=color, alpha=0.1, linewidth=0
    )


def legend(figure: Figure, axis: Axes) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False)


def frontier(rows: pandas.DataFrame) -> Figure:
    """Score and gold reward against KL: a dot a run, a cross if it lies beyond the axis.

    A line goes through the means of each β at which no run went beyond 5 nats.
    """
    rows = compare.part_of(rows, "frontier")
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
    titles = {
        "score": "Score: all but DPO and GRPO on one line",
        "gold": "Gold reward: it turns at four to six nats",
    }
    panels = (
        ("score", "score, from the mean at β = 0.1", (-0.8, 1.6)),
        ("gold", "gold reward, nats", (-6, 7)),
    )
    for axis, (name, label, limits) in zip(axes, panels, strict=True):
        for method in compare.METHODS:
            mine = rows[rows.method == method]
            shown = mine[name].clip(limits[0] + 0.1, limits[1] - 0.1)
            axis.plot(mine.kl, shown, ".", color=COLORS[method], markersize=4, alpha=0.6)
            beyond = shown != mine[name]
            axis.plot(mine.kl[beyond], shown[beyond], "x", color=COLORS[method], markersize=5)
            kls, samples = [], []
            for _, found in mine.groupby("beta", sort=False):
                if found.kl.max() < 5:  # beyond, some runs game the reward model, some do not
                    kls.append(found.kl.mean())
                    samples.append(list(found[name]))
            if kls:
                line(axis, method, kls, samples)
        axis.set(xlabel="KL to SFT, nats", ylabel=label, xscale="log", ylim=limits)
        axis.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
        axis.set_xticks([], minor=True)
        axis.set_title(titles[name], loc="left", fontsize=10)
    legend(figure, axes[0])
    return figure


def sensitivity(rows: pandas.DataFrame) -> Figure:
    """Score − β KL at other rates, on stale samples, under an offset."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), sharey=True)
    parts = (
        ("rate", "lr", "learning rate", "Learning rate: a cliff at 4e-3 to 8e-3"),
        (
            "staleness",
            "epochs",
            "passes over the same samples",
            "Stale samples cost PPO and V1 most",
        ),
        ("offset", "offset", "standard deviation of δ(x)", "δ(x): pairs do not notice"),
    )
    for axis, (part, column, label, title) in zip(axes, parts, strict=True):
        found = compare.part_of(rows, part)
        for method in compare.METHODS:
            mine = found[found.method == method].groupby(column).reached
            if len(mine):
                line(axis, method, list(mine.groups), [list(values) for _, values in mine])
        axis.set_xlabel(label)
        axis.set_title(title, loc="left", fontsize=10)
        if part == "rate":
            axis.set_xscale("log")
        else:  # 0 or 1 on the left, in even steps of a factor
            axis.set_xscale("symlog", base=2, linthresh=1)
            ticks = sorted(set(found[column]))
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel("score − β KL, from the mean as tuned\n(cut at −1.5)")
    axes[0].set_ylim(-1.5, 0.3)
    legend(figure, axes[0])
    return figure


def head_to_head(rows: pandas.DataFrame, kl: float = 2.5) -> Figure:
    """How often a method's answer beats another's to the same prompt, at about the same KL."""
    wins = compare.head_to_head(rows, kl)
    methods = list(compare.METHODS)
    figure, axis = plt.subplots(figsize=(6.4, 5.2))
    means = [[statistics.mean(wins[a, b]) for b in methods] for a in methods]
    axis.imshow(means, cmap="RdBu", vmin=0.3, vmax=0.7)
    for i, a in enumerate(methods):
        for j, b in enumerate(methods):
            mean, half = compare.interval(wins[a, b])
            text = "" if a == b else f"{mean:.2f}\n±{half:.2f}"
            color = "black" if 0.35 < mean < 0.65 else "white"
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(methods)), methods, rotation=45, ha="right")
    axis.set_yticks(range(len(methods)), methods)
    axis.set_title(f"Win rate of the row over the column, KL near {kl:g} nats", fontsize=10)
    return figure


def gaming(rows: pandas.DataFrame) -> Figure:
    """Gold reward against score along a long run at a low β, a panel a seed; a ring ends it."""
    rows = rows[rows.part == "gaming"]
    seeds = sorted(set(rows.seed))
    figure, axes = plt.subplots(1, len(seeds), figsize=(9.5, 3.3), sharey=True, squeeze=False)
    for axis, seed in zip(axes[0], seeds, strict=True):
        for method in compare.METHODS:
            for points in compare.course(rows[rows.seed == seed], method):  # (points, 3)
                _, scores, golds = points.T  # (points,) each
                style = LINES.get(method, "--")
                axis.plot(scores, golds, style, color=COLORS[method], marker=".", label=method)
                axis.plot(scores[-1], golds[-1], "o", color=COLORS[method], fillstyle="none")
        axis.set_title(f"seed {seed}", loc="left", fontsize=9)
    axes[0, 0].set_ylabel("gold reward, nats")
    figure.supxlabel("score of the reward model", fontsize=9)
    figure.suptitle(
        "A long run at β = 0.025: the score rises, the gold reward mostly falls", fontsize=10
    )
    legend(figure, axes[0, 0])
    return figure


def joint(rows: pandas.DataFrame) -> Figure:
    """Gold reward by the share of the preferences, in stages and at once: a dot a run."""
    rows = compare.part_of(rows, "joint")
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    for name in compare.JOINT:
        mine = rows[rows.method == name]
        means = mine.groupby("knob").gold.mean()
        axis.plot(means.index, means, "-", color=JOINT_COLORS[name], label=name)
        axis.plot(mine.knob, mine.gold, ".", color=JOINT_COLORS[name])
    axis.set(xlabel="share of the 12,000 preferences", xscale="log", ylim=(-4, 6))
    axis.set_ylabel("gold reward, nats (cut at −4)")
    axis.set_xticks(compare.SHARES, [f"{share:.0%}" for share in compare.SHARES], minor=False)
    axis.set_title(
        "Learned at once: no better when preferences are scarce", loc="left", fontsize=10
    )
    legend(figure, axis)
    return figure


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("folder", type=Path, help="where frontier.svg and sensitivity.svg go")
    args = parser.parse_args()
    rows = compare.read_rows()
    with matplotlib.rc_context(STYLE):
        for picture in (frontier, sensitivity):
            path = args.folder / f"{picture.__name__}.svg"
            picture(rows).savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
