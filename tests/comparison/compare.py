"""Compare P3O with its relatives: tune all alike, then vary β, learning rate, reuse and offset.

    python tests/comparison/compare.py --show                            # print the results
    python tests/comparison/compare.py --seeds 8 9                       # run two more seeds: hours
    python tests/comparison/compare.py --seeds 8 --parts "as tuned" offset    # only these parts

Each run starts from the SFT and reward models of its own seed (`p3o.py --small`) and becomes one
row of data/comparison.csv. All runs see the same prompts and make the same number of updates, and
all draw the same number of samples, except in the parts about reusing samples. A run that has a
row is not repeated, so a stopped comparison resumes. Each method uses the learning rate and the
other setting that did best in tuning, on seeds that no other part uses. The rows of a seed belong
to its models in runs/pipelines: without those models no runs are added to the seed.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # one run per core
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import numpy  # noqa: E402
import pandas  # noqa: E402
import relatives  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

import p3o  # noqa: E402
from data import judge  # noqa: E402
from data.preferences import load_pairs, tokenize  # noqa: E402

ROWS = ROOT / "data" / "comparison.csv"
PIPELINES = ROOT / "runs" / "pipelines"
LOSSES = {
    "V2": p3o.p3o_loss,
    "V1": p3o.p3o_loss,
    "RLOO": relatives.rloo_loss,
    "GRPO": relatives.grpo_loss,
    "online DPO": relatives.online_dpo_loss,
    "REBEL": relatives.rebel_loss,
}
METHODS = (*LOSSES, "PPO", "DPO")
ONLINE = METHODS[:-1]
NAMES = {"V2": "P3O (V2)", "V1": "P3O (V1)"}  # how the rows' short names are displayed
BETA = 0.1
BETAS = (0.4, 0.2, 0.1, 0.05, 0.025)
# Each of the next three changes one thing about the tuned run: BETA, 2 epochs, no offset.
RATES = (0.25, 2, 4, 8)  # times the tuned learning rate
EPOCHS = (1, 4, 8, 16)  # passes over the same samples, with the same number of updates in all
OFFSETS = (1, 3, 10)  # standard deviations of δ(x); pairwise methods run only the last
SEEDS = (0, 1, 2, 3, 4, 5)
TUNING_SEEDS = (100, 101)
# Every method gets ten trials per seed: five rates times two values of its other setting, which is
# ε, REBEL's η or PPO's λ; or ten rates where it has none.
RATE_GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
MORE_RATES = (3.125e-5, 6.25e-5, 1.25e-4, *RATE_GRID, 8e-3, 1.6e-2)
KNOBS = {method: (0.2, 0.5) for method in ("V2", "V1", "RLOO", "GRPO")}
KNOB_NAMES = {method: "ε" for method in KNOBS} | {"REBEL": "η", "PPO": "λ"}
KNOBS |= {"REBEL": (1.0, 4.0), "PPO": (0.95, 1.0), "online DPO": (0.0,), "DPO": (0.0,)}
# Learning from a share of the preferences: reward model first, or with the policy (AIHF).
JOINT = ("pipeline", "pipeline, equal updates", "AIHF", "AIHF, logistic")
SHARES = (0.01, 0.03, 0.1, 1.0)
JOINT_BETAS = (0.05, 0.1, 0.2, 0.4)
WEIGHTS = (1.0, 0.1, 0.01)  # of AIHF's demonstrations, so AIHF gets three times as many trials
# The same with good demonstrations: each the best of so many answers, by gold reward. Three trials
# each on a seed of its own: the weight of AIHF's demonstrations or the pipeline's β
BEST_OF = 8
GOOD_PARTS = ("good demonstrations, tuning", "good demonstrations")
GOOD_METHODS = ("pipeline, equal updates", "AIHF", "AIHF, logistic")
GOOD_BETAS = (0.1, 0.2, 0.4)
GOOD_SHARES = (0.01, 0.03, 0.1)
TUNED_ON = {"tuning": TUNING_SEEDS, "joint tuning": TUNING_SEEDS, GOOD_PARTS[0]: (102,)}
# Is it the clip of its values that keeps PPO's critic from learning δ(x)? (weight of its loss)
CRITICS = {"PPO": 1.0, "PPO, no value clip": 1.0, "PPO, no value clip, weight × 10": 10.0}
EVALUATED = 256  # held-out prompts
WATCHED_EVERY = 40  # iterations between two measurements of the long run
PARTS = ("tuning", "frontier", "as tuned", "rate", "staleness", "staleness, one rate", "offset")
PARTS += ("gaming", "joint tuning", "joint", "value clip", *GOOD_PARTS)
FIGURES = ("score", "gold", "kl", "win_rate", "finished", "points", "curve")
# curve: further measurements, by the part: KL, score and gold reward along a long run; of a value
# clip run, the share of δ(x) that the critic knows; the gold reward of good demonstrations


class Trial(NamedTuple):
    part: str
    method: str
    seed: int
    beta: float
    lr: float
    knob: float  # the method's other setting; in the joint parts the share of the preferences
    epochs: int = 2
    iterations: int = 80
    offset: float = 0.0
    weight: float = 1.0  # of AIHF's demonstrations; times VALUE_WEIGHT in the part about critics


# ---- One run -----------------------------------------------------------------------------
def made(seed: int) -> bool:
    return (PIPELINES / str(seed) / "summary.json").exists()


def pipeline(seed: int) -> Path:
    """Return the directory of a seed's SFT and reward models; train them if needed."""
    out = PIPELINES / str(seed)
    if not made(seed):
        options = dict(seed=seed, out=str(out), iterations=1, eval_prompts=2)
        p3o.run(p3o.Config(**p3o.SMALL | options))
    return out


