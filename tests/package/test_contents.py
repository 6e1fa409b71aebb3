"""What is in the package, before it is installed anywhere."""

import hashlib
import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import click
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from kvmagent.cli.ctl.exits import MEANINGS
from kvmagent.cli.ctl.main import make_cli
from kvmagent.settings import sample_conf
from tests.lab.agent import find_command
from tests.package.conftest import ROOT, run
from tests.package.test_locked import read_locked

SCRIPTS = [
    "init.d/kvmagent",
    "conf/debian/build.sh",
    "conf/rpm/build.sh",
    *(f"conf/debian/kvmagent.{name}" for name in ("postinst", "prerm", "postrm")),
    "tests/lab/packages.sh",
]
PAGES = [f"usr/share/man/man{page[-1]}/{page}.gz" for page in ("kvmagentctl.1", "kvmagent.conf.5", "kvmagent.8")]


@pytest.fixture(scope="module")
def unpacked(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's files."""
    directory = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["dpkg-deb", "--extract", str(deb), str(directory)], check=True)
    return directory


def test_the_bill_of_materials_names_what_is_in_the_package_by_the_archives_that_are_locked(
    deb: Path, unpacked: Path
) -> None:
    text = deb.with_name(f"{deb.stem}.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    assert bom["metadata"]["component"]["hashes"][0]["content"] == hashlib.sha256(deb.read_bytes()).hexdigest()
    (packages,) = unpacked.glob("usr/lib/kvmagent/lib/python3*/site-packages")
    there = {canonicalize_name(one.metadata["Name"]): one.version for one in distributions(path=[str(packages)])}
    del there["kvmagent"]
    assert {one["name"]: one["version"] for one in bom["components"]} == there
    locked, python = read_locked("agent"), packages.parent.name.removeprefix("python")
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    brought = {name for name, one in locked.items() if not one.marker or one.marker.evaluate(environment)}
    assert set(there) == brought - runpy.run_path(str(ROOT / "conf/leave_out.py"))["DISTRIBUTIONS"]
    lines = (ROOT / "conf/locked/agent.txt").read_text()
    for one in bom["components"]:
        assert locked[one["name"]].specifier.contains(one["version"])
        assert f"--hash=sha256:{one['hashes'][0]['content']}" in lines
        assert one["licenses"][0]
    needed = {entry["ref"]: entry["dependsOn"] for entry in bom["dependencies"]}
    assert set(needed) == {bom["metadata"]["component"]["bom-ref"], *(one["bom-ref"] for one in bom["components"])}
    assert any(ref.startswith("pkg:pypi/libvirt-python@") for ref in needed[bom["metadata"]["component"]["bom-ref"]])


def test_lintian_finds_nothing_that_is_not_explained(deb: Path) -> None:
    done = run("lintian", "--allow-root", "--fail-on", "error", str(deb))
    assert done.returncode == 0, done.stdout + done.stderr
    # Warnings of other projects' files come and go with their versions.
    assert [line for line in done.stdout.splitlines() if "/site-packages/" not in line] == []


def test_shellcheck_finds_nothing() -> None:
    finds_nothing("shellcheck", *(str(ROOT / script) for script in SCRIPTS))


@pytest.mark.parametrize("page", PAGES)
def test_man_and_mandoc_find_nothing_in_a_page(unpacked: Path, page: str) -> None:
    # "man" finds pages of other packages; this package's own are not installed here.
    finds_nothing("mandoc", "-Tlint", "-Wwarning", str(unpacked / page))
    finds_nothing("man", "--warnings", "--local-file", "--encoding=UTF-8", str(unpacked / page), prints=True)


def test_each_setting_is_in_the_manual(unpacked: Path) -> None:
    page = subprocess.run(["zcat", str(unpacked / PAGES[1])], capture_output=True, text=True, check=True).stdout
    keys = [line.partition(" ")[0] for line in (ROOT / "conf/kvmagent.conf").read_text().splitlines() if " =" in line]
    assert len(keys) > 20
    for key in keys:
        assert f".It Ic {key}\n" in page


def test_each_option_of_the_agent_is_in_the_manual(unpacked: Path) -> None:
    page = subprocess.run(["zcat", str(unpacked / PAGES[2])], capture_output=True, text=True, check=True).stdout
    shown = subprocess.run([*find_command(), "--help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"^  (?:-h, )?--([a-z-]+)", shown, re.MULTILINE))
    assert options >= {"config", "set", "help"}
    for option in options:
        assert re.search(rf"^\.It (?:Fl h , )?Fl {re.escape(escaped('-' + option))}( |$)", page, re.MULTILINE), option


def test_each_subcommand_and_option_is_in_the_manual(unpacked: Path) -> None:
    page = subprocess.run(["zcat", str(unpacked / PAGES[0])], capture_output=True, text=True, check=True).stdout
    cli = make_cli()
    described = cli.to_info_dict(click.Context(cli))
    assert len(described["commands"]) > 10
    for name, command in described["commands"].items():
        assert re.search(rf'^\.Ss "{re.escape(escaped(name))}[ "]', page, re.MULTILINE), name
        for param in command["params"]:
            if param["param_type_name"] == "option":
                assert escaped(param["opts"][0]) in page, param
    for status in MEANINGS:
        assert f".It {status.value}\n" in page


def escaped(word: str) -> str:
    """A word as it stands in a page."""
    return word.replace("-", r"\-")


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", "bash-completion/completions/kvmagentctl"),
        ("zsh", "zsh/vendor-completions/_kvmagentctl"),
        ("fish", "fish/vendor_completions.d/kvmagentctl.fish"),
    ],
)
def test_shells_find_what_completes_a_command_line(unpacked: Path, shell: str, file: str) -> None:
    assert f"_KVMAGENTCTL_COMPLETE={shell}_complete" in (unpacked / "usr/share" / file).read_text()


@pytest.mark.parametrize(("source", "package"), [("kvmagent", "kvmagent"), ("plugins", "kvmagent_plugins")])
def test_each_file_of_the_sources_is_there(unpacked: Path, source: str, package: str) -> None:
    (target,) = unpacked.glob(f"usr/lib/kvmagent/lib/python3*/site-packages/{package}")
    for file in (ROOT / source).rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert (target / file.relative_to(ROOT / source)).is_file(), file


def test_no_path_of_the_builder_is_in_any_file(unpacked: Path) -> None:
    paths = {str(ROOT), sys.prefix, "kvmagent-deb.", "pip-install-", "debian/kvmagent/"}
    if not sys.base_prefix.startswith("/usr"):
        paths.add(sys.base_prefix)
    for file in unpacked.rglob("*"):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            assert not [path for path in paths if path.encode() in content], file


def test_the_interpreter_is_the_distribution_s_and_takes_nothing_from_its_user(unpacked: Path) -> None:
    home = unpacked / "usr/lib/kvmagent"
    assert (home / "bin/python3").readlink().parts[:4] == ("..", "..", "..", "bin")
    assert (home / "bin/kvmagent").read_text().startswith("#!/usr/lib/kvmagent/bin/python3 -I\n")
    assert not list(home.rglob("*.pyc"))
    assert not (home / "lib64").exists()


def test_the_configuration_is_no_file_of_the_package_and_each_key_can_be_looked_up(unpacked: Path) -> None:
    """Of a conffile that was edited dpkg asks, and an unattended upgrade ends there."""
    assert not (unpacked / "etc/kvmagent").exists()
    assert (unpacked / "usr/share/kvmagent/kvmagent.conf").read_text() == sample_conf()


def test_every_distribution_that_is_left_is_imported_and_nothing_misses_one_that_is_not(unpacked: Path) -> None:
    """All modules of the agent, its plugins and kvmagentctl, by the package's own interpreter."""
    (site,) = unpacked.glob("usr/lib/kvmagent/lib/python3*/site-packages")
    done = run(f"/usr/bin/{site.parent.name}", "-I", "-c", IMPORT_ALL, str(site))
    assert done.returncode == 0, done.stderr
    unused = set(json.loads(done.stdout))
    assert not unused, "leave it out too: conf/leave_out.py"
    size = sum(file.stat().st_size for file in unpacked.rglob("*") if file.is_file() and not file.is_symlink())
    told = re.search(r"(\d+) MB installed", (ROOT / "docs/install.md").read_text())
    assert told is not None
    assert int(told[1]) == pytest.approx(size / 1e6, abs=3)


IMPORT_ALL = """
import importlib, importlib.metadata, json, pkgutil, sys
site = sys.argv[1]
sys.path.insert(0, site)
for name in ("kvmagent", "kvmagent_plugins"):
    for found in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(found.name)
files = {module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
print(json.dumps([
    one.metadata["Name"] for one in importlib.metadata.distributions(path=[site])
    if not any(file.startswith(f"{site}/{top}") for file in files for top in (one.read_text("top_level.txt") or
        one.metadata["Name"].lower().removeprefix("python-").replace("-", "_")).split())
]))
"""


@pytest.mark.parametrize("file", ["etc/logrotate.d/kvmagent", "etc/init.d/kvmagent"])
def test_what_operators_edit_is_a_conffile(deb: Path, unpacked: Path, file: str) -> None:
    assert (unpacked / file).is_file()
    listed = subprocess.run(["dpkg-deb", "--info", str(deb), "conffiles"], capture_output=True, text=True, check=True)
    assert f"/{file}" in listed.stdout.split()


def test_systemd_finds_the_unit_s_program_and_manual(unpacked: Path) -> None:
    # Older debhelpers put it below /lib, newer ones below /usr/lib: on an installed system that is one directory.
    (unit,) = unpacked.glob("**/lib/systemd/system/kvmagent.service")
    assert "ExecStart=/usr/bin/kvmagent " in unit.read_text()
    assert (unpacked / "usr/bin/kvmagent").readlink() == Path("../lib/kvmagent/bin/kvmagent")
    for line in unit.read_text().splitlines():
        if line.startswith("Documentation=file://"):
            assert (unpacked / line.removeprefix("Documentation=file:///")).is_file()


def finds_nothing(*command: str, prints: bool = False) -> None:
    """Run a linter; `prints`: on standard output is what it is for."""
    done = run(*command)
    assert (done.returncode, "" if prints else done.stdout, done.stderr) == (0, "", ""), done.stdout + done.stderr
