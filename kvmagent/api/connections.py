"""Idle connections: what each waits for, and since when. Stands in for cheroot's ConnectionManager.

    accept -> worker -> put: its client says more, or takes more of its answer -> worker
                             nothing for `idle_s`: closed

cheroot's own waits for what clients say and never for what they take, and measures by the clock that may be set.
Source: cheroot 11 connections.ConnectionManager, and what server.HTTPServer calls of it.
"""

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvmagent.logs import Log

log = Log(__name__)

# Before the next accept, where the host lets no more be opened: those who wait would be tried for without a pause.
_PAUSE_S = 0.2


class Connection(Protocol):
    """What waits here."""

    #: Since when, by the monotonic clock.
    last_used: float

    @property
    def socket(self) -> socket.socket:
        """What it waits at."""

    @property
    def has_more(self) -> bool:
        """Whether it waits for nothing: its next request is there."""

    @property
    def is_writing(self) -> bool:
        """Whether it waits for its client to take more."""

    def close(self) -> None:
        """Close it."""


class Connections:
    """`put` may be called by any thread; `run` and `close` by one.

    `connect` makes a connection of a socket and the address of its other end; `go_on` takes one to a worker.
    """

    def __init__(
        self,
        listening: socket.socket,
        connect: Callable[[socket.socket, object], Connection],
        go_on: Callable[[Connection], None],
        *,
        idle_s: float,
    ) -> None:
        self._listening = listening
        self._connect = connect
        self._go_on = go_on
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._wake = os.eventfd(0)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._ended.set()

    def put(self, connection: Connection) -> None:
        """Have a connection wait."""
        connection.last_used = time.monotonic()
        if connection.has_more:
            self._go_on(connection)
            return
        event = selectors.EVENT_WRITE if connection.is_writing else selectors.EVENT_READ
        with self._lock:
            self._selector.register(connection.socket, event, connection)

    def run(self, look_s: float) -> None:
        """Accept and wait until `stop`; every `look_s` for those that waited too long."""
        self._ended.clear()
        look_at = 0.0
        try:
            while not self._stopping.is_set():
                for key, _ in self._selector.select(look_s):
                    if key.fileobj is self._listening:
                        self._accept()
                    elif key.data is not None:
                        self._forget(key.data)
                        self._go_on(key.data)
                if (now := time.monotonic()) >= look_at:
                    look_at = now + look_s
                    for connection in self._waiting():
                        if connection.last_used < now - self._idle_s:
                            self._forget(connection)
                            connection.close()
        finally:
            self._ended.set()

    def stop(self) -> None:
        """End `run`, and wait for its end."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._ended.wait()

    def close(self) -> None:
        """Close what waits."""
        for connection in self._waiting():
            connection.close()
        self._selector.close()
        os.close(self._wake)

    def _accept(self) -> None:
        try:
            accepted, address = self._listening.accept()
        except TimeoutError:
            return  # who was there has gone
        except OSError as error:
            if not self._stopping.wait(_PAUSE_S):
                log.warning("no connection accepted", error=str(error))
            return
        self._go_on(self._connect(accepted, address))

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._selector.unregister(connection.socket)

    def _waiting(self) -> list[Connection]:
        with self._lock:
            return [key.data for key in self._selector.get_map().values() if key.data is not None]
