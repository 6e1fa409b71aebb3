"""Watches removals that were pending when their task answered: the guest may still release the device hours later.

    executor: outcome pending -> add -> look_after, every second -> the VM's lane -> executor reads the VM

    libvirt's event loop: the guest refused -> note_refusal -> journal, and look_after at once

Each check runs in the VM's lane like a task, so that nothing else changes the VM meanwhile. After a restart the
journal says what is still to be watched.
"""

import contextlib
import threading
from collections.abc import Callable

from kvmagent.logs import Log, error_fields
from kvmagent.model.errors import CODES, AgentError, Code
from kvmagent.model.reply import Problem
from kvmagent.tasks.journal import Journal, Task

log = Log(__name__)

# The VM is read again after a quarter of the time that the removal has been pending, within these limits.
_SHORTEST_S, _LONGEST_S = 1.0, 60.0
_GIVE_UP_S = 86400.0
# A refusal may come between the end of a step's wait and its task's answer: so many are remembered, for so long.
_MOST_REFUSALS, _REMEMBERED_S = 256, 120.0
# A guest that says it again and again is noted once in this time.
_REFUSAL_INTERVAL_S = 1.0


class PendingRemovals:
    """Thread-safe. `put` gives a task to its VM's lane. All times are the agent's own."""

    def __init__(self, journal: Journal, put: Callable[[Task], None]) -> None:
        self._journal = journal
        self._put = put
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}
        self._refusals: dict[tuple[str, str], float] = {}

    def start(self) -> None:
        """Take up what an earlier agent watched.

        Raises:
            AgentError: JOURNAL_UNAVAILABLE.
        """
        for task_uuid in self._journal.pending():
            self.add(task_uuid)

    def add(self, task_uuid: str) -> None:
        """Watch a task that answered `pending`."""
        now = self._journal.own_time()
        with self._lock:
            self._due[task_uuid] = now + _SHORTEST_S
            refusals = [one for one in self._refusals.items() if now - one[1] < _REMEMBERED_S]
        for (vm_uuid, alias), at in refusals:
            self._note(vm_uuid, alias, at)

    def note_refusal(self, vm_uuid: str, alias: str) -> None:
        """Note that a guest refused to let go of a device, for the task that waits for it. Does not block."""
        now, key = self._journal.own_time(), (vm_uuid, alias)
        with self._lock:
            before = self._refusals.pop(key, None)
            if before is not None and now - before < _REFUSAL_INTERVAL_S:
                self._refusals[key] = now
                return
            self._refusals[key] = now
            if len(self._refusals) > _MOST_REFUSALS:
                del self._refusals[next(iter(self._refusals))]
            is_waited_for = bool(self._due)
        if is_waited_for:
            self._note(vm_uuid, alias, now)

    def _note(self, vm_uuid: str, alias: str, at: float) -> None:
        problem = Problem(
            code=Code.MEMORY_REMOVAL_REFUSED,
            message=f"the guest refused to release {alias}",
            remedy=CODES[Code.MEMORY_REMOVAL_REFUSED].remedy,
        )
        with contextlib.suppress(AgentError):  # the journal is closed: the agent stops
            self._journal.note_refusal(
                vm_uuid, alias, at, pending=Code.MEMORY_REMOVAL_PENDING, problem=problem, then=self._hurry
            )

    def _hurry(self, task_uuids: list[str]) -> None:
        with self._lock:
            self._due.update(dict.fromkeys(task_uuids, 0.0))

    def look_after(self) -> None:
        """Give the tasks whose time has come to their lanes. To be called every second or so."""
        now = self._journal.own_time()
        with self._lock:
            due = [task_uuid for task_uuid, at in self._due.items() if at <= now]
        for task_uuid in due:
            try:
                task = self._journal.find(task_uuid)
            except AgentError as error:
                log.warning("pending tasks cannot be read now", **error_fields(error))
                return
            age_s = 0.0 if task is None else now - task.own_at
            with self._lock:
                if task is None or task.outcome != "pending" or age_s > _GIVE_UP_S:
                    del self._due[task_uuid]
                    continue
                self._due[task_uuid] = now + min(max(age_s / 4, _SHORTEST_S), _LONGEST_S)
            if task.state != "finished":  # the first callback goes first
                self._put(task)
