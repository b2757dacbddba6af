"""A run that stops anywhere: the same command resumes and ends in the same weights and metrics."""

import inspect
import json
import os
import shutil
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from toys import metrics_of, same_weights, status, weights_of, write_rows

import p3o


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def undone(finished, out):
    """Makes the finished run one that was stopped before a stage; returns its options."""

    def undo(first: str) -> list[str]:
        for stage in list(p3o.STAGES)[list(p3o.STAGES).index(first) :]:
            shutil.rmtree(out / stage)
            (out / f"{stage}.jsonl").unlink()
        (out / "summary.json").unlink()
        return finished

    return undo


# ---- Writing -------------------------------------------------------------------------------
def test_what_is_written_appears_whole_or_not_at_all(tmp_path):
    """The folder of a stage means that the stage is finished."""
    with pytest.raises(OSError, match="disk full"), p3o.appears_whole(tmp_path / "sft") as folder:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")
    assert not (tmp_path / "sft").exists()
    with p3o.appears_whole(tmp_path / "sft") as folder:
        folder.mkdir()
    assert not any((tmp_path / "sft").iterdir()), "the folder holds what was left half-written"


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
    def written() -> list[list[float]]:
        return [[row["step"], row["kl"]] for row in metrics_of(tmp_path, "p3o")]

    log = p3o.log_to(tmp_path / "p3o.jsonl")
    for step in range(5):
        log(step, {"kl": step})
        assert len(written()) == step + 1, "a step's metrics should be there at once"
    log = p3o.log_to(tmp_path / "p3o.jsonl")
    assert len(written()) == 5, "nothing is replaced before there is something new"
    log(3, {"kl": 30})
    assert written() == [[0, 0], [1, 1], [2, 2], [3, 30]]
    log(4, {"kl": 40})
    assert written() == [[0, 0], [1, 1], [2, 2], [3, 30], [4, 40]]


def test_the_seconds_of_all_steps_add_up_also_over_a_run_that_was_stopped(tmp_path, monkeypatch):
    """Each step's seconds begin at the end of the step before, or at the start of the log."""
    now = 0.0
    monkeypatch.setattr(p3o.time, "perf_counter", lambda: now)
    path = tmp_path / "sft.jsonl"
    for first in (0, 2):
        now += 100  # while nothing runs
        log = p3o.log_to(path)
        for step in (first, first + 1):
            now += step + 1
            log(step, {})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["seconds"] for row in rows] == [1, 2, 3, 4]


# ---- Stopped -------------------------------------------------------------------------------
def test_a_finished_run_trains_nothing_and_gives_the_same_figures_again(finished, out):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert status(finished) == 0
    assert before.pop(out / "config.json") != (out / "config.json").read_bytes()  # another --out
    assert before.pop(out / "summary.json") == (out / "summary.json").read_bytes(), (
        "other figures: is the evaluation seeded?"
    )
    assert before == {path: path.read_bytes() for path in before}
    assert times == {path: path.stat().st_mtime_ns for path in times}, "a model was written again"


# where a run is killed: within which call of gradient_step, or before which appearance of a file
# or folder. Stages 1 and 2 have three updates, stage 3 has three iterations of four updates
MOMENTS = {
    "in stage 1": ("gradient_step", 2),
    "before SFT's folder appears": ("sft", 1),
    "in stage 2": ("gradient_step", 3 + 2),
    "in stage 3, after its first checkpoint": ("gradient_step", 3 + 4 + 2),
    "before its second checkpoint appears": ("p3o.checkpoint", 2),
    "after its second checkpoint": ("gradient_step", 4 + 4 + 2),
    "before the policy's folder appears": ("p3o", 1),
}


def kill_at(call: str, count: int) -> None:
    """Make this process kill itself at a moment."""
    calls = []

    def count_call(plain, *args):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args)

    step, replace = p3o.gradient_step, Path.replace
    if call == "gradient_step":
        p3o.gradient_step = partial(count_call, step)
    else:
        Path.replace = lambda scratch, path: (
            count_call(replace, scratch, path) if path.name == call else replace(scratch, path)
        )


