"""Delivery: each outcome to its callback URL, until it is taken, refused for good, or given up.

    put(owed)  ->  its destination (scheme, host, port)  ->  when it is due: one of a few threads, one callback
                     2xx: delivered    404: gone    other answers: this VM's callbacks again, later
                     no answer: the whole destination again, later

A destination has one callback under way at a time, on a connection that is kept; callbacks of one VM go out in
order. A destination that does not answer is tried less and less often, and those together occupy at most half of the
threads, so that a dead or slow server holds up no other. Only ids are kept in memory; the body is read from the
journal when it is sent.
"""

import heapq
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

from kvmagent.logs import Log, error_fields, log_context
from kvmagent.meters import Meters
from kvmagent.model.command import NO_CALLBACK
from kvmagent.model.errors import AgentError
from kvmagent.tasks.callbacks import Callbacks, Channel
from kvmagent.tasks.faults import Fault, no_fault
from kvmagent.tasks.journal import Journal, Owed, State, Task

log = Log(__name__)

_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.5, 180.0
# Callbacks under way at once; of these to destinations whose last one was not answered.
_THREADS, _SUSPECT_THREADS = 32, 16
# A thread or connection that has had nothing to do for so long is ended.
_IDLE_S = 10.0


@dataclass
class _Destination:
    """One callback server and what is owed to it: by VM the ids with the time since when, oldest first: by the clock,
    which is told, and in the agent's own time, which counts.

    Every lane has one entry in `due`, but for the one that is `busy`: its first callback is under way. `scheduled_at`
    is the entry on Delivery's schedule that counts. Guarded by Delivery's lock, but for `channel`, which belongs to the
    thread that has the callback under way.
    """

    url: str
    channel: Channel
    lanes: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    due: list[tuple[float, int, str]] = field(default_factory=list)
    failures: int = 0
    not_before: float = 0.0
    busy: str | None = None
    scheduled_at: float | None = None
    used_at: float = 0.0

    def next_at(self) -> float:
        return max(self.not_before, self.due[0][0])


class Backlog(NamedTuple):
    """What is owed to one destination: how many callbacks, the oldest since when (seconds since the epoch), how often
    in a row it did not answer, which VM's callback is under way, in how many seconds another is due."""

    destination: str
    owed: int
    oldest_at: float
    failures: int
    under_way: str | None
    next_in_s: float | None


