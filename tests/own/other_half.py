"""Judge a run by a second reward model, trained on pairs that the policy never saw.

    python tests/own/other_half.py split PAIRS DIR [--model MODEL]
    python p3o.py --data DIR/mine --out RUN          # with any other options
    python tests/own/other_half.py judge RUN DIR/other

Without a gold reward, p3o.py lets the run's own reward model judge the answers. The policy was
trained to please that model, so its win rate is too high. `split` gives half of the training
prompts to the run and half to the judge; both hold out the same pairs. `judge` trains a second
reward model on the other half, with the run's options, and prints what both models say of the
same answers. The second model also makes mistakes, and it starts from the same SFT model. But the
policy was not trained to please it.
"""

import argparse
import json
import math
import statistics
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import datasets
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data.preferences import InputError, Pair, load_pairs, tokenize, try_hub


def write(path: Path, pairs: list[Pair]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for pair in pairs:
            file.write(json.dumps(pair._asdict()) + "\n")


def split(source: str, folder: Path, model: str | None) -> None:
    """Write DIR/mine and DIR/other, each with train.jsonl and test.jsonl.

    Pairs of messages need the model's tokenizer, whose chat template turns them into text.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; choose another directory")
    try_hub(source, *([model] if model else []))
    tokenizer = AutoTokenizer.from_pretrained(model) if model else None
    train, heldout = load_pairs(source, tokenizer)
    halves = defaultdict(list)
    for pair in train:
        # split by prompt: two answers to one prompt are alike, so one would leak the other
        half = "other" if zlib.crc32(pair.prompt.encode()) & 64 else "mine"
        halves[half].append(pair)
    for half in ("mine", "other"):
        write(folder / half / "train.jsonl", halves[half])
        write(folder / half / "test.jsonl", heldout)
        print(f"{folder / half}: {len(halves[half])} training, {len(heldout)} held-out pairs")


def judge(run: Path, other: str) -> dict[str, list[float]]:
    """Train the second judge; return each figure's values, one for each held-out pair or prompt.

    accuracy_* and win_rate_* are those of p3o.evaluate by each judge, on the answers that the run
    itself evaluated. agreement is the share of prompts on which both prefer the same answer.
    """
    made_with = json.loads((run / "config.json").read_text())
    cfg = p3o.Config(**{key: made_with[key] for key in vars(p3o.Config()) if key in made_with})
    cfg.data = other
    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    train, heldout = [
        tokenize(pairs, tokenizer, cfg.prompt_tokens, cfg.response_tokens)
        for pairs in load_pairs(other)
    ]
    second = p3o.load(run / "sft", AutoModelForSequenceClassification, num_labels=1)
    p3o.seed_stage(cfg, "reward")
    p3o.train_reward(second, train, cfg, lambda step, metrics: None)

    sft = p3o.load(run / "sft")
    policy = p3o.load(run / "p3o")
    first = p3o.load(run / "reward", AutoModelForSequenceClassification)
    figures = {}
    for name, model in (("own", first), ("other", second)):
        p3o.seed_stage(cfg, "evaluation")  # so that both judge the same answers
        found, _ = p3o.evaluate(cfg, sft, model, policy, tokenizer, heldout)
        figures[f"accuracy_{name}"] = found["reward_accuracy"]
        figures[f"win_rate_{name}"] = found["win_rate"]
    both = zip(figures["win_rate_own"], figures["win_rate_other"], strict=True)
    figures["agreement"] = [own == other for own, other in both]
    return figures


def main(argv: list[str]) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("split", help="split the prompts between run and judge")
    command.add_argument("pairs", help="hub name, file or directory, like --data of p3o.py")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--model", help="has the chat template for pairs of messages")
    command = commands.add_parser("judge", help="train the second judge and print its figures")
    command.add_argument("run", type=Path, metavar="RUN", help="a finished run of p3o.py")
    command.add_argument("other", metavar="DIR/other", help="the judge's half")
    args = parser.parse_args(argv)
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
    for name, values in figures.items():
        half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
        print(f"{name:22}{statistics.fmean(values):8.3f} ± {half:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
