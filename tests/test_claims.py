"""What P3O claims, claim by claim, and what distinguishes it from its relatives.

A "bandit" here is one prompt with five responses (Y = 5) and a softmax policy over them, so that
every expectation is a finite sum, in float64. Claims about `p3o_loss` use that function's gradient.
"""

import doctest
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from expected import (
    BETA,
    BOUND,
    EPS,
    Batch,
    along_G,
    diagnosis,
    gap,
    objective_by_hand,
    q_of,
    stopped_by_clip,
)
from torch import Tensor

import p3o

CLIPS = ("joint", "separate", "none")
bradley_terry = pytest.mark.problem_5
p3o_loss = pytest.mark.problem_6


class Bandit(NamedTuple):
    """One prompt and what there is to know about its responses, (Y,) each."""

    logits: Tensor  # of π, with gradient
    old: Tensor  # log π_old
    ref: Tensor  # log π_ref
    r: Tensor


def random_bandit(seed: int, spread: float = 1.0) -> Bandit:
    """Return a bandit whose π is about `spread` away from π_old."""
    torch.manual_seed(seed)
    old, ref, r, step = torch.randn(4, 5, dtype=torch.float64)
    logits = (old + spread * step).requires_grad_()
    return Bandit(logits, old.log_softmax(0), ref.log_softmax(0), r)


def random_batch(seed: int, spread: float, size: int = 64) -> Batch:
    """Return random pairs with log ratios of about `spread`."""
    torch.manual_seed(seed)
    old = -10 + torch.randn(size, 2, dtype=torch.float64)
    logprobs = old + spread * torch.randn_like(old)
    ref = old + 0.3 * torch.randn_like(old)
    scores = torch.randn_like(old)
    return Batch(logprobs, old, ref, scores)


def every_pair(values: Tensor) -> Tensor:
    """Return the values of all ordered pairs of responses, (Y², 2)."""
    return torch.cartesian_prod(values, values)


def batch_of_every_pair(logprobs: Tensor, old: Tensor, ref: Tensor, r: Tensor) -> Batch:
    """Return all ordered pairs of a bandit's responses, from (Y,) each."""
    return Batch(every_pair(logprobs), every_pair(old), every_pair(ref), every_pair(r))


def loss_of(batch: Batch, beta: float = BETA, **options) -> Tensor:
    loss, _ = p3o.p3o_loss(*batch, beta=beta, **options)
    return loss


def pushes(batch: Batch, beta: float = BETA, **options) -> Tensor:
    """Return ∂L/∂log π(y_i) of each pair, (B, 2): how hard an update pushes each response."""
    leaf = batch.logprobs.detach().requires_grad_()
    loss = loss_of(batch._replace(logprobs=leaf), beta, **options)
    gradient = torch.autograd.grad(loss, leaf)[0]
    return -gradient * len(leaf)  # the loss is a mean over pairs


def expected_gradient(bandit: Bandit, beta: float = BETA, **options) -> Tensor:
    """Return p3o_loss's gradient of the logits, (Y,), averaged over pairs y_1, y_2 ∼ π_old."""
    logp = bandit.logits.log_softmax(0)  # (Y,)
    batch = batch_of_every_pair(logp.detach(), bandit.old, bandit.ref, bandit.r)
    push = pushes(batch, beta, **options)  # (Y², 2)
    weight = batch.old.sum(1, keepdim=True).exp()  # (Y², 1): π_old(y_1) π_old(y_2)
    objective = (weight * push * every_pair(logp)).sum()
    return torch.autograd.grad(objective, bandit.logits)[0]


def exact_gradient(bandit: Bandit, beta: float) -> Tensor:
    """Return ∇(E r − β KL(π‖π_ref)) of the logits, (Y,), from its definition."""
    logp = bandit.logits.log_softmax(0)  # (Y,)
    objective = (logp.exp() * (bandit.r - beta * (logp - bandit.ref))).sum()
    return torch.autograd.grad(objective, bandit.logits)[0]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


