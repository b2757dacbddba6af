"""P3O beside its relatives: tuned alike, then compared over β, rates, stale samples and offsets.

    python tests/comparison/compare.py --seeds 8 9        # all parts, from where it stopped; hours
    python tests/comparison/compare.py --seeds 8 --parts "as tuned" rate      # some
    python tests/comparison/compare.py --show             # what the rows say

Every run starts from a pipeline of its own seed (SFT and reward model of p3o.py --small), takes the
same prompts and makes as many updates, on as many samples unless the part is about their reuse, and
is one row of data/comparison.csv. Rows that are there are not run again. Learning rate and clip of
each method are those that did best in the tuning, whose seeds are not used afterwards. A seed's
rows belong to its models in runs/pipelines; without those it is not continued.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import itertools
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

os.environ["OMP_NUM_THREADS"] = "1"  # a run a core
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import numpy  # noqa: E402
import pandas  # noqa: E402
import relatives  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

import p3o  # noqa: E402
from data import judge  # noqa: E402

ROWS = ROOT / "data" / "comparison.csv"
PIPELINES = ROOT / "runs" / "pipelines"
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4, 5)
BETA = 0.1
BETAS = (0.4, 0.2, 0.1, 0.05, 0.025)
# beside the run as tuned: at BETA, with the tuned rate, 2 epochs and no offset
RATES = (0.25, 2, 4, 8)  # times the tuned one
EPOCHS = (1, 4, 8, 16)  # on the same samples, with as many updates in all
OFFSETS = (1, 3, 10)  # standard deviation of δ(x); methods that see pairs get only the last
EVALUATED = 256  # held-out prompts
WATCHED_EVERY = 40  # iterations of the long run
LOSSES = {
    "V2": p3o.p3o_loss,
    "V1": p3o.p3o_loss,
    "RLOO": relatives.rloo_loss,
    "GRPO": relatives.grpo_loss,
    "online DPO": relatives.online_dpo_loss,
    "REBEL": relatives.rebel_loss,
}
METHODS = (*LOSSES, "PPO", "DPO")
RATE_GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
# as many trials for a method without a knob
MORE_RATES = (3.125e-5, 6.25e-5, 1.25e-4, *RATE_GRID, 8e-3, 1.6e-2)
# what else a method has: ε; η of REBEL, λ of PPO; online DPO and DPO have nothing but more rates
KNOBS = {
    "V2": (0.2, 0.5),
    "V1": (0.2, 0.5),
    "RLOO": (0.2, 0.5),
    "GRPO": (0.2, 0.5),
    "online DPO": (0.0,),
    "REBEL": (1.0, 4.0),
    "PPO": (0.95, 1.0),
    "DPO": (0.0,),
}
# reward and policy one after the other, or at once: with this share of the preferences
JOINT = ("pipeline", "pipeline, equal updates", "AIHF", "AIHF, logistic")
SHARES = (0.01, 0.03, 0.1, 1.0)
JOINT_BETAS = (0.05, 0.1, 0.2, 0.4)
WEIGHTS = (1.0, 0.1, 0.01)  # AIHF has two settings, and so three times as many trials


class Trial(NamedTuple):
    part: str
    method: str
    seed: int
    beta: float
    lr: float
    knob: float
    epochs: int = 2
    iterations: int = 80
    offset: float = 0.0
    weight: float = 1.0  # of AIHF's demonstrations


PARTS = (
    "tuning",
    "frontier",
    "as tuned",
    "rate",
    "staleness",
    "staleness, one rate",
    "offset",
    "gaming",
    "joint tuning",
    "joint",
)
FIGURES = ("score", "gold", "kl", "win_rate", "finished", "points", "curve")


# ---- One run -----------------------------------------------------------------------------
def made(seed: int) -> bool:
    return (PIPELINES / str(seed) / "summary.json").exists()


def pipeline(seed: int) -> Path:
    """SFT and reward model of a seed, made once."""
    out = PIPELINES / str(seed)
    if not made(seed):
        options = dict(seed=seed, out=str(out), iterations=1, eval_prompts=2)
        p3o.run(p3o.Config(**p3o.SMALL | options))
    return out


def offset_of(ids: torch.Tensor, response_mask: torch.Tensor, spread: float) -> torch.Tensor:
    """δ(x): a normal number with this standard deviation, looked up by a hash of the prompt."""
    table = torch.randn(9973, generator=torch.Generator().manual_seed(1))
    weights = torch.arange(1, ids.shape[-1] + 1) ** 2  # (T,)
    before = response_mask.cumsum(-1) == 0  # (…, T)
    return spread * table[(ids * before * weights).sum(-1) % len(table)]


def train(trial: Trial, policy, sft, reward_model, examples, log) -> None:
    """One method's training of `policy`."""
    options = dict(
        seed=trial.seed,
        beta=trial.beta,
        lr=trial.lr,
        inner_epochs=trial.epochs,
        iterations=trial.iterations,
    )
    if trial.method in ("V2", "V1", "RLOO", "GRPO"):
        options["clip_range"] = trial.knob
    if trial.method == "GRPO":
        # its two advantages differ by 2 in every pair, scores by about 1 at first: β in that unit
        options["beta"] = 2 * trial.beta
    cfg = p3o.Config(**p3o.SMALL | options, clip="separate" if trial.method == "V1" else "joint")
    prompts = [example.prompt for example in examples]

    def score(ids, response_mask):
        offsets = offset_of(ids, response_mask, trial.offset)
        return p3o.reward_scores(reward_model, ids, response_mask) + offsets

    if trial.method == "DPO":
        relatives.train_dpo(policy, sft, examples, cfg, log)
    elif trial.method == "PPO":
        critic = copy.deepcopy(reward_model)
        relatives.train_ppo(policy, sft, score, prompts, cfg, log, critic, gae_lambda=trial.knob)
    else:
        loss = LOSSES[trial.method]
        if trial.method == "REBEL":
            loss = functools.partial(loss, eta=trial.knob)
        p3o.train_policy(policy, sft, score, prompts, cfg, log, loss_fn=loss)


