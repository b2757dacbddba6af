"""Sampling, log-probabilities, scores and the stages, on the tiny model."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import p3o


def encode(tiny, count: int = 6) -> list:
    _, _, tokenizer, cfg, pairs = tiny
    return p3o.tokenize(pairs[:count], tokenizer, cfg)


def collated(tiny, count: int = 6):
    examples = encode(tiny, count)
    return p3o.collate([e.prompt for e in examples], [e.chosen for e in examples], tiny[0])


def test_mask_covers_the_response_and_its_eos_and_nothing_else(tiny):
    ids, mask = collated(tiny)
    for row, covered, example in zip(ids.tolist(), mask.tolist(), encode(tiny), strict=True):
        start, end = len(example.prompt), len(example.prompt) + len(example.chosen)
        assert [i for i, inside in enumerate(covered) if inside] == list(range(start, end))
        assert row[start:end] == example.chosen
        assert row[end - 1] == tiny[2].eos_token_id
        assert set(row[end:]) <= {tiny[2].pad_token_id}


def test_logprob_is_the_sum_over_response_tokens_read_one_position_earlier(tiny):
    """By hand, response by response, from the library's own logits."""
    policy = tiny[0]
    ids, mask = collated(tiny)
    with torch.no_grad():
        found = p3o.response_logprobs(policy, ids, mask).sum(-1)
        for row, (example, value) in enumerate(zip(encode(tiny), found, strict=True)):
            alone = torch.tensor([example.prompt + example.chosen])
            logp = policy(alone).logits[0].log_softmax(-1)
            start = len(example.prompt)
            by_hand = sum(logp[start + t - 1, token].item() for t, token in enumerate(example.chosen))
            assert value.item() == pytest.approx(by_hand, abs=1e-4), row


def test_logprobs_and_scores_do_not_depend_on_padding_or_company(tiny):
    policy, reward_model, tokenizer, _, _ = tiny
    ids, mask = collated(tiny)
    wide = torch.nn.functional.pad(ids, (0, 5), value=tokenizer.eos_token_id)  # even EOS to the right is not read
    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    with torch.no_grad():
        logprobs, scores = p3o.response_logprobs(policy, ids, mask), p3o.reward_scores(reward_model, ids, mask)
        assert torch.allclose(p3o.response_logprobs(policy, wide, wide_mask).sum(-1), logprobs.sum(-1), atol=1e-4)
        assert torch.allclose(p3o.reward_scores(reward_model, wide, wide_mask), scores, atol=1e-5)
        assert torch.allclose(p3o.reward_scores(reward_model, ids[:1], mask[:1]), scores[:1], atol=1e-5)


def test_pairs_are_scored_as_rows(tiny):
    """(B, 2, T) and (2B, T) are the same rows, in the same order."""
    policy, reward_model, *_ = tiny
    ids, mask = collated(tiny)
    paired = ids.view(3, 2, -1), mask.view(3, 2, -1)
    with torch.no_grad():
        for function, model in ((p3o.response_logprobs, policy), (p3o.reward_scores, reward_model)):
            rows, pairs = function(model, ids, mask), function(model, *paired)
            assert torch.equal(pairs.flatten(0, 1), rows)


def test_the_logit_of_eos_receives_gradient_and_masked_tokens_none(tiny):
    policy = tiny[0]
    ids, mask = collated(tiny, 2)
    logprobs = p3o.response_logprobs(policy, ids, mask)
    assert torch.equal(logprobs != 0, mask[:, 1:])
    last = mask[0].nonzero().max()
    assert ids[0, last] == policy.config.eos_token_id
    assert logprobs[0, last - 1] < -0.01


def test_scores_come_from_the_last_token(tiny):
    reward_model = tiny[1]
    ids, mask = collated(tiny, 1)
    last = mask[0].nonzero().max()
    changed = ids.clone()
    changed[0, last] = 300
    with torch.no_grad():
        assert p3o.reward_scores(reward_model, changed, mask) != p3o.reward_scores(reward_model, ids, mask)


def test_the_librarys_own_forward_gives_the_same_score(tiny):
    _, reward_model, *_ = tiny
    ids, mask = collated(tiny)
    with torch.no_grad():
        theirs = reward_model(ids).logits[:, 0]
        assert torch.allclose(p3o.reward_scores(reward_model, ids, mask), theirs, atol=1e-5)