# ---- Reward equivalence: r and r + δ(x) ----------------------------------------------------------
@bradley_terry
def test_bradley_terry_cannot_tell_r_from_r_plus_delta():
    """The loss uses r only as r(x, y_w) − r(x, y_l), where δ(x) cancels."""

    def loss_and_gradient(values: Tensor) -> tuple[Tensor, Tensor]:
        leaf = values.clone().requires_grad_()  # (B, 2)
        loss = p3o.bradley_terry_loss(leaf[:, 0], leaf[:, 1])
        return loss, torch.autograd.grad(loss, leaf)[0]

    torch.manual_seed(0)
    scores = torch.randn(32, 2, dtype=torch.float64)
    delta = 100 * torch.randn(32, 1, dtype=torch.float64)
    loss, gradient = loss_and_gradient(scores)
    loss_shifted, gradient_shifted = loss_and_gradient(scores + delta)
    assert close(loss, loss_shifted), "an offset of both scores changed the loss"
    assert close(gradient, gradient_shifted), "an offset of both scores changed the gradient"


@bradley_terry
def test_bradley_terry_loss_is_the_mean_of_minus_log_sigmoid_of_chosen_minus_rejected():
    """−log σ(m) = log(1 + e^−m), in plain floats."""
    torch.manual_seed(1)
    chosen, rejected = torch.randn(2, 32, dtype=torch.float64)
    margins = (chosen - rejected).tolist()
    mean = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 32
    right = p3o.bradley_terry_loss(chosen, rejected).item() == pytest.approx(mean, rel=1e-12)
    assert right, "the loss should be the mean of −log σ(chosen − rejected)"


@bradley_terry
def test_bradley_terry_loss_of_equal_scores_is_ln_2():
    """σ(0) = ½."""
    zeros = torch.zeros(4, dtype=torch.float64)
    assert p3o.bradley_terry_loss(zeros, zeros).item() == math.log(2)


@bradley_terry
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_bradley_terry_loss_and_gradient_are_finite_at_any_margin(margin):
    """−log σ(−m) → m, while σ(−m) itself underflows to 0."""
    scores = torch.tensor([margin], requires_grad=True)
    loss = p3o.bradley_terry_loss(scores, torch.zeros(1))
    gradient = torch.autograd.grad(loss, scores)[0]
    hint = "σ underflows before its log is taken: take both in one step that is stable"
    assert loss.item() == pytest.approx(max(0.0, -margin)), hint
    assert gradient.item() == (0.0 if margin > 0 else -1.0)


@bradley_terry
def test_plackett_luce_cannot_tell_r_from_r_plus_delta_and_is_bradley_terry_for_two():
    """P(ranking) = Π_k e^r_k / Σ_{j≥k} e^r_j: e^δ(x) cancels in every factor."""

    def log_plackett_luce(r: Tensor) -> Tensor:
        return sum(r[k] - r[k:].logsumexp(0) for k in range(len(r)))

    torch.manual_seed(2)
    r = torch.randn(4, dtype=torch.float64)
    assert close(log_plackett_luce(r), log_plackett_luce(r + 100))
    assert close(log_plackett_luce(r[:2]), -p3o.bradley_terry_loss(r[:1], r[1:2]))


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_p3o_gives_equivalent_rewards_the_same_update_sample_by_sample(clip):
    """q has r only as r_1 − r_2. Scores and offsets are multiples of 1/64: float sums are exact."""
    batch = random_batch(3, 0.5)
    scores = (batch.scores * 64).round() / 64  # (B, 2)
    delta = torch.randint(-6400, 6400, (64, 1)) / 64  # (B, 1)
    push = pushes(batch._replace(scores=scores), clip=clip)
    shifted = pushes(batch._replace(scores=scores + delta), clip=clip)
    assert torch.equal(push, shifted), (
        "something reads absolute scores: whitening, clipping, or a sum before r_1 − r_2 is taken"
    )


