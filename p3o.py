# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tqdm==4.70.1"]
# ///
"""RLHF with Pairwise Proximal Policy Optimization (P3O, arXiv 2310.00212), in one file, read from top to bottom.

    python p3o.py --small      # a tiny GPT-2 on the data in data/: about a minute on a laptop, no network
    python p3o.py              # GPT-2 (124M) on Anthropic HH, one GPU

Three stages, each a function below with its loop in plain sight, x a prompt and y a whole response:

    1  SFT      maximise log π(y|x) = Σ_t log π(y^t | x, y^<t) on the preferred responses              train_sft
    2  reward   minimise −E log σ(r(x, y_w) − r(x, y_l)), Bradley-Terry                                train_reward
    3  P3O      maximise E r − β KL(π‖π_ref) from pairs y_1, y_2 sampled for the same prompt           train_policy

Stage 3 is why this file exists. Bradley-Terry fixes r only up to an offset δ(x): r and r + δ(x) give each preference
the same probability. PPO's update changes with δ(x), sample by sample; P3O's cannot: it sees r only as r_1 − r_2.

    (1)  h_i = log π(y_i|x) − log π_ref(y_i|x)      ρ_i = π(y_i|x) / π_old(y_i|x)      sg = stop-gradient
    (2)  q = sg[ r_1 − r_2 − β (h_1 − h_2) ]                                           0 for all pairs: the optimum
    (3)  ∇J = E ½ q ρ_1 ρ_2 ∇ log( π(y_1|x) / π(y_2|x) )                               the pairwise policy gradient
    (4)  V2, clip="joint":     J = ½ min( q w u, q w clip(u, −ε, ε) ),  u = log(ρ_1/ρ_2),  w = sg[clip(ρ_1 ρ_2, 1/c, c)]
    (5)  V1, clip="separate":  J = ½ { min( q sg[ρ̄_2] ρ_1, q sg[ρ̄_2] clip(ρ_1, 1−ε, 1+ε) )
                                     + min( −q sg[ρ̄_1] ρ_2, −q sg[ρ̄_1] clip(ρ_2, 1−ε, 1+ε) ) },  ρ̄ = clip(ρ, 1/c, c)

Left out: a value network and GAE (a response is one action, its partner the baseline), whitening and clipping scores
(absolute scores would bring δ(x) back), a KL loss (q holds it), several GPUs and LoRA (see TRL).
"""

import argparse
import json
import logging
import math
import os
import runpy
import shutil
import sys
import textwrap
import time
import zlib
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

SHIPPED_DATA = (Path(__file__).parent / "data").resolve()
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how Anthropic HH marks its turns
mixed_precision = torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())  # weights, losses: fp32
Log = Callable[..., None]  # log(step, **metrics) writes one line of metrics.jsonl


class UserError(Exception):
    """Something the user can mend, told in one line."""


# ---- Configuration: each field is an option of the command line, its help text included ------------------------------
def option(default: Any, help: str, **rule: Any) -> Any:
    return field(default=default, metadata={"help": help} | rule)


@dataclass
class Config:
    small: bool = option(False, "a tiny GPT-2 on the shipped data, in about a minute on two cores")
    model: str = option("gpt2", "causal language model: a hub name or a directory")
    data: str = option("Anthropic/hh-rlhf", "preference pairs: a hub name, a file or a directory")
    out: str = option("runs/gpt2", "directory for models and metrics; run again to resume")
    seed: int = option(0, "fixes data order, samples and fresh weights", least=0)
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    clip: str = option("joint", "joint (V2), separate (V1) or none", choices=("joint", "separate", "none"))
    beta: float = option(0.05, "price of KL to the SFT model, in reward per nat", least=0)
    clip_range: float = option(0.2, "ε: half-width of the clip, of log(ρ_1/ρ_2) or of each ρ", least=0)
    ratio_bound: float = option(10.0, "c: importance weights are kept in [1/c, c]", least=1)
    prompt_tokens: int = option(384, "longer prompts lose their first turns", least=1)
    response_tokens: int = option(128, "longest response", least=1)
    batch: int = option(32, "stages 1 and 2: rows per update", least=1)
    sft_epochs: int = option(1, "stage 1: passes over the preferred responses", least=1)
    sft_lr: float = option(5e-5, "stage 1: peak learning rate", least=0)
    reward_epochs: int = option(1, "stage 2: passes over the pairs", least=1)
    reward_lr: float = option(2e-5, "stage 2: peak learning rate", least=0)
    iterations: int = option(1000, "stage 3: rounds of sampling and updating", least=1)
    pairs: int = option(128, "stage 3: prompts per iteration, two responses each", least=1)
    minibatch: int = option(16, "stage 3: pairs per update", least=1)
    inner_epochs: int = option(4, "stage 3: passes over each iteration's pairs", least=1)
    lr: float = option(2e-6, "stage 3: peak learning rate", least=0)
    micro_batch: int = option(8, "rows or pairs per backward pass; fewer take less memory for the same update", least=1)
    eval_prompts: int = option(512, "held-out prompts that SFT and P3O answer at the end", least=2)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, name, rule = getattr(self, f.name), "--" + f.name.replace("_", "-"), f.metadata
            if value not in rule.get("choices", [value]):
                raise UserError(f"{name} must be one of {', '.join(rule['choices'])}, not {value!r}")
            if "least" in rule and not rule["least"] <= value < math.inf:  # NaN fails, too
                raise UserError(f"{name} must be a finite number of at least {rule['least']}, not {value}")


