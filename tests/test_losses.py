"""The two losses against the equations, in float64."""

import math

import pytest
import torch

import p3o

CLIPS = ("joint", "separate", "none")


def random_case(seed: int, spread: float, size: int = 64) -> list[torch.Tensor]:
    """logprobs (with gradient), old_logprobs, ref_logprobs, scores: each (size, 2), float64."""
    torch.manual_seed(seed)
    old = -10 + torch.randn(size, 2, dtype=torch.float64)
    logprobs = (old + spread * torch.randn_like(old)).requires_grad_()
    return [logprobs, old, old + 0.3 * torch.randn_like(old), torch.randn_like(old)]


def gradient(case, **options) -> torch.Tensor:
    loss, _ = p3o.p3o_loss(*case, **{"beta": 0.05} | options)
    return torch.autograd.grad(loss, case[0])[0] * len(case[0])  # per pair


def by_hand(logprobs, old, ref, scores, beta, clip, eps, c) -> float:
    """Equations (1) to (5) for one pair, with plain floats: the objective J as a function of logprobs.

    What the paper puts under a stop-gradient is computed at `logprobs` too, so only values are compared with this.
    """
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


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
def test_value_is_the_papers_equation(clip, spread):
    case = random_case(1, spread)
    loss, _ = p3o.p3o_loss(*case, beta=0.07, clip=clip, clip_range=0.25, ratio_bound=5.0)
    rows = zip(*(tensor.tolist() for tensor in case), strict=True)
    expected = [by_hand(*row, beta=0.07, clip=clip, eps=0.25, c=5.0) for row in rows]
    assert loss.item() == pytest.approx(-sum(expected) / len(expected), rel=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
def test_at_the_sampling_policy_the_gradient_is_half_q(clip):
    """Ratios are 1, so all variants give ½ q ∇ log(π(y_1)/π(y_2)): +½q on y_1 and −½q on y_2 of the objective."""
    case = random_case(2, 0.0)
    h = case[0].detach() - case[2]
    q = case[3][:, 0] - case[3][:, 1] - 0.05 * (h[:, 0] - h[:, 1])
    assert torch.allclose(gradient(case, clip=clip), -0.5 * torch.stack([q, -q], 1), rtol=1e-12)


def test_without_clipping_the_gradient_is_the_ratio_weighted_pairwise_policy_gradient():
    case = random_case(3, 0.8)
    h, rho = (case[0] - case[2]).detach(), (case[0] - case[1]).detach().exp()
    q = case[3][:, 0] - case[3][:, 1] - 0.05 * (h[:, 0] - h[:, 1])
    weight = 0.5 * q * rho.prod(1)
    assert torch.allclose(gradient(case, clip="none"), -torch.stack([weight, -weight], 1), rtol=1e-12)


def test_exact_expected_gradient_is_that_of_reward_minus_beta_kl_also_off_policy():
    """Σ π_old π_old ½ q ρ_1 ρ_2 ∇u = ∇(E r − β KL): importance weights undo the sampling policy, q holds the KL."""
    torch.manual_seed(4)
    logits, old, ref, r = (torch.randn(5, dtype=torch.float64) for _ in range(4))
    logits.requires_grad_()
    logp, logp_old, logp_ref = logits.log_softmax(0), old.log_softmax(0), ref.log_softmax(0)
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    pairs = torch.stack([i, j], 1)  # (25, 2): every pair of responses
    probability = (logp_old[i] + logp_old[j]).exp()
    total = 0
    for k in range(25):
        row = pairs[k : k + 1]
        loss, _ = p3o.p3o_loss(logp[row], logp_old[row], logp_ref[row], r[row], beta=0.3, clip="none")
        total = total - probability[k] * loss
    objective = (logp.exp() * (r - 0.3 * (logp - logp_ref))).sum()
    estimated = torch.autograd.grad(total, logits, retain_graph=True)[0]
    assert torch.allclose(estimated, torch.autograd.grad(objective, logits)[0], atol=1e-14)


@pytest.mark.parametrize("clip", ("joint", "separate"))
def test_gradient_is_zero_exactly_where_the_paper_stops_it(clip):
    case = random_case(5, 0.5, size=4000)
    log_ratio = (case[0] - case[1]).detach()
    h = (case[0] - case[2]).detach()
    q = case[3][:, 0] - case[3][:, 1] - 0.05 * (h[:, 0] - h[:, 1])
    if clip == "joint":
        u = log_ratio[:, 0] - log_ratio[:, 1]
        stopped = (((q > 0) & (u > 0.2)) | ((q < 0) & (u < -0.2)))[:, None].expand(-1, 2)
    else:
        advantage = torch.stack([q, -q], 1)
        stopped = ((advantage > 0) & (log_ratio.exp() > 1.2)) | ((advantage < 0) & (log_ratio.exp() < 0.8))
    assert 0.2 < stopped.double().mean() < 0.8
    assert torch.equal(gradient(case, clip=clip) == 0, stopped)
    _, metrics = p3o.p3o_loss(*case, beta=0.05, clip=clip)
    assert metrics["policy/clipfrac"].item() == pytest.approx(stopped.double().mean().item(), abs=1e-6)


@pytest.mark.parametrize("clip", CLIPS)
def test_an_offset_of_both_scores_changes_nothing(clip):
    """δ(x) cancels in r_1 − r_2. The offsets are powers of two times integers, so the subtraction is exact."""
    case = random_case(6, 0.5)
    case[3] = (case[3] * 64).round() / 64
    delta = torch.randint(-640, 640, (64, 1)) / 64
    assert torch.equal(gradient(case, clip=clip), gradient([*case[:3], case[3] + delta], clip=clip))


@pytest.mark.parametrize("clip", CLIPS)
def test_swapping_the_pair_changes_nothing(clip):
    case = random_case(7, 0.5)
    flipped = [tensor.detach().flip(1) for tensor in case]
    flipped[0].requires_grad_()
    assert torch.allclose(gradient(case, clip=clip), gradient(flipped, clip=clip).flip(1), rtol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_response_paired_with_itself_gives_no_gradient(clip):
    case = [tensor.detach()[:, :1].expand(-1, 2).clone() for tensor in random_case(8, 0.5)]
    case[0].requires_grad_()
    assert gradient(case, clip=clip).sum(1).abs().max() < 1e-15  # y_1 = y_2: the two entries act on one log-prob


@pytest.mark.parametrize("clip", CLIPS)
def test_gradient_agrees_with_finite_differences_of_the_objective_with_its_weights_held(clip):
    """Central differences in log π(y_1), with everything under a stop-gradient held at the current policy."""
    case = random_case(9, 0.1, size=1)
    rho, h = (case[0] - case[1]).detach().exp()[0], (case[0] - case[2]).detach()[0]
    q = (case[3][0, 0] - case[3][0, 1] - 0.05 * (h[0] - h[1])).item()

    def objective(step: float) -> float:
        log_ratio = [(case[0] - case[1])[0, 0].item() + step, (case[0] - case[1])[0, 1].item()]
        u = log_ratio[0] - log_ratio[1]
        if clip == "separate":
            ratio = [math.exp(value) for value in log_ratio]
            held = [min(max(value, 0.8), 1.2) for value in ratio]
            a, b = q * rho[1].item(), -q * rho[0].item()
            return 0.5 * (min(a * ratio[0], a * held[0]) + min(b * ratio[1], b * held[1]))
        held = min(max(u, -0.2), 0.2) if clip == "joint" else u
        return 0.5 * min(q * rho.prod().item() * u, q * rho.prod().item() * held)

    difference = (objective(1e-6) - objective(-1e-6)) / 2e-6
    assert -gradient(case, clip=clip)[0, 0].item() == pytest.approx(difference, rel=1e-7, abs=1e-9)


def test_only_logprobs_gets_a_gradient_and_inputs_are_left_alone():
    case = [tensor.detach().requires_grad_() for tensor in random_case(10, 0.5)]
    before = [tensor.detach().clone() for tensor in case]
    p3o.p3o_loss(*case, beta=0.05)[0].backward()
    assert case[0].grad is not None
    assert all(tensor.grad is None for tensor in case[1:])
    assert all(torch.equal(old, new) for old, new in zip(before, case, strict=True))


def test_bradley_terry_starts_at_ln_2_and_stays_finite_at_huge_margins():
    zeros = torch.zeros(4, dtype=torch.float64)
    assert p3o.bradley_terry_loss(zeros, zeros).item() == math.log(2)
    scores = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = p3o.bradley_terry_loss(scores, -scores)
    assert torch.isfinite(loss)
    assert loss.item() == pytest.approx(1e4)
    assert torch.isfinite(torch.autograd.grad(loss, scores)[0]).all()


def test_bradley_terry_is_minus_log_sigmoid_of_the_difference_and_blind_to_an_offset():
    torch.manual_seed(11)
    chosen, rejected, delta = (torch.randn(32, dtype=torch.float64) for _ in range(3))
    expected = sum(math.log(1 + math.exp(b - a)) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)) / 32
    assert p3o.bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-12)
    shifted = p3o.bradley_terry_loss(chosen + delta, rejected + delta).item()
    assert shifted == pytest.approx(expected, rel=1e-12)


def test_doctests():
    import doctest

    torch.set_printoptions(profile="default")
    result = doctest.testmod(p3o)
    assert result.attempted >= 5
    assert result.failed == 0
