"""Whole training runs under a reward r and under r + δ(x), δ of standard deviation 5 where r's
is about 1."""

import copy

import pytest
import torch

import p3o

CLIPS = ("joint", "separate")


def delta(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """δ(x), (…) from ids and mask (…, T): normal with standard deviation 5, a multiple of
    1/1024, by prompt alone."""
    table = (
        5 * 1024 * torch.randn(9973, generator=torch.Generator().manual_seed(1))
    ).round() / 1024
    weights = torch.arange(1, ids.shape[-1] + 1) ** 2
    return table[
        (ids * (mask.cumsum(-1) == 0) * weights).sum(-1) % 9973
    ]  # the prompt lies before the response


def rounded(score):
    """Scores as multiples of 1/1024, so that r + δ and its differences are exact in float32."""
    return lambda ids, mask: (score(ids, mask) * 1024).round() / 1024


def plus_delta(score):
    return lambda ids, mask: score(ids, mask) + delta(ids, mask)


def absolutely_normalised(score):
    """As PPO code for language models commonly does: clip scores to ±10, divide by their
    running deviation."""
    seen = []

    def normalised(ids, mask):
        scores = score(ids, mask).clamp(-10, 10)
        seen.append(scores.flatten())
        return scores / torch.cat(seen).std()

    return normalised


@pytest.fixture(scope="module")
def reward(tiny):
    """A reward model with random weights, scores of standard deviation about 1."""
    model = copy.deepcopy(tiny[1])
    with torch.no_grad():
        model.score.weight.mul_(2.5)
    return lambda ids, mask: p3o.reward_scores(model, ids, mask)


def train(tiny, score, **options):
    """Stage 3 from the tiny policy: everything sampled, the metrics, the final weights."""
    policy, _, tokenizer, _, pairs = tiny
    trained = copy.deepcopy(policy)
    rows = []
    samples = []
    cfg = p3o.Config(
        **p3o.SMALL | dict(iterations=5, pairs=32, minibatch=16, response_tokens=10) | options
    )

    def watched(ids, mask):
        samples.append(ids)
        return score(ids, mask)

    prompts = [example.prompt for example in p3o.tokenize(pairs[:96], tokenizer, cfg)]
    torch.manual_seed(0)
    p3o.train_policy(trained, policy, watched, prompts, cfg, lambda step, row: rows.append(row))
    return samples, rows, list(trained.parameters())


def assert_same_run(a, b) -> None:
    """Bit by bit; the mean score is reported as it is, so it alone may differ."""
    (samples, rows, weights) = a
    (other_samples, other_rows, other_weights) = b
    for row, other in zip(rows, other_rows, strict=True):
        unscored = row | {"objective/scores": 0}
        assert unscored == other | {"objective/scores": 0}, "the metrics differ"
    assert all(map(torch.equal, weights, other_weights)), "the final weights differ"
    assert len(samples) == len(other_samples), "the samples differ"
    assert all(map(torch.equal, samples, other_samples)), "the samples differ"


@pytest.mark.problem_8
def test_the_offset_is_one_number_a_prompt_and_far_larger_than_the_reward(tiny, reward):
    """What the tests below rest on."""
    rewards = []
    offsets = []

    def score(ids, mask):
        rewards.append(rounded(reward)(ids, mask))
        offsets.append(delta(ids, mask))
        return rewards[-1]

    train(tiny, score)
    r = torch.cat(rewards)
    offset = torch.cat(offsets)
    assert torch.equal(offset[:, 0], offset[:, 1])
    assert 4 < offset.std() < 6
    assert 0.5 < r.diff().square().mean().sqrt() < 2


@pytest.mark.problem_8
@pytest.mark.parametrize("clip", CLIPS)
def test_a_whole_policy_run_is_the_same_bit_by_bit_under_r_and_r_plus_delta(tiny, reward, clip):
    """Same samples, same metrics, same final weights: every step between sampling and weights
    sees r_1 − r_2 alone."""
    r = rounded(reward)
    plain = train(tiny, r, clip=clip)
    assert_same_run(plain, train(tiny, plus_delta(r), clip=clip))
    moved = not any(map(torch.equal, tiny[0].parameters(), plain[2]))
    assert moved, "nothing was learnt, so nothing was shown"


@pytest.mark.problem_8
def test_a_whole_policy_run_is_another_when_scores_are_normalised_absolutely(tiny, reward):
    """The same comparison fails: δ(x) has swollen the standard deviation and shrunk every r_1 −
    r_2."""
    r = rounded(reward)
    plain = train(tiny, absolutely_normalised(r), beta=0.0)
    shifted = train(tiny, absolutely_normalised(plus_delta(r)), beta=0.0)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_run(plain, shifted)
    assert torch.equal(plain[0][0], shifted[0][0]), "samples differ before the first update"
    gap = plain[1][0]["objective/q"]
    shrunk = shifted[1][0]["objective/q"]
    assert shrunk < 0.4 * gap, "the effective reward gap should have shrunk"


def reward_then_policy(tiny, score_of, monkeypatch):
    """Stages 2 and 3, the gain between them, with every score of the file taken from `score_of`."""
    policy, reward_model, tokenizer, _, pairs = tiny
    options = dict(batch=32, epochs=1, iterations=4, pairs=32, minibatch=16, response_tokens=10)
    cfg = p3o.Config(**p3o.SMALL | options)
    examples = p3o.tokenize(pairs[:400], tokenizer, cfg)
    rows = []
    samples = []
    model = copy.deepcopy(reward_model)
    trained = copy.deepcopy(policy)
    prompts = [example.prompt for example in examples]

    def log(step, row):
        rows.append(row)

    def score(ids, mask):
        samples.append(ids)
        return p3o.reward_scores(model, ids, mask)

    monkeypatch.setattr(p3o, "reward_scores", score_of)
    torch.manual_seed(0)
    p3o.train_reward(model, examples, cfg, log)
    p3o.set_gain(model, policy, prompts[:64], cfg)
    p3o.train_policy(trained, policy, score, prompts, cfg, log)
    return samples, rows, [*model.parameters(), *trained.parameters()]


@pytest.mark.problem_8
def test_reward_training_gain_and_policy_run_are_the_same_under_r_and_r_plus_delta(
    tiny, monkeypatch
):
    """From the first preference to the last update, bit by bit: float64 has room for score + δ."""
    scores = p3o.reward_scores

    def exact(model, ids, mask):
        return scores(model, ids, mask).double()

    def shifted(model, ids, mask):
        return exact(model, ids, mask) + delta(ids, mask)

    run = reward_then_policy(tiny, exact, monkeypatch)
    other_run = reward_then_policy(tiny, shifted, monkeypatch)
    assert_same_run(run, other_run)
    for row, other in zip(run[1], other_run[1], strict=True):
        if "objective/scores" in row:
            assert row["objective/scores"] != other["objective/scores"]
    policy = list(tiny[0].parameters())
    trained = run[2][-len(policy) :]
    assert not any(map(torch.equal, policy, trained))
