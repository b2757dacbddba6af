"""What is read from a model: log-probabilities, scores and samples, whatever the padding."""

import copy
import math

import pytest
import torch
from toys import (
    EOS,
    LONGEST,
    PAD,
    TOY_PROMPTS,
    batch,
    encode,
    every_response,
    llama,
    toy_batch,
    toy_model,
    with_nan_elsewhere,
)
from transformers import AutoModelForSequenceClassification

import p3o


def wider(ids: torch.Tensor, mask: torch.Tensor, token: int):
    """Add five columns of a token that is no response."""
    pad = torch.nn.functional.pad
    return pad(ids, (0, 5), value=token), pad(mask, (0, 5), value=False)


# ---- Both ----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ("gpt2", "llama"))
@pytest.mark.parametrize(
    "name",
    (
        pytest.param("response_logprobs", marks=pytest.mark.problem_2),
        pytest.param("reward_scores", marks=pytest.mark.problem_4),
    ),
)
def test_pairs_have_the_log_probs_and_the_scores_of_their_rows(tiny, name, family):
    """(B, 2, T) and (2B, T) are the same rows in the same order; Llama takes only (2B, T)."""
    ids, mask = batch(tiny)
    model = tiny[name == "reward_scores"]
    if family == "llama":
        model = llama(len(tiny[2]), num_labels=1, pad_token_id=tiny[2].pad_token_id)
        if name == "reward_scores":
            model = AutoModelForSequenceClassification.from_config(model.config).eval()
    function = getattr(p3o, name)
    with torch.no_grad():
        rows = function(model, ids, mask)  # (6, …)
        pairs = function(model, ids.view(3, 2, -1), mask.view(3, 2, -1))  # (3, 2, …)
    assert torch.allclose(pairs, rows.view(3, 2, *rows.shape[1:]), atol=1e-5)


# ---- Log-probabilities ---------------------------------------------------------------------
@pytest.mark.problem_2
def test_a_response_tokens_log_prob_is_read_one_position_earlier(tiny):
    """The library's own logits of each response alone: those at t − 1 predict token t."""
    policy = tiny[0]
    ids, mask = batch(tiny)
    with torch.no_grad():
        found = p3o.response_logprobs(policy, ids, mask)
        assert found.shape == (len(ids), ids.shape[1] - 1)
        for example, row in zip(encode(tiny), found, strict=True):
            logp = policy(torch.tensor([example.prompt + example.chosen])).logits[0].log_softmax(-1)
            start = len(example.prompt)
            for t, token in enumerate(example.chosen, start):
                right = row[t - 1].item() == pytest.approx(logp[t - 1, token].item(), abs=1e-4)
                place = f"response token {t - start + 1} of {len(example.chosen)}"
                assert right, f"{place}: its log-prob is read one position earlier"


@pytest.mark.problem_2
@pytest.mark.parametrize("prompt", TOY_PROMPTS, ids=str)
def test_the_probabilities_of_all_responses_add_up_to_one(toy, prompt):
    """Only if every response token counts, EOS included, and no other token does."""
    with torch.no_grad():
        logprobs = p3o.response_logprobs(toy, *toy_batch(prompt)).sum(-1)  # (85,)
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.problem_2
def test_only_response_tokens_have_a_log_prob_and_eos_is_one_of_them(tiny):
    ids, mask = batch(tiny, 2)
    found = p3o.response_logprobs(tiny[0], ids, mask)
    assert torch.equal(found != 0, mask[:, 1:])
    last = mask[0].nonzero().max()
    assert ids[0, last] == tiny[2].eos_token_id
    assert found[0, last - 1] < -0.01


@pytest.mark.problem_2
def test_a_responses_log_prob_is_the_same_alone_and_in_a_padded_batch(tiny):
    policy, _, tokenizer, _, _ = tiny
    ids, mask = batch(tiny)
    with torch.no_grad():
        found = p3o.response_logprobs(policy, ids, mask).sum(-1)
        padded = p3o.response_logprobs(policy, *wider(ids, mask, tokenizer.eos_token_id))
        assert torch.allclose(padded.sum(-1), found, atol=1e-4), "padding changes it"
        for i in range(len(ids)):
            end = mask[i].nonzero().max() + 1
            alone = p3o.response_logprobs(policy, ids[i : i + 1, :end], mask[i : i + 1, :end])
            assert alone.sum().item() == pytest.approx(found[i].item(), abs=1e-4)


