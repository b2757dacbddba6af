"""The evaluation, each figure worked out by hand."""

import math
import statistics

import pytest
import torch
from toys import encode, small

import p3o
from data import judge
from data.preferences import Pair

GOLD = {"gold_sft", "gold_policy", "well_formed_sft", "well_formed_policy", "reward_gold_agreement"}


def likes(model, token: int, how_much: float):
    """The model's last hidden state points at a token: it says that one more often."""
    with torch.no_grad():
        model.transformer.ln_f.bias += how_much * model.lm_head.weight[token]
    return model


@pytest.fixture
def said(monkeypatch):
    """What the models of an evaluation said, by name: `judge.show` is given it."""
    kept = {}
    monkeypatch.setattr(judge, "show", lambda pairs, answers, figures: kept.update(answers))
    return kept


def test_evaluation_by_hand(tiny, fresh, said):
    """A policy that ends at once against one that rambles: each figure from what was said."""
    base, reward_model, tokenizer, _, pairs = tiny
    sft = likes(fresh(base), tokenizer.encode(".")[0], 10)
    policy = likes(fresh(base), tokenizer.eos_token_id, 30)
    cfg = small(eval_prompts=24, minibatch=7)  # 7 divides neither 24 nor 61
    examples = p3o.tokenize(pairs[:61], tokenizer, cfg)
    torch.manual_seed(0)
    figures = p3o.evaluate(cfg, sft, reward_model, policy, tokenizer, examples)

    assert sum(map(len, said["policy"])) < sum(map(len, said["sft"])) / 5
    for name in ("sft", "policy"):
        answers = said[name]
        assert len(answers) == 24
        for i, answer in enumerate(answers):
            prompt = pairs[i].prompt
            assert figures[f"gold_{name}"][i] == judge.gold_reward(prompt, answer)
            assert figures[f"well_formed_{name}"][i] == judge.well_formed(prompt, answer)
    wins = []
    for ours, theirs in zip(figures["gold_policy"], figures["gold_sft"], strict=True):
        wins.append(0.5 if ours == theirs else float(ours > theirs))
    assert figures["win_rate"] == wins
    assert sum(wins) != 12  # so that the sides cannot be swapped unseen
    assert 0.5 in wins, "no tie, so it was not shown that it counts half"

    with torch.no_grad():
        scores = p3o.score_pairs(reward_model, examples)
    better = (scores[:, 0] > scores[:, 1]).tolist()
    assert figures["reward_accuracy"] == better
    assert 0 < sum(better) < 61
    agrees = []
    for pair, prefers_chosen in zip(pairs, better, strict=False):
        gap = judge.gold_reward(pair.prompt, pair.chosen)
        gap -= judge.gold_reward(pair.prompt, pair.rejected)
        if gap:
            agrees.append(prefers_chosen == (gap > 0))
    assert len(agrees) < 61
    message = "pairs of equal gold reward have no better response"
    assert figures["reward_gold_agreement"] == agrees, message


def test_the_prompts_that_are_answered_are_those_that_are_judged_and_shown(tiny, monkeypatch, said):
    """The first --eval-prompts held-out ones, in their order, by both models."""
    base, reward_model, tokenizer, _, _ = tiny
    cfg = small(eval_prompts=10, minibatch=4, response_tokens=2)
    examples = encode(tiny, 16)
    plain = p3o.sample
    asked = []

    def watched(model, prompts, *rest):
        asked.append(prompts)
        return plain(model, prompts, *rest)

    monkeypatch.setattr(p3o, "sample", watched)
    figures = p3o.evaluate(cfg, base, reward_model, base, tokenizer, examples)
    expected = [example.prompt for example in examples[:10]]
    for first in (0, 1):  # SFT and the policy take turns
        answered = [prompt for batch in asked[first::2] for prompt in batch]
        assert answered == expected
    assert len(said["sft"]) == len(figures["gold_sft"]) == 10


