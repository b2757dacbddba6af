"""Points for the eight problems and for a run, as text, as a table and for Gradescope."""

import ast
import csv
import json
import os
import re
import resource
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from problems import POINTS, PROBLEMS
from running import CORES, SLOWER, Job, Result, run_tests, tests_of
from source import PAGES, ROOT, SOURCE, TESTS, functions

# Of `p3o.py --small` on the student's file: figure, least, most, points. README.md has the figures
# of healthy runs and of sick ones
RUN = (
    ("win_rate", 0.8, 1.0, 4),
    ("kl_policy", 1.0, 8.0, 3),
    ("finished_policy", 0.95, 1.0, 3),
)
RUN_SECONDS = 900  # of processor time; p3o.py itself takes about 75
# modules of the project's tests, with which a file could look up the solution
KIT = {file.stem for folder in (TESTS, PAGES) for file in folder.glob("*.py")}
VISIBILITIES = ("visible", "after_due_date", "after_published", "hidden")


class Grade(NamedTuple):
    name: str
    points: float | None  # None: not graded
    out_of: int
    message: str


class Report(NamedTuple):
    """The grades of one file."""

    grades: list[Grade]
    note: str = ""  # about the file as a whole

    @property
    def points(self) -> float:
        return round(sum((grade.points or 0.0 for grade in self.grades), 0.0), 1)

    @property
    def not_graded(self) -> list[str]:
        return [grade.name for grade in self.grades if grade.points is None]

    def summary(self) -> str:
        """Return one line: the points, and what the reader must know about them."""
        graded = [grade for grade in self.grades if grade.points is not None]
        line = f"{self.points} of {sum(grade.out_of for grade in graded)}"
        if self.not_graded:
            line += f"; not graded, run again: {', '.join(self.not_graded)}"
        return f"{line}; {self.note}" if self.note else line


# ---- One file ------------------------------------------------------------------------------
def names_of(files: list[Path]) -> list[str]:
    """Return a name for each file: its own, or its folder's if it is called p3o or as another.

    Raises ValueError if two files still have the same name.
    """
    own = Counter(file.stem for file in files)
    names = []
    for file in files:
        shared = file.stem == "p3o" or own[file.stem] > 1
        names.append(file.resolve().parent.name if shared else file.stem)
    taken = {}
    for name, file in zip(names, files, strict=True):
        if name in taken:
            raise ValueError(f"{taken[name]} and {file} are both called {name}; rename one")
        taken[name] = file
    return names


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def fault(text: str) -> str:
    """Return why a text is no Python file, or one that reads the tests' modules, or nothing."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
        why = error.args[0] if error.args else "it is nested too deeply"
        return f"the file cannot be imported: {type(error).__name__}: {why}{line}"
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        for name in imported:
            first, *_ = name.split(".")
            if first in KIT or first == "tests":
                return f"the file imports {name}, a module of the tests (line {node.lineno})"
    return ""


def alone(submission: str, number: int) -> str:
    """Return a submission with one of its problems, and the solutions of the others.

    All stand at the end, so the student's version of the others has no effect.
    """
    mine = functions(submission)
    parts = {problem: functions(SOURCE)[problem].text for problem in PROBLEMS}
    name = list(PROBLEMS)[number - 1]
    parts[name] = mine[name].text if name in mine else ""
    return "\n\n".join([submission, *parts.values()])


def grade_of(number: int, result: Result) -> Grade:
    """Return a problem's points: half for the share of its tests that pass, half if all do.

    A wrong solution passes many tests, on shapes or special cases, so their share alone flatters.
    """
    problem = list(PROBLEMS)[number - 1]
    name, out_of = f"{number} {problem}", POINTS[problem]
    if result.stopped:
        return Grade(name, None, out_of, f"not graded, run again: {result.trouble}")
    if result.trouble:
        return Grade(name, 0.0, out_of, result.trouble)
    failed = set(result.failed)
    passed = set(result.passed) - failed  # a test may fail after it has passed
    share = len(passed) / len(passed | failed)
    points = round(out_of * (share + (not failed)) / 2, 1)
    message = next((f"{test}: {said}" for test, said in result.failed.items()), "")
    return Grade(name, points, out_of, message)


def grade(
    files: list[Path],
    numbers: list[int],
    seconds: int = 60,
    at_once: int = CORES,
    with_run: bool = False,
) -> Iterator[Report]:
    """Grade files, and yield their reports in order.

    Each problem stands among the solutions of the other seven, so one mistake counts once. A file
    that cannot be imported is found out once, not eight times.
    """
    texts = [text_of(file) for file in files]
    faults = [fault(text) for text in texts]
    sound = [i for i, found in enumerate(faults) if not found]
    collect = ["--collect-only", *tests_of(numbers[0])]
    tried = run_tests([Job(alone(texts[i], numbers[0]), collect) for i in sound], seconds, at_once)
    stopped = set()
    for i, result in zip(sound, tried, strict=True):
        # when tests are only collected, none passes or fails: no report of why is good news
        if not result.trouble.startswith("no test ran"):
            faults[i] = result.trouble
            if result.stopped:
                stopped.add(i)
    cases = [(i, number) for i in sound if not faults[i] for number in numbers]
    jobs = [Job(alone(texts[i], number), tests_of(number)) for i, number in cases]
    results = run_tests(jobs, seconds, at_once)
    for i, file in enumerate(files):
        grades = []
        for number in numbers:
            problem = list(PROBLEMS)[number - 1]
            if faults[i]:
                points = None if i in stopped else 0.0
                grades.append(Grade(f"{number} {problem}", points, POINTS[problem], ""))
            else:
                grades.append(grade_of(number, next(results)))
        if with_run:
            points = None if i in stopped else 0.0
            grades.append(Grade("run", points, 10, "") if faults[i] else grade_run(file))
        yield Report(grades, faults[i])


def grade_run(file: Path, options: tuple[str, ...] = ("--small",)) -> Grade:
    """Run the student's whole file, and compare the figures that it writes with RUN."""
    out_of = sum(points for *_, points in RUN)

    def limit() -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (RUN_SECONDS, RUN_SECONDS + 5))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        (Path(folder) / "p3o.py").write_text(text_of(file))
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
        }
        command = [sys.executable, Path(folder) / "p3o.py", *options, "--out", out]
        with (Path(folder) / "errors.txt").open("w") as errors:
            try:
                result = subprocess.run(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    preexec_fn=limit,
                    timeout=SLOWER * RUN_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return Grade("run", None, out_of, "not graded, run again: it took too long")
        if result.returncode < 0:
            return Grade("run", None, out_of, "not graded, run again: a limit stopped it")
        summary = out / "summary.json"
        if result.returncode or not summary.exists():
            last = (Path(folder) / "errors.txt").read_text(errors="replace").strip().split("\n")[-1]
            return Grade("run", 0.0, out_of, f"p3o.py --small did not end: {last[:300]}")
        try:
            found = json.loads(summary.read_text())
            figures = {name: float(found[name]) for name, *_ in RUN}
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError, OSError) as error:
            said = f"summary.json is not what p3o.py writes: {type(error).__name__} {error}"
            return Grade("run", 0.0, out_of, said[:300])
    points, said = 0, []
    for name, least, most, worth in RUN:
        inside = least <= figures[name] <= most
        points += worth * inside
        wanted = f"{least:g} to {most:g}"
        said.append(f"{name} {figures[name]}" + ("" if inside else f", not {wanted}"))
    return Grade("run", float(points), out_of, "; ".join(said))


def print_report(name: str, report: Report) -> None:
    if not report.note:
        for grade in report.grades:
            points = "not graded" if grade.points is None else f"{grade.points} of {grade.out_of}"
            message = grade.message.removeprefix("not graded, ")
            print(f"{name}: {grade.name}: {points}  {message}".rstrip())
    print(f"{name}: {report.summary()}", flush=True)


def write_table(reports: dict[str, Report], table: Path) -> None:
    """Write one row for each file. What was not graded stays empty, and so does its sum."""
    with table.open("w", newline="") as out:
        writer = csv.writer(out)
        for i, (name, report) in enumerate(reports.items()):
            if i == 0:
                writer.writerow(["name", *[g.name for g in report.grades], "points", "note"])
            points = ["" if g.points is None else g.points for g in report.grades]
            total = "" if report.not_graded else report.points
            writer.writerow([name, *points, total, report.summary().partition("; ")[2]])


# ---- Gradescope ----------------------------------------------------------------------------
def results_json(report: Report, seconds: float = 0.0, visibility: str = "visible") -> dict:
    """Return a report in the format of Gradescope's results.json.

    A problem that was not graded has no score there. Its text says so, and the head of the page
    if that is visible.
    """
    tests = []
    for number, grade in enumerate(report.grades, 1):
        test = {
            "name": grade.name,
            "number": str(number),
            "max_score": grade.out_of,
            "output": grade.message or report.note,
            "output_format": "text",
            "visibility": visibility,
        }
        if grade.points is not None:
            test["score"] = grade.points
            test["status"] = "passed" if grade.points == grade.out_of else "failed"
        tests.append(test)
    return {
        "score": report.points,
        "execution_time": round(seconds),
        # it has no visibility of its own, so it shows no points before the tests do
        "output": report.summary() if visibility == "visible" else report.note[:300],
        "output_format": "text",
        "stdout_visibility": "hidden",
        "tests": tests,
    }


def submission_in(folder: Path) -> Path:
    """Return the one file that a student has handed in. Raises ValueError."""
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else []
    files = [file for file in files if file.is_file() and "__MACOSX" not in file.parts]
    named = [file for file in files if file.name == "p3o.py"]
    for found in (named, files):
        if len(found) == 1:
            return found[0]
    shown = ", ".join(str(file.relative_to(folder)) for file in files[:9]) or "no Python file"
    raise ValueError(f"hand in one file called p3o.py; there is {shown}")


def autograde(root: Path, visibility: str, with_run: bool = False, seconds: int = 60) -> None:
    """Grade root/submission into root/results/results.json, as Gradescope wants it."""
    began = time.monotonic()
    numbers = list(range(1, len(PROBLEMS) + 1))
    try:
        file = submission_in(root / "submission")
        (report,) = grade([file], numbers, seconds, at_once=2, with_run=with_run)
    except ValueError as error:
        grades = [Grade(f"{n} {p}", 0.0, POINTS[p], "") for n, p in enumerate(PROBLEMS, 1)]
        report = Report(grades + [Grade("run", 0.0, 10, "")] * with_run, str(error))
    (root / "results").mkdir(exist_ok=True)
    results = results_json(report, time.monotonic() - began, visibility)
    (root / "results" / "results.json").write_text(json.dumps(results, indent=2))
    print(report.summary())


SETUP = """\
#!/usr/bin/env bash
# Installs what the grading needs, once, when Gradescope builds the image
set -e
cd "$(dirname "$0")"
if command -v apt-get > /dev/null; then
    apt-get update && apt-get install -y python3-venv
fi
# the packages need Python 3.11, which uv brings where the image's own is older
python3 -m venv tools
tools/bin/pip install -q uv
tools/bin/uv venv --seed --python 3.11 .venv
.venv/bin/pip install -q torch=={torch} --index-url https://download.pytorch.org/whl/cpu
.venv/bin/pip install -q -r requirements.txt
"""

AUTOGRADER = """\
#!/usr/bin/env bash
# Gradescope copies this file beside source/, submission/ and results/, and runs it there
cd "$(dirname "$0")"
export HF_HUB_OFFLINE=1
source/.venv/bin/python source/tests/course/course.py autograde . {options}
"""


def requirements() -> list[str]:
    """Return the requirements of the hand-out and the grading: what they run, and no more."""
    lines = (TESTS / "requirements.txt").read_text().splitlines()
    needless = ("trl", "accelerate", "peft", "ruff", "pytest-xdist", "nbclient")
    return [line for line in lines if re.split("[=<>]", line)[0] not in needless]


def write_gradescope(target: Path, visibility: str, with_run: bool) -> None:
    """Write the zip that Gradescope takes as an autograder. It holds the solution."""
    (torch,) = [line.split("==")[1] for line in requirements() if line.startswith("torch==")]
    options = f"--visibility {visibility}" + " --run" * with_run
    needed = "\n".join(line for line in requirements() if not line.startswith(("matpl", "ipyk")))
    scripts = {
        "setup.sh": SETUP.format(torch=torch),
        "run_autograder": AUTOGRADER.format(options=options),
        "requirements.txt": needed + "\n",
    }
    files = [ROOT / "p3o.py", *sorted((ROOT / "data").rglob("*")), *sorted(TESTS.glob("*.py"))]
    files += [file for file in sorted(PAGES.glob("*.py")) if not file.name.startswith("test_")]
    with zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as out:
        for name, text in scripts.items():
            entry = zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0))
            entry.external_attr = (stat.S_IFREG | 0o755) << 16  # both scripts can be executed
            entry.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(entry, text)
        for file in files:
            hidden = "__pycache__" in file.parts or file.name == "comparison.csv"
            if file.is_file() and not hidden:
                out.write(file, file.relative_to(ROOT))
