"""Loading the model that SFT starts from: plain ones, chat models, and those that are refused."""

import json
import socket
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from toys import assert_p3o_moved_every_weight, small, status, tokenize, write_rows
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import p3o
from data.preferences import InputError, split_row


def config(path: Path, **options) -> p3o.Config:
    sizes = dict(prompt_tokens=32, response_tokens=40)
    return p3o.Config(model=str(path), **sizes | options)


# ---- A plain model, such as GPT-2 ----------------------------------------------------------
@pytest.fixture
def plain_gpt2(tmp_path) -> Path:
    """A small stand-in for GPT-2: its tokenizer has EOS and no padding token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["My bike is slow."], 300, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    assert "<|pad|>" not in tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    sizes = dict(n_positions=72, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path)  # many models on the hub are in bf16
    return tmp_path


def test_a_base_model_without_a_pad_token_gets_one_inside_its_vocabulary(plain_gpt2):
    model, tokenizer = p3o.load_base(config(plain_gpt2))
    pad = tokenizer.pad_token_id
    assert pad not in (None, tokenizer.eos_token_id)
    assert model.config.pad_token_id == pad < model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.float32


def test_gpt2s_activation_is_one_kernel_and_the_same_function(plain_gpt2, tmp_path):
    ids = torch.tensor([[5, 6, 7, 8]])
    own = GPT2LMHeadModel.from_pretrained(plain_gpt2, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in own.parameters():
            weight.normal_()  # so large that another approximation of GELU would show
    own.save_pretrained(plain_gpt2)
    model, tokenizer = p3o.load_base(config(plain_gpt2))
    p3o.save(tmp_path / "sft", model, tokenizer)
    for loaded in (model, p3o.load(tmp_path / "sft")):
        logits = loaded(ids).logits[..., : own.config.vocab_size]  # without the new pad token's
        assert torch.allclose(logits, own(ids).logits, atol=1e-4)
        assert loaded.config.activation_function == "gelu_pytorch_tanh"
    assert p3o.load_base(small())[0].config.activation_function == "relu", "others stay"


def test_a_model_brings_no_penalties_of_its_own(plain_gpt2):
    """generate() on a saved model should sample from the distribution that training scored."""
    settings = {"repetition_penalty": 1.3, "temperature": 0.5, "top_k": 7}
    (plain_gpt2 / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = p3o.load_base(config(plain_gpt2))
    inherited = model.generation_config
    assert inherited.repetition_penalty in (None, 1.0)
    assert inherited.temperature == 1.0  # said, or pipeline() would take 0.7
    assert inherited.do_sample
    assert inherited.top_k == 0
    assert inherited.max_new_tokens == 40
    assert inherited.eos_token_id == tokenizer.eos_token_id
    assert inherited.pad_token_id == tokenizer.pad_token_id


# ---- Models that are refused, or not -------------------------------------------------------
def test_a_sequence_longer_than_the_models_positions_is_refused(plain_gpt2):
    """On a GPU it would end in a failed assertion inside CUDA."""
    with pytest.raises(InputError, match="must be at most 72"):
        p3o.load_base(config(plain_gpt2, prompt_tokens=33))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--model .*nothing"):
        p3o.load_base(config(tmp_path / "nothing"))


SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


@pytest.mark.parametrize(
    "changed",
    (
        Gemma2Config(final_logit_softcapping=5.0, initializer_range=1.0, **SIZES),
        GraniteConfig(logits_scaling=8.0, **SIZES),
    ),
    ids=("capped", "scaled"),
)
def test_a_model_that_changes_its_logits_after_the_head_is_refused_by_name(changed, tiny, tmp_path):
    """p3o.py would sample and score another distribution than the library's."""
    changed.vocab_size = len(tiny[2])
    model = AutoModelForCausalLM.from_config(changed)
    model.save_pretrained(tmp_path)
    tiny[2].save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{type(model).__name__} scales or caps"):
        p3o.load_base(config(tmp_path))


def test_offline_one_try_is_enough(tmp_path, monkeypatch, capsys):
    """The library by itself would try six times, for half a minute."""
    attempts = []

    def refuse(address, *_, **__):
        attempts.append(address)
        raise ConnectionRefusedError("this test has no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    # main() changes these for good, and the machine that runs this test may be offline
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert status(["--model", "nobody/no-such-model", "--out", str(tmp_path / "out")]) == 1
    assert len(attempts) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("p3o.py: --model nobody/no-such-model: ")
    assert not (tmp_path / "out").exists()


# ---- A chat model, such as SmolLM2-135M-Instruct -------------------------------------------
# Its peculiarities: pad is EOS. A turn ends with EOS and a newline. The template adds a system
# message. The tokenizer puts BOS before any text. Positions are rotary, there are fewer key heads
# than query heads, and embeddings and head are tied. Temperature and penalties come with the model.
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
    assert tokenizer.encode("bike")[0] == tokenizer.bos_token_id
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
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
    cfg = small(model=str(chat_model), prompt_tokens=96, response_tokens=24)
    model, tokenizer = p3o.load_base(cfg)

    def encoded(*rows: dict) -> list[p3o.Example]:
        pairs = [split_row(row, tokenizer) for row in rows]
        return tokenize(pairs * 2, tokenizer, cfg)[: len(rows)]  # takes at least two pairs

    return model, tokenizer, encoded


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
    assert model.get_output_embeddings().weight is now, "the head is no longer tied"


def test_a_prompt_is_the_templates_to_the_token_and_a_response_ends_with_one_eos(loaded):
    _, tokenizer, encoded = loaded
    row = row_of("My bike is slow.")
    quoting = row_of("My bike is slow.", chosen=f"Oil the chain.{END} Then test it.")
    example, other = encoded(row, quoting)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"]
    assert example.prompt + example.chosen == whole[:-1]
    assert tokenizer.decode(whole[-1]) == "\n"
    assert example.prompt.count(tokenizer.bos_token_id) == 3, "system, user, assistant"
    assert example.chosen.index(tokenizer.eos_token_id) == len(example.chosen) - 1
    assert other.chosen.count(tokenizer.eos_token_id) == 1, "a quoted EOS ended it twice"


def test_a_prompt_that_is_too_long_keeps_its_end(loaded):
    _, tokenizer, encoded = loaded
    (example,) = encoded(row_of("My bike is slow. " * 40))
    assert len(example.prompt) == 96
    assert tokenizer.decode(example.prompt).endswith(f"{END}\n{START}assistant\n")


def test_it_goes_through_every_stage_and_the_library_chats_with_the_result(
    chat_model, quick, out, tmp_path
):
    rows = [row_of(f"My bike is slow, {number}.") for number in range(120)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--model", str(chat_model), "--data", str(data), "--prompt-tokens", "96"]
    assert status([*quick, *options]) == 0
    assert_p3o_moved_every_weight(out)
    policy = pipeline("text-generation", str(out / "p3o"))
    chat = [{"role": "user", "content": "My bike is slow."}]
    given = []
    generate = policy.model.generate

    def spy(**inputs):
        given.extend(inputs["input_ids"].tolist())
        return generate(**inputs)

    policy.model.generate = spy
    (answer,) = policy(chat)
    assert answer["generated_text"][:-1] == chat
    tokenizer = policy.tokenizer
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    trained_on = tokenizer.encode(text, add_special_tokens=False)
    assert given == [trained_on], "the library gives the model other ids than training did"
