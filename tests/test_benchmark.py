"""tests/benchmark.py: what is compared is alike, but for what it says."""

import re
import sys
import time
from functools import partial

import benchmark
import pytest
import trl

import p3o

# TRL and accelerate warn about their own and transformers' future
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def watched(monkeypatch) -> dict[str, list]:
    """What `benchmark` gives to stage 3 and to TRL, at a size that takes seconds."""
    seen = {"trl": [], "p3o": [], "updates": [], "samples": []}

    class Trainer(trl.RLOOTrainer):
        def train(self) -> None:
            (reward_model,) = self.reward_funcs
            models = (self.model, self.ref_model, reward_model)
            activations = {model.config.activation_function for model in models}
            dropout = {m.p for m in self.model.modules() if type(m).__name__ == "Dropout"}
            prompts = sorted(self.train_dataset["prompt"])
            self.began = []  # iterations
            super().train()
            seconds = (self.began[3] - self.began[1]) / 2
            updates = self.state.global_step
            seen["trl"].append((activations, dropout, prompts, updates, seconds, self.args))

        def _generate_and_score_completions(self, inputs):
            self.began.append(time.perf_counter())
            seen["samples"].append(sorted(row["prompt"] for row in inputs))
            return super()._generate_and_score_completions(inputs)

    def train_policy(policy, reference, score, prompts, cfg, log) -> None:
        assert reference is not policy
        models = (policy, reference, score.args[0])
        activations = {model.config.activation_function for model in models}
        plain["train_policy"](policy, reference, score, prompts, cfg, log)
        seconds = (seen["updates"][24] - seen["updates"][8]) / 2  # eight an iteration
        seen["p3o"].append((activations, prompts, seconds, cfg))

    def gradient_step(*args) -> float:
        seen["updates"].append(time.perf_counter())
        return plain["gradient_step"](*args)

    plain = {"train_policy": p3o.train_policy, "gradient_step": p3o.gradient_step}
    monkeypatch.setattr(trl, "RLOOTrainer", Trainer)
    monkeypatch.setattr(p3o, "train_policy", train_policy)
    monkeypatch.setattr(p3o, "gradient_step", gradient_step)
    tiny = partial(benchmark.GPT2Config, n_layer=1, n_head=2, n_embd=8)
    monkeypatch.setattr(benchmark, "GPT2Config", tiny)
    sizes = {"gpt2": benchmark.SIZES["gpt2"] | dict(prompt_tokens=16, response_tokens=4)}
    monkeypatch.setattr(benchmark, "SIZES", sizes)
    monkeypatch.setattr(benchmark, "limits", lambda: (1e10, 1e11))
    return seen


def test_all_do_the_same_but_for_what_is_said(watched, capsys, monkeypatch):
    options = "benchmark.py --size gpt2 --pairs 32 --rounds 1 --iterations 4"
    monkeypatch.setattr(sys, "argv", options.split())
    benchmark.main()
    ((activations, prompts, p3o_seconds, cfg),) = watched["p3o"]
    assert activations == {"gelu_pytorch_tanh"}
    lengths = sorted(map(len, prompts))
    assert len(lengths) == 32
    even = [2 + 14 * (i + 0.5) / 32 for i in range(32)]  # from an eighth of 16 to 16
    assert lengths == pytest.approx(even, abs=1.01), "a whole token, and one more in the text"
    alike, own = watched["trl"]
    assert alike[:2] == ({"gelu_pytorch_tanh"}, {0.0})
    assert own[:2] == ({"gelu_new"}, {0.1})
    tokenizer = p3o.AutoTokenizer.from_pretrained(p3o.SMALL["model"])
    for _, _, texts, updates, _, args in watched["trl"]:
        assert len(texts) == 32
        assert updates == len(watched["updates"]) == 4 * 4 * 2  # iterations, epochs, minibatches
        assert args.gradient_accumulation_steps * args.per_device_train_batch_size == 2 * 16
        assert args.num_iterations == 4
        assert args.beta == cfg.beta > 0
        assert args.learning_rate == cfg.lr == 0
        assert args.max_completion_length == cfg.response_tokens
        assert (args.temperature, args.top_p, args.top_k) == (1, 1, 0)
        assert not args.activation_checkpointing
        assert not args.bf16
        lengths = (len(tokenizer(text)["input_ids"]) for text in texts)
        assert sum(lengths) == pytest.approx(sum(map(len, prompts)), rel=0.05)
    texts = alike[2]
    assert watched["samples"] == [sorted(2 * texts)] * 2 * 4, "two of each, each iteration"

    printed = capsys.readouterr().out
    seconds = re.findall(r"^\| iteration of (.*) \| ([\d.]+) \|", printed, re.MULTILINE)
    ours, *theirs = [float(figure) for _, figure in seconds]
    assert [name.split()[-1] for name, _ in seconds] == ["p3o.py", "alike", "own"]
    for how, figure, turn in zip(("alike", "own"), theirs, (alike, own), strict=True):
        (ratio,) = re.findall(rf"{how} / p3o.py, each turn: ([\d.]+)$", printed, re.MULTILINE)
        assert float(ratio) == pytest.approx(figure / ours, rel=0.02)
        assert 0.4 < figure / turn[4] < 2.5, "two iterations are much like the three timed"
    assert 0.4 < ours / p3o_seconds < 2.5


@pytest.mark.parametrize(
    ("options", "reason"), [("--pairs 17", "try a power of 2"), ("--iterations 1", "at least 2")]
)
def test_what_cannot_be_timed_is_refused(options, reason, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"benchmark.py --size gpt2 {options}".split())
    with pytest.raises(SystemExit):
        benchmark.main()
    assert reason in capsys.readouterr().err
