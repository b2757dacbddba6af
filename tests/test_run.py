"""The command: its options, what one stage hands to the next, and the figures at the end."""

import gzip
import json
import math
import re
import runpy
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT, TESTS
from toys import (
    assert_p3o_moved_every_weight,
    dialogue,
    encode,
    metrics_of,
    nothing,
    same_weights,
    small,
    status,
    tokenize,
    weights_of,
    write_rows,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import p3o
from data import judge
from data.preferences import Pair

SCRIPT = str(Path(p3o.__file__).resolve())


def last_line(capsys) -> str:
    """Return the message that a failed run ends with."""
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("p3o.py: ")
    return line


# ---- A run ---------------------------------------------------------------------------------
def test_a_run_leaves_models_metrics_and_a_summary(run):
    assert {path.name for path in run.out.iterdir()} == {
        *("config.json", "summary.json", ".lock"),
        *("sft", "reward", "p3o"),
        *("sft.jsonl", "reward.jsonl", "p3o.jsonl"),
    }
    tokenizer = AutoTokenizer.from_pretrained(run.out / "p3o")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert weights_of(run.out).keys() > {"sft.lm_head.weight", "reward.score.weight"}
    for stage in p3o.STAGES:
        assert [row["step"] for row in metrics_of(run.out, stage)] == [0, 1, 2]


def test_a_run_says_what_it_loads_what_it_checks_and_where_the_results_are(run, quick_data):
    first, second, *rest = run.printed.splitlines()
    assert first == f"loading {p3o.SMALL['model']} and {quick_data}"
    assert second == f"167 training and 33 held-out pairs, on cpu, in {run.out}"
    shown = "\n".join(rest)
    assert "check: reward loss starts at ln 2: ok" in shown
    assert "check: ratio = 1 and KL = 0 before the first update: ok" in shown
    assert f"are in {run.out}" in shown


def test_the_python_that_a_run_prints_at_its_end_samples_from_the_policy(run):
    _, code = run.printed.split("in Python:\n")
    *first, last = [line.strip() for line in code.strip().splitlines()]
    names = {}
    exec("\n".join(first), names)
    (answer,) = eval(last, names)
    prompt = run.given["evaluate"]["examples"][0].text.prompt
    assert answer["generated_text"].startswith(prompt)


def readme_code(holds: str) -> str:
    """Return the Python block of the README that holds a text."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if holds in block]
    return code


def test_the_bug_that_the_tests_readme_plants_changes_one_line():
    (old, new), *_ = re.findall(r"sed 's/(.*?)/(.*?)/' p3o.py", (TESTS / "README.md").read_text())
    assert Path(p3o.__file__).read_text().count(old) == 1 and old != new


def test_the_readmes_way_of_using_a_run_works_and_scores_as_the_script_does(
    run, tmp_path, monkeypatch, capsys
):
    shutil.copytree(run.out, tmp_path / "runs" / "small")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(readme_code("runs/small/reward"), names)
    *_, printed = capsys.readouterr().out.splitlines()
    tokenizer = names["reward"].tokenizer
    prompt = tokenizer.encode(names["prompt"])
    answer = tokenizer.encode(names["answer"]["generated_text"])
    model = p3o.load(run.out / "reward", AutoModelForSequenceClassification)
    batch = p3o.collate([prompt], [[*answer, tokenizer.eos_token_id]], model)
    score = p3o.reward_scores(model, *batch).item()
    assert eval(printed)[0]["score"] == pytest.approx(score, abs=1e-4)


def test_the_readmes_loss_takes_the_place_of_p3o_loss(stopped, out, monkeypatch):
    """It is the gradient of RLOO with two samples, and stage 3 uses it."""
    torch.manual_seed(0)
    batch = [torch.randn(8, 2) for _ in range(4)]
    batch[1] = batch[0].clone()  # on fresh samples RLOO is P3O
    leaf = batch[0].requires_grad_()
    options = dict(beta=0.1, clip="joint", clip_range=0.2)
    (expected,) = torch.autograd.grad(p3o.p3o_loss(leaf, *batch[1:], **options)[0], leaf)
    monkeypatch.setattr(p3o, "p3o_loss", p3o.p3o_loss)  # so that it comes back after the test
    with monkeypatch.context() as patch:
        patch.setattr(p3o, "main", nothing)
        exec(readme_code("p3o.p3o_loss = "), {})
    (found,) = torch.autograd.grad(p3o.p3o_loss(leaf, *batch[1:], **options)[0], leaf)
    assert torch.allclose(found, expected)
    assert status(stopped) == 0
    assert metrics_of(out, "p3o")[0].keys() - metrics_of(out, "p3o")[-1].keys() == {
        *("policy/clipfrac", "policy/approxkl", "objective/q")
    }


def test_the_readmes_judge_takes_the_place_of_the_reward_model(stopped, out, monkeypatch):
    """Stage 3 gets P − ½ and 0 from a judge that likes responses of 12 tokens."""
    monkeypatch.setattr(p3o, "train_policy", p3o.train_policy)  # so that it comes back afterwards
    with monkeypatch.context() as patch:
        patch.setattr(p3o, "main", nothing)
        names = {}
        exec(readme_code("def concise("), names)
    mask = torch.tensor([[[True, False], [True, True]]])  # (1, 2, 2): lengths 1 and 2
    expected = torch.tensor([[1 / (1 + math.exp(1)) - 0.5, 0.0]])
    assert torch.allclose(names["concise"](mask.long(), mask), expected)
    seen = []
    plain = p3o.p3o_loss

    def watched(logprobs, old_logprobs, ref_logprobs, scores, **options):
        seen.append(scores)
        return plain(logprobs, old_logprobs, ref_logprobs, scores, **options)

    monkeypatch.setattr(p3o, "p3o_loss", watched)
    assert status(stopped) == 0
    scores = torch.cat(seen)
    assert (scores[:, 1] == 0).all() and (scores[:, 0].abs() <= 0.5).all()


def test_every_metric_and_every_figure_is_explained(run, tiny):
    explained = set(re.findall(r"`([^`\n]+)`", (TESTS / "README.md").read_text()))
    for stage in p3o.STAGES:
        lines = (run.out / f"{stage}.jsonl").read_text().splitlines()
        for key in json.loads(lines[0]):
            key = re.sub(".*/grad_norm", "*/grad_norm", key)
            assert key in explained, f"tests/README.md should explain the metric {key}"
    base, reward_model, tokenizer, *_ = tiny
    cfg = small(eval_prompts=2, response_tokens=2)
    figures, _ = p3o.evaluate(cfg, base, reward_model, base, tokenizer, encode(tiny, 4))
    summary = json.loads((run.out / "summary.json").read_text())
    assert figures.keys() > {key.removesuffix("_ci") for key in summary}
    for key in figures:
        key = re.sub("_(sft|policy)$", "_*", key)
        assert key in explained, f"tests/README.md should explain the figure {key}"


def test_two_runs_with_one_seed_are_identical_and_another_seed_is_not(run, quick, tmp_path):
    for seed in ("0", "1"):
        assert status([*quick, "--out", str(tmp_path / seed), "--seed", seed]) == 0
    first = weights_of(run.out)
    second = weights_of(tmp_path / "0")
    other = weights_of(tmp_path / "1")
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key in ("sft.transformer.wte.weight", "p3o.transformer.wte.weight"):
        assert not torch.equal(first[key], other[key])
    for stage in p3o.STAGES:
        assert metrics_of(run.out, stage) == metrics_of(tmp_path / "0", stage)
    folders = (run.out, tmp_path / "0", tmp_path / "1")
    summaries = [(folder / "summary.json").read_text() for folder in folders]
    assert summaries[0] == summaries[1] != summaries[2]


def test_the_default_path_takes_a_gpt2_directory_and_rough_gzipped_dialogues(
    tiny, rows, tmp_path, monkeypatch, capsys
):
    """A small stand-in for the default run: GPT-2 without a pad token, every kind of bad row."""
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
    for name, part in (("train", rows[:100] + rough), ("test", rows[100:140])):
        plain = write_rows(tmp_path / "plain", part)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    monkeypatch.setattr(p3o, "GAIN_PROMPTS", 16)
    options = ["--model", str(model), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for key, value in (QUICK | dict(prompt_tokens=32)).items():
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
    assert "1 of 102 pairs dropped: equal once truncated" in shown
    assert "101 training and 40 held-out pairs" in shown
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "p3o")
    embeddings = weights_of(tmp_path / "out")["p3o.transformer.wte.weight"]
    assert tokenizer.eos_token_id != tokenizer.pad_token_id < len(embeddings)


def test_gpt_neox_goes_through_every_stage(tiny, quick, out, tmp_path):
    """Other names for body and head, rotary positions. Llama does so in test_loading.py."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model("gpt_neox", vocab_size=len(tiny[2]), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny[2].save_pretrained(tmp_path / "model")
    assert status([*quick, "--model", str(tmp_path / "model")]) == 0
    assert_p3o_moved_every_weight(out)


# ---- From stage to stage -------------------------------------------------------------------
def test_every_stage_starts_from_weights_in_float32(tiny, fresh, tmp_path):
    """In bf16's three digits, AdamW's steps at a rate of 2e-6 would vanish."""
    fresh(tiny[0]).to(torch.bfloat16).save_pretrained(tmp_path)
    assert p3o.load(tmp_path).dtype == torch.float32
    scorer = p3o.load(tmp_path, AutoModelForSequenceClassification, num_labels=1)
    assert scorer.dtype == torch.float32
    assert not scorer.training


def test_the_reward_model_begins_from_the_sft_model(run):
    body = run.at_first["train_reward"]["model"].base_model
    assert same_weights(body, p3o.load(run.out / "sft").base_model)


def test_the_reward_model_is_saved_with_its_gain(run):
    """Without it, β would have another unit in a resumed run and for anyone who loads it."""
    saved = p3o.load(run.out / "reward", AutoModelForSequenceClassification)
    assert torch.equal(saved.score.weight, run.given["set_gain"]["model"].score.weight)


def test_reference_and_reward_model_are_unchanged_by_stage_3(run):
    """To the last bit. And the saved reward model is the one that scored."""
    given = run.given["train_policy"]
    used = {"p3o": given["policy"], "sft": given["reference"], "reward": given["score"].args[0]}
    saved = weights_of(run.out)
    for stage, model in used.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, saved[f"{stage}.{key}"]), f"{stage}: {key}"
    assert_p3o_moved_every_weight(run.out)


