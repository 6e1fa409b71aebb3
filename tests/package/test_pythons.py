"""The agent runs on each Python that it says it supports.

The newest is tried here, on the fast tests that are no properties: hundreds of examples of each find faults in what is
decided, which is the same on every Python, and take longer than all else. `make test-pythons` runs all, on all.
"""

import re
from pathlib import Path

import pytest

from tests.lab.pythons import VERSIONS, run_fast

pytestmark = pytest.mark.slow

SETUP = Path(__file__).parents[2] / "setup.py"


def test_the_fast_tests_pass_on_the_newest_python() -> None:
    assert run_fast(VERSIONS[-1], "-m", "not slow and not hypothesis") == 0


def test_the_oldest_python_is_the_one_that_is_asked_for() -> None:
    assert re.findall(r'python_requires=">=(.+)"', SETUP.read_text()) == [VERSIONS[0]]
