"""The judge: the gold reward behind the shipped preferences, and every sentence it knows.

`gold_reward` reads an answer as a person at a glance would: is it about the question, is it kind,
is it whole? It knows the truth because the same tables wrote the data; a model trained on the
preferences never sees it. Below it stands what a run's figures are made of, on any data.
"""

import math
import re
import statistics
from itertools import pairwise

from data.preferences import ASSISTANT, Pair

# topic -> (ways to tell the trouble, first steps, second steps)
# What helps with one trouble is no help with another.
TOPICS = {
    "bread": (
        [
            "My bread is too dense",
            "My bread did not rise",
            "My bread is flat",
            "I burned my bread",
            "My bread is dry",
        ],
        [
            "First weigh the bread flour.",
            "First knead the bread longer.",
            "First let the bread dough rest.",
        ],
        ["Then bake the bread on low heat.", "Then let the bread cool.", "Then cover the bread."],
    ),
    "bike": (
        [
            "My bike has a flat tire",
            "My bike is slow",
            "My bike makes noise",
            "I fell off my bike",
            "My bike is old",
        ],
        [
            "First pump up the bike tires.",
            "First clean the bike chain.",
            "First test the bike brakes.",
        ],
        ["Then oil the bike chain.", "Then ride the bike slowly.", "Then take the bike to a shop."],
    ),
    "plant": (
        [
            "My plant has yellow leaves",
            "My plant is dry",
            "My plant is weak",
            "My plant is too tall",
            "I may lose my plant",
        ],
        [
            "First move the plant to the light.",
            "First check the plant for bugs.",
            "First find the plant a new pot.",
        ],
        ["Then water the plant a little.", "Then cut the plant back.", "Then give the plant time."],
    ),
    "sleep": (
        [
            "I can not sleep",
            "I sleep badly",
            "I do not sleep at night",
            "My sleep is too short",
            "I talk in my sleep",
        ],
        [
            "First make the room dark for sleep.",
            "First drink milk before you sleep.",
            "First plan more time for sleep.",
        ],
        ["Then read until you sleep.", "Then sleep without your phone.", "Then go to sleep early."],
    ),
    "friend": (
        [
            "My friend is angry with me",
            "I hurt my friend",
            "My friend does not call",
            "I lied to my friend",
            "I miss my friend",
        ],
        [
            "First listen to your friend.",
            "First call your friend today.",
            "First write to your friend.",
        ],
        [
            "Then tell your friend you are sorry.",
            "Then meet your friend for tea.",
            "Then thank your friend.",
        ],
    ),
}
KIND_OPENERS = ["Good question!", "Glad you asked!", "I can help!"]
RUDE_OPENERS = ["Not again.", "Silly question.", "Who cares?"]
KIND_CLOSERS = ["You can do it!", "Good luck!", "Hope that helps!"]
RUDE_CLOSERS = ["Leave me alone.", "Stop asking."]
VAGUE = ["It depends.", "Try harder.", "Look it up."]

# how sure the annotators are: a gap of one point is labelled right with probability sigmoid(1.5)
NATS_PER_POINT = 1.5

# An answer has four slots, each of which may be empty: opener, first step (or something vague),
# second step, closer.
POOLS = [(0, KIND_OPENERS), (0, RUDE_OPENERS), (1, VAGUE), (3, KIND_CLOSERS), (3, RUDE_CLOSERS)]
POOLS += [(slot, topic[slot]) for topic in TOPICS.values() for slot in (1, 2)]
SLOT_OF = {sentence: slot for slot, pool in POOLS for sentence in pool}
TOPIC_OF = {
    step: topic for topic, (_, firsts, seconds) in TOPICS.items() for step in firsts + seconds
}


def sentences(response: str) -> list[str]:
    """Split after each full stop, exclamation or question mark; a tail without one is a
    sentence of its own."""
    return re.findall(r"\S[^.!?]*[.!?]*", response)


def flaws(response: str) -> int:
    """Count what a reader would call broken: fragments, run-ons, repetition, rambling, bad
    spacing, nothing at all."""
    parts = sentences(response)
    slots = [SLOT_OF[s] for s in parts if s in SLOT_OF]
    unknown = len(parts) - len(slots)
    repeated = sum(later <= earlier for earlier, later in pairwise(slots))
    return unknown + repeated + (" ".join(parts) != response.strip() or not parts)


