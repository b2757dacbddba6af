"""What one stage hands to the next, what the run's directory promises, what a figure is computed from."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import p3o


def out_of(options: list[str]) -> Path:
    return Path(options[options.index("--out") + 1])


def test_a_failed_self_check_stops_the_run():
    with pytest.raises(AssertionError, match="ratio = 1"):
        p3o.self_check("ratio = 1", False)


def test_what_is_written_appears_whole_or_not_at_all(tmp_path):
    """A stage's folder is its promise that the stage is done."""

    def half(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        p3o.write_atomically(tmp_path / "sft", half)
    assert not (tmp_path / "sft").exists()


def test_every_stage_starts_from_weights_in_float32(tiny, fresh, tmp_path):
    """AdamW's steps at a learning rate of 2e-6 would vanish in bf16's three digits."""
    for name in ("sft", "reward"):
        model = fresh(tiny[name == "reward"]).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        loaded = p3o.load(p3o.Config(out=str(tmp_path)), name)
        assert loaded.dtype == torch.float32


def test_the_reward_model_is_saved_with_its_gain(quick, monkeypatch):
    """Else β would have another unit in stage 3 of a resumed run, and for whoever loads the folder."""
    plain, heads = p3o.set_gain, []

    def watched(model, *rest):
        gain = plain(model, *rest)
        heads.append(model.score.weight.detach().clone())
        return gain

    monkeypatch.setattr(p3o, "set_gain", watched)
    assert p3o.main(quick) == 0
    saved = AutoModelForSequenceClassification.from_pretrained(out_of(quick) / "reward")
    assert torch.equal(saved.score.weight, heads[0])


def test_the_checkpoint_is_kept_until_the_policy_is_saved(quick, monkeypatch, capsys):
    """Killed or out of disk while it saves, stage 3 must not begin anew."""
    plain = p3o.write_atomically

    def full(path, *writers):
        if path.name == "p3o":
            raise OSError("disk full")
        plain(path, *writers)

    monkeypatch.setattr(p3o, "write_atomically", full)
    assert p3o.main([*quick, "--iterations", "22", "--pairs", "4"]) == 2
    assert "disk full" in capsys.readouterr().err
    assert (out_of(quick) / "p3o.checkpoint").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--iterations", "3"), ("--lr", "0.1"), ("--seed", "5"), ("--response-tokens", "9")]
)
def test_what_changes_the_training_is_compared_when_a_run_goes_on(option, value, quick, capsys):
    assert p3o.main(quick) == 0
    assert p3o.main([*quick, option, value]) == 2
    assert option.removeprefix("--").replace("-", "_") in capsys.readouterr().err


def test_one_held_out_pair_is_too_few(rows, tmp_path):
    """One figure has no interval."""
    for name, part in (("train", rows[:30]), ("test", rows[30:31])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    with pytest.raises(p3o.UserError, match="too few usable rows"):
        p3o.load_pairs(str(tmp_path))


def test_an_interval_counts_the_prompts_that_there_are(tiny, fresh):
    """Where fewer prompts are held out than --eval-prompts asks for."""
    base, reward_model, tokenizer, cfg, pairs = tiny
    cfg = p3o.Config(**p3o.SMALL | dict(eval_prompts=100, response_tokens=20))
    torch.manual_seed(0)
    summary, table = p3o.evaluate(cfg, [base, reward_model, fresh(base)], tokenizer, pairs[:30])
    assert len(table["win_rate"]) == 30
    half = 1.96 * statistics.stdev(table["score_policy"]) / math.sqrt(30)
    low, high = summary["score_policy_ci"]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-4)