def killed(options: list[str], call: str, count: int) -> bool:
    """Run the command in a process that kills itself at a moment; return whether it did."""
    child = os.fork()
    if child == 0:
        try:
            kill_at(call, count)
            status(options)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # without the clean-up of the tests' own process
    _, ended = os.waitpid(child, 0)
    return os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL


@pytest.mark.resuming
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch does not survive a fork")
def test_killed_in_any_stage_the_same_command_ends_in_the_same_weights(run, quick, out):
    for where, moment in MOMENTS.items():
        assert killed(quick, *moment), f"the run was not killed {where}"
    assert status(quick) == 0
    weights = weights_of(run.out)
    for key, value in weights_of(out).items():
        assert torch.equal(value, weights[key]), f"{key}: other weights"
    for stage in p3o.STAGES:
        assert metrics_of(run.out, stage) == metrics_of(out, stage), f"{stage}: other metrics"
    names = [{path.name for path in folder.iterdir()} for folder in (run.out, out)]
    assert names[0] == names[1], "something is left over"
    summaries = [(folder / "summary.json").read_text() for folder in (run.out, out)]
    assert summaries[0] == summaries[1]


def test_interrupting_keeps_what_was_finished(undone, out, monkeypatch, capsys):
    options = undone("reward")
    monkeypatch.setattr(p3o, "train_policy", interrupt)
    assert status(options) == 1
    assert capsys.readouterr().err.endswith("p3o.py: interrupted; the same command resumes\n")
    assert (out / "sft").is_dir()
    assert (out / "reward").is_dir()
    assert not (out / "p3o").exists()


def test_out_of_memory_gives_advice_and_the_run_goes_on_with_less(undone, out, monkeypatch, capsys):
    options = undone("p3o")

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.\nNone is left.")

    with monkeypatch.context() as patch:
        patch.setattr(p3o, "train_policy", no_memory)
        assert status(options) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("p3o.py: out of memory")
    assert "--micro-batch" in line
    assert status([*options, "--micro-batch", "2"]) == 0


