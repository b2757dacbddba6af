"""What P3O claims, claim by claim, and how it compares with its relatives, in float64, on enumerable policies.

A "bandit" here is one prompt with five responses and a softmax policy over them, so every expectation is a finite sum.
Where a claim is about `p3o_loss`, the gradient comes from that very function.
"""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import p3o

CLIPS = ("joint", "separate", "none")
BETA, EPS, BOUND = 0.3, 0.2, 10.0  # β, ε, c
bradley_terry = pytest.mark.problem_5
p3o_loss = pytest.mark.problem_6


def bandit(seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of π (with gradient), then log π_old, log π_ref and r: each (5,). π is `spread` away from π_old."""
    torch.manual_seed(seed)
    old, ref, r, step = torch.randn(4, 5, dtype=torch.float64)
    return (old + spread * step).requires_grad_(), old.log_softmax(0), ref.log_softmax(0), r


def every_pair(values: Tensor) -> Tensor:
    """(Y,) → (Y², 2): the values of all ordered pairs of responses."""
    return torch.cartesian_prod(values, values)


def pushes(logprobs: Tensor, old: Tensor, ref: Tensor, scores: Tensor, **options) -> Tensor:
    """∂J/∂log π(y_i) of each pair, (B, 2), by autograd through p3o_loss: how hard an update pushes each response."""
    leaf = logprobs.detach().requires_grad_()
    loss, _ = p3o.p3o_loss(leaf, old, ref, scores, **{"beta": BETA} | options)
    return -torch.autograd.grad(loss, leaf)[0] * len(leaf)


def expected_gradient(logits: Tensor, old: Tensor, ref: Tensor, r: Tensor, **options) -> Tensor:
    """∇ of the logits, (Y,): the mean over pairs y_1, y_2 ~ π_old of what p3o_loss does to each."""
    logp = logits.log_softmax(0)
    push = pushes(*map(every_pair, (logp.detach(), old, ref, r)), **options)  # (Y², 2)
    weight = every_pair(old).sum(1, keepdim=True).exp()  # (Y², 1): π_old(y_1) π_old(y_2)
    return torch.autograd.grad((weight * push * every_pair(logp)).sum(), logits)[0]


def exact_gradient(logits: Tensor, ref: Tensor, r: Tensor, beta: float) -> Tensor:
    """∇ (E r − β KL(π‖π_ref)) of the logits, (Y,), straight from the definition."""
    logp = logits.log_softmax(0)
    return torch.autograd.grad((logp.exp() * (r - beta * (logp - ref))).sum(), logits)[0]


def sampled(seed: int, spread: float, size: int = 64) -> list[Tensor]:
    """logprobs, old_logprobs, ref_logprobs, scores of random pairs: each (size, 2); log ratios of size `spread`."""
    torch.manual_seed(seed)
    old = -10 + torch.randn(size, 2, dtype=torch.float64)
    return [old + spread * torch.randn_like(old), old, old + 0.3 * torch.randn_like(old), torch.randn_like(old)]


def q_of(logprobs: Tensor, old: Tensor, ref: Tensor, scores: Tensor, beta: float = BETA) -> Tensor:
    """Equation (2), (B,)."""
    gap = scores - beta * (logprobs - ref)
    return gap[:, 0] - gap[:, 1]


def along_G(weight: Tensor) -> Tensor:
    """weight · G as pushes on the two log-probs, (B,) → (B, 2), where G = ∇ log(π(y_1)/π(y_2))."""
    return torch.stack([weight, -weight], 1)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


# ---- Reward equivalence: r and r + δ(x) ------------------------------------------------------------------------------
@bradley_terry
def test_bradley_terry_cannot_tell_r_from_r_plus_delta():
    """The loss has r only as r(x, y_w) − r(x, y_l), where δ(x) cancels."""
    torch.manual_seed(0)
    scores, delta = torch.randn(32, 2, dtype=torch.float64), 100 * torch.randn(32, 1, dtype=torch.float64)
    losses, gradients = [], []
    for shifted in (scores, scores + delta):
        leaf = shifted.clone().requires_grad_()
        losses.append(p3o.bradley_terry_loss(leaf[:, 0], leaf[:, 1]))
        gradients.append(torch.autograd.grad(losses[-1], leaf)[0])
    assert close(*losses), "an offset of both scores changed the loss"
    assert close(*gradients), "an offset of both scores changed the gradient"


@bradley_terry
def test_bradley_terry_loss_is_the_mean_of_minus_log_sigmoid_of_chosen_minus_rejected():
    torch.manual_seed(1)
    chosen, rejected = torch.randn(2, 32, dtype=torch.float64)
    by_hand = sum(math.log(1 + math.exp(b - a)) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)) / 32
    assert p3o.bradley_terry_loss(chosen, rejected).item() == pytest.approx(by_hand, rel=1e-12)


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
    assert loss.item() == pytest.approx(max(0.0, -margin)), "log(sigmoid(·)) underflows: is it logsigmoid?"
    assert gradient.item() == (0.0 if margin > 0 else -1.0)


@bradley_terry
def test_plackett_luce_cannot_tell_r_from_r_plus_delta_and_is_bradley_terry_for_two():
    """P(ranking) = Π_k e^r_k / Σ_{j≥k} e^r_j: e^δ(x) cancels in every factor."""

    def plackett_luce(r: Tensor) -> Tensor:
        return sum(r[k] - r[k:].logsumexp(0) for k in range(len(r)))

    torch.manual_seed(2)
    r = torch.randn(4, dtype=torch.float64)
    assert close(plackett_luce(r), plackett_luce(r + 100))
    assert close(plackett_luce(r[:2]), -p3o.bradley_terry_loss(r[:1], r[1:2]))


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_p3o_gives_equivalent_rewards_the_same_update_sample_by_sample(clip):
    """q has r only as r_1 − r_2. Scores and offsets are multiples of 1/64, so that float sums are exact."""
    logprobs, old, ref, scores = sampled(3, 0.5)
    scores = (scores * 64).round() / 64
    delta = torch.randint(-6400, 6400, (64, 1)) / 64
    a, b = (pushes(logprobs, old, ref, s, clip=clip) for s in (scores, scores + delta))
    assert torch.equal(a, b), "something reads absolute scores: whitening, clipping, or a sum before r_1 − r_2 is taken"


def test_ppo_gives_equivalent_rewards_different_updates_sample_by_sample():
    """Unclipped bandit PPO with a fixed V: ∇ ρ (r − V) gains δ(x) ρ ∇ log π on each sample."""
    logits, old, _, r = bandit(4)
    y, value, delta = 2, 0.1, 7.0

    def gradient(reward: Tensor) -> Tensor:
        ratio = (logits.log_softmax(0)[y] - old[y]).exp()
        return torch.autograd.grad(ratio * (reward[y] - value), logits)[0]

    score = torch.autograd.grad(logits.log_softmax(0)[y], logits)[0]  # ∇ log π(y)
    ratio = (logits.detach().log_softmax(0)[y] - old[y]).exp()
    assert close(gradient(r + delta) - gradient(r), delta * ratio * score)
    assert (gradient(r + delta) - gradient(r)).norm() > 0.1


@pytest.mark.parametrize("clipped", [False, True])
def test_ppo_changes_in_exact_expectation_only_through_its_clip(clipped):
    """In fairness: E_π_old[ρ δ ∇ log π] = δ ∇ Σ π = 0, so the mean over *all* samples is invariant, a batch's is not.

    Off-policy, the clip drops samples by the sign of the advantage, which δ flips: then even the expectation moves.
    """
    logits, old, _, r = bandit(5)

    def gradient(reward: Tensor) -> Tensor:
        ratio = (logits.log_softmax(0) - old).exp()  # (Y,)
        held = ratio.clamp(1 - EPS, 1 + EPS) if clipped else ratio
        return torch.autograd.grad((old.exp() * torch.minimum(ratio * reward, held * reward)).sum(), logits)[0]

    assert close(gradient(r), gradient(r + 7.0)) != clipped


def test_reinforce_without_a_baseline_is_not_invariant():
    """½ (r_1 ∇ log π(y_1) + r_2 ∇ log π(y_2)): an offset pushes both responses up."""
    logits, _, _, r = bandit(6)

    def gradient(reward: Tensor) -> Tensor:
        logp = logits.log_softmax(0)
        return torch.autograd.grad(0.5 * (reward[0] * logp[0] + reward[1] * logp[1]), logits)[0]

    assert (gradient(r + 5.0) - gradient(r)).norm() > 1


def test_dividing_by_the_deviation_of_absolute_scores_is_not_invariant_but_of_differences_is():
    """With δ of standard deviation 5 among scores of 1, absolute scores spread √26 wide: r_1 − r_2 shrinks fivefold."""
    torch.manual_seed(7)
    scores = torch.randn(4000, 2, dtype=torch.float64)
    shifted = scores + 5 * torch.randn(4000, 1, dtype=torch.float64)
    size = {
        (name, which): (s.diff() / scale(s)).abs().mean().item()
        for which, s in (("r", scores), ("r + δ", shifted))
        for name, scale in (("absolute", lambda s: s.std()), ("differences", lambda s: s.diff().square().mean().sqrt()))
    }
    assert size["absolute", "r + δ"] / size["absolute", "r"] == pytest.approx(1 / math.sqrt(26), rel=0.05)
    assert size["differences", "r + δ"] == pytest.approx(size["differences", "r"], rel=1e-12)


# ---- The pairwise policy gradient ------------------------------------------------------------------------------------
@p3o_loss
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_pairwise_policy_gradient_is_the_policy_gradient_on_and_off_policy(spread):
    """Baseline E r(y_2), double expectation, symmetrise; then ρ_1 ρ_2 changes the measure of both samples."""
    logits, old, ref, r = bandit(8, spread)
    found = expected_gradient(logits, old, ref, r, beta=0.0, clip="none")
    assert close(found, exact_gradient(logits, ref, r, beta=0.0))


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_without_its_ratios_the_pairwise_policy_gradient_is_biased_off_policy(spread):
    """E_π_old[½ Δr G] is ∇ E r only where π = π_old."""
    logits, old, ref, r = bandit(9, spread)
    logp = logits.log_softmax(0)
    pairs, gap = every_pair(logp), every_pair(r)
    weight = every_pair(old).sum(1).exp() * 0.5 * (gap[:, 0] - gap[:, 1])
    found = torch.autograd.grad((weight * (pairs[:, 0] - pairs[:, 1])).sum(), logits)[0]
    error = (found - exact_gradient(logits, ref, r, beta=0.0)).norm()
    assert error < 1e-12 if spread == 0 else error > 0.1


def test_pairs_do_not_always_have_the_lower_variance():
    """Both use two samples. An offset raises the variance of REINFORCE alone; without one, REINFORCE may win."""
    logits, _, _, r = bandit(10)
    logp = logits.log_softmax(0)
    prob = logp.exp().detach()
    score = torch.stack([torch.autograd.grad(value, logits, retain_graph=True)[0] for value in logp])  # (Y, Y)
    r = r - (prob * r).sum()  # centred

    def variances(r: Tensor) -> tuple[float, float]:
        first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
        weight = (prob[first] * prob[second])[:, None]
        plain = 0.5 * (r[first, None] * score[first] + r[second, None] * score[second])
        paired = 0.5 * (r[first] - r[second])[:, None] * (score[first] - score[second])
        return tuple((weight * (x - (weight * x).sum(0)).square()).sum().item() for x in (plain, paired))

    (plain, paired), (plain_offset, paired_offset) = variances(r), variances(r + 5)
    assert plain < paired
    assert plain_offset > paired_offset
    assert paired_offset == pytest.approx(paired, rel=1e-10)


# ---- The two losses --------------------------------------------------------------------------------------------------
def objective_by_hand(logprobs, old, ref, scores, beta, clip, eps, c) -> float:
    """J of one pair by equations (1) to (5), in plain floats."""
    rho = [math.exp(a - b) for a, b in zip(logprobs, old, strict=True)]
    h = [a - b for a, b in zip(logprobs, ref, strict=True)]
    q = scores[0] - scores[1] - beta * (h[0] - h[1])
    bounded = [min(max(r, 1 / c), c) for r in rho]
    clipped = [min(max(r, 1 - eps), 1 + eps) for r in rho]
    u = math.log(rho[0] / rho[1])
    if clip == "separate":
        first = min(q * bounded[1] * rho[0], q * bounded[1] * clipped[0])
        return 0.5 * (first + min(-q * bounded[0] * rho[1], -q * bounded[0] * clipped[1]))
    if clip == "joint":
        w = min(max(rho[0] * rho[1], 1 / c), c)
        return 0.5 * min(q * w * u, q * w * min(max(u, -eps), eps))
    return 0.5 * q * rho[0] * rho[1] * u


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
def test_the_loss_is_minus_the_mean_objective_of_the_equations(clip, spread):
    case = sampled(11, spread)
    loss, _ = p3o.p3o_loss(*case, beta=0.07, clip=clip, clip_range=0.25, ratio_bound=5.0)
    rows = zip(*(tensor.tolist() for tensor in case), strict=True)
    values = [objective_by_hand(*row, beta=0.07, clip=clip, eps=0.25, c=5.0) for row in rows]
    assert loss.item() == pytest.approx(-sum(values) / len(values), rel=1e-12)


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_at_the_sampling_policy_every_variant_is_half_q_times_G(clip):
    """Ratios are 1 and u = 0 lies inside the box: V1 = V2 = PPG with clipping on, the ½ included."""
    case = sampled(12, 0.0)
    assert close(pushes(*case, clip=clip), along_G(0.5 * q_of(*case)))


@p3o_loss
def test_unclipped_both_variants_are_the_pairwise_policy_gradient_of_each_sample_at_every_policy():
    """∇ρ = ρ ∇ log π, so V1's q ρ_2 ∇ρ_1 − q ρ_1 ∇ρ_2 is V2's q ρ_1 ρ_2 ∇u."""
    case = sampled(13, 0.8)
    weight = 0.5 * q_of(*case) * (case[0] - case[1]).sum(1).exp()
    for options in (
        {"clip": "none"},
        {"clip": "joint", "clip_range": math.inf, "ratio_bound": math.inf},
        {"clip": "separate", "clip_range": math.inf, "ratio_bound": math.inf},
    ):
        assert close(pushes(*case, **options), along_G(weight)), options


@p3o_loss
@pytest.mark.parametrize("seed", range(5))
def test_unclipped_the_expected_update_is_the_gradient_of_reward_minus_beta_kl_at_every_policy(seed):
    """q takes h at the current policy and holds it: the KL's own ∇h term has mean zero, E_π ∇ log π = 0."""
    logits, old, ref, r = bandit(20 + seed)
    assert close(expected_gradient(logits, old, ref, r, clip="none"), exact_gradient(logits, ref, r, BETA))


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_with_the_rollouts_kl_the_expected_update_is_right_only_at_the_sampling_policy(spread):
    """h of π_old is a stale reward after the first inner step. Here r − βh_old stands in for r, with β = 0."""
    logits, old, ref, r = bandit(14, spread)
    stale = expected_gradient(logits, old, ref, r - BETA * (old - ref), beta=0.0, clip="none")
    error = (stale - exact_gradient(logits, ref, r, BETA)).norm()
    assert error < 1e-12 if spread == 0 else error > 0.01


def optimum(ref: Tensor, r: Tensor, beta: float) -> Tensor:
    return (ref + r / beta).log_softmax(0)


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_no_pair_is_pushed_exactly_at_the_known_optimum(clip):
    """q = 0 for all pairs ⇔ r − βh is constant in y ⇔ π ∝ π_ref exp(r/β)."""
    _, _, ref, r = bandit(15)
    best = optimum(ref, r, BETA)
    at_best = pushes(*map(every_pair, (best, best, ref, r)), clip=clip)
    beside = best + torch.tensor([0.1, 0, 0, 0, 0], dtype=torch.float64)
    assert at_best.abs().max() < 1e-14
    assert pushes(*map(every_pair, (beside, beside, ref, r)), clip=clip).abs().max() > 0.01


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_p3os_updates_arrive_at_the_known_optimum(clip):
    """From the reference, 4 inner steps an iteration on the expected update, to π ∝ π_ref exp(r/β)."""
    _, _, ref, r = bandit(16)
    r, beta = 2 * r, 1.0
    logits = ref.clone().requires_grad_()
    for _ in range(250):
        old = logits.detach().log_softmax(0)
        for _ in range(4):
            step = expected_gradient(logits, old, ref, r, clip=clip, beta=beta)
            logits = (logits + 2.0 * step).detach().requires_grad_()
    best = optimum(ref, r, beta)
    assert (best.exp() * (best - ref)).sum() > 0.5, "the optimum should be well away from the start"
    assert (best.exp() * (best - logits.detach().log_softmax(0))).sum() < 1e-6


@p3o_loss
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("clip", ("joint", "separate"))
def test_the_gradient_is_zero_exactly_where_the_clip_stops_it(clip, sign):
    """V2 stops a pair when u > ε and q > 0, or u < −ε and q < 0; V1 stops each response alone, by its own ratio.

    `sign` flips all scores, so that a min taken for a max on one side only cannot hide.
    """
    logprobs, old, ref, scores = sampled(17, 0.5, size=4000)
    case = logprobs, old, ref, sign * scores
    log_ratio, q = logprobs - old, q_of(*case)
    if clip == "joint":
        u = log_ratio[:, 0] - log_ratio[:, 1]
        stopped = (((q > 0) & (u > EPS)) | ((q < 0) & (u < -EPS)))[:, None].expand(-1, 2)
    else:
        ratio, advantage = log_ratio.exp(), torch.stack([q, -q], 1)
        stopped = ((advantage > 0) & (ratio > 1 + EPS)) | ((advantage < 0) & (ratio < 1 - EPS))
    push = pushes(*case, clip=clip)
    assert 0.2 < stopped.double().mean() < 0.8
    assert (push[stopped] == 0).all(), "a gradient gets through where the clip should stop it"
    assert (push[~stopped] != 0).all(), "the clip stops a gradient that should get through"
    _, metrics = p3o.p3o_loss(*case, beta=BETA, clip=clip)
    share = stopped.double().mean().item()
    assert metrics["policy/clipfrac"].item() == pytest.approx(share, abs=1e-6), "not all out of range are stopped"


@p3o_loss
def test_a_drift_of_both_responses_is_not_clipped_by_v2_only_bounded_by_c():
    """u = log(ρ_1/ρ_2) does not see a common factor; w = clip(ρ_1 ρ_2, 1/c, c) does."""
    case = sampled(18, 0.0)
    half_q = 0.5 * q_of(*case)
    for drift, weight in ((0.5, math.exp(1.0)), (3.0, BOUND), (-0.5, math.exp(-1.0)), (-3.0, 1 / BOUND)):
        moved = [case[0] + drift, *case[1:]]
        assert close(pushes(*moved), along_G(half_q * weight)), f"log ratios of {drift} should weigh {weight:.2f}"


@p3o_loss
def test_v1_bounds_the_partners_weight_by_c_and_gives_it_no_gradient():
    """Response 1 has ratio 1, its partner ρ_2 beyond c: response 1 is pushed by ½ q clip(ρ_2, 1/c, c)."""
    old, ref = torch.zeros(2, 1, 2, dtype=torch.float64)
    scores = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for log_ratio, weight in ((3.0, BOUND), (-3.0, 1 / BOUND), (0.5, math.exp(0.5))):
        logprobs = torch.tensor([[0.0, log_ratio]], dtype=torch.float64)
        push = pushes(logprobs, old, ref, scores, clip="separate", beta=0.0)
        assert push[0, 0].item() == pytest.approx(0.5 * weight), f"partner's log ratio {log_ratio}"


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_swapping_the_responses_of_a_pair_changes_nothing(clip):
    """q and u change sign together."""
    case = sampled(19, 0.5)
    swapped = [tensor.flip(1) for tensor in case]
    unchanged = close(pushes(*case, clip=clip), pushes(*swapped, clip=clip).flip(1))
    assert unchanged, "y_1 and y_2 are treated differently: on which side of the pair, or for which sign of q?"
    losses = [p3o.p3o_loss(*tensors, beta=BETA, clip=clip)[0] for tensors in (case, swapped)]
    assert close(*losses), "the loss depends on the order"


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_a_response_paired_with_itself_is_not_pushed(clip):
    """y_1 = y_2: q = 0, and both entries act on one log-prob."""
    case = [tensor[:, :1].expand(-1, 2) for tensor in sampled(20, 0.5)]
    assert pushes(*case, clip=clip).sum(1).abs().max() < 1e-15


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_agrees_with_finite_differences_of_the_objective_with_its_weights_held(clip, seed):
    """Central differences in log π of each response, everything under a stop-gradient held at the current policy."""
    case = sampled(seed, 0.1, size=1)
    ratio, q = (case[0] - case[1]).exp()[0], q_of(*case).item()

    def objective(which: int, step: float) -> float:
        log_ratio = (case[0] - case[1])[0].tolist()
        log_ratio[which] += step
        u = log_ratio[0] - log_ratio[1]
        if clip == "separate":
            moved = [math.exp(value) for value in log_ratio]
            held = [min(max(value, 1 - EPS), 1 + EPS) for value in moved]
            a, b = q * ratio[1].item(), -q * ratio[0].item()
            return 0.5 * (min(a * moved[0], a * held[0]) + min(b * moved[1], b * held[1]))
        held = min(max(u, -EPS), EPS) if clip == "joint" else u
        return 0.5 * min(q * ratio.prod().item() * u, q * ratio.prod().item() * held)

    differences = [(objective(i, 1e-6) - objective(i, -1e-6)) / 2e-6 for i in range(2)]
    found = pushes(*case, clip=clip)[0].tolist()
    hint = "do q or the weights carry a gradient, or is the clip on the wrong side?"
    assert found == pytest.approx(differences, rel=1e-7, abs=1e-9), hint


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_only_the_current_log_probs_get_a_gradient_and_no_input_is_changed(clip):
    """q, the weights, π_old, π_ref and the scores are constants of an update."""
    case = [tensor.requires_grad_() for tensor in sampled(22, 0.5)]
    before = [tensor.detach().clone() for tensor in case]
    p3o.p3o_loss(*case, beta=BETA, clip=clip)[0].backward()
    assert case[0].grad is not None
    assert all(tensor.grad is None for tensor in case[1:]), "π_old, π_ref or the scores got a gradient"
    assert all(torch.equal(old, new) for old, new in zip(before, case, strict=True)), "an input was changed in place"


@p3o_loss
def test_equal_micro_batches_average_to_the_full_batchs_gradient():
    """The loss is a mean over pairs, so means of means are the mean."""
    case = sampled(23, 0.5)
    for size in (1, 2, 32):
        parts = torch.cat([pushes(*(tensor[i : i + size] for tensor in case)) for i in range(0, 64, size)])
        assert close(parts, pushes(*case)), f"micro-batches of {size}"


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_metrics_are_what_they_say(clip):
    """½ (log ρ)², ρ and |q|, here of pairs within the clip; the clip fraction beyond it is with the zero gradients."""
    case = sampled(24, 0.01)
    leaf = case[0].requires_grad_()
    loss, metrics = p3o.p3o_loss(leaf, *case[1:], beta=BETA, clip=clip)
    log_ratio = (case[0] - case[1]).detach()
    assert set(metrics) == {"policy/clipfrac", "policy/approxkl", "policy/ratio", "objective/q"}
    assert metrics["policy/clipfrac"] == 0
    assert metrics["policy/approxkl"].item() == pytest.approx((0.5 * log_ratio**2).mean().item())
    assert metrics["policy/ratio"].item() == pytest.approx(log_ratio.exp().mean().item())
    assert metrics["objective/q"].item() == pytest.approx(q_of(*case).abs().mean().item())
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values()), "a metric carries a gradient: detach it"