def test_ppo_gives_equivalent_rewards_different_updates_sample_by_sample():
    """Unclipped bandit PPO with a fixed V: ∇ρ (r − V) gains δ(x) ρ ∇ log π on each sample."""
    bandit = random_bandit(4)
    logp = bandit.logits.log_softmax(0)[2]
    ratio = (logp - bandit.old[2]).exp()

    def gradient(r: Tensor) -> Tensor:
        return torch.autograd.grad(ratio * (r[2] - 0.1), bandit.logits, retain_graph=True)[0]

    score = torch.autograd.grad(logp, bandit.logits, retain_graph=True)[0]  # (Y,): ∇ log π(y)
    change = gradient(bandit.r + 7.0) - gradient(bandit.r)
    assert close(change, 7.0 * ratio.detach() * score)
    assert change.norm() > 0.1


@pytest.mark.parametrize("clipped", [False, True])
def test_ppo_changes_in_exact_expectation_only_through_its_clip(clipped):
    """In fairness: E_π_old[ρ δ ∇ log π] = δ ∇ Σ π = 0, so the mean over *all* samples is invariant.

    A batch's mean is not. And off-policy, the clip drops samples by the sign of the advantage,
    which δ can change: then even the expectation depends on δ.
    """
    bandit = random_bandit(5)

    def gradient(r: Tensor) -> Tensor:
        ratio = (bandit.logits.log_softmax(0) - bandit.old).exp()  # (Y,)
        objective = ratio * r  # (Y,)
        if clipped:
            objective = torch.minimum(objective, ratio.clamp(1 - EPS, 1 + EPS) * r)
        return torch.autograd.grad((bandit.old.exp() * objective).sum(), bandit.logits)[0]

    invariant = close(gradient(bandit.r), gradient(bandit.r + 7.0))
    assert invariant != clipped


def test_reinforce_without_a_baseline_is_not_invariant():
    """½ (r_1 ∇ log π(y_1) + r_2 ∇ log π(y_2)): an offset pushes both responses up."""
    bandit = random_bandit(6)

    def gradient(r: Tensor) -> Tensor:
        logp = bandit.logits.log_softmax(0)  # (Y,)
        return torch.autograd.grad(0.5 * (r[:2] * logp[:2]).sum(), bandit.logits)[0]

    assert (gradient(bandit.r + 5.0) - gradient(bandit.r)).norm() > 1


def test_dividing_by_the_deviation_of_absolute_scores_is_not_invariant_but_of_differences_is():
    """A δ of standard deviation 5 makes that of the scores, 1, √26: r_1 − r_2 shrinks fivefold."""

    def gap_over_absolute(scores: Tensor) -> float:
        return (gap(scores) / scores.std()).abs().mean().item()

    def gap_over_differences(scores: Tensor) -> float:
        deviation = gap(scores).square().mean().sqrt()
        return (gap(scores) / deviation).abs().mean().item()

    torch.manual_seed(7)
    scores = torch.randn(4000, 2, dtype=torch.float64)
    shifted = scores + 5 * torch.randn(4000, 1, dtype=torch.float64)
    shrinkage = gap_over_absolute(shifted) / gap_over_absolute(scores)
    assert shrinkage == pytest.approx(1 / math.sqrt(26), rel=0.05)
    unchanged = pytest.approx(gap_over_differences(scores), rel=1e-12)
    assert gap_over_differences(shifted) == unchanged


# ---- The pairwise policy gradient ----------------------------------------------------------------
@p3o_loss
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_pairwise_policy_gradient_is_the_policy_gradient_on_and_off_policy(spread):
    """Baseline E r(y_2), double expectation, symmetrise; then ρ_1 ρ_2 changes both measures."""
    bandit = random_bandit(8, spread)
    found = expected_gradient(bandit, beta=0.0, clip="none")
    right = close(found, exact_gradient(bandit, beta=0.0))
    assert right, (
        "pairs from π_old weigh ρ_1 ρ_2 in the gradient ½ (r_1 − r_2) ∇ log(π_1/π_2), and that "
        "weight is a constant: it carries no gradient"
    )


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_without_its_ratios_the_pairwise_policy_gradient_is_biased_off_policy(spread):
    """E_π_old[½ Δr G] is ∇ E r only where π = π_old."""
    bandit = random_bandit(9, spread)
    pairs = every_pair(bandit.logits.log_softmax(0))  # (Y², 2)
    prob = every_pair(bandit.old).sum(1).exp()  # (Y²,): π_old(y_1) π_old(y_2)
    weight = prob * 0.5 * gap(every_pair(bandit.r))  # (Y²,)
    objective = (weight * gap(pairs)).sum()
    found = torch.autograd.grad(objective, bandit.logits)[0]
    error = (found - exact_gradient(bandit, beta=0.0)).norm()
    assert error < 1e-12 if spread == 0 else error > 0.1


