"""The shipped data and its judge."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from data import judge
from data.preferences import Pair, load_pairs

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Pair]]:
    train, heldout = load_pairs(str(DATA))
    return {"train": train, "heldout": heldout}


def test_regenerating_gives_the_same_bytes(tmp_path):
    command = [sys.executable, "-m", "data.generate", str(tmp_path)]
    subprocess.run(command, check=True, cwd=DATA.parent)
    for made in (*tmp_path.glob("*.jsonl"), *tmp_path.glob("tiny/*")):
        assert made.read_bytes() == (DATA / made.relative_to(tmp_path)).read_bytes()
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
    """Among pairs with one gap, the better response is chosen with probability σ(gap), within 4
    standard errors."""
    chosen_better: dict[float, list[bool]] = {}
    for pair in shipped["train"]:
        gap = judge.gold_reward(pair.prompt, pair.chosen) - judge.gold_reward(
            pair.prompt, pair.rejected
        )
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
