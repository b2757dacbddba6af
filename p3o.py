# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tqdm==4.70.1"]
# ///
"""RLHF with Pairwise Proximal Policy Optimization (P3O, arXiv 2310.00212), in one file.

    python p3o.py --small   # a tiny GPT-2 on the data in data/: a minute on a laptop, offline
    python p3o.py           # GPT-2 (124M) on Anthropic HH, one GPU

Read it from top to bottom. x is a prompt, y a whole response; each stage is a function below,
its loop in plain sight:

    1  SFT      maximise log π(y|x) = Σ_t log π(y^t | x, y^<t), y preferred       train_sft
    2  reward   minimise −E log σ(r(x, y_w) − r(x, y_l)), Bradley-Terry           train_reward
       gain     scale r once: r_1 − r_2 gets size 1, and so β a unit              set_gain
    3  P3O      maximise E r − β KL(π‖π_ref), from two responses to each prompt   train_policy

Stage 3 is why this file exists. Bradley-Terry fixes r only up to an offset δ(x): r and
r + δ(x) give each preference the same probability. PPO's update changes with δ(x), sample by
sample. P3O's cannot: it sees r only as r_1 − r_2.

    (1)  h_i = log π(y_i|x) − log π_ref(y_i|x)        ρ_i = π(y_i|x) / π_old(y_i|x)
    (2)  q = sg[ r_1 − r_2 − β (h_1 − h_2) ]          sg: stop-gradient
    (3)  ∇J = E ½ q ρ_1 ρ_2 ∇ log( π(y_1|x) / π(y_2|x) )

(3) is the policy gradient, each response the baseline of the other; at the optimum q = 0. It
asks for pairs from π, but ours were sampled some updates ago, from π_old: hence the importance
weight ρ_1 ρ_2. Two objectives have this gradient. Each is clipped at ε, as in PPO, and where a
ratio only weighs, it is bounded by c: ρ̄ = clip(ρ, 1/c, c).

    (4)  V2, clip="joint", moves u = log(ρ_1/ρ_2); ∇u = ∇ log(π_1/π_2), since π_old is fixed:
         J = ½ min( q w u, q w clip(u, −ε, ε) )       w = sg[ clip(ρ_1 ρ_2, 1/c, c) ]
    (5)  V1, clip="separate", moves one ratio and holds its partner; ∇ρ_1 = ρ_1 ∇ log π_1:
         J = ½ { min(  q sg[ρ̄_2] ρ_1,  q sg[ρ̄_2] clip(ρ_1, 1−ε, 1+ε) )
               + min( −q sg[ρ̄_1] ρ_2, −q sg[ρ̄_1] clip(ρ_2, 1−ε, 1+ε) ) }

Three sizes of stage 3: an iteration samples --pairs pairs; an update takes --minibatch of
them; --micro-batch of those pass through the model at a time, which saves memory and changes
no update.

Left out: a value network and GAE (a response is one action, its partner the baseline),
whitening and clipping scores (absolute scores would bring δ(x) back), a KL loss (q holds it),
several GPUs and LoRA (see TRL).
"""

import contextlib
import json
import math
import shutil
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from data import judge
from data.preferences import HUMAN, InputError, Pair, load_pairs, try_hub

SHIPPED_DATA = Path(judge.__file__).resolve().parent
GAIN_PROMPTS = 128  # the size of r_1 − r_2 from so many pairs is right to about 6 %
CHECKPOINT_EVERY = 20  # iterations of stage 3
STAGES = {"sft": "sft_lr", "reward": "reward_lr", "p3o": "lr"}  # and their learning rates
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    # TF32: in bf16, rounding (of logits above all) would move log(ρ_1/ρ_2) by more than ε
    torch.set_float32_matmul_precision("high")


# ---- Configuration: each field is an option of the command line --------------------------
def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    small: bool = option(False, "a tiny GPT-2 on the shipped data: a minute on two cores")
    model: str = option("gpt2", "causal language model: a hub name or a directory")
    data: str = option("Anthropic/hh-rlhf", "preference pairs: hub name, file or directory")
    out: str = option("runs/gpt2", "directory for models and metrics; run again to resume")
    seed: int = option(0, "fixes data order, samples and fresh weights")
    clip: Literal["joint", "separate", "none"] = option("joint", "V2, V1 or no clipping")
    beta: float = option(0.05, "price of KL to the SFT model, in reward per nat")
    clip_range: float = option(0.2, "ε, half-width of the clip: of log(ρ_1/ρ_2), or of ρ")
    prompt_tokens: int = option(384, "longer prompts lose their first turns")
    response_tokens: int = option(128, "longest response")
    batch: int = option(32, "stages 1 and 2: rows per update")
    epochs: int = option(1, "stages 1 and 2: passes over the data")
    sft_lr: float = option(5e-5, "stage 1: peak learning rate")
    reward_lr: float = option(2e-5, "stage 2: peak learning rate of the body")
    iterations: int = option(1000, "stage 3: rounds of sampling and updating")
    pairs: int = option(64, "stage 3: pairs per iteration, each of its own prompt")
    minibatch: int = option(16, "stage 3: pairs per update")
    inner_epochs: int = option(4, "stage 3: passes over each iteration's pairs")
    lr: float = option(2e-6, "stage 3: peak learning rate")
    micro_batch: int = option(4, "rows or pairs per backward pass: memory, not the update")
    eval_prompts: int = option(128, "held-out prompts that SFT and P3O answer at the end")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            least = 1 if f.type is int and f.name != "seed" else 0
            if f.type in (int, float) and not least <= value < math.inf:  # NaN fails, too
                raise InputError(f"--{f.name} must be a number of at least {least}, not {value}")