def train_on_few(trial: Trial, policy, sft, out: Path, examples, log) -> None:
    """The last two stages with a share of the preferences, `knob`; all demonstrations are there.

    AIHF makes an update of the reward with each of the policy. The pipeline trains its reward model
    before, for two epochs as p3o.py does, or with as many updates as AIHF.
    """
    preferences = examples[: round(trial.knob * len(examples))]
    options = dict(beta=trial.beta, lr=trial.lr, iterations=trial.iterations)
    cfg = p3o.Config(**p3o.SMALL | options)
    prompts = [example.prompt for example in examples]
    reward_model = p3o.load(out / "sft", AutoModelForSequenceClassification, num_labels=1)
    if trial.method.startswith("AIHF"):
        torch.nn.init.zeros_(reward_model.score.weight)  # as train_reward does
        exact = trial.method == "AIHF"
        models = (policy, sft, reward_model)
        options = dict(exact=exact, demo_weight=trial.weight)
        relatives.train_jointly(*models, examples, preferences, cfg, log, **options)
        return
    epochs = 2
    if trial.method == "pipeline, equal updates":
        updates = trial.iterations * cfg.inner_epochs * cfg.pairs // cfg.minibatch
        epochs = max(1, round(updates * cfg.batch / len(preferences)))
    p3o.train_reward(reward_model, preferences, dataclasses.replace(cfg, epochs=epochs), log)
    p3o.set_gain(reward_model, sft, prompts[: p3o.GAIN_PROMPTS], cfg)
    score = functools.partial(p3o.reward_scores, reward_model)
    p3o.train_policy(policy, sft, score, prompts, cfg, log)


def answer_all(policy, sft, reward_model, tokenizer, examples) -> dict[str, list]:
    """One answer to each prompt: its score, KL, text, and whether it ended."""
    found = defaultdict(list)
    torch.manual_seed(0)
    for batch in p3o.parts_of(examples, 64, "answers"):
        prompts = [example.prompt for example in batch]
        ids, mask = p3o.sample(policy, prompts, 1, p3o.SMALL["response_tokens"])  # (b, 1, T)
        with torch.no_grad():
            logprobs = p3o.sequence_logprobs(policy, ids, mask)
            found["kl"] += (logprobs - p3o.sequence_logprobs(sft, ids, mask)).flatten().tolist()
            found["score"] += p3o.reward_scores(reward_model, ids, mask).flatten().tolist()
        found["finished"] += p3o.finished(policy, ids, mask).flatten().tolist()
        for example, row, inside in zip(batch, ids, mask, strict=True):
            text = tokenizer.decode(row[inside], skip_special_tokens=True)
            found["gold"].append(judge.gold_reward(example.text.prompt, text))
    return found


