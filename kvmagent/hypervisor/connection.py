"""One connection to libvirt, with its event loop: opened when needed, replaced when it is dead.

libvirt answers keep-alive only while its event loop runs, and without keep-alive a call on a hung daemon never
returns: so the loop's thread runs before the first open, and until the last close.
Source: libvirt virConnectSetKeepAlive, virEventRegisterDefaultImpl.
"""

import logging
import threading
import time
from collections.abc import Callable

import libvirt

from kvmagent.hypervisor.libvirterrors import translate
from kvmagent.model.errors import AgentError, Code

log = logging.getLogger(__name__)

# A daemon that answers nothing for KEEPALIVE_INTERVAL_S x (KEEPALIVE_COUNT + 1) is given up, its calls fail.
KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 3, 3
# After a failed open, calls fail at once for so long before the next try.
_RETRY_AFTER_S = 0.5


class Connection:
    """The agent's libvirt connection. Thread-safe.

    `register` has each new connection report its events, and returns the callback ids: without their removal a
    closed connection would live on.
    """

    def __init__(
        self,
        uri: str,
        *,
        open_libvirt: Callable[[str], libvirt.virConnect] = libvirt.open,
        register: Callable[[libvirt.virConnect], list[int]] = lambda _connection: [],
    ) -> None:
        self._uri = uri
        self._open_libvirt = open_libvirt
        self._register = register
        self._callback_ids: list[int] = []
        self._lock = threading.Lock()
        self._connection: libvirt.virConnect | None = None
        self._failure: AgentError | None = None
        self._failed_at = 0.0
        self._stopping = threading.Event()
        self._loop: threading.Thread | None = None

    def start(self) -> None:
        """Start the event loop and try to connect; a libvirt that is down is no reason not to start."""
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        # Wakes the loop, so that it sees the stop.
        self._timer = libvirt.virEventAddTimeout(500, lambda _timer, _opaque: None, None)
        self._loop = threading.Thread(target=self._run_loop, name="libvirt-events", daemon=True)
        self._loop.start()
        try:
            self.get()
        except AgentError as error:
            log.warning("libvirt is not reachable yet uri=%s error=%r", self._uri, error.message)

    def stop(self) -> None:
        """Close the connection and end the event loop."""
        with self._lock:
            if self._connection is not None:
                self._close(self._connection)
                self._connection = None
        self._stopping.set()
        if self._loop is not None:
            self._loop.join()
            libvirt.virEventRemoveTimeout(self._timer)

    def get(self) -> libvirt.virConnect:
        """Return a connection that was alive a moment ago, a new one if need be.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE, when libvirt cannot be reached.
        """
        with self._lock:
            if self._connection is not None and self._connection.isAlive():
                return self._connection
            if self._stopping.is_set():
                raise AgentError(Code.STOPPING, "the libvirt connection is closed")
            if self._failure is not None and time.monotonic() - self._failed_at < _RETRY_AFTER_S:
                raise self._failure
            if self._connection is not None:
                log.warning("libvirt connection is dead, opening a new one uri=%s", self._uri)
                self._close(self._connection)
                self._connection = None
            self._connection = self._open()
            return self._connection

    def _open(self) -> libvirt.virConnect:
        try:
            connection = self._open_libvirt(self._uri)
        except libvirt.libvirtError as error:
            self._failed_at = time.monotonic()
            reason = translate(error, f"connecting to {self._uri}").message
            self._failure = AgentError(Code.LIBVIRT_UNAVAILABLE, reason)
            raise self._failure from error
        try:
            connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        except libvirt.libvirtError as error:
            # A driver inside this process (test:) has no wire to keep alive.
            log.debug("no keep-alive on this driver uri=%s error=%s", self._uri, error)
        try:
            self._callback_ids = self._register(connection)
        except libvirt.libvirtError as error:
            self._callback_ids = []
            log.warning("no device events from this driver uri=%s error=%s", self._uri, error)
        self._failure = None
        log.info("libvirt connected uri=%s", self._uri)
        return connection

    def _close(self, connection: libvirt.virConnect) -> None:
        try:
            for callback_id in self._callback_ids:
                connection.domainEventDeregisterAny(callback_id)
            connection.close()
        except libvirt.libvirtError as error:
            log.debug("closing a dead libvirt connection error=%s", error)

    def _run_loop(self) -> None:
        while not self._stopping.is_set():
            libvirt.virEventRunDefaultImpl()
