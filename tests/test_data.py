"""The shipped data, its judge, and the loader."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import judge
import pytest

import p3o

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[p3o.Pair]]:
    return dict(zip(("train", "heldout"), p3o.load_pairs(str(DATA)), strict=True))


def test_regenerating_gives_the_same_bytes(tmp_path):
    subprocess.run([sys.executable, str(DATA / "generate.py"), str(tmp_path)], check=True)
    for name in ("train.jsonl", "test.jsonl", *(f"tiny/{file.name}" for file in (DATA / "tiny").iterdir())):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_there_is_enough_of_it_and_no_row_twice(shipped):
    assert len(shipped["train"]) >= 4000
    assert len(shipped["heldout"]) >= 500
    assert all(len(set(pairs)) == len(pairs) for pairs in shipped.values())


def test_no_prompt_and_no_response_of_the_heldout_file_occurs_in_training(shipped):
    train, heldout = shipped["train"], shipped["heldout"]
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in heldout}
    responses = [{text for pair in pairs for text in pair[1:]} for pairs in (train, heldout)]
    assert not responses[0] & responses[1]


def test_labels_are_drawn_from_bradley_terry_on_the_gold_reward(shipped):
    """Among pairs with one gap, the better response is chosen with probability σ(gap), within 4 standard errors."""
    chosen_better: dict[float, list[bool]] = {}
    for pair in shipped["train"]:
        gap = judge.gold_reward(pair.prompt, pair.chosen) - judge.gold_reward(pair.prompt, pair.rejected)
        if gap:
            chosen_better.setdefault(abs(gap), []).append(gap > 0)
    assert len(chosen_better) >= 5
    for gap, outcomes in chosen_better.items():
        expected = 1 / (1 + math.exp(-gap))
        error = math.sqrt(expected * (1 - expected) / len(outcomes))
        assert abs(sum(outcomes) / len(outcomes) - expected) < 4 * error + 1 / len(outcomes)


PROMPT = "\n\nHuman: My bike is slow. Any advice?\n\nAssistant:"


@pytest.mark.parametrize(
    ("points", "response"),
    [
        (4, " Good question! First clean the bike chain. Then oil the bike chain. Good luck!"),
        (2, " First clean the bike chain. Then oil the bike chain."),
        (1, " Not again. First clean the bike chain. Then oil the bike chain."),
        (0, " First weigh the bread flour. Good luck!"),
        (0, " It depends."),
        (-2, " Who cares? Then read until you sleep."),
    ],
)
def test_gold_reward_counts_points(points, response):
    assert judge.gold_reward(PROMPT, response) == judge.NATS_PER_POINT * points
    assert judge.well_formed(PROMPT, response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " First clean the bike",
        " clean the bike chain.",
        " First clean the bike chain. First clean the bike chain.",
        " First clean the bike chain Then oil the bike chain.",
        " Good question! I can help! First clean the bike chain.",
        " Good luck! Good luck!",
        " Then oil the bike chain. First clean the bike chain.",
        " First clean the bike chain.  Then oil the bike chain.",
        " bike bike bike bike",
    ],
)
def test_broken_text_is_recognised_and_costs_more_than_it_can_earn(response):
    assert not judge.well_formed(PROMPT, response)
    assert judge.gold_reward(PROMPT, response) <= 0


def test_the_best_answer_to_one_prompt_is_a_poor_answer_to_every_other():
    best = {
        topic: f" Good question! {firsts[0]} {seconds[0]} Good luck!"
        for topic, (_, firsts, seconds) in judge.TOPICS.items()
    }
    for topic, (troubles, *_) in judge.TOPICS.items():
        for trouble in troubles:
            prompt = f"\n\nHuman: {trouble}.\n\nAssistant:"
            values = {other: judge.gold_reward(prompt, answer) for other, answer in best.items()}
            assert values.pop(topic) == 4 * judge.NATS_PER_POINT
            assert set(values.values()) == {0.0}


def test_the_judge_says_so_when_it_does_not_know_the_prompt():
    with pytest.raises(ValueError, match="knows no trouble"):
        judge.gold_reward("\n\nHuman: Hello?\n\nAssistant:", " It depends.")


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {turn}" for i, turn in enumerate(turns))


def test_a_row_is_split_after_the_last_assistant_turn_that_both_share():
    pair = p3o.split_row(dialogue("Hi", "Hello", "Help", "Yes"), dialogue("Hi", "Hello", "Help", "Yes, gladly"))
    assert pair == (dialogue("Hi", "Hello", "Help", "").removesuffix(" "), " Yes", " Yes, gladly")
    assert pair.prompt.endswith("\n\nAssistant:")


@pytest.mark.parametrize(
    ("reason", "chosen", "rejected"),
    [
        ("no shared prompt", dialogue("Hi", "A"), dialogue("Ho", "A")),
        ("no shared prompt", "A", "B"),
        ("a new human turn in a response", dialogue("Hi", "A", "more", "B"), dialogue("Hi", "C")),
        ("a new human turn in a response", dialogue("Hi", "C"), dialogue("Hi", "A", "more", "B")),
        ("empty response", dialogue("Hi", "A"), dialogue("Hi", " ")),
        ("empty response", dialogue("Hi", " "), dialogue("Hi", "A")),
        ("equal responses", dialogue("Hi", "A"), dialogue("Hi", "A")),
    ],
)
def test_rows_that_cannot_be_used_are_dropped_with_their_reason(reason, chosen, rejected):
    assert p3o.split_row(chosen, rejected) == reason


def test_dropped_rows_are_counted(tmp_path, capsys):
    good = [{"chosen": dialogue(f"Hi {i}", "A"), "rejected": dialogue(f"Hi {i}", "B")} for i in range(40)]
    bad = [{"chosen": dialogue("Hi", "A"), "rejected": dialogue("Hi", "A")}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good + bad))
    train, heldout = p3o.load_pairs(str(tmp_path / "rows.jsonl"))
    assert len(train) + len(heldout) == 40
    assert len(heldout) > 0
    assert "3 of 43 rows dropped: equal responses" in capsys.readouterr().out


def test_a_single_file_holds_out_whole_prompts(tmp_path):
    """Answers to one prompt look alike: with some in training, the held-out ones would look easy."""
    rows = [
        {"chosen": dialogue(f"Hi {i // 3}", f"A {i}"), "rejected": dialogue(f"Hi {i // 3}", "B")} for i in range(600)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, heldout = p3o.load_pairs(str(tmp_path / "rows.jsonl"))
    assert len(train) + len(heldout) == len({*train, *heldout}) == 600
    assert 30 <= len(heldout) <= 90
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in heldout}


def test_a_row_may_bring_its_prompt():
    """The ecosystem's explicit format; what the responses share belongs to them."""
    parts = (" Yes, do", " Yes, wait", dialogue("Go?", ""))
    assert p3o.split_row(*parts) == (parts[2], *parts[:2])
    assert p3o.split_row("A", "B", "Question: 1 + 1?") == ("Question: 1 + 1?", "A", "B")
    assert p3o.split_row(" ", "B", "Go?") == "empty response"


