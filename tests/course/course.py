"""The assignment kit. It is made from p3o.py itself, so starter, solution and tests agree.

    python tests/course/course.py handout DIR       # two folders: for students, for the instructor
    python tests/course/course.py starter mine.py   # p3o.py without the eight problems' bodies
    python tests/course/course.py grade FILE ...    # points for each problem; runs the files' code
    python tests/course/course.py hunt DIR NAME ... # for each student, a run with a bug to find
    python tests/course/course.py bug 7 buggy.py    # p3o.py with bug 7 planted

After a change to p3o.py or its tests:

    python tests/course/course.py check             # right solutions pass, wrong ones fail
    python tests/course/course.py plant --named     # each bug is caught by the test that names it
    python tests/course/course.py plant             # list all tests that catch each bug; hours

Test a file with `python -m pytest -q tests --file mine.py`, and one problem with `-m problem_3`.
"""

import argparse
import ast
import contextlib
import csv
import functools
import gc
import importlib
import json
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
from bugs import BUGS, DATA_BUGS, Bug  # noqa: E402
from problems import PROBLEMS  # noqa: E402
from wrong import SICK, WRONG, Sick, Wrong  # noqa: E402

ROOT = TESTS.parent
PAGES = TESTS / "course"
SOURCE = (ROOT / "p3o.py").read_text()
NUMBERS = {name: number for number, name in enumerate(PROBLEMS, 1)}
LETTERS = dict(zip(sorted(sick.diagnosis for sick in SICK), string.ascii_uppercase, strict=False))
HUNT_OPTIONS = ["--small"]


# ---- Functions of a file, taken out and put in ---------------------------------------------
class Function(NamedTuple):
    text: str  # with its decorators
    body: str  # without its docstring
    first: int  # the body is lines[first:last] of the file
    last: int


def functions(source: str) -> dict[str, Function]:
    """Return a file's functions by name. Of two with the same name, the last counts."""
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            top = min(part.lineno for part in [node, *node.decorator_list]) - 1
            first = node.body[0].lineno - 1
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


# ---- Running the tests against a file ------------------------------------------------------
class Job(NamedTuple):
    """A run of the tests with another text in the place of one of the project's files."""

    text: str
    options: list  # of pytest
    file: str = "p3o.py"


class Result(NamedTuple):
    passed: list[str]  # names of tests, with their parameters
    failed: dict[str, str]  # name: the first line of the message
    trouble: str = ""  # why there is no report of the tests


class Recorder:
    """A plugin of pytest that records which tests pass and what the others say."""

    def __init__(self) -> None:
        self.result = Result([], {})

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.split("::")[-1]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.result.failed[name] = message.strip().split("\n")[0][:300]
        elif report.passed and report.when == "call":
            self.result.passed.append(name)

    pytest_collectreport = pytest_runtest_logreport


