# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tqdm==4.70.1"]
# ///
"""RLHF with Pairwise Proximal Policy Optimization (P3O, arXiv 2310.00212), in one file.

    python p3o.py --small   # a tiny GPT-2 on the data in data/: a minute on a laptop, offline
    python p3o.py           # GPT-2 (124M) on Anthropic HH, on a GPU

It runs on the first CUDA GPU, or on the CPU if there is none.

Read it from top to bottom. x is a prompt. y is a whole response: it ends with an end-of-sequence
token (EOS) unless it was truncated. π(y|x) is the probability that a language model, the policy,
gives to y. r(x, y) is a reward: how good y is. Of a preference pair, y_w was preferred to y_l.

    1  SFT      supervised fine-tuning: maximise log π(y_w|x) = Σ_t log π(y_w^t | x, y_w^<t)
                                                                                train_sft
    2  reward   Bradley-Terry: minimise −E log σ( r(x, y_w) − r(x, y_l) ),      train_reward
                σ the logistic function
       gain     rescale r once, so that r differs by 1 (root mean square)       set_gain
                between two responses of the SFT model
    3  P3O      maximise J = E r(x, y) − β KL(π‖π_ref)                          train_policy

The reward model and the policy both start from the SFT model. A frozen copy of it is π_ref.
Dropout is off in every stage.

Why pairs? Preferences determine r only up to an offset δ(x): r and r + δ(x) give each
preference the same probability. PPO, the usual algorithm of RLHF, weighs each response by its
own reward, so its updates depend on δ(x), as far as its value network has not learned δ(x).
P3O's updates do not depend on it at all, because they use r only as r_1 − r_2, for two responses
to the same prompt.

From J to the loss. Let y_1 and y_2 be drawn independently from π(·|x), r_i = r(x, y_i), and

    (1)  h_i = log π(y_i|x) − log π_ref(y_i|x)        ρ_i = π(y_i|x) / π_old(y_i|x)
    (2)  q = sg[ r_1 − r_2 − β (h_1 − h_2) ]          sg: stop-gradient

KL(π‖π_ref) = E_π h, so J = E[ r − β h ], over prompts x and responses y ∼ π. For any f(y),
∇ E_π f = E_π[ f ∇ log π + ∇f ]. Hence ∇J = E[ (r_1 − β h_1) ∇ log π(y_1|x) ] − β E[ ∇h_1 ].
As ∇h = ∇ log π and E_π ∇ log π = ∇ Σ_y π = 0, the second term is zero. For the same reason, a
baseline that does not depend on y_1 may be subtracted in the first term. The partner's
r_2 − β h_2 is one, which leaves E[ q ∇ log π(y_1|x) ]. With the roles of y_1 and y_2 swapped,
the same gradient is E[ −q ∇ log π(y_2|x) ]. The mean of the two, hence the ½, is
E ½ q ∇ log(π(y_1|x)/π(y_2|x)). But our pairs were sampled some updates ago, by an older policy
π_old. An importance weight ρ_i for each response corrects for that:

    (3)  ∇J = E ½ q ρ_1 ρ_2 ∇ log( π(y_1|x) / π(y_2|x) )         E over x and y_1, y_2 ∼ π_old

The loss is −L, and L has two forms. Both have gradient (3) as long as nothing is clipped. The
paper calls them V1 and V2, and finds V2 steadier, so V2 is the default. As in PPO, ε = 0.2
limits how far an update may go. Ratios that only weigh, w and ρ̄ = clip(ρ, 1/c, c), are
clipped by c = 10, so that no pair dominates an update, or drops out of it, by its weight.

    (4)  V2, clip="joint", acts on u = log(ρ_1/ρ_2). As π_old is fixed, ∇u = ∇ log(π(y_1)/π(y_2)):
         L = E ½ min( q w u,  q w clip(u, −ε, ε) )             w = sg[ clip(ρ_1 ρ_2, 1/c, c) ]
    (5)  V1, clip="separate", acts on one ratio at a time, and ∇ρ_1 = ρ_1 ∇ log π(y_1|x):
         L = E ½ { min(  q sg[ρ̄_2] ρ_1,   q sg[ρ̄_2] clip(ρ_1, 1−ε, 1+ε) )
                 + min( −q sg[ρ̄_1] ρ_2,  −q sg[ρ̄_1] clip(ρ_2, 1−ε, 1+ε) ) }

Once u (in V1, a ratio) has moved by ε in the direction in which q pushes, min() picks the
clipped term, which is constant, so the gradient is zero. It never stops a move back. At the
optimum, π ∝ π_ref exp(r/β), r − β h is the same for all y, so every q is 0.

Three sizes in stage 3: each iteration samples --pairs pairs, each update takes --minibatch of
them, and --micro-batch of those pass forward and backward at a time. The last one saves memory
and changes no update.

Left out: PPO's value network, a learned baseline for each token (here the partner is the
baseline), clipping scores or dividing them by their spread (δ(x) would matter again), a
KL loss (q holds the KL), several GPUs and LoRA (tests/own/trl_p3o.py hands over to the library
TRL).
"""

import contextlib
import json
import math
import shutil
import statistics
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.utils.peft_utils import find_adapter_config_file

from data import judge
from data.models import check_model, check_weights, fit_tokens
from data.preferences import (
    ASSISTANT,
    SHIPPED_DATA,
    Example,
    InputError,
    checksum,
    first_start,
    load_examples,
    try_hub,
)

