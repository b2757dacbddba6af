"""tests/tools/benchmark.py: what is compared is alike, but for what it says."""

import re
import sys
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
    seen = {"trl": [], "p3o": [], "updates": []}

    class Trainer(trl.RLOOTrainer):
        def train(self) -> None:
            (reward_model,) = self.reward_funcs
            models = (self.model, reward_model)
            activations = {model.config.activation_function for model in models}
            dropout = {m.p for m in self.model.modules() if type(m).__name__ == "Dropout"}
            super().train()
            seen["trl"].append((activations, dropout, self.state.global_step, self.args))

    def train_policy(policy, reference, score, prompts, cfg, log) -> None:
        models = (policy, reference, score.args[0])
        seen["p3o"].append({model.config.activation_function for model in models})
        plain["train_policy"](policy, reference, score, prompts, cfg, log)

    def gradient_step(*args) -> float:
        seen["updates"].append(args)
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


def test_as_many_updates_and_what_trl_is_given(watched, capsys, monkeypatch):
    options = "benchmark.py --size gpt2 --pairs 8 --rounds 1 --iterations 3"
    monkeypatch.setattr(sys, "argv", options.split())
    benchmark.main()
    assert watched["p3o"] == [{"gelu_pytorch_tanh"}]
    alike, as_it_comes = watched["trl"]
    assert alike[:2] == ({"gelu_pytorch_tanh"}, {0.0})
    assert as_it_comes[:2] == ({"gelu_new"}, {0.1})
    for _, _, updates, args in watched["trl"]:
        assert updates == len(watched["updates"]) == 3 * 4  # iterations, inner epochs
        assert args.num_generations == 2
        assert args.gradient_accumulation_steps * args.per_device_train_batch_size == 2 * 8
        assert args.num_iterations == 4
    printed = capsys.readouterr().out
    seconds = re.findall(r"^\| iteration of (\w+).* \| ([\d.]+) \|", printed, re.MULTILINE)
    assert [name for name, _ in seconds] == ["p3o", "TRL", "TRL"]
    for how, (_, theirs) in zip(("alike", "as it comes"), seconds[1:], strict=True):
        (ratio,) = re.findall(rf"{how} / p3o.py, each turn: ([\d.]+)$", printed, re.MULTILINE)
        assert float(ratio) == pytest.approx(float(theirs) / float(seconds[0][1]), abs=0.05)
    phases = re.findall(r"^\| (?:sampling|scores.*|updates) \| ([\d.]+) ", printed, re.MULTILINE)
    assert sum(map(float, phases)) == pytest.approx(float(seconds[0][1]), abs=0.003)


def test_pairs_that_do_not_divide_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--size", "gpt2", "--pairs", "17"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "try a power of 2" in capsys.readouterr().err
