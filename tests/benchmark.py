"""Time stage 3 on this machine, beside TRL's RLOOTrainer.

    python tests/benchmark.py                  # the small run's model
    python tests/benchmark.py --size gpt2      # a random GPT-2 (124M): speed, no learning

Both take turns in one process, from the same weights and prompts, with the same number of samples
and updates, in fp32, without dropout and gradient checkpointing. TRL also computes entropies, and
scores text, as it does by default.

Each iteration uses all the prompts; the first one of a turn is not counted. The learning rate is 0,
so that the responses keep their lengths. The updates' rate of arithmetic is set beside that of a
large matrix product.
"""

import argparse
import contextlib
import importlib.metadata
import io
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    PreTrainedModel,
)
from trl import RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "own"))
from trl_p3o import trl_config

import p3o
from data.preferences import InputError, load_pairs, tokenize

CUDA = p3o.DEVICE == "cuda"
GPT2 = dict(
    small=False,
    prompt_tokens=128,
    response_tokens=128,
    pairs=128,
    minibatch=16,
    micro_batch=p3o.Config().micro_batch,
    inner_epochs=4,
)
SIZES = {"small": p3o.SMALL, "gpt2": p3o.SMALL | GPT2}
VOCABULARY = 50257  # of GPT-2


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_product_rate() -> float:
    """Return floating-point operations per second, the best of ten products."""
    n = 8192 if CUDA else 2048
    x = torch.ones(n, n, device=p3o.DEVICE)  # in TF32 on a GPU, as in p3o.py
    seconds = []
    for _ in range(10):
        start = now()
        x @ x
        seconds.append(now() - start)
    return 2 * n**3 / min(seconds)


def prepare(cfg: p3o.Config, size: str, folder: Path) -> list[str]:
    """Save a policy and a reward model, each with its tokenizer.

    Returns the prompts of an iteration as text.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(p3o.SMALL["model"])
    pairs, _ = load_pairs(cfg.data)
    if size == "small":
        # TRL scores text, sometimes of more tokens than were sampled: more positions
        config = AutoConfig.from_pretrained(cfg.model, n_positions=256)
        policy = AutoModelForCausalLM.from_config(config).to(p3o.DEVICE)
        examples = tokenize(pairs[:4000], tokenizer, cfg.prompt_tokens, cfg.response_tokens)
        # trained a little, so that responses end as they do in a run
        p3o.train_sft(policy, examples, cfg, lambda step, metrics: None)
        prompts = [pair.prompt for pair in pairs[: cfg.pairs]]
    else:
        tokenizer.add_tokens([f"<{i}>" for i in range(VOCABULARY - len(tokenizer))])
        config = GPT2Config(
            vocab_size=VOCABULARY,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            activation_function="gelu_pytorch_tanh",  # as in p3o.load_base
        )
        policy = AutoModelForCausalLM.from_config(config)
        ids = tokenizer("".join(pair.prompt for pair in pairs))["input_ids"]
        prompts = []
        shortest = cfg.prompt_tokens // 8
        # lengths are spread evenly; a few drawn at random might all be long, without padding
        for i in range(cfg.pairs):
            length = shortest + (cfg.prompt_tokens - shortest) * (2 * i + 1) // (2 * cfg.pairs)
            start = i * cfg.prompt_tokens
            prompts.append(tokenizer.decode(ids[start : start + length]))
    policy.config.num_labels = 1
    reward_model = AutoModelForSequenceClassification.from_config(policy.config)
    for name, model in (("policy", policy), ("reward", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return prompts


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    reward_model = p3o.load(folder / "reward", AutoModelForSequenceClassification)
    return p3o.load(folder / "policy"), reward_model


def time_p3o(cfg: p3o.Config, folder: Path, prompts: list[str]) -> dict[str, float]:
    """Return medians over iterations: seconds of an iteration and of its phases, tokens sampled
    and tokens trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    encoded = [tokenizer(prompt)["input_ids"][-cfg.prompt_tokens :] for prompt in prompts]
    policy, reward_model = load(folder)
    reference, _ = load(folder)
    sample, sequence_logprobs = p3o.sample, p3o.sequence_logprobs
    rows = []
    row = {}
    stamps = [now()]

    def timed_sample(model: PreTrainedModel, batch: list, *rest: int) -> tuple[Tensor, Tensor]:
        ids, mask = sample(model, batch, *rest)
        stamps.append(now())
        row["sampled"] = mask.sum().item()
        row["trained"] = cfg.inner_epochs * (2 * sum(map(len, batch)) + row["sampled"])
        return ids, mask

    def timed_logprobs(*args) -> Tensor:
        if torch.is_grad_enabled() and len(stamps) == 2:  # the first update begins
            stamps.append(now())
        return sequence_logprobs(*args)

    def log(step: int, metrics: dict[str, float]) -> None:
        stamps.append(now())
        sampling, scoring, updates = (end - start for start, end in pairwise(stamps))
        phases = dict(sampling=sampling, scoring=scoring, updates=updates)
        rows.append(row | phases | {"iteration": sum(phases.values())})
        del stamps[:-1]

    score = partial(p3o.reward_scores, reward_model)
    with (
        patch.object(p3o, "sample", timed_sample),
        patch.object(p3o, "sequence_logprobs", timed_logprobs),
    ):
        p3o.train_policy(policy, reference, score, p3o.p3o_loss, encoded, cfg, log)
    return {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}


