"""Owns a fresh Debian in a directory, as a clean machine: to install packages in, and to run what they bring.

    FreshDebian -- stdin --> unshare: a shell that is process 1 of namespaces of its own
                                 /mnt/base    what debootstrap made, a tmpfs that no other process sees; it is kept
                                              in /var/tmp/kvmagent-lab-<uid>, until the archive has a newer release
                                 /mnt/NAME    a Tree: a copy of it, with /proc and /dev

Mounts and processes end with that shell, and it ends with its standard input: nothing is left to undo, also when the
test run is killed. The network is the host's, so that the tests reach an agent that runs in a tree.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tests.lab.image import cache_directory

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ROOM = Path("/mnt")
#: Process 1 of its namespace: what an ended daemon leaves is reaped by it. It says its id as the host has it.
FIRST_PROCESS = f"""
read -r pid rest </proc/self/stat
mount -t tmpfs -o mode=0755 none {ROOM}
mount -t proc none /proc
echo "$pid"
cat
exit 0
"""
# A machine that is busy installs packages slowly.
TIMEOUT_S = 1200.0


class FreshDebian:
    """The namespaces, and in them the release that the host runs, from the mirror that the host uses. Needs root."""

    def __init__(self) -> None:
        self._shell: subprocess.Popen[str] | None = None
        self._pid = 0

    def __enter__(self) -> FreshDebian:
        if os.getuid() != 0:
            raise PermissionError("a fresh Debian needs root, for its namespaces and mounts")
        self._shell = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", FIRST_PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._shell.stdout is not None
        self._pid = int(self._shell.stdout.readline())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._shell is not None
        self._shell.communicate()

    def bootstrap(self) -> None:
        """Make the base: the required packages and apt."""
        kept, base = self._bootstrap_once(), str(ROOM / "base")
        self.run("mkdir", base)
        self.run("tar", "--extract", "--file", str(kept), "--directory", base)

    def _bootstrap_once(self) -> Path:
        """The base in a file, made now or before."""
        mirror, release = find_mirror()
        with urllib.request.urlopen(f"{mirror}/dists/{release}/InRelease") as answer:
            key = hashlib.sha256(answer.read()).hexdigest()[:16]
        kept = cache_directory() / f"{release}-{key}.tar"
        with kept.with_name(f".lock-{release}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                new, part = ROOM / "new", kept.with_suffix(".part")
                self.run("debootstrap", "--variant=minbase", release, str(new), mirror)
                self.run("tar", "--create", "--file", str(part), "--directory", str(new), ".")
                self.run("rm", "--recursive", "--one-file-system", str(new))
                for former in kept.parent.glob(f"{release}-*.tar"):
                    former.unlink()
                part.rename(kept)
        return kept

    def copy(self, name: str) -> Tree:
        """A tree of its own."""
        root = ROOM / name
        self.run("cp", "-a", str(ROOM / "base"), str(root))
        self.run("mount", "-t", "proc", "none", str(root / "proc"))
        self.run("mount", "--rbind", "/dev", str(root / "dev"))
        return Tree(self, root)

    @property
    def entering(self) -> list[str]:
        """The words before a command of the host that is to run in the namespaces."""
        return ["nsenter", f"--target={self._pid}", "--mount", "--pid"]

    def host_path(self, path: Path) -> Path:
        """Where a file of the namespace is for the tests."""
        return Path(f"/proc/{self._pid}/root{path}")

    def run(self, *command: str, timeout_s: float = TIMEOUT_S) -> str:
        """Run a command of the host in the namespaces; what it printed.

        Raises:
            RuntimeError: it failed; the text has what it printed.
        """
        done = subprocess.run(
            [*self.entering, *command],
            env={"PATH": SYSTEM_PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-8000:]}")
        return done.stdout


class Process(NamedTuple):
    """A process of a tree: its id in the namespace, and its user's."""

    pid: int
    user: int


class Tree:
    """One copy of the fresh Debian. `root` is where it is in the namespaces, `path` how the tests see that."""

    def __init__(self, debian: FreshDebian, root: Path) -> None:
        self.debian = debian
        self.root = root
        self.path = debian.host_path(root)

    def run(self, *command: str) -> str:
        """Run a command of the tree, as its root; what it printed.

        Raises:
            RuntimeError: it failed; the text has what it printed.
        """
        return self.debian.run("chroot", str(self.root), *command)

    def bind(self, source: Path, target: str) -> None:
        """Show a directory of the host in the tree."""
        (self.path / target.lstrip("/")).mkdir(parents=True)
        self.debian.run("mount", "--bind", str(source), f"{self.root}{target}")

    def install(self, *packages: str | Path, options: Sequence[str] = ()) -> str:
        """Install packages by name, and files of the host, with what they depend on and nothing more."""
        names = [f"/var/tmp/{self.take(one).name}" if isinstance(one, Path) else one for one in packages]
        return self.run("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *options, *names)

    def run_services(self) -> None:
        """As on a machine that runs: installations start and stop services. Without an init system they are denied."""
        policy = self.path / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 0\n")
        policy.chmod(0o755)

    def processes(self) -> list[Process]:
        """What runs with this tree as its root."""
        found = []
        for entry in self.debian.host_path(Path("/proc")).iterdir():
            # A process may end meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if entry.name.isdigit() and os.readlink(entry / "root") == str(self.root):
                    found.append(Process(int(entry.name), entry.stat().st_uid))
        return found

    def take(self, file: Path) -> Path:
        """Copy a file of the host into the tree's /var/tmp; where it is for the tests."""
        target = self.path / "var/tmp" / file.name
        target.write_bytes(file.read_bytes())
        return target


def find_mirror() -> tuple[str, str]:
    """The archive that the host's apt takes its release from, and the release's name.

    Raises:
        RuntimeError: apt names none.
    """
    command = ["apt-get", "indextargets", "--format", "$(SITE)|$(CODENAME)|$(RELEASE)", "Created-By: Packages"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    for line in listed:
        site, *names = line.split("|")
        if release in names:
            return site, release
    raise RuntimeError(f"apt has no source of {release}: {listed}")