SMALL = dict(
    small=True,
    model=str(SHIPPED_DATA / "tiny"),
    data=str(SHIPPED_DATA),
    out="runs/small",
    beta=0.1,
    prompt_tokens=32,
    response_tokens=40,
    epochs=2,
    sft_lr=5e-3,
    reward_lr=2e-3,
    iterations=80,
    minibatch=32,
    inner_epochs=2,
    lr=2e-3,
    micro_batch=32,
    eval_prompts=512,
)


# ---- Tokens and masks --------------------------------------------------------------------
class Example(NamedTuple):
    """A preference pair as token ids, and the text that they came from."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    text: Pair


def tokenize(pairs: list[Pair], tokenizer: Any, cfg: Config) -> list[Example]:
    """Text to ids, for every stage alike; pairs that are equal once cut are left out."""
    examples = []
    for pair in tqdm(pairs, "tokenizing", leave=False, delay=2):
        prompt = tokenize_prompt(pair.prompt, tokenizer, cfg.prompt_tokens)
        chosen = tokenize_response(pair.chosen, tokenizer, cfg.response_tokens)
        rejected = tokenize_response(pair.rejected, tokenizer, cfg.response_tokens)
        if chosen != rejected:
            examples.append(Example(prompt, chosen, rejected, pair))
    if len(examples) < len(pairs):
        print(f"{len(examples)} of {len(pairs)} pairs differ once cut; only they are used")
    return examples


def tokenize_prompt(text: str, tokenizer: Any, limit: int) -> list[int]:
    """A long prompt loses its oldest turns, then the beginning of what is left."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    while len(ids) > limit and HUMAN in text[1:]:
        text = text[text.index(HUMAN, 1) :]  # the oldest turn begins at 0, the next here
        ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[-limit:]