def test_pairs_do_not_always_have_the_lower_variance():
    """Both estimators use two samples. An offset raises the variance of REINFORCE only.

    Without an offset, REINFORCE may have the lower variance.
    """
    bandit = random_bandit(10)
    prob = bandit.logits.detach().softmax(0)  # (Y,)
    score = torch.eye(5, dtype=torch.float64) - prob  # (Y, Y): row y is ∇ log π(y) = 1_y − π
    first, second = every_pair(torch.arange(5)).unbind(1)  # (Y²,) each
    weight = every_pair(prob).prod(1, keepdim=True)  # (Y², 1): π(y_1) π(y_2)

    def variance(estimates: Tensor) -> float:
        mean = (weight * estimates).sum(0)  # (Y,)
        return (weight * (estimates - mean).square()).sum().item()

    def reinforce(r: Tensor) -> float:
        return variance(0.5 * (r[first, None] * score[first] + r[second, None] * score[second]))

    def pairwise(r: Tensor) -> float:
        return variance(0.5 * (r[first] - r[second])[:, None] * (score[first] - score[second]))

    centred = bandit.r - (prob * bandit.r).sum()
    assert reinforce(centred) < pairwise(centred)
    assert reinforce(centred + 5) > pairwise(centred + 5)
    assert pairwise(centred + 5) == pytest.approx(pairwise(centred), rel=1e-10)


# ---- The two losses ------------------------------------------------------------------------------
@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
def test_the_loss_is_minus_the_mean_objective_of_the_equations(clip, spread):
    """β, ε and c are not the defaults, so none of them can be ignored."""
    batch = random_batch(11, spread)
    loss = loss_of(batch, beta=0.07, clip=clip, clip_range=0.25, ratio_bound=5.0)
    log_ratios = (batch.logprobs - batch.old).tolist()  # (B, 2)
    total = 0.0
    for now, q in zip(log_ratios, q_of(batch, beta=0.07).tolist(), strict=True):
        total += objective_by_hand(now, now, q, clip, eps=0.25, c=5.0)
    right = loss.item() == pytest.approx(-total / 64, rel=1e-12)
    assert right, diagnosis(batch, loss.item(), clip, beta=0.07, eps=0.25, c=5.0)


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_at_the_sampling_policy_every_variant_is_half_q_times_G(clip):
    """Ratios are 1 and u = 0 lies inside the box: V1 = V2 = PPG with clipping on, with its ½."""
    batch = random_batch(12, 0.0)
    right = close(pushes(batch, clip=clip), along_G(0.5 * q_of(batch)))
    assert right, f"{clip}: not ½ q at ρ = 1: does q, or ρ̄ of the partner, carry a gradient?"


@p3o_loss
def test_unclipped_both_variants_are_the_pairwise_policy_gradient_of_each_sample_at_every_policy():
    """∇ρ = ρ ∇ log π, so V1's q ρ_2 ∇ρ_1 − q ρ_1 ∇ρ_2 is V2's q ρ_1 ρ_2 ∇u."""
    batch = random_batch(13, 0.8)
    ratios = (batch.logprobs - batch.old).sum(1).exp()  # (B,): ρ_1 ρ_2
    expected = along_G(0.5 * q_of(batch) * ratios)  # (B, 2)
    for clip in ("none", "joint", "separate"):
        push = pushes(batch, clip=clip, clip_range=math.inf, ratio_bound=math.inf)
        right = close(push, expected)
        assert right, f"{clip}: not ½ q ρ_1 ρ_2: does q, or a weight, carry a gradient?"