def test_training_sees_no_held_out_pair_and_the_evaluation_nothing_else(run):
    examples = run.given["train_sft"]["examples"]
    heldout = run.given["evaluate"]["examples"]
    assert run.given["train_reward"]["examples"] == examples
    assert run.given["train_policy"]["prompts"] == [example.prompt for example in examples]
    assert not {example.text for example in examples} & {example.text for example in heldout}
    assert len(examples) + len(heldout) == 200


def test_what_is_evaluated_is_what_was_saved(run):
    """SFT, the reward model and the policy, each in its place."""
    given = run.given["evaluate"]
    saved = weights_of(run.out)
    for stage, name in (("sft", "sft"), ("reward", "reward_model"), ("p3o", "policy")):
        for key, value in given[name].state_dict().items():
            assert torch.equal(value, saved[f"{stage}.{key}"]), f"{stage}: {key}"


def test_every_stage_draws_by_the_seed(quick, out, monkeypatch):
    """No stage draws what another one did, nor what it did with another seed."""
    drawn = []

    def train(*_):
        drawn.append(torch.initial_seed())

    def evaluate(*_):
        drawn.append(torch.initial_seed())
        raise KeyboardInterrupt

    for name in ("train_sft", "train_reward", "train_policy"):
        monkeypatch.setattr(p3o, name, train)
    monkeypatch.setattr(p3o, "log_to", nothing)
    monkeypatch.setattr(p3o, "set_gain", lambda *_: 1.0)
    monkeypatch.setattr(p3o, "evaluate", evaluate)
    for seed in ("0", "1"):
        assert status([*quick, "--seed", seed, "--out", f"{out}{seed}"]) == 1
    assert len(set(drawn)) == len(drawn) == 8


