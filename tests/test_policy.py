"""Stage 3: pairs, ratios, metrics, checkpoints, and that it learns."""

import copy

import pytest
import torch
from toys import (
    EOS,
    LONGEST,
    PAD,
    TOY_PROMPTS,
    batch,
    even_share,
    length_score,
    nothing,
    run_policy,
    same_weights,
    small,
    toy_batch,
)

import p3o


@pytest.mark.problem_8
def test_pairs_stay_together_from_sampling_to_loss(tiny, prompts):
    """A score that encodes the prompt: both members of every pair always carry the same one."""
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
    """With the reference's own log-prob as score and no learning, three columns of the loss
    must agree row by row."""
    policy = tiny[0]
    cfg = small(iterations=2, pairs=16, minibatch=5, response_tokens=6, lr=0.0)

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
    orders = []  # log π_old of the pairs of each pass, in the order in which it took them
    for i in range(0, len(seen), 4):
        orders.append(torch.cat([update["old"] for update in seen[i : i + 4]]).sum(1))
    assert [len(order) for order in orders] == [16] * 2 * 3
    passes = [order.sort().values for order in orders]
    for first, *others in (passes[:3], passes[3:]):
        assert len(first.unique()) == 16, "some pairs came twice, others never"
        for other in others:
            assert torch.equal(other, first), "π_old changed between inner epochs"
    assert not torch.equal(passes[0], passes[3]), "the buffer was not thrown away"
    assert not torch.equal(orders[0], orders[1]), "pairs are not shuffled"


@pytest.mark.problem_8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_no_learning_rate_ratio_is_1_and_kl_0_at_every_inner_step(tiny, prompts, dtype):
    """Even with weights in bfloat16, because both come from the same code."""
    policy = copy.deepcopy(tiny[0]).to(dtype)
    cfg = small(iterations=2, pairs=16, minibatch=8, inner_epochs=3, lr=0.0, response_tokens=8)
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


def test_the_self_check_stops_a_run_whose_reference_is_another_model(tiny, prompts, fresh):
    """By less than half a nat: rounding is far below it."""
    reference = fresh(tiny[0])
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.002)
    cfg = small(iterations=1, pairs=8, minibatch=8, response_tokens=8)
    ids, mask = batch(tiny)
    with torch.no_grad():
        gap = p3o.sequence_logprobs(tiny[0], ids, mask) - p3o.sequence_logprobs(
            reference, ids, mask
        )
    assert 0.001 < gap.abs().max() < 0.5
    with pytest.raises(AssertionError, match="KL = 0"):
        run_policy(tiny[0], reference, length_score, prompts, cfg)


@pytest.mark.parametrize(
    ("updating", "rows"),
    [
        pytest.param(True, slice(None), id="in updates"),
        pytest.param(False, slice(None), id="in sampling and scoring"),
        pytest.param(True, slice(1), id="in one response"),
    ],
)
def test_the_self_check_stops_a_run_whose_ratio_is_not_1(toy, updating, rows):
    """As where dropout is on in one place alone."""
    policy = copy.deepcopy(toy)

    def disturb(_, arguments, output):
        if torch.is_grad_enabled() == updating:
            output.last_hidden_state = output.last_hidden_state.clone()
            output.last_hidden_state[rows] *= 1.01
        return output

    policy.base_model.register_forward_hook(disturb)
    cfg = small(iterations=1, pairs=64, minibatch=64, micro_batch=64, response_tokens=LONGEST)
    with pytest.raises(AssertionError, match="ratio = 1"):
        p3o.train_policy(policy, toy, length_score, TOY_PROMPTS * 64, cfg, nothing)


