"""The assignment kit fits p3o.py as it is: starter, hand-out, bug hunt, grading, catalogue of bugs.

`course.py check` and `course.py plant --named` run the tests against all solutions and all bugs.
"""

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import course
import grading
import hunt
import openers
import pytest
import source
import torch
import yaml
from bugs import BUGS, DATA_BUGS
from conftest import ROOT, TESTS
from grading import names_of
from problems import POINTS, PROBLEMS
from running import Result, files_with
from source import SOURCE, functions, right, starter, with_bodies
from wrong import SICK

PAGE = (TESTS / "course" / "README.md").read_text()


def kit(*command) -> subprocess.CompletedProcess:
    tool = TESTS / "course" / "course.py"
    return subprocess.run([sys.executable, tool, *command], capture_output=True, text=True)


def test_every_bug_can_be_planted_and_names_one_test():
    bugs = BUGS + DATA_BUGS
    assert len({bug.name for bug in bugs}) == len({source.planted(bug) for bug in bugs})
    assert len(BUGS) > 100, "as README.md says"
    assert f"{sum('__' in name for name in source.right())} more solutions" in PAGE
    for bug in bugs:
        compile(source.planted(bug), bug.name, "exec")
        assert len(files_with(rf"\ndef {bug.caught_by}\(")) == 1, bug.name
    assert {bug.file for bug in BUGS} == {"p3o.py"}, "these are handed out"


def test_every_problem_has_tests_a_row_in_the_page_and_needs_no_later_problem():
    for number, (name, function) in enumerate(
        ((name, functions(SOURCE)[name]) for name in PROBLEMS), 1
    ):
        assert re.search(rf"^\| {number} \| `{name}` \|", PAGE, re.MULTILINE)
        assert files_with(rf"mark\.problem_{number}\b")
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
    assert bug.read_text() == source.planted(BUGS[6])
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
            if path.suffix == ".py":
                shown = re.search(r"def (\w+_)?by_(hand|clip)\b|logsigmoid|reorder_cache", text)
                assert not shown, f"{path.relative_to(student)} shows {shown[0]}"
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


def test_the_hand_out_needs_only_what_it_runs_and_links_only_to_what_it_holds(handed_out):
    student = handed_out / "student"
    needed = (student / "tests" / "requirements.txt").read_text()
    assert not re.search("trl|peft|accelerate|ruff|xdist", needed)
    assert {"torch", "transformers", "pytest"} <= {line.split("==")[0] for line in needed.split()}
    notebook = json.loads((student / "tutorial.ipynb").read_text())
    pages = {file: file.read_text() for file in student.rglob("*.md")}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    pages[student / "tutorial.ipynb"] = "\n".join(cell["source"] for cell in cells)
    for file, text in pages.items():
        for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", text):
            there = "://" in target or (file.parent / target).exists()
            assert there, f"{file.name} links to {target}"


def test_where_the_code_of_a_picture_goes_its_text_goes_too():
    folded = "<details><summary>A</summary>\nSo.</details>"
    cells = [
        ("markdown", "## 1. A\n\nfine"),
        ("code", "x = 1"),
        ("markdown", "## 2. B\n\nSee the picture."),
        ("code", "pictures.frontier(rows)"),
        ("code", "x = rows"),
        ("markdown", f"As you see.\n\n**Think.** Why?\n\n{folded}"),
    ]
    cells = [dict(cell_type=kind, source=text) for kind, text in cells]
    notebook, answers = course.without_answers({"cells": cells})
    left = [cell["source"] for cell in notebook["cells"]]
    assert left[:2] == ["## 1. A\n\nfine", "x = 1"]
    assert left[2:] == [f"## 2. B\n\n{course.LEFT_OUT}", "**Think.** Why?"]
    assert "Why?\n\nSo." in answers


def test_github_classroom_has_a_step_for_each_problem(handed_out):
    file = handed_out / "student" / ".github" / "workflows" / "classroom.yml"
    job = yaml.safe_load(file.read_text())["jobs"]["run-autograding-tests"]
    graders = [step for step in job["steps"] if "command-grader" in step.get("uses", "")]
    assert [step["with"]["max-score"] for step in graders] == list(POINTS.values())
    for number, step in enumerate(graders, 1):
        assert step["with"]["command"] == f"python -m pytest -q tests -m problem_{number}"
    reporter = job["steps"][-1]
    ids = [step["id"] for step in graders]
    assert reporter["with"]["runners"].split(",") == ids
    for name in ids:
        result = f"${{{{ steps.{name}.outputs.result }}}}"
        assert reporter["env"][f"{name.upper()}_RESULTS"] == result


