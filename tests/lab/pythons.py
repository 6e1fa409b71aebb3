"""Runs the fast tests on each Python that the agent supports: make test-pythons.

    3.11 to 3.13   the host's own, on PATH or of pyenv -> .venv-VERSION in this checkout
    3.14           Debian's testing suite, in the lab's directory of it (tests/lab/newest.py)

libvirt-python is compiled for each. A Python that is not to be had is named, and the run fails.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tests.lab.image import ImageError, call
from tests.lab.newest import CHECKOUT, ROOT, build_newest_tree, enter, install_checkout

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
FAST = ("tests/test_floors.py", "tests/golden", "tests/unit")
#: What is compiled needs them.
HEADERS = "import os, sysconfig; print(os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))"


def find_python(version: str) -> str | None:
    """Return the host's interpreter of a version, with its headers."""
    installed = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    for found in (f"/usr/bin/python{version}", shutil.which(f"python{version}"), *map(str, installed)):
        if found and Path(found).exists():
            asked = subprocess.run([found, "-c", HEADERS], capture_output=True, text=True, check=False)
            if asked.stdout.strip() == "True":
                return found
    return None


def make_venv(python: str, version: str) -> Path:
    """Return this checkout's virtual environment of a version, made now or before."""
    venv = ROOT / f".venv-{version}"
    installed = venv / ".installed"
    if not installed.exists() or installed.stat().st_mtime < (ROOT / "setup.py").stat().st_mtime:
        call(python, "-m", "venv", str(venv))
        call(str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[fast]")
        installed.touch()
    return venv


def find_command(version: str) -> list[str]:
    """Return the interpreter that runs this checkout on a version, and how it is started.

    Raises:
        ImageError: there is none.
    """
    python = find_python(version)
    if python is not None:
        return [str(make_venv(python, version) / "bin/python")]
    tree = build_newest_tree(report=print)
    place = install_checkout(tree, report=print)
    has = call(*enter(tree, f"{place}/bin/python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")).strip()
    if has != version:
        raise ImageError(f"neither PATH nor pyenv has a Python {version} with its headers; Debian's testing has {has}")
    return enter(tree, "env", f"--chdir={CHECKOUT}", f"{place}/bin/python")


def run_fast(version: str, *arguments: str) -> int:
    """Run the fast tests on a version; pytest's exit status. Another -m among the arguments replaces this one.

    Raises:
        ImageError: there is no such Python.
    """
    # The examples are the same each time: what is new is the Python.
    options = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "--hypothesis-seed=0")
    return subprocess.run(
        [*find_command(version), "-m", "pytest", *options, *FAST, *arguments], cwd=ROOT, check=False
    ).returncode


def main() -> None:
    """Run them on all versions, or those that are named; what follows is for pytest."""
    parser = argparse.ArgumentParser(prog="make test-pythons")
    parser.add_argument("--on", action="append", choices=VERSIONS, help="this version alone; may be given again")
    asked, arguments = parser.parse_known_args()
    failed = []
    for version in asked.on or VERSIONS:
        print(f"==> Python {version}", flush=True)
        try:
            if run_fast(version, "-n", "auto", "--dist", "loadfile", *arguments):
                failed.append(version)
        except ImageError as error:
            print(f"make test-pythons: {error}", file=sys.stderr)
            failed.append(version)
    sys.exit(f"make test-pythons: failed on {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
