"""How fast stage 3 is on this machine, beside TRL's RLOOTrainer where `trl` is installed.

    python tests/benchmark.py                  # the small run's model
    python tests/benchmark.py --size gpt2      # a random GPT-2 (124M): speed, no learning

Three take turns in one process, from the same weights and prompts, with as many samples and
updates, in fp32 and without gradient checkpointing:

    p3o.py
    TRL, alike  without dropout and with GPT-2's activation in one kernel, as p3o.py has them
    TRL, own    with dropout and activation as the model's own configuration has them

Each iteration is on all the prompts; the first of a turn is not counted. The learning rate is 0, so
that answers stay alike in length. TRL computes entropies, too, and scores text, as it does for its
users. Limits are measured as well: the rate of a large copy, and that of a large matrix product.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import p3o
from data.preferences import load_pairs

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
HOW = ("alike", "own")  # dropout and activation that TRL gets


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def rate(work: float, function, repeats: int = 10) -> float:
    """`work` per second, the best of some calls."""
    seconds = []
    for _ in range(repeats):
        start = now()
        function()
        seconds.append(now() - start)
    return work / min(seconds)


def limits() -> tuple[float, float]:
    """Bytes per second of a copy, read and written; floating-point operations per second of a
    matrix product."""
    a, b = (torch.ones(2**26, device=p3o.DEVICE) for _ in range(2))
    n = 8192 if CUDA else 2048
    x = torch.ones(n, n, device=p3o.DEVICE)  # in TF32 on a GPU, as p3o.py has it
    return rate(2 * a.nbytes, lambda: b.copy_(a)), rate(2 * n**3, lambda: x @ x)


def prepare(cfg: p3o.Config, size: str, folder: Path) -> list[str]:
    """Write a policy and a reward model, each with its tokenizer, in the folders of `HOW`.

    Returns the prompts of an iteration as text.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(p3o.SMALL["model"])
    pairs, _ = load_pairs(cfg.data)
    if size == "small":  # trained a little, so that its answers end as they do in a run
        examples = p3o.tokenize(pairs, tokenizer, cfg)[:4000]
        config = AutoConfig.from_pretrained(
            cfg.model, n_positions=256
        )  # TRL scores text, at times of more tokens
        policy = AutoModelForCausalLM.from_config(config)
        p3o.train_sft(policy.to(p3o.DEVICE), examples, cfg, lambda step, row: None)
        prompts = [pair.prompt for pair in pairs]
    else:
        tokenizer.add_tokens([f"<{i}>" for i in range(50257 - len(tokenizer))])
        config = GPT2Config(
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        policy = AutoModelForCausalLM.from_config(config)
        text = "".join(pair.prompt for pair in pairs)
        long = tokenizer(text)["input_ids"]
        shortest = cfg.prompt_tokens // 8
        prompts = []
        # lengths spread evenly: a few drawn at random might all be long, and then nobody pads
        for number in range(cfg.pairs):
            length = shortest + (cfg.prompt_tokens - shortest) * (2 * number + 1) // (2 * cfg.pairs)
            start = number * cfg.prompt_tokens
            prompts.append(tokenizer.decode(long[start : start + length]))
    policy.config.num_labels = 1
    reward_model = AutoModelForSequenceClassification.from_config(policy.config)
    own = policy.config.activation_function
    fused = "gelu_pytorch_tanh" if own == "gelu_new" else own  # as in p3o.load_base
    for how, activation in (("own", own), ("alike", fused)):
        for name, model in (("policy", policy), ("reward", reward_model)):
            model.config.activation_function = activation
            # TRL takes its reference model from the folder of the policy
            model.save_pretrained(folder / how / name)
            tokenizer.save_pretrained(folder / how / name)
    return prompts[: cfg.pairs]


def load(folder: Path, name: str):
    kind = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
    return kind.from_pretrained(folder / name, dtype=torch.float32).to(p3o.DEVICE)


def device_name() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if "model name" in line]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def time_p3o(cfg: p3o.Config, folder: Path, prompts: list[str]) -> dict[str, float]:
    """Medians over iterations: seconds of an iteration and of its phases, tokens sampled and
    tokens trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    encoded = [tokenizer(prompt)["input_ids"][-cfg.prompt_tokens :] for prompt in prompts]
    policy = load(folder, "policy")
    reference = load(folder, "policy")
    reward_model = load(folder, "reward")
    rows = []
    row = {}
    plain = {name: getattr(p3o, name) for name in ("sample", "in_parts")}
    start = now()

    def timed(name, *args):
        began = now()
        result = plain[name](*args)
        row[name] = row.get(name, 0) + now() - began
        if name == "sample":
            _, mask = result
            lengths = [len(prompt) for prompt in args[1]]
            row["steps"] = mask.sum(-1).max().item()
            row["length"] = max(lengths) + row["steps"]
            row["sampled"] = mask.sum().item()
            row["trained"] = cfg.inner_epochs * (2 * sum(lengths) + row["sampled"])
        return result

    def log(step, metrics):
        nonlocal start
        rows.append(row | {"iteration": now() - start})
        row.clear()
        start = now()

    for name in plain:
        setattr(p3o, name, partial(timed, name))
    try:
        p3o.train_policy(
            policy, reference, partial(p3o.reward_scores, reward_model), encoded, cfg, log
        )
    finally:
        for name, function in plain.items():
            setattr(p3o, name, function)
    return {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}


def time_trl(cfg: p3o.Config, folder: Path, prompts: list[str]) -> float:
    """Median seconds of an iteration: as many samples, updates and passes over them."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    updates = cfg.inner_epochs * cfg.pairs // cfg.minibatch
    stamps = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % updates == 0:
                stamps.append(now())

    options = RLOOConfig(
        output_dir=str(folder / "trl"),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**6,
        use_cpu=not CUDA,
        bf16=False,  # as p3o.py, which on a GPU makes products TF32 for both
        disable_dropout=folder.name == "alike",
        dataloader_pin_memory=CUDA,
        activation_checkpointing=False,
        learning_rate=cfg.lr,
        beta=cfg.beta,
        num_generations=2,
        num_iterations=cfg.inner_epochs,
        max_steps=cfg.iterations * updates,
        per_device_train_batch_size=2 * cfg.micro_batch,
        gradient_accumulation_steps=cfg.minibatch // cfg.micro_batch,
        steps_per_generation=cfg.pairs // cfg.micro_batch,
        max_completion_length=cfg.response_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    trainer = RLOOTrainer(
        model=load(folder, "policy"),
        reward_funcs=load(folder, "reward"),
        args=options,
        callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        reward_processing_classes=AutoTokenizer.from_pretrained(folder / "reward"),
    )
    trainer.train()
    return statistics.median(b - a for a, b in itertools.pairwise(stamps))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--iterations", type=int, default=10, help="of each turn")
    parser.add_argument(
        "--pairs", type=int, help="prompts an iteration; minibatches shrink with them"
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # a learning rate of 0: were anything learnt, answers would not stay alike in length
    cfg = p3o.Config(**SIZES[args.size] | dict(iterations=args.iterations, lr=0.0))
    if args.pairs:
        # micro-batches stay the same share of a minibatch: sorting by length saves padding in them
        parts = cfg.minibatch // cfg.micro_batch
        cfg.pairs = args.pairs
        cfg.minibatch = min(cfg.minibatch, cfg.pairs)
        cfg.micro_batch = max(1, cfg.minibatch // parts)
    if cfg.pairs % cfg.minibatch or cfg.minibatch % cfg.micro_batch:
        parser.error("--pairs must divide into minibatches and these into parts: try a power of 2")
    if cfg.iterations < 2:
        parser.error("--iterations must be at least 2: the first is not counted")
    ours = []
    theirs = {how: [] for how in HOW}
    memory = 0
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        folder = Path(name)
        prompts = prepare(cfg, args.size, folder)
        for _ in range(args.rounds):
            ours.append(time_p3o(cfg, folder / "alike", prompts))
            if CUDA and not theirs["alike"]:  # before TRL leaves anything behind
                memory = torch.cuda.max_memory_allocated()
            if importlib.util.find_spec("trl"):
                for how, turns in theirs.items():
                    turns.append(time_trl(cfg, folder / how, prompts))
        model = load(folder / "alike", "policy")
    mine = {key: statistics.median(turn[key] for turn in ours) for key in ours[0]}
    mine["updates"] = mine["iteration"] - mine["sample"] - mine["in_parts"]
    copy, product = limits()

    # what a decoding step must read: the weights, and the keys and values so far; what an update
    # must compute
    body = sum(weight.numel() for weight in model.base_model.parameters())
    body -= model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    width = model.config.n_embd
    layers = model.config.n_layer
    entries = 2 * cfg.pairs * 2 * layers * width * (mine["length"] - mine["steps"] / 2)
    read = 4 * (body + head + entries) * mine["steps"]
    compute = 6 * body * mine["trained"] + 6 * head * cfg.inner_epochs * mine["sampled"]

    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{device_name()}, {versions}")
    limit = f"copy {copy / 1e9:.0f} GB/s, matrix product {product / 1e9:.0f} GFLOP/s"
    print(f"limits measured: {limit}")
    updates = cfg.inner_epochs * cfg.pairs // cfg.minibatch
    parameters = f"{(body + head) / 1e6:.1f}M parameters"
    print(f"{args.size}: {parameters}, {cfg.pairs} prompts of up to {cfg.prompt_tokens} tokens,")
    print(f"two responses of up to {cfg.response_tokens}, {updates} updates an iteration;")
    print(f"medians of {args.rounds} turns of {args.iterations - 1} iterations\n")
    print("| phase | seconds | tokens/s | share of the limit |\n| --- | --- | --- | --- |")
    rate_of = mine["sampled"] / mine["sample"]
    share = read / copy / mine["sample"]
    print(f"| sampling | {mine['sample']:.3f} | {rate_of:.0f} | {share:.0%} of bandwidth |")
    print(f"| scores and log-probs | {mine['in_parts']:.3f} | | |")
    rate_of = mine["trained"] / mine["updates"]
    share = compute / product / mine["updates"]
    print(f"| updates | {mine['updates']:.3f} | {rate_of:.0f} | {share:.0%} of arithmetic |")
    print(f"| iteration of p3o.py | {mine['iteration']:.3f} | | |")
    if theirs["alike"]:
        trl = f"TRL {importlib.metadata.version('trl')}"
        for how, turns in theirs.items():
            name = f"iteration of {trl}'s RLOOTrainer, {how}"
            print(f"| {name} | {statistics.median(turns):.3f} | | |")
        for how, turns in theirs.items():
            ratios = [their / our["iteration"] for their, our in zip(turns, ours, strict=True)]
            print(f"\n{trl}, {how} / p3o.py, each turn: {', '.join(f'{r:.2f}' for r in ratios)}")
    if CUDA:
        print(f"\npeak memory of p3o.py: {memory / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