def test_both_pages_have_the_hours_and_points_of_each_problem():
    student = (TESTS / "course" / "student.md").read_text()
    for page in (PAGE, student):
        assert "8 to 12" in page and "4 to 5" in page
        rows = re.findall(r"^\| \d \| `(\w+)` \|.*\| ([½1-9]+) \| (\d+) \|$", page, re.MULTILINE)
        assert {name: int(points) for name, _, points in rows} == POINTS


def test_the_equilibrium_of_the_open_problem_is_one():
    """It is the reference times exp(w/β), w the win rate against itself."""
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4])
    shares = openers.equilibrium(reference, 0.1)
    again = (reference.log() + openers.P @ shares / 0.1).softmax(0)
    assert torch.allclose(shares, again, atol=1e-4)
    assert torch.allclose(openers.P + openers.P.T, torch.ones(4, 4))
    texts = [*openers.judge.KIND_OPENERS, "Bake it."]
    assert [openers.opening_of(f" {text}") for text in texts] == [0, 1, 2, 3]


# ---- The bug hunt --------------------------------------------------------------------------
def test_a_dozen_bugs_each_with_a_diagnosis_and_symptoms_of_its_own():
    assert len(hunt.LETTERS) == len({sick.symptom for sick in SICK}) == len(SICK) >= 12


@pytest.mark.parametrize("known", [3, 8])
def test_a_hunts_source_shows_what_is_solved_and_the_key_points_at_its_bug(known):
    drawn = [hunt.hunted("secret", f"student {i}", known) for i in range(15)]
    assert hunt.hunted("secret", "student 0", known) == drawn[0], "drawn again, it is the same"
    assert len({sick.diagnosis for sick, _, _ in drawn}) >= 4
    for sick, text, lines in drawn:
        assert source.NUMBERS[sick.wrong.problem] <= known
        compile(text, "source", "exec")
        there = text.splitlines(keepends=True)[lines[0] - 1 : lines[-1]]
        assert sick.wrong.new in "".join(there)
        assert len(there) == len(sick.wrong.new.splitlines())
        shown = functions(text)
        for number, problem in enumerate(PROBLEMS, 1):
            assert ("NotImplementedError" in shown[problem].body) == (number > known)


def test_who_does_not_know_the_secret_cannot_draw_the_bug():
    names = [f"student {i}" for i in range(30)]
    mine, theirs = ([hunt.hunted(word, name, 8) for name in names] for word in ("one", "two"))
    same = sum(a[0] == b[0] for a, b in zip(mine, theirs, strict=True))
    assert same < 10, "another secret should draw other bugs"
    with pytest.raises(ValueError, match="--secret"):
        hunt.hunt(Path("nowhere"), ["Ada"], 8, "")


def test_sources_of_two_students_differ_in_more_than_their_bugs():
    """`diff` must not show the bug, not even between neighbors with the same one."""
    names = ("Ada", "Blaise", "Carl", "Dana")
    sources = [functions(hunt.hunted("secret", name, 8)[1]) for name in names]
    sources.append(functions(SOURCE))
    for i, mine in enumerate(sources):
        for theirs in sources[:i]:
            assert sum(mine[name].body != theirs[name].body for name in PROBLEMS) >= 3