GAIN_PROMPTS = 128  # with as many r_1 − r_2, the gain's standard error is about 6 %
CHECKPOINT_EVERY = 20  # iterations of stage 3
AT_ONCE = 8  # micro-batches sampled at a time: together less memory than one with its gradients
ROUNDING = 1e-3  # nats by which two computations of the same log π(y|x) may differ
STAGES = ("sft", "reward", "p3o")
LogStep = Callable[[int, dict[str, float]], None]  # is given a step and its metrics
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    # fp32 with TF32 products, which round log π(y|x) by some 0.03 nats. In bf16 it would be some
    # 0.3, and log(ρ_1/ρ_2) would pass ε by rounding alone
    torch.set_float32_matmul_precision("high")
    ROUNDING = 1.0  # the check in stage 3 is coarse here, but dropout would exceed it by far


# ---- Configuration: each field is a command-line option ------------------------------------
def option(default: Any, help: str) -> Any:
    return HfArg(default=default, help=help)


@dataclass
class Config:
    small: bool = option(False, "a tiny GPT-2 on the shipped data, in a minute")
    model: str = option("gpt2", "causal language model: hub name or directory")
    data: str = option("Anthropic/hh-rlhf", "preference pairs: hub name, file or directory")
    out: str = option("runs/gpt2", "directory for the results; run again to resume")
    seed: int = option(0, "fixes data order, samples and fresh weights")
    clip: Literal["joint", "separate", "none"] = option(
        "joint", "P3O (V2), P3O (V1) or no clipping"
    )
    beta: float = option(0.05, "price of KL to the SFT model, in reward per nat")
    clip_range: float = option(0.2, "ε, half-width of the clip of log(ρ_1/ρ_2) or ρ")
    prompt_tokens: int = option(384, "longer prompts lose their oldest turns")
    response_tokens: int = option(128, "longer responses are truncated")
    batch: int = option(32, "stages 1 and 2: preference pairs per update")
    epochs: int = option(1, "stages 1 and 2: passes over the data")
    sft_lr: float = option(5e-5, "stage 1: peak learning rate")
    reward_lr: float = option(2e-5, "stage 2: peak learning rate of the body")
    iterations: int = option(1000, "stage 3: rounds of sampling and updating")
    pairs: int = option(64, "stage 3: prompts, so pairs, sampled per iteration")
    minibatch: int = option(16, "stage 3: pairs per update")
    inner_epochs: int = option(4, "stage 3: passes over each iteration's pairs")
    p3o_lr: float = option(2e-6, "stage 3: peak learning rate")
    micro_batch: int = option(4, "pairs per backward pass: saves memory only")
    eval_prompts: int = option(128, "held-out prompts answered at the end")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            # two answers to compute an interval from, else 1 for a count and 0 for a number
            least = {"seed": 0, "eval_prompts": 2}.get(f.name, int(f.type is int))
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
    p3o_lr=2e-3,
    micro_batch=32,
    eval_prompts=512,
)


# ---- From token ids to tensors ---------------------------------------------------------------
def collate(
    prompts: list[list[int]], responses: list[list[int]], model: PreTrainedModel
) -> tuple[Tensor, Tensor]:
    """Join each prompt to its response, both token ids; pad on the right with the model's pad.

    Returns ids and response_mask, both (N, T) on the model's device, T the longest row's length.
    response_mask is a boolean tensor: True on every response token, EOS included, else False.
    """
    rows = []
    masks = []
    for prompt, response in zip(prompts, responses, strict=True):
        rows.append(torch.tensor(prompt + response))
        # NOTE never computed as ids != pad: if pad = EOS, that would leave out EOS
        masks.append(torch.tensor([False] * len(prompt) + [True] * len(response)))
    ids = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)  # (N, T)
    response_mask = pad_sequence(masks, batch_first=True)  # (N, T), False on padding
    return ids.to(model.device), response_mask.to(model.device)


