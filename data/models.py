"""What a model must have and be able to do for p3o.py, seen to before anything is trained.

Nothing here is about RLHF. Each function raises ValueError with a reason that fits one line.
"""

import math
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def check_weights(model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuse weights that are missing, of another shape, or not finite.

    `loading` is what `from_pretrained` returns with output_loading_info=True. It would draw what
    is missing at random and say nothing.
    """
    shapes = [name for name, *_ in loading["mismatched_keys"]]
    for problem, names in (("lack", loading["missing_keys"]), ("have other shapes for", shapes)):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise ValueError(f"its weights {problem} {shown} ({len(names)} in all)")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"its weight {name} holds NaN or infinite values")


def fit_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, response_tokens: int
) -> None:
    """Give the model its tokenizer's EOS and padding, two tokens, and each token an embedding."""
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no EOS token; set tokenizer.eos_token and save it")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        # NOTE with pad = EOS, transformers' own forward() of the saved reward model would read
        # the score one token early
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    # so that generate() on a saved model samples as `sample` does, without filters or penalties
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,  # said, or pipeline() would take 0.7
        top_k=0,
        max_new_tokens=response_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def check_model(model: PreTrainedModel, tokens: int) -> None:
    """Refuse a model that cannot hold so many tokens, be sampled from, or become a reward model."""
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    if tokens > positions:
        raise ValueError(f"--prompt-tokens + --response-tokens must be at most {positions}")
    with torch.device("meta"):  # neither memory nor time
        classifier = AutoModelForSequenceClassification.from_config(model.config)
    if not hasattr(classifier, "score"):
        raise ValueError(f"{type(classifier).__name__} has no `score`, which stage 2 trains")

    own = model(torch.tensor([[0, 1, 2, 3, 1, 2]])).logits[:, -1]  # (1, V)
    name = type(model).__name__
    try:
        ours = last_logits(model)
    except Exception as error:  # each family fails in its own way
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} cannot sample with padding and a cache ({reason})") from None
    if not torch.allclose(ours, own, atol=1e-4 * own.abs().max().item()):  # fp32 rounds
        raise ValueError(f"{name} scales or caps its logits, or samples otherwise; use TRL for it")


def last_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits (1, V) after tokens 0, 1, 2, 3, 1, 2, computed as p3o.py's `sample` does.

    With padding on the left, a key-value cache, and a longer row beside it that ends earlier.
    """
    prompts = torch.tensor([[2, 1, 0, 3, 1, 2, 0, 3], [0, 0, 0, 0, 0, 0, 1, 2]])  # (2, 8)
    positions = torch.arange(8) - torch.tensor([[0], [5]])  # (2, 8): five are padding
    out = model.base_model(
        prompts,
        attention_mask=(positions >= 0).long(),
        position_ids=positions.clamp(min=0),
        use_cache=True,
    )
    out.past_key_values.reorder_cache(torch.tensor([1]))  # the first row has ended
    for position, token in ((3, 3), (4, 1), (5, 2)):
        out = model.base_model(
            torch.tensor([[token]]),
            attention_mask=(torch.arange(6 + position) >= 5).long()[None],
            position_ids=torch.tensor([[position]]),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return model.get_output_embeddings()(out.last_hidden_state[:, -1])
