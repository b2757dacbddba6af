"""Preference pairs from every source and in every format; the shipped data and its judge."""

import gzip
import json
import math
from pathlib import Path

import datasets
import pytest
from toys import CHATML, dialogue, letters, talk, write_rows

from data import generate, judge
from data.preferences import (
    SHIPPED_DATA,
    Chat,
    InputError,
    Pair,
    Unusable,
    load_pairs,
    split_row,
)


def hh(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


# ---- Rows of text --------------------------------------------------------------------------
def test_a_row_is_split_after_the_last_assistant_turn_that_both_share():
    chosen = dialogue("Hi", "Hello", "Help", "Yes")
    rejected = dialogue("Hi", "Hello", "Help", "Yes, gladly")
    pair = split_row(hh(chosen, rejected))
    assert pair.prompt == dialogue("Hi", "Hello", "Help") + "\n\nAssistant:"
    assert pair.chosen == " Yes"
    assert pair.rejected == " Yes, gladly"


def test_a_row_may_bring_its_prompt():
    """Then everything else belongs to the responses, also a beginning that they share."""
    row = {"prompt": dialogue("Go?"), "chosen": " Yes, do", "rejected": " Yes, wait"}
    assert split_row(row) == Pair(dialogue("Go?"), " Yes, do", " Yes, wait")
    row = {"prompt": "Question: 1 + 1?", "chosen": "A", "rejected": "B"}
    assert split_row(row) == Pair("Question: 1 + 1?", "A", "B")


SECOND_QUESTION = dialogue("Hi", "A", "and", "B")


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("no shared prompt", hh(dialogue("Hi", "A"), dialogue("Ho", "A"))),
        ("no shared prompt", hh("A", "B")),
        ("a new human turn in a response", hh(SECOND_QUESTION, dialogue("Hi", "C"))),
        ("a new human turn in a response", hh(dialogue("Hi", "C"), SECOND_QUESTION)),
        ("empty response", hh(dialogue("Hi", "A"), dialogue("Hi", " "))),
        ("empty response", hh(dialogue("Hi", " "), dialogue("Hi", "A"))),
        ("equal responses", hh(dialogue("Hi", "A"), dialogue("Hi", "A"))),
        ("empty response", {"prompt": "Go?", "chosen": " ", "rejected": "B"}),
        ("no shared prompt", {"prompt": " ", "chosen": "A", "rejected": "B"}),
    ],
)
def test_rows_that_cannot_be_used_are_dropped_with_their_reason(reason, row):
    with pytest.raises(Unusable, match=reason):
        split_row(row)


# ---- Rows of messages ----------------------------------------------------------------------
def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


TALK = [user("Hi"), assistant("Hello"), user("Help")]
YES = [assistant("Yes")]
NO = [assistant("No ")]


@pytest.mark.parametrize(
    "row",
    (
        {"chosen": TALK + YES, "rejected": TALK + NO},
        {"prompt": TALK, "chosen": YES, "rejected": NO},
        {"prompt": "Help", "chosen": TALK + YES, "rejected": TALK + NO},  # some bring both
    ),
    ids=("shared beginning", "prompt of messages", "prompt of text beside messages"),
)
def test_messages_without_a_chat_template_become_an_hh_dialogue(row):
    prompt = dialogue("Hi", "Hello", "Help") + "\n\nAssistant:"
    assert split_row(row) == Pair(prompt, " Yes", " No")


def test_a_system_message_opens_the_dialogue():
    system = {"role": "system", "content": "Be kind."}
    pair = split_row({"prompt": [system, user("Hi")], "chosen": YES, "rejected": NO})
    assert pair.prompt == "\n\nSystem: Be kind." + dialogue("Hi") + "\n\nAssistant:"


def test_messages_go_through_the_tokenizers_own_chat_template():
    """The response ends before EOS, which all formats get with the token ids."""
    pair = split_row({"chosen": TALK + YES, "rejected": TALK + NO}, Chat(letters(CHATML)))
    assert pair.prompt.startswith("<|im_start|>user\nHi<|im_end|>\n")
    assert pair.prompt.endswith("<|im_start|>user\nHelp<|im_end|>\n<|im_start|>assistant\n")
    assert (pair.chosen, pair.rejected) == ("Yes", "No ")