# ---- The evaluation ------------------------------------------------------------------------
GOLD = {"gold_sft", "gold_policy", "well_formed_sft", "well_formed_policy", "reward_gold_agreement"}


def likes(model, token: int, how_much: float):
    """Make a model say a token more often: turn its last hidden state towards it."""
    with torch.no_grad():
        model.transformer.ln_f.bias += how_much * model.lm_head.weight[token]
    return model


def wins_by_hand(ours: list[float], theirs: list[float]) -> list[float]:
    wins = []
    for our, their in zip(ours, theirs, strict=True):
        wins.append(0.5 if our == their else float(our > their))
    return wins


def test_evaluation_by_hand(tiny, fresh, monkeypatch):
    """A policy that ends at once against one that rambles: each figure from what was said."""
    base, reward_model, tokenizer, _, pairs = tiny
    sft = likes(fresh(base), tokenizer.encode(".")[0], 10)
    policy = likes(fresh(base), tokenizer.eos_token_id, 30)
    cfg = small(eval_prompts=24, micro_batch=1)
    monkeypatch.setattr(p3o, "AT_ONCE", 7)  # divides neither 24 nor 61
    examples = tokenize(pairs[:61], tokenizer, cfg)
    torch.manual_seed(0)
    figures, answers = p3o.evaluate(cfg, sft, reward_model, policy, tokenizer, examples)

    assert sum(map(len, answers["policy"])) < sum(map(len, answers["sft"])) / 5
    for name in ("sft", "policy"):
        assert len(answers[name]) == 24
        for i, answer in enumerate(answers[name]):
            prompt = pairs[i].prompt
            assert figures[f"gold_{name}"][i] == judge.gold_reward(prompt, answer)
            assert figures[f"well_formed_{name}"][i] == judge.well_formed(prompt, answer)
    wins = wins_by_hand(figures["gold_policy"], figures["gold_sft"])
    assert figures["win_rate"] == wins
    assert sum(wins) != 12, "if this were ½, swapped sides would not show"
    assert 0.5 in wins, "there is no tie, so this does not show that it counts half"

    with torch.no_grad():
        scores = p3o.score_pairs(reward_model, examples)
    better = (scores[:, 0] > scores[:, 1]).tolist()
    assert figures["reward_accuracy"] == better
    assert 0 < sum(better) < 61
    agrees = []
    for (prompt, chosen, rejected, _), prefers_chosen in zip(pairs, better, strict=False):
        gap = judge.gold_reward(prompt, chosen) - judge.gold_reward(prompt, rejected)
        if gap:
            agrees.append(prefers_chosen == (gap > 0))
    assert len(agrees) < 61
    message = "pairs of equal gold reward have no better response"
    assert figures["reward_gold_agreement"] == agrees, message


