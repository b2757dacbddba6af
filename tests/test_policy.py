"""Stage 3: pairs, ratios, metrics, checkpoints, what it learns, and whole runs under r + δ(x)."""

import copy

import pytest
import torch
from toys import (
    EOS,
    LONGEST,
    PAD,
    TOY_PROMPTS,
    batch,
    encode,
    even_share,
    length_score,
    run_policy,
    same_weights,
    small,
    toy_batch,
)

import p3o

CLIPS = ("joint", "separate")


# ---- Pairs and log-probs -------------------------------------------------------------------
@pytest.mark.problem_8
def test_pairs_stay_together_from_sampling_to_loss(tiny, prompts):
    """The score encodes the prompt, so both members of a pair always have the same one."""
    cfg = small(iterations=3, pairs=16, minibatch=5, inner_epochs=2, response_tokens=6)

    def prompt_score(ids, mask):
        in_prompt = mask.cumsum(-1) == 0
        place = torch.arange(1, ids.shape[-1] + 1)
        return (ids * in_prompt * place).sum(-1).float()

    *_, seen = run_policy(tiny[0], tiny[0], prompt_score, prompts, cfg)
    scores = torch.cat([update["scores"] for update in seen])
    assert torch.equal(scores[:, 0], scores[:, 1]), "a pair was torn apart"
    assert len(scores.unique()) > 20, "some pairs' scores came twice, others' never"


@pytest.mark.problem_8
def test_score_and_log_probs_of_a_pair_belong_together(tiny, prompts):
    """If nothing is learned and the score is the log-prob, three columns of the loss are equal."""
    policy = tiny[0]
    cfg = small(iterations=2, pairs=16, minibatch=5, response_tokens=6, p3o_lr=0.0)

    def logprob_score(ids, mask):
        return p3o.sequence_logprobs(policy, ids, mask)

    *_, seen = run_policy(policy, policy, logprob_score, prompts, cfg)
    for update in seen:
        for name in ("old", "ref", "scores"):
            same = torch.allclose(update["logprobs"], update[name], atol=1e-4)
            assert same, f"{name} belongs to other pairs"


@pytest.mark.problem_8
def test_each_pass_sees_each_pair_once_and_each_iteration_new_pairs(tiny, prompts):
    cfg = small(iterations=2, pairs=16, minibatch=5, inner_epochs=3, response_tokens=6)
    *_, seen = run_policy(tiny[0], tiny[0], even_share, prompts, cfg)
    orders = []  # for each pass, log π_old of its pairs in the order in which it took them
    for i in range(0, len(seen), 4):
        orders.append(torch.cat([update["old"] for update in seen[i : i + 4]]).sum(1))
    assert [len(order) for order in orders] == [16] * 2 * 3
    passes = [order.sort().values for order in orders]
    for first, *others in (passes[:3], passes[3:]):
        assert len(first.unique()) == 16, "some pairs came twice, others never"
        for other in others:
            assert torch.equal(other, first), "π_old changed between inner epochs"
    assert not torch.equal(passes[0], passes[3]), "the second iteration uses the first one's pairs"
    assert not torch.equal(orders[0], orders[1]), "pairs are not shuffled"


@pytest.mark.problem_8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_no_learning_rate_ratio_is_1_and_kl_0_at_every_inner_step(tiny, prompts, dtype):
    """The same code computes all log-probs, so this holds even with weights in bfloat16."""
    policy = copy.deepcopy(tiny[0]).to(dtype)
    sizes = dict(iterations=2, pairs=16, minibatch=8, inner_epochs=3, response_tokens=8)
    cfg = small(p3o_lr=0.0, **sizes)
    _, rows, seen = run_policy(policy, policy, length_score, prompts, cfg)
    assert len(seen) == 2 * 2 * 3
    for update in seen:
        assert update["logprobs"].dtype == torch.float32
        for name in ("old", "ref"):
            drift = (update["logprobs"] - update[name]).abs().max()
            assert drift < (1e-4 if dtype == torch.float32 else 0.05), f"{name} differs"
    for row in rows:
        assert abs(row["objective/kl"]) < 1e-4
        assert row["policy/clipfrac"] == 0


