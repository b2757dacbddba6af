"""RLHF with Pairwise Proximal Policy Optimization (P3O, arXiv 2310.00212), in one file, read from top to bottom.

    python p3o.py --small           # a tiny GPT-2 on the data in data/: about a minute on a laptop, no network
    python p3o.py --small --chat    # ask the two models of that run
    python p3o.py                   # GPT-2 (124M) on Anthropic HH, one GPU

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
import math
import os
import runpy
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
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
STAGES = ("sft", "reward", "p3o")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how Anthropic HH marks its turns
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = DEVICE == "cuda" and torch.cuda.is_bf16_supported(False)  # in hardware, not emulated
mixed_precision = torch.autocast("cuda", torch.bfloat16, enabled=BF16)  # weights and losses stay fp32


class UserError(Exception):
    """Something the user can mend, told in one line."""


# ---- Configuration: each field is an option of the command line, its help text included ------------------------------
def option(default: Any, help: str, **rule: Any) -> Any:
    return field(default=default, metadata={"help": help} | rule)


@dataclass
class Config:
    small: bool = option(False, "a tiny GPT-2 on the shipped data, in about a minute on two cores")
    chat: bool = option(False, "with the options of a finished run: type prompts, see SFT's and P3O's answers")
    model: str = option("gpt2", "causal language model: a hub name or a directory")
    data: str = option("Anthropic/hh-rlhf", "preference pairs: a hub name, a file or a directory")
    out: str = option("runs/gpt2", "directory for models and metrics; run again to resume")
    seed: int = option(0, "fixes data order, samples and fresh weights", least=0)
    clip: str = option("joint", "joint (V2), separate (V1) or none", choices=("joint", "separate", "none"))
    beta: float = option(0.05, "price of KL to the SFT model, in reward per nat", least=0)
    clip_range: float = option(0.2, "ε: half-width of the clip, of log(ρ_1/ρ_2) or of each ρ", least=0)
    prompt_tokens: int = option(384, "longer prompts lose their first turns", least=1)
    response_tokens: int = option(128, "longest response", least=1)
    batch: int = option(32, "stages 1 and 2: rows per update", least=1)
    epochs: int = option(1, "stages 1 and 2: passes over the data", least=1)
    sft_lr: float = option(5e-5, "stage 1: peak learning rate", least=0)
    reward_lr: float = option(2e-5, "stage 2: peak learning rate", least=0)
    iterations: int = option(1000, "stage 3: rounds of sampling and updating", least=1)
    pairs: int = option(64, "stage 3: prompts per iteration, two responses each", least=1)
    minibatch: int = option(16, "stage 3: pairs per update", least=1)
    inner_epochs: int = option(4, "stage 3: passes over each iteration's pairs", least=1)
    lr: float = option(2e-6, "stage 3: peak learning rate", least=0)
    micro_batch: int = option(4, "rows or pairs per backward pass; fewer take less memory for the same update", least=1)
    eval_prompts: int = option(128, "held-out prompts that SFT and P3O answer at the end, all at once", least=2)

    def __post_init__(self) -> None:
        for f in fields(self):
            name, value, least = f.name.replace("_", "-"), getattr(self, f.name), f.metadata.get("least", -math.inf)
            if f.type in (int, float) and not least <= value < math.inf:  # NaN fails, too
                raise UserError(f"--{name} must be a finite number of at least {least}, not {value}")


SMALL: dict[str, Any] = dict(
    small=True, model=str(SHIPPED_DATA / "tiny"), data=str(SHIPPED_DATA), out="runs/small", beta=0.1, prompt_tokens=32,
    response_tokens=40, epochs=2, sft_lr=5e-3, reward_lr=2e-3, iterations=80, pairs=64, minibatch=32, inner_epochs=2,
    lr=2e-3, micro_batch=32, eval_prompts=512,
)  # fmt: skip


# ---- Data: preference pairs as text, then as token ids ---------------------------------------------------------------
Pair = namedtuple("Pair", ["prompt", "chosen", "rejected"])  # each as text (str), then as token ids (list[int])


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
    start = torch.tensor([[len(prompt)] for prompt in prompts])  # (N, 1)
    end = torch.tensor([[len(row)] for row in rows])  # (N, 1)
    # NOTE from positions, not from ids != pad: with pad = EOS, a mask from ids would hide the EOS action
    response_mask = (torch.arange(ids.shape[1]) >= start) & (torch.arange(ids.shape[1]) < end)  # (N, T)
    return ids.to(model.device), response_mask.to(model.device)


# ---- Models: sampling, log-probabilities, scores ---------------------------------------------------------------------
def load_base(cfg: Config) -> tuple[PreTrainedModel, Any]:
    """The model that SFT starts from. EOS and padding are different tokens, and both are in the vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        if Path(cfg.model).resolve() == SHIPPED_DATA / "tiny":  # a tokenizer and a configuration, no weights
            model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(cfg.model))
        else:
            model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {cfg.model!r}: {str(error).splitlines()[0]}; --small needs none") from None
    if cfg.prompt_tokens + cfg.response_tokens > getattr(model.config, "max_position_embeddings", math.inf):
        raise UserError(f"--prompt-tokens + --response-tokens exceed {model.config.max_position_embeddings} positions")
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
    """Draw n responses a prompt from π, token by token, up to EOS: ids and mask (B, n, T) as `collate`'s."""
    eos, pad, device = model.config.eos_token_id, model.config.pad_token_id, model.device
    longest = max(map(len, prompts))  # P
    rows = [prompt for prompt in prompts for _ in range(n)]  # N = B·n
    left = torch.tensor([[longest - len(row)] for row in rows], device=device)  # (N, 1): padding before each prompt
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)  # (N, P)
    response_mask = torch.zeros_like(ids).bool()  # (N, P)
    unfinished = torch.ones_like(left).bool()  # (N, 1)
    unread = ids  # what the model has not seen yet: the prompts, then one token a row
    cache = None
    while ids.shape[1] < longest + max_tokens and unfinished.any():
        columns = torch.arange(ids.shape[1], device=device)  # (t,)
        # NOTE position 0 is the first prompt token, padded or not, as in training
        positions = (columns - left).clamp(min=0)[:, -unread.shape[1] :]  # (N, P) at first, then (N, 1)
        seen = dict(attention_mask=(columns >= left).long(), position_ids=positions, past_key_values=cache)
        out = model.base_model(unread, **seen, use_cache=True)
        cache = out.past_key_values
        logits = model.get_output_embeddings()(out.last_hidden_state[:, -1])  # (N, V)
        # NOTE temperature 1 and every token: with top-k we would sample one distribution and score another
        cdf = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)  # (N, V); on a CPU, multinomial is far slower
        drawn = torch.searchsorted(cdf, torch.rand_like(cdf[:, :1]) * cdf[:, -1:], right=True)  # (N, 1)
        drawn = drawn.clamp(max=cdf.shape[1] - 1)  # NaN would point past the vocabulary
        unread = torch.where(unfinished, drawn, pad)  # (N, 1)
        ids = torch.cat([ids, unread], 1)
        response_mask = torch.cat([response_mask, unfinished], 1)
        unfinished = unfinished & (unread != eos)
    order = (torch.arange(ids.shape[1], device=device) + left) % ids.shape[1]  # (N, T): padding goes to the right end
    ids = ids.gather(1, order)
    response_mask = response_mask.gather(1, order)
    return ids.view(len(prompts), n, -1), response_mask.view(len(prompts), n, -1)