@pytest.mark.parametrize("tokenizer", (None, letters(CHATML)), ids=("HH", "template"))
@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("no shared prompt", {"chosen": [user("A"), *YES], "rejected": [user("B"), *NO]}),
        ("no shared prompt", {"chosen": YES, "rejected": NO}),
        ("a new human turn", {"chosen": TALK + YES + TALK + YES, "rejected": TALK + NO}),
        ("a new human turn", {"prompt": TALK, "chosen": YES, "rejected": NO + TALK}),
        ("equal responses", {"chosen": TALK + YES, "rejected": TALK + YES}),
        ("empty response", {"prompt": TALK, "chosen": [assistant(" ")], "rejected": NO}),
        ("not an assistant's", {"prompt": TALK, "chosen": [user("Yes")], "rejected": NO}),
    ],
)
def test_messages_that_cannot_be_used_are_dropped_with_their_reason(reason, row, tokenizer):
    with pytest.raises(Unusable, match=reason):
        split_row(row, Chat(tokenizer))


@pytest.mark.parametrize(
    "row",
    (
        {"chosen": "A"},
        {"chosen": "A", "rejected": None},
        {"chosen": "A", "rejected": NO},
        {"chosen": [], "rejected": NO},
        {"chosen": ["Yes"], "rejected": NO},
        {"chosen": [{"role": "assistant"}], "rejected": NO},
        {"prompt": TALK, "chosen": [{"role": "assistant", "content": None}], "rejected": NO},
        {"chosen": [{"from": "gpt", "value": "Yes"}], "rejected": NO},
        {"prompt": TALK, "chosen": "A", "rejected": "B"},
    ),
    ids=str,
)
def test_a_row_of_another_form_is_dropped(row):
    with pytest.raises(Unusable, match="must be text or lists of messages"):
        split_row(row)


PROMPT_OF_HH = dialogue("Hi", "")[:-1]


@pytest.mark.parametrize(
    "row",
    (
        {"prompt": PROMPT_OF_HH, **hh(dialogue("Hi", "Yes"), dialogue("Hi", "No"))},
        {"prompt": PROMPT_OF_HH, "chosen": " Yes", "rejected": " No"},
        {"prompt": [user("Hi")], "chosen": [user("Hi"), *YES], "rejected": [user("Hi"), *NO]},
        {"prompt": json.dumps([user("Hi")]), "chosen": json.dumps(YES), "rejected": json.dumps(NO)},
        hh(json.dumps([user("Hi"), *YES], indent=1), json.dumps([user("Hi"), *NO])),
    ),
    ids=("HH", "text", "messages", "messages in JSON", "dialogues in JSON"),
)
def test_a_prompt_that_the_answers_repeat_is_not_part_of_them(row):
    """Nor are messages that a column spells out as JSON taken for text."""
    assert split_row(row) == Pair(PROMPT_OF_HH, " Yes", " No")


@pytest.mark.parametrize("text", ('[{"a": 1}]', '[{"role": "user"', "[1] is a number", "[]"))
def test_other_text_in_brackets_stays_text(text):
    assert split_row({"prompt": "Q", "chosen": text, "rejected": "B"}).chosen == text


