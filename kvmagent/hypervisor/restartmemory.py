"""Since when each VM waits for a restart, kept over the agent's own in a small file.

It is noted whenever a VM is looked at. The moment is that of the first look that showed it: the own preparation,
or the next look after somebody else's change. What is lost with the file is only since when.
"""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from kvmagent.logs import Log
from kvmagent.model.facts import Facts
from kvmagent.private import write_file

log = Log(__name__)


class _Waiting(msgspec.Struct, frozen=True):
    """One VM that waits: since when, in seconds since the epoch, in which of its runs."""

    since: float
    run: str | None


_WAITING = msgspec.json.Decoder(dict[str, _Waiting])


class RestartMemory:
    """Thread-safe. `clock` tells seconds since the epoch."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[str, _Waiting] = {}

    def load(self) -> None:
        """Read what was noted; a file that cannot be read is told, and begun anew."""
        try:
            self._waiting = _WAITING.decode(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("since when VMs wait for a restart is forgotten", path=self._path, error=str(error))

    def note(self, facts: Facts) -> float | None:
        """Note whether a VM waits for a restart, and return since when; None where it does not."""
        uuid = facts.domain.uuid
        with self._lock:
            known = self._waiting.get(uuid)
            if not facts.restart_required:
                if known is not None:
                    del self._waiting[uuid]
                    self._save()
                return None
            if known is None or known.run != facts.run:
                known = self._waiting[uuid] = _Waiting(self._clock(), facts.run)
                self._save()
            return known.since

    def keep(self, uuids: Iterable[str]) -> None:
        """Forget the VMs that are not on this host any more."""
        here = set(uuids)
        with self._lock:
            if gone := self._waiting.keys() - here:
                self._waiting = {uuid: one for uuid, one in self._waiting.items() if uuid not in gone}
                self._save()

    def _save(self) -> None:
        try:
            write_file(self._path, msgspec.json.encode(self._waiting))
        except OSError as error:
            log.warning("since when VMs wait for a restart cannot be kept", path=self._path, error=str(error))
