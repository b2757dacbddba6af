"""Text to tokens, tokens to batches: which of them are the response, and what padding costs."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from toys import EOS, LONGEST, TOY_PROMPTS, dialogue, encode, nothing, small, tokenize

import p3o
from data.preferences import InputError, Pair, tokenize_prompt


# ---- Text to tokens ------------------------------------------------------------------------
def test_a_long_prompt_loses_whole_turns_then_the_beginning_of_its_last(tiny):
    tokenizer = tiny[2]
    last = dialogue("ten eleven", "")
    later = dialogue("eight", "nine") + last
    whole = dialogue("one two three four five", "six seven") + later
    for limit, kept in (
        (len(tokenizer.encode(whole)), whole),
        (len(tokenizer.encode(whole)) - 1, later),
        (len(tokenizer.encode(later)) - 1, last),
    ):
        ids = tokenize_prompt(whole, tokenizer, limit)
        assert tokenizer.decode(ids) == kept, f"at most {limit} tokens"
    assert tokenize_prompt(whole, tokenizer, 2) == tokenizer.encode(whole)[-2:]


def test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos(tiny):
    _, _, tokenizer, _, pairs = tiny
    eos = tokenizer.eos_token_id
    for pair in pairs[:50]:
        prompt, chosen, rejected = map(tokenizer.encode, pair)
        for text, ids in zip(pair, (prompt, chosen, rejected), strict=True):
            assert tokenizer.decode(ids) == text
        assert eos not in chosen + rejected
        examples = p3o.tokenize([pair, pair], tokenizer, 4, 12)
        expected = p3o.Example(prompt[-4:], [*chosen, eos][:12], [*rejected, eos][:12], pair)
        assert examples == [expected, expected]


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(tiny, capsys):
    tokenizer = tiny[2]
    limit = len(tokenizer.encode(" one two"))
    equal = Pair("Hi", " one two three", " one two four")
    pairs = [equal, Pair("Hi", " five", " six"), Pair("Ho", " five", " six")]
    examples = p3o.tokenize(pairs, tokenizer, 9, limit)
    assert [example.text for example in examples] == pairs[1:]
    assert "dropped 1 of 3 pairs: equal once truncated" in capsys.readouterr().out
    with pytest.raises(InputError, match="too few pairs are left; raise --response-tokens"):
        p3o.tokenize(pairs[:2], tokenizer, 9, limit)


def test_no_token_is_added_by_the_tokenizer_itself(tiny, fresh):
    """Llama's tokenizer puts BOS before every text: it would separate prompt and response."""
    tokenizer = fresh(tiny[2])
    eos = tokenizer.eos_token
    adds_one = TemplateProcessing(f"{eos} $A", special_tokens=[(eos, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds_one
    assert tokenizer.encode(" A")[0] == tokenizer.eos_token_id
    for example in tokenize([Pair("Hi", " A", " B")] * 2, tokenizer, tiny[3]):
        assert example.prompt[0] != tokenizer.eos_token_id
        assert example.chosen.count(tokenizer.eos_token_id) == 1


# ---- Tokens to batches ---------------------------------------------------------------------
@pytest.mark.problem_1
def test_the_mask_covers_the_response_and_its_eos_and_nothing_else(tiny):
    examples = encode(tiny)
    prompts = [example.prompt for example in examples]
    chosen = [example.chosen for example in examples]
    ids, mask = p3o.collate(prompts, chosen, tiny[0])
    for row, covered, example in zip(ids.tolist(), mask.tolist(), examples, strict=True):
        start = len(example.prompt)
        end = len(example.prompt) + len(example.chosen)
        begins = row[:end] == example.prompt + example.chosen
        assert begins, "a row should begin with its prompt: the padding belongs on the right"
        assert row[end - 1] == tiny[2].eos_token_id
        assert set(row[end:]) <= {tiny[2].pad_token_id}, "the padding belongs on the right"
        expected = [start <= t < end for t in range(len(row))]
        assert covered == expected, "the mask should run from the first response token to EOS"


@pytest.mark.problem_1
def test_the_mask_keeps_eos_where_eos_is_the_padding_too(toy):
    """With EOS hidden from the loss, the policy would never learn to stop."""
    model = copy.deepcopy(toy)
    model.config.pad_token_id = EOS
    ids, mask = p3o.collate([[0], [0]], [[1, EOS], [1, 2, EOS]], model)
    assert ids.tolist() == [[0, 1, EOS, EOS], [0, 1, 2, EOS]]
    right = mask.tolist() == [[False, True, True, False], [False, True, True, True]]
    assert right, "if EOS is the padding, a mask from ids != pad hides it: use positions"


# ---- What padding costs --------------------------------------------------------------------
class Shapes:
    """While in use, record the number and the width of the rows that a model's body is given."""

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
def mixed(tiny) -> list[p3o.Example]:
    """Prompts of 2 and of 20 tokens in turn: in this order, half of a batch would be padding."""
    examples = []
    for number, length in enumerate([2, 20] * 8):
        prompt = [10 + number] * length
        examples.append(p3o.Example(prompt, [5, 6, 7], [6, 7, 8], tiny[4][number]))
    return examples


@pytest.mark.padding
def test_columns_behind_the_last_response_token_are_not_computed(tiny, mixed):
    policy, reward_model, *_ = tiny
    prompts = [example.prompt for example in mixed]
    responses = [example.chosen for example in mixed]
    ids, mask = p3o.collate(prompts, responses, policy)
    wider = torch.nn.functional.pad(ids, (0, 9), value=policy.config.pad_token_id)
    wider_mask = torch.nn.functional.pad(mask, (0, 9))
    with torch.no_grad(), Shapes(policy) as seen:
        found = p3o.response_logprobs(policy, wider, wider_mask)
    assert seen.widths == [22], "23 tokens, and the last one predicts nothing"
    assert found.shape == (len(ids), 23 + 9 - 1)
    assert torch.allclose(found[:, :22], p3o.response_logprobs(policy, ids, mask), atol=1e-5)
    assert not found[:, 22:].any()
    with torch.no_grad(), Shapes(reward_model) as seen:
        scores = p3o.reward_scores(reward_model, wider, wider_mask)
    assert seen.widths == [23]
    assert torch.allclose(scores, p3o.reward_scores(reward_model, ids, mask), atol=1e-5)


@pytest.mark.padding
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_micro_batches_are_alike_in_length(tiny, fresh, mixed, stage):
    cfg = small(batch=16, epochs=1, micro_batch=4)
    model = fresh(tiny[stage == "reward"])
    train = p3o.train_reward if stage == "reward" else p3o.train_sft
    with Shapes(model) as seen:
        train(model, mixed, cfg, nothing)
    assert seen.widths == ([5, 5, 23, 23] if stage == "reward" else [4, 4, 22, 22])


@pytest.mark.padding
def test_so_are_those_of_stage_3_in_scoring_and_in_each_update(tiny, fresh, mixed):
    sizes = dict(iterations=1, pairs=16, minibatch=16, inner_epochs=2, response_tokens=1)
    cfg = small(micro_batch=4, **sizes)
    policy, reference, reward_model = fresh(tiny[0]), fresh(tiny[0]), fresh(tiny[1])
    prompts = [example.prompt for example in mixed]

    def score(ids, mask):
        return p3o.reward_scores(reward_model, ids, mask)

    with Shapes(policy) as new, Shapes(reference) as ref, Shapes(reward_model) as scored:
        p3o.train_policy(policy, reference, score, p3o.p3o_loss, prompts, cfg, nothing)
    parts = [2, 2, 20, 20]
    assert new.widths == [20, *parts, *parts, *parts], "samples, old log-probs, two epochs"
    assert ref.widths == parts
    assert scored.widths == [3, 3, 21, 21]


@pytest.mark.padding
def test_sampling_spends_no_pass_on_rows_that_have_ended(toy):
    torch.manual_seed(0)
    with Shapes(toy) as seen:
        _, mask = p3o.sample(toy, TOY_PROMPTS * 50, 2, LONGEST)
    lengths = mask.sum(-1)  # (100, 2)
    going = [(lengths > done).sum().item() for done in range(LONGEST)]
    assert seen.rows == going
    assert going[0] == 200 > going[1] > going[2] > 0