# ---- Rows that a chat template refuses -----------------------------------------------------
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
ASKS_FOR_SYSTEM = NO_SYSTEM.replace("==", "!=").replace("not supported", "expected")
COUNTING = "{% if messages[0].content == 'odd' %}{{ messages | length }}{% endif %}" + CHATML
SYSTEM = {"role": "system", "content": "Be kind."}
WITH_SYSTEM = talk("") | {"prompt": [SYSTEM, user("Hi")]}


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (NO_SYSTEM, WITH_SYSTEM, "the chat template refuses it: System role not supported"),
        (ALTERNATING, WITH_SYSTEM, "the chat template refuses it: Conversation roles must alter"),
        (ASKS_FOR_SYSTEM, talk("Hi"), "the chat template refuses it: System role expected"),
        (COUNTING, talk("odd"), "the chat template does not continue its own prompt"),
        (CHATML, talk(None), "no shared prompt"),
        (CHATML, talk("Hi", None), "must be text or lists of messages"),
    ],
)
def test_a_row_that_the_template_refuses_is_dropped_in_its_words(
    template, row, reason, tmp_path, capsys
):
    """Whether it is the first row or the last; if there is no other, the run ends."""
    good = [talk(f"Q{number}") for number in range(60)]
    if template == ASKS_FOR_SYSTEM:
        good = [talk("") | {"prompt": [SYSTEM, user(f"Q{number}")]} for number in range(60)]
    for rows in ([row, *good], [*good, row]):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        train, heldout = load_pairs(str(path), letters(template))
        assert len(train) + len(heldout) == 60
        shown = capsys.readouterr().out
        assert "train: 1 of 61 rows dropped: " in shown
        assert reason in shown
    path = write_rows(tmp_path / "rows.jsonl", [row] * 3)
    with pytest.raises(InputError, match="no row can be used; 3 of 3: ") as error:
        load_pairs(str(path), letters(template))
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ({"a": CHATML, "b": CHATML}, "none of the tokenizer's chat templates is called default"),
    ],
)
def test_a_template_that_is_no_use_gives_one_line_and_no_harm_to_text(template, reason, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [talk("Hi")] * 3)
    with pytest.raises(InputError, match=f"no row can be used; 3 of 3: .*{reason}") as error:
        load_pairs(str(path), letters(template))
    assert "\n" not in str(error.value)
    assert split_row({"prompt": "Q", "chosen": "A", "rejected": "B"}, Chat(letters(template)))
    named = Chat(letters({"other": template, "default": CHATML}))
    assert split_row(talk("Hi"), named).prompt.startswith("<|im_start|>user\nHi<|im_end|>")


# ---- Files and directories -----------------------------------------------------------------
ROWS = [hh(dialogue(f"Hi {i}", f'"A", {i}'), dialogue(f"Hi {i}", "B\nC")) for i in range(40)]


@pytest.mark.parametrize(
    "name",
    ("a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"),
)
def test_every_file_format_gives_the_same_pairs(name, tmp_path):
    rows = [{"prompt": None, **ROWS[0]}, *ROWS[1:]]  # a prompt may be missing here and there
    table = datasets.Dataset.from_list(rows)
    plain = tmp_path / "plain"
    if ".parquet" in name:
        table.to_parquet(plain)
    elif ".csv" in name:
        table.to_csv(plain)
    else:
        table.to_json(plain, lines=".jsonl" in name)
    content = plain.read_bytes()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    (tmp_path / name).write_bytes(content)
    train, heldout = load_pairs(str(tmp_path / name))
    assert {*train, *heldout} == {split_row(row) for row in ROWS}


def test_an_answer_none_or_na_in_a_csv_file_is_an_answer(tmp_path):
    rows = "".join(f"Q{number},None,NA\n" for number in range(40))
    (tmp_path / "rows.csv").write_text(f"prompt,chosen,rejected\n{rows}")
    train, heldout = load_pairs(str(tmp_path / "rows.csv"))
    assert {pair[1:3] for pair in train + heldout} == {("None", "NA")}
    assert len(train) + len(heldout) == 40


def test_brackets_and_stars_in_a_path_are_letters(tmp_path):
    folder = tmp_path / "[a]*"
    folder.mkdir()
    for name in ("rows[1]*.jsonl", "train.jsonl", "test.jsonl"):
        write_rows(folder / name, ROWS)
    for path in (folder / "rows[1]*.jsonl", folder):
        train, heldout = load_pairs(str(path))
        assert {*train, *heldout} == {split_row(row) for row in ROWS}


