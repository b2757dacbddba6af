"""Loading the model that SFT starts from."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    PreTrainedTokenizerFast,
)

import p3o
from data.preferences import InputError


@pytest.fixture
def plain_gpt2(tmp_path) -> Path:
    """The path of the real GPT-2, in small: its tokenizer has EOS, and no token for padding."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["My bike is slow."], 300, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    assert "<|pad|>" not in tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    sizes = dict(n_positions=72, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path)  # as many models of the hub are saved
    return tmp_path


def config(path: Path, **options) -> p3o.Config:
    sizes = dict(prompt_tokens=32, response_tokens=40)
    return p3o.Config(model=str(path), **sizes | options)


def test_a_base_model_without_a_pad_token_gets_one_inside_its_vocabulary(plain_gpt2):
    model, tokenizer = p3o.load_base(config(plain_gpt2))
    pad = tokenizer.pad_token_id
    assert pad not in (None, tokenizer.eos_token_id)
    assert model.config.pad_token_id == pad < model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.float32


def test_gpt2s_activation_is_one_kernel_and_the_same_function(plain_gpt2, tmp_path):
    """For other functions, as the shipped model's, nothing changes."""
    ids = torch.tensor([[5, 6, 7, 8]])
    own = GPT2LMHeadModel.from_pretrained(plain_gpt2, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in own.parameters():
            weight.normal_()  # so large that another approximation of GELU would show
    own.save_pretrained(plain_gpt2)
    model, tokenizer = p3o.load_base(config(plain_gpt2))
    p3o.save(tmp_path / "sft", model, tokenizer)
    for loaded in (model, p3o.load(tmp_path / "sft")):
        logits = loaded(ids).logits
        same = logits[..., : own.config.vocab_size]  # but for the pad token's
        assert torch.allclose(same, own(ids).logits, atol=1e-4)
        assert "GeluBackward0" in operations(logits)
        assert "TanhBackward0" not in operations(logits)
    relu, _ = p3o.load_base(p3o.Config(**p3o.SMALL))
    assert "ReluBackward0" in operations(relu(ids).logits)


def operations(result: torch.Tensor) -> set[str]:
    """The names of all that led to a tensor."""
    seen = set()
    left = [result.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


def test_a_model_brings_no_penalties_of_its_own(plain_gpt2):
    """They would be sampled with, but not scored."""
    settings = {"repetition_penalty": 1.3, "temperature": 0.5}
    (plain_gpt2 / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = p3o.load_base(config(plain_gpt2))
    inherited = model.generation_config
    assert inherited.repetition_penalty in (None, 1.0)
    assert inherited.eos_token_id == tokenizer.eos_token_id
    assert inherited.pad_token_id == tokenizer.pad_token_id


def test_a_sequence_longer_than_the_models_positions_is_refused(plain_gpt2):
    """On a GPU it would be an assertion of CUDA's."""
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
    """It would be sampled and scored as another model than the library's."""
    changed.vocab_size = len(tiny[2])
    model = AutoModelForCausalLM.from_config(changed)
    model.save_pretrained(tmp_path)
    tiny[2].save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{type(model).__name__} scales or caps"):
        p3o.load_base(config(tmp_path))


@pytest.mark.parametrize("family", ("llama", "gpt_neox", "qwen2"))
def test_a_model_with_plain_logits_is_taken(family, tiny, tmp_path):
    sizes = SIZES | {"num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=len(tiny[2]), **sizes)
    )
    model.save_pretrained(tmp_path)
    tiny[2].save_pretrained(tmp_path)
    loaded, _ = p3o.load_base(config(tmp_path))
    assert type(loaded) is type(model)


def test_offline_one_try_is_enough(tmp_path):
    """The library would try six times, for half a minute."""
    environment = {"PATH": "", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)  # for a file under test without data/ beside it
    command = [sys.executable, p3o.__file__, "--out", str(tmp_path / "out")]
    began = time.monotonic()
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert time.monotonic() - began < 25
    assert result.returncode == 1
    *_, line = result.stderr.splitlines()
    assert line.startswith("p3o.py: --model gpt2: ")
    assert not (tmp_path / "out").exists()