# ---- Relatives -------------------------------------------------------------------------------------------------------
def gradient_of(loss, logprobs: Tensor) -> Tensor:
    """−∂loss/∂log π of each pair, (B, 2), for another method's loss(logprobs) → (B,)."""
    leaf = logprobs.detach().requires_grad_()
    return -torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def rloo(old: Tensor, ref: Tensor, scores: Tensor):
    """RLOO with k = 2 and the rollout's KL in the reward; each response's ratio is clipped alone."""
    rewards = scores - BETA * (old - ref)
    advantage = rewards - rewards.flip(1)  # the other response is the baseline

    def loss(logprobs: Tensor) -> Tensor:
        ratio = (logprobs - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - EPS, 1 + EPS) * advantage).mean(1)

    return loss


@p3o_loss
@pytest.mark.parametrize("clip", CLIPS)
def test_rloo_with_two_samples_is_p3o_at_the_first_inner_step(clip):
    """Leave-one-out of two is the partner: advantage ±(ΔR), mean over two responses brings the ½."""
    case = sampled(30, 0.0)
    assert close(gradient_of(rloo(*case[1:]), case[0]), pushes(*case, clip=clip))


def test_rloo_and_p3o_part_after_the_first_inner_step():
    """Off-policy RLOO weighs response i by ρ_i alone and its q is stale; P3O weighs by ρ_1 ρ_2."""
    case = sampled(31, 0.05)
    q_old = q_of(case[1], *case[1:])
    ratio = (case[0] - case[1]).exp()
    inside = ((ratio - 1).abs() < EPS).all(1)
    found = gradient_of(rloo(*case[1:]), case[0])
    assert inside.sum() > 32
    assert close(found[inside], (along_G(0.5 * q_old) * ratio)[inside])
    assert (found - pushes(*case, clip="none")).abs().max() > 0.01


