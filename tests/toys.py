"""What several tests share: a model small enough to enumerate, batches made by hand, short runs."""

import copy
import itertools
import json
import math
import string
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from expected import by_hand
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import p3o
from data import preferences

EOS = 3  # of the toy: five tokens, responses of at most three
PAD = 4
LONGEST = 3
TOY_PROMPTS = [[0], [1, 2, 0]]


# ---- Models --------------------------------------------------------------------------------
def toy_model(seed: int, vocab_size: int = 5) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
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
    """Return a model with rotary positions. Unlike GPT-2, it takes ids only as (N, T)."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Compare bit by bit."""
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# ---- Tokenizers ----------------------------------------------------------------------------
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def letters(
    template: str | dict | None = None,
    *,
    merges: tuple = (),
    tokens: tuple = ("<|im_start|>", "<|im_end|>"),
    leading: str = "",
    metaspace: bool = False,
    **special: str,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each letter, each of `merges`, `tokens` and `special`.

    It puts `leading` before a text. With `metaspace` it puts a space there, too, and knows no
    space inside of a text from it, as SentencePiece does.
    """
    known = [*(string.printable + "▁" if metaspace else pre_tokenizers.ByteLevel.alphabet())]
    known = sorted(known) + ["".join(merge) for merge in merges]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, list(merges)))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    special = {name: token for name, token in ({"eos_token": "<eos>"} | special).items() if token}
    backend.add_special_tokens([*special.values(), *tokens])
    if leading:
        ids = [(leading, backend.token_to_id(leading))]
        backend.post_processor = TemplateProcessing(f"{leading} $A", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


# ---- Batches -------------------------------------------------------------------------------
def unended(length: int) -> list[list[int]]:
    """Return all rows of `length` tokens of the toy that hold no EOS."""
    tokens = [token for token in range(5) if token != EOS]
    return [list(row) for row in itertools.product(tokens, repeat=length)]


def every_response() -> list[list[int]]:
    """Return the toy's 85 responses: up to the first EOS, or truncated after three tokens."""
    responses = []
    for length in range(LONGEST):
        responses += [[*row, EOS] for row in unended(length)]
    return responses + unended(LONGEST)


def toy_batch(prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and response_mask, (85, T), of every response to a prompt."""
    responses = every_response()
    return by_hand([prompt] * len(responses), responses, PAD)


def tokenize(pairs, tokenizer, cfg: p3o.Config) -> list[p3o.Example]:
    return preferences.tokenize(pairs, tokenizer, cfg.prompt_tokens, cfg.response_tokens)


def encode(tiny, count: int = 6) -> list[p3o.Example]:
    """Return the first held-out pairs as token ids."""
    _, _, tokenizer, cfg, pairs = tiny
    return tokenize(pairs[:count], tokenizer, cfg)


def batch(tiny, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and response_mask of the first chosen responses."""
    examples = encode(tiny, count)
    prompts = [example.prompt for example in examples]
    chosen = [example.chosen for example in examples]
    return by_hand(prompts, chosen, tiny[2].pad_token_id)


def with_nan_elsewhere(model: torch.nn.Module, ids: torch.Tensor, keep: torch.Tensor):
    """Make hidden states NaN where `keep` (N, T) is False, until the returned hook is removed.

    The model may be given rows of `ids` (N, T), or their beginnings, in any order.
    """

    def kept(row):
        for known, where in zip(ids, keep, strict=True):
            if torch.equal(known[: len(row)], row):
                return where[: len(row)]
        raise AssertionError(f"the model is given a row that is not in the batch: {row.tolist()}")

    def hook(_, arguments, options, output):
        (rows,) = arguments or [options["input_ids"]]
        where = torch.stack([kept(row) for row in rows])
        hidden = output.last_hidden_state
        output.last_hidden_state = torch.where(where[..., None], hidden, math.nan)
        return output

    return model.base_model.register_forward_hook(hook, with_kwargs=True)


def dialogue(*turns: str) -> str:
    """Return text in the format of Anthropic HH; the human begins."""
    text = ""
    for i, turn in enumerate(turns):
        who = "Assistant" if i % 2 else "Human"
        text += f"\n\n{who}: {turn}"
    return text


def talk(question: str, chosen: str = "Yes", rejected: str = "No") -> dict[str, list]:
    """Return a row of messages: a question and two answers."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write one JSON line a row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- Stages --------------------------------------------------------------------------------
def small(**options) -> p3o.Config:
    return p3o.Config(**p3o.SMALL | options)


def nothing(*_, **__) -> None:
    """A log that keeps nothing."""


def length_score(ids, mask):
    """Score a response by its length."""
    return mask.sum(-1).float() / 8


def even_share(ids, mask):
    """Score a response by its share of even token ids."""
    return ((ids % 2 == 0) & mask).sum(-1) / mask.sum(-1)


def run_policy(policy, reference, score: Callable, prompts, cfg, loss_fn: Callable | None = None):
    """Run stage 3 on a copy of `policy`: the copy, its metrics, what the loss saw each time."""
    trained = copy.deepcopy(policy)
    rows = []
    seen = []
    loss_fn = loss_fn or p3o.p3o_loss

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
    log = lambda step, row: rows.append(row)  # noqa: E731
    p3o.train_policy(trained, reference, score, spy, prompts, cfg, log)
    return trained, rows, seen


def train(stage: str, model, reference, examples, cfg, log=nothing, loss_fn=None) -> None:
    """Run any stage on the same examples; stage 3's score likes even token ids."""
    if stage == "sft":
        p3o.train_sft(model, examples, cfg, log)
    elif stage == "reward":
        p3o.train_reward(model, examples, cfg, log)
    else:
        prompts = [example.prompt for example in examples]
        loss_fn = loss_fn or p3o.p3o_loss
        p3o.train_policy(model, reference, even_share, loss_fn, prompts, cfg, log)


# ---- The command ---------------------------------------------------------------------------
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


def metrics_of(out: Path, stage: str) -> list[dict]:
    """Return a stage's metrics without their timings."""
    rows = [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a finished run's three models, by stage and name."""
    weights = {}
    for stage, kind in (
        ("sft", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
        ("p3o", AutoModelForCausalLM),
    ):
        for key, value in kind.from_pretrained(out / stage).state_dict().items():
            weights[f"{stage}.{key}"] = value
    return weights


def assert_p3o_moved_every_weight(out: Path) -> None:
    weights = weights_of(out)
    for key, value in weights.items():
        if key.startswith("p3o."):
            moved = not torch.equal(value, weights["sft" + key[3:]])
            assert moved, f"P3O never moved {key}"
