"""A machine's life with the package, in this order: installed, in use, upgraded under load, removed, purged."""

import http.client
import json
import re
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvmagent.settings import Settings, list_settings
from tests.crash.conftest import find_dimms
from tests.lab.agent import OPEN_TO_LOOPBACK, find_free_port
from tests.lab.domainxml import GuestSpec
from tests.lab.guest import Guest
from tests.lab.libvirtd import PrivateLibvirtd
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer
from tests.lab.tree import FreshDebian, Tree
from tests.package.conftest import NEWER, make_newer

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
CONF = "etc/kvmagent/kvmagent.conf"
SOCKETS = "/run/lab"

pytestmark = pytest.mark.guest


class Machine:
    """A tree with the package installed, and its agent, which is started as SysV init does it."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def configure(self, **values: str) -> None:
        """Edit the configuration as an operator does: keys of any section, by their names."""
        file = self.tree.path / CONF
        lines = [file.read_text(), "# edited by an operator"]
        for section, key, _, _ in list_settings(Settings()):
            if key in values:
                lines += [f"[{section}]"] * (f"[{section}]" not in lines) + [f"{key} = {values[key]}"]
        file.write_text("\n".join(lines) + "\n")

    def service(self, action: str) -> str:
        """Call the init script."""
        return self.tree.run("/etc/init.d/kvmagent", action)

    def start(self) -> None:
        """Start the agent and wait until it is ready."""
        self.service("start")
        wait_for(self.is_ready, timeout_s=30, what="the agent to be ready")

    def is_ready(self) -> bool:
        """Whether /healthz says so."""
        try:
            return self.request("GET", "/healthz") == 200
        except OSError:
            return False

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> int:
        """Send a request; the status of its answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json", **headers})
            return connection.getresponse().status

    def log(self) -> str:
        """What the agent has said, over all its starts."""
        return (self.tree.path / "var/log/kvmagent/stderr").read_text()


@pytest.fixture(scope="module")
def guest(boot_module: Callable[[GuestSpec], Guest]) -> Guest:
    """A real guest."""
    return boot_module(GuestSpec(name="packaged", memory_mib=512))


@pytest.fixture(scope="module")
def machine(debian: FreshDebian, deb: Path, lab: PrivateLibvirtd) -> Machine:
    """The package, installed on a machine that has no init system, as in an image that is being built."""
    tree = debian.copy("lifecycle")
    tree.install("systemd-standalone-sysusers", deb)
    tree.bind(lab.directory / "r" / "libvirt", SOCKETS)
    return Machine(tree)


def test_an_installation_makes_the_user_and_starts_nothing_where_no_service_is_wanted(machine: Machine) -> None:
    assert machine.tree.processes() == []
    assert "libvirt" in machine.tree.run("id", "--name", "--groups", "kvmagent").split()
    owners = machine.tree.run("stat", "--format=%U:%G %a", "/etc/kvmagent", "/var/lib/kvmagent", "/var/log/kvmagent")
    assert owners.splitlines() == ["root:kvmagent 750", "kvmagent:kvmagent 700", "kvmagent:kvmagent 700"]
    assert list((machine.tree.path / "usr/lib/kvmagent/lib").rglob("*.pyc"))


@pytest.fixture(scope="module")
def in_use(machine: Machine, lab: PrivateLibvirtd) -> Machine:
    """The machine, its agent started with a configuration that an operator has edited."""
    socket = lab.uri.rpartition("/")[2]
    # The lab's libvirtd lets in its own user alone.
    machine.tree.run("usermod", "--non-unique", f"--uid={lab.user.pw_uid}", "kvmagent")
    uri = f"qemu+unix:///session?socket={SOCKETS}/{socket}"
    machine.configure(port=str(machine.port), uri=uri, stop_timeout_sec="3", **OPEN_TO_LOOPBACK)
    machine.start()
    return machine


