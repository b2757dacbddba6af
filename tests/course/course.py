"""The assignment kit. It is made from p3o.py itself, so starter, solution and tests agree.

    python tests/course/course.py handout DIR       # two folders: for students, for the instructor
    python tests/course/course.py starter mine.py   # p3o.py without the eight problems' bodies
    python tests/course/course.py grade FILE ...    # points for each problem; runs the files' code
    python tests/course/course.py gradescope FILE.zip   # the same as an autograder for Gradescope
    python tests/course/course.py hunt DIR NAME ... --secret WORD   # for each, a bug to find
    python tests/course/course.py bug 7 buggy.py    # p3o.py with bug 7 planted

After a change to p3o.py or its tests:

    python tests/course/course.py check             # right solutions pass, wrong ones fail
    python tests/course/course.py plant --named     # each bug is caught by the test that names it
    python tests/course/course.py plant             # list all tests that catch each bug; hours

Test a file with `python -m pytest -q tests --file mine.py`, and one problem with `-m problem_3`.
"""

import argparse
import ast
import base64
import json
import re
import shutil
import sys
import textwrap
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bugs import BUGS, DATA_BUGS
from grading import (
    VISIBILITIES,
    autograde,
    grade,
    names_of,
    print_report,
    requirements,
    results_json,
    write_gradescope,
    write_table,
)
from hunt import diagnoses, hunt, hunt_answers, hunt_results
from problems import POINTS, PROBLEMS
from running import CORES, Job, files_with, run_tests, tests_of
from source import (
    NUMBERS,
    PAGES,
    ROOT,
    SOURCE,
    TESTS,
    planted,
    right,
    starter,
    with_bodies,
    wrong_body,
)
from wrong import WRONG


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


LEFT_OUT = """*The runs of this section are left out here, because their code would give problem 8
away. The project's own notebook has them: read it when you have handed in.*"""


def gives_away(cell: dict) -> bool:
    """Return whether a cell shows lines of the solution, or runs code that students do not get."""
    text = "".join(cell["source"])
    if "inspect.getsource(p3o" in text or "**7 to 9" in text:
        return True  # these exercises replace lines of the solution
    if cell["cell_type"] == "code":
        return bool(re.search(r"\b(compare|pictures|relatives)\b\.", text))
    return False


def without_links(text: str, folder: Path) -> str:
    """Return a page on which links to files that are not in the folder are plain text."""

    def plain(match: re.Match) -> str:
        target = match[2].split("#")[0]
        near = "://" in target or not target or (folder / target).exists()
        return match[0] if near else match[1]

    return re.sub(r"\[([^\]\n]*)\]\(([^)\s]*)\)", plain, text)


def without_answers(notebook: dict) -> tuple[dict, str]:
    """Return a notebook without its answers and outputs, and a page with the answers.

    Where the code of a section's pictures goes, the text about them goes, too: only the section's
    head and its questions stay.
    """
    page = "# Answers to the notebook\n"
    sections = []  # lists of cells; each begins with a heading
    for cell in notebook["cells"]:
        if "".join(cell["source"]).startswith("#") and cell["cell_type"] == "markdown":
            sections.append([])
        sections[-1].append(cell)
    cells = []
    for section in sections:
        pictures = any(gives_away(cell) and cell["cell_type"] == "code" for cell in section)
        exercises = "xercises" in "".join(section[0]["source"]).split("\n")[0]
        for cell in section:
            text = "".join(cell["source"])
            folded = re.findall(
                r"<details><summary>(.*?)</summary>\n(.*?)</details>", text, re.DOTALL
            )
            asked = re.split("<details>", text)[0]
            thought = asked[max(0, asked.find("**Think.**")) :].replace("**", "").strip()
            for title, answer in folded:
                page += f"\n## {thought or title}\n\n{answer.strip()}\n"
            if gives_away(cell) or (folded and not asked.strip()):
                continue
            if cell["cell_type"] == "code":
                if pictures and not exercises:
                    continue  # it may use what is left out
                code = without_asserts(asked).rstrip()
                cell = cell | {"source": code, "outputs": [], "execution_count": None}
            else:
                if pictures and not exercises:
                    if cell is section[0]:
                        heading = asked.strip().split("\n")[0]
                        asked = f"{heading}\n\n{LEFT_OUT}"
                    elif "**Think.**" in asked:
                        asked = asked[asked.find("**Think.**") :]
                    else:
                        continue
                cell = cell | {"source": asked.rstrip()}
            cells.append(cell)
    return notebook | {"cells": cells}, page


