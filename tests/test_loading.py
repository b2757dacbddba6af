"""Loading the model that SFT starts from: plain ones, chat models, and those that are refused."""

import json
import math
import re
import socket
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from toys import (
    CHATML,
    assert_p3o_moved_every_weight,
    letters,
    llama,
    small,
    status,
    talk,
    tokenize,
    write_rows,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

import p3o
from data.preferences import Chat, InputError, split_row


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
    ("unfit", "reason"),
    (
        (Gemma2Config(final_logit_softcapping=5.0, initializer_range=1.0, **SIZES), "caps its"),
        (GraniteConfig(**SIZES), "GraniteConfig.* AutoModelForSequenceClassification"),
    ),
    ids=("logits capped", "no classifier"),
)
def test_a_family_that_a_later_stage_could_not_use_is_refused(unfit, reason, tiny, tmp_path):
    """With logits changed after the head, p3o.py would sample and score another distribution."""
    unfit.vocab_size = len(tiny[2])
    AutoModelForCausalLM.from_config(unfit).save_pretrained(tmp_path)
    tiny[2].save_pretrained(tmp_path)
    with pytest.raises(InputError, match=reason):
        p3o.load_base(config(tmp_path))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small Llama and its tokenizer, both sound."""
    tokenizer = letters()
    llama(len(tokenizer), max_position_embeddings=80).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_positions_are_limited_under_any_name(folder):
    assert p3o.load_base(config(folder, prompt_tokens=40))
    with pytest.raises(InputError, match="must be at most 80"):
        p3o.load_base(config(folder, prompt_tokens=41))


def test_a_model_with_large_logits_may_round_them(folder):
    """A real model's logits of 26 differed by 3e-4 between its forward() and its cache."""
    edited(**{"lm_head.weight": lambda weight: 1e6 * weight})(folder)
    assert p3o.load_base(config(folder))


def test_a_tokenizer_without_eos_is_refused(folder):
    letters(eos_token=None).save_pretrained(folder)
    with pytest.raises(InputError, match="its tokenizer has no EOS token"):
        p3o.load_base(config(folder))


def test_tokens_without_an_embedding_get_one(folder):
    """Some models come with more tokens than their embedding has rows, so ids would point past."""
    letters(tokens=tuple(f"<{i}>" for i in range(9)), pad_token="<pad>").save_pretrained(folder)
    model, tokenizer = p3o.load_base(config(folder))
    assert len(tokenizer) == len(letters()) + 8
    assert model(torch.tensor([[len(tokenizer) - 1]])).logits.shape[-1] == len(tokenizer)


def edited(**changes):
    """Return a function that changes a model's tensors, given as NAME=function of the tensor."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name, change in changes.items():
            tensor = change(tensors.pop(name))
            if tensor is not None:
                tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def compiled(folder: Path) -> None:
    """Prefix all names as torch.compile does."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def weights(change):
    """Return a function that changes the bytes of a model's file."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return edit


def adapter(alone: bool):
    def edit(folder: Path) -> None:
        base = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
        (folder / "adapter_config.json").write_text(json.dumps(base))
        if alone:
            (folder / "model.safetensors").unlink()
            (folder / "config.json").unlink()

    return edit


def narrower(folder: Path) -> None:
    shape = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 24}
    (folder / "config.json").write_text(json.dumps(shape))


def t5(folder: Path) -> None:
    sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(T5Config(vocab_size=300, **sizes)).save_pretrained(folder)


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (compiled, f"its weights lack .*{EMBEDDING}"),
        (edited(**{NORM: lambda _: None}), f"its weights lack {NORM}"),
        (edited(**{EMBEDDING: lambda weight: weight * math.nan}), f"{EMBEDDING} holds NaN"),
        (edited(**{NORM: lambda weight: weight / 0}), f"{NORM} holds NaN or inf"),
        (adapter(alone=True), "LoRA adapter; merge it"),
        (adapter(alone=False), "LoRA adapter; merge it"),
        (weights(lambda _: b""), "header"),
        (weights(lambda content: content[:3000]), "incomplete metadata"),
        (weights(lambda _: POINTER), "header"),
        (narrower, "gate_proj"),
        (t5, "T5Config.* AutoModelForCausalLM"),
    ],
    ids=(
        *("compiled", "a tensor dropped", "NaN", "infinite", "adapter", "adapter beside weights"),
        *("empty", "truncated", "LFS pointer", "other shapes", "encoder-decoder"),
    ),
)
def test_a_model_that_is_not_whole_is_refused_in_one_line(damage, reason, folder):
    """Missing weights would be drawn at random, and training would start from noise."""
    damage(folder)
    with pytest.raises(InputError) as error:
        p3o.load_base(config(folder))
    assert re.search(reason, str(error.value))
    assert str(error.value).startswith(f"--model {folder}: ")
    assert "\n" not in str(error.value)


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


@pytest.fixture
def loaded(chat_model):
    cfg = small(model=str(chat_model), prompt_tokens=96, response_tokens=24)
    model, tokenizer = p3o.load_base(cfg)

    def encoded(*rows: dict) -> list[p3o.Example]:
        pairs = [split_row(row, Chat(tokenizer)) for row in rows]
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
    row = talk("My bike is slow.")
    quoting = talk("My bike is slow.", f"Oil the chain.{END} Then test it.")
    example, other = encoded(row, quoting)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"]
    assert example.prompt + example.chosen == whole[:-1]
    assert tokenizer.decode(whole[-1]) == "\n"
    assert example.prompt.count(tokenizer.bos_token_id) == 3, "system, user, assistant"
    assert example.chosen.index(tokenizer.eos_token_id) == len(example.chosen) - 1
    assert other.chosen.count(tokenizer.eos_token_id) == 1, "a quoted EOS ended it twice"


def test_a_prompt_that_is_too_long_keeps_its_end(loaded):
    _, tokenizer, encoded = loaded
    (example,) = encoded(talk("My bike is slow. " * 40))
    assert len(example.prompt) == 96
    assert tokenizer.decode(example.prompt).endswith(f"{END}\n{START}assistant\n")


def test_the_token_that_ends_a_turn_is_eos_in_all_that_is_saved(quick, out, tmp_path, capsys):
    """Also where it was the padding: padding then gets a token of its own."""
    end = "<|im_end|>"
    tokenizer = letters(CHATML, pad_token=end)
    llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", [talk(f"Q{number}") for number in range(120)])
    options = ["--model", str(tmp_path), "--data", str(data), "--prompt-tokens", "64"]
    assert status([*quick, *options]) == 0
    for stage in p3o.STAGES:
        saved = AutoTokenizer.from_pretrained(out / stage)
        config = AutoConfig.from_pretrained(out / stage)
        ids = {saved.eos_token_id, config.eos_token_id}
        pads = {saved.pad_token_id, config.pad_token_id}
        if stage != "reward":  # which generates nothing
            settings = GenerationConfig.from_pretrained(out / stage)
            ids.add(settings.eos_token_id)
            pads.add(settings.pad_token_id)
        assert ids == {tokenizer.convert_tokens_to_ids(end)}, stage
        assert len(pads) == 1
        assert not pads & ids
    *_, build, use = capsys.readouterr().out.splitlines()
    names = {}
    exec(build.strip(), names)
    (answer,) = eval(use.strip(), names)
    assert answer["generated_text"][-1]["role"] == "assistant", "the printed code does not chat"


def test_it_goes_through_every_stage_and_the_library_chats_with_the_result(
    chat_model, quick, out, tmp_path
):
    rows = [talk(f"My bike is slow, {number}.") for number in range(120)]
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
