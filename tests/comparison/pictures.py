"""Draw the pictures of the comparison, and the README's picture of a run.

python tests/comparison/pictures.py              # from data/comparison.csv
python tests/comparison/pictures.py runs/small   # from a finished run of p3o.py --small
"""

import argparse
import json
import statistics
import sys
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare

import p3o
from data import judge
from data.preferences import load_pairs

HERE = Path(__file__).resolve().parent
SHOWN = 3  # prompts in the picture of a run
P3O_BLUE = "#0072B2"
GREY = "#777777"
# Colour, marker and line style: each method differs from the others in grey and to colour-blind
# eyes, too.
LOOKS = {
    "V2": (P3O_BLUE, "o", "-"),
    "V1": ("#56B4E9", "s", (0, (6, 1))),
    "RLOO": ("#E69F00", "^", "--"),
    "GRPO": ("#006D4F", "v", ":"),
    "online DPO": ("#CC79A7", "D", "-."),
    "REBEL": ("#882255", "P", (0, (8, 2))),
    "PPO": ("#B2410A", "X", "-"),
    "DPO": (GREY, "*", (0, (3, 1, 1, 1, 1, 1))),
    "pipeline": ("#555555", "s", "--"),
    "pipeline, equal updates": (P3O_BLUE, "o", "-"),
    "AIHF": ("#E69F00", "^", "-."),
    "AIHF, logistic": ("#882255", "P", ":"),
}
TITLE = dict(loc="left", fontsize=10)
STYLE = {
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "p3o",  # the same input gives the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def looks(method: str) -> dict:
    """Return a method's plot options; P3O (V2) is drawn above all others."""
    color, marker, style = LOOKS[method]
    name = compare.NAMES.get(method, method)
    found = dict(color=color, marker=marker, linestyle=style, label=name)
    found |= dict(markersize=6, markeredgewidth=0)
    main = method in ("V2", "pipeline, equal updates")
    return found | (dict(linewidth=2.4, zorder=5) if main else dict(linewidth=1.3, zorder=3))


def line(axis: Axes, method: str, xs: list[float], samples: list[list[float]]) -> None:
    """Plot means over seeds, with a 95 % interval where there are three seeds or more."""
    means, halves = zip(*map(compare.interval, samples), strict=True)
    known = [half if len(values) >= 3 else 0 for half, values in zip(halves, samples, strict=True)]
    shown = looks(method)
    axis.plot(xs, means, **shown)
    axis.errorbar(xs, means, known, fmt="none", ecolor=shown["color"], elinewidth=0.8)


def legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=3.2)


# ---- The comparison ----------------------------------------------------------------------
def offset(rows: pandas.DataFrame) -> Figure:
    """Change of score − β KL by the size of the offset δ(x), against the same seed without it."""
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    spreads = (0, *compare.OFFSETS)  # evenly spaced on the axis
    changes = {sd: compare.change(rows, "offset", "offset", sd) for sd in compare.OFFSETS}
    for number, method in enumerate(compare.ONLINE):
        mine = {sd: found[method] for sd, found in changes.items() if method in found}
        shift = 0 if method == "PPO" else 0.05 * number - 0.125  # side by side
        xs = [0] + [spreads.index(sd) + shift for sd in mine]
        line(axis, method, xs, [[0.0, 0.0], *mine.values()])
    axis.axhline(0, color=GREY, linewidth=0.6)
    axis.set_xticks(range(len(spreads)), [f"{sd:g}" for sd in spreads])
    axis.set_xlabel("standard deviation of δ(x), in units of a typical r₁ − r₂")
    axis.set_ylabel("change of score − β KL")
    axis.set_title(
        "An offset δ(x), which preferences cannot show,\nruins PPO and no pairwise method",
        **TITLE,
    )
    axis.legend(loc="lower left", frameon=False, handlelength=3)
    return figure


def frontier(rows: pandas.DataFrame) -> Figure:
    """Score and gold reward against KL: a point per run, a cross if it lies beyond the axis.

    A line joins the means of each β at which no run passed 5 nats.
    """
    rows = compare.part_of(rows, "frontier")
    figure, axes = plt.subplots(1, 2, figsize=(8.8, 3.9))
    panels = (
        ("score", "score, from the mean at β = 0.1", (-0.8, 1.6)),
        ("gold", "gold reward, nats", (-6, 7)),
    )
    titles = (
        "Score: one frontier for all but DPO and GRPO",
        "Gold reward: falls beyond about six nats",
    )
    for axis, (name, label, limits), title in zip(axes, panels, titles, strict=True):
        for method in compare.METHODS:
            mine = rows[rows.method == method]
            shown = mine[name].clip(limits[0] + 0.1, limits[1] - 0.1)
            points = looks(method) | dict(linestyle="", label="", markersize=4, alpha=0.5)
            within = shown == mine[name]
            axis.plot(mine.kl[within], shown[within], **points)
            axis.plot(
                mine.kl[~within],
                shown[~within],
                **points | dict(marker="x", markersize=6, markeredgewidth=1),
            )
            kls, samples = [], []
            for _, found in mine.groupby("beta"):
                if found.kl.max() < 5:  # beyond, some runs game the reward model, some do not
                    kls.append(found.kl.mean())
                    samples.append(list(found[name]))
            if kls:
                line(axis, method, kls, samples)
        axis.set(xlabel="KL to SFT, nats", ylabel=label, xscale="log", ylim=limits)
        axis.set_title(title, **TITLE)
        axis.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
        axis.set_xticks([], minor=True)
    legend(figure, axes[0])
    return figure


