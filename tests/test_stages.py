"""What all stages promise, the update that they share, stages 1 and 2, and the gain."""

import inspect
import math

import pytest
import torch
from toys import encode, nothing, small, train

import p3o

POLICY = pytest.param("policy", marks=pytest.mark.problem_8)
GAIN = small(minibatch=8, response_tokens=10)
every_stage = pytest.mark.parametrize("stage", ("sft", "reward", POLICY))


@pytest.fixture
def model_of(tiny, fresh):
    """Makes the model that a stage trains."""

    def make(stage: str):
        policy, reward_model, *_ = tiny
        return fresh(reward_model if stage == "reward" else policy)

    return make


# ---- All three -----------------------------------------------------------------------------
@every_stage
def test_every_stage_sees_each_row_once_a_pass_in_a_new_order(tiny, model_of, monkeypatch, stage):
    examples = []
    for i, example in enumerate(encode(tiny, 24)):
        # each prompt its own number, and all rows of one length: those of a batch are sorted by it
        examples.append(example._replace(prompt=[i], chosen=[30, 31], rejected=[32, 33]))
    cfg = small(batch=7, epochs=2, iterations=7, pairs=7, minibatch=7, response_tokens=2)
    seen = []
    name = "sample" if stage == "policy" else "collate"
    plain = getattr(p3o, name)

    def watched(*args, **options):
        prompts = inspect.signature(plain).bind(*args, **options).arguments["prompts"]
        if stage == "reward":  # each of its prompts comes twice
            prompts = prompts[::2]
        seen.extend(prompt[0] for prompt in prompts)
        return plain(*args, **options)

    monkeypatch.setattr(p3o, name, watched)
    torch.manual_seed(0)
    train(stage, model_of(stage), tiny[0], examples, cfg)
    first = seen[:24]
    second = seen[24:48]
    assert sorted(first) == sorted(second) == list(range(24)), "a pass should see each row once"
    assert first != second, "each pass should come in a new order"
    assert list(range(24)) not in (first, second), "the first pass should be shuffled, too"


