"""Test the relatives of P3O: their gradients, where each ends, and their training loops.

On bandits with five responses and on the toy model's 85 responses, in float64 where a claim is
exact.
"""

import copy
import math
from functools import partial

import pytest
import relatives
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import LONGEST, TOY_PROMPTS, even_share, nothing, same_weights, toy_batch, toy_model
from transformers import AutoModelForSequenceClassification

import p3o

LOSSES = {
    "P3O (V2)": p3o.p3o_loss,
    "P3O (V1)": partial(p3o.p3o_loss, clip="separate"),
    "RLOO": relatives.rloo_loss,
    "GRPO": relatives.grpo_loss,
    "online DPO": relatives.online_dpo_loss,
    "REBEL": relatives.rebel_loss,
}
BETA = 0.3


def random_pairs(spread: float, size: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log π, log π_old, log π_ref and scores of random pairs, (B, 2) each."""
    torch.manual_seed(0)
    old = -10 + torch.randn(size, 2, dtype=torch.float64)
    new = old + spread * torch.randn_like(old)
    ref = old + torch.randn_like(old)
    return new, old, ref, torch.randn_like(old)


def pushes(loss_fn, new: Tensor, old: Tensor, ref: Tensor, scores: Tensor, beta=BETA) -> Tensor:
    """Return −∂loss/∂log π(y_i) of each pair, (B, 2)."""
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
def test_off_policy_pushes_are_those_of_the_equations():
    new, old, ref, scores = random_pairs(0.3)
    ratio = (new - old).exp()

    def clipped(advantage):
        stopped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
        assert 0.1 < stopped.double().mean() < 0.5
        return (0.5 * advantage * ratio).where(~stopped, 0.0), stopped.double().mean()

    # RLOO and REBEL take the KL of the sampling policy, GRPO and online DPO the current one
    reward, h = scores - BETA * (old - ref), gap(new - ref)
    expected, stopped = clipped(along_G(gap(reward)))
    assert close(pushes(relatives.rloo_loss, new, old, ref, scores), expected)
    _, metrics = relatives.rloo_loss(new, old, ref, scores, beta=BETA)
    assert stopped == pytest.approx(float(metrics["policy/clipfrac"]))
    expected = clipped(along_G(gap(scores).sign()))[0] - along_G(0.5 * BETA * h)
    far = (gap(scores).abs() > 0.1)[:, None]  # where the 1e-4 beside GRPO's std hardly matters
    grpo = pushes(relatives.grpo_loss, new, old, ref, scores)
    assert torch.allclose(grpo * far, expected * far, atol=5e-3)
    chance = torch.sigmoid(gap(scores)) - torch.sigmoid(BETA * h)
    assert close(pushes(relatives.online_dpo_loss, new, old, ref, scores), along_G(BETA * chance))
    residual = gap(reward) - gap(new - old) / 4
    rebel = partial(relatives.rebel_loss, eta=4.0)
    assert close(pushes(rebel, new, old, ref, scores), along_G(2 / 4 * residual))


def test_on_fresh_samples_rloo_is_p3o():
    pairs = random_pairs(0.0)
    assert close(pushes(relatives.rloo_loss, *pairs), pushes(p3o.p3o_loss, *pairs))


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_depends_on_an_offset_and_only_the_current_log_probs_get_a_gradient(name):
    new, old, ref, scores = arguments = [values.requires_grad_() for values in random_pairs(0.3)]
    delta = 10 * torch.randn(len(scores), 1, dtype=torch.float64)  # the same for both responses
    before = pushes(LOSSES[name], new, old, ref, scores)
    assert close(pushes(LOSSES[name], new, old, ref, scores + delta), before)
    loss, metrics = LOSSES[name](*arguments, beta=BETA)
    loss.backward()
    assert new.grad.abs().max() > 0
    assert old.grad is ref.grad is scores.grad is None
    assert not any(value.requires_grad for value in metrics.values())


# ---- Where each ends -----------------------------------------------------------------------
def every_pair(values: Tensor) -> Tensor:
    return torch.cartesian_prod(values, values)


RATES = {"REBEL": 0.5, "online DPO": 6.0}  # their pushes are larger, and smaller, than the others'


def end_of(loss_fn, ref: Tensor, r: Tensor, beta: float, rate: float, rounds: int) -> Tensor:
    """Return log π after expected updates from the reference, two per sampling policy."""
    logits = ref.clone().requires_grad_()
    for _ in range(rounds):
        old = logits.detach().log_softmax(0)
        weight = every_pair(old).sum(1, keepdim=True).exp()  # (25, 1): π_old(y_1) π_old(y_2)
        for _ in range(2):
            logp = logits.log_softmax(0)
            pairs = [every_pair(values) for values in (logp.detach(), old, ref, r)]
            push = pushes(loss_fn, *pairs, beta=beta)
            (step,) = torch.autograd.grad((weight * push * every_pair(logp)).sum(), logits)
            logits = (logits + rate * step).detach().requires_grad_()
    return logits.detach().log_softmax(0)


@pytest.mark.parametrize("name", LOSSES)
def test_all_but_grpo_end_in_the_optimum(name):
    """π ∝ π_ref exp(r/β). GRPO maximises how often its responses beat the policy's own."""
    torch.manual_seed(3)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    r = 2 * torch.randn(5, dtype=torch.float64)
    beta = 1.0
    best = (ref + r / beta).log_softmax(0)
    assert (best.exp() * (best - ref)).sum() > 0.3, "the optimum should be away from the start"
    end = end_of(LOSSES[name], ref, r, beta, RATES.get(name, 1.0), rounds=200)
    distance = (best.exp() * (best - end)).sum().item()
    if name != "GRPO":
        assert distance < 2e-3
        return
    assert distance > 0.05
    beaten = (r[:, None] - r).sign() @ end.exp()  # (5,): wins minus losses against the policy
    left = beaten - beta * (end - ref)  # constant in y where the gradient is 0
    assert (left - left.mean()).abs().max() < 1e-3


# ---- PPO, piece by piece -------------------------------------------------------------------
def test_gae_is_its_definition():
    """Σ_k λ^k δ_{t+k}, by a loop over responses of different lengths."""
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


def toy_config(**options) -> p3o.Config:
    small = dict(pairs=16, minibatch=8, inner_epochs=2, response_tokens=LONGEST, p3o_lr=5e-3)
    return p3o.Config(**p3o.SMALL | small | dict(iterations=8, beta=0.05) | options)


def toy_critic() -> torch.nn.Module:
    policy = toy_model(0)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config).eval()
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    return critic


