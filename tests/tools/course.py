"""What a course needs, made from p3o.py itself: starter, solution and tests cannot drift apart.

    python tests/tools/course.py starter mine.py   # p3o.py without the bodies of the eight problems
    python tests/tools/course.py bug 7 buggy.py    # p3o.py with bug 7 planted: find it
    python tests/tools/course.py plant             # each bug in turn: which tests catch it
    python tests/tools/course.py check             # each problem's tests: fail before, pass after
    python tests/tools/course.py solutions         # the tests accept right code, and no wrong code

Check a file with `python -m pytest -q tests --file mine.py`, one problem with `-k problem_3`.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
from problems import PROBLEMS  # noqa: E402

ROOT = TESTS.parent
SOURCE = ROOT / "p3o.py"


def starter(source: str, first: int = 1) -> str:
    """The source without the bodies of problem `first` and all after it.

    Docstrings stay, as specification.
    """
    lines = source.splitlines(keepends=True)
    numbers = {name: i for i, name in enumerate(PROBLEMS, 1)}
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and numbers.get(node.name, 0) >= first:
            problem = f"problem {numbers[node.name]}: {node.name}"
            start = node.body[0].end_lineno  # of the docstring
            lines[start : node.end_lineno] = [f'    raise NotImplementedError("{problem}")\n']
    return "".join(lines)


def solved(source: str, name: str, body: str) -> str:
    """The source with another body of a function."""
    lines = source.splitlines(keepends=True)
    (node,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == name]
    lines[node.body[0].end_lineno : node.end_lineno] = [body]
    return "".join(lines)


def bodies(source: str) -> dict[str, str]:
    """The bodies of a file's functions, without their docstrings."""
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            start = node.body[0].lineno - 1
            if ast.get_docstring(node):
                start = node.body[0].end_lineno
            found[node.name] = "".join(lines[start : node.end_lineno])
    return found


def plant(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"the file should hold this once: {old}"
    return source.replace(old, new)


def outcomes(source: str, file: str = "p3o.py", options: tuple = ()) -> dict[str, set[str]]:
    """Run the tests with another p3o.py, or another file of data/.

    Returns the names of the tests that "passed" and "failed", with their parameters.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "data", folder / "data")
        shutil.copy(SOURCE, folder)
        (folder / file).write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider"]
        command += [f"--file={folder / 'p3o.py'}", *options, str(TESTS)]
        result = subprocess.run(command, capture_output=True, text=True)
    lines = r"^(PASSED|FAILED|ERROR) \S+?::(.+?)(?: - .*)?$"
    found = re.findall(lines, result.stdout, re.MULTILINE)
    if not found:
        sys.exit(f"the tests did not run:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    failed = {name for outcome, name in found if outcome != "PASSED"}
    return {"failed": failed, "passed": {name for _, name in found} - failed}


def plant_all(bugs: list, named: bool) -> int:
    """Plant each bug; the test that the catalogue names must catch it.

    Returns the number of those that it did not catch.
    """

    def try_one(bug) -> set[str]:
        source = plant((ROOT / bug.file).read_text(), bug.old, bug.new)
        options = ("-k", bug.caught_by) if named else ()
        failed = outcomes(source, bug.file, options)["failed"]
        return {name.split("[")[0] for name in failed}

    if failed := outcomes(SOURCE.read_text())["failed"]:
        sys.exit(f"without any bug, these fail: {', '.join(sorted(failed))}")
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(try_one, bugs)
        for number, (bug, failed) in enumerate(zip(bugs, found, strict=True), 1):
            verdict = "caught" if bug.caught_by in failed else "MISSED"
            missed += verdict == "MISSED"
            print(f"{number:3} {verdict}  {bug.name}\n      by {bug.caught_by}", flush=True)
            for test in sorted(failed - {bug.caught_by}):
                print(f"         {test}")
    print(f"{len(bugs) - missed} of {len(bugs)} bugs caught by the test that names them")
    return missed


def first_message(source: str, number: int) -> str:
    """What the first failing test of a problem says; "" if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mine.py"
        file.write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", f"--file={file}"]
        command += ["-p", "no:cacheprovider", "-m", f"problem_{number}", str(TESTS)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    said = [line for line in result.stdout.splitlines() if line.startswith(("E  ", "FAILED"))]
    return (
        "\n".join(said) or f"the tests did not run:\n{result.stdout[-1000:]}{result.stderr[-1000:]}"
    )


def solutions() -> int:
    """Right solutions in other styles must pass their problem's tests, wrong ones must fail.

    Returns the number of those of which that is not so.
    """
    from wrong import WRONG

    source = SOURCE.read_text()
    right = bodies((TESTS / "tools" / "right.py").read_text())
    numbers = {name: i for i, name in enumerate(PROBLEMS, 1)}
    cases = [(name, body, "") for name, body in right.items()]
    for wrong in WRONG:
        body = plant(right[wrong.solution], wrong.old, wrong.new)
        cases.append((f"{wrong.solution}: {wrong.mistake}", body, wrong.says))

    def try_one(case) -> tuple[int, str]:
        title, body, _ = case
        problem = title.split("__")[0]
        return numbers[problem], first_message(solved(source, problem, body), numbers[problem])

    failures = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(try_one, cases)
        for (title, _, says), (number, message) in zip(cases, found, strict=True):
            must_pass = title in right
            fine = not message if must_pass else bool(message) and says in message
            failures += not fine
            print(f"{'ok   ' if fine else 'WRONG'} problem {number}: {title}", flush=True)
            if message and (not fine or title not in right):
                print(
                    "".join(f"        {line[:150]}\n" for line in message.splitlines()[:3]), end=""
                )
    print(f"{len(cases) - failures} of {len(cases)} solutions got what they deserve")
    return failures


def check() -> int:
    """Solve the problems one after the other.

    Returns the number of problems whose tests do not fit.
    """
    source = SOURCE.read_text()

    def try_one(number: int) -> tuple[set[str], set[str]]:
        choice = ("-k", f"problem_{number}")
        before = outcomes(starter(source), options=choice)
        after = outcomes(starter(source, number + 1), options=choice)
        return before["passed"], after["failed"]

    wrong = 0
    numbers = range(1, len(PROBLEMS) + 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(try_one, numbers)
        for number, name, (passed, failed) in zip(numbers, PROBLEMS, found, strict=True):
            verdict = "WRONG" if passed | failed else "ok"
            wrong += verdict == "WRONG"
            print(f"problem {number}, {name}: {verdict}", flush=True)
            for test in sorted(passed):
                print(f"    passes in the starter file: {test}")
            for test in sorted(failed):
                print(f"    fails though problems 1 to {number} are solved: {test}")
    return wrong


def main() -> int:
    from bugs import BUGS, DATA_BUGS  # here, so that the tests run without the answers

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    about = "write p3o.py without the bodies of the eight problems"
    starter_command = commands.add_parser("starter", help=about)
    bug_command = commands.add_parser("bug", help="write p3o.py with one bug planted")
    bug_command.add_argument("number", type=int, help=f"1 to {len(BUGS)}")
    for command in (starter_command, bug_command):
        command.add_argument("file", type=Path)
    about = "plant each bug in turn and name the tests that catch it"
    plant_command = commands.add_parser("plant", help=about)
    about = "run only the test that the catalogue names"
    plant_command.add_argument("--named", action="store_true", help=about)
    about = "show that the problems' tests fail in the starter and pass once solved"
    commands.add_parser("check", help=about)
    about = "right solutions in other styles must pass, wrong ones fail"
    commands.add_parser("solutions", help=about)
    args = parser.parse_args()
    if args.command == "solutions":
        return int(solutions() > 0)
    if args.command == "plant":
        return int(plant_all(BUGS + DATA_BUGS, args.named) > 0)
    if args.command == "check":
        return int(check() > 0)
    source = SOURCE.read_text()
    if args.command == "starter":
        text = starter(source)
    elif 1 <= args.number <= len(BUGS):
        bug = BUGS[args.number - 1]
        text = plant(source, bug.old, bug.new)
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