def test_the_prompts_that_are_answered_are_those_that_are_judged_and_shown(tiny, monkeypatch):
    """Both models answer the first --eval-prompts held-out prompts, in their order."""
    base, reward_model, tokenizer, _, pairs = tiny
    cfg = small(eval_prompts=10, minibatch=4, response_tokens=2)
    examples = encode(tiny, 16)
    plain = p3o.sample
    asked = []
    judged = []

    def watched(model, prompts, *rest):
        asked.append(prompts)
        return plain(model, prompts, *rest)

    monkeypatch.setattr(p3o, "sample", watched)
    monkeypatch.setattr(judge, "well_formed", lambda prompt, answer: judged.append(prompt))
    figures, answers = p3o.evaluate(cfg, base, reward_model, base, tokenizer, examples)
    expected = [example.prompt for example in examples[:10]]
    for first in (0, 1):  # SFT and the policy take turns
        answered = [prompt for batch in asked[first::2] for prompt in batch]
        assert answered == expected
    assert sorted(judged) == sorted([pair.prompt for pair in pairs[:10]] * 2)
    assert len(answers["sft"]) == len(figures["gold_sft"]) == 10


def test_kl_score_and_finished_are_those_of_each_models_own_answers(tiny, fresh, monkeypatch):
    base, reward_model, tokenizer, *_ = tiny
    sft = likes(fresh(base), tokenizer.eos_token_id, 18)
    policy = likes(fresh(base), tokenizer.eos_token_id, 24)
    cfg = small(eval_prompts=20, minibatch=8, response_tokens=6)
    plain = p3o.sample
    sampled = []

    def watched(model, *rest):
        ids, mask = plain(model, *rest)
        sampled.append((model, ids[:, 0], mask[:, 0]))
        return ids, mask

    monkeypatch.setattr(p3o, "sample", watched)
    torch.manual_seed(0)
    figures, _ = p3o.evaluate(cfg, sft, reward_model, policy, tokenizer, encode(tiny, 30))
    for name, model in (("sft", sft), ("policy", policy)):
        expected = {"kl": [], "score": [], "finished": []}
        for sampler, ids, mask in sampled:
            if sampler is model:
                with torch.no_grad():
                    kl = p3o.sequence_logprobs(model, ids, mask)
                    kl -= p3o.sequence_logprobs(sft, ids, mask)
                    score = p3o.reward_scores(reward_model, ids, mask)
                expected["kl"] += kl.tolist()
                expected["score"] += score.tolist()
                ended = (ids.masked_fill(~mask, -1) == tokenizer.eos_token_id).any(-1)
                expected["finished"] += ended.tolist()
        for key, values in expected.items():
            assert figures[f"{key}_{name}"] == pytest.approx(values, abs=1e-4), f"{key}_{name}"
    assert max(map(abs, figures["kl_sft"])) == 0
    assert max(map(abs, figures["kl_policy"])) > 0.1
    assert 0 < sum(figures["finished_sft"]) < sum(figures["finished_policy"])


