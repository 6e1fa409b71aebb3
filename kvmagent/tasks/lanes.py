"""Lanes: run the tasks of one VM one at a time and in order, and those of several VMs in parallel.

A lane is named by its VM. Threads are made as lanes need them, up to `workers`, and end when nothing is left to do.
A lane whose task has run for long, because a guest or a hypervisor hangs, counts no longer: another thread takes
its place, so that hanging VMs hold up themselves and no other. A lane whose task has to wait for another's on the same
VM is parked without a thread until it is woken.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmagent.logs import Log, log_context
from kvmagent.model.errors import AgentError, Code
from kvmagent.tasks.journal import Task
from kvmagent.tasks.vmturns import NotYet

log = Log(__name__)

# A worker with nothing to do waits so long for more before it ends.
_IDLE_S = 10.0
# A task that runs longer than this has its thread replaced; so many at most, for a thread costs memory.
_LONG_S = 20.0
_MOST_REPLACED = 256


class Lanes:
    """Thread-safe. `run` works on one task; what it raises is logged and ends nothing but that task.

    NotYet parks the task's lane until `wake`.
    """

    def __init__(
        self,
        run: Callable[[Task], None],
        *,
        workers: int,
        max_queued: int,
        max_queued_per_lane: int,
        max_queued_per_client: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._workers = workers
        self._max_queued = max_queued
        self._max_queued_per_lane = max_queued_per_lane
        self._max_queued_per_client = max_queued_per_client
        self._clock = clock
        self._changed = threading.Condition()
        # Places taken in each lane and by each client: tasks that wait, run, or are about to be stored.
        self._places: Counter[str] = Counter()
        self._places_of_client: Counter[str] = Counter()
        self._places_taken = 0
        self._waiting: dict[str, deque[Task]] = {}
        self._ready: deque[str] = deque()
        self._parked: set[str] = set()
        # Tasks that were woken, or withdrawn, before `run` has come to say that they wait.
        self._woken: set[str] = set()
        self._withdrawn: set[str] = set()
        self._running: dict[str, tuple[Task, float]] = {}
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._taken_at = clock()
        self._stopping = False

    def set_limits(
        self, *, workers: int, max_queued: int, max_queued_per_lane: int, max_queued_per_client: int
    ) -> None:
        """Have other limits from now on; what was accepted stays."""
        with self._changed:
            self._workers, self._max_queued = workers, max_queued
            self._max_queued_per_lane, self._max_queued_per_client = max_queued_per_lane, max_queued_per_client

    @contextmanager
    def hold_place(self, task: Task) -> Iterator[None]:
        """Hold a place in a task's lane while it is being stored, so that no more are accepted than may wait.

        Raises:
            AgentError: STOPPING; QUEUE_FULL.
        """
        with self._changed:
            self._check_room(task.lane, _client(task))
            self._take_place(task)
        try:
            yield
        finally:
            with self._changed:
                self._leave_place(task)

    def check_room(self) -> None:
        """Raise what `hold_place` would for a VM that has no tasks."""
        with self._changed:
            self._check_room("", "")

    def put(self, task: Task) -> None:
        """Queue a stored task, unless it is there already; one that comes while stopping stays in the journal for the
        next start."""
        with self._changed:
            if self._stopping or self._has(task):
                return
            self._take_place(task)
            lane = self._waiting.setdefault(task.lane, deque())
            lane.append(task)
            if len(lane) == 1 and task.lane not in self._running:
                self._give_thread(task.lane)

    def wake(self, task: Task) -> None:
        """Run a task again that had to wait."""
        with self._changed:
            if task.lane in self._parked:
                self._parked.remove(task.lane)
                self._give_thread(task.lane)
            elif self._runs(task):
                self._woken.add(task.task_uuid)

    def withdraw(self, task: Task) -> None:
        """Take a task out of its lane, where it waits there or comes to wait."""
        with self._changed:
            if self._runs(task):
                self._withdrawn.add(task.task_uuid)
            lane = self._waiting.get(task.lane, deque())
            waiting = next((one for one in lane if one.task_uuid == task.task_uuid), None)
            if waiting is None:
                return
            was_parked = waiting is lane[0] and task.lane in self._parked
            lane.remove(waiting)
            self._leave_place(waiting)
            if was_parked:
                self._parked.remove(task.lane)
            if not lane and task.lane not in self._running:
                if not was_parked:
                    self._ready.remove(task.lane)
                del self._waiting[task.lane]
            elif was_parked:
                self._give_thread(task.lane)

    def relieve(self) -> None:
        """Give ready lanes threads in place of those that long tasks occupy. To be called every second or so."""
        with self._changed:
            for _ in range(len(self._ready) - self._idle):
                if not self._add_worker():
                    return

    def stalled_s(self) -> float:
        """Return for how long a ready lane waits although a thread for it is free, or could be made."""
        with self._changed:
            if not self._ready or (not self._idle and len(self._threads) >= self._limit()):
                return 0.0
            return self._clock() - self._taken_at

    def stop(self, timeout_s: float) -> bool:
        """Let what runs finish, leave what waits; return whether all of it finished in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._threads, timeout=timeout_s)
            left = dict(self._running)
        for task, _ in left.values():
            with log_context(**task.log_fields):
                log.warning("task still runs at stop and stays in the journal")
        return not left

    def running(self) -> dict[str, tuple[Task, float]]:
        """Return the running task of each busy lane, and for how many seconds it has run."""
        with self._changed:
            now = self._clock()
            return {lane: (task, now - since) for lane, (task, since) in self._running.items()}

    def queued(self) -> dict[str, int]:
        """Return how many tasks wait in each lane that has any."""
        with self._changed:
            return {lane: len(waiting) for lane, waiting in self._waiting.items() if waiting}

    def depth(self) -> int:
        """Return how many tasks wait."""
        return sum(self.queued().values())

    def _runs(self, task: Task) -> bool:
        running, _ = self._running.get(task.lane, (None, 0.0))
        return running is not None and running.task_uuid == task.task_uuid

    def _has(self, task: Task) -> bool:
        return self._runs(task) or any(one.task_uuid == task.task_uuid for one in self._waiting.get(task.lane, ()))

    def _check_room(self, lane: str, client: str) -> None:
        if self._stopping:
            raise AgentError(Code.STOPPING, "the agent is stopping")
        if self._places_taken >= self._max_queued:
            message = f"{self._places_taken} tasks are unfinished, the limit is {self._max_queued}"
            raise AgentError(Code.QUEUE_FULL, message)
        places = self._places[lane]
        if places >= self._max_queued_per_lane:
            raise AgentError(
                Code.QUEUE_FULL,
                f"{places} tasks of VM {lane} are unfinished, the limit is {self._max_queued_per_lane}",
            )

        places = self._places_of_client[client]
        if places >= self._max_queued_per_client:
            raise AgentError(
                Code.QUEUE_FULL,
                f"{places} tasks of {client} are unfinished, the limit is {self._max_queued_per_client}",
            )

    def _take_place(self, task: Task) -> None:
        self._places_taken += 1
        self._places[task.lane] += 1
        self._places_of_client[_client(task)] += 1

    def _leave_place(self, task: Task) -> None:
        self._places_taken -= 1
        for places, key in ((self._places, task.lane), (self._places_of_client, _client(task))):
            places[key] -= 1
            if not places[key]:
                del places[key]

    def _make_ready(self, lane: str) -> None:
        if not self._ready:
            self._taken_at = self._clock()
        self._ready.append(lane)

    def _give_thread(self, lane: str) -> None:
        self._make_ready(lane)
        if self._idle >= len(self._ready):
            self._changed.notify()
        else:
            self._add_worker()

    def _limit(self) -> int:
        """Return how many threads there may be: long tasks' are replaced."""
        now = self._clock()
        long = sum(now - since > _LONG_S for _, since in self._running.values())
        return self._workers + min(long, _MOST_REPLACED)

    def _add_worker(self) -> bool:
        if self._stopping or len(self._threads) >= self._limit():
            return False
        thread = threading.Thread(target=self._work, name=f"lane-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread to give; `relieve` tries again
            log.error("no thread for a lane", error=str(error), ready=len(self._ready))
            return False
        self._threads.add(thread)
        return True

    def _work(self) -> None:
        while (task := self._take()) is not None:
            waits = False
            try:
                self._run(task)
            except NotYet:
                waits = True
            except Exception as error:
                with log_context(**task.log_fields):
                    log.failure("task ended with an unexpected error", error)
            self._release(task, waits=waits)

    def _take(self) -> Task | None:
        """Return the next task of a free lane; None when the worker is to end."""
        with self._changed:
            surplus = len(self._threads) > self._limit()
            if not surplus:
                self._idle += 1
                self._changed.wait_for(lambda: self._ready or self._stopping, timeout=_IDLE_S)
                self._idle -= 1
            if surplus or self._stopping or not self._ready:
                # Under the same lock as the look at what is ready, or a lane could be left without a thread.
                self._threads.discard(threading.current_thread())
                self._changed.notify_all()
                return None
            lane = self._ready.popleft()
            task = self._waiting[lane].popleft()
            self._taken_at = self._clock()
            self._running[lane] = (task, self._taken_at)
            return task

    def _release(self, task: Task, *, waits: bool) -> None:
        lane = task.lane
        with self._changed:
            del self._running[lane]
            was_woken = task.task_uuid in self._woken
            was_withdrawn = task.task_uuid in self._withdrawn
            self._woken.discard(task.task_uuid)
            self._withdrawn.discard(task.task_uuid)
            if waits and not was_withdrawn:
                self._waiting[lane].appendleft(task)
                if was_woken:
                    self._make_ready(lane)
                else:
                    self._parked.add(lane)
                return
            self._leave_place(task)
            if self._waiting[lane]:
                self._make_ready(lane)
            else:
                del self._waiting[lane]


def _client(task: Task) -> str:
    """Return whose task it is: who they proved to be, and where they came from."""
    return f"{task.caller or 'unknown'} at {task.client}"
