"""The tools for your own model and data, and the benchmark. Needs TRL, accelerate and peft."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import benchmark
import other_half
import pytest
import torch
import trials
import trl
import trl_p3o
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import p3o
from data.preferences import InputError, load_pairs, tokenize

# TRL and accelerate warn about their own and transformers' future
trl_warns = pytest.mark.filterwarnings("ignore")
OPTIONS = dict(
    response_tokens=12,
    reward_lr=1e-3,
    epochs=1,
    iterations=2,
    pairs=8,
    minibatch=4,
    micro_batch=4,
    eval_prompts=16,
)


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    """200 of the shipped pairs and their two halves."""
    folder = tmp_path_factory.mktemp("own")
    lines = (p3o.SHIPPED_DATA / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:200]))
    other_half.split(str(folder / "pairs.jsonl"), folder / "halves", None)
    return folder / "halves"


@pytest.fixture(scope="module")
def run(halves) -> Path:
    """A finished run of p3o.py on one half, with OPTIONS."""
    run = halves.parent / "run"
    options = [f"--{key}={value}" for key, value in OPTIONS.items()]
    p3o.main(["--small", "--data", str(halves / "mine"), "--out", str(run), *options])
    return run


def flat(model: torch.nn.Module) -> torch.Tensor:
    """All weights of a model in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- other_half.py -----------------------------------------------------------------------
def test_each_prompt_is_in_one_half_and_both_hold_out_the_same(halves):
    source = str(halves.parent / "pairs.jsonl")
    train, heldout = load_pairs(source)
    mine, mine_out = load_pairs(str(halves / "mine"))
    other, other_out = load_pairs(str(halves / "other"))
    assert sorted(mine + other) == sorted(train)
    assert not {pair.prompt for pair in mine} & {pair.prompt for pair in other}
    assert mine_out == other_out == heldout
    assert 0.3 < len(mine) / len(train) < 0.7


def test_the_judge_learns_from_its_half_alone_and_both_judge_the_runs_answers(
    run, halves, monkeypatch, capsys
):
    train, heldout = load_pairs(str(halves / "other"))
    second = []
    evaluated = []

    def spy_train(model, examples, cfg, log):
        assert [example.text for example in examples] == train
        assert cfg.reward_lr == 1e-3, "the run's options"
        assert torch.equal(flat(model.base_model), flat(p3o.load(run / "sft").base_model))
        plain["train_reward"](model, examples, cfg, log)
        second.append(model)

    def spy_evaluate(cfg, sft, reward_model, policy, tokenizer, examples):
        assert torch.equal(flat(sft), flat(p3o.load(run / "sft")))
        assert torch.equal(flat(policy), flat(p3o.load(run / "p3o")))
        assert [example.text for example in examples] == heldout
        assert cfg.data == str(halves / "other"), "no gold judge, not even of the shipped data"
        figures, answers = plain["evaluate"](cfg, sft, reward_model, policy, tokenizer, examples)
        evaluated.append((reward_model, figures, answers))
        return figures, answers

    plain = {"train_reward": p3o.train_reward, "evaluate": p3o.evaluate}
    monkeypatch.setattr(p3o, "train_reward", spy_train)
    monkeypatch.setattr(p3o, "evaluate", spy_evaluate)
    other_half.main(["judge", str(run), str(halves / "other")])
    printed = dict(re.findall(r"^(\w+) +(\S+) ± ", capsys.readouterr().out, re.MULTILINE))

    (first, own, answers), (judge, other, same_answers) = evaluated
    reward_model = p3o.load(run / "reward", AutoModelForSequenceClassification)
    assert torch.equal(flat(first), flat(reward_model))
    assert [judge] == second
    assert answers == same_answers
    assert own["win_rate"] != other["win_rate"]
    agreement = [a == b for a, b in zip(own["win_rate"], other["win_rate"], strict=True)]
    expected = {
        "accuracy_own": own["reward_accuracy"],
        "win_rate_own": own["win_rate"],
        "accuracy_other": other["reward_accuracy"],
        "win_rate_other": other["win_rate"],
        "agreement": agreement,
    }
    for name, values in expected.items():
        assert float(printed.pop(name)) == pytest.approx(sum(values) / len(values), abs=1e-3)
    assert not printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["win_rate"] == sum(own["win_rate"]) / len(own["win_rate"])


