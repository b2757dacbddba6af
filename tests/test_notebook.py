"""The committed notebook was run from top to bottom without an error, and redefines nothing.

To show that it still runs, run it: `jupyter execute tutorial.ipynb`.
"""

import ast
import json
import re
from pathlib import Path

import pytest

import p3o

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads((ROOT / "tutorial.ipynb").read_text())["cells"]


def test_every_code_cell_was_run_in_order_without_an_error(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10


def test_it_redefines_nothing_of_p3o(cells):
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    own = {name for name, value in vars(p3o).items() if getattr(value, "__module__", "") == "p3o"}
    assert "p3o_loss" in own
    for node in ast.walk(ast.parse("\n".join(code))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.name not in own, f"the notebook defines {node.name} again"
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert ast.unparse(node.value) != "p3o", f"the notebook sets p3o.{node.attr}"


def test_each_section_has_a_number_and_a_question(cells):
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) > 8
    for number, section in enumerate(sections, 1):
        assert section.startswith(f"{number}. ")
        title, *_ = section.splitlines()
        assert "<details><summary>" in section, f"section {title} asks nothing"