def test_kl_score_and_finished_are_those_of_each_models_own_answers(tiny, fresh, monkeypatch):
    base, reward_model, tokenizer, _, pairs = tiny
    sft = likes(fresh(base), tokenizer.eos_token_id, 18)
    policy = likes(fresh(base), tokenizer.eos_token_id, 24)
    cfg = small(eval_prompts=20, minibatch=8, response_tokens=6)
    examples = p3o.tokenize(pairs[:30], tokenizer, cfg)
    plain = p3o.sample
    sampled = []

    def watched(model, *rest):
        ids, mask = plain(model, *rest)
        sampled.append((model is policy, ids[:, 0], mask[:, 0]))
        return ids, mask

    monkeypatch.setattr(p3o, "sample", watched)
    torch.manual_seed(0)
    figures = p3o.evaluate(cfg, sft, reward_model, policy, tokenizer, examples)
    for name, by_policy, model in (("sft", False, sft), ("policy", True, policy)):
        expected = {"kl": [], "score": [], "finished": []}
        for of_policy, ids, mask in sampled:
            if of_policy == by_policy:
                with torch.no_grad():
                    kl = p3o.sequence_logprobs(model, ids, mask)
                    kl -= p3o.sequence_logprobs(sft, ids, mask)
                    score = p3o.reward_scores(reward_model, ids, mask)
                expected["kl"] += kl.tolist()
                expected["score"] += score.tolist()
                ended = (ids.masked_fill(~mask, -1) == tokenizer.eos_token_id).any(-1)
                expected["finished"] += ended.tolist()
        for key, values in expected.items():
            assert figures[f"{key}_{name}"] == pytest.approx(values, abs=1e-4), f"{key}_{name}"
    assert max(map(abs, figures["kl_sft"])) == 0
    assert max(map(abs, figures["kl_policy"])) > 0.1
    assert 0 < sum(figures["finished_sft"]) < sum(figures["finished_policy"])


def test_without_a_gold_judge_the_win_rate_is_by_the_reward_models_own_scores(
    tiny, fresh, tmp_path, monkeypatch, said
):
    """A reward that counts one token, and a policy that likes it."""
    base, reward_model, tokenizer, _, pairs = tiny
    liked = 300
    policy = likes(fresh(base), liked, 30)
    cfg = small(eval_prompts=24, response_tokens=20, data=str(tmp_path))
    examples = p3o.tokenize(pairs[:30], tokenizer, cfg)

    def count(_, ids, mask):
        return ((ids == liked) & mask).sum(-1).float()

    monkeypatch.setattr(p3o, "reward_scores", count)
    torch.manual_seed(0)
    figures = p3o.evaluate(cfg, base, reward_model, policy, tokenizer, examples)
    for name in ("sft", "policy"):
        for answer, score in zip(said[name], figures[f"score_{name}"], strict=True):
            found = tokenizer.encode(answer).count(liked)
            assert score >= found, "the scores belong to other answers"
    assert not GOLD & figures.keys()
    wins = []
    for ours, theirs in zip(figures["score_policy"], figures["score_sft"], strict=True):
        wins.append(0.5 if ours == theirs else float(ours > theirs))
    assert figures["win_rate"] == wins
    assert statistics.fmean(wins) > 0.6


def test_the_judge_sees_the_whole_prompt_however_short_the_models_is(tiny):
    """Of "...Any advice?", the model's last two tokens, it could not tell what the trouble is."""
    base, reward_model, tokenizer, _, pairs = tiny
    cfg = small(prompt_tokens=2, response_tokens=10, eval_prompts=8)
    examples = p3o.tokenize(pairs[:8], tokenizer, cfg)
    figures = p3o.evaluate(cfg, base, reward_model, base, tokenizer, examples)
    assert len(figures["gold_policy"]) == 8


def test_figures_are_told_with_half_of_their_95_percent_interval(capsys):
    """1.96 standard errors, deviation / √n, to each side, of as many values as there are."""
    values = [0.0, 1.0, 1.0, 0.5, 1.0]
    summary = judge.summarize({"win_rate": values, "kl_policy": [2.0, 4.0]})
    half = 1.96 * statistics.stdev(values) / math.sqrt(5)
    assert summary["win_rate"] == pytest.approx(0.7)
    assert summary["win_rate_ci"] == pytest.approx(half)
    assert summary["kl_policy_ci"] == pytest.approx(1.96)
    assert "win_rate                 0.700 ± 0.392" in capsys.readouterr().out


def test_what_was_said_is_shown_beside_its_score_before_and_after(capsys):
    pairs = [Pair(f"\n\nHuman: Q{i}\n\nAssistant:", "", "") for i in range(7)]
    answers = {"sft": [f" a{i}" for i in range(6)], "policy": [f" b{i}" for i in range(6)]}
    figures = {"score_sft": list(range(6)), "score_policy": [-i for i in range(6)]}
    judge.show(pairs, answers, figures)
    shown = capsys.readouterr().out
    assert "Human: Q4\n  SFT +4.00  a4\n  P3O -4.00  b4\n" in shown
    assert "Q5" not in shown


def test_fewer_answers_than_are_shown_are_shown(tiny, capsys):
    cfg = small(eval_prompts=2, response_tokens=4)
    base, reward_model, tokenizer, _, _ = tiny
    p3o.evaluate(cfg, base, reward_model, base, tokenizer, encode(tiny, 6))
    assert capsys.readouterr().out.count("  P3O ") == 2
