"""The relatives of P3O, on the same pairs and in the same loop: what P3O shares with them, and what
it leaves out.

The first four are losses for `p3o.train_policy`, with the arguments of `p3o.p3o_loss`: (B, 2)
log-probs in nats and scores. PPO and offline DPO have loops of their own. As in p3o.py,
h_i = log π(y_i|x) − log π_ref(y_i|x), ρ_i = π(y_i|x) / π_old(y_i|x); Δ is y_1's minus y_2's.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import p3o


def metrics_of(log_ratio: Tensor, q: Tensor, stopped: Tensor) -> dict[str, Tensor]:
    """p3o_loss's metrics, from log ρ (B, 2), the push on a pair (B,), and what the clip stops."""
    log_ratio = log_ratio.detach()
    return {
        "policy/clipfrac": stopped.float().mean(),
        "policy/approxkl": (0.5 * log_ratio**2).mean(),
        "policy/ratio": log_ratio.exp().mean(),
        "objective/q": q.detach().abs().mean(),
    }


def clipped(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's objective, min( A ρ, A clip(ρ, 1−ε, 1+ε) ), and where the clip stops its gradient."""
    ratio = log_ratio.clamp(max=20).exp()
    free = advantage * ratio
    held = advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.minimum(free, held), held < free


# ---- Losses for train_policy -------------------------------------------------------------
def rloo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    *,
    beta: float,
    clip_range: float = 0.2,
    **_: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE leave-one-out with two samples (Ahmadian et al. 2024), clipped as PPO.

    A_i = R_i − R_{3−i}, R = r − β h_old, the KL of the *sampling* policy inside the reward:
    J = ½ Σ_i min( A_i ρ_i, A_i clip(ρ_i, 1−ε, 1+ε) ). On fresh samples this is P3O; later each
    response is weighted by its own ratio, not by that of the pair.
    """
    reward = scores - beta * (old_logprobs - ref_logprobs)  # (B, 2)
    advantage = (reward - reward.flip(-1)).detach()  # (B, 2)
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    objective, stopped = clipped(log_ratio, advantage, clip_range)
    return -objective.sum(-1).mul(0.5).mean(), metrics_of(log_ratio, advantage[:, 0], stopped)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    *,
    beta: float,
    clip_range: float = 0.2,
    **_: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Group relative policy optimization (Shao et al. 2024), groups of two, whole responses.

    A_i = (r_i − mean) / std = ±1: which response is better, and not by how much. The KL is a term
    of its own, with h of the current policy, and neither weighted nor clipped:
    J = ½ Σ_i min( A_i ρ_i, A_i clip(ρ_i, 1−ε, 1+ε) ) − ½ β sg[Δh] Δ log π. The published KL term,
    π_ref/π + h − 1, is meant for single tokens and explodes on whole responses; this one has the
    KL's gradient on fresh samples, with the partner as the baseline.
    """
    centred = (scores - scores.mean(-1, keepdim=True)).detach()  # (B, 2)
    spread = centred.square().mean(-1, keepdim=True).sqrt()  # (B, 1)
    advantage = centred / (spread + 1e-4)  # (B, 2)
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    objective, stopped = clipped(log_ratio, advantage, clip_range)
    h = logprobs - ref_logprobs.detach()  # (B, 2)
    kl_push = beta * (h[:, 0] - h[:, 1]).detach()  # (B,)
    objective = 0.5 * (objective.sum(-1) - kl_push * (logprobs[:, 0] - logprobs[:, 1]))  # (B,)
    return -objective.mean(), metrics_of(log_ratio, advantage[:, 0] - kl_push, stopped)


def online_dpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    *,
    beta: float,
    **_: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO (Rafailov et al. 2023) on fresh pairs, labelled by the reward model.

    −E log σ(β Δh), y_1 preferred with probability σ(Δr), as Bradley-Terry says; the expectation
    over the label is taken exactly. Nothing is clipped, and π_old plays no part.
    """
    h = logprobs - ref_logprobs.detach()  # (B, 2)
    margin = beta * (h[:, 0] - h[:, 1])  # (B,)
    gap = (scores[:, 0] - scores[:, 1]).detach()  # (B,): Δr
    won = torch.sigmoid(gap)  # (B,)
    loss = -(won * F.logsigmoid(margin) + (1 - won) * F.logsigmoid(-margin))  # (B,)
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    return loss.mean(), metrics_of(log_ratio, gap - margin, torch.zeros_like(gap))


def rebel_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    *,
    beta: float,
    eta: float = 1.0,
    **_: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REBEL (Gao et al. 2024): regress the gap of rewards on the move of the policy.

    ( Δ(r − β h_old) − Δ log ρ / η )². Where V2 stops, this pulls back: 1/η is the price of leaving
    π_old. The KL to the reference is in the reward.
    """
    reward = scores - beta * (old_logprobs - ref_logprobs)  # (B, 2)
    gap = (reward[:, 0] - reward[:, 1]).detach()  # (B,)
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    left = gap - (log_ratio[:, 0] - log_ratio[:, 1]) / eta  # (B,)
    return left.square().mean(), metrics_of(log_ratio, left, torch.zeros_like(gap))


# ---- PPO as it is used on language -------------------------------------------------------
def token_values(critic: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """V of the state before each response token, 0 elsewhere: (N, T−1) from (N, T)."""
    hidden = critic.base_model(ids).last_hidden_state[:, :-1]  # (N, T−1, D)
    values = critic.score(hidden).float()[..., 0]  # (N, T−1)
    return values.where(response_mask[:, 1:], 0.0)


def gae(rewards: Tensor, values: Tensor, discount: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016), γ = 1: (N, L) from (N, L) each.

    A_t = Σ_k λ^k (r_{t+k} + V_{t+k+1} − V_{t+k}). Rewards and values are 0 outside the response, so
    that V is 0 after its last token.
    """
    following = F.pad(values[:, 1:], (0, 1))  # (N, L): V_{t+1}
    surprise = rewards + following - values  # (N, L)
    advantage = torch.zeros_like(values[:, 0])  # (N,)
    columns = []
    for column in surprise.flip(-1).unbind(-1):  # from the last token to the first
        advantage = column + discount * advantage
        columns.append(advantage)
    return torch.stack(columns, -1).flip(-1)


def train_ppo(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    score: Callable[[Tensor, Tensor], Tensor],
    prompts: list[list[int]],
    cfg: p3o.Config,
    log: Callable,
    critic: PreTrainedModel,
    gae_lambda: float = 0.95,
    value_weight: float = 0.1,
) -> None:
    """Token-wise PPO with a critic, on the prompts, samples and updates of `p3o.train_policy`.

    A token is an action: its reward is −β (log π_old − log π_ref), plus the score at the last one.
    Advantages by GAE, whitened over the batch; ratios clipped token by token; the critic's values
    clipped as well (Ouyang et al. 2022). `critic` starts as a copy of the reward model.
    """
    policy.eval()
    critic.eval()
    batches = p3o.shuffled(prompts, cfg.pairs, cfg.iterations)
    both = torch.nn.ModuleList([policy, critic])
    optimizer = p3o.make_optimizer([{"params": both.parameters(), "weight_decay": 0.0}])
    size = 2 * min(cfg.micro_batch, cfg.minibatch)  # in responses: PPO knows no pairs
    for iteration in tqdm(range(cfg.iterations), "PPO"):
        lr = p3o.learning_rate(cfg.lr, iteration, cfg.iterations)

        # 1. responses, token by token
        ids, response_mask = p3o.sample(policy, batches[iteration], 2, cfg.response_tokens)
        ids, response_mask = ids.flatten(0, 1), response_mask.flatten(0, 1)  # (N, T)
        inside = response_mask[:, 1:]  # (N, T−1)
        scores = p3o.in_parts(score, size, ids, response_mask)  # (N,)
        policy_logprobs = partial(p3o.response_logprobs, policy)
        reference_logprobs = partial(p3o.response_logprobs, reference)
        old_logprobs = p3o.in_parts(policy_logprobs, size, ids, response_mask)  # (N, T−1)
        ref_logprobs = p3o.in_parts(reference_logprobs, size, ids, response_mask)  # (N, T−1)
        old_values = p3o.in_parts(partial(token_values, critic), size, ids, response_mask)

        # 2. rewards, advantages, and what the critic should have said, (N, T−1) each
        rewards = -cfg.beta * (old_logprobs - ref_logprobs)
        column = torch.arange(inside.shape[1], device=ids.device)  # (T−1,)
        last = (column * inside).argmax(-1)  # (N,)
        rewards[torch.arange(len(ids)), last] += scores
        advantages = gae(rewards, old_values, gae_lambda)
        returns = advantages + old_values
        found = advantages[inside]
        advantages = (advantages - found.mean()) / (found.std() + 1e-8)

        # 3. updates on minibatches of responses
        row = {"policy/clipfrac": 0.0, "loss/value": 0.0, "policy/grad_norm": 0.0}
        updates = 0
        for _ in range(cfg.inner_epochs):
            for minibatch in torch.randperm(len(ids)).split(2 * cfg.minibatch):
                tokens = inside[minibatch].sum()
                for part in minibatch.split(2 * cfg.micro_batch):
                    here = inside[part]  # (n, T−1)
                    logprobs = p3o.response_logprobs(policy, ids[part], response_mask[part])
                    log_ratio = logprobs - old_logprobs[part]
                    objective, stopped = clipped(log_ratio, advantages[part], cfg.clip_range)
                    values = token_values(critic, ids[part], response_mask[part])
                    moved = (values - old_values[part]).clamp(-cfg.clip_range, cfg.clip_range)
                    error = (values - returns[part]).square()
                    held_error = (old_values[part] + moved - returns[part]).square()
                    value_loss = 0.5 * torch.maximum(error, held_error)
                    loss = (value_weight * value_loss - objective)[here].sum() / tokens
                    loss.backward()
                    row["policy/clipfrac"] += (stopped[here].sum() / tokens).item()
                    row["loss/value"] += (value_loss[here].sum() / tokens).item()
                row["policy/grad_norm"] += p3o.gradient_step(both, optimizer, lr)
                updates += 1

        # 4. metrics
        row = {key: total / updates for key, total in row.items()}
        row["objective/scores"] = scores.mean().item()
        row["objective/kl"] = (old_logprobs - ref_logprobs).sum(-1).mean().item()
        row["objective/entropy"] = -old_logprobs.sum(-1).mean().item()
        row["response/length"] = response_mask.sum(-1).float().mean().item()
        log(iteration, row)


# ---- Offline DPO -------------------------------------------------------------------------
def train_dpo(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    examples: list[p3o.Example],
    cfg: p3o.Config,
    log: Callable,
) -> None:
    """DPO on the data's pairs, without a reward model or a sample: −log σ(β (h_w − h_l)).

    As many updates as stage 3 makes, on `cfg.minibatch` pairs each.
    """
    policy.eval()
    steps = cfg.iterations * cfg.inner_epochs * math.ceil(cfg.pairs / cfg.minibatch)
    batches = p3o.shuffled(examples, cfg.minibatch, steps)
    optimizer = p3o.make_optimizer([{"params": policy.parameters(), "weight_decay": 0.0}])
    for step, batch in enumerate(tqdm(batches, "DPO")):
        prompts = [example.prompt for example in batch]
        chosen = p3o.collate(prompts, [example.chosen for example in batch], policy)
        rejected = p3o.collate(prompts, [example.rejected for example in batch], policy)
        margins = 0.0
        for (ids, response_mask), sign in ((chosen, 1), (rejected, -1)):  # (B, T) each
            with torch.no_grad():
                ref = p3o.sequence_logprobs(reference, ids, response_mask)  # (B,)
            h = p3o.sequence_logprobs(policy, ids, response_mask) - ref  # (B,)
            margins = margins + sign * cfg.beta * h
        loss = -F.logsigmoid(margins).mean()
        loss.backward()
        lr = p3o.learning_rate(cfg.lr, step, steps)
        norm = p3o.gradient_step(policy, optimizer, lr)
        accuracy = (margins > 0).float().mean().item()
        log(step, {"loss/policy": loss.item(), "accuracy": accuracy, "policy/grad_norm": norm})


# ---- Reward and policy learned at once ---------------------------------------------------
def demonstration_loss(demo_scores: Tensor, sample_scores: Tensor, exact: bool) -> Tensor:
    """What demonstrations ask of the reward, (B,), (B,) → scalar.

    Exact, r(sample) − r(demonstration): its gradient is that of −β log π_r(demonstration), where
    π_r ∝ π_ref exp(r/β) and the sample is drawn from π_r. Or −log σ(r(demonstration) − r(sample)),
    Bradley-Terry as if the demonstration had been preferred, which stops pulling once it is.
    Both see only differences within a prompt.
    """
    if exact:
        return (sample_scores - demo_scores).mean()
    return p3o.bradley_terry_loss(demo_scores, sample_scores)


def train_jointly(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: PreTrainedModel,
    demonstrations: list[p3o.Example],
    preferences: list[p3o.Example],
    cfg: p3o.Config,
    log: Callable,
    *,
    demo_weight: float = 1.0,
    exact: bool = True,
) -> None:
    """AIHF (Li et al. 2024): one stage in the place of the last two; P3O is its policy step.

    Each iteration samples a pair for each of cfg.pairs prompts, makes as many updates of the reward
    as of the policy, and both start from where they were. The reward minimises
    demo_weight · demonstration_loss(chosen, y_1) + the Bradley-Terry loss of as many preferences;
    then the policy makes P3O's updates under the new reward, with the KL to the fixed reference.
    """
    policy.eval()
    reward_model.eval()
    updates = cfg.inner_epochs * math.ceil(cfg.pairs / cfg.minibatch)
    demo_batches = p3o.shuffled(demonstrations, cfg.pairs, cfg.iterations)
    preferred = p3o.shuffled(preferences, cfg.minibatch, cfg.iterations * updates)
    body = {"params": reward_model.base_model.parameters()}
    head = {"params": reward_model.score.parameters(), "lr_scale": 10}
    reward_optimizer = p3o.make_optimizer([body, head])
    optimizer = p3o.make_optimizer([{"params": policy.parameters(), "weight_decay": 0.0}])
    for iteration in tqdm(range(cfg.iterations), "AIHF"):
        batch = demo_batches[iteration]
        prompts = [example.prompt for example in batch]
        ids, mask = p3o.sample(policy, prompts, 2, cfg.response_tokens)  # (B, 2, T)
        demos = p3o.collate(prompts, [example.chosen for example in batch], policy)  # (B, T')

        # 1. the reward: demonstrations over samples, preferred over rejected
        lr = p3o.learning_rate(cfg.reward_lr, iteration, cfg.iterations)
        total = 0.0
        minibatches = []
        for _ in range(cfg.inner_epochs):
            minibatches += torch.randperm(cfg.pairs).split(cfg.minibatch)
        for step, part in enumerate(minibatches):
            demo_scores = p3o.reward_scores(reward_model, demos[0][part], demos[1][part])  # (b,)
            sample_scores = p3o.reward_scores(reward_model, ids[part, 0], mask[part, 0])  # (b,)
            pairs = p3o.score_pairs(reward_model, preferred[iteration * updates + step])  # (b, 2)
            loss = p3o.bradley_terry_loss(pairs[:, 0], pairs[:, 1])
            loss = loss + demo_weight * demonstration_loss(demo_scores, sample_scores, exact)
            loss.backward()
            p3o.gradient_step(reward_model, reward_optimizer, lr)
            total += loss.item() / updates

        # 2. the policy: P3O under the reward as it is now
        lr = p3o.learning_rate(cfg.lr, iteration, cfg.iterations)
        with torch.no_grad():
            scores = p3o.reward_scores(reward_model, ids, mask)  # (B, 2)
            old = p3o.sequence_logprobs(policy, ids, mask)  # (B, 2)
            ref = p3o.sequence_logprobs(reference, ids, mask)  # (B, 2)
        for part in minibatches:
            logprobs = p3o.sequence_logprobs(policy, ids[part], mask[part])  # (b, 2)
            loss, _ = p3o.p3o_loss(logprobs, old[part], ref[part], scores[part], beta=cfg.beta)
            loss.backward()
            p3o.gradient_step(policy, optimizer, lr)
        kl = (old - ref).mean().item()
        log(
            iteration,
            {"loss/reward": total, "objective/kl": kl, "objective/scores": scores.mean().item()},
        )
