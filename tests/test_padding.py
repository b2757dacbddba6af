"""What padding costs: nothing is computed behind the last response token, and little between rows
of a micro-batch, which are alike in length."""

import pytest
import torch
from toys import even_share, nothing, small

import p3o

pytestmark = pytest.mark.padding
LENGTHS = [2, 20] * 8  # of prompts: in their own order, a batch would be half padding


class Columns:
    """While in use, counts the tokens that a model's body is given, padding included."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.widths = []
        self.tokens = 0
        self.body = model.base_model

    def count(self, module, arguments, options):
        (ids,) = arguments or [options["input_ids"]]
        self.widths.append(ids.shape[1])
        self.tokens += ids.numel()

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
    with torch.no_grad(), Columns(policy) as seen:
        found = p3o.response_logprobs(policy, wider, wider_mask)
    assert seen.widths == [22], "23 tokens, of which the last predicts nothing"
    assert found.shape == (len(ids), 23 + 9 - 1)
    assert torch.allclose(found[:, :22], p3o.response_logprobs(policy, ids, mask), atol=1e-5)
    assert not found[:, 22:].any()
    with torch.no_grad(), Columns(reward_model) as seen:
        scores = p3o.reward_scores(reward_model, wider, wider_mask)
    assert seen.widths == [23]
    assert torch.allclose(scores, p3o.reward_scores(reward_model, ids, mask), atol=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward", "p3o"])
def test_micro_batches_are_alike_in_length(tiny, fresh, examples, stage):
    """Half of the prompts are a tenth as long as the others: so are half of the micro-batches."""
    stage_3 = dict(iterations=1, pairs=16, minibatch=16, inner_epochs=1, response_tokens=1)
    cfg = small(batch=16, epochs=1, micro_batch=4, **stage_3)
    model = fresh(tiny[stage == "reward"])
    with Columns(model) as seen:
        if stage == "sft":
            p3o.train_sft(model, examples, cfg, nothing)
        elif stage == "reward":
            p3o.train_reward(model, examples, cfg, nothing)
        else:
            prompts = [example.prompt for example in examples]
            p3o.train_policy(model, tiny[0], even_share, prompts, cfg, nothing)
    first, second, third, fourth = seen.widths[-4:]
    assert max(first, second) < 6
    assert min(third, fourth) > 19