@functools.cache
def import_once() -> None:
    """Import what every run of the tests needs. Then forget p3o.py: each run loads its own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for each process
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # a forked process cannot use a GPU
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(ROOT))
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama")]
    for name in ("matplotlib.pyplot", "p3o", *models):
        importlib.import_module(name)
    sys.path.remove(str(ROOT))
    for name in list(sys.modules):
        if name.split(".")[0] in ("p3o", "data"):
            del sys.modules[name]
    gc.freeze()  # pytest collects garbage at its end, and need not look through all of this


def run_one(job: Job, folder: Path) -> None:
    """Run the tests in this process and write their result into `folder`."""
    os.setsid()  # what the file starts can then be killed with it
    with open(os.devnull, "w") as nowhere, (folder / "errors.txt").open("w") as errors:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    (folder / "p3o.py").write_text(SOURCE)
    if job.file != "p3o.py":
        shutil.copytree(ROOT / "data", folder / "data")
    (folder / job.file).write_text(job.text)
    recorder = Recorder()
    options = ["-s", "--tb=short", "-p", "no:cacheprovider", f"--file={folder / 'p3o.py'}"]
    pytest.main([*options, *job.options], plugins=[recorder])
    (folder / "result.json").write_text(json.dumps(recorder.result))
    os._exit(0)  # without waiting for threads that the file has started


def result_of(folder: Path) -> Result:
    """Return what `run_one` wrote, or why it wrote nothing."""
    report = folder / "result.json"
    if not report.exists():
        return Result([], {}, "no report: it ended the process")
    result = Result(*json.loads(report.read_text()))
    if result.passed or result.failed:
        return result
    errors = (folder / "errors.txt").read_text(errors="replace")
    reason = re.search("cannot be imported: .*", errors)
    return Result([], {}, f"the file {reason[0]}" if reason else f"no test ran: {errors[-1000:]}")


def kill(process: multiprocessing.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def run_tests(jobs: list[Job], seconds: float = 3600) -> Iterator[Result]:
    """Run the tests for each job, each in its own process, as many at a time as there are cores.

    Yields the results in the order of the jobs. Kills a job that takes longer than `seconds`. The
    processes are forked from this one, so that none has to import the large packages.
    """
    import_once()
    fork = multiprocessing.get_context("fork")
    late = Result([], {}, f"stopped after {seconds:.0f} seconds")
    results = {}  # number of the job: result
    running = {}  # sentinel: number of the job, process, deadline; the oldest first
    started = finished = 0
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(len(jobs))]
        try:
            while finished < len(jobs):
                if finished in results:
                    yield results.pop(finished)
                    finished += 1
                elif started < len(jobs) and len(running) < os.cpu_count():
                    folders[started].mkdir()
                    process = fork.Process(target=run_one, args=(jobs[started], folders[started]))
                    process.start()
                    running[process.sentinel] = started, process, time.monotonic() + seconds
                    started += 1
                else:
                    oldest = next(iter(running))
                    left = max(running[oldest][-1] - time.monotonic(), 0)
                    ended = multiprocessing.connection.wait(running, left)
                    number, process, _ = running.pop(ended[0] if ended else oldest)
                    kill(process)  # and what it started
                    results[number] = result_of(folders[number]) if ended else late
        finally:
            for _, process, _ in running.values():
                kill(process)


def files_with(pattern: str) -> list[str]:
    """Return the test files whose text matches. Other files need not be imported."""
    files = sorted(TESTS.glob("test_*.py"))
    return [str(file) for file in files if re.search(pattern, file.read_text())]


def tests_of(number: int) -> list[str]:
    """Return the options of pytest that choose a problem's tests."""
    return ["-m", f"problem_{number}", *files_with(rf"\bproblem_{number}\b")]


# ---- The hand-out --------------------------------------------------------------------------
def without_asserts(code: str) -> str:
    """Return a notebook's code without its asserts.

    A student's right solution draws other samples, so a claim about a figure may fail by chance.
    """
    lines = code.splitlines(keepends=True)
    for parent in ast.walk(ast.parse(code)):
        block = getattr(parent, "body", None)
        if not isinstance(block, list):  # of an expression, such as a lambda
            continue
        claims = [node for node in block if isinstance(node, ast.Assert)]
        for node in claims:
            first, *rest = range(node.lineno - 1, node.end_lineno)
            lines[first] = " " * node.col_offset + "pass\n" if claims == block else ""
            for line in rest:
                lines[line] = ""
    return "".join(lines)


