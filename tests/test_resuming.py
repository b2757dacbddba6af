"""What one stage hands to the next, what the run's directory promises: stopped anywhere, the same
command ends in the same weights and metrics."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toys import metrics_of, same_weights, status, weights_of
from transformers import AutoModelForSequenceClassification

import p3o

SCRIPT = str(Path(p3o.__file__).resolve())


def lengthened(quick: list[str]) -> list[str]:
    """A run with two checkpoints in stage 3."""
    return [*quick, "--iterations", "45", "--pairs", "4"]


def assert_same_run(out: Path, other: Path) -> None:
    weights = weights_of(out)
    for key, value in weights_of(other).items():
        assert torch.equal(value, weights[key]), f"{key}: other weights"
    for stage in p3o.STAGES:
        assert metrics_of(out, stage) == metrics_of(other, stage), f"{stage}: other metrics"
    names = [{path.name for path in folder.iterdir()} for folder in (out, other)]
    assert names[0] == names[1], "something is left over"
    summaries = [(folder / "summary.json").read_text() for folder in (out, other)]
    assert summaries[0] == summaries[1]


# ---- Writing -------------------------------------------------------------------------------
def test_what_is_written_appears_whole_or_not_at_all(tmp_path):
    """A stage's folder is its promise that the stage is done."""
    with pytest.raises(OSError, match="disk full"), p3o.appears_whole(tmp_path / "sft") as folder:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")
    assert not (tmp_path / "sft").exists()
    with p3o.appears_whole(tmp_path / "sft") as folder:
        folder.mkdir()
    assert not any((tmp_path / "sft").iterdir()), "what was left half-written is in the folder"


@pytest.mark.parametrize("name", ("sft", "summary.json"))
def test_what_a_killed_write_left_is_no_obstacle(name, tmp_path):
    (tmp_path / f"{name}.partial").mkdir()
    (tmp_path / f"{name}.partial" / "old").write_text("old")
    with p3o.appears_whole(tmp_path / name) as scratch:
        scratch.write_text("new")
    assert (tmp_path / name).read_text() == "new"


def test_a_failed_self_check_stops_the_run():
    with pytest.raises(AssertionError, match="ratio = 1"):
        p3o.self_check("ratio = 1", False)


# ---- Metrics -------------------------------------------------------------------------------
def test_a_step_done_again_replaces_its_metrics_and_those_after_it(tmp_path):
    path = tmp_path / "p3o.jsonl"
    log = p3o.Log(path)
    for step in range(5):
        log(step, {"objective/kl": step})
    log = p3o.Log(path)
    log(3, {"objective/kl": 30})
    assert [row["objective/kl"] for row in metrics_of(tmp_path, "p3o")] == [0, 1, 2, 30]
    log(0, {"objective/kl": 7})
    assert [row["step"] for row in metrics_of(tmp_path, "p3o")] == [0]


def test_the_seconds_of_all_steps_add_up_also_over_a_run_that_was_stopped(tmp_path):
    path = tmp_path / "sft.jsonl"
    began = time.perf_counter()
    for first in (0, 2):
        log = p3o.Log(path)
        for step in (first, first + 1):
            time.sleep(0.02)
            log(step, {})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    total = sum(row["seconds"] for row in rows)
    assert 0.08 <= total <= time.perf_counter() - began
    assert min(row["seconds"] for row in rows) >= 0.02


# ---- From stage to stage -------------------------------------------------------------------
def test_every_stage_starts_from_weights_in_float32(tiny, fresh, tmp_path):
    """AdamW's steps at a learning rate of 2e-6 would vanish in bf16's three digits."""
    fresh(tiny[0]).to(torch.bfloat16).save_pretrained(tmp_path)
    assert p3o.load(tmp_path).dtype == torch.float32
    scorer = p3o.load(tmp_path, AutoModelForSequenceClassification, num_labels=1)
    assert scorer.dtype == torch.float32
    assert not scorer.training


