"""What several tests share: a model small enough to enumerate, batches made by hand, short runs
of stage 3."""

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import p3o

EOS = 3  # of the toy: a vocabulary of five, responses of at most three tokens
PAD = 4
LONGEST = 3
TOY_PROMPTS = [[0], [1, 2, 0]]


def toy_model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=5,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.6,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config).eval()


def llama(vocab_size: int, **options) -> LlamaForCausalLM:
    """A model with rotary positions, which unlike GPT-2 takes ids (N, T) alone."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def unended(length: int) -> list[list[int]]:
    """All rows of so many of the toy's tokens, none of them EOS."""
    tokens = [token for token in range(5) if token != EOS]
    return [list(row) for row in itertools.product(tokens, repeat=length)]


def every_response() -> list[list[int]]:
    """All 85 responses of the toy: up to and including the first EOS, or cut after three tokens."""
    responses = []
    for length in range(LONGEST):
        responses += [[*row, EOS] for row in unended(length)]
    return responses + unended(LONGEST)


def by_hand(prompts: list[list[int]], responses: list[list[int]], pad: int):
    """ids and response_mask, (N, T), without `collate`: these tests need nothing but torch."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, len(prompts[number]) : len(row)] = True
    return ids, mask


def toy_batch(prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and response_mask, (85, T), of every response to a prompt."""
    responses = every_response()
    return by_hand([prompt] * len(responses), responses, PAD)


def encode(tiny, count: int = 6) -> list[p3o.Example]:
    """The first held-out pairs as token ids."""
    _, _, tokenizer, cfg, pairs = tiny
    return p3o.tokenize(pairs[:count], tokenizer, cfg)


def batch(tiny, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and response_mask of the first chosen responses."""
    examples = encode(tiny, count)
    prompts = [example.prompt for example in examples]
    chosen = [example.chosen for example in examples]
    return by_hand(prompts, chosen, tiny[2].pad_token_id)


def with_nan_elsewhere(model: torch.nn.Module, ids: torch.Tensor, keep: torch.Tensor):
    """Until removed, the model's hidden states for rows of `ids` (N, T), or their beginnings, are
    NaN wherever `keep` (N, T) is False."""

    def kept(row):
        for known, where in zip(ids, keep, strict=True):
            if torch.equal(known[: len(row)], row):
                return where[: len(row)]
        raise AssertionError(f"the model is given a row that is none of the batch: {row.tolist()}")

    def hook(_, arguments, options, output):
        (rows,) = arguments or [options["input_ids"]]
        where = torch.stack([kept(row) for row in rows])
        hidden = output.last_hidden_state
        output.last_hidden_state = torch.where(where[..., None], hidden, math.nan)
        return output

    return model.base_model.register_forward_hook(hook, with_kwargs=True)


def dialogue(*turns: str) -> str:
    """Text as Anthropic HH has it; the human begins."""
    text = ""
    for i, turn in enumerate(turns):
        who = "Assistant" if i % 2 else "Human"
        text += f"\n\n{who}: {turn}"
    return text


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write a JSON line a row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small(**options) -> p3o.Config:
    return p3o.Config(**p3o.SMALL | options)


def nothing(*_, **__) -> None:
    """A log that forgets."""


def length_score(ids, mask):
    """A score: the longer, the better."""
    return mask.sum(-1).float() / 8


def even_share(ids, mask):
    """A score: the share of even token ids."""
    return ((ids % 2 == 0) & mask).sum(-1) / mask.sum(-1)


def run_policy(policy, reference, score: Callable, prompts, cfg, loss_fn: Callable = p3o.p3o_loss):
    """Stage 3 on a copy of `policy`: the copy, its metrics, what the loss saw at each update."""
    trained = copy.deepcopy(policy)
    rows = []
    seen = []

    def log(step, row):
        rows.append(row)

    def spy(logprobs, old_logprobs, ref_logprobs, scores, **options):
        loss, metrics = loss_fn(logprobs, old_logprobs, ref_logprobs, scores, **options)
        update = dict(
            logprobs=logprobs, old=old_logprobs, ref=ref_logprobs, scores=scores, loss=loss
        )
        for key, tensor in update.items():
            update[key] = tensor.detach().clone()
        seen.append(update | {"options": options} | metrics)
        return loss, metrics

    torch.manual_seed(0)
    p3o.train_policy(trained, reference, score, prompts, cfg, log, spy)
    return trained, rows, seen


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Bit by bit."""
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def status(options: list[str]) -> int:
    """Run the command line in this process: its exit status, its message on stderr."""
    try:
        p3o.main(options)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code
    return 0


def train(stage: str, model, reference, examples, cfg, log=nothing, loss_fn=p3o.p3o_loss) -> None:
    """Any of the three stages on the same examples; the third likes even token ids."""
    if stage == "sft":
        p3o.train_sft(model, examples, cfg, log)
    elif stage == "reward":
        p3o.train_reward(model, examples, cfg, log)
    else:
        prompts = [example.prompt for example in examples]
        p3o.train_policy(model, reference, even_share, prompts, cfg, log, loss_fn)


def metrics_of(out: Path, stage: str) -> list[dict]:
    """The metrics of a stage of a finished run, but for their timings."""
    rows = [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """The weights of the three models of a finished run, by stage and name."""
    weights = {}
    for stage, kind in (
        ("sft", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
        ("p3o", AutoModelForCausalLM),
    ):
        for key, value in kind.from_pretrained(out / stage).state_dict().items():
            weights[f"{stage}.{key}"] = value
    return weights
