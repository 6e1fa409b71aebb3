"""Owns a directory with the newest libvirt, QEMU and Python of Debian's archive: made by debootstrap once, and kept.

    debootstrap of the testing suite + libvirtd, QEMU, Python -> /var/tmp/kvmagent-lab-<uid>/testing-KEY, 0.8 GB
    PrivateLibvirtd(tree=...)            runs that libvirtd, as the lab's ordinary user
    AgentProcess(command=enter(...))     runs this checkout with that Python and that libvirt's API

It is made anew where the list of packages changes, or by hand: remove the directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.lab.image import ImageError, cache_directory, call
from tests.lab.tree import find_mirror

SUITE = "testing"
#: debootstrap of an older Debian knows no newer suites; what makes them is the same for all.
SCRIPT = "/usr/share/debootstrap/scripts/sid"
PACKAGES = (
    *("libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients", "qemu-system-x86", "qemu-system-ppc"),
    *("python3", "python3-dev", "python3-venv", "gcc", "libc6-dev", "libvirt-dev", "pkgconf", "ca-certificates"),
)
OPTIONS = ("-o", "Acquire::Check-Valid-Until=false", "--no-install-recommends", "--yes", "-qq")


ROOT = Path(__file__).parents[2]
#: Where the checkout is in the directory.
CHECKOUT = "/srv/kvmagent"
#: The host's own, where it reaches the package index by a proxy or with certificates of its own.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
#: Runs a command in the directory ($0) as a user ($1), in mounts of its own: this checkout ($2) and the lab's files are
#: the host's.
ENTER = f"""
mount --make-rprivate /
for directory in /tmp /var/tmp; do mount --bind $directory "$0$directory"; done
mount --bind "$2" "$0{CHECKOUT}"
mount -t proc none "$0/proc"
mount --rbind /dev "$0/dev"
mount --rbind /sys "$0/sys"
root=$0 user=$1
shift 2
exec chroot --userspec="$user" "$root" "$@"
"""


def enter(tree: Path, *command: str, user: str = "0:0") -> list[str]:
    """Return the command that runs a command of the directory in it; it has the process id that was started."""
    return ["unshare", "--mount", "sh", "-ec", ENTER, str(tree), user, str(ROOT), *command]


def build_newest_tree(*, report: Callable[[str], None] = lambda _line: None) -> Path:
    """Return the directory, made now or before, without this checkout's Python packages.

    Raises:
        ImageError: this user is not root, or a tool failed.
    """
    if os.getuid() != 0:
        raise ImageError("a directory with the newest libvirt and Python is made by debootstrap, which needs root")
    key = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:16]
    directory = cache_directory() / f"{SUITE}-{key}"
    with (directory.parent / f".lock-{SUITE}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "complete").exists():
            report(f"making {directory}: the newest libvirt, QEMU and Python, 0.8 GB, some minutes")
            shutil.rmtree(directory, ignore_errors=True)
            mirror, _release = find_mirror()
            call("debootstrap", "--variant=minbase", SUITE, str(directory), mirror, SCRIPT)
            # Nothing is started in it.
            policy = directory / "usr/sbin/policy-rc.d"
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
            quiet = ("env", "DEBIAN_FRONTEND=noninteractive")
            call("chroot", str(directory), *quiet, "apt-get", "install", *OPTIONS, *PACKAGES)
            call("chroot", str(directory), "apt-get", "clean")
            shutil.rmtree(directory / "var/lib/apt/lists")
            shutil.copyfile(CERTIFICATES, directory / CERTIFICATES.relative_to("/"))
            (directory / CHECKOUT.lstrip("/")).mkdir()
            (directory / "complete").touch()
    return directory


def install_checkout(tree: Path, *, report: Callable[[str], None] = lambda _line: None) -> str:
    """Return the directory's virtual environment with what this checkout's fast tests need, made now or before.

    libvirt-python is compiled, against the directory's own libvirt.

    Raises:
        ImageError: a tool failed.
    """
    key = hashlib.sha256((ROOT / "setup.py").read_bytes()).hexdigest()[:16]
    place = f"/srv/python-{key}"
    with (tree / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (tree / place.lstrip("/") / "complete").exists():
            report(f"installing Python packages in {tree}{place}")
            for former in (tree / "srv").glob("python-*"):
                shutil.rmtree(former)
            shutil.copyfile("/etc/resolv.conf", tree / "etc/resolv.conf")
            call(*enter(tree, "/usr/bin/python3", "-m", "venv", place))
            pip = (
                f"{place}/bin/python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-cache-dir",
            )
            call(*enter(tree, *pip, "--editable", f"{CHECKOUT}[fast]"))
            (tree / place.lstrip("/") / "complete").touch()
    return place