def test_a_hunt_gives_symptoms_then_sources_and_checks_both_answers(tmp_path, monkeypatch, capsys):
    rows = (ROOT / "data" / "train.jsonl").read_text().splitlines()[:100]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    quick = f"--small --data {tmp_path / 'few.jsonl'} --epochs 1 --iterations 1 --pairs 8"
    monkeypatch.setattr(hunt, "OPTIONS", [*quick.split(), "--minibatch", "8"])
    sick, text, lines = hunt.hunted("secret", "Ada", 8)
    hunt.hunt(tmp_path, ["Ada"], 8, "secret")
    assert capsys.readouterr().out == "1 of 2 runs done\n2 of 2 runs done\n", "no diagnosis"
    assert (tmp_path / "sources" / "Ada.py").read_text() == text
    for name in ("Ada", "healthy"):
        given = tmp_path / "symptoms" / name
        files = {path.name for path in given.iterdir()}
        assert files == {"output.txt", "sft.jsonl", "reward.jsonl", "p3o.jsonl"}
        assert "win_rate" in (given / "output.txt").read_text()
        assert ", in runs/small\n" in (given / "output.txt").read_text()
        for file in given.iterdir():
            assert str(tmp_path / "runs") not in file.read_text(), "it names the diagnosis"
    letter = hunt.LETTERS[sick.diagnosis]
    answers, table = tmp_path / "answers.csv", tmp_path / "points.csv"
    for row, says in (
        (f"Ada,{letter.lower()},{lines[-1]}\n", "right,right,2"),
        (f"Ada,{letter},{lines[-1] + 1}\n", "right,wrong,1"),
        (f"Ada,{letter} - the scores fall,{lines[0]}\n", "right,right,2"),
        (f'Ada,"{letter}: first line\nsecond, line",{lines[0]}\n', "right,right,2"),
        (f"Ada,{letter} wrong sign somewhere,²\n", "wrong,wrong,0"),
        ("Ada,?,somewhere\n", "wrong,wrong,0"),
        ("", "wrong,wrong,0"),
    ):
        answers.write_text(f"name,diagnosis,line\n{row}")
        hunt.hunt_results(tmp_path / "key.csv", answers, table)
        assert table.read_text().split() == ["name,diagnosis,line,points", f"Ada,{says}"]
        diagnosis, line, points = says.split(",")
        printed = f"Ada: diagnosis {diagnosis}, line {line}: {points} of 2"
        assert capsys.readouterr().out.splitlines()[-1] == printed
    answers.write_text(f"name;diagnosis;line\nAda;{letter};{lines[0]}\n", encoding="utf-8-sig")
    hunt.hunt_results(tmp_path / "key.csv", answers)
    assert capsys.readouterr().out.endswith("2 of 2\n"), "as some versions of Excel write it"
    answers.write_text("student,letter\n")
    with pytest.raises(ValueError, match="needs the columns name, diagnosis, line"):
        hunt.hunt_results(tmp_path / "key.csv", answers)


# ---- Grading -------------------------------------------------------------------------------
LOSS = "bradley_terry_loss"  # problem 5, the only one that these tests grade
EXIT = "\nimport os\nos._exit(0)\n"


def submissions() -> list[tuple[str, str, float | None]]:
    """Return every kind of accident, with words of its message, and its points."""
    empty = starter()
    mine = with_bodies(empty, {LOSS: right()[f"{LOSS}__softplus"]})

    def body(*lines: str) -> str:
        return with_bodies(empty, {LOSS: "".join(f"    {line}\n" for line in lines)})

    loop = ["while True:", "    print('x' * 1000000)"]
    return [
        ("", mine, 4.0),  # the other seven problems are not solved
        ("", mine.replace("def collate", "def my_collate"), 4.0),
        ("", mine.replace("import json\n", "import json\nprint('x' * 10**7)\n"), 4.0),
        ("NotImplementedError: problem 5", empty, 0.0),
        ("NotImplementedError: problem 5", mine + "\n" + functions(empty)[LOSS].text, 0.0),
        ("has no attribute", empty.replace(f"def {LOSS}", "def my_loss"), 0.0),
        ("seconds of processor time", body(*loop), None),
        ("SystemExit", body("raise SystemExit(0)"), 0.0),
        ("it ended the process", body("import os", "os._exit(0)"), 0.0),
        ("it ended the process", empty + EXIT, 0.0),
        ("SyntaxError: ", empty + "\nif True print(1)", 0.0),
        ("cannot be imported: ", "\0", 0.0),
        ("cannot be imported: ZeroDivisionError", empty + "\n1 / 0\n", 0.0),
        ("cannot be imported: SystemExit", empty + "\nimport sys\nsys.exit(0)\n", 0.0),
        ("cannot be imported: NameError", "", 0.0),
        ("of processor time", empty + "\nwhile True: pass\n", None),
        ("imports source, a module of the tests", body("import source"), 0.0),
        ("imports tests.expected, a module", empty + "\nfrom tests import expected\n", 0.0),
        ("", mine + "\nimport torch.utils.benchmark as source\n", 4.0),
        ("MemoryError", "-" * 200_000 + "1", 0.0),
    ]