@pytest.mark.parametrize(("correction", "c"), [(0, 1.0), (1, math.sqrt(0.5))])
def test_grpo_with_two_samples_keeps_only_the_sign_of_the_gap(correction, c):
    """(r_i − mean)/std is ±1, or ±0.707 with the n − 1 standard deviation, whatever the gap: ½ c sign(Δr) G."""
    case = sampled(32, 0.0)
    scores = case[3]
    for scale in (1.0, 100.0):
        r = scale * scores
        advantage = (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True, correction=correction)
        found = gradient_of(lambda logp, a=advantage: -((logp - case[1]).exp() * a).mean(1), case[0])
        assert close(found, along_G(0.5 * c * (scores[:, 0] - scores[:, 1]).sign()))


@p3o_loss
def test_grpo_without_the_deviation_is_half_of_p3o():
    """r_i − mean = ±Δr/2: Dr. GRPO."""
    case = sampled(33, 0.0)
    advantage = case[3] - case[3].mean(1, keepdim=True)
    found = gradient_of(lambda logp: -((logp - case[1]).exp() * advantage).mean(1), case[0])
    assert close(found, 0.5 * pushes(*case, beta=0.0))


def dpo(ref: Tensor, winner: int):
    def loss(logprobs: Tensor) -> Tensor:
        h = logprobs - ref
        return -F.logsigmoid(BETA * (h[:, winner] - h[:, 1 - winner]))

    return loss


