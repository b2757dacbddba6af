"""tests/tools/rates.py: what it tries, what it says of it, and what it hands on."""

import re

import pytest
import rates
import torch

import p3o

CFG = p3o.Config(**p3o.SMALL)


def losses(by_rate: dict[float, list[float]]):
    """A stage that has these losses, and leaves the rate in the model."""
    draws = []

    def train(model, cfg, log) -> None:
        assert model.bias.item() == 0, "each rate starts from the same model"
        draws.append(torch.rand(3).tolist())
        for step, loss in enumerate(by_rate[cfg.sft_lr]):
            log(step, {"sft/loss": loss})
        if len(by_rate[cfg.sft_lr]) < 8:
            raise FloatingPointError("NaN in the gradient")
        model.bias.data.fill_(cfg.sft_lr)

    return train, draws


def start() -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1)
    model.bias.data.zero_()
    return model


def test_the_least_loss_of_the_last_quarter_is_handed_on(capsys):
    """On the same batches, whatever came before."""
    by_rate = {0.001: [1.0] * 8, 0.005: [9.0] * 6 + [0.5, 0.7], 0.025: [0.1] * 6 + [2.0] * 2}
    train, draws = losses(by_rate)
    best = rates.best_of("sft", start(), train, CFG)
    assert best.bias.item() == pytest.approx(0.005)
    assert draws[0] == draws[1] == draws[2]
    printed = capsys.readouterr().out
    found = re.findall(r"sft_lr (\S+): sft/loss (\S+); (\d+) steps", printed)
    assert found == [("0.001", "1.000", "8"), ("0.005", "0.600", "8"), ("0.025", "2.000", "8")]


def test_a_rate_that_diverges_is_named_and_passed_over(capsys):
    train, _ = losses({0.001: [1.0] * 8, 0.005: [0.1] * 8, 0.025: [0.0]})
    assert rates.best_of("sft", start(), train, CFG).bias.item() == pytest.approx(0.005)
    assert "sft_lr 0.025: NaN in the gradient\n" in capsys.readouterr().out
    train, _ = losses({0.001: [], 0.005: [], 0.025: []})
    with pytest.raises(FloatingPointError, match=r"--sft_lr.*smaller"):
        rates.best_of("sft", start(), train, CFG)


def test_stage_3_pays_for_its_kl():
    row = {"objective/scores": 2.0, "objective/kl": 5.0}
    assert rates.cost("p3o", row, beta=0.1) == pytest.approx(-1.5)
    assert rates.cost("reward", {"reward/loss": 0.6}, beta=0.1) == 0.6


def test_each_stage_starts_from_what_the_stage_before_made(capsys, monkeypatch):
    monkeypatch.setattr(rates, "FACTORS", (1,))
    monkeypatch.setattr(rates, "UPDATES", 3)
    train_reward, train_policy = p3o.train_reward, p3o.train_policy
    bodies = []
    models = []

    def watched_reward(model, *rest) -> None:
        bodies.append(model.base_model.wte.weight.detach().clone())
        train_reward(model, *rest)

    def watched(policy, reference, score, *rest) -> None:
        models.extend((reference, score.args[0]))
        assert torch.equal(policy.lm_head.weight, reference.lm_head.weight)
        train_policy(policy, reference, score, *rest)

    monkeypatch.setattr(p3o, "train_reward", watched_reward)
    monkeypatch.setattr(p3o, "train_policy", watched)
    options = "--small --batch 32 --iterations 2 --pairs 4 --minibatch 2 --response-tokens 8"
    rates.main(options.split())
    printed = capsys.readouterr().out
    figures = re.findall(r"^(sft_lr|reward_lr|lr) (\S+): .*; (\d+) steps", printed, re.MULTILINE)
    assert figures == [("sft_lr", "0.005", "3"), ("reward_lr", "0.002", "3"), ("lr", "0.002", "2")]
    torch.manual_seed(0)
    base, _ = p3o.load_base(CFG)
    sft, reward_model = models
    trained = sft.base_model.wte.weight
    assert not torch.equal(trained, base.base_model.wte.weight)
    assert torch.equal(trained, bodies[0]), "the reward model starts from the SFT model"
    assert not torch.equal(trained, reward_model.base_model.wte.weight)
    scores = p3o.reward_scores(reward_model, *p3o.sample(sft, [[5, 6, 7]] * 64, 2, 8))
    assert 0.3 < (scores[:, 0] - scores[:, 1]).square().mean().sqrt() < 3, "the gain is set"


def test_bad_input_is_one_line():
    with pytest.raises(SystemExit, match=r"^rates.py: .*nowhere"):
        rates.main(["--small", "--data", "nowhere"])
