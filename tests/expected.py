"""What the tests compare the functions of p3o.py with, where that is most of a solution itself.

Students get this file in a form that nobody reads by accident: see `scrambled` in the course kit.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BETA = 0.3  # β
EPS = 0.2  # ε, the default of clip_range
BOUND = 10.0  # c, the default of ratio_bound


def by_hand(prompts: list[list[int]], responses: list[list[int]], pad: int):
    """Return ids and response_mask, (N, T), without `collate`, which may not be solved yet."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, len(prompts[number]) : len(row)] = True
    return ids, mask


class Batch(NamedTuple):
    """The arguments of p3o_loss for B pairs of responses, each (B, 2)."""

    logprobs: Tensor  # log π
    old: Tensor  # log π_old
    ref: Tensor  # log π_ref
    scores: Tensor  # r


def gap(values: Tensor) -> Tensor:
    """Return the first response's value minus the second's, (B,)."""
    return values[:, 0] - values[:, 1]


def q_of(batch: Batch, beta: float = BETA) -> Tensor:
    """Return q of equation (2), (B,)."""
    h = batch.logprobs - batch.ref  # (B, 2)
    return gap(batch.scores) - beta * gap(h)


def along_G(weight: Tensor) -> Tensor:
    """Return weight · G as pushes on both log-probs, (B, 2): G = ∇ log(π(y_1)/π(y_2))."""
    return torch.stack([weight, -weight], 1)


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def pessimistic(weight: float, value: float, low: float, high: float) -> float:
    """min(weight · value, weight · clip(value, low, high))."""
    return min(weight * value, weight * clamp(value, low, high))


def objective_by_hand(
    log_ratio: list[float],
    held_log_ratio: list[float],
    q: float,
    clip: str,
    eps: float = EPS,
    c: float = BOUND,
) -> float:
    """Return L of one pair by equations (3) to (5), in plain floats.

    Everything under a stop-gradient is computed at `held_log_ratio`, the rest at `log_ratio`.
    """
    held_1 = math.exp(held_log_ratio[0])
    held_2 = math.exp(held_log_ratio[1])
    if clip == "separate":
        weight_1 = q * clamp(held_2, 1 / c, c)
        weight_2 = -q * clamp(held_1, 1 / c, c)
        first = pessimistic(weight_1, math.exp(log_ratio[0]), 1 - eps, 1 + eps)
        second = pessimistic(weight_2, math.exp(log_ratio[1]), 1 - eps, 1 + eps)
        return 0.5 * (first + second)
    weight = held_1 * held_2
    u = log_ratio[0] - log_ratio[1]
    if clip == "joint":
        return 0.5 * pessimistic(q * clamp(weight, 1 / c, c), u, -eps, eps)
    return 0.5 * q * weight * u


def stopped_by_clip(batch: Batch, clip: str, beta: float = BETA) -> Tensor:
    """Return which responses the clip stops, (B, 2).

    V2 stops a pair if u > ε and q > 0, or u < −ε and q < 0. V1 stops each response by itself, by
    its own ratio and its own advantage ±q.
    """
    log_ratio = batch.logprobs - batch.old  # (B, 2)
    q = q_of(batch, beta)  # (B,)
    if clip == "joint":
        u = gap(log_ratio)  # (B,)
        too_high = (q > 0) & (u > EPS)
        too_low = (q < 0) & (u < -EPS)
        return (too_high | too_low)[:, None].expand(-1, 2)
    ratio = log_ratio.exp()  # (B, 2)
    advantage = along_G(q)  # (B, 2)
    too_high = (advantage > 0) & (ratio > 1 + EPS)
    too_low = (advantage < 0) & (ratio < 1 - EPS)
    return too_high | too_low


def diagnosis(batch: Batch, loss: float, clip: str, beta: float, eps: float, c: float) -> str:
    """Return which mistake gives this loss, if it is a usual one."""
    log_ratios = (batch.logprobs - batch.old).tolist()  # (B, 2)
    right = q_of(batch, beta)
    stale = q_of(batch._replace(logprobs=batch.old), beta)

    def mean(q: Tensor, form: str = clip, flip: bool = False, **bounds: float) -> float:
        total = 0.0
        for now, push in zip(log_ratios, q.tolist(), strict=True):
            held = now[::-1] if flip else now
            total += objective_by_hand(now, held, push, form, **(dict(eps=eps, c=c) | bounds))
        return total / len(log_ratios)

    mistakes = {
        "h is π_old's, but should be π's": -mean(stale),
        "the KL term has the wrong sign": -mean(q_of(batch, -beta)),
        "it is L, but should be −L": mean(right),
        "it is a sum over pairs, but should be a mean": -mean(right) * len(log_ratios),
        "the ½ is missing": -2 * mean(right),
    }
    if clip == "none":
        bounded = -mean(right, form="joint", eps=math.inf)
        mistakes["ρ_1 ρ_2 has a bound, which eq. (3) does not have"] = bounded
    else:
        mistakes |= {
            "ε is not clip_range, but the default": -mean(right, eps=EPS),
            "the clip by ε is missing": -mean(right, eps=math.inf),
            "the bound c is missing": -mean(right, c=math.inf),
            "c is not ratio_bound, but the default": -mean(right, c=BOUND),
            "a response weighs its own ρ̄, not its partner's": -mean(right, flip=True),
        }
    wanted = f"the loss should be −L of eq. {dict(none='(3)', joint='(4)', separate='(5)')[clip]}"
    for mistake, value in mistakes.items():
        if math.isclose(loss, value, rel_tol=1e-9):
            return f"{wanted}: {mistake}"
    return f"{wanted}, the mean over pairs; h is π's, not π_old's"
