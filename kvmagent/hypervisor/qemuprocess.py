"""The QEMU process of a VM, as far as the kernel shows it to the agent; None stands for what it does not show.

Source: proc(5); libvirt qemuBuildCommandLine gives every QEMU its VM's UUID as -uuid.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from kvmagent.hypervisor.kernelfiles import read_text

UNLIMITED_BYTES = 2**63 - 1
_UUID = re.compile(rb"\0-uuid\0([0-9a-f-]{36})\0")


def find_pid(root: Path, uuid: str) -> int | None:
    """Return the process that runs the VM of this UUID, `root` being where /proc is.

    An agent that is confined (ProtectProc=invisible) sees no other user's processes, and so none.
    """
    wanted = f"\0-uuid\0{uuid}\0".encode()
    return next((pid for pid, arguments in _read_processes(root) if wanted in arguments), None)


def find_incoming(root: Path) -> frozenset[str]:
    """Return the UUIDs of the VMs whose QEMUs were started to take a VM that ran before, as far as they are seen.

    libvirt forgets it at the first pause, the process never. Source: libvirt qemuMigrationDstPrepare, "-incoming
    defer". Observed: libvirt 9.0 starts it so for a VM that is restored from a file, too.
    """
    incoming = (args for _, args in _read_processes(root) if b"\0-incoming\0defer\0" in args)
    return frozenset(found[1].decode() for args in incoming if (found := _UUID.search(args)))


def _read_processes(root: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each process with its arguments, each of which ends with a zero.

    Hosts have thousands of processes: each is one read, and nothing is made of it.
    """
    processes = root / "proc"
    for name in filter(str.isdecimal, os.listdir(processes) if processes.is_dir() else ()):
        try:
            with open(f"{processes}/{name}/cmdline", "rb", buffering=0) as file:
                yield int(name), file.read()
        except OSError:  # it has ended, or is not to be seen
            continue


def read_memlock_bytes(root: Path, pid: int) -> int | None:
    """Return how much memory a process may lock at most: RLIMIT_MEMLOCK, to which its soft limit can be raised."""
    limits = read_text(root / "proc" / str(pid) / "limits") or ""
    found = re.search(r"^Max locked memory +\S+ +(\S+)", limits, re.MULTILINE)
    if found is None:
        return None
    return UNLIMITED_BYTES if found.group(1) == "unlimited" else int(found.group(1))
