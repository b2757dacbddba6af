"""Write what `python p3o.py --small` trains on.

train.jsonl and test.jsonl, held out, are preference pairs between two mediocre answers, labelled by
Bradley-Terry; tiny/ holds a tokenizer and the configuration of a model, without weights.

python -m data.generate [DIRECTORY]      # default: beside this file; always the same
"""

import json
import math
import random
import sys
import zlib
from pathlib import Path

import tokenizers
import transformers

from data import judge

SEED = 2310
TRAIN_PAIRS = 12000
HELDOUT_PAIRS = 800
HELDOUT_SHARE = 6
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
    parts += rng.choice(
        [[rng.choice(judge.KIND_CLOSERS)], [rng.choice(judge.RUDE_CLOSERS)], [], []]
    )
    return break_response(parts, rng) if rng.random() < 0.18 else " ".join(parts)


def break_response(parts: list[str], rng: random.Random) -> str:
    """One flaw: the answer stops early, a sentence loses its beginning, runs on, or says its
    thing twice."""
    i = rng.randrange(len(parts))
    words = parts[i].split()
    flaw = rng.choices(["stop", "no beginning", "run-on", "twice"], [1, 1, 1, 3])[0]
    if flaw == "stop":
        parts[i:] = [" ".join(words[: rng.randrange(1, len(words))])]
    elif flaw == "no beginning":
        parts[i] = " ".join(words[rng.randrange(1, len(words)) :])
    elif flaw == "run-on":
        parts[i] = parts[i].rstrip(".!?")
    else:
        parts.insert(i, rng.choice(next(pool for _, pool in judge.POOLS if parts[i] in pool)))
    return " ".join(parts)


def held_out(text: str) -> bool:
    """A text belongs to one side for good, so no prompt and no response of the held-out file
    occurs in training."""
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


def write_tiny(directory: Path, texts: list[str]) -> None:
    """GPT-2's architecture at 2 layers of width 64, without weights, and a byte-level BPE
    trained on the texts."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    bpe.train_from_iterator(texts, 1000, special_tokens=list(special.values()), show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    tokenizer.add_tokens(
        ["\n\nHuman:", "\n\nAssistant:"]
    )  # one token a marker, as chat templates have it
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=72, n_embd=64, n_layer=2, n_head=4,
        initializer_range=0.06,  # GPT-2's 0.02 is for width 768
        activation_function="relu",  # GELU would take a third of the time at this size
        bos_token_id=eos, eos_token_id=eos, pad_token_id=pad, architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    tokenizer.save_pretrained(directory)
    config.save_pretrained(directory)


def main(directory: Path) -> None:
    rng = random.Random(SEED)
    for name, count, heldout in [("train", TRAIN_PAIRS, False), ("test", HELDOUT_PAIRS, True)]:
        rows: dict[str, dict] = {}
        while len(rows) < count:
            row = write_row(rng, heldout)
            rows[json.dumps(row)] = row
        (directory / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), newline="\n")
        if name == "train":
            write_tiny(directory / "tiny", [row[key] for row in rows.values() for key in row])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
