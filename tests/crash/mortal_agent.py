"""The agent, killed at a point that KVMAGENT_FAULT names: `step:done@2` is the second time that `step:done` is reached.

The kill is SIGKILL: no handler, no cleanup, nothing flushed.
"""

import os
import signal
import sys
import threading

from kvmagent.cli.daemon import main
from kvmagent.tasks.faults import Fault


def kill_at(spec: str) -> Fault:
    """A fault that kills this process when a point is reached the given number of times."""
    point, _, count = spec.partition("@")
    left = int(count or 1)
    lock = threading.Lock()

    def fault(name: str) -> None:
        nonlocal left
        with lock:
            left -= name == point
            if name == point and left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return fault


if __name__ == "__main__":
    sys.exit(main(fault=kill_at(os.environ.get("KVMAGENT_FAULT", ""))))