@pytest.mark.problem_8
def test_the_ratio_is_against_the_sampling_policy_and_moves_during_the_inner_steps(tiny, prompts):
    cfg = small(iterations=2, pairs=16, minibatch=16, inner_epochs=3, response_tokens=6)
    *_, seen = run_policy(tiny[0], tiny[0], even_share, prompts, cfg)
    drift = [(update["logprobs"] - update["old"]).abs().max().item() for update in seen]
    assert drift[0] < 1e-4 and drift[3] < 1e-4, "at the first inner step the ratio should be 1"
    later = min(drift[2], drift[4], drift[5])
    assert later > 1e-3, "π_old should stay where the pairs were sampled"


# ---- The self-check ------------------------------------------------------------------------
def assert_stopped(why: str, *arguments) -> None:
    try:
        run_policy(*arguments)
    except AssertionError as error:
        assert "check failed" in str(error), error
    else:
        pytest.fail(f"self_check should stop the run before its first step: {why}")


@pytest.mark.problem_8
def test_the_self_check_stops_a_run_whose_reference_is_another_model(tiny, prompts, fresh):
    """Less than half a nat is enough to be noticed."""
    reference = fresh(tiny[0])
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.002)
        ids, mask = batch(tiny)
        gap = p3o.sequence_logprobs(tiny[0], ids, mask)
        gap -= p3o.sequence_logprobs(reference, ids, mask)
    assert 0.001 < gap.abs().max() < 0.5
    cfg = small(iterations=1, pairs=8, minibatch=8, response_tokens=8)
    why = "π_ref is another model than the policy"
    assert_stopped(why, tiny[0], reference, length_score, prompts, cfg)


@pytest.mark.problem_8
@pytest.mark.parametrize(
    ("updating", "first", "rows"),
    [
        pytest.param(True, 0, slice(None), id="in updates"),
        pytest.param(False, 0, slice(None), id="in sampling and scoring"),
        pytest.param(True, 0, slice(1), id="in one response"),
        pytest.param(True, 3, slice(None), id="in the last micro-batch"),
    ],
)
def test_the_self_check_stops_a_run_whose_ratio_is_not_1(toy, updating, first, rows):
    """For instance because dropout is on in one place."""
    policy = copy.deepcopy(toy)
    passes = 0  # so far, with a gradient or without

    def disturb(_, arguments, output):
        nonlocal passes
        if torch.is_grad_enabled() == updating:
            if passes >= first:
                output.last_hidden_state = output.last_hidden_state.clone()
                output.last_hidden_state[rows] *= 1.01
            passes += 1
        return output

    policy.base_model.register_forward_hook(disturb)
    cfg = small(iterations=1, pairs=64, minibatch=64, micro_batch=16, response_tokens=LONGEST)
    why = "the log π that its loss is computed from is not log π_old, on one response or more"
    assert_stopped(why, policy, toy, length_score, TOY_PROMPTS * 64, cfg)


# ---- The loss and the metrics --------------------------------------------------------------
@pytest.mark.problem_8
def test_the_loss_gets_the_configurations_options(toy):
    options = dict(beta=0.7, clip="separate", clip_range=0.11)
    sizes = dict(iterations=1, pairs=4, minibatch=4, inner_epochs=1, response_tokens=LONGEST)
    *_, seen = run_policy(toy, toy, length_score, TOY_PROMPTS * 2, small(**sizes, **options))
    (update,) = seen
    assert options.items() <= update["options"].items()


