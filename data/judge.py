"""The judge: the gold reward behind the shipped preferences, and every sentence it knows.

`gold_reward` reads an answer as a person at a glance would: is it about the question, is it kind, is it whole?
It knows the truth because the same tables wrote the data; a model trained on the preferences never sees it.
"""

import re

# topic -> (ways to tell the trouble, first steps that help, second steps that help). What helps one is no help to another.
TOPICS = {
    "bread": (
        ["My bread is too dense", "My bread did not rise", "My bread is flat", "I burned my bread", "My bread is dry"],
        ["First weigh the bread flour.", "First knead the bread longer.", "First let the bread dough rest."],
        ["Then bake the bread on low heat.", "Then let the bread cool.", "Then cover the bread."],
    ),
    "bike": (
        ["My bike has a flat tire", "My bike is slow", "My bike makes noise", "I fell off my bike", "My bike is old"],
        ["First pump up the bike tires.", "First clean the bike chain.", "First test the bike brakes."],
        ["Then oil the bike chain.", "Then ride the bike slowly.", "Then take the bike to a shop."],
    ),
    "plant": (
        ["My plant has yellow leaves", "My plant is dry", "My plant is weak", "My plant is too tall", "I may lose my plant"],
        ["First move the plant to the light.", "First check the plant for bugs.", "First find the plant a new pot."],
        ["Then water the plant a little.", "Then cut the plant back.", "Then give the plant time."],
    ),
    "sleep": (
        ["I can not sleep", "I sleep badly", "I do not sleep at night", "My sleep is too short", "I talk in my sleep"],
        ["First make the room dark for sleep.", "First drink milk before you sleep.", "First plan more time for sleep."],
        ["Then read until you sleep.", "Then sleep without your phone.", "Then go to sleep early."],
    ),
    "friend": (
        ["My friend is angry with me", "I hurt my friend", "My friend does not call", "I lied to my friend", "I miss my friend"],
        ["First listen to your friend.", "First call your friend today.", "First write to your friend."],
        ["Then tell your friend you are sorry.", "Then meet your friend for tea.", "Then thank your friend."],
    ),
}
KIND_OPENERS = ["Good question!", "Glad you asked!", "I can help!"]
RUDE_OPENERS = ["Not again.", "Silly question.", "Who cares?"]
KIND_CLOSERS = ["You can do it!", "Good luck!", "Hope that helps!"]
RUDE_CLOSERS = ["Leave me alone.", "Stop asking."]
VAGUE = ["It depends.", "Try harder.", "Look it up."]

ENOUGH_STEPS, MOST_SENTENCES, FLAW = 2, 4, -2
NATS_PER_POINT = 1.5  # how sure the annotators are: a gap of one point is labelled right with probability sigmoid(1.5)

TOPIC_OF = {step: topic for topic, (_, firsts, thens) in TOPICS.items() for step in firsts + thens}
KNOWN = {*TOPIC_OF, *KIND_OPENERS, *RUDE_OPENERS, *KIND_CLOSERS, *RUDE_CLOSERS, *VAGUE}


def sentences(response: str) -> list[str]:
    """Split after each full stop, exclamation or question mark; a tail without one is a sentence of its own."""
    return re.findall(r"\S[^.!?]*[.!?]*", response)


def flaws(response: str) -> int:
    """Count what a reader would call broken: fragments, run-ons, repetition, bad spacing, rambling, nothing at all."""
    parts = sentences(response)
    unknown = sum(s not in KNOWN for s in parts)
    repeated = len(parts) - len(set(parts))
    return unknown + repeated + (" ".join(parts) != response.strip()) + (len(parts) > MOST_SENTENCES) + (not parts)


def well_formed(response: str) -> bool:
    return flaws(response) == 0


def topic_of(prompt: str) -> str:
    """The one trouble that the last human turn is about. Raises ValueError if the judge does not know it."""
    question = prompt.rsplit("Human:", 1)[-1].lower()
    for topic, (troubles, _, _) in TOPICS.items():
        if any(trouble.lower() in question for trouble in troubles):
            return topic
    raise ValueError(f"the judge knows no trouble in the prompt {prompt!r}")


def gold_reward(prompt: str, response: str) -> float:
    """The true reward, in nats: P(a preferred to b) = sigmoid(gold(a) - gold(b)).

    One point for a kind opener, for each helpful step (two are enough) and for a kind closer; one off for each rude or
    off-topic sentence; none for vague ones; two off for each flaw.
    """
    topic, parts = topic_of(prompt), sentences(response)
    helpful = len({s for s in parts if TOPIC_OF.get(s) == topic})
    off_topic = sum(s in TOPIC_OF and TOPIC_OF[s] != topic for s in parts)
    kind = sum(s in KIND_OPENERS for s in parts[:1]) + sum(s in KIND_CLOSERS for s in parts[-1:])
    rude = sum(s in RUDE_OPENERS + RUDE_CLOSERS for s in parts)
    return NATS_PER_POINT * (min(helpful, ENOUGH_STEPS) + kind - off_topic - rude + FLAW * flaws(response))
