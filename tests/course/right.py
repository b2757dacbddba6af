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


def collate__columns(prompts, responses, model):
    starts = torch.tensor([len(prompt) for prompt in prompts])  # (N,)
    ends = starts + torch.tensor([len(response) for response in responses])  # (N,)
    column = torch.arange(int(ends.max()))  # (T,)
    filled = column < ends[:, None]  # (N, T)
    response_mask = filled & (column >= starts[:, None])  # (N, T)
    rows = zip(prompts, responses, strict=True)
    tokens = torch.tensor([token for row in rows for part in row for token in part])
    ids = torch.full(filled.shape, model.config.pad_token_id).masked_scatter(filled, tokens)
    return ids.to(model.device), response_mask.to(model.device)


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


def response_logprobs__columns(model, ids, response_mask):
    def last_hidden(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
        """Return the hidden states (N, T', H) up to the last column that has a response token."""
        column = torch.arange(ids.shape[-1], device=ids.device)
        used = int(torch.where(response_mask, column, 0).max()) + 1
        return model.base_model(ids[:, :used], use_cache=False).last_hidden_state

    shape = *ids.shape[:-1], ids.shape[-1] - 1
    ids, response_mask = ids.flatten(0, -2), response_mask.flatten(0, -2)  # (N, T)
    rows, columns = response_mask[:, 1:].nonzero(as_tuple=True)  # (M,) each, M predicted tokens
    hidden = last_hidden(model, ids, response_mask)[rows, columns]  # (M, H)
    logits = model.get_output_embeddings()(hidden).float()  # (M, V)
    chosen = ids[rows, columns + 1][:, None]  # (M, 1)
    logprobs = F.log_softmax(logits, -1).gather(-1, chosen).squeeze(-1)  # (M,)
    result = logprobs.new_zeros(len(ids), shape[-1])  # (N, T−1)
    return result.index_put((rows, columns), logprobs).view(shape)


def response_logprobs__beginner(model, ids, response_mask):
    def used_columns(masks: Tensor) -> int:
        """Return how many columns there are up to the last response token, at least 1: (N, T)."""
        used = 1
        for mask in masks:
            positions = mask.nonzero().flatten().tolist()
            if positions and positions[-1] + 1 > used:
                used = positions[-1] + 1
        return used

    length = ids.shape[-1]
    rows = ids.reshape(-1, length)  # (N, T)
    masks = response_mask.reshape(-1, length)
    used = used_columns(masks)
    hidden = model.base_model(rows[:, :used], use_cache=False).last_hidden_state  # (N, used, D)
    head = model.get_output_embeddings()
    result = []
    for i in range(len(rows)):
        row_result = torch.zeros(length - 1, device=ids.device)
        # column t is filled if token t+1 belongs to the response
        columns = masks[i, 1:].nonzero().flatten()
        if len(columns) > 0:
            logits = head(hidden[i, columns]).float()  # (L, V)
            logprobs = torch.log_softmax(logits, dim=-1)
            targets = rows[i, columns + 1]
            picked = logprobs[torch.arange(len(columns), device=ids.device), targets]  # (L,)
            row_result[columns] = picked
        result.append(row_result)
    return torch.stack(result).view(*ids.shape[:-1], length - 1)


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


def sample__columns(model, prompts, n, max_tokens):
    def draw(logits: Tensor) -> Tensor:
        """Draw a token from each row's softmax by inverting its distribution: (R, V) → (R,).

        The uniform numbers come from the CPU's generator, which a checkpoint of stage 3 restores.
        """
        cdf = F.softmax(logits.float(), -1).double().cumsum(-1)  # (R, V)
        u = torch.rand(len(logits), 1, dtype=torch.float64).to(logits.device) * cdf[:, -1:]
        # the first token whose cdf exceeds u, which is never one of probability 0
        return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    device = model.device
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
    width = int(lengths.max())
    column = torch.arange(width + max_tokens, device=device)  # (W,) of the left-padded buffer
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    ids = torch.full((len(prompts), len(column)), pad, device=device)  # (B, W)
    is_prompt = (column >= width - lengths[:, None]) & (column < width)  # (B, W)
    ids = ids.masked_scatter(is_prompt, tokens).repeat_interleave(n, 0)  # (R, W), R = B·n
    lengths = lengths.repeat_interleave(n)  # (R,)
    shift = width - lengths[:, None]  # (R, 1), the padding on the left
    attended = (column >= shift).long()  # (R, W), by place and not by id: a pad may be drawn
    positions = (column - shift).clamp(min=0)  # (R, W), from 0 as in `response_logprobs`

    live = torch.ones_like(lengths, dtype=torch.bool)  # (R,), has no EOS yet
    drawn = torch.zeros_like(lengths)  # (R,), the response's length so far
    cache = None
    begin = 0
    for end in range(width, width + max_tokens):
        output = model.base_model(
            ids[:, begin:end],
            attention_mask=attended[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits = model.get_output_embeddings()(output.last_hidden_state[:, -1])  # (R, V)
        if not (logits.isfinite() | ~live[:, None]).all():
            raise FloatingPointError("logits are not finite; resume with a lower learning rate")
        token = draw(logits)  # (R,)
        ids[:, end] = torch.where(live, token, pad)
        drawn += live
        live = live & (token != eos)
        if not live.any():
            break
        begin = end

    ends = (lengths + drawn)[:, None]  # (R, 1)
    column = torch.arange(int(ends.max()), device=device)  # (T,) of the right-padded rows
    source = (column + shift).clamp(max=ids.shape[1] - 1)  # (R, T)
    ids = torch.where(column < ends, ids.gather(1, source), pad)  # (R, T)
    response_mask = (column >= lengths[:, None]) & (column < ends)  # (R, T)
    shape = len(prompts), n, -1
    return ids.view(shape), response_mask.view(shape)


def sample__library(model, prompts, n, max_tokens):
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    class FiniteLogits(LogitsProcessor):
        """Passes the logits on as they are, unless one of them is NaN or +inf."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if scores.isnan().any() or (scores == math.inf).any():
                raise FloatingPointError("the model's logits are not finite")
            return scores

    @contextlib.contextmanager
    def generation_config_of(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
        """Let `config` alone rule `generate`: what a checkpoint's own says would fill its gaps."""
        own = model.generation_config
        model.generation_config = config
        try:
            yield
        finally:
            model.generation_config = own

    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    prompt_ids = left(rows, padding_value=model.config.pad_token_id).to(model.device)  # (B, P)
    attention_mask = left([torch.ones_like(row) for row in rows]).to(model.device)
    plain = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,  # the library's default is 50
        top_p=1.0,
        num_return_sequences=n,
        max_new_tokens=max_tokens,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    with generation_config_of(model, plain):
        output = model.generate(
            prompt_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
        )
    drawn = output[:, prompt_ids.shape[1] :]  # (B·n, ≤ max_tokens)
    ends = (drawn == model.config.eos_token_id).long()
    lengths = (ends.cumsum(-1) - ends == 0).sum(-1)  # tokens with no EOS before them
    responses = [row[:k] for row, k in zip(drawn.tolist(), lengths.tolist(), strict=True)]
    repeated = [prompt for prompt in prompts for _ in range(n)]
    ids, response_mask = collate(repeated, responses, model)  # (B·n, T)
    return ids.view(len(prompts), n, -1), response_mask.view(len(prompts), n, -1)


def sample__beginner(model, prompts, n, max_tokens):
    def draw_token(logits: Tensor, dice: float) -> int:
        """Return the token that `dice`, uniform in [0, 1), draws from softmax(logits), (V,)."""
        if not torch.isfinite(logits).all():
            raise FloatingPointError("the logits of a sampled token are not finite")
        # token k owns the interval from the sum of the probabilities before it to that up to it
        ends = logits.cpu().double().softmax(-1).cumsum(-1)
        dice = dice * ends[-1].item()  # the last end is 1, but for rounding
        return (ends <= dice).sum().item()

    eos = model.config.eos_token_id
    pad = model.config.pad_token_id
    longest = max(len(prompt) for prompt in prompts)

    # one row for each response; the n copies of a prompt are neighbors
    owners = []
    for prompt in prompts:
        for _ in range(n):
            owners.append(prompt)
    tokens = []
    attention = []
    positions = []
    for prompt in owners:
        padding = longest - len(prompt)
        tokens.append([pad] * padding + list(prompt))
        attention.append([0] * padding + [1] * len(prompt))
        positions.append([0] * padding + list(range(len(prompt))))

    # All dice are thrown first, response by response. So a response does not depend on how
    # sample_by_parts divides the prompts, which follows --micro-batch
    fair = torch.distributions.Uniform(0.0, torch.ones((), dtype=torch.float64))
    dice = [fair.sample((max_tokens,)).tolist() for _ in owners]
    responses = [[] for _ in owners]
    done = [False for _ in owners]
    past = None
    for step in range(max_tokens):
        output = model.base_model(
            input_ids=torch.tensor(tokens, device=model.device),
            attention_mask=torch.tensor(attention, device=model.device),
            position_ids=torch.tensor(positions, device=model.device),
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        logits = model.get_output_embeddings()(output.last_hidden_state[:, -1]).float()  # (N, V)

        # the next call gets one new token for each row
        tokens = []
        positions = []
        for i in range(len(owners)):
            token = pad  # of a response that has ended: nobody reads it
            if not done[i]:
                token = draw_token(logits[i], dice[i][step])
                responses[i].append(token)
                if token == eos:
                    done[i] = True
            tokens.append([token])
            positions.append([len(owners[i]) + step])
            attention[i].append(1)
        if all(done):
            break

    ids, response_mask = collate(owners, responses, model)  # (B·n, T)
    shape = len(prompts), n, ids.shape[-1]
    return ids.view(shape), response_mask.view(shape)


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


def reward_scores__columns(model, ids, response_mask):
    def last_hidden(model: PreTrainedModel, ids: Tensor, response_mask: Tensor) -> Tensor:
        """Return the hidden states (N, T', H) up to the last column that has a response token."""
        column = torch.arange(ids.shape[-1], device=ids.device)
        used = int(torch.where(response_mask, column, 0).max()) + 1
        return model.base_model(ids[:, :used], use_cache=False).last_hidden_state

    shape = ids.shape[:-1]
    ids, response_mask = ids.flatten(0, -2), response_mask.flatten(0, -2)  # (N, T)
    column = torch.arange(ids.shape[-1], device=ids.device)
    last = torch.where(response_mask, column, 0).amax(-1)  # (N,)
    row = torch.arange(len(ids), device=ids.device)
    hidden = last_hidden(model, ids, response_mask)[row, last]  # (N, H)
    return model.score(hidden).squeeze(-1).float().view(shape)


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


def p3o_loss__columns(
    logprobs,
    old_logprobs,
    ref_logprobs,
    scores,
    *,
    beta,
    clip="joint",
    clip_range=0.2,
    ratio_bound=10.0,
):
    if clip not in ("joint", "separate", "none"):
        raise ValueError(f"clip must be joint, separate or none, not {clip!r}")
    contrast = logprobs.new_tensor([1.0, -1.0])  # · (B, 2) → y_1 minus y_2
    h = logprobs.detach() - ref_logprobs.detach()  # (B, 2)
    r_gap = scores.detach().diff(dim=-1).neg().squeeze(-1)  # (B,)
    h_gap = h.diff(dim=-1).neg().squeeze(-1)  # (B,)
    q = r_gap - beta * h_gap  # (B,)
    log_ratio = logprobs - old_logprobs.detach()  # (B, 2), log ρ

    if clip == "separate":
        ratio = log_ratio.clamp(max=20).exp()  # (B, 2), no gradient above e^20
        bounded = ratio.detach().clamp(1 / ratio_bound, ratio_bound)  # (B, 2), ρ̄
        push = torch.einsum("b,k->bk", q, contrast)  # (B, 2), q for y_1 and −q for y_2
        low, high = 1 - clip_range, 1 + clip_range
        stopped = (push > 0) & (ratio > high) | (push < 0) & (ratio < low)  # (B, 2)
        moved = torch.where(stopped, ratio.detach().clamp(low, high), ratio)  # (B, 2), the min's
        objective = (push * bounded.flip(-1) * moved).sum(-1)  # (B,)
    else:
        ratio = log_ratio.exp()
        u = log_ratio @ contrast  # (B,)
        weight = log_ratio.detach().sum(-1).exp()  # (B,), ρ_1 ρ_2
        stopped = torch.zeros_like(q, dtype=torch.bool)
        if clip == "joint":
            weight = weight.clamp(1 / ratio_bound, ratio_bound)
            stopped = (q > 0) & (u > clip_range) | (q < 0) & (u < -clip_range)  # (B,)
        moved = torch.where(stopped, u.detach().clamp(-clip_range, clip_range), u)  # the min's
        objective = q * weight * moved  # (B,)

    metrics = {
        "policy/clipfrac": stopped.float().mean(),
        "policy/approxkl": (log_ratio.square() / 2).mean(),
        "policy/ratio": ratio.mean(),
        "objective/q": q.abs().mean(),
    }
    return -(objective / 2).mean(), {name: value.detach() for name, value in metrics.items()}


def p3o_loss__library(
    logprobs,
    old_logprobs,
    ref_logprobs,
    scores,
    *,
    beta,
    clip="joint",
    clip_range=0.2,
    ratio_bound=10.0,
):
    log_ratios = logprobs - old_logprobs.detach()  # log ρ, (B, 2)
    h = logprobs - ref_logprobs
    # r_1 − r_2 first: a large δ(x) then costs no more precision than it must
    q = ((scores[:, 0] - scores[:, 1]) - beta * (h[:, 0] - h[:, 1])).detach()  # (B,)
    bound = math.log(ratio_bound)
    ratios = log_ratios.exp()

    if clip in ("joint", "none"):
        u = log_ratios[:, 0] - log_ratios[:, 1]
        log_weight = log_ratios.detach().sum(-1)  # log(ρ_1 ρ_2): bounded there, no overflow
        if clip == "joint":
            weight = log_weight.clamp(-bound, bound).exp()
            free = q * weight * u
            clipped = q * weight * u.clamp(-clip_range, clip_range)
        else:
            free = clipped = q * log_weight.exp() * u
        per_pair = torch.minimum(free, clipped)
    elif clip == "separate":
        ratios = log_ratios.clamp(max=20).exp()
        partner = ratios.detach().clamp(1 / ratio_bound, ratio_bound).flip(-1)  # ρ̄_2, ρ̄_1
        push = torch.stack([q, -q], -1) * partner  # (B, 2)
        free = push * ratios
        clipped = push * ratios.clamp(1 - clip_range, 1 + clip_range)
        per_pair = torch.minimum(free, clipped).sum(-1)
    else:
        raise ValueError(f"clip must be joint, separate or none, not {clip!r}")

    metrics = {
        "policy/clipfrac": (free > clipped).float().mean(),
        "policy/approxkl": 0.5 * log_ratios.square().mean(),
        "policy/ratio": ratios.mean(),
        "objective/q": q.abs().mean(),
    }
    return -0.5 * per_pair.mean(), {name: value.detach() for name, value in metrics.items()}


def p3o_loss__beginner(
    logprobs,
    old_logprobs,
    ref_logprobs,
    scores,
    *,
    beta,
    clip="joint",
    clip_range=0.2,
    ratio_bound=10.0,
):
    def clipped_term(
        weight: Tensor, value: Tensor, lowest: float, highest: float
    ) -> tuple[Tensor, bool]:
        """Return min(weight·value, weight·clip(value, lowest, highest)), and if clip stops it.

        All are scalars, and `weight` is a constant.
        """
        went_too_far_up = bool(weight > 0 and value > highest)
        went_too_far_down = bool(weight < 0 and value < lowest)
        if went_too_far_up or went_too_far_down:
            return weight * value.clamp(lowest, highest), True  # outside, clamp has gradient 0
        return weight * value, False

    if clip not in ("joint", "separate", "none"):
        raise ValueError(f"clip must be joint, separate or none, not {clip!r}")
    old_logprobs = old_logprobs.detach()
    ref_logprobs = ref_logprobs.detach()
    scores = scores.detach()

    total = 0.0
    stopped = []
    kls = []
    ratios = []
    sizes_of_q = []
    for b in range(len(logprobs)):
        now_1, now_2 = logprobs[b, 0].detach(), logprobs[b, 1].detach()
        h_1 = now_1 - ref_logprobs[b, 0]
        h_2 = now_2 - ref_logprobs[b, 1]
        q = scores[b, 0] - scores[b, 1] - beta * (h_1 - h_2)
        sizes_of_q.append(q.abs())

        log_rho_1 = logprobs[b, 0] - old_logprobs[b, 0]  # these two have a gradient
        log_rho_2 = logprobs[b, 1] - old_logprobs[b, 1]
        for log_rho in (log_rho_1.detach(), log_rho_2.detach()):
            kls.append(0.5 * log_rho * log_rho)
            ratios.append(log_rho.exp())
        if clip == "separate":
            log_rho_1 = log_rho_1.clamp(max=20)
            log_rho_2 = log_rho_2.clamp(max=20)

        if clip == "separate":
            rho_1 = log_rho_1.exp()
            rho_2 = log_rho_2.exp()
            weight_1 = rho_1.detach().clamp(1 / ratio_bound, ratio_bound)
            weight_2 = rho_2.detach().clamp(1 / ratio_bound, ratio_bound)
            first, stops_1 = clipped_term(q * weight_2, rho_1, 1 - clip_range, 1 + clip_range)
            second, stops_2 = clipped_term(-q * weight_1, rho_2, 1 - clip_range, 1 + clip_range)
            gain = 0.5 * (first + second)
            stopped += [stops_1, stops_2]
        else:
            u = log_rho_1 - log_rho_2
            w = (log_rho_1 + log_rho_2).detach().exp()
            if clip == "joint":
                w = w.clamp(1 / ratio_bound, ratio_bound)
                term, stops = clipped_term(q * w, u, -clip_range, clip_range)
            else:
                term, stops = q * w * u, False
            gain = 0.5 * term
            stopped.append(stops)
        total = total + gain

    metrics = {
        "policy/clipfrac": torch.tensor(sum(stopped) / len(stopped), device=logprobs.device),
        "policy/approxkl": torch.stack(kls).mean(),
        "policy/ratio": torch.stack(ratios).mean(),
        "objective/q": torch.stack(sizes_of_q).mean(),
    }
    return -total / len(logprobs), metrics


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


def set_gain__columns(model, policy, prompts, cfg):
    ids, response_mask = sample_by_parts(policy, prompts, 2, cfg)  # (B, 2, T)
    size = AT_ONCE * cfg.micro_batch
    batches = zip(ids.split(size), response_mask.split(size), strict=True)
    scores = torch.cat([reward_scores(model, *part) for part in batches])  # (B, 2)
    rms = scores.double().diff(dim=-1).square().mean().sqrt().item()
    if rms == 0 or not math.isfinite(rms):
        raise FloatingPointError(f"r_1 − r_2 has root mean square {rms}; change --reward-lr")
    model.score.weight.mul_(1 / rms)
    return 1 / rms


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
                    if t == epoch == start == 0:
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
                    if updates == 0:
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


def train_policy__columns(policy, reference, score, loss_fn, prompts, cfg, log, checkpoint=None):
    policy.eval()
    reference.eval()
    batches = shuffled(prompts, cfg.pairs, cfg.iterations)
    optimizer = make_optimizer([{"params": policy.parameters(), "weight_decay": 0.0}])
    optimizer.zero_grad()
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = load_checkpoint(checkpoint, policy, optimizer)

    bar = tqdm(range(start, cfg.iterations), "3 P3O   ", initial=start, total=cfg.iterations)
    for iteration in bar:
        lr = learning_rate(cfg.p3o_lr, iteration, cfg.iterations)
        # rows of similar length are sampled and computed together
        batch = sorted(batches[iteration], key=len)
        ids, response_mask = sample_by_parts(policy, batch, 2, cfg)  # (P, 2, T)
        with torch.no_grad():
            size = cfg.micro_batch
            measured = [
                torch.stack([sequence_logprobs(policy, *part), sequence_logprobs(reference, *part)])
                for part in zip(ids.split(size), response_mask.split(size), strict=True)
            ]  # (2, b, 2) each
            old_logprobs, ref_logprobs = torch.cat(measured, 1)  # (P, 2) each
            scores = torch.cat(
                [
                    score(*part)
                    for part in zip(ids.split(size), response_mask.split(size), strict=True)
                ]
            )  # (P, 2)
        widths = response_mask.sum((1, 2))  # (P,), how long a pair's responses are
        sums = defaultdict(float)
        updates = [
            minibatch
            for _ in range(cfg.inner_epochs)
            for minibatch in torch.randperm(len(batch)).to(ids.device).split(cfg.minibatch)
        ]
        for update, minibatch in enumerate(updates):
            minibatch = minibatch[widths[minibatch].argsort()]
            gaps = []
            for part in minibatch.split(cfg.micro_batch):
                logprobs = sequence_logprobs(policy, ids[part], response_mask[part])  # (b, 2)
                loss, metrics = loss_fn(
                    logprobs,
                    old_logprobs[part],
                    ref_logprobs[part],
                    scores[part],
                    beta=cfg.beta,
                    clip=cfg.clip,
                    clip_range=cfg.clip_range,
                )
                (loss * len(part) / len(minibatch)).backward()
                for name, value in {**metrics, "loss/policy": loss.detach()}.items():
                    sums[name] += value * len(part)
                known = torch.stack([old_logprobs[part], ref_logprobs[part]])  # (2, b, 2)
                gaps.append((logprobs.detach() - known).abs())
            if iteration == 0 and update == 0:
                holds = bool((torch.cat(gaps, 1) < ROUNDING).all())
                self_check("log π is log π_old and log π_ref before the first update", holds)
            sums["policy/grad_norm"] += gradient_step(policy, optimizer, lr) * len(minibatch)

        means = {name: float(value) / len(batch) / cfg.inner_epochs for name, value in sums.items()}
        sampled = {
            "objective/scores": scores,
            "objective/kl": old_logprobs - ref_logprobs,
            "objective/entropy": -old_logprobs,
            "response/length": response_mask.sum(-1),
            "response/finished": finished(policy, ids, response_mask),
        }  # (P, 2) each
        means |= {name: values.float().mean().item() for name, values in sampled.items()}
        log(iteration, means)
        bar.set_postfix(score=means["objective/scores"], kl=means["objective/kl"])
        if checkpoint is not None and (iteration + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, iteration + 1, policy, optimizer)


def train_policy__library(policy, reference, score, loss_fn, prompts, cfg, log, checkpoint=None):
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

    @dataclass
    class Pairs:
        """Sampled pairs, and what stays the same while they are trained on."""

        ids: Tensor  # (B, 2, T)
        response_mask: Tensor  # (B, 2, T)
        old_logprobs: Tensor  # (B, 2), as the rest
        ref_logprobs: Tensor
        scores: Tensor

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, which: list[int]) -> "Pairs":
            return Pairs(*(getattr(self, f.name)[which] for f in fields(self)))

        def micro_batches(self, size: int) -> Iterator["Pairs"]:
            for which in parts(list(range(len(self))), size):
                yield self[which]

        def minibatches(self, size: int, epochs: int) -> Iterator["Pairs"]:
            for _ in range(epochs):
                for which in BatchSampler(RandomSampler(range(len(self))), size, drop_last=False):
                    yield self[which]

        def logprobs(self, model: PreTrainedModel) -> Tensor:
            return sequence_logprobs(model, self.ids, self.response_mask)

        def metrics(self, model: PreTrainedModel) -> dict[str, float]:
            values = {
                "objective/scores": self.scores,
                "objective/kl": self.old_logprobs - self.ref_logprobs,
                "objective/entropy": -self.old_logprobs,
                "response/length": self.response_mask.sum(-1),
                "response/finished": finished(model, self.ids, self.response_mask),
            }
            return {name: value.float().mean().item() for name, value in values.items()}

    class Means:
        """Weighted means of whatever is added, by name."""

        def __init__(self) -> None:
            self.sums: dict[str, float] = defaultdict(float)
            self.weights: dict[str, float] = defaultdict(float)

        def add(self, weight: float, **values: Tensor | float) -> None:
            for name, value in values.items():
                self.sums[name] += weight * float(value)
                self.weights[name] += weight

        def result(self) -> dict[str, float]:
            return {name: total / self.weights[name] for name, total in self.sums.items()}

    @torch.no_grad()
    def sample_pairs(
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        score: Callable[[Tensor, Tensor], Tensor],
        prompts: list[list[int]],
        cfg: Config,
    ) -> Pairs:
        ids, response_mask = sample_by_parts(policy, prompts, 2, cfg)
        loader = DataLoader(TensorDataset(ids, response_mask), batch_size=cfg.micro_batch)
        measured = [
            (sequence_logprobs(policy, *part), sequence_logprobs(reference, *part), score(*part))
            for part in loader
        ]
        return Pairs(ids, response_mask, *map(torch.cat, zip(*measured, strict=True)))

    def check_start(logprobs: Tensor, pairs: Pairs) -> None:
        """Before the first update, π as it is trained is what sampled, and what it is held to."""
        for name, other in (("old", pairs.old_logprobs), ("ref", pairs.ref_logprobs)):
            near = bool(((logprobs - other).abs() < ROUNDING).all())  # False on NaN
            self_check(f"log π starts at log π_{name}", near)

    policy.eval()
    reference.eval()
    batches = shuffled(prompts, cfg.pairs, cfg.iterations)
    optimizer = make_optimizer([{"params": policy.parameters(), "weight_decay": 0.0}])
    optimizer.zero_grad()
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = load_checkpoint(checkpoint, policy, optimizer)
    bar = tqdm(range(start, cfg.iterations), "3 P3O   ", initial=start, total=cfg.iterations)
    for t in bar:
        batch = sorted(batches[t], key=len)  # prompts of similar length are sampled together
        pairs = sample_pairs(policy, reference, score, batch, cfg)
        lr = learning_rate(cfg.p3o_lr, t, cfg.iterations)
        means = Means()
        for update, minibatch in enumerate(pairs.minibatches(cfg.minibatch, cfg.inner_epochs)):
            trained = []
            for part in minibatch.micro_batches(cfg.micro_batch):
                logprobs = part.logprobs(policy)  # (b, 2)
                trained.append(logprobs.detach())
                loss, metrics = loss_fn(
                    logprobs,
                    part.old_logprobs,
                    part.ref_logprobs,
                    part.scores,
                    beta=cfg.beta,
                    clip=cfg.clip,
                    clip_range=cfg.clip_range,
                )
                (loss * len(part) / len(minibatch)).backward()  # this part's share of the mean
                means.add(len(part), **metrics, **{"loss/policy": loss.detach()})
            if t == update == 0:
                check_start(torch.cat(trained), minibatch)
            norm = gradient_step(policy, optimizer, lr)
            means.add(len(minibatch), **{"policy/grad_norm": norm})
        metrics = pairs.metrics(policy) | means.result()
        log(t, metrics)
        bar.set_postfix(score=metrics["objective/scores"], kl=metrics["objective/kl"])
        if checkpoint is not None and (t + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, t + 1, policy, optimizer)


def train_policy__beginner(policy, reference, score, loss_fn, prompts, cfg, log, checkpoint=None):
    @torch.no_grad()
    def measure(
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        score: Callable[[Tensor, Tensor], Tensor],
        ids: Tensor,
        response_mask: Tensor,
        cfg: Config,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log π_old, log π_ref and the scores of all pairs, (B, 2) each."""
        old_logprobs = []
        ref_logprobs = []
        scores = []
        for pairs in parts(list(range(len(ids))), cfg.micro_batch):
            part = ids[pairs], response_mask[pairs]  # (b, 2, T) each
            old_logprobs.append(sequence_logprobs(policy, *part))
            ref_logprobs.append(sequence_logprobs(reference, *part))
            scores.append(score(*part))
        return torch.cat(old_logprobs), torch.cat(ref_logprobs), torch.cat(scores)

    policy.eval()
    reference.eval()
    optimizer = make_optimizer([{"params": policy.parameters(), "weight_decay": 0.0}])
    optimizer.zero_grad()
    batches = shuffled(prompts, cfg.pairs, cfg.iterations)
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = load_checkpoint(checkpoint, policy, optimizer)

    for t in tqdm(range(start, cfg.iterations), "3 P3O   "):
        # sample and score
        ids, response_mask = sample_by_parts(policy, batches[t], 2, cfg)  # (B, 2, T)
        old_logprobs, ref_logprobs, scores = measure(
            policy, reference, score, ids, response_mask, cfg
        )  # (B, 2) each

        # update
        rate = learning_rate(cfg.p3o_lr, t, cfg.iterations)
        sums = defaultdict(float)  # of each metric, over all pairs of all updates
        seen = 0  # pairs, in all updates
        for epoch in range(cfg.inner_epochs):
            order = torch.randperm(len(ids)).tolist()
            for number, minibatch in enumerate(parts(order, cfg.minibatch)):
                worst_old = []
                worst_ref = []
                for pairs in parts(minibatch, cfg.micro_batch):
                    logprobs = sequence_logprobs(policy, ids[pairs], response_mask[pairs])
                    loss, metrics = loss_fn(
                        logprobs,
                        old_logprobs[pairs],
                        ref_logprobs[pairs],
                        scores[pairs],
                        beta=cfg.beta,
                        clip=cfg.clip,
                        clip_range=cfg.clip_range,
                    )
                    (loss * len(pairs) / len(minibatch)).backward()
                    sums["loss/policy"] += loss.item() * len(pairs)
                    for name, value in metrics.items():
                        sums[name] += float(value) * len(pairs)
                    difference = logprobs.detach() - old_logprobs[pairs]
                    worst_old += difference.abs().flatten().tolist()
                    difference = logprobs.detach() - ref_logprobs[pairs]
                    worst_ref += difference.abs().flatten().tolist()
                if t == 0 and epoch == 0 and number == 0:
                    self_check(
                        "log π starts at log π_old", all(one < ROUNDING for one in worst_old)
                    )
                    self_check(
                        "log π starts at log π_ref", all(one < ROUNDING for one in worst_ref)
                    )
                norm = gradient_step(policy, optimizer, rate)
                sums["policy/grad_norm"] += norm * len(minibatch)
                seen += len(minibatch)

        # report
        means = {}
        for name, value in sums.items():
            means[name] = value / seen
        means["objective/scores"] = scores.float().mean().item()
        means["objective/kl"] = (old_logprobs - ref_logprobs).mean().item()
        means["objective/entropy"] = -old_logprobs.mean().item()
        means["response/length"] = response_mask.sum(-1).float().mean().item()
        means["response/finished"] = finished(policy, ids, response_mask).float().mean().item()
        log(t, means)

        if checkpoint is not None and (t + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, t + 1, policy, optimizer)