def test_token_values_are_the_critics_before_each_response_token():
    critic = toy_critic()
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
    """The score is the share of even tokens; each method raises it."""
    policy, reference, critic = toy_model(0), toy_model(0), toy_critic()
    rows = []

    def log(step, row):
        rows.append(row)

    torch.manual_seed(0)
    rest = TOY_PROMPTS * 8, toy_config(), log
    if name == "PPO":
        relatives.train_ppo(policy, reference, even_share, *rest, critic)
        assert rows[-1]["loss/value"] < rows[0]["loss/value"]
    else:
        p3o.train_policy(policy, reference, even_share, LOSSES[name], *rest)
    assert same_weights(reference, toy_model(0))
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.15


def sgd(groups: list[dict]) -> torch.optim.Optimizer:
    """Replace AdamW, whose first step is a sign, and so noise where a gradient is nearly 0."""
    return torch.optim.SGD(groups, lr=1.0)


def assert_same_parameters(*pairs) -> None:
    for trained, expected in pairs:
        for a, b in zip(trained.parameters(), expected.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("value_clip", "value_weight"), [(0.2, 0.1), (math.inf, 1.0)])
def test_ppos_updates_are_those_of_its_equations(value_clip, value_weight, monkeypatch):
    """Two updates by hand on the same samples, away from the reference; the second is clipped."""
    monkeypatch.setattr(p3o, "make_optimizer", sgd)
    reference, policy, critic = toy_model(1), toy_model(0), toy_critic()
    sizes = dict(iterations=1, pairs=32, minibatch=32, micro_batch=16)
    cfg = toy_config(inner_epochs=2, p3o_lr=0.5, beta=0.7, **sizes)
    prompts = TOY_PROMPTS * 16
    mine, mine_critic = copy.deepcopy(policy), copy.deepcopy(critic)
    torch.manual_seed(0)
    options = dict(value_clip=value_clip, value_weight=value_weight)
    if value_weight == 0.1:
        options = {}  # the defaults
    relatives.train_ppo(policy, reference, even_share, prompts, cfg, nothing, critic, **options)

    torch.manual_seed(0)
    (batch,) = p3o.shuffled(prompts, 32, 1)
    ids, mask = p3o.sample(mine, batch, 2, LONGEST)
    ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
    inside = mask[:, 1:]
    with torch.no_grad():
        old_values = relatives.token_values(mine_critic, ids, mask)
        old = p3o.response_logprobs(mine, ids, mask)
        rewards = 0.7 * (p3o.response_logprobs(reference, ids, mask) - old)
    assert rewards.abs().max() > 0.5, "the KL matters"
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
        near = values.clamp(old_values - value_clip, old_values + value_clip)
        errors = torch.stack([(values - returns).square(), (near - returns).square()])
        loss = (value_weight * 0.5 * errors.amax(0) - objective)[inside].mean()
        loss.backward()
        p3o.gradient_step(both, optimizer, cfg.p3o_lr)
    active = (errors[0] != errors[1]).any()
    assert active == (value_clip == 0.2), "the value clip is active, where there is one"
    assert_same_parameters((policy, mine), (critic, mine_critic))


