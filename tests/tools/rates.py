"""Which learning rates suit a model and its data: a few updates at each, on the same batches.

    python tests/tools/rates.py --model MODEL --data PAIRS --batch 8 --iterations 8

Takes the options of p3o.py: --iterations is the length of a trial of stage 3; --out, --epochs and
--eval-prompts change nothing, and nothing is written. Each stage tries a fifth of its learning
rate, the rate, and five times it, and hands the best on to the next stage. As in a run of one
epoch, stages 1 and 2 see no pair twice, so the loss of their last updates is of pairs new to them;
stage 3 is judged by what it sampled before its last updates. What is best in so few updates need
not be best in a long run.
"""

import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data.preferences import InputError, load_pairs, try_hub

FACTORS = (0.2, 1, 5)
UPDATES = 20  # of stages 1 and 2; stage 3 makes as many iterations as its option says
SHOWN = {
    "sft": ("sft/loss",),
    "reward": ("reward/loss", "reward/accuracy"),
    "p3o": ("objective/scores", "objective/kl", "response/finished"),
}


def cost(stage: str, row: dict[str, float], beta: float) -> float:
    """What a stage makes small: its loss; in stage 3, β KL − r."""
    if stage == "p3o":
        return beta * row["objective/kl"] - row["objective/scores"]
    return row[f"{stage}/loss"]


def best_of(
    stage: str, start: PreTrainedModel, train: Callable, cfg: p3o.Config
) -> PreTrainedModel:
    """Train a copy of `start` at each rate, and print what the last quarter of it was like.

    `train` takes the model, the configuration and a log. Returns the copy of least cost. Raises
    FloatingPointError if none was trained to the end.
    """
    name = p3o.STAGES[stage]
    least = math.inf
    best = None
    for factor in FACTORS:
        model = copy.deepcopy(start)
        lr = factor * getattr(cfg, name)
        rows = []
        torch.manual_seed(cfg.seed)
        began = time.perf_counter()
        try:
            train(model, replace(cfg, **{name: lr}), lambda _, row, rows=rows: rows.append(row))
        except FloatingPointError as error:
            print(f"{name} {lr:g}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - began
        last = rows[-max(1, len(rows) // 4) :]
        means = {key: statistics.mean(row[key] for row in last) for key in last[0]}
        figures = ", ".join(f"{key} {means[key]:.3f}" for key in SHOWN[stage])
        print(f"{name} {lr:g}: {figures}; {len(rows)} steps, {seconds:.0f} s", flush=True)
        found = cost(stage, means, cfg.beta)
        if found < least:
            least, best, best_lr = found, model, lr
    if best is None:
        raise FloatingPointError(f"no --{name} went to the end; try smaller ones")
    print(f"{name}: {best_lr:g} is the best of these", flush=True)
    return best


def try_all(cfg: p3o.Config) -> None:
    """The three stages, one after the other."""
    torch.manual_seed(cfg.seed)
    base, tokenizer = p3o.load_base(cfg)
    pairs, _ = load_pairs(cfg.data, tokenizer)
    examples = p3o.tokenize(pairs, tokenizer, cfg)
    prompts = [example.prompt for example in examples]
    few = examples[: UPDATES * cfg.batch]
    few = few[: len(few) // cfg.batch * cfg.batch]  # whole batches
    if not few:
        raise InputError(f"{len(examples)} pairs are left, fewer than a --batch")
    if cfg.iterations < 2:
        raise InputError("--iterations must be at least 2: the first samples are SFT's")
    cfg = replace(cfg, epochs=1)

    def train_sft(model, tried, log) -> None:
        p3o.train_sft(model, few, tried, log)

    def train_reward(model, tried, log) -> None:
        p3o.train_reward(model, few, tried, log)

    def train_policy(model, tried, log) -> None:
        score = partial(p3o.reward_scores, reward_model)
        p3o.train_policy(model, sft, score, prompts, tried, log)

    sft = best_of("sft", base, train_sft, cfg)
    del base  # no stage needs it again, and its memory is wanted
    with tempfile.TemporaryDirectory() as folder:
        p3o.save(Path(folder) / "sft", sft, tokenizer)
        kind = AutoModelForSequenceClassification
        fresh = p3o.load(Path(folder) / "sft", kind, num_labels=1)
    reward_model = best_of("reward", fresh, train_reward, cfg)
    del fresh
    p3o.set_gain(reward_model, sft, prompts[: p3o.GAIN_PROMPTS], cfg)
    best_of("p3o", sft, train_policy, cfg)


def main(argv: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        cfg = p3o.parse_config(argv)
        try_hub(cfg.model, cfg.data)
        try_all(cfg)
    except KeyboardInterrupt:
        sys.exit("rates.py: interrupted")
    except torch.OutOfMemoryError:
        sys.exit("rates.py: out of memory; try a smaller --micro-batch")
    except (InputError, FloatingPointError, OSError) as error:
        sys.exit(f"rates.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
