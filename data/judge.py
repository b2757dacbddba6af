"""The judge: the gold reward behind the shipped preferences, and every sentence it knows.

`gold_reward` asks what a person would ask at a glance: is the answer about the question, is it
kind, is it whole? The judge knows the truth because the same tables wrote the data. No model is
trained on it; models see only the preferences.
"""

import re
from itertools import pairwise

# topic -> (ways to say the trouble, first steps, second steps)
# A step helps with its own trouble only.
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

# how reliable the annotators are: a gap of one point is labelled right with probability
# sigmoid(1.5)
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
    """Split after each full stop, exclamation or question mark; the rest is one more sentence."""
    return re.findall(r"\S[^.!?]*[.!?]*", response)


def flaws(response: str) -> int:
    """Count what a reader would call broken: fragments, run-ons, repetition, rambling, bad
    spacing, an empty answer."""
    parts = sentences(response)
    slots = [SLOT_OF[s] for s in parts if s in SLOT_OF]
    unknown = len(parts) - len(slots)
    repeated = sum(later <= earlier for earlier, later in pairwise(slots))
    return unknown + repeated + (" ".join(parts) != response.strip() or not parts)


def well_formed(prompt: str, response: str) -> bool:
    """Return whether the response has no flaw, whatever it says; the prompt is not used."""
    return flaws(response) == 0


def topic_of(prompt: str) -> str:
    """Return the trouble that the last human turn is about.

    Raises ValueError if the judge does not know it.
    """
    question = prompt.rsplit("Human:", 1)[-1].lower()
    for topic, (troubles, _, _) in TOPICS.items():
        if any(trouble.lower() in question for trouble in troubles):
            return topic
    raise ValueError(f"the judge knows no trouble in the prompt {prompt!r}")


def gold_reward(prompt: str, response: str) -> float:
    """Return the true reward in nats: P(a preferred to b) = sigmoid(gold(a) - gold(b)).

    One point each for a kind opener, a first and a second step that help, and a kind closer. None
    for vague words. Minus one for each rude or off-topic sentence, minus two for each flaw.
    """
    topic, parts = topic_of(prompt), sentences(response)
    good = {
        SLOT_OF[s] for s in parts if s in KIND_OPENERS + KIND_CLOSERS or TOPIC_OF.get(s) == topic
    }
    bad = [s for s in parts if s in RUDE_OPENERS + RUDE_CLOSERS or TOPIC_OF.get(s, topic) != topic]
    return NATS_PER_POINT * (len(good) - len(bad) - 2 * flaws(response))