def tokenize_response(text: str, tokenizer: Any, limit: int) -> list[int]:
    """EOS ends a response unless it was cut: to stop is an action, learnt from here."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [*ids, tokenizer.eos_token_id][:limit]


def collate(
    prompts: list[list[int]], responses: list[list[int]], model: PreTrainedModel
) -> tuple[Tensor, Tensor]:
    """Prompt + response, padded on the right with the model's pad token: ids and mask.

    Both are (N, T), T the length of the longest row, on the model's device. The mask is True on
    each response token, EOS included, and nowhere else.
    """
    rows = []
    masks = []
    for prompt, response in zip(prompts, responses, strict=True):
        rows.append(torch.tensor(prompt + response))
        # NOTE not from ids != pad: with pad = EOS, that would hide the EOS action
        masks.append(torch.tensor([False] * len(prompt) + [True] * len(response)))
    ids = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)  # (N, T)
    response_mask = pad_sequence(masks, batch_first=True)  # (N, T), False on padding
    return ids.to(model.device), response_mask.to(model.device)


# ---- Models: loading, sampling, log-probabilities, scores --------------------------------
@torch.no_grad()
def load_base(cfg: Config) -> tuple[PreTrainedModel, Any]:
    """The model that SFT starts from, in fp32, and its tokenizer. Raises InputError.

    EOS and padding are different tokens, and the model has an embedding for both.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        config = AutoConfig.from_pretrained(cfg.model)
        if getattr(config, "activation_function", "") == "gelu_new":  # GPT-2's
            config.activation_function = "gelu_pytorch_tanh"  # the same in one kernel
        if Path(cfg.model).resolve() == SHIPPED_DATA / "tiny":  # without weights: draw them
            model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                cfg.model, config=config, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--model {cfg.model}: {reason} (--small needs no hub)") from None
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    if cfg.prompt_tokens + cfg.response_tokens > positions:
        raise InputError(f"--prompt-tokens + --response-tokens must be at most {positions}")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # NOTE with pad = EOS the library's classifier reads the score one token early
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    # no penalties of its own, for whoever samples with the library from what is saved
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    # below, logits are the output head of the last hidden state; Gemma-2 and Granite differ
    ids = torch.arange(4)[None]  # (1, 4): any tokens
    hidden = model.eval().base_model(ids).last_hidden_state  # (1, 4, D)
    plain = model.get_output_embeddings()(hidden)  # (1, 4, V)
    if not torch.allclose(model(ids).logits, plain):
        raise InputError(f"{type(model).__name__} scales or caps its logits; use TRL for it")
    return model.to(DEVICE), tokenizer


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: list[list[int]], n: int, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Draw n responses to each prompt from π, token by token, up to EOS or max_tokens.

    Returns ids and mask as `collate` does, but (B, n, T): a response ends with its first EOS.
    Every token may be drawn, as often as `response_logprobs` says; all draws are independent.
    Only in here is padding on the left.
    """
    rows = [prompt for prompt in prompts for _ in range(n)]  # N = B·n
    responses = [[] for _ in rows]
    # what the model has not seen yet: the prompts, (N, P), then one token a row, (N, 1)
    unread = pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_value=model.config.pad_token_id,
        padding_side="left",
    ).to(model.device)
    longest = unread.shape[1]  # P
    # padding before each prompt
    left = torch.tensor([[longest - len(row)] for row in rows], device=model.device)  # (N, 1)
    active = torch.arange(len(rows), device=model.device)  # (N,): rows that go on; N will shrink
    cache = None
    for t in range(longest, longest + max_tokens):
        column = torch.arange(t, device=model.device)  # (t,)
        # NOTE position 0 is the first prompt token, padded or not, as in training
        positions = (column - left).clamp(min=0)  # (N, t)
        out = model.base_model(
            unread,
            attention_mask=(column >= left).long(),
            position_ids=positions[:, -unread.shape[1] :],  # (N, P) at first, then (N, 1)
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits = model.get_output_embeddings()(out.last_hidden_state[:, -1])  # (N, V)
        # NOTE temperature 1, every token: with top-k, what is sampled is not what is scored
        probs = logits.float().softmax(-1)  # (N, V)
        # on a CPU, ten times as fast as multinomial
        cdf = probs.cumsum(-1, dtype=torch.float64)  # (N, V)
        point = torch.rand_like(cdf[:, :1]) * cdf[:, -1:]  # (N, 1)
        drawn = torch.searchsorted(cdf, point, right=True)  # (N, 1)
        unread = drawn.clamp(max=cdf.shape[1] - 1)  # NaN would point past the vocabulary
        for i, token in zip(active.tolist(), unread.flatten().tolist(), strict=True):
            responses[i].append(token)
        # rows that have ended leave the batch: no more passes of the model are spent on them
        going = (unread != model.config.eos_token_id).nonzero()[:, 0]  # (N',)
        if len(going) == 0:
            break
        if len(going) < len(active):
            cache.reorder_cache(going)
            unread = unread[going]
            left = left[going]
            active = active[going]
    ids, response_mask = collate(rows, responses, model)  # (B·n, T)
    return ids.view(len(prompts), n, -1), response_mask.view(len(prompts), n, -1)


def response_logprobs(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """log π(y^t | x, y^<t) of each response token in nats, 0 elsewhere.

    (…, T−1) from ids and mask (…, T), which `model.base_model` wants as (N, T), or their
    beginnings, up to what is used; column t belongs to token t+1, since none predicts the first.
    No attention mask: padding stands on the right, where a causal model never looks, and
    positions count from 0. Only response positions meet the vocabulary
    (`model.get_output_embeddings()`), the softmax is in fp32 whatever the model is in, and other
    positions' hidden states, NaN or not, are never used.
    """
    predicted = response_mask[..., 1:]  # (…, T−1): True where t+1 is response
    # the cumsum reaches its maximum at the last True; nothing behind it is computed
    end = predicted.cumsum(-1).argmax(-1).max() + 1
    hidden = model.base_model(ids.flatten(0, -2)[:, :end]).last_hidden_state  # (N, end, D)
    used = hidden[predicted.flatten(0, -2)[:, :end]]  # (n, D): after token t
    logits = model.get_output_embeddings()(used).float()  # (n, V)
    targets = ids[..., 1:][predicted]  # (n,)
    picked = -F.cross_entropy(logits, targets, reduction="none")  # (n,)
    return picked.new_zeros(predicted.shape).masked_scatter(predicted, picked)  # (…, T−1)


def sequence_logprobs(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """log π(y|x) in nats, one a response: (…) from ids and mask (…, T)."""
    return response_logprobs(model, ids, response_mask).sum(-1)


def reward_scores(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """r(x, y), one score a response, read at its last token, EOS included: (…) from (…, T).

    `model.score` of that token's hidden state, which `model.base_model` gives for ids (N, T), or
    their beginnings; no other hidden state is used. The library's own forward gives the same
    score.
    """
    last = response_mask.flatten(0, -2).cumsum(-1).argmax(-1)  # (N,): the last True
    end = last.max() + 1
    hidden = model.base_model(ids.flatten(0, -2)[:, :end]).last_hidden_state  # (N, end, D)
    row = torch.arange(len(last), device=ids.device)  # (N,)
    return model.score(hidden[row, last]).float().view(ids.shape[:-1])


def score_pairs(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """Scores (B, 2) of chosen and rejected."""
    prompts = []
    responses = []
    for example in examples:
        prompts += [example.prompt, example.prompt]
        responses += [example.chosen, example.rejected]
    ids, response_mask = collate(prompts, responses, model)  # (2B, T)
    return reward_scores(model, ids, response_mask).view(-1, 2)


def finished(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """Whether each response ended by EOS, not by its limit: (…) from ids and mask (…, T)."""
    return ((ids == model.config.eos_token_id) & response_mask).any(-1)


@torch.no_grad()
def in_parts(
    function: Callable[[Tensor, Tensor], Tensor], size: int, ids: Tensor, response_mask: Tensor
) -> Tensor:
    """function(ids, response_mask), `size` rows at a time and without gradients: less memory."""
    parts = zip(ids.split(size), response_mask.split(size), strict=True)
    return torch.cat([function(*part) for part in parts])


# ---- The two losses: tensors in, tensors out ---------------------------------------------
def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Mean −log σ(r_w − r_l) over pairs, (B,), (B,) → scalar in nats (Bradley & Terry 1952).

    >>> bradley_terry_loss(torch.tensor([102.0]), torch.tensor([101.0]))  # 100 is not seen
    tensor(0.3133)
    """
    # NOTE log(sigmoid(−200)) is −inf, logsigmoid(−200) is −200
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()