def test_without_a_gold_judge_the_win_rate_is_by_the_reward_models_own_scores(
    tiny, fresh, tmp_path, monkeypatch, capsys
):
    """The reward counts one token, and the policy likes to say it."""
    base, reward_model, tokenizer, *_ = tiny
    liked = 300
    policy = likes(fresh(base), liked, 30)
    cfg = small(eval_prompts=24, response_tokens=20, data=str(tmp_path))
    examples = encode(tiny, 30)

    counted = {}  # by answer; text encoded anew may hold other tokens

    def count(_, ids, mask):
        found = ((ids == liked) & mask).sum(-1).float()  # (…)
        rows = zip(ids.flatten(0, -2), mask.flatten(0, -2), found.flatten(), strict=True)
        for row, inside, score in rows:
            counted[tokenizer.decode(row[inside], skip_special_tokens=True)] = score.item()
        return found

    monkeypatch.setattr(p3o, "reward_scores", count)
    torch.manual_seed(0)
    figures, answers = p3o.evaluate(cfg, base, reward_model, policy, tokenizer, examples)
    for name in ("sft", "policy"):
        for answer, score in zip(answers[name], figures[f"score_{name}"], strict=True):
            assert score == counted[answer], "the scores belong to other answers"
    assert not GOLD & figures.keys()
    wins = wins_by_hand(figures["score_policy"], figures["score_sft"])
    assert figures["win_rate"] == wins
    assert statistics.fmean(wins) > 0.6
    p3o.report(figures, answers, examples)
    assert "24 held-out prompts, by its own reward model" in capsys.readouterr().out


def test_the_judge_sees_the_whole_prompt_however_short_the_models_is(tiny):
    """The model's last two tokens, "Any advice?", would not say what the trouble is."""
    base, reward_model, tokenizer, _, pairs = tiny
    cfg = small(prompt_tokens=2, response_tokens=10, eval_prompts=8)
    examples = tokenize(pairs[:8], tokenizer, cfg)
    figures, _ = p3o.evaluate(cfg, base, reward_model, base, tokenizer, examples)
    assert len(figures["gold_policy"]) == 8


# ---- The report ----------------------------------------------------------------------------
def reported(count: int, **figures) -> dict[str, float]:
    """Report on `count` made-up answers."""
    pair = [Pair(f"\n\nHuman: Q{i}\n\nAssistant:", "", "") for i in range(count)]
    examples = [p3o.Example([], [], [], text) for text in pair]
    answers = {"sft": [f" a{i}" for i in range(count)], "policy": [f" b{i}" for i in range(count)]}
    scores = {"score_sft": list(range(count)), "score_policy": [-i for i in range(count)]}
    return p3o.report({"win_rate": [0.0, 1.0]} | scores | figures, answers, examples)


def test_figures_are_told_with_half_of_their_95_percent_interval(capsys):
    """1.96 standard errors to each side: deviation / √n, of as many values as there are."""
    values = [0.0, 1.0, 1.0, 0.5, 1.0]
    summary = reported(6, win_rate=values, kl_policy=[2.0, 4.0], gold_policy=[1.0, 2.0])
    half = 1.96 * statistics.stdev(values) / math.sqrt(5)
    assert summary["win_rate"] == pytest.approx(0.7)
    assert summary["win_rate_ci"] == pytest.approx(half)
    assert summary["kl_policy_ci"] == pytest.approx(1.96)
    shown = capsys.readouterr().out
    assert "win_rate                 0.700 ± 0.392" in shown
    assert "P3O's answer beats SFT's on 70% of 6 held-out prompts, by the gold judge" in shown