@p3o_loss
@pytest.mark.parametrize("seed", range(5))
def test_unclipped_the_expected_update_is_the_gradient_of_reward_minus_beta_kl_at_every_policy(
    seed,
):
    """q uses h of the current policy without its gradient, whose mean is E_π ∇ log π = 0."""
    bandit = random_bandit(20 + seed)
    found = expected_gradient(bandit, clip="none")
    assert close(found, exact_gradient(bandit, BETA))


@p3o_loss
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_with_the_rollouts_kl_the_expected_update_is_right_only_at_the_sampling_policy(spread):
    """After the first inner step h of π_old is stale. Here it is part of the reward, with β = 0."""
    bandit = random_bandit(14, spread)
    h_old = bandit.old - bandit.ref  # (Y,)
    stale = bandit._replace(r=bandit.r - BETA * h_old)
    found = expected_gradient(stale, beta=0.0, clip="none")
    error = (found - exact_gradient(bandit, BETA)).norm()
    assert error < 1e-12 if spread == 0 else error > 0.01


def optimum(ref: Tensor, r: Tensor, beta: float) -> Tensor:
    """Return log π, (Y,), of the policy that maximises E r − β KL(π‖π_ref)."""
    return (ref + r / beta).log_softmax(0)


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_no_pair_is_pushed_exactly_at_the_known_optimum(clip):
    """q = 0 for all pairs ⇔ r − βh is constant in y ⇔ π ∝ π_ref exp(r/β)."""
    bandit = random_bandit(15)
    best = optimum(bandit.ref, bandit.r, BETA)  # (Y,)
    beside = best + torch.tensor([0.1, 0, 0, 0, 0], dtype=torch.float64)  # (Y,)
    at_best = batch_of_every_pair(best, best, bandit.ref, bandit.r)
    at_beside = batch_of_every_pair(beside, beside, bandit.ref, bandit.r)
    assert pushes(at_best, clip=clip).abs().max() < 1e-14
    assert pushes(at_beside, clip=clip).abs().max() > 0.01


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_p3os_updates_arrive_at_the_known_optimum(clip):
    """From the reference to π ∝ π_ref exp(r/β), with 4 expected updates for each π_old."""
    ref = random_bandit(16).ref
    r = 2 * random_bandit(16).r
    beta = 1.0
    logits = ref.clone().requires_grad_()
    for _ in range(120):
        old = logits.detach().log_softmax(0)
        for _ in range(4):
            step = expected_gradient(Bandit(logits, old, ref, r), beta, clip=clip)
            logits = (logits + 2.0 * step).detach().requires_grad_()
    best = optimum(ref, r, beta)
    arrived = logits.detach().log_softmax(0)
    kl_from_start = (best.exp() * (best - ref)).sum()
    kl_from_end = (best.exp() * (best - arrived)).sum()
    assert kl_from_start > 0.5, "the optimum should be well away from the start"
    assert kl_from_end < 1e-5


@p3o_loss
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("clip", ("joint", "separate"))
def test_the_gradient_is_zero_exactly_where_the_clip_stops_it(clip, sign):
    """`sign` flips all scores, so that a max in place of a min on one side only shows."""
    batch = random_batch(17, 0.5, size=4000)
    batch = batch._replace(scores=sign * batch.scores)
    stopped = stopped_by_clip(batch, clip)  # (B, 2)
    share = stopped.double().mean().item()
    push = pushes(batch, clip=clip)  # (B, 2)
    assert 0.2 < share < 0.8
    assert (push[stopped] == 0).all(), "a gradient gets through where the clip should stop it"
    assert (push[~stopped] != 0).all(), "the clip stops a gradient that should get through"
    _, metrics = p3o.p3o_loss(*batch, beta=BETA, clip=clip)
    clipfrac = metrics["policy/clipfrac"].item()
    assert clipfrac == pytest.approx(share, abs=1e-6), "not all out of range are stopped"


