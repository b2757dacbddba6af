"""A judge where no gold reward is known: a reward model trained on pairs that the policy never saw.

    python tests/own/other_half.py split PAIRS DIR [--model MODEL]
    python p3o.py --data DIR/mine --out RUN          # and whatever else you like
    python tests/own/other_half.py judge RUN DIR/other

The run's own reward model is what the policy was trained to please, weak spots included, so a win
rate by it flatters. `split` deals the training prompts out, half to the run and half to the judge;
both hold out the same pairs. `judge` trains a second reward model on the other half, with the run's
options, and lets both judge the same answers. The second is fallible too, and starts from the same
SFT model, but the policy was not trained to please it.
"""

import argparse
import json
import sys
import zlib
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data import judge as rules
from data.preferences import InputError, Pair, load_pairs, try_hub


def write(path: Path, pairs: list[Pair]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for pair in pairs:
            file.write(json.dumps(pair._asdict()) + "\n")


def split(source: str, folder: Path, model: str | None) -> None:
    """Write DIR/mine and DIR/other, each with train.jsonl and test.jsonl, halved by prompt.

    The model's tokenizer is needed for pairs of messages, whose text its chat template makes.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; choose another directory")
    try_hub(source, *([model] if model else []))
    tokenizer = AutoTokenizer.from_pretrained(model) if model else None
    train, heldout = load_pairs(source, tokenizer)
    halves = defaultdict(list)
    for pair in train:
        # by prompt: answers to one prompt are alike, and would give each other away
        half = "other" if zlib.crc32(pair.prompt.encode()) & 64 else "mine"
        halves[half].append(pair)
    for half in ("mine", "other"):
        write(folder / half / "train.jsonl", halves[half])
        write(folder / half / "test.jsonl", heldout)
        print(f"{folder / half}: {len(halves[half])} training, {len(heldout)} held-out pairs")


@torch.no_grad()
def judge(run: Path, other: str) -> dict[str, list[float]]:
    """Each figure's values, one a held-out pair or prompt: accuracies and win rates of both judges.

    `agreement`: how often they prefer the same of the two answers.
    """
    options = json.loads((run / "config.json").read_text())
    names = {field.name for field in fields(p3o.Config)}
    cfg = p3o.Config(**{key: value for key, value in options.items() if key in names})
    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    train, heldout = load_pairs(other)
    torch.manual_seed(cfg.seed)
    second = p3o.load(run / "sft", AutoModelForSequenceClassification, num_labels=1)
    with torch.enable_grad():
        p3o.train_reward(second, p3o.tokenize(train, tokenizer, cfg), cfg, lambda *_: None)
    judges = {"own": p3o.load(run / "reward", AutoModelForSequenceClassification), "other": second}
    sft = p3o.load(run / "sft")
    policy = p3o.load(run / "p3o")
    examples = p3o.tokenize(heldout, tokenizer, cfg)
    figures = defaultdict(list)
    for batch in p3o.parts_of(examples, cfg.minibatch, "pairs"):
        for name, model in judges.items():
            scores = p3o.score_pairs(model, batch)  # (b, 2)
            figures[f"accuracy_{name}"] += (scores[:, 0] > scores[:, 1]).tolist()
    torch.manual_seed(cfg.seed)
    scored = defaultdict(list)
    for batch in p3o.parts_of(examples[: cfg.eval_prompts], cfg.minibatch, "answers"):
        prompts = [example.prompt for example in batch]
        for answers, answerer in (("sft", sft), ("policy", policy)):
            ids, mask = p3o.sample(answerer, prompts, 1, cfg.response_tokens)  # (b, 1, T)
            for name, model in judges.items():
                scored[name, answers] += p3o.reward_scores(model, ids, mask).flatten().tolist()
    for name in judges:
        figures[f"win_rate_{name}"] = rules.wins(scored[name, "policy"], scored[name, "sft"])
    both = zip(figures["win_rate_own"], figures["win_rate_other"], strict=True)
    figures["agreement"] = [own == other for own, other in both]
    return figures


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    split_command = commands.add_parser("split", help="deal the prompts out to run and judge")
    split_command.add_argument("pairs", help="hub name, file or directory, as --data of p3o.py")
    split_command.add_argument("folder", type=Path, metavar="DIR")
    split_command.add_argument("--model", help="whose chat template makes text of messages")
    judge_command = commands.add_parser("judge", help="train the judge, and let it judge")
    judge_command.add_argument("run", type=Path, metavar="RUN", help="a finished run of p3o.py")
    judge_command.add_argument("other", metavar="DIR/other", help="the judge's half")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        if args.command == "split":
            split(args.pairs, args.folder, args.model)
            return
        figures = judge(args.run, args.other)
    except (InputError, FloatingPointError, OSError) as error:
        sys.exit(f"other_half.py: {error}")
    rules.summarize(figures)


if __name__ == "__main__":
    main()