def test_every_accident_gets_its_line_and_its_points(tmp_path):
    """And no submission spoils another's. What a limit stops is not graded, which is not 0."""
    files = []
    for i, (_, text, _) in enumerate(submissions()):
        folder = tmp_path / f"student{i}"
        folder.mkdir()
        files.append(folder / "p3o.py")
        files[-1].write_text(text)
    table, folder = tmp_path / "grades.csv", tmp_path / "json"
    options = ["--problem", "5", "--seconds", "3", "--csv", table, "--json", folder]
    done = kit("grade", *files, *options)
    assert done.returncode == 3, "something was not graded"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert list(rows[0]) == ["name", f"5 {LOSS}", "points", "note"]
    for i, ((says, _, points), row) in enumerate(zip(submissions(), rows, strict=True)):
        name = f"student{i}"
        assert row["name"] == name
        assert row["points"] == row[f"5 {LOSS}"] == ("" if points is None else str(points))
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
        if points is None:
            assert f"{name}: 0.0 of 0; not graded, run again: 5 {LOSS}" in lines[-1]
        else:
            assert lines[-1].startswith(f"{name}: {points} of 4")
        report = json.loads((folder / name / "results.json").read_text())
        assert_gradescope(report)
        assert ("run again" in report["output"]) == (points is None)
        assert says in report["tests"][0]["output"]
        assert bool(says) == bool(report["tests"][0]["output"])
    broken = [line for line in done.stdout.splitlines() if line.startswith("student10: ")]
    assert len(broken) == 1, "a syntax error is one line"


def test_two_files_of_the_same_name_are_called_after_their_folders_or_refused():
    files = [Path(name) for name in ("a/p3o.py", "b/p3o.py", "c/mine.py", "d/x.py", "e/x.py")]
    assert names_of(files) == ["a", "b", "mine", "d", "e"]
    assert names_of(files[:1]) == ["a"], "students are told to hand in p3o.py"
    for twice in (["a/p3o.py", "x/a/p3o.py"], ["a/p3o.py", "a.py"], ["a.py", "a.py"]):
        with pytest.raises(ValueError, match="both called"):
            names_of([Path(name) for name in twice])


def test_half_of_the_points_are_for_all_tests_and_half_for_their_share():
    def points(passed, failed) -> float:
        return grading.grade_of(6, Result(passed, failed)).points

    assert points(["a", "b"], {}) == POINTS["p3o_loss"] == 20
    assert points(["a"], {"b": "wrong"}) == 5
    assert points(["a", "b"], {"b": "error in its end"}) == 5
    assert points([], {"a": "wrong"}) == 0
    assert sum(POINTS.values()) == 80


RUN = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[-1])
out.mkdir()
(out / "summary.json").write_text(json.dumps({}))
"""
HEALTHY = dict(win_rate=0.9, kl_policy=2.5, finished_policy=1.0)


@pytest.mark.parametrize(
    ("text", "points", "says"),
    [
        (RUN.format(HEALTHY), 10, ""),
        (RUN.format(HEALTHY | dict(win_rate=0.3)), 6, "win_rate 0.3, not 0.8 to 1"),
        (RUN.format(HEALTHY | dict(kl_policy=300)), 7, "kl_policy 300.0, not 1 to 8"),
        (RUN.format({}), 0, "not what p3o.py writes: KeyError 'win_rate'"),
        (RUN.format([1]), 0, "not what p3o.py writes"),
        (RUN.format("0.9"), 0, "not what p3o.py writes"),
        ("raise ValueError('no')", 0, "did not end: ValueError: no"),
        ("", 0, "did not end"),
        ("import os\nos.kill(os.getpid(), 24)", None, "run again"),
    ],
    ids=["healthy", "loses", "far", "no figures", "list", "number", "error", "empty", "stopped"],
)
def test_a_run_earns_points_for_each_figure_in_its_range(tmp_path, text, points, says):
    file = tmp_path / "p3o.py"
    file.write_text(text)
    found = grading.grade_run(file)
    assert found.points == points and found.out_of == 10
    assert says in found.message


# ---- Gradescope ----------------------------------------------------------------------------
# the fields and values of gradescope-autograders.readthedocs.io, "Autograder Specifications"
FORMATS = ("text", "html", "simple_format", "md", "ansi")
FIELDS = {
    "score": lambda value: type(value) in (int, float),
    "execution_time": lambda value: type(value) in (int, float),
    "output": lambda value: type(value) is str,
    "output_format": FORMATS.__contains__,
    "test_output_format": FORMATS.__contains__,
    "test_name_format": FORMATS.__contains__,
    "visibility": grading.VISIBILITIES.__contains__,
    "stdout_visibility": grading.VISIBILITIES.__contains__,
    "extra_data": lambda value: type(value) is dict,
    "tests": lambda value: type(value) is list,
    "leaderboard": lambda value: type(value) is list,
}
TEST_FIELDS = {
    "score": FIELDS["score"],
    "max_score": FIELDS["score"],
    "status": ("passed", "failed").__contains__,
    "name": FIELDS["output"],
    "name_format": FORMATS.__contains__,
    "number": FIELDS["output"],
    "output": FIELDS["output"],
    "output_format": FORMATS.__contains__,
    "tags": lambda value: type(value) is list,
    "visibility": FIELDS["visibility"],
    "extra_data": FIELDS["extra_data"],
}


def assert_gradescope(results: dict) -> None:
    """A score is needed at the top, or else in each test; all other fields are optional."""
    for field, value in results.items():
        assert FIELDS[field](value), f"{field}: {value}"
    assert "score" in results
    for test in results["tests"]:
        for field, value in test.items():
            assert TEST_FIELDS[field](value), f"{field}: {value}"
        assert 0 <= test.get("score", 0) <= test["max_score"]
    assert results["score"] == pytest.approx(sum(t.get("score", 0) for t in results["tests"]))


@pytest.fixture(scope="module")
def gradescope(tmp_path_factory) -> Path:
    """A folder laid out as Gradescope's /autograder, without a submission."""
    root = tmp_path_factory.mktemp("gradescope") / "autograder"
    (root / "submission").mkdir(parents=True)
    (root / "results").mkdir()
    packed = root.parent / "course.zip"
    assert kit("gradescope", packed, "--visibility", "after_due_date").returncode == 0
    subprocess.run([sys.executable, "-m", "zipfile", "-e", packed, root / "source"], check=True)
    shutil.copy(root / "source" / "run_autograder", root)
    (root / "source" / ".venv").symlink_to(sys.prefix)  # setup.sh makes it
    return root