@pytest.mark.problem_2
def test_positions_outside_the_response_are_left_out_not_multiplied_by_zero(toy):
    """NaN · 0 = NaN. With NaN wherever no response token is predicted, value and gradient stay."""
    ids, mask = toy_batch(TOY_PROMPTS[1])
    results = []
    for poisoned in (False, True):
        model = copy.deepcopy(toy)
        keep = torch.nn.functional.pad(mask[:, 1:], (0, 1), value=False)
        handle = with_nan_elsewhere(model, ids, keep | (not poisoned))
        found = p3o.response_logprobs(model, ids, mask).sum(-1)
        found.square().sum().backward()
        handle.remove()
        results.append([found.detach(), *(p.grad for p in model.parameters())])
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert same, "positions outside the response are multiplied by 0: select those inside"


@pytest.mark.problem_2
def test_only_response_positions_meet_the_vocabulary(tiny):
    """Logits of prompts and padding would take most of the memory: 200 kB a token with GPT-2."""
    policy = tiny[0]
    ids, mask = batch(tiny)
    seen = []
    handle = policy.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    p3o.response_logprobs(policy, ids, mask)
    handle.remove()
    positions = sum(seen) // policy.config.n_embd
    assert positions == mask.sum(), "the output head should see only the response positions"


@pytest.mark.problem_2
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_log_probs_are_computed_in_float32_even_in_a_bfloat16_model(toy, dtype):
    """bf16 has three digits: its softmax would not even add up to one."""
    model = copy.deepcopy(toy).to(dtype)
    with torch.no_grad():
        found = p3o.response_logprobs(model, *toy_batch([0]))
        first = model(torch.tensor([[0]])).logits[0, -1].float().log_softmax(-1)
    assert found.dtype == torch.float32
    right = found.sum(-1)[0].item() == pytest.approx(first[EOS].item(), abs=1e-6)
    assert right, "the softmax should be in float32"


@pytest.mark.problem_2
def test_no_batch_is_changed_in_place(tiny):
    ids, mask = batch(tiny)
    before = ids.clone(), mask.clone()
    p3o.response_logprobs(tiny[0], ids, mask)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.problem_6
def test_the_expected_update_of_a_language_model_is_the_gradient_of_reward_minus_beta_kl(toy):
    """All 85² pairs, off-policy, down to the weights of a GPT-2."""
    beta = 0.3
    model = toy_model(2)
    weights = list(model.parameters())
    ids, mask = toy_batch(TOY_PROMPTS[1])
    r = torch.randn(len(ids))
    with torch.no_grad():
        old = p3o.response_logprobs(toy_model(3), ids, mask).sum(-1)  # (85,)
        ref = p3o.response_logprobs(toy_model(4), ids, mask).sum(-1)  # (85,)
    logp = p3o.response_logprobs(model, ids, mask).sum(-1)  # (85,)
    objective = (logp.exp() * (r - beta * (logp - ref))).sum()
    exact = torch.autograd.grad(objective, weights, retain_graph=True)

    leaf = torch.cartesian_prod(logp.detach(), logp.detach()).requires_grad_()  # (85², 2)
    old_pairs, ref_pairs, score_pairs = (torch.cartesian_prod(x, x) for x in (old, ref, r))
    loss, _ = p3o.p3o_loss(leaf, old_pairs, ref_pairs, score_pairs, beta=beta, clip="none")
    mean_push = -torch.autograd.grad(loss, leaf)[0]  # (85², 2)
    probability = old_pairs.sum(1, keepdim=True).exp()  # (85², 1): how often a pair is sampled
    push = mean_push * len(leaf) * probability
    found = torch.autograd.grad((push * torch.cartesian_prod(logp, logp)).sum(), weights)
    assert (flat(exact) - flat(found)).norm() < 1e-4 * flat(exact).norm()


# ---- Scores --------------------------------------------------------------------------------
def last_column(mask: torch.Tensor) -> torch.Tensor:
    """Return the column of each row's last response token, (N,)."""
    return (mask * torch.arange(mask.shape[1])).argmax(1)


@pytest.mark.problem_4
def test_a_score_is_read_at_the_last_response_token(tiny):
    """It changes with that token, here EOS, and with nothing to the right of it."""
    reward_model = tiny[1]
    ids, mask = batch(tiny)
    changed = ids.clone()
    after = ids.clone()
    last = last_column(mask)
    changed[torch.arange(len(ids)), last] = 300
    after[torch.arange(ids.shape[1]) > last[:, None]] = tiny[2].eos_token_id
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        assert scores.shape == (len(ids),)
        differs = p3o.reward_scores(reward_model, changed, mask) != scores
        same = torch.allclose(p3o.reward_scores(reward_model, after, mask), scores, atol=1e-5)
    assert differs.all(), "the last token, EOS, is not read"
    assert same, "the score changes with what stands behind the last response token"


