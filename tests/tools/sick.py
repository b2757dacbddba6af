"""Bugs for the hunt: each makes a small run sick; what is wrong can be told from its metrics.

Each is a right solution of a problem, p3o.py's own or one of right.py, with some text replaced.
"""

from typing import NamedTuple


class Sick(NamedTuple):
    diagnosis: str  # what students choose from
    solution: str
    old: str
    new: str
    symptom: str  # for the instructor

    @property
    def problem(self) -> str:
        return self.solution.split("__")[0]


SICK: list[Sick] = []