def well_formed(prompt: str, response: str) -> bool:
    """Whether the response is whole, whatever it says; the prompt is not read."""
    return flaws(response) == 0


def topic_of(prompt: str) -> str:
    """The one trouble that the last human turn is about. Raises ValueError if the judge does
    not know it."""
    question = prompt.rsplit("Human:", 1)[-1].lower()
    for topic, (troubles, _, _) in TOPICS.items():
        if any(trouble.lower() in question for trouble in troubles):
            return topic
    raise ValueError(f"the judge knows no trouble in the prompt {prompt!r}")


def gold_reward(prompt: str, response: str) -> float:
    """The true reward, in nats: P(a preferred to b) = sigmoid(gold(a) - gold(b)).

    One point for a kind opener, for a first and a second step that help, and for a kind closer;
    none for vague words; one off for each rude or off-topic sentence; two off for each flaw.
    """
    topic, parts = topic_of(prompt), sentences(response)
    good = {
        SLOT_OF[s] for s in parts if s in KIND_OPENERS + KIND_CLOSERS or TOPIC_OF.get(s) == topic
    }
    bad = [s for s in parts if s in RUDE_OPENERS + RUDE_CLOSERS or TOPIC_OF.get(s, topic) != topic]
    return NATS_PER_POINT * (len(good) - len(bad) - 2 * flaws(response))


def figures(
    pairs: list[Pair], ranked: list[bool], answers: dict[str, list[str]]
) -> dict[str, list[float]]:
    """What the judge says of a run: `answers` by name, in the order of the pairs' prompts.

    Of each answer its gold reward and whether it is well-formed; and of a reward model, which
    prefers `chosen` where `ranked` is true, its agreement with the gold reward.
    """
    columns: dict[str, list[float]] = {"reward_gold_agreement": agreement(pairs, ranked)}
    prompts = [pair.prompt for pair in pairs]
    for name, texts in answers.items():
        columns[f"gold_{name}"] = list(map(gold_reward, prompts, texts))
        columns[f"well_formed_{name}"] = list(map(well_formed, prompts, texts))
    return columns


def agreement(pairs: list[Pair], ranked: list[bool]) -> list[bool]:
    """Whether a reward model, which prefers `chosen` where `ranked` is true, agrees with the gold
    reward: of each pair whose gold rewards differ."""
    agrees = []
    for pair, prefers_chosen in zip(pairs, ranked, strict=True):
        gold_chosen = gold_reward(pair.prompt, pair.chosen)
        gold_rejected = gold_reward(pair.prompt, pair.rejected)
        if gold_chosen != gold_rejected:
            agrees.append(prefers_chosen == (gold_chosen > gold_rejected))
    return agrees


def wins(scores: list[float], others: list[float]) -> list[float]:
    """1 where a score is the higher one, ½ at a tie."""
    paired = zip(scores, others, strict=True)
    return [(score > other) + 0.5 * (score == other) for score, other in paired]


def show(pairs: list[Pair], answers: dict[str, list[str]], figures: dict[str, list]) -> None:
    """Prints the first five prompts, and what was answered before and after stage 3."""
    print("\nHeld-out prompts; before each answer stands its score")
    for i in range(min(5, len(answers["sft"]))):
        print(f"\n{pairs[i].prompt.removesuffix(ASSISTANT).strip()}")
        for label, name in (("SFT", "sft"), ("P3O", "policy")):
            print(f"  {label} {figures[f'score_{name}'][i]:+5.2f}  {answers[name][i].strip()}")


def summarize(figures: dict[str, list[float]]) -> dict[str, float]:
    """Prints and returns the mean of each figure's values, and half its 95 % interval as
    NAME_ci."""
    summary = {}
    print("\nfigure                    mean   95 % interval")
    for name, values in figures.items():
        mean = statistics.fmean(values)
        half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
        print(f"{name:22}{mean:8.3f} ± {half:.3f}")
        summary[name] = mean
        summary[f"{name}_ci"] = half
    return summary
