"""The assignment kit fits p3o.py as it is: starter, hand-out, bug hunt, grading, catalogue of bugs.

`course.py check` and `course.py plant --named` run the tests against all solutions and all bugs.
"""

import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import course
import pytest
from bugs import BUGS, DATA_BUGS
from conftest import ROOT, TESTS
from course import SOURCE, functions, starter, with_bodies
from problems import PROBLEMS
from wrong import SICK

PAGE = (TESTS / "course" / "README.md").read_text()


def kit(*command) -> subprocess.CompletedProcess:
    tool = TESTS / "course" / "course.py"
    return subprocess.run([sys.executable, tool, *command], capture_output=True, text=True)


def test_every_bug_can_be_planted_and_names_one_test():
    bugs = BUGS + DATA_BUGS
    assert len({bug.name for bug in bugs}) == len({course.planted(bug) for bug in bugs})
    assert len(bugs) >= 100
    assert f"bug 7 of {len(BUGS)} planted" in PAGE
    assert f"{len(DATA_BUGS)} of them in `data/`" in PAGE
    for bug in bugs:
        compile(course.planted(bug), bug.name, "exec")
        assert len(course.files_with(rf"\ndef {bug.caught_by}\(")) == 1, bug.name
    assert {bug.file for bug in BUGS} == {"p3o.py"}, "these are handed out"


def test_every_problem_has_tests_a_row_in_the_page_and_needs_no_later_problem():
    for number, (name, function) in enumerate(
        ((name, functions(SOURCE)[name]) for name in PROBLEMS), 1
    ):
        assert re.search(rf"^\| {number} \| `{name}` \|", PAGE, re.MULTILINE)
        assert course.files_with(rf"mark\.problem_{number}\b")
        for later in list(PROBLEMS)[number:]:
            assert not re.search(rf"\b{later}\(", function.body), f"{name} calls {later}"


def test_the_starter_keeps_everything_but_the_bodies_of_the_problems():
    for first in range(1, len(PROBLEMS) + 2):
        solved = list(PROBLEMS)[: first - 1]
        for mine, solution in zip(
            ast.parse(starter(first)).body, ast.parse(SOURCE).body, strict=True
        ):
            if getattr(mine, "name", None) in PROBLEMS and mine.name not in solved:
                assert [type(line) for line in mine.body] == [ast.Expr, ast.Raise]
                solution.body[1:] = mine.body[1:]  # the rest is compared
            assert ast.unparse(mine) == ast.unparse(solution)


def test_the_commands_write_a_file_and_never_over_one(tmp_path, monkeypatch, capsys):
    def run(*command) -> int:
        monkeypatch.setattr(sys, "argv", ["course.py", *map(str, command)])
        try:
            return course.main()
        except SystemExit as stop:
            return stop.code

    file = tmp_path / "mine.py"
    bug = tmp_path / "bug.py"
    assert run("starter", file) == 0
    assert file.read_text() == starter()
    assert run("bug", "7", bug) == 0
    assert capsys.readouterr().out == "", "no hint of where to look"
    assert bug.read_text() == course.planted(BUGS[6])
    for command in (
        ["starter", file],
        ["bug", "7", file],
        ["bug", "0", tmp_path / "a.py"],
        ["bug", "7", tmp_path],
        ["hunt", tmp_path],
        ["hunt", tmp_path, "../Ada"],
        ["hunt", tmp_path, "--answers", file],  # no table, and nobody hunted
        ["grade", tmp_path / "missing.py"],
    ):
        assert run(*command) == 2
        assert capsys.readouterr().err.count("error: ") == 1
    assert file.read_text() == starter()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bug.py", "mine.py"]


# ---- The hand-out --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def handed_out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("course") / "out"
    course.handout(folder)
    return folder


def solution_lines() -> set[str]:
    """Return the lines of the eight solutions that are nowhere else in p3o.py."""
    lines = set()
    for name in PROBLEMS:
        for line in functions(SOURCE)[name].body.splitlines():
            code = line.split("  #")[0].strip()
            if len(code) > 25 and not code.startswith("#") and code not in starter():
                lines.add(code)
    return lines