def test_two_forwards_are_bit_equal_because_dropout_is_off(tiny):
    policy = tiny[0]
    assert policy.config.resid_pdrop > 0  # GPT-2's default: eval mode is what turns it off
    policy.train()
    p3o.train_sft(
        policy, encode(tiny, 2), p3o.Config(**p3o.SMALL | {"sft_lr": 0.0, "sft_epochs": 1}), lambda *a, **k: 0
    )
    ids, mask = collated(tiny)
    with torch.no_grad():
        assert torch.equal(p3o.response_logprobs(policy, ids, mask), p3o.response_logprobs(policy, ids, mask))


def test_sampling_keeps_prompts_pads_right_and_stops_at_the_first_eos(tiny):
    policy, _, tokenizer, _, _ = tiny
    prompts = [example.prompt for example in encode(tiny, 8)]
    assert len(set(map(len, prompts))) > 1
    torch.manual_seed(0)
    # an EOS that is as likely as everything else together, so that responses end at many lengths
    weight, eos = policy.lm_head.weight, tokenizer.eos_token_id
    kept = weight[eos].clone()
    with torch.no_grad():
        weight[eos] = weight.mean(0) + 0.5 * policy.transformer.ln_f.bias
        ids, mask = p3o.sample(policy, prompts * 8, 2, 12)
        weight[eos] = kept
    assert ids.shape == mask.shape == (64, 2, ids.shape[-1])
    for prompt, pair, pair_mask in zip(prompts * 8, ids.tolist(), mask.tolist(), strict=True):
        for row, covered in zip(pair, pair_mask, strict=True):
            assert row[: len(prompt)] == prompt
            start, end = covered.index(True), covered.index(True) + sum(covered)
            assert start == len(prompt)
            assert covered[start:end] == [True] * (end - start)
            assert eos not in row[start : end - 1]
            assert row[end - 1] == eos or end - start == 12  # nothing forged: it ended, or it was cut
            assert set(row[end:]) <= {tokenizer.pad_token_id}


