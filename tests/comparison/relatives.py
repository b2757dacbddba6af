"""The relatives of P3O: RLOO, GRPO, online DPO, REBEL, PPO, DPO and AIHF, each with its equation.

The first four are losses for `p3o.train_policy`, with the arguments and results of `p3o.p3o_loss`:
log-probs in nats and scores, (B, 2) each. The others are loops, with the arguments of
`p3o.train_policy` and more. As in p3o.py, h_i = log π(y_i|x) − log π_ref(y_i|x) and
ρ_i = π(y_i|x) / π_old(y_i|x). Δ is the value of y_1 minus that of y_2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import p3o

VALUE_WEIGHT = 0.1  # of the critic's loss in PPO
VALUE_CLIP = 0.2  # how far a value may move on one batch of samples before its gradient stops


def metrics_of(log_ratio: Tensor, q: Tensor, stopped: Tensor) -> dict[str, Tensor]:
    """Return the metrics of p3o_loss.

    From log ρ (B, 2), the push on each pair (B,), and whether the clip stops it.
    """
    log_ratio = log_ratio.detach()
    return {
        "policy/clipfrac": stopped.float().mean(),
        "policy/approxkl": (0.5 * log_ratio**2).mean(),
        "policy/ratio": log_ratio.exp().mean(),
        "objective/q": q.detach().abs().mean(),
    }


def clipped(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Return PPO's objective min( A ρ, A clip(ρ, 1−ε, 1+ε) ), and where the clip is active."""
    ratio = log_ratio.clamp(max=20).exp()
    plain = advantage * ratio
    bounded = advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.minimum(plain, bounded), bounded < plain


# ---- Losses for train_policy -------------------------------------------------------------
def rloo_loss(logprobs, old_logprobs, ref_logprobs, scores, *, beta, clip_range=0.2, **_):
    """REINFORCE leave-one-out with two samples (Ahmadian et al. 2024), with PPO's clip.

    J = ½ Σ_i min( A_i ρ_i, A_i clip(ρ_i, 1−ε, 1+ε) ), with A_i = R_i − R_{3−i} and R = r − β h_old:
    the reward contains the KL of the *sampling* policy. On fresh samples this is P3O. Off-policy,
    each response is weighted by its own ratio and not by the pair's.
    """
    reward = scores - beta * (old_logprobs - ref_logprobs)  # (B, 2)
    advantage = (reward - reward.flip(-1)).detach()  # (B, 2)
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    objective, stopped = clipped(log_ratio, advantage, clip_range)
    return -objective.sum(-1).mul(0.5).mean(), metrics_of(log_ratio, advantage[:, 0], stopped)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, scores, *, beta, clip_range=0.2, **_):
    """Group relative policy optimization (Shao et al. 2024) with groups of two, on whole responses.

    J = ½ Σ_i min( A_i ρ_i, A_i clip(ρ_i, 1−ε, 1+ε) ) − ½ β sg[Δh] Δ log π. The advantages
    A_i = (r_i − mean) / std = ±1 say which response is better and not by how much. The KL is a term
    of its own: h is the current policy's, and nothing weights or clips it. The published KL term,
    π_ref/π + h − 1, is meant for single tokens and explodes on whole responses. This one has the
    gradient of the KL on fresh samples, with the partner as the baseline.
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


def online_dpo_loss(logprobs, old_logprobs, ref_logprobs, scores, *, beta, **_):
    """DPO (Rafailov et al. 2023) on sampled pairs that the reward model labels.

    The loss is −E log σ(β Δh). y_1 is preferred with probability σ(Δr), as in Bradley-Terry, and
    the expectation over the label is exact. Nothing is clipped, and π_old is not used.
    """
    h = logprobs - ref_logprobs.detach()  # (B, 2)
    margin = beta * (h[:, 0] - h[:, 1])  # (B,)
    gap = (scores[:, 0] - scores[:, 1]).detach()  # (B,): Δr
    won = torch.sigmoid(gap)  # (B,)
    loss = -(won * F.logsigmoid(margin) + (1 - won) * F.logsigmoid(-margin))  # (B,)
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    return loss.mean(), metrics_of(log_ratio, gap - margin, torch.zeros_like(gap))


def rebel_loss(logprobs, old_logprobs, ref_logprobs, scores, *, beta, eta=1.0, **_):
    """REBEL (Gao et al. 2024): fit Δ log ρ / η to the difference of the rewards.

    The loss is ( Δ(r − β h_old) − Δ log ρ / η )². Where P3O (V2) stops, REBEL pulls back: 1/η is
    the price of leaving π_old. The reward contains the KL to the reference.
    """
    reward = scores - beta * (old_logprobs - ref_logprobs)  # (B, 2)
    gap = (reward[:, 0] - reward[:, 1]).detach()  # (B,)
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2)
    residual = gap - (log_ratio[:, 0] - log_ratio[:, 1]) / eta  # (B,)
    return residual.square().mean(), metrics_of(log_ratio, residual, torch.zeros_like(gap))


# ---- PPO, token by token -----------------------------------------------------------------
def token_values(critic: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
    """Return V of the state before each response token, and 0 elsewhere: (N, T−1) from (N, T)."""
    hidden = critic.base_model(ids).last_hidden_state[:, :-1]  # (N, T−1, D)
    values = critic.score(hidden).float()[..., 0]  # (N, T−1)
    return values.where(response_mask[:, 1:], 0.0)


def gae(rewards: Tensor, values: Tensor, discount: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016) with γ = 1 and λ = discount.

    A_t = Σ_k λ^k (r_{t+k} + V_{t+k+1} − V_{t+k}), (N, L) from rewards and values (N, L). Both are 0
    outside the response, so V is 0 after its last token.
    """
    next_values = F.pad(values[:, 1:], (0, 1))  # (N, L): V_{t+1}
    errors = rewards + next_values - values  # (N, L)
    advantage = torch.zeros_like(values[:, 0])  # (N,)
    columns = []
    for column in errors.flip(-1).unbind(-1):  # from the last token to the first
        advantage = column + discount * advantage
        columns.append(advantage)
    return torch.stack(columns, -1).flip(-1)