def test_the_reward_model_is_saved_with_its_gain(quick, out, monkeypatch):
    """Else β would have another unit in a resumed run, and for whoever loads the folder."""
    plain = p3o.set_gain
    heads = []

    def watched(model, policy, prompts, cfg):
        gain = plain(model, policy, prompts, cfg)
        heads.append(model.score.weight.detach().clone())
        return gain

    monkeypatch.setattr(p3o, "set_gain", watched)
    assert status(quick) == 0
    saved = AutoModelForSequenceClassification.from_pretrained(out / "reward")
    assert torch.equal(saved.score.weight, heads[0])


def test_the_gain_is_set_on_samples_of_the_sft_model_for_a_few_prompts(quick, out, monkeypatch):
    """Not of the base model, which a resumed run holds as well, nor of prompts without end."""
    monkeypatch.setattr(p3o, "GAIN_PROMPTS", 10)
    plain = p3o.set_gain
    given = []

    def watched(model, policy, prompts, cfg):
        given.extend([policy, prompts])
        return plain(model, policy, prompts, cfg)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(p3o, "train_reward", interrupt)
        assert status(quick) == 1
    monkeypatch.setattr(p3o, "set_gain", watched)
    assert status(quick) == 0
    policy, prompts = given
    assert same_weights(policy, p3o.load(out / "sft"))
    assert len(prompts) == 10


def test_the_reward_model_begins_from_the_sft_model(quick, out, monkeypatch):
    given = []
    monkeypatch.setattr(p3o, "train_reward", lambda model, *_: given.append(model))
    monkeypatch.setattr(p3o, "set_gain", lambda *_: 1.0)
    assert status(quick) == 0
    body = p3o.load(out / "sft").base_model
    assert same_weights(given[0].base_model, body)


def test_training_sees_no_held_out_pair_and_the_evaluation_nothing_else(quick, monkeypatch):
    """Nor does stage 3 a held-out prompt."""
    seen = {}
    for name in ("train_sft", "train_reward", "evaluate"):
        plain = getattr(p3o, name)

        def watched(*args, name=name, plain=plain):
            for arg in args:
                if isinstance(arg, list) and isinstance(arg[0], p3o.Example):
                    seen[name] = arg
            return plain(*args)

        monkeypatch.setattr(p3o, name, watched)

    plain_policy = p3o.train_policy

    def watched_policy(policy, reference, score, prompts, *rest, **options):
        seen["train_policy"] = prompts
        return plain_policy(policy, reference, score, prompts, *rest, **options)

    monkeypatch.setattr(p3o, "train_policy", watched_policy)
    assert status(quick) == 0
    assert seen["train_sft"] == seen["train_reward"]
    assert seen["train_policy"] == [example.prompt for example in seen["train_sft"]]
    trained_on = {example.text for example in seen["train_sft"]}
    assert not trained_on & {example.text for example in seen["evaluate"]}
    assert len(seen["train_sft"]) + len(seen["evaluate"]) == 200


def test_what_is_evaluated_is_what_was_saved(quick, out, monkeypatch):
    """SFT, the reward model and the policy, each in its place."""
    plain = p3o.evaluate
    given = []

    def watched(cfg, *args):
        given.extend(args[:3])
        return plain(cfg, *args)

    monkeypatch.setattr(p3o, "evaluate", watched)
    assert status(quick) == 0
    saved = weights_of(out)
    for stage, model in zip(("sft", "reward", "p3o"), given, strict=True):
        for key, value in model.state_dict().items():
            assert torch.equal(value, saved[f"{stage}.{key}"]), f"{stage}: {key}"


def test_every_stage_draws_by_the_seed(quick, monkeypatch):
    """And none what another did."""
    drawn = {}
    for name in ("train_sft", "train_reward", "train_policy", "evaluate"):
        plain = getattr(p3o, name)

        def watched(*args, name=name, plain=plain, **options):
            drawn.setdefault(name, []).append(torch.initial_seed())
            return plain(*args, **options)

        monkeypatch.setattr(p3o, name, watched)
    for seed in ("0", "1"):
        assert (
            status([*quick, "--seed", seed, "--out", quick[quick.index("--out") + 1] + seed]) == 0
        )
    seeds = [seed for pair in drawn.values() for seed in pair]
    assert len(set(seeds)) == len(seeds) == 8