@pytest.mark.problem_8
def test_a_smaller_last_minibatch_counts_as_its_pairs_do(toy):
    """Its gradient is that of its own mean loss; its metrics weigh as much as its pairs."""
    sizes = dict(iterations=1, pairs=7, minibatch=4, micro_batch=4, inner_epochs=1)
    cfg = small(**sizes, p3o_lr=0.0, response_tokens=LONGEST)
    policy = copy.deepcopy(toy)
    own = []  # for each minibatch its pairs, and the norm of the gradient of their mean loss
    rows = []

    def watched(logprobs, *rest, **options):
        loss, metrics = p3o.p3o_loss(logprobs, *rest, **options)
        gradient = torch.autograd.grad(loss, policy.parameters(), retain_graph=True)
        norm = torch.cat([part.flatten() for part in gradient]).norm().item()
        own.append((len(logprobs), norm))
        return loss, metrics

    log = lambda step, row: rows.append(row)  # noqa: E731
    p3o.train_policy(policy, toy, length_score, watched, TOY_PROMPTS * 7, cfg, log)
    assert [pairs for pairs, _ in own] == [4, 3]
    mean = sum(pairs * norm for pairs, norm in own) / 7
    assert rows[0]["policy/grad_norm"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.problem_8
def test_the_loss_sees_the_references_log_probs_and_the_metrics_their_difference(tiny, prompts):
    """objective/kl is the mean of log π_old − log π_ref, objective/entropy that of −log π_old."""
    policy = tiny[0]
    sizes = dict(iterations=4, pairs=16, minibatch=8, inner_epochs=1, response_tokens=6)
    cfg = small(p3o_lr=2e-2, **sizes)

    def reference_score(ids, mask):
        return p3o.sequence_logprobs(policy, ids, mask)

    _, rows, seen = run_policy(policy, policy, reference_score, prompts, cfg)
    for i, row in enumerate(rows):
        updates = seen[2 * i : 2 * i + 2]
        old = torch.cat([update["old"] for update in updates])  # (B, 2)
        ref = torch.cat([update["ref"] for update in updates])  # (B, 2)
        scores = torch.cat([update["scores"] for update in updates])  # (B, 2)
        assert torch.allclose(ref, scores, atol=1e-4), "ref_logprobs are not the reference's"
        sampled = {"kl": old - ref, "entropy": -old, "scores": scores}
        for name, values in sampled.items():
            expected = pytest.approx(values.mean().item(), rel=1e-4, abs=1e-5)
            same = row[f"objective/{name}"] == expected
            assert same, f"objective/{name} should be the mean over the iteration's samples"
        for key in ("policy/clipfrac", "policy/approxkl", "policy/ratio", "objective/q"):
            same = row[key] == pytest.approx(sum(float(update[key]) for update in updates) / 2)
            assert same, f"{key} should be the mean over the iteration's updates"
        assert row["loss/policy"] == pytest.approx(sum(u["loss"].item() for u in updates) / 2)
        assert row["policy/grad_norm"] > 0
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["objective/kl"] > 0.1


@pytest.mark.problem_8
def test_response_length_counts_eos_and_finished_counts_those_that_ended_by_it(toy):
    lengths = []  # of each response in turn
    ended = []

    def score(ids, mask):
        lengths.append(mask.sum(-1).flatten())
        ended.append((ids.masked_fill(~mask, PAD) == EOS).any(-1).flatten())
        return length_score(ids, mask)

    cfg = small(iterations=2, pairs=20, minibatch=20, inner_epochs=1, response_tokens=LONGEST)
    _, rows, _ = run_policy(toy, toy, score, TOY_PROMPTS * 20, cfg)
    for name, values in (("length", lengths), ("finished", ended)):
        means = torch.cat(values).double().view(2, 40).mean(1)  # (iterations,)
        assert [row[f"response/{name}"] for row in rows] == pytest.approx(means.tolist())
    assert 0.05 < rows[0]["response/finished"] < 0.95


# ---- Learning ------------------------------------------------------------------------------
@pytest.mark.problem_8
def test_the_policy_learns_what_the_score_asks_for_and_the_reference_stays(tiny, prompts):
    """A reward for even token ids: their share rises."""
    sizes = dict(iterations=12, pairs=32, minibatch=16, response_tokens=6)
    before = copy.deepcopy(tiny[0])
    cfg = small(p3o_lr=4e-3, beta=0.0, **sizes)
    _, rows, _ = run_policy(tiny[0], tiny[0], even_share, prompts, cfg)
    scores = [row["objective/scores"] for row in rows]
    assert sum(scores[-4:]) / 4 > sum(scores[:2]) / 2 + 0.1
    assert rows[-1]["objective/kl"] > 0
    assert same_weights(tiny[0], before), "the reference learned"


@pytest.mark.problem_8
def test_a_loss_without_gradient_leaves_the_policy_where_it_is(toy):
    """Weight decay would move it away from the reference, although nothing is to be gained."""
    cfg = small(iterations=4, pairs=4, minibatch=2, response_tokens=LONGEST)

    def zero(logprobs, *rest, **options):
        loss, metrics = p3o.p3o_loss(logprobs, *rest, **options)
        return 0 * loss, metrics

    trained, *_ = run_policy(toy, toy, length_score, TOY_PROMPTS * 2, cfg, zero)
    assert same_weights(trained, toy), "the policy moved without a gradient"


@pytest.mark.problem_8
@pytest.mark.parametrize("clip", CLIPS)
def test_on_the_toy_p3o_approaches_the_known_optimum(toy, clip):
    """KL(π‖π*) to π* ∝ π_ref exp(r/β) falls to a tenth or less, with sampled pairs."""
    beta = 0.5
    prompt = TOY_PROMPTS[0]
    ids, mask = toy_batch(prompt)
    sizes = dict(iterations=30, pairs=128, minibatch=64, micro_batch=64, inner_epochs=2)
    cfg = small(p3o_lr=1e-2, beta=beta, clip=clip, response_tokens=LONGEST, **sizes)

    def score(ids, mask):
        return ((ids == 2) & mask).sum(-1) - 0.5 * ((ids == 1) & mask).sum(-1)

    trained, *_ = run_policy(toy, toy, score, [prompt] * 128, cfg)
    with torch.no_grad():
        start = p3o.sequence_logprobs(toy, ids, mask)  # (85,)
        end = p3o.sequence_logprobs(trained, ids, mask)  # (85,)
    best = (start + score(ids, mask) / beta).log_softmax(0)  # (85,)
    at_first = (start.exp() * (start - best)).sum().item()
    at_last = (end.exp() * (end - best)).sum().item()
    assert at_first > 0.3
    assert at_last < 0.1 * at_first


@pytest.mark.problem_8
def test_train_policy_takes_a_judge_as_score(tiny, prompts):
    """The judge likes even token ids. The trained policy beats the one that it started from."""

    def odds(shares: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(8 * (shares[:, 0] - shares[:, 1]))  # (B,): P(y_1 ≻ y_2)

    def judge(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        P = odds(even_share(ids, mask))
        return torch.stack([P - 0.5, torch.zeros_like(P)], 1)  # (B, 2)

    cfg = small(iterations=12, pairs=32, minibatch=16, response_tokens=6, p3o_lr=4e-3, beta=0.0)
    trained, *_ = run_policy(tiny[0], tiny[0], judge, prompts, cfg)
    shares = []
    for model in (trained, tiny[0]):
        ids, mask = p3o.sample(model, prompts, 8, 6)  # (B, 8, T)
        shares.append(even_share(ids, mask).flatten())  # (8B,)
    assert odds(torch.stack(shares, 1)).mean() > 0.6


# ---- Checkpoints ---------------------------------------------------------------------------
class Killed(Exception):
    pass


@pytest.mark.resuming
def test_stopped_after_a_checkpoint_the_stage_ends_in_the_same_weights(toy, tmp_path, monkeypatch):
    """Policy, AdamW's moments, learning rate, order of the prompts and random draws go on."""
    monkeypatch.setattr(p3o, "CHECKPOINT_EVERY", 4)
    sizes = dict(iterations=9, pairs=4, minibatch=2, micro_batch=2, response_tokens=LONGEST)
    cfg = small(p3o_lr=1e-2, **sizes)
    prompts = [[0], [1], [2], [1, 2, 0], [2, 2]]

    def train(checkpoint, stop_at):
        policy = copy.deepcopy(toy)
        rows = {}

        def log(step, row):
            rows[step] = row
            if step == stop_at:
                raise Killed

        torch.manual_seed(0)
        p3o.train_policy(policy, toy, length_score, p3o.p3o_loss, prompts, cfg, log, checkpoint)
        return policy, rows

    whole, rows = train(None, None)
    checkpoint = tmp_path / "p3o.checkpoint"
    with pytest.raises(Killed):
        train(checkpoint, 6)
    resumed, later = train(checkpoint, None)
    assert min(later) == 4, "it should go on from the last checkpoint"
    for step, row in later.items():
        assert row == rows[step], "another course than without the stop"
    assert same_weights(resumed, whole), "other weights than without the stop"
    assert not same_weights(resumed, toy)


# ---- Whole runs under r and under r + δ(x) -------------------------------------------------
def delta(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return δ(x), (…) from ids and mask (…, T): it depends on the prompt alone.

    It is normal with standard deviation 5, where r's is about 1, and a multiple of 1/1024.
    """
    generator = torch.Generator().manual_seed(1)
    table = (5 * 1024 * torch.randn(9973, generator=generator)).round() / 1024
    weights = torch.arange(1, ids.shape[-1] + 1) ** 2
    in_prompt = mask.cumsum(-1) == 0
    return table[(ids * in_prompt * weights).sum(-1) % 9973]


def rounded(score):
    """Round scores to multiples of 1/1024, so that sums and differences with δ are exact."""
    return lambda ids, mask: (score(ids, mask) * 1024).round() / 1024


def plus_delta(score):
    return lambda ids, mask: score(ids, mask) + delta(ids, mask)


def absolutely_normalised(score):
    """Clip scores to ±10 and divide by their running deviation, as PPO code commonly does."""
    seen = []

    def normalised(ids, mask):
        scores = score(ids, mask).clamp(-10, 10)
        seen.append(scores.flatten())
        return scores / torch.cat(seen).std()

    return normalised


@pytest.fixture(scope="module")
def reward(tiny):
    """A reward model with random weights; its scores have a standard deviation of about 1."""
    model = copy.deepcopy(tiny[1])
    with torch.no_grad():
        model.score.weight.mul_(2.5)
    return rounded(lambda ids, mask: p3o.reward_scores(model, ids, mask))


def sampled_run(tiny, score, **options):
    """Run stage 3 from the tiny policy: everything sampled, the metrics, the final weights."""
    samples = []
    sizes = dict(iterations=3, pairs=24, minibatch=12, response_tokens=10)

    def watched(ids, mask):
        samples.append(ids)
        return score(ids, mask)

    prompts = [example.prompt for example in encode(tiny, 72)]
    trained, rows, _ = run_policy(tiny[0], tiny[0], watched, prompts, small(**sizes | options))
    return samples, rows, list(trained.parameters())


def assert_same_run(a, b) -> None:
    """Compare bit by bit, except for the mean score, which is reported as it is."""
    (samples, rows, weights) = a
    (other_samples, other_rows, other_weights) = b
    for row, other in zip(rows, other_rows, strict=True):
        unscored = row | {"objective/scores": 0}
        assert unscored == other | {"objective/scores": 0}, "the metrics differ"
    assert all(map(torch.equal, weights, other_weights)), "the final weights differ"
    assert len(samples) == len(other_samples), "the samples differ"
    assert all(map(torch.equal, samples, other_samples)), "the samples differ"


@pytest.mark.problem_4
def test_the_offset_is_one_number_a_prompt_and_far_larger_than_the_reward(tiny, reward, prompts):
    """The tests below rely on it."""
    torch.manual_seed(0)
    ids, mask = p3o.sample(tiny[0], prompts, 2, 10)  # (64, 2, T)
    offset = delta(ids, mask)  # (64, 2)
    assert torch.equal(offset[:, 0], offset[:, 1])
    assert 4 < offset.std() < 6
    with torch.no_grad():
        assert 0.5 < reward(ids, mask).diff().square().mean().sqrt() < 2


@pytest.mark.problem_8
@pytest.mark.parametrize("clip", CLIPS)
def test_a_whole_policy_run_is_the_same_bit_by_bit_under_r_and_r_plus_delta(tiny, reward, clip):
    """Every step between sampling and weights sees only r_1 − r_2."""
    plain = sampled_run(tiny, reward, clip=clip)
    assert_same_run(plain, sampled_run(tiny, plus_delta(reward), clip=clip))
    moved = not any(map(torch.equal, tiny[0].parameters(), plain[2]))
    assert moved, "nothing was learned, so nothing was shown"


@pytest.mark.problem_8
def test_a_whole_policy_run_is_another_when_scores_are_normalised_absolutely(tiny, reward):
    """The same comparison fails: δ(x) makes the deviation larger and so every r_1 − r_2 smaller."""
    plain = sampled_run(tiny, absolutely_normalised(reward), beta=0.0)
    shifted = sampled_run(tiny, absolutely_normalised(plus_delta(reward)), beta=0.0)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_run(plain, shifted)
    assert torch.equal(plain[0][0], shifted[0][0]), "samples differ before the first update"
    gap = plain[1][0]["objective/q"]
    shrunk = shifted[1][0]["objective/q"]
    assert shrunk < 0.4 * gap, "the effective reward gap should have shrunk"


def reward_then_policy(tiny, score_of, monkeypatch):
    """Run stage 2, the gain and stage 3 with every score of the file taken from `score_of`."""
    policy, reward_model, *_ = tiny
    sizes = dict(batch=32, epochs=1, iterations=2, pairs=24, minibatch=12, response_tokens=10)
    cfg = small(**sizes)
    examples = encode(tiny, 160)
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
    p3o.set_gain(model, policy, prompts[:24], cfg)
    p3o.train_policy(trained, policy, score, p3o.p3o_loss, prompts, cfg, log)
    return samples, rows, [*model.parameters(), *trained.parameters()]


@pytest.mark.problem_8
def test_reward_training_gain_and_policy_run_are_the_same_under_r_and_r_plus_delta(
    tiny, monkeypatch
):
    """From the first preference to the last update. In float64, score + δ is not rounded."""
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
    assert not any(map(torch.equal, policy, run[2][-len(policy) :]))
