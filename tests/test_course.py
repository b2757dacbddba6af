"""The catalogue of bugs and the starter file fit p3o.py as it is; that every bug is caught, `course.py plant` shows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import course
from bugs import BUGS

TESTS = Path(__file__).parent
SOURCE = course.SOURCE.read_text()


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def test_there_are_at_least_thirty_bugs_each_another_one():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 30
    assert len({SOURCE} | {course.plant(SOURCE, bug.old, bug.new) for bug in BUGS}) == len(BUGS) + 1


def test_a_bug_can_be_planted_and_names_a_test_that_exists():
    tests = "".join(file.read_text() for file in TESTS.glob("test_*.py"))
    for bug in BUGS:
        compile(course.plant(SOURCE, bug.old, bug.new), bug.name, "exec")
        assert f"\ndef {bug.caught_by}(" in tests, bug.name


def test_the_starter_keeps_everything_but_the_bodies_of_the_problems():
    solution, starter = functions(SOURCE), functions(course.starter(SOURCE))
    assert starter.keys() == solution.keys() > course.PROBLEMS.keys()
    for name, node in starter.items():
        if name in course.PROBLEMS:
            assert ast.unparse(node.args) == ast.unparse(solution[name].args)
            assert ast.get_docstring(node) == ast.get_docstring(solution[name]), "the docstring is the specification"
            assert [type(line) for line in node.body] == [ast.Expr, ast.Raise], f"{name} shows its solution"
        else:
            assert ast.unparse(node) == ast.unparse(solution[name])


def test_solving_the_last_problem_leaves_nothing_to_do():
    numbers = range(1, len(course.PROBLEMS) + 2)
    assert [course.starter(SOURCE, n).count("NotImplementedError") for n in numbers] == [
        *range(len(numbers) - 1, -1, -1)
    ]
    assert course.starter(SOURCE, len(course.PROBLEMS) + 1) == SOURCE


def test_the_commands_write_a_file_and_never_over_one(tmp_path):
    def run(*command):
        return subprocess.run([sys.executable, TESTS / "course.py", *command], capture_output=True, text=True)

    file = tmp_path / "mine.py"
    assert run("starter", file).returncode == 0
    assert file.read_text() == course.starter(SOURCE)
    assert run("bug", "7", tmp_path / "bug.py").stdout == "", "no hint of where to look"
    assert (tmp_path / "bug.py").read_text() == course.plant(SOURCE, BUGS[6].old, BUGS[6].new)
    for command in (["starter", file], ["bug", "7", file], ["bug", "0", tmp_path / "a.py"], ["bug", "7", tmp_path]):
        refused = run(*command)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) <= 2
    assert file.read_text() == course.starter(SOURCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bug.py", "mine.py"]


def test_every_problem_has_tests_and_the_readme_lists_it():
    readme = (TESTS.parent / "README.md").read_text()
    assert f"bug 7 of {len(BUGS)} planted" in readme
    tests = "".join(file.read_text() for file in TESTS.glob("test_*.py"))
    for number, name in enumerate(course.PROBLEMS, 1):
        assert re.search(rf"^\| {number} \| `{name}` \|", readme, re.MULTILINE)
        assert f"pytest.mark.problem_{number}\n" in tests