# ---- Stopped -------------------------------------------------------------------------------
def test_a_finished_run_trains_nothing_and_gives_the_same_figures_again(finished, out, capsys):
    before = (out / "summary.json").read_bytes()
    models = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    metrics = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    assert status(finished) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    assert models == {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert metrics == {path: path.read_bytes() for path in out.glob("*.jsonl")}
    assert (out / "summary.json").read_bytes() == before, "is the evaluation seeded?"


def killed_in(stage: str, command: list[str], out: Path) -> None:
    """Start the command; kill it once the stage has begun, "checkpoint" once there is one."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sign = out / ("p3o.checkpoint" if stage == "checkpoint" else f"{stage}.jsonl")
    enough = 25 if stage == "checkpoint" else 1  # lines of metrics
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        metrics = out / ("p3o.jsonl" if stage == "checkpoint" else f"{stage}.jsonl")
        if sign.exists() and metrics.exists() and metrics.read_text().count("\n") >= enough:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)  # the other process trains meanwhile
    assert process.wait(timeout=60) == -signal.SIGKILL, f"it was not killed within {stage}"


@pytest.mark.resuming
def test_killed_in_any_stage_the_same_command_ends_in_the_same_weights(quick, tmp_path):
    options = lengthened(quick)
    whole = tmp_path / "whole"
    assert status([*options, "--out", str(whole)]) == 0
    killed = tmp_path / "killed"
    for stage in ("sft", "reward", "p3o", "checkpoint"):
        killed_in(stage, [sys.executable, SCRIPT, *options, "--out", str(killed)], killed)
    (killed / "p3o.partial").mkdir(exist_ok=True)  # as a kill within a write leaves it
    assert len(metrics_of(killed, "p3o")) >= 20
    assert status([*options, "--out", str(killed)]) == 0
    assert_same_run(whole, killed)


def test_interrupting_keeps_what_was_finished(quick, out, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(p3o, "train_policy", interrupt)
    assert status(quick) == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert (out / "sft").is_dir()
    assert (out / "reward").is_dir()
    assert not (out / "p3o").exists()


def test_out_of_memory_gives_advice_and_the_run_goes_on_with_less(quick, monkeypatch, capsys):
    plain = p3o.train_policy

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.\nNone is left.")

    monkeypatch.setattr(p3o, "train_policy", no_memory)
    assert status(quick) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("p3o.py: out of memory")
    assert "--micro-batch" in line
    monkeypatch.setattr(p3o, "train_policy", plain)
    assert status([*quick, "--micro-batch", "4"]) == 0
    assert capsys.readouterr().out.count("finished before") == 2


@pytest.fixture
def stopped(quick, out, monkeypatch) -> list[str]:
    """The options of a run that stopped while it saved the policy, for want of room on the disk."""
    plain = p3o.save

    def full(folder, *rest):
        if folder.name == "p3o":
            raise OSError("disk full")
        plain(folder, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(p3o, "save", full)
        assert status(lengthened(quick)) == 1
    return lengthened(quick)


@pytest.mark.resuming
def test_the_checkpoint_is_kept_until_the_policy_is_saved(stopped, out):
    """Killed or out of disk while it saves, stage 3 must not begin anew."""
    assert (out / "p3o.checkpoint").exists()
    assert status(stopped) == 0
    assert not (out / "p3o.checkpoint").exists()


@pytest.mark.resuming
def test_a_truncated_checkpoint_gives_one_line_and_is_kept(stopped, out, capsys):
    checkpoint = out / "p3o.checkpoint"
    part = checkpoint.read_bytes()[:20_000]
    checkpoint.write_bytes(part)
    capsys.readouterr()
    assert status(stopped) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"p3o.py: {checkpoint} is broken; delete it to begin stage 3 again"
    assert checkpoint.read_bytes() == part


@pytest.mark.resuming
def test_a_gradient_that_becomes_nan_keeps_the_metrics_and_the_last_checkpoint(
    quick, out, monkeypatch, capsys
):
    plain = p3o.gradient_step
    updates = []

    def gradient_step(model, optimizer, lr):
        if optimizer.param_groups[0]["weight_decay"] == 0:  # the policy's
            updates.append(lr)
            if len(updates) == 30:
                next(model.parameters()).grad.fill_(float("nan"))
        return plain(model, optimizer, lr)

    monkeypatch.setattr(p3o, "gradient_step", gradient_step)
    options = [*quick, "--iterations", "40", "--pairs", "4", "--inner-epochs", "1"]
    assert status(options) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "p3o.py: gradient norm nan; go on with a lower learning rate"
    assert [row["step"] for row in metrics_of(out, "p3o")] == list(range(29))
    state = torch.load(out / "p3o.checkpoint")
    assert state["iteration"] == 20
    assert all(weight.isfinite().all() for weight in state["policy"].values())

    # go on from the checkpoint, as it says
    monkeypatch.setattr(p3o, "gradient_step", plain)
    assert status([*options, "--lr", "1e-3"]) == 0
    assert json.loads((out / "config.json").read_text())["lr"] == 1e-3
    assert len(metrics_of(out, "p3o")) == 40


@pytest.mark.resuming
def test_a_lower_rate_is_used_from_the_checkpoint_on(stopped, monkeypatch):
    """Not the one that the optimizer was saved with."""
    plain = p3o.gradient_step
    rates = []

    def gradient_step(model, optimizer, lr):
        norm = plain(model, optimizer, lr)
        rates.append(optimizer.param_groups[0]["lr"])
        return norm

    monkeypatch.setattr(p3o, "gradient_step", gradient_step)
    assert status([*stopped, "--lr", "1e-5"]) == 0
    assert rates[0] == pytest.approx(p3o.learning_rate(1e-5, 40, 45))


@pytest.mark.parametrize(("stage", "option"), (("sft", "--sft-lr"), ("reward", "--reward-lr")))
def test_a_loss_that_diverges_stops_and_a_lower_rate_goes_on(stage, option, quick, out, capsys):
    assert status([*quick, option, "1e30"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert "gradient norm" in line or "--reward-lr" in line
    assert not (out / stage).exists()
    assert (out / f"{stage}.jsonl").exists()
    assert status([*quick, option, "1e-3"]) == 0


# ---- Another run's directory ---------------------------------------------------------------
@pytest.mark.parametrize(
    "option",
    (
        ("--iterations", "3"),
        ("--lr", "0.1"),
        ("--sft-lr", "0.1"),
        ("--seed", "5"),
        ("--response-tokens", "9"),
        ("--beta", "0.3"),
        ("--clip", "separate"),
    ),
    ids=" ".join,
)
def test_what_changes_the_training_is_compared_when_a_run_goes_on(option, finished, out, capsys):
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    assert status([*finished, *option]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    name = option[0].removeprefix("--").replace("-", "_")
    assert line == f"p3o.py: {out} was made with other {name}; change --out"
    assert before == {path: path.read_bytes() for path in out.rglob("*.json*")}


@pytest.mark.parametrize("changed", ("train", "test"))
def test_a_run_does_not_continue_on_other_data(changed, quick, rows, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name, part in (("train", rows[:100]), ("test", rows[100:120])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    assert status([*quick, "--data", str(data)]) == 0
    with (data / f"{changed}.jsonl").open("a") as file:
        file.write(json.dumps(rows[130]) + "\n")
    assert status([*quick, "--data", str(data)]) == 1
    assert "other data_crc" in capsys.readouterr().err


def test_options_that_change_no_training_may_change(finished):
    assert status([*finished, "--micro-batch", "4", "--eval-prompts", "10"]) == 0


def test_a_run_that_finished_no_stage_may_be_restarted_with_other_options(quick, capsys):
    assert status([*quick, "--sft-lr", "1e30"]) == 1
    assert status([*quick, "--beta", "0.3", "--batch", "32"]) == 0
    assert "win_rate" in capsys.readouterr().out
