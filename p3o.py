# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tqdm==4.70.1"]
# ///
"""RLHF with Pairwise Proximal Policy Optimization (P3O, arXiv 2310.00212), in one file, read from top to bottom.

    python p3o.py --small      # a tiny GPT-2 on the data in data/: about a minute on a laptop, no network
    python p3o.py              # GPT-2 (124M) on Anthropic HH, one GPU
    python p3o.py -h           # every option

Three stages, each a function below with its loop in plain sight, x a prompt and y a whole response:

    1  SFT      maximise log π(y|x) = Σ_t log π(y^t | x, y^<t) on the preferred responses              train_sft
    2  reward   minimise −E log σ(r(x, y_w) − r(x, y_l)), Bradley-Terry                                train_reward
    3  P3O      maximise E r − β KL(π‖π_ref) from pairs y_1, y_2 sampled for the same prompt           train_policy

Stage 3 is why this file exists. Bradley-Terry fixes r only up to an offset δ(x): r and r + δ(x) give every preference
the same probability. PPO's update changes with δ(x), sample by sample. P3O's cannot, since r enters it only as r_1 − r_2:

    (1)  h_i = log π(y_i|x) − log π_ref(y_i|x)      ρ_i = π(y_i|x) / π_old(y_i|x)      sg = stop-gradient
    (2)  q = sg[ r_1 − r_2 − β (h_1 − h_2) ]                                           zero for every pair: the optimum
    (3)  ∇J = E ½ q ρ_1 ρ_2 ∇ log( π(y_1|x) / π(y_2|x) )                               the pairwise policy gradient
    (4)  V2, clip="joint":     J = ½ min( q w u, q w clip(u, −ε, ε) )                  u = log(ρ_1/ρ_2)
                                                                                       w = sg[ clip(ρ_1 ρ_2, 1/c, c) ]
    (5)  V1, clip="separate":  J = ½ { min( q sg[ρ̄_2] ρ_1, q sg[ρ̄_2] clip(ρ_1, 1−ε, 1+ε) )
                                     + min( −q sg[ρ̄_1] ρ_2, −q sg[ρ̄_1] clip(ρ_2, 1−ε, 1+ε) ) },  ρ̄ = clip(ρ, 1/c, c)

Left out, on purpose:
    a value network and GAE     the whole response is one action, and the other response of the pair is its baseline
    reward whitening, clipping  anything that reads an absolute score would bring δ(x) back
    a KL term in the loss       q holds it; differentiating log π/π_ref instead has expected gradient zero
    several GPUs, LoRA, vLLM    use TRL when you need them
"""

import time

START = time.perf_counter()  # before the imports: they are a tenth of a small run

import argparse
import json
import math
import os
import runpy
import shutil
import sys
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

