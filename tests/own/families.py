"""Check which model families p3o.py handles: build a tiny random model of each, and try it.

    python tests/own/families.py            # all of them: some minutes on a CPU
    python tests/own/families.py gpt2 phi3  # these only

A family must be refused before training, in one line, or pass two checks to 1e-4.

- log π: what `sample` draws from, with padding, a cache and rows that end early, is what
  `response_logprobs` scores, and what the library's own forward() computes for each row alone.
  The scoring model is the one that p3o.py saves and loads.
- scores: `reward_scores` of a saved reward model are those of the library's own forward().

Weights are so large, and sliding windows so short, that a wrong position would show. Prints a
Markdown table. Exits with status 1 if a family is neither refused nor right.
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import p3o
from data.preferences import InputError

TOLERANCE = 1e-4  # nats, and reward
WORDS = 40
PROMPTS = [[7], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
# each family takes those of these options that its configuration has
SIZES = dict(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=64,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    sliding_window=4,
    num_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    pad_token_id=3,
    bos_token_id=1,
    eos_token_id=2,
)
LATENT = dict(
    num_key_value_heads=4,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    kv_lora_rank=8,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"])
PLAIN = """
    gpt2 gpt_bigcode gpt_neox gpt_oss gpt-sw3 llama diffllama arcee mistral ministral ministral3
    mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma phi phi3 phimoe opt bloom mpt falcon biogpt
    persimmon stablelm starcoder2 olmo olmo2 glm glm4 nemotron smollm3 helium seed_oss doge jetmoe
    hunyuan_v1_dense hunyuan_v1_moe gemma2 minimax ctrl openai-gpt bert roberta electra
    modernbert-decoder bart mbart t5 granite granitemoe cohere cohere2 ernie4_5 olmoe glm4_moe
    llama4_text xglm mamba rwkv recurrent_gemma lfm2 bitnet
"""
# each family's options beside SIZES; words after its name tell variants apart
FAMILIES: dict[str, dict] = {name: {} for name in PLAIN.split()}
FAMILIES |= {
    "gpt_neo": dict(
        num_layers=2, num_heads=4, window_size=4, attention_types=[[["global", "local"], 1]]
    ),
    "gptj": dict(rotary_dim=4),
    "codegen": dict(rotary_dim=4),
    "falcon with ALiBi": dict(alibi=True),
    "opt with projections": dict(word_embed_proj_dim=16),
    "gemma2 without its caps": dict(final_logit_softcapping=None) | SLIDING,
    "gemma3_text": SLIDING,
    "olmo3": SLIDING,
    "exaone4": SLIDING,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "minicpm3": LATENT,
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=8,
        mamba_headdim=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
    ),
    "mamba2": dict(num_heads=8, n_groups=1, state_size=8),
    "xlnet": dict(d_head=8),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    words |= {f"w{i}": i for i in range(len(words), WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


def make_model(family: str) -> PreTrainedModel:
    """Return a tiny model of the family, its matrices drawn from N(0, 0.3²)."""
    name = family.split()[0]
    defaults = AutoConfig.for_model(name)
    names = set(vars(defaults)) | set(defaults.attribute_map)
    options = {key: value for key, value in SIZES.items() if key in names} | FAMILIES[family]
    kind = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(name, **options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model


@torch.no_grad()
def largest_difference(base: PreTrainedModel, loaded: PreTrainedModel) -> float:
    """Return by how many nats two computations of a sampled token's log π differ at most."""
    steps = []
    hook = base.get_output_embeddings().register_forward_hook(lambda *call: steps.append(call[-1]))
    ids, mask = p3o.sample(base, PROMPTS, 4, 16)  # (3, 4, T)
    hook.remove()
    ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)  # (12, T)
    scored = p3o.response_logprobs(loaded, ids, mask)  # (12, T−1)
    largest = 0.0
    for row in range(len(ids)):
        places = mask[row].nonzero().flatten().tolist()
        alone = loaded(ids[row : row + 1, : places[-1] + 1]).logits[0].log_softmax(-1)
        for step, place in enumerate(places):
            # the rows that still went on at this step, in order
            now = (mask[:row].sum(-1) > step).sum()
            token = ids[row, place]
            sampled = steps[step][now].log_softmax(-1)[token]
            for other in (scored[row, place - 1], alone[place - 1, token]):
                largest = max(largest, (sampled - other).abs().item())
    return largest


def try_family(family: str) -> tuple[str, bool]:
    """Return the cells of the table's row for this family, and whether it is as it should be."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        tokenizer = make_tokenizer()
        p3o.save(path / "base", make_model(family), tokenizer)
        cfg = p3o.Config(model=str(path / "base"), prompt_tokens=16, response_tokens=16)
        try:
            base, tokenizer = p3o.load_base(cfg)
        except InputError as error:
            reason = str(error).removeprefix(f"--model {cfg.model}: ")
            reason = re.sub(r" <class .*?>", "", reason.removesuffix(" (--small needs no hub)"))
            return f"refused: {reason} | |", True
        p3o.save(path / "sft", base, tokenizer)
        nats = largest_difference(base, p3o.load(path / "sft"))
        kind = AutoModelForSequenceClassification
        p3o.save(path / "reward", p3o.load(path / "sft", kind, num_labels=1), tokenizer)
        reward_model = p3o.load(path / "reward", kind)
        rows = [torch.randint(4, WORDS, (length,)).tolist() for length in (3, 8, 12, 5)]
        ids, mask = p3o.collate(PROMPTS + PROMPTS[:1], rows, reward_model)
        with torch.no_grad():
            reward_model.score.weight.normal_()
            scores = p3o.reward_scores(reward_model, ids, mask)  # (4,)
            own = reward_model(ids).logits[:, 0]  # (4,)
        reward = (scores - own).abs().max().item()
        right = nats <= TOLERANCE and reward <= TOLERANCE
        return f"{'passes' if right else 'WRONG'} | {nats:.0e} | {reward:.0e} |", right


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    print("| family | result | log π off by, nats | score off by |\n| --- | --- | --- | --- |")
    failed = []
    for family in FAMILIES:
        if names and family.split()[0] not in names:
            continue
        try:
            cells, right = try_family(family)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            cells, right = f"WRONG: {reason} | |", False
        print(f"| {family} | {cells}", flush=True)
        if not right:
            failed.append(family)
    if failed:
        sys.exit(f"families.py: neither refused nor right: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
