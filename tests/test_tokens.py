"""Text to tokens, and which tokens are the response."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing
from toys import EOS, dialogue, encode, small

import p3o
from data.preferences import Pair


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
        assert begins, "a row begins with its prompt: padding belongs on the right"
        assert row[end - 1] == tiny[2].eos_token_id
        assert set(row[end:]) <= {tiny[2].pad_token_id}, "the padding belongs on the right"
        expected = [start <= t < end for t in range(len(row))]
        assert covered == expected, "the mask should run from the first response token to EOS"


@pytest.mark.problem_1
def test_the_mask_keeps_eos_where_eos_is_the_padding_too(toy):
    """A mask from ids != pad would hide the EOS action from the loss: the policy would never
    learn to stop."""
    model = copy.deepcopy(toy)
    model.config.pad_token_id = EOS
    ids, mask = p3o.collate([[0], [0]], [[1, EOS], [1, 2, EOS]], model)
    assert ids.tolist() == [[0, 1, EOS, EOS], [0, 1, 2, EOS]]
    right = mask.tolist() == [[False, True, True, False], [False, True, True, True]]
    assert right, "where EOS is the padding, a mask from ids != pad hides it: take positions"


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
        ids = p3o.tokenize_prompt(whole, tokenizer, limit)
        assert tokenizer.decode(ids) == kept, f"at most {limit} tokens"
    assert p3o.tokenize_prompt(whole, tokenizer, 2) == tokenizer.encode(whole)[-2:]


def test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos(tiny):
    _, _, tokenizer, _, pairs = tiny
    eos = tokenizer.eos_token_id
    cfg = small(prompt_tokens=4, response_tokens=12)
    for pair in pairs[:50]:
        (example,) = p3o.tokenize([pair], tokenizer, cfg)
        chosen = tokenizer.encode(pair.chosen)
        rejected = tokenizer.encode(pair.rejected)
        assert example.prompt == tokenizer.encode(pair.prompt)[-4:]
        assert example.chosen == [*chosen, eos][:12]
        assert example.rejected == [*rejected, eos][:12]
        assert eos not in chosen
        assert example.text == pair


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(tiny, capsys):
    tokenizer = tiny[2]
    pairs = [Pair("Hi", " one two three", " one two four"), Pair("Hi", " five", " six")]
    cfg = small(response_tokens=len(tokenizer.encode(" one two")))
    (example,) = p3o.tokenize(pairs, tokenizer, cfg)
    assert example.text == pairs[1]
    assert "1 of 2 pairs differ once cut" in capsys.readouterr().out


def test_text_survives_the_tokenizer(tiny):
    _, _, tokenizer, _, pairs = tiny
    for pair in pairs[:20]:
        for text in pair:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_token_is_added_by_the_tokenizer_itself(tiny, fresh):
    """Llama's puts its BOS before every text: it would stand between prompt and response."""
    tokenizer = fresh(tiny[2])
    eos = tokenizer.eos_token
    adds_one = TemplateProcessing(f"{eos} $A", special_tokens=[(eos, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds_one
    assert tokenizer.encode(" A")[0] == tokenizer.eos_token_id
    (example,) = p3o.tokenize([Pair("Hi", " A", " B")], tokenizer, tiny[3])
    assert example.prompt[0] != tokenizer.eos_token_id
    assert example.chosen.count(tokenizer.eos_token_id) == 1