@every_stage
def test_every_stages_learning_rate_falls_until_its_last_update_and_not_before(
    tiny, model_of, monkeypatch, stage
):
    """22 rows by 8 in two passes are 6 updates. Stage 3 has one rate an iteration: here 3
    iterations of two passes over 11 pairs by 4, 18 updates."""
    peak = {"sft": 0.1, "reward": 0.2, "policy": 0.3}[stage]
    sizes = dict(batch=8, epochs=2, iterations=3, pairs=11, minibatch=4, response_tokens=4)
    cfg = small(sft_lr=0.1, reward_lr=0.2, p3o_lr=0.3, **sizes)
    rates = []

    def watched(model, optimizer, lr):
        rates.append(lr)
        optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(p3o, "gradient_step", watched)
    monkeypatch.setattr(p3o, "self_check", nothing)
    train(stage, model_of(stage), tiny[0], encode(tiny, 22), cfg)
    if stage == "policy":
        expected = [p3o.learning_rate(peak, update // 6, 3) for update in range(18)]
    else:
        expected = [p3o.learning_rate(peak, update, 6) for update in range(6)]
    assert rates == pytest.approx(expected)


@every_stage
def test_every_stage_turns_dropout_off(tiny, model_of, stage):
    """GPT-2's default dropout is 0.1: the same policy would give two different log-probs."""
    model = model_of(stage).train()
    assert model.config.resid_pdrop > 0
    examples = encode(tiny, 2)
    cfg = small(sft_lr=0.0, reward_lr=0.0, p3o_lr=0.0, iterations=1, pairs=2, minibatch=2)
    train(stage, model, tiny[0], examples, cfg)
    ids = torch.tensor([examples[0].prompt])
    with torch.no_grad():
        first = model.base_model(ids).last_hidden_state
        second = model.base_model(ids).last_hidden_state
    assert torch.equal(first, second), "dropout is on"


@every_stage
def test_micro_batches_change_memory_and_not_the_update(tiny, model_of, stage, monkeypatch):
    """In float64, all at once, one at a time, and four with two left over give the same."""
    monkeypatch.setattr(p3o, "AT_ONCE", 12)  # all sampled at once: this is about the updates
    sizes = dict(batch=6, epochs=1, iterations=2, pairs=12, minibatch=6, response_tokens=6)
    reference = model_of("policy").double()

    def run(micro_batch):
        model = model_of(stage).double()
        rows = []
        seen = []

        def spy(logprobs, *rest, **options):
            seen.append(len(logprobs))
            return p3o.p3o_loss(logprobs, *rest, **options)

        torch.manual_seed(0)
        cfg = small(micro_batch=micro_batch, **sizes)
        log = lambda step, row: rows.append(row)  # noqa: E731
        train(stage, model, reference, encode(tiny, 12), cfg, log, spy)
        assert not seen or max(seen) == min(micro_batch, 6)
        return rows, list(model.parameters())

    rows, weights = run(12)
    for size in (1, 4):
        other_rows, other_weights = run(size)
        for row, other in zip(rows, other_rows, strict=True):
            same = row == pytest.approx(other, rel=1e-4, abs=1e-6)
            assert same, "the metrics depend on the micro-batch"
        for weight, other in zip(weights, other_weights, strict=True):
            same = torch.allclose(weight, other, atol=1e-6)
            assert same, "the update depends on the micro-batch"


# ---- One update ----------------------------------------------------------------------------
class Model(torch.nn.Module):
    """A body and a head, two parameters each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Parameter(torch.zeros(2))
        self.head = torch.nn.Parameter(torch.zeros(2))


def sgd(model: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [model.body]}, {"params": [model.head], "lr_scale": 10}])


def test_a_step_clips_the_gradient_to_norm_1_and_reports_its_norm_before():
    model = Model()
    (model.body * torch.tensor([3.0, 4.0])).sum().backward()
    norm = p3o.gradient_step(model, sgd(model), 1.0)
    assert norm == pytest.approx(5.0), "the norm should be this loss's, before it is clipped"
    assert torch.allclose(model.body.detach(), torch.tensor([-0.6, -0.8]))


def test_a_step_clips_the_norm_over_all_parameter_groups():
    """Clipped apart, body and head would leave the gradient's direction."""
    model = Model()
    (3 * model.body[0] + 4 * model.head[0]).backward()
    assert p3o.gradient_step(model, sgd(model), 0.1) == pytest.approx(5.0)
    assert model.body[0].item() == pytest.approx(-0.06)
    assert model.head[0].item() == pytest.approx(-0.8), "the head's rate is ten times the body's"


def test_a_step_forgets_the_gradient_of_the_step_before():
    model = Model()
    optimizer = sgd(model)
    for _ in range(2):
        (model.body * torch.tensor([0.3, 0.4])).sum().backward()
        p3o.gradient_step(model, optimizer, 1.0)
    assert torch.allclose(model.body.detach(), -2 * torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_gradient_that_is_not_finite_stops_before_the_update(bad):
    model = Model()
    (model.body * bad).sum().backward()
    with pytest.raises(FloatingPointError):
        p3o.gradient_step(model, sgd(model), 1.0)
    assert torch.equal(model.body.detach(), torch.zeros(2))


def test_the_learning_rate_warms_up_over_a_twentieth_then_falls_and_is_never_0():
    rates = [p3o.learning_rate(2.0, step, 100) for step in range(100)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert max(rates) == rates[4]
    assert rates[5:] == pytest.approx([2.0 * (1 - step / 100) for step in range(5, 100)])
    assert min(rates) > 0


def test_a_stage_of_one_step_has_the_peak_rate():
    assert p3o.learning_rate(2.0, 0, 1) == 2.0


# ---- Stages 1 and 2 ------------------------------------------------------------------------
def test_the_sft_loss_is_the_mean_over_the_tokens_of_the_chosen_responses(tiny, fresh):
    """Prompts, padding and rejected responses do not count."""
    examples = encode(tiny, 8)
    rows = []
    cfg = small(batch=8, epochs=1)
    p3o.train_sft(fresh(tiny[0]), examples, cfg, lambda step, row: rows.append(row))
    total = 0.0
    count = 0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.prompt + example.chosen])
            chosen = torch.tensor(example.chosen)
            logits = tiny[0](ids).logits[0, len(example.prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, chosen, reduction="sum").item()
            count += len(chosen)
    assert rows[0]["sft/loss"] == pytest.approx(total / count, rel=1e-5)


def test_sft_makes_the_chosen_responses_likelier(tiny, fresh):
    losses = []
    torch.manual_seed(0)
    cfg = small(batch=8, epochs=3)
    log = lambda step, row: losses.append(row["sft/loss"])  # noqa: E731
    p3o.train_sft(fresh(tiny[0]), encode(tiny, 64), cfg, log)
    assert sum(losses[-4:]) < sum(losses[:4]) / 2


def test_reward_training_starts_at_ln_2_and_learns_to_rank(tiny, fresh):
    """After training it ranks its training pairs better than chance."""
    model = fresh(tiny[1])
    rows = []
    examples = encode(tiny, 160)
    torch.manual_seed(0)
    cfg = small(epochs=4, batch=16)
    p3o.train_reward(model, examples, cfg, lambda step, row: rows.append(row))
    assert rows[0]["reward/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(row["reward/loss"] for row in rows[-10:]) / 10 < 0.6
    assert sum(row["reward/accuracy"] for row in rows[-10:]) / 10 > 0.6
    with torch.no_grad():
        scores = p3o.score_pairs(model, examples)
    assert (scores[:, 0] > scores[:, 1]).float().mean() > 0.7


def test_the_fresh_head_of_the_reward_model_has_ten_times_the_rate(tiny, fresh, monkeypatch):
    """The head starts at 0; the body was trained before."""
    model = fresh(tiny[1])
    rates = {}

    def watched(_, optimizer, lr):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                rates[weight] = lr * group.get("lr_scale", 1)
        return 0.0

    monkeypatch.setattr(p3o, "gradient_step", watched)
    p3o.train_reward(model, encode(tiny, 2), small(batch=2, epochs=1, reward_lr=0.5), nothing)
    assert rates.pop(model.score.weight) == 5.0
    assert set(rates.values()) == {0.5}
    assert len(rates) == len(list(model.base_model.parameters()))


# ---- The gain ------------------------------------------------------------------------------
@pytest.mark.problem_7
def test_the_gain_makes_score_differences_of_root_mean_square_1(tiny, fresh, monkeypatch):
    """Two responses to each of the prompts are sampled and scored."""
    policy, reward_model, *_ = tiny
    model = fresh(reward_model)
    with torch.no_grad():
        model.score.weight.mul_(30)
    before = model.score.weight.detach().clone()
    prompts = [example.prompt for example in encode(tiny, 32)]
    plain = p3o.reward_scores
    seen = []

    def watched(model, ids, mask):
        scores = plain(model, ids, mask)
        seen.append(scores.detach().clone())
        return scores

    monkeypatch.setattr(p3o, "reward_scores", watched)
    torch.manual_seed(0)
    factor = p3o.set_gain(model, policy, prompts, GAIN)
    scores = torch.cat(seen)
    assert scores.shape == (32, 2), "each prompt should be answered, and scored, twice"
    gaps = scores[:, 0] - scores[:, 1]
    right = (gaps * factor).square().mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    assert right, "times the factor, r_1 − r_2 should have root mean square 1"
    scaled = torch.allclose(model.score.weight, before * factor)
    assert scaled, "the head should be multiplied by the factor that is returned"
    body = model.base_model.state_dict().values()
    same = all(map(torch.equal, body, reward_model.base_model.state_dict().values()))
    assert same, "the gain is the head's alone"


@pytest.mark.problem_7
def test_a_reward_model_that_scores_all_alike_has_no_gain(tiny, fresh):
    model = fresh(tiny[1])
    torch.nn.init.zeros_(model.score.weight)
    with pytest.raises(FloatingPointError, match="--reward-lr"):
        p3o.set_gain(model, tiny[0], [[1], [2]], GAIN)


@pytest.mark.problem_7
def test_the_gain_does_not_depend_on_an_offset_of_the_reward(tiny, fresh, monkeypatch):
    """A gain from absolute scores would, because δ(x) is part of their spread."""
    policy, reward_model, *_ = tiny
    prompts = [example.prompt for example in encode(tiny, 32)]
    plain = p3o.reward_scores

    def shifted(model, ids, mask):
        in_prompt = mask.cumsum(-1) == 0
        offset = (ids * in_prompt).sum(-1).double()  # one number a prompt
        return plain(model, ids, mask).double() + offset

    torch.manual_seed(0)
    factor = p3o.set_gain(fresh(reward_model), policy, prompts, GAIN)
    monkeypatch.setattr(p3o, "reward_scores", shifted)
    torch.manual_seed(0)
    assert p3o.set_gain(fresh(reward_model), policy, prompts, GAIN) == pytest.approx(factor)
