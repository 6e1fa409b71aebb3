"""How many agents this machine can have: by memory, by processes and threads, by open files."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# What an agent with ten VMs takes, with the process that watches over its end, when it is busy.
AGENT_BYTES, AGENT_THREADS, AGENT_FILES = 96 * 2**20, 64, 160
# What is left to others, and to the server and Prometheus.
SPARE_BYTES, SPARE_THREADS, SPARE_FILES = 2 * 2**30, 500, 2000
# Of the process that holds the most connections, the server: those of an agent, and its own.
SERVER_FILES = 4


class Room(NamedTuple):
    """How many agents there is room for, and by which limit."""

    agents: int
    limit: str


def find_room(root: Path = Path("/")) -> Room:
    """How many agents fit; at least none."""
    return min(_limits(root), key=lambda room: room.agents)


def _limits(root: Path) -> Iterator[Room]:
    memory = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(memory["MemAvailable"].split()[0]) * 1024
    yield _room(available, SPARE_BYTES, AGENT_BYTES, "memory that is available")
    for name in ("proc/sys/kernel/threads-max", "proc/sys/kernel/pid_max", "sys/fs/cgroup/pids.max"):
        file = root / name
        text = file.read_text().strip() if file.exists() else "max"
        if text != "max":
            yield _room(int(text), SPARE_THREADS, AGENT_THREADS, name)
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if processes != resource.RLIM_INFINITY:
        yield _room(processes, SPARE_THREADS, AGENT_THREADS, "processes of this user (ulimit -u)")
    used, _, most = map(int, (root / "proc/sys/fs/file-nr").read_text().split())
    yield _room(most - used, SPARE_FILES, AGENT_FILES, "open files of the system")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY:
        yield _room(files, 100, SERVER_FILES, "open files of a process (ulimit -n)")


def _room(has: int, spare: int, each: int, limit: str) -> Room:
    return Room(max(0, (has - spare) // each), limit)