def test_the_students_part_holds_no_answer(handed_out):
    answers = solution_lines()
    assert len(answers) > 60
    student = handed_out / "student"
    for path in student.rglob("*"):
        if path.suffix in (".py", ".md", ".ipynb", ".txt"):
            text = path.read_text()
            for line in answers:
                assert line not in text, f"{path.relative_to(student)} shows a solution"
            assert "<details>" not in text, f"{path.relative_to(student)} shows an answer"
    assert not list(handed_out.rglob(".git"))
    names = {path.name for path in student.rglob("*.py")}
    assert not names & {"bugs.py", "right.py", "wrong.py", "course.py", "test_course.py"}
    answered = (handed_out / "instructor" / "answers.md").read_text()
    asked = (ROOT / "tutorial.ipynb").read_text().count("<details>")
    assert answered.count("\n## ") == asked
    page = (student / "README.md").read_text()
    answered = (handed_out / "instructor" / "hunt.md").read_text()
    for sick in SICK:
        assert sick.diagnosis in page
        assert sick.symptom in answered


def test_the_students_notebook_keeps_every_section_and_runs_nothing_of_the_solutions(handed_out):
    notebook = json.loads((handed_out / "student" / "tutorial.ipynb").read_text())
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    whole = (ROOT / "tutorial.ipynb").read_text()
    sections = re.findall(r'"## (\d+)\.', whole)
    assert re.findall(r"^## (\d+)\.", text, re.MULTILINE) == sections
    assert len(sections) >= 10
    assert "getsource" not in text
    assert not re.search(r"\b(compare|pictures|relatives)\.\w+\(", text), "they are not handed out"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            nodes = ast.walk(ast.parse(cell["source"]))
            assert not any(isinstance(node, ast.Assert) for node in nodes)
    assert text.count("**Think.**") >= 10


def test_the_hand_out_checks_itself(handed_out):
    """With its own tests, in its own folder: problem 5 is solved here, and problem 4 is not."""
    student = handed_out / "student"
    mine = handed_out / "mine.py"
    name = "bradley_terry_loss"
    mine.write_text(with_bodies(starter(), {name: functions(SOURCE)[name].body}))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "tests"]
    command += ["--file", mine, "-m", "problem_4 or problem_5"]
    printed = subprocess.run(command, cwd=student, capture_output=True, text=True).stdout
    assert "NotImplementedError: problem 4: reward_scores" in printed
    assert printed.count("\nPASSED ") >= 3


# ---- The bug hunt --------------------------------------------------------------------------
def test_a_dozen_bugs_each_with_a_diagnosis_and_symptoms_of_its_own():
    assert len(course.LETTERS) == len({sick.symptom for sick in SICK}) == len(SICK) >= 12


@pytest.mark.parametrize("known", [3, 8])
def test_a_hunts_source_shows_what_is_solved_and_the_key_points_at_its_bug(known):
    drawn = [course.hunted(f"student {i}", known) for i in range(15)]
    assert course.hunted("student 0", known) == drawn[0], "the name alone decides"
    assert len({sick.diagnosis for sick, _, _ in drawn}) >= 4
    for sick, source, lines in drawn:
        assert course.NUMBERS[sick.wrong.problem] <= known
        compile(source, "source", "exec")
        there = source.splitlines(keepends=True)[lines[0] - 1 : lines[-1]]
        assert sick.wrong.new in "".join(there)
        assert len(there) == len(sick.wrong.new.splitlines())
        shown = functions(source)
        for number, problem in enumerate(PROBLEMS, 1):
            assert ("NotImplementedError" in shown[problem].body) == (number > known)


def test_sources_of_two_students_differ_in_more_than_their_bugs():
    """`diff` must not show the bug, not even between neighbors with the same one."""
    sources = [functions(course.hunted(name, 8)[1]) for name in ("Ada", "Blaise", "Carl", "Dana")]
    sources.append(functions(SOURCE))
    for i, mine in enumerate(sources):
        for theirs in sources[:i]:
            assert sum(mine[name].body != theirs[name].body for name in PROBLEMS) >= 3