def demonstrated(seed: int) -> Path:
    """Return the directory of a seed's good demonstrations, and of an SFT model trained on them.

    A demonstration is the best of BEST_OF answers of the pipeline's SFT model, by gold reward. The
    new SFT model starts from the same weights as the old one did and is trained in the same way.
    """
    out = pipeline(seed) / "demonstrated"
    if not (out / "sft").exists():
        tokenizer, examples, _, sft, *_ = start_of(seed)
        out.mkdir(exist_ok=True)
        torch.manual_seed(seed)
        demos = best_of(BEST_OF, sft, tokenizer, examples)
        (out / "chosen.json").write_text(json.dumps([demo.chosen for demo in demos]))
        cfg = p3o.Config(**p3o.SMALL | dict(seed=seed))
        torch.manual_seed(seed)
        policy, _ = p3o.load_base(cfg)
        p3o.seed_stage(cfg, "sft")
        p3o.train_sft(policy, demos, cfg, lambda *_: None)
        p3o.save(out / "sft", policy, tokenizer)
    return out


def best_of(n: int, policy, tokenizer, examples: list) -> list:
    """Replace each example's chosen answer by the best of n samples, by gold reward."""
    found = []
    for i in range(0, len(examples), 64):
        batch = examples[i : i + 64]
        prompts = [example.prompt for example in batch]
        ids, mask = p3o.sample(policy, prompts, n, p3o.SMALL["response_tokens"])  # (b, n, T)
        for example, rows, masks in zip(batch, ids, mask, strict=True):
            answers = [row[inside] for row, inside in zip(rows, masks, strict=True)]
            prompt = example.text.prompt
            golds = [judge.gold_reward(prompt, text_of(tokenizer, answer)) for answer in answers]
            best_one = answers[golds.index(max(golds))]
            found.append(example._replace(chosen=best_one.tolist()))
    return found


def text_of(tokenizer, answer: torch.Tensor) -> str:
    return tokenizer.decode(answer, skip_special_tokens=True)


def offset_of(ids: torch.Tensor, response_mask: torch.Tensor, spread: float) -> torch.Tensor:
    """Return δ(x), (…) from (…, T): a normal number with this standard deviation.

    It depends only on the prompt, through a hash of its tokens.
    """
    table = torch.randn(9973, generator=torch.Generator().manual_seed(1)).to(ids.device)
    weights = torch.arange(1, ids.shape[-1] + 1, device=ids.device) ** 2  # (T,)
    before = response_mask.cumsum(-1) == 0  # (…, T)
    return spread * table[(ids * before * weights).sum(-1) % len(table)]


def train(trial: Trial, policy, sft, reward_model, examples, log) -> PreTrainedModel | None:
    """Train `policy` with one method. Returns PPO's critic."""
    options = dict(
        seed=trial.seed,
        beta=trial.beta,
        p3o_lr=trial.lr,
        inner_epochs=trial.epochs,
        iterations=trial.iterations,
        clip="separate" if trial.method == "V1" else "joint",
    )
    if trial.method in ("V2", "V1", "RLOO", "GRPO"):
        options["clip_range"] = trial.knob
    if trial.method == "GRPO":
        # GRPO's two advantages always differ by 2, scores by about 1: put β into that unit
        options["beta"] = 2 * trial.beta
    cfg = p3o.Config(**p3o.SMALL | options)
    prompts = [example.prompt for example in examples]

    def score(ids, response_mask):
        offsets = offset_of(ids, response_mask, trial.offset)
        return p3o.reward_scores(reward_model, ids, response_mask) + offsets

    if trial.method == "DPO":
        relatives.train_dpo(policy, sft, examples, cfg, log)
    elif trial.method in CRITICS:
        critic = copy.deepcopy(reward_model)
        options = dict(gae_lambda=trial.knob, value_weight=trial.weight * relatives.VALUE_WEIGHT)
        if trial.method != "PPO":
            options["value_clip"] = math.inf
        relatives.train_ppo(policy, sft, score, prompts, cfg, log, critic, **options)
        return critic
    else:
        loss = LOSSES[trial.method]
        if trial.method == "REBEL":
            loss = functools.partial(loss, eta=trial.knob)
        p3o.train_policy(policy, sft, score, loss, prompts, cfg, log)


