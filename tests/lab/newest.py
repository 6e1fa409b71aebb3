"""Owns a directory with the newest libvirt and QEMU of Debian's archive: made by debootstrap once, and kept.

    debootstrap of the testing suite + libvirtd and QEMU -> /var/tmp/kvmagent-lab-<uid>/testing: 382 MB, about a minute
    PrivateLibvirtd(tree=...) runs that libvirtd, as the lab's ordinary user

It is made anew where the recipe changes, or by hand: remove the directory.
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
PACKAGES = ("libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients", "qemu-system-x86")
OPTIONS = ("-o", "Acquire::Check-Valid-Until=false", "--no-install-recommends", "--yes", "-qq")


def build_newest_tree(*, report: Callable[[str], None] = lambda _line: None) -> Path:
    """Return the directory, made now or before.

    Raises:
        ImageError: this user is not root, or a tool failed.
    """
    if os.getuid() != 0:
        raise ImageError("a directory with the newest libvirt and QEMU is made by debootstrap, which needs root")
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    directory = cache_directory() / f"{SUITE}-{key}"
    with (directory.parent / f".lock-{SUITE}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "complete").exists():
            report(f"making {directory}: the newest libvirt and QEMU, 382 MB, about a minute")
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
            (directory / "complete").touch()
    return directory
