"""What a course needs, made from p3o.py itself: starter, solution and tests cannot drift apart.

    python tests/course/course.py handout DIR       # what students get, and the instructor's part
    python tests/course/course.py grade FILE ...    # points by problem; runs the files' code
    python tests/course/course.py starter mine.py   # p3o.py without the bodies of the eight problems
    python tests/course/course.py hunt DIR NAME ... # a sick run for each student: find the bug
    python tests/course/course.py bug 7 buggy.py    # p3o.py with bug 7 planted: find it
    python tests/course/course.py plant             # each bug in turn: which tests catch it
    python tests/course/course.py check             # each problem's tests: fail before, pass after
    python tests/course/course.py solutions         # the tests accept right code, and no wrong code

Check a file with `python -m pytest -q tests --file mine.py`, one problem with `-m problem_3`.
"""

import argparse
import ast
import contextlib
import csv
import functools
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
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
from bugs import BUGS, DATA_BUGS  # noqa: E402
from problems import PROBLEMS  # noqa: E402
from sick import SICK, Sick  # noqa: E402

ROOT = TESTS.parent
HUNT_OPTIONS = ["--small"]
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
# a course tries hundreds of files: each process is forked from one that has the large packages
FORKED = multiprocessing.get_context("forkserver")
LARGE = ["datasets", "matplotlib.pyplot", "pandas", "pytest", "torch"]
FORKED.set_forkserver_preload([*LARGE, "transformers.models.gpt2.modeling_gpt2"])
ONE_AT_A_TIME = threading.Lock()
os.environ["OMP_NUM_THREADS"] = "1"  # a process a core
SOURCE = ROOT / "p3o.py"
NUMBERS = {name: number for number, name in enumerate(PROBLEMS, 1)}
LETTERS = dict(zip(sorted(sick.diagnosis for sick in SICK), string.ascii_uppercase, strict=False))


def starter(source: str, first: int = 1) -> str:
    """The source without the bodies of problem `first` and all after it.

    Docstrings stay, as specification.
    """
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and NUMBERS.get(node.name, 0) >= first:
            problem = f"problem {NUMBERS[node.name]}: {node.name}"
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


@functools.cache
def styles() -> dict[str, str]:
    """Right bodies of the problems' functions: p3o.py's, by their name, and right.py's."""
    found = bodies((TESTS / "course" / "right.py").read_text())
    for name, body in bodies(SOURCE.read_text()).items():
        if name in PROBLEMS:
            found[name] = body
    return found


def definitions(source: str) -> dict[str, str]:
    """A file's functions, whole; of one that is there twice, the last."""
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node, *node.decorator_list], key=lambda part: part.lineno)
            found[node.name] = "".join(lines[first.lineno - 1 : node.end_lineno])
    return found


