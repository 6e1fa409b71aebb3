"""The table of what was proven: each test that it names is there, and runs on a real guest."""

import re

import pytest

from tests.docs.blocks import ROOT

NAMED = re.findall(r"`(tests/guest/\w+\.py)::(\w+)`", (ROOT / "docs/install.md").read_text())


def test_what_is_called_proven_has_a_test_on_a_real_guest() -> None:
    assert len(NAMED) >= 9
    for file, name in NAMED:
        text = (ROOT / file).read_text()
        assert f"def {name}(" in text, name
        assert "pytestmark = pytest.mark.guest" in text, file


@pytest.mark.parametrize("file", ["tests/guest/test_power.py", "tests/guest/test_newest.py"])
def test_the_table_names_all_that_is_proven_of_vcpus_that_leave(file: str) -> None:
    tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
    assert sorted(tests) == sorted(name for named, name in NAMED if named == file)