IMPORT_SECONDS = time.perf_counter() - START
SHIPPED_DATA = Path(__file__).resolve().parent / "data"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how Anthropic HH marks its turns


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do. Exit status 2."""


class DivergedError(Exception):
    """A loss or gradient that is not finite. Exit status 1."""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: each field is an option of the command line, its help text included.


def option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class Config:
    small: bool = option(False, "a tiny GPT-2 on the shipped data, in about a minute on two cores")
    model: str = option("gpt2", "causal language model: a hub name, a directory, or 'tiny' to build one")
    data: str = option("Anthropic/hh-rlhf", "preference pairs: a hub name, a .jsonl file or a directory")
    out: str = option("runs/gpt2", "directory for models and metrics; run again to resume")
    seed: int = option(0, "fixes data order, samples and fresh weights", least=0)
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the best there is")
    clip: str = option("joint", "joint (V2), separate (V1) or none", choices=("joint", "separate", "none"))
    beta: float = option(0.05, "price of KL to the SFT model, in reward per nat", least=0)
    clip_range: float = option(0.2, "ε: how far a log-ratio may move in one iteration", above=0)
    ratio_bound: float = option(10.0, "c: importance weights are kept in [1/c, c]", least=1)
    prompt_tokens: int = option(384, "longer prompts lose their beginning", least=1)
    response_tokens: int = option(128, "longest response", least=1)
    sft_epochs: int = option(1, "stage 1: passes over the preferred responses", least=1)
    sft_batch: int = option(32, "stage 1: responses per update", least=1)
    sft_lr: float = option(5e-5, "stage 1: peak learning rate", least=0)
    reward_epochs: int = option(1, "stage 2: passes over the pairs", least=1)
    reward_batch: int = option(32, "stage 2: pairs per update", least=1)
    reward_lr: float = option(2e-5, "stage 2: peak learning rate", least=0)
    iterations: int = option(1000, "stage 3: rounds of sampling and updating", least=1)
    pairs: int = option(128, "stage 3: prompts per iteration, two responses each", least=1)
    minibatch: int = option(16, "stage 3: pairs per update", least=1)
    inner_epochs: int = option(4, "stage 3: passes over each iteration's pairs", least=1)
    lr: float = option(2e-6, "stage 3: peak learning rate", least=0)
    eval_prompts: int = option(512, "held-out prompts that SFT and P3O answer at the end", least=2)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata
            name = "--" + f.name.replace("_", "-")
            if f.type in (int, float) and not math.isfinite(value):
                raise UserError(f"{name} must be finite, not {value}")
            if "choices" in rule and value not in rule["choices"]:
                raise UserError(f"{name} must be one of {', '.join(rule['choices'])}, not {value!r}")
            if "least" in rule and value < rule["least"]:
                raise UserError(f"{name} must be at least {rule['least']}, not {value}")
            if "above" in rule and value <= rule["above"]:
                raise UserError(f"{name} must be above {rule['above']}, not {value}")


SMALL: dict[str, Any] = dict(small=True, model="tiny", data=str(SHIPPED_DATA), out="runs/small", beta=0.05)
SMALL |= dict(prompt_tokens=32, response_tokens=40, sft_epochs=2, sft_batch=32, sft_lr=5e-3)
SMALL |= dict(reward_epochs=2, reward_batch=32, reward_lr=2e-3)
SMALL |= dict(iterations=60, pairs=64, minibatch=32, inner_epochs=2, lr=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Data: preference pairs as text, then as token ids.


class Pair(NamedTuple):
    """One preference, as text (str) or as token ids (list[int]): both responses follow the same prompt."""

    prompt: Any
    chosen: Any
    rejected: Any


def split_dialogues(chosen: str, rejected: str) -> Pair | str:
    """Split two Anthropic-HH dialogues after their last shared "Assistant:", or say why the row cannot be used."""
    shared = os.path.commonprefix([chosen, rejected])
    cut = shared.rfind(ASSISTANT) + len(ASSISTANT)
    pair = Pair(chosen[:cut], chosen[cut:], rejected[cut:])
    if ASSISTANT not in shared:
        return "no shared prompt"
    if HUMAN in pair.chosen or HUMAN in pair.rejected:
        return "prompts differ"
    if not pair.chosen.strip() or not pair.rejected.strip():
        return "empty response"
    return "responses are equal" if pair.chosen == pair.rejected else pair


def load_rows(source: str) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows from a directory (train.jsonl, heldout.jsonl), a .jsonl file or the hub: training, and held-out if any."""
    path = Path(source)
    if path.is_dir():
        return load_rows(str(path / "train.jsonl"))[0], load_rows(str(path / "heldout.jsonl"))[0]
    if path.is_file():
        try:
            return datasets.load_dataset("json", data_files=source, split="train"), None
        except Exception as error:  # datasets wraps whatever its reader raises
            try:
                for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                    if line.strip() and not isinstance(json.loads(line), dict):
                        raise UserError(f"{source}, line {number}: not a JSON object") from None
            except json.JSONDecodeError as reason:
                raise UserError(f"{source}, line {number}: invalid JSON ({reason.msg})") from None
            except (OSError, UnicodeDecodeError) as reason:
                raise UserError(f"{source}: cannot be read ({reason})") from None
            raise UserError(f"{source}: no rows that can be read ({type(error).__name__})") from None
    if path.suffix or source.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such file or directory; --data takes a file, a directory or a hub name")
    try:
        splits = datasets.load_dataset(source)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load {source!r} from the hub ({reason}); --small needs no network") from None
    return splits["train"], splits.get("test")


