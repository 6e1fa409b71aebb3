"""make test-on: what is given to pytest comes through make and a shell as it was."""

import subprocess
from pathlib import Path

import pytest

from tests.lab.suite import set_arguments

# make is not where the newest Python is tried.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "arguments", [["-k", "dimm or virtio"], ["tests/unit", "-m", "not slow"], ["it's", '"$HOME"', "a$(b)", ""], []]
)
def test_arguments_come_through_make_as_they_were(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "Makefile").write_text("test:\n\t@for one in $(ARGS); do printf '%s\\n' \"$$one\"; done\n")
    done = subprocess.run(
        ["make", "-s", "test", set_arguments(arguments)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == arguments