def test_a_hunt_gives_symptoms_then_sources_and_checks_both_answers(tmp_path, monkeypatch, capsys):
    rows = (ROOT / "data" / "train.jsonl").read_text().splitlines()[:100]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    quick = f"--small --data {tmp_path / 'few.jsonl'} --epochs 1 --iterations 1 --pairs 8"
    monkeypatch.setattr(course, "HUNT_OPTIONS", [*quick.split(), "--minibatch", "8"])
    sick, source, lines = course.hunted("Ada", 8)
    course.hunt(tmp_path, ["Ada"], 8)
    assert (tmp_path / "sources" / "Ada.py").read_text() == source
    for name in ("Ada", "healthy"):
        given = tmp_path / "symptoms" / name
        files = {path.name for path in given.iterdir()}
        assert files == {"output.txt", "sft.jsonl", "reward.jsonl", "p3o.jsonl"}
        assert "win_rate" in (given / "output.txt").read_text()
        assert ", in runs/small\n" in (given / "output.txt").read_text()
        for file in given.iterdir():
            assert str(tmp_path / "runs") not in file.read_text(), "it names the diagnosis"
    letter = course.LETTERS[sick.diagnosis]
    answers = tmp_path / "answers.csv"
    for row, says in (
        (f"Ada,{letter.lower()},{lines[-1]}\n", "diagnosis right, line right: 2 of 2"),
        (f"Ada,{letter},{lines[-1] + 1}\n", "diagnosis right, line wrong: 1 of 2"),
        ("Ada,?,somewhere\n", "diagnosis wrong, line wrong: 0 of 2"),
        ("", "diagnosis wrong, line wrong: 0 of 2"),
    ):
        answers.write_text(f"name,diagnosis,line\n{row}")
        course.hunt_results(tmp_path / "key.csv", answers)
        assert capsys.readouterr().out.splitlines()[-1] == f"Ada: {says}"


# ---- Grading -------------------------------------------------------------------------------
def submissions() -> list[tuple[str, str]]:
    """Return every kind of accident, with words of its message. Only problem 5 is graded."""
    name = "bradley_terry_loss"
    empty = starter()
    mine = with_bodies(empty, {name: course.right()[f"{name}__softplus"]})
    endless = "    while True:\n        print('x' * 1000000)\n        time.sleep(0.1)\n"
    return [
        ("", mine),  # the other seven problems are not solved
        ("", mine.replace("def collate", "def my_collate")),
        ("NotImplementedError: problem 5", empty),
        ("NotImplementedError: problem 5", mine + "\n" + functions(empty)[name].text),
        ("has no attribute", empty.replace(f"def {name}", "def my_loss")),
        ("stopped after", with_bodies(empty, {name: endless})),
        ("SystemExit", with_bodies(empty, {name: "    raise SystemExit(0)\n"})),
        ("it ended the process", empty + "\nimport os\nos._exit(0)\n"),
        ("cannot be imported: SyntaxError", empty + "\nif True print(1)"),
        ("cannot be imported: ZeroDivisionError", empty + "\n1 / 0\n"),
        ("cannot be imported: SystemExit", empty + "\nimport sys\nsys.exit(0)\n"),
    ]


def test_every_accident_gets_its_line_and_its_points(tmp_path):
    """And no submission spoils another's."""
    files = []
    for i, (_, text) in enumerate(submissions()):
        files.append(tmp_path / f"student{i}.py")
        files[-1].write_text(text)
    table, folder = tmp_path / "grades.csv", tmp_path / "json"
    options = ["--problem", "5", "--seconds", "10", "--csv", table, "--json", folder]
    printed = kit("grade", *files, *options).stdout
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert list(rows[0]) == ["file", "5 bradley_terry_loss", "score"]
    for (says, _), file, row in zip(submissions(), files, rows, strict=True):
        points = 0.0 if says else 10.0
        assert row["file"] == str(file)
        assert float(row["score"]) == float(row["5 bradley_terry_loss"]) == points
        assert f"{file}: {points} of 10\n" in printed
        report = json.loads((folder / file.stem / "results.json").read_text())
        assert report["score"] == points
        (test,) = report["tests"]
        assert test["max_score"] == 10
        assert says in test["output"]
        assert bool(says) == bool(test["output"])
