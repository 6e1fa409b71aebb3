"""What is used from inside has an upper bound, and the tests run with what it lets in."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.mark.parametrize("package", ["cherrypy", "cheroot"])
def test_a_package_whose_internals_are_used_is_bounded(package: str) -> None:
    bounds = re.search(rf'"{package}>=(\d+)[.\d]*,<(\d+)"', SETUP.read_text())
    assert bounds is not None
    assert int(bounds.group(1)) <= int(version(package).partition(".")[0]) < int(bounds.group(2))
