"""What padding costs: nothing is computed behind the last response token, neither in scoring nor in
sampling, and little between rows of a micro-batch, which are alike in length."""

import pytest
import torch
from toys import LONGEST, TOY_PROMPTS, nothing, small

import p3o

pytestmark = pytest.mark.padding
LENGTHS = [2, 20] * 8  # of prompts: in their own order, a batch would be half padding


class Shapes:
    """While in use, notes how many rows a model's body is given, and how wide they are."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows = []
        self.widths = []
        self.body = model.base_model

    def count(self, module, arguments, options):
        (ids,) = arguments or [options["input_ids"]]
        self.rows.append(ids.shape[0])
        self.widths.append(ids.shape[1])

    def __enter__(self):
        self.handle = self.body.register_forward_pre_hook(self.count, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.fixture
def examples(tiny):
    """Prompts of two tokens and of twenty in turn, and responses of three."""
    *_, pairs = tiny
    found = []
    for number, length in enumerate(LENGTHS):
        prompt = [10 + number] * length
        found.append(p3o.Example(prompt, [5, 6, 7], [6, 7, 8], pairs[number]))
    return found


def test_columns_behind_the_last_response_token_are_not_computed(tiny, examples):
    policy, reward_model, *_ = tiny
    prompts = [example.prompt for example in examples]
    responses = [example.chosen for example in examples]
    ids, mask = p3o.collate(prompts, responses, policy)
    wider = torch.nn.functional.pad(ids, (0, 9), value=policy.config.pad_token_id)
    wider_mask = torch.nn.functional.pad(mask, (0, 9))
    with torch.no_grad(), Shapes(policy) as seen:
        found = p3o.response_logprobs(policy, wider, wider_mask)
    assert seen.widths == [22], "23 tokens, of which the last predicts nothing"
    assert found.shape == (len(ids), 23 + 9 - 1)
    assert torch.allclose(found[:, :22], p3o.response_logprobs(policy, ids, mask), atol=1e-5)
    assert not found[:, 22:].any()
    with torch.no_grad(), Shapes(reward_model) as seen:
        scores = p3o.reward_scores(reward_model, wider, wider_mask)
    assert seen.widths == [23]
    assert torch.allclose(scores, p3o.reward_scores(reward_model, ids, mask), atol=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_micro_batches_are_alike_in_length(tiny, fresh, examples, stage):
    """Half of the prompts are a tenth as long as the others: so are half of the micro-batches."""
    cfg = small(batch=16, epochs=1, micro_batch=4)
    model = fresh(tiny[stage == "reward"])
    train = p3o.train_reward if stage == "reward" else p3o.train_sft
    with Shapes(model) as seen:
        train(model, examples, cfg, nothing)
    assert seen.widths == ([5, 5, 23, 23] if stage == "reward" else [4, 4, 22, 22])


def test_so_are_those_of_stage_3_in_scoring_and_in_each_update(tiny, fresh, examples):
    sizes = dict(iterations=1, pairs=16, minibatch=16, inner_epochs=2, response_tokens=1)
    cfg = small(micro_batch=4, **sizes)
    policy, reference, reward_model = fresh(tiny[0]), fresh(tiny[0]), fresh(tiny[1])
    prompts = [example.prompt for example in examples]

    def score(ids, mask):
        return p3o.reward_scores(reward_model, ids, mask)

    with Shapes(policy) as new, Shapes(reference) as ref, Shapes(reward_model) as scored:
        p3o.train_policy(policy, reference, score, prompts, cfg, nothing)
    parts = [2, 2, 20, 20]
    assert new.widths == [20, *parts, *parts, *parts], "samples, old log-probs, two epochs"
    assert ref.widths == parts
    assert scored.widths == [3, 3, 21, 21]


def test_sampling_spends_no_pass_on_rows_that_have_ended(toy):
    torch.manual_seed(0)
    with Shapes(toy) as seen:
        _, mask = p3o.sample(toy, TOY_PROMPTS * 50, 2, LONGEST)
    lengths = mask.sum(-1)  # (100, 2)
    going = [(lengths > done).sum().item() for done in range(LONGEST)]
    assert seen.rows == going
    assert going[0] == 200 > going[1] > going[2] > 0
