"""Which settings suit a model and its data: a few updates with each, on the same batches.

    python tests/own/trials.py --model MODEL --data PAIRS --batch 8 --iterations 8

Takes the options of p3o.py: --iterations is the length of each trial of stage 3, of which there
are seven; --out, --epochs and --eval-prompts change nothing, and nothing is written. Each stage
tries a fifth of its learning rate, the rate, and five times it, and hands the best on to the next
stage. At its best rate stage 3 then tries, one change at a time, a fifth of β and five times it,
and half (rounded up) and twice as many inner epochs. Which of those is best is for the reader to
say, since β is the price that would decide it. As in a run of one epoch, no stage sees a pair
twice; stage 3 is judged by the samples of its last iterations. Each trial is one run: in stage 3
compare nothing that differs by less than two runs of the same settings do. And what is best in so
few updates need not be best in a long run.
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


def try_one(
    stage: str, name: str, value: float, start: PreTrainedModel, train: Callable, cfg: p3o.Config
) -> tuple[float, PreTrainedModel]:
    """Train a copy of `start` with this value of an option, and print what came of it.

    `train` takes the model, the configuration and a log; what is printed are means over the last
    quarter of its steps. Returns their cost, infinite if the gradient was, and the copy.
    """
    model = copy.deepcopy(start)
    rows = []
    torch.manual_seed(cfg.seed)
    began = time.perf_counter()
    try:
        train(model, replace(cfg, **{name: value}), lambda _, row: rows.append(row))
    except FloatingPointError as error:
        print(f"{name} {value:g}: {error}", flush=True)
        return math.inf, model
    seconds = time.perf_counter() - began
    last = rows[-max(1, len(rows) // 4) :]
    means = {key: statistics.mean(row[key] for row in last) for key in last[0]}
    figures = ", ".join(f"{key} {means[key]:.3f}" for key in SHOWN[stage])
    print(f"{name} {value:g}: {figures}; {len(rows)} steps, {seconds:.0f} s", flush=True)
    return cost(stage, means, cfg.beta), model


def best_of(
    stage: str, start: PreTrainedModel, train: Callable, cfg: p3o.Config
) -> tuple[float, PreTrainedModel]:
    """The learning rate whose trial has the least cost, and the model that it trained.

    Raises FloatingPointError if none went to the end.
    """
    name = p3o.STAGES[stage]
    rates = [factor * getattr(cfg, name) for factor in FACTORS]
    least = math.inf
    for rate in rates:
        found, model = try_one(stage, name, rate, start, train, cfg)
        if found < least:
            least, best, best_rate = found, model, rate
    if least == math.inf:
        raise FloatingPointError(f"no --{name} went to the end; try smaller ones")
    edge = ""
    if best_rate == rates[0]:
        edge = ", and the smallest"
    elif best_rate == rates[-1]:
        edge = ", and the largest"
    print(f"{name}: {best_rate:g} is the best of these{edge}", flush=True)
    return best_rate, best


def try_all(cfg: p3o.Config) -> None:
    """The rates of the three stages, one after the other, then β and inner epochs."""
    if cfg.iterations < 2:
        raise InputError("--iterations must be at least 2: the first samples are SFT's")
    torch.manual_seed(cfg.seed)
    base, tokenizer = p3o.load_base(cfg)
    pairs, _ = load_pairs(cfg.data, tokenizer)
    examples = p3o.tokenize(pairs, tokenizer, cfg)
    prompts = [example.prompt for example in examples]
    few = examples[: UPDATES * cfg.batch]
    few = few[: len(few) // cfg.batch * cfg.batch]  # whole batches
    if not few:
        raise InputError(f"{len(examples)} pairs are left, fewer than a --batch")
    cfg = replace(cfg, epochs=1)

    def train_sft(model, tried, log) -> None:
        p3o.train_sft(model, few, tried, log)

    def train_reward(model, tried, log) -> None:
        p3o.train_reward(model, few, tried, log)

    def train_policy(model, tried, log) -> None:
        score = partial(p3o.reward_scores, reward_model)
        p3o.train_policy(model, sft, score, prompts, tried, log)

    _, sft = best_of("sft", base, train_sft, cfg)
    del base  # no stage needs it again, and its memory is wanted
    with tempfile.TemporaryDirectory() as folder:
        p3o.save(Path(folder) / "sft", sft, tokenizer)
        kind = AutoModelForSequenceClassification
        fresh = p3o.load(Path(folder) / "sft", kind, num_labels=1)
    _, reward_model = best_of("reward", fresh, train_reward, cfg)
    del fresh
    p3o.set_gain(reward_model, sft, prompts[: p3o.GAIN_PROMPTS], cfg)
    lr, best = best_of("p3o", sft, train_policy, cfg)
    del best  # only its rate is wanted

    cfg = replace(cfg, lr=lr)
    inner_epochs = {math.ceil(cfg.inner_epochs / 2), 2 * cfg.inner_epochs} - {cfg.inner_epochs}
    others = {"beta": [cfg.beta / 5, 5 * cfg.beta], "inner_epochs": sorted(inner_epochs)}
    for name, values in others.items():
        for value in values:
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