def expected_dpo(logprobs: Tensor, ref: Tensor, scores: Tensor) -> Tensor:
    """DPO's gradient with labels drawn from Bradley–Terry on the scores, (B, 2)."""
    first_wins = (scores[:, :1] - scores[:, 1:]).sigmoid()
    return first_wins * gradient_of(dpo(ref, 0), logprobs) + (1 - first_wins) * gradient_of(dpo(ref, 1), logprobs)


@p3o_loss
def test_dpos_expected_gradient_has_the_sign_and_the_zero_of_p3os():
    """β (σ(Δr) − σ(βΔh)) G, and σ is monotonic; the reward enters as Δr alone, so it is invariant as well."""
    case = sampled(34, 0.5)
    h, scores = case[0] - case[2], case[3]
    gap_r, gap_h = scores[:, 0] - scores[:, 1], h[:, 0] - h[:, 1]
    found = expected_dpo(case[0], case[2], scores)
    assert close(found, along_G(BETA * (gap_r.sigmoid() - (BETA * gap_h).sigmoid())))
    assert torch.equal(found.sign(), pushes(*case, clip="none").sign())
    at_zero = BETA * h  # scores for which q = 0
    assert expected_dpo(case[0], case[2], at_zero).abs().max() < 1e-15
    assert close(gradient_of(dpo(case[2], 0), case[0]), along_G(BETA * (-BETA * gap_h).sigmoid()))


