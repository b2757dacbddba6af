"""Draw the README's picture of a finished run: score, KL, gold reward; what was said.

python p3o.py --small && python tests/comparison/picture.py runs/small .github/run.svg
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data import judge
from data.preferences import load_pairs

SHOWN = 3  # prompts
SFT_COLOR = "#8a8a8a"
P3O_COLOR = "#c8553d"
matplotlib.rcParams |= {
    "svg.fonttype": "none",  # text stays text: smaller, and readable by a screen reader
    "svg.hashsalt": "p3o",  # the same bytes each time
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def answers(run: Path) -> list[tuple[str, list[str]]]:
    """Held-out prompts, each with what SFT and P3O say, each answer with its gold reward."""
    tokenizer = AutoTokenizer.from_pretrained(run / "p3o")
    _, heldout = load_pairs(str(p3o.SHIPPED_DATA))
    prompts = list(dict.fromkeys(pair.prompt for pair in heldout))[:SHOWN]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    said = []
    for name in ("sft", "p3o"):
        torch.manual_seed(0)
        model = p3o.load(run / name)
        rows, mask = p3o.sample(model, ids, 1, p3o.SMALL["response_tokens"])
        said.append(
            [
                tokenizer.decode(r[m], skip_special_tokens=True)
                for r, m in zip(rows, mask, strict=True)
            ]
        )
    found = []
    for prompt, *texts in zip(prompts, *said, strict=True):
        lines = [f"{judge.gold_reward(prompt, text):+.1f}  {text.strip()}" for text in texts]
        question = prompt.removeprefix("\n\nHuman:").removesuffix("\n\nAssistant:").strip()
        found.append((question, lines))
    return found


def draw(run: Path, path: Path) -> None:
    rows = [json.loads(line) for line in (run / "p3o.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    figure = plt.figure(figsize=(9, 4.6))
    score, kl, gold = figure.subplots(
        1, 3, gridspec_kw=dict(bottom=0.53, top=0.92, wspace=0.32, left=0.06, right=0.98)
    )
    for axis, key, title in (
        (score, "objective/scores", "reward model's score"),
        (kl, "objective/kl", "KL to the SFT model, nats"),
    ):
        axis.plot([row[key] for row in rows], color=P3O_COLOR)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
    for i, (name, color) in enumerate((("sft", SFT_COLOR), ("policy", P3O_COLOR))):
        gold.bar(
            i,
            summary[f"gold_{name}"],
            yerr=summary[f"gold_{name}_ci"],
            color=color,
            width=0.6,
            capsize=4,
        )
    gold.set_xticks([0, 1], ["SFT", "P3O"])
    gold.set_title("gold reward, held-out prompts", fontsize=10)
    y = 0.38
    for question, (before, after) in answers(run):
        figure.text(0.06, y, question, weight="bold")
        figure.text(0.06, y - 0.045, f"SFT  {before}", color="#555555")
        figure.text(0.06, y - 0.09, f"P3O  {after}", color=P3O_COLOR)
        y -= 0.135
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a finished run on the shipped data")
    parser.add_argument("svg", type=Path, help="where to write the picture")
    args = parser.parse_args()
    draw(args.run, args.svg)


if __name__ == "__main__":
    main()
