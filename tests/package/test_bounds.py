"""What is used from inside has an upper bound, and the tests run with the newest that it lets in."""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BOUNDED = dict(re.findall(r'"(cherrypy|cheroot)(>=[.\d]+,<\d+)"', (ROOT / "setup.py").read_text()))
#: What stands on their internals: framing, limits, threads, TLS, answers.
TESTS = ("tests/http/test_security_limits.py", "tests/http/test_refusals.py", "tests/http/test_tasks.py")


@pytest.mark.parametrize("package", ["cherrypy", "cheroot"])
def test_a_package_whose_internals_are_used_is_bounded(package: str) -> None:
    low, high = re.findall(r"\d+(?:\.\d+)*", BOUNDED[package])
    assert int(low.partition(".")[0]) <= int(version(package).partition(".")[0]) < int(high)


def test_the_agent_serves_with_the_newest_that_are_allowed(tmp_path: Path) -> None:
    """Where this run's own are the newest, all other tests are the proof."""
    wanted = [name + bounds for name, bounds in BOUNDED.items()]
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade")
    run(*command, "--target", str(tmp_path), *wanted)
    newest = {found.name.lower(): found.version for found in distributions(path=[str(tmp_path)])}
    assert set(BOUNDED) <= set(newest)
    if any(newest[name] != version(name) for name in BOUNDED):
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        ran = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, PYTHONPATH=path)
        assert " passed" in ran, newest


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout
