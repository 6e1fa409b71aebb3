"""Owns the end of QEMU processes whose parent is gone: libvirt takes one for running until somebody has reaped it.

The init of a container may do that a second or two late, at every end of a VM.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# Source: linux/prctl.h
_SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 36, 37
_POLL_S = 0.05


@contextlib.contextmanager
def reaping_orphans(name: str = "qemu-system") -> Iterator[None]:
    """Be the parent of processes that lose theirs, and reap at once those whose names begin so."""
    libc, ended, former = ctypes.CDLL(None), threading.Event(), ctypes.c_int()

    def reap() -> None:
        while not ended.wait(_POLL_S):
            for pid in filter(lambda pid: _is_ended(pid, name), _find_children()):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    reaper = threading.Thread(target=reap, name="reaper")
    libc.prctl(_GET_CHILD_SUBREAPER, ctypes.byref(former), 0, 0, 0)
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reaper.start()
    try:
        yield
    finally:
        libc.prctl(_SET_CHILD_SUBREAPER, former.value, 0, 0, 0)
        ended.set()
        reaper.join()


def _find_children() -> Iterator[int]:
    """None where the kernel does not list them."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            yield from map(int, (task / "children").read_text().split())


def _is_ended(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        comm, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        return comm.startswith(name) and rest.split()[0] == "Z"
    return False
