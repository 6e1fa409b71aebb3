"""The agent, killed at a point that KVMAGENT_FAULT names: `step:done@2` is the second time that `step:done` is reached.

The kill is SIGKILL: no handler, no cleanup, nothing flushed. With `fsync!` before the point, it
is the disk that fails there, in the hardest way for a journal: what has been written stays readable and is not kept, so
that a commit which failed may be there all the same.
"""

import ctypes
import errno
import os
import signal
import sys
import threading

from kvmagent.cli.daemon import main
from kvmagent.tasks.faults import Fault

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# Source: libseccomp seccomp.h, scmp_filter_attr: synchronise the threads.
_TSYNC = 4


def break_fsync() -> None:
    """Have the kernel answer every fsync and fdatasync of this process with EIO: only its end undoes it."""
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(_ALLOW)))
    assert seccomp.seccomp_attr_set(context, _TSYNC, ctypes.c_uint32(1)) == 0
    for name in (b"fsync", b"fdatasync"):
        number = seccomp.seccomp_syscall_resolve_name(name)
        done = seccomp.seccomp_rule_add_array(context, ctypes.c_uint32(_ERRNO | errno.EIO), number, 0, None)
        assert done == 0, (name, done)
    assert seccomp.seccomp_load(context) == 0


def kill_at(spec: str) -> Fault:
    """A fault that kills this process, or breaks its disk, when a point is reached the given number of times."""
    point, _, count = spec.removeprefix("fsync!").partition("@")
    left = int(count or 1)
    lock = threading.Lock()

    def fault(name: str) -> None:
        nonlocal left
        with lock:
            left -= name == point
            if name == point and left == 0:
                if spec.startswith("fsync!"):
                    break_fsync()
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

    return fault


if __name__ == "__main__":
    sys.exit(main(fault=kill_at(os.environ.get("KVMAGENT_FAULT", ""))))