def test_the_installed_programs_plug_a_guest_and_the_agent_is_not_root(
    in_use: Machine, lab: PrivateLibvirtd, guest: Guest
) -> None:
    assert "is running" in in_use.service("status")
    reply = json.loads(in_use.tree.run("kvmagentctl", f"--url={in_use.url}", "plug-cpu", "packaged", "2", "--json"))
    assert (reply["outcome"], reply["after"]["guestCpuNum"]) == ("online", 2)
    assert guest.cpus_online() == "0-1"
    (process,) = in_use.tree.processes()
    assert process.user == lab.user.pw_uid


def test_an_upgrade_in_the_middle_of_a_task_loses_nothing_and_keeps_the_configuration(
    in_use: Machine, lab: PrivateLibvirtd, guest: Guest, server: ManagementServer, deb: Path, tmp_path: Path
) -> None:
    edited = (in_use.tree.path / CONF).read_text()
    in_use.tree.run_services()
    (before,) = in_use.tree.processes()
    lab.pause()
    try:
        body = {"vmUuid": "packaged", "memorySize": 640 * MIB}
        assert in_use.request("POST", "/vm/hotplug/memory", body, taskuuid="memory", callbackurl=server.url) == 200
        wait_for(lambda: "task=memory" in in_use.log(), timeout_s=20, what="the task to be under way")
        newer = make_newer(deb, tmp_path)
        in_use.tree.install(newer)  # unattended: nobody answers a question of dpkg's
        assert server.callbacks("memory") == []
    finally:
        lab.resume()
    reply = server.wait("memory", 90)
    assert (reply["outcome"], reply["recovered"]) == ("online", True)
    assert reply["after"]["memorySize"] == 640 * MIB
    assert [len(dimms) for dimms in find_dimms(guest)] == [1, 1]
    assert all(callback.body == reply for callback in server.callbacks("memory"))
    assert (in_use.tree.path / CONF).read_text() == edited
    assert "newer_key = 1" in (in_use.tree.path / "usr/share/kvmagent/kvmagent.conf").read_text()
    assert in_use.tree.run("kvmagent", "--version").strip() == NEWER
    (after,) = in_use.tree.processes()
    assert after.pid != before.pid


def test_the_backup_is_made_by_the_command_as_it_is_written(in_use: Machine) -> None:
    text = (ROOT / "docs/operate.md").read_text()
    found = re.search(r"^## Back up\n\n    (.+)$", text, re.MULTILINE)
    assert found is not None
    in_use.tree.run("sh", "-ec", f"cd /root && {found[1]}")
    (backup,) = (in_use.tree.path / "root").glob("kvmagent-*.tar.gz")
    assert backup.stat().st_mode & 0o777 == 0o600, "it holds keys"
    with tarfile.open(backup) as archive:
        names = archive.getnames()
    assert "etc/kvmagent/kvmagent.conf" in names
    assert not [name for name in names if "journal" in name]


def test_a_downgrade_keeps_configuration_and_journal(in_use: Machine, deb: Path) -> None:
    edited = (in_use.tree.path / CONF).read_text()
    in_use.tree.install(deb, options=["--allow-downgrades"])
    wait_for(in_use.is_ready, timeout_s=60, what="the older agent to be ready")
    assert in_use.tree.run("kvmagent", "--version").strip() != NEWER
    assert (in_use.tree.path / CONF).read_text() == edited
    assert in_use.request("GET", "/tasks/memory") == 200


def test_a_removal_stops_the_agent_and_keeps_state_and_configuration(in_use: Machine) -> None:
    in_use.tree.run("apt-get", "remove", "--yes", "kvmagent")
    assert in_use.tree.processes() == []
    assert (in_use.tree.path / CONF).exists()
    assert (in_use.tree.path / "var/lib/kvmagent/journal.sqlite").exists()
    assert not (in_use.tree.path / "usr/lib/kvmagent").exists()


def test_a_purge_leaves_the_user_and_nothing_else(in_use: Machine) -> None:
    in_use.tree.run("apt-get", "purge", "--yes", "kvmagent")
    left = in_use.tree.run("find", "/etc", "/lib", "/run", "/usr", "/var", "-xdev", "-name", "*kvmagent*")
    assert [line for line in left.splitlines() if not line.startswith("/var/tmp/")] == []
    assert "nologin" in in_use.tree.run("getent", "passwd", "kvmagent")
