"""The catalogue of bugs and the starter file fit p3o.py as it is.

That every bug is caught, `course.py plant` shows.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import course
import pytest
from bugs import BUGS, DATA_BUGS
from conftest import ROOT, TESTS
from problems import PROBLEMS
from sick import SICK

SOURCE = course.SOURCE.read_text()
SOLVED = len(PROBLEMS) + 1


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def all_tests() -> str:
    return "".join(file.read_text() for file in TESTS.glob("test_*.py"))


def test_there_are_at_least_thirty_bugs_each_another_one():
    assert len({bug.name for bug in BUGS + DATA_BUGS}) == len(BUGS + DATA_BUGS) >= 30
    planted = {course.plant(SOURCE, bug.old, bug.new) for bug in BUGS}
    assert len(planted) == len(BUGS)
    assert SOURCE not in planted


def test_a_bug_can_be_planted_and_names_a_test_that_exists():
    tests = all_tests()
    for bug in BUGS + DATA_BUGS:
        source = course.plant((ROOT / bug.file).read_text(), bug.old, bug.new)
        compile(source, bug.name, "exec")
        assert f"\ndef {bug.caught_by}(" in tests, bug.name


def test_a_bug_that_is_handed_out_is_in_p3o():
    assert {bug.file for bug in BUGS} == {"p3o.py"}
    assert {bug.file for bug in DATA_BUGS} == {"data/preferences.py", "data/judge.py"}


def test_the_starter_keeps_everything_but_the_bodies_of_the_problems():
    solution = functions(SOURCE)
    starter = functions(course.starter(SOURCE))
    assert starter.keys() == solution.keys() > PROBLEMS.keys()
    for name, node in starter.items():
        if name in PROBLEMS:
            assert ast.unparse(node.args) == ast.unparse(solution[name].args)
            specification = ast.get_docstring(node)
            assert specification == ast.get_docstring(solution[name])
            kinds = [type(line) for line in node.body]
            assert kinds == [ast.Expr, ast.Raise], f"{name} shows its solution"
        else:
            assert ast.unparse(node) == ast.unparse(solution[name])


def test_solving_the_last_problem_leaves_nothing_to_do():
    for solved in range(SOLVED):
        starter = course.starter(SOURCE, solved + 1)
        assert starter.count("NotImplementedError") == len(PROBLEMS) - solved
    assert course.starter(SOURCE, SOLVED) == SOURCE


def test_a_file_passes_fails_or_was_not_tested():
    assert course.first_message(SOURCE, 5) == ""
    assert "NotImplementedError" in course.first_message(course.starter(SOURCE), 5)
    with pytest.raises(SystemExit, match=r"did not run, status 4:\n.*cannot be imported"):
        course.first_message("raise ValueError", 5)


def test_the_commands_write_a_file_and_never_over_one(tmp_path):
    def run(*command):
        tool = TESTS / "course" / "course.py"
        return subprocess.run([sys.executable, tool, *command], capture_output=True, text=True)

    file = tmp_path / "mine.py"
    bug = tmp_path / "bug.py"
    assert run("starter", file).returncode == 0
    assert file.read_text() == course.starter(SOURCE)
    assert run("bug", "7", bug).stdout == "", "no hint of where to look"
    assert bug.read_text() == course.plant(SOURCE, BUGS[6].old, BUGS[6].new)
    for command in (
        ["starter", file],
        ["bug", "7", file],
        ["bug", "0", tmp_path / "a.py"],
        ["bug", "7", tmp_path],
        ["hunt", tmp_path],
        ["hunt", tmp_path, "../Ada"],
        ["hunt", tmp_path, "--answers", file],  # no table, and nobody hunted
    ):
        refused = run(*command)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) <= 2
    assert file.read_text() == course.starter(SOURCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bug.py", "mine.py"]


def test_every_problem_has_tests_and_the_readme_lists_it():
    readme = (ROOT / "README.md").read_text()
    assert f"bug 7 of {len(BUGS)} planted" in readme
    tests = all_tests()
    for number, name in enumerate(PROBLEMS, 1):
        assert re.search(rf"^\| {number} \| `{name}` \|", readme, re.MULTILINE)
        assert f"pytest.mark.problem_{number}\n" in tests


# ---- The hand-out --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def handed_out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("course") / "out"
    course.handout(folder)
    return folder


def solution_lines() -> set[str]:
    """Lines of the eight solutions that stand nowhere else in p3o.py."""
    starter = course.starter(SOURCE)
    lines = set()
    for name, body in course.bodies(SOURCE).items():
        if name in PROBLEMS:
            for line in body.splitlines():
                code = line.split("  #")[0].strip()
                if len(code) > 25 and not code.startswith("#") and code not in starter:
                    lines.add(code)
    return lines


def test_the_students_part_holds_no_answer(handed_out):
    answers = solution_lines()
    assert len(answers) > 80
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


def test_the_students_notebook_keeps_every_section_and_runs_nothing_of_the_solutions(handed_out):
    notebook = json.loads((handed_out / "student" / "tutorial.ipynb").read_text())
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    assert re.findall(r"^## (\d+)\.", text, re.MULTILINE) == [str(n) for n in range(1, 14)]
    assert "getsource" not in text
    tools = {"compare", "pictures", "relatives"}  # they are not handed out
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            nodes = list(ast.walk(ast.parse(cell["source"])))
            assert not any(isinstance(node, ast.Assert) for node in nodes)
            names = {node.id for node in nodes if isinstance(node, ast.Name)}
            assert not names & tools
    assert text.count("**Think.**") >= 10


def test_the_hand_out_checks_itself(handed_out):
    """With its own tests, in its own folder: the starter fails, the solution passes."""
    student = handed_out / "student"

    def check() -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
        command += ["-m", "problem_5"]
        return subprocess.run(command, cwd=student, capture_output=True, text=True).stdout

    assert "NotImplementedError: problem 5: bradley_terry_loss" in check()
    starter = (student / "p3o.py").read_text()
    body = course.bodies(SOURCE)["bradley_terry_loss"]
    (student / "p3o.py").write_text(course.solved(starter, "bradley_terry_loss", body))
    found = check()
    (student / "p3o.py").write_text(starter)
    assert "failed" not in found
    assert "passed" in found


# ---- The bug hunt --------------------------------------------------------------------------
def test_a_dozen_bugs_each_with_a_diagnosis_and_symptoms_of_its_own():
    assert len(course.LETTERS) == len(SICK) >= 12
    assert len({sick.symptom for sick in SICK}) == len(SICK)
    for sick in SICK:
        compile(course.solved(SOURCE, sick.problem, course.sick_body(sick)), "sick", "exec")


@pytest.mark.parametrize("known", [3, 8])
def test_a_hunts_source_shows_what_is_solved_and_the_key_points_at_its_bug(known):
    names = [f"student {i}" for i in range(15)]
    drawn = [course.hunted(name, known) for name in names]
    assert course.hunted(names[0], known) == drawn[0], "the name alone decides"
    in_reach = {sick for sick in SICK if course.NUMBERS[sick.problem] <= known}
    assert {sick for sick, _, _ in drawn} <= in_reach
    assert len({sick for sick, _, _ in drawn}) >= 4
    problems = list(PROBLEMS)
    for sick, source, lines in drawn:
        compile(source, "source", "exec")
        there = source.splitlines(keepends=True)[lines[0] - 1 : lines[-1]]
        assert sick.new in "".join(there)
        assert len(there) == len(sick.new.splitlines())
        shown = course.bodies(source)
        for number, problem in enumerate(problems, 1):
            assert ("NotImplementedError" in shown[problem]) == (number > known)


def test_sources_of_two_students_differ_in_more_than_their_bugs():
    """So that `diff` shows no bug, not even that of a neighbor with the same."""
    sources = [course.hunted(name, 8)[1] for name in ("Ada", "Blaise", "Carl", "Dana", "Emmy")]
    for i, mine in enumerate(sources):
        assert len(course.bodies(mine).items() - course.bodies(SOURCE).items()) >= 7
        for theirs in sources[:i]:
            assert len(course.bodies(mine).items() - course.bodies(theirs).items()) >= 3


def test_a_hunt_gives_symptoms_then_sources_and_checks_both_answers(tmp_path, monkeypatch, capsys):
    rows = (ROOT / "data" / "train.jsonl").read_text().splitlines()[:200]
    (tmp_path / "few.jsonl").write_text("\n".join(rows))
    quick = f"--small --data {tmp_path / 'few.jsonl'} --iterations 1 --pairs 8 --minibatch 8"
    monkeypatch.setattr(course, "HUNT_OPTIONS", quick.split())
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
            assert str(tmp_path) not in file.read_text(), "the run's folder names the diagnosis"
    letter = course.LETTERS[sick.diagnosis]
    answers = tmp_path / "answers.csv"
    for diagnosis, line, says in (
        (letter.lower(), str(lines[-1]), "diagnosis right, line right: 2 of 2"),
        (letter, str(lines[-1] + 1), "diagnosis right, line wrong: 1 of 2"),
        ("?", "somewhere", "diagnosis wrong, line wrong: 0 of 2"),
    ):
        answers.write_text(f"name,diagnosis,line\nAda,{diagnosis},{line}\n")
        course.hunt_results(tmp_path / "key.csv", answers)
        assert capsys.readouterr().out.splitlines()[-1] == f"Ada: {says}"
    answers.write_text("name,diagnosis,line\n")
    course.hunt_results(tmp_path / "key.csv", answers)
    assert "0 of 2" in capsys.readouterr().out


# ---- Grading -------------------------------------------------------------------------------
def submissions() -> list[tuple[str, str]]:
    """Every kind of accident, behind what the report must say; problem 5 alone is graded."""
    starter = course.starter(SOURCE)
    name = "bradley_terry_loss"
    right = course.bodies((TESTS / "course" / "right.py").read_text())[f"{name}__softplus"]
    endless = "    while True:\n        print('x' * 1000)\n"
    return [
        ("", course.solved(starter, name, right)),
        ("NotImplementedError: problem 5", starter),
        ("the file cannot be read", starter + "\nif True print(1)"),
        ("stopped after", course.solved(starter, name, endless)),
        ("SystemExit", course.solved(starter, name, "    raise SystemExit(0)\n")),
        ("it ended the process", starter + "\nimport os\nos._exit(0)\n"),
        ("cannot be imported: ZeroDivisionError", starter + "\n1 / 0\n"),
        ("cannot be imported: SystemExit", starter + "\nimport sys\nsys.exit(0)\n"),
        ("has no attribute", starter.replace(f"def {name}", "def my_loss")),
        (
            "NotImplementedError: problem 5",
            course.solved(starter, name, right) + "\n" + course.definitions(starter)[name],
        ),
    ]


def test_every_accident_gets_its_line_and_its_points(tmp_path, capsys):
    """And no submission spoils another's."""
    files = []
    for i, (_, text) in enumerate(submissions()):
        files.append(tmp_path / f"student{i}.py")
        files[-1].write_text(text)
    results = course.grade(files, [5], seconds=40)
    for (says, _), ((_, share, message),) in zip(submissions(), results.values(), strict=True):
        assert says in message
        assert share == (0.0 if says else 1.0)
    course.write_grades(results, tmp_path / "grades.csv", tmp_path / "json")
    table = (tmp_path / "grades.csv").read_text().splitlines()
    assert table[0] == "file,5 bradley_terry_loss,score"
    assert table[1].endswith("student0.py,10.0,10.0")
    assert len(table) == 1 + len(files)
    report = json.loads((tmp_path / "json" / "student1" / "results.json").read_text())
    assert report["score"] == 0
    assert report["tests"][0]["max_score"] == 10
    assert "student0.py: 10.0 of 10" in capsys.readouterr().out


def test_one_mistake_costs_one_problem():
    """Problem 5 is graded with the solutions of the other seven."""
    right = course.bodies((TESTS / "course" / "right.py").read_text())
    starter = course.starter(SOURCE)
    mine = course.solved(starter, "bradley_terry_loss", right["bradley_terry_loss__softmax"])
    assert course.grade_problem(mine, 1, seconds=60)[0] == 0
    renamed = mine.replace("def collate", "def my_collate")
    assert course.grade_problem(renamed, 5, seconds=60) == (1.0, "")
