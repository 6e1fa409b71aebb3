"""One lock for each VM that is worked on: two names of one VM are two lanes, and still one VM."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvmagent.meters import phase


class VmLocks:
    """Thread-safe. A VM is known by its UUID, and costs nothing while nobody works on it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, threading.Lock] = {}
        self._users: Counter[str] = Counter()

    @contextmanager
    def hold(self, uuid: str) -> Iterator[None]:
        with self._lock:
            lock = self._held.setdefault(uuid, threading.Lock())
            self._users[uuid] += 1
        try:
            with phase("queue"):
                lock.acquire()
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                self._users[uuid] -= 1
                if not self._users[uuid]:
                    del self._users[uuid], self._held[uuid]
