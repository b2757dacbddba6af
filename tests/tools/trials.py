"""Which settings suit a model and its data: a few updates with each, on the same batches.

    python tests/tools/trials.py --model MODEL --data PAIRS --batch 8 --iterations 8

Takes the options of p3o.py: --iterations is the length of a trial of stage 3; --out, --epochs and
--eval-prompts change nothing, and nothing is written. Each stage tries a fifth of its learning
rate, the rate, and five times it, and hands the best on to the next stage. At its best rate stage 3
then tries a fifth of β and five times it, and half and twice as many inner epochs; which of those
is best is for the reader to say. As in a run of one epoch, stages 1 and 2 see no pair twice, so the
loss of their last updates is of pairs new to them; stage 3 is judged by what it sampled before its
last updates. What is best in so few updates need not be best in a long run.
"""

import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


def try_each(
    stage: str,
    name: str,
    values: list[float],
    start: PreTrainedModel,
    train: Callable,
    cfg: p3o.Config,
) -> Iterator[tuple[float, dict[str, float], PreTrainedModel]]:
    """Train a copy of `start` with each value of an option, and print what came of it.

    `train` takes the model, the configuration and a log. Yields, for each trial that went to the
    end, the value, the means of the metrics over the last quarter, and the model.
    """
    for value in values:
        model = copy.deepcopy(start)
        rows = []
        torch.manual_seed(cfg.seed)
        began = time.perf_counter()
        try:
            train(model, replace(cfg, **{name: value}), lambda _, row, rows=rows: rows.append(row))
        except FloatingPointError as error:
            print(f"{name} {value:g}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - began
        last = rows[-max(1, len(rows) // 4) :]
        means = {key: statistics.mean(row[key] for row in last) for key in last[0]}
        figures = ", ".join(f"{key} {means[key]:.3f}" for key in SHOWN[stage])
        print(f"{name} {value:g}: {figures}; {len(rows)} steps, {seconds:.0f} s", flush=True)
        yield value, means, model


def best_of(
    stage: str, start: PreTrainedModel, train: Callable, cfg: p3o.Config
) -> tuple[float, PreTrainedModel]:
    """The learning rate whose trial has the least cost, and the model that it trained.

    Raises FloatingPointError if none went to the end.
    """
    name = p3o.STAGES[stage]
    rates = [factor * getattr(cfg, name) for factor in FACTORS]
    least = math.inf
    best = None
    for rate, means, model in try_each(stage, name, rates, start, train, cfg):
        found = cost(stage, means, cfg.beta)
        if found < least:
            least, best, best_rate = found, model, rate
    if best is None:
        raise FloatingPointError(f"no --{name} went to the end; try smaller ones")
    edge = ", at their edge: try beyond it" if best_rate in (rates[0], rates[-1]) else ""
    print(f"{name}: {best_rate:g} is the best of these{edge}", flush=True)
    return best_rate, best


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

    _, sft = best_of("sft", base, train_sft, cfg)
    del base  # no stage needs it again, and its memory is wanted
    with tempfile.TemporaryDirectory() as folder:
        p3o.save(Path(folder) / "sft", sft, tokenizer)
        kind = AutoModelForSequenceClassification
        fresh = p3o.load(Path(folder) / "sft", kind, num_labels=1)
    _, reward_model = best_of("reward", fresh, train_reward, cfg)
    del fresh
    p3o.set_gain(reward_model, sft, prompts[: p3o.GAIN_PROMPTS], cfg)
    lr, _ = best_of("p3o", sft, train_policy, cfg)
    cfg = replace(cfg, lr=lr)
    epochs = {math.ceil(cfg.inner_epochs / 2), 2 * cfg.inner_epochs} - {cfg.inner_epochs}
    others = {"beta": [cfg.beta / 5, 5 * cfg.beta], "inner_epochs": sorted(epochs)}
    for name, values in others.items():
        for _ in try_each("p3o", name, values, sft, train_policy, cfg):
            pass  # what came of it is printed


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