def test_the_gain_is_set_on_samples_of_the_sft_model_for_a_few_prompts(undone, out, monkeypatch):
    """Not on those of the base model, which a resumed run loads, too."""
    options = undone("reward")
    monkeypatch.setattr(p3o, "GAIN_PROMPTS", 10)
    plain = p3o.set_gain
    given = {}

    def watched(*args):
        given.update(inspect.signature(plain).bind(*args).arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(p3o, "set_gain", watched)
    assert status(options) == 1
    assert same_weights(given["policy"], p3o.load(out / "sft"))
    assert len(given["prompts"]) == 10


@pytest.mark.resuming
def test_the_checkpoint_is_kept_until_the_policy_is_saved(stopped, out):
    """If a run stops while it saves the policy, stage 3 should not start again."""
    assert (out / "p3o.checkpoint").exists()
    assert status(stopped) == 0
    assert not (out / "p3o.checkpoint").exists()


def test_a_full_disk_gives_one_line(undone, monkeypatch, capsys):
    options = undone("p3o")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(p3o, "train_policy", full)
    assert status(options) == 1
    assert capsys.readouterr().err.endswith("p3o.py: No space left on device\n")


@pytest.mark.resuming
def test_a_truncated_checkpoint_gives_one_line_and_is_kept(stopped, out, capsys):
    checkpoint = out / "p3o.checkpoint"
    part = checkpoint.read_bytes()[:20_000]
    checkpoint.write_bytes(part)
    assert status(stopped) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"p3o.py: {checkpoint} is broken; delete it to restart stage 3"
    assert checkpoint.read_bytes() == part


@pytest.mark.resuming
def test_a_gradient_that_becomes_nan_keeps_the_metrics_and_the_last_checkpoint(
    undone, out, monkeypatch, capsys
):
    """The run stops before the update, and a lower rate resumes from the checkpoint."""
    options = undone("p3o")
    plain = p3o.gradient_step
    updates = []

    def gradient_step(model, optimizer, lr):
        updates.append(lr)
        if len(updates) == 4 * 2 + 3:  # of four in each of three iterations
            next(model.parameters()).grad.fill_(float("nan"))
        return plain(model, optimizer, lr)

    monkeypatch.setattr(p3o, "gradient_step", gradient_step)
    assert status(options) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "p3o.py: gradient norm nan; resume with a lower learning rate"
    assert [row["step"] for row in metrics_of(out, "p3o")] == [0, 1]
    iteration, policy, *_ = torch.load(out / "p3o.checkpoint")
    assert iteration == 2
    assert all(weight.isfinite().all() for weight in policy.values())

    monkeypatch.setattr(p3o, "gradient_step", plain)
    assert status([*options, "--p3o-lr", "1e-3"]) == 0
    assert json.loads((out / "config.json").read_text())["p3o_lr"] == 1e-3
    assert len(metrics_of(out, "p3o")) == 3


@pytest.mark.resuming
def test_a_lower_rate_is_used_from_the_checkpoint_on(stopped, monkeypatch):
    """The optimizer was saved with another one."""
    plain = p3o.gradient_step
    rates = []

    def gradient_step(model, optimizer, lr):
        norm = plain(model, optimizer, lr)
        rates.append(optimizer.param_groups[0]["lr"])
        return norm

    monkeypatch.setattr(p3o, "gradient_step", gradient_step)
    assert status([*stopped, "--p3o-lr", "1e-5"]) == 0
    assert rates[0] == pytest.approx(p3o.learning_rate(1e-5, 2, 3))


@pytest.mark.parametrize(
    ("stage", "option", "later"),
    (("sft", "--sft-lr", "train_reward"), ("reward", "--reward-lr", "train_policy")),
)
def test_a_loss_that_diverges_stops_and_a_lower_rate_goes_on(
    stage, option, later, undone, out, monkeypatch, capsys
):
    options = undone(stage)
    assert status([*options, option, "1e30"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert "gradient norm" in line or "--reward-lr" in line
    assert not (out / stage).exists()
    assert (out / f"{stage}.jsonl").exists()
    monkeypatch.setattr(p3o, later, interrupt)
    assert status([*options, option, "1e-3"]) == 1
    assert (out / stage).exists()


# ---- Another run's directory ---------------------------------------------------------------
@pytest.mark.parametrize(
    "option",
    (
        ("--iterations", "4"),
        ("--p3o-lr", "0.1"),
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


@pytest.mark.parametrize("side", (0, 1), ids=("training", "held out"))
def test_a_run_does_not_continue_on_other_data(side, finished, out, rows, tmp_path, capsys):
    """One more pair on either side is enough."""
    data = write_rows(tmp_path / "pairs.jsonl", rows[:200])
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"data": str(data)}))
    options = [*finished, "--data", str(data)]
    assert status(options) == 0, "the same rows in another file"
    sizes = [len(part) for part in p3o.load_pairs(str(data))]
    for row in rows[200:]:
        write_rows(data, [*rows[:200], row])
        if len(p3o.load_pairs(str(data))[side]) > sizes[side]:
            break
    assert status(options) == 1
    assert "was made with other data_crc; change --out" in capsys.readouterr().err


def test_options_that_change_no_training_may_change(finished):
    assert status([*finished, "--micro-batch", "4", "--eval-prompts", "10"]) == 0


def test_the_rates_of_stages_that_are_not_finished_may_change(undone, out, monkeypatch, capsys):
    """Other options may not, even if no stage is finished."""
    options = undone("sft")
    assert status([*options, "--beta", "0.3"]) == 1
    assert "other beta" in capsys.readouterr().err
    monkeypatch.setattr(p3o, "train_sft", interrupt)
    assert status([*options, "--sft-lr", "0.1", "--reward-lr", "0.2", "--p3o-lr", "0.3"]) == 1
    assert "interrupted" in capsys.readouterr().err