def plant(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"the file should hold this once: {old}"
    return source.replace(old, new)


def forked(arguments: list[str], log: Path) -> None:
    """A process that runs the tests, and prints into a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(pytest.main([*OPTIONS, *arguments, str(TESTS)]))


def run_tests(*arguments: str) -> tuple[int, str]:
    """Run the tests in a process of their own. Returns its exit status and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = FORKED.Process(target=forked, args=(arguments, log))
        with ONE_AT_A_TIME:  # start() polls other threads' processes, and could take their status
            process.start()
        multiprocessing.connection.wait([process.sentinel])
        with ONE_AT_A_TIME:
            process.join()
        return process.exitcode, log.read_text()


def outcomes(source: str, file: str = "p3o.py", options: tuple = ()) -> dict[str, set[str]]:
    """Run the tests with another p3o.py, or another file of data/.

    Returns the names of the tests that "passed" and "failed", with their parameters.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "data", folder / "data")
        shutil.copy(SOURCE, folder)
        (folder / file).write_text(source)
        _, printed = run_tests("-rA", "--tb=no", f"--file={folder / 'p3o.py'}", *options)
    lines = r"^(PASSED|FAILED|ERROR) \S+?::(.+?)(?: - .*)?$"
    found = re.findall(lines, printed, re.MULTILINE)
    if not found:
        sys.exit(f"the tests did not run:\n{printed[-3000:]}")
    failed = {name for outcome, name in found if outcome != "PASSED"}
    return {"failed": failed, "passed": {name for _, name in found} - failed}


def plant_all(bugs: list, named: bool) -> int:
    """Plant each bug; the test that the catalogue names must catch it.

    Returns the number of those that it did not catch.
    """

    def try_one(bug) -> set[str]:
        source = plant((ROOT / bug.file).read_text(), bug.old, bug.new)
        options = ("-x", "-k", bug.caught_by) if named else ()
        failed = outcomes(source, bug.file, options)["failed"]
        return {name.split("[")[0] for name in failed}

    tests = " or ".join({bug.caught_by for bug in bugs})
    failed = outcomes(SOURCE.read_text(), options=("-k", tests) if named else ())["failed"]
    if failed:
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
        options = ("-x", "--tb=short", f"--file={file}", "-m", f"problem_{number}")
        status, printed = run_tests(*options)
    if status == pytest.ExitCode.OK:
        return ""
    if status != pytest.ExitCode.TESTS_FAILED:
        sys.exit(f"the tests did not run, status {status}:\n{printed[-3000:]}")
    said = [line for line in printed.splitlines() if line.startswith(("E  ", "FAILED"))]
    return "\n".join(said)


def solutions() -> int:
    """Right solutions in other styles must pass their problem's tests, wrong ones must fail.

    Returns the number of those of which that is not so.
    """
    from wrong import WRONG

    source = SOURCE.read_text()
    right = bodies((TESTS / "course" / "right.py").read_text())
    cases = [(name, body, "") for name, body in right.items()]
    for wrong in WRONG:
        body = plant(right[wrong.solution], wrong.old, wrong.new)
        cases.append((f"{wrong.solution}: {wrong.mistake}", body, wrong.says))
    for sick in SICK:
        cases.append((f"{sick.solution}: {sick.diagnosis}", sick_body(sick), ""))

    def try_one(case) -> tuple[int, str]:
        title, body, _ = case
        problem = re.match(r"\w+?(?=__|:|$)", title)[0]
        return NUMBERS[problem], first_message(solved(source, problem, body), NUMBERS[problem])

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


def without_asserts(code: str) -> str:
    """Code whose claims a student's right solution may miss by chance: it draws other samples."""
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
    """A notebook without its answers and outputs, and the answers, as a page."""
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
    """Write what students get, and what the instructor needs, each into a folder of its own."""
    source = SOURCE.read_text()
    notebook, answers = without_answers(json.loads((ROOT / "tutorial.ipynb").read_text()))
    student = folder / "student"
    (student / "tests").mkdir(parents=True)
    (student / "p3o.py").write_text(starter(source))
    (student / "tutorial.ipynb").write_text(json.dumps(notebook, ensure_ascii=False, indent=1))
    pages = TESTS / "course"
    shutil.copy(pages / "student.md", student / "README.md")
    (student / "hunt.md").write_text((pages / "hunt.md").read_text() + diagnoses())
    ignored = shutil.ignore_patterns("__pycache__", "comparison.csv")
    shutil.copytree(ROOT / "data", student / "data", ignore=ignored)
    for file in ("conftest.py", "toys.py", "problems.py", "requirements.txt"):
        shutil.copy(TESTS / file, student / "tests")
    for file in TESTS.glob("test_*.py"):
        if "mark.problem_" in file.read_text() and file.name != "test_course.py":
            shutil.copy(file, student / "tests")
    instructor = folder / "instructor"
    instructor.mkdir()
    (instructor / "p3o.py").write_text(source)
    (instructor / "answers.md").write_text(answers)
    (instructor / "hunt.md").write_text(hunt_answers())
    shutil.copy(pages / "README.md", instructor / "README.md")


# ---- The bug hunt --------------------------------------------------------------------------
def sick_body(sick: Sick) -> str:
    return plant(styles()[sick.solution], sick.old, sick.new)


def hunted(name: str, known: int) -> tuple[Sick, str, range]:
    """A student's bug, the source to find it in, and its line numbers there.

    The source shows the first `known` problems solved, each in a style of its own, and no other:
    all of it is drawn by the name, so that comparing with a neighbour or p3o.py shows no bug.
    """
    rng = random.Random(name)
    sick = rng.choice([s for s in SICK if NUMBERS[s.problem] <= known])
    source = starter(SOURCE.read_text(), known + 1)
    right = styles()
    for problem in list(PROBLEMS)[:known]:
        body = right[rng.choice([style for style in right if style.startswith(f"{problem}__")])]
        if problem == sick.problem:
            body = sick_body(sick)
        source = solved(source, problem, body)
    before = source[: source.index(sick_body(sick))] + sick_body(sick).split(sick.new)[0]
    first = before.count("\n") + 1
    return sick, source, range(first, first + sick.new.strip("\n").count("\n") + 1)


def sick_run(sick: Sick | None, out: Path) -> None:
    """A small run with a bug, or without; what it prints goes to output.txt in its directory."""
    source = SOURCE.read_text()
    if sick:
        source = solved(source, sick.problem, sick_body(sick))
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
    """Write each student's symptoms, each student's source, and key.csv with all the answers."""
    drawn = {name: hunted(name, known) for name in names}
    runs = {"healthy": None}
    for sick, _, _ in drawn.values():
        runs[LETTERS[sick.diagnosis]] = sick
    (folder / "runs").mkdir(parents=True, exist_ok=True)

    def try_one(item) -> None:
        letter, sick = item
        out = folder / "runs" / letter
        if not (out / "output.txt").exists():
            sick_run(sick, out)
        print(f"run {letter}: done", flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(try_one, runs.items()))

    def symptoms(letter: str, name: str) -> None:
        target = folder / "symptoms" / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("output.txt", "sft.jsonl", "reward.jsonl", "p3o.jsonl"):
            shutil.copy(folder / "runs" / letter / file, target)

    symptoms("healthy", "healthy")
    (folder / "sources").mkdir(exist_ok=True)
    with (folder / "key.csv").open("w", newline="") as file:
        key = csv.writer(file)
        key.writerow(["name", "diagnosis", "first_line", "last_line", "function", "it_should_be"])
        for name, (sick, source, lines) in drawn.items():
            letter = LETTERS[sick.diagnosis]
            symptoms(letter, name)
            (folder / "sources" / f"{name}.py").write_text(source)
            key.writerow([name, letter, lines[0], lines[-1], sick.problem, sick.old.strip()])


def hunt_results(key: Path, answers: Path) -> None:
    """Print what is right of each student's answer: name, diagnosis, line."""
    with answers.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row.get("name"): row for row in rows}
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
    """The instructor's page: what each bug looks like, and its line."""
    page = "# The bug hunt: answers\n"
    for text, letter in LETTERS.items():
        (sick,) = [sick for sick in SICK if sick.diagnosis == text]
        page += f"\n## {letter} {text}\n\n`{sick.problem}`. {sick.symptom}\n\n"
        page += f"```diff\n{diff(sick.new, '-')}{diff(sick.old, '+')}```\n"
    return page


def diff(text: str, sign: str) -> str:
    return "".join(f"{sign}{line}\n" for line in text.strip("\n").splitlines())


# ---- Grading -------------------------------------------------------------------------------
def run_limited(command: list[str], seconds: float, errors: Path) -> bool:
    """Run a command, its errors into a file; returns False if it was stopped after some time."""
    with errors.open("w") as file:
        away = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)
        process = subprocess.Popen(command, start_new_session=True, **away)
        try:
            process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()


def alone(submission: str, name: str) -> str:
    """A submission with one of its problems, and the solutions of the others.

    They stand at the end, where they replace what the student may have written twice, or not at
    all. Raises SyntaxError.
    """
    parts = definitions(SOURCE.read_text())
    parts[name] = definitions(submission).get(name, "")
    return "\n\n".join([submission, *[parts[problem] for problem in PROBLEMS]])


def trouble(case: ElementTree.Element) -> ElementTree.Element | None:
    """What pytest's report says of a test that did not pass."""
    failure = case.find("failure")
    return case.find("error") if failure is None else failure


def grade_problem(submission: str, number: int, seconds: float) -> tuple[float, str]:
    """The share of a problem's tests that pass, and the first message of those that do not.

    The other problems' functions are taken from the solution, so that one mistake counts once.
    """
    try:
        submission = alone(submission, list(PROBLEMS)[number - 1])
    except (SyntaxError, ValueError) as error:
        return 0.0, f"the file cannot be read: {error}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "p3o.py"
        file.write_text(submission)
        report = Path(folder) / "report.xml"
        errors = Path(folder) / "errors.txt"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *OPTIONS,
            "-s",
            "--tb=short",
            f"--file={file}",
            f"--junitxml={report}",
        ]
        command += ["-m", f"problem_{number}", str(TESTS)]
        if not run_limited(command, seconds, errors):
            return 0.0, f"stopped after {seconds:.0f} seconds"
        if not report.exists():
            with errors.open(errors="replace") as file:
                reason = re.search("cannot be imported: .*", file.read(10_000))
            return 0.0, f"the file {reason[0]}" if reason else "no report: it ended the process"
        cases = list(ElementTree.parse(report).iter("testcase"))
    if not cases:
        return 0.0, "no test ran"
    bad = [case for case in cases if trouble(case) is not None]
    if not bad:
        return 1.0, ""
    message = (trouble(bad[0]).get("message") or "").splitlines() or [""]
    return 1 - len(bad) / len(cases), f"{bad[0].get('name')}: {message[0][:300]}"