# ---- trials.py ---------------------------------------------------------------------------
CFG = p3o.Config(**p3o.SMALL)
RATES = ("sft_lr", "reward_lr", "p3o_lr")


def linear() -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1)
    model.bias.data.zero_()
    return model


@pytest.mark.parametrize(
    ("curves", "best", "edge"),
    [
        (([1.0] * 12, [9.0] * 9 + [0.4, 0.5, 0.9], [0.1] * 9 + [2.0] * 3), 0.005, ""),
        (([0.0] * 8, [1.0] * 8, [1.0] * 8), 0.001, ", and the smallest"),
        (([1.0] * 8, [1.0] * 8, [0.0] * 8), 0.025, ", and the largest"),
        (([1.0] * 8, [0.5] * 8, [0.0]), 0.005, ""),  # the last one diverges
    ],
)
def test_the_rate_with_the_lowest_loss_in_its_last_quarter_is_handed_on(curves, best, edge, capsys):
    curve_of = dict(zip((0.001, 0.005, 0.025), curves, strict=True))
    draws = []

    def train(model, cfg, log) -> None:
        assert model.bias.item() == 0, "each rate starts from the same model"
        draws.append(torch.rand(3).tolist())
        for step, loss in enumerate(curve_of[cfg.sft_lr]):
            log(step, {"sft/loss": loss})
        if len(curve_of[cfg.sft_lr]) < 8:
            raise FloatingPointError("NaN in the gradient")
        model.bias.data.fill_(cfg.sft_lr)

    rate, model = trials.best_of("sft", linear(), train, CFG)
    assert (rate, model.bias.item()) == (best, pytest.approx(best))
    assert draws[0] == draws[1] == draws[2], "the same batches"
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"sft_lr: {best:g} is the best of these{edge}"
    for line, (rate, curve) in zip(lines, curve_of.items(), strict=True):
        quarter = curve[-(len(curve) // 4) :]
        figures = f"sft/loss {sum(quarter) / len(quarter):.3f}; {len(curve)} steps, 0 s"
        if len(curve) < 8:
            figures = "NaN in the gradient"
        assert line == f"sft_lr {rate:g}: {figures}"


def test_stage_3_pays_for_its_kl(capsys):
    """At β = 0.1 the higher score of the second is not worth its KL."""

    def train(model, cfg, log) -> None:
        score, kl = {0.0004: (1.0, 1.0), 0.002: (2.0, 20.0), 0.01: (0.5, 0.0)}[cfg.p3o_lr]
        log(0, {"objective/scores": score, "objective/kl": kl, "response/finished": 0.9})

    rate, _ = trials.best_of("p3o", linear(), train, CFG)
    assert rate == pytest.approx(0.0004)
    line = "0.002: objective/scores 2.000, objective/kl 20.000, response/finished 0.900; 1 steps"
    assert line in capsys.readouterr().out


def test_each_stage_starts_from_the_best_of_the_stage_before(halves, capsys, monkeypatch):
    monkeypatch.setattr(trials, "FACTORS", (0.5, 2))
    monkeypatch.setattr(trials, "UPDATES", 3)
    calls = []

    def watch(name: str) -> None:
        plain = getattr(p3o, name)

        def watched(model, *rest):
            calls.append((name, rest, flat(model.base_model)))
            return plain(model, *rest)

        monkeypatch.setattr(p3o, name, watched)

    for name in ("train_sft", "train_reward", "set_gain", "train_policy"):
        watch(name)
    options = "--small --batch 16 --iterations 2 --pairs 4 --minibatch 2 --response-tokens 8"
    source = str(halves.parent / "pairs.jsonl")
    trials.main([*options.split(), "--inner-epochs", "3", "--data", source])

    names, rests, starts = zip(*calls, strict=True)
    assert (
        names == ("train_sft",) * 2 + ("train_reward",) * 2 + ("set_gain",) + ("train_policy",) * 6
    )
    printed = capsys.readouterr().out
    best = float(re.search(r"^p3o_lr: (\S+) is the best", printed, re.MULTILINE)[1])
    changes = [{name: getattr(CFG, name) * factor} for name in RATES for factor in (0.5, 2)]
    others = [{"beta": 0.02}, {"beta": 0.5}, {"inner_epochs": 2}, {"inner_epochs": 6}]
    cfg = rests[4][-1]  # set_gain's
    tried = [rest[-2] for rest in rests[:4] + rests[5:]]
    expected = [replace(cfg, **change) for change in changes]
    expected += [replace(cfg, p3o_lr=best, **change) for change in others]
    assert tried == expected
    assert (cfg.epochs, cfg.inner_epochs, cfg.p3o_lr) == (1, 3, CFG.p3o_lr)
    lines = re.findall(r"^(\w+ \S+): .*; (\d) steps", printed, re.MULTILINE)
    steps = ["3"] * 4 + ["2"] * 6
    labels = [f"{name} {value:g}" for change in changes + others for name, value in change.items()]
    assert lines == list(zip(labels, steps, strict=True))

    torch.manual_seed(0)
    base, _ = p3o.load_base(CFG)
    assert torch.equal(starts[0], flat(base.base_model))
    sft, score, _, prompts, *_ = rests[-1]
    reward_model = score.args[0]
    body = flat(sft.base_model)
    assert not torch.equal(body, starts[0])
    for weights in starts[2:4] + starts[5:]:
        assert torch.equal(weights, body), "reward model and policy start from the SFT model"
    sampler, few, _ = rests[4]
    assert (sampler, len(few)) == (sft, p3o.GAIN_PROMPTS)
    assert torch.equal(starts[4], flat(reward_model.base_model))
    assert not torch.equal(starts[4], body)
    assert len(prompts) > 3 * 16 * 2, "all prompts, not only those of the few updates"
    scores = p3o.reward_scores(reward_model, *p3o.sample(sft, [[5, 6, 7]] * 64, 2, 8))
    assert 0.3 < (scores[:, 0] - scores[:, 1]).square().mean().sqrt() < 3, "the gain is set"


def test_no_setting_is_tried_twice(halves, monkeypatch):
    tried = []
    monkeypatch.setattr(trials, "best_of", lambda stage, start, *_: (0.1, start))
    monkeypatch.setattr(trials, "try_one", lambda *args: tried.append(args[1:3]))
    options = ["--small", "--batch", "8", "--beta", "0", "--inner-epochs", "1"]
    trials.main([*options, "--data", str(halves.parent / "pairs.jsonl")])
    assert tried == [("inner_epochs", 2)]


# ---- trl_p3o.py --------------------------------------------------------------------------
QUIET = dict(disable_tqdm=True, save_strategy="no", logging_steps=1)
SGD = dict(optim="sgd", learning_rate=0.1, max_grad_norm=1e9)  # AdamW would hide a wrong factor


def trainer_of(run, tmp_path, kind=trl_p3o.P3OTrainer, config=None, peft_config=None, **options):
    """The trainer with changed options of p3o.py, and of TRL in `config`."""
    cfg = replace(trl_p3o.parse_run(run, []), out=str(tmp_path), **options)
    config = trl_p3o.trl_config(cfg, **QUIET | (config or {}))
    return kind(run, cfg, config, peft_config=peft_config)


def rows_of(inputs: dict, kind: str) -> list[list[int]]:
    """The ids of prompts or completions without their padding, y_1, y_2 of each pair in turn."""
    ids, mask = (inputs[f"{kind}_{name}"].flatten(0, 1) for name in ("ids", "mask"))
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


@trl_warns
@pytest.mark.parametrize(("micro_batch", "clip"), [(4, "joint"), (1, "separate")])
def test_loss_and_gradient_are_p3os_at_every_update_and_pairs_stay_together(
    run, tmp_path, micro_batch, clip
):
    drifts = []

    class Watched(trl_p3o.P3OTrainer):
        def _compute_loss(self, model, inputs):
            """Compare with p3o.py's loss on the same samples."""
            loss = super()._compute_loss(model, inputs)
            prompts = rows_of(inputs, "prompt")
            assert prompts[0::2] == prompts[1::2], "a pair was torn"
            ids, mask = p3o.collate(prompts, rows_of(inputs, "completion"), self.model)
            ids, mask = ids.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))
            with torch.no_grad():
                scores = p3o.reward_scores(self.judge, ids, mask)
                ref = p3o.sequence_logprobs(self.ref_model, ids, mask)
            new = p3o.sequence_logprobs(self.model, ids, mask)
            old = inputs["old_logps"]
            expected, _ = p3o.p3o_loss(new, old, ref, scores, beta=0.7, clip=clip, clip_range=0.1)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
            parameters = list(self.model.parameters())
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradient = torch.autograd.grad(expected, parameters)
            size = max(part.abs().max().item() for part in gradient)
            for part, other in zip(found, gradient, strict=True):
                assert (part - other).abs().max() < 1e-3 * size + 3e-5
            drifts.append((new.detach() - old).abs().max().item())
            return loss

    options = dict(micro_batch=micro_batch, clip=clip, beta=0.7, clip_range=0.1, p3o_lr=5e-4)
    trainer_of(run, tmp_path, Watched, **options).train()
    assert len(drifts) == 8 * 4 / micro_batch, "2 iterations × 2 passes × 2 updates"
    assert drifts[0] < 1e-4 < 0.01 < max(drifts), "several updates on the same samples"