@torch.no_grad()
def offset_known(critic, examples: list, spread: float) -> float:
    """Return the share of δ(x)'s variance, over different prompts, that a critic explains.

    1 if V(x) − δ(x) is the same for all prompts, 0 if it varies as much as δ(x), below 0 if more.
    """
    examples = list({tuple(example.prompt): example for example in examples}.values())
    prompts = [example.prompt for example in examples]
    ids, mask = p3o.collate(prompts, [example.chosen for example in examples], critic)  # (N, T)
    first = mask[:, 1:].int().argmax(-1)  # (N,): the state before the first token of the answer
    values = relatives.token_values(critic, ids, mask).gather(1, first[:, None])[:, 0]  # (N,)
    delta = offset_of(ids, mask, spread)  # (N,)
    return (1 - (values - delta).var() / delta.var()).item()


def train_on_few(trial: Trial, policy, sft, out: Path, demos, examples, log) -> None:
    """Train reward model and policy with a share of the preferences, but all demonstrations.

    Preferences are those of `examples`, demonstrations the chosen answers of `demos`. `out` has
    the SFT model.

    AIHF updates the reward model as often as the policy. The pipeline trains its reward model
    first: for two epochs, as p3o.py does, or with the same number of updates as AIHF.
    """
    preferences = examples[: round(trial.knob * len(examples))]
    options = dict(beta=trial.beta, p3o_lr=trial.lr, iterations=trial.iterations)
    cfg = p3o.Config(**p3o.SMALL | options)
    prompts = [example.prompt for example in examples]
    reward_model = p3o.load(out / "sft", AutoModelForSequenceClassification, num_labels=1)
    if trial.method.startswith("AIHF"):
        torch.nn.init.zeros_(reward_model.score.weight)  # as train_reward does
        exact = trial.method == "AIHF"
        models = (policy, sft, reward_model)
        options = dict(exact=exact, demo_weight=trial.weight)
        relatives.train_jointly(*models, demos, preferences, cfg, log, **options)
        return
    epochs = 2
    if trial.method == "pipeline, equal updates":
        updates = trial.iterations * cfg.inner_epochs * cfg.pairs // cfg.minibatch
        epochs = max(1, round(updates * cfg.batch / len(preferences)))
    p3o.train_reward(reward_model, preferences, dataclasses.replace(cfg, epochs=epochs), log)
    p3o.set_gain(reward_model, sft, prompts[: p3o.GAIN_PROMPTS], cfg)
    score = functools.partial(p3o.reward_scores, reward_model)
    p3o.train_policy(policy, sft, score, p3o.p3o_loss, prompts, cfg, log)


def answer_all(policy, sft, reward_model, tokenizer, examples) -> dict[str, list]:
    """Sample one answer to each prompt; return each answer's KL, score, end and gold reward."""
    found = defaultdict(list)
    torch.manual_seed(0)
    for i in range(0, len(examples), 64):
        batch = examples[i : i + 64]
        prompts = [example.prompt for example in batch]
        ids, mask = p3o.sample(policy, prompts, 1, p3o.SMALL["response_tokens"])  # (b, 1, T)
        with torch.no_grad():
            logprobs = p3o.sequence_logprobs(policy, ids, mask)  # (b, 1)
            found["kl"] += (logprobs - p3o.sequence_logprobs(sft, ids, mask)).flatten().tolist()
            found["score"] += p3o.reward_scores(reward_model, ids, mask).flatten().tolist()
        found["finished"] += p3o.finished(policy, ids, mask).flatten().tolist()
        for example, row, inside in zip(batch, ids, mask, strict=True):
            text = text_of(tokenizer, row[inside])
            found["gold"].append(judge.gold_reward(example.text.prompt, text))
    return found


def win_rate(mine: Sequence, theirs: Sequence) -> float:
    """Return the share of answers that are better than the other's; a tie counts half."""
    pairs = list(zip(mine, theirs, strict=True))
    return statistics.mean((a > b) + 0.5 * (a == b) for a, b in pairs)


