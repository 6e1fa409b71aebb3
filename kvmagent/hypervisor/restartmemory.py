"""Since when each VM has needed a restart, kept in a small file while the agent itself restarts.

It is noted whenever a VM is observed. The time is that of the first observation that showed it: the own preparation,
or the next one after somebody else's change. What is lost with the file is only since when.
"""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from kvmagent.hypervisor.vmfile import VmFile
from kvmagent.model.facts import Facts


class _Waiting(msgspec.Struct, frozen=True):
    """One VM that waits: since when, in seconds since the epoch, in which of its runs."""

    since: float
    run: str | None


class RestartMemory:
    """Thread-safe. `clock` returns seconds since the epoch."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._file = VmFile(path, _Waiting, "since when VMs wait for a restart")
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[str, _Waiting] = {}

    def load(self) -> None:
        """Read what was noted."""
        self._waiting = self._file.load()

    def note(self, facts: Facts) -> float | None:
        """Note whether a VM waits for a restart, and return since when; None where it does not."""
        uuid = facts.domain.uuid
        with self._lock:
            known = self._waiting.get(uuid)
            if not facts.restart_required:
                if known is not None:
                    del self._waiting[uuid]
                    self._file.save(self._waiting)
                return None
            if known is None or known.run != facts.run:
                known = self._waiting[uuid] = _Waiting(self._clock(), facts.run)
                self._file.save(self._waiting)
            return known.since

    def known(self) -> frozenset[str]:
        """Return the VMs of which something is remembered."""
        with self._lock:
            return frozenset(self._waiting)

    def forget(self, uuids: Iterable[str]) -> None:
        """Forget VMs that are not on this host any more."""
        gone = set(uuids)
        with self._lock:
            if gone & self._waiting.keys():
                self._waiting = {uuid: one for uuid, one in self._waiting.items() if uuid not in gone}
                self._file.save(self._waiting)