def test_what_is_sampled_is_what_is_scored(tiny):
    """Frequencies of the first token over many draws match exp(scored log-prob): temperature 1, no top-k, no top-p."""
    policy, _, tokenizer, _, _ = tiny
    prompt = encode(tiny, 1)[0].prompt
    torch.manual_seed(0)
    draws = 40_000
    ids, _ = p3o.sample(policy, [prompt] * (draws // 100), 100, 1)
    counts = torch.bincount(ids[..., len(prompt)].flatten(), minlength=len(tokenizer)) / draws
    every = torch.tensor([[*prompt, token] for token in range(len(tokenizer))])
    mask = torch.zeros_like(every, dtype=torch.bool)
    mask[:, -1] = True
    with torch.no_grad():
        probability = p3o.response_logprobs(policy, every, mask).sum(-1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-4)
    error = (counts - probability).abs() / (probability * (1 - probability) / draws).sqrt()
    assert error.max() < 5.5  # standard errors, over some seven hundred tokens
    assert (counts > 0).sum() > 400  # a top-k of 50 would leave 50


def test_the_two_samples_of_a_pair_are_independent(tiny):
    policy, *_ = tiny
    torch.manual_seed(0)
    ids, _ = p3o.sample(policy, [encode(tiny, 1)[0].prompt] * 500, 2, 1)
    assert (ids[:, 0] == ids[:, 1]).all(-1).float().mean() < 0.05


def run_policy(tiny, score, cfg, seed=0, loss_fn=p3o.p3o_loss):
    policy, _, _, _, _ = tiny
    trained = type(policy)(policy.config)
    trained.load_state_dict(policy.state_dict())
    rows: list[dict] = []
    torch.manual_seed(seed)
    prompts = [example.prompt for example in encode(tiny, 64)]
    p3o.train_policy(trained, policy, score, prompts, cfg, lambda step, **row: rows.append(row), loss_fn)
    return trained, rows


def length_score(ids, mask):
    return mask.sum(-1).float() / 8


def test_pairs_stay_together_from_sampling_to_loss(tiny):
    """A score that encodes the prompt: both members of every pair always carry the same one."""
    cfg = p3o.Config(**p3o.SMALL | dict(iterations=3, pairs=16, minibatch=5, inner_epochs=2, response_tokens=6))
    seen = []

    def loss_fn(logprobs, old_logprobs, ref_logprobs, scores, **options):
        seen.append(scores)
        return p3o.p3o_loss(logprobs, old_logprobs, ref_logprobs, scores, **options)

    def prompt_score(ids, mask):
        return (ids * (mask.cumsum(-1) == 0) * torch.arange(1, ids.shape[-1] + 1)).sum(-1).float()

    run_policy(tiny, prompt_score, cfg, loss_fn=loss_fn)
    scores = torch.cat(seen)
    assert torch.equal(scores[:, 0], scores[:, 1])
    assert len(scores.unique()) > 20


def test_with_no_learning_rate_ratio_is_1_and_kl_0_at_every_inner_step(tiny):
    cfg = p3o.Config(**p3o.SMALL | dict(iterations=2, pairs=16, minibatch=8, inner_epochs=3, lr=0.0, response_tokens=8))
    drift = []

    def loss_fn(logprobs, old_logprobs, ref_logprobs, scores, **options):
        drift.append((logprobs - old_logprobs).abs().max().item())
        return p3o.p3o_loss(logprobs, old_logprobs, ref_logprobs, scores, **options)

    _, rows = run_policy(tiny, length_score, cfg, loss_fn=loss_fn)
    assert len(drift) == 2 * 3 * 2
    assert max(drift) < 1e-4
    assert all(abs(row["objective/kl"]) < 1e-4 for row in rows)
    assert all(row["policy/clipfrac"] == 0 for row in rows)


@pytest.mark.parametrize("clip", ("joint", "separate"))
def test_a_whole_policy_run_is_invariant_to_an_offset_of_the_reward(tiny, clip):
    """r and r + δ(x): the same samples, metrics and final weights, bit by bit (δ exact in binary)."""
    cfg = p3o.Config(**p3o.SMALL | dict(iterations=3, pairs=16, minibatch=8, response_tokens=8, clip=clip))
    plain, rows = run_policy(tiny, length_score, cfg)

    def offset_score(ids, mask):
        delta = ids[..., 1].float().remainder(40) - 20  # one number a prompt, exact in binary, far larger than r
        assert torch.equal(delta[:, 0], delta[:, 1])
        return length_score(ids, mask) + delta

    offset, shifted_rows = run_policy(tiny, offset_score, cfg)
    for a, b in zip(plain.parameters(), offset.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(rows, shifted_rows, strict=True):
        assert {k: v for k, v in a.items() if k != "objective/scores"} == {
            k: v for k, v in b.items() if k != "objective/scores"
        }


def test_the_policy_learns_what_the_score_asks_for(tiny):
    """Reward for one token: its share rises, and the reference stays where it was."""
    cfg = p3o.Config(**p3o.SMALL | dict(iterations=12, pairs=32, minibatch=16, response_tokens=6, lr=3e-3, beta=0.0))
    reference = {key: value.clone() for key, value in tiny[0].state_dict().items()}
    _, rows = run_policy(tiny, lambda i, m: ((i % 2 == 0) & m).sum(-1) / m.sum(-1), cfg)
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.1
    assert rows[-1]["objective/kl"] > 0
    assert all(torch.equal(value, reference[key]) for key, value in tiny[0].state_dict().items())


def test_the_gain_makes_score_differences_of_unit_size_whatever_the_offset(tiny):
    policy, reward_model, _, cfg, _ = tiny
    model = type(reward_model)(reward_model.config).eval()
    prompts = [example.prompt for example in encode(tiny, 32)]
    with torch.no_grad():
        model.score.weight.mul_(30)
    torch.manual_seed(0)
    p3o.set_gain(model, policy, prompts, cfg)
    torch.manual_seed(0)
    ids, mask = p3o.sample(policy, prompts, 2, cfg.response_tokens)
    with torch.no_grad():
        gaps = p3o.reward_scores(model, ids, mask).diff()
    assert gaps.square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)


def test_reward_training_starts_at_ln_2_and_learns(tiny):
    _, reward_model, _, _, _ = tiny
    cfg = p3o.Config(**p3o.SMALL | dict(reward_epochs=3, batch=16))
    model, rows = type(reward_model)(reward_model.config), []
    torch.manual_seed(0)
    p3o.train_reward(model, encode(tiny, 256), cfg, lambda step, **row: rows.append(row["reward/loss"]))
    assert rows[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(rows[-10:]) / 10 < 0.6


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, schedule = p3o.make_optimizer([{"params": [weight], "lr": 1.0}], 1)
    with pytest.raises(FloatingPointError):
        p3o.gradient_step((weight * math.nan).sum(), optimizer, schedule)
    assert torch.equal(weight.detach(), torch.ones(2))


def test_a_base_model_without_a_pad_token_gets_one_inside_its_vocabulary(tiny, tmp_path):
    """The path of the real GPT-2: loaded from a directory, its tokenizer has EOS alone."""
    policy, _, tokenizer, _, pairs = tiny
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    cfg = p3o.Config(model=str(tmp_path), prompt_tokens=32, response_tokens=40)
    model, loaded = p3o.load_base(cfg, pairs)
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    assert loaded.pad_token_id < model.get_input_embeddings().num_embeddings
    with pytest.raises(p3o.UserError, match="positions"):
        p3o.load_base(p3o.Config(model=str(tmp_path)), pairs)
    with pytest.raises(p3o.UserError, match="cannot load"):
        p3o.load_base(p3o.Config(model=str(tmp_path / "nothing")), pairs)


def test_saved_models_load_and_score_the_same(tiny, tmp_path):
    policy, reward_model, *_ = tiny
    ids, mask = collated(tiny)
    for model, kind in ((policy, AutoModelForCausalLM), (reward_model, AutoModelForSequenceClassification)):
        model.save_pretrained(tmp_path / kind.__name__)
        loaded = kind.from_pretrained(tmp_path / kind.__name__)
        function = p3o.response_logprobs if model is policy else p3o.reward_scores
        with torch.no_grad():
            assert torch.equal(function(model, ids, mask), function(loaded, ids, mask))


def test_every_stage_turns_dropout_off(tiny):
    policy, reward_model, *_ = tiny
    cfg = p3o.Config(**p3o.SMALL | dict(sft_epochs=1, reward_epochs=1, iterations=1, pairs=2, minibatch=2, lr=0.0))
    copy = type(reward_model)(reward_model.config).train()
    p3o.train_reward(copy, encode(tiny, 2), cfg, lambda *_, **__: None)
    assert not copy.training
    trained = type(policy)(policy.config).train()
    trained.load_state_dict(policy.state_dict())
    prompts = [example.prompt for example in encode(tiny, 2)]
    p3o.train_policy(trained, policy, length_score, prompts, cfg, lambda *_, **__: None)
    assert not trained.training


def test_evaluation_by_hand(tiny):
    """A policy that ends at once against one that rambles: each figure from its own table, or from the pairs."""
    import judge

    sft, reward_model, tokenizer, _, pairs = tiny
    policy = type(sft)(sft.config).eval()
    policy.load_state_dict(sft.state_dict())
    with torch.no_grad():  # the last hidden state points at EOS
        policy.transformer.ln_f.bias += 30 * policy.lm_head.weight[tokenizer.eos_token_id]
    cfg = p3o.Config(**p3o.SMALL | dict(eval_prompts=24, pairs=10, response_tokens=20))
    torch.manual_seed(0)
    summary, table = p3o.evaluate(cfg, [sft, reward_model, policy], tokenizer, pairs[:60])

    assert summary["judge"] == "gold"
    assert summary["finished_fraction"] > 0.9 > 0.5 > sum(table["finished_sft"]) / 24
    assert summary["kl"] > 1
    gold = {
        name: [judge.gold_reward(*row) for row in zip(table["prompt"], table[f"answer_{name}"], strict=True)]
        for name in ("sft", "policy")
    }
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(gold["policy"], gold["sft"], strict=True)]
    assert summary["win_rate"] == pytest.approx(sum(wins) / 24)
    assert summary["win_rate"] != 0.5  # so that the sides cannot be swapped unseen
    assert summary["gold_policy"] == pytest.approx(sum(gold["policy"]) / 24)
    with torch.no_grad():
        scores = p3o.score_pairs(reward_model, p3o.tokenize(pairs[:60], tokenizer, cfg))
    better = (scores[:, 0] > scores[:, 1]).tolist()
    assert summary["reward_accuracy"] == pytest.approx(sum(better) / 60)
    assert 0 < sum(better) < 60 and sum(better) != 30
