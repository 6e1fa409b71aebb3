"""Watches what was pending when its task answered: the guest may still let go of it, minutes or hours later.

    executor: outcome pending -> add -> look_after, every second -> the VM's lane -> executor looks

Every look is a task's turn in its VM's lane, so that nothing else changes the VM meanwhile. After a restart the
journal says what is still to be watched.
"""

import threading
import time
from collections.abc import Callable

from kvmagent.logs import Log, error_fields
from kvmagent.model.errors import AgentError
from kvmagent.tasks.journal import Journal, Task

log = Log(__name__)

# A look comes after a quarter of the time that the removal has been pending, within these.
_SHORTEST_S, _LONGEST_S = 1.0, 60.0
_GIVE_UP_S = 86400.0


class LateRemovals:
    """Thread-safe. `put` gives a task to its VM's lane."""

    def __init__(
        self, journal: Journal, put: Callable[[Task], None], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._journal = journal
        self._put = put
        self._clock = clock
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}

    def start(self) -> None:
        """Take up what an earlier agent watched.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE.
        """
        for task_uuid in self._journal.pending():
            self.add(task_uuid)

    def add(self, task_uuid: str) -> None:
        """Watch a task that answered `pending`."""
        with self._lock:
            self._due[task_uuid] = self._clock() + _SHORTEST_S

    def look_after(self) -> None:
        """Give the tasks whose time has come to their lanes. To be called every second or so."""
        now = self._clock()
        with self._lock:
            due = [task_uuid for task_uuid, at in self._due.items() if at <= now]
        for task_uuid in due:
            try:
                task = self._journal.find(task_uuid)
            except AgentError as error:
                log.warning("pending tasks cannot be read now", **error_fields(error))
                return
            age_s = 0.0 if task is None else now - (task.finished_at or now)
            with self._lock:
                if task is None or task.outcome != "pending" or age_s > _GIVE_UP_S:
                    del self._due[task_uuid]
                    continue
                self._due[task_uuid] = now + min(max(age_s / 4, _SHORTEST_S), _LONGEST_S)
            if task.state != "finished":  # the first callback goes first
                self._put(task)