class Delivery:
    """Thread-safe. A callback's age is measured in the agent's own time: no step of the clock gives one up."""

    def __init__(
        self,
        journal: Journal,
        callbacks: Callbacks,
        *,
        timeout_s: float,
        give_up_s: float,
        jitter: Callable[[], float] = lambda: random.uniform(0.75, 1.25),
        fault: Fault = no_fault,
        meters: Meters | None = None,
    ) -> None:
        self._journal = journal
        self._callbacks = callbacks
        self._timeout_s = timeout_s
        self._give_up_s = give_up_s
        self._jitter = jitter
        self._fault = fault
        self._meters = meters or Meters()
        self._changed = threading.Condition()
        self._destinations: dict[str, _Destination] = {}
        # When each destination that owes something and is not busy is due: the answering ones, and the suspect ones.
        # An entry that no longer says when its destination is due is passed over.
        self._schedules: tuple[list[tuple[float, int, str]], list[tuple[float, int, str]]] = ([], [])
        self._suspects_busy = 0
        self._order = itertools.count()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._owed = 0
        self._stop_at: float | None = None

    def put(self, owed: Owed) -> None:
        """Send a task's reply to its callback URL, soon; one that is owed already is tried again now.

        Where no callback was wanted there is nothing to send: it counts as delivered, after no attempt.
        """
        if owed.callback_url == NO_CALLBACK:
            self._journal.settle(owed.task_uuid, "delivered", None)
            return
        key = _destination_of(owed)
        with self._changed:
            if self._stop_at is not None:
                return
            destination = self._destinations.get(key)
            if destination is None:
                channel = self._callbacks.open(owed.callback_url, owed.client)
                destination = self._destinations[key] = _Destination(key, channel)
            lane = destination.lanes.setdefault(owed.lane, {})
            known = owed.task_uuid in lane
            if not known:
                lane[owed.task_uuid] = owed.owed_at, owed.own_at
                self._owed += 1
            if known or len(lane) == 1:
                self._make_due_now(destination, owed.lane, asked=known)

    def put_missing(self, owed: Owed) -> None:
        """Send a reply that is owed and that nobody told of; what waits already keeps its turn."""
        with self._changed:
            destination = self._destinations.get(_destination_of(owed))
            waits = destination is not None and owed.task_uuid in destination.lanes.get(owed.lane, {})
        if not waits:
            self.put(owed)

    def owed(self) -> int:
        """Return how many callbacks wait to be taken."""
        with self._changed:
            return self._owed

    def backlog(self) -> list[Backlog]:
        """Return what is owed to each destination that is owed anything."""
        with self._changed:
            now = time.monotonic()
            return [
                Backlog(
                    destination=destination.url,
                    owed=sum(map(len, destination.lanes.values())),
                    oldest_at=min(next(iter(lane.values()))[0] for lane in destination.lanes.values()),
                    failures=destination.failures,
                    under_way=destination.busy,
                    next_in_s=max(0.0, destination.next_at() - now) if destination.due else None,
                )
                for destination in self._destinations.values()
                if destination.lanes
            ]

    def stalled_s(self) -> float:
        """Return for how long a callback has been due although a thread for it is free, or could be made."""
        with self._changed:
            due = self._find_due(time.monotonic())
            if due is None or (not self._idle and len(self._threads) >= _THREADS):
                return 0.0
            return time.monotonic() - max(due.next_at(), due.used_at)

    def relieve(self) -> None:
        """Give due callbacks a thread where none could be had before. To be called every second or so."""
        with self._changed:
            if self._find_due(time.monotonic()) is not None and not self._idle:
                self._add_thread()

    def stop(self, timeout_s: float) -> None:
        """Send what is due now, as far as the time goes; what is still owed then stays in the journal."""
        with self._changed:
            self._stop_at = time.monotonic() + timeout_s
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._threads, timeout=timeout_s + self._timeout_s)
            for destination in self._destinations.values():
                if destination.busy is None:
                    destination.channel.close()

    # -- the schedule, under the lock

    def _make_due_now(self, destination: _Destination, lane: str, *, asked: bool) -> None:
        """Put a lane's first callback on the schedule; when its caller asked for it, whatever the pause."""
        now = time.monotonic()
        if asked:
            destination.due = [entry for entry in destination.due if entry[2] != lane]
            heapq.heapify(destination.due)
            destination.not_before = min(destination.not_before, now)
        if destination.busy != lane:
            heapq.heappush(destination.due, (now, next(self._order), lane))
        self._schedule(destination)
        if self._idle:
            self._changed.notify()
        else:
            self._add_thread()

    def _schedule(self, destination: _Destination) -> None:
        if destination.busy is not None or not destination.due or destination.scheduled_at == destination.next_at():
            return
        destination.scheduled_at = destination.next_at()
        entry = (destination.scheduled_at, next(self._order), destination.url)
        heapq.heappush(self._schedules[destination.failures > 0], entry)

    def _find_due(self, now: float) -> _Destination | None:
        """Return the destination to send to now; it stays on the schedule."""
        for suspect, schedule in enumerate(self._schedules):
            if suspect and self._suspects_busy >= _SUSPECT_THREADS:
                continue
            while schedule and schedule[0][0] <= now:
                when, _, key = schedule[0]
                destination = self._destinations.get(key)
                if destination is not None and destination.scheduled_at == when:
                    return destination
                heapq.heappop(schedule)
        return None

    def _next_at(self) -> float | None:
        schedules = self._schedules[: 1 if self._suspects_busy >= _SUSPECT_THREADS else 2]
        return min((schedule[0][0] for schedule in schedules if schedule), default=None)

    def _add_thread(self) -> None:
        if len(self._threads) >= _THREADS or self._stop_at is not None:
            return
        thread = threading.Thread(target=self._run, name=f"delivery-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread to give; `relieve` tries again
            log.error("no thread for delivery", error=str(error), owed=self._owed)
            return
        self._threads.add(thread)

    # -- the threads

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            destination, lane, task_uuid = taken
            settled, pause_s, answered = False, _LONGEST_RETRY_S, True
            try:
                settled, pause_s, answered = self._send(destination, task_uuid)
            except AgentError as error:
                log.warning("callback waits for the journal", task=task_uuid, vm=lane, **error_fields(error))
            except Exception as error:
                log.failure("delivery failed in a way that nothing expected", error, task=task_uuid, vm=lane)
            self._put_back(destination, lane, task_uuid, settled, pause_s, answered)

    def _take(self) -> tuple[_Destination, str, str] | None:
        """Wait for a callback that is due and return it; None when the thread is to end."""
        with self._changed:
            idle_until = time.monotonic() + _IDLE_S
            while True:
                now = time.monotonic()
                destination = self._find_due(now)
                if self._stop_at is not None and (destination is None or now >= self._stop_at or destination.failures):
                    break
                if destination is not None:
                    lane = heapq.heappop(destination.due)[2]
                    destination.busy, destination.scheduled_at = lane, None
                    self._suspects_busy += destination.failures > 0
                    return destination, lane, next(iter(destination.lanes[lane]))
                next_at = self._next_at()
                if now >= idle_until and (next_at is None or self._idle):
                    break
                # The last thread stays as long as anything is owed.
                wake_at = [at for at in (next_at, idle_until) if at is not None and at > now]
                self._idle += 1
                self._changed.wait(min(wake_at) - now)
                self._idle -= 1
            self._threads.discard(threading.current_thread())
            self._close_idle(now)
            self._changed.notify_all()
            return None

    def _put_back(
        self, destination: _Destination, lane: str, task_uuid: str, settled: bool, pause_s: float, answered: bool
    ) -> None:
        given_up: list[str] = []
        with self._changed:
            now = time.monotonic()
            self._suspects_busy -= destination.failures > 0
            destination.busy, destination.used_at = None, now
            destination.failures = 0 if answered else destination.failures + 1
            if settled:
                self._forget(destination, lane, task_uuid)
            if not answered:
                destination.not_before = now + self._pause_s(destination.failures)
                pause_s = 0.0
                if self._stop_at is None:
                    given_up = self._forget_old(destination)
            if lane in destination.lanes:
                heapq.heappush(destination.due, (now + (0.0 if settled else pause_s), next(self._order), lane))
            self._schedule(destination)
        for old in given_up:
            self._give_up(destination, old)

    def _forget(self, destination: _Destination, lane: str, task_uuid: str) -> None:
        owed = destination.lanes[lane]
        del owed[task_uuid]
        self._owed -= 1
        if not owed:
            del destination.lanes[lane]

    def _drop_due(self, destination: _Destination) -> None:
        """Take what is owed nothing any more out of what is due."""
        destination.due = [entry for entry in destination.due if entry[2] in destination.lanes]
        heapq.heapify(destination.due)

    def _forget_old(self, destination: _Destination) -> list[str]:
        """Forget what this destination has been owed for too long, and return it: it has just been tried once more."""
        oldest, old = self._journal.own_time() - self._give_up_s, []
        for lane, owed in list(destination.lanes.items()):
            for task_uuid in [task_uuid for task_uuid, (_, own_at) in owed.items() if own_at <= oldest]:
                self._forget(destination, lane, task_uuid)
                old.append(task_uuid)
        self._drop_due(destination)
        return old

    def _give_up(self, destination: _Destination, task_uuid: str) -> None:
        error = "no answer from the receiver"
        try:
            task = self._journal.find(task_uuid)
            if task is None:
                return
            with log_context(**task.log_fields):
                log.error("callback given up", url=destination.url, attempts=task.attempts, error=error)
            self._settle(task, "given_up", error, None)
        except AgentError as failure:  # the next start finds it owed, tries it, and gives it up
            log.warning("callback waits for the journal", task=task_uuid, **error_fields(failure))

    def _close_idle(self, now: float) -> None:
        for key, destination in list(self._destinations.items()):
            if not destination.lanes and destination.busy is None and now - destination.used_at >= _IDLE_S:
                destination.channel.close()
                del self._destinations[key]

    def _pause_s(self, failures: int) -> float:
        """Return how long to wait after so many failures: doubling, with jitter, up to a few minutes."""
        doubled: float = _FIRST_RETRY_S * 2 ** min(failures - 1, 16)
        return min(doubled, _LONGEST_RETRY_S) * self._jitter()

    # -- one callback

    def _send(self, destination: _Destination, task_uuid: str) -> tuple[bool, float, bool]:
        """Send one callback; return whether it is settled, else in how many seconds to try it again, and whether the
        receiver answered at all."""
        task = self._journal.find(task_uuid)
        if task is None or task.state != "finished":
            return True, 0.0, True
        attempts = task.attempts + 1
        with log_context(**task.log_fields):
            url = task.callback_url.partition("?")[0]  # a query may hold what is nobody's business
            headers = {"taskuuid": task_uuid}
            status, error = destination.channel.post(task.callback_url, task.reply, headers, self._timeout_s)
            if status is not None and 200 <= status < 300:
                self._fault("callback:taken")
                self._settle(task, "delivered", None, attempts)
                log.info("callback delivered", url=url, attempts=attempts)
                return True, 0.0, True
            if status == 404:
                self._settle(task, "gone", error, attempts)
                log.warning("callback refused for good", url=url, attempts=attempts, error=error)
                return True, 0.0, True
            if self._age_s(task) >= self._give_up_s:
                self._settle(task, "given_up", error, attempts)
                log.error("callback given up", url=url, attempts=attempts, error=error)
                return True, 0.0, status is not None
            self._journal.record_attempt(task_uuid, attempts, error)
            self._meters.callback_failed()
            log.warning("callback not taken", url=url, attempts=attempts, error=error)
            return False, self._pause_s(attempts), status is not None

    def _settle(self, task: Task, state: State, error: str | None, attempts: int | None) -> None:
        self._journal.settle(task.task_uuid, state, error, attempts=attempts)
        self._meters.settled(task.command, state, self._age_s(task))

    def _age_s(self, task: Task) -> float:
        return self._journal.own_time() - task.own_at


def _destination_of(owed: Owed) -> str:
    """Return where a callback goes, and for whom.

    Where callbacks may go depends on who asked: a connection that is kept serves one client's tasks alone.
    """
    parts = urlsplit(owed.callback_url)
    return f"{parts.scheme}://{parts.netloc} of {owed.client}"