@p3o_loss
def test_dpos_expected_gradient_tends_to_half_beta_times_p3o_for_small_margins():
    """σ(a) − σ(b) → (a − b)/4, and P3O's is ½ (a − b)."""
    logprobs, old, ref, scores = sampled(35, 0.0)
    ref, scores = old + 1e-3 * (ref - old), 1e-3 * scores
    found, p3os = expected_dpo(logprobs, ref, scores), 0.5 * BETA * pushes(logprobs, old, ref, scores)
    assert torch.allclose(found, p3os, rtol=1e-4, atol=1e-12)


@p3o_loss
def test_copg_is_twice_p3o_on_the_pair():
    """CoPG minimises (Δr − βΔh)²/(2β): gradient −(Δr − βΔh) G, with no ratio."""
    case = sampled(36, 0.0)
    found = gradient_of(lambda logp: q_of(logp, *case[1:]).square() / (2 * BETA), case[0])
    assert close(found, 2 * pushes(*case))


@p3o_loss
def test_rebels_gradient_is_a_multiple_of_p3os_at_the_sampling_policy_then_pulls_back_where_v2_stops():
    """REBEL minimises (Δr − ηu)²: at u = 0 its loss gradient is −4η × P3O's push; past u = Δr/η it turns round."""
    eta = 0.5
    logprobs, old, ref, scores = sampled(37, 0.0)
    gap = scores[:, 0] - scores[:, 1]

    def loss(logp: Tensor) -> Tensor:
        log_ratio = logp - old
        return (gap - eta * (log_ratio[:, 0] - log_ratio[:, 1])).square()

    assert close(-gradient_of(loss, logprobs), -4 * eta * pushes(logprobs, old, ref, scores, beta=0.0))
    beyond = logprobs + along_G(gap / eta) + 0.2 * along_G(gap.sign())  # u beyond both Δr/η and ε
    assert torch.equal(gradient_of(loss, beyond)[:, 0].sign(), -gap.sign())
    assert (pushes(beyond, old, ref, scores, beta=0.0) == 0).all()


# ---- Examples in docstrings ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [pytest.param("bradley_terry_loss", marks=bradley_terry), pytest.param("p3o_loss", marks=p3o_loss)],
)
def test_the_examples_in_docstrings_are_right(name):
    function = getattr(p3o, name)
    examples = doctest.DocTestFinder().find(function, name, globs=vars(p3o).copy())
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0, "see the captured output"
