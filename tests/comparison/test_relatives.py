"""The relatives of P3O, as the comparison runs them: gradients, where each ends, PPO in pieces.

On bandits of five responses and on the toy model's 85, in float64 where a claim is exact.
"""

import copy
import itertools
import math
from functools import partial

import pytest
import relatives
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import (
    LONGEST,
    TOY_PROMPTS,
    even_share,
    nothing,
    same_weights,
    toy_batch,
    toy_model,
)
from transformers import AutoModelForSequenceClassification

import p3o

LOSSES = {
    "P3O V2": p3o.p3o_loss,
    "P3O V1": partial(p3o.p3o_loss, clip="separate"),
    "RLOO": relatives.rloo_loss,
    "GRPO": relatives.grpo_loss,
    "online DPO": relatives.online_dpo_loss,
    "REBEL": relatives.rebel_loss,
}
BETA = 0.3
RATES = {"REBEL": 0.5, "online DPO": 6.0}  # their pushes are larger, and smaller, than the others'


def random_pairs(spread: float, size: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log π, log π_old, log π_ref and scores of random pairs, (B, 2) each; ρ is e^±spread or so."""
    torch.manual_seed(0)
    old = -10 + torch.randn(size, 2, dtype=torch.float64)
    new = old + spread * torch.randn_like(old)
    ref = old + torch.randn_like(old)
    return new, old, ref, torch.randn_like(old)


def pushes(loss_fn, new: Tensor, old: Tensor, ref: Tensor, scores: Tensor, beta=BETA) -> Tensor:
    """−∂loss/∂log π(y_i) of each pair, (B, 2)."""
    leaf = new.detach().requires_grad_()
    loss, _ = loss_fn(leaf, old, ref, scores, beta=beta)
    return -torch.autograd.grad(loss, leaf)[0] * len(leaf)


def gap(values: Tensor) -> Tensor:
    return values[:, 0] - values[:, 1]


def along_G(weight: Tensor) -> Tensor:
    return torch.stack([weight, -weight], 1)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


# ---- The losses, pair by pair --------------------------------------------------------------
def test_on_fresh_samples_each_pushes_by_its_factor_of_G():
    """RLOO as P3O; GRPO by the sign alone, the KL apart; DPO β(σ(Δr) − σ(βΔh)); REBEL 2/η · ΔR."""
    new, old, ref, scores = random_pairs(0.0)
    h = new - ref
    p3o_push = pushes(p3o.p3o_loss, new, old, ref, scores)
    assert close(p3o_push, along_G(0.5 * (gap(scores) - BETA * gap(h))))
    assert close(pushes(relatives.rloo_loss, new, old, ref, scores), p3o_push)
    sign = along_G(0.5 * gap(scores).sign())
    grpo = pushes(relatives.grpo_loss, new, old, ref, scores)
    assert torch.allclose(grpo, sign - along_G(0.5 * BETA * gap(h)), atol=0.05)  # std + 1e-4
    chance = torch.sigmoid(gap(scores)) - torch.sigmoid(BETA * gap(h))
    assert close(pushes(relatives.online_dpo_loss, new, old, ref, scores), along_G(BETA * chance))
    rebel = partial(relatives.rebel_loss, eta=4.0)
    assert close(pushes(rebel, new, old, ref, scores), along_G(gap(scores - BETA * h) * 2 / 4))


def test_off_policy_rloo_weighs_a_response_by_its_own_ratio_and_stops_it_alone():
    new, old, ref, scores = random_pairs(0.3)
    advantage = along_G(gap(scores - BETA * (old - ref)))  # (B, 2): of the sampling policy's KL
    ratio = (new - old).exp()
    stopped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    expected = (0.5 * advantage * ratio).where(~stopped, 0.0)
    assert close(pushes(relatives.rloo_loss, new, old, ref, scores), expected)
    _, metrics = relatives.rloo_loss(new, old, ref, scores, beta=BETA)
    assert 0.1 < stopped.double().mean() == pytest.approx(float(metrics["policy/clipfrac"]))


def test_off_policy_grpo_clips_a_response_alone_and_takes_the_current_kl():
    new, old, ref, scores = random_pairs(0.3)
    without = pushes(relatives.grpo_loss, new, old, ref, scores, beta=0.0)
    ratio = (new - old).exp()
    assert (without == 0).any(1).sum() > 20
    moving = without != 0
    sign = along_G(0.5 * gap(scores).sign())
    assert torch.allclose(without[moving], (sign * ratio)[moving], atol=0.1)
    kl = pushes(relatives.grpo_loss, new, old, ref, scores) - without
    assert close(kl, -along_G(0.5 * BETA * gap(new - ref)))


def test_off_policy_rebel_takes_the_sampling_policys_kl():
    new, old, ref, scores = random_pairs(0.3)
    reward = gap(scores - BETA * (old - ref))
    expected = 2 * (reward - gap(new - old))
    assert close(pushes(relatives.rebel_loss, new, old, ref, scores)[:, 0], expected)


def test_rebel_pulls_back_where_the_policy_has_moved_too_far():
    _, old, ref, scores = random_pairs(0.0)
    beyond = old + along_G(gap(scores))  # u = 2 Δr, η = 1
    push = pushes(relatives.rebel_loss, beyond, old, ref, scores, beta=0.0)
    assert torch.equal(push[:, 0].sign(), -gap(scores).sign())


@pytest.mark.parametrize("name", LOSSES)
def test_none_of_them_sees_an_offset(name):
    """δ(x) is the same for both responses."""
    new, old, ref, scores = random_pairs(0.3)
    delta = 10 * torch.randn(len(scores), 1, dtype=torch.float64)
    before = pushes(LOSSES[name], new, old, ref, scores)
    assert close(pushes(LOSSES[name], new, old, ref, scores + delta), before)


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_current_log_probs_get_a_gradient(name):
    arguments = [values.requires_grad_() for values in random_pairs(0.3)]
    loss, metrics = LOSSES[name](*arguments, beta=BETA)
    loss.backward()
    assert arguments[0].grad.abs().max() > 0
    assert all(values.grad is None for values in arguments[1:])
    assert not any(value.requires_grad for value in metrics.values())


# ---- Where each ends -----------------------------------------------------------------------
def every_pair(values: Tensor) -> Tensor:
    return torch.cartesian_prod(values, values)


def end_of(loss_fn, ref: Tensor, r: Tensor, beta: float, rate: float) -> Tensor:
    """log π after many expected updates from the reference, four to each sampling policy."""
    logits = ref.clone().requires_grad_()
    for _ in range(600):
        old = logits.detach().log_softmax(0)
        weight = every_pair(old).sum(1, keepdim=True).exp()  # (25, 1): π_old(y_1) π_old(y_2)
        for _ in range(4):
            logp = logits.log_softmax(0)
            pairs = [every_pair(values) for values in (logp.detach(), old, ref, r)]
            push = pushes(loss_fn, *pairs, beta=beta)
            (step,) = torch.autograd.grad((weight * push * every_pair(logp)).sum(), logits)
            logits = (logits + rate * step).detach().requires_grad_()
    return logits.detach().log_softmax(0)


@pytest.mark.parametrize("name", LOSSES)
def test_all_but_grpo_end_in_the_optimum(name):
    """π ∝ π_ref exp(r/β). GRPO climbs another reward, how often a response beats the policy's."""
    torch.manual_seed(3)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    r = 2 * torch.randn(5, dtype=torch.float64)
    beta = 1.0
    best = (ref + r / beta).log_softmax(0)
    end = end_of(LOSSES[name], ref, r, beta, rate=RATES.get(name, 1.0))
    assert (best.exp() * (best - ref)).sum() > 0.3, "the optimum should be away from the start"
    distance = (best.exp() * (best - end)).sum().item()
    if name != "GRPO":
        assert distance < 1e-3
        return
    assert distance > 0.05
    beaten = (r[:, None] - r).sign() @ end.exp()  # (5,): wins minus losses against the policy
    left = beaten - beta * (end - ref)  # constant in y where the gradient is 0
    assert (left - left.mean()).abs().max() < 1e-3


# ---- PPO, piece by piece -------------------------------------------------------------------
def test_gae_is_its_definition():
    """Σ_k λ^k δ_{t+k}, by a loop over each response, of a length of its own."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, dtype=torch.float64)
    lengths = [7, 4, 1, 6]
    for row, length in enumerate(lengths):
        rewards[row, length:] = 0
        values[row, length:] = 0
    found = relatives.gae(rewards, values, 0.9)
    for row, length in enumerate(lengths):
        for t in range(length):
            expected = 0.0
            for k in range(t, length):
                following = values[row, k + 1] if k + 1 < length else 0.0
                expected += 0.9 ** (k - t) * (rewards[row, k] + following - values[row, k])
            assert found[row, t].item() == pytest.approx(float(expected))
        assert (found[row, length:] == 0).all()


def test_with_lambda_1_and_no_critic_an_advantage_is_the_reward_to_go():
    torch.manual_seed(0)
    rewards = torch.randn(3, 5, dtype=torch.float64)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    assert close(relatives.gae(rewards, torch.zeros_like(rewards), 1.0), to_go)


def test_with_a_perfect_critic_the_expected_step_is_the_policy_gradient():
    """On all 85 responses, weighted by π: Σ_t A_t ∇log π(y^t) is ∇(E r − β KL), whatever λ is."""
    torch.manual_seed(0)
    policy, reference = toy_model(1).double(), toy_model(2).double()
    prompt = TOY_PROMPTS[1]
    ids, mask = toy_batch(prompt)  # (85, T)
    inside = mask[:, 1:]
    r = torch.randn(len(ids), dtype=torch.float64)
    logprobs = exact_logprobs(policy, ids, inside)  # (85, T−1)
    ref = exact_logprobs(reference, ids, inside).detach()
    weight = logprobs.sum(-1).exp().detach()  # (85,): π(y|x)
    assert weight.sum().item() == pytest.approx(1)
    h = logprobs - ref
    exact = (logprobs.sum(-1).exp() * (r - BETA * h.sum(-1))).sum()
    parameters = list(policy.parameters())
    expected = torch.autograd.grad(exact, parameters, retain_graph=True, allow_unused=True)

    rewards = -BETA * h.detach()
    last = (torch.arange(inside.shape[1]) * inside).argmax(-1)
    rewards[torch.arange(len(ids)), last] += r
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    values = torch.zeros_like(rewards)  # V(x, y^<t) = E of the reward to go, over all that go on so
    for row, t in inside.nonzero().tolist():
        alike = (ids[:, : t + 1] == ids[row, : t + 1]).all(1) & inside[:, t]
        values[row, t] = (weight * to_go[:, t])[alike].sum() / weight[alike].sum()
    for discount in (0.0, 0.5, 1.0):
        advantages = relatives.gae(rewards, values, discount)
        objective = (weight[:, None] * advantages * logprobs).sum()
        found = torch.autograd.grad(objective, parameters, retain_graph=True, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-10)


def exact_logprobs(model, ids: Tensor, inside: Tensor) -> Tensor:
    """(N, T−1) in float64: `response_logprobs` is in float32."""
    logp = model(ids).logits[:, :-1].log_softmax(-1)
    return logp.gather(-1, ids[:, 1:, None])[..., 0].where(inside, 0.0)


def toy_config(**options) -> p3o.Config:
    small = dict(pairs=32, minibatch=16, inner_epochs=2, response_tokens=LONGEST, p3o_lr=3e-3)
    return p3o.Config(**p3o.SMALL | small | dict(iterations=12, beta=0.05) | options)


def toy_critic() -> torch.nn.Module:
    policy = toy_model(0)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config)
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    return critic


def test_token_values_are_the_critics_before_each_response_token():
    critic = toy_critic().eval()
    ids, mask = toy_batch(TOY_PROMPTS[1])
    values = relatives.token_values(critic, ids, mask)
    assert values.shape == (85, ids.shape[1] - 1)
    assert (values[~mask[:, 1:]] == 0).all()
    changed = ids.clone()
    changed[:, -1] = 0  # no value stands after the last token
    assert torch.equal(relatives.token_values(critic, changed, mask), values)
    hidden = critic.base_model(ids).last_hidden_state
    start = len(TOY_PROMPTS[1]) - 1  # the state before the first response token
    assert torch.allclose(values[:, start], critic.score(hidden[:, start])[:, 0])


@pytest.mark.parametrize("name", [*LOSSES, "PPO"])
def test_each_learns(name):
    """Responses of even tokens score; each method finds more of them."""
    reference = toy_model(0)
    policy = copy.deepcopy(reference)
    rows = []

    def log(step, row):
        rows.append(row)

    torch.manual_seed(0)
    arguments = (policy, reference, even_share, TOY_PROMPTS * 16, toy_config(), log)
    if name == "PPO":
        critic = toy_critic()
        before = copy.deepcopy(critic)
        relatives.train_ppo(*arguments, critic)
        assert not same_weights(critic, before)
        assert rows[-1]["loss/value"] < rows[0]["loss/value"]
    else:
        p3o.train_policy(policy, reference, even_share, LOSSES[name], *rest)
    assert same_weights(reference, toy_model(0))
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.15


def sgd(groups: list[dict]) -> torch.optim.Optimizer:
    """In the place of AdamW, whose first step is a sign: noise where a gradient is nearly 0."""
    return torch.optim.SGD(groups, lr=1.0)


def test_ppos_updates_are_those_of_its_equations(monkeypatch):
    """Two updates on the same samples by hand, the second clipped, away from the reference."""
    monkeypatch.setattr(p3o, "make_optimizer", sgd)
    reference, policy, critic = toy_model(1), toy_model(0), toy_critic().eval()
    rates = dict(p3o_lr=0.5, beta=0.7)
    cfg = toy_config(iterations=1, inner_epochs=2, minibatch=32, micro_batch=32, **rates)
    prompts = TOY_PROMPTS * 16
    mine, mine_critic = copy.deepcopy(policy), copy.deepcopy(critic)
    torch.manual_seed(0)
    relatives.train_ppo(policy, reference, even_share, prompts, cfg, nothing, critic)

    torch.manual_seed(0)
    (batch,) = p3o.shuffled(prompts, 32, 1)
    ids, mask = p3o.sample(mine, batch, 2, LONGEST)
    ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
    inside = mask[:, 1:]
    with torch.no_grad():
        old_values = relatives.token_values(mine_critic, ids, mask)
        old = p3o.response_logprobs(mine, ids, mask)
        rewards = 0.7 * (p3o.response_logprobs(reference, ids, mask) - old)
    assert rewards.abs().max() > 0.5, "the KL is paid for"
    for row, t in enumerate(inside.int().argmax(1) + inside.sum(1) - 1):
        rewards[row, t] += even_share(ids, mask)[row]
    advantages = relatives.gae(rewards, old_values, 0.95)
    returns = advantages + old_values
    whitened = (advantages - advantages[inside].mean()) / advantages[inside].std()
    both = torch.nn.ModuleList([mine, mine_critic])
    optimizer = p3o.make_optimizer([{"params": both.parameters(), "weight_decay": 0.0}])
    for _ in range(2):
        ratio = (p3o.response_logprobs(mine, ids, mask) - old).exp()
        objective = torch.minimum(whitened * ratio, whitened * ratio.clamp(0.8, 1.2))
        values = relatives.token_values(mine_critic, ids, mask)
        near = values.clamp(old_values - 0.2, old_values + 0.2)
        errors = torch.stack([(values - returns).square(), (near - returns).square()])
        loss = (0.1 * 0.5 * errors.amax(0) - objective)[inside].mean()
        loss.backward()
        p3o.gradient_step(both, optimizer, cfg.p3o_lr)
    assert (errors[0] != errors[1]).any(), "a value is held"
    for trained, expected in ((policy, mine), (critic, mine_critic)):
        for a, b in zip(trained.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


# ---- Offline DPO ---------------------------------------------------------------------------
def test_dpo_starts_at_ln_2_and_learns_to_prefer_the_chosen():
    reference = toy_model(0)
    policy = copy.deepcopy(reference)
    examples = [p3o.Example([0], [0, 3], [1, 3], None), p3o.Example([1], [2, 2, 3], [1, 3], None)]
    rows = []
    torch.manual_seed(0)
    cfg = toy_config(p3o_lr=1e-3, iterations=5, beta=0.5)
    relatives.train_dpo(policy, reference, examples * 40, cfg, lambda _, row: rows.append(row))
    assert len(rows) == 5 * 2 * 2, "as many updates as stage 3"
    assert rows[0]["loss/policy"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss/policy"] < 0.6
    assert rows[-1]["accuracy"] == 1
    assert same_weights(reference, toy_model(0))


def test_dpo_takes_a_minibatch_of_pairs_an_update(monkeypatch):
    sizes = []
    plain = p3o.collate

    def watched(prompts, *rest):
        sizes.append(len(prompts))
        return plain(prompts, *rest)

    monkeypatch.setattr(p3o, "collate", watched)
    examples = [p3o.Example([0], [0, 3], [1, 3], None)] * 100
    cfg = toy_config(iterations=1, pairs=32, minibatch=16)
    relatives.train_dpo(toy_model(0), toy_model(0), examples, cfg, nothing)
    assert set(sizes) == {16}


def test_dpos_gradient_is_that_of_its_loss(monkeypatch):
    """−β σ(−β Δh) ∇Δh, mean over pairs; here by autograd on one batch by hand."""
    monkeypatch.setattr(p3o, "make_optimizer", sgd)
    reference, policy = toy_model(1), toy_model(0)
    mine = copy.deepcopy(policy)
    examples = [p3o.Example([0], [0, 3], [1, 2, 3], None)]
    cfg = toy_config(iterations=1, inner_epochs=1, pairs=1, minibatch=1, beta=0.5)
    relatives.train_dpo(policy, reference, examples, cfg, nothing)
    h = []
    for response in ([0, 3], [1, 2, 3]):
        ids, mask = p3o.collate([[0]], [response], mine)
        new = p3o.sequence_logprobs(mine, ids, mask)
        h.append(new - p3o.sequence_logprobs(reference, ids, mask).detach())
    (-F.logsigmoid(0.5 * (h[0] - h[1]))).mean().backward()
    optimizer = p3o.make_optimizer([{"params": mine.parameters(), "weight_decay": 0.0}])
    p3o.gradient_step(mine, optimizer, cfg.p3o_lr)
    assert all(map(torch.allclose, mine.parameters(), policy.parameters()))


# ---- Reward and policy learned at once -----------------------------------------------------
@pytest.mark.parametrize("exact", [True, False])
def test_the_demonstration_term_sees_only_differences(exact):
    """r + δ(x) has the same gradient: δ is added to both responses of a prompt."""
    torch.manual_seed(0)
    demo, sample, delta = torch.randn(3, 8, dtype=torch.float64)
    gradients = []
    for offset in (torch.zeros_like(delta), 10 * delta):
        leaves = [(scores + offset).requires_grad_() for scores in (demo, sample)]
        relatives.demonstration_loss(*leaves, exact).backward()
        gradients.append(torch.stack([leaf.grad for leaf in leaves]))
    assert close(*gradients)
    assert (gradients[0][0] < 0).all(), "a demonstration's score is pushed up"
    assert close(gradients[0][0], -gradients[0][1])


@pytest.mark.parametrize("exact", [True, False])
def test_the_exact_term_finds_the_demonstrators_policy_and_the_logistic_one_does_not(exact):
    """From demonstrations alone, in expectation, with the policy at its optimum for each reward.

    KL(demonstrator‖π_r) goes to 0 for the gradient of the likelihood; −log σ stops earlier, where
    its two pulls on each response are equal.
    """
    torch.manual_seed(0)
    ref, wanted = torch.randn(2, 5, dtype=torch.float64).mul(1.5).log_softmax(-1)
    beta = 0.5
    r = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        policy = (ref + r.detach() / beta).log_softmax(0)  # π_r
        loss = 0.0
        for demo, sample in itertools.product(range(5), range(5)):
            weight = (wanted[demo] + policy[sample]).exp()
            loss = loss + weight * relatives.demonstration_loss(r[[demo]], r[[sample]], exact)
        (gradient,) = torch.autograd.grad(loss, r)
        r = (r - gradient).detach().requires_grad_()
    end = (ref + r.detach() / beta).log_softmax(0)
    start = (wanted.exp() * (wanted - ref)).sum().item()
    distance = (wanted.exp() * (wanted - end)).sum().item()
    assert start > 0.5
    assert distance < 1e-4 if exact else distance > 0.02


def joint_run(exact: bool, **options):
    """AIHF on the toy: demonstrations are [0, EOS], preferences say that 0 is better than 1."""
    reference = toy_model(0)
    policy, reward_model = copy.deepcopy(reference), toy_critic()
    torch.nn.init.zeros_(reward_model.score.weight)
    demos = [p3o.Example(prompt, [0, 3], [1, 3], None) for prompt in TOY_PROMPTS] * 16
    cfg = toy_config(**dict(reward_lr=3e-3, beta=0.3) | options)
    rows = []
    torch.manual_seed(0)
    relatives.train_jointly(
        policy,
        reference,
        reward_model,
        demos,
        demos,
        cfg,
        lambda _, row: rows.append(row),
        exact=exact,
    )
    assert same_weights(reference, toy_model(0))
    return policy, reward_model, rows


@pytest.mark.parametrize("exact", [True, False])
def test_learning_both_at_once_makes_demonstrations_likelier_and_ranks_preferences(exact):
    policy, reward_model, rows = joint_run(exact, iterations=25)
    ids, mask = p3o.collate([[0], [0]], [[0, 3], [1, 3]], policy)
    before = p3o.sequence_logprobs(toy_model(0), ids, mask)
    after = p3o.sequence_logprobs(policy, ids, mask)
    assert after[0] > before[0] + 0.5
    scores = p3o.reward_scores(reward_model, ids, mask)
    assert scores[0] > scores[1]
    assert rows[-1]["objective/kl"] > 0.1


@pytest.mark.parametrize("exact", [True, False])
def test_learning_both_at_once_is_blind_to_an_offset(exact, monkeypatch):
    """δ(x), of size 3, on every score that the loop sees: reward and policy end as without it."""
    monkeypatch.setattr(p3o, "make_optimizer", sgd)
    options = dict(iterations=3, lr=0.5, reward_lr=0.5)
    plain, plain_reward, _ = joint_run(exact, **options)
    assert not same_weights(plain, toy_model(0))
    scores = p3o.reward_scores

    def shifted(model, ids, mask):
        in_prompt = mask.cumsum(-1) == 0
        return scores(model, ids, mask) + 3.0 * (ids * in_prompt).sum(-1)

    monkeypatch.setattr(p3o, "reward_scores", shifted)
    moved, moved_reward, _ = joint_run(exact, **options)
    for a, b in ((plain, moved), (plain_reward, moved_reward)):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.allclose(x, y, atol=1e-4)


def test_learning_both_at_once_goes_through_all_preferences(monkeypatch):
    """And makes P3O's update, with the KL to the reference, not to the policy that sampled."""
    seen, given = [], []
    score_pairs, loss = p3o.score_pairs, p3o.p3o_loss

    def watched_pairs(model, batch):
        seen.append(tuple(example.chosen[0] for example in batch))
        return score_pairs(model, batch)

    def watched_loss(logprobs, old, ref, scores, **options):
        given.append((old, ref, options["beta"]))
        return loss(logprobs, old, ref, scores, **options)

    monkeypatch.setattr(p3o, "score_pairs", watched_pairs)
    monkeypatch.setattr(p3o, "p3o_loss", watched_loss)
    demos = [p3o.Example([0], [0, 3], [1, 3], None)] * 32
    preferences = [p3o.Example([0], [i % 3, i // 3 % 3, 3], [1, 1, 1, 3], None) for i in range(96)]
    order = [example.chosen[:2] for example in preferences]
    assert len(set(map(tuple, order))) == 9
    cfg = toy_config(iterations=2, pairs=32, minibatch=16, inner_epochs=1, beta=0.3, reward_lr=0.01)
    models = (toy_model(0), toy_model(1), toy_critic())
    torch.manual_seed(0)
    relatives.train_jointly(*models, demos, preferences, cfg, nothing)
    assert len(seen) == 4
    assert len(set(seen)) == 4, "other preferences in each update"
    for old, ref, beta in given:
        assert beta == 0.3
        assert (old - ref).abs().min() > 1e-4