def sensitivity(rows: pandas.DataFrame) -> Figure:
    """Score − β KL by learning rate, by passes over the same samples, and by offset."""
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.8), sharey=True)
    panels = (
        ("rate", "lr", "learning rate", "Rate: a cliff at 4 to 8 × tuned"),
        (
            "staleness",
            "epochs",
            "passes over the same samples",
            "Reuse hurts PPO and P3O (V1)",
        ),
        ("offset", "offset", "standard deviation of δ(x)", "An offset hurts PPO alone"),
    )
    for axis, (part, column, label, title) in zip(axes, panels, strict=True):
        found = compare.part_of(rows, part)
        for method in compare.ONLINE:
            mine = found[found.method == method].groupby(column).reached
            line(axis, method, list(mine.groups), [list(values) for _, values in mine])
        axis.set_xlabel(label)
        axis.set_title(title, **TITLE)
        if part == "rate":
            axis.set_xscale("log")
            axis.set_xticks([2.5e-4, 1e-3, 4e-3, 1.6e-2], ["2.5e-4", "1e-3", "4e-3", "1.6e-2"])
            axis.set_xticks([], minor=True)
        else:  # the first value, 0 or 1, on the left; then even steps per factor
            axis.set_xscale("symlog", base=2, linthresh=1)
            ticks = sorted(set(found[column]))
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel("score − β KL, from the mean as tuned\n(cut at −1.5)")
    axes[0].set_ylim(-1.5, 0.3)
    legend(figure, axes[0])
    return figure


def head_to_head(rows: pandas.DataFrame, kl: float = 2.0) -> Figure:
    """How often a method's answer beats another's to the same prompt, both at the same KL."""
    wins = compare.head_to_head(rows, kl)
    methods = list(compare.METHODS)
    names = [compare.NAMES.get(method, method) for method in methods]
    figure, axis = plt.subplots(figsize=(6.4, 5.6))
    means = [[statistics.mean(wins[a, b]) for b in methods] for a in methods]
    axis.imshow(means, cmap="RdBu", vmin=0.2, vmax=0.8)
    for i, a in enumerate(methods):
        for j, b in enumerate(methods):
            text = "" if a == b else compare.cell(wins[a, b], ".2f").replace(" ± ", "\n±")
            color = "black" if 0.3 < means[i][j] < 0.7 else "white"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(methods)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(methods)), names)
    axis.set_title(
        "Answer against answer, online methods tie; offline DPO loses\n"
        f"(win rate of the row over the column, both at a KL of {kl:g} nats)",
        **TITLE,
    )
    return figure


def gaming(rows: pandas.DataFrame) -> Figure:
    """Gold reward against score along a long run at a low β, a panel per seed; rings are ends."""
    rows = rows[rows.part == "gaming"]
    seeds = sorted(set(rows.seed))
    figure, axes = plt.subplots(1, len(seeds), figsize=(9.5, 3.3), sharey=True, squeeze=False)
    for axis, seed in zip(axes[0], seeds, strict=True):
        for method in compare.ONLINE:
            for points in compare.course(rows[rows.seed == seed], method):  # (points, 3)
                _, scores, golds = points.T  # (points,) each
                axis.plot(scores, golds, **looks(method))
                ring = looks(method) | dict(marker="o", markersize=9, label="")
                ring |= dict(fillstyle="none", markeredgewidth=1)
                axis.plot(scores[-1:], golds[-1:], **ring)
        axis.set_title(f"seed {seed}", **TITLE)
    axes[0, 0].set_ylabel("gold reward, nats")
    figure.supxlabel("score of the reward model", fontsize=9)
    figure.suptitle(
        "A long run at β = 0.025: the score rises, the gold reward mostly falls", fontsize=10
    )
    legend(figure, axes[0, 0])
    return figure


