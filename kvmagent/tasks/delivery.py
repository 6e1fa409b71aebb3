"""Delivery: each outcome to its callback URL, until it is taken, refused for good, or given up.

    put(task)  ->  its destination (scheme, host, port)  ->  a thread of the destination's own
                     2xx: delivered    404: gone    else: again, later

A destination has a thread only while something is owed to it, so that a dead or slow server holds up no other.
Callbacks of one VM go out in order. Only ids are kept in memory; the body is read from the journal when it is sent.
"""

import heapq
import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import urlsplit

import urllib3

from kvmagent.logs import log_context
from kvmagent.tasks.journal import Journal, Task

log = logging.getLogger(__name__)

_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.5, 180.0
# A destination's thread waits so long for more before it closes its connection and ends.
_IDLE_S = 30.0


class Delivery:
    """Thread-safe."""

    def __init__(
        self, journal: Journal, *, timeout_s: float, give_up_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._journal = journal
        self._timeout_s = timeout_s
        self._give_up_s = give_up_s
        self._clock = clock
        self._lock = threading.Lock()
        self._destinations: dict[str, _Destination] = {}
        self._stopping = False

    def put(self, task: Task) -> None:
        """Send the reply of a finished task to its callback URL, soon."""
        parts = urlsplit(task.callback_url)
        key = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            if self._stopping:
                return
            destination = self._destinations.get(key)
            if destination is None or not destination.put(task.lane, task.task_uuid):
                destination = self._destinations[key] = _Destination(key, self._send)
                destination.put(task.lane, task.task_uuid)

    def owed(self) -> int:
        """Return how many callbacks wait to be taken."""
        with self._lock:
            return sum(destination.depth() for destination in self._destinations.values())

    def stop(self, timeout_s: float) -> None:
        """Send what is due now, as far as the time goes; what is still owed then stays in the journal."""
        with self._lock:
            self._stopping = True
            destinations = list(self._destinations.values())
        deadline = time.monotonic() + timeout_s
        for destination in destinations:
            destination.finish()
        for destination in destinations:
            destination.join(max(0.0, deadline - time.monotonic()))
        for destination in destinations:
            destination.abandon()
            destination.join(self._timeout_s)

    def _send(self, pool: urllib3.PoolManager, task_uuid: str) -> float | None:
        """Send one callback; return when to try again, in seconds from now, or None when it is settled."""
        task = self._journal.find(task_uuid)
        if task is None or task.state != "finished":
            return None
        attempts = task.attempts + 1
        with log_context(task=task.task_uuid, vm=task.lane, command=task.command):
            status, error = self._post(pool, task)
            if status is not None and 200 <= status < 300:
                self._journal.settle(task.task_uuid, "delivered", attempts, None)
                log.info("callback delivered url=%s attempts=%d", task.callback_url, attempts)
                return None
            if status == 404:
                self._journal.settle(task.task_uuid, "gone", attempts, error)
                log.warning("callback refused for good url=%s error=%r", task.callback_url, error)
                return None
            if self._clock() - (task.finished_at or 0.0) >= self._give_up_s:
                self._journal.settle(task.task_uuid, "given_up", attempts, error)
                log.error("callback given up url=%s attempts=%d error=%r", task.callback_url, attempts, error)
                return None
            self._journal.record_attempt(task.task_uuid, attempts, error)
            pause_s = _retry_pause_s(attempts)
            log.warning(
                "callback not taken url=%s attempts=%d error=%r next_s=%.1f",
                task.callback_url,
                attempts,
                error,
                pause_s,
            )
            return pause_s

    def _post(self, pool: urllib3.PoolManager, task: Task) -> tuple[int | None, str]:
        headers = {"Content-Type": "application/json", "taskuuid": task.task_uuid}
        try:
            response = pool.request(
                "POST",
                task.callback_url,
                body=task.reply,
                headers=headers,
                timeout=self._timeout_s,
                retries=False,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return None, f"{type(error).__name__}: {error}"
        return response.status, f"HTTP {response.status}"


def _retry_pause_s(attempts: int) -> float:
    """Return how long to wait after so many attempts: doubling, with jitter, up to a few minutes."""
    doubled: float = _FIRST_RETRY_S * 2 ** min(attempts - 1, 16)
    return min(doubled, _LONGEST_RETRY_S) * random.uniform(0.75, 1.25)


class _Destination:
    """One callback server: the ids owed to it, by VM, and the thread that sends them."""

    def __init__(self, name: str, send: Callable[[urllib3.PoolManager, str], float | None]) -> None:
        self._send = send
        self._changed = threading.Condition()
        self._owed: dict[str, deque[str]] = {}
        self._due: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._ended = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=f"delivery {name}", daemon=True)
        self._thread.start()

    def put(self, lane: str, task_uuid: str) -> bool:
        """Queue an id behind its VM's others; return False when the thread has ended: a new one is needed."""
        with self._changed:
            if self._ended:
                return False
            owed = self._owed.setdefault(lane, deque())
            owed.append(task_uuid)
            if len(owed) == 1:
                heapq.heappush(self._due, (0.0, next(self._order), lane))
                self._changed.notify()
            return True

    def depth(self) -> int:
        with self._changed:
            return sum(map(len, self._owed.values()))

    def finish(self) -> None:
        """End the thread once nothing is due."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def abandon(self) -> None:
        """End the thread after what it is sending."""
        with self._changed:
            self._abandoned = True
            self._due.clear()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        with urllib3.PoolManager(num_pools=1, maxsize=1) as pool:
            while (lane := self._take()) is not None:
                try:
                    pause_s = self._send(pool, self._owed[lane][0])
                except Exception:
                    log.exception("delivery failed in a way that nothing expected vm=%s", lane)
                    pause_s = _LONGEST_RETRY_S
                self._put_back(lane, pause_s)

    def _take(self) -> str | None:
        """Wait for the next lane whose first callback is due; None when there is nothing more to do."""
        with self._changed:
            idle_until = time.monotonic() + _IDLE_S
            while True:
                now = time.monotonic()
                if self._due and self._due[0][0] <= now:
                    return heapq.heappop(self._due)[2]
                if self._ended:
                    return None
                if not self._due and now >= idle_until:
                    self._ended = True
                    return None
                until = self._due[0][0] if self._due else idle_until
                self._changed.wait(until - now)

    def _put_back(self, lane: str, pause_s: float | None) -> None:
        with self._changed:
            owed = self._owed[lane]
            if pause_s is None:
                owed.popleft()
            if owed and not self._abandoned:
                heapq.heappush(self._due, (time.monotonic() + (pause_s or 0.0), next(self._order), lane))
            if not owed:
                del self._owed[lane]