def grade(files: list[Path], numbers: list[int], seconds: float) -> dict[Path, list]:
    """For each submission its problems' shares and messages, printed as they come."""
    jobs = [(file, number) for file in files for number in numbers]

    def try_one(job) -> tuple[float, str]:
        file, number = job
        try:
            submission = file.read_text()
        except (OSError, ValueError) as error:
            return 0.0, f"the file cannot be read: {error}"
        return grade_problem(submission, number, seconds)

    results: dict[Path, list] = {file: [] for file in files}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, number), (share, message) in zip(jobs, pool.map(try_one, jobs), strict=True):
            results[file].append((number, share, message))
            print(f"{file}: problem {number}: {10 * share:.1f} of 10  {message}", flush=True)
            if number == numbers[-1]:
                total = sum(10 * share for _, share, _ in results[file])
                print(f"{file}: {total:.1f} of {10 * len(numbers)}", flush=True)
    return results


def gradescope(results: list) -> dict:
    """A submission's results as Gradescope's results.json has them."""
    tests = []
    for number, share, message in results:
        name = f"{number} {list(PROBLEMS)[number - 1]}"
        score = round(10 * share, 1)
        tests.append({"name": name, "score": score, "max_score": 10, "output": message})
    return {"score": round(sum(test["score"] for test in tests), 1), "tests": tests}


def write_grades(results: dict[Path, list], table: Path | None, folder: Path | None) -> None:
    rows = {file: gradescope(found) for file, found in results.items()}
    if folder:
        for file, row in rows.items():
            (folder / file.stem).mkdir(parents=True, exist_ok=True)
            (folder / file.stem / "results.json").write_text(json.dumps(row, indent=2))
    if table:
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            for i, (submission, row) in enumerate(rows.items()):
                if i == 0:
                    writer.writerow(["file", *[test["name"] for test in row["tests"]], "score"])
                scores = [test["score"] for test in row["tests"]]
                writer.writerow([submission, *scores, row["score"]])


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    about = "write p3o.py without the bodies of the eight problems"
    starter_command = commands.add_parser("starter", help=about)
    bug_command = commands.add_parser("bug", help="write p3o.py with one bug planted")
    bug_command.add_argument("number", type=int, help=f"1 to {len(BUGS)}")
    numbers = range(1, len(PROBLEMS) + 1)
    about = "write a folder for students, without answers, and one for the instructor"
    commands.add_parser("handout", help=about).add_argument("folder", type=Path)
    about = "write a sick run, and the source to find its bug in, for each student"
    hunt_command = commands.add_parser("hunt", help=about)
    hunt_command.add_argument("folder", type=Path)
    hunt_command.add_argument("names", nargs="*", metavar="NAME", help="a student, or several")
    about = "the problems that the source shows solved: this one and those before it"
    hunt_command.add_argument("--solved", type=int, choices=numbers, default=8, help=about)
    about = "check these answers, a table with the columns name, diagnosis and line"
    hunt_command.add_argument("--answers", type=Path, help=about)
    grade_command = commands.add_parser("grade", help="points by problem; runs the files' code")
    grade_command.add_argument("files", type=Path, nargs="+")
    about = "grade this problem only"
    grade_command.add_argument("--problem", type=int, choices=numbers, help=about)
    about = "time limit of a problem"
    grade_command.add_argument("--seconds", type=float, default=120, help=about)
    grade_command.add_argument("--csv", type=Path, help="write a table")
    about = "write a results.json for each file, in Gradescope's format"
    grade_command.add_argument("--json", type=Path, help=about)
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
    if args.command == "hunt":
        bad = [name for name in args.names if Path(name).name != name]
        if bad:
            parser.error(f"{bad[0]!r} is no file name; use a name without a slash")
        if not args.names and not args.answers:
            parser.error("name the students, or give their --answers")
        try:
            if args.answers:
                hunt_results(args.folder / "key.csv", args.answers)
            else:
                hunt(args.folder, args.names, args.solved)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return 0
    if args.command == "grade":
        chosen = [args.problem] if args.problem else list(numbers)
        write_grades(grade(args.files, chosen, args.seconds), args.csv, args.json)
        return 0
    if args.command == "handout":
        try:
            handout(args.folder)
        except FileExistsError:
            parser.error(f"{args.folder} holds a hand-out already; choose another folder")
        return 0
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