ROWS = [{"chosen": dialogue(f"Hi {i}", f'"A", {i}'), "rejected": dialogue(f"Hi {i}", "B\nC")} for i in range(40)]


@pytest.mark.parametrize("name", ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"))
def test_every_file_format_gives_the_same_pairs(name, tmp_path):
    rows = [{"prompt": None, **ROWS[0]}, *ROWS[1:]]  # a prompt may be missing here and there
    table, path, plain = datasets.Dataset.from_list(rows), tmp_path / name, tmp_path / "plain"
    if ".parquet" in name:
        table.to_parquet(plain)
    elif ".csv" in name:
        table.to_csv(plain)
    else:
        table.to_json(plain, lines=".jsonl" in name)
    path.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith(".gz") else plain.read_bytes())
    train, heldout = p3o.load_pairs(str(path))
    assert {*train, *heldout} == {p3o.split_row(**row) for row in ROWS}


def test_a_directory_has_its_own_held_out_part_and_other_files_are_left_alone(tmp_path, monkeypatch):
    for name, part in (("train", ROWS[:30]), ("test", ROWS[30:])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "readme.py").write_text("not data")
    train, heldout = p3o.load_pairs(str(tmp_path))
    assert train == [p3o.split_row(**row) for row in ROWS[:30]]
    assert heldout == [p3o.split_row(**row) for row in ROWS[30:]]
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert p3o.load_pairs(f"~/{tmp_path.name}") == (train, heldout)


def test_a_long_prompt_loses_whole_turns_then_the_beginning_of_its_last(tiny):
    tokenizer = tiny[2]
    turns = [dialogue("one two three four five", "six seven"), dialogue("eight", "nine"), dialogue("ten eleven", "")]
    sizes = [len(tokenizer("".join(turns[i:]))["input_ids"]) for i in range(3)]
    for limit, kept in ((sizes[0], turns), (sizes[0] - 1, turns[1:]), (sizes[1] - 1, turns[2:])):
        cfg = p3o.Config(**p3o.SMALL | dict(prompt_tokens=limit))
        (example,) = p3o.tokenize([p3o.Pair("".join(turns), " A", " B")], tokenizer, cfg)
        assert tokenizer.decode(example.prompt) == "".join(kept), f"at most {limit} tokens"
    cfg = p3o.Config(**p3o.SMALL | dict(prompt_tokens=2))
    (example,) = p3o.tokenize([p3o.Pair("".join(turns), " A", " B")], tokenizer, cfg)
    assert example.prompt == tokenizer("".join(turns))["input_ids"][-2:]


def test_tokenizing_keeps_the_end_of_prompts_and_forges_no_eos(tiny):
    _, _, tokenizer, _, pairs = tiny
    eos = tokenizer.eos_token_id
    for pair in pairs[:50]:
        (example,) = p3o.tokenize(
            [pair], tokenizer, p3o.Config(**p3o.SMALL | dict(prompt_tokens=4, response_tokens=12))
        )
        prompt, chosen = (tokenizer(text)["input_ids"] for text in pair[:2])
        assert example.prompt == prompt[-4:]
        assert example.chosen == [*chosen, eos][:12]
        assert eos not in chosen


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(tiny, capsys):
    _, _, tokenizer, _, _ = tiny
    pairs = [p3o.Pair("Hi", " one two three", " one two four"), p3o.Pair("Hi", " five", " six")]
    cfg = p3o.Config(**p3o.SMALL | dict(response_tokens=len(tokenizer(" one two")["input_ids"])))
    assert len(p3o.tokenize(pairs, tokenizer, cfg)) == 1
    assert "1 of 2 pairs dropped" in capsys.readouterr().out


def test_text_survives_the_tokenizer(tiny):
    _, _, tokenizer, _, pairs = tiny
    for pair in pairs[:20]:
        assert tokenizer.decode(tokenizer(pair.chosen)["input_ids"]) == pair.chosen
        assert tokenizer.decode(tokenizer(pair.prompt)["input_ids"]) == pair.prompt
