"""README's trainer for several GPUs: P3O's loss in TRL's engine, on the CPU.

The code is taken from the README as it stands.
"""

import copy
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tokenizers.processors import TemplateProcessing

import p3o

# TRL and accelerate warn about their own and transformers' future
pytestmark = pytest.mark.filterwarnings("ignore")
README = (ROOT / "README.md").read_text()
SECTION = README.split("## When one GPU is not enough")[1].split("\n## ")[0]
(CODE,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
QUIET = dict(disable_tqdm=True, save_strategy="no", logging_steps=1, max_completion_length=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny) -> Path:
    """A folder with what a small run leaves, and the README's script."""
    policy, reward_model, tokenizer, *_ = tiny
    folder = tmp_path_factory.mktemp("trl")
    for name, model in (("sft", policy), ("reward", reward_model)):
        model.save_pretrained(folder / "runs" / "small" / name)
        tokenizer.save_pretrained(folder / "runs" / "small" / name)
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "p3o.py").symlink_to(Path(p3o.__file__))
    (folder / "trl_p3o.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module")
def script(folder):
    """The README's script as a module."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        spec = importlib.util.spec_from_file_location("trl_p3o", folder / "trl_p3o.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        os.chdir(before)


def trainer_of(script, tmp_path, kind=None, score=None, peft_config=None, **options):
    """The README's trainer, on few prompts; the same one each time."""
    changed = dict(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8)
    changed |= dict(generation_batch_size=None) | QUIET | options
    config = dataclasses.replace(script.config, **changed)
    pairs, _ = script.load_pairs("data")
    prompts = script.Dataset.from_list([{"prompt": pair.prompt} for pair in pairs[:40]])
    torch.manual_seed(0)
    return (kind or script.P3OTrainer)(
        f"{script.run}/sft",
        score or script.score,
        config,
        prompts,
        processing_class=script.tokenizer,
        peft_config=peft_config,
    )


def watched(script, seen: list):
    """A trainer that compares each loss and gradient with p3o.py's on the same samples."""

    class Watched(script.P3OTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            rows = {key: value.flatten(0, 1) for key, value in inputs.items()}
            prompts, responses = [], []
            for texts, kind in ((prompts, "prompt"), (responses, "completion")):
                for ids, mask in zip(rows[f"{kind}_ids"], rows[f"{kind}_mask"], strict=True):
                    texts.append(ids[mask.bool()].tolist())
            assert prompts[0::2] == prompts[1::2], "a pair was torn"
            ids, mask = p3o.collate(prompts, responses, self.model)
            ids, mask = ids.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))
            with torch.no_grad():
                scores = script.reward_scores(script.reward_model, ids, mask)
                ref = p3o.sequence_logprobs(self.ref_model, ids, mask)
            new = p3o.sequence_logprobs(self.model, ids, mask)
            old = inputs["old_logps"]
            mine, _ = p3o.p3o_loss(new, old, ref, scores, beta=self.beta)
            parameters = list(self.model.parameters())
            theirs = torch.autograd.grad(loss, parameters, retain_graph=True)
            ours = torch.autograd.grad(mine, parameters)
            gap = max((a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True))
            size = max(b.abs().max().item() for b in ours)
            drift = (new.detach() - old).abs().max().item()
            seen.append((abs(loss - mine).item(), gap / max(size, 1e-2), drift))
            return loss

    return Watched


# 4 pairs an update, 2 updates a pass, 2 passes; the same in micro-batches of one pair
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)])
def test_loss_and_gradient_are_p3os_at_every_update_and_pairs_stay_together(
    script, tmp_path, sizes
):
    rows, micro_batches = sizes
    seen = []
    kind = watched(script, seen)
    options = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=micro_batches)
    options |= dict(steps_per_generation=2 * micro_batches, max_steps=6)
    trainer_of(script, tmp_path, kind, **options).train()
    assert len(seen) == 6 * micro_batches
    for loss_gap, gradient_gap, _ in seen:
        assert loss_gap < 1e-4
        assert gradient_gap < 1e-3
    drifts = [drift for *_, drift in seen]
    assert drifts[0] < 1e-4 < 0.01 < max(drifts), "many updates to each sample"


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
def test_what_would_tear_pairs_or_change_the_method_is_refused(script, tmp_path, options):
    with pytest.raises(ValueError, match="P3O"):
        trainer_of(script, tmp_path, **options)


