"""The connection for libvirt's events: opened at the start, and again whenever it is lost.

    thread: open -> keep-alive, close callback -> register -> wait for the loss -> again, with backoff

It has no other work, so that no call holds up an event. Events are lost while it is away: `on_gap` says so after it is
there again, and whoever waits for an event also looks for itself now and then.
"""

import threading
from collections.abc import Callable

import libvirt

from kvmagent.hypervisor.connection import BACKOFF, KEEPALIVE_COUNT, KEEPALIVE_INTERVAL_S, close_connection
from kvmagent.hypervisor.libvirterrors import translate
from kvmagent.logs import Log

log = Log(__name__)

_STOP_WAIT_S = 5.0

# Has a new connection report its events; returns the ids that libvirt gave to the callbacks. The callbacks run on
# libvirt's event loop: they hand over and never call libvirt.
Register = Callable[[libvirt.virConnect], list[int]]


class EventConnection:
    """Owns one connection and the thread that looks after it. Needs the event loop of `Connection`."""

    def __init__(
        self,
        uri: str,
        registers: tuple[Register, ...],
        *,
        on_open: Callable[[], None] = lambda: None,
        on_gap: Callable[[str], None] = lambda _reason: None,
        open_libvirt: Callable[[str], libvirt.virConnect] = libvirt.open,
    ) -> None:
        self._uri = uri
        self._registers = registers
        self._on_open = on_open
        self._on_gap = on_gap
        self._open_libvirt = open_libvirt
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="libvirt-watch", daemon=True)

    def start(self) -> None:
        """Begin to listen; returns at once, whether libvirt is there or not."""
        self._thread.start()

    def stop(self) -> None:
        """Close the connection and end the thread, but for one that a hung daemon holds in an open."""
        self._stopping.set()
        self._changed.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_WAIT_S)

    def _run(self) -> None:
        failures, was_there = 0, False
        while not self._stopping.is_set():
            self._changed.clear()
            try:
                connection = self._open_libvirt(self._uri)
            except libvirt.libvirtError as error:
                log.debug("no events yet", error=translate(error, f"connecting to {self._uri}").message)
                failures += 1
                self._stopping.wait(BACKOFF.pause_s(failures))
                continue
            try:
                ids = self._listen(connection)
            except libvirt.libvirtError as error:
                close_connection(connection)
                if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
                    log.info("no events from this driver", uri=self._uri)
                    return
                log.warning("no events yet", error=translate(error, "registering for events").message)
                failures += 1
                self._stopping.wait(BACKOFF.pause_s(failures))
                continue
            failures = 0
            self._on_open()
            if was_there:
                self._on_gap("libvirt was away")
            was_there = True
            self._wait_lost(connection)
            close_connection(connection, ids)

    def _listen(self, connection: libvirt.virConnect) -> list[int]:
        """A driver inside this process (test:) has no wire to keep alive, and nobody else who could change its VMs."""
        connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        connection.registerCloseCallback(lambda _connection, _reason, _opaque: self._changed.set(), None)
        return [number for register in self._registers for number in register(connection)]

    def _wait_lost(self, connection: libvirt.virConnect) -> None:
        while not self._stopping.is_set() and connection.isAlive():
            self._changed.wait(BACKOFF.longest_s)
            self._changed.clear()