def scrambled(code: str) -> str:
    """Return a file that does what the code does, and that nobody reads by accident."""
    packed = base64.b64encode(zlib.compress(code.encode(), 9)).decode()
    lines = "".join(f'    "{line}"\n' for line in textwrap.wrap(packed, 90))
    return f'''"""Much of a problem's answer, in a form that nobody reads by accident."""

import base64
import zlib

CODE = (
{lines})
exec(zlib.decompress(base64.b64decode(CODE)))
'''


WORKFLOW_HEAD = """\
# GitHub Classroom: one step for each problem. Each tests the whole file, so a problem that uses an
# unsolved one fails, too
name: Autograding Tests
on: [push, workflow_dispatch]
permissions:
  checks: write
  actions: read
  contents: read
jobs:
  run-autograding-tests:
    runs-on: ubuntu-latest
    if: github.actor != 'github-classroom[bot]'
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.11"
      - run: pip install -q {torch} --index-url https://download.pytorch.org/whl/cpu
      - run: pip install -q -r tests/requirements.txt
"""
WORKFLOW_STEP = """\
      - id: problem{number}
        uses: classroom-resources/autograding-command-grader@v1
        with:
          test-name: {number} {name}
          command: python -m pytest -q tests -m problem_{number}
          timeout: 5
          max-score: {points}
"""


def workflow() -> str:
    """Return the workflow file that GitHub Classroom runs on each push."""
    (torch,) = [line for line in requirements() if line.startswith("torch==")]
    text = WORKFLOW_HEAD.format(torch=torch)
    for name, number in NUMBERS.items():
        text += WORKFLOW_STEP.format(number=number, name=name, points=POINTS[name])
    text += "      - uses: classroom-resources/autograding-grading-reporter@v1\n        env:\n"
    for number in NUMBERS.values():
        result = f"${{{{ steps.problem{number}.outputs.result }}}}"
        text += f"          PROBLEM{number}_RESULTS: {result}\n"
    steps = ",".join(f"problem{number}" for number in NUMBERS.values())
    return f"{text}        with:\n          runners: {steps}\n"


