"""The judge trained on the half of the pairs that the policy never saw."""

import other_half
import pytest
import torch
from toys import status

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


def test_the_judge_learns_from_its_half_alone_and_both_judge_the_same_answers(
    quick, halves, out, monkeypatch, capsys
):
    assert status([*quick, "--data", str(halves / "mine"), "--reward-lr", "1e-3"]) == 0
    other, heldout = load_pairs(str(halves / "other"))
    trained = []
    train_reward = p3o.train_reward

    def spy(model, examples, cfg, log):
        trained.append([example.text for example in examples])
        assert cfg.reward_lr == 1e-3, "the run's options"
        train_reward(model, examples, cfg, log)

    monkeypatch.setattr(p3o, "train_reward", spy)
    judged = []
    reward_scores = p3o.reward_scores

    def watch(model, ids, mask):
        judged.append((id(model), ids.clone()))
        return reward_scores(model, ids, mask)

    monkeypatch.setattr(p3o, "reward_scores", watch)
    figures = other_half.judge(out, str(halves / "other"))
    assert trained == [other]
    asked = min(16, len(heldout))
    assert {len(figures[name]) for name in ("accuracy_own", "accuracy_other")} == {len(heldout)}
    for name in ("win_rate_own", "win_rate_other", "agreement"):
        assert len(figures[name]) == asked
    models = {model for model, _ in judged}
    seen = {
        model: [ids for who, ids in judged if who == model and ids.dim() == 3] for model in models
    }
    first, second = [rows for rows in seen.values() if rows][-2:]
    assert all(map(torch.equal, first, second)), "the same answers"


def test_its_command_line_tells_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["other_half.py", "judge", str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"other_half\.py: .*config\.json"):
        other_half.main()