def p3o_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    *,
    beta: float,
    clip: str = "joint",
    clip_range: float = 0.2,
    ratio_bound: float = 10.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise, −J of equations (4) and (5), mean over pairs, and metrics.

    Each argument is (B, 2): log π(y|x) in nats, summed over the response, under the current,
    the sampling and the reference policy, and the scores r(x, y). Only `logprobs` gets a
    gradient. `clip_range` is ε, `ratio_bound` c. `clip` is "joint" (V2), "separate" (V1) or
    "none", J = ½ q sg[ρ_1 ρ_2] u, whose expected gradient is that of E r − β KL(π‖π_ref),
    wherever the policy is. V1's ρ is at most e^20, so that nothing overflows.
    Metrics, detached: policy/clipfrac, the share of pairs (V1: responses) that the clip stops;
    the means of ½ (log ρ)², policy/approxkl, of ρ, policy/ratio, and of |q|, objective/q.
    From the P3O paper, section 4.2.

    >>> logprobs = torch.tensor([[-3.0, -4.0]], requires_grad=True)
    >>> same = logprobs.detach()
    >>> scores = torch.tensor([[1.0, 0.0]])
    >>> loss, metrics = p3o_loss(logprobs, same, same, scores, beta=0.05)
    >>> torch.autograd.grad(loss, logprobs)[0]  # −½ q on y_1, +½ q on y_2, q = r_1 − r_2
    tensor([[-0.5000,  0.5000]])
    """
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    # NOTE h is the current policy's; the sampling policy's is wrong after the first update
    h = (logprobs - ref_logprobs).detach()  # (B, 2), eq. (1)
    # r_1 − r_2 comes first, so that δ(x) cancels exactly
    q = (scores[:, 0] - scores[:, 1]).detach() - beta * (h[:, 0] - h[:, 1])  # (B,), eq. (2)
    u = log_ratio[:, 0] - log_ratio[:, 1]  # (B,)
    product = log_ratio.sum(-1).exp().detach()  # (B,): ρ_1 ρ_2, eq. (3)
    if clip == "joint":  # V2, eq. (4): both responses are stopped together
        weight = product.clamp(1 / ratio_bound, ratio_bound)  # (B,)
        free = (q * weight * u)[:, None]  # (B, 1)
        held = (q * weight * u.clamp(-clip_range, clip_range))[:, None]  # (B, 1)
    elif clip == "separate":  # V1, eq. (5): each response is stopped alone
        # NOTE e^100 is inf in fp32, inf · 0 is NaN; beyond e^20 a response gets no gradient
        ratio = log_ratio.clamp(max=20).exp()  # (B, 2)
        weight = ratio.detach().clamp(1 / ratio_bound, ratio_bound)  # (B, 2): ρ̄
        partner = weight.flip(-1)  # (B, 2): ρ̄_2, ρ̄_1
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


# ---- What the three stages share ---------------------------------------------------------
def shuffled(rows: list, size: int, steps: int) -> list[list]:
    """`steps` batches of `size` rows: pass after pass over all, each in a new order."""
    passes = math.ceil(steps * size / len(rows))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(passes)])
    batches = []
    for batch in order.split(size)[:steps]:
        batches.append([rows[i] for i in batch])
    return batches


def parts_of(rows: list, size: int, title: str) -> Iterable[list]:
    """The rows in order, `size` at a time, behind a progress bar that goes away."""
    return tqdm([rows[i : i + size] for i in range(0, len(rows), size)], title, leave=False)


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW; `lr_scale` of a group of parameters, if any, multiplies its learning rate."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Of step 0, 1, …: rises over the first twentieth, falls towards the end; never 0."""
    warmup = math.ceil(0.05 * steps)
    return peak * min((step + 1) / warmup, 1 - step / steps)