SMALL: dict[str, Any] = dict(
    small=True, model=str(SHIPPED_DATA / "tiny"), data=str(SHIPPED_DATA), out="runs/small", beta=0.1, prompt_tokens=32,
    response_tokens=40, sft_epochs=2, sft_lr=5e-3, reward_epochs=2, reward_lr=2e-3, iterations=80, pairs=64,
    minibatch=32, inner_epochs=2, lr=2e-3, micro_batch=32,
)  # fmt: skip


# ---- Data: preference pairs as text, then as token ids ---------------------------------------------------------------
# one preference, its three parts as text (str) or as token ids (list[int]); both responses follow the same prompt
Pair = namedtuple("Pair", ["prompt", "chosen", "rejected"])


def split_row(chosen: str, rejected: str, prompt: str = "") -> Pair | str:
    """A pair, or why the row cannot be used. Without a prompt, split both after their last shared "Assistant:"."""
    if not prompt:
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071
        cut = shared.rfind(ASSISTANT) + len(ASSISTANT) if ASSISTANT in shared else 0
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    reasons = {
        "no shared prompt": not prompt.strip(),
        "a new human turn in a response": HUMAN in chosen + rejected,
        "empty response": not chosen.strip() or not rejected.strip(),
        "equal responses": chosen == rejected,
    }
    return next((reason for reason, holds in reasons.items() if holds), Pair(prompt, chosen, rejected))


