"""Sampling: from the distribution that is scored, each response with its prompt, up to its
first EOS."""

import copy
import math

import pytest
import torch
from toys import EOS, LONGEST, PAD, TOY_PROMPTS, encode, every_response, llama, toy_batch

import p3o


@pytest.mark.problem_3
def test_samples_keep_their_prompt_are_padded_on_the_right_and_stop_at_their_first_eos(toy):
    torch.manual_seed(0)
    ids, mask = p3o.sample(toy, TOY_PROMPTS * 50, 2, LONGEST)
    assert ids.shape == mask.shape
    assert ids.shape[:2] == (100, 2)
    ends = set()
    for prompt, rows, masks in zip(TOY_PROMPTS * 50, ids.tolist(), mask.tolist(), strict=True):
        for row, covered in zip(rows, masks, strict=True):
            start = len(prompt)
            length = sum(covered)
            response = row[start : start + length]
            assert row[:start] == prompt, "a response follows the wrong prompt"
            assert covered == [start <= t < start + length for t in range(len(row))]
            assert EOS not in response[:-1], "a token after EOS counts as response"
            ended = response[-1] == EOS
            assert ended or length == LONGEST, "EOS is not of the response, or it was cut early"
            assert set(row[start + length :]) <= {PAD}
            ends.add((length, ended))
    assert len(ends) == 4  # lengths 1, 2 and 3 by EOS, and 3 by the limit


@pytest.mark.problem_3
def test_a_response_alone_goes_on_to_its_end(toy):
    torch.manual_seed(0)
    longest = 7  # the toy has eight positions
    lengths = set()
    for _ in range(100):
        ids, mask = p3o.sample(toy, [[0]], 1, longest)
        response = ids[mask].tolist()
        assert response[-1] == EOS or len(response) == longest, "a response was cut early"
        lengths.add(len(response))
    assert len(lengths) > 4


def standard_errors(counts, probability):
    """How far frequencies are from probabilities, (V,) each."""
    deviation = (probability * (1 - probability) * counts.sum()).sqrt()
    return (counts - probability * counts.sum()).abs() / deviation


@pytest.mark.problem_3
@pytest.mark.parametrize("positions", ("learned", "rotary"))
def test_whole_responses_come_as_often_as_their_scored_probability_also_beside_a_longer_prompt(
    toy, positions
):
    """Left padding that shifts positions, a temperature or a lost EOS would show."""
    torch.manual_seed(0)
    draws = 20_000
    model = toy
    if positions == "rotary":
        tokens = dict(bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
        model = llama(5, initializer_range=0.6, **tokens)
    number = {tuple(response): i for i, response in enumerate(every_response())}
    ids, mask = p3o.sample(model, TOY_PROMPTS, draws, LONGEST)
    for prompt, rows, masks in zip(TOY_PROMPTS, ids, mask, strict=True):
        counts = torch.zeros(len(number))
        for row, covered in zip(rows, masks, strict=True):
            response = row[covered].tolist()
            counts[number[tuple(response)]] += 1
        with torch.no_grad():
            probability = p3o.response_logprobs(model, *toy_batch(prompt)).sum(-1).exp()
        often = probability * draws > 5
        assert often.sum() > 15
        error = standard_errors(counts, probability)[often].max()
        assert error < 4.5, f"prompt {prompt}: frequencies are off by that many standard errors"


@pytest.mark.problem_3
def test_the_whole_vocabulary_is_sampled(tiny):
    """The library's default keeps the 50 likeliest tokens; what is scored is all of them."""
    policy, _, tokenizer, _, _ = tiny
    prompt = encode(tiny, 1)[0].prompt
    torch.manual_seed(0)
    ids, _ = p3o.sample(policy, [prompt] * 150, 100, 1)
    counts = torch.bincount(ids[..., len(prompt)].flatten(), minlength=len(tokenizer))
    with torch.no_grad():
        probability = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert (counts > 0).sum() > 300
    assert standard_errors(counts, probability).max() < 5.5  # over some seven hundred tokens


@pytest.mark.problem_3
def test_the_two_responses_of_a_pair_are_independent(toy):
    """Their joint first tokens come as often as the product of the single frequencies."""
    torch.manual_seed(0)
    ids, _ = p3o.sample(toy, [[0]] * 5000, 2, 1)
    first = ids[:, 0, 1]
    second = ids[:, 1, 1]
    joint = torch.bincount(5 * first + second, minlength=25).view(5, 5) / 5000
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert ((joint - expected).abs() < 4 * (expected / 5000).sqrt()).all()


@pytest.mark.problem_3
def test_a_data_pair_and_a_sample_with_the_same_text_are_the_same_input(toy):
    """What the reward model was trained on is what it scores: same ids, same mask, whatever the
    padding was."""
    torch.manual_seed(0)
    ids, mask = p3o.sample(toy, TOY_PROMPTS * 20, 1, LONGEST)
    responses = [row[covered].tolist() for row, covered in zip(ids, mask, strict=True)]
    data_ids, data_mask = p3o.collate(TOY_PROMPTS * 20, responses, toy)
    width = data_ids.shape[1]
    assert torch.equal(ids[:, 0, :width], data_ids)
    assert torch.equal(mask[:, 0, :width], data_mask)
    assert not mask[..., width:].any(), "nothing but padding may follow the longest row"


def test_not_a_number_is_no_token_outside_the_vocabulary(toy):
    """The update after it then stops the run with a clear message."""
    model = copy.deepcopy(toy)
    torch.nn.init.constant_(model.transformer.ln_f.bias, math.nan)
    ids, _ = p3o.sample(model, TOY_PROMPTS, 2, LONGEST)
    assert ids.min() >= 0 and ids.max() < 5
