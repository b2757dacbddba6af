"""What a course needs, made from p3o.py itself, so that starter, solution and tests cannot drift apart.

    python tests/course.py starter mine.py   # p3o.py without the bodies of the eight problems
    python tests/course.py bug 7 buggy.py    # p3o.py with bug 7 planted: find it
    python tests/course.py plant             # plants each bug in turn and names the tests that catch it
    python tests/course.py check             # the starter fails each problem's tests, and solving it passes them

Check a file with `python -m pytest -q tests --file mine.py`, one problem with `-k problem_3`.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "p3o.py"
PROBLEMS = {  # in the order in which they build on each other: a problem's tests need only the problems before it
    "collate": "which tokens are the response",
    "response_logprobs": "log π(y|x), each token read one position earlier",
    "sample": "two responses a prompt, from the distribution that is scored",
    "reward_scores": "a score read at the last token, whatever the padding",
    "bradley_terry_loss": "preferences as differences of scores",
    "p3o_loss": "the pairwise update, with both clippings",
    "set_gain": "a unit for β that no offset changes",
    "train_policy": "the loop: sample, score, update, throw away",
}


def starter(source: str, first: int = 1) -> str:
    """The source with the bodies of problem `first` and all after it taken out; docstrings stay as specification."""
    lines, numbers = source.splitlines(keepends=True), {name: i for i, name in enumerate(PROBLEMS, 1)}
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and numbers.get(node.name, 0) >= first:
            message = f'    raise NotImplementedError("problem {numbers[node.name]}: {node.name}")\n'
            lines[node.body[0].end_lineno : node.end_lineno] = [message]
    return "".join(lines)


def plant(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"p3o.py should hold this once: {old}"
    return source.replace(old, new)


def outcomes(source: str, *options: str) -> dict[str, set[str]]:
    """Run the tests against a source: the names of those that "passed" and "failed", with their parameters."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").symlink_to(SOURCE.parent / "data")
        file = Path(folder) / "p3o.py"
        file.write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", f"--file={file}"]
        result = subprocess.run([*command, *options, TESTS], capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
    if not found:
        sys.exit(f"the tests did not run:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    failed = {name for outcome, name in found if outcome != "PASSED"}
    return {"failed": failed, "passed": {name for _, name in found} - failed}


def plant_all(bugs: list, named: bool) -> int:
    """Plant each bug; the test that the catalogue names must catch it. Returns the number of those that it did not."""
    source, missed = SOURCE.read_text(), 0
    if failed := outcomes(source)["failed"]:
        sys.exit(f"without any bug, these fail: {', '.join(sorted(failed))}")

    def try_one(bug) -> set[str]:
        failed = outcomes(plant(source, bug.old, bug.new), *(["-k", bug.caught_by] if named else []))["failed"]
        return {name.split("[")[0] for name in failed}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (bug, failed) in enumerate(zip(bugs, pool.map(try_one, bugs), strict=True), 1):
            caught = bug.caught_by in failed
            missed += not caught
            print(f"{number:3} {'caught' if caught else 'MISSED'}  {bug.name}\n      by {bug.caught_by}", flush=True)
            for test in sorted(failed - {bug.caught_by}):
                print(f"         {test}")
    print(f"{len(bugs) - missed} of {len(bugs)} bugs caught by the test that names them")
    return missed


def check() -> int:
    """Solve the problems one after the other. Returns the number of problems whose tests do not fit."""
    source, wrong = SOURCE.read_text(), 0

    def try_one(number: int) -> tuple[set[str], set[str]]:
        choice = ["-k", f"problem_{number}"]
        return outcomes(starter(source), *choice)["passed"], outcomes(starter(source, number + 1), *choice)["failed"]

    numbers = range(1, len(PROBLEMS) + 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, name, (passed, failed) in zip(numbers, PROBLEMS, pool.map(try_one, numbers), strict=True):
            wrong += bool(passed or failed)
            print(f"problem {number}, {name}: {'ok' if not passed | failed else 'WRONG'}", flush=True)
            for test in sorted(passed):
                print(f"    passes in the starter file: {test}")
            for test in sorted(failed):
                print(f"    fails though problems 1 to {number} are solved: {test}")
    return wrong


def main() -> int:
    from bugs import BUGS  # here, so that the tests run without the answers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    starter_command = commands.add_parser("starter", help="write p3o.py without the bodies of the eight problems")
    bug_command = commands.add_parser("bug", help="write p3o.py with one bug planted")
    bug_command.add_argument("number", type=int, help=f"1 to {len(BUGS)}")
    for command in (starter_command, bug_command):
        command.add_argument("file", type=Path)
    plant_command = commands.add_parser("plant", help="plant each bug in turn and name the tests that catch it")
    plant_command.add_argument("--named", action="store_true", help="run only the test that the catalogue names")
    commands.add_parser("check", help="show that the problems' tests fail in the starter and pass once solved")
    args = parser.parse_args()
    if args.command == "plant":
        return int(plant_all(BUGS, args.named) > 0)
    if args.command == "check":
        return int(check() > 0)
    source = SOURCE.read_text()
    if args.command == "starter":
        text = starter(source)
    elif 1 <= args.number <= len(BUGS):
        text = plant(source, BUGS[args.number - 1].old, BUGS[args.number - 1].new)
    else:
        parser.error(f"there is no bug {args.number}, only 1 to {len(BUGS)}")
    try:
        with args.file.open("x") as file:
            file.write(text)
    except OSError as error:
        parser.error(f"{args.file}: {error.strerror}; choose another file")
    return 0


if __name__ == "__main__":
    sys.exit(main())