def load_pairs(source: str) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of text, from a hub name, or a file or directory (train.*, test.*) of .jsonl, .json,
    .csv or .parquet, gzipped or not. Where nothing is held out, about every tenth prompt is, with all its rows."""
    path = Path(source).expanduser().absolute()
    if not path.exists() and (path.suffix or source.startswith((".", "/", "~"))):
        raise UserError(f"--data {source}: no such file or directory")
    place = {"path": str(path) if path.is_dir() else source}
    if path.is_file():
        place = {"path": str(path.parent), "data_files": path.name}
    try:
        splits = {split: rows.to_list() for split, rows in datasets.load_dataset(**place).items()}
    except (ValueError, StopIteration, OSError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error.__cause__ or error) or "no rows").splitlines()[0]
        raise UserError(f"cannot load {source!r}: {reason}; --data takes local files, and --small needs none") from None
    train, heldout = (usable_pairs(splits.get(split, []), f"{source}, {split}") for split in ("train", "test"))
    if not heldout:
        heldout = [pair for pair in train if zlib.crc32(pair.prompt.encode()) % 10 == 0]
        train = [pair for pair in train if zlib.crc32(pair.prompt.encode()) % 10 != 0]
    if not train or len(heldout) < 2:  # one figure has no interval
        raise UserError(f"{source}: too few usable rows to train on some and hold out others")
    return train, heldout


def usable_pairs(rows: list[dict], where: str) -> list[Pair]:
    """Split every row; drop, count and report those that cannot be used."""
    results: list[Pair | str] = []
    for number, row in enumerate(rows, 1):
        texts = [row.get("chosen"), row.get("rejected"), row.get("prompt") or ""]
        if not all(isinstance(text, str) for text in texts):
            advice = "lists of messages become text by your tokenizer's apply_chat_template(..., tokenize=False)"
            raise UserError(f"{where} row {number}: chosen, rejected and prompt, if any, must be text; {advice}")
        results.append(split_row(*texts))
    for reason, count in Counter(result for result in results if isinstance(result, str)).items():
        print(f"{where}: {count} of {len(rows)} rows dropped: {reason}")
    return [result for result in results if isinstance(result, Pair)]


def tokenize(pairs: list[Pair], tokenizer: Any, cfg: Config) -> list[Pair]:
    """Text to ids, for every stage alike. A long prompt loses its oldest turns, then the beginning of what is left; EOS
    ends a response unless it was cut."""
    encode, examples = partial(tokenizer, add_special_tokens=False), []
    for prompt, *responses in pairs:
        ids = encode(prompt)["input_ids"]
        while len(ids) > cfg.prompt_tokens and HUMAN in prompt[1:]:
            prompt = prompt[prompt.index(HUMAN, 1) :]
            ids = encode(prompt)["input_ids"]
        ends = [[*encode(text)["input_ids"], tokenizer.eos_token_id][: cfg.response_tokens] for text in responses]
        examples.append(Pair(ids[-cfg.prompt_tokens :], *ends))
    kept = [pair for pair in examples if pair.chosen != pair.rejected]
    if len(kept) < len(pairs):
        print(f"{len(pairs) - len(kept)} of {len(pairs)} pairs dropped: equal after {cfg.response_tokens} tokens")
    return kept


def collate(prompts: list[list[int]], responses: list[list[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Prompt + response, then the model's pad token: ids and mask (N, T), True on each response token, EOS included."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)  # (N, T)
    start, end = torch.tensor([[len(p), len(row)] for p, row in zip(prompts, rows, strict=True)]).T[..., None]  # (N, 1)
    # NOTE from positions, not from ids != pad: with pad = EOS, a mask from ids would hide the EOS action
    response_mask = (torch.arange(ids.shape[1]) >= start) & (torch.arange(ids.shape[1]) < end)  # (N, T)
    return ids.to(model.device), response_mask.to(model.device)


# ---- Models: sampling, log-probabilities, scores ---------------------------------------------------------------------
def load_base(cfg: Config) -> tuple[PreTrainedModel, Any]:
    """The model that SFT starts from. EOS and padding are different tokens, and both are in the vocabulary."""
    tiny = Path(cfg.model).resolve() == SHIPPED_DATA / "tiny"  # a tokenizer and a configuration, no weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        if tiny:
            model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(cfg.model))
        else:
            model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {cfg.model!r}: {str(error).splitlines()[0]}; --small needs none") from None
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    if cfg.prompt_tokens + cfg.response_tokens > positions:
        raise UserError(f"--prompt-tokens + --response-tokens must fit in the {positions} positions of {cfg.model!r}")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # NOTE with pad = EOS the library's classifier takes EOS for padding and reads the score one token early
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)  # no penalties of its own
    return model, tokenizer


@torch.no_grad()
@mixed_precision
def sample(model: PreTrainedModel, prompts: list[list[int]], n: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Draw n responses a prompt from π by `generate`, up to the first EOS: ids and mask (B, n, T) as `collate`'s."""
    P, eos, pad = max(map(len, prompts)), model.config.eos_token_id, model.config.pad_token_id
    left = torch.tensor([[P - len(p)] for p in prompts], device=model.device)  # (B, 1): padding before each prompt
    out = model.generate(
        torch.tensor([[pad] * (P - len(p)) + p for p in prompts], device=model.device),  # (B, P)
        attention_mask=(torch.arange(P, device=model.device) >= left).long(),  # (B, P)
        # NOTE explicit: with the library's default top_k = 50 we would sample one distribution and score another
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=max_tokens, num_return_sequences=n, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip  # (B·n, P + R)
    ended_before = (out[:, P:] == eos).cumsum(1) - (out[:, P:] == eos).long()  # (B·n, R): EOS tokens before this one
    mask = F.pad(ended_before == 0, (P, 0), value=False)  # (B·n, P + R)
    # moves each row's left padding to its right end, (B·n, P + R)
    order = (torch.arange(out.shape[1], device=out.device) + left.repeat_interleave(n, 0)) % out.shape[1]
    return tuple(rows.gather(1, order).view(len(prompts), n, -1) for rows in (out, mask))


@mixed_precision
def response_logprobs(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """log π(y^t | x, y^<t) of each response token in nats, 0 elsewhere: (…, T−1) from ids and mask (…, T).

    Column t belongs to token t+1, since no token predicts the first; sum over the last axis for log π(y|x).
    No attention mask: padding stands on the right, where a causal model never looks, and positions count from 0.
    Only response positions meet the vocabulary (`get_output_embeddings`), in fp32; others, NaN or not, are never used.
    """
    flat, targets = ids.flatten(0, -2), response_mask.flatten(0, -2)[:, 1:]  # (N, T), (N, T−1)
    hidden = model.base_model(flat).last_hidden_state[:, :-1]  # (N, T−1, D): position t−1 predicts token t
    logits = model.get_output_embeddings()(hidden[targets]).float()  # (n, V)
    picked = -F.cross_entropy(logits, flat[:, 1:][targets], reduction="none")  # (n,)
    return torch.zeros(targets.shape, device=ids.device).masked_scatter(targets, picked).view(*ids.shape[:-1], -1)


def reward_scores(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """r(x, y), one score a response, read at its last token, EOS included, and nowhere else: (…) from (…, T) twice."""
    with mixed_precision:
        hidden = model.base_model(ids.flatten(0, -2)).last_hidden_state  # (N, T, D)
    positions = torch.arange(ids.shape[-1], device=ids.device)  # (T,)
    last = (positions * response_mask.flatten(0, -2)).argmax(-1, keepdim=True)  # (N, 1): the last True
    return model.score(hidden.take_along_dim(last[..., None], 1)).float().view(ids.shape[:-1])  # the head in fp32


# ---- The two losses: tensors in, tensors out -------------------------------------------------------------------------
def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Mean −log σ(r_w − r_l) over pairs (B,), (B,) → scalar, in nats (Bradley & Terry 1952).

    >>> bradley_terry_loss(torch.tensor([2.0]) + 100, torch.tensor([1.0]) + 100)  # blind to an offset
    tensor(0.3133)
    """
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()  # NOTE log(sigmoid(−200)) is −inf, logsigmoid is −200


def p3o_loss(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, *,
    beta: float, clip: str = "joint", clip_range: float = 0.2, ratio_bound: float = 10.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss to minimise, −J of equations (4) and (5), mean over pairs, and metrics (P3O paper, section 4.2).

    Each argument is (B, 2): log π(y|x) in nats summed over the response, under the current, the sampling and the
    reference policy, and the scores r(x, y). Only `logprobs` gets a gradient. `clip`: "joint" (V2), "separate" (V1) or
    "none", J = ½ q sg[ρ_1 ρ_2] u: its expected gradient is that of E r − β KL(π‖π_ref), wherever the policy is.
    Metrics, detached: policy/clipfrac, share of pairs (V1: responses) that the clip stops; means of ½ (log ρ)²,
    policy/approxkl, of ρ, policy/ratio, and of |q|, objective/q. In q, r_1 − r_2 comes first: δ(x) cancels exactly.

    >>> logprobs = torch.tensor([[-3.0, -4.0]], requires_grad=True)
    >>> same = logprobs.detach()
    >>> loss, metrics = p3o_loss(logprobs, same, same, torch.tensor([[1.0, 0.0]]), beta=0.05)
    >>> torch.autograd.grad(loss, logprobs)[0]  # −½ q on y_1, +½ q on y_2, q = r_1 − r_2
    tensor([[-0.5000,  0.5000]])
    """
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    h = (logprobs - ref_logprobs).detach()  # (B, 2), eq. (1)
    # NOTE h is the current policy's at every inner step; the rollout's h would be the wrong gradient after the first
    q = (scores[:, 0] - scores[:, 1]).detach() - beta * (h[:, 0] - h[:, 1])  # (B,), eq. (2)
    u = log_ratio[:, 0] - log_ratio[:, 1]  # (B,)
    if clip == "separate":  # V1, eq. (5): each response is stopped alone
        ratio = log_ratio.exp()  # (B, 2)
        partner = ratio.detach().clamp(1 / ratio_bound, ratio_bound).flip(-1)  # (B, 2): ρ̄ of the other response
        advantage = torch.stack([q, -q], dim=-1) * partner  # (B, 2)
        free, held = advantage * ratio, advantage * ratio.clamp(1 - clip_range, 1 + clip_range)  # (B, 2)
    else:
        weight, limit = log_ratio.sum(-1).exp().detach(), math.inf  # (B,): ρ_1 ρ_2, eq. (3)
        if clip == "joint":  # V2, eq. (4): both responses are stopped together
            weight, limit = weight.clamp(1 / ratio_bound, ratio_bound), clip_range
        free, held = ((q * weight * log)[:, None] for log in (u, u.clamp(-limit, limit)))  # (B, 1)
    objective = 0.5 * torch.minimum(free, held).sum(-1)  # (B,)
    metrics = {
        "policy/clipfrac": (held < free).float().mean(),
        "policy/approxkl": (0.5 * log_ratio.detach() ** 2).mean(),
        "policy/ratio": log_ratio.detach().exp().mean(),
        "objective/q": q.abs().mean(),
    }
    return -objective.mean(), metrics


# ---- The three stages ------------------------------------------------------------------------------------------------
def make_optimizer(groups: list[dict[str, Any]], steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, each group with its learning rate, and its schedule: 5 % warm-up, then linearly to 0."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, math.ceil(0.05 * steps), steps)


def gradient_step(optimizer: torch.optim.Optimizer, schedule: Any) -> float:
    """One update by the summed gradients, then forgotten; returns their norm before clipping. Raises if not finite."""
    norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"update {schedule.last_epoch}: gradient norm {norm} must be finite; lower its --lr")
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return norm


def self_check(claim: str, holds: bool) -> None:
    tqdm.write(f"  check: {claim}: {'ok' if holds else 'FAILED'}")
    if not holds:
        raise AssertionError(claim)


def train_sft(policy: PreTrainedModel, examples: list[Pair], cfg: Config, log: Log) -> None:
    """Stage 1: maximum likelihood on the preferred responses, mean over response tokens."""
    policy.eval()  # NOTE dropout off here and in every stage: with it on, ratios differ from 1 before any update
    loader = torch.utils.data.DataLoader(examples, cfg.batch, shuffle=True, collate_fn=list)
    steps = cfg.sft_epochs * len(loader)
    optimizer, schedule = make_optimizer([{"params": policy.parameters(), "lr": cfg.sft_lr}], steps)
    bar = tqdm(islice(chain.from_iterable(repeat(loader)), steps), "1 SFT   ", steps)
    for step, rows in enumerate(bar):
        prompts, chosen, _ = zip(*rows, strict=True)
        ids, response_mask = collate(prompts, chosen, policy)  # (B, T)
        total = 0.0
        for part in zip(ids.split(cfg.micro_batch), response_mask.split(cfg.micro_batch), strict=True):
            loss = -response_logprobs(policy, *part).sum() / response_mask.sum()  # a part of the mean over all tokens
            loss.backward()
            total += loss.item()
        log(step, **{"sft/loss": total, "sft/grad_norm": gradient_step(optimizer, schedule)})
        bar.set_postfix(loss=total)


def train_reward(model: PreTrainedModel, examples: list[Pair], cfg: Config, log: Log) -> None:
    """Stage 2: Bradley-Terry on the preference pairs."""
    model.eval()
    torch.nn.init.zeros_(model.score.weight)  # every score starts at 0, so the loss starts at ln 2
    loader = torch.utils.data.DataLoader(examples, cfg.batch, shuffle=True, collate_fn=list)
    steps = cfg.reward_epochs * len(loader)
    groups = [{"params": model.base_model.parameters(), "lr": cfg.reward_lr}]
    groups += [{"params": model.score.parameters(), "lr": 10 * cfg.reward_lr}]  # the fresh head has further to go
    optimizer, schedule = make_optimizer(groups, steps)
    bar = tqdm(islice(chain.from_iterable(repeat(loader)), steps), "2 reward", steps)
    for step, rows in enumerate(bar):
        total = accuracy = 0.0
        for i in range(0, len(rows), cfg.micro_batch):
            scores = score_pairs(model, rows[i : i + cfg.micro_batch])  # (b, 2): chosen, rejected
            loss = bradley_terry_loss(scores[:, 0], scores[:, 1]) * len(scores) / len(rows)  # a part of the mean
            loss.backward()
            total += loss.item()
            accuracy += (scores[:, 0] > scores[:, 1]).sum().item() / len(rows)
        if step == 0:
            self_check("reward loss starts at ln 2", abs(total - math.log(2)) < 1e-6)
        norm = gradient_step(optimizer, schedule)
        log(step, **{"reward/loss": total, "reward/accuracy": accuracy, "reward/grad_norm": norm})
        bar.set_postfix(loss=total, accuracy=accuracy)


def score_pairs(model: PreTrainedModel, rows: list[Pair]) -> Tensor:
    """Scores (B, 2) of chosen and rejected."""
    prompts, responses = zip(*((row.prompt, response) for row in rows for response in row[1:]), strict=True)
    return reward_scores(model, *collate(prompts, responses, model)).view(-1, 2)  # (2B, T) → (B, 2)


@torch.no_grad()
def set_gain(model: PreTrainedModel, policy: PreTrainedModel, prompts: list[list[int]], cfg: Config) -> float:
    """Scale the head so that r_1 − r_2 has root mean square 1 on SFT's pairs: β then has a unit. Returns the factor."""
    # NOTE from differences: a gain from absolute scores would depend on δ(x), and so would the update
    ids, response_mask = sample(policy, prompts, 2, cfg.response_tokens)  # (B, 2, T)
    size = reward_scores(model, ids, response_mask).diff().square().mean().sqrt().item()
    if not 0 < size < math.inf:
        raise FloatingPointError(f"score differences of size {size}: the reward model learnt nothing; see --reward-lr")
    model.score.weight.div_(size)
    return 1 / size


def train_policy(
    policy: PreTrainedModel, reference: PreTrainedModel, score: Callable[[Tensor, Tensor], Tensor],
    prompts: list[list[int]], cfg: Config, log: Log, loss_fn: Callable[..., tuple[Tensor, dict]] = p3o_loss,
) -> None:  # fmt: skip
    """Stage 3: sample a pair for each of cfg.pairs prompts, score it (B, 2, T) → (B, 2), update, throw it away.

    No dropout or weight decay; each inner epoch shuffles the pairs; a minibatch's gradient adds up over micro-batches.
    Each iteration logs the means of loss_fn's metrics, loss/policy and policy/grad_norm over the pairs it updates on,
    and of objective/scores, /kl (log π_old − log π_ref), /entropy, response/length and /finished (by EOS) over samples.
    """
    policy.eval()
    options = dict(beta=cfg.beta, clip=cfg.clip, clip_range=cfg.clip_range, ratio_bound=cfg.ratio_bound)
    loader = torch.utils.data.DataLoader(prompts, cfg.pairs, shuffle=True, collate_fn=list)
    steps = cfg.iterations * cfg.inner_epochs * math.ceil(cfg.pairs / cfg.minibatch)
    optimizer, schedule = make_optimizer([{"params": policy.parameters(), "lr": cfg.lr, "weight_decay": 0.0}], steps)
    bar = tqdm(islice(chain.from_iterable(repeat(loader)), cfg.iterations), "3 P3O   ", cfg.iterations)
    for iteration, batch in enumerate(bar):
        # 1. two responses to each prompt; the pair stays together, (B, 2, …), from here to the loss
        ids, response_mask = sample(policy, batch, 2, cfg.response_tokens)  # (B, 2, T)
        # 2. what does not change during the inner epochs
        with torch.no_grad():
            scores = score(ids, response_mask)  # (B, 2)
            chunks = torch.arange(len(batch)).split(cfg.micro_batch)  # micro-batches' shape: ratio 1 to the last bit
            old_logprobs, ref_logprobs = (
                torch.cat([response_logprobs(model, ids[c], response_mask[c]).sum(-1) for c in chunks])
                for model in (policy, reference)
            )  # (B, 2)
        # 3. updates on minibatches of pairs
        sums: dict[str, Any] = defaultdict(float)  # of each metric over all pairs of all inner epochs
        for _ in range(cfg.inner_epochs):
            for minibatch in torch.randperm(len(batch)).split(cfg.minibatch):
                for pairs in minibatch.split(cfg.micro_batch):  # their gradients add up to the minibatch's
                    logprobs = response_logprobs(policy, ids[pairs], response_mask[pairs]).sum(-1)  # (b, 2)
                    old, ref = old_logprobs[pairs], ref_logprobs[pairs]  # (b, 2)
                    loss, metrics = loss_fn(logprobs, old, ref, scores[pairs], **options)
                    for claim, other in (("ratio = 1", old), ("KL = 0", ref)) if iteration == 0 and not sums else ():
                        drift = (logprobs - other).abs().max().item()
                        self_check(f"{claim} before the first update (largest |log ratio| {drift:.0e})", drift < 1e-4)
                    (loss * len(pairs) / len(minibatch)).backward()
                    for key, value in (metrics | {"loss/policy": loss.detach()}).items():
                        sums[key] += value * len(pairs)
                sums["policy/grad_norm"] += gradient_step(optimizer, schedule) * len(minibatch)
        # 4. metrics
        row = {key: float(value) / (cfg.inner_epochs * len(batch)) for key, value in sums.items()} | {
            "objective/scores": scores.mean().item(),
            "objective/kl": (old_logprobs - ref_logprobs).mean().item(),
            "objective/entropy": -old_logprobs.mean().item(),
            "response/length": response_mask.sum(-1).float().mean().item(),
            "response/finished": ((ids == policy.config.eos_token_id) & response_mask).any(-1).float().mean().item(),
        }
        log(iteration, **row)
        bar.set_postfix(score=row["objective/scores"], kl=row["objective/kl"], clipfrac=row["policy/clipfrac"])


# ---- Evaluation on held-out prompts ----------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(cfg: Config, models: list[PreTrainedModel], tokenizer: Any, pairs: list[Pair]) -> tuple[dict, dict]:
    """SFT and P3O (`models`: SFT, reward, P3O) answer the same held-out prompts; a summary and a table of columns.

    The judge is the gold reward where the data has one; else the reward model, which the policy was trained to please.
    """
    judge = runpy.run_path(str(SHIPPED_DATA / "judge.py")) if Path(cfg.data).resolve() == SHIPPED_DATA else None
    (sft, reward_model, policy), examples = models, tokenize(pairs, tokenizer, cfg)
    text = partial(tokenizer.decode, skip_special_tokens=True)
    chunks = [examples[i : i + cfg.pairs] for i in range(0, len(examples), cfg.pairs)]
    agrees = torch.cat([score_pairs(reward_model, chunk).diff()[:, 0] < 0 for chunk in chunks]).cpu()  # (N,)
    prompts = [example.prompt for example in examples[: cfg.eval_prompts]]
    table: dict[str, list] = defaultdict(list, prompt=list(map(text, prompts)))
    for name, model in (("sft", sft), ("policy", policy)):
        for i in range(0, len(prompts), cfg.pairs):
            ids, response_mask = sample(model, prompts[i : i + cfg.pairs], 1, cfg.response_tokens)  # (B, 1, T)
            h = response_logprobs(model, ids, response_mask) - response_logprobs(sft, ids, response_mask)  # (B, 1, T−1)
            table[f"kl_{name}"] += h.sum((1, 2)).tolist()
            table[f"score_{name}"] += reward_scores(reward_model, ids, response_mask)[:, 0].tolist()
            table[f"finished_{name}"] += ((ids == model.config.eos_token_id) & response_mask).any(-1)[:, 0].tolist()
            table[f"answer_{name}"] += [text(y[mask]) for y, mask in zip(ids[:, 0], response_mask[:, 0], strict=True)]
        for key, function in (("gold", "gold_reward"), ("well_formed", "well_formed")) if judge else ():
            table[f"{key}_{name}"] = list(map(judge[function], table["prompt"], table[f"answer_{name}"]))
    by, keys = ("gold", ("score", "gold", "well_formed")) if judge else ("score", ("score",))
    better = torch.tensor(table[f"{by}_policy"]) - torch.tensor(table[f"{by}_sft"])  # (N,)
    figures = {"win_rate": (better.sign() + 1) / 2, "kl": table["kl_policy"], "reward_accuracy": agrees}  # a tie is ½
    figures |= {"finished_fraction": table["finished_policy"]} | {
        f"{key}_{name}": table[f"{key}_{name}"] for key in keys for name in ("sft", "policy")
    }
    summary: dict[str, Any] = {"judge": by}
    if judge:
        gold = torch.tensor([[judge["gold_reward"](text(x), text(y)) for y in ys] for x, *ys in examples])  # (N, 2)
        figures["reward_gold_agreement"] = (agrees == (gold[:, 0] > gold[:, 1]))[gold[:, 0] != gold[:, 1]]
    for name, values in figures.items():
        values = torch.as_tensor(values).float()
        mean, half = values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))
        summary |= {name: mean, f"{name}_ci": [mean - half, mean + half]}
    return summary | {key: summary.get(key) for key in ("reward_gold_agreement", "gold_sft", "gold_policy")}, table


def show(summary: dict[str, Any], table: dict[str, list]) -> None:
    """A few answers before and after, then the figures with their 95 % intervals."""
    print("\nHeld-out prompts and answers; before each answer its score and, if there is a judge, its gold reward")
    for i in [table["prompt"].index(prompt) for prompt in dict.fromkeys(table["prompt"])][:5]:
        print("\n" + textwrap.shorten(table["prompt"][i].removesuffix(ASSISTANT), 110))
        for label, name in (("SFT", "sft"), ("P3O", "policy")):
            gold = f"{table[f'gold_{name}'][i]:+5.1f}" if f"gold_{name}" in table else ""
            answer = textwrap.shorten(table[f"answer_{name}"][i], 96)
            print(f"  {label} {table[f'score_{name}'][i]:+5.2f} {gold}  {answer}")
    print(f"\n{'figure':24}{'mean':>8}   95 % interval")
    for name in (key for key in summary if f"{key}_ci" in summary):
        print(f"{name:24}{summary[name]:8.3f}   {summary[f'{name}_ci'][0]:.3f} to {summary[f'{name}_ci'][1]:.3f}")


# ---- The run: one directory, one folder a finished stage -------------------------------------------------------------
def start_stage(cfg: Config, name: str) -> Log | None:
    """Seed a stage and return its `log`, or None if it was finished; it depends on seed, options and stages before."""
    metrics, start = Path(cfg.out) / "metrics.jsonl", time.perf_counter()
    if (Path(cfg.out) / name).exists():
        return print(f"{name}: finished before")
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    kept = tuple(f'{{"stage": "{done.name}"' for done in Path(cfg.out).iterdir())
    write_atomically(metrics, "".join(line for line in lines if line.startswith(kept)))  # forget a killed stage's
    torch.manual_seed(zlib.crc32(f"{cfg.seed} {name}".encode()))

    def log(step: int, **values: float) -> None:
        row = {"stage": name, "step": step} | values | {"seconds": round(time.perf_counter() - start, 3)}
        with metrics.open("a") as file:
            print(json.dumps(row), file=file)

    return log


def finish_stage(cfg: Config, name: str, model: PreTrainedModel, tokenizer: Any) -> None:
    """Write the model in the library's format, then rename its folder into place: it is there whole or not at all."""
    scratch = Path(cfg.out) / f"{name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    scratch.rename(Path(cfg.out) / name)


def write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text)
    scratch.replace(path)