def test_prompts_are_those_of_the_stages_before(script, tmp_path, monkeypatch):
    """Cut as p3o.py cuts them, and without the special token that a tokenizer adds by itself."""
    tokenizer = copy.deepcopy(script.tokenizer)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    adds = TemplateProcessing(single=f"{end[0]} $A", special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = adds
    assert tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id
    monkeypatch.setattr(script, "tokenizer", tokenizer)
    monkeypatch.setattr(script, "prompt_tokens", 12)
    pairs, _ = script.load_pairs("data")
    expected = {tuple(p3o.tokenize_prompt(pair.prompt, tokenizer, 12)) for pair in pairs[:40]}
    scored, sampled = [], []
    collate = script.collate

    def spy(prompts, *rest):
        scored.extend(map(tuple, prompts))
        return collate(prompts, *rest)

    class Watched(script.P3OTrainer):
        def _compute_loss(self, model, inputs):
            rows = {key: value.flatten(0, 1) for key, value in inputs.items()}
            for ids, mask in zip(rows["prompt_ids"], rows["prompt_mask"], strict=True):
                sampled.append(tuple(ids[mask.bool()].tolist()))
            return super()._compute_loss(model, inputs)

    monkeypatch.setattr(script, "collate", spy)
    trainer_of(script, tmp_path, Watched, max_steps=1).train()
    assert set(sampled) <= expected
    assert set(scored) <= expected
    assert sampled and scored


def test_micro_batches_add_up_to_one_update(script, tmp_path):
    """Four pairs at once, or one by one; SGD, since AdamW does not see a factor."""
    ends = []
    for rows, micro_batches in ((8, 1), (2, 4)):
        options = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=micro_batches)
        options |= dict(steps_per_generation=2 * micro_batches, max_steps=4)
        options |= dict(optim="sgd", learning_rate=0.1, max_grad_norm=1e9)
        trainer = trainer_of(script, tmp_path, **options)
        start = weights(trainer).clone()
        trainer.train()
        ends.append(weights(trainer))
    assert (ends[0] - start).abs().max() > 1e-2
    assert torch.allclose(*ends, atol=1e-4)


def test_what_is_sampled_does_not_depend_on_padding(script, tmp_path):
    """A short prompt, alone and padded beside a longer one: the same next token, positions
    weighing much; and the library's sampling counts them in the same way."""
    model = trainer_of(script, tmp_path).model.eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(20)
    prompts = [[10, 11, 12], [20 + i for i in range(12)]]
    batch = script.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
    greedy = dict(do_sample=False, max_new_tokens=6)
    beside = model(**batch).logits[:, -1]
    continued = model.generate(**batch, **greedy)[:, 12:]
    for logits, row, prompt in zip(beside, continued, prompts, strict=True):
        ids = torch.tensor([prompt])
        alone = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.allclose(model(**alone).logits[0, -1], logits, atol=1e-3)
        expected = model.generate(**alone, **greedy)[0, len(prompt) :]
        assert row[: len(expected)].tolist() == expected.tolist()


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_an_offset_of_the_reward_changes_nothing(script, tmp_path):
    """SGD, since AdamW makes ±lr of what rounding leaves where a gradient is 0."""

    def shifted(prompts, completion_ids, **_):
        scores = script.score(prompts, completion_ids)
        return [score + len(prompt) for score, prompt in zip(scores, prompts, strict=True)]

    options = dict(optim="sgd", learning_rate=1.0)
    ends = []
    for score in (script.score, shifted):
        trainer = trainer_of(script, tmp_path, score=score, **options)
        start = weights(trainer).clone()
        trainer.train()
        ends.append(weights(trainer))
    assert (ends[0] - start).abs().max() > 1e-3
    assert torch.allclose(*ends, atol=1e-5)