@functools.lru_cache(1)
def start_of(seed: int) -> tuple:
    """Return what all runs of a seed start from, and the answers of its SFT model."""
    torch.set_num_threads(1)
    out = pipeline(seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    cfg = p3o.Config(**p3o.SMALL)
    train_pairs, heldout_pairs = load_pairs(cfg.data)
    limits = cfg.prompt_tokens, cfg.response_tokens
    examples = tokenize(train_pairs, tokenizer, *limits)
    heldout = tokenize(heldout_pairs, tokenizer, *limits)[:EVALUATED]
    sft = p3o.load(out / "sft")
    reward_model = p3o.load(out / "reward", AutoModelForSequenceClassification)
    answers = answer_all(sft, sft, reward_model, tokenizer, heldout)
    return tokenizer, examples, heldout, sft, reward_model, answers


@functools.lru_cache(1)
def good_start_of(seed: int) -> tuple:
    """Return a seed's good demonstrations, SFT model and its answers, and their directory."""
    out = demonstrated(seed)
    tokenizer, examples, heldout, _, reward_model, _ = start_of(seed)
    chosen = json.loads((out / "chosen.json").read_text())
    pairs = zip(examples, chosen, strict=True)
    demos = [example._replace(chosen=answer) for example, answer in pairs]
    sft = p3o.load(out / "sft")
    return demos, sft, answer_all(sft, sft, reward_model, tokenizer, heldout), out


def run(trial: Trial) -> dict:
    """Train and evaluate one policy; return its row: the trial and its figures."""
    tokenizer, examples, heldout, sft, reward_model, first = start_of(trial.seed)
    demos, out = examples, pipeline(trial.seed)
    if trial.part in GOOD_PARTS:
        demos, sft, first, out = good_start_of(trial.seed)
    policy = p3o.load(out / "sft")
    critic = None
    curve = []

    def log(step: int, row: dict) -> None:
        if trial.part == "gaming" and (step + 1) % WATCHED_EVERY == 0:
            state = torch.get_rng_state()
            now = answer_all(policy, sft, reward_model, tokenizer, heldout)
            torch.set_rng_state(state)
            curve.extend(statistics.mean(now[key]) for key in ("kl", "score", "gold"))

    torch.manual_seed(trial.seed)
    with contextlib.suppress(FloatingPointError):  # diverged: evaluate the policy as it is
        if trial.method in JOINT:
            train_on_few(trial, policy, sft, out, demos, examples, log)
        elif trial.method != "SFT":
            critic = train(trial, policy, sft, reward_model, examples, log)
    if trial.part == "value clip" and trial.offset and critic:  # None if it diverged
        curve = [offset_known(critic, some, trial.offset) for some in (examples, heldout)]
    if trial.method == "SFT":
        golds = [
            judge.gold_reward(demo.text.prompt, text_of(tokenizer, demo.chosen)) for demo in demos
        ]
        curve = [statistics.mean(golds)]
    mine = answer_all(policy, sft, reward_model, tokenizer, heldout)
    row = trial._asdict()
    for key in ("score", "gold", "kl", "finished"):
        row[key] = round(statistics.mean(mine[key]), 4)
    row["win_rate"] = round(win_rate(mine["gold"], first["gold"]), 4)
    row["points"] = ""
    if trial.part == "frontier":  # each answer's gold reward in points, as a letter; "m" is 0
        row["points"] = "".join(chr(ord("m") + round(gold / 1.5)) for gold in mine["gold"])
    row["curve"] = " ".join(f"{value:.3f}" for value in curve)
    return row


# ---- All runs ----------------------------------------------------------------------------
def read_rows() -> pandas.DataFrame:
    """Return the rows that exist."""
    if not ROWS.exists():
        return pandas.DataFrame(columns=[*Trial._fields, *FIGURES])
    return pandas.read_csv(ROWS, keep_default_na=False)


def write_row(row: dict) -> None:
    found = pandas.DataFrame([row], columns=[*Trial._fields, *FIGURES])
    found.to_csv(ROWS, mode="a", header=not ROWS.exists(), index=False)


def key_of(row: dict) -> tuple:
    """Return what identifies a row's trial, whatever the rounding."""
    numbers = [round(float(row[name]), 9) for name in Trial._fields[2:]]
    return (row["part"], row["method"], *numbers)


def keys_of(rows: pandas.DataFrame) -> set[tuple]:
    return {key_of(row) for row in rows.to_dict("records")}


def reached(rows: pandas.DataFrame) -> pandas.Series:
    """Return score − β KL, the objective of all methods except GRPO and DPO.

    Each seed's score has a zero of its own.
    """
    return rows.score - rows.beta * rows.kl


def best(values: pandas.Series, rows: pandas.DataFrame, *columns: str) -> dict[str, tuple]:
    """Return for each method the values of these columns that have the best mean."""
    means = values.groupby([rows[column] for column in ("method", *columns)]).mean()
    return {method: tuple(found) for method, *found in means.groupby("method").idxmax()}


def tuned(rows: pandas.DataFrame) -> dict[str, tuple[float, float]]:
    """Return each method's learning rate and knob: the best score − β KL in tuning."""
    rows = rows[rows.part == "tuning"]
    return best(reached(rows), rows, "lr", "knob")


def tuned_joint(rows: pandas.DataFrame) -> dict[str, tuple[float, float]]:
    """Return β and weight of each way to learn from few preferences: the best gold reward.

    Scores would not do: those of different reward models have no common unit.
    """
    rows = rows[rows.part == "joint tuning"]
    return best(rows.gold, rows, "beta", "weight")


def best_good(rows: pandas.DataFrame) -> dict[str, tuple[float, float]]:
    """Return β and weight of each way to learn from good demonstrations: the best gold reward."""
    rows = rows[rows.part == "good demonstrations, tuning"]
    return best(rows.gold, rows, "beta", "weight")


def trials(part: str, rows: pandas.DataFrame, seeds: tuple[int, ...]) -> list[Trial]:
    """Return all trials of a part, seed by seed."""
    found = []
    if part == "tuning":
        for seed, method in itertools.product(TUNING_SEEDS, METHODS):
            rates = RATE_GRID if len(KNOBS[method]) > 1 else MORE_RATES
            for lr, knob in itertools.product(rates, KNOBS[method]):
                found.append(Trial(part, method, seed, BETA, lr, knob))
        return found
    if part == "joint tuning":
        for seed, method, beta in itertools.product(TUNING_SEEDS, JOINT, JOINT_BETAS):
            weights = WEIGHTS if method.startswith("AIHF") else WEIGHTS[:1]
            for weight in weights:
                found.append(Trial(part, method, seed, beta, 2e-3, 0.1, weight=weight))
        return found
    if part == "joint":
        settings = tuned_joint(rows)
        for seed, method, share in itertools.product(seeds, JOINT, SHARES):
            beta, weight = settings[method]
            found.append(Trial(part, method, seed, beta, 2e-3, share, weight=weight))
        return found
    if part == "good demonstrations, tuning":
        few = GOOD_SHARES[1]
        for method, (beta, weight) in tuned_joint(rows).items():
            if method in GOOD_METHODS:
                base = Trial(part, method, TUNED_ON[part][0], beta, 2e-3, few, weight=weight)
                if method.startswith("AIHF"):
                    found += [base._replace(weight=other) for other in WEIGHTS]
                else:
                    found += [base._replace(beta=other) for other in GOOD_BETAS]
        return found
    if part == "good demonstrations":
        settings = best_good(rows)
        for seed in seeds:
            found.append(Trial(part, "SFT", seed, BETA, 0.0, 0.0, iterations=0))
            for share, (method, (beta, weight)) in itertools.product(GOOD_SHARES, settings.items()):
                found.append(Trial(part, method, seed, beta, 2e-3, share, weight=weight))
        return found
    if part == "value clip":
        lr, knob = tuned(rows)["PPO"]
        for seed, offset, method in itertools.product(seeds, (0.0, 10.0), CRITICS):
            base = Trial(part, method, seed, BETA, lr, knob, offset=offset)
            found.append(base._replace(weight=CRITICS[method]))
        return found
    done = keys_of(rows)
    for seed, (method, (lr, knob)) in itertools.product(seeds, tuned(rows).items()):
        base = Trial(part, method, seed, BETA, lr, knob)
        spreads = OFFSETS if method == "PPO" else OFFSETS[-1:]
        changes = {
            "frontier": [dict(beta=beta) for beta in BETAS],
            "as tuned": [{}],
            "rate": [dict(lr=lr * factor) for factor in RATES],
            "staleness": [dict(epochs=n, iterations=160 // n) for n in EPOCHS],
            # the tuned rates differ by a factor of up to 4
            "staleness, one rate": [dict(epochs=16, iterations=10, lr=1e-3)],
            "offset": [dict(offset=spread) for spread in spreads],
            # one rate for all, because a higher rate games a reward model sooner
            "gaming": [dict(beta=0.025, lr=1e-3, iterations=240)],
        }
        if part == "as tuned" and key_of(base._replace(part="frontier")._asdict()) in done:
            continue  # the seed's frontier has this run in it
        if method in ONLINE or part == "frontier":
            found += [base._replace(**change) for change in changes[part]]
    return found


def missing(part: str, rows: pandas.DataFrame, seeds: tuple[int, ...]) -> list[Trial]:
    """Return the trials of a part that have no row."""
    done = keys_of(rows)
    return [trial for trial in trials(part, rows, seeds) if key_of(trial._asdict()) not in done]


def run_all(parts: Sequence[str], seeds: tuple[int, ...]) -> None:
    """Run the missing trials, one process per core, and write each row when its run ends.

    The two tunings come first, then each seed with all its parts.
    """
    rows = read_rows()
    needed = set(seeds)
    for part, some in TUNED_ON.items():
        # without rows of the tuning before, the next one has no trials yet
        if part in parts and (part not in set(rows.part) or missing(part, rows, seeds)):
            needed |= set(some)
    needed = sorted(needed)
    lost = [seed for seed in needed if seed in set(rows.seed) and not made(seed)]
    if lost:
        # Retrained models would differ by rounding, and their scores would have another zero.
        reason = f"{ROWS.name} has rows of seeds {lost}, but {PIPELINES} lacks their models"
        sys.exit(f"compare.py: {reason}; choose other --seeds, or put the models there")
    context = multiprocessing.get_context("spawn")
    os.environ["TQDM_DISABLE"] = "1"  # for the workers; this process has its tqdm already
    steps = [(part, seeds) for part in PARTS if part in parts and "tuning" in part]
    later = [part for part in PARTS if part in parts and "tuning" not in part]
    steps += [(part, (seed,)) for seed in seeds for part in later]
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        list(tqdm(pool.map(pipeline, needed), "pipelines", len(needed)))
        for part, some in steps:
            if part in GOOD_PARTS:
                left = {trial.seed for trial in missing(part, read_rows(), some)}
                list(tqdm(pool.map(demonstrated, left), "demonstrations", len(left)))
            futures = [pool.submit(run, trial) for trial in missing(part, read_rows(), some)]
            name = part if "tuning" in part else f"{part}, seed {some[0]}"
            for future in tqdm(as_completed(futures), name, len(futures)):
                write_row(future.result())


# ---- What the rows say -------------------------------------------------------------------
# Student's t, two-sided 95 %, by the number of seeds
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
T_95 |= {11: 2.23, 12: 2.20, 13: 2.18, 14: 2.16, 15: 2.14}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and the half-width of its 95 % interval."""
    values = list(values)
    if len(values) < 2:
        return values[0], math.inf
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def cell(values: Sequence[float], layout: str = "+.2f") -> str:
    mean, half = interval(values)
    return f"{mean:{layout}} ± {half:.2f}"


def as_tuned(rows: pandas.DataFrame) -> numpy.ndarray:
    """Return which rows are tuned runs at BETA with nothing changed; one per method and seed."""
    value_clip = (rows.part == "value clip") & (rows.method == "PPO") & (rows.offset == 0)
    found = rows[rows.part.isin(("frontier", "as tuned")) & (rows.beta == BETA) | value_clip]
    return rows.index.isin(found.drop_duplicates(["method", "seed"]).index)


def part_of(rows: pandas.DataFrame, part: str) -> pandas.DataFrame:
    """Return a part's rows, with `reached` added and each seed's score moved to a common zero.

    Zero is the mean of the tuned runs of the online methods on that seed. Rate, staleness, offset
    and gaming get those tuned runs as well, for their plots.
    """
    rows = rows.assign(reached=reached(rows))
    middle = as_tuned(rows) & (rows.method != "DPO")
    for figure in ("score", "reached"):
        zero = rows[middle].groupby("seed")[figure].mean()
        rows[figure] -= rows.seed.map(zero)
    found = rows.part == part
    if part not in ("frontier", "joint", *GOOD_PARTS):
        found |= middle & rows.seed.isin(rows[found].seed)
    return rows[found]


def by_method(values: pandas.Series) -> dict[str, list[float]]:
    """Turn values indexed by (method, seed) into lists in the order of the seeds."""
    groups = values.dropna().sort_index().groupby(level=0)
    found = {method: list(group) for method, group in groups}
    return {method: found[method] for method in METHODS if method in found}


def change(rows: pandas.DataFrame, part: str, column: str, value: float) -> dict[str, list]:
    """Return by how much `reached` differs from the tuned run of the same seed, by method.

    Of a part, the runs whose `column` has this value; one difference per seed.
    """
    rows = rows.assign(reached=reached(rows))
    there = rows[(rows.part == part) & (rows[column].round(9) == value)]
    keys = ["method", "seed"]
    base = rows[as_tuned(rows)].set_index(keys).reached
    return by_method(there.set_index(keys).reached - base)


def at_kl(rows: pandas.DataFrame, kl: float) -> dict[tuple[str, int], list]:
    """Return for each method and seed two weighted runs that interpolate the frontier at this KL.

    They are the runs on either side of it, and the weights are linear in log KL, against which
    the frontier is nearly straight. A method and seed that does not reach this KL is left out.
    """
    found = {}
    for key, runs in rows[rows.part == "frontier"].groupby(["method", "seed"]):
        runs = runs.sort_values("kl")
        log_kl = numpy.log(runs.kl.clip(1e-3)).to_numpy()
        above = int(numpy.searchsorted(log_kl, math.log(kl)))
        if 0 < above < len(runs):
            low, high = log_kl[above - 1 : above + 1]
            share = (math.log(kl) - low) / (high - low)
            found[key] = [(1 - share, runs.iloc[above - 1]), (share, runs.iloc[above])]
    return found


def frontier_gaps(rows: pandas.DataFrame, kl: float, figure: str = "gold") -> dict[str, list]:
    """Return how far each method is above P3O (V2) at the same KL, one value per seed."""
    found = at_kl(rows, kl)
    values = {key: sum(w * run[figure] for w, run in runs) for key, runs in found.items()}
    gaps = {key: value - values.get(("V2", key[1]), math.nan) for key, value in values.items()}
    return by_method(pandas.Series(gaps, dtype=float))


def head_to_head(rows: pandas.DataFrame, kl: float) -> dict[tuple[str, str], list[float]]:
    """Return how often a method's answers beat another's at the same KL, one value per seed.

    The answers are to the same prompts, and a tie counts half.
    """
    wins = defaultdict(list)
    found = at_kl(rows, kl)
    for (one, seed), (other, same) in itertools.product(found, found):
        if seed == same:
            pairs = itertools.product(found[one, seed], found[other, seed])
            rate = sum(w * v * win_rate(a.points, b.points) for (w, a), (v, b) in pairs)
            wins[one, other].append(rate)
    return wins


def course(rows: pandas.DataFrame, method: str) -> numpy.ndarray:
    """Return KL, score and gold reward along the long run: (seeds, measurements, 3)."""
    rows = rows[(rows.part == "gaming") & (rows.method == method)].sort_values("seed")
    curves = [[float(value) for value in curve.split()] for curve in rows.curve]
    return numpy.array(curves).reshape(len(curves), -1, 3) if curves else numpy.empty((0, 0, 3))


def gamed_after(rows: pandas.DataFrame, method: str) -> list[float]:
    """Return how many iterations the long run took to pass 20 nats, one per seed; inf if never."""
    found = []
    for points in course(rows, method):
        beyond = [i for i, (kl, *_) in enumerate(points, 1) if kl > 20]
        found.append(WATCHED_EVERY * beyond[0] if beyond else math.inf)
    return found


def by(rows: pandas.DataFrame, part: str, column: str, figure: str) -> str:
    """Return a table of a figure, mean ± half-width over seeds: methods by values of `column`."""
    table = defaultdict(dict)
    for (method, value), found in part_of(rows, part).groupby(["method", column]):
        table[method][value] = cell(found[figure], "6.2f")
    order = dict.fromkeys((*METHODS, *CRITICS, "SFT", *JOINT))
    methods = [method for method in order if method in table]
    table = {NAMES.get(method, method): table[method] for method in methods}
    return pandas.DataFrame(table).T.fillna("").sort_index(axis=1).to_string()


def critic_gaps(rows: pandas.DataFrame) -> dict[str, tuple[list[float], list[float]]]:
    """Return what score − β KL changes by δ(x), by critic: two lists with one value per seed.

    First against the same critic without δ(x), then against PPO as tuned with the same δ(x).
    """
    rows = rows[rows.part == "value clip"].assign(reached=reached(rows))
    found = rows.pivot_table("reached", "seed", ["method", "offset"])
    gaps = {}
    for method in CRITICS:
        bases = (found[method, 0.0], found["PPO", 10.0])
        gaps[method] = tuple(list((found[method, 10.0] - base).dropna()) for base in bases)
    return gaps


def offset_shares(rows: pandas.DataFrame) -> dict[str, list[list[float]]]:
    """Return the share of δ(x) that each critic knows: on training prompts, on held-out ones.

    By method, two lists with one value per seed.
    """
    rows = rows[(rows.part == "value clip") & (rows.curve != "")].sort_values("seed")
    found = {}
    for method in CRITICS:
        curves = rows[rows.method == method].curve
        pairs = [[float(value) for value in curve.split()] for curve in curves]
        found[method] = [list(values) for values in zip(*pairs, strict=True)]
    return found


def good_gaps(rows: pandas.DataFrame, share: float, base: str) -> dict[str, list[float]]:
    """Return the gold reward with this share of the preferences, minus that of another method.

    Of the runs with good demonstrations. SFT, another base, uses no preferences. By method, one
    value per seed, in the order of the seeds.
    """
    rows = rows[(rows.part == "good demonstrations") & rows.knob.isin((0.0, share))]
    golds = rows.pivot_table("gold", "seed", "method")
    return {method: list((golds[method] - golds[base]).dropna()) for method in GOOD_METHODS}


def summary(rows: pandas.DataFrame) -> str:
    """Return the table of README.md: tuned settings; differences with their intervals."""
    columns = {
        "gold reward at KL 2, minus P3O (V2)'s": frontier_gaps(rows, 2.0),
        "rate 4e-3": change(rows, "rate", "lr", 4e-3),
        "16 passes": change(rows, "staleness", "epochs", 16),
        "16 passes, all at rate 1e-3": change(rows, "staleness, one rate", "epochs", 16),
        "r + δ(x), sd 10": change(rows, "offset", "offset", 10),
    }
    seeds = {title: max(map(len, gaps.values()), default=0) for title, gaps in columns.items()}
    titles = ["tuned", *(f"{title}; {count} seeds" for title, count in seeds.items())]
    settings = tuned(rows)
    lines = ["| method | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for method in METHODS:
        cells = [NAMES.get(method, method), ""]
        if method in settings:
            lr, knob = settings[method]
            name = KNOB_NAMES.get(method)
            cells[1] = f"rate {lr:g}" + (f", {name} {knob:g}" if name else "")
        for gaps in columns.values():
            known = any(gaps.get(method, []))  # P3O (V2) minus itself is 0 in every seed
            cells.append(cell(gaps[method]) if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(rows: pandas.DataFrame) -> None:
    """Print the tables of the parts that have rows."""
    have = set(rows.part)
    print("tuned: learning rate; ε, η or λ; reached = score − β KL")
    tuning = rows[rows.part == "tuning"]
    for method, (lr, knob) in tuned(rows).items():
        here = tuning[(tuning.method == method) & (tuning.lr == lr) & (tuning.knob == knob)]
        print(f"  {NAMES.get(method, method):11}{lr:10g}{knob:8g}{reached(here).mean():8.3f}")
    print("\nbelow, the zero of a seed's score is the mean of its tuned online runs")
    tables = [("frontier", "beta", f) for f in ("kl", "score", "gold", "win_rate", "reached")]
    tables += [("rate", "lr", "reached"), ("staleness", "epochs", "reached")]
    tables += [("offset", "offset", "reached")]
    tables += [("joint", "knob", "gold"), ("joint", "knob", "kl")]  # knob: share of preferences
    tables += [("value clip", "offset", f) for f in ("reached", "gold", "kl", "win_rate")]
    tables += [("good demonstrations", "knob", f) for f in ("gold", "kl", "win_rate")]
    for part, column, figure in tables:
        if part in have:
            print(f"\n{part}: {figure} by {column}\n{by(rows, part, column, figure)}")
    if "value clip" in have:
        print("\nscore − β KL with δ(x): minus that without; minus PPO's as tuned")
        for method, gaps in critic_gaps(rows).items():
            print(f"  {method:32}" + "   ".join(cell(values) for values in gaps))
        print("\nshare of δ(x) that PPO's critic knows: training prompts, held-out prompts")
        for method, shares in offset_shares(rows).items():
            print(f"  {method:32}" + "   ".join(cell(values) for values in shares))
    if "good demonstrations" in have:
        sft = rows[(rows.part == "good demonstrations") & (rows.method == "SFT")]
        golds = cell([float(curve) for curve in sft.curve], ".2f")
        print(f"\ngold reward of the good demonstrations: {golds}")
        print("gold reward minus that of SFT on them; minus the pipeline's")
        for share in GOOD_SHARES:
            above_sft = good_gaps(rows, share, "SFT")
            for method, gaps in good_gaps(rows, share, GOOD_METHODS[0]).items():
                print(f"  {share:4.0%}  {method:24}{cell(above_sft[method])}   {cell(gaps)}")
    for kl in (1.0, 2.0):
        print(f"\nabove P3O (V2) at a KL of {kl:g}: score, gold reward")
        scores = frontier_gaps(rows, kl, "score")
        for method, golds in frontier_gaps(rows, kl).items():
            print(f"  {NAMES.get(method, method):11}{cell(scores[method])}   {cell(golds)}")
    print(f"\n{summary(rows)}")
    print("\ngaming, a long run at β = 0.025: mean KL, score, gold reward every 40 iterations")
    for method in dict.fromkeys(rows[rows.part == "gaming"].method):
        points = [" ".join(f"{v:.2f}" for v in point) for point in course(rows, method).mean(0)]
        print(f"  {NAMES.get(method, method):11}" + ", ".join(points))


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--show", action="store_true", help="print the results and run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    if args.show:
        show(read_rows())
        return
    run_all(args.parts, tuple(args.seeds))


if __name__ == "__main__":
    main()