def test_the_zip_holds_what_it_needs_and_can_be_executed(tmp_path):
    packed = tmp_path / "course.zip"
    grading.write_gradescope(packed, "visible", False)
    with zipfile.ZipFile(packed) as out:
        for name in ("setup.sh", "run_autograder"):
            assert out.getinfo(name).external_attr >> 16 & 0o111, f"{name} is no program"
            assert out.read(name).startswith(b"#!/usr/bin/env bash\n")
        needed = out.read("requirements.txt").decode()
        assert {"p3o.py", "data/judge.py", "tests/conftest.py"} <= set(out.namelist())
    assert "torch==" in needed and "pytest==" in needed and "trl" not in needed
    with pytest.raises(FileExistsError):
        grading.write_gradescope(packed, "visible", False)


def autograded(root: Path, files: dict[str, str]) -> dict:
    shutil.rmtree(root / "submission", ignore_errors=True)
    (root / "submission").mkdir()
    (root / "results" / "results.json").unlink(missing_ok=True)
    for name, text in files.items():
        file = root / "submission" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    command = ["bash", root / "run_autograder"]
    assert subprocess.run(command, cwd="/", capture_output=True).returncode == 0
    results = json.loads((root / "results" / "results.json").read_text())
    assert_gradescope(results)
    return results


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "hand in one file called p3o.py; there is no Python file"),
        ({"a.py": "", "b.py": ""}, "hand in one file called p3o.py; there is a.py, b.py"),
        ({"a/p3o.py": "", "b/p3o.py": ""}, "there is a/p3o.py, b/p3o.py"),
        ({"p3o.py": "if True print(1)", "notes.py": ""}, "SyntaxError"),
        ({"mine.py": EXIT}, "it ended the process"),
    ],
    ids=["no file", "two files", "two p3o.py", "a syntax error", "an exit"],
)
def test_gradescope_gets_its_results_whatever_is_handed_in(gradescope, files, says):
    results = autograded(gradescope, files)
    assert says in results["output"]
    assert results["score"] == 0
    assert [test["max_score"] for test in results["tests"]] == list(POINTS.values())
    assert {test["visibility"] for test in results["tests"]} == {"after_due_date"}


def test_gradescope_grades_each_problem(gradescope):
    """Here two are solved, and one of them does not end: see the limits of the other tests."""
    solved = {LOSS: right()[LOSS], "set_gain": "    import os\n    os.kill(os.getpid(), 24)\n"}
    results = autograded(gradescope, {"p3o.py": with_bodies(starter(), solved)})
    tests = {test["name"]: test for test in results["tests"]}
    assert tests.pop(f"5 {LOSS}")["status"] == "passed"
    stopped = tests.pop("7 set_gain")
    assert "score" not in stopped and "run again" in stopped["output"]
    assert results["output"] == "", "points are not shown before the due date"
    assert {test["score"] for test in tests.values()} == {0.0}
    assert results["score"] == 4