def test_stopped_and_resumed_it_ends_in_the_same_weights(script, tmp_path):
    options = dict(max_steps=8, save_strategy="steps", save_steps=4)
    whole = trainer_of(script, tmp_path / "whole", **options)
    whole.train()
    first = trainer_of(script, tmp_path / "part", **options)
    first.add_callback(stop_at(4))
    first.train()
    assert first.state.global_step == 4
    second = trainer_of(script, tmp_path / "part", **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 8
    assert torch.equal(weights(second), weights(whole))
    assert not torch.equal(weights(first), weights(whole))


def stop_at(step: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == step

    return Stop()


def test_an_adapter_learns_and_the_model_below_stays(script, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    trainer = trainer_of(script, tmp_path, peft_config=lora, learning_rate=1e-2, max_steps=8)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in name for name in changed)
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-5), "the reference is the model without its adapter"
    assert abs(kl[-1]) > 1e-4, "and not the model with it"


PRESET = '''
import dataclasses, sys, torch
from trl_p3o import *

class Preset(P3OTrainer):
    """The same two responses to a prompt whoever generates."""
    def _generate(self, prompts):
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        ends = [[10 + i % 2, 20 + row[-3] % 7, tokenizer.eos_token_id] for i, row in enumerate(ids)]
        return ids, ends, tokenizer.batch_decode(ends)

config = dataclasses.replace(
    config, per_device_train_batch_size=int(sys.argv[1]), steps_per_generation=1, max_steps=4,
    generation_batch_size=None, optim="sgd", learning_rate=1.0, save_strategy="no",
)
pairs, _ = load_pairs("data")
prompts = Dataset.from_list([{"prompt": pair.prompt} for pair in pairs[:40]])
trainer = Preset(f"{run}/sft", score, config, prompts, processing_class=tokenizer)
trainer.train()
if trainer.accelerator.is_main_process:
    print(trainer.accelerator.num_processes, "processes")
    model = trainer.accelerator.unwrap_model(trainer.model)
    torch.save([p.detach() for p in model.parameters()], sys.argv[2])
'''


def launch(folder: Path, processes: int, *command: str) -> str:
    """`accelerate launch`, as the README has it, but on the CPU: what it prints."""
    options = ["--num_processes", str(processes), "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:
        options.append("--multi_gpu")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*launcher, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_two_processes_make_the_updates_of_one(folder):
    """Eight pairs an update: all in one process, or four in each of two."""
    (folder / "preset.py").write_text(PRESET)
    ends = []
    for processes, rows in ((1, "16"), (2, "8")):
        end = folder / f"end{processes}.pt"
        printed = launch(folder, processes, "preset.py", rows, str(end))
        assert f"{processes} processes" in printed
        ends.append(torch.cat([p.flatten() for p in torch.load(end)]))
    start = torch.cat(
        [p.detach().flatten() for p in p3o.load(folder / "runs/small/sft").parameters()]
    )
    assert (ends[0] - start).abs().max() > 1e-3
    assert torch.allclose(*ends, atol=1e-6)


def test_the_readmes_script_runs_as_it_stands(folder):
    """But for its length; `accelerate launch` with two processes, and on from a checkpoint."""
    for line in ("max_steps=320", "save_steps=80"):
        assert CODE.count(line) == 1
    ending = '    print(trainer.accelerator.num_processes, "processes")\n'
    made = []
    for steps, resume in ((4, []), (8, ["resume"])):
        short = CODE.replace("max_steps=320", f"max_steps={steps}")
        short = short.replace("save_steps=80", "save_steps=4") + ending
        (folder / "short.py").write_text(short)
        assert "2 processes" in launch(folder, 2, "short.py", *resume)
        first = folder / "runs" / "trl" / "checkpoint-4" / "model.safetensors"
        made.append(first.stat().st_mtime_ns)
    assert made[0] == made[1], "it began again"
    assert (folder / "runs" / "trl" / "checkpoint-8").exists()
    assert (folder / "runs" / "trl" / "model.safetensors").exists()
    assert "accelerate launch --multi_gpu --num_processes 8 trl_p3o.py" in SECTION
