"""The catalogue of bugs and the starter file fit p3o.py as it is.

That every bug is caught, `course.py plant` shows.
"""

import ast
import re
import subprocess
import sys

import course
from bugs import BUGS, DATA_BUGS
from conftest import ROOT, TESTS
from problems import PROBLEMS

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


def test_the_commands_write_a_file_and_never_over_one(tmp_path):
    def run(*command):
        tool = TESTS / "tools" / "course.py"
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
