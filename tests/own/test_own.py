"""The tools for a model and data of one's own. Needs TRL, accelerate and peft."""

import copy
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
import trl_p3o
from conftest import ROOT
from tokenizers.processors import TemplateProcessing

import p3o
from data.preferences import InputError, load_pairs

# ---- trl_p3o.py --------------------------------------------------------------------------
# TRL and accelerate warn about their own and transformers' future
trl_warns = pytest.mark.filterwarnings("ignore")
CFG = p3o.Config(
    **p3o.SMALL
    | dict(response_tokens=8, iterations=2, pairs=8, minibatch=4, micro_batch=4, inner_epochs=2)
)
QUIET = dict(disable_tqdm=True, save_strategy="no", logging_steps=1)
SGD = dict(optim="sgd", learning_rate=0.1, max_grad_norm=1e9)  # AdamW would hide a wrong factor


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, rows) -> Path:
    """What a run of p3o.py leaves after two stages, on 40 pairs, with the options CFG."""
    policy, reward_model, tokenizer, *_ = tiny
    run = tmp_path_factory.mktemp("trl") / "run"
    for stage, model in (("sft", policy), ("reward", reward_model)):
        model.save_pretrained(run / stage)
        tokenizer.save_pretrained(run / stage)
    data = run / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    made_with = asdict(CFG) | {"data": str(data), "data_crc": 0}
    (run / "config.json").write_text(json.dumps(made_with))
    return run


def trainer_of(run, tmp_path, kind=trl_p3o.P3OTrainer, config=None, peft_config=None, **options):
    """The trainer with changed options of p3o.py, and of TRL in `config`."""
    cfg = replace(trl_p3o.parse_run(run, []), out=str(tmp_path), **options)
    config = trl_p3o.trl_config(cfg, **QUIET | (config or {}))
    return kind(run, cfg, config, peft_config=peft_config)


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def rows_of(inputs: dict, kind: str) -> list[list[int]]:
    """The ids of prompts or completions without their padding, y_1, y_2 of each pair in turn."""
    pairs = zip(inputs[f"{kind}_ids"].flatten(0, 1), inputs[f"{kind}_mask"].flatten(0, 1))
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


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
                assert (part - other).abs().max() < 1e-3 * max(size, 1e-2)
            drifts.append((new.detach() - old).abs().max().item())
            return loss

    options = dict(micro_batch=micro_batch, clip=clip, beta=0.7, clip_range=0.1, lr=5e-4)
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
        start = weights(trainer).clone()
        trainer.train()
        ends.append(weights(trainer))
    assert (ends[0] - start).abs().max() > 1e-2
    assert torch.allclose(ends[1], ends[0], atol=1e-4)
    assert torch.allclose(ends[2], ends[0], atol=1e-5)


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
    cfg = p3o.Config(**p3o.SMALL | dict(micro_batch=8, seed=7, lr=1e-3))
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
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    adds = TemplateProcessing(single=f"{eos[0]} $A", special_tokens=[eos])
    tokenizer.backend_tokenizer.post_processor = adds
    assert tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id
    trainer.train()
    pairs, _ = load_pairs(str(run / "pairs.jsonl"))
    expected = [p3o.tokenize_prompt(pair.prompt, tokenizer, 12) for pair in pairs]
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
    trainer = trainer_of(run, tmp_path, peft_config=lora, lr=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in name for name in changed)
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-5), "the reference is the model without its adapter"
    assert abs(kl[-1]) > 1e-4, "and not the model with it"


def saved(out: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in p3o.load(out / "p3o").state_dict().values()])


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
    trl_p3o.main([str(run), "--out", str(tmp_path / "whole")])
    assert len(updates) == 8
    part = [str(run), "--out", str(tmp_path / "part")]
    with pytest.raises(KeyboardInterrupt):
        trl_p3o.main(part)
    with pytest.raises(SystemExit, match=r"^trl_p3o.py: .*part has checkpoints; add --resume"):
        trl_p3o.main(part)
    trl_p3o.main([*part, "--resume"])
    assert len(updates) == 14 + 4, "it went on after the fourth update"
    assert torch.equal(saved(tmp_path / "part"), saved(tmp_path / "whole"))
    assert not torch.equal(
        saved(tmp_path / "whole"), weights(SimpleNamespace(model=p3o.load(run / "sft")))
    )
    tokenizer = p3o.AutoTokenizer.from_pretrained(tmp_path / "whole" / "p3o")
    assert tokenizer.pad_token_id is not None


def test_options_are_the_runs_unless_they_are_given(run):
    assert trl_p3o.parse_run(run, []) == replace(
        CFG, data=str(run / "pairs.jsonl"), out=f"{run}-trl"
    )
    changed = trl_p3o.parse_run(run, ["--beta", "0.3", "--out", "there", "--pairs=64"])
    assert (changed.beta, changed.out, changed.pairs, changed.minibatch) == (0.3, "there", 64, 4)


@trl_warns
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--resume"], "no checkpoint to resume"),
        (["--pairs", "6"], "--pairs 6 must be a multiple of --minibatch 4"),
        (["--minibatch", "8", "--micro-batch", "3"], "1 processes × --micro-batch 3"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_usage_of_trl_p3o_is_one_line(run, tmp_path, options, reason):
    with pytest.raises(SystemExit, match=f"^trl_p3o.py: .*{reason}.*$"):
        trl_p3o.main([str(run), "--out", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit, match=r"^trl_p3o.py: .*config\.json"):
        trl_p3o.main([str(tmp_path)])


# trl_p3o.py as it stands, with responses that do not depend on which process samples them
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
    options = [str(run), "--lr", "1", "--pairs", "4"]
    for name, value in (("RLOOConfig", trl.RLOOConfig), ("_generate", trl.RLOOTrainer._generate)):
        monkeypatch.setattr(trl if name == "RLOOConfig" else trl.RLOOTrainer, name, value)
    monkeypatch.setattr(sys, "argv", ["trl_p3o.py", *options, "--out", str(tmp_path / "one")])
    exec(PRESET)

    (tmp_path / "preset.py").write_text(PRESET)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    result = subprocess.run(
        [*launch, tmp_path / "preset.py", *options, "--out", str(tmp_path / "two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    start = torch.cat([p.flatten() for p in p3o.load(run / "sft").state_dict().values()])
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert (one - start).abs().max() > 1e-3
    assert torch.allclose(one, two, atol=1e-6)
