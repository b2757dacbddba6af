import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import p3o  # noqa: E402

QUICK = dict(
    batch=64, sft_epochs=1, reward_epochs=1, iterations=2, pairs=16, minibatch=8, inner_epochs=2, eval_prompts=16
)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    import json

    return [json.loads(line) for line in (ROOT / "data" / "heldout.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny(rows):
    """A policy with random weights, a reward model that shares its body, their tokenizer and configuration."""
    torch.manual_seed(0)
    cfg = p3o.Config(**p3o.SMALL | QUICK)
    pairs = [p3o.split_dialogues(row["chosen"], row["rejected"]) for row in rows]
    policy, tokenizer = p3o.build_tiny([pair.prompt + pair.chosen for pair in pairs], cfg)
    from transformers import GPT2ForSequenceClassification

    policy.config.num_labels = 1
    reward_model = GPT2ForSequenceClassification(policy.config)
    reward_model.transformer.load_state_dict(policy.transformer.state_dict())
    return policy.eval(), reward_model.eval(), tokenizer, cfg, pairs


@pytest.fixture(scope="session")
def quick_data(rows, tmp_path_factory):
    """A file of 200 preference rows."""
    import json

    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:200]))
    return path


@pytest.fixture
def quick(quick_data, tmp_path):
    """Command-line options of a run that takes about a second, and its output directory."""
    options = ["--small", "--data", str(quick_data), "--out", str(tmp_path / "out")]
    return options + [word for key, value in QUICK.items() for word in ("--" + key.replace("_", "-"), str(value))]
