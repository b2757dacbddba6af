"""A model tuned for chat, such as SmolLM2-135M-Instruct, in small: from its template to its EOS.

What is peculiar to it: pad is EOS; a turn ends with EOS and a newline; the template adds a system
message of its own; the tokenizer may put a BOS before any text; positions are rotary; fewer heads
hold keys than ask; embeddings and head are tied; temperature and penalties come with the weights.
"""

import json

import pytest
import torch
from conftest import QUICK
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from toys import status
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

import p3o
from data.preferences import split_row

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% if messages[0].role != 'system' %}" + START + "system\nBe kind." + END + "\n{% endif %}"
    "{% for m in messages %}" + START + "{{ m.role }}\n{{ m.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["My bike is slow."], 300, special_tokens=["<unk>", START, END])
    bpe.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    special = dict(unk_token="<unk>", bos_token=START, eos_token=END, pad_token=END)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.encode("bike")[0] == tokenizer.bos_token_id, "as Llama's tokenizers do"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=160,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **heads,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    settings = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def row_of(question: str, chosen: str = "Oil the chain.", rejected: str = "Who cares?") -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


@pytest.fixture
def loaded(chat_model):
    options = dict(model=str(chat_model), prompt_tokens=96, response_tokens=24)
    cfg = p3o.Config(**p3o.SMALL | QUICK | options)
    model, tokenizer = p3o.load_base(cfg)
    return model, tokenizer, cfg


def test_padding_gets_a_token_and_an_embedding_of_its_own_and_the_rest_stays(loaded, chat_model):
    model, tokenizer, _ = loaded
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    before = LlamaForCausalLM.from_pretrained(chat_model).get_input_embeddings().weight
    now = model.get_input_embeddings().weight
    assert len(now) == len(before) + 1
    assert torch.equal(now[:-1], before)
    assert torch.isfinite(now[-1]).all()
    assert model.get_output_embeddings().weight is now, "still tied"
    assert model.generation_config.temperature in (None, 1.0)
    assert model.generation_config.repetition_penalty in (None, 1.0)


def test_a_prompt_is_the_templates_to_the_token_and_a_response_ends_with_one_eos(loaded):
    _, tokenizer, cfg = loaded
    row = row_of("My bike is slow.")
    (example,) = p3o.tokenize([split_row(row, tokenizer)], tokenizer, cfg)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"]
    assert example.prompt + example.chosen == whole[:-1], "but for the newline after EOS"
    assert tokenizer.decode(whole[-1]) == "\n"
    assert example.prompt.count(tokenizer.bos_token_id) == 3, "system, user, assistant"
    assert example.chosen.index(tokenizer.eos_token_id) == len(example.chosen) - 1


def test_what_a_row_quotes_of_the_template_does_not_end_a_response_twice(loaded):
    _, tokenizer, cfg = loaded
    row = row_of("My bike is slow.", chosen=f"Oil the chain.{END} Then test it.")
    (example,) = p3o.tokenize([split_row(row, tokenizer)], tokenizer, cfg)
    assert example.chosen.count(tokenizer.eos_token_id) == 1


def test_a_prompt_that_is_too_long_keeps_its_end(loaded):
    _, tokenizer, cfg = loaded
    pair = split_row(row_of("My bike is slow. " * 40), tokenizer)
    (example,) = p3o.tokenize([pair], tokenizer, cfg)
    assert len(example.prompt) == cfg.prompt_tokens
    assert tokenizer.decode(example.prompt).endswith(f"{END}\n{START}assistant\n")


def test_samples_end_at_eos_and_are_scored_alike_alone_and_beside_longer_prompts(loaded):
    model, tokenizer, cfg = loaded
    with torch.no_grad():  # tied: a larger embedding is said more often
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 20
    rows = [row_of("Bike."), row_of("My bike is slow, and my bread is flat. Any advice?")]
    pairs = [split_row(row, tokenizer) for row in rows]
    prompts = [example.prompt for example in p3o.tokenize(pairs, tokenizer, cfg)]
    torch.manual_seed(0)
    ids, mask = p3o.sample(model, prompts, 64, 24)  # (2, 64, T)
    ended = p3o.finished(model, ids, mask)
    assert ended.any()
    assert not ended.all()
    for row, inside in zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True):
        response = row[inside].tolist()
        assert tokenizer.eos_token_id not in response[:-1]
    logprobs = p3o.response_logprobs(model, ids, mask)  # (2, 64, T−1)
    inside = mask[0, 0]
    alone = ids[0, 0][: inside.nonzero()[-1] + 1]  # (t,)
    expected = model(alone[None]).logits[0, :-1].log_softmax(-1)  # (t−1, V)
    expected = expected.gather(-1, alone[1:, None])[:, 0][inside[1 : len(alone)]]
    assert torch.allclose(logprobs[0, 0][inside[1:]], expected, atol=1e-5)


def test_it_goes_through_every_stage_and_the_library_chats_with_the_result(
    chat_model, quick, out, tmp_path
):
    questions = [f"My bike is slow, {i}." for i in range(120)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row_of(question)) + "\n" for question in questions))
    options = ["--model", str(chat_model), "--data", str(data), "--prompt-tokens", "96"]
    assert status([*quick, *options]) == 0
    policy = pipeline("text-generation", str(out / "p3o"))
    assert policy.model.generation_config.eos_token_id == policy.tokenizer.eos_token_id
    chat = [{"role": "user", "content": "My bike is slow."}]
    given = []
    generate = policy.model.generate

    def spy(**inputs):
        given.extend(inputs["input_ids"].tolist())
        return generate(**inputs)

    policy.model.generate = spy
    (answer,) = policy(chat, do_sample=True, top_k=0, max_new_tokens=8)
    assert answer["generated_text"][:-1] == chat
    text = policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert given == [p3o.tokenize_prompt(text, policy.tokenizer, 96)], "other ids than in training"
