"""tests/own/trials.py: what it tries, what it says of it, and what it hands on."""

import re

import pytest
import torch
import trials

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
    by_rate = {0.001: [1.0] * 12, 0.005: [9.0] * 9 + [0.4, 0.5, 0.9], 0.025: [0.1] * 9 + [2.0] * 3}
    train, draws = losses(by_rate)
    rate, best = trials.best_of("sft", start(), train, CFG)
    assert (rate, best.bias.item()) == (0.005, pytest.approx(0.005))
    assert draws[0] == draws[1] == draws[2]
    printed = capsys.readouterr().out
    assert "sft_lr: 0.005 is the best of these\n" in printed
    found = re.findall(r"sft_lr (\S+): sft/loss (\S+); (\d+) steps", printed)
    assert found == [("0.001", "1.000", "12"), ("0.005", "0.600", "12"), ("0.025", "2.000", "12")]


def test_a_rate_that_diverges_is_named_and_passed_over(capsys):
    train, _ = losses({0.001: [1.0] * 8, 0.005: [0.1] * 8, 0.025: [0.0]})
    _, best = trials.best_of("sft", start(), train, CFG)
    assert best.bias.item() == pytest.approx(0.005)
    assert "sft_lr 0.025: NaN in the gradient\n" in capsys.readouterr().out
    train, _ = losses({0.001: [], 0.005: [], 0.025: []})
    with pytest.raises(FloatingPointError, match=r"--sft_lr.*smaller"):
        trials.best_of("sft", start(), train, CFG)


@pytest.mark.parametrize(
    ("best", "edge"), [(0.001, ", and the smallest"), (0.005, ""), (0.025, ", and the largest")]
)
def test_it_says_that_the_best_rate_lies_at_the_edge(best, edge, capsys):
    train, _ = losses({rate: [float(rate != best)] * 8 for rate in (0.001, 0.005, 0.025)})
    trials.best_of("sft", start(), train, CFG)
    assert capsys.readouterr().out.endswith(f"sft_lr: {best:g} is the best of these{edge}\n")


def test_stage_3_pays_for_its_kl(capsys):
    """At β = 0.1 the higher score of the second is not worth its KL."""

    def train(model, cfg, log) -> None:
        score, kl = {0.0004: (1.0, 1.0), 0.002: (2.0, 20.0), 0.01: (0.5, 0.0)}[cfg.lr]
        log(0, {"objective/scores": score, "objective/kl": kl, "response/finished": 0.9})
        model.bias.data.fill_(cfg.lr)

    _, best = trials.best_of("p3o", start(), train, CFG)
    assert best.bias.item() == pytest.approx(0.0004)
    line = "lr 0.002: objective/scores 2.000, objective/kl 20.000, response/finished 0.900; 1 steps"
    assert line in capsys.readouterr().out


def test_each_stage_starts_from_what_the_stage_before_made(capsys, monkeypatch):
    monkeypatch.setattr(trials, "FACTORS", (0.5, 2))
    monkeypatch.setattr(trials, "UPDATES", 3)
    tried = []
    bodies = []
    models = []
    for name in ("train_sft", "train_reward", "train_policy"):
        monkeypatch.setattr(p3o, name, watched(getattr(p3o, name), tried, bodies, models))
    sampler = []
    set_gain = p3o.set_gain

    def watched_gain(model, policy, prompts, cfg) -> float:
        assert len(prompts) == p3o.GAIN_PROMPTS
        sampler.append(policy)
        return set_gain(model, policy, prompts, cfg)

    monkeypatch.setattr(p3o, "set_gain", watched_gain)
    options = "--small --batch 32 --iterations 2 --pairs 4 --minibatch 2 --response-tokens 8 \
        --inner-epochs 3"
    trials.main(options.split())
    printed = capsys.readouterr().out
    figures = re.findall(r"^(\w+) (\S+): .*; (\d+) steps", printed, re.MULTILINE)
    assert figures == [
        ("sft_lr", "0.0025", "3"),
        ("sft_lr", "0.01", "3"),
        ("reward_lr", "0.001", "3"),
        ("reward_lr", "0.004", "3"),
        ("lr", "0.001", "2"),
        ("lr", "0.004", "2"),
        ("beta", "0.02", "2"),
        ("beta", "0.5", "2"),
        ("inner_epochs", "2", "2"),
        ("inner_epochs", "6", "2"),
    ]
    found = re.search(r"^lr: (\S+) is the best", printed, re.MULTILINE)
    best = float(found[1])
    whole = dict(sft_lr=CFG.sft_lr, reward_lr=CFG.reward_lr, lr=CFG.lr, beta=0.1, inner_epochs=3)
    changes = [
        dict(sft_lr=CFG.sft_lr / 2),
        dict(sft_lr=CFG.sft_lr * 2),
        dict(reward_lr=CFG.reward_lr / 2),
        dict(reward_lr=CFG.reward_lr * 2),
        dict(lr=CFG.lr / 2),
        dict(lr=CFG.lr * 2),
        dict(lr=best, beta=0.02),
        dict(lr=best, beta=0.5),
        dict(lr=best, inner_epochs=2),
        dict(lr=best, inner_epochs=6),
    ]
    assert tried == [whole | change for change in changes]
    torch.manual_seed(0)
    base, _ = p3o.load_base(CFG)
    sft, reward_model, prompts = models[-1]
    assert sampler == [sft]
    assert len(prompts) > 1000, "all prompts, not those of the few updates"
    body = sft.base_model.wte.weight
    assert not torch.equal(body, base.base_model.wte.weight)
    assert torch.equal(bodies[0], base.base_model.wte.weight)
    for start in bodies[2:]:
        assert torch.equal(start, body), "reward model and policy start from the SFT model"
    assert not torch.equal(reward_model.base_model.wte.weight, body)
    scores = p3o.reward_scores(reward_model, *p3o.sample(sft, [[5, 6, 7]] * 64, 2, 8))
    assert 0.3 < (scores[:, 0] - scores[:, 1]).square().mean().sqrt() < 3, "the gain is set"


def watched(plain, tried: list, bodies: list, models: list):
    """A stage that also keeps its options, the weights that it began with, and in stage 3 the
    rest: reference, reward model and prompts."""

    def train(model, *rest) -> None:
        cfg = rest[-2]
        names = ("sft_lr", "reward_lr", "lr", "beta", "inner_epochs")
        tried.append({name: getattr(cfg, name) for name in names})
        bodies.append(model.base_model.wte.weight.detach().clone())
        if plain.__name__ == "train_policy":
            reference, score, prompts, *_ = rest
            models.append((reference, score.args[0], prompts))
        plain(model, *rest)

    return train


def test_too_few_pairs_are_one_line():
    with pytest.raises(SystemExit, match=r"^trials.py: .*fewer than a --batch"):
        trials.main(["--small", "--batch", "20000"])


def test_one_iteration_would_tell_nothing():
    """Its samples are the same at each rate."""
    with pytest.raises(SystemExit, match=r"^trials.py: --iterations must be at least 2"):
        trials.main(["--small", "--batch", "8", "--iterations", "1"])


def test_rates_that_all_diverge_are_one_line(monkeypatch):
    monkeypatch.setattr(trials, "FACTORS", (1e30,))
    with pytest.raises(SystemExit, match=r"^trials.py: no --sft_lr"):
        trials.main(["--small", "--batch", "8"])


def test_bad_input_is_one_line():
    with pytest.raises(SystemExit, match=r"^trials.py: .*nowhere"):
        trials.main(["--small", "--data", "nowhere"])