def open_out(cfg: Config, pairs: Any) -> Path:
    """Make the output directory, or accept the one that this very configuration made from this very data."""
    out, config = Path(cfg.out), Path(cfg.out) / "config.json"
    mine = asdict(cfg) | {"out": None, "micro_batch": None, "data_crc": zlib.crc32(repr(pairs).encode())}
    if out.exists() and not config.exists() and any(file.suffix != ".partial" for file in out.iterdir()):
        raise UserError(f"{out} exists and is not a run of p3o.py; choose another --out")
    if not any((out / stage).exists() for stage in ("sft", "reward", "p3o")):  # nothing to lose yet
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(mine, indent=2))
    theirs = json.loads(config.read_text())
    if differ := [f"{key} {theirs.get(key)!r}, not {mine[key]!r}" for key in mine if theirs.get(key) != mine[key]]:
        raise UserError(f"{out} holds a run with {'; '.join(differ)}; choose another --out")
    return out


def run(cfg: Config) -> None:
    began = time.perf_counter()
    train_pairs, heldout_pairs = load_pairs(cfg.data)
    out = open_out(cfg, (train_pairs, heldout_pairs))
    print(f"{len(train_pairs)} training and {len(heldout_pairs)} held-out pairs, on {cfg.device}, in {out}")

    def load(name: str, **options: Any) -> PreTrainedModel:
        kind = AutoModelForSequenceClassification if options else AutoModelForCausalLM
        return kind.from_pretrained(out / name, dtype=torch.float32, **options).to(cfg.device)  # in eval mode

    if log := start_stage(cfg, "sft"):
        policy, tokenizer = load_base(cfg)
        train_sft(policy.to(cfg.device), tokenize(train_pairs, tokenizer, cfg), cfg, log)
        finish_stage(cfg, "sft", policy, tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    examples = tokenize(train_pairs, tokenizer, cfg)
    prompts = [example.prompt for example in examples]
    if log := start_stage(cfg, "reward"):
        reward_model = load("sft", num_labels=1)
        train_reward(reward_model, examples, cfg, log)
        gain = set_gain(reward_model, load("sft"), prompts[: cfg.eval_prompts], cfg)
        print(f"  gain: scores × {gain:.3f}, so that r_1 − r_2 has root mean square 1 on SFT's pairs")
        finish_stage(cfg, "reward", reward_model, tokenizer)
    if log := start_stage(cfg, "p3o"):
        policy, reference, reward_model = load("sft"), load("sft"), load("reward", num_labels=1)
        train_policy(policy, reference, partial(reward_scores, reward_model), prompts, cfg, log)
        for model, saved in ((reference, load("sft")), (reward_model, load("reward", num_labels=1))):
            same = map(torch.equal, model.state_dict().values(), saved.state_dict().values())
            self_check(f"{'reference' if model is reference else 'reward model'} unchanged to the last bit", all(same))
        finish_stage(cfg, "p3o", policy, tokenizer)
    start = time.perf_counter()
    torch.manual_seed(zlib.crc32(f"{cfg.seed} eval".encode()))
    summary, table = evaluate(cfg, [load("sft"), load("reward", num_labels=1), load("p3o")], tokenizer, heldout_pairs)
    show(summary, table)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    seconds = {row["stage"]: row["seconds"] for row in rows}  # each stage's last row
    seconds |= {"eval": time.perf_counter() - start, "total": time.perf_counter() - began}
    summary |= {"seconds": seconds, "seed": cfg.seed, "config": asdict(cfg)}
    write_atomically(out / "summary.json", json.dumps(summary, indent=2))
    print("seconds: " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()) + f"; all is in {out}")