def without_answers(notebook: dict) -> tuple[dict, str]:
    """Return a notebook without its answers and outputs, and a page with the answers."""
    page = "# Answers to the notebook\n"
    cells = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        folded = re.findall(r"<details><summary>.*?</summary>\n(.*?)</details>", text, re.DOTALL)
        asked, *_ = text.split("<details>")
        if folded:
            question = asked[max(0, asked.find("**Think.**")) :].replace("**", "").strip()
            page += f"\n## {question or 'Exercises'}\n\n{folded[0].strip()}\n"
        if "inspect.getsource(p3o" in text or "**7 to 9" in text:
            continue  # these exercises replace lines of the solution
        if re.search(r"\b(compare|pictures|relatives)\b\.", text) and cell["cell_type"] == "code":
            continue  # the relatives' loops give problem 8's away
        if folded and not asked.strip():
            continue
        cell = cell | {"source": asked.rstrip()}
        if cell["cell_type"] == "code":
            code = without_asserts(asked).rstrip()
            cell |= {"source": code, "outputs": [], "execution_count": None}
        cells.append(cell)
    return notebook | {"cells": cells}, page


def handout(folder: Path) -> None:
    """Write two folders: what students get, and what the instructor keeps."""
    notebook, answers = without_answers(json.loads((ROOT / "tutorial.ipynb").read_text()))
    student = folder / "student"
    (student / "tests").mkdir(parents=True)
    (student / "p3o.py").write_text(starter())
    (student / "tutorial.ipynb").write_text(json.dumps(notebook, ensure_ascii=False, indent=1))
    (student / "README.md").write_text((PAGES / "student.md").read_text() + diagnoses())
    ignored = shutil.ignore_patterns("__pycache__", "comparison.csv")
    shutil.copytree(ROOT / "data", student / "data", ignore=ignored)
    for file in ("conftest.py", "toys.py", "problems.py", "requirements.txt"):
        shutil.copy(TESTS / file, student / "tests")
    for file in files_with(r"mark\.problem_"):
        shutil.copy(file, student / "tests")
    instructor = folder / "instructor"
    instructor.mkdir()
    (instructor / "p3o.py").write_text(SOURCE)
    (instructor / "answers.md").write_text(answers)
    (instructor / "hunt.md").write_text(hunt_answers())
    shutil.copy(PAGES / "README.md", instructor)


# ---- The bug hunt --------------------------------------------------------------------------
def hunted(name: str, known: int) -> tuple[Sick, str, range]:
    """Return a student's bug, the source to find it in, and its line numbers there.

    The source shows the first `known` problems solved and no other. The name draws the bug and the
    style of each solution, so comparing with a neighbor or with p3o.py does not show the bug.
    """
    rng = random.Random(name)
    sick = rng.choice([sick for sick in SICK if NUMBERS[sick.wrong.problem] <= known])
    bodies = {}
    for problem in list(PROBLEMS)[:known]:
        styles = [style for style in right() if style.split("__")[0] == problem]
        bodies[problem] = right()[rng.choice(styles)]
    wrong = bodies[sick.wrong.problem] = wrong_body(sick.wrong)
    source = with_bodies(starter(known + 1), bodies)
    before = source[: source.index(wrong)] + wrong.split(sick.wrong.new)[0]
    first = before.count("\n") + 1
    return sick, source, range(first, first + sick.wrong.new.count("\n") + 1)


def sick_run(sick: Sick | None, out: Path) -> None:
    """Make a small run with a bug, or without. What it prints goes to output.txt in `out`."""
    source = SOURCE
    if sick:
        source = with_bodies(source, {sick.wrong.problem: wrong_body(sick.wrong)})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "p3o.py"
        file.write_text(source)
        command = [sys.executable, file, *HUNT_OPTIONS, "--out", out]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{out}: the run failed: {result.stderr.splitlines()[-1]}")
    # the directory's name is the answer
    (out / "output.txt").write_text(result.stdout.replace(str(out), "runs/small"))