@mixed_precision
def response_logprobs(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """log π(y^t | x, y^<t) of each response token in nats, 0 elsewhere: (…, T−1) from ids and mask (…, T).

    Column t belongs to token t+1, since no token predicts the first; sum over the last axis for log π(y|x).
    No attention mask: padding stands on the right, where a causal model never looks, and positions count from 0.
    Only response positions meet the vocabulary (`get_output_embeddings`), in fp32; others, NaN or not, are never used.
    """
    flat = ids.flatten(0, -2)  # (N, T)
    predicted = response_mask.flatten(0, -2)[:, 1:]  # (N, T−1): True where column t's token, t+1, is of the response
    hidden = model.base_model(flat).last_hidden_state[:, :-1]  # (N, T−1, D): position t−1 predicts token t
    logits = model.get_output_embeddings()(hidden[predicted]).float()  # (n, V)
    targets = flat[:, 1:][predicted]  # (n,)
    picked = -F.cross_entropy(logits, targets, reduction="none")  # (n,)
    logprobs = torch.zeros(predicted.shape, device=ids.device).masked_scatter(predicted, picked)  # (N, T−1)
    return logprobs.view(*ids.shape[:-1], -1)


def reward_scores(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """r(x, y), one score a response, read at its last token, EOS included, and nowhere else: (…) from (…, T) twice."""
    with mixed_precision:
        hidden = model.base_model(ids.flatten(0, -2)).last_hidden_state  # (N, T, D)
    positions = torch.arange(ids.shape[-1], device=ids.device)  # (T,)
    last = (positions * response_mask.flatten(0, -2)).argmax(-1, keepdim=True)  # (N, 1): the last True
    return model.score(hidden.take_along_dim(last[..., None], 1)).float().view(ids.shape[:-1])  # the head in fp32


@torch.no_grad()
def in_chunks(function: Callable[..., Tensor], size: int, *columns: Any) -> Tensor:
    """A function of whole columns, applied to `size` rows at a time, without gradients: memory for a few rows only."""
    return torch.cat([function(*(c[i : i + size] for c in columns)) for i in range(0, len(columns[0]), size)])


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
    V1's ρ is at most e^20, so that nothing overflows.
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
    product = log_ratio.sum(-1).exp().detach()  # (B,): ρ_1 ρ_2, eq. (3)
    if clip == "joint":  # V2, eq. (4): both responses are stopped together
        weight = product.clamp(1 / ratio_bound, ratio_bound)  # (B,)
        free = (q * weight * u)[:, None]  # (B, 1)
        held = (q * weight * u.clamp(-clip_range, clip_range))[:, None]  # (B, 1)
    elif clip == "separate":  # V1, eq. (5): each response is stopped alone
        # NOTE capped at e^20, beyond which a response gets no gradient: e^100 is inf in fp32, and inf · 0 is NaN
        ratio = log_ratio.clamp(max=20).exp()  # (B, 2)
        partner = ratio.detach().clamp(1 / ratio_bound, ratio_bound).flip(-1)  # (B, 2): ρ̄ of the other response
        advantage = torch.stack([q, -q], dim=-1) * partner  # (B, 2)
        free = advantage * ratio  # (B, 2)
        held = advantage * ratio.clamp(1 - clip_range, 1 + clip_range)  # (B, 2)
    else:  # nothing is stopped, eq. (3)
        free = (q * product * u)[:, None]  # (B, 1)
        held = free
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


def shuffled(rows: list, size: int, steps: int) -> list[list]:
    """`steps` batches of `size` rows: pass after pass over all rows, each in a new order drawn here and now."""
    order = torch.cat([torch.randperm(len(rows)) for _ in range(math.ceil(steps * size / len(rows)))])
    return [[rows[i] for i in batch] for batch in order.split(size)[:steps]]


def self_check(claim: str, holds: bool) -> None:
    assert holds, f"check failed: {claim}"
    tqdm.write(f"  check: {claim}: ok")


def train_sft(policy: PreTrainedModel, examples: list[Pair], cfg: Config, log: Callable[..., None]) -> None:
    """Stage 1: maximum likelihood on the preferred responses, mean over response tokens."""
    policy.eval()  # NOTE dropout off here and in every stage: with it on, ratios differ from 1 before any update
    batches = shuffled(examples, cfg.batch, math.ceil(cfg.epochs * len(examples) / cfg.batch))
    optimizer, schedule = make_optimizer([{"params": policy.parameters(), "lr": cfg.sft_lr}], len(batches))
    for step, rows in enumerate(bar := tqdm(batches, "1 SFT   ")):
        prompts, chosen, _ = zip(*rows, strict=True)
        ids, response_mask = collate(prompts, chosen, policy)  # (B, T)
        total = 0.0
        for part in zip(ids.split(cfg.micro_batch), response_mask.split(cfg.micro_batch), strict=True):
            loss = -response_logprobs(policy, *part).sum() / response_mask.sum()  # a part of the mean over all tokens
            loss.backward()
            total += loss.detach()
        norm = gradient_step(optimizer, schedule)
        log(step, **{"sft/loss": float(total), "sft/grad_norm": norm})
        bar.set_postfix(loss=float(total))


def train_reward(model: PreTrainedModel, examples: list[Pair], cfg: Config, log: Callable[..., None]) -> None:
    """Stage 2: Bradley-Terry on the preference pairs."""
    model.eval()
    torch.nn.init.zeros_(model.score.weight)  # every score starts at 0, so the loss starts at ln 2
    batches = shuffled(examples, cfg.batch, math.ceil(cfg.epochs * len(examples) / cfg.batch))
    groups = [{"params": model.base_model.parameters(), "lr": cfg.reward_lr}]
    groups += [{"params": model.score.parameters(), "lr": 10 * cfg.reward_lr}]  # the fresh head has further to go
    optimizer, schedule = make_optimizer(groups, len(batches))
    for step, rows in enumerate(bar := tqdm(batches, "2 reward")):
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
    scores = in_chunks(lambda x: reward_scores(model, *sample(policy, x, 2, cfg.response_tokens)), cfg.pairs, prompts)
    size = scores.diff().square().mean().sqrt().item()
    if not 0 < size < math.inf:
        raise FloatingPointError(f"score differences of size {size}: the reward model learnt nothing; see --reward-lr")
    model.score.weight.div_(size)
    return 1 / size


def train_policy(
    policy: PreTrainedModel, reference: PreTrainedModel, score: Callable[[Tensor, Tensor], Tensor],
    prompts: list[list[int]], cfg: Config, log: Callable[..., None],
    loss_fn: Callable[..., tuple[Tensor, dict]] = p3o_loss, checkpoint: Path | None = None,
) -> None:  # fmt: skip
    """Stage 3: sample a pair for each of cfg.pairs prompts, score it (B, 2, T) → (B, 2), update, throw it away.
    No dropout or weight decay; each inner epoch shuffles the pairs; a minibatch's gradient adds up over micro-batches.
    Each iteration logs the means of loss_fn's metrics, loss/policy and policy/grad_norm over the pairs it updates on,
    and of objective/scores, /kl (log π_old − log π_ref), /entropy, response/length and /finished (by EOS) over samples.
    """
    policy.eval()
    options = dict(beta=cfg.beta, clip=cfg.clip, clip_range=cfg.clip_range)
    batches = shuffled(prompts, cfg.pairs, cfg.iterations)
    steps = cfg.iterations * cfg.inner_epochs * math.ceil(cfg.pairs / cfg.minibatch)
    optimizer, schedule = make_optimizer([{"params": policy.parameters(), "lr": cfg.lr, "weight_decay": 0.0}], steps)
    learner = (policy, optimizer, schedule)
    first = 0
    if checkpoint and checkpoint.exists():
        first, states, cpu, cuda = torch.load(checkpoint, map_location="cpu")
        for part, state in zip(learner, states, strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
    for iteration in (bar := tqdm(range(first, cfg.iterations), "3 P3O   ", cfg.iterations, initial=first)):
        if checkpoint and iteration > first and iteration % 20 == 0:  # all that an iteration starts from
            state = [part.state_dict() for part in learner], torch.get_rng_state(), torch.cuda.get_rng_state_all()
            write_atomically(checkpoint, partial(torch.save, (iteration, *state)))
        # 1. two responses to each prompt; the pair stays together, (B, 2, …), from here to the loss
        ids, response_mask = sample(policy, batches[iteration], 2, cfg.response_tokens)  # (B, 2, T)
        # 2. what does not change during the inner epochs, (B, 2) each
        size = min(cfg.micro_batch, cfg.minibatch)  # the updates' shape, so that ratios start at 1 to the last bit
        scores = in_chunks(score, size, ids, response_mask)
        old_logprobs = in_chunks(partial(response_logprobs, policy), size, ids, response_mask).sum(-1)
        ref_logprobs = in_chunks(partial(response_logprobs, reference), size, ids, response_mask).sum(-1)
        # 3. updates on minibatches of pairs
        sums: dict[str, Any] = defaultdict(float)  # of each metric over all pairs of all inner epochs
        for _ in range(cfg.inner_epochs):
            for minibatch in torch.randperm(cfg.pairs).split(cfg.minibatch):
                for pairs in minibatch.split(cfg.micro_batch):  # their gradients add up to the minibatch's
                    logprobs = response_logprobs(policy, ids[pairs], response_mask[pairs]).sum(-1)  # (b, 2)
                    old, ref = old_logprobs[pairs], ref_logprobs[pairs]  # (b, 2)
                    if iteration == 0 and not sums:
                        drift = torch.stack([logprobs - old, logprobs - ref]).abs().max().item()
                        self_check("ratio = 1 and KL = 0 before the first update", drift < (0.05 if BF16 else 1e-4))
                    loss, metrics = loss_fn(logprobs, old, ref, scores[pairs], **options)
                    (loss * len(pairs) / len(minibatch)).backward()
                    for key, value in (metrics | {"loss/policy": loss.detach()}).items():
                        sums[key] += value * len(pairs)
                norm = gradient_step(optimizer, schedule)
                sums["policy/grad_norm"] += norm * len(minibatch)
        # 4. metrics
        row = {key: float(value) / (cfg.inner_epochs * cfg.pairs) for key, value in sums.items()} | {
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
    """SFT and P3O (`models`: SFT, reward, P3O) answer held-out prompts: a summary, and the table of columns behind it.
    The judge is the data's gold reward if it has one, else the reward model, which the policy was trained to please."""
    (sft, reward_model, policy), examples = models, tokenize(pairs, tokenizer, cfg)
    prompts = [example.prompt for example in examples[: cfg.eval_prompts]]
    text, score = partial(tokenizer.decode, skip_special_tokens=True), partial(reward_scores, reward_model)
    ranks = in_chunks(partial(score_pairs, reward_model), cfg.micro_batch, examples).diff()[:, 0] < 0  # (M,)
    table = {"win_rate": [], "kl": [], "prompt": list(map(text, prompts)), "reward_accuracy": ranks.tolist()}
    for name, model in (("sft", sft), ("policy", policy)):
        ids, response_mask = sample(model, prompts, 1, cfg.response_tokens)  # (N, 1, T)
        table[f"answer_{name}"] = [text(row[mask]) for row, mask in zip(ids, response_mask, strict=True)]
        table[f"score_{name}"] = in_chunks(score, cfg.micro_batch, ids, response_mask)[:, 0].tolist()
    both = [partial(response_logprobs, model) for model in (policy, sft)]
    logprobs, ref_logprobs = (in_chunks(function, cfg.micro_batch, ids, response_mask).sum((1, 2)) for function in both)
    table["kl"] = (logprobs - ref_logprobs).tolist()  # (N,), of the policy's answers
    table["finished_fraction"] = ((ids == policy.config.eos_token_id) & response_mask).any(-1)[:, 0].tolist()
    by, summary = "score", dict.fromkeys(("judge", "reward_gold_agreement", "gold_sft", "gold_policy"))
    if Path(cfg.data).resolve() == SHIPPED_DATA:
        by, judge = "gold", runpy.run_path(str(SHIPPED_DATA / "judge.py"))
        table |= judge["judge_run"](table, [list(map(text, example)) for example in examples])
    answers = zip(table[f"{by}_policy"], table[f"{by}_sft"], strict=True)
    table["win_rate"] = [(policy > sft) + 0.5 * (policy == sft) for policy, sft in answers]
    print(f"\n{'figure':24}{'mean':>8}   95 % interval")
    for name in (name for name in table if table[name] and not isinstance(table[name][0], str)):
        values = torch.tensor(table[name]).float()
        mean, half = values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))
        summary |= {name: mean, f"{name}_ci": [mean - half, mean + half]}
        print(f"{name:24}{mean:8.3f}   {mean - half:.3f} to {mean + half:.3f}")
    return summary | {"judge": by}, table


def ask(cfg: Config, title: str, prompts: Iterable[str]) -> None:
    """SFT and P3O of a finished run answer each prompt, a text as the data has it."""
    if not (Path(cfg.out) / "p3o").exists():
        raise UserError(f"{cfg.out} holds no finished run; run the same command without --chat first")
    sft, reward_model, policy = (load(cfg, name) for name in STAGES)
    tokenizer = AutoTokenizer.from_pretrained(Path(cfg.out) / "p3o")
    print(f"\n{title}; before each answer stands its score", flush=True)
    for prompt in prompts:
        print(f"\n{prompt.removesuffix(ASSISTANT).strip()}")
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"][-cfg.prompt_tokens :]
        for label, model in (("SFT", sft), ("P3O", policy)):
            ids, response_mask = sample(model, [tokens], 1, cfg.response_tokens)  # (1, 1, T)
            answer = tokenizer.decode(ids[response_mask], skip_special_tokens=True).strip()
            print(f"  {label} {reward_scores(reward_model, ids, response_mask).item():+5.2f}  {answer}")


# ---- The run: one directory, one folder a finished stage -------------------------------------------------------------
def start_stage(cfg: Config, name: str) -> Callable[..., None] | None:
    """Seed a stage and return its `log`, or None if it was finished; it depends on seed, options and stages before."""
    if (Path(cfg.out) / name).exists():
        return print(f"{name}: finished before")
    torch.manual_seed(zlib.crc32(f"{cfg.seed} {name}".encode()))
    metrics, start = Path(cfg.out) / "metrics.jsonl", time.perf_counter()
    kept = [metrics.read_text()] if metrics.exists() else []

    def log(step: int, **values: float) -> None:
        if kept:  # at first: forget what a killed run wrote of this step and after it
            before = kept.pop().partition(f'{{"stage": "{name}", "step": {step},')[0]
            write_atomically(metrics, lambda file: file.write_text(before[: before.rfind("\n") + 1]))
        row = {"stage": name, "step": step} | values | {"seconds": round(time.perf_counter() - start, 3)}
        with metrics.open("a") as file:
            print(json.dumps(row), file=file)

    return log


def write_atomically(path: Path, *writers: Callable[[Path], Any]) -> None:
    """What the writers make, a file or a folder, appears at its path whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    for write in writers:
        write(scratch)
    scratch.replace(path)


def open_out(cfg: Config, pairs: Any) -> Path:
    """Make the output directory, or accept the one that this very configuration made from this very data."""
    out, config = Path(cfg.out), Path(cfg.out) / "config.json"
    free = dict.fromkeys(("out", "micro_batch", "eval_prompts"))  # they do not change the training
    mine = asdict(cfg) | free | {"data_crc": zlib.crc32(repr(pairs).encode())}
    if out.exists() and not config.exists() and any(file.suffix != ".partial" for file in out.iterdir()):
        raise UserError(f"{out} exists and is not a run of p3o.py; choose another --out")
    if not any((out / stage).exists() for stage in STAGES):  # nothing to lose yet
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(config, lambda file: file.write_text(json.dumps(mine, indent=2)))
    theirs = json.loads(config.read_text())
    if differ := [f"{key} {theirs.get(key)!r}, not {mine[key]!r}" for key in mine if theirs.get(key) != mine[key]]:
        raise UserError(f"{out} holds a run with {'; '.join(differ)}; choose another --out")
    return out


def load(cfg: Config, name: str, **head: int) -> PreTrainedModel:
    """The model of a finished stage, in fp32 and in eval mode; with num_labels=1 it gets a score head."""
    kind = AutoModelForSequenceClassification if head or name == "reward" else AutoModelForCausalLM
    return kind.from_pretrained(Path(cfg.out) / name, dtype=torch.float32, **head).to(DEVICE)


def run(cfg: Config) -> None:
    """The stages that are not finished, one after the other, then the evaluation."""
    began = time.perf_counter()
    train_pairs, heldout_pairs = load_pairs(cfg.data)
    out = open_out(cfg, (train_pairs, heldout_pairs))
    print(f"{len(train_pairs)} training and {len(heldout_pairs)} held-out pairs, on {DEVICE}, in {out}")
    log = start_stage(cfg, "sft")
    policy, tokenizer = load_base(cfg) if log else (None, AutoTokenizer.from_pretrained(out / "sft"))
    examples = tokenize(train_pairs, tokenizer, cfg)
    if log:
        train_sft(policy.to(DEVICE), examples, cfg, log)
        write_atomically(out / "sft", policy.save_pretrained, tokenizer.save_pretrained)
    prompts = [example.prompt for example in examples]
    if log := start_stage(cfg, "reward"):
        reward_model = load(cfg, "sft", num_labels=1)
        train_reward(reward_model, examples, cfg, log)
        gain = set_gain(reward_model, load(cfg, "sft"), prompts[:512], cfg)
        print(f"  gain: scores × {gain:.3f}, so that r_1 − r_2 has root mean square 1 on SFT's pairs")
        write_atomically(out / "reward", reward_model.save_pretrained, tokenizer.save_pretrained)
    checkpoint = out / "p3o.checkpoint"
    if log := start_stage(cfg, "p3o"):
        policy, reference, reward_model = load(cfg, "sft"), load(cfg, "sft"), load(cfg, "reward")
        train_policy(policy, reference, partial(reward_scores, reward_model), prompts, cfg, log, checkpoint=checkpoint)
        for name, model in (("sft", reference), ("reward", reward_model)):
            same = map(torch.equal, model.state_dict().values(), load(cfg, name).state_dict().values())
            self_check(f"{'reference' if name == 'sft' else 'reward model'} unchanged to the last bit", all(same))
        write_atomically(out / "p3o", policy.save_pretrained, tokenizer.save_pretrained)
    checkpoint.unlink(missing_ok=True)
    log, models = start_stage(cfg, "eval"), [load(cfg, name) for name in STAGES]
    summary, table = evaluate(cfg, models, tokenizer, heldout_pairs)
    ask(cfg, "Held-out prompts", list(dict.fromkeys(table["prompt"]))[:5])
    log(0, **{key: summary[key] for key in ("win_rate", "kl")})
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    seconds = {row["stage"]: row["seconds"] for row in rows} | {"total": time.perf_counter() - began}  # of last rows
    summary |= {"seconds": seconds, "seed": cfg.seed, "config": asdict(cfg)}
    write_atomically(out / "summary.json", lambda file: file.write_text(json.dumps(summary, indent=2)))
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
        kind = {"type": f.type, "default": default, "metavar": "X", "choices": f.metadata.get("choices")}
        parser.add_argument(name, help=f"{text} ({default})", **({"action": "store_true"} if f.type is bool else kind))
    return Config(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 training stopped, 2 bad input, 130 interrupted."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # what matters comes as an exception
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv)
        typed = (f"{HUMAN} {line.strip()}{ASSISTANT}" for line in sys.stdin if line.strip())
        ask(cfg, "Type a prompt and Enter; Ctrl-D ends", typed) if cfg.chat else run(cfg)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command continues from the last stage or checkpoint"
    except torch.OutOfMemoryError:
        status, message = 1, "out of memory; the same command with a smaller --micro-batch goes on from where it was"
    except (UserError, OSError, FloatingPointError) as error:
        status, message = 1 if isinstance(error, FloatingPointError) else 2, str(error)
    print(f"p3o.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