def time_trl(cfg: p3o.Config, folder: Path, prompts: list[str]) -> float:
    """Return the median seconds of an iteration with as many samples and updates."""
    updates = cfg.inner_epochs * cfg.pairs // cfg.minibatch
    stamps = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % updates == 0:
                stamps.append(now())

    config = trl_config(
        cfg,
        output_dir=str(folder / "trl"),
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**6,
        dataloader_pin_memory=CUDA,
        activation_checkpointing=False,
    )
    policy, reward_model = load(folder)
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=reward_model,
        args=config,
        callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy", padding_side="left"),
        reward_processing_classes=AutoTokenizer.from_pretrained(folder / "reward"),
    )
    trainer.train()
    return statistics.median(end - start for start, end in pairwise(stamps))


def report(
    cfg: p3o.Config,
    model: PreTrainedModel,
    p3o_turns: list[dict[str, float]],
    trl_turns: list[float],
) -> None:
    """Print the table, and the ratios turn by turn."""
    mid = {key: statistics.median(turn[key] for turn in p3o_turns) for key in p3o_turns[0]}
    body = sum(weight.numel() for weight in model.base_model.parameters())
    body -= model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    operations = 6 * body * mid["trained"] + 6 * head * cfg.inner_epochs * mid["sampled"]
    rate = matrix_product_rate()

    device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    print(f"{device}, torch {torch.__version__}, matrix product {rate / 1e9:.0f} GFLOP/s")
    updates = cfg.inner_epochs * cfg.pairs // cfg.minibatch
    print(
        f"{(body + head) / 1e6:.1f}M parameters, {cfg.pairs} prompts of up to {cfg.prompt_tokens} "
        f"tokens, two responses of up to {cfg.response_tokens}, {updates} updates an iteration; "
        f"medians of {len(p3o_turns)} turns of {cfg.iterations - 1} iterations\n"
    )
    print("| phase | seconds | tokens/s |\n| --- | --- | --- |")
    print(f"| sampling | {mid['sampling']:.3f} | {mid['sampled'] / mid['sampling']:.0f} |")
    print(f"| scores and log-probs | {mid['scoring']:.3f} | |")
    print(f"| updates | {mid['updates']:.3f} | {mid['trained'] / mid['updates']:.0f} |")
    print(f"| iteration of p3o.py | {mid['iteration']:.3f} | |")
    trl = f"TRL {importlib.metadata.version('trl')}"
    print(f"| iteration of {trl} | {statistics.median(trl_turns):.3f} | |")
    print(f"\nupdates of p3o.py at {operations / mid['updates'] / rate:.0%} of the product's rate")
    paired = zip(trl_turns, p3o_turns, strict=True)
    ratios = [f"{theirs / ours['iteration']:.2f}" for theirs, ours in paired]
    print(f"{trl} / p3o.py, turn by turn: {', '.join(ratios)}")


def main(argv: list[str]) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--iterations", type=int, default=10, help="of each turn")
    parser.add_argument("--pairs", type=int, help="prompts of an iteration")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cfg = p3o.Config(**SIZES[args.size] | dict(iterations=args.iterations, p3o_lr=0.0))
    if args.pairs:
        # the same number of micro-batches in a minibatch: sorting by length then saves as much
        parts = cfg.minibatch // cfg.micro_batch
        cfg.pairs = args.pairs
        cfg.minibatch = min(cfg.minibatch, cfg.pairs)
        cfg.micro_batch = max(1, cfg.minibatch // parts)
    warnings.simplefilter("ignore", FutureWarning)  # transformers', about TRL
    try:
        trl_config(cfg)
        if cfg.iterations < 2 or args.rounds < 1:
            raise InputError("--iterations must be at least 2 (one is not counted), --rounds 1")
    except InputError as error:
        sys.exit(f"benchmark.py: {error}")
    p3o_turns = []
    trl_turns = []
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        folder = Path(name)
        prompts = prepare(cfg, args.size, folder)
        for _ in range(args.rounds):
            p3o_turns.append(time_p3o(cfg, folder, prompts))
            trl_turns.append(time_trl(cfg, folder, prompts))
        model, _ = load(folder)
    report(cfg, model, p3o_turns, trl_turns)


if __name__ == "__main__":
    main(sys.argv[1:])
