"""Boots a fresh Debian with its own systemd, in a container: for what only a service manager shows.

    Booted(tree) -- systemd-nspawn --> systemd, process 1 of the container: journald, polkit, libvirtd, the agent's unit

The container has its own cgroup, and the host's network. It ends with `FreshDebian`, whose namespaces it is in.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType

from tests.lab.processes import wait_for
from tests.lab.tree import Tree

BOOT_TIMEOUT_S, COMMAND_TIMEOUT_S = 90.0, 600.0


class Booted:
    """A tree that runs as a machine does, while the `with` lasts."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._former_cgroups: dict[str, set[Path]] = {}

    def __enter__(self) -> Booted:
        # The container gets its own; systemd-nspawn takes what is mounted there, and does not start.
        for mounted in ("dev", "proc"):
            self._tree.debian.run("umount", "--recursive", str(self._tree.root / mounted))
        # The console goes where nobody looks: what is of interest is in the journal.
        self._container = subprocess.Popen(
            [
                *self._tree.debian.entering,
                *["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--resolv-conf=off", "--console=pipe"],
                *[f"--directory={self._tree.root}", "--boot"],
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._leader = wait_for(self._find_leader, timeout_s=BOOT_TIMEOUT_S, what="the container's first process")
        wait_for(self._is_up, timeout_s=BOOT_TIMEOUT_S, what="the container to have booted")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # With its first process the container ends, and with it systemd-nspawn, which holds our pipe.
        os.kill(self._leader, signal.SIGKILL)
        self._container.communicate()
        for place, former in self._former_cgroups.items():
            for directory in reversed(find_directories(Path(place))):
                if directory not in former:
                    with contextlib.suppress(OSError):
                        directory.rmdir()

    @property
    def root(self) -> Path:
        """Where its files are for the tests, those of its kernel too."""
        return Path(f"/proc/{self._leader}/root")

    def run(self, *command: str) -> str:
        """Run a command in the container as its root; what it printed.

        Raises:
            RuntimeError: it failed; the text has what it printed.
        """
        done = self._run(*command)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-8000:]}")
        return done.stdout

    def open_cgroups(self) -> None:
        """Let systemd and libvirt share out CPU time. Cgroups of version 1 are the host's, and shown read-only.

        libvirt starts no VM where it may write some controllers and not others.
        """
        mounts = [line.split()[1:4] for line in self.run("cat", "/proc/mounts").splitlines()]
        shut = [place for place, kind, options in mounts if kind == "cgroup" and "ro" in options.split(",")]
        self._former_cgroups = {place: set(find_directories(Path(place))) for place in shut}
        for place in shut:
            self.run("mount", "-o", "remount,bind,rw", place)
        if shut:
            # What it may use, systemd finds out at its start.
            self.run("systemctl", "daemon-reexec")
            wait_for(self._is_up, timeout_s=BOOT_TIMEOUT_S, what="systemd to be executed again")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def journal(self, unit: str, *options: str) -> str:
        """What a unit has said since the boot."""
        return self.run("journalctl", "--boot", "--no-pager", "--output=cat", f"--unit={unit}", *options)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", f"--target={self._leader}", "--all", *command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def _find_leader(self) -> int | None:
        """The systemd below nsenter and systemd-nspawn: the first one, whose children bear its name for a moment."""
        left = [self._container.pid]
        while left:
            pid = left.pop()
            # One that helps with the setup may end meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    return pid
                left += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if self._container.poll() is not None:
            assert self._container.stdout is not None
            raise RuntimeError(f"systemd-nspawn ended: {self._container.stdout.read().decode()}")
        return None

    def _is_up(self) -> bool:
        return self._run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")


def find_directories(top: Path) -> list[Path]:
    """The directories below one, each before those in it."""
    return sorted(path for path in top.rglob("*/") if path.is_dir())
