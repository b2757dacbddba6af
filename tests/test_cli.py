"""The command line: a run and what it leaves, and every kind of bad input."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT
from toys import dialogue, metrics_of, status, weights_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import p3o

SCRIPT = str(Path(p3o.__file__).resolve())


def last_line(capsys) -> str:
    """The message that a failed run ends with; nothing but progress stands above it."""
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("p3o.py: ")
    return line


# ---- A run ---------------------------------------------------------------------------------
def test_a_run_leaves_models_metrics_and_a_summary(quick, out, capsys):
    assert status(quick) == 0
    shown = capsys.readouterr().out
    assert "check: reward loss starts at ln 2: ok" in shown
    assert "check: ratio = 1 and KL = 0 before the first update: ok" in shown
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "summary.json"),
        *("sft", "reward", "p3o"),
        *("sft.jsonl", "reward.jsonl", "p3o.jsonl"),
    }
    tokenizer = AutoTokenizer.from_pretrained(out / "p3o")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert weights_of(out).keys() > {"sft.lm_head.weight", "reward.score.weight"}
    for stage, count in (("sft", 3), ("reward", 3), ("p3o", 2)):
        assert [row["step"] for row in metrics_of(out, stage)] == list(range(count))


def test_the_readme_explains_every_metric_and_every_figure(finished, out):
    readme = (ROOT / "README.md").read_text()
    explained = set(re.findall(r"`([^`\n]+)`", readme))
    for stage in p3o.STAGES:
        for key in metrics_of(out, stage)[0]:
            key = re.sub(".*/grad_norm", "*/grad_norm", key)
            assert key in explained, f"README.md does not explain the metric {key}"
    for key in json.loads((out / "summary.json").read_text()):
        key = re.sub("_(sft|policy)$", "_*", key.removesuffix("_ci"))
        assert key in explained, f"README.md does not explain the figure {key}"


def test_two_runs_with_one_seed_are_identical_and_another_seed_is_not(quick, tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert status([*quick, "--out", str(tmp_path / name), "--seed", seed]) == 0
    first = weights_of(tmp_path / "a")
    second = weights_of(tmp_path / "b")
    other = weights_of(tmp_path / "c")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[f"{stage}.{key}"], other[f"{stage}.{key}"])
                   for stage in ("sft", "p3o") for key in ["transformer.wte.weight"])  # fmt: skip
    for stage in p3o.STAGES:
        assert metrics_of(tmp_path / "a", stage) == metrics_of(tmp_path / "b", stage)
    summaries = [(tmp_path / name / "summary.json").read_text() for name in ("a", "b", "c")]
    assert summaries[0] == summaries[1] != summaries[2]


def test_reference_and_reward_model_are_unchanged_by_stage_3(quick, out, monkeypatch):
    """To the last bit; and the reward model is scored with, not another."""
    plain = p3o.train_policy
    used = []

    def watched(policy, reference, score, *rest, **options):
        plain(policy, reference, score, *rest, **options)
        used.extend([policy, reference, score.args[0]])

    monkeypatch.setattr(p3o, "train_policy", watched)
    assert status(quick) == 0
    saved = weights_of(out)
    for stage, model in zip(("p3o", "sft", "reward"), used, strict=True):
        for key, value in model.state_dict().items():
            assert torch.equal(value, saved[f"{stage}.{key}"]), f"{stage}: {key}"
    moved = [
        not torch.equal(saved[key], saved["p3o" + key[3:]]) for key in saved if key[:3] == "sft"
    ]
    assert all(moved), "a weight that P3O never moved"


def test_the_default_path_takes_a_gpt2_directory_and_rough_gzipped_dialogues(
    tiny, rows, tmp_path, capsys
):
    """What the default run loads, in small: GPT-2 with a tokenizer that has no pad token, and
    every kind of bad row."""
    model = tmp_path / "gpt2"
    tiny[0].save_pretrained(model)
    tiny[2].save_pretrained(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))

    prompt = dialogue("Hi", "")
    long = dialogue("I burned my bread. " * 40, "Oh.") + prompt
    so = "So. " * 40
    rough = []
    for chosen, rejected in (
        (dialogue("Hi", "A"), dialogue("Ho", "A")),
        (dialogue("Hi", "A", "And?", "B"), dialogue("Hi", "B")),
        (prompt + "A", prompt),
        (prompt + "A", prompt + "A"),
        (prompt + so + "A", prompt + so + "B"),
        (long + "A", long + "B"),
    ):
        rough.append({"chosen": chosen, "rejected": rejected})
    data = tmp_path / "hh"
    data.mkdir()
    for name, part in (("train", rows[:100] + rough), ("test", rows[100:140])):
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in part))

    options = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]
    for key, value in (QUICK | dict(prompt_tokens=32, response_tokens=40)).items():
        options += ["--" + key.replace("_", "-"), str(value)]
    assert status(options) == 0
    shown = capsys.readouterr().out
    for reason in (
        "no shared prompt",
        "a new human turn in a response",
        "empty response",
        "equal responses",
    ):
        assert f"1 of 106 rows dropped: {reason}" in shown
    assert "101 of 102 pairs differ once cut" in shown
    assert "101 training and 40 held-out pairs" in shown
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "p3o")
    embeddings = weights_of(tmp_path / "out")["p3o.transformer.wte.weight"]
    assert tokenizer.eos_token_id != tokenizer.pad_token_id < len(embeddings)


@pytest.mark.parametrize("family", ("llama", "gpt_neox"))
def test_a_model_with_rotary_positions_goes_through_every_stage(
    family, tiny, quick, out, tmp_path, capsys
):
    """Other names for body and head, no table of positions, in Llama's case more queries than
    keys."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    if family == "llama":
        sizes["num_key_value_heads"] = 2
    config = AutoConfig.for_model(family, vocab_size=len(tiny[2]), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    tiny[2].save_pretrained(tmp_path / family)
    assert status([*quick, "--model", str(tmp_path / family)]) == 0
    assert "ratio = 1 and KL = 0 before the first update: ok" in capsys.readouterr().out
    saved = weights_of(out)
    for key in saved:
        if key.startswith("p3o."):
            before = saved[key.replace("p3o.", "sft.", 1)]
            assert not torch.equal(saved[key], before), f"P3O never moved {key}"


def test_rows_of_messages_go_through_every_stage(tiny, quick, out, tmp_path):
    """By the chat template of the model's tokenizer."""
    model = tmp_path / "chat"
    tiny[0].save_pretrained(model)
    tiny[2].save_pretrained(model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = []
    for i in range(120):
        question = [{"role": "user", "content": f"My bike is slow, {i}."}]
        row = {"prompt": question}
        for key, text in (("chosen", "Oil the chain."), ("rejected", "Who cares?")):
            row[key] = [{"role": "assistant", "content": text}]
        rows.append(row)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert status([*quick, "--model", str(model), "--data", str(data)]) == 0
    assert AutoTokenizer.from_pretrained(out / "p3o").chat_template
    assert metrics_of(out, "sft")[-1]["sft/loss"] < metrics_of(out, "sft")[0]["sft/loss"]


def test_the_readmes_way_of_using_a_run_works_and_scores_as_the_script_does(
    quick, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "runs" / "small"
    assert status([*quick, "--out", str(out)]) == 0
    capsys.readouterr()
    readme = (ROOT / "README.md").read_text()
    section = readme.split("**Using the result.**")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    *_, shown = capsys.readouterr().out.splitlines()
    tokenizer = names["reward"].tokenizer
    prompt = tokenizer.encode(names["prompt"])
    answer = tokenizer.encode(names["answer"]["generated_text"])
    model = p3o.load(out / "reward", p3o.AutoModelForSequenceClassification)
    batch = p3o.collate([prompt], [[*answer, tokenizer.eos_token_id]], model)
    score = p3o.reward_scores(model, *batch).item()
    assert eval(shown)[0]["score"] == pytest.approx(score, abs=1e-4)


# ---- Bad input -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "x"], "argument --beta: invalid float value: 'x'"),
        (["--clip", "both"], "argument --clip: invalid choice: 'both'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_an_option_that_is_none_gets_argparses_message_and_status_2(
    options, message, quick, out, capsys
):
    assert status([*quick, *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "-0.1"], "--beta must be a number of at least 0, not -0.1"),
        (["--beta", "nan"], "--beta must be"),
        (["--lr", "inf"], "--lr must be"),
        (["--pairs", "0"], "--pairs must be a number of at least 1, not 0"),
        (["--response-tokens", "0"], "--response_tokens must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--eval-prompts", "1"], "see --response-tokens and --eval-prompts"),
        (["--data", "nowhere/rows.jsonl"], "--data nowhere/rows.jsonl: no such file"),
        (["--data", "./nowhere"], "--data ./nowhere: no such file"),
        (["--model", "./nowhere"], "--model ./nowhere: "),
        (["--response-tokens", "41"], "--prompt-tokens + --response-tokens must be at most 72"),
    ],
)
def test_a_bad_option_gives_one_line_and_writes_nothing(options, message, quick, out, capsys):
    assert status([*quick, *options]) == 1
    assert message in last_line(capsys)
    assert not out.exists()


