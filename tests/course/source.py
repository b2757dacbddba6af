"""Functions of a Python file, taken out and put in: the starter, solutions, mistakes and bugs."""

import ast
import functools
import sys
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PAGES = TESTS / "course"
for folder in (PAGES, TESTS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
from bugs import Bug  # noqa: E402
from problems import PROBLEMS  # noqa: E402
from wrong import Wrong  # noqa: E402

SOURCE = (ROOT / "p3o.py").read_text()
NUMBERS = {name: number for number, name in enumerate(PROBLEMS, 1)}


class Function(NamedTuple):
    text: str  # with its decorators
    body: str  # without its docstring
    first: int  # the body is lines[first:last] of the file
    last: int


def top_of(node: ast.stmt) -> int:
    """Return the index of a statement's first line, with its decorators."""
    return min(part.lineno for part in [node, *getattr(node, "decorator_list", [])]) - 1


def functions(source: str) -> dict[str, Function]:
    """Return a file's functions by name. Of two with the same name, the last counts."""
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            top = top_of(node)
            first = top_of(node.body[0])
            if ast.get_docstring(node):
                first = node.body[0].end_lineno
            last = node.end_lineno
            text = "".join(lines[top:last])
            found[node.name] = Function(text, "".join(lines[first:last]), first, last)
    return found


def with_bodies(source: str, bodies: dict[str, str]) -> str:
    """Return the source with other bodies of some functions. The docstrings stay."""
    lines = source.splitlines(keepends=True)
    for name, function in reversed(functions(source).items()):  # from the end of the file
        if name in bodies:
            lines[function.first : function.last] = [bodies[name]]
    return "".join(lines)


@functools.cache
def starter(first: int = 1) -> str:
    """Return p3o.py without the bodies of problem `first` and all later ones.

    The docstrings stay: they are the specification.
    """
    empty = {}
    for name, number in NUMBERS.items():
        if number >= first:
            empty[name] = f'    raise NotImplementedError("problem {number}: {name}")\n'
    return with_bodies(SOURCE, empty)


@functools.cache
def right() -> dict[str, str]:
    """Return right bodies of the problems: right.py's by PROBLEM__STYLE, p3o.py's by PROBLEM."""
    mine = {name: found.body for name, found in functions(SOURCE).items() if name in PROBLEMS}
    others = functions((PAGES / "right.py").read_text())
    return mine | {name: found.body for name, found in others.items()}


def replaced(source: str, old: str, new: str) -> str:
    """Return the source with `old` replaced, which must occur once."""
    assert source.count(old) == 1, f"the file should hold this once: {old}"
    return source.replace(old, new)


def wrong_body(wrong: Wrong) -> str:
    return replaced(right()[wrong.solution], wrong.old, wrong.new)


def planted(bug: Bug) -> str:
    return replaced((ROOT / bug.file).read_text(), bug.old, bug.new)