# ---- Offline DPO ---------------------------------------------------------------------------
def test_dpos_updates_are_those_of_its_equation(monkeypatch):
    """As many as in stage 3, each on a minibatch of the pairs, by hand; the loss starts at ln 2."""
    monkeypatch.setattr(p3o, "make_optimizer", sgd)
    reference, policy = toy_model(0), toy_model(0)
    mine = copy.deepcopy(policy)
    responses = ([0, 3], [1, 3]), ([2, 2, 3], [1, 3]), ([0, 0, 3], [2, 1, 3])
    examples = [p3o.Example([i], *pair, None) for i, pair in enumerate(responses)] * 4
    cfg = toy_config(iterations=2, pairs=6, minibatch=3, p3o_lr=0.5, beta=0.5)
    rows = []
    torch.manual_seed(0)
    relatives.train_dpo(policy, reference, examples, cfg, lambda _, row: rows.append(row))
    assert len(rows) == 2 * 2 * 2
    assert rows[0]["loss/policy"] == pytest.approx(math.log(2), abs=1e-5)

    torch.manual_seed(0)
    optimizer = p3o.make_optimizer([{"params": mine.parameters(), "weight_decay": 0.0}])
    for step, batch in enumerate(p3o.shuffled(examples, 3, 8)):
        margins = []
        for example in batch:
            h = []
            for response in (example.chosen, example.rejected):
                row = p3o.collate([example.prompt], [response], mine)
                h.append(p3o.sequence_logprobs(mine, *row) - p3o.sequence_logprobs(reference, *row))
            margins.append(0.5 * (h[0] - h[1]))
        loss = -F.logsigmoid(torch.cat(margins)).mean()
        assert rows[step]["loss/policy"] == pytest.approx(loss.item(), abs=1e-5)
        assert rows[step]["accuracy"] == pytest.approx(sum(m.item() > 0 for m in margins) / 3)
        loss.backward()
        reference.zero_grad()
        p3o.gradient_step(mine, optimizer, p3o.learning_rate(0.5, step, 8))
    assert_same_parameters((policy, mine), (reference, toy_model(0)))
    assert rows[-1]["loss/policy"] < rows[0]["loss/policy"]


# ---- AIHF ----------------------------------------------------------------------------------
@pytest.mark.parametrize("exact", [True, False])
def test_only_the_exact_demonstration_loss_finds_the_demonstrators_policy(exact):
    """From demonstrations alone, in expectation, with the policy at its optimum for each reward.

    KL(demonstrator‖π_r) goes to 0 for the gradient of the likelihood. −log σ stops earlier, where
    its two pulls on each response are equal.
    """
    torch.manual_seed(0)
    ref, wanted = torch.randn(2, 5, dtype=torch.float64).mul(1.5).log_softmax(-1)
    beta = 0.5
    r = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    losses = torch.vmap(partial(relatives.demonstration_loss, exact=exact))
    for _ in range(400):
        policy = (ref + r.detach() / beta).log_softmax(0)  # π_r
        weight = (wanted[:, None] + policy).exp().flatten()  # (25,): demonstration and sample
        demos, samples = torch.cartesian_prod(r, r)[:, :, None].unbind(1)  # (25, 1) each
        (gradient,) = torch.autograd.grad((weight * losses(demos, samples)).sum(), r)
        r = (r - gradient).detach().requires_grad_()
    end = (ref + r.detach() / beta).log_softmax(0)
    start = (wanted.exp() * (wanted - ref)).sum().item()
    distance = (wanted.exp() * (wanted - end)).sum().item()
    assert start > 0.5
    assert distance < 1e-4 if exact else distance > 0.02