def train_ppo(
    policy,
    reference,
    score,
    prompts,
    cfg,
    log,
    critic,
    gae_lambda=0.95,
    value_clip=VALUE_CLIP,
    value_weight=VALUE_WEIGHT,
) -> None:
    """PPO with a critic (Ouyang et al. 2022): the prompts, samples and updates of train_policy.

    Each token is an action. Its reward is −β (log π_old − log π_ref); the last token gets the score
    as well. Advantages come from GAE and are whitened over the batch. The ratio of each token and
    the critic's values are clipped. `critic` should start as a copy of the reward model.
    """
    policy.eval()
    critic.eval()
    batches = p3o.shuffled(prompts, cfg.pairs, cfg.iterations)
    both = torch.nn.ModuleList([policy, critic])
    optimizer = p3o.make_optimizer([{"params": both.parameters(), "weight_decay": 0.0}])
    size = 2 * cfg.micro_batch  # of responses: PPO has no pairs
    for iteration in tqdm(range(cfg.iterations), "PPO"):
        lr = p3o.learning_rate(cfg.p3o_lr, iteration, cfg.iterations)

        # 1. responses, token by token
        ids, response_mask = p3o.sample(policy, batches[iteration], 2, cfg.response_tokens)
        ids, response_mask = ids.flatten(0, 1), response_mask.flatten(0, 1)  # (N, T)
        inside = response_mask[:, 1:]  # (N, T−1)
        parts = list(zip(ids.split(size), response_mask.split(size), strict=True))
        with torch.no_grad():
            scores = torch.cat([score(*part) for part in parts])  # (N,)
            old_logprobs = torch.cat([p3o.response_logprobs(policy, *part) for part in parts])
            ref_logprobs = torch.cat([p3o.response_logprobs(reference, *part) for part in parts])
            old_values = torch.cat([token_values(critic, *part) for part in parts])  # (N, T−1)

        # 2. rewards, advantages, and the targets of the critic, (N, T−1) each
        rewards = -cfg.beta * (old_logprobs - ref_logprobs)
        column = torch.arange(inside.shape[1], device=ids.device)  # (T−1,)
        last = (column * inside).argmax(-1)  # (N,)
        rewards[torch.arange(len(ids)), last] += scores
        advantages = gae(rewards, old_values, gae_lambda)
        returns = advantages + old_values
        used = advantages[inside]
        advantages = (advantages - used.mean()) / (used.std() + 1e-8)

        # 3. updates on minibatches of responses
        row = {"policy/clipfrac": 0.0, "loss/value": 0.0, "policy/grad_norm": 0.0}
        updates = 0
        for _ in range(cfg.inner_epochs):
            for minibatch in torch.randperm(len(ids)).split(2 * cfg.minibatch):
                tokens = inside[minibatch].sum()
                for part in minibatch.split(size):
                    here = inside[part]  # (n, T−1)
                    logprobs = p3o.response_logprobs(policy, ids[part], response_mask[part])
                    log_ratio = logprobs - old_logprobs[part]
                    objective, stopped = clipped(log_ratio, advantages[part], cfg.clip_range)
                    values = token_values(critic, ids[part], response_mask[part])
                    moved = (values - old_values[part]).clamp(-value_clip, value_clip)
                    error = (values - returns[part]).square()
                    clipped_error = (old_values[part] + moved - returns[part]).square()
                    value_loss = 0.5 * torch.maximum(error, clipped_error)
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
def train_dpo(policy, reference, examples, cfg, log) -> None:
    """DPO on the pairs of the dataset: −log σ(β (h_w − h_l)); no reward model and no samples.

    Makes the same number of updates as stage 3, on `cfg.minibatch` pairs each.
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
        lr = p3o.learning_rate(cfg.p3o_lr, step, steps)
        norm = p3o.gradient_step(policy, optimizer, lr)
        accuracy = (margins > 0).float().mean().item()
        log(step, {"loss/policy": loss.item(), "accuracy": accuracy, "policy/grad_norm": norm})


# ---- AIHF: reward and policy at once -----------------------------------------------------
def demonstration_loss(demo_scores: Tensor, sample_scores: Tensor, exact: bool) -> Tensor:
    """Return the reward model's loss on demonstrations: scores (B,), (B,) → scalar.

    The exact form is r(sample) − r(demonstration). Its gradient is that of
    −β log π_r(demonstration), where π_r ∝ π_ref exp(r/β) and the sample comes from π_r. The other
    form is −log σ( r(demonstration) − r(sample) ): Bradley-Terry, as if the demonstration had been
    preferred. Both use only differences within a prompt.
    """
    if exact:
        return (sample_scores - demo_scores).mean()
    return p3o.bradley_terry_loss(demo_scores, sample_scores)


def train_jointly(
    policy, reference, reward_model, demos, preferences, cfg, log, demo_weight, exact
):
    """AIHF (Li et al. 2024): one stage replaces the last two; its policy step is P3O's.

    Each iteration samples a pair for each of cfg.pairs prompts. Then it updates the reward model
    and the policy, the same number of times each. The reward model minimises demo_weight ·
    demonstration_loss(chosen, y_1) plus the Bradley-Terry loss on the same number of preferences.
    The policy makes P3O's updates under the new reward, with the KL to the fixed reference.
    """
    policy.eval()
    reward_model.eval()
    updates = cfg.inner_epochs * math.ceil(cfg.pairs / cfg.minibatch)
    demo_batches = p3o.shuffled(demos, cfg.pairs, cfg.iterations)
    preferred = p3o.shuffled(preferences, cfg.minibatch, cfg.iterations * updates)
    body = {"params": reward_model.base_model.parameters()}
    head = {"params": reward_model.score.parameters(), "lr_scale": 10}
    reward_optimizer = p3o.make_optimizer([body, head])
    optimizer = p3o.make_optimizer([{"params": policy.parameters(), "weight_decay": 0.0}])
    for iteration in tqdm(range(cfg.iterations), "AIHF"):
        batch = demo_batches[iteration]
        prompts = [example.prompt for example in batch]
        ids, mask = p3o.sample(policy, prompts, 2, cfg.response_tokens)  # (B, 2, T)
        chosen = [example.chosen for example in batch]
        demo_ids, demo_mask = p3o.collate(prompts, chosen, policy)  # (B, T')

        # 1. the reward model: demonstrations above samples, chosen above rejected
        lr = p3o.learning_rate(cfg.reward_lr, iteration, cfg.iterations)
        total = 0.0
        minibatches = []
        for _ in range(cfg.inner_epochs):
            minibatches += torch.randperm(cfg.pairs).split(cfg.minibatch)
        for step, part in enumerate(minibatches):
            demo_scores = p3o.reward_scores(reward_model, demo_ids[part], demo_mask[part])  # (b,)
            sample_scores = p3o.reward_scores(reward_model, ids[part, 0], mask[part, 0])  # (b,)
            pairs = p3o.score_pairs(reward_model, preferred[iteration * updates + step])  # (b, 2)
            loss = p3o.bradley_terry_loss(*pairs.unbind(-1))
            loss = loss + demo_weight * demonstration_loss(demo_scores, sample_scores, exact)
            loss.backward()
            p3o.gradient_step(reward_model, reward_optimizer, lr)
            total += loss.item() / updates

        # 2. the policy: P3O under the new reward
        lr = p3o.learning_rate(cfg.p3o_lr, iteration, cfg.iterations)
        with torch.no_grad():
            scores = p3o.reward_scores(reward_model, ids, mask)  # (B, 2)
            old = p3o.sequence_logprobs(policy, ids, mask)  # (B, 2)
            ref = p3o.sequence_logprobs(reference, ids, mask)  # (B, 2)
        for part in minibatches:
            logprobs = p3o.sequence_logprobs(policy, ids[part], mask[part])  # (b, 2)
            loss, _ = p3o.p3o_loss(logprobs, old[part], ref[part], scores[part], beta=cfg.beta)
            loss.backward()
            p3o.gradient_step(policy, optimizer, lr)
        row = {"loss/reward": total, "objective/kl": (old - ref).mean().item()}
        log(iteration, row | {"objective/scores": scores.mean().item()})
