"""Owns the end of every process that the lab starts, also when the test run itself dies without warning.

A process of the lab is known by its HOME: it lies in the lab's own directory, and libvirtd hands it on to QEMU.

    Guard(home)  --pipe-->  a child that waits for the end of the pipe; then, whatever happened to its parent,
                            it ends what is left with that HOME and removes the directory
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

POLL_S = 0.02
#: For a process to be gone after SIGKILL.
END_TIMEOUT_S = 10.0

#: A limit is what the wait takes at most where nothing else runs; two runs of the tests or a busy host take longer.
LOAD_FACTOR = 4

Found = TypeVar("Found")


def wait_for(find: Callable[[], Found | None], *, timeout_s: float, what: str) -> Found:
    """Poll until `find` returns something that is true, and return that.

    Raises:
        TimeoutError: it did not in `timeout_s` (LOAD_FACTOR times it); the text names `what` was waited for.
    """
    timeout_s *= LOAD_FACTOR
    deadline = time.monotonic() + timeout_s
    while not (found := find()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(POLL_S)
    return found


def find_processes(home: Path) -> Iterator[int]:
    """The ids of the running processes whose HOME is `home`, children of the lab or not."""
    mark = f"HOME={home}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # Other users' processes cannot be read, and any process may end meanwhile. A zombie has no environment.
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def end_processes(home: Path) -> None:
    """SIGKILL every process whose HOME is `home`, until none is left.

    Raises:
        TimeoutError: one would not go.
    """

    def none_left() -> bool:
        left = list(find_processes(home))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_for(none_left, timeout_s=END_TIMEOUT_S, what=f"the end of {[*find_processes(home)]}")


def stop_child(child: subprocess.Popen[bytes], *, timeout_s: float) -> int:
    """End a child by SIGTERM, or SIGKILL if that takes too long; its exit status."""
    child.terminate()
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait(END_TIMEOUT_S)


class Guard:
    """Watches over a directory of the lab until `release`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        # In a session of its own, so that Ctrl-C leaves it alone.
        self._child = subprocess.Popen(
            [sys.executable, "-I", __file__, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def release(self) -> None:
        """End what is left in the directory and remove it, now.

        Raises:
            RuntimeError: a process would not end.
        """
        assert self._child.stdin is not None
        self._child.stdin.close()
        if self._child.wait(2 * END_TIMEOUT_S) != 0:
            raise RuntimeError(f"processes are left: {[*find_processes(self._home)]}")


def main() -> None:
    """Wait for the parent to let go of the pipe, then clean up behind it."""
    home = Path(sys.argv[1])
    sys.stdin.buffer.read()
    try:
        end_processes(home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