def load_pairs(source: str) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs of text. Without a held-out part, every tenth prompt (not row) is held out."""
    train, heldout = (usable_pairs(rows, source) for rows in load_rows(source))
    if not heldout:
        heldout = [pair for pair in train if zlib.crc32(pair.prompt.encode()) % 10 == 0]
        train = [pair for pair in train if zlib.crc32(pair.prompt.encode()) % 10 != 0]
    if not train or not heldout:
        raise UserError(f"{source}: no usable pair to {'train on' if not train else 'hold out'}; it needs more rows")
    return train, heldout


def usable_pairs(rows: datasets.Dataset | None, source: str) -> list[Pair]:
    """Split every row; count and report those that cannot be used."""
    if rows is None:
        return []
    pairs, dropped = [], Counter()
    for number, row in enumerate(rows, 1):
        for key in ("chosen", "rejected"):
            if not isinstance(row.get(key), str):
                raise UserError(f"{source}, row {number}: no text under {key!r}; each row needs chosen and rejected")
        pair = split_dialogues(row["chosen"], row["rejected"])
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            dropped[pair] += 1
    for reason, count in dropped.items():
        print(f"  {source}: {count} of {len(rows)} rows dropped: {reason}")
    if not pairs:
        raise UserError(f"{source}: no usable row; a row's two dialogues must share a prompt and differ after it")
    return pairs


def tokenize(pairs: list[Pair], tokenizer: Any, cfg: Config) -> list[Pair]:
    """Text to ids, the one place where it happens, so every stage sees the same ids for the same text.

    Prompts keep their end. A response ends with EOS unless it was cut: no EOS is forged.
    """
    eos = [tokenizer.eos_token_id]
    prompts, chosen, rejected = (tokenizer(list(texts))["input_ids"] for texts in zip(*pairs, strict=True))
    examples = [
        Pair(p[-cfg.prompt_tokens :], (c + eos)[: cfg.response_tokens], (r + eos)[: cfg.response_tokens])
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]
    different = [example for example in examples if example.chosen != example.rejected]
    if len(different) < len(examples):
        print(f"  {len(examples) - len(different)} pairs dropped: equal after {cfg.response_tokens} tokens")
    return different


def collate(prompts: list[list[int]], responses: list[list[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Prompt + response, right-padded: ids (N, T) and response_mask (N, T), which is True from first token to EOS."""
    T = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), T), model.config.pad_token_id)  # (N, T)
    response_mask = torch.zeros_like(ids, dtype=torch.bool)  # (N, T)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        # NOTE from positions, not from ids != pad: with pad = EOS, a mask from ids would hide the EOS action
        response_mask[i, len(p) : len(p) + len(r)] = True
    return ids.to(model.device), response_mask.to(model.device)


def batches(n: int, size: int) -> Iterator[Tensor]:
    """Endless index batches, reshuffled after each pass over n items."""
    while True:
        yield from torch.randperm(n).split(size)


# ---------------------------------------------------------------------------------------------------------------------
# Models: sampling, log-probabilities, scores.


def build_tiny(texts: list[str], cfg: Config) -> tuple[PreTrainedModel, Any]:
    """GPT-2's architecture at 2 layers of width 64 with fresh weights, and a byte-level BPE trained on the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<|endoftext|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|pad|>")
    tokenizer.add_tokens([HUMAN, ASSISTANT])  # one token a marker, as chat templates have it
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=cfg.prompt_tokens + cfg.response_tokens,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.06,  # GPT-2's 0.02 is for width 768
        activation_function="relu",  # GELU would take a third of the time at this size
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config), tokenizer


def load_base(cfg: Config, train: list[Pair]) -> tuple[PreTrainedModel, Any]:
    """The model that SFT starts from. EOS and padding are different tokens, and both are in the vocabulary."""
    if cfg.model == "tiny":
        return build_tiny([pair.prompt + text for pair in train for text in pair[1:]], cfg)
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load the model {cfg.model!r} ({reason}); --small needs no network") from None
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    if cfg.prompt_tokens + cfg.response_tokens > positions:
        raise UserError(
            f"--prompt-tokens {cfg.prompt_tokens} and --response-tokens {cfg.response_tokens} do not fit in the "
            f"{positions} positions of {cfg.model!r}"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # NOTE with pad = EOS the library's classifier takes EOS for padding and reads the score one token early
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: list[list[int]], n: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Draw n independent responses a prompt from the model's own distribution.

    Returns ids (B, n, T) and response_mask (B, n, T), right-padded like `collate`; the mask ends with the first EOS.
    """
    P, eos, pad = max(map(len, prompts)), model.config.eos_token_id, model.config.pad_token_id
    left = torch.tensor([[P - len(p)] for p in prompts], device=model.device)  # (B, 1): padding before each prompt
    out = model.generate(
        torch.tensor([[pad] * (P - len(p)) + p for p in prompts], device=model.device),  # (B, P)
        attention_mask=(torch.arange(P, device=model.device) >= left).long(),
        max_new_tokens=max_tokens,
        num_return_sequences=n,
        do_sample=True,
        # NOTE explicit: the library's default top_k = 50 samples from another distribution than the one we score
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        eos_token_id=eos,
        pad_token_id=pad,
    )  # (B·n, P + R)
    ended_before = (out[:, P:] == eos).cumsum(1) - (out[:, P:] == eos).long()  # (B·n, R): number of EOS so far
    mask = F.pad(ended_before == 0, (P, 0), value=False)  # (B·n, P + R)
    shift = torch.arange(out.shape[1], device=out.device) + left.repeat_interleave(n, 0)  # (B·n, P + R)
    rolled = shift % out.shape[1]  # moves each row's left padding to its right end
    ids, mask = out.gather(1, rolled), mask.gather(1, rolled)
    return ids.view(len(prompts), n, -1), mask.view(len(prompts), n, -1)


