"""Find settings for a model and its data: a few updates with each, on the same batches.

    python tests/own/trials.py --model MODEL --data PAIRS --batch 8 --iterations 8

Takes the options of p3o.py. --iterations is the length of each trial of stage 3. --out, --epochs
and --eval-prompts change nothing, and nothing is written.

- Each stage tries a fifth of its learning rate, the rate, and five times it. The next stage starts
  from the best of the three models.
- At its best rate, stage 3 then tries a fifth of β and five times it, and half and twice the inner
  epochs, one change at a time. Which is best is yours to say: β is the price that would decide.
- Each trial is one run. Ignore differences smaller than those between two runs of one setting.
- The best setting for a few updates need not be the best for a long run.
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
from data.preferences import InputError, load_pairs, tokenize, try_hub

FACTORS = (0.2, 1, 5)
UPDATES = 20  # in stages 1 and 2
SHOWN = {
    "sft": ("sft/loss",),
    "reward": ("reward/loss", "reward/accuracy"),
    "p3o": ("objective/scores", "objective/kl", "response/finished"),
}


def cost(stage: str, metrics: dict[str, float], beta: float) -> float:
    """Return what a stage minimises: its loss, or β KL − r in stage 3."""
    if stage == "p3o":
        return beta * metrics["objective/kl"] - metrics["objective/scores"]
    return metrics[f"{stage}/loss"]


def try_one(
    stage: str, name: str, value: float, start: PreTrainedModel, train: Callable, cfg: p3o.Config
) -> tuple[float, PreTrainedModel]:
    """Train a copy of `start` with this value of an option; print the result.

    `train` takes the model, the options and a log. Prints means over the last quarter of the steps.
    Returns their cost, infinite if the gradient was not finite, and the trained copy.
    """
    model = copy.deepcopy(start)
    rows = []
    torch.manual_seed(cfg.seed)
    began = time.perf_counter()
    try:
        train(model, replace(cfg, **{name: value}), lambda step, metrics: rows.append(metrics))
    except FloatingPointError as error:
        print(f"{name} {value:g}: {error}", flush=True)
        return math.inf, model
    seconds = time.perf_counter() - began
    last = rows[-max(1, len(rows) // 4) :]
    means = {key: statistics.fmean(row[key] for row in last) for key in last[0]}
    figures = ", ".join(f"{key} {means[key]:.3f}" for key in SHOWN[stage])
    print(f"{name} {value:g}: {figures}; {len(rows)} steps, {seconds:.0f} s", flush=True)
    return cost(stage, means, cfg.beta), model


def best_of(
    stage: str, start: PreTrainedModel, train: Callable, cfg: p3o.Config
) -> tuple[float, PreTrainedModel]:
    """Return the learning rate with the lowest cost, and the model that it trained.

    Raises FloatingPointError if all of them diverged.
    """
    name = f"{stage}_lr"
    rates = [factor * getattr(cfg, name) for factor in FACTORS]
    lowest = math.inf
    for rate in rates:
        found, model = try_one(stage, name, rate, start, train, cfg)
        if found < lowest:
            lowest, best, best_rate = found, model, rate
    if lowest == math.inf:
        raise FloatingPointError(f"each --{name} diverged; try smaller ones")
    edge = {rates[0]: ", and the smallest", rates[-1]: ", and the largest"}.get(best_rate, "")
    print(f"{name}: {best_rate:g} is the best of these{edge}", flush=True)
    return best_rate, best


def try_all(cfg: p3o.Config) -> None:
    """Try the learning rates of the three stages in order, then β and the inner epochs."""
    if cfg.iterations < 2:
        raise InputError("--iterations must be at least 2: the first samples are those of SFT")
    torch.manual_seed(cfg.seed)
    base, tokenizer = p3o.load_base(cfg)
    pairs, _ = load_pairs(cfg.data, tokenizer)
    examples = tokenize(pairs, tokenizer, cfg.prompt_tokens, cfg.response_tokens)
    prompts = [example.prompt for example in examples]
    few = examples[: min(UPDATES, len(examples) // cfg.batch) * cfg.batch]  # whole batches
    if not few:
        raise InputError(f"{len(examples)} pairs are left, fewer than a --batch")
    cfg = replace(cfg, epochs=1)  # no stage sees a pair twice

    def train_sft(model, tried, log) -> None:
        p3o.train_sft(model, few, tried, log)

    def train_reward(model, tried, log) -> None:
        p3o.train_reward(model, few, tried, log)

    def train_policy(model, tried, log) -> None:
        score = partial(p3o.reward_scores, reward_model)
        p3o.train_policy(model, sft, score, p3o.p3o_loss, prompts, tried, log)

    _, sft = best_of("sft", base, train_sft, cfg)
    del base  # frees memory
    with tempfile.TemporaryDirectory() as folder:
        p3o.save(Path(folder) / "sft", sft, tokenizer)
        kind = AutoModelForSequenceClassification
        fresh = p3o.load(Path(folder) / "sft", kind, num_labels=1)
    _, reward_model = best_of("reward", fresh, train_reward, cfg)
    del fresh
    p3o.set_gain(reward_model, sft, prompts[: p3o.GAIN_PROMPTS], cfg)
    best_rate = best_of("p3o", sft, train_policy, cfg)[0]

    cfg = replace(cfg, p3o_lr=best_rate)
    others = {
        "beta": {cfg.beta / 5, 5 * cfg.beta},
        "inner_epochs": {math.ceil(cfg.inner_epochs / 2), 2 * cfg.inner_epochs},
    }
    for name, values in others.items():
        for value in sorted(values - {getattr(cfg, name)}):  # none for β = 0
            try_one("p3o", name, value, sft, train_policy, cfg)


def main(argv: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        cfg = p3o.parse_config(argv)
        try_hub(cfg.model, cfg.data)
        try_all(cfg)
    except KeyboardInterrupt:
        sys.exit("trials.py: interrupted")
    except torch.OutOfMemoryError:
        sys.exit("trials.py: out of memory; try a smaller --micro-batch")
    except (InputError, FloatingPointError, OSError) as error:
        sys.exit(f"trials.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
