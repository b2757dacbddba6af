"""The command line: a run, its output, resuming, and every kind of bad input."""

import gzip
import io
import json
import re
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import p3o

SCRIPT = str(Path(p3o.__file__).resolve())


def rows_of(out: Path, timings: bool = False) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows if timings else [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(out: Path) -> dict[str, torch.Tensor]:
    kinds = {"sft": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification, "p3o": AutoModelForCausalLM}
    models = {name: kind.from_pretrained(out / name) for name, kind in kinds.items()}
    return {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_leaves_models_metrics_and_a_summary(quick, capsys):
    out = Path(quick[quick.index("--out") + 1])
    assert p3o.main(quick) == 0
    shown = capsys.readouterr().out
    for claim in (
        "reward loss starts at ln 2",
        "ratio = 1 and KL = 0",
        "reference unchanged",
        "reward model unchanged",
    ):
        assert re.search(f"check: {claim}.*: ok", shown)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "sft", "reward", "p3o",
    }  # fmt: skip
    weights(out)
    tokenizer = AutoTokenizer.from_pretrained(out / "p3o")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    summary = json.loads((out / "summary.json").read_text())
    figures = "win_rate win_rate_ci judge reward_accuracy reward_gold_agreement kl score_sft score_policy gold_sft"
    assert {*figures.split(), "gold_policy", "finished_fraction", "seconds", "seed", "config"} <= summary.keys()
    assert set(summary["seconds"]) == {"sft", "reward", "p3o", "eval", "total"}
    assert summary["judge"] == "score"  # not the shipped data, so there is no gold reward
    assert summary["gold_policy"] is None
    assert summary["win_rate_ci"][0] <= summary["win_rate"] <= summary["win_rate_ci"][1]
    rows = rows_of(out)
    assert [row["stage"] for row in rows] == sorted((row["stage"] for row in rows), key=[*p3o.STAGES, "eval"].index)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for key in {*chain.from_iterable(rows)} - {"stage", "step"} | {key.removesuffix("_ci") for key in summary}:
        assert f"`{re.sub('.*/grad_norm', '*/grad_norm', key)}`" in readme, f"README.md does not explain {key}"

    # again: nothing is trained, the figures are the same
    assert max(row["seconds"] for row in rows_of(out, timings=True)) <= summary["seconds"]["total"]
    before, stamps = summary, {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert p3o.main(quick) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert rows_of(out) == rows, "the metrics of the evaluation come twice"
    again = json.loads((out / "summary.json").read_text())
    same = all(again[key] == before[key] for key in before if key != "seconds")
    assert same, "the evaluation of a finished run should give the same figures: is it seeded?"

    # less memory, the same run
    assert p3o.main([*quick, "--micro-batch", "4"]) == 0
    capsys.readouterr()

    # with another configuration: refused, and nothing is touched
    kept = (out / "summary.json").read_bytes()
    assert p3o.main([*quick, "--beta", "0.3"]) == 2
    error = capsys.readouterr().err
    assert "beta" in error and "--out" in error and error.count("\n") == 1
    assert (out / "summary.json").read_bytes() == kept


def test_two_runs_with_one_seed_are_identical_and_another_seed_is_not(quick, tmp_path):
    runs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(runs, ("3", "3", "4"), strict=True):
        assert p3o.main([*quick, "--out", str(out), "--seed", seed]) == 0
    assert rows_of(runs[0]) == rows_of(runs[1])
    assert_same_weights(*runs[:2])
    assert rows_of(runs[0]) != rows_of(runs[2])


def test_killed_in_any_stage_the_same_command_ends_in_the_same_weights(quick, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    quick = [*quick, "--iterations", "45", "--pairs", "4"]
    assert p3o.main([*quick, "--out", str(whole)]) == 0
    command = [sys.executable, SCRIPT, *quick, "--out", str(killed)]
    for stage in ("sft", "reward", "p3o", "checkpoint"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            metrics = killed / "metrics.jsonl"
            begun = metrics.exists() and f'"stage": "{stage}"' in metrics.read_text()
            if begun or (stage == "checkpoint" and (killed / "p3o.checkpoint").exists()):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)  # the other process trains meanwhile
        assert process.wait(timeout=60) == -signal.SIGKILL, f"it was not killed within stage {stage}"
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "p')  # a torn line, as a kill within a write leaves it
    (killed / "p3o.partial").mkdir(exist_ok=True)
    kept = len([row for row in (killed / "metrics.jsonl").read_text().splitlines() if '"stage": "p3o"' in row])
    assert kept >= 20
    assert p3o.main([*quick, "--out", str(killed)]) == 0
    assert_same_weights(whole, killed)
    assert rows_of(whole) == rows_of(killed)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}, "something is left over"


def test_interrupting_keeps_what_was_finished(quick, monkeypatch, capsys):
    out = Path(quick[quick.index("--out") + 1])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(p3o, "train_policy", interrupt)
    assert p3o.main(quick) == 130
    assert "continues" in capsys.readouterr().err
    assert (out / "sft").is_dir() and (out / "reward").is_dir() and not (out / "p3o").exists()


def test_out_of_memory_gives_advice_and_the_run_goes_on_with_less(quick, monkeypatch, capsys):
    plain = p3o.train_policy

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.\nOf what there is, none is left.")

    monkeypatch.setattr(p3o, "train_policy", no_memory)
    assert p3o.main(quick) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("p3o.py: out of memory") and "--micro-batch" in error
    monkeypatch.setattr(p3o, "train_policy", plain)
    assert p3o.main([*quick, "--micro-batch", "4"]) == 0
    assert capsys.readouterr().out.count("finished before") == 2


def test_a_gradient_that_becomes_nan_keeps_the_metrics_and_the_last_checkpoint(quick, monkeypatch, capsys):
    out, plain, updates = Path(quick[quick.index("--out") + 1]), p3o.gradient_step, []

    def gradient_step(optimizer, schedule):
        if optimizer.param_groups[0]["weight_decay"] == 0:  # the policy's
            updates.append(schedule.last_epoch)
            if len(updates) == 30:
                next(iter(optimizer.param_groups[0]["params"])).grad.fill_(float("nan"))
        return plain(optimizer, schedule)

    monkeypatch.setattr(p3o, "gradient_step", gradient_step)
    assert p3o.main([*quick, "--iterations", "40", "--pairs", "4", "--inner-epochs", "1"]) == 1
    assert "update 29: gradient norm nan" in capsys.readouterr().err
    assert [row["step"] for row in rows_of(out) if row["stage"] == "p3o"] == list(range(29))
    iteration, (policy, *_), *_ = torch.load(out / "p3o.checkpoint")
    assert iteration == 20
    assert all(weight.isfinite().all() for weight in policy.values())


def test_chat_answers_what_is_typed_by_both_models_of_a_finished_run(quick, monkeypatch, capsys):
    assert p3o.main([*quick, "--chat"]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert p3o.main(quick) == 0
    out = Path(quick[quick.index("--out") + 1])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("My bike is slow.\n\n  I burned my bread. \n"))
    assert p3o.main([*quick, "--chat"]) == 0
    shown = capsys.readouterr().out
    found = re.findall(r"^Human: (.*)$|^  (SFT|P3O) [+-]\d+\.\d\d  ", shown, re.MULTILINE)
    first, second = ("My bike is slow.", ""), ("I burned my bread.", "")
    assert found == [first, ("", "SFT"), ("", "P3O"), second, ("", "SFT"), ("", "P3O")]
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_asking_samples_from_the_right_model_and_scores_the_whole_answer(quick, monkeypatch, capsys):
    """With a policy that ends at once: its answer is EOS alone, its score that of the prompt and EOS."""
    assert p3o.main(quick) == 0
    out, plain = quick[quick.index("--out") + 1], p3o.load
    cfg = p3o.parse_config([*quick, "--prompt-tokens", "5"])
    tokenizer = AutoTokenizer.from_pretrained(Path(out) / "p3o")

    def load(cfg, name):
        model = plain(cfg, name)
        if name == "p3o":
            with torch.no_grad():
                model.transformer.ln_f.bias += 300 * model.lm_head.weight[tokenizer.eos_token_id]
        return model

    monkeypatch.setattr(p3o, "load", load)
    capsys.readouterr()
    prompt = "\n\nHuman: My bike is slow. Any advice?\n\nAssistant:"
    p3o.ask(cfg, "Test", [prompt])
    shown = capsys.readouterr().out
    (found,) = re.findall(r"^  P3O ([+-]\d+\.\d\d)\s*\Z", shown, re.MULTILINE)
    model = plain(cfg, "reward")
    end = tokenizer(prompt)["input_ids"][-5:]
    score = p3o.reward_scores(model, *p3o.collate([end], [[tokenizer.eos_token_id]], model)).item()
    assert float(found) == pytest.approx(score, abs=0.006)
    assert re.search(r"^  SFT [+-]\d+\.\d\d  \S", shown, re.MULTILINE)


def test_the_readmes_way_of_using_a_run_works_and_scores_as_the_script_does(quick, tmp_path, monkeypatch, capsys):
    assert p3o.main([*quick, "--out", str(tmp_path / "runs" / "small")]) == 0
    capsys.readouterr()
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    *_, shown = capsys.readouterr().out.splitlines()
    tokenizer = names["reward"].tokenizer
    prompt, answer = (tokenizer(text)["input_ids"] for text in (names["prompt"], names["answer"]["generated_text"]))
    model = p3o.load(p3o.Config(out="runs/small"), "reward")
    score = p3o.reward_scores(model, *p3o.collate([prompt], [[*answer, tokenizer.eos_token_id]], model)).item()
    assert eval(shown)[0]["score"] == pytest.approx(score, abs=1e-4)


def test_a_loss_that_becomes_nan_stops_with_status_1_and_keeps_the_metrics(quick, capsys):
    out = Path(quick[quick.index("--out") + 1])
    assert p3o.main([*quick, "--sft-lr", "1e30"]) == 1
    error = capsys.readouterr().err
    assert "must be finite" in error.splitlines()[-1]
    assert rows_of(out)
    assert not (out / "sft").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "-0.1"], "--beta must be"),
        (["--beta", "nan"], "--beta must be"),
        (["--beta", "x"], "--beta"),
        (["--clip", "both"], "--clip: invalid choice: 'both' (choose from"),
        (["--pairs", "0"], "--pairs must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--nonsense"], "--nonsense"),
        (["--data", "nowhere/rows.jsonl"], "--data nowhere/rows.jsonl: no such file"),
        (["--data", "./nowhere"], "--data ./nowhere: no such file"),
        (["--model", "./nowhere"], "./nowhere"),
    ],
)
def test_a_bad_option_gives_one_line_and_status_2_and_leaves_no_model(options, message, quick, capsys):
    out = Path(quick[quick.index("--out") + 1])
    assert p3o.main([*quick, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("p3o.py: ") and captured.err.count("\n") == 1
    assert not list(out.glob("*/model.safetensors"))


GOOD_PROMPT = "\n\nHuman: Hi\n\nAssistant:"
GOOD = json.dumps({"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"})
SAME = json.dumps({"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: A"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{GOOD}\n{{oops\n".encode(), "JSON parse error"),
        (f"{GOOD}\n".encode() + b'{"chosen": "\xff"}\n', "utf-8"),
        (f'{GOOD}\n{{"chosen": "x"}}\n'.encode(), "row 2: chosen, rejected and prompt, if any, must be text"),
        (b'{"chosen": [{"role": "user", "content": "x"}], "rejected": []}\n', "row 1: chosen, rejected and prompt"),
        (b'{"chosen": [{"role": "user", "content": "x"}], "rejected": []}\n', "apply_chat_template"),
        (b"", "rows.jsonl"),
        (f"{SAME}\n{SAME}\n".encode(), "too few usable rows"),
    ],
)
def test_bad_data_gives_one_line_and_status_2_and_writes_nothing(content, message, quick, tmp_path, capsys):
    path, out = tmp_path / "rows.jsonl", Path(quick[quick.index("--out") + 1])
    path.write_bytes(content)
    assert p3o.main([*quick, "--data", str(path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("changed", ("train", "test"))
def test_a_run_does_not_continue_on_other_data(changed, quick, rows, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name, part in (("train", rows[:100]), ("test", rows[100:120])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    assert p3o.main([*quick, "--data", str(data)]) == 0
    with (data / f"{changed}.jsonl").open("a") as file:
        file.write(json.dumps(rows[130]) + "\n")
    assert p3o.main([*quick, "--data", str(data)]) == 2
    assert "data_crc" in capsys.readouterr().err


def test_the_default_path_takes_a_gpt2_directory_and_rough_gzipped_dialogues(tiny, rows, tmp_path, capsys):
    """What the default run loads, in small: GPT-2 with a tokenizer that has no pad token, and every kind of bad row."""
    model, data, out = (tmp_path / name for name in ("gpt2", "hh", "out"))
    tiny[0].save_pretrained(model)
    tiny[2].save_pretrained(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    long = "\n\nHuman: " + "I burned my bread. " * 40 + "\n\nAssistant: Oh." + GOOD_PROMPT
    rough = [
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Ho\n\nAssistant: A"},
        {"chosen": f"{GOOD_PROMPT} A\n\nHuman: And?\n\nAssistant: B", "rejected": f"{GOOD_PROMPT} B"},
        {"chosen": f"{GOOD_PROMPT} A", "rejected": f"{GOOD_PROMPT} "},
        {"chosen": f"{GOOD_PROMPT} A", "rejected": f"{GOOD_PROMPT} A"},
        {"chosen": f"{GOOD_PROMPT} {'So. ' * 40}A", "rejected": f"{GOOD_PROMPT} {'So. ' * 40}B"},
        {"chosen": f"{long} A", "rejected": f"{long} B"},
    ]
    data.mkdir()
    for name, part in (("train", rows[:100] + rough), ("test", rows[100:140])):
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in part))
    sizes = QUICK | dict(prompt_tokens=32, response_tokens=40)
    options = [word for key, value in sizes.items() for word in ("--" + key.replace("_", "-"), str(value))]
    assert p3o.main(["--model", str(model), "--data", str(data), "--out", str(out), *options]) == 0
    shown = capsys.readouterr().out
    for reason in ("no shared prompt", "a new human turn in a response", "empty response", "equal responses"):
        assert f"1 of 106 rows dropped: {reason}" in shown
    assert "1 of 102 pairs dropped: equal after 40 tokens" in shown
    assert "102 training and 40 held-out pairs" in shown
    tokenizer = AutoTokenizer.from_pretrained(out / "p3o")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id < len(weights(out)["p3o.transformer.wte.weight"])


@pytest.mark.parametrize("family", ("llama", "gpt_neox"))
def test_a_model_with_rotary_positions_goes_through_every_stage(family, tiny, quick, tmp_path, capsys):
    """Other names for body and head, no table of positions, in Llama's case more queries than keys."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    if family == "llama":
        sizes["num_key_value_heads"] = 2
    config = AutoConfig.for_model(family, vocab_size=len(tiny[2]), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    tiny[2].save_pretrained(tmp_path / family)
    assert p3o.main([*quick, "--model", str(tmp_path / family)]) == 0
    assert "ratio = 1 and KL = 0 before the first update: ok" in capsys.readouterr().out
    trained = weights(Path(quick[quick.index("--out") + 1]))
    changed = [not torch.equal(value, trained["sft" + key[3:]]) for key, value in trained.items() if key[:3] == "p3o"]
    assert all(changed), "a weight that P3O never moved"


def test_a_directory_that_no_run_made_is_left_alone(quick, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert p3o.main([*quick, "--out", str(tmp_path / "mine")]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_help_fits_one_screen_and_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        p3o.parse_config(["-h"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 40
    for name in p3o.Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in shown


def test_the_script_itself_exits_with_the_status(quick):
    result = subprocess.run(
        [sys.executable, SCRIPT, *quick, "--beta", "-1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == "p3o.py: --beta must be a finite number of at least 0, not -1.0\n"


def test_a_run_that_finished_no_stage_may_be_restarted_with_other_options(quick, capsys):
    assert p3o.main([*quick, "--sft-lr", "1e30"]) == 1
    assert p3o.main(quick) == 0
    assert "win_rate" in capsys.readouterr().out
