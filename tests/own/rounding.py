"""What rounding in matrix products does to the log-ratios that the clip acts on.

    python tests/own/rounding.py --model MODEL --data PAIRS --lr 2e-6

Takes the options of p3o.py. For the pairs of one minibatch, both answers as if they were samples,
it computes log π(y|x) before and after one step of ±--lr on every weight, signs at random, in each
precision, and prints what rounding does to it. That is emulated, on any machine, and in linear
layers alone: of what goes into them and their weights, in bf16 also of what comes out. Attention
and all else stay in fp32.
"""

import copy
import sys
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data.preferences import InputError, load_pairs, try_hub

BODY_ONLY = "bf16, but the head"
PRECISIONS = ("fp32", "TF32", BODY_ONLY, "bf16")


def to_tf32(x: Tensor) -> Tensor:
    """Ten bits behind the point, of fp32's 23, to the nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def to_bf16(x: Tensor) -> Tensor:
    """Seven bits behind the point."""
    return x.bfloat16().float()


def rounded(model: PreTrainedModel, into: str) -> PreTrainedModel:
    """A copy whose linear layers compute in one of PRECISIONS."""
    model = copy.deepcopy(model)
    if into == "fp32":
        return model
    rounding = to_tf32 if into == "TF32" else to_bf16
    head = model.get_output_embeddings()
    for module in model.modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if module is head and into == BODY_ONLY:
            continue
        # a new parameter: the head's may be shared with the embedding, which is no product
        module.weight = nn.Parameter(rounding(module.weight.detach()))
        module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]),))
        if rounding is to_bf16:
            module.register_forward_hook(lambda _, inputs, output: rounding(output))
    return model


def step(model: PreTrainedModel, lr: float) -> PreTrainedModel:
    """A copy, each weight moved by lr up or down."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        weight.add_(lr * torch.randn_like(weight).sign())
    return model


@torch.no_grad()
def compare(cfg: p3o.Config) -> None:
    torch.manual_seed(cfg.seed)
    before, tokenizer = p3o.load_base(cfg)
    pairs, _ = load_pairs(cfg.data, tokenizer)
    examples = p3o.tokenize(pairs, tokenizer, cfg)
    if len(examples) < cfg.minibatch:
        raise InputError(f"{len(examples)} pairs are left, fewer than a --minibatch")
    (batch,) = p3o.shuffled(examples, cfg.minibatch, 1)
    prompts = []
    responses = []
    for example in batch:
        prompts += [example.prompt, example.prompt]
        responses += [example.chosen, example.rejected]
    ids, response_mask = p3o.collate(prompts, responses, before)  # (2B, T)
    shape = (cfg.minibatch, 2, -1)
    ids, response_mask = ids.view(shape), response_mask.view(shape)
    after = step(before, cfg.lr)

    def logprobs(model: PreTrainedModel, into: str) -> Tensor:
        total = partial(p3o.sequence_logprobs, rounded(model, into))
        return p3o.in_parts(total, cfg.micro_batch, ids, response_mask)  # (B, 2)

    length = response_mask.sum(-1).double().mean()
    print(f"{cfg.minibatch} pairs, responses of {length:.0f} tokens in the mean; root mean squares")
    exact = logprobs(before, "fp32")
    for into in PRECISIONS:
        old = logprobs(before, into)
        log_ratio = logprobs(after, into) - old  # (B, 2)
        u = log_ratio[:, 0] - log_ratio[:, 1]  # (B,)
        error = (old - exact).square().mean().sqrt()
        size = u.square().mean().sqrt()
        beyond = (u.abs() > cfg.clip_range).double().mean()
        print(
            f"{into}: log π(y|x) off by {error:.4f} nats; u after a step {size:.4f}, "
            f"beyond ε in {beyond:.2f} of the pairs",
            flush=True,
        )


def main(argv: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_float32_matmul_precision("highest")  # where p3o.py has set TF32
    try:
        cfg = p3o.parse_config(argv)
        try_hub(cfg.model, cfg.data)
        compare(cfg)
    except (InputError, OSError) as error:
        sys.exit(f"rounding.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
