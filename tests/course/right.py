"""Right solutions of the eight problems in other styles than p3o.py's. The tests must accept them.

A function is called PROBLEM__STYLE. Its body takes the place of the problem's body in the starter.
"""
# ruff: noqa: F821

import math

import torch
import torch.nn.functional as F


# ---- 1 -------------------------------------------------------------------------------------
def collate__lists(prompts, responses, model):
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids, mask = [], []
    for p, r in zip(prompts, responses, strict=True):
        rest = width - len(p) - len(r)
        ids.append(p + r + [model.config.pad_token_id] * rest)
        mask.append([False] * len(p) + [True] * len(r) + [False] * rest)
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def collate__fill(prompts, responses, model):
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    ids = torch.full((len(prompts), max(lengths)), model.config.pad_token_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        ids[i, : lengths[i]] = torch.tensor([*p, *r])
        mask[i, len(p) : lengths[i]] = True
    return ids.to(model.device), mask.to(model.device)


def collate__pad_twice(prompts, responses, model):
    pad = torch.nn.utils.rnn.pad_sequence
    rows, inside = [], []
    for p, r in zip(prompts, responses, strict=True):
        rows.append(torch.LongTensor(p + r))
        inside.append(torch.cat([torch.zeros(len(p)), torch.ones(len(r))]).bool())
    ids = pad(rows, batch_first=True, padding_value=model.config.pad_token_id)
    mask = pad(inside, batch_first=True, padding_value=False)
    return ids.to(model.device), mask.to(model.device)


# ---- 2 -------------------------------------------------------------------------------------
def response_logprobs__gather(model, ids, response_mask):
    shape = ids.shape
    ids = ids.reshape(-1, shape[-1])
    mask = response_mask.reshape(-1, shape[-1])
    hidden = model.base_model(input_ids=ids).last_hidden_state
    row, column = mask.nonzero(as_tuple=True)  # of each response token
    logits = model.get_output_embeddings()(hidden[row, column - 1])
    logp = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked = logp.gather(1, ids[row, column][:, None])[:, 0]
    out = torch.zeros(len(ids), shape[-1] - 1, device=ids.device)
    out = out.index_put((row, column - 1), picked)
    return out.reshape(*shape[:-1], shape[-1] - 1)


def response_logprobs__rows(model, ids, response_mask):
    rows = []
    for row, mask in zip(ids.flatten(0, -2), response_mask.flatten(0, -2), strict=True):
        states = model.base_model(row[None]).last_hidden_state[0]
        values = [torch.zeros((), device=ids.device)] * (len(row) - 1)
        where = mask.nonzero()[:, 0].tolist()
        logits = model.get_output_embeddings()(states[[t - 1 for t in where]]).float()
        for t, scores in zip(where, logits, strict=True):
            values[t - 1] = scores[row[t]] - scores.logsumexp(0)
        rows.append(torch.stack(values))
    return torch.stack(rows).view(*ids.shape[:-1], -1)


def response_logprobs__one_hot(model, ids, response_mask):
    tokens = ids.flatten(0, -2)
    wanted = response_mask.flatten(0, -2)[:, 1:]
    states = model.base_model(tokens)[0][:, :-1][wanted]
    logits = model.get_output_embeddings()(states).float()
    chosen = F.one_hot(tokens[:, 1:][wanted], logits.shape[-1]).float()
    picked = torch.einsum("nv,nv->n", chosen, logits) - logits.logsumexp(-1)
    out = torch.zeros(wanted.shape, device=ids.device)
    out[wanted] = picked
    return out.view(*ids.shape[:-1], -1)


# ---- 3 -------------------------------------------------------------------------------------
def sample__generate(model, prompts, n, max_tokens):
    rows = [p for p in prompts for _ in range(n)]
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    responses = []
    for new in out[:, width:].tolist():
        if eos in new:
            new = new[: new.index(eos) + 1]
        responses.append(new)
    ids, mask = collate(rows, responses, model)
    return ids.unflatten(0, (len(prompts), n)), mask.unflatten(0, (len(prompts), n))


def sample__without_cache(model, prompts, n, max_tokens):
    """Read everything again for each token, padded on the right: slow, and hard to get wrong."""
    rows = [p for p in prompts for _ in range(n)]
    responses = [[] for _ in rows]
    for _ in range(max_tokens):
        open_ = [i for i, r in enumerate(responses) if not r or r[-1] != model.config.eos_token_id]
        if not open_:
            break
        ids, _ = collate([rows[i] for i in open_], [responses[i] for i in open_], model)
        states = model.base_model(ids).last_hidden_state
        last = torch.tensor([len(rows[i]) + len(responses[i]) - 1 for i in open_])
        states = states[torch.arange(len(open_)), last.to(ids.device)]
        probabilities = model.get_output_embeddings()(states).float().softmax(-1)
        for i, token in zip(open_, torch.multinomial(probabilities, 1)[:, 0].tolist(), strict=True):
            responses[i] = [*responses[i], token]
    ids, mask = collate(rows, responses, model)
    return ids.view(len(prompts), n, -1), mask.view(len(prompts), n, -1)


def sample__gumbel(model, prompts, n, max_tokens):
    pad, eos, device = model.config.pad_token_id, model.config.eos_token_id, model.device
    width = max(len(p) for p in prompts)
    left = torch.tensor([width - len(p) for p in prompts], device=device).repeat_interleave(n)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    ids = ids.repeat_interleave(n, 0)
    seen = (torch.arange(width, device=device) >= left[:, None]).long()
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    new, kept, cache, step = [], [], None, ids
    for _ in range(max_tokens):
        position = (seen.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        out = model.base_model(
            step,
            attention_mask=seen,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits = model.get_output_embeddings()(out.last_hidden_state[:, -1]).double()
        noise = -torch.log(-torch.log(torch.rand_like(logits)))
        token = (logits + noise).argmax(-1)
        kept.append(~done)
        new.append(torch.where(done, pad, token))
        done = done | (token == eos)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        step = new[-1][:, None]
        if done.all():
            break
    new, kept = torch.stack(new, 1), torch.stack(kept, 1)
    ids = torch.cat([ids, new], 1)
    mask = torch.cat([torch.zeros(len(ids), width, dtype=torch.bool, device=device), kept], 1)
    rows, masks = [], []
    for i, shift in enumerate(left.tolist()):
        rows.append(torch.cat([ids[i, shift:], ids.new_full((shift,), pad)]))
        masks.append(torch.cat([mask[i, shift:], mask.new_zeros(shift)]))
    shape = (len(prompts), n, -1)
    return torch.stack(rows).view(shape), torch.stack(masks).view(shape)


# ---- 4 -------------------------------------------------------------------------------------
def reward_scores__gather(model, ids, response_mask):
    flat = ids.reshape(-1, ids.shape[-1])
    lengths = response_mask.reshape(flat.shape).long().cumsum(-1)
    last = lengths.argmax(-1)  # the first column where the count is complete
    hidden = model.base_model(flat).last_hidden_state
    index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
    return model.score(hidden.gather(1, index)[:, 0]).float().reshape(ids.shape[:-1])


def reward_scores__rows(model, ids, response_mask):
    scores = []
    for row, mask in zip(ids.flatten(0, -2), response_mask.flatten(0, -2), strict=True):
        end = mask.nonzero().max().item() + 1
        hidden = model.base_model(row[None, :end]).last_hidden_state[0, -1]
        scores.append(model.score(hidden))
    return torch.cat(scores).float().view(ids.shape[:-1])


def reward_scores__flip(model, ids, response_mask):
    mask = response_mask.flatten(0, -2)
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    hidden = model.base_model(ids.flatten(0, -2))[0]
    return F.linear(hidden[last], model.score.weight).float().view(ids.shape[:-1])


# ---- 5 -------------------------------------------------------------------------------------
def bradley_terry_loss__softplus(chosen_scores, rejected_scores):
    return F.softplus(rejected_scores - chosen_scores).mean()


def bradley_terry_loss__softmax(chosen_scores, rejected_scores):
    both = torch.stack([chosen_scores, rejected_scores], -1)
    return -both.log_softmax(-1)[..., 0].mean()


def bradley_terry_loss__classification(chosen_scores, rejected_scores):
    gap = chosen_scores - rejected_scores
    return F.binary_cross_entropy_with_logits(gap, torch.ones_like(gap))


# ---- 6 -------------------------------------------------------------------------------------
def p3o_loss__two_columns(
    logprobs, old_logprobs, ref_logprobs, scores, *, beta, clip, clip_range, ratio_bound
):
    l1, l2 = (logprobs - old_logprobs.detach()).unbind(-1)
    with torch.no_grad():
        h1, h2 = (logprobs - ref_logprobs).unbind(-1)
        q = (scores[:, 0] - scores[:, 1]) - beta * (h1 - h2)
    u = l1 - l2
    both = (l1 + l2).exp().detach()
    if clip == "separate":
        r1, r2 = l1.clamp(max=20).exp(), l2.clamp(max=20).exp()
        w1 = r1.detach().clamp(1 / ratio_bound, ratio_bound)
        w2 = r2.detach().clamp(1 / ratio_bound, ratio_bound)
        low, high = 1 - clip_range, 1 + clip_range
        first = torch.min(q * w2 * r1, q * w2 * r1.clamp(low, high))
        second = torch.min(-q * w1 * r2, -q * w1 * r2.clamp(low, high))
        objective = 0.5 * (first + second)
        stopped = torch.stack(
            [
                q * w2 * r1 > q * w2 * r1.clamp(low, high),
                -q * w1 * r2 > -q * w1 * r2.clamp(low, high),
            ]
        )
    elif clip == "joint":
        w = both.clamp(1 / ratio_bound, ratio_bound)
        a, b = q * w * u, q * w * u.clamp(-clip_range, clip_range)
        objective = 0.5 * torch.min(a, b)
        stopped = b < a
    elif clip == "none":
        objective = 0.5 * q * both * u
        stopped = torch.zeros_like(u)
    else:
        raise ValueError(f"no such clip: {clip}")
    metrics = {
        "policy/clipfrac": stopped.float().mean(),
        "policy/approxkl": torch.stack([l1, l2]).detach().square().mean() / 2,
        "policy/ratio": torch.stack([l1, l2]).detach().exp().mean(),
        "objective/q": q.abs().mean(),
    }
    return -objective.mean(), metrics


def p3o_loss__signs(
    logprobs, old_logprobs, ref_logprobs, scores, *, beta, clip, clip_range, ratio_bound
):
    if clip not in ("joint", "separate", "none"):
        raise ValueError(f"clip={clip}")
    sign = torch.tensor([1.0, -1.0], dtype=logprobs.dtype, device=logprobs.device)
    moved = logprobs - old_logprobs.detach()
    q = (scores.detach() * sign).sum(1) - beta * ((logprobs - ref_logprobs).detach() * sign).sum(1)
    ratio = moved.clamp(max=20).exp()
    stopped = torch.zeros_like(q)
    if clip == "separate":
        bounded = ratio.detach().clamp(1 / ratio_bound, ratio_bound)
        force = q[:, None] * sign * bounded[:, [1, 0]]
        out = torch.where(force > 0, moved.exp() > 1 + clip_range, ratio < 1 - clip_range)
        stopped = (out & (force != 0)).float()
        held = ratio.clamp(1 - clip_range, 1 + clip_range)
        terms = (force * torch.where(stopped.bool(), held, ratio)).sum(1)
    else:
        u = (moved * sign).sum(1)
        weight = moved.detach().sum(1).exp()
        if clip == "joint":
            force = q * weight.clamp(1 / ratio_bound, ratio_bound)
            out = torch.where(force > 0, u > clip_range, u < -clip_range) & (force != 0)
            stopped = out.float()
            terms = force * torch.where(out, u.clamp(-clip_range, clip_range), u)
        else:
            terms = q * weight * u
    metrics = {
        "policy/clipfrac": stopped.mean(),
        "policy/approxkl": 0.5 * moved.detach().pow(2).mean(),
        "policy/ratio": moved.detach().exp().mean(),
        "objective/q": q.abs().mean(),
    }
    return -0.5 * terms.mean(), metrics


def p3o_loss__one_response_at_a_time(
    logprobs, old_logprobs, ref_logprobs, scores, *, beta, clip, clip_range, ratio_bound
):
    moved = logprobs - old_logprobs.detach()
    h = (logprobs - ref_logprobs).detach()
    q = (scores[:, 0] - scores[:, 1]).detach() - beta * (h[:, 0] - h[:, 1])
    if clip == "separate":
        terms = []
        for mine, partner, push in ((0, 1, q), (1, 0, -q)):
            rho, other = moved[:, mine].clamp(max=20).exp(), moved[:, partner].detach().exp()
            push = push * other.clip(1 / ratio_bound, ratio_bound)
            terms.append((push * rho, push * rho.clip(1 - clip_range, 1 + clip_range)))
    elif clip in ("joint", "none"):
        push = q * torch.exp(moved.detach().sum(1))
        u = cut = moved[:, 0] - moved[:, 1]
        if clip == "joint":
            push = q * torch.exp(moved.detach().sum(1)).clip(1 / ratio_bound, ratio_bound)
            cut = u.clip(-clip_range, clip_range)
        terms = [(push * u, push * cut)]
    else:
        raise ValueError("clip must be joint, separate or none")
    objective = sum(torch.minimum(free, cut) for free, cut in terms) / 2
    metrics = {
        "policy/clipfrac": torch.cat([cut < free for free, cut in terms]).double().mean(),
        "policy/approxkl": (moved.detach() ** 2 / 2).mean(),
        "policy/ratio": moved.detach().exp().mean(),
        "objective/q": q.abs().mean(),
    }
    return -objective.mean(), metrics


# ---- 7 -------------------------------------------------------------------------------------
def set_gain__all_at_once(model, policy, prompts, cfg):
    ids, mask = sample(policy, prompts, 2, cfg.response_tokens)
    gaps = reward_scores(model, ids, mask).diff()
    rms = gaps.norm().item() / math.sqrt(len(gaps))
    if rms == 0 or not math.isfinite(rms):
        raise FloatingPointError("the scores are all alike; try another --reward-lr")
    model.score.weight /= rms
    return 1 / rms


def set_gain__one_by_one(model, policy, prompts, cfg):
    squares = 0.0
    for prompt in prompts:
        r = reward_scores(model, *sample(policy, [prompt], 2, cfg.response_tokens))
        squares += (r[0, 0].double() - r[0, 1].double()).item() ** 2
    if not 0 < squares < math.inf:
        raise FloatingPointError("the scores are all alike; try another --reward-lr")
    factor = (len(prompts) / squares) ** 0.5
    model.score.weight.data *= factor
    return factor


def set_gain__by_variance(model, policy, prompts, cfg):
    """The mean square of r_1 − r_2 is four times the mean variance within a pair."""
    variances = []
    for i in range(0, len(prompts), 10):
        ids, mask = sample(policy, prompts[i : i + 10], 2, cfg.response_tokens)
        variances.append(reward_scores(model, ids, mask).var(1, correction=0))
    deviation = torch.cat(variances).mean().sqrt().item()
    if not 0 < deviation < float("inf"):
        raise FloatingPointError("the scores are all alike; try another --reward-lr")
    factor = 0.5 / deviation
    model.score.weight.copy_(model.score.weight * factor)
    return factor


# ---- 8 -------------------------------------------------------------------------------------
def train_policy__lists(policy, reference, score, loss_fn, prompts, cfg, log, checkpoint=None):
    policy.eval()
    params = [{"params": list(policy.parameters()), "weight_decay": 0.0}]
    opt = make_optimizer(params)
    size = min(cfg.micro_batch, cfg.minibatch)
    for t, chosen in enumerate(shuffled(prompts, cfg.pairs, cfg.iterations)):
        ids, mask = sample(policy, chosen, 2, cfg.response_tokens)
        r, old, ref = [], [], []
        with torch.no_grad():
            for i in range(0, cfg.pairs, size):
                part = ids[i : i + size], mask[i : i + size]
                r.append(score(*part))
                old.append(response_logprobs(policy, *part).sum(-1))
                ref.append(response_logprobs(reference, *part).sum(-1))
        r, old, ref = torch.cat(r), torch.cat(old), torch.cat(ref)
        means, counts = {}, 0
        for epoch in range(cfg.inner_epochs):
            order = torch.randperm(cfg.pairs)
            for start in range(0, cfg.pairs, cfg.minibatch):
                batch = order[start : start + cfg.minibatch]
                for begin in range(0, len(batch), cfg.micro_batch):
                    k = batch[begin : begin + cfg.micro_batch]
                    new = response_logprobs(policy, ids[k], mask[k]).sum(-1)
                    if t == epoch == start == begin == 0:
                        drift = max((new - old[k]).abs().max(), (new - ref[k]).abs().max())
                        self_check("ratio = 1 and KL = 0 before the first update", drift < 1e-3)
                    loss, extra = loss_fn(
                        new,
                        old[k],
                        ref[k],
                        r[k],
                        beta=cfg.beta,
                        clip=cfg.clip,
                        clip_range=cfg.clip_range,
                    )
                    (loss * (len(k) / len(batch))).backward()
                    extra = dict(extra) | {"loss/policy": float(loss)}
                    for name, value in extra.items():
                        means[name] = means.get(name, 0.0) + float(value) * len(k)
                    counts += len(k)
                norm = gradient_step(policy, opt, learning_rate(cfg.p3o_lr, t, cfg.iterations))
                name = "policy/grad_norm"
                means[name] = means.get(name, 0.0) + norm * len(batch)
        means = {name: value / counts for name, value in means.items()}
        ended = ((ids == policy.config.eos_token_id) & mask).any(-1)
        log(
            t,
            means
            | {
                "objective/scores": float(r.mean()),
                "objective/kl": float((old - ref).mean()),
                "objective/entropy": -float(old.mean()),
                "response/length": float(mask.sum(-1).float().mean()),
                "response/finished": float(ended.float().mean()),
            },
        )


def train_policy__helpers(policy, reference, score, loss_fn, prompts, cfg, log, checkpoint=None):
    def total(model, ids, mask):
        return response_logprobs(model, ids, mask).sum(-1)

    def frozen(function, ids, mask):
        with torch.no_grad():
            pieces = [function(ids[k], mask[k]) for k in torch.arange(len(ids)).split(piece)]
        return torch.cat(pieces)

    def backward(k, share):
        new = total(policy, ids[k], mask[k])
        for fixed in (old, ref):
            first.append((new.detach() - fixed[k]).abs().max() < 1e-3)
        arguments = (new, old[k], ref[k], r[k])
        loss, metrics = loss_fn(*arguments, **options)
        torch.mul(loss, share).backward()
        return {**metrics, "loss/policy": loss.detach()}

    piece = min(cfg.minibatch, cfg.micro_batch)
    options = {name: getattr(cfg, name) for name in ("beta", "clip", "clip_range")}
    policy.train(False)
    optimizer = make_optimizer([dict(params=policy.parameters(), weight_decay=0)])
    first = []
    batches = shuffled(prompts, cfg.pairs, cfg.iterations)
    for iteration in range(cfg.iterations):
        rate = learning_rate(cfg.p3o_lr, iteration, cfg.iterations)
        ids, mask = sample(policy, batches[iteration], 2, cfg.response_tokens)
        r = frozen(score, ids, mask)
        old = frozen(lambda *part: total(policy, *part), ids, mask)
        ref = frozen(lambda *part: total(reference, *part), ids, mask)
        history = []  # (number of pairs, metrics)
        minibatches = [
            batch
            for _ in range(cfg.inner_epochs)
            for batch in torch.randperm(cfg.pairs).split(cfg.minibatch)
        ]
        for batch in minibatches:
            parts = batch.split(cfg.micro_batch)
            rows = [backward(k, len(k) / len(batch)) for k in parts]
            if iteration == 0 and batch is minibatches[0]:
                self_check("ratio = 1 and KL = 0 before the first update", all(first))
            norm = gradient_step(policy, optimizer, rate)
            for k, row in zip(parts, rows, strict=True):
                history.append((len(k), row | {"policy/grad_norm": norm}))
        row = {}
        for name in history[0][1]:
            row[name] = sum(n * float(m[name]) for n, m in history) / sum(n for n, _ in history)
        row["objective/scores"] = r.mean().item()
        row["objective/kl"] = (old - ref).mean().item()
        row["objective/entropy"] = old.mean().neg().item()
        row["response/length"] = mask.sum(-1).double().mean().item()
        eos = ids.eq(policy.config.eos_token_id) & mask
        row["response/finished"] = eos.any(-1).double().mean().item()
        log(iteration, row)


def train_policy__by_dataset(policy, reference, score, loss_fn, prompts, cfg, log, checkpoint=None):
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    policy.eval()
    optimizer = make_optimizer([{"params": policy.parameters(), "weight_decay": 0.0}])
    updates = 0
    for step, questions in enumerate(shuffled(prompts, cfg.pairs, cfg.iterations)):
        ids, mask = sample(policy, questions, 2, cfg.response_tokens)
        columns = {"score": [], "old": [], "ref": []}
        for i, m in zip(
            ids.split(min(cfg.micro_batch, cfg.minibatch)),
            mask.split(min(cfg.micro_batch, cfg.minibatch)),
            strict=True,
        ):
            with torch.no_grad():
                columns["score"] += score(i, m)
                columns["old"] += response_logprobs(policy, i, m).sum(-1)
                columns["ref"] += response_logprobs(reference, i, m).sum(-1)
        columns = {name: torch.stack(values) for name, values in columns.items()}
        data = torch.utils.data.TensorDataset(ids, mask, *columns.values())
        seen, sums = 0, {}
        for _ in range(cfg.inner_epochs):
            loader = torch.utils.data.DataLoader(data, batch_size=cfg.minibatch, shuffle=True)
            for minibatch in loader:
                count = len(minibatch[0])
                for i, m, s, old, ref in zip(
                    *[column.split(cfg.micro_batch) for column in minibatch], strict=True
                ):
                    logprobs = response_logprobs(policy, i, m).sum(-1)
                    if updates == 0 and seen == 0:
                        start = torch.cat([logprobs - old, logprobs - ref]).abs().max()
                        self_check("ratio = 1 and KL = 0 before the first update", start < 1e-3)
                    loss, metrics = loss_fn(
                        logprobs=logprobs,
                        old_logprobs=old,
                        ref_logprobs=ref,
                        scores=s,
                        beta=cfg.beta,
                        clip=cfg.clip,
                        clip_range=cfg.clip_range,
                    )
                    loss.mul(len(i) / count).backward()
                    seen += len(i)
                    for name, value in (metrics | {"loss/policy": loss.item()}).items():
                        sums[name] = sums.get(name, 0) + len(i) * float(value)
                rate = learning_rate(cfg.p3o_lr, step, cfg.iterations)
                norm = gradient_step(policy, optimizer, lr=rate)
                sums["policy/grad_norm"] = sums.get("policy/grad_norm", 0) + norm * count
                updates += 1
        metrics = {name: value / seen for name, value in sums.items()}
        metrics["objective/scores"] = columns["score"].mean().item()
        metrics["objective/kl"] = (columns["old"] - columns["ref"]).mean().item()
        metrics["objective/entropy"] = -columns["old"].mean().item()
        metrics["response/length"] = mask.float().sum(-1).mean().item()
        metrics["response/finished"] = finished(policy, ids, mask).float().mean().item()
        log(step, metrics)
