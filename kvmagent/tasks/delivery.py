"""Delivers each outcome to its callback URL until it is accepted, refused for good, or given up.

    put(owed)  ->  its destination (scheme, host, port)  ->  when it is due: one of a few threads, one callback
                     2xx: delivered    404: gone    other answers: this VM's callbacks again, later
                     no answer: the whole destination again, later

A destination has one callback under way at a time, on a connection that is kept; callbacks of one VM go out in
order. Threads are shared by client and by host (kvmagent.shares): whatever the receivers of one do, the others keep
theirs. A destination that does not answer is tried less and less often, and has a smaller part. Only ids are kept in
memory; the body is read from the journal when it is sent.
"""

import heapq
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmagent.backoff import Backoff
from kvmagent.logs import Log, error_fields, log_context
from kvmagent.model.command import NO_CALLBACK
from kvmagent.model.errors import AgentError, Code
from kvmagent.recorder import Recorder
from kvmagent.shares import Shares
from kvmagent.tasks.callbackclient import CallbackClient, Channel, find_receiver
from kvmagent.tasks.faults import Fault, no_fault
from kvmagent.tasks.journal import Journal, State, Task, Undelivered

log = Log(__name__)

# A server that keeps a callback in 10 ms on disk is busy for a second with one from each of a hundred hosts: so much is
# the window wider, in which an agent comes back, for each callback that it owes.
BACKOFF = Backoff(0.5, 180.0, each_s=1.0)
# Agents that start together, with their region, spread what they owe from before over so long at most.
_MOST_AT_START_S = 60.0
# Callbacks under way at once. Of the threads that are free, a client, a host, and all destinations that do not answer
# have at most so large a part each while a destination does not answer.
_THREADS, _PART_OF_SILENT = 32, 0.5
_SILENT = "destinations that do not answer"
# A thread or connection that has had nothing to do for so long is ended.
_IDLE_S = 10.0

# Whose threads a callback takes: its client's and its host's, and of who does not answer, all of those.
_Payers = tuple[str, ...]


@dataclass(eq=False)
class _Destination:
    """A callback server and what is undelivered there: by VM the ids, oldest first, since when in the agent's own time.

    A lane's first callback is under way (`busy`), may go now (`ready`), or waits until a moment of `waits`. There the
    key None is the whole destination's: none of its callbacks goes before. Guarded by Delivery's lock, but for
    `channel`, which belongs to the thread that has the callback under way.
    """

    url: str
    channel: Channel
    client: str
    host: str
    lanes: dict[str, dict[str, float]] = field(default_factory=dict)
    ready: dict[str, None] = field(default_factory=dict)
    waits: dict[str | None, float] = field(default_factory=dict)
    failures: int = 0
    busy: str | None = None
    used_at: float = 0.0
    ready_at: float = 0.0

    def next_at(self) -> float | None:
        """Return when something may go to it; None when nothing waits."""
        lanes = [0.0] if self.ready else [at for lane, at in self.waits.items() if lane is not None]
        return max(self.waits.get(None, 0.0), min(lanes)) if lanes else None


class Backlog(NamedTuple):
    """What is owed to one destination: how many callbacks, the oldest for how long, how often in a row it did not
    answer, which VM's callback is under way, in how many seconds another is due."""

    destination: str
    owed: int
    oldest_s: float
    failures: int
    under_way: str | None
    next_in_s: float | None


