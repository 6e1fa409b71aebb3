"""Writes the lock files beside it: each Python package by version, with the hashes of its archives. For `make lock`.

test.txt      all that `make setup` installs             setup.py, install_requires and the extra "test"
build.txt     what builds a Python package               pyproject.toml, build-system.requires
agent.txt     what the agent's package brings            setup.py, install_requires
EXTRA.txt     what another extra adds                    setup.py, extras_require

The first is resolved first, and the others take its versions: what is shipped is what was tested. Markers choose what a
Python needs: one file is for all that the project runs on. A package keeps its version until UPGRADE names it, or is
"all". No address of a registry is written.
"""

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import metadata, requires
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OLDEST_PYTHON = "3.11"
COMMAND = ["--universal", f"--python-version={OLDEST_PYTHON}", "--generate-hashes", "--no-annotate", "--no-header"]


def find_groups() -> dict[str, list[str]]:
    """The name of each lock file, and what is asked for in it."""
    asked = [Requirement(line) for line in requires("kvmagent") or ()]
    own = [bare(one) for one in asked if fits(one, "")]
    extras = metadata("kvmagent").get_all("Provides-Extra") or ()
    added = {extra: [bare(one) for one in asked if not fits(one, "") and fits(one, extra)] for extra in extras}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    added.pop("fast")  # is part of "test"
    return {"test": own + added.pop("test"), "build": build, "agent": own, **added}


def fits(one: Requirement, extra: str) -> bool:
    """Whether a requirement is asked for with an extra, or with "" by the project itself."""
    return one.marker is None or one.marker.evaluate({"extra": extra})


def bare(one: Requirement) -> str:
    """A requirement without what says for which extra it is."""
    one.marker = None
    return str(one)


def lock(name: str, asked: Iterable[str], upgrade: str) -> None:
    """Write a file; what stands in the first one has the same version here."""
    target = HERE / f"{name}.txt"
    constraints = [] if name == "test" else [f"--constraints={HERE / 'test.txt'}"]
    newer = {"": [], "all": ["--upgrade"]}.get(upgrade, [f"--upgrade-package={upgrade}"])
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run(
        [uv, "pip", "compile", "--quiet", *COMMAND, *constraints, *newer, "-", f"--output-file={target}"],
        input="\n".join(asked),
        text=True,
        check=True,
    )


if __name__ == "__main__":
    for group, wanted in find_groups().items():
        lock(group, wanted, sys.argv[1] if len(sys.argv) > 1 else "")
