"""Text to tokens, tokens to batches: which of them are the response, and what padding costs."""

import copy

import pytest
import torch
from toys import (
    CHATML,
    EOS,
    LONGEST,
    TOY_PROMPTS,
    dialogue,
    encode,
    letters,
    nothing,
    small,
    talk,
)

import p3o
from data import preferences
from data.preferences import Chat, Example, InputError, Pair, split_row


# ---- Text to tokens ------------------------------------------------------------------------
def prompt_ids(prompt: str, tokenizer, limit: int) -> list[int]:
    """Return the ids of a text's prompt."""
    example, _ = preferences.tokenize([Pair(prompt, " A", " B")] * 2, tokenizer, limit, 9)
    return example.prompt


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
        assert tokenizer.decode(prompt_ids(whole, tokenizer, limit)) == kept, f"{limit} tokens"
    assert prompt_ids(whole, tokenizer, 2) == tokenizer.encode(whole)[-2:]


def test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos(tiny):
    _, _, tokenizer, _, pairs = tiny
    eos = tokenizer.eos_token_id
    for pair in pairs[:50]:
        prompt, chosen, rejected = map(tokenizer.encode, pair[:3])
        for text, ids in zip(pair[:3], (prompt, chosen, rejected), strict=True):
            assert tokenizer.decode(ids) == text
        assert eos not in chosen + rejected
        examples = preferences.tokenize([pair, pair], tokenizer, 4, 12)
        expected = p3o.Example(prompt[-4:], [*chosen, eos][:12], [*rejected, eos][:12], pair)
        assert examples == [expected, expected]


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(tiny, capsys):
    tokenizer = tiny[2]
    limit = len(tokenizer.encode(" one two"))
    equal = Pair("Hi", " one two three", " one two four")
    pairs = [equal, Pair("Hi", " five", " six"), Pair("Ho", " five", " six")]
    examples = preferences.tokenize(pairs, tokenizer, 9, limit)
    assert [example.text for example in examples] == pairs[1:]
    assert "1 of 3 pairs dropped: equal once truncated" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"too few pairs are left; raise .*--response-tokens"):
        preferences.tokenize(pairs[:2], tokenizer, 9, limit)


# ---- Tokenizers and chat templates of every family -------------------------------------------
WITH_BOS = "{{ bos_token }}" + CHATML
# Zephyr's. Its SentencePiece tokenizer puts a space before a text, so also before a lone response
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def encoded(row: dict, tokenizer, prompt_tokens: int = 999) -> Example:
    """Return a row's ids; a chat template is applied to messages."""
    pair = split_row(row, Chat(tokenizer))
    example, _ = preferences.tokenize([pair, pair], tokenizer, prompt_tokens, 99)
    return example


def text(prompt: str, chosen: str = " A", rejected: str = " B") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("leading", ("", "<s>"))
@pytest.mark.parametrize("template", (None, CHATML, WITH_BOS))
def test_a_prompt_begins_with_what_its_text_needs_and_never_twice(template, leading):
    """A text with what the tokenizer puts in front, a templated one with the template's BOS."""
    tokenizer = letters(template, leading=leading, bos_token="<s>")
    bos = tokenizer.bos_token_id
    wanted = template == WITH_BOS if template else bool(leading)
    for limit in (999, 24):
        row = talk("Hi, " * 9 + "you?") if template else text("Hi, " * 9 + "you?")
        example = encoded(row, tokenizer, limit)
        ids = example.prompt + example.chosen + example.rejected
        assert ids.count(bos) == wanted, f"{limit} tokens: {ids}"
        assert (example.prompt[0] == bos) == wanted
        assert (
            tokenizer.decode(example.prompt).removesuffix("<|im_end|>\n<|im_start|>assistant\n")[
                -4:
            ]
            == "you?"
        )
        assert limit == 999 or len(example.prompt) == limit or template
    assert encoded(text("<s>Hi"), tokenizer).prompt.count(bos) == 1, "the text spells it out"


@pytest.mark.parametrize("metaspace", (False, True), ids=("bytes", "SentencePiece"))
@pytest.mark.parametrize("row", (text("Hi:", " Yes"), text("Hi:\n", "Yes"), talk("Hi", "Yes")))
def test_prompt_and_response_have_the_ids_of_the_whole_text(row, metaspace):
    """A space before the response would be one that sampling never sees."""
    tokens = ("<|user|>", "<|assistant|>")
    tokenizer = letters(ZEPHYR, tokens=tokens, leading="<s>", bos_token="<s>", metaspace=metaspace)
    example = encoded(row, tokenizer)
    pair = example.text
    templated = pair.messages is not None
    for response, ids in ((pair.chosen, example.chosen), (pair.rejected, example.rejected)):
        whole = tokenizer.encode(pair.prompt + response, add_special_tokens=not templated)
        assert example.prompt + ids == [*whole, tokenizer.eos_token_id]