@pytest.mark.parametrize("hub", (False, True), ids=("files", "hub"))
@pytest.mark.parametrize(
    ("first", "second"),
    [
        *(("train_prefs", "test_prefs"), ("train_pref", "test_pref")),
        *(("train", name) for name in ("validation", "valid", "val", "dev", "eval")),
    ],
)
def test_parts_are_known_by_the_names_in_use(first, second, hub, tmp_path, monkeypatch, capsys):
    """Files and splits beside them are left alone, and what is read is told."""
    for name, part in ((first, ROWS[:30]), (second, ROWS[30:]), (f"{first}_old", ROWS[:3])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    source = str(tmp_path)
    if hub:
        files = {path.stem: datasets.Dataset.from_json(str(path)) for path in tmp_path.iterdir()}
        monkeypatch.setattr(datasets, "load_dataset", lambda _: datasets.DatasetDict(files))
        source = "someone/pairs"
    train, heldout = load_pairs(source)
    assert set(train) == {split_row(row) for row in ROWS[:30]}
    assert set(heldout) == {split_row(row) for row in ROWS[30:]}
    told = capsys.readouterr().out
    assert all(f"{name}.jsonl" in told for name in (first, second)) != hub
    assert "old" not in told


def test_parts_of_other_names_are_listed_in_the_error(tmp_path):
    for name in ("mine", "yours"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    with pytest.raises(InputError, match="holds mine, yours; it needs one of train, train_prefs"):
        load_pairs(str(tmp_path))


@pytest.mark.parametrize("name", ("rows.jsonl.gz", "rows.csv.gz", "rows.parquet", "rows.json"))
def test_a_file_that_breaks_off_gives_one_line(name, tmp_path):
    content = gzip.compress(json.dumps(ROWS).encode())
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cannot load .*rows\.") as error:
        load_pairs(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_dataset_that_cannot_be_loaded_gives_one_line(monkeypatch):
    def fail(_):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="cannot load 'someone/pairs': no network; --data takes"):
        load_pairs("someone/pairs")


def test_files_of_messages_give_their_pairs(tmp_path):
    rows = []
    for i in range(40):
        rows.append({"chosen": [user(f"Hi {i}"), *YES], "rejected": [user(f"Hi {i}"), *NO]})
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    train, heldout = load_pairs(str(path))
    assert len(train) + len(heldout) == 40
    assert {pair.chosen for pair in train} == {" Yes"}


@pytest.mark.parametrize(
    ("train_name", "test_name"),
    [("train", "test"), ("train_prefs", "test_prefs"), ("train", "validation")],
)
def test_a_directory_has_its_own_held_out_part_and_other_files_are_left_alone(
    train_name, test_name, tmp_path, monkeypatch, capsys
):
    for name, part in ((train_name, ROWS[:30]), (test_name, ROWS[30:])):
        plain = write_rows(tmp_path / "plain", part)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "readme.py").write_text("not data")
    (tmp_path / "README.md").write_text("---\nconfigs: no data set card\n---")
    train, heldout = load_pairs(str(tmp_path))
    assert train == [split_row(row) for row in ROWS[:30]]
    assert heldout == [split_row(row) for row in ROWS[30:]]
    names = f"{train_name}.jsonl.gz and {test_name}.jsonl.gz"
    assert capsys.readouterr().out == f"reading {names}\n"
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert load_pairs(f"~/{tmp_path.name}") == (train, heldout)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test.jsonl", "holds test; it needs one of train, "),
        ("train.txt", "holds no data; it needs one of train, "),
    ],
)
def test_a_directory_without_a_training_part_is_refused(name, message, tmp_path):
    write_rows(tmp_path / name, ROWS)
    with pytest.raises(InputError, match=message):
        load_pairs(str(tmp_path))
    if name == "train.txt":
        with pytest.raises(InputError, match=r"train\.txt: the name must end in \.jsonl, "):
            load_pairs(str(tmp_path / name))


def test_a_single_file_holds_out_whole_prompts(tmp_path):
    """Answers to one prompt are alike: some in training would make the others look easy."""
    rows = []
    for i in range(600):
        rows.append(hh(dialogue(f"Hi {i // 3}", f"A {i}"), dialogue(f"Hi {i // 3}", "B")))
    path = write_rows(tmp_path / "rows [1].JSONL", rows)  # a name, not a pattern
    train, heldout = load_pairs(str(path))
    assert len(train) + len(heldout) == len({*train, *heldout}) == 600
    assert 30 <= len(heldout) <= 90
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in heldout}


