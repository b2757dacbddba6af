"""Scores: one a response, read at its last token, the same for everyone."""

import pytest
import torch
from toys import batch, encode, llama, with_nan_elsewhere
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import p3o


@pytest.mark.problem_4
def test_a_score_is_read_at_the_last_response_token(tiny):
    """It changes with that token, EOS here, and with nothing to the right of it."""
    reward_model = tiny[1]
    tokenizer = tiny[2]
    ids, mask = batch(tiny)
    changed = ids.clone()
    after = ids.clone()
    last = (mask * torch.arange(ids.shape[1])).argmax(1)
    changed[torch.arange(len(ids)), last] = 300
    after[torch.arange(ids.shape[1]) > last[:, None]] = tokenizer.eos_token_id
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        assert scores.shape == (len(ids),)
        assert (p3o.reward_scores(reward_model, changed, mask) != scores).all(), (
            "the last token, EOS, is not read"
        )
        same = torch.allclose(p3o.reward_scores(reward_model, after, mask), scores, atol=1e-5)
        assert same, "the score changes with what stands behind the last response token"


@pytest.mark.problem_4
def test_a_score_is_the_same_alone_and_in_a_padded_batch(tiny):
    reward_model = tiny[1]
    tokenizer = tiny[2]
    ids, mask = batch(tiny)
    wide = torch.nn.functional.pad(ids, (0, 5), value=tokenizer.eos_token_id)
    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        assert torch.allclose(p3o.reward_scores(reward_model, wide, wide_mask), scores, atol=1e-5)
        for i in range(len(ids)):
            length = mask[i].nonzero().max() + 1
            alone = p3o.reward_scores(
                reward_model, ids[i : i + 1, :length], mask[i : i + 1, :length]
            )
            assert alone.item() == pytest.approx(scores[i].item(), abs=1e-5)


@pytest.mark.problem_4
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_pairs_have_the_scores_of_their_rows(tiny, family):
    """(B, 2, T) and (2B, T) are the same rows, in the same order; Llama takes (2B, T) alone."""
    ids, mask = batch(tiny)
    model = tiny[1]
    if family == "llama":
        config = llama(len(tiny[2]), num_labels=1, pad_token_id=tiny[2].pad_token_id).config
        model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        rows = p3o.reward_scores(model, ids, mask)
        pairs = p3o.reward_scores(model, ids.view(3, 2, -1), mask.view(3, 2, -1))
    assert pairs.shape == (3, 2)
    assert torch.allclose(pairs, rows.view(3, 2), atol=1e-5)


@pytest.mark.problem_4
def test_the_librarys_own_forward_gives_the_same_score(tiny):
    """So the saved reward model means the same in anyone's hands."""
    ids, mask = batch(tiny)
    with torch.no_grad():
        assert torch.allclose(
            p3o.reward_scores(tiny[1], ids, mask), tiny[1](ids).logits[:, 0], atol=1e-5
        )


@pytest.mark.problem_4
def test_hidden_states_other_than_the_last_tokens_do_not_reach_the_score(tiny):
    reward_model = tiny[1]
    ids, mask = batch(tiny)
    last = (mask * torch.arange(ids.shape[1])).argmax(1, keepdim=True)
    with torch.no_grad():
        scores = p3o.reward_scores(reward_model, ids, mask)
        handle = with_nan_elsewhere(reward_model, ids, torch.arange(ids.shape[1]) == last)
        poisoned = p3o.reward_scores(reward_model, ids, mask)
        handle.remove()
    assert torch.equal(scores, poisoned), "another position than the last token's reaches the score"


@pytest.mark.problem_4
def test_score_pairs_has_chosen_first_and_rejected_second(tiny):
    examples = encode(tiny)
    with torch.no_grad():
        found = p3o.score_pairs(tiny[1], examples)
        for example, (chosen, rejected) in zip(examples, found.tolist(), strict=True):
            for response, score in ((example.chosen, chosen), (example.rejected, rejected)):
                alone = tiny[1](torch.tensor([example.prompt + response])).logits.item()
                assert score == pytest.approx(alone, abs=1e-5)


def test_saved_models_load_and_score_the_same(tiny, tmp_path):
    policy, reward_model, *_ = tiny
    ids, mask = batch(tiny)
    for model, kind in (
        (policy, AutoModelForCausalLM),
        (reward_model, AutoModelForSequenceClassification),
    ):
        model.save_pretrained(tmp_path / kind.__name__)
        loaded = kind.from_pretrained(tmp_path / kind.__name__)
        function = p3o.response_logprobs if model is policy else p3o.reward_scores
        with torch.no_grad():
            assert torch.equal(function(model, ids, mask), function(loaded, ids, mask))