def gradient_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> float:
    """One update by the gradients summed so far, which are then forgotten.

    Returns their norm before it is clipped to 1. Raises FloatingPointError if not finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm}; go on with a lower learning rate")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def self_check(claim: str, holds: bool) -> None:
    assert holds, f"check failed: {claim}"
    tqdm.write(f"  check: {claim}: ok")


# ---- Stage 1: supervised fine-tuning -----------------------------------------------------
def train_sft(policy: PreTrainedModel, examples: list[Example], cfg: Config, log: Callable) -> None:
    """Maximum likelihood on the preferred responses, mean over response tokens."""
    policy.eval()  # NOTE no dropout in any stage: with it, ratios differ from 1 from the start
    steps = math.ceil(cfg.epochs * len(examples) / cfg.batch)
    batches = shuffled(examples, cfg.batch, steps)
    optimizer = make_optimizer([{"params": policy.parameters()}])
    bar = tqdm(batches, "1 SFT   ")
    for step, batch in enumerate(bar):
        # prompts alike in length share a micro-batch: behind its longest row nothing is computed
        batch.sort(key=lambda example: len(example.prompt))
        prompts = [example.prompt for example in batch]
        chosen = [example.chosen for example in batch]
        ids, response_mask = collate(prompts, chosen, policy)  # (B, T)
        total = 0.0
        for part in torch.arange(len(batch)).split(cfg.micro_batch):
            logprobs = response_logprobs(policy, ids[part], response_mask[part])  # (b, T−1)
            loss = -logprobs.sum() / response_mask.sum()  # its part of the mean over tokens
            loss.backward()
            total += loss.item()
        lr = learning_rate(cfg.sft_lr, step, steps)
        norm = gradient_step(policy, optimizer, lr)
        log(step, {"sft/loss": total, "sft/grad_norm": norm})
        bar.set_postfix(loss=total)


# ---- Stage 2: the reward model -----------------------------------------------------------
def train_reward(
    model: PreTrainedModel, examples: list[Example], cfg: Config, log: Callable
) -> None:
    """Bradley-Terry on the preference pairs."""
    model.eval()
    torch.nn.init.zeros_(model.score.weight)  # every score starts at 0, so the loss at ln 2
    steps = math.ceil(cfg.epochs * len(examples) / cfg.batch)
    batches = shuffled(examples, cfg.batch, steps)
    body = {"params": model.base_model.parameters()}
    head = {"params": model.score.parameters(), "lr_scale": 10}  # fresh: has further to go
    optimizer = make_optimizer([body, head])
    bar = tqdm(batches, "2 reward")
    for step, batch in enumerate(bar):
        batch.sort(key=lambda example: len(example.prompt))  # as in stage 1
        total = 0.0
        accuracy = 0.0
        for i in range(0, len(batch), cfg.micro_batch):
            scores = score_pairs(model, batch[i : i + cfg.micro_batch])  # (b, 2)
            share = len(scores) / len(batch)  # its part of the mean
            loss = bradley_terry_loss(scores[:, 0], scores[:, 1]) * share
            loss.backward()
            total += loss.item()
            accuracy += (scores[:, 0] > scores[:, 1]).float().mean().item() * share
        if step == 0:
            self_check("reward loss starts at ln 2", abs(total - math.log(2)) < 1e-6)
        lr = learning_rate(cfg.reward_lr, step, steps)
        norm = gradient_step(model, optimizer, lr)
        log(step, {"reward/loss": total, "reward/accuracy": accuracy, "reward/grad_norm": norm})
        bar.set_postfix(loss=total, accuracy=accuracy)


@torch.no_grad()
def set_gain(
    model: PreTrainedModel, policy: PreTrainedModel, prompts: list[list[int]], cfg: Config
) -> float:
    """Scale the head so that r_1 − r_2 has root mean square 1 on pairs sampled by SFT's policy.

    The pairs are drawn by `sample`, one for each of the prompts, and scored by `reward_scores`,
    any number at a time. β then has a unit: it is a price per nat, in typical differences of the
    reward. Returns the factor. Raises FloatingPointError, naming --reward-lr, if the scores are
    all alike.
    """
    differences = []
    for batch in parts_of(prompts, cfg.minibatch, "  gain   "):
        ids, response_mask = sample(policy, batch, 2, cfg.response_tokens)  # (b, 2, T)
        scores = reward_scores(model, ids, response_mask)  # (b, 2)
        # NOTE not absolute scores: the gain, and so each update, would depend on δ(x)
        differences.append(scores[:, 0] - scores[:, 1])  # (b,)
    size = torch.cat(differences).square().mean().sqrt().item()
    if not 0 < size < math.inf:
        raise FloatingPointError(f"r_1 − r_2 has size {size}; try another --reward-lr")
    model.score.weight.div_(size)
    return 1 / size


# ---- Stage 3: P3O ------------------------------------------------------------------------
def train_policy(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    score: Callable[[Tensor, Tensor], Tensor],
    prompts: list[list[int]],
    cfg: Config,
    log: Callable,
    loss_fn: Callable = p3o_loss,
    checkpoint: Path | None = None,
) -> None:
    """Sample a pair for each of cfg.pairs prompts, score it, update, throw the pairs away.

    The prompts of iteration t are shuffled(prompts, cfg.pairs, cfg.iterations)[t], in any order,
    its learning rate is learning_rate(cfg.lr, t, cfg.iterations). `score` gives (B, 2) scores for
    ids and mask (B, 2, T); `loss_fn` takes what `p3o_loss` does, with cfg's beta, clip and
    clip_range. Each of cfg.inner_epochs shuffles the pairs, and makes a gradient_step on each
    cfg.minibatch of them, its gradient that of the mean loss, by cfg.micro_batch pairs at a time.
    No dropout, no weight decay. Log-probs are computed alike everywhere, so that before the first
    update, where `self_check` says so, ratio = 1 and KL = 0, up to rounding.
    log(t, metrics), once an iteration, gets the means of loss_fn's metrics, loss/policy and
    policy/grad_norm over the pairs updated on, and over the samples those of objective/scores,
    objective/kl (log π_old − log π_ref), objective/entropy (−log π_old), response/length and
    response/finished (by EOS). Where `checkpoint` exists the stage goes on from it, and every
    CHECKPOINT_EVERY iterations it is saved.
    """
    policy.eval()
    batches = shuffled(prompts, cfg.pairs, cfg.iterations)
    # NOTE weight decay would pull the policy away from the reference
    optimizer = make_optimizer([{"params": policy.parameters(), "weight_decay": 0.0}])
    first = 0
    if checkpoint and checkpoint.exists():
        first = load_checkpoint(checkpoint, policy, optimizer)
    bar = tqdm(range(first, cfg.iterations), "3 P3O   ", cfg.iterations, initial=first)
    for iteration in bar:
        if checkpoint and iteration % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, iteration, policy, optimizer)

        lr = learning_rate(cfg.lr, iteration, cfg.iterations)

        # 1. two responses to each prompt, (B, 2, T); from here to the loss a pair is a row
        batches[iteration].sort(key=len)  # as in stage 1
        ids, response_mask = sample(policy, batches[iteration], 2, cfg.response_tokens)

        # 2. what does not change during the inner epochs, (B, 2) each
        scores = in_parts(score, cfg.micro_batch, ids, response_mask)
        old_logprobs = in_parts(
            partial(sequence_logprobs, policy), cfg.micro_batch, ids, response_mask
        )
        ref_logprobs = in_parts(
            partial(sequence_logprobs, reference), cfg.micro_batch, ids, response_mask
        )

        # 3. updates on minibatches of pairs
        new_logprobs = old_logprobs.clone()  # (B, 2), the latest, for the check below
        sums = defaultdict(float)  # of each metric, over the pairs of all updates
        for _ in range(cfg.inner_epochs):
            for minibatch in torch.randperm(cfg.pairs).split(cfg.minibatch):
                # in the order of the batch, by length of the prompt
                for part in minibatch.sort().values.split(cfg.micro_batch):
                    logprobs = sequence_logprobs(policy, ids[part], response_mask[part])  # (b, 2)
                    new_logprobs[part] = logprobs.detach()
                    loss, metrics = loss_fn(
                        logprobs,
                        old_logprobs[part],
                        ref_logprobs[part],
                        scores[part],
                        beta=cfg.beta,
                        clip=cfg.clip,
                        clip_range=cfg.clip_range,
                    )
                    # gradients add up to that of the mean over the minibatch
                    (loss * len(part) / len(minibatch)).backward()
                    metrics["loss/policy"] = loss.detach()
                    for key, value in metrics.items():
                        sums[key] += value * len(part)
                if not optimizer.state:  # nothing was updated yet
                    drift = new_logprobs - torch.stack([old_logprobs, ref_logprobs])  # (2, B, 2)
                    rounding = 1.0 if DEVICE == "cuda" else 1e-3  # nats
                    same = drift.abs().max() < rounding
                    self_check("ratio = 1 and KL = 0 before the first update", same)
                norm = gradient_step(policy, optimizer, lr)
                sums["policy/grad_norm"] += norm * len(minibatch)

        # 4. metrics
        updated_on = cfg.inner_epochs * cfg.pairs
        row = {key: float(total) / updated_on for key, total in sums.items()}
        sampled = {
            "objective/scores": scores,
            "objective/kl": old_logprobs - ref_logprobs,
            "objective/entropy": -old_logprobs,
            "response/length": response_mask.sum(-1),
            "response/finished": finished(policy, ids, response_mask),
        }  # (B, 2) each
        for key, values in sampled.items():
            row[key] = values.double().mean().item()
        log(iteration, row)
        bar.set_postfix(score=row["objective/scores"], kl=row["objective/kl"])


# ---- Evaluation on held-out prompts ------------------------------------------------------
@torch.no_grad()
def evaluate(
    cfg: Config,
    sft: PreTrainedModel,
    reward_model: PreTrainedModel,
    policy: PreTrainedModel,
    tokenizer: Any,
    examples: list[Example],
) -> dict[str, list[float]]:
    """Each figure's values, one a held-out pair or prompt; shows the first answers.

    SFT and P3O answer the same prompts; P3O wins where its answer is the better one, and a tie
    is half a win. The judge is the gold reward of the shipped data. On other data it is the
    reward model, which the policy was trained to please. kl is log π − log π_ref in nats.
    """
    ranked = []
    for batch in parts_of(examples, cfg.minibatch, "  pairs  "):
        scores = score_pairs(reward_model, batch)  # (b, 2)
        ranked += (scores[:, 0] > scores[:, 1]).tolist()
    figures = defaultdict(list, reward_accuracy=ranked)
    texts = [example.text for example in examples]
    answers = defaultdict(list)
    for batch in parts_of(examples[: cfg.eval_prompts], cfg.minibatch, "  answers"):
        prompts = [example.prompt for example in batch]
        for name, model in (("sft", sft), ("policy", policy)):
            ids, response_mask = sample(model, prompts, 1, cfg.response_tokens)  # (b, 1, T)
            logprobs = sequence_logprobs(model, ids, response_mask)  # (b, 1)
            measured = {
                "score": reward_scores(reward_model, ids, response_mask),
                "kl": logprobs - sequence_logprobs(sft, ids, response_mask),
                "finished": finished(model, ids, response_mask),
            }  # (b, 1) each
            for key, values in measured.items():
                figures[f"{key}_{name}"] += values.flatten().tolist()
            for row, mask in zip(ids, response_mask, strict=True):
                answers[name].append(tokenizer.decode(row[mask], skip_special_tokens=True))
    judged_by = "score"
    if Path(cfg.data).resolve() == SHIPPED_DATA:
        judged_by = "gold"
        figures |= judge.figures(texts, ranked, answers)
    wins = judge.wins(figures[f"{judged_by}_policy"], figures[f"{judged_by}_sft"])

    judge.show(texts, answers, figures)
    return {"win_rate": wins} | figures


# ---- The run: a directory in which each finished stage is a folder -----------------------
@contextlib.contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Write to what this gives: it appears at `path` when all is written, or not at all."""
    scratch = path.with_name(path.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    yield scratch
    scratch.replace(path)


def open_out(cfg: Config, pairs: Any) -> Path:
    """Make the output directory, or accept the one that these options and these pairs made.

    Options that change no training may differ, and so may the learning rate of a stage that is
    not done. Raises InputError for any other directory, which stays as it is.
    """
    out = Path(cfg.out)
    config = out / "config.json"
    mine = asdict(cfg) | {"data_crc": zlib.crc32(repr(pairs).encode())}
    done = [stage for stage in STAGES if (out / stage).exists()]
    if done:
        theirs = json.loads(config.read_text())
        free = ["out", "micro_batch", "eval_prompts"]
        free += [rate for stage, rate in STAGES.items() if stage not in done]
        differ = [key for key in mine if key not in free and mine[key] != theirs.get(key)]
        if differ:
            raise InputError(f"{out} was made with other {', '.join(differ)}; change --out")
    elif out.exists() and not config.exists() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not a run of p3o.py; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with appears_whole(config) as file:
        file.write_text(json.dumps(mine, indent=2))
    return out


def starts(cfg: Config, stage: str) -> bool:
    """Whether a stage is still to do; if so, its randomness depends on the seed alone."""
    if (Path(cfg.out) / stage).exists():
        print(f"{stage}: finished before")
        return False
    torch.manual_seed(zlib.crc32(f"{cfg.seed} {stage}".encode()))
    return True


def save(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    with appears_whole(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def load(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """The model of a finished stage, in fp32 and in eval mode."""
    return kind.from_pretrained(folder, dtype=torch.float32, **options).to(DEVICE)


class Log:
    """A stage's metrics in a file, a JSON line a step; `seconds` are the step's own.

    Line t is step t: a step that a killed run had done is replaced, with all after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = path.read_text().splitlines() if path.exists() else []
        self.last = time.perf_counter()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        row = {"step": step, **metrics, "seconds": now - self.last}
        self.last = now
        self.lines[step:] = [json.dumps(row)]
        with appears_whole(self.path) as file:
            file.write_text("\n".join(self.lines) + "\n")


def save_checkpoint(
    path: Path, iteration: int, policy: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> None:
    """All that stage 3 needs to go on as if it had not been stopped."""
    state = {
        "iteration": iteration,
        "policy": policy.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cpu_generator": torch.get_rng_state(),
        "gpu_generators": torch.cuda.get_rng_state_all(),
    }
    with appears_whole(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Put everything back; returns the iteration to go on with. Raises InputError."""
    try:
        state = torch.load(path, map_location="cpu")
    except Exception:  # of many kinds, by where the file breaks off
        raise InputError(f"{path} is broken; delete it to begin stage 3 again") from None
    policy.load_state_dict(state["policy"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["cpu_generator"])
    torch.cuda.set_rng_state_all(state["gpu_generators"])
    return state["iteration"]


def run(cfg: Config) -> None:
    """The stages that are not finished, one after the other, then the evaluation."""
    torch.manual_seed(cfg.seed)
    policy, tokenizer = load_base(cfg)
    train_pairs, heldout_pairs = load_pairs(cfg.data, tokenizer)
    examples = tokenize(train_pairs, tokenizer, cfg)
    heldout = tokenize(heldout_pairs, tokenizer, cfg)
    prompts = [example.prompt for example in examples]
    if not examples or len(heldout[: cfg.eval_prompts]) < 2:  # one figure has no interval
        raise InputError("too few pairs are left; see --response-tokens and --eval-prompts")
    out = open_out(cfg, (train_pairs, heldout_pairs))
    print(f"{len(examples)} training and {len(heldout)} held-out pairs, on {DEVICE}, in {out}")

    if starts(cfg, "sft"):
        train_sft(policy, examples, cfg, Log(out / "sft.jsonl"))
        save(out / "sft", policy, tokenizer)
    sft = load(out / "sft")

    if starts(cfg, "reward"):
        reward_model = load(out / "sft", AutoModelForSequenceClassification, num_labels=1)
        train_reward(reward_model, examples, cfg, Log(out / "reward.jsonl"))
        gain = set_gain(reward_model, sft, prompts[:GAIN_PROMPTS], cfg)
        print(f"  scores × {gain:.3f}: r_1 − r_2 has root mean square 1 on SFT's pairs")
        save(out / "reward", reward_model, tokenizer)
    reward_model = load(out / "reward", AutoModelForSequenceClassification)

    checkpoint = out / "p3o.checkpoint"
    if starts(cfg, "p3o"):
        policy = load(out / "sft")
        score = partial(reward_scores, reward_model)
        train_policy(
            policy, sft, score, prompts, cfg, Log(out / "p3o.jsonl"), checkpoint=checkpoint
        )
        save(out / "p3o", policy, tokenizer)
    checkpoint.unlink(missing_ok=True)
    policy = load(out / "p3o")

    starts(cfg, "evaluation")  # never finished before
    figures = evaluate(cfg, sft, reward_model, policy, tokenizer, heldout)
    summary = judge.summarize(figures)
    with appears_whole(out / "summary.json") as file:
        file.write_text(json.dumps(summary, indent=2))


# ---- Command line ------------------------------------------------------------------------
def parse_config(argv: list[str]) -> Config:
    """A preset, changed by what the options say."""
    parser = transformers.HfArgumentParser(Config, description=__doc__.splitlines()[0])
    if "--small" in argv:
        parser.set_defaults(**SMALL)
    return Config(**vars(parser.parse_args(argv)))


def main(argv: list[str]) -> None:
    """The command line; what goes wrong for a known reason is told in one line, status 1."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # we get exceptions
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        cfg = parse_config(argv)
        try_hub(cfg.model, cfg.data)
        run(cfg)
    except KeyboardInterrupt:
        sys.exit("p3o.py: interrupted; the same command goes on from here")
    except torch.OutOfMemoryError:
        sys.exit("p3o.py: out of memory; go on by the same command, smaller --micro-batch")
    except (InputError, FloatingPointError, OSError) as error:
        sys.exit(f"p3o.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