def handout(folder: Path) -> None:
    """Write two folders: what students get, and what the instructor keeps."""
    notebook, answers = without_answers(json.loads((ROOT / "tutorial.ipynb").read_text()))
    student = folder / "student"
    (student / "tests").mkdir(parents=True)
    (student / ".github" / "workflows").mkdir(parents=True)
    (student / ".github" / "workflows" / "classroom.yml").write_text(workflow())
    (student / ".gitignore").write_text(".venv/\nruns/\n__pycache__/\n")
    (student / "p3o.py").write_text(starter())
    (student / "README.md").write_text((PAGES / "student.md").read_text() + diagnoses())
    ignored = shutil.ignore_patterns("__pycache__", "comparison.csv")
    shutil.copytree(ROOT / "data", student / "data", ignore=ignored)
    for file in ("conftest.py", "toys.py", "problems.py"):
        shutil.copy(TESTS / file, student / "tests")
    for path in (Path("tests/expected.py"), Path("data/models.py")):
        (student / path).write_text(scrambled((ROOT / path).read_text()))
    (student / "tests" / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    for file in files_with(r"mark\.problem_"):
        shutil.copy(file, student / "tests")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = without_links(cell["source"], student)
    (student / "tutorial.ipynb").write_text(json.dumps(notebook, ensure_ascii=False, indent=1))
    for page in student.rglob("*.md"):
        page.write_text(without_links(page.read_text(), page.parent))
    instructor = folder / "instructor"
    instructor.mkdir()
    (instructor / "p3o.py").write_text(SOURCE)
    (instructor / "answers.md").write_text(answers)
    (instructor / "hunt.md").write_text(hunt_answers())
    for name in ("README.md", "openers.py", "Dockerfile"):
        shutil.copy(PAGES / name, instructor)


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
    parser = command_line()
    args = parser.parse_args()
    if args.command == "check":
        return int(check() > 0)
    if args.command == "plant":
        return int(plant(args.named) > 0)
    try:
        return obey(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def command_line() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_subparsers(dest="command", metavar="COMMAND", required=True).add_parser
    numbers = range(1, len(PROBLEMS) + 1)
    command = add("handout", help="write a folder for students and one for the instructor")
    command.add_argument("folder", type=Path)
    command = add("starter", help="write p3o.py without the eight problems' bodies")
    command.add_argument("file", type=Path)
    command = add("grade", help="give points for each problem; runs the files' code")
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--problem", type=int, choices=numbers, help="grade only this one")
    limit = "limit for a problem, in seconds of processor time (default: 60)"
    command.add_argument("--seconds", type=int, default=60, help=limit)
    command.add_argument("--jobs", type=int, default=CORES, help="problems graded at a time")
    command.add_argument("--run", action="store_true", help="grade a run of --small, too: minutes")
    command.add_argument("--csv", type=Path, help="write a table")
    command.add_argument("--json", type=Path, help="write Gradescope's results.json files")
    command = add("gradescope", help="write the zip that Gradescope takes as an autograder")
    command.add_argument("file", type=Path)
    command.add_argument("--visibility", choices=VISIBILITIES, default="visible")
    command.add_argument("--run", action="store_true", help="grade a run of --small, too: minutes")
    command = add("autograde", help="what that zip runs: grade ROOT/submission")
    command.add_argument("root", type=Path)
    command.add_argument("--visibility", choices=VISIBILITIES, default="visible")
    command.add_argument("--run", action="store_true")
    command = add("hunt", help="write, for each student, a run with a bug to find")
    command.add_argument("folder", type=Path)
    command.add_argument("names", nargs="*", metavar="NAME", help="a student")
    command.add_argument("--secret", help="a word that you keep: it draws the bugs")
    shown = "show problems 1 to this one solved"
    command.add_argument("--solved", type=int, choices=numbers, default=8, help=shown)
    columns = "check a table with the columns name, diagnosis and line"
    command.add_argument("--answers", type=Path, help=columns)
    command.add_argument("--csv", type=Path, help="with --answers: write a table of what is right")
    command = add("bug", help="write p3o.py with a bug planted")
    command.add_argument("number", type=int, help=f"1 to {len(BUGS)}")
    command.add_argument("file", type=Path)
    add("check", help="show that right solutions pass, and that wrong ones fail")
    command = add("plant", help="plant each bug and list the tests that catch it")
    command.add_argument("--named", action="store_true", help="run only the test it names")
    return parser


def obey(args: argparse.Namespace) -> int:
    """Run one of the commands for a course; return its exit status. Raises ValueError, OSError."""
    if args.command == "handout":
        handout(args.folder)
    elif args.command == "grade":
        return grade_all(args)
    elif args.command == "gradescope":
        write_gradescope(args.file, args.visibility, args.run)
    elif args.command == "autograde":
        autograde(args.root, args.visibility, args.run)
    elif args.command == "hunt" and args.answers:
        hunt_results(args.folder / "key.csv", args.answers, args.csv)
    elif args.command == "hunt":
        hunt(args.folder, args.names, args.solved, args.secret)
    elif args.command == "starter":
        write_new(args.file, starter())
    elif 1 <= args.number <= len(BUGS):
        write_new(args.file, planted(BUGS[args.number - 1]))
    else:
        raise ValueError(f"there is no bug {args.number}, only 1 to {len(BUGS)}")
    return 0


def grade_all(args: argparse.Namespace) -> int:
    """Grade files, print and write the points. Returns 3 if something was not graded, else 0."""
    names = names_of(args.files)
    chosen = [args.problem] if args.problem else list(range(1, len(PROBLEMS) + 1))
    reports = {}
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
    found = grade(args.files, chosen, args.seconds, args.jobs, args.run)
    for name, report in zip(names, found, strict=True):
        reports[name] = report
        print_report(name, report)
        if args.csv:
            write_table(reports, args.csv)  # anew for each file, so that a stop loses none
        if args.json:
            (args.json / name).mkdir(parents=True, exist_ok=True)
            results = json.dumps(results_json(report), indent=2)
            (args.json / name / "results.json").write_text(results)
    return 3 if any(report.not_graded for report in reports.values()) else 0


def write_new(file: Path, text: str) -> None:
    with file.open("x") as out:
        out.write(text)


if __name__ == "__main__":
    sys.exit(main())