@trl_warns
def test_micro_batches_and_an_offset_of_the_reward_change_nothing(run, tmp_path):
    class Shifted(trl_p3o.P3OTrainer):
        def score(self, prompts, completion_ids, **_):
            scores = super().score(prompts, completion_ids)
            return [score + len(prompt) for score, prompt in zip(scores, prompts, strict=True)]

    ends = []
    for kind, micro_batch in ((trl_p3o.P3OTrainer, 4), (trl_p3o.P3OTrainer, 1), (Shifted, 4)):
        trainer = trainer_of(run, tmp_path, kind, SGD, micro_batch=micro_batch)
        start = flat(trainer.model).clone()
        trainer.train()
        ends.append(flat(trainer.model))
    assert (ends[0] - start).abs().max() > 1e-2
    assert torch.allclose(ends[1], ends[0], atol=1e-4)
    assert torch.allclose(ends[2], ends[0], atol=1e-4)  # r + δ rounds in fp32


@trl_warns
@pytest.mark.parametrize(
    "options",
    (
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=2),
        dict(per_device_train_batch_size=3, gradient_accumulation_steps=2),
        dict(num_generations=4),
        dict(normalize_advantages=True),
        dict(reward_clip_range=(-1.0, 1.0)),
        dict(mask_truncated_completions=True),
    ),
    ids=str,
)
def test_what_would_tear_pairs_or_change_the_method_is_refused(run, tmp_path, options):
    with pytest.raises(InputError, match="P3O"):
        trainer_of(run, tmp_path, config=options)


