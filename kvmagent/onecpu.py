"""Keeps the agent on one CPU: of those that it may use, the one that others leave it most of.

CPython runs one thread at a time. On several CPUs each hand-over of the interpreter wakes another CPU, and whoever
let go of it for a short call waits for it to come back; on one they take turns. And the guests lose one CPU to a busy
agent at most. Observed on two CPUs, CPython 3.11, 16 clients: 1.4 times the commands for 0.6 times the CPU a command.

A CPU that others have come to use is left for one that they use less. Threads and processes are begun on the CPU of
the thread that begins them: what is not the agent's own is begun inside `everywhere`.
Source: sched_setaffinity(2), proc(5): /proc/stat, /proc/[pid]/task.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmagent.logs import Log

log = Log(__name__)

# How often it is looked how busy the CPUs are: over so long a time.
_LOOK_S = 5.0
# A CPU is left when others used more of it than this, and of another one so much less.
_CROWDED, _BETTER = 0.5, 0.25

# Of one CPU so far: ticks in all, and those without work.
_Ticks = tuple[int, int]


class OneCpu:
    """`start` and `look` belong to one thread; `everywhere` to any.

    `proc` is where the kernel's files are; `clock` and `used` are seconds: now, and of CPU that the agent has used.
    """

    def __init__(
        self,
        *,
        proc: Path = Path("/proc"),
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.process_time,
    ) -> None:
        self._proc = proc
        self._clock = clock
        self._used = used
        self._allowed = frozenset(os.sched_getaffinity(0))
        self._cpu: int | None = None
        self._seen: dict[int, _Ticks] = {}
        self._seen_at = self._seen_used = 0.0

    def start(self) -> None:
        """Bring all threads to one CPU; where there is but one, or none may be chosen, nothing changes."""
        if len(self._allowed) > 1:
            self._seen = self._read_ticks()
            busy = {cpu: 1 - idle / total for cpu, (total, idle) in self._seen.items() if total}
            self._seen_at, self._seen_used = self._clock(), self._used()
            if busy:
                self._move(min(busy, key=lambda cpu: (busy[cpu], cpu)))

    def stop(self) -> None:
        """Let all threads use what they could use before."""
        if self._cpu is not None:
            self._cpu = None
            self._confine(self._allowed)

    def look(self) -> None:
        """Go to another CPU where others crowd this one. To be called every second or so."""
        now = self._clock()
        if self._cpu is None or now - self._seen_at < _LOOK_S:
            return
        seen, used = self._read_ticks(), self._used()
        busy = {cpu: _busy(self._seen[cpu], ticks) for cpu, ticks in seen.items() if cpu in self._seen}
        own = (used - self._seen_used) / (now - self._seen_at)
        self._seen, self._seen_at, self._seen_used = seen, now, used
        others = busy.get(self._cpu, 0.0) - own
        best = min(busy, key=lambda cpu: (busy[cpu], cpu), default=self._cpu)
        if best != self._cpu and others > _CROWDED and busy[best] < others - _BETTER:
            log.debug("another CPU", cpu=best, before=self._cpu, others=round(others, 2))
            self._move(best)

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """Let what this thread begins inside the block use all CPUs that the agent was given."""
        if self._cpu is None:
            yield
            return
        # Where they have been taken away meanwhile, what is begun stays where the agent is.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self._allowed)
        try:
            yield
        finally:
            cpu = self._cpu
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._allowed if cpu is None else {cpu})

    def _move(self, cpu: int) -> None:
        self._cpu = cpu
        try:
            self._confine(frozenset({cpu}))
        except OSError as error:  # the administrator has taken it away meanwhile, or the call is not allowed
            self._cpu = None
            log.warning("the agent is not kept on one CPU", cpu=cpu, error=str(error))

    def _confine(self, cpus: frozenset[int]) -> None:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cpus)

    def _read_ticks(self) -> dict[int, _Ticks]:
        """Return what the kernel has counted of each CPU that may be used; nothing where it does not say."""
        ticks = {}
        try:
            lines = (self._proc / "stat").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            name, *numbers = line.split()
            # Of the ten numbers the last two, for guests, are in the first two already.
            counted = [int(number) for number in numbers[:8]]
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in self._allowed and len(counted) == 8:
                ticks[int(name[3:])] = sum(counted), counted[3] + counted[4]
        return ticks


def _busy(before: _Ticks, now: _Ticks) -> float:
    """Return the part of a time that a CPU worked for anybody."""
    total, idle = now[0] - before[0], now[1] - before[1]
    return 1 - idle / total if total > 0 else 0.0
