"""P3O with a judge, who compares two responses, in place of a reward.

A judge here is a matrix P (Y, Y) over the five responses (Y = 5) to one prompt:
P[i, j] = P(y_i ≻ y_j), in float64. A judge becomes scores as P − ½ for y_1 and 0 for y_2.
"""

import pytest
import torch
from test_claims import BETA, Bandit, Batch, close, every_pair, pushes, random_bandit
from torch import Tensor


def intransitive_judge(seed: int) -> Tensor:
    """Return a random P (Y, Y) in which the first three responses beat each other in a circle."""
    torch.manual_seed(seed)
    odds = torch.randn(5, 5, dtype=torch.float64)
    odds[[0, 1, 2], [1, 2, 0]] = 2.0
    odds[[1, 2, 0], [0, 1, 2]] = -2.0
    return torch.sigmoid(odds - odds.T)


def expected_step(P: Tensor, bandit: Bandit, beta: float, clip: str = "none") -> Tensor:
    """Return the ascent on the logits, (Y,), averaged over pairs y_1, y_2 ∼ π_old."""
    logp = bandit.logits.log_softmax(0)  # (Y,)
    scores = torch.stack([P.flatten() - 0.5, torch.zeros(25, dtype=P.dtype)], 1)  # (Y², 2)
    old = every_pair(bandit.old)  # (Y², 2)
    batch = Batch(every_pair(logp.detach()), old, every_pair(bandit.ref), scores)
    push = pushes(batch, beta, clip=clip)  # (Y², 2)
    objective = (old.sum(1, keepdim=True).exp() * push * every_pair(logp)).sum()
    return torch.autograd.grad(objective, bandit.logits)[0]


@pytest.mark.problem_6
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["fresh pairs", "old pairs"])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_with_a_judge_the_expected_step_is_the_gradient_of_the_win_rate(beta, spread):
    """Against a frozen copy of the current policy, minus β KL, for a judge without a reward."""
    bandit = random_bandit(21, spread)
    P = intransitive_judge(21)
    logp = bandit.logits.log_softmax(0)  # (Y,)
    win_rate = logp.exp() @ P @ logp.detach().exp()
    kl = (logp.exp() * (logp - bandit.ref)).sum()
    exact = torch.autograd.grad(win_rate - beta * kl, bandit.logits)[0]
    assert exact.norm() > 0.01
    assert close(expected_step(P, bandit, beta), exact)


def equilibrium(P: Tensor, ref: Tensor, beta: float) -> Tensor:
    """Return log π (Y,) with π ∝ π_ref exp(w/β), where w(y) = E_{y'∼π} P(y ≻ y')."""
    logp = ref
    for _ in range(2000):
        best = (ref + P @ logp.exp() / beta).log_softmax(0)  # the best answer to π
        logp = (0.9 * logp + 0.1 * best).log_softmax(0)
    assert close(logp, best)
    return logp


@pytest.mark.problem_6
def test_no_expected_push_is_left_at_the_equilibrium_of_a_judge():
    """Single pairs still push there, unlike at the optimum of a reward: a circle has no order."""
    ref = random_bandit(22).ref
    P = intransitive_judge(22)
    rest = equilibrium(P, ref, BETA)
    at_rest = Bandit(rest.clone().requires_grad_(), rest, ref, rest)
    assert expected_step(P, at_rest, BETA).abs().max() < 1e-15
    elsewhere = Bandit(ref.clone().requires_grad_(), ref, ref, ref)
    assert expected_step(P, elsewhere, BETA).abs().max() > 1e-3


@pytest.mark.problem_6
@pytest.mark.parametrize("clip", ["joint", "separate"])
def test_p3os_updates_arrive_at_the_equilibrium_of_a_judge(clip):
    """From the reference, with 2 expected updates for each π_old."""
    ref = random_bandit(23).ref
    P = intransitive_judge(23)
    logits = ref.clone().requires_grad_()
    for _ in range(300):
        old = logits.detach().log_softmax(0)
        for _ in range(2):
            step = expected_step(P, Bandit(logits, old, ref, ref), BETA, clip)
            logits = (logits + 4.0 * step).detach().requires_grad_()
    rest = equilibrium(P, ref, BETA)
    arrived = logits.detach().log_softmax(0)
    assert (rest.exp() * (rest - ref)).sum() > 0.02, "it should be away from the start"
    assert (rest.exp() * (rest - arrived)).sum() < 1e-6


@pytest.mark.problem_6
def test_on_fresh_pairs_a_biased_judge_has_the_expected_step_of_asking_it_in_both_orders():
    """y_1 and y_2 are drawn alike. What the judge makes of the order only adds variance."""
    bandit = random_bandit(24, 0.0)
    biased = torch.rand(5, 5, dtype=torch.float64)  # P[i, j] if y_i comes first
    both = (biased + 1 - biased.T) / 2
    assert (biased - both).abs().max() > 0.1
    for clip in ("joint", "separate"):
        once = expected_step(biased, bandit, BETA, clip)
        assert close(once, expected_step(both, bandit, BETA, clip))