@p3o_loss
def test_a_drift_of_both_responses_is_not_clipped_by_v2_only_bounded_by_c():
    """A common factor of both ratios does not change u = log(ρ_1/ρ_2), only the weight."""
    batch = random_batch(18, 0.0)
    half_q = 0.5 * q_of(batch)  # (B,): a common drift leaves it as it is
    weights = {0.5: math.exp(1.0), 3.0: BOUND, -0.5: math.exp(-1.0), -3.0: 1 / BOUND}
    for drift, weight in weights.items():
        moved = batch._replace(logprobs=batch.logprobs + drift)
        hint = f"log ratios of {drift} should weigh {weight:.2f}"
        assert close(pushes(moved), along_G(half_q * weight)), hint


@p3o_loss
def test_v1_bounds_the_partners_weight_by_c_and_gives_it_no_gradient():
    """Response 1 has ratio 1, its partner ρ_2: response 1 is pushed by ½ q clip(ρ_2, 1/c, c)."""
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    scores = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    weights = {3.0: BOUND, -3.0: 1 / BOUND, 0.5: math.exp(0.5)}
    for log_ratio, weight in weights.items():
        logprobs = torch.tensor([[0.0, log_ratio]], dtype=torch.float64)
        batch = Batch(logprobs, zeros, zeros, scores)
        push = pushes(batch, beta=0.0, clip="separate")[0, 0]
        assert push.item() == pytest.approx(0.5 * weight), f"partner's log ratio {log_ratio}"


@p3o_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("clip", ("joint", "separate"))
def test_losses_are_finite_and_right_where_both_ratios_are_extreme(clip, q, dtype):
    """e^100 overflows float32, and 0 · ∞ is NaN: a response that is stopped must get 0."""
    extremes = [[100.0, 100.0], [100.0, -100.0], [-100.0, 100.0], [-100.0, -100.0]]
    logprobs = torch.tensor(extremes, dtype=dtype)  # (4, 2)
    zeros = torch.zeros_like(logprobs)
    scores = torch.tensor([[q, 0.0]], dtype=dtype).expand(4, 2)
    batch = Batch(logprobs, zeros, zeros, scores)
    loss = loss_of(batch, beta=0.0, clip=clip)
    push = pushes(batch, beta=0.0, clip=clip)  # (4, 2)
    stopped = stopped_by_clip(batch, clip, beta=0.0)  # (4, 2)
    assert loss.isfinite(), f"{loss} at log ρ = ±100: take log(ρ_1/ρ_2) as a difference of logs"
    assert push.isfinite().all(), f"the gradient is {push}"
    assert (push[stopped] == 0).all(), "a gradient gets through where the clip should stop it"
    assert (push * along_G(scores[:, 0]) >= 0).all(), "a response is pushed the wrong way"
    if clip == "joint":
        weight = torch.tensor([BOUND, 1.0, 1.0, 1 / BOUND], dtype=dtype)  # (4,): clip(ρ_1 ρ_2)
        half_q_weight = along_G(0.5 * q * weight)  # (4, 2)
        expected = half_q_weight.masked_fill(stopped, 0.0)
        assert torch.allclose(push, expected, rtol=1e-6, atol=0.0)
    for i, log_ratio in enumerate(extremes):
        if clip == "joint" or stopped[i].all():  # else V1 has a ratio of e^100 in its loss
            pair = Batch(*[tensor[i : i + 1] for tensor in batch])
            objective = objective_by_hand(log_ratio, log_ratio, q, clip)
            pair_loss = loss_of(pair, beta=0.0, clip=clip).item()
            assert pair_loss == pytest.approx(-objective, rel=1e-6), f"log ratios {log_ratio}"


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_swapping_the_responses_of_a_pair_changes_nothing(clip):
    """q and u change sign together."""
    batch = random_batch(19, 0.5)
    swapped = Batch(*[tensor.flip(1) for tensor in batch])
    push = pushes(batch, clip=clip)
    push_swapped = pushes(swapped, clip=clip)
    assert close(push, push_swapped.flip(1)), (
        "y_1 and y_2 are treated differently: on which side of the pair, or for which sign of q?"
    )
    loss = loss_of(batch, clip=clip)
    loss_swapped = loss_of(swapped, clip=clip)
    assert close(loss, loss_swapped), "the loss depends on the order"


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_agrees_with_finite_differences_of_the_objective_with_its_weights_held(
    clip, seed
):
    """Central differences in log π of each response; stop-gradients hold the current policy."""
    batch = random_batch(seed, 0.1, size=1)
    held = (batch.logprobs - batch.old)[0].tolist()
    q = q_of(batch).item()
    step = 1e-6
    differences = []
    for i in range(2):
        above = held.copy()
        above[i] += step
        below = held.copy()
        below[i] -= step
        rise = objective_by_hand(above, held, q, clip) - objective_by_hand(below, held, q, clip)
        differences.append(rise / (2 * step))
    found = pushes(batch, clip=clip)[0].tolist()
    hint = "do q or the weights carry a gradient, or is the clip on the wrong side?"
    assert found == pytest.approx(differences, rel=1e-7, abs=1e-9), hint


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_only_the_current_log_probs_get_a_gradient_and_no_input_is_changed(clip):
    """In an update, q, the weights, π_old, π_ref and the scores are constants."""
    batch = random_batch(22, 0.5)
    before = Batch(*[tensor.clone() for tensor in batch])
    for tensor in batch:
        tensor.requires_grad_()
    loss_of(batch, clip=clip).backward()
    assert batch.logprobs.grad is not None
    assert batch.old.grad is None, "π_old got a gradient"
    assert batch.ref.grad is None, "π_ref got a gradient"
    assert batch.scores.grad is None, "the scores got a gradient"
    for name in Batch._fields:
        unchanged = torch.equal(getattr(before, name), getattr(batch, name))
        assert unchanged, f"{name} was changed in place"


