"""One answer to question 4 of the open problem: a judge of openers, its equilibrium, and a run.

    python tests/course/openers.py runs/small       # after `python p3o.py --small`; a minute

The judge sees only how a response begins: with one of three kind openers, or without. In a circle,
each kind opener beats the next one, and all beat a response without. Because the judge sees nothing
else, the equilibrium π ∝ π_ref exp(w/β) changes only the shares s of the four kinds of opening:
s ∝ s_ref exp(P s / β), where P is the judge's table.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data import judge

# odds in nats for the row's opening against the column's; the last is a response without opener
ODDS = torch.tensor(
    [
        [0.0, 1.0, -1.0, 2.0],
        [-1.0, 0.0, 1.0, 2.0],
        [1.0, -1.0, 0.0, 2.0],
        [-2.0, -2.0, -2.0, 0.0],
    ]
)
P = torch.sigmoid(ODDS)  # (4, 4)
SAMPLES = 512


def opening_of(response: str) -> int:
    """Return which kind opener a response has, 0 to 2, or 3 if it has none."""
    for number, opener in enumerate(judge.KIND_OPENERS):
        if response.strip().startswith(opener):
            return number
    return 3


def equilibrium(reference: Tensor, beta: float) -> Tensor:
    """Return the shares s, (4,), with s ∝ s_ref exp(P s / β), by small steps towards it."""
    shares = reference
    for _ in range(10_000):
        best = (reference.log() + P @ shares / beta).softmax(0)
        shares = 0.99 * shares + 0.01 * best
    return shares


def main(run: str, betas: tuple[float, ...] = (0.1, 0.3, 1.0)) -> None:
    p3o.transformers.logging.set_verbosity_error()
    sft = p3o.load(Path(run) / "sft")
    cfg = p3o.Config(**p3o.SMALL)
    _, tokenizer = p3o.load_base(cfg)
    started = p3o.first_start(run)
    limits = cfg.prompt_tokens, cfg.response_tokens
    examples, heldout = p3o.load_examples(cfg.data, tokenizer, *limits, started)

    def openings(ids: Tensor, mask: Tensor) -> Tensor:
        """Return the opening of each response, (…), from ids and mask (…, T)."""
        rows = zip(ids.flatten(0, -2), mask.flatten(0, -2), strict=True)
        texts = [tokenizer.decode(row[inside], skip_special_tokens=True) for row, inside in rows]
        return torch.tensor([opening_of(text) for text in texts]).view(ids.shape[:-1])

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        """Return P − ½ for y_1 and 0 for y_2, (B, 2)."""
        kinds = openings(ids, mask)  # (B, 2)
        wins = P[kinds[:, 0], kinds[:, 1]]  # (B,)
        return torch.stack([wins - 0.5, torch.zeros_like(wins)], 1)

    def shares(policy: torch.nn.Module) -> Tensor:
        torch.manual_seed(1)
        prompts = [example.prompt for example in heldout[:SAMPLES]]
        kinds = openings(*p3o.sample(policy, prompts, 4, cfg.response_tokens))
        return F.one_hot(kinds.flatten(), 4).double().mean(0).float()

    reference = shares(sft)
    print("shares of", *judge.KIND_OPENERS, "and none, from", 4 * SAMPLES, "samples")
    print("reference        ", reference.numpy().round(2))
    prompts = [example.prompt for example in examples]
    for beta in betas:
        policy = copy.deepcopy(sft)
        settings = p3o.Config(**p3o.SMALL | dict(beta=beta, iterations=40))
        torch.manual_seed(0)
        log = lambda step, row: None  # noqa: E731
        p3o.train_policy(policy, sft, score, p3o.p3o_loss, prompts, settings, log)
        print(f"β = {beta:<4} predicted ", equilibrium(reference, beta).numpy().round(2))
        print("         found     ", shares(policy).numpy().round(2), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