def hunt(folder: Path, names: list[str], known: int) -> None:
    """Write each student's symptoms, each student's source, and key.csv with all answers."""
    if not names:
        raise ValueError("name the students, or give their --answers")
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file name; use a name without a slash")
    drawn = {name: hunted(name, known) for name in names}
    runs = {"healthy": None} | {LETTERS[sick.diagnosis]: sick for sick, _, _ in drawn.values()}

    def run_once(letter: str) -> None:
        out = folder / "runs" / letter
        if not (out / "output.txt").exists():
            sick_run(runs[letter], out)
        print(f"run {letter}: done", flush=True)

    def give_symptoms(letter: str, name: str) -> None:
        target = folder / "symptoms" / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("output.txt", "sft.jsonl", "reward.jsonl", "p3o.jsonl"):
            shutil.copy(folder / "runs" / letter / file, target)

    for part in ("runs", "sources"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_once, runs))
    give_symptoms("healthy", "healthy")
    with (folder / "key.csv").open("w", newline="") as file:
        key = csv.writer(file)
        key.writerow(["name", "diagnosis", "first_line", "last_line", "function", "it_should_be"])
        for name, (sick, source, lines) in drawn.items():
            letter = LETTERS[sick.diagnosis]
            give_symptoms(letter, name)
            (folder / "sources" / f"{name}.py").write_text(source)
            wrong = sick.wrong
            key.writerow([name, letter, lines[0], lines[-1], wrong.problem, wrong.old.strip()])


def hunt_results(key: Path, answers: Path) -> None:
    """Print for each student whether the diagnosis and the line are right."""
    with answers.open(newline="") as file:
        found = {row.get("name"): row for row in csv.DictReader(file)}
    if None in found:
        raise ValueError(f"{answers} needs the columns name, diagnosis and line")
    with key.open(newline="") as file:
        for row in csv.DictReader(file):
            answer = found.get(row["name"], {})
            diagnosis = (answer.get("diagnosis") or "").strip().upper() == row["diagnosis"]
            line = (answer.get("line") or "").strip()
            inside = line.isdigit() and int(row["first_line"]) <= int(line) <= int(row["last_line"])
            print(
                f"{row['name']}: diagnosis {'right' if diagnosis else 'wrong'}, "
                f"line {'right' if inside else 'wrong'}: {diagnosis + inside} of 2"
            )


def diagnoses() -> str:
    return "".join(f"- **{letter}** {text}\n" for text, letter in LETTERS.items())


def hunt_answers() -> str:
    """Return the instructor's page: what each bug does to a run, and its line."""

    def lines(text: str, sign: str) -> str:
        return "".join(f"{sign}{line}\n" for line in text.strip("\n").splitlines())

    page = "# The bug hunt: answers\n"
    for sick in sorted(SICK, key=lambda sick: sick.diagnosis):
        page += f"\n## {LETTERS[sick.diagnosis]} {sick.diagnosis}\n\n"
        page += f"`{sick.wrong.problem}`. {sick.symptom}\n\n"
        page += f"```diff\n{lines(sick.wrong.new, '-')}{lines(sick.wrong.old, '+')}```\n"
    return page


# ---- Grading -------------------------------------------------------------------------------
def alone(submission: str, number: int) -> str:
    """Return a submission with one of its problems, and the solutions of the others.

    All stand at the end, so the student's version of the others has no effect. A submission that
    cannot be parsed stays as it is: the tests will say so.
    """
    try:
        mine = functions(submission)
    except (SyntaxError, ValueError):
        return submission
    parts = {problem: functions(SOURCE)[problem].text for problem in PROBLEMS}
    name = list(PROBLEMS)[number - 1]
    parts[name] = mine[name].text if name in mine else ""
    return "\n\n".join([submission, *parts.values()])


