"""The RPM package: built by its spec, found in order by rpmlint, and rolled out by the role to a machine with dnf.

That machine is Debian with dnf, which says of itself that it is Fedora. What the package needs of Fedora is Debian's; a
package that provides those names tells rpm so.
"""

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.agent import find_free_port
from tests.lab.booted import Booted
from tests.lab.pki import Authority
from tests.lab.tree import FreshDebian
from tests.package.conftest import (
    CONTROLLER,
    NEWER,
    ROOT,
    control,
    health,
    play_site,
    run,
    set_version,
    write_inventory,
)

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, for this distribution's Python and with the versions of these tests."""
    directory = tmp_path_factory.mktemp("rpm")
    done = subprocess.run(
        ["sh", str(ROOT / "conf/rpm/build.sh"), "/usr/bin/python3", str(directory)],
        env={**os.environ, "PIP": f"{sys.executable} -m pip"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = directory.glob("kvmagent-*.rpm")
    return built


def test_rpmlint_finds_no_error(rpm: Path) -> None:
    done = run("rpmlint", "-c", str(ROOT / "conf/rpm/kvmagent.rpmlintrc.toml"), str(rpm))
    assert done.returncode == 0, done.stdout
    assert " 0 errors" in done.stdout


def test_it_needs_the_python_that_it_was_built_for_and_brings_no_init_script(rpm: Path) -> None:
    needs = run("rpm", "-qp", "--requires", str(rpm)).stdout.split()
    assert not [word for word in needs if "dist(" in word], "it brings its Python packages"
    assert f"/usr/bin/python3.{sys.version_info.minor}" in needs or any(
        word.startswith("/usr/bin/python3.") for word in needs
    )
    assert any(word.startswith("libvirt.so") for word in needs)
    files = run("rpm", "-qpl", str(rpm)).stdout.split()
    assert "/usr/share/kvmagent/60-kvmagent-access.rules" in files
    assert "/usr/lib/systemd/system/kvmagent.service" in files
    assert not [file for file in files if "init.d" in file]
    assert run("rpm", "-qpc", str(rpm)).stdout.split() == ["/etc/kvmagent/kvmagent.conf", "/etc/logrotate.d/kvmagent"]


def test_its_programs_start(rpm: Path, tmp_path: Path) -> None:
    unpack = f"rpm2cpio {rpm} | cpio --quiet -idm"
    subprocess.run(["sh", "-c", unpack], cwd=tmp_path, check=True)
    home = tmp_path / "usr/lib/kvmagent"
    (site,) = home.glob("lib/python3*/site-packages")
    for module in ("kvmagent.cli.daemon", "kvmagent.cli.ctl.main"):
        code = f"import sys; sys.path.insert(0, {str(site)!r}); import {module} as program; program.main(['--version'])"
        done = run(f"/usr/bin/{site.parent.name}", "-I", "-c", code)
        assert done.stdout.split()[-1:] == [
            run(sys.executable, "-m", "kvmagent.cli.daemon", "--version").stdout.split()[-1]
        ]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA, whose files are in the controller's directory."""
    return Authority(tmp_path_factory.mktemp("controller"))


@pytest.fixture(scope="module")
def port() -> int:
    """Where the agent shall listen."""
    return find_free_port()


@pytest.fixture(scope="module")
def machine(
    debian: FreshDebian, rpm: Path, authority: Authority, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Booted]:
    """The machine, booted; it has no kvmagent yet."""
    tree = debian.copy("dnf")
    tree.install("systemd-sysv", "dbus", "python3", "libvirt0", "logrotate", "rpm", "dnf", "python3-dnf")
    release = 'ID=fedora\nNAME="Fedora Linux"\nVERSION_ID=40\nPRETTY_NAME="Fedora Linux 40"\n'
    (tree.path / "usr/lib/os-release").write_text(release)
    (tree.path / "etc/redhat-release").write_text("Fedora release 40 (Forty)\n")
    host = build_host(rpm, tmp_path_factory.mktemp("host"))
    control(tree, write_inventory(authority, port, {"kvmagent_rpm": f"{CONTROLLER}/{rpm.name}"}))
    shutil.copy(rpm, authority.ca_file.parent)
    # Debian 12's rpm refuses to install anything without this word, Debian 13's does not know it.
    force = ["--force-debian"] if "force-debian" in tree.run("rpm", "--help") else []
    tree.run("rpm", *force, "--install", f"/var/tmp/{tree.take(host).name}")
    with Booted(tree) as booted:
        yield booted


def build_host(rpm: Path, directory: Path) -> Path:
    """A package without files that provides what the agent's package needs."""
    needs = {line for line in run("rpm", "-qp", "--requires", str(rpm)).stdout.splitlines() if "rpmlib(" not in line}
    lines = ["Name: host", "Version: 1", "Release: 1", "Summary: What a host has", "License: none", "BuildArch: noarch"]
    lines += [f"Provides: {need}" for need in sorted(needs)]
    return build_rpm("\n".join([*lines, "%description", "What a host has.", "%files", ""]), directory)


def build_newer(rpm: Path, directory: Path) -> Path:
    """The same package as its next version: by the spec's scripts and list of files, of the files that are built."""
    content = directory / "content"
    content.mkdir()
    subprocess.run(["sh", "-c", f"rpm2cpio {rpm} | cpio --quiet -idm"], cwd=content, check=True)
    set_version(content)
    spec = (ROOT / "conf/rpm/kvmagent.spec").read_text()
    spec = re.sub(r"(?ms)^%prep\n.*?(?=^%pre\n)", f"%install\ncp -a {content}/. %{{buildroot}}\n\n", spec)
    return build_rpm(re.sub(r"(?m)^(%license|%doc|Source0:) .*\n", "", spec), directory, version=NEWER)


def build_rpm(spec: str, directory: Path, **macros: str) -> Path:
    """Build a package of a spec."""
    (directory / "kvmagent.spec").write_text(spec)
    macros |= {"_topdir": str(directory), "_unpackaged_files_terminate_build": "0", "python": "/usr/bin/python3"}
    defined = [word for name, value in macros.items() for word in ("--define", f"{name} {value}")]
    done = run("rpmbuild", "-bb", "--nodeps", *defined, str(directory / "kvmagent.spec"))
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = directory.glob("RPMS/*/*.rpm")
    return built


@pytest.fixture(scope="module")
def play(machine: Booted) -> Callable[..., str]:
    """Runs the playbook on the machine; what it printed."""
    return lambda **variables: machine.run(*play_site(variables))


@pytest.fixture(scope="module")
def rolled_out(play: Callable[..., str]) -> str:
    """What the first run printed."""
    return play()


def test_the_role_rolls_it_out_with_dnf_and_changes_nothing_the_second_time(
    rolled_out: str, machine: Booted, play: Callable[..., str], authority: Authority, port: int
) -> None:
    assert re.search(r"node1 .* failed=0 ", rolled_out), rolled_out
    assert "Install the package with dnf" in rolled_out
    assert machine.run("systemctl", "is-enabled", "kvmagent").strip() == "enabled"
    assert machine.run("stat", "--format=%U:%G %a", "/etc/kvmagent", "/var/lib/kvmagent").splitlines() == [
        "root:kvmagent 750",
        "kvmagent:kvmagent 700",
    ]
    assert health(port, authority.client(authority.ca_file.parent / "server.pem")) == 200
    with pytest.raises((ssl.SSLError, OSError)):
        health(port, authority.client())
    before = machine.show("kvmagent", "MainPID")
    assert re.search(r"node1 .* changed=0 .* failed=0 ", again := play()), again
    assert machine.show("kvmagent", "MainPID") == before


def test_an_older_rpm_is_a_rollback_that_keeps_tasks_and_configuration(
    rolled_out: str, machine: Booted, play: Callable[..., str], authority: Authority, rpm: Path, tmp_path: Path
) -> None:
    older = machine.run("kvmagent", "--version").strip()
    newer = build_newer(rpm, tmp_path)
    shutil.copy(newer, authority.ca_file.parent)
    assert re.search(r"node1 .* failed=0 ", output := play(kvmagent_rpm=f"{CONTROLLER}/{newer.name}")), output
    assert json.loads(machine.run("kvmagentctl", "status", "--json"))["version"] == NEWER
    machine.run("sh", "-c", "kvmagentctl plug-cpu test 77 || true")
    (task,) = machine.run("kvmagentctl", "tasks", "--limit", "1", "-o", "name").split()
    assert re.search(r"node1 .* failed=0 ", output := play()), output
    told = json.loads(machine.run("kvmagentctl", "status", "--json"))
    assert (told["version"], told["ready"]) == (older, True), "it is the older agent that runs"
    assert json.loads(machine.run("kvmagentctl", "task", task, "--json"))["request"]["cpuNum"] == 77


def test_a_removal_leaves_state_and_what_was_edited_and_nothing_else(rolled_out: str, machine: Booted) -> None:
    machine.run("kvmagentctl", "status")  # as root, who could write bytecode
    machine.run("dnf", "--assumeyes", "remove", "kvmagent")
    assert machine.show("kvmagent", "ActiveState") == "inactive"
    left = machine.run("find", "/etc", "/usr", "/var/lib", "-xdev", "-path", "*kvmagent*", "-type", "f").split()
    assert {file for file in left if not file.startswith(("/var/lib/kvmagent/", "/etc/kvmagent/"))} == set()
    assert "/var/lib/kvmagent/journal.sqlite" in left