def joint(rows: pandas.DataFrame) -> Figure:
    """Gold reward by share of the preferences, reward model first or at once; a point per run."""
    rows = rows[rows.part == "joint"]
    figure, axis = plt.subplots(figsize=(6.8, 3.6))
    for method in compare.JOINT:
        mine = rows[rows.method == method]
        means = mine.groupby("knob").gold.mean()
        axis.plot(means.index, means, **looks(method))
        axis.plot(mine.knob, mine.gold, **looks(method) | dict(linestyle="", label="", alpha=0.4))
    axis.set(xlabel="share of the 12,000 preferences", xscale="log", ylim=(-4, 6))
    axis.set_ylabel("gold reward, nats (cut at −4)")
    axis.set_xticks(compare.SHARES, [f"{share:.0%}" for share in compare.SHARES], minor=False)
    axis.set_title("Learning both at once is no better when preferences are scarce", **TITLE)
    legend(figure, axis)
    return figure


# ---- A run -------------------------------------------------------------------------------
def answers(folder: Path, prompts: list[str]) -> list[tuple[float, str]]:
    """Sample a model's answer to each prompt; return the gold rewards and the answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    torch.manual_seed(0)
    rows, masks = p3o.sample(p3o.load(folder), ids, 1, p3o.SMALL["response_tokens"])
    found = []
    for prompt, row, mask in zip(prompts, rows, masks, strict=True):
        text = tokenizer.decode(row[mask], skip_special_tokens=True)
        found.append((judge.gold_reward(prompt, text), text.strip()))
    return found


def run(folder: Path) -> Figure:
    """Score, KL and gold reward of a finished run, and examples of what SFT and P3O answer."""
    rows = [json.loads(text) for text in (folder / "p3o.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    figure = plt.figure(figsize=(5.2, 5.7), layout="none")
    grid = dict(bottom=0.71, top=0.885, wspace=0.35, left=0.075, right=0.985)
    score, kl, gold = figure.subplots(1, 3, gridspec_kw=grid)
    panels = ((score, "objective/scores", "score"), (kl, "objective/kl", "KL to SFT, nats"))
    for axis, key, title in panels:
        axis.plot([row[key] for row in rows], color=P3O_BLUE)
        axis.set_title(title, **TITLE)
        axis.set_xlabel("iteration")
    for place, name, color in ((0, "sft", GREY), (1, "policy", P3O_BLUE)):
        mean, half = summary[f"gold_{name}"], summary[f"gold_{name}_ci"]
        gold.bar(place, mean, yerr=half, color=color, width=0.6, capsize=4)
    gold.set_xticks([0, 1], ["SFT", "P3O"])
    gold.set_title("gold reward, nats", **TITLE)
    before, after, kl = (summary[key] for key in ("gold_sft", "gold_policy", "kl_policy"))
    verb = "raises" if after > before else "lowers"
    title = f"P3O {verb} the gold reward from {before:.1f} to {after:.1f} nats, at a KL of {kl:.1f}"
    figure.suptitle(title, x=0.015, y=0.985, ha="left", fontsize=10)

    _, heldout = load_pairs(str(p3o.SHIPPED_DATA))
    prompts = list(dict.fromkeys(pair.prompt for pair in heldout))[:50]
    pairs = zip(answers(folder / "sft", prompts), answers(folder / "p3o", prompts), strict=True)
    cases = zip(prompts, pairs, strict=True)
    differ = [(prompt, pair) for prompt, pair in cases if pair[0][0] != pair[1][0]]
    y = 0.585
    title = "The first three held-out prompts whose two answers differ in gold reward:"
    figure.text(0.015, y, title, style="italic")
    for prompt, pair in differ[:SHOWN]:
        y -= 0.05
        question = prompt.removeprefix("\n\nHuman:").removesuffix("\n\nAssistant:").strip()
        figure.text(0.015, y, question, weight="bold")
        speakers = (("SFT", "#555555"), ("P3O", P3O_BLUE))
        for (reward, text), (name, color) in zip(pair, speakers, strict=True):
            said = f"{name} {reward:+.1f}  {text}"
            for part in textwrap.wrap(said, 72, subsequent_indent="    "):
                y -= 0.0345
                figure.text(0.015, y, part, color=color)
    return figure


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("run", type=Path, nargs="?", help="draw this finished run instead")
    args = parser.parse_args()
    with matplotlib.rc_context(STYLE):
        if args.run:
            drawn = {compare.ROOT / ".github" / "run.svg": run(args.run)}
        else:
            rows = compare.read_rows()
            drawn = {compare.ROOT / ".github" / "offset.svg": offset(rows)}
            drawn |= {HERE / f"{draw.__name__}.svg": draw(rows) for draw in (frontier, sensitivity)}
        for path, figure in drawn.items():
            figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
