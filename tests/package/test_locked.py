"""conf/locked: each Python package that is installed, by version and hash; and what the tests run with is that."""

import re
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.package.conftest import ROOT

FILES = sorted((ROOT / "conf/locked").glob("*.txt"))
ENTRY = re.compile(r"(?P<asked>\S+==\S+(?: ; [^\\\n]+)?) \\\n(?P<hashes>(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")


def read_locked(name: str) -> dict[str, Requirement]:
    """The entries of a file by name."""
    text = (ROOT / f"conf/locked/{name}.txt").read_text()
    assert ENTRY.sub("", text) == "", "each line is an entry, or a hash of one"
    found = [Requirement(entry["asked"]) for entry in ENTRY.finditer(text)]
    return {canonicalize_name(one.name): one for one in found}


def applies(one: Requirement, extra: str = "") -> bool:
    """Whether a requirement is for this Python and this extra."""
    return one.marker is None or one.marker.evaluate({"extra": extra})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_package_has_a_version_and_hashes_and_no_address(file: Path) -> None:
    assert read_locked(file.stem)
    assert "://" not in file.read_text()


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_what_the_project_asks_for_is_locked_within_its_bounds(name: str) -> None:
    locked = read_locked(name)
    asked = [Requirement(line) for line in requires("kvmagent") or ()]
    own = [one for one in asked if applies(one)]
    added = [one for one in asked if applies(one, name) and one not in own]
    for one in {"agent": own, "build": [Requirement("setuptools")], "test": own + added}.get(name, added):
        (pin,) = locked[canonicalize_name(one.name)].specifier
        assert one.specifier.contains(pin.version), one


def test_the_tests_run_with_what_is_locked_and_all_of_it_is() -> None:
    locked = read_locked("test")
    for name, one in locked.items():
        if applies(one):
            assert one.specifier.contains(version(name)), f"{name} {version(name)} is installed: make setup"
            needed = [Requirement(line) for line in requires(name) or ()]
            lacking = [str(other) for other in needed if applies(other) and canonicalize_name(other.name) not in locked]
            assert lacking == [], f"{name} needs them; run: make lock"


def test_one_package_has_one_version_in_all_files() -> None:
    versions: dict[str, set[str]] = {}
    for file in FILES:
        for name, one in read_locked(file.stem).items():
            versions.setdefault(name, set()).add(str(one.specifier))
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_setup_takes_nothing_that_is_not_locked() -> None:
    """Every call of pip checks hashes, or takes the project itself and nothing that it needs."""
    makefile, *rules = (
        (ROOT / file).read_text() for file in ("Makefile", "conf/debian/rules", "conf/rpm/kvmagent.spec")
    )
    assert re.search(r"^LOCKED := \$\(PIP\) --require-hashes$", makefile, re.MULTILINE)
    assert all("--no-build-isolation" in text for text in (makefile, *rules))
    calls = re.findall(
        r"^(?:\t.*(?:\$\(PIP\)|\$\(LOCKED\)|pip install)|\$install ).*(?:\\\n.*)*",
        "\n".join((makefile, *rules)),
        re.MULTILINE,
    )
    assert len(calls) >= 10
    checked = ("--require-hashes", "$(LOCKED)", "--no-deps")
    assert [call for call in calls if not any(word in call for word in checked)] == []