def grade(files: list[Path], numbers: list[int], seconds: float) -> dict[Path, list[dict]]:
    """Grade each problem by the share of its tests that pass. Prints the points as they come.

    Each problem stands among the solutions of the other seven, so one mistake counts once. Returns
    for each file its problems as Gradescope wants them.
    """
    cases = [(file, number) for file in files for number in numbers]
    jobs = []
    for file, number in cases:
        jobs.append(Job(alone(file.read_text(errors="replace"), number), tests_of(number)))
    grades = {file: [] for file in files}
    for (file, number), result in zip(cases, run_tests(jobs, seconds), strict=True):
        points, message = 0.0, result.trouble
        if not message:
            failed, tests = result.failed, {*result.failed, *result.passed}
            points = round(10 * (1 - len(failed) / len(tests)), 1)
            message = next((f"{test}: {said}" for test, said in failed.items()), "")
        print(f"{file}: problem {number}: {points} of 10  {message}", flush=True)
        name = f"{number} {list(PROBLEMS)[number - 1]}"
        grades[file].append(dict(name=name, score=points, max_score=10, output=message))
        if number == numbers[-1]:
            print(f"{file}: {total(grades[file])} of {10 * len(numbers)}", flush=True)
    return grades


def total(problems: list[dict]) -> float:
    return round(sum(problem["score"] for problem in problems), 1)


def write_grades(grades: dict[Path, list[dict]], table: Path | None, folder: Path | None) -> None:
    """Write a table of all files, and a results.json for each in Gradescope's format."""
    if folder:
        for file, problems in grades.items():
            (folder / file.stem).mkdir(parents=True, exist_ok=True)
            report = {"score": total(problems), "tests": problems}
            (folder / file.stem / "results.json").write_text(json.dumps(report, indent=2))
    if table:
        with table.open("w", newline="") as out:
            writer = csv.writer(out)
            for i, (file, problems) in enumerate(grades.items()):
                if i == 0:
                    writer.writerow(["file", *[problem["name"] for problem in problems], "score"])
                scores = [problem["score"] for problem in problems]
                writer.writerow([file, *scores, total(problems)])


# ---- Checks of the kit ---------------------------------------------------------------------
def check() -> int:
    """Check each problem's tests, and return the number of files that they misjudge.

    While a problem is not solved, all of its tests must fail. Right solutions in other styles than
    p3o.py's must pass before any later problem is solved. Wrong ones must fail, and the first
    message must name the mistake. The suite itself shows that p3o.py passes.
    """
    cases = []  # title, job, words of the first message
    for number, problem in enumerate(PROBLEMS, 1):
        tests = tests_of(number)
        unsolved = Job(starter(number), tests)
        cases.append((f"{problem}: not solved", unsolved, f"NotImplementedError: problem {number}"))
        for style, body in right().items():
            if style.startswith(f"{problem}__"):
                text = with_bodies(starter(number + 1), {problem: body})
                cases.append((style, Job(text, tests), ""))
        for wrong in WRONG:
            if wrong.problem == problem:
                text = with_bodies(starter(number + 1), {problem: wrong_body(wrong)})
                cases.append((f"{problem}: {wrong.mistake}", Job(text, ["-x", *tests]), wrong.says))
    misjudged = 0
    results = run_tests([job for _, job, _ in cases])
    for (title, job, says), result in zip(cases, results, strict=True):
        test, message = next(iter(result.failed.items()), ("", result.trouble))
        said = f"{test}: {message}"
        fine = says in said if says else not message
        if "-x" not in job.options:  # all must pass, or all must fail
            fine = fine and not (result.passed and result.failed)
        misjudged += not fine
        print(f"{'ok   ' if fine else 'WRONG'} {title}", flush=True)
        if message:
            print(f"        {said[:200]}", flush=True)
    print(f"{len(cases) - misjudged} of {len(cases)} files judged right")
    return misjudged


