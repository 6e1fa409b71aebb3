"""The QEMU process of a VM, as far as the kernel lets the agent see it; what it does not see is None.

Source: proc(5); libvirt qemuBuildCommandLine gives every QEMU its VM's UUID as -uuid.
"""

import itertools
import os
import re
from pathlib import Path

from kvmagent.hypervisor.kernelfiles import read_text

UNLIMITED_BYTES = 2**63 - 1


def find_pid(root: Path, uuid: str) -> int | None:
    """Return the process that runs the VM of this UUID, `root` being where /proc is.

    An agent that is confined (ProtectProc=invisible) sees no other user's processes, and so none.
    """
    # Hosts have thousands of processes: each is one read, and nothing is made of it. Each argument ends with a zero.
    wanted = f"\0-uuid\0{uuid}\0".encode()
    processes = root / "proc"
    for name in filter(str.isdecimal, os.listdir(processes) if processes.is_dir() else ()):
        try:
            with open(f"{processes}/{name}/cmdline", "rb", buffering=0) as file:
                arguments = file.read()
        except OSError:  # it has ended, or is not to be seen
            continue
        if wanted in arguments:
            return int(name)
    return None


def was_migrated(root: Path, uuid: str) -> bool:
    """Return whether the QEMU of this VM was started to take a VM that ran before; False where it is not seen.

    libvirt forgets it at the first pause, the process never. Source: libvirt qemuMigrationDstPrepare, "-incoming
    defer". Observed: libvirt 9.0 starts it so for a VM that is restored from a file, too.
    """
    pid = find_pid(root, uuid)
    if pid is None:
        return False
    arguments = (read_text(root / "proc" / str(pid) / "cmdline") or "").split("\0")
    return ("-incoming", "defer") in itertools.pairwise(arguments)


def read_memlock_bytes(root: Path, pid: int) -> int | None:
    """Return how much memory a process may lock at most: RLIMIT_MEMLOCK, to which its soft limit can be raised."""
    limits = read_text(root / "proc" / str(pid) / "limits") or ""
    found = re.search(r"^Max locked memory +\S+ +(\S+)", limits, re.MULTILINE)
    if found is None:
        return None
    return UNLIMITED_BYTES if found.group(1) == "unlimited" else int(found.group(1))