@trl_warns
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_samples_and_updates_are_those_of_p3o_however_many_processes(monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    cfg = p3o.Config(**p3o.SMALL | dict(micro_batch=8, seed=7, p3o_lr=1e-3))
    config = trl_p3o.trl_config(cfg)
    at_once = config.per_device_train_batch_size * processes  # responses
    assert config.per_device_train_batch_size <= 2 * cfg.micro_batch
    assert at_once * config.gradient_accumulation_steps == 2 * cfg.minibatch
    assert at_once * config.steps_per_generation == 2 * cfg.pairs
    assert config.num_iterations == cfg.inner_epochs
    assert config.max_steps == cfg.iterations * 4  # updates an iteration
    assert config.save_steps == p3o.CHECKPOINT_EVERY * 4
    assert (config.seed, config.learning_rate, config.beta) == (7, 1e-3, cfg.beta)
    assert config.max_completion_length == cfg.response_tokens
    assert (config.temperature, config.top_p, config.top_k) == (1, 1, 0)
    assert config.disable_dropout and not config.bf16 and config.weight_decay == 0


@trl_warns
def test_prompts_are_the_ids_of_the_stages_before(run, tmp_path, monkeypatch):
    """Truncated as in p3o.py, without the special token that the tokenizer adds by itself."""
    scored, sampled = [], []

    class Watched(trl_p3o.P3OTrainer):
        def _compute_loss(self, model, inputs):
            sampled.extend(rows_of(inputs, "prompt"))
            return super()._compute_loss(model, inputs)

    def collate(prompts, *rest):
        scored.extend(prompts)
        return plain(prompts, *rest)

    plain = p3o.collate
    monkeypatch.setattr(p3o, "collate", collate)
    trainer = trainer_of(run, tmp_path, Watched, prompt_tokens=12, iterations=1)
    tokenizer = trainer.processing_class
    pairs, _ = load_pairs(trainer.cfg.data)
    expected = [example.prompt for example in tokenize(pairs, tokenizer, 12, 40)]
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    adds = TemplateProcessing(single=f"{eos[0]} $A", special_tokens=[eos])
    tokenizer.backend_tokenizer.post_processor = adds
    assert tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id
    trainer.train()
    for prompts in (sampled, scored):
        assert prompts and all(prompt in expected for prompt in prompts)


@trl_warns
def test_what_is_sampled_does_not_depend_on_padding(run, tmp_path):
    """With strong position embeddings, a short prompt continues in the same way alone and beside a
    longer one, both in a forward pass and in `generate`."""
    trainer = trainer_of(run, tmp_path)
    model = trainer.model.eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(20)
    prompts = [[10, 11, 12], [20 + i for i in range(12)]]
    batch = trainer.encoder.pad({"input_ids": prompts}, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0, "padding is on the left"
    greedy = dict(do_sample=False, max_new_tokens=6)
    beside = model(**batch).logits[:, -1]
    continued = model.generate(**batch, **greedy)[:, 12:]
    for logits, row, prompt in zip(beside, continued, prompts, strict=True):
        ids = torch.tensor([prompt])
        alone = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.allclose(model(**alone).logits[0, -1], logits, atol=1e-3)
        expected = model.generate(**alone, **greedy)[0, len(prompt) :]
        assert row[: len(expected)].tolist() == expected.tolist()


@trl_warns
def test_an_adapter_learns_and_the_model_below_stays(run, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    trainer = trainer_of(run, tmp_path, peft_config=lora, p3o_lr=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in name for name in changed)
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-5), "the reference is the model without its adapter"
    assert abs(kl[-1]) > 1e-4, "and not the model with it"


@trl_warns
def test_an_interrupted_run_resumes_and_ends_in_the_same_weights(run, tmp_path, monkeypatch):
    monkeypatch.setattr(p3o, "CHECKPOINT_EVERY", 1)
    plain = trl_p3o.P3OTrainer._compute_loss
    updates = []

    def interrupted(*args):
        updates.append(args)
        if len(updates) == 14:  # the sixth of the second run
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(trl_p3o.P3OTrainer, "_compute_loss", interrupted)
    whole, part = tmp_path / "whole", tmp_path / "part"
    trl_p3o.main([str(run), "--out", str(whole)])
    assert len(updates) == 8
    with pytest.raises(KeyboardInterrupt):
        trl_p3o.main([str(run), "--out", str(part)])
    with pytest.raises(SystemExit, match=r"^trl_p3o.py: .*part has checkpoints; add --resume"):
        trl_p3o.main([str(run), "--out", str(part)])
    trl_p3o.main([str(run), "--out", str(part), "--resume"])
    assert len(updates) == 14 + 4, "it went on after the fourth update"
    end = flat(p3o.load(whole / "p3o"))
    assert torch.equal(flat(p3o.load(part / "p3o")), end)
    assert not torch.equal(flat(p3o.load(run / "sft")), end)
    AutoTokenizer.from_pretrained(whole / "p3o")


def test_options_are_the_runs_unless_they_are_given(run, halves):
    expected = p3o.Config(**p3o.SMALL | OPTIONS | dict(data=str(halves / "mine"), out=f"{run}-trl"))
    assert trl_p3o.parse_run(run, []) == expected
    changed = trl_p3o.parse_run(run, ["--beta", "0.3", "--out", "there", "--pairs=64"])
    assert changed == replace(expected, beta=0.3, out="there", pairs=64)


# trl_p3o.py as it stands, with responses that do not depend on the process that samples them
PRESET = f"""
import functools, runpy, sys, trl

def generate(self, prompts):
    ids, _, _ = self._tokenize_prompts(prompts)
    responses = [[10 + i % 2, 20 + row[-3] % 7, 0] for i, row in enumerate(ids)]
    return ids, responses, self.processing_class.batch_decode(responses)

trl.RLOOTrainer._generate = generate
trl.RLOOConfig = functools.partial(trl.RLOOConfig, optim="sgd")
runpy.run_path({trl_p3o.__file__!r}, run_name="__main__")
"""


@trl_warns
def test_two_processes_make_the_updates_of_one(run, tmp_path, monkeypatch):
    """By `accelerate launch`, on the CPU: two pairs of each update in each process, or all four in
    this process."""
    options = [str(run), "--p3o-lr", "1", "--pairs", "4"]
    one, two = tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(trl, "RLOOConfig", trl.RLOOConfig)  # so that both are set back
    monkeypatch.setattr(trl.RLOOTrainer, "_generate", trl.RLOOTrainer._generate)
    monkeypatch.setattr(sys, "argv", ["trl_p3o.py", *options, "--out", str(one)])
    exec(PRESET)

    preset = tmp_path / "preset.py"
    preset.write_text(PRESET)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", str(preset), *options, "--out", str(two)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "1 process" not in result.stdout
    ends = [flat(p3o.load(out / "p3o")) for out in (one, two)]
    assert (ends[0] - flat(p3o.load(run / "sft"))).abs().max() > 1e-3
    assert torch.allclose(*ends, atol=1e-6)


# ---- the script in README.md about rounding ----------------------------------------------
README = (Path(__file__).parent / "README.md").read_text()
(ROUNDING,) = re.findall(r"```python\n(import copy\n.*?)```", README, re.DOTALL)


def run_script(halves: Path, options: str) -> dict:
    """Run the script on the shipped model and pairs; what it defines."""
    own = f'"--small --data {halves / "mine"} --minibatch 16 {options}"'
    names = {}
    with torch.no_grad():  # so that gradients are as before at the end
        exec(re.sub(r'(?<=OPTIONS = )".*"', own, ROUNDING), names)
    return names


def test_bf16_moves_log_ratios_more_than_tf32_and_that_more_than_the_step(
    halves, capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    names = run_script(halves, "--p3o-lr 1e-7 --clip-range 1e-3")
    assert asked == ["highest"]
    _, _, *lines = capsys.readouterr().out.splitlines()[-6:]
    table = [line.strip("| ").split(" | ") for line in lines]
    assert [name for name, *_ in table] == ["fp32", "TF32", "bf16, the head in fp32", "bf16"]
    exact, tf32, body, bf16 = ([float(figure) for figure in figures] for _, *figures in table)
    assert exact[0] == 0
    assert 4 * tf32[0] < body[0] < bf16[0]
    assert exact[1] < tf32[1] < bf16[1] / 4
    assert exact[2] <= tf32[2] <= bf16[2] > 0.5
    with torch.no_grad():
        old, new = (names["logprobs"](names[key], names["bf16"]) for key in ("model", "moved"))
    u = (new[:, 0] - old[:, 0]) - (new[:, 1] - old[:, 1])
    assert bf16[1] == pytest.approx(u.square().mean().sqrt().item(), abs=1e-4)
    assert bf16[2] == pytest.approx((u.abs() > 1e-3).float().mean().item(), abs=0.01)
    step = (flat(names["moved"]) - flat(names["model"])) / 1e-7
    assert torch.allclose(step.abs().mean(), torch.ones(()), atol=0.02)
    assert step.mean().abs() < 0.02


@pytest.mark.parametrize(
    ("rounding", "with_head"), [("tf32", True), ("bf16", False), ("bf16", True)]
)
def test_inputs_weights_and_bf16_results_of_linear_layers_are_rounded(
    halves, monkeypatch, rounding, with_head
):
    """Round in the functions instead. Only GPT-2's head calls F.linear."""
    names = run_script(halves, "")
    near = names[rounding]
    of_result = near if rounding == "bf16" else names["exactly"]
    addmm, linear = torch.addmm, torch.nn.functional.linear

    def rounded_addmm(bias, x, weight):
        return of_result(addmm(bias, near(x), near(weight)))

    def rounded_linear(x, weight, bias):
        return of_result(linear(near(x), near(weight), bias))

    with torch.no_grad():
        found = names["logprobs"](names["model"], near, with_head)
        monkeypatch.setattr(torch, "addmm", rounded_addmm)
        if with_head:
            monkeypatch.setattr(torch.nn.functional, "linear", rounded_linear)
        expected = p3o.sequence_logprobs(names["model"], names["ids"], names["mask"])
    assert torch.equal(found, expected.view(-1, 2))

    x = torch.randn(10_000) * 10.0 ** torch.randint(-5, 6, (10_000,))
    off = ((near(x) - x) / x).abs().max()
    half_a_step = 2.0 ** -(8 if rounding == "bf16" else 11)
    assert 0.9 * half_a_step < off <= half_a_step, "to the nearest"


def test_on_a_gpu_products_are_tf32_and_on_a_cpu_all_is_fp32(monkeypatch):
    """p3o.py, as it loads with and without one."""
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    for there, precisions in ((False, []), (True, ["high"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        spec = importlib.util.spec_from_file_location("p3o_again", p3o.__file__)
        again = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "p3o_again", again)  # dataclasses look there
        spec.loader.exec_module(again)
        assert asked == precisions


# ---- tests/benchmark.py ------------------------------------------------------------------
@trl_warns
def test_both_sides_do_the_same_work_and_their_seconds_are_counted(monkeypatch, capsys):
    """A clock of our own: sampling takes 100 s, which must not count, then 1, 2 and 9 s."""
    clock = [0.0]
    updates = []
    sampled = []  # by p3o.py: its model, the lengths of its prompts
    trainers = []

    def takes(seconds, function, *args):
        clock[0] += seconds
        return function(*args)

    def watched_sample(model, prompts, *rest):
        sampled.append((model, sorted(map(len, prompts))))
        return takes([100, 1, 2, 9][len(sampled) - 1], sample, model, prompts, *rest)

    def gradient_step(*args):
        updates.append(args)
        return takes(0.5, step, *args)

    class Trainer(trl.RLOOTrainer):
        def train(self):
            trainers.append(self)
            self.samples = []
            super().train()

        def _generate_and_score_completions(self, inputs):
            self.samples.append(sorted(row["prompt"] for row in inputs))
            clock[0] += [100, 4, 8, 16][len(self.samples) - 1]
            return super()._generate_and_score_completions(inputs)

    sample, step = p3o.sample, p3o.gradient_step
    monkeypatch.setattr(benchmark, "now", lambda: clock[0])
    monkeypatch.setattr(benchmark, "matrix_product_rate", lambda: 1e9)
    monkeypatch.setattr(benchmark, "RLOOTrainer", Trainer)
    monkeypatch.setattr(p3o, "sample", watched_sample)
    monkeypatch.setattr(p3o, "gradient_step", gradient_step)
    for name, seconds in (("reward_scores", 0.25), ("sequence_logprobs", 0.125)):
        monkeypatch.setattr(p3o, name, partial(takes, seconds, getattr(p3o, name)))
    size = dict(prompt_tokens=16, response_tokens=4, minibatch=4, micro_batch=2)
    monkeypatch.setattr(benchmark, "SIZES", {"gpt2": benchmark.SIZES["gpt2"] | size})
    monkeypatch.setattr(benchmark, "VOCABULARY", 629)
    tiny = partial(benchmark.GPT2Config, n_layer=1, n_head=2, n_embd=8)
    monkeypatch.setattr(benchmark, "GPT2Config", tiny)
    benchmark.main(["--size", "gpt2", "--pairs", "8", "--rounds", "1", "--iterations", "4"])

    (trainer,) = trainers
    model, lengths = sampled[0]
    assert sampled == [(model, lengths)] * 4
    even = [2 + 14 * (i + 0.5) / 8 for i in range(8)]  # from an eighth of 16 to 16
    assert lengths == pytest.approx(even, abs=1.01), "a whole token, and one more in the text"
    texts = list(trainer.train_dataset["prompt"])
    assert trainer.samples == [sorted(2 * texts)] * 4, "two of each, each iteration"
    tokenizer = AutoTokenizer.from_pretrained(p3o.SMALL["model"])
    found = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    assert found == pytest.approx(lengths, abs=1)
    assert len(updates) == trainer.state.global_step == 4 * 4 * 2, "of 4 pairs, in 4 inner epochs"
    assert torch.equal(flat(trainer.model), flat(model)), "the same weights, and nothing is learnt"
    for kept in (model, trainer.model, trainer.ref_model, *trainer.reward_funcs):
        assert kept.config.activation_function == "gelu_pytorch_tanh"
    assert not any(m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))
    config = trainer.args
    assert (config.max_completion_length, config.activation_checkpointing) == (4, False)
    assert (config.per_device_train_batch_size, config.num_iterations) == (2 * 2, 4)

    printed = capsys.readouterr().out
    seconds = re.findall(r"^\| .*? \| ([\d.]+) \|", printed, re.MULTILINE)
    assert [float(figure) for figure in seconds] == [2, 2, 6, 10, 8]
    assert printed.endswith("/ p3o.py, turn by turn: 0.80\n")


# ---- all of them -------------------------------------------------------------------------
@trl_warns
@pytest.mark.parametrize(
    ("tool", "options", "reason"),
    [
        (other_half, "split PAIRS HALVES", "exists; choose another"),
        (other_half, "judge HALVES HALVES/other", "config.json"),
        (trials, "--small --batch 500 --data PAIRS", "fewer than a --batch"),
        (trials, "--small --iterations 1 --data PAIRS", "--iterations must be at least 2"),
        (trials, "--small --sft-lr 1e30 --data PAIRS", "each --sft_lr diverged"),
        (trials, "--small --data nowhere.jsonl", "nowhere"),
        (trl_p3o, "HALVES", "config.json"),
        (trl_p3o, "RUN --resume --out OUT", "no checkpoint to resume"),
        (trl_p3o, "RUN --out OUT --pairs 6", "--pairs 6 must be a multiple of --minibatch 4"),
        (trl_p3o, "RUN --out OUT --minibatch 8 --micro-batch 3", "1 processes × --micro-batch 3"),
        (trl_p3o, "RUN --out OUT --data nowhere.jsonl", "nowhere"),
        (benchmark, "--size gpt2 --pairs 17", "--pairs 17 must be a multiple"),
        (benchmark, "--iterations 1", "--iterations must be at least 2"),
    ],
)
def test_bad_usage_is_one_line(run, halves, tmp_path, tool, options, reason):
    places = {"PAIRS": halves.parent / "pairs.jsonl", "HALVES": halves, "RUN": run}
    for name, path in (places | {"OUT": tmp_path / "out"}).items():
        options = options.replace(name, str(path))
    with pytest.raises(SystemExit, match=f"^{tool.__name__}.py: .*{reason}.*$"):
        tool.main(options.split())