class Delivery:
    """Thread-safe. A callback's age is measured in the agent's own time: no step of the clock gives one up."""

    def __init__(
        self,
        journal: Journal,
        callbacks: CallbackClient,
        *,
        timeout_s: float,
        give_up_s: float,
        max_owed: int = 20_000,
        max_owed_per_client: int = 10_000,
        backoff: Backoff = BACKOFF,
        fault: Fault = no_fault,
        recorder: Recorder | None = None,
    ) -> None:
        self._journal = journal
        self._callbacks = callbacks
        self._timeout_s = timeout_s
        self._give_up_s = give_up_s
        self._max_owed = max_owed
        self._max_owed_per_client = max_owed_per_client
        self._backoff = backoff
        self._fault = fault
        self._recorder = recorder or Recorder()
        self._changed = threading.Condition()
        self._destinations: dict[str, _Destination] = {}
        # What waits for a moment: a lane, or with None a whole destination. An entry that is not in its destination's
        # `waits` any more is passed over.
        self._later: list[tuple[float, int, _Destination, str | None]] = []
        # Destinations that a callback may go to now, in order of coming, by who is to pay with a thread.
        self._ready: dict[_Payers, dict[str, _Destination]] = {}
        self._shares = Shares(_THREADS)
        self._order = itertools.count()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._owed: Counter[str] = Counter()
        # When an exchange began or ended last.
        self._moved_at = 0.0
        # By when each exchange that is under way is to be over.
        self._ends: dict[_Destination, float] = {}
        self._stop_at: float | None = None

    def set_limits(self, *, timeout_s: float, give_up_s: float, max_owed: int, max_owed_per_client: int) -> None:
        """Use other limits from now on; undelivered callbacks stay."""
        with self._changed:
            self._timeout_s, self._give_up_s = timeout_s, give_up_s
            self._max_owed, self._max_owed_per_client = max_owed, max_owed_per_client

    def put(self, owed: Undelivered, *, pause_s: float = 0.0) -> None:
        """Send a task's reply to its callback URL, soon; one that is already undelivered is tried again now.

        A destination that was not known waits for `pause_s` first.
        Where no callback was wanted there is nothing to send: it counts as delivered, after no attempt.
        """
        if owed.callback_url == NO_CALLBACK:
            self._journal.record_delivery(owed.task_uuid, "delivered", None)
            return
        key = _destination_of(owed)
        with self._changed:
            if self._stop_at is not None:
                return
            destination = self._destinations.get(key)
            if destination is None:
                channel = self._callbacks.open(owed.callback_url, owed.client)
                _, host, _ = find_receiver(owed.callback_url)
                destination = self._destinations[key] = _Destination(key, channel, owed.client, host)
                if pause_s:
                    self._wait_until(time.monotonic() + pause_s, destination, None)
                    if not self._threads:  # somebody has to wait for it
                        self._add_thread()
            lane = destination.lanes.setdefault(owed.lane, {})
            known = owed.task_uuid in lane
            if not known:
                lane[owed.task_uuid] = owed.own_at
                self._owed[owed.client] += 1
            if known:  # its caller asked for it: whatever the pause
                destination.waits.pop(None, None)
            if known or len(lane) == 1:
                self._make_ready(destination, owed.lane)
                self._wake_thread()

    def put_missing(self, owed: Iterable[Undelivered]) -> None:
        """Send undelivered replies that were never put here; what waits already keeps its turn.

        A destination of which nothing was known has its first one after a pause: the agent may have started together
        with all others.
        """
        missing: dict[str, list[Undelivered]] = {}
        with self._changed:
            for one in owed:
                destination = self._destinations.get(key := _destination_of(one))
                if destination is None or one.task_uuid not in destination.lanes.get(one.lane, {}):
                    missing.setdefault(key, []).append(one)
            unknown = missing.keys() - self._destinations.keys()
        for key, those in missing.items():
            pause_s = self._backoff.first_pause_s(len(those), most_s=_MOST_AT_START_S) if key in unknown else 0.0
            for one in those:
                self.put(one, pause_s=pause_s)

    def owed(self) -> int:
        """Return how many callbacks wait to be taken."""
        with self._changed:
            return self._owed.total()

    def check_room(self, client: str) -> None:
        """Refuse a task of a client whose callbacks nobody takes, or where nobody takes any.

        Raises:
            AgentError: QUEUE_FULL.
        """
        with self._changed:
            of_client, in_all = self._owed[client], self._owed.total()
        if of_client >= self._max_owed_per_client or in_all >= self._max_owed:
            found = f"{of_client} callbacks to {client} and {in_all} in all are not delivered yet"
            limits = f"the limits are {self._max_owed_per_client} and {self._max_owed}"
            raise AgentError(Code.QUEUE_FULL, f"{found}; {limits}")

    def backlog(self) -> list[Backlog]:
        """Return the backlog of each destination with undelivered callbacks."""
        with self._changed:
            now, own = time.monotonic(), self._journal.own_time()
            return [
                Backlog(
                    destination=destination.url,
                    owed=sum(map(len, destination.lanes.values())),
                    oldest_s=own - min(next(iter(lane.values())) for lane in destination.lanes.values()),
                    failures=destination.failures,
                    under_way=destination.busy,
                    next_in_s=None if (at := destination.next_at()) is None else max(0.0, at - now),
                )
                for destination in self._destinations.values()
                if destination.lanes
            ]

    def stalled_s(self) -> float:
        """Return for how long a callback has been due although a thread for it is free, or could be made; or an
        exchange has been over its time."""
        with self._changed:
            now = time.monotonic()
            since = [*self._ends.values()]
            due = self._find_ready(now)
            if due is not None and (self._idle or len(self._threads) < _THREADS):
                since.append(max(due.ready_at, self._moved_at))
            return max([0.0, *(now - moment for moment in since)])

    def relieve(self) -> None:
        """Give due callbacks a thread where none could be had before. To be called every second or so."""
        with self._changed:
            self._wake_thread()

    def stop(self, timeout_s: float) -> None:
        """Send what is due, as long as there is time; what is undelivered then stays in the journal."""
        with self._changed:
            self._stop_at = time.monotonic() + timeout_s
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._threads, timeout=timeout_s + self._timeout_s)
            for destination in self._destinations.values():
                if destination.busy is None:
                    destination.channel.close()

    # -- what may go now, and what waits; under the lock

    def _make_ready(self, destination: _Destination, lane: str) -> None:
        """A lane's first callback may go as far as it goes by the lane."""
        destination.waits.pop(lane, None)
        if destination.busy != lane:
            destination.ready[lane] = None
        self._offer(destination)

    def _offer(self, destination: _Destination) -> None:
        """A destination that can take a callback now may have one of the threads."""
        if destination.ready and destination.busy is None and None not in destination.waits:
            queue = self._ready.setdefault(_payers(destination), {})
            if destination.url not in queue:
                destination.ready_at = time.monotonic()
                queue[destination.url] = destination

    def _wait_until(self, at: float, destination: _Destination, lane: str | None) -> None:
        destination.waits[lane] = at
        heapq.heappush(self._later, (at, next(self._order), destination, lane))

    def _find_ready(self, now: float) -> _Destination | None:
        """Return the destination to send to now, first that of whoever was served longest ago; it stays ready."""
        while self._later and self._later[0][0] <= now:
            at, _, destination, lane = heapq.heappop(self._later)
            if destination.waits.get(lane) != at:
                continue
            if lane is None:
                del destination.waits[None]
                self._offer(destination)
            else:
                self._make_ready(destination, lane)
        for payers, queue in self._ready.items():
            is_silent = _SILENT in payers
            if is_silent and self._stop_at is not None:
                continue
            if self._shares.has_room(*payers, part=_PART_OF_SILENT if is_silent else 1.0):
                return next(iter(queue.values()))
        return None

    def _wake_thread(self) -> None:
        """Have a thread for what may go now."""
        if self._find_ready(time.monotonic()) is None:
            return
        if self._idle:
            self._changed.notify()
        else:
            self._add_thread()

    def _add_thread(self) -> None:
        if len(self._threads) >= _THREADS or self._stop_at is not None:
            return
        thread = threading.Thread(target=self._run, name=f"delivery-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread to give; `relieve` tries again
            log.error("no thread for delivery", error=str(error), owed=self._owed.total())
            return
        self._threads.add(thread)

    # -- the threads

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            destination, lane, task_uuid = taken
            settled, pause_s, answered = False, self._backoff.longest_s, True
            try:
                settled, pause_s, answered = self._send(destination, task_uuid)
            except AgentError as error:
                log.warning("callback waits for the journal", task=task_uuid, vm=lane, **error_fields(error))
            except Exception as error:
                log.failure("delivery failed with an unexpected error", error, task=task_uuid, vm=lane)
            self._put_back(destination, lane, task_uuid, settled, pause_s, answered)

    def _take(self) -> tuple[_Destination, str, str] | None:
        """Wait for a callback that is due and return it; None when the thread is to end."""
        with self._changed:
            idle_until = time.monotonic() + _IDLE_S
            while True:
                now = time.monotonic()
                destination = self._find_ready(now)
                if self._stop_at is not None and (destination is None or now >= self._stop_at):
                    break
                if destination is not None:
                    return self._begin(destination, now)
                next_at = self._later[0][0] if self._later else None
                if now >= idle_until and (next_at is None or self._idle):
                    break
                # The last thread stays as long as anything waits.
                wake_at = [at for at in (next_at, idle_until) if at is not None and at > now]
                self._idle += 1
                self._changed.wait(min(wake_at) - now)
                self._idle -= 1
            self._threads.discard(threading.current_thread())
            self._close_idle(now)
            self._changed.notify_all()
            return None

    def _begin(self, destination: _Destination, now: float) -> tuple[_Destination, str, str]:
        payers = _payers(destination)
        queue = self._ready.pop(payers)
        del queue[destination.url]
        if queue:
            self._ready[payers] = queue  # behind all others
        self._shares.take(*payers)
        lane = next(iter(destination.ready))
        del destination.ready[lane]
        destination.busy, self._moved_at = lane, now
        self._ends[destination] = now + self._timeout_s
        self._wake_thread()
        return destination, lane, next(iter(destination.lanes[lane]))

    def _put_back(
        self, destination: _Destination, lane: str, task_uuid: str, settled: bool, pause_s: float, answered: bool
    ) -> None:
        given_up: list[str] = []
        with self._changed:
            now = time.monotonic()
            self._shares.leave(*_payers(destination))
            del self._ends[destination]
            destination.busy, destination.used_at, self._moved_at = None, now, now
            destination.failures = 0 if answered else destination.failures + 1
            if settled:
                self._forget(destination, lane, task_uuid)
            if not answered:
                owed = sum(map(len, destination.lanes.values()))
                self._wait_until(now + self._backoff.pause_s(destination.failures, owed=owed), destination, None)
                if self._stop_at is None:
                    given_up = self._forget_old(destination)
            if lane in destination.lanes:
                if settled or not answered:
                    self._make_ready(destination, lane)
                else:
                    self._wait_until(now + pause_s, destination, lane)
            self._offer(destination)
        for old in given_up:
            self._give_up(destination, old)

    def _forget(self, destination: _Destination, lane: str, task_uuid: str) -> None:
        owed = destination.lanes[lane]
        del owed[task_uuid]
        self._owed[destination.client] -= 1
        if not self._owed[destination.client]:
            del self._owed[destination.client]
        if not owed:
            del destination.lanes[lane]
            destination.ready.pop(lane, None)
            destination.waits.pop(lane, None)

    def _forget_old(self, destination: _Destination) -> list[str]:
        """Give up what has been undelivered here for too long, and return it: it has just been tried once more."""
        oldest, old = self._journal.own_time() - self._give_up_s, []
        for lane, owed in list(destination.lanes.items()):
            for task_uuid in [task_uuid for task_uuid, own_at in owed.items() if own_at <= oldest]:
                self._forget(destination, lane, task_uuid)
                old.append(task_uuid)
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
        except AgentError as failure:  # the next start finds it undelivered, tries it, and gives it up
            log.warning("callback waits for the journal", task=task_uuid, **error_fields(failure))

    def _close_idle(self, now: float) -> None:
        for key, destination in list(self._destinations.items()):
            if not destination.lanes and destination.busy is None and now - destination.used_at >= _IDLE_S:
                destination.channel.close()
                del self._destinations[key]

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
            headers = {"taskuuid": task_uuid} | ({"traceparent": task.traceparent} if task.traceparent else {})
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
            self._recorder.callback_failed()
            log.warning("callback not accepted", url=url, attempts=attempts, error=error)
            return False, self._backoff.pause_s(attempts), status is not None

    def _settle(self, task: Task, state: State, error: str | None, attempts: int | None) -> None:
        self._journal.record_delivery(task.task_uuid, state, error, attempts=attempts)
        self._recorder.settled(task.command, state, self._age_s(task))

    def _age_s(self, task: Task) -> float:
        return self._journal.own_time() - task.own_at


def _destination_of(owed: Undelivered) -> str:
    """Return where a callback goes, and for whom; nothing where none was wanted.

    Where callbacks may go depends on the caller: a connection that is kept serves one client's tasks alone.
    """
    if owed.callback_url == NO_CALLBACK:
        return ""
    scheme, host, port = find_receiver(owed.callback_url)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port} of {owed.client}"


def _payers(destination: _Destination) -> _Payers:
    payers = (f"client {destination.client}", f"host {destination.host}")
    return (*payers, _SILENT) if destination.failures else payers
