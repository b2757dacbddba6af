"""The eight problems of the course: functions of p3o.py, and what each is about.

They stand in the order in which they build on each other: a problem's tests need only those before.
"""

PROBLEMS = {
    "collate": "which tokens are the response",
    "response_logprobs": "log π(y|x), each token read one position earlier",
    "sample": "two responses a prompt, from the distribution that is scored",
    "reward_scores": "a score read at the last token, whatever the padding",
    "bradley_terry_loss": "preferences as differences of scores",
    "p3o_loss": "the pairwise update, with both clippings",
    "set_gain": "a unit for β that no offset changes",
    "train_policy": "the loop: sample, score, update, throw away",
}

# Points follow the hours that a problem takes, ½ to 3
POINTS = {
    "collate": 4,
    "response_logprobs": 10,
    "sample": 14,
    "reward_scores": 4,
    "bradley_terry_loss": 4,
    "p3o_loss": 20,
    "set_gain": 4,
    "train_policy": 20,
}