GOOD = json.dumps({"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi", "B")})
SAME = json.dumps({"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi", "A")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{GOOD}\n{{oops\n".encode(), "JSON parse error"),
        (f"{GOOD}\n".encode() + b'{"chosen": "\xff"}\n', "utf-8"),
        (f'{GOOD}\n{{"chosen": "x"}}\n'.encode(), "row 2: chosen, rejected and prompt"),
        (b'{"chosen": [{"role": "user"}], "rejected": []}\n', "lists of messages"),
        (b"", "rows.jsonl"),
        (f"{SAME}\n{SAME}\n".encode(), "too few usable rows"),
    ],
)
def test_bad_data_gives_one_line_and_writes_nothing(content, message, quick, out, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert status([*quick, "--data", str(path)]) == 1
    assert message in last_line(capsys)
    assert not out.exists()


def test_pairs_that_are_all_equal_once_cut_give_one_line(quick, out, tmp_path, capsys):
    rows = []
    for i in range(40):
        so = "So. " * 40
        rows.append({"prompt": f"Q{i}", "chosen": so + "A", "rejected": so + "B"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert status([*quick, "--data", str(path)]) == 1
    assert "too few pairs are left; see --response-tokens" in last_line(capsys)
    assert not out.exists()


def test_a_directory_that_no_run_made_is_left_alone(quick, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    assert status([*quick, "--out", str(mine)]) == 1
    assert "choose another --out" in last_line(capsys)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_directory_gives_one_line(quick, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert status([*quick, "--out", str(tmp_path / "mine")]) == 1
    assert "mine" in last_line(capsys)
    assert (tmp_path / "mine").read_text() == "precious"


def test_help_names_every_option_and_what_it_is(capsys):
    assert status(["-h"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in p3o.Config.__dataclass_fields__.values():
        assert "--" + field.name.replace("_", "-") in shown
        assert field.metadata["help"] in shown
    assert "(default: 0.05)" in shown
    assert status(["--small", "-h"]) == 0
    assert "(default: 0.1)" in capsys.readouterr().out


def test_the_script_itself_ends_with_the_message_and_the_status(quick):
    command = [sys.executable, SCRIPT, *quick, "--beta", "-1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for a file under test without data/
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "p3o.py: --beta must be a number of at least 0, not -1.0\n"


def test_the_header_for_uv_names_the_readmes_versions():
    """`uv run p3o.py` reads them there."""
    header = Path(SCRIPT).read_text().split("# ///\n")[0]
    (listed,) = re.findall(r"^# dependencies = (.*)$", header, re.MULTILINE)
    (command,) = re.findall(r"pip install -q (torch.*?) &&", (ROOT / "README.md").read_text())
    assert json.loads(listed) == command.split()
    needed = (ROOT / "tests" / "requirements.txt").read_text().split()
    assert set(json.loads(listed)) < set(needed)