def test_a_token_across_the_boundary_is_split_there():
    """A prompt must have the same ids in both responses, in sampling and in training."""
    tokenizer = letters(merges=(("i", "t"),))
    assert len(tokenizer.encode("Hit")) == 2
    example = encoded(text("Hi", "to", "no"), tokenizer)
    whole = example.prompt + example.chosen
    assert tokenizer.convert_ids_to_tokens(whole) == ["H", "i", "t", "o", "<eos>"]
    assert tokenizer.decode(example.rejected) == "no<eos>"


@pytest.mark.parametrize("pad", ("<pad>", "END"))
@pytest.mark.parametrize("end", ("<|im_end|>", "<end_of_turn>", "<|end|>", "<eos>"))
def test_the_token_that_ends_a_turn_is_eos_and_a_response_has_it_once(end, pad, capsys):
    template = CHATML.replace("<|im_end|>", end)
    pad = pad.replace("END", end)
    tokenizer = letters(template, tokens=("<|im_start|>", end), pad_token=pad)
    for response in ("Yes", f"Yes{end}", f"Yes{end} and more"):
        example = encoded(talk("Hi", response), tokenizer)
        assert tokenizer.decode(example.chosen) == f"Yes{end}"
    assert tokenizer.eos_token == end
    told = f"EOS is {end}, which ends a turn in the chat template\n"
    assert capsys.readouterr().out == told * (end != "<eos>")


def test_an_eos_that_a_text_spells_out_ends_it_and_is_there_once():
    example = encoded(text("Hi", " A<eos>", " B<eos> and more"), letters())
    assert letters().decode(example.chosen) == " A<eos>"
    assert letters().decode(example.rejected) == " B<eos>"


# ---- Long dialogues ------------------------------------------------------------------------
SYSTEM = {"role": "system", "content": "Be kind."}


def turns(count: int, system: bool = True, last: str = "?") -> list[dict[str, str]]:
    """Return `count` questions with answers in between, and the system's message before them."""
    messages = [SYSTEM] * system
    for number in range(count - 1):
        messages.append({"role": "user", "content": f"Q{number}"})
        messages.append({"role": "assistant", "content": f"A{number}"})
    return [*messages, {"role": "user", "content": last}]


def rendered(tokenizer, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("system", (True, False))
def test_a_long_templated_prompt_loses_whole_turns_and_is_rendered_again(system):
    """The template's beginning, the system's message and the assistant's header stay."""
    tokenizer = letters(WITH_BOS, bos_token="<s>")
    messages = turns(6, system)
    row = talk("", "Yes") | {"prompt": messages}
    lengths = []
    for dropped in range(6):
        kept = messages[:system] + messages[system + 2 * dropped :]
        ids = tokenizer.encode(rendered(tokenizer, kept), add_special_tokens=False)
        lengths.append(len(ids))
        assert encoded(row, tokenizer, len(ids)).prompt == ids
        if dropped:
            assert encoded(row, tokenizer, lengths[-2] - 1).prompt == ids, "one too few for more"


@pytest.mark.parametrize("system", (True, False))
def test_a_last_message_that_is_too_long_loses_its_beginning(system):
    tokenizer = letters(WITH_BOS, bos_token="<s>")
    messages = turns(3, system, "a b c d e f g h i j" * 9)
    row = talk("", "Yes") | {"prompt": messages}
    whole = rendered(tokenizer, messages[:system] + messages[-1:])
    for limit in (60, 59):
        prompt = encoded(row, tokenizer, limit).prompt
        assert len(prompt) == limit
        shown = tokenizer.decode(prompt)
        head, tail = shown.split("user\n")
        assert whole.startswith(head)
        assert whole.endswith(tail)
    for prompt in (messages, [SYSTEM]):
        with pytest.raises(InputError, match="too few pairs are left"):
            encoded(row | {"prompt": prompt}, tokenizer, 5)


@pytest.mark.parametrize("template", (None, CHATML))
def test_few_encodings_are_enough_for_many_turns(template, monkeypatch):
    tokenizer = letters(template)
    row = talk("", "Yes") | {"prompt": turns(800)}
    plain = tokenizer.encode
    calls = []
    monkeypatch.setattr(tokenizer, "encode", lambda *a, **o: calls.append(a) or plain(*a, **o))
    assert len(encoded(row, tokenizer, 200).prompt) in range(160, 201)
    assert len(calls) < 60, "for two pairs"


# ---- Tokens to batches ---------------------------------------------------------------------
@pytest.mark.problem_1
def test_the_mask_covers_the_response_and_its_eos_and_nothing_else(tiny):
    examples = encode(tiny)
    prompts = [example.prompt for example in examples]
    chosen = [example.chosen for example in examples]
    ids, mask = p3o.collate(prompts, chosen, tiny[0])
    assert mask.dtype == torch.bool, "response_mask should be boolean"
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