@pytest.mark.parametrize("exact", [True, False])
def test_aihf_ignores_an_offset(exact, monkeypatch):
    """Adding δ(x) of size 3 to every score in the loop changes neither reward model nor policy."""
    monkeypatch.setattr(p3o, "make_optimizer", sgd)
    demos = [p3o.Example(prompt, [0, 3], [1, 3], None) for prompt in TOY_PROMPTS] * 8
    cfg = toy_config(iterations=3, p3o_lr=0.1, reward_lr=0.1, beta=0.3)
    trained = []
    scores = p3o.reward_scores

    def shifted(model, ids, mask):
        in_prompt = mask.cumsum(-1) == 0
        return scores(model, ids, mask) + 3.0 * (ids * in_prompt).sum(-1)

    for score in (scores, shifted):
        monkeypatch.setattr(p3o, "reward_scores", score)
        policy, reference, reward_model = toy_model(0), toy_model(0), toy_critic()
        models = policy, reference, reward_model
        torch.manual_seed(0)
        relatives.train_jointly(*models, demos, demos, cfg, nothing, 1.0, exact)
        assert not same_weights(policy, reference)
        trained.append((policy, reward_model))
    assert_same_parameters(*zip(*trained, strict=True))


def test_aihfs_updates_are_those_of_its_equations(monkeypatch):
    """By hand: the reward model on demonstrations and new preferences, then the policy by P3O."""
    monkeypatch.setattr(p3o, "make_optimizer", sgd)
    policy, reference, reward_model = toy_model(0), toy_model(1), toy_critic()
    demos = [p3o.Example(prompt, [0, 3], [1, 3], None) for prompt in TOY_PROMPTS] * 4
    preferences = [p3o.Example([0], [i % 3, i // 3, 3], [1, 1, 1, 3], None) for i in range(8)]
    sizes = dict(iterations=1, pairs=8, minibatch=4, inner_epochs=1)
    cfg = toy_config(**sizes, p3o_lr=0.5, reward_lr=0.1, beta=0.3)
    mine, mine_reward = copy.deepcopy(policy), copy.deepcopy(reward_model)
    torch.manual_seed(0)
    models = policy, reference, reward_model
    relatives.train_jointly(*models, demos, preferences, cfg, nothing, 0.2, exact=True)

    torch.manual_seed(0)
    (batch,) = p3o.shuffled(demos, 8, 1)
    preferred = p3o.shuffled(preferences, 4, 2)
    prompts = [example.prompt for example in batch]
    ids, mask = p3o.sample(mine, prompts, 2, LONGEST)
    demo_ids, demo_mask = p3o.collate(prompts, [[0, 3]] * 8, mine)
    parts = torch.randperm(8).split(4)
    groups = [{"params": mine_reward.base_model.parameters()}]
    optimizer = p3o.make_optimizer([*groups, {"params": mine_reward.score.parameters()}])
    optimizer.param_groups[1]["lr_scale"] = 10
    for part, pairs in zip(parts, preferred, strict=True):
        samples = p3o.reward_scores(mine_reward, ids[part, 0], mask[part, 0])
        demo_scores = p3o.reward_scores(mine_reward, demo_ids[part], demo_mask[part])
        scores = p3o.score_pairs(mine_reward, pairs)
        loss = p3o.bradley_terry_loss(*scores.unbind(1)) + 0.2 * (samples - demo_scores).mean()
        loss.backward()
        p3o.gradient_step(mine_reward, optimizer, 0.1)
    with torch.no_grad():
        scores = p3o.reward_scores(mine_reward, ids, mask)
        old, ref = (p3o.sequence_logprobs(model, ids, mask) for model in (mine, reference))
    assert (old - ref).abs().max() > 0.1
    optimizer = p3o.make_optimizer([{"params": mine.parameters()}])
    for part in parts:
        logprobs = p3o.sequence_logprobs(mine, ids[part], mask[part])
        loss, _ = p3o.p3o_loss(logprobs, old[part], ref[part], scores[part], beta=0.3)
        loss.backward()
        p3o.gradient_step(mine, optimizer, 0.5)
    assert_same_parameters((policy, mine), (reward_model, mine_reward), (reference, toy_model(1)))
