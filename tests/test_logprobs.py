"""Log-probabilities: of each response token, read in the right place, in fp32, whatever the
batch."""

import copy
import math

import pytest
import torch
from toys import (
    EOS,
    TOY_PROMPTS,
    batch,
    encode,
    llama,
    toy_batch,
    toy_model,
    unended,
    with_nan_elsewhere,
)

import p3o


@pytest.mark.problem_2
def test_a_response_tokens_log_prob_is_read_one_position_earlier(tiny):
    """By hand from the library's own logits, each response alone: logits at t − 1 predict token
    t."""
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
def test_the_log_probs_of_constant_logits_are_minus_ln_of_the_vocabulary_per_response_token(toy):
    """Two prompt lengths, three response lengths: an off-by-one in the mask changes the count
    of tokens."""
    model = copy.deepcopy(toy)
    torch.nn.init.zeros_(model.transformer.ln_f.weight)
    torch.nn.init.zeros_(model.transformer.ln_f.bias)
    for prompt in TOY_PROMPTS:
        ids, mask = toy_batch(prompt)
        found = p3o.response_logprobs(model, ids, mask).sum(-1)
        assert torch.allclose(found, -math.log(5) * mask.sum(-1))


@pytest.mark.problem_2
@pytest.mark.parametrize("prompt", TOY_PROMPTS, ids=str)
def test_the_probabilities_of_all_responses_add_up_to_one(toy, prompt):
    """Only if every action counts, EOS included, and nothing else does."""
    with torch.no_grad():
        assert p3o.response_logprobs(toy, *toy_batch(prompt)).sum(
            -1
        ).exp().sum().item() == pytest.approx(1, abs=1e-5)


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
    wide = torch.nn.functional.pad(
        ids, (0, 5), value=tokenizer.eos_token_id
    )  # even EOS to the right is not read
    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    with torch.no_grad():
        found = p3o.response_logprobs(policy, ids, mask).sum(-1)
        assert torch.allclose(
            p3o.response_logprobs(policy, wide, wide_mask).sum(-1), found, atol=1e-4
        )
        for i in range(len(ids)):
            length = mask[i].nonzero().max() + 1
            alone = p3o.response_logprobs(
                policy, ids[i : i + 1, :length], mask[i : i + 1, :length]
            ).sum(-1)
            assert alone.item() == pytest.approx(found[i].item(), abs=1e-4)


@pytest.mark.problem_2
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_pairs_have_the_log_probs_of_their_rows(tiny, family):
    """(B, 2, T) and (2B, T) are the same rows, in the same order; Llama takes (2B, T) alone."""
    ids, mask = batch(tiny)
    model = tiny[0] if family == "gpt2" else llama(len(tiny[2]))
    with torch.no_grad():
        rows = p3o.response_logprobs(model, ids, mask)
        pairs = p3o.response_logprobs(model, ids.view(3, 2, -1), mask.view(3, 2, -1))
    assert pairs.shape == (3, 2, ids.shape[1] - 1)
    assert torch.allclose(pairs, rows.view(3, 2, -1), atol=1e-5)


@pytest.mark.problem_2
def test_positions_outside_the_response_are_left_out_not_multiplied_by_zero(toy):
    """NaN · 0 = NaN: with NaN in every slot that predicts no response token, value and gradient
    stay the same."""
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
    """Logits for prompts and padding would be most of the memory: with GPT-2, 200 kB a token."""
    policy = tiny[0]
    ids, mask = batch(tiny)
    seen = []
    handle = policy.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    p3o.response_logprobs(policy, ids, mask)
    handle.remove()
    positions = sum(seen) // policy.config.n_embd
    assert positions == mask.sum(), "the output head should see the response positions alone"


@pytest.mark.problem_2
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_log_probs_are_computed_in_float32_even_in_a_bfloat16_model(toy, dtype):
    """bf16 has three digits: a softmax over it would not even add up to one."""
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


@pytest.mark.problem_2
def test_the_mean_log_ratio_over_the_policy_is_the_kl_to_the_reference(toy):
    """E_π[h] = KL(π‖π_ref) ≥ 0, summed over all 85 responses, against the chain rule: the KL of
    each next token, times the probability of coming there."""
    reference = toy_model(1)
    prompt = TOY_PROMPTS[1]
    ids, mask = toy_batch(prompt)
    by_token = 0.0
    with torch.no_grad():
        logp = p3o.response_logprobs(toy, ids, mask).sum(-1)  # (85,)
        logp_ref = p3o.response_logprobs(reference, ids, mask).sum(-1)  # (85,)
        for prefix in [*unended(0), *unended(1), *unended(2)]:
            so_far = torch.tensor([prompt + prefix])
            a = toy(so_far).logits[0].log_softmax(-1)  # (T, 5)
            b = reference(so_far).logits[0].log_softmax(-1)  # (T, 5)
            reached = sum(a[len(prompt) - 1 + t, token] for t, token in enumerate(prefix))
            next_kl = (a[-1].exp() * (a[-1] - b[-1])).sum()
            by_token += math.exp(reached) * next_kl.item()
    kl = (logp.exp() * (logp - logp_ref)).sum().item()
    assert kl == pytest.approx(by_token, rel=1e-4)
    assert kl > 0.1


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


def test_what_is_computed_in_parts_has_no_gradient(tiny):
    ids, mask = batch(tiny)

    def logprobs(ids, mask):
        return p3o.sequence_logprobs(tiny[0], ids, mask)

    whole = logprobs(ids, mask)
    found = p3o.in_parts(logprobs, 4, ids, mask)
    assert torch.allclose(found, whole, atol=1e-4)
    assert whole.requires_grad and not found.requires_grad