@pytest.mark.problem_8
def test_a_smaller_last_minibatch_counts_as_its_pairs_do(toy):
    """Its gradient is that of its own mean loss, and its norm weighs as many pairs."""
    sizes = dict(iterations=1, pairs=7, minibatch=4, micro_batch=4, inner_epochs=1)
    cfg = small(**sizes, lr=0.0, response_tokens=LONGEST)
    policy = copy.deepcopy(toy)
    own = []  # pairs, and norm of the gradient of their mean loss

    def watched(logprobs, *rest, **options):
        loss, metrics = p3o.p3o_loss(logprobs, *rest, **options)
        gradient = torch.autograd.grad(loss, policy.parameters(), retain_graph=True)
        norm = torch.cat([part.flatten() for part in gradient]).norm().item()
        own.append((len(logprobs), norm))
        return loss, metrics

    rows = []

    def log(step, row) -> None:
        rows.append(row)

    p3o.train_policy(policy, toy, length_score, TOY_PROMPTS * 7, cfg, log, watched)
    assert [pairs for pairs, _ in own] == [4, 3]
    mean = sum(pairs * norm for pairs, norm in own) / 7
    assert rows[0]["policy/grad_norm"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.problem_8
def test_the_ratio_is_against_the_sampling_policy_and_moves_during_the_inner_steps(tiny, prompts):
    cfg = small(iterations=2, pairs=16, minibatch=16, inner_epochs=3, response_tokens=6)
    *_, seen = run_policy(tiny[0], tiny[0], even_share, prompts, cfg)
    drift = [(update["logprobs"] - update["old"]).abs().max().item() for update in seen]
    assert drift[0] < 1e-4 and drift[3] < 1e-4, "at the first inner step the ratio should be 1"
    later = min(drift[2], drift[4], drift[5])
    assert later > 1e-3, "π_old should stay where the pairs were sampled"


@pytest.mark.problem_8
def test_the_loss_sees_the_references_log_probs_and_the_metrics_their_difference(tiny, prompts):
    """objective/kl is the mean of log π_old − log π_ref, of that sign, and entropy that of −log
    π_old."""
    policy = tiny[0]
    cfg = small(iterations=4, pairs=16, minibatch=8, inner_epochs=1, response_tokens=6, lr=2e-2)

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
            same = row[f"objective/{name}"] == pytest.approx(
                values.mean().item(), rel=1e-4, abs=1e-5
            )
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
    lengths = []
    ended = []

    def score(ids, mask):
        lengths.append(mask.sum(-1).double().mean().item())
        ended.append((ids.masked_fill(~mask, PAD) == EOS).any(-1).double().mean().item())
        return length_score(ids, mask)

    cfg = small(iterations=2, pairs=20, minibatch=20, inner_epochs=1, response_tokens=LONGEST)
    _, rows, _ = run_policy(toy, toy, score, TOY_PROMPTS * 20, cfg)
    assert [row["response/length"] for row in rows] == pytest.approx(lengths)
    assert [row["response/finished"] for row in rows] == pytest.approx(ended)
    assert 0.05 < rows[0]["response/finished"] < 0.95


@pytest.mark.problem_8
def test_the_loss_gets_the_configurations_options(toy):
    options = dict(beta=0.7, clip="separate", clip_range=0.11)
    sizes = dict(iterations=1, pairs=4, minibatch=4, inner_epochs=1, response_tokens=LONGEST)
    cfg = small(**sizes, **options)
    *_, seen = run_policy(toy, toy, length_score, TOY_PROMPTS * 2, cfg)
    (update,) = seen
    assert options.items() <= update["options"].items()


@pytest.mark.problem_8
def test_the_policy_learns_what_the_score_asks_for_and_the_reference_stays(tiny, prompts):
    """A reward for even token ids: their share rises."""
    cfg = small(iterations=16, pairs=32, minibatch=16, response_tokens=6, lr=3e-3, beta=0.0)
    before = copy.deepcopy(tiny[0])
    _, rows, _ = run_policy(tiny[0], tiny[0], even_share, prompts, cfg)
    scores = [row["objective/scores"] for row in rows]
    assert sum(scores[-4:]) / 4 > sum(scores[:2]) / 2 + 0.1
    assert rows[-1]["objective/kl"] > 0
    assert same_weights(tiny[0], before), "the reference learnt"


@pytest.mark.problem_8
def test_a_loss_without_gradient_leaves_the_policy_where_it_is(toy):
    """Weight decay would move it: away from the reference, where q = 0 says that nothing is to
    be gained."""
    cfg = small(iterations=4, pairs=4, minibatch=2, response_tokens=LONGEST)

    def zero(logprobs, *rest, **options):
        loss, metrics = p3o.p3o_loss(logprobs, *rest, **options)
        return 0 * loss, metrics

    trained, *_ = run_policy(toy, toy, length_score, TOY_PROMPTS * 2, cfg, zero)
    assert same_weights(trained, toy), "the policy moved without a gradient"


class Killed(Exception):
    pass


@pytest.mark.resuming
def test_stopped_after_a_checkpoint_the_stage_ends_in_the_same_weights(toy, tmp_path):
    """Policy, AdamW's moments, learning rate, order of the prompts and random draws all go on
    as they were."""
    sizes = dict(iterations=45, pairs=4, minibatch=2, micro_batch=2, response_tokens=LONGEST)
    cfg = small(lr=1e-2, **sizes)
    prompts = [[0], [1], [2], [1, 2, 0], [2, 2]]

    def train(checkpoint, stop_at, seed):
        policy = copy.deepcopy(toy)
        rows = {}

        def log(step, row):
            rows[step] = row
            if step == stop_at:
                raise Killed

        torch.manual_seed(seed)
        p3o.train_policy(policy, toy, length_score, prompts, cfg, log, checkpoint=checkpoint)
        return policy, rows

    whole, rows = train(None, None, 0)
    checkpoint = tmp_path / "p3o.checkpoint"
    with pytest.raises(Killed):
        train(checkpoint, 43, 0)
    resumed, later = train(checkpoint, None, 0)
    assert min(later) == 40, "it should go on from the last checkpoint"
    for step, row in later.items():
        assert row == rows[step], "another course than without the stop"
    assert same_weights(resumed, whole), "other weights than without the stop"
    assert not same_weights(resumed, toy)


@pytest.mark.problem_8
@pytest.mark.parametrize("clip", ("joint", "separate"))
def test_on_the_toy_p3o_approaches_the_known_optimum(toy, clip):
    """Sampled pairs, whole loop: KL(π‖π*) to π* ∝ π_ref exp(r/β) falls to a tenth of where it
    began, or less."""
    beta = 0.5
    prompt = TOY_PROMPTS[0]
    ids, mask = toy_batch(prompt)
    sizes = dict(iterations=60, pairs=256, minibatch=128, inner_epochs=2, response_tokens=LONGEST)
    cfg = small(lr=5e-3, beta=beta, clip=clip, **sizes)

    def score(ids, mask):
        return ((ids == 2) & mask).sum(-1) - 0.5 * ((ids == 1) & mask).sum(-1)

    trained, *_ = run_policy(toy, toy, score, [prompt] * 256, cfg)
    with torch.no_grad():
        start = p3o.sequence_logprobs(toy, ids, mask)  # (85,)
        end = p3o.sequence_logprobs(trained, ids, mask)  # (85,)
    best = (start + score(ids, mask) / beta).log_softmax(0)  # (85,)
    at_first = (start.exp() * (start - best)).sum().item()
    at_last = (end.exp() * (end - best)).sum().item()
    assert at_first > 0.3
    assert at_last < 0.1 * at_first


def test_an_eos_of_the_prompt_does_not_finish_the_response(toy):
    """Chat templates end every turn with one."""
    ids, mask = p3o.collate([[EOS, 0], [EOS, 0]], [[1, 2], [1, EOS]], toy)
    assert p3o.finished(toy, ids, mask).tolist() == [False, True]
