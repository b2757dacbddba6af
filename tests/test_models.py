"""Sampling, log-probabilities, scores and the three stages, on a tiny model and on one small enough to enumerate."""

import copy
import itertools
import json
import math
import statistics

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import p3o

collate = pytest.mark.problem_1
logprobs = pytest.mark.problem_2
sampling = pytest.mark.problem_3
scoring = pytest.mark.problem_4
gain = pytest.mark.problem_7
policy_stage = pytest.mark.problem_8

EOS, PAD, LONGEST = 3, 4, 3  # of the toy: a vocabulary of five, responses of at most three tokens
TOY_PROMPTS = [[0], [1, 2, 0]]


@pytest.fixture(scope="module")
def toy() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=5, n_positions=8, n_embd=16, n_layer=1, n_head=2, initializer_range=0.6,
        bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def every_response() -> list[list[int]]:
    """All 85 responses of the toy: up to and including the first EOS, or cut after three tokens."""
    going = [token for token in range(5) if token != EOS]
    ended = [[*body, EOS] for n in range(LONGEST) for body in itertools.product(going, repeat=n)]
    return ended + [list(body) for body in itertools.product(going, repeat=LONGEST)]


def toy_batch(prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and response_mask, (85, T), of every response to a prompt; by hand, so that it needs nothing but torch."""
    rows = [prompt + response for response in every_response()]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[len(prompt) <= t < len(row) for t in range(width)] for row in rows])
    return ids, mask


def encode(tiny, count: int = 6) -> list[p3o.Pair]:
    _, _, tokenizer, cfg, pairs = tiny
    return p3o.tokenize(pairs[:count], tokenizer, cfg)


def batch(tiny, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and response_mask of the first chosen responses, padded by hand."""
    examples = encode(tiny, count)
    width = max(len(e.prompt) + len(e.chosen) for e in examples)
    rows = [e.prompt + e.chosen for e in examples]
    ids = torch.tensor([row + [tiny[2].pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[len(e.prompt) <= t < len(e.prompt + e.chosen) for t in range(width)] for e in examples])
    return ids, mask


# ---- Which tokens are the response -----------------------------------------------------------------------------------
@collate
def test_the_mask_covers_the_response_and_its_eos_and_nothing_else(tiny):
    examples = encode(tiny)
    ids, mask = p3o.collate([e.prompt for e in examples], [e.chosen for e in examples], tiny[0])
    for row, covered, example in zip(ids.tolist(), mask.tolist(), examples, strict=True):
        start, end = len(example.prompt), len(example.prompt) + len(example.chosen)
        assert row[:end] == example.prompt + example.chosen
        assert row[end - 1] == tiny[2].eos_token_id
        assert set(row[end:]) <= {tiny[2].pad_token_id}, "the padding belongs on the right"
        where = [i for i, inside in enumerate(covered) if inside]
        assert where == list(range(start, end)), "the mask should run from the first response token to EOS"


@collate
def test_the_mask_keeps_eos_where_eos_is_the_padding_too(toy):
    """A mask from ids != pad would hide the EOS action from the loss: the policy would never learn to stop."""
    model = copy.deepcopy(toy)
    model.config.pad_token_id = EOS
    ids, mask = p3o.collate([[0], [0]], [[1, EOS], [1, 2, EOS]], model)
    assert ids.tolist() == [[0, 1, EOS, EOS], [0, 1, 2, EOS]]
    assert mask.tolist() == [[False, True, True, False], [False, True, True, True]]


# ---- Log-probabilities -----------------------------------------------------------------------------------------------
@logprobs
def test_a_response_tokens_log_prob_is_read_one_position_earlier(tiny):
    """By hand from the library's own logits, each response alone: logits at t − 1 predict token t."""
    policy = tiny[0]
    ids, mask = batch(tiny)
    with torch.no_grad():
        found = p3o.response_logprobs(policy, ids, mask)
        assert found.shape == (len(ids), ids.shape[1] - 1)
        for example, row in zip(encode(tiny), found, strict=True):
            logp = policy(torch.tensor([example.prompt + example.chosen])).logits[0].log_softmax(-1)
            start = len(example.prompt)
            for t, token in enumerate(example.chosen, start):
                assert row[t - 1].item() == pytest.approx(logp[t - 1, token].item(), abs=1e-4)


@logprobs
def test_the_log_probs_of_constant_logits_are_minus_ln_of_the_vocabulary_per_response_token(toy):
    """Two prompt lengths, three response lengths: an off-by-one in the mask changes the count of tokens."""
    model = copy.deepcopy(toy)
    torch.nn.init.zeros_(model.transformer.ln_f.weight)
    torch.nn.init.zeros_(model.transformer.ln_f.bias)
    for prompt in TOY_PROMPTS:
        ids, mask = toy_batch(prompt)
        found = p3o.response_logprobs(model, ids, mask).sum(-1)
        assert torch.allclose(found, -math.log(5) * mask.sum(-1))


@logprobs
@pytest.mark.parametrize("prompt", TOY_PROMPTS, ids=str)
def test_the_probabilities_of_all_responses_add_up_to_one(toy, prompt):
    """Only if every action counts, EOS included, and nothing else does."""
    with torch.no_grad():
        assert p3o.response_logprobs(toy, *toy_batch(prompt)).sum(-1).exp().sum().item() == pytest.approx(1, abs=1e-5)


@logprobs
def test_only_response_tokens_have_a_log_prob_and_eos_is_one_of_them(tiny):
    ids, mask = batch(tiny, 2)
    found = p3o.response_logprobs(tiny[0], ids, mask)
    assert torch.equal(found != 0, mask[:, 1:])
    last = mask[0].nonzero().max()
    assert ids[0, last] == tiny[2].eos_token_id
    assert found[0, last - 1] < -0.01


@logprobs
def test_a_responses_log_prob_is_the_same_alone_and_in_a_padded_batch(tiny):
    policy, _, tokenizer, _, _ = tiny
    ids, mask = batch(tiny)
    wide = torch.nn.functional.pad(ids, (0, 5), value=tokenizer.eos_token_id)  # even EOS to the right is not read
    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    with torch.no_grad():
        found = p3o.response_logprobs(policy, ids, mask).sum(-1)
        assert torch.allclose(p3o.response_logprobs(policy, wide, wide_mask).sum(-1), found, atol=1e-4)
        for i in range(len(ids)):
            length = mask[i].nonzero().max() + 1
            alone = p3o.response_logprobs(policy, ids[i : i + 1, :length], mask[i : i + 1, :length]).sum(-1)
            assert alone.item() == pytest.approx(found[i].item(), abs=1e-4)


@logprobs
def test_pairs_have_the_log_probs_of_their_rows(tiny):
    """(B, 2, T) and (2B, T) are the same rows, in the same order."""
    ids, mask = batch(tiny)
    with torch.no_grad():
        rows = p3o.response_logprobs(tiny[0], ids, mask)
        pairs = p3o.response_logprobs(tiny[0], ids.view(3, 2, -1), mask.view(3, 2, -1))
    assert torch.equal(pairs, rows.view(3, 2, -1))


def with_nan_elsewhere(model: torch.nn.Module, keep: torch.Tensor):
    """Until removed, the model's hidden states (N, T, D) are NaN wherever `keep` (N, T) is False."""

    def hook(_, __, output):
        hidden = output.last_hidden_state
        output.last_hidden_state = torch.where(keep[..., None], hidden, torch.full_like(hidden, math.nan))
        return output

    return model.base_model.register_forward_hook(hook)


@logprobs
def test_positions_outside_the_response_are_left_out_not_multiplied_by_zero(toy):
    """NaN · 0 = NaN: with NaN in every slot that predicts no response token, value and gradient stay the same."""
    ids, mask = toy_batch(TOY_PROMPTS[1])
    results = []
    for poisoned in (False, True):
        model = copy.deepcopy(toy)
        keep = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)
        handle = with_nan_elsewhere(model, keep | (not poisoned))
        found = p3o.response_logprobs(model, ids, mask).sum(-1)
        found.square().sum().backward()
        handle.remove()
        results.append([found.detach(), *(p.grad for p in model.parameters())])
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert same, "positions outside the response reach the log-probs or their gradient: select, do not multiply by 0"


@logprobs
def test_only_response_positions_meet_the_vocabulary(tiny):
    """Logits for prompts and padding would be most of the memory: with GPT-2, 200 kB a token."""
    policy = tiny[0]
    ids, mask = batch(tiny)
    seen = []
    handle = policy.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    p3o.response_logprobs(policy, ids, mask)
    handle.remove()
    assert seen == [(mask.sum().item(), policy.config.n_embd)]


@logprobs
def test_log_probs_are_computed_in_float32_even_in_a_bfloat16_model(toy):
    """bf16 has three digits: a softmax over it would not even add up to one."""
    model = copy.deepcopy(toy).to(torch.bfloat16)
    with torch.no_grad():
        found = p3o.response_logprobs(model, *toy_batch([0]))
        first = model(torch.tensor([[0]])).logits[0, -1].float().log_softmax(-1)
    assert found.dtype == torch.float32
    assert found.sum(-1)[0].item() == pytest.approx(first[EOS].item(), abs=1e-6)


@logprobs
def test_no_batch_is_changed_in_place(tiny):
    ids, mask = batch(tiny)
    before = ids.clone(), mask.clone()
    p3o.response_logprobs(tiny[0], ids, mask)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


@logprobs
def test_the_mean_log_ratio_over_the_policy_is_the_kl_to_the_reference(toy):
    """E_π[h] = KL(π‖π_ref) ≥ 0, summed over all 85 responses, against the chain rule over single tokens."""
    torch.manual_seed(1)
    reference = GPT2LMHeadModel(toy.config).eval()
    prompt = TOY_PROMPTS[1]
    ids, mask = toy_batch(prompt)
    with torch.no_grad():
        logp, logp_ref = (p3o.response_logprobs(model, ids, mask).sum(-1) for model in (toy, reference))
        by_token = 0.0
        going = [token for token in range(5) if token != EOS]
        for prefix in (list(p) for n in range(LONGEST) for p in itertools.product(going, repeat=n)):
            a, b = (m(torch.tensor([prompt + prefix])).logits[0].log_softmax(-1) for m in (toy, reference))
            reach = sum(a[len(prompt) - 1 + t, token] for t, token in enumerate(prefix))
            by_token += math.exp(reach) * (a[-1].exp() * (a[-1] - b[-1])).sum().item()
    kl = (logp.exp() * (logp - logp_ref)).sum().item()
    assert kl == pytest.approx(by_token, rel=1e-4)
    assert kl > 0.1


@pytest.mark.problem_6
def test_the_expected_update_of_a_language_model_is_the_gradient_of_reward_minus_beta_kl(toy):
    """All 85² pairs, off-policy, down to the weights of a GPT-2."""
    torch.manual_seed(2)
    old_model, reference, model = (GPT2LMHeadModel(toy.config).eval() for _ in range(3))
    ids, mask = toy_batch(TOY_PROMPTS[1])
    r, beta = torch.randn(len(ids)), 0.3
    with torch.no_grad():
        old, ref = (p3o.response_logprobs(m, ids, mask).sum(-1) for m in (old_model, reference))
    logp = p3o.response_logprobs(model, ids, mask).sum(-1)
    exact = torch.autograd.grad(
        (logp.exp() * (r - beta * (logp - ref))).sum(), list(model.parameters()), retain_graph=True
    )
    pairs = [torch.cartesian_prod(x, x) for x in (logp.detach(), old, ref, r)]  # (85², 2) each
    leaf = pairs[0].requires_grad_()
    loss, _ = p3o.p3o_loss(leaf, *pairs[1:], beta=beta, clip="none")
    push = -torch.autograd.grad(loss, leaf)[0] * len(leaf) * pairs[1].sum(1, keepdim=True).exp()  # (85², 2)
    found = torch.autograd.grad((push * torch.cartesian_prod(logp, logp)).sum(), list(model.parameters()))
    flat_exact, flat_found = (torch.cat([g.flatten() for g in gradients]) for gradients in (exact, found))
    assert (flat_exact - flat_found).norm() < 1e-4 * flat_exact.norm()


# ---- Sampling --------------------------------------------------------------------------------------------------------
@sampling
def test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos(toy):
    torch.manual_seed(0)
    ids, mask = p3o.sample(toy, TOY_PROMPTS * 50, 2, LONGEST)
    assert ids.shape == mask.shape == (100, 2, 3 + LONGEST)
    lengths = set()
    for prompt, rows, masks in zip(TOY_PROMPTS * 50, ids.tolist(), mask.tolist(), strict=True):
        for row, covered in zip(rows, masks, strict=True):
            assert row[: len(prompt)] == prompt, "a response follows the wrong prompt"
            length = sum(covered)
            start, end = len(prompt), len(prompt) + length
            assert covered == [start <= t < end for t in range(len(row))]
            assert EOS not in row[start : end - 1], "a token after EOS counts as response"
            assert row[end - 1] == EOS or length == LONGEST, "EOS is not part of the response, or it was cut early"
            assert set(row[end:]) <= {PAD}
            lengths.add((length, row[end - 1] == EOS))
    assert len(lengths) == 4  # lengths 1, 2 and 3 by EOS, and 3 by the limit


@sampling
@pytest.mark.parametrize("positions", ("learned", "rotary"))
def test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt(toy, positions):
    """Left padding that shifts positions, a temperature or a lost EOS would show; 20,000 draws a prompt."""
    torch.manual_seed(0)
    draws = 20_000
    if positions == "rotary":
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        ids = dict(bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
        toy = LlamaForCausalLM(LlamaConfig(vocab_size=5, initializer_range=0.6, **sizes, **ids)).eval()
    ids, mask = p3o.sample(toy, TOY_PROMPTS, draws, LONGEST)
    for prompt, rows, covered in zip(TOY_PROMPTS, ids, mask, strict=True):
        code = {tuple(response): i for i, response in enumerate(every_response())}
        drawn = [code[tuple(row[m].tolist())] for row, m in zip(rows, covered, strict=True)]
        counts = torch.bincount(torch.tensor(drawn), minlength=len(code)) / draws
        with torch.no_grad():
            probability = p3o.response_logprobs(toy, *toy_batch(prompt)).sum(-1).exp()
        error = (counts - probability).abs() / (probability * (1 - probability) / draws).sqrt()
        enough = probability * draws > 5
        assert enough.sum() > 15
        assert error[enough].max() < 4.5, f"prompt {prompt}: frequencies are off by that many standard errors"


@sampling
def test_the_whole_vocabulary_is_sampled(tiny):
    """The library's default keeps the 50 likeliest tokens; what is scored is all of them."""
    policy, _, tokenizer, _, _ = tiny
    prompt = encode(tiny, 1)[0].prompt
    torch.manual_seed(0)
    draws = 15_000
    ids, _ = p3o.sample(policy, [prompt] * (draws // 100), 100, 1)
    counts = torch.bincount(ids[..., len(prompt)].flatten(), minlength=len(tokenizer)) / draws
    with torch.no_grad():
        probability = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    error = (counts - probability).abs() / (probability * (1 - probability) / draws).sqrt()
    assert (counts > 0).sum() > 300
    assert error.max() < 5.5  # standard errors, over some seven hundred tokens


@sampling
def test_the_two_responses_of_a_pair_are_independent(toy):
    """Their joint first tokens come as often as the product of the single frequencies."""
    torch.manual_seed(0)
    ids, _ = p3o.sample(toy, [[0]] * 5000, 2, 1)
    first, second = ids[:, 0, 1], ids[:, 1, 1]
    joint = torch.bincount(5 * first + second, minlength=25).view(5, 5) / 5000
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert ((joint - expected).abs() < 4 * (expected / 5000).sqrt()).all()


@sampling
def test_a_data_pair_and_a_sample_with_the_same_text_are_the_same_input(toy):
    """What the reward model was trained on is what it scores: same ids, same mask, whatever the padding was."""
    torch.manual_seed(0)
    ids, mask = (rows[:, 0] for rows in p3o.sample(toy, TOY_PROMPTS * 20, 1, LONGEST))
    responses = [row[covered].tolist() for row, covered in zip(ids, mask, strict=True)]
    data_ids, data_mask = p3o.collate(TOY_PROMPTS * 20, responses, toy)
    assert torch.equal(ids[mask], data_ids[data_mask])
    assert torch.equal(ids[:, : data_ids.shape[1]], data_ids) and torch.equal(mask[:, : data_ids.shape[1]], data_mask)


# ---- Scores ----------------------------------------------------------------------------------------------------------
@scoring
def test_a_score_is_read_at_the_last_response_token(tiny):
    """It changes with that token, EOS here, and with nothing to the right of it."""
    reward_model, tokenizer = tiny[1], tiny[2]
    ids, mask = batch(tiny)
    changed, after = ids.clone(), ids.clone()
    last = (mask * torch.arange(ids.shape[1])).argmax(1)
    changed[torch.arange(len(ids)), last] = 300
    after[torch.arange(ids.shape[1]) > last[:, None]] = tokenizer.eos_token_id
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        assert scores.shape == (len(ids),)
        assert (p3o.reward_scores(reward_model, changed, mask) != scores).all(), "the last token, EOS, is not read"
        assert torch.allclose(p3o.reward_scores(reward_model, after, mask), scores, atol=1e-5)


@scoring
def test_a_score_is_the_same_alone_and_in_a_padded_batch(tiny):
    reward_model, tokenizer = tiny[1], tiny[2]
    ids, mask = batch(tiny)
    wide = torch.nn.functional.pad(ids, (0, 5), value=tokenizer.eos_token_id)
    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        assert torch.allclose(p3o.reward_scores(reward_model, wide, wide_mask), scores, atol=1e-5)
        for i in range(len(ids)):
            length = mask[i].nonzero().max() + 1
            alone = p3o.reward_scores(reward_model, ids[i : i + 1, :length], mask[i : i + 1, :length])
            assert alone.item() == pytest.approx(scores[i].item(), abs=1e-5)


@scoring
def test_pairs_have_the_scores_of_their_rows(tiny):
    ids, mask = batch(tiny)
    with torch.no_grad():
        rows = p3o.reward_scores(tiny[1], ids, mask)
        assert torch.equal(p3o.reward_scores(tiny[1], ids.view(3, 2, -1), mask.view(3, 2, -1)), rows.view(3, 2))


@scoring
def test_the_librarys_own_forward_gives_the_same_score(tiny):
    """So the saved reward model means the same in anyone's hands."""
    ids, mask = batch(tiny)
    with torch.no_grad():
        assert torch.allclose(p3o.reward_scores(tiny[1], ids, mask), tiny[1](ids).logits[:, 0], atol=1e-5)


@scoring
def test_hidden_states_other_than_the_last_tokens_do_not_reach_the_score(tiny):
    reward_model = tiny[1]
    ids, mask = batch(tiny)
    last = (mask * torch.arange(ids.shape[1])).argmax(1, keepdim=True)
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        handle = with_nan_elsewhere(reward_model, torch.arange(ids.shape[1]) == last)
        poisoned = p3o.reward_scores(reward_model, ids, mask)
        handle.remove()
    assert torch.equal(scores, poisoned), "another position than the last token's reaches the score"


@scoring
def test_score_pairs_has_chosen_first_and_rejected_second(tiny):
    examples = encode(tiny)
    with torch.no_grad():
        found = p3o.score_pairs(tiny[1], examples)
        for example, (chosen, rejected) in zip(examples, found.tolist(), strict=True):
            for response, score in ((example.chosen, chosen), (example.rejected, rejected)):
                alone = tiny[1](torch.tensor([example.prompt + response])).logits.item()
                assert score == pytest.approx(alone, abs=1e-5)


def test_saved_models_load_and_score_the_same(tiny, tmp_path):
    policy, reward_model, *_ = tiny
    ids, mask = batch(tiny)
    for model, kind in ((policy, AutoModelForCausalLM), (reward_model, AutoModelForSequenceClassification)):
        model.save_pretrained(tmp_path / kind.__name__)
        loaded = kind.from_pretrained(tmp_path / kind.__name__)
        function = p3o.response_logprobs if model is policy else p3o.reward_scores
        with torch.no_grad():
            assert torch.equal(function(model, ids, mask), function(loaded, ids, mask))


# ---- One update ------------------------------------------------------------------------------------------------------
def plain_sgd(weight: torch.nn.Parameter):
    optimizer = torch.optim.SGD([weight], lr=1.0)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def step(loss, optimizer, schedule) -> float:
    loss.backward()
    return p3o.gradient_step(optimizer, schedule)


def test_a_step_clips_the_gradient_to_norm_1_and_reports_its_norm_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    norm = step((weight * torch.tensor([3.0, 4.0])).sum(), *plain_sgd(weight))
    assert norm == pytest.approx(5.0), "the norm should be the one before clipping, of this loss's gradient"
    assert torch.allclose(weight.detach(), torch.tensor([-0.6, -0.8]))


def test_a_step_clips_the_norm_over_all_parameter_groups():
    """The reward model has two, its body and its head: clipped apart, they would leave the gradient's direction."""
    body, head = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [body]}, {"params": [head]}], lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    assert step((3 * body + 4 * head).sum(), optimizer, schedule) == pytest.approx(5.0)
    assert (body.item(), head.item()) == pytest.approx((-0.6, -0.8))


def test_a_step_forgets_the_gradient_of_the_step_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, schedule = plain_sgd(weight)
    for _ in range(2):
        step((weight * torch.tensor([0.3, 0.4])).sum(), optimizer, schedule)
    assert torch.allclose(weight.detach(), -2 * torch.tensor([0.3, 0.4]))


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, schedule = p3o.make_optimizer([{"params": [weight], "lr": 1.0}], 1)
    with pytest.raises(FloatingPointError):
        step((weight * math.nan).sum(), optimizer, schedule)
    assert torch.equal(weight.detach(), torch.ones(2))


def test_the_learning_rate_warms_up_over_a_twentieth_then_falls_to_zero():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, schedule = p3o.make_optimizer([{"params": [weight], "lr": 1.0}], 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        step(weight.sum(), optimizer, schedule)
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(1 / 95)


# ---- Stages 1 and 2 --------------------------------------------------------------------------------------------------
def nothing(*_, **__) -> None:
    pass


def small(**options) -> p3o.Config:
    return p3o.Config(**p3o.SMALL | options)


def test_the_sft_loss_is_the_mean_over_the_tokens_of_the_chosen_responses(tiny, fresh):
    """Prompts, padding and rejected responses do not count."""
    examples, rows = encode(tiny, 8), []
    p3o.train_sft(fresh(tiny[0]), examples, small(batch=8, epochs=1), lambda step, **row: rows.append(row))
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = tiny[0](torch.tensor([example.prompt + example.chosen])).logits[0, len(example.prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(example.chosen), reduction="sum").item()
            count += len(example.chosen)
    assert rows[0]["sft/loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("stage", ("sft", "reward", pytest.param("policy", marks=policy_stage)))
def test_every_stage_sees_each_row_once_a_pass_in_a_new_order(tiny, fresh, monkeypatch, stage):
    """Else a stage that ends early would never see the end of the data."""
    policy, reward_model, *_ = tiny
    examples, seen = encode(tiny, 24), []
    examples = [example._replace(prompt=[i]) for i, example in enumerate(examples)]  # each prompt its own number
    cfg = small(batch=7, epochs=2, iterations=7, pairs=7, minibatch=7, response_tokens=2)
    name = "sample" if stage == "policy" else "collate"
    plain = getattr(p3o, name)

    def watched(*args):
        prompts = next(arg for arg in args if isinstance(arg, list | tuple))
        seen.extend(prompt[0] for prompt in (prompts[::2] if stage == "reward" else prompts))  # there, each comes twice
        return plain(*args)

    monkeypatch.setattr(p3o, name, watched)
    torch.manual_seed(0)
    if stage == "policy":
        p3o.train_policy(fresh(policy), policy, length_score, [e.prompt for e in examples], cfg, nothing)
    else:
        train = {"sft": p3o.train_sft, "reward": p3o.train_reward}[stage]
        train(fresh(policy if stage == "sft" else reward_model), examples, cfg, nothing)
    first, second = seen[:24], seen[24:48]
    assert sorted(first) == sorted(second) == list(range(24)), "a pass should see each row once"
    assert len({tuple(first), tuple(second), tuple(range(24))}) == 3, "each pass should come in a new order"


def test_sft_makes_the_chosen_responses_likelier(tiny, fresh):
    policy, examples, rows = fresh(tiny[0]), encode(tiny, 64), []
    torch.manual_seed(0)
    p3o.train_sft(policy, examples, small(batch=8, epochs=3), lambda step, **row: rows.append(row["sft/loss"]))
    assert sum(rows[-4:]) < sum(rows[:4]) / 2


def test_reward_training_starts_at_ln_2_and_learns_to_rank(tiny, fresh):
    """It comes to rank its training pairs as labelled, better than chance would."""
    model, rows, examples = fresh(tiny[1]), [], encode(tiny, 256)
    torch.manual_seed(0)
    p3o.train_reward(model, examples, small(epochs=3, batch=16), lambda step, **row: rows.append(row))
    assert rows[0]["reward/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(row["reward/loss"] for row in rows[-10:]) / 10 < 0.6
    with torch.no_grad():
        ranked = -p3o.score_pairs(model, examples).diff()[:, 0] > 0
    assert ranked.float().mean() > 0.7
    assert sum(row["reward/accuracy"] for row in rows[-10:]) / 10 > 0.6


@pytest.mark.parametrize("stage", ("sft", "reward", pytest.param("policy", marks=policy_stage)))
def test_every_stages_learning_rate_falls_to_zero_at_its_last_update_and_not_before(tiny, fresh, monkeypatch, stage):
    """The schedule counts updates: rows over batch size, times passes; pairs over minibatch, times passes, times
    iterations."""
    policy, reward_model, *_ = tiny
    examples, made, plain = encode(tiny, 22), [], p3o.make_optimizer

    def watched(*args):
        made.append(plain(*args))
        return made[-1]

    monkeypatch.setattr(p3o, "make_optimizer", watched)
    cfg = small(batch=8, epochs=2, iterations=3, pairs=11, minibatch=4, response_tokens=4)
    if stage == "policy":
        p3o.train_policy(fresh(policy), policy, length_score, [e.prompt for e in examples], cfg, nothing)
    else:
        train = {"sft": p3o.train_sft, "reward": p3o.train_reward}[stage]
        train(fresh(policy if stage == "sft" else reward_model), examples, cfg, nothing)
    ((_, schedule),) = made
    assert schedule.last_epoch == (18 if stage == "policy" else 6), "the number of updates"
    assert schedule.get_last_lr()[0] == 0, "the schedule is longer than the training"
    before = schedule.lr_lambdas[0](schedule.last_epoch - 1)
    assert before > 0, "the schedule is shorter than the training"


@pytest.mark.parametrize("stage", ("sft", "reward", pytest.param("policy", marks=policy_stage)))
def test_every_stage_turns_dropout_off(tiny, fresh, stage):
    """GPT-2's default dropout is 0.1: two forwards of one policy would differ, and so would ratios from 1."""
    policy, reward_model, *_ = tiny
    assert policy.config.resid_pdrop > 0
    model = fresh(reward_model if stage == "reward" else policy).train()
    examples, cfg = encode(tiny, 2), small(sft_lr=0.0, reward_lr=0.0, lr=0.0, iterations=1, pairs=2, minibatch=2)
    if stage == "sft":
        p3o.train_sft(model, examples, cfg, nothing)
    elif stage == "reward":
        p3o.train_reward(model, examples, cfg, nothing)
    else:
        p3o.train_policy(model, policy, length_score, [e.prompt for e in examples], cfg, nothing)
    ids = torch.tensor([examples[0].prompt])
    with torch.no_grad():
        first, second = (model.base_model(ids).last_hidden_state for _ in range(2))
    assert torch.equal(first, second), "dropout is on"


@pytest.mark.parametrize("stage", ("sft", "reward", pytest.param("policy", marks=policy_stage)))
def test_micro_batches_change_memory_and_not_the_update(tiny, fresh, stage):
    """One at a time, two, four with two left over, all at once: the same metrics and weights, in float64."""
    policy, reward_model, *_ = tiny
    examples, results = encode(tiny, 12), []
    for size in (1, 2, 4, 12):
        model, rows, seen = fresh(reward_model if stage == "reward" else policy).double(), [], []
        cfg = small(
            batch=6, epochs=1, iterations=2, pairs=12, minibatch=6, response_tokens=6,
            micro_batch=size,
        )  # fmt: skip

        def log(step, rows=rows, **row):
            rows.append(row)

        def spy(logprobs, *rest, seen=seen, **options):
            seen.append(len(logprobs))
            return p3o.p3o_loss(logprobs, *rest, **options)

        torch.manual_seed(0)
        if stage == "policy":
            p3o.train_policy(model, copy.deepcopy(model), even_share, [e.prompt for e in examples], cfg, log, spy)
            assert max(seen) == min(size, 6)
        else:
            train = {"sft": p3o.train_sft, "reward": p3o.train_reward}[stage]
            train(model, examples, cfg, log)
        results.append((rows, list(model.parameters())))
    (rows, weights), *others = results
    for other_rows, other_weights in others:
        for row, other in zip(rows, other_rows, strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-6), "the metrics depend on the micro-batch"
        same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, other_weights, strict=True))
        assert same, "the update depends on the micro-batch"


@gain
def test_the_gain_makes_score_differences_of_root_mean_square_1(tiny, fresh):
    policy, reward_model, _, cfg, _ = tiny
    model = fresh(reward_model)
    with torch.no_grad():
        model.score.weight.mul_(30)
    before = model.score.weight.detach().clone()
    prompts = [example.prompt for example in encode(tiny, 32)]
    torch.manual_seed(0)
    factor = p3o.set_gain(model, policy, prompts, cfg)
    torch.manual_seed(0)
    halves = (prompts[: cfg.pairs], prompts[cfg.pairs :])  # it samples cfg.pairs prompts at a time
    with torch.no_grad():
        samples = [p3o.sample(policy, half, 2, cfg.response_tokens) for half in halves]
        gaps = torch.cat([p3o.reward_scores(model, *batch).diff() for batch in samples])
    assert gaps.square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    assert torch.allclose(model.score.weight, before * factor)
    body = zip(model.base_model.parameters(), reward_model.base_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in body)


def test_a_reward_model_that_scores_all_alike_has_no_gain(tiny, fresh):
    model = fresh(tiny[1])
    torch.nn.init.zeros_(model.score.weight)
    with pytest.raises(FloatingPointError):
        p3o.set_gain(model, tiny[0], [[1], [2]], tiny[3])


@gain
def test_the_gain_does_not_depend_on_an_offset_of_the_reward(tiny, fresh, monkeypatch):
    """A gain from absolute scores would: their spread holds that of δ(x), and so would every update after it."""
    policy, reward_model, *_ = tiny
    prompts, plain, cfg = [example.prompt for example in encode(tiny, 32)], p3o.reward_scores, small(pairs=32)
    factors, delta = [], 10 * torch.arange(len(prompts), dtype=torch.float64)[:, None]  # (B, 1): one number a prompt
    for size in (0, 1):
        monkeypatch.setattr(p3o, "reward_scores", lambda *args, s=size: plain(*args).double() + s * delta)
        torch.manual_seed(0)
        factors.append(p3o.set_gain(fresh(reward_model), policy, prompts, cfg))
    assert factors[0] == pytest.approx(factors[1], rel=1e-9)


# ---- Stage 3 ---------------------------------------------------------------------------------------------------------
def length_score(ids, mask):
    return mask.sum(-1).float() / 8


def even_share(ids, mask):
    return ((ids % 2 == 0) & mask).sum(-1) / mask.sum(-1)


def run_policy(policy, reference, score, prompts, cfg, loss_fn=None):
    """Stage 3 on a copy of `policy`: the copy, its metrics, and what the loss saw at each update, in order."""
    trained, rows, seen = copy.deepcopy(policy), [], []

    def spy(logprobs, old_logprobs, ref_logprobs, scores, **options):
        loss, metrics = (loss_fn or p3o.p3o_loss)(logprobs, old_logprobs, ref_logprobs, scores, **options)
        tensors = dict(logprobs=logprobs, old=old_logprobs, ref=ref_logprobs, scores=scores, loss=loss)
        seen.append({k: v.detach().clone() for k, v in tensors.items()} | {"options": options} | metrics)
        return loss, metrics

    torch.manual_seed(0)
    p3o.train_policy(trained, reference, score, prompts, cfg, lambda step, **row: rows.append(row), spy)
    return trained, rows, seen


@pytest.fixture
def prompts(tiny):
    return [example.prompt for example in encode(tiny, 64)]


@policy_stage
def test_pairs_stay_together_from_sampling_to_loss(tiny, prompts):
    """A score that encodes the prompt: both members of every pair always carry the same one."""
    cfg = small(iterations=3, pairs=16, minibatch=5, inner_epochs=2, response_tokens=6)

    def prompt_score(ids, mask):
        return (ids * (mask.cumsum(-1) == 0) * torch.arange(1, ids.shape[-1] + 1)).sum(-1).float()

    *_, seen = run_policy(tiny[0], tiny[0], prompt_score, prompts, cfg)
    scores = torch.cat([update["scores"] for update in seen])
    assert torch.equal(scores[:, 0], scores[:, 1]), "a pair was torn apart"
    assert len(scores.unique()) > 20


@policy_stage
def test_score_and_log_probs_of_a_pair_belong_together(tiny, prompts):
    """With the reference's own log-prob as score and no learning, three columns of the loss must agree row by row."""
    policy = tiny[0]
    cfg = small(iterations=2, pairs=16, minibatch=5, response_tokens=6, lr=0.0)

    def logprob_score(ids, mask):
        return p3o.response_logprobs(policy, ids, mask).sum(-1)

    *_, seen = run_policy(policy, policy, logprob_score, prompts, cfg)
    for update in seen:
        for name in ("old", "ref", "scores"):
            assert torch.allclose(update["logprobs"], update[name], atol=1e-4), f"{name} belongs to other pairs"


@policy_stage
def test_each_pass_sees_each_pair_once_and_each_iteration_new_pairs(tiny, prompts):
    cfg = small(iterations=2, pairs=16, minibatch=5, inner_epochs=3, response_tokens=6)
    *_, seen = run_policy(tiny[0], tiny[0], even_share, prompts, cfg)
    passes = [torch.cat([u["old"] for u in seen[i : i + 4]]).sum(1).sort().values for i in range(0, len(seen), 4)]
    assert len(passes) == 2 * 3 and all(len(values) == 16 for values in passes)
    for iteration in (passes[:3], passes[3:]):
        assert all(torch.equal(values, iteration[0]) for values in iteration), "π_old changed between inner epochs"
    assert not torch.equal(passes[0], passes[3]), "the buffer was not thrown away"
    orders = [torch.cat([u["old"] for u in seen[i : i + 4]]) for i in range(0, 12, 4)]
    assert not torch.equal(orders[0], orders[1]), "pairs are not shuffled"


@policy_stage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_no_learning_rate_ratio_is_1_and_kl_0_at_every_inner_step(tiny, prompts, dtype):
    """To the last bit, even with weights in bfloat16, because both come from the same code on the same shapes."""
    policy = copy.deepcopy(tiny[0]).to(dtype)
    cfg = small(iterations=2, pairs=16, minibatch=8, inner_epochs=3, lr=0.0, response_tokens=8)
    _, rows, seen = run_policy(policy, policy, length_score, prompts, cfg)
    assert len(seen) == 2 * 2 * 3
    for update in seen:
        assert update["logprobs"].dtype == torch.float32
        for name in ("old", "ref"):
            same = torch.equal(update["logprobs"], update[name])
            assert same, f"{name} differs, if only in the last bits: compute it in minibatches as well, not all at once"
    assert all(abs(row["objective/kl"]) < 1e-4 and row["policy/clipfrac"] == 0 for row in rows)


@policy_stage
def test_in_mixed_precision_log_probs_and_scores_are_float32_and_the_ratio_is_1(tiny, prompts, monkeypatch):
    """What a GPU does, with the CPU's bf16: the reward head is applied in fp32, old and new log-probs still agree."""
    policy, reward_model, *_ = tiny
    ids, mask = batch(tiny)
    monkeypatch.setattr(p3o, "mixed_precision", torch.autocast("cpu", torch.bfloat16))
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        with p3o.mixed_precision:
            hidden = reward_model.base_model(ids).last_hidden_state
    last = (mask * torch.arange(ids.shape[1])).argmax(1)
    exact = hidden[torch.arange(len(ids)), last].double() @ reward_model.score.weight[0].double()
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), exact, rtol=1e-5, atol=1e-6), "the head was applied in bf16"
    cfg = small(iterations=1, pairs=16, minibatch=8, micro_batch=4, lr=0.0, response_tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        *_, seen = run_policy(policy, policy, length_score, prompts, cfg)
        full = p3o.response_logprobs(policy, ids, mask)
    assert all(torch.equal(u["logprobs"], u["old"]) and torch.equal(u["logprobs"], u["ref"]) for u in seen)
    assert seen[0]["logprobs"].dtype == full.dtype == torch.float32
    assert not torch.equal(full, p3o.response_logprobs(policy, ids, mask)), "autocast did nothing, so nothing was shown"


@policy_stage
def test_the_ratio_is_against_the_sampling_policy_and_moves_during_the_inner_steps(tiny, prompts):
    cfg = small(iterations=2, pairs=16, minibatch=16, inner_epochs=3, response_tokens=6)
    *_, seen = run_policy(tiny[0], tiny[0], even_share, prompts, cfg)
    drift = [(update["logprobs"] - update["old"]).abs().max().item() for update in seen]
    assert drift[0] < 1e-4 and drift[3] < 1e-4, "at the first inner step the ratio should be 1"
    assert min(drift[2], drift[4], drift[5]) > 1e-3, "π_old should stay where the pairs were sampled"


@policy_stage
def test_the_loss_sees_the_references_log_probs_and_the_metrics_their_difference(tiny, prompts):
    """objective/kl is the mean of log π_old − log π_ref, of that sign, and entropy that of −log π_old."""
    policy = tiny[0]
    cfg = small(iterations=4, pairs=16, minibatch=8, inner_epochs=1, response_tokens=6, lr=2e-2)

    def reference_score(ids, mask):
        return p3o.response_logprobs(policy, ids, mask).sum(-1)

    _, rows, seen = run_policy(policy, policy, reference_score, prompts, cfg)
    for i, row in enumerate(rows):
        old, ref, scores = (torch.cat([u[k] for u in seen[2 * i : 2 * i + 2]]) for k in ("old", "ref", "scores"))
        assert torch.allclose(ref, scores, atol=1e-4), "ref_logprobs are not the reference's"
        sampled = {"kl": old - ref, "entropy": -old, "scores": scores}
        for name, values in sampled.items():
            mean = pytest.approx(values.mean().item(), rel=1e-4, abs=1e-5)
            assert row[f"objective/{name}"] == mean, f"objective/{name} should be the mean over the iteration's samples"
        for key in ("policy/clipfrac", "policy/approxkl", "policy/ratio", "objective/q"):
            mean = sum(float(update[key]) for update in seen[2 * i : 2 * i + 2]) / 2
            assert row[key] == pytest.approx(mean), f"{key} should be the mean over the iteration's updates"
        assert row["loss/policy"] == pytest.approx(sum(u["loss"].item() for u in seen[2 * i : 2 * i + 2]) / 2)
        assert row["policy/grad_norm"] > 0
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["objective/kl"] > 0.1


@policy_stage
def test_response_length_counts_eos_and_finished_counts_those_that_ended_by_it(toy):
    lengths, ended = [], []

    def score(ids, mask):
        lengths.append(mask.sum(-1).double().mean().item())
        ended.append((ids.masked_fill(~mask, PAD) == EOS).any(-1).double().mean().item())
        return length_score(ids, mask)

    cfg = small(iterations=2, pairs=20, minibatch=20, inner_epochs=1, response_tokens=LONGEST)
    _, rows, _ = run_policy(toy, toy, score, TOY_PROMPTS * 20, cfg)
    assert [row["response/length"] for row in rows] == pytest.approx(lengths)
    assert [row["response/finished"] for row in rows] == pytest.approx(ended)
    assert 0.05 < rows[0]["response/finished"] < 0.95


@policy_stage
def test_the_loss_gets_the_configurations_options(toy):
    options = dict(beta=0.7, clip="separate", clip_range=0.11)
    cfg = small(iterations=1, pairs=4, minibatch=4, inner_epochs=1, response_tokens=LONGEST, **options)
    *_, seen = run_policy(toy, toy, length_score, TOY_PROMPTS * 2, cfg)
    assert [update["options"] for update in seen] == [options]


@policy_stage
def test_the_policy_learns_what_the_score_asks_for_and_the_reference_stays(tiny, prompts):
    """A reward for even token ids: their share rises."""
    cfg = small(iterations=12, pairs=32, minibatch=16, response_tokens=6, lr=3e-3, beta=0.0)
    reference = {key: value.clone() for key, value in tiny[0].state_dict().items()}
    _, rows, _ = run_policy(tiny[0], tiny[0], even_share, prompts, cfg)
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.1
    assert rows[-1]["objective/kl"] > 0
    assert all(torch.equal(value, reference[key]) for key, value in tiny[0].state_dict().items())


@policy_stage
def test_a_loss_without_gradient_leaves_the_policy_where_it_is(toy):
    """Weight decay would move it: away from the reference, where q = 0 says that nothing is to be gained."""
    cfg = small(iterations=4, pairs=4, minibatch=2, response_tokens=LONGEST)

    def zero(logprobs, *rest, **options):
        loss, metrics = p3o.p3o_loss(logprobs, *rest, **options)
        return 0 * loss, metrics

    trained, *_ = run_policy(toy, toy, length_score, TOY_PROMPTS * 2, cfg, zero)
    assert all(map(torch.equal, trained.parameters(), toy.parameters())), "the policy moved without a gradient"


class Killed(Exception):
    pass


@policy_stage
def test_stopped_after_a_checkpoint_the_stage_ends_in_the_same_weights(toy, tmp_path):
    """Policy, AdamW's moments, learning rate, order of the prompts and random draws all go on as they were."""
    cfg = small(iterations=45, pairs=4, minibatch=2, micro_batch=2, response_tokens=LONGEST, lr=1e-2)
    prompts = [[0], [1], [2], [1, 2, 0], [2, 2]]

    def train(checkpoint, stop_at, seed):
        policy, rows = copy.deepcopy(toy), {}

        def log(step, **row):
            rows[step] = row
            if step == stop_at:
                raise Killed

        torch.manual_seed(seed)
        p3o.train_policy(policy, toy, length_score, prompts, cfg, log, checkpoint=checkpoint)
        return policy, rows

    whole, rows = train(None, None, 0)
    checkpoint = tmp_path / "p3o.checkpoint"
    with pytest.raises(Killed):
        train(checkpoint, 43, 0)
    resumed, later = train(checkpoint, None, 0)
    assert min(later) == 40, "it should go on from the last checkpoint"
    assert later == {step: row for step, row in rows.items() if step >= 40}, "another course than without the stop"
    assert all(map(torch.equal, resumed.parameters(), whole.parameters())), "other weights than without the stop"
    assert not any(map(torch.equal, resumed.parameters(), toy.parameters()))


@policy_stage
@pytest.mark.parametrize("clip", ("joint", "separate"))
def test_on_the_toy_p3o_approaches_the_known_optimum(toy, clip):
    """Sampled pairs, whole loop: KL(π‖π*) to π* ∝ π_ref exp(r/β) falls to a tenth of where it began, or less."""
    beta, prompt = 0.5, TOY_PROMPTS[0]
    ids, mask = toy_batch(prompt)
    cfg = small(
        iterations=60, pairs=256, minibatch=128, inner_epochs=2, response_tokens=LONGEST, lr=5e-3, beta=beta, clip=clip
    )

    def score(ids, mask):
        return ((ids == 2) & mask).sum(-1) - 0.5 * ((ids == 1) & mask).sum(-1)

    trained, *_ = run_policy(toy, toy, score, [prompt] * 256, cfg)
    with torch.no_grad():
        start, end = (p3o.response_logprobs(model, ids, mask).sum(-1) for model in (toy, trained))
    best = (start + score(ids, mask) / beta).log_softmax(0)
    distance = [(logp.exp() * (logp - best)).sum().item() for logp in (start, end)]
    assert distance[0] > 0.3
    assert distance[1] < 0.1 * distance[0], distance


# ---- Loading ---------------------------------------------------------------------------------------------------------
def test_a_base_model_without_a_pad_token_gets_one_inside_its_vocabulary(tiny, tmp_path):
    """The path of the real GPT-2: loaded from a directory, its tokenizer has EOS alone."""
    policy, _, tokenizer, *_ = tiny
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3, "temperature": 0.5}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    cfg = p3o.Config(model=str(tmp_path), prompt_tokens=32, response_tokens=40)
    model, loaded = p3o.load_base(cfg)
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    assert model.config.pad_token_id == loaded.pad_token_id < model.get_input_embeddings().num_embeddings
    inherited = model.generation_config
    assert inherited.repetition_penalty in (None, 1.0), "it would be sampled with, but not scored"
    assert (inherited.eos_token_id, inherited.pad_token_id) == (loaded.eos_token_id, loaded.pad_token_id)
    with pytest.raises(p3o.UserError, match="positions"):
        p3o.load_base(p3o.Config(model=str(tmp_path)))
    with pytest.raises(p3o.UserError, match="cannot load"):
        p3o.load_base(p3o.Config(model=str(tmp_path / "nothing")))


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def test_evaluation_by_hand(tiny, fresh):
    """A policy that ends at once against one that rambles: each figure from its own table, or from the pairs."""
    import judge

    base, reward_model, tokenizer, _, pairs = tiny
    sft, policy = fresh(base), fresh(base)
    with torch.no_grad():  # the last hidden state points at EOS, or a little at the full stop
        policy.transformer.ln_f.bias += 30 * policy.lm_head.weight[tokenizer.eos_token_id]
        sft.transformer.ln_f.bias += 10 * sft.lm_head.weight[tokenizer(".")["input_ids"][0]]
    cfg = small(eval_prompts=24, pairs=7, micro_batch=7, response_tokens=40)  # 7 divides neither 24 nor 61
    torch.manual_seed(0)
    summary, table = p3o.evaluate(cfg, [sft, reward_model, policy], tokenizer, pairs[:61])

    assert summary["judge"] == "gold"
    assert summary["finished_fraction"] == sum(table["finished_fraction"]) / 24 > 0.9
    assert summary["kl"] > 1
    assert sum(map(len, table["answer_policy"])) < sum(map(len, table["answer_sft"])) / 5
    for name in ("sft", "policy"):
        whole = [judge.well_formed(*row) for row in zip(table["prompt"], table[f"answer_{name}"], strict=True)]
        assert table[f"well_formed_{name}"] == whole
    gold = {
        name: [judge.gold_reward(*row) for row in zip(table["prompt"], table[f"answer_{name}"], strict=True)]
        for name in ("sft", "policy")
    }
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(gold["policy"], gold["sft"], strict=True)]
    assert summary["win_rate"] == pytest.approx(sum(wins) / 24)
    assert summary["win_rate"] != 0.5  # so that the sides cannot be swapped unseen
    half = 1.96 * statistics.stdev(wins) / math.sqrt(24)
    interval = pytest.approx([sum(wins) / 24 - half, sum(wins) / 24 + half])
    assert summary["win_rate_ci"] == interval, "an interval is 1.96 standard errors, deviation / √n, to each side"
    assert len(table["kl"]) == 24
    assert summary["gold_policy"] == pytest.approx(sum(gold["policy"]) / 24)
    with torch.no_grad():
        examples = p3o.tokenize(pairs[:61], tokenizer, cfg)
        scores = p3o.score_pairs(reward_model, examples)
    better = (scores[:, 0] > scores[:, 1]).tolist()
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in e] for e in examples]  # as the model saw them
    gaps = [judge.gold_reward(x, chosen) - judge.gold_reward(x, rejected) for x, chosen, rejected in texts]
    agrees = [b == (gap > 0) for b, gap in zip(better, gaps, strict=True) if gap]
    assert len(agrees) < 61
    agreement = pytest.approx(sum(agrees) / len(agrees))
    assert summary["reward_gold_agreement"] == agreement, "pairs of equal gold reward have no better response"
    assert summary["reward_accuracy"] == pytest.approx(sum(better) / 61)
    assert 0 < sum(better) < 61