# ---- Command line ----------------------------------------------------------------------------------------------------
def parse_config(argv: list[str]) -> Config:
    """A preset, changed by what the options say. Raises UserError."""
    preset = Config(**SMALL) if "--small" in argv else Config()
    layout = partial(argparse.HelpFormatter, max_help_position=26, width=112)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=layout, allow_abbrev=False)
    parser.usage = "python p3o.py [--small] [options]"

    def fail(message: str) -> None:
        raise UserError(f"{message}; python p3o.py -h lists the options")

    parser.error = fail
    for f in fields(Config):
        default, name, text = getattr(preset, f.name), "--" + f.name.replace("_", "-"), f.metadata["help"]
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "default": default, "metavar": "X"}
        parser.add_argument(name, help=text if f.type is bool else f"{text} ({default})", **kind)
    cfg = Config(**vars(parser.parse_args(argv)))
    if cfg.device == "auto":
        cfg.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        torch.zeros(1, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device}: {str(error).splitlines()[0]}") from None
    return cfg


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 diverged, 2 bad input, 130 interrupted."""
    logging.disable(logging.ERROR)  # what matters comes as an exception
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        run(parse_config(sys.argv[1:] if argv is None else argv))
    except (UserError, OSError, FloatingPointError) as error:
        print(f"p3o.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("p3o.py: interrupted; finished stages are kept, and the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