def test_what_was_said_is_shown_beside_its_score_before_and_after(capsys):
    reported(6)
    shown = capsys.readouterr().out
    assert "Human: Q4\n  sft    +4.00  a4\n  policy -4.00  b4\n" in shown
    assert "Q5" not in shown
    reported(2)
    assert capsys.readouterr().out.count("  policy ") == 2, "only two were answered"


# ---- Options -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "x"], "argument --beta: invalid float value: 'x'"),
        (["--clip", "both"], "argument --clip: invalid choice: 'both'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--smal"], "unrecognized arguments: --smal"),
        (["--p3o", "0.1"], "unrecognized arguments: --p3o 0.1"),
    ],
)
def test_an_option_that_is_none_gets_argparses_message_and_status_2(
    options, message, quick, out, capsys
):
    assert status([*quick, *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("given", (["--small"], ["--small=true"], ["--small", "true"]), ids=str)
def test_the_preset_is_used_however_it_is_asked_for_and_other_options_change_it(given):
    """Also those that stand before it, and those that name a default."""
    assert p3o.parse_config(given) == small()
    for options in ([*given, "--beta", "0.05"], ["--beta", "0.05", *given]):
        assert p3o.parse_config(options) == small(beta=0.05)


@pytest.mark.parametrize("given", ([], ["--small", "false"], ["--small=false"]), ids=str)
def test_without_the_preset_the_defaults_are_used(given):
    assert p3o.parse_config(given) == p3o.Config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "-0.1"], "--beta must be a number of at least 0, not -0.1"),
        (["--beta", "nan"], "--beta must be"),
        (["--p3o-lr", "inf"], "--p3o_lr must be"),
        (["--pairs", "0"], "--pairs must be a number of at least 1, not 0"),
        (["--response-tokens", "0"], "--response_tokens must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--eval-prompts", "1"], "--eval_prompts must be a number of at least 2, not 1"),
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
LONG = [{"prompt": f"Q{i}", "chosen": "So " * 40, "rejected": "So " * 41} for i in range(40)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{GOOD}\n{{oops\n".encode(), "JSON parse error"),
        (f"{GOOD}\n".encode() + b'{"chosen": "\xff"}\n', "utf-8"),
        (b'{"chosen": "x"}\n', "no row can be used; 1 of 1: chosen, rejected and prompt, if any,"),
        (b'{"chosen": [{"role": "user"}], "rejected": []}\n', "lists of messages"),
        (b"", "rows.jsonl"),
        (f"{SAME}\n{SAME}\n".encode(), "no row can be used; 2 of 2: equal responses"),
        (f"{GOOD}\n{SAME}\n".encode(), "too few usable rows"),
        (
            "\n".join(map(json.dumps, LONG)).encode(),
            "too few pairs are left; raise --prompt-tokens or --resp",
        ),
    ],
)
def test_bad_data_gives_one_line_and_writes_nothing(content, message, quick, out, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert status([*quick, "--data", str(path)]) == 1
    assert message in last_line(capsys)
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


def test_the_script_itself_ends_with_the_message_and_the_status(quick, monkeypatch):
    """sys.exit prints a message to stderr and gives status 1."""
    monkeypatch.setattr("sys.argv", ["p3o.py", *quick, "--beta", "-1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(SCRIPT, run_name="__main__")
    assert stop.value.code == "p3o.py: --beta must be a number of at least 0, not -1.0"


def test_the_header_for_uv_names_versions_that_the_tests_are_run_with():
    """`uv run p3o.py` reads them there."""
    header = Path(SCRIPT).read_text().split("# ///\n")[0]
    (listed,) = re.findall(r"^# dependencies = (.*)$", header, re.MULTILINE)
    tested = (TESTS / "requirements.txt").read_text().split()
    assert {"torch", "transformers"} < {name.split("==")[0] for name in json.loads(listed)}
    assert set(json.loads(listed)) < set(tested)
