"""Lanes: the tasks of one VM run one at a time and in order, those of many VMs side by side.

A lane is named by its VM. Threads are made as lanes need them, up to `workers`, and end when nothing is left to do.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.journal import Task

log = logging.getLogger(__name__)

# A worker with nothing to do waits so long for more before it ends.
_IDLE_S = 10.0


class Lanes:
    """Thread-safe. `run` works on one task; what it raises is logged and ends nothing but that task."""

    def __init__(self, run: Callable[[Task], None], *, workers: int, max_queued: int, max_queued_per_lane: int) -> None:
        self._run = run
        self._workers = workers
        self._max_queued = max_queued
        self._max_queued_per_lane = max_queued_per_lane
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[Task]] = {}
        self._ready: deque[str] = deque()
        self._running: dict[str, tuple[Task, float]] = {}
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._stopping = False

    def check_room(self, lane: str) -> None:
        """Refuse before a task is stored what could not be put.

        Raises:
            AgentError: STOPPING; QUEUE_FULL.
        """
        with self._changed:
            if self._stopping:
                raise AgentError(Code.STOPPING, "the agent is stopping")
            queued = sum(map(len, self._waiting.values()))
            if queued >= self._max_queued:
                raise AgentError(Code.QUEUE_FULL, f"{queued} tasks are waiting, the limit is {self._max_queued}")
            queued = len(self._waiting.get(lane, ()))
            if queued >= self._max_queued_per_lane:
                raise AgentError(
                    Code.QUEUE_FULL,
                    f"{queued} tasks are waiting for VM {lane}, the limit is {self._max_queued_per_lane}",
                )

    def put(self, task: Task) -> None:
        """Queue a stored task; one that comes while stopping stays in the journal for the next start."""
        with self._changed:
            if self._stopping:
                return
            lane = self._waiting.setdefault(task.lane, deque())
            lane.append(task)
            if len(lane) == 1 and task.lane not in self._running:
                self._ready.append(task.lane)
                self._wake_worker()

    def stop(self, timeout_s: float) -> bool:
        """Let what runs finish, leave what waits; return whether all of it finished in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._threads, timeout=timeout_s)
            left = dict(self._running)
            threads = set(self._threads)
        for lane, (task, _) in left.items():
            log.warning("task still runs at stop and stays in the journal task=%s vm=%s", task.task_uuid, lane)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not left

    def running(self) -> dict[str, tuple[Task, float]]:
        """Return the running task of each busy lane, and since when (time.monotonic())."""
        with self._changed:
            return dict(self._running)

    def depth(self) -> int:
        """Return how many tasks wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def _wake_worker(self) -> None:
        if self._idle >= len(self._ready):
            self._changed.notify()
        elif len(self._threads) < self._workers:
            thread = threading.Thread(target=self._work, name=f"lane-{len(self._threads)}", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _work(self) -> None:
        while (task := self._take()) is not None:
            try:
                self._run(task)
            except Exception:
                log.exception("task ended in an error that nothing expected task=%s vm=%s", task.task_uuid, task.lane)
            self._release(task.lane)
        with self._changed:
            self._threads.discard(threading.current_thread())
            self._changed.notify_all()

    def _take(self) -> Task | None:
        """Return the next task of a free lane; None when the worker is to end."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._ready or self._stopping, timeout=_IDLE_S)
            self._idle -= 1
            if self._stopping or not self._ready:
                return None
            lane = self._ready.popleft()
            task = self._waiting[lane].popleft()
            self._running[lane] = (task, time.monotonic())
            return task

    def _release(self, lane: str) -> None:
        with self._changed:
            del self._running[lane]
            if self._waiting[lane]:
                self._ready.append(lane)
                self._wake_worker()
            else:
                del self._waiting[lane]