@functools.lru_cache(1)
def start_of(seed: int) -> tuple:
    """What all runs of a seed begin with, and what its SFT model answers."""
    torch.set_num_threads(1)
    out = pipeline(seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    cfg = p3o.Config(**p3o.SMALL)
    train_pairs, heldout_pairs = p3o.load_pairs(cfg.data)
    examples = p3o.tokenize(train_pairs, tokenizer, cfg)
    heldout = p3o.tokenize(heldout_pairs, tokenizer, cfg)[:EVALUATED]
    sft = p3o.load(out / "sft")
    reward_model = p3o.load(out / "reward", AutoModelForSequenceClassification)
    answers = answer_all(sft, sft, reward_model, tokenizer, heldout)
    return tokenizer, examples, heldout, sft, reward_model, answers


def run(trial: Trial) -> dict:
    """A row of the file: the trial and its figures."""
    tokenizer, examples, heldout, sft, reward_model, first = start_of(trial.seed)
    out = pipeline(trial.seed)
    policy = p3o.load(out / "sft")
    curve = []

    def log(step: int, row: dict) -> None:
        if trial.part == "gaming" and (step + 1) % WATCHED_EVERY == 0:
            state = torch.get_rng_state()
            now = answer_all(policy, sft, reward_model, tokenizer, heldout)
            torch.set_rng_state(state)
            curve.extend(statistics.mean(now[key]) for key in ("kl", "score", "gold"))

    torch.manual_seed(trial.seed)
    with contextlib.suppress(FloatingPointError):  # it diverged: what it became is judged
        if trial.method in JOINT:
            train_on_few(trial, policy, sft, out, examples, log)
        else:
            train(trial, policy, sft, reward_model, examples, log)
    mine = answer_all(policy, sft, reward_model, tokenizer, heldout)
    wins = judge.wins(mine["gold"], first["gold"])
    row = trial._asdict()
    for key in ("score", "gold", "kl", "finished"):
        row[key] = round(statistics.mean(mine[key]), 4)
    row["win_rate"] = round(statistics.mean(wins), 4)
    row["points"] = ""
    if trial.part == "frontier":  # the gold reward of each answer in points, a letter each
        row["points"] = "".join(chr(ord("m") + round(gold / 1.5)) for gold in mine["gold"])
    row["curve"] = " ".join(f"{value:.3f}" for value in curve)
    return row


# ---- All runs ----------------------------------------------------------------------------
def read_rows() -> pandas.DataFrame:
    """The rows so far."""
    if not ROWS.exists():
        return pandas.DataFrame(columns=[*Trial._fields, *FIGURES])
    return pandas.read_csv(ROWS, keep_default_na=False)


def key_of(row: dict) -> tuple:
    """What tells a trial from others."""
    numbers = [round(float(row[name]), 9) for name in Trial._fields[2:]]
    return (row["part"], row["method"], *numbers)


def reached(rows: pandas.DataFrame) -> pandas.Series:
    """r − β KL in its own seed's score: what all methods but GRPO and DPO climb."""
    return rows.score - rows.beta * rows.kl


def tuned(rows: pandas.DataFrame) -> dict[str, tuple[float, float]]:
    """Learning rate and knob of each method: the best mean of what it reached in the tuning."""
    rows = rows[rows.part == "tuning"]
    means = reached(rows).groupby([rows.method, rows.lr, rows.knob]).mean()
    best = means.groupby("method").idxmax()
    return {method: (lr, knob) for method, lr, knob in best}


def tuned_joint(rows: pandas.DataFrame) -> dict[str, tuple[float, float]]:
    """β and weight of each way to learn from few preferences: the best mean at a tenth of them.

    By gold reward, since their scores have no common unit.
    """
    rows = rows[rows.part == "joint tuning"]
    means = rows.gold.groupby([rows.method, rows.beta, rows.weight]).mean()
    best = means.groupby("method").idxmax()
    return {method: (beta, weight) for method, beta, weight in best}


def trials(part: str, rows: pandas.DataFrame, seeds: tuple[int, ...]) -> list[Trial]:
    """What a part consists of, whole seeds after one another."""
    if part == "tuning":
        found = []
        for seed, method in itertools.product(TUNING_SEEDS, METHODS):
            rates = RATE_GRID if len(KNOBS[method]) > 1 else MORE_RATES
            for lr, knob in itertools.product(rates, KNOBS[method]):
                found.append(Trial(part, method, seed, BETA, lr, knob))
        return found
    if part == "joint tuning":
        found = []
        for seed, method, beta in itertools.product(TUNING_SEEDS, JOINT, JOINT_BETAS):
            trial = Trial(part, method, seed, beta, 2e-3, 0.1)
            weights = WEIGHTS if method.startswith("AIHF") else WEIGHTS[:1]
            found += [trial._replace(weight=weight) for weight in weights]
        return found
    if part == "joint":
        best = tuned_joint(rows)
        found = []
        for seed, method, share in itertools.product(seeds, JOINT, SHARES):
            beta, weight = best[method]
            found.append(Trial(part, method, seed, beta, 2e-3, share, weight=weight))
        return found
    best = tuned(rows)
    keys = {key_of(row) for row in rows.to_dict("records")}
    found = []
    online = [method for method in METHODS if method != "DPO"]
    for seed, method in itertools.product(seeds, METHODS if part == "frontier" else online):
        lr, knob = best[method]
        base = Trial(part, method, seed, BETA, lr, knob)
        if part == "frontier":
            found += [base._replace(beta=beta) for beta in BETAS]
        elif part == "as tuned":  # for seeds without a frontier, which has this run in it
            same = base._replace(part="frontier")._asdict()
            if key_of(same) not in keys:
                found.append(base)
        elif part == "rate":
            found += [base._replace(lr=lr * factor) for factor in RATES]
        elif part == "staleness":
            found += [base._replace(epochs=n, iterations=160 // n) for n in EPOCHS]
        elif part == "staleness, one rate":  # the tuned ones differ by up to 4
            found.append(base._replace(epochs=16, iterations=10, lr=1e-3))
        elif part == "offset":
            spreads = OFFSETS if method == "PPO" else OFFSETS[-1:]
            found += [base._replace(offset=spread) for spread in spreads]
        elif part == "gaming":
            # one rate for all: a higher one games a reward model sooner
            found.append(base._replace(beta=0.025, lr=1e-3, iterations=240))
    return found


def missing(part: str, rows: pandas.DataFrame, seeds: tuple[int, ...]) -> list[Trial]:
    """The trials of a part that have no row."""
    done = {key_of(row) for row in rows.to_dict("records")}
    return [trial for trial in trials(part, rows, seeds) if key_of(trial._asdict()) not in done]


def run_all(parts: Sequence[str], seeds: tuple[int, ...]) -> None:
    """Run what is missing, a process a core; each row is written as it comes.

    The tunings come first, then all parts of a seed after those of the seed before.
    """
    rows = read_rows()
    needed = list(seeds)
    if any("tuning" in part and missing(part, rows, seeds) for part in parts):
        needed += TUNING_SEEDS
    lost = [seed for seed in needed if seed in set(rows.seed) and not made(seed)]
    if lost:
        # trained again they differ by rounding, and so does the zero of their score
        reason = f"{ROWS.name} has rows of seeds {lost}, but {PIPELINES} not their models"
        sys.exit(f"compare.py: {reason}; choose other --seeds, or put the models there")
    context = multiprocessing.get_context("spawn")
    os.environ["TQDM_DISABLE"] = "1"  # for the workers; this process has its tqdm already
    steps = [(part, seeds) for part in PARTS if part in parts and "tuning" in part]
    later = [part for part in PARTS if part in parts and "tuning" not in part]
    steps += [(part, (seed,)) for seed in seeds for part in later]
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        list(tqdm(pool.map(pipeline, needed), "pipelines", len(needed)))
        for part, some in steps:
            futures = [pool.submit(run, trial) for trial in missing(part, read_rows(), some)]
            name = part if "tuning" in part else f"{part}, seed {some[0]}"
            for future in tqdm(as_completed(futures), name, len(futures)):
                write_row(future.result())


def write_row(row: dict) -> None:
    fresh = not ROWS.exists()
    with ROWS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*Trial._fields, *FIGURES], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


# ---- What the rows say -------------------------------------------------------------------
# Student's t, two-sided, by the number of seeds
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
T_95 |= {11: 2.23, 12: 2.20, 13: 2.18, 14: 2.16, 15: 2.14}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half-width of its 95 % interval."""
    values = list(values)
    if len(values) < 2:
        return values[0], math.inf
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def as_tuned(rows: pandas.DataFrame) -> numpy.ndarray:
    """Which rows are of runs at BETA with nothing changed, one a method and seed: booleans."""
    found = rows[rows.part.isin(("frontier", "as tuned")) & (rows.beta == BETA)]
    return rows.index.isin(found.drop_duplicates(["method", "seed"]).index)


def part_of(rows: pandas.DataFrame, part: str) -> pandas.DataFrame:
    """A part's rows, with what each method `reached`.

    Rate, staleness and offset have the run as tuned in their middle. The zero of each seed's score
    means nothing: it is put where the online methods are in those runs, on average.
    """
    rows = rows.assign(reached=reached(rows))
    middle = as_tuned(rows) & (rows.method != "DPO")
    for figure in ("score", "reached"):
        zero = rows[middle].groupby("seed")[figure].mean()
        rows[figure] -= rows.seed.map(zero)
    found = rows.part == part
    if part not in ("frontier", "joint"):
        found |= middle & rows.seed.isin(rows[found].seed)
    return rows[found]


def change(rows: pandas.DataFrame, part: str, column: str, value: float) -> dict[str, list]:
    """What each method reached at a value of `column`, less what it reached at BETA as tuned.

    Seed by seed.
    """
    rows = part_of(rows, part)
    found = {}
    for method in METHODS:
        mine = rows[rows.method == method].round({"lr": 9})
        base = mine[as_tuned(mine)].set_index("seed").reached
        there = mine[(mine.part == part) & (mine[column] == value)].set_index("seed").reached
        gaps = (there - base).dropna().sort_index()
        if len(gaps):
            found[method] = list(gaps)
    return found


def at_kl(rows: pandas.DataFrame, kl: float, figure: str) -> float:
    """A figure on a seed's frontier at this KL, between the two nearest β; NaN beyond its ends."""
    rows = rows.sort_values("kl")
    log_kl = numpy.log(rows.kl.clip(1e-3))  # against which the frontier is nearly straight
    value = numpy.interp(math.log(kl), log_kl, rows[figure], left=math.nan, right=math.nan)
    return float(value)


def frontier_gaps(rows: pandas.DataFrame, kl: float, figure: str = "gold") -> dict[str, list]:
    """How far each method is above V2 at the same KL, seed by seed."""
    rows = rows[rows.part == "frontier"]
    found = {}
    for method in METHODS:
        gaps = []
        for seed, mine in rows[rows.method == method].groupby("seed"):
            base = rows[(rows.method == "V2") & (rows.seed == seed)]
            gap = at_kl(mine, kl, figure) - at_kl(base, kl, figure)
            if not math.isnan(gap):
                gaps.append(gap)
        if gaps:
            found[method] = gaps
    return found


def head_to_head(rows: pandas.DataFrame, kl: float) -> dict[tuple[str, str], list[float]]:
    """How often each method's answers beat each other's to the same prompts, seed by seed.

    Of each method and seed the run is taken whose KL is nearest. A tie counts half.
    """
    rows = rows[rows.part == "frontier"]
    nearest = {}
    for (method, seed), found in rows.groupby(["method", "seed"]):
        closest = found.loc[(numpy.log(found.kl.clip(0.01) / kl)).abs().idxmin()]
        nearest[method, seed] = [ord(letter) for letter in closest.points]
    wins = defaultdict(list)
    for (one, seed), mine in nearest.items():
        for other in METHODS:
            theirs = nearest.get((other, seed))
            if theirs:
                wins[one, other].append(statistics.mean(judge.wins(mine, theirs)))
    return wins


def course(rows: pandas.DataFrame, method: str) -> numpy.ndarray:
    """Of the long run, KL, score and gold reward every 40 iterations: (seeds, points, 3)."""
    rows = rows[(rows.part == "gaming") & (rows.method == method)].sort_values("seed")
    curves = [[float(value) for value in curve.split()] for curve in rows.curve]
    return numpy.array(curves).reshape(len(curves), -1, 3) if curves else numpy.empty((0, 0, 3))


def gamed_after(rows: pandas.DataFrame, method: str) -> list[float]:
    """Iterations of the long run until 20 nats were seen, seed by seed; infinite if never."""
    found = []
    for points in course(rows, method):
        beyond = [i for i, (kl, *_) in enumerate(points, 1) if kl > 20]
        found.append(WATCHED_EVERY * beyond[0] if beyond else math.inf)
    return found


def by(rows: pandas.DataFrame, part: str, column: str, figure: str) -> str:
    """Mean and half-width over seeds of a figure, a row a method, a column a value of `column`."""
    rows = part_of(rows, part)
    table = {}
    for method in dict.fromkeys([*METHODS, *JOINT]):
        cells = {}
        for value, found in rows[rows.method == method].groupby(column):
            mean, half = interval(found[figure])
            cells[value] = f"{mean:6.2f} ± {half:.2f}"
        if cells:
            table[method] = cells
    return pandas.DataFrame(table).T.fillna("").sort_index(axis=1).to_string()


def summary(rows: pandas.DataFrame) -> str:
    """The README's table: each difference, its mean over seeds ± half its 95 % interval."""
    columns = {
        "gold reward at 2 nats, above V2's": frontier_gaps(rows, 2.0),
        "rate 4e-3": change(rows, "rate", "lr", 4e-3),
        "16 passes": change(rows, "staleness", "epochs", 16),
        "16 passes, all at rate 1e-3": change(rows, "staleness, one rate", "epochs", 16),
        "r + δ(x), sd 10": change(rows, "offset", "offset", 10),
    }
    seeds = {title: max(map(len, gaps.values()), default=0) for title, gaps in columns.items()}
    titles = [f"{title}; {count} seeds" for title, count in seeds.items()]
    lines = ["| method | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for method in METHODS:
        cells = [method]
        for gaps in columns.values():
            if method not in gaps or not any(gaps[method]):
                cells.append("")
                continue
            mean, half = interval(gaps[method])
            cells.append(f"{mean:+.2f} ± {half:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(rows: pandas.DataFrame) -> None:
    """Print the tables of the parts that have rows."""
    have = set(rows.part)
    print("tuned: learning rate; ε, η or λ; score − β KL there")
    tuning = rows[rows.part == "tuning"]
    for method, (lr, knob) in tuned(rows).items():
        here = tuning[(tuning.method == method) & (tuning.lr == lr) & (tuning.knob == knob)]
        print(f"  {method:11}{lr:10g}{knob:8g}{reached(here).mean():8.3f}")
    if "frontier" in have:
        for figure in ("kl", "score", "gold", "win_rate", "reached"):
            print(f"\nfrontier: {figure} by β")
            print(by(rows, "frontier", "beta", figure))
        for kl in (1.0, 2.0):
            print(f"\nat a KL of {kl:g}, above V2 in score and in gold reward")
            scores = frontier_gaps(rows, kl, "score")
            for method, golds in frontier_gaps(rows, kl).items():
                score, score_half = interval(scores[method])
                gold, gold_half = interval(golds)
                print(
                    f"  {method:11}{score:+7.2f} ± {score_half:.2f}{gold:+9.2f} ± {gold_half:.2f}"
                )
    for part, column in (("rate", "lr"), ("staleness", "epochs"), ("offset", "offset")):
        if part in have:
            print(f"\n{part}: score − β KL by {column}, less the online methods' mean as tuned")
            print(by(rows, part, column, "reached"))
    print(f"\n{summary(rows)}")
    if "gaming" in have:
        print("\na long run at β = 0.025: KL, score and gold reward every 40 iterations")
        for method in METHODS:
            curves = course(rows, method)
            if len(curves):
                points = [" ".join(f"{v:.2f}" for v in point) for point in curves.mean(0)]
                print(f"  {method:11}" + ", ".join(points))
    if "joint" in have:
        for figure in ("gold", "kl"):
            print(f"\nfew preferences: {figure} by their share")
            print(by(rows, "joint", "knob", figure))


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--show", action="store_true", help="what the rows say; nothing is run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    if args.show:
        show(read_rows())
        return
    run_all(args.parts, tuple(args.seeds))


if __name__ == "__main__":
    main()