def plant(named: bool) -> int:
    """Plant each bug, and return the number of those that their test does not catch.

    Prints all tests that catch a bug. If `named`, runs only the one that the catalogue names.
    Without a bug, the tests must pass.
    """
    bugs = BUGS + DATA_BUGS
    tests = {bug.caught_by: str(TESTS) for bug in bugs}
    if named:
        for test in tests:
            (file,) = files_with(rf"\ndef {test}\(")
            tests[test] = f"{file}::{test}"
    file = DATA_BUGS[0].file
    jobs = [Job((ROOT / file).read_text(), sorted(set(tests.values())), file)]
    for bug in bugs:
        options = ["-x"] if named else []
        jobs.append(Job(planted(bug), [*options, tests[bug.caught_by]], bug.file))
    results = run_tests(jobs)
    healthy = next(results)
    if healthy.failed or healthy.trouble:
        sys.exit(f"without any bug: {', '.join(healthy.failed)}{healthy.trouble}")
    missed = 0
    for number, (bug, result) in enumerate(zip(bugs, results, strict=True), 1):
        failed = {name.split("[")[0] for name in result.failed}
        verdict = "caught" if bug.caught_by in failed else "MISSED"
        missed += verdict == "MISSED"
        print(
            f"{number:3} {verdict}  {bug.name}  {result.trouble}\n      by {bug.caught_by}",
            flush=True,
        )
        for test in sorted(failed - {bug.caught_by}):
            print(f"         {test}")
    print(f"{len(bugs) - missed} of {len(bugs)} bugs caught by the test that names them")
    return missed


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_subparsers(dest="command", metavar="COMMAND", required=True).add_parser
    numbers = range(1, len(PROBLEMS) + 1)
    handout_command = add("handout", help="write a folder for students and one for the instructor")
    handout_command.add_argument("folder", type=Path)
    starter_command = add("starter", help="write p3o.py without the eight problems' bodies")
    starter_command.add_argument("file", type=Path)
    grade_command = add("grade", help="give points for each problem; runs the files' code")
    grade_command.add_argument("files", type=Path, nargs="+")
    grade_command.add_argument("--problem", type=int, choices=numbers, help="grade only this one")
    grade_command.add_argument("--seconds", type=float, default=120, help="limit for a problem")
    grade_command.add_argument("--csv", type=Path, help="write a table")
    grade_command.add_argument("--json", type=Path, help="write Gradescope's results.json files")
    hunt_command = add("hunt", help="write, for each student, a run with a bug to find")
    hunt_command.add_argument("folder", type=Path)
    hunt_command.add_argument("names", nargs="*", metavar="NAME", help="a student")
    hunt_command.add_argument(
        "--solved", type=int, choices=numbers, default=8, help="show problems 1 to this one solved"
    )
    hunt_command.add_argument(
        "--answers", type=Path, help="check a table with the columns name, diagnosis and line"
    )
    bug_command = add("bug", help="write p3o.py with a bug planted")
    bug_command.add_argument("number", type=int, help=f"1 to {len(BUGS)}")
    bug_command.add_argument("file", type=Path)
    add("check", help="show that right solutions pass, and that wrong ones fail")
    plant_command = add("plant", help="plant each bug and list the tests that catch it")
    plant_command.add_argument("--named", action="store_true", help="run only the test it names")
    args = parser.parse_args()
    if args.command == "check":
        return int(check() > 0)
    if args.command == "plant":
        return int(plant(args.named) > 0)
    try:
        if args.command == "handout":
            handout(args.folder)
        elif args.command == "grade":
            chosen = [args.problem] if args.problem else list(numbers)
            write_grades(grade(args.files, chosen, args.seconds), args.csv, args.json)
        elif args.command == "hunt" and args.answers:
            hunt_results(args.folder / "key.csv", args.answers)
        elif args.command == "hunt":
            hunt(args.folder, args.names, args.solved)
        elif args.command == "starter":
            write_new(args.file, starter())
        elif 1 <= args.number <= len(BUGS):
            write_new(args.file, planted(BUGS[args.number - 1]))
        else:
            parser.error(f"there is no bug {args.number}, only 1 to {len(BUGS)}")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def write_new(file: Path, text: str) -> None:
    with file.open("x") as out:
        out.write(text)


if __name__ == "__main__":
    sys.exit(main())