def test_a_dataset_of_the_hub_is_shuffled_always_alike_and_a_file_keeps_its_order(
    tmp_path, monkeypatch
):
    """Many on the hub are sorted by source, so their first rows would all be of one kind."""
    rows = []
    for number in range(200):
        rows.append({"prompt": f"P{number}", "chosen": f"A{number}", "rejected": "B"})
    pairs = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    write_rows(tmp_path / "train.jsonl", rows[:150])
    write_rows(tmp_path / "test.jsonl", rows[150:])
    assert load_pairs(str(tmp_path)) == (pairs[:150], pairs[150:])

    held_out_of_it = load_pairs(str(tmp_path / "train.jsonl"))
    assert [sorted(part, key=pairs.index) == part for part in held_out_of_it] == [True, True]

    splits = {"train_prefs": rows[:150], "test_prefs": rows[150:], "test_sft": rows[:5]}
    splits = {name: datasets.Dataset.from_list(part) for name, part in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda path: datasets.DatasetDict(splits))
    train, heldout = load_pairs("someone/pairs")
    assert sorted(train) == sorted(pairs[:150])
    assert sorted(heldout) == sorted(pairs[150:])
    for part, middle in ((train, 75), (heldout, 175)):
        from_late = [pair for pair in part[:20] if pairs.index(pair) >= middle]
        assert 4 < len(from_late) < 16, "the first rows are not like the others"
    assert (train, heldout) == load_pairs("someone/pairs")


def test_one_held_out_pair_is_too_few(tmp_path):
    """A figure's interval takes two values."""
    write_rows(tmp_path / "train.jsonl", ROWS[:30])
    write_rows(tmp_path / "test.jsonl", ROWS[30:31])
    with pytest.raises(InputError, match="too few usable rows"):
        load_pairs(str(tmp_path))


def test_one_prompt_cannot_be_both_trained_on_and_held_out(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:1] * 30)
    with pytest.raises(InputError, match="too few usable rows"):
        load_pairs(str(path))


# ---- The formats of data/README.md ---------------------------------------------------------
def test_the_pages_example_rows_are_one_pair_in_each_format():
    page = (SHIPPED_DATA / "README.md").read_text()
    rows = [json.loads(line) for line in page.splitlines() if line.startswith('{"')]
    assert len(rows) == 4
    assert len({split_row(row) for row in rows}) == 1


# ---- The shipped data ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Pair]]:
    train, heldout = load_pairs(str(SHIPPED_DATA))
    return {"train": train, "heldout": heldout}


def test_regenerating_gives_the_same_bytes(tmp_path):
    generate.main(tmp_path)
    for made in (*tmp_path.glob("*.jsonl"), *tmp_path.glob("tiny/*")):
        shipped = Path(SHIPPED_DATA, made.relative_to(tmp_path))
        assert made.read_bytes() == shipped.read_bytes(), f"{shipped.name} is not generate.py's"
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "test.jsonl", "tiny"}


def test_there_is_enough_of_it_and_no_row_twice(shipped):
    assert len(shipped["train"]) >= 4000
    assert len(shipped["heldout"]) >= 500
    assert all(len(set(pairs)) == len(pairs) for pairs in shipped.values())


def test_no_prompt_and_no_response_of_the_heldout_file_occurs_in_training(shipped):
    train = shipped["train"]
    heldout = shipped["heldout"]
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in heldout}
    trained_on = {pair.chosen for pair in train} | {pair.rejected for pair in train}
    assert not trained_on & {pair.chosen for pair in heldout}
    assert not trained_on & {pair.rejected for pair in heldout}


def test_labels_are_drawn_from_bradley_terry_on_the_gold_reward(shipped):
    """With each gap, the better response is chosen as often as σ(gap), within 4 standard errors."""
    chosen_better: dict[float, list[bool]] = {}
    for prompt, chosen, rejected, _ in shipped["train"]:
        gap = judge.gold_reward(prompt, chosen) - judge.gold_reward(prompt, rejected)
        if gap:
            chosen_better.setdefault(abs(gap), []).append(gap > 0)
    assert len(chosen_better) >= 5
    for gap, outcomes in chosen_better.items():
        expected = 1 / (1 + math.exp(-gap))
        error = math.sqrt(expected * (1 - expected) / len(outcomes))
        assert abs(sum(outcomes) / len(outcomes) - expected) < 4 * error + 1 / len(outcomes)


# ---- The judge -----------------------------------------------------------------------------
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
