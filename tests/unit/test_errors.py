import ast
from pathlib import Path

import pytest

from kvmagent.model.errors import CODES, AgentError, Code

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("code", Code)
def test_every_code_has_a_meaning_and_a_remedy(code: Code) -> None:
    assert code.value == code.name
    assert CODES[code].meaning.endswith(".")
    assert CODES[code].remedy.endswith(".")
    assert CODES[code].status in (200, 400, 401, 403, 404, 405, 408, 409, 413, 414, 431, 500, 503)


def test_every_code_is_used() -> None:
    used = set()
    for path in [*(ROOT / "kvmagent").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Code":
                used.add(node.attr)
    assert used == {code.name for code in Code}


def test_an_error_takes_the_code_s_own_remedy_unless_a_better_one_is_known() -> None:
    assert AgentError(Code.NO_ACPI, "m").remedy == CODES[Code.NO_ACPI].remedy
    assert AgentError(Code.NO_ACPI, "m", remedy="r").remedy == "r"
    assert AgentError(Code.VM_NOT_FOUND, "m").status == 404