@pytest.mark.problem_4
def test_a_score_is_the_same_alone_and_in_a_padded_batch(tiny):
    reward_model = tiny[1]
    ids, mask = batch(tiny)
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        padded = p3o.reward_scores(reward_model, *wider(ids, mask, tiny[2].eos_token_id))
        assert torch.allclose(padded, scores, atol=1e-5), "padding changes it"
        for i in range(len(ids)):
            end = mask[i].nonzero().max() + 1
            alone = p3o.reward_scores(reward_model, ids[i : i + 1, :end], mask[i : i + 1, :end])
            assert alone.item() == pytest.approx(scores[i].item(), abs=1e-5)


@pytest.mark.problem_4
def test_the_librarys_own_forward_gives_the_same_score(tiny):
    """So the saved reward model gives anyone who loads it the same scores."""
    ids, mask = batch(tiny)
    with torch.no_grad():
        librarys = tiny[1](ids).logits[:, 0]
        same = torch.allclose(p3o.reward_scores(tiny[1], ids, mask), librarys, atol=1e-5)
    assert same, "it is not model.score of the hidden state at the response's last token"


@pytest.mark.problem_4
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_scores_are_in_float32_whatever_the_models_dtype(tiny, dtype):
    model = copy.deepcopy(tiny[1]).to(dtype)
    ids, mask = batch(tiny)
    with torch.no_grad():
        found = p3o.reward_scores(model, ids, mask)
        expected = p3o.reward_scores(tiny[1], ids, mask)
    assert found.dtype == torch.float32, "the scores should be in float32"
    assert torch.allclose(found, expected, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.problem_4
def test_hidden_states_other_than_the_last_tokens_do_not_reach_the_score(tiny):
    reward_model = tiny[1]
    ids, mask = batch(tiny)
    keep = torch.arange(ids.shape[1]) == last_column(mask)[:, None]
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        handle = with_nan_elsewhere(reward_model, ids, keep)
        poisoned = p3o.reward_scores(reward_model, ids, mask)
        handle.remove()
    assert torch.equal(scores, poisoned), "another position than the last token's reaches the score"


@pytest.mark.problem_4
def test_score_pairs_has_chosen_first_and_rejected_second(tiny):
    examples = encode(tiny)
    with torch.no_grad():
        found = p3o.score_pairs(tiny[1], examples)
        for example, (chosen, rejected) in zip(examples, found.tolist(), strict=True):
            for response, score in ((example.chosen, chosen), (example.rejected, rejected)):
                alone = tiny[1](torch.tensor([example.prompt + response])).logits.item()
                assert score == pytest.approx(alone, abs=1e-5)


# ---- Samples -------------------------------------------------------------------------------
@pytest.mark.problem_3
def test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos(toy):
    torch.manual_seed(0)
    ids, mask = p3o.sample(toy, TOY_PROMPTS * 50, 2, LONGEST)
    assert ids.shape == mask.shape
    assert ids.shape[:2] == (100, 2)
    ends = set()
    for prompt, rows, masks in zip(TOY_PROMPTS * 50, ids.tolist(), mask.tolist(), strict=True):
        for row, covered in zip(rows, masks, strict=True):
            start = len(prompt)
            length = sum(covered)
            response = row[start : start + length]
            assert row[:start] == prompt, "a response follows the wrong prompt"
            assert length > 0, "a response has no token: is a drawn pad token left out of the mask?"
            whole = covered == [start <= t < start + length for t in range(len(row))]
            assert whole, "the mask has a hole: a drawn pad token is a token of the response, too"
            assert EOS not in response[:-1], "a token after EOS counts as response"
            ended = response[-1] == EOS
            assert ended or length == LONGEST, "EOS is not in the response, or it stops too early"
            assert set(row[start + length :]) <= {PAD}
            ends.add((length, ended))
    ways = "lengths 1, 2 and 3 by EOS, and 3 by the limit"
    assert len(ends) == 4, f"{ends} of {ways}: are some tokens never drawn, as with top-p?"


@pytest.mark.problem_3
def test_a_response_alone_goes_on_to_its_end(toy):
    torch.manual_seed(0)
    longest = 7  # the toy has eight positions
    lengths = set()
    for _ in range(60):
        ids, mask = p3o.sample(toy, [[0]], 1, longest)
        response = ids[mask].tolist()
        assert response[-1] == EOS or len(response) == longest, "a response stops too early"
        lengths.add(len(response))
    assert len(lengths) > 4


def standard_errors(counts, probability):
    """Return how far frequencies are from their probabilities, (V,) from (V,) each."""
    deviation = (probability * (1 - probability) * counts.sum()).sqrt()
    return (counts - probability * counts.sum()).abs() / deviation


@pytest.mark.problem_3
@pytest.mark.parametrize("positions", ("learned", "rotary"))
def test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt(
    toy, positions
):
    """Left padding that shifts positions, a temperature or a lost EOS would show."""
    torch.manual_seed(0)
    draws = 10_000
    model = toy
    if positions == "rotary":
        tokens = dict(bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
        model = llama(5, initializer_range=0.6, **tokens)
    number = {tuple(response): i for i, response in enumerate(every_response())}
    ids, mask = p3o.sample(model, TOY_PROMPTS, draws, LONGEST)
    for prompt, rows, lengths in zip(TOY_PROMPTS, ids.tolist(), mask.sum(-1).tolist(), strict=True):
        start = len(prompt)
        found = [
            number[tuple(row[start : start + length])]
            for row, length in zip(rows, lengths, strict=True)
        ]
        counts = torch.tensor(found).bincount(minlength=len(number))
        with torch.no_grad():
            probability = p3o.response_logprobs(model, *toy_batch(prompt)).sum(-1).exp()
        often = probability * draws > 5
        assert often.sum() > 15
        error = standard_errors(counts, probability)[often].max()
        assert error < 4.5, f"prompt {prompt}: frequencies are off by {error:.0f} standard errors"


@pytest.mark.problem_3
def test_the_whole_vocabulary_is_sampled():
    """The library's default keeps the 50 likeliest tokens; what is scored is all of them."""
    model = toy_model(0, vocab_size=200)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)  # so that no token is rare
        probability = model(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    ids, _ = p3o.sample(model, [[0]] * 200, 100, 1)
    counts = torch.bincount(ids[..., 1].flatten(), minlength=200)
    assert (counts > 0).all(), "some tokens of the vocabulary are never sampled"
    assert standard_errors(counts, probability).max() < 5


@pytest.mark.problem_3
def test_the_two_responses_of_a_pair_are_independent(toy):
    """Their joint first tokens come as often as the product of the single frequencies."""
    torch.manual_seed(0)
    ids, _ = p3o.sample(toy, [[0]] * 5000, 2, 1)
    first = ids[:, 0, 1]
    second = ids[:, 1, 1]
    joint = torch.bincount(5 * first + second, minlength=25).view(5, 5) / 5000
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert ((joint - expected).abs() < 4 * (expected / 5000).sqrt()).all()


@pytest.mark.problem_3
def test_a_data_pair_and_a_sample_with_the_same_text_are_the_same_input(toy):
    """The reward model scores what it was trained on: same ids and mask, whatever the padding."""
    torch.manual_seed(0)
    ids, mask = p3o.sample(toy, TOY_PROMPTS * 20, 1, LONGEST)
    responses = [row[covered].tolist() for row, covered in zip(ids, mask, strict=True)]
    data_ids, data_mask = p3o.collate(TOY_PROMPTS * 20, responses, toy)
    width = data_ids.shape[1]
    assert torch.equal(ids[:, 0, :width], data_ids)
    assert torch.equal(mask[:, 0, :width], data_mask)
    assert not mask[..., width:].any(), "only padding may follow the longest row"


@pytest.mark.padding
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_sampling_by_parts_changes_no_draw(toy, monkeypatch, micro_batch):
    """So that --micro-batch saves memory in sampling, too, and changes no update."""
    at_once = []
    sample = p3o.sample

    def watched(model, prompts, *rest):
        at_once.append(len(prompts))
        return sample(model, prompts, *rest)

    torch.manual_seed(0)
    ids, mask = p3o.sample(toy, TOY_PROMPTS * 20, 2, LONGEST)
    monkeypatch.setattr(p3o, "sample", watched)
    torch.manual_seed(0)
    cfg = p3o.Config(response_tokens=LONGEST, micro_batch=micro_batch)
    by_parts = p3o.sample_by_parts(toy, TOY_PROMPTS * 20, 2, cfg)
    assert torch.equal(by_parts[0], ids)
    assert torch.equal(by_parts[1], mask)
    assert max(at_once) == 8 * micro_batch and sum(at_once) == 20 * len(TOY_PROMPTS)


@pytest.mark.padding
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_the_sampling(toy, value):
    model = copy.deepcopy(toy)
    torch.nn.init.constant_(model.transformer.ln_f.bias, value)
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        p3o.sample(model, TOY_PROMPTS, 2, LONGEST)


# ---- EOS -----------------------------------------------------------------------------------
def test_an_eos_of_the_prompt_does_not_finish_the_response(toy):
    """Chat templates end every turn with one."""
    ids, mask = p3o.collate([[EOS, 0], [EOS, 0]], [[1, 2], [1, EOS]], toy)
    assert p3o.finished(toy, ids, mask).tolist() == [False, True]