def response_logprobs(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """log π(y^t | x, y^<t) of each response token in nats, 0 elsewhere: (…, T−1) from ids and mask (…, T).

    Column t belongs to token t+1, since no token predicts the first; sum over the last axis for log π(y|x).

    No attention mask: padding stands on the right, where a causal model never looks, and positions count from 0.
    """
    flat, targets = ids.flatten(0, -2), response_mask.flatten(0, -2)[:, 1:]  # (N, T), (N, T−1)
    hidden = model.base_model(flat).last_hidden_state[:, :-1]  # (N, T−1, D): position t−1 predicts token t
    # only response positions meet the vocabulary; log-softmax in fp32 whatever the model computes in
    logits = model.get_output_embeddings()(hidden[targets]).float()  # (n, V)
    picked = -F.cross_entropy(logits, flat[:, 1:][targets], reduction="none")  # (n,)
    return torch.zeros(targets.shape, device=ids.device).masked_scatter(targets, picked).view(*ids.shape[:-1], -1)


def reward_scores(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """r(x, y), one score a response, read at its last token, EOS included: (…) from ids and mask (…, T)."""
    hidden = model.base_model(ids.flatten(0, -2)).last_hidden_state  # (N, T, D)
    positions = torch.arange(ids.shape[-1], device=ids.device)  # (T,)
    last = (positions * response_mask.flatten(0, -2)).argmax(-1, keepdim=True)  # (N, 1): the last True
    return model.score(hidden.take_along_dim(last[..., None], 1)).float().view(ids.shape[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# The two losses: tensors in, tensors out.


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Mean −log σ(r_w − r_l) over pairs (B,), (B,) → scalar, in nats (Bradley & Terry 1952).

    >>> bradley_terry_loss(torch.zeros(3), torch.zeros(3))  # ln 2: no preference yet
    tensor(0.6931)
    >>> bradley_terry_loss(torch.tensor([2.0]) + 100, torch.tensor([1.0]) + 100)  # blind to an offset
    tensor(0.3133)
    """
    return -F.logsigmoid(chosen_scores - rejected_scores).mean()  # NOTE log(sigmoid(−200)) is −inf, logsigmoid is −200


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
    """The loss to minimise, −J of equations (4) and (5), mean over pairs, and metrics (P3O paper, section 4.2).

    Each argument is (B, 2): log π(y|x) in nats summed over the response, under the current, the sampling and the
    reference policy, and the scores r(x, y). Only `logprobs` receives gradient. `clip`: "joint" (V2), "separate" (V1) or
    "none", whose gradient is exactly that of E r − β KL(π‖π_ref), by importance sampling, wherever the policy is.

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
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)  # (B, 2)
        objective = 0.5 * torch.minimum(advantage * ratio, advantage * clipped).sum(-1)  # (B,)
        stopped = torch.where(advantage > 0, ratio > 1 + clip_range, (advantage < 0) & (ratio < 1 - clip_range))  # (B, 2)
    else:
        weight = log_ratio.sum(-1).exp().detach()  # (B,): ρ_1 ρ_2
        if clip == "joint":  # V2, eq. (4): both responses are stopped together
            weight = weight.clamp(1 / ratio_bound, ratio_bound)
            objective = 0.5 * torch.minimum(q * weight * u, q * weight * u.clamp(-clip_range, clip_range))  # (B,)
            stopped = torch.where(q > 0, u > clip_range, (q < 0) & (u < -clip_range))  # (B,)
        else:  # eq. (3)
            objective = 0.5 * q * weight * u  # (B,)
            stopped = torch.zeros_like(q)
    metrics = {
        "policy/clipfrac": stopped.float().mean(),
        "policy/approxkl": (0.5 * log_ratio.detach() ** 2).mean(),
        "policy/ratio": log_ratio.detach().exp().mean(),
        "objective/q": q.abs().mean(),
    }
    return -objective.mean(), metrics


# ---------------------------------------------------------------------------------------------------------------------
# The three stages.


def make_optimizer(groups: list[dict[str, Any]], steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW on parameter groups with their own learning rates, and its schedule: 5 % warm-up, then linearly to 0."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, math.ceil(0.05 * steps), steps)


def gradient_step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: Any) -> float:
    """One update; returns the gradient norm before clipping. Raises DivergedError before a bad update."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0).item()
    if not math.isfinite(norm + loss.item()):
        raise DivergedError(f"loss {loss.item()} and gradient norm {norm} must be finite; try a lower learning rate")
    optimizer.step()
    schedule.step()
    return norm


def self_check(claim: str, holds: bool) -> None:
    tqdm.write(f"  check: {claim}: {'ok' if holds else 'FAILED'}")
    if not holds:
        raise AssertionError(claim)


def train_sft(policy: PreTrainedModel, examples: list[Pair], cfg: Config, log: Callable[..., None]) -> None:
    """Stage 1: maximum likelihood on the preferred responses, mean over response tokens."""
    policy.eval()  # NOTE dropout off here and in every stage: with it on, ratios differ from 1 before any update
    steps = cfg.sft_epochs * math.ceil(len(examples) / cfg.sft_batch)
    optimizer, schedule = make_optimizer([{"params": policy.parameters(), "lr": cfg.sft_lr}], steps)
    bar = tqdm(islice(batches(len(examples), cfg.sft_batch), steps), "1 SFT   ", steps)
    for step, batch in enumerate(bar):
        prompts, chosen, _ = zip(*(examples[i] for i in batch), strict=True)
        ids, response_mask = collate(prompts, chosen, policy)  # (B, T)
        loss = -response_logprobs(policy, ids, response_mask).sum() / response_mask.sum()
        norm = gradient_step(loss, optimizer, schedule)
        log(step, **{"sft/loss": loss.item(), "sft/grad_norm": norm})
        bar.set_postfix(loss=f"{loss.item():.3f}")


def train_reward(model: PreTrainedModel, examples: list[Pair], cfg: Config, log: Callable[..., None]) -> None:
    """Stage 2: Bradley-Terry on the preference pairs."""
    model.eval()
    torch.nn.init.zeros_(model.score.weight)  # every score starts at 0, so the loss starts at ln 2
    steps = cfg.reward_epochs * math.ceil(len(examples) / cfg.reward_batch)
    groups = [{"params": model.base_model.parameters(), "lr": cfg.reward_lr}]
    groups += [{"params": model.score.parameters(), "lr": 10 * cfg.reward_lr}]  # the fresh head has further to go
    optimizer, schedule = make_optimizer(groups, steps)
    bar = tqdm(islice(batches(len(examples), cfg.reward_batch), steps), "2 reward", steps)
    for step, batch in enumerate(bar):
        rows = [examples[i] for i in batch]
        scores = score_pairs(model, rows)  # (B, 2): chosen, rejected
        loss = bradley_terry_loss(scores[:, 0], scores[:, 1])
        if step == 0:
            self_check("reward loss starts at ln 2", abs(loss.item() - math.log(2)) < 1e-6)
        norm = gradient_step(loss, optimizer, schedule)
        margin = scores.detach()[:, 0] - scores.detach()[:, 1]  # (B,)
        accuracy = (margin > 0).float().mean().item()
        log(step, **{"reward/loss": loss.item(), "reward/accuracy": accuracy, "reward/margin": margin.mean().item()}
            | {"reward/grad_norm": norm})
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.2f}")


def score_pairs(model: PreTrainedModel, rows: list[Pair]) -> Tensor:
    """Scores (B, 2) of chosen and rejected."""
    prompts, responses = [row.prompt for row in rows for _ in (0, 1)], [text for row in rows for text in row[1:]]
    ids, response_mask = collate(prompts, responses, model)  # (2B, T)
    return reward_scores(model, ids, response_mask).view(-1, 2)


@torch.no_grad()
def set_gain(model: PreTrainedModel, policy: PreTrainedModel, prompts: list[list[int]], cfg: Config) -> float:
    """Scale the score head, once, so that r_1 − r_2 has root mean square 1 on pairs from SFT: β then means something.

    NOTE from differences: a gain from absolute scores would depend on δ(x), and so would the update.
    """
    ids, response_mask = sample(policy, prompts, 2, cfg.response_tokens)  # (B, 2, T)
    scores = reward_scores(model, ids, response_mask)  # (B, 2)
    gain = 1 / (scores[:, 0] - scores[:, 1]).square().mean().sqrt().item()
    model.score.weight.mul_(gain)
    return gain


def train_policy(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    score: Callable[[Tensor, Tensor], Tensor],
    prompts: list[list[int]],
    cfg: Config,
    log: Callable[..., None],
    loss_fn: Callable[..., tuple[Tensor, dict[str, Tensor]]] = p3o_loss,
) -> None:
    """Stage 3: sample pairs, score them, a few epochs of updates on them, throw them away, sample again.

    `score` maps ids and response_mask (B, 2, T) to scores (B, 2).
    """
    policy.eval()
    reference.requires_grad_(False)
    clipping = dict(clip=cfg.clip, clip_range=cfg.clip_range, ratio_bound=cfg.ratio_bound)
    steps = cfg.iterations * cfg.inner_epochs * math.ceil(min(cfg.pairs, len(prompts)) / cfg.minibatch)
    optimizer, schedule = make_optimizer([{"params": policy.parameters(), "lr": cfg.lr, "weight_decay": 0.0}], steps)
    bar = tqdm(islice(batches(len(prompts), cfg.pairs), cfg.iterations), "3 P3O   ", cfg.iterations)
    for iteration, batch in enumerate(bar):
        # 1. two responses to each prompt; the pair stays together, (B, 2, …), from here to the loss
        ids, response_mask = sample(policy, [prompts[i] for i in batch], 2, cfg.response_tokens)  # (B, 2, T)
        # 2. what does not change during the inner epochs
        with torch.no_grad():
            scores = score(ids, response_mask)  # (B, 2)
            chunks = [torch.arange(len(batch)).split(cfg.minibatch)][0]
            old_logprobs, ref_logprobs = (
                torch.cat([response_logprobs(model, ids[c], response_mask[c]).sum(-1) for c in chunks])
                for model in (policy, reference)
            )  # (B, 2)
        # 3. updates on minibatches of pairs
        updates: list[dict[str, Tensor | float]] = []
        for _ in range(cfg.inner_epochs):
            for pairs in torch.randperm(len(batch)).split(cfg.minibatch):
                logprobs = response_logprobs(policy, ids[pairs], response_mask[pairs]).sum(-1)  # (b, 2)
                loss, metrics = loss_fn(
                    logprobs, old_logprobs[pairs], ref_logprobs[pairs], scores[pairs], beta=cfg.beta, **clipping
                )
                if iteration == 0 and not updates:
                    drift = (logprobs - old_logprobs[pairs]).abs().max().item()
                    self_check(f"ratio = 1 before the first update (|log ρ| ≤ {drift:.0e})", drift < 1e-4)
                    drift = (logprobs - ref_logprobs[pairs]).abs().max().item()
                    self_check(f"KL = 0 before the first update (|h| ≤ {drift:.0e})", drift < 1e-4)
                norm = gradient_step(loss, optimizer, schedule)
                updates.append(metrics | {"loss/policy": loss.detach(), "policy/grad_norm": norm})
        # 4. metrics
        row = {
            "objective/scores": scores.mean(),
            "objective/score_gap": (scores[:, 0] - scores[:, 1]).abs().mean(),
            "objective/kl": (old_logprobs - ref_logprobs).mean(),
            "objective/entropy": -old_logprobs.mean(),
            "response/length": response_mask.sum(-1).float().mean(),
            "response/finished": finished(ids, response_mask, policy).float().mean(),
        } | {key: sum(update[key] for update in updates) / len(updates) for key in updates[0]}
        row = {key: float(value) for key, value in row.items()}
        log(iteration, **row)
        shown = {"score": "objective/scores", "kl": "objective/kl", "clipfrac": "policy/clipfrac"}
        bar.set_postfix({name: f"{row[key]:.2f}" for name, key in shown.items()})


def finished(ids: Tensor, response_mask: Tensor, model: PreTrainedModel) -> Tensor:
    """Whether each response (…) of ids, mask (…, T) ended with EOS by itself."""
    return ((ids == model.config.eos_token_id) & response_mask).any(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation on held-out prompts.


def mean_ci(values: Tensor) -> tuple[float, list[float]]:
    """Mean and 95 % normal interval of a sample (N,)."""
    mean, half = values.float().mean().item(), 1.96 * values.float().std().item() / math.sqrt(len(values))
    return mean, [mean - half, mean + half]


@torch.no_grad()
def evaluate(
    cfg: Config, sft: PreTrainedModel, reward_model: PreTrainedModel, policy: PreTrainedModel, tokenizer: Any, pairs: list
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """SFT and P3O answer the same held-out prompts, once each. Returns the figures and one row per prompt.

    The judge is the gold reward where the data has one, else the reward model itself (which the policy was trained on).
    """
    judge = runpy.run_path(str(SHIPPED_DATA / "judge.py")) if Path(cfg.data).resolve() == SHIPPED_DATA else {}
    examples, chunk = tokenize(pairs, tokenizer, cfg), cfg.pairs

    def text(ids: Any) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    scores = torch.cat([score_pairs(reward_model, examples[i : i + chunk]) for i in range(0, len(examples), chunk)]).cpu()
    agrees = scores[:, 0] > scores[:, 1]  # (N,)
    figures = {"reward_accuracy": agrees, "reward_gold_agreement": None, "gold_sft": None, "gold_policy": None}
    if judge:
        gold = torch.tensor([[judge["gold_reward"](text(p), text(y)) for y in (c, r)] for p, c, r in examples])  # (N, 2)
        figures["reward_gold_agreement"] = (agrees == (gold[:, 0] > gold[:, 1]))[gold[:, 0] != gold[:, 1]]
    prompts = [example.prompt for example in examples][: cfg.eval_prompts]
    table: list[dict[str, Any]] = []
    for i in range(0, len(prompts), chunk):
        batch = prompts[i : i + chunk]
        rows = [{"prompt": text(prompt)} for prompt in batch]
        for name, model in (("sft", sft), ("policy", policy)):
            ids, response_mask = sample(model, batch, 1, cfg.response_tokens)  # (B, 1, T)
            h = response_logprobs(model, ids, response_mask) - response_logprobs(sft, ids, response_mask)  # (B, 1, T−1)
            score, done = reward_scores(reward_model, ids, response_mask), finished(ids, response_mask, model)  # (B, 1)
            for j, row in enumerate(rows):
                row[name] = text(ids[j, 0, response_mask[j, 0]])
                row[f"score_{name}"] = score[j].item()
                row[f"kl_{name}"], row[f"finished_{name}"] = h[j].sum().item(), done[j].item()
                if judge:
                    row[f"gold_{name}"] = judge["gold_reward"](row["prompt"], row[name])
                    row[f"well_formed_{name}"] = judge["well_formed"](row[name])
        table += rows
    by = "gold" if judge else "score"
    wins = [(row[f"{by}_policy"] > row[f"{by}_sft"]) + 0.5 * (row[f"{by}_policy"] == row[f"{by}_sft"]) for row in table]
    columns = {key: [row[key] for row in table] for key in table[0] if not isinstance(table[0][key], str)}
    figures |= {"win_rate": wins, "kl": columns.pop("kl_policy"), "finished_fraction": columns["finished_policy"]} | columns
    summary: dict[str, Any] = {"judge": "gold reward" if judge else "reward model"}
    for name, values in figures.items():
        summary[name] = None
        if values is not None:
            summary[name], summary[f"{name}_ci"] = mean_ci(torch.as_tensor(values))
    return summary, table


def show(summary: dict[str, Any], table: list[dict[str, Any]]) -> None:
    """A few answers before and after, then the figures with their 95 % intervals."""
    print("\nHeld-out prompts, SFT's answer and P3O's (score of the reward model, gold reward):")
    for row in list({row["prompt"]: row for row in table}.values())[:5]:
        print("\n" + textwrap.shorten(row["prompt"].removesuffix(ASSISTANT.strip()).strip(), 110))
        for label, name in (("SFT", "sft"), ("P3O", "policy")):
            gold = f"{row[f'gold_{name}']:+5.1f}" if f"gold_{name}" in row else ""
            print(f"  {label} {row[f'score_{name}']:+5.2f} {gold}  {textwrap.shorten(row[name], 90)}")
    print(f"\n{'figure':32}{'mean':>8}   95 % interval")
    for name, value in summary.items():
        if f"{name}_ci" in summary:
            low, high = summary[f"{name}_ci"]
            print(f"{name:32}{value:8.3f}   {low:.3f} to {high:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# The run: one directory, one folder a finished stage.


def run_stage(cfg: Config, name: str, train: Callable[[Path, Callable[..., None]], None]) -> Path:
    """Run `train(folder, log)` and rename its folder into place at the end; skip it if that was done before.

    A stage depends on its seed, the configuration and the folders of earlier stages alone, so a run that was killed ends
    in the same weights as one that was not.
    """
    done, partial, metrics = (Path(cfg.out) / part for part in (name, f"{name}.partial", "metrics.jsonl"))
    if done.exists():
        print(f"{name}: done before, in {done}")
        return done
    # forget what a killed run left of this stage; its last line may be torn
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    write_atomically(metrics, "".join(line for line in lines if not line.startswith(f'{{"stage": "{name}"')))
    shutil.rmtree(partial, ignore_errors=True)
    torch.manual_seed(zlib.crc32(f"{cfg.seed} {name}".encode()))
    start = time.perf_counter()
    with metrics.open("a", buffering=1) as file:  # line by line, so that a run can be watched

        def log(step: int, **values: float) -> None:
            seconds = round(time.perf_counter() - start, 3)
            file.write(json.dumps({"stage": name, "step": step} | values | {"seconds": seconds}) + "\n")

        train(partial, log)
    partial.rename(done)
    return done


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def open_out(cfg: Config, pairs: Any) -> Path:
    """Make the output directory, or accept it if this very configuration on this very data made it."""
    out = Path(cfg.out)
    mine = json.loads(json.dumps(asdict(cfg) | {"data_crc": zlib.crc32(repr(pairs).encode())}))
    del mine["out"]
    if (out / "config.json").exists():
        theirs = json.loads((out / "config.json").read_text())
        if differ := [f"{key} {theirs.get(key)} → {mine[key]}" for key in mine if theirs.get(key) != mine[key]]:
            raise UserError(f"{out} was made with another configuration ({', '.join(differ)}); choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and no run of p3o.py made it; choose another --out")
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / "config.json", json.dumps(mine, indent=2))
        except OSError as error:
            raise UserError(f"cannot write to --out {out} ({error.strerror})") from None
    return out


def run(cfg: Config) -> None:
    train_pairs, heldout_pairs = load_pairs(cfg.data)
    out = open_out(cfg, (train_pairs, heldout_pairs))
    print(f"{len(train_pairs)} training and {len(heldout_pairs)} held-out pairs, on {cfg.device}, in {out}")

    def load(path: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
        return kind.from_pretrained(path, dtype=torch.float32, **options).to(cfg.device)  # in eval mode

    def sft(folder: Path, log: Callable[..., None]) -> None:
        policy, tokenizer = load_base(cfg, train_pairs)
        train_sft(policy.to(cfg.device), tokenize(train_pairs, tokenizer, cfg), cfg, log)
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    sft_dir = run_stage(cfg, "sft", sft)
    tokenizer = AutoTokenizer.from_pretrained(sft_dir)
    examples = tokenize(train_pairs, tokenizer, cfg)
    prompts = [example.prompt for example in examples]

    def reward(folder: Path, log: Callable[..., None]) -> None:
        model = load(sft_dir, AutoModelForSequenceClassification, num_labels=1)
        train_reward(model, examples, cfg, log)
        gain = set_gain(model, load(sft_dir), prompts[: cfg.eval_prompts], cfg)
        print(f"  gain: scores × {gain:.3f}, so that r_1 − r_2 has root mean square 1 on SFT's pairs")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    reward_dir = run_stage(cfg, "reward", reward)

    def p3o(folder: Path, log: Callable[..., None]) -> None:
        policy, reference = load(sft_dir), load(sft_dir)
        reward_model = load(reward_dir, AutoModelForSequenceClassification).requires_grad_(False)
        train_policy(policy, reference, lambda ids, mask: reward_scores(reward_model, ids, mask), prompts, cfg, log)
        for model, saved in ((reference, load(sft_dir)), (reward_model, load(reward_dir, type(reward_model)))):
            same = all(map(torch.equal, model.state_dict().values(), saved.state_dict().values()))
            self_check(f"{'reference' if model is reference else 'reward model'} bit-equal at the end", same)
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    policy_dir = run_stage(cfg, "policy", p3o)

    start = time.perf_counter()
    torch.manual_seed(zlib.crc32(f"{cfg.seed} eval".encode()))
    reward_model = load(reward_dir, AutoModelForSequenceClassification)
    summary, table = evaluate(cfg, load(sft_dir), reward_model, load(policy_dir), tokenizer, heldout_pairs)
    show(summary, table)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    seconds = {"import": IMPORT_SECONDS} | {row["stage"]: row["seconds"] for row in rows}  # each stage's last row
    seconds["p3o"] = seconds.pop("policy")
    seconds |= {"eval": time.perf_counter() - start, "total": time.perf_counter() - START}
    summary |= {"seconds": {key: round(value, 2) for key, value in seconds.items()}}
    summary |= {"seed": cfg.seed, "config": asdict(cfg)}
    write_atomically(out / "summary.json", json.dumps(summary, indent=2))
    print("seconds: " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()))
    print(f"models, metrics.jsonl and summary.json are in {out}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line.


def parse_config(argv: list[str]) -> Config:
    """The configuration from the command line: a preset, then what the options say. Raises UserError."""
    preset = Config(**SMALL) if "--small" in argv else Config()
    parser = argparse.ArgumentParser(
        prog="p3o.py", usage="python p3o.py [--small] [options]", allow_abbrev=False, description=__doc__.split("\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=110),
    )  # fmt: skip

    def fail(message: str) -> None:
        raise UserError(f"{message}; python p3o.py -h lists the options")

    parser.error = fail
    for f in fields(Config):
        default, name = getattr(preset, f.name), "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=f.metadata["help"])
        else:
            parser.add_argument(name, type=f.type, default=default, metavar="X", help=f"{f.metadata['help']} ({default})")
    cfg = Config(**vars(parser.parse_args(argv)))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    cfg.device = str(accelerator) if cfg.device == "auto" else cfg.device
    try:
        torch.zeros(1, device=cfg.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {cfg.device} is not to be had here: {str(error).splitlines()[0]}") from None
    return cfg


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 diverged, 2 bad input, 130 interrupted."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        run(parse_config(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"p3o.py: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"p3o.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("p3o.py: interrupted; finished stages are kept, and the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
