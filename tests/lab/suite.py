"""Owns a Debian of another suite in a directory, and runs the gate in it: make test-on SUITE=trixie.

    debootstrap of the suite, once -> /var/tmp/kvmagent-lab-<uid>/on-<suite>/ (kept; remove it to begin anew)
    this checkout's files          -> its /srv/kvmagent, which keeps .venv and the images that were built
    unshare (mounts, processes)    -> the directory becomes the root -> make test, as on a machine of that suite

Nothing of it outlives the command: mounts and processes end with its first process.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lab.image import ImageError, cache_directory, call
from tests.lab.tree import SYSTEM_PATH, find_mirror

ROOT = Path(__file__).parents[2]
PLACE = "srv/kvmagent"
PACKAGES = ("ca-certificates", "git", "make")
SCRIPTS = Path("/usr/share/debootstrap/scripts")
#: The host's own, where it reaches the package index by a proxy or with certificates of its own.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PASSED_ON = ("PIP_CERT", "PIP_INDEX_URL", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "http_proxy", "https_proxy")
#: Process 1 of its namespaces: $0 is the directory, the rest a command. It reaps what daemons leave behind.
FIRST_PROCESS = """
mount --make-rprivate /
mount --bind "$0" "$0"
mount -t proc none "$0/proc"
mount --rbind /dev "$0/dev"
mount --rbind /sys "$0/sys"
mount -t tmpfs -o mode=0755 none "$0/run"
cd "$0"
mkdir -p .host
pivot_root . .host
umount -l /.host
"$@"
"""


def make_suite(suite: str) -> Path:
    """Return the directory of a suite, made now or before.

    Raises:
        ImageError: this user is not root, or a tool failed.
    """
    if os.getuid() != 0:
        raise ImageError("a directory of another suite is made by debootstrap, which needs root")
    directory = cache_directory() / f"on-{suite}"
    complete = directory / ".complete"
    if complete.exists():
        return directory
    print(f"==> making {directory}", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    mirror, _release = find_mirror()
    script = [] if (SCRIPTS / suite).exists() else [str(SCRIPTS / "sid")]
    call("debootstrap", "--variant=minbase", suite, str(directory), mirror, *script)
    policy = directory / "usr/sbin/policy-rc.d"  # nothing is started in it
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    quiet = ("env", "DEBIAN_FRONTEND=noninteractive")
    call("chroot", str(directory), *quiet, "apt-get", "install", "--no-install-recommends", "--yes", "-qq", *PACKAGES)
    complete.touch()
    return directory


def take_checkout(directory: Path) -> None:
    """Make the directory's copy what this checkout's files are; what was built there stays."""
    place = directory / PLACE
    place.mkdir(parents=True, exist_ok=True)
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", directory=ROOT).split("\0")
    names = {name for name in listed if name and (ROOT / name).exists()}
    known = place / ".git/taken"
    former = set(known.read_text().split("\0")) if known.exists() else set()
    for name in former - names:
        (place / name).unlink(missing_ok=True)
    for name in sorted(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if not (place / name).exists() or (place / name).read_bytes() != (ROOT / name).read_bytes():
            shutil.copy2(ROOT / name, place / name)
    if not (place / ".git").exists():
        call("git", "init", "--quiet", directory=place)
    call("git", "add", "--all", directory=place)
    known.write_text("\0".join(sorted(names)))


def set_arguments(arguments: Sequence[str]) -> str:
    """Return the word for make that sets ARGS to arguments: make expands it, and then a shell takes it apart."""
    return f"ARGS={shlex.join(arguments).replace('$', '$$')}"


def run_in(directory: Path, *command: str) -> int:
    """Run a command with the directory as the root of namespaces of its own; its exit status."""
    shutil.copyfile("/etc/resolv.conf", directory / "etc/resolv.conf")
    shutil.copyfile(CERTIFICATES, directory / CERTIFICATES.relative_to("/"))
    environment = {
        "PATH": SYSTEM_PATH,
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
    first = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", FIRST_PROCESS, str(directory)]
    return subprocess.run([*first, *command], env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def main() -> None:
    """Make the directory if need be, and run make test in it with what follows the suite's name."""
    parser = argparse.ArgumentParser(prog="make test-on")
    parser.add_argument("suite")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for pytest")
    asked = parser.parse_args()
    with (cache_directory() / f".lock-on-{asked.suite}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            directory = make_suite(asked.suite)
        except ImageError as error:
            sys.exit(f"make test-on: {error}")
        take_checkout(directory)
        sys.exit(run_in(directory, "make", "-C", f"/{PLACE}", "test", set_arguments(asked.arguments)))


if __name__ == "__main__":
    main()