def test_without_a_gold_judge_the_win_rate_is_by_the_reward_models_own_scores(tiny, fresh, tmp_path, monkeypatch):
    """A reward that counts one token, and a policy that likes it."""
    base, reward_model, tokenizer, _, pairs = tiny
    policy, liked = fresh(base), 300
    with torch.no_grad():
        policy.transformer.ln_f.bias += 30 * policy.lm_head.weight[liked]
    cfg = small(eval_prompts=24, micro_batch=7, response_tokens=20, data=str(tmp_path))
    monkeypatch.setattr(p3o, "reward_scores", lambda _, ids, mask: ((ids == liked) & mask).sum(-1).float())
    torch.manual_seed(0)
    summary, table = p3o.evaluate(cfg, [base, reward_model, policy], tokenizer, pairs[:30])
    counts = {
        name: [tokenizer(answer)["input_ids"].count(liked) for answer in table[f"answer_{name}"]]
        for name in ("sft", "policy")
    }
    assert sum(counts["policy"]) > sum(counts["sft"]) + 10
    assert sum(table["score_policy"]) >= sum(counts["policy"]), "the scores belong to other answers"
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(table["score_policy"], table["score_sft"], strict=True)]
    assert summary["judge"] == "score" and summary["gold_sft"] is None
    assert summary["win_rate"] == pytest.approx(sum(wins) / 24) and summary["win_rate"] > 0.6
    assert summary["score_policy"] > summary["score_sft"] >= 0


def test_what_is_computed_in_chunks_has_no_gradient(tiny):
    ids, mask = batch(tiny)
    whole = p3o.response_logprobs(tiny[0], ids, mask)
    found = p3o.in_chunks(lambda *rows: p3o.response_logprobs(tiny[0], *rows), 4, ids, mask)
    assert torch.allclose(found, whole, atol=1e-5)
    assert whole.requires_grad and not found.requires_grad


@sampling
def test_not_a_number_is_no_token_outside_the_vocabulary(toy):
    """The update after it then stops the run with a clear message."""
    model = copy.deepcopy(toy)
    torch.nn.init.constant_(model.transformer.ln_f.bias, math.nan)
    ids, _ = p3o.sample(model, TOY_PROMPTS, 2, LONGEST)
    assert ids.min() >= 0 and ids.max() < 5
