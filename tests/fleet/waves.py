"""An upgrade in waves by the Ansible role: one playbook over several machines, each a Debian in a directory.

    golden   a Debian with the package and what it depends on
    nodeN    a layer over it, entered by Ansible's local connection through a shell that changes its root

The machines have no init system of their own: the role starts services by their LSB scripts, as on a machine without
systemd. Needs root and Debian.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.fleet.scenes import Table
from tests.lab.agent import LOOPBACK, find_free_port
from tests.lab.pki import Authority
from tests.lab.tree import ROOM, FreshDebian, Tree
from tests.package.conftest import ROOT, build, run

# Machines: each takes a minute of a CPU for each run.
MOST = 6
SERIAL = 2
PLAY_S = 1800.0


def can_play() -> bool:
    """Whether this machine can have Debians in directories."""
    return os.getuid() == 0 and platform.freedesktop_os_release()["ID"] == "debian"


def play_waves(table: Table, count: int) -> None:
    """Build the package, make machines, and roll it out to them."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="waves-")))
        debian = stack.enter_context(FreshDebian())
        debian.bootstrap()
        roll_out(table, min(count, MOST), build(directory), debian)


def roll_out(table: Table, count: int, deb: Path, debian: FreshDebian) -> None:
    """Roll a package out to so many machines, and then a newer one, in waves."""
    table.begin(f"an upgrade of {count} machines by the Ansible role, {SERIAL} at a time")
    with tempfile.TemporaryDirectory(prefix="waves-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        newer = rename_version(deb, directory)
        golden = debian.copy("golden")
        golden.install("python3-apt", "systemd-standalone-sysusers", deb)
        controller = Controller(directory, debian, golden, count)
        for done, package in (("rolled out", deb), ("upgraded", newer)):
            took = controller.play(package)
            table.add(f"until all are {done}", took, "s")
            table.add(f"of that for a wave of {SERIAL}", took / -(-count // SERIAL), "s")
            expected, versions = read_version(package), controller.versions()
            if set(versions.values()) != {expected}:
                table.faults.append(f"after the role the machines have {versions}, not {expected}")
            table.add("machines on that version, seen healthy over TLS by the role", len(versions))
        took = controller.play(newer)
        table.add("until the role has found all as they should be", took, "s")


def read_version(deb: Path) -> str:
    """The version in a package's name."""
    return deb.name.split("_")[1]


def rename_version(deb: Path, directory: Path) -> Path:
    """The same package as a newer version."""
    unpacked = directory / "unpacked"
    done = run("dpkg-deb", "--raw-extract", str(deb), str(unpacked))
    assert done.returncode == 0, done.stderr
    control = unpacked / "DEBIAN/control"
    version = read_version(deb)
    control.write_text(re.sub(r"(?m)^Version: .*$", rf"Version: {version}+wave", control.read_text()))
    newer = directory / deb.name.replace(version, f"{version}+wave", 1)
    done = run("dpkg-deb", "--build", "--root-owner-group", str(unpacked), str(newer))
    assert done.returncode == 0, done.stderr
    return newer


class Controller:
    """Who runs the playbook: this machine's Ansible, with the machines as its hosts."""

    def __init__(self, directory: Path, debian: FreshDebian, golden: Tree, count: int) -> None:
        self._directory, self._debian = directory, debian
        authority = Authority(directory)
        issue(authority, directory, "server", "server.example")
        # Ansible's files for a machine: on the same path for who writes them here, and who reads them there.
        remote = directory / "remote"
        remote.mkdir()
        self._trees = {f"node{n}": self._layer(golden, f"node{n}", remote) for n in range(count)}
        hosts = {}
        for name, tree in self._trees.items():
            issue(authority, directory, name, LOOPBACK)
            shell = directory / f"enter-{name}"
            shell.write_text(f'#!/bin/sh\nexec chroot {tree.root} /bin/sh "$@"\n')
            shell.chmod(0o755)
            hosts[name] = {
                "ansible_connection": "local",
                "ansible_shell_executable": str(shell),
                "ansible_python_interpreter": "/usr/bin/python3",
                "ansible_remote_tmp": str(remote / name),
                "kvmagent_address": LOOPBACK,
                "kvmagent_port": find_free_port(),
            }
        variables = {
            "kvmagent_pki": str(directory),
            "kvmagent_client_cert": str(directory / "server.pem"),
            "kvmagent_client_key": str(directory / "server.key"),
            "kvmagent_install_recommends": False,
            "kvmagent_settings": {"libvirt": {"uri": "test:///default"}},
        }
        inventory = {"kvmagent": {"hosts": hosts, "vars": variables}}
        (directory / "inventory.yml").write_text(json.dumps(inventory))
        collection = directory / "collections/ansible_collections/kvmagent/hotplug"
        collection.parent.mkdir(parents=True)
        collection.symlink_to(ROOT / "conf/ansible")

    def play(self, deb: Path) -> float:
        """Run the playbook with a package; the seconds that it took."""
        command = ["env", f"ANSIBLE_COLLECTIONS_PATH={self._directory}/collections", sys.executable, "-m", "ansible"]
        command += ["playbook", "--inventory", str(self._directory / "inventory.yml"), "kvmagent.hotplug.site"]
        command += ["--extra-vars", json.dumps({"kvmagent_deb": str(deb), "kvmagent_serial": SERIAL})]
        began = time.monotonic()
        self._debian.run(*command, timeout_s=PLAY_S)
        return time.monotonic() - began

    def versions(self) -> dict[str, str]:
        """The version of the package on each machine, where its agent runs."""
        asked = ("dpkg-query", "--show", "--showformat=${Version}", "kvmagent")
        return {
            name: tree.run(*asked).strip() if tree.processes() else "not running" for name, tree in self._trees.items()
        }

    def _layer(self, golden: Tree, name: str, remote: Path) -> Tree:
        """A machine as a layer over the golden one."""
        root, parts = ROOM / name, ROOM / f"{name}-layer"
        upper, work = parts / "upper", parts / "work"
        self._debian.run("mkdir", "-p", str(root), str(upper), str(work))
        layers = f"lowerdir={golden.root},upperdir={upper},workdir={work}"
        self._debian.run("mount", "-t", "overlay", "overlay", "-o", layers, str(root))
        self._debian.run("mount", "-t", "proc", "none", str(root / "proc"))
        self._debian.run("mount", "--rbind", "/dev", str(root / "dev"))
        tree = Tree(self._debian, root)
        tree.run_services()
        tree.bind(remote, str(remote))
        return tree


def issue(authority: Authority, directory: Path, file: str, name: str) -> None:
    """Make a certificate, and its key in a file of its own."""
    both = authority.issue(name, file_name=file)
    key = re.search(r"-----BEGIN[^-]*PRIVATE KEY-----.*?-----END[^-]*-----\n", both.read_text(), re.DOTALL)
    assert key
    (directory / f"{file}.key").write_text(key.group())


def main() -> None:
    """The scene alone."""
    table = Table()
    play_waves(table, MOST)
    print(table, *table.faults, sep="\n")


if __name__ == "__main__":
    main()