# ---- Models: loading, sampling, log-probabilities, scores ----------------------------------
def load_base(cfg: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that SFT starts from, in fp32, and its tokenizer.

    Raises InputError for a model that cannot be loaded, or that a later stage could not use.
    """
    try:
        if find_adapter_config_file(cfg.model):
            raise ValueError("it is a LoRA adapter; merge it into its base model first")
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        config = AutoConfig.from_pretrained(cfg.model)
        if getattr(config, "activation_function", "") == "gelu_new":  # GPT-2's
            config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel
        if Path(cfg.model).resolve() == SHIPPED_DATA / "tiny":  # ships no weights: draw them
            model = AutoModelForCausalLM.from_config(config)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                cfg.model,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # check_weights names them
                output_loading_info=True,
            )
            check_weights(model, loading)
        fit_tokens(model.eval(), tokenizer, cfg.response_tokens)
        check_model(model, cfg.prompt_tokens + cfg.response_tokens)
    except Exception as error:  # of many kinds: no network, a broken file, a missing package
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, SafetensorError):
            reason = f"a weights file is cut or a Git LFS pointer ({reason}); fetch it again"
        raise InputError(f"--model {cfg.model}: {reason} (--small needs no hub)") from None
    return model.to(DEVICE), tokenizer


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: list[list[int]], n: int, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Draw n responses to each prompt from π, token by token, up to EOS or max_tokens.

    Returns ids and response_mask as `collate` does, but (B, n, T): prompt b's n responses are
    row b. Pads on the left internally; the rows it returns are padded on the right.

    - Each token is drawn from the whole vocabulary at temperature 1, with the probability that
      `response_logprobs` computes. All draws are independent.
    - A response ends with its first EOS, which is part of it, or after max_tokens tokens. Until
      then a pad token that is drawn is part of it, too, like any other token.
    - Raises FloatingPointError if a row that has no EOS yet has a logit of NaN or +inf.
    """
    rows = [prompt for prompt in prompts for _ in range(n)]  # N = B·n, the n of a prompt together
    responses = [[] for _ in rows]
    input_ids = pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_value=model.config.pad_token_id,
        padding_side="left",
    ).to(model.device)  # (N, P) at first, later the last token drawn: (N, 1)
    longest = input_ids.shape[1]  # P
    n_pad = torch.tensor([[longest - len(row)] for row in rows], device=model.device)  # (N, 1)
    # drawn on the CPU and at once: neither the device nor a split into parts changes a draw
    points = torch.rand(len(rows), max_tokens, dtype=torch.float64).to(model.device)
    unfinished = list(range(len(rows)))  # N of them, which shrinks as rows finish
    cache = None
    for step in range(max_tokens):
        slots = torch.arange(longest + step, device=model.device)  # (length,)
        # NOTE position 0 is the first token of the prompt, padded or not, as in training
        position_ids = (slots - n_pad).clamp(min=0)  # (N, length)
        out = model.base_model(
            input_ids,
            attention_mask=(slots >= n_pad).long(),
            position_ids=position_ids[:, -input_ids.shape[1] :],  # (N, P) at first, then (N, 1)
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits = model.get_output_embeddings()(out.last_hidden_state[:, -1])  # (N, V)
        # NOTE temperature 1, all tokens: with top-k, samples would not follow the scored policy
        probs = logits.float().softmax(-1)  # (N, V)
        # inverse of the cumulative distribution: on a CPU ten times as fast as multinomial, and
        # in float64, so that summing up loses no small probability
        cdf = probs.cumsum(-1, dtype=torch.float64)  # (N, V)
        point = points[:, step, None] * cdf[:, -1:]  # (N, 1)
        input_ids = torch.searchsorted(cdf, point, right=True)  # (N, 1)
        drawn = input_ids.flatten().tolist()  # waits for a GPU
        if max(drawn) == cdf.shape[1]:  # past the vocabulary, where NaN points
            raise FloatingPointError("logits are not finite; resume with a lower learning rate")
        for row, token in zip(unfinished, drawn, strict=True):
            responses[row].append(token)
        # finished rows leave the batch, so that no more passes are spent on them
        going_on = [i for i, token in enumerate(drawn) if token != model.config.eos_token_id]
        if not going_on:
            break
        if len(going_on) < len(unfinished):
            unfinished = [unfinished[i] for i in going_on]
            kept = torch.tensor(going_on, device=model.device)  # (N',)
            cache.reorder_cache(kept)  # keeps these rows only
            input_ids = input_ids[kept]
            n_pad = n_pad[kept]
            points = points[kept]
    ids, response_mask = collate(rows, responses, model)  # (B·n, T)
    return ids.view(len(prompts), n, -1), response_mask.view(len(prompts), n, -1)


def sample_by_parts(
    model: PreTrainedModel, prompts: list[list[int]], n: int, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Return what `sample` returns, (B, n, T), sampled by parts of the rows to save memory."""
    rows = []
    masks = []
    for part in parts(prompts, AT_ONCE * cfg.micro_batch):
        ids, response_mask = sample(model, part, n, cfg.response_tokens)  # (b, n, T')
        rows += ids.flatten(0, 1)  # b·n rows (T',), T' is the part's longest
        masks += response_mask.flatten(0, 1)
    ids = pad_sequence(rows, True, model.config.pad_token_id)  # (B·n, T)
    response_mask = pad_sequence(masks, True)  # (B·n, T), False on padding
    shape = len(prompts), n, -1
    return ids.view(shape), response_mask.view(shape)


def response_logprobs(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """Return log π(y^t | x, y^<t) of each response token in nats, and 0 elsewhere.

    ids and response_mask are (…, T) with any leading shape; the result is (…, T−1). Its column t
    belongs to token t+1, which is predicted after token t. No attention mask is needed: padding
    is on the right, where a causal model never looks, and positions count from 0.

    - `model.base_model` is called with ids of shape (N, T), with or without use_cache=False, and
      nothing else. Columns after the last response token may be cut off.
    - Only hidden states that predict a response token are used, and only they pass through
      `model.get_output_embeddings()`. The others may hold anything, even NaN (NaN · 0 is NaN, so
      select, do not multiply).
    - The softmax is in fp32, whatever the model's dtype.
    """
    is_target = response_mask[..., 1:]  # (…, T−1): column t: is token t+1 a response token?
    # argmax returns the first maximum of the cumsum, so the last True of each row
    end = int(is_target.cumsum(-1).argmax(-1).max()) + 1  # nothing after it is computed
    out = model.base_model(ids.flatten(0, -2)[:, :end], use_cache=False)
    hidden = out.last_hidden_state  # (N, end, D)
    used = hidden[is_target.flatten(0, -2)[:, :end]]  # (R, D), R response tokens in all
    logits = model.get_output_embeddings()(used).float()  # (R, V)
    targets = ids[..., 1:][is_target]  # (R,)
    picked = -F.cross_entropy(logits, targets, reduction="none")  # (R,)
    return picked.new_zeros(is_target.shape).masked_scatter(is_target, picked)  # (…, T−1)


def sequence_logprobs(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """Return log π(y|x) in nats: (…) from ids and response_mask (…, T)."""
    return response_logprobs(model, ids, response_mask).sum(-1)


def reward_scores(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """Return r(x, y), read at the response's last token: (…) from ids and response_mask (…, T).

    - The score is `model.score` of the hidden state at that token, EOS if the response has one.
      `model.base_model` is called as in `response_logprobs`.
    - Other hidden states are not used. They may hold anything, even NaN.
    - The result is in fp32, whatever the model's dtype.
    """
    last = response_mask.flatten(0, -2).cumsum(-1).argmax(-1)  # (N,): the last True
    end = last.max() + 1
    out = model.base_model(ids.flatten(0, -2)[:, :end], use_cache=False)
    hidden = out.last_hidden_state  # (N, end, D)
    row = torch.arange(len(last), device=ids.device)  # (N,)
    return model.score(hidden[row, last]).float().view(ids.shape[:-1])


def score_pairs(model: PreTrainedModel, examples: list[Example]) -> Tensor:
    """Return the scores of chosen and rejected, (B, 2)."""
    prompts = []
    responses = []
    for example in examples:
        prompts += [example.prompt, example.prompt]
        responses += [example.chosen, example.rejected]
    ids, response_mask = collate(prompts, responses, model)  # (2B, T)
    return reward_scores(model, ids, response_mask).view(-1, 2)


def finished(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """Return whether each response has its EOS: (…) from ids and response_mask (…, T)."""
    return ((ids == model.config.eos_token_id) & response_mask).any(-1)


# ---- The two losses: tensors in, tensors out -----------------------------------------------
def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Return the mean of −log σ(r_w − r_l) in nats: (B,), (B,) → scalar (Bradley & Terry 1952).

    The loss and its gradient are finite at any finite margin.

    >>> bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0]))
    tensor(0.3133)
    >>> bradley_terry_loss(torch.tensor([102.0]), torch.tensor([101.0]))  # δ = 100 on both
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
    """Return the loss −L of equation (4) or (5), a mean over pairs, and metrics.

    Tensors are (B, 2), a pair a row: log π(y|x) in nats, summed over the response, under the
    current, the sampling and the reference policy, and the scores r(x, y). `clip_range` is ε,
    `ratio_bound` is c. From the P3O paper, section 4.2.

    - clip="joint" is P3O (V2), "separate" is P3O (V1). "none" is L = E ½ q sg[ρ_1 ρ_2] u, whose
      gradient is ∇J exactly, also off-policy. Others raise ValueError.
    - Only `logprobs` gets a gradient: q, w and ρ̄ are constants. No input is changed in place.
    - ρ_1 ρ_2 has no bound with "none".
    - In V1 a ρ above e^20, far beyond a healthy run, counts as e^20 and gets no gradient. Its
      gradient contains ρ itself, which overflows in fp32 at e^89.
    - Metrics, detached: policy/clipfrac, the share of pairs (V1: of responses) whose gradient
      the clip stops; the means of ½ (log ρ)², ρ and |q|: policy/approxkl, policy/ratio and
      objective/q.

    >>> logprobs = torch.tensor([[-3.0, -4.0]], requires_grad=True)
    >>> same = logprobs.detach()
    >>> scores = torch.tensor([[1.0, 0.0]])
    >>> loss, metrics = p3o_loss(logprobs, same, same, scores, beta=0.05)
    >>> torch.autograd.grad(loss, logprobs)[0]  # −½ q on y_1, +½ q on y_2, q = r_1 − r_2
    tensor([[-0.5000,  0.5000]])
    """
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2): log ρ
    # NOTE h of the current policy; that of the sampling policy is wrong after one update
    h = (logprobs - ref_logprobs).detach()  # (B, 2), eq. (1)
    # r_1 − r_2 is computed first, so that δ(x) cancels exactly
    q = (scores[:, 0] - scores[:, 1]).detach() - beta * (h[:, 0] - h[:, 1])  # (B,), eq. (2)
    u = log_ratio[:, 0] - log_ratio[:, 1]  # (B,): log(ρ_1/ρ_2)
    weight = log_ratio.sum(-1).exp().detach()  # (B,): ρ_1 ρ_2, eq. (3)
    if clip == "joint":  # eq. (4): the clip stops both responses together
        weight = weight.clamp(1 / ratio_bound, ratio_bound)  # (B,): w
        unclipped = (q * weight * u)[:, None]  # (B, 1)
        clipped = (q * weight * u.clamp(-clip_range, clip_range))[:, None]  # (B, 1)
    elif clip == "separate":  # eq. (5): the clip stops each response by itself
        # NOTE e^100 is inf in fp32, and the gradient would be NaN
        ratio = log_ratio.clamp(max=20).exp()  # (B, 2): ρ
        bounded = ratio.detach().clamp(1 / ratio_bound, ratio_bound)  # (B, 2): ρ̄
        advantage = torch.stack([q, -q], dim=-1) * bounded.flip(-1)  # (B, 2): q ρ̄_2, −q ρ̄_1
        unclipped = advantage * ratio  # (B, 2)
        clipped = advantage * ratio.clamp(1 - clip_range, 1 + clip_range)  # (B, 2)
    elif clip == "none":  # eq. (3)
        unclipped = (q * weight * u)[:, None]  # (B, 1)
        clipped = unclipped
    else:
        raise ValueError(f'clip must be "joint", "separate" or "none", not {clip!r}')
    objective = 0.5 * torch.minimum(unclipped, clipped).sum(-1)  # (B,)
    moved = log_ratio.detach()  # (B, 2)
    metrics = {
        "policy/clipfrac": (clipped < unclipped).float().mean(),
        "policy/approxkl": (0.5 * moved**2).mean(),
        "policy/ratio": moved.exp().mean(),
        "objective/q": q.abs().mean(),
    }
    return -objective.mean(), metrics


# ---- What the stages share -----------------------------------------------------------------
def parts(rows: list, size: int) -> list[list]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def shuffled(rows: list, size: int, steps: int) -> list[list]:
    """Return `steps` batches of `size` rows: pass after pass over all, each in a new order."""
    passes = math.ceil(steps * size / len(rows))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(passes)])
    return [[rows[i] for i in batch] for batch in order.split(size)[:steps]]


def make_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW; a parameter group's `lr_scale`, if any, multiplies its learning rate."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return the rate of step 0, 1, …: linear warm-up for a twentieth, linear decay, never 0."""
    warmup = math.ceil(0.05 * steps)
    return peak * min((step + 1) / warmup, 1 - step / steps)


def gradient_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Take one optimizer step on the accumulated gradients, then zero them.

    Returns the gradient norm before it is clipped to 1. Raises FloatingPointError, without a
    step, if that is not finite.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm}; resume with a lower learning rate")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def self_check(claim: str, holds: bool) -> None:
    assert holds, f"check failed: {claim}"
    tqdm.write(f"  check: {claim}: ok")


# ---- Stage 1: supervised fine-tuning -------------------------------------------------------
def train_sft(policy: PreTrainedModel, examples: list[Example], cfg: Config, log: LogStep) -> None:
    """Maximise the likelihood of the chosen responses; the loss is a mean over their tokens."""
    policy.eval()  # NOTE no dropout in any stage: with it, ratios would not even start at 1
    steps = math.ceil(cfg.epochs * len(examples) / cfg.batch)
    batches = shuffled(examples, cfg.batch, steps)
    optimizer = make_optimizer([{"params": policy.parameters()}])
    losses = []
    bar = tqdm(batches, "1 SFT   ")
    for step, batch in enumerate(bar):
        # rows of similar length share a micro-batch, computed up to its longest row only
        batch.sort(key=lambda example: len(example.prompt + example.chosen))
        prompts = [example.prompt for example in batch]
        chosen = [example.chosen for example in batch]
        ids, response_mask = collate(prompts, chosen, policy)  # (B, T)
        total = 0.0
        size = cfg.micro_batch
        for part in zip(ids.split(size), response_mask.split(size), strict=True):  # (b, T) each
            logprobs = response_logprobs(policy, *part)  # (b, T−1)
            loss = -logprobs.sum() / response_mask.sum()  # this part's share of the mean
            loss.backward()
            total += loss.detach()
        total = total.item()
        norm = gradient_step(policy, optimizer, learning_rate(cfg.sft_lr, step, steps))
        log(step, {"sft/loss": total, "sft/grad_norm": norm})
        losses.append(total)
        bar.set_postfix(loss=statistics.fmean(losses[-50:]))  # one batch's alone is noisy


# ---- Stage 2: the reward model -------------------------------------------------------------
def train_reward(
    model: PreTrainedModel, examples: list[Example], cfg: Config, log: LogStep
) -> None:
    """Minimise the Bradley-Terry loss on the preference pairs."""
    model.eval()
    torch.nn.init.zeros_(model.score.weight)  # all scores start at 0, so the loss at ln 2
    steps = math.ceil(cfg.epochs * len(examples) / cfg.batch)
    batches = shuffled(examples, cfg.batch, steps)
    body = {"params": model.base_model.parameters()}
    head = {"params": model.score.parameters(), "lr_scale": 10}  # it is new and starts at 0
    optimizer = make_optimizer([body, head])
    accuracies = []
    bar = tqdm(batches, "2 reward")
    for step, batch in enumerate(bar):
        # as in stage 1; a pair is as long as its longer row
        batch.sort(key=lambda one: len(one.prompt) + max(len(one.chosen), len(one.rejected)))
        total = 0.0
        correct = 0
        for part in parts(batch, cfg.micro_batch):
            chosen_scores, rejected_scores = score_pairs(model, part).unbind(-1)  # (b,), (b,)
            loss = bradley_terry_loss(chosen_scores, rejected_scores)
            loss = loss * len(part) / len(batch)  # this part's share of the mean
            loss.backward()
            total += loss.detach()
            correct += (chosen_scores > rejected_scores).sum()
        total = total.item()
        accuracy = correct.item() / len(batch)
        if step == 0:
            self_check("reward loss starts at ln 2", abs(total - math.log(2)) < 1e-6)
        norm = gradient_step(model, optimizer, learning_rate(cfg.reward_lr, step, steps))
        log(step, {"reward/loss": total, "reward/accuracy": accuracy, "reward/grad_norm": norm})
        accuracies.append(accuracy)
        bar.set_postfix(accuracy=statistics.fmean(accuracies[-50:]))  # as in stage 1


@torch.no_grad()
def set_gain(
    model: PreTrainedModel, policy: PreTrainedModel, prompts: list[list[int]], cfg: Config
) -> float:
    """Rescale the score so that r_1 − r_2 has root mean square 1 on pairs from the SFT policy.

    Then β has a unit: nats are priced in typical differences of reward. Returns the factor.

    - The pairs come from `sample`, one for each prompt, and are scored by `reward_scores`, in
      batches of any size.
    - `model.score.weight` is multiplied by the factor, in place.
    - Raises FloatingPointError, which names --reward-lr, if the root mean square is 0 or not
      finite.
    """
    differences = []
    batches = parts(prompts, AT_ONCE * cfg.micro_batch)
    for batch in tqdm(batches, "  gain   ", leave=False):
        ids, response_mask = sample(policy, batch, 2, cfg.response_tokens)  # (b, 2, T)
        scores = reward_scores(model, ids, response_mask)  # (b, 2)
        # NOTE absolute scores would make the gain, and so each update, depend on δ(x)
        differences.append(scores[:, 0] - scores[:, 1])  # (b,)
    size = torch.cat(differences).square().mean().sqrt().item()
    if not 0 < size < math.inf:
        raise FloatingPointError(f"r_1 − r_2 has size {size}; try another --reward-lr")
    model.score.weight.div_(size)  # the head has no bias
    return 1 / size


# ---- Stage 3: P3O --------------------------------------------------------------------------
def train_policy(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    score: Callable[[Tensor, Tensor], Tensor],
    loss_fn: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    prompts: list[list[int]],
    cfg: Config,
    log: LogStep,
    checkpoint: Path | None = None,
) -> None:
    """Sample a pair for each of cfg.pairs prompts, score it, update on it, discard it; repeat.

    Only `policy` is trained: `reference` and `score` run without gradients. `score` returns
    (B, 2) from ids and response_mask (B, 2, T). `loss_fn` has the arguments and results of
    `p3o_loss`. Both are arguments so that another reward, judge or algorithm can take their place.

    - Iteration t uses the prompts shuffled(prompts, cfg.pairs, cfg.iterations)[t], in any
      order, and the rate learning_rate(cfg.p3o_lr, t, cfg.iterations).
    - Each of cfg.inner_epochs shuffles the pairs and makes one `gradient_step` for each
      cfg.minibatch of them (the last may be fewer), on the gradient of their mean loss,
      accumulated over micro-batches of cfg.micro_batch pairs.
    - `loss_fn` gets cfg's beta, clip and clip_range as keywords.
    - No dropout and no weight decay. Before the first `gradient_step`, `self_check` stops the run
      if the log π that this step's loss was computed from is ROUNDING (1e-3 nats on a CPU) or
      more away from log π_old or log π_ref, on any response of the first minibatch.
    - `sample` and `score` may be called on some of the pairs at a time.
    - log(t, metrics) is called once an iteration. loss_fn's metrics, loss/policy and
      policy/grad_norm are means over all updates, each weighted by its number of pairs. Means
      over the sampled responses: objective/scores, objective/kl (log π_old − log π_ref),
      objective/entropy (−log π_old), response/length in tokens, response/finished (has its EOS).
    - If `checkpoint` exists, training resumes from it. It is saved every CHECKPOINT_EVERY
      iterations.
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

        lr = learning_rate(cfg.p3o_lr, iteration, cfg.iterations)

        # 1. two responses to each prompt, (B, 2, T); from here on, a pair is one row
        batches[iteration].sort(key=len)  # prompts of similar length are sampled together
        ids, response_mask = sample_by_parts(policy, batches[iteration], 2, cfg)

        # 2. what stays fixed during the inner epochs, (B, 2) each. old_logprobs is not kept from
        #    sampling, which rounds differently, so that the ratio starts at 1
        size = cfg.micro_batch
        pairs = list(zip(ids.split(size), response_mask.split(size), strict=True))  # (b, 2, T)
        with torch.no_grad():
            scores = torch.cat([score(*part) for part in pairs])
            old_logprobs = torch.cat([sequence_logprobs(policy, *part) for part in pairs])
            ref_logprobs = torch.cat([sequence_logprobs(reference, *part) for part in pairs])

        # 3. updates, each on one minibatch of pairs
        minibatches = []
        for _ in range(cfg.inner_epochs):
            minibatches += torch.randperm(cfg.pairs).to(ids.device).split(cfg.minibatch)
        new_logprobs = old_logprobs.clone()  # (B, 2), the latest, for the check below
        sums = defaultdict(float)  # of each metric, every pair of every update counted once
        for minibatch in minibatches:
            # in the order of step 1: pairs of similar length share a micro-batch
            for index in minibatch.sort().values.split(cfg.micro_batch):  # (b,): which pairs
                logprobs = sequence_logprobs(policy, ids[index], response_mask[index])  # (b, 2)
                new_logprobs[index] = logprobs.detach()
                loss, metrics = loss_fn(
                    logprobs,
                    old_logprobs[index],
                    ref_logprobs[index],
                    scores[index],
                    beta=cfg.beta,
                    clip=cfg.clip,
                    clip_range=cfg.clip_range,
                )
                # these gradients add up to the gradient of the minibatch's mean loss
                (loss * len(index) / len(minibatch)).backward()
                metrics["loss/policy"] = loss.detach()
                for key, value in metrics.items():
                    sums[key] += value * len(index)
            if not optimizer.state:  # AdamW has none before its first update
                # all pairs against π_ref; this minibatch, computed anew, also against π_old
                drift = new_logprobs - torch.stack([old_logprobs, ref_logprobs])  # (2, B, 2)
                self_check(
                    "ratio = 1 and KL = 0 before the first update", drift.abs().max() < ROUNDING
                )
            norm = gradient_step(policy, optimizer, lr)
            sums["policy/grad_norm"] += norm * len(minibatch)

        # 4. metrics
        row = {key: float(total) / (cfg.inner_epochs * cfg.pairs) for key, total in sums.items()}
        sampled = {
            "objective/scores": scores,
            "objective/kl": old_logprobs - ref_logprobs,
            "objective/entropy": -old_logprobs,
            "response/length": response_mask.sum(-1),
            "response/finished": finished(policy, ids, response_mask),
        }  # (B, 2) each
        row |= {key: values.double().mean().item() for key, values in sampled.items()}
        log(iteration, row)
        bar.set_postfix(score=row["objective/scores"], kl=row["objective/kl"])


# ---- Evaluation on held-out prompts --------------------------------------------------------
@torch.no_grad()
def evaluate(
    cfg: Config,
    sft: PreTrainedModel,
    reward_model: PreTrainedModel,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Let SFT and P3O answer the same held-out prompts, and compare the answers.

    On the shipped data, the better answer is the one with the higher gold reward: the true reward
    of data/judge.py, from whose differences the noisy labels were drawn. On other data, it is the
    one with the higher score of the reward model, which P3O was trained to please. Returns

    - figures: for each figure, a list of its values, one for each held-out pair or prompt,
    - answers: the texts of "sft" and of "policy".
    """
    figures = defaultdict(list)
    gold_is_known = Path(cfg.data).resolve() == SHIPPED_DATA
    size = AT_ONCE * cfg.micro_batch
    for batch in tqdm(parts(examples, size), "  pairs  ", leave=False):
        chosen_scores, rejected_scores = score_pairs(reward_model, batch).unbind(-1)  # (b,), (b,)
        for example, as_labelled in zip(
            batch, (chosen_scores > rejected_scores).tolist(), strict=True
        ):
            figures["reward_accuracy"].append(as_labelled)
            if gold_is_known:
                prompt, chosen, rejected, _ = example.text
                gap = judge.gold_reward(prompt, chosen) - judge.gold_reward(prompt, rejected)
                if gap != 0:
                    figures["reward_gold_agreement"].append(as_labelled == (gap > 0))

    answers = defaultdict(list)
    batches = parts(examples[: cfg.eval_prompts], size)
    for batch in tqdm(batches, "  answers", leave=False):
        prompts = [example.prompt for example in batch]
        for name, model in (("sft", sft), ("policy", policy)):
            ids, response_mask = sample(model, prompts, 1, cfg.response_tokens)  # (b, 1, T)
            logprobs = sequence_logprobs(model, ids, response_mask)  # (b, 1)
            measured = {
                "score": reward_scores(reward_model, ids, response_mask),
                "kl": logprobs - sequence_logprobs(sft, ids, response_mask),  # 0 for sft itself
                "finished": finished(model, ids, response_mask),
            }  # (b, 1) each
            for key, values in measured.items():
                figures[f"{key}_{name}"] += values.flatten().tolist()
            for example, row, mask in zip(batch, ids, response_mask, strict=True):
                answer = tokenizer.decode(row[mask], skip_special_tokens=True)
                answers[name].append(answer)
                if gold_is_known:
                    prompt = example.text.prompt
                    figures[f"gold_{name}"].append(judge.gold_reward(prompt, answer))
                    figures[f"well_formed_{name}"].append(judge.well_formed(prompt, answer))

    judged_by = "gold" if gold_is_known else "score"
    paired = zip(figures[f"{judged_by}_policy"], figures[f"{judged_by}_sft"], strict=True)
    figures["win_rate"] = [(ours > theirs) + 0.5 * (ours == theirs) for ours, theirs in paired]
    return figures, answers


def report(
    figures: dict[str, list[float]], answers: dict[str, list[str]], examples: list[Example]
) -> dict[str, float]:
    """Print the first answers, the figures and the result in words.

    Returns the mean of each figure, and half its 95 % interval as NAME_ci.
    """
    print("\nHeld-out prompts, with the answers of SFT and of the P3O policy and their scores")
    for i in range(len(answers["sft"]))[:5]:
        print(f"\n{examples[i].text.prompt.removesuffix(ASSISTANT).strip()}")
        for name in ("sft", "policy"):
            print(f"  {name:6} {figures[f'score_{name}'][i]:+5.2f}  {answers[name][i].strip()}")

    summary = {}
    print("\nfigure                    mean   95 % interval")
    for name, values in figures.items():
        mean = statistics.fmean(values)
        half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
        print(f"{name:22}{mean:8.3f} ± {half:.3f}")
        summary[name] = mean
        summary[f"{name}_ci"] = half

    by = "its own reward model, which it was trained to please"
    if "gold_policy" in figures:
        by = "the gold judge"
    share = f"{summary['win_rate']:.0%} of {len(answers['policy'])} held-out prompts"
    print(f"\nP3O's answer beats SFT's on {share}, by {by}.")
    return summary


# ---- The run -------------------------------------------------------------------------------
def run(cfg: Config) -> None:
    """Run each stage that is not finished yet, then evaluate."""
    torch.manual_seed(cfg.seed)
    policy, tokenizer = load_base(cfg)
    started = first_start(cfg.out)
    examples, heldout = load_examples(
        cfg.data, tokenizer, cfg.prompt_tokens, cfg.response_tokens, started
    )
    prompts = [example.prompt for example in examples]
    # a chat template may end turns with another EOS
    fit_tokens(policy, tokenizer, cfg.response_tokens)
    with open_out(cfg, policy, [*examples, *heldout], started) as out:
        print(f"{len(examples)} training and {len(heldout)} held-out pairs, on {DEVICE}, in {out}")

        if not (out / "sft").exists():
            seed_stage(cfg, "sft")
            train_sft(policy, examples, cfg, log_to(out / "sft.jsonl"))
            save(out / "sft", policy, tokenizer)
        sft = load(out / "sft")

        if not (out / "reward").exists():
            seed_stage(cfg, "reward")
            reward_model = load(out / "sft", AutoModelForSequenceClassification, num_labels=1)
            train_reward(reward_model, examples, cfg, log_to(out / "reward.jsonl"))
            # the first prompts will do: `load_pairs` shuffles data from the hub
            gain = set_gain(reward_model, sft, prompts[:GAIN_PROMPTS], cfg)
            save(out / "reward", reward_model, tokenizer)
            print(f"  scores × {gain:.3f}: r_1 − r_2 has root mean square 1 on pairs from SFT")
        reward_model = load(out / "reward", AutoModelForSequenceClassification)

        checkpoint = out / "p3o.checkpoint"
        if not (out / "p3o").exists():
            seed_stage(cfg, "p3o")
            policy = load(out / "sft")
            score = partial(reward_scores, reward_model)
            log = log_to(out / "p3o.jsonl")
            train_policy(policy, sft, score, p3o_loss, prompts, cfg, log, checkpoint)
            save(out / "p3o", policy, tokenizer)
        checkpoint.unlink(missing_ok=True)
        policy = load(out / "p3o")

        seed_stage(cfg, "evaluation")
        figures, answers = evaluate(cfg, sft, reward_model, policy, tokenizer, heldout)
        summary = report(figures, answers, heldout)
        with appears_whole(out / "summary.json") as file:
            file.write_text(json.dumps(summary, indent=2))

        print(f"Models, metrics and summary.json are in {out}.")
        asked = heldout[0].text.messages or heldout[0].text.prompt
        print("To use the policy, in Python:\n  from transformers import pipeline")
        print(f"  pipeline('text-generation', '{out / 'p3o'}')({asked!r})")


def seed_stage(cfg: Config, stage: str) -> None:
    """Make a stage's randomness depend on the seed and its name, not on what ran before it."""
    torch.manual_seed(zlib.crc32(f"{cfg.seed} {stage}".encode()))


# ---- The run directory: nothing about RLHF, you may skip to the command line ---------------
@contextlib.contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Write atomically to the path this yields: `path` appears complete or not at all."""
    scratch = path.with_name(path.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
        scratch.replace(path)
    except Exception as error:  # a full disk has a name of its own in each library
        raise OSError(f"cannot write {path}: {error}".splitlines()[0]) from None


@contextlib.contextmanager
def open_out(
    cfg: Config, model: PreTrainedModel, examples: list[Example], started: str
) -> Iterator[Path]:
    """Create the output directory, or accept one that the same options, model and data made.

    Options that do not change the weights may differ, and so may the learning rates of stages
    that are not finished. Raises InputError for any other directory and leaves it as it is, and
    while another run writes to the directory.
    """
    out = Path(cfg.out)
    config = out / "config.json"
    out.mkdir(parents=True, exist_ok=True)
    if not config.exists() and any(out.glob("[!.]*")):
        raise InputError(f"{out} exists and is not a run of p3o.py; choose another --out")
    weights = sum(torch.hash_tensor(weight).item() for weight in model.state_dict().values())
    wanted = asdict(cfg) | dict(started=started, weights=weights, rows=checksum(examples))
    try:
        with FileLock(out / ".lock", blocking=False):
            saved = json.loads(config.read_text()) if config.exists() else wanted
            later_rates = [f"{stage}_lr" for stage in STAGES if not (out / stage).exists()]
            # the same model and rows may have other names
            may_differ = ["out", "model", "data", "micro_batch", "eval_prompts", *later_rates]
            differ = [k for k in wanted if k not in may_differ and wanted[k] != saved.get(k)]
            if differ:
                raise InputError(f"{out} was made with other {', '.join(differ)}; change --out")
            with appears_whole(config) as file:
                file.write_text(json.dumps(wanted, indent=2))
            yield out
    except Timeout:
        raise InputError(f"another run writes to {out}; wait for it or change --out") from None


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with appears_whole(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def load(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """Return the model of a finished stage, in fp32 and in eval mode. Raises InputError."""
    try:
        return kind.from_pretrained(folder, dtype=torch.float32, **options).to(DEVICE)
    except SafetensorError as error:
        raise InputError(f"{folder} is broken ({error}); delete it to repeat the stage") from None


def log_to(path: Path) -> LogStep:
    """Return a function that appends a step's metrics and its seconds to a file, a JSON line each.

    Line t is step t. A stage that resumes repeats the steps since its last checkpoint, so their
    old lines are dropped first.
    """
    path.touch()
    lines = path.read_text().splitlines(keepends=True)
    last = time.perf_counter()

    def log(step: int, metrics: dict[str, float]) -> None:
        nonlocal last
        now = time.perf_counter()
        line = json.dumps({"step": step, **metrics, "seconds": now - last})
        last = now
        if step < len(lines):
            del lines[step:]
            with appears_whole(path) as file:
                file.write_text("".join(lines))
        with path.open("a") as file:
            file.write(f"{line}\n")

    return log


def save_checkpoint(
    path: Path, iteration: int, policy: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> None:
    """Save everything that stage 3 needs to resume as if it had not been stopped."""
    state = iteration, policy.state_dict(), optimizer.state_dict(), torch.get_rng_state()
    with appears_whole(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Restore that state; return the iteration to resume at. Raises InputError."""
    try:
        iteration, weights, moments, generator = torch.load(path, map_location="cpu")
    except Exception:  # of many kinds, by where the file breaks off
        raise InputError(f"{path} is broken; delete it to restart stage 3") from None
    policy.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(generator)  # nothing is drawn on a GPU
    return iteration


# ---- Command line --------------------------------------------------------------------------
def parse_config(argv: list[str]) -> Config:
    """Return the default settings, or those of --small, changed by the other options."""
    what = f"{__doc__.splitlines()[0]} It runs on the first CUDA GPU, else on the CPU."
    parser = HfArgumentParser(Config, description=what, allow_abbrev=False)
    options = parser.parse_args(argv)
    if options.small:
        parser.set_defaults(**SMALL)
        options = parser.parse_args(argv)
    return Config(**vars(options))


def main(argv: list[str]) -> None:
    """Run the command line; expected errors exit with a one-line message and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console may know no ρ
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # exceptions will do
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        cfg = parse_config(argv)
        print(f"loading {cfg.model} and {cfg.data}", flush=True)
        try_hub(cfg.model, cfg.data)
        run(cfg)
    except KeyboardInterrupt:
        sys.exit("p3o.py: interrupted; the same command resumes")
    except torch.OutOfMemoryError:
        sys.exit("p3o.py: out of memory; the same command with a smaller --micro-batch resumes")
    except (InputError, FloatingPointError, OSError) as error:
        sys.exit(f"p3o.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
