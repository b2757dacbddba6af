"""What a model must be able to do for p3o.py, asked before anything is trained.

Nothing here is about RLHF. Each function raises ValueError with a reason that fits one line.
"""

import math
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel


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

    # The last logits of four tokens: by the library's own forward(), and as `sample` computes
    # them, with padding on the left and a key-value cache.
    ids = torch.arange(4)[None]  # (1, 4)
    own = model(ids).logits[:, -1]  # (1, V)
    mask = torch.tensor([[0, 1, 1, 1, 1]])  # (1, 5): one is padding
    cache = model.base_model(
        ids[:, [0, 0, 1, 2]],
        attention_mask=mask[:, :4],
        position_ids=torch.tensor([[0, 0, 1, 2]]),
        use_cache=True,
    ).past_key_values
    cache.reorder_cache(torch.tensor([0]))
    hidden = model.base_model(
        ids[:, 3:],
        attention_mask=mask,
        position_ids=torch.tensor([[3]]),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state  # (1, 1, D)
    ours = model.get_output_embeddings()(hidden[:, -1])  # (1, V)
    if not torch.allclose(ours, own, atol=1e-3):
        name = type(model).__name__
        raise ValueError(f"{name} scales or caps its logits, or samples otherwise; use TRL for it")
