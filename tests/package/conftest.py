"""A package as `make deb` builds it, and clean machines to install it on; both are made once, side by side."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.lab.tree import FreshDebian

ROOT = Path(__file__).parents[2]


Done = subprocess.CompletedProcess[str]


class Made(NamedTuple):
    """The package, what lintian says of it (it takes its time), and the fresh Debian that machines are copied from."""

    deb: Path
    lintian: Future[Done]
    debian: FreshDebian


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Compiles in one thread, and waits for the network in the other."""
    if platform.freedesktop_os_release()["ID"] != "debian":
        pytest.skip("the package is for Debian")
    with FreshDebian() as debian, ThreadPoolExecutor() as pool:
        bootstrap = pool.submit(debian.bootstrap)
        deb = build(tmp_path_factory.mktemp("deb"))
        lintian = pool.submit(run, "lintian", "--allow-root", "--fail-on", "error", str(deb))
        bootstrap.result()
        yield Made(deb, lintian, debian)


@pytest.fixture(scope="package")
def deb(made: Made) -> Path:
    """The package."""
    return made.deb


@pytest.fixture(scope="package")
def debian(made: Made) -> FreshDebian:
    """Where clean machines come from."""
    return made.debian


def build(directory: Path) -> Path:
    """Build the package as `make deb` does, with the Python packages of these tests."""
    done = run("sh", str(ROOT / "conf/debian/build.sh"), sys.executable, str(directory))
    assert done.returncode == 0, done.stdout + done.stderr
    (deb,) = directory.glob("kvmagent_*.deb")
    return deb


def run(*command: str) -> Done:
    """Run a command, whatever comes of it."""
    return subprocess.run(command, capture_output=True, text=True, check=False)