@p3o_loss
def test_equal_micro_batches_average_to_the_full_batchs_gradient():
    """The loss is a mean over pairs, so means of means are the mean."""
    batch = random_batch(23, 0.5)
    for size in (1, 2, 32):
        micro_batches = zip(*[tensor.split(size) for tensor in batch], strict=True)
        parts = [pushes(Batch(*micro_batch)) for micro_batch in micro_batches]
        assert close(torch.cat(parts), pushes(batch)), f"micro-batches of {size}"


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_metrics_are_what_they_say(clip):
    """Here of pairs that are not clipped. The zero gradients above test the clip fraction."""
    batch = random_batch(24, 0.01)
    leaf = batch.logprobs.clone().requires_grad_()
    moving = batch._replace(logprobs=leaf)
    loss, metrics = p3o.p3o_loss(*moving, beta=BETA, clip=clip)
    log_ratio = batch.logprobs - batch.old  # (B, 2)
    expected = {
        "policy/clipfrac": 0.0,
        "policy/approxkl": (0.5 * log_ratio**2).mean().item(),
        "policy/ratio": log_ratio.exp().mean().item(),
        "objective/q": q_of(batch).abs().mean().item(),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert loss.requires_grad
    for name, value in metrics.items():
        assert not value.requires_grad, f"{name} carries a gradient: detach it"


@p3o_loss
def test_another_clip_is_refused():
    with pytest.raises(ValueError):
        loss_of(random_batch(25, 0.1), clip="both")


# ---- Relatives -----------------------------------------------------------------------------------
# another method's loss: logprobs (B, 2) → (B,); tests/comparison has them as a run uses them
Loss = Callable[[Tensor], Tensor]


def gradient_of(loss: Loss, logprobs: Tensor) -> Tensor:
    """Return −∂loss/∂log π of each pair, (B, 2)."""
    leaf = logprobs.detach().requires_grad_()
    return -torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def group_loss(batch: Batch, advantage: Tensor, eps: float = math.inf) -> Loss:
    """The mean over both responses of ratio times advantage, each ratio clipped by itself."""

    def loss(logprobs: Tensor) -> Tensor:
        ratio = (logprobs - batch.old).exp()  # (B, 2)
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage).mean(1)

    return loss


def rloo(batch: Batch) -> Loss:
    """RLOO with two samples: the partner is the baseline, the sampling policy's KL a reward."""
    rewards = batch.scores - BETA * (batch.old - batch.ref)  # (B, 2)
    return group_loss(batch, rewards - rewards.flip(1), EPS)


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_rloo_with_two_samples_is_p3o_at_the_first_inner_step(clip):
    """The advantage is ±ΔR, and the mean over both responses brings the ½."""
    batch = random_batch(30, 0.0)
    found = gradient_of(rloo(batch), batch.logprobs)
    assert close(found, pushes(batch, clip=clip))


def test_at_the_first_inner_step_each_relative_pushes_along_g():
    """In P3O's units, ½ q: they differ in how they use the gap of the scores and the KL."""
    batch = random_batch(31, 0.0)
    gap_r = gap(batch.scores)  # (B,)
    beta_h = BETA * gap(batch.logprobs - batch.ref)  # (B,)
    centred = batch.scores - batch.scores.mean(1, keepdim=True)  # (B, 2)
    population = centred / centred.std(1, keepdim=True, correction=0)  # (B, 2)
    sample = centred / centred.std(1, keepdim=True)  # (B, 2)

    def dpo(logprobs: Tensor) -> Tensor:
        """In expectation, with labels drawn from Bradley-Terry on the scores."""
        margin = BETA * gap(logprobs - batch.ref)  # (B,)
        label = gap_r.sigmoid()  # (B,)
        return -label * margin.sigmoid().log() - (1 - label) * (-margin).sigmoid().log()

    def copg(logprobs: Tensor) -> Tensor:
        return q_of(batch._replace(logprobs=logprobs)).square() / (2 * BETA)

    def rebel(logprobs: Tensor) -> Tensor:
        return (gap_r - 0.7 * gap(logprobs - batch.old)).square()  # η = 0.7

    for name, loss, weight in (
        ("GRPO: only the gap's sign is left", group_loss(batch, population), 0.5 * gap_r.sign()),
        ("the same with n − 1", group_loss(batch, sample), 0.5 * math.sqrt(0.5) * gap_r.sign()),
        ("GRPO without the deviation: half of P3O", group_loss(batch, centred), 0.25 * gap_r),
        ("DPO: the same sign, the same zero", dpo, BETA * (gap_r.sigmoid() - beta_h.sigmoid())),
        ("CoPG: twice P3O", copg, gap_r - beta_h),
        ("REBEL: 4η times P3O", rebel, 2 * 0.7 * gap_r),
    ):
        assert close(gradient_of(loss, batch.logprobs), along_G(weight)), name


@p3o_loss
def test_rloo_and_p3o_part_after_the_first_inner_step():
    """RLOO's ratio is that of one response, and its q is the sampling policy's."""
    batch = random_batch(32, 0.05)
    q_old = q_of(batch._replace(logprobs=batch.old))  # (B,)
    ratio = (batch.logprobs - batch.old).exp()  # (B, 2)
    inside = ((ratio - 1).abs() < EPS).all(1)  # (B,)
    found = gradient_of(rloo(batch), batch.logprobs)  # (B, 2)
    assert inside.sum() > 32
    assert close(found[inside], (along_G(0.5 * q_old) * ratio)[inside])
    assert (found - pushes(batch, clip="none")).abs().max() > 0.01


# ---- Examples in docstrings ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("bradley_terry_loss", marks=bradley_terry),
        pytest.param("p3o_loss", marks=p3o_loss),
    ],
)
def test_the_examples_in_docstrings_are_right(name):
    """Each runs as it stands in p3o.py."""
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(getattr(p3o, name), name, globs=vars(p3o).copy()):
        runner.run(example)
    failed, attempted = runner.summarize()[:2]
    assert attempted > 0
    assert failed == 0, "see the captured output"
