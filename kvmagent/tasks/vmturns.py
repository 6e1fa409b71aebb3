"""Runs one task per VM at a time even if two names of the VM make two lanes.

    take         the VM for a task, until it leaves; where another has it, NotYet, and the task is woken once it is free
    wait_for     another task's end: then the task is woken
    leave        the task has ended, or waits itself

Who waits keeps no thread: NotYet parks the task in its lane (tasks.lanes), and `wake` takes it up again.
"""

import threading
from collections.abc import Callable

from kvmagent.tasks.journal import Task


class NotYet(Exception):
    """Raised by `VmTurns.take` and the executor: the task cannot begin now, and is woken when it can."""


class VmTurns:
    """Thread-safe. A VM is known by its UUID, and costs nothing while nobody works on it or waits for it.

    `wake` is called without a lock, and may be called before the one that is woken has come to rest.
    """

    def __init__(self, wake: Callable[[Task], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._holders: dict[str, str] = {}
        self._waiting_for_vm: dict[str, list[Task]] = {}
        self._waiting_for_end: dict[str, list[Task]] = {}

    def take(self, vm_uuid: str, task: Task) -> None:
        """Have a VM until `leave`; who has it already keeps it.

        Raises:
            NotYet: another task has it.
        """
        with self._lock:
            if self._holders.setdefault(vm_uuid, task.task_uuid) != task.task_uuid:
                self._waiting_for_vm.setdefault(vm_uuid, []).append(task)
                raise NotYet

    def wait_for(self, other_uuid: str, task: Task) -> None:
        """Have a task woken once another has ended. Check only after this call that it has not ended yet."""
        with self._lock:
            self._waiting_for_end.setdefault(other_uuid, []).append(task)

    def leave(self, task_uuid: str, *, ended: bool) -> None:
        """Let go of what a task has, and wake who waits for that; with `ended` who waits for its end, too."""
        with self._lock:
            free = [vm for vm, holder in self._holders.items() if holder == task_uuid]
            woken = self._waiting_for_end.pop(task_uuid, []) if ended else []
            for vm in free:
                del self._holders[vm]
                woken += self._waiting_for_vm.pop(vm, [])
        for task in woken:
            self._wake(task)
