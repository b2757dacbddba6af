"""Write train.jsonl and heldout.jsonl: preference pairs between two mediocre answers, labelled by Bradley-Terry.

    python data/generate.py [DIRECTORY]      # default: beside this file; always the same bytes
"""

import json
import math
import random
import sys
import zlib
from pathlib import Path

import judge

SEED, TRAIN_PAIRS, HELDOUT_PAIRS, HELDOUT_SHARE = 2310, 8000, 800, 6
FRAMES = [
    "{}.",
    "{} again.",
    "{}. Any advice?",
    "{}. What now?",
    "{}. Can you help?",
    "{}. What can I do?",
    "{}. Where do I start?",
    "Please help. {}.",
    "Hello. {}.",
    "Help! {}.",
    "Advice, please. {}.",
    "Hello. {}. Any advice?",
]


def write_prompt(rng: random.Random) -> str:
    topic = rng.choice(list(judge.TOPICS))
    trouble = rng.choice(judge.TOPICS[topic][0])
    return f"\n\nHuman: {rng.choice(FRAMES).format(trouble)}\n\nAssistant:"


def write_response(prompt: str, rng: random.Random) -> str:
    """A mediocre answer: now and then kind, on topic about half of the time, sometimes broken."""
    topic = judge.topic_of(prompt)
    parts = rng.choice([[rng.choice(judge.KIND_OPENERS)], [rng.choice(judge.RUDE_OPENERS)], []])
    for slot in rng.choice([[1], [1, 2], [1, 2]]):
        subject = rng.choices([topic, rng.choice(list(judge.TOPICS)), None], [5, 3, slot == 1])[0]
        parts.append(rng.choice(judge.TOPICS[subject][slot] if subject else judge.VAGUE))
    parts += rng.choice([[rng.choice(judge.KIND_CLOSERS)], [rng.choice(judge.RUDE_CLOSERS)], [], []])
    return break_response(parts, rng) if rng.random() < 0.08 else " ".join(parts)


def break_response(parts: list[str], rng: random.Random) -> str:
    """One of two flaws: the answer is cut short inside a sentence, or two sentences run together."""
    i = rng.randrange(len(parts))
    if rng.random() < 0.5:
        words = parts[i].split()
        parts[i:] = [" ".join(words[: rng.randrange(1, len(words))])]
    else:
        i = rng.randrange(len(parts) - 1) if len(parts) > 1 else 0
        tail = parts[i + 1 : i + 2] or [rng.choice(judge.VAGUE)]
        parts[i : i + 2] = [parts[i][:-1] + " and " + tail[0][0].lower() + tail[0][1:]]
    return " ".join(parts)


def held_out(text: str) -> bool:
    """A text belongs to one side for good, so no prompt and no response of the held-out file occurs in training."""
    return zlib.crc32(text.encode()) % HELDOUT_SHARE == 0


def write_row(rng: random.Random, heldout: bool) -> dict[str, str]:
    def draw(write, *arguments) -> str:
        while held_out(text := write(*arguments)) != heldout:
            pass
        return text

    prompt = draw(write_prompt, rng)
    a = draw(write_response, prompt, rng)
    while (b := draw(write_response, prompt, rng)) == a:
        pass
    p_a = 1 / (1 + math.exp(judge.gold_reward(prompt, b) - judge.gold_reward(prompt, a)))
    chosen, rejected = (a, b) if rng.random() < p_a else (b, a)
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


def main(directory: Path) -> None:
    rng = random.Random(SEED)
    for name, count, heldout in [("train", TRAIN_PAIRS, False), ("heldout", HELDOUT_PAIRS, True)]:
        rows: dict[str, None] = {}
        while len(rows) < count:
            rows[json.dumps(write_row(rng, heldout))] = None
        (directory / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
