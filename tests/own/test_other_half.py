"""The judge trained on the half of the pairs that the policy never saw."""

import other_half
import pytest
import torch
from conftest import QUICK
from toys import status
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import p3o
from data.preferences import InputError, load_pairs


@pytest.fixture(scope="module")
def halves(quick_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves") / "halves"
    other_half.split(str(quick_data), folder, None)
    return folder


def test_each_prompt_is_in_one_half_and_both_hold_out_the_same(quick_data, halves):
    train, heldout = load_pairs(str(quick_data))
    mine, mine_out = load_pairs(str(halves / "mine"))
    other, other_out = load_pairs(str(halves / "other"))
    assert sorted(mine + other) == sorted(train)
    assert not {pair.prompt for pair in mine} & {pair.prompt for pair in other}
    assert mine_out == other_out == heldout
    assert 0.3 < len(mine) / len(train) < 0.7
    with pytest.raises(InputError, match="exists"):
        other_half.split(str(quick_data), halves, None)


def same(model, other) -> bool:
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_the_judge_learns_from_its_half_alone_and_both_judge_the_same_answers(
    quick, halves, out, monkeypatch
):
    """Each figure again, from what the models were asked and what they said."""
    assert status([*quick, "--data", str(halves / "mine"), "--reward-lr", "1e-3"]) == 0
    other, heldout = load_pairs(str(halves / "other"))
    train_reward, score_pairs = p3o.train_reward, p3o.score_pairs
    reward_scores, sample = p3o.reward_scores, p3o.sample
    second = []
    ranked = {"own": [], "other": []}
    said = {"own": [], "other": []}
    answered = []
    asked_for = [[], []]  # of the policy, of SFT

    def spy_train(model, examples, cfg, log):
        assert [example.text for example in examples] == other
        assert cfg.reward_lr == 1e-3, "the run's options"
        assert same(model.base_model, p3o.load(out / "sft").base_model)
        train_reward(model, examples, cfg, log)
        second.append(model)

    def name_of(model) -> str:
        if model in second:
            return "other"
        assert same(model, p3o.load(out / "reward", AutoModelForSequenceClassification))
        return "own"

    def spy_pairs(model, batch):
        scores = score_pairs(model, batch)
        if second:
            ranked[name_of(model)] += (scores[:, 0] > scores[:, 1]).tolist()
        return scores

    def spy_scores(model, ids, mask):
        scores = reward_scores(model, ids, mask)
        if ids.dim() == 3:
            said[name_of(model)].append((ids, scores.flatten()))
        return scores

    def spy_sample(model, prompts, *rest):
        answered.append(model)
        asked_for[len(answered) % 2] += prompts
        return sample(model, prompts, *rest)

    monkeypatch.setattr(p3o, "train_reward", spy_train)
    monkeypatch.setattr(p3o, "score_pairs", spy_pairs)
    monkeypatch.setattr(p3o, "reward_scores", spy_scores)
    monkeypatch.setattr(p3o, "sample", spy_sample)
    figures = other_half.judge(out, str(halves / "other"))

    tokenizer = AutoTokenizer.from_pretrained(out / "sft")
    cfg = p3o.Config(**p3o.SMALL | QUICK)
    examples = p3o.tokenize(heldout, tokenizer, cfg)[: cfg.eval_prompts]
    assert asked_for == [[example.prompt for example in examples]] * 2
    for turn, model in enumerate(answered):
        assert same(model, p3o.load(out / ("sft", "p3o")[turn % 2]))
    wins = {}
    for name, calls in said.items():
        assert figures[f"accuracy_{name}"] == ranked[name]
        assert len(ranked[name]) == len(heldout)
        answers = [scores for _, scores in calls]
        gap = torch.cat(answers[1::2]) - torch.cat(answers[0::2])  # policy's over SFT's
        wins[name] = (gap.sign() / 2 + 0.5).tolist()
        assert figures[f"win_rate_{name}"] == wins[name]
    assert wins["own"] != wins["other"]
    both = zip(wins["own"], wins["other"], strict=True)
    assert figures["agreement"] == [own == other for own, other in both]
    asked = [[ids for ids, _ in calls] for calls in said.values()]
    assert all(map(torch.equal, *asked)), "the same answers"


def test_its_command_line_tells_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["other_half.py", "judge", str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"other_half\.py: .*config\.json"):
        other_half.main()
