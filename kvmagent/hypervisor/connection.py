"""Connections to libvirt, with their event loop: opened when needed, replaced when they are dead.

    lease()  ->  an idle connection, or a new one         one call at a time on each
    opener thread: open, keep-alive, close callback; while libvirt is away again and again, with backoff

libvirtd takes five calls at a time from one client and then reads no further: on a shared connection five hanging
VMs would hold up all. So each piece of work has a connection of its own while it lasts.

libvirt answers keep-alive only while its event loop runs, and without keep-alive a call on a hung daemon never
returns: so the loop's thread runs before the first open, and until the last close. An open itself has no way out of
a hung daemon: it is done by a thread that nobody waits for longer than `_OPEN_WAIT_S`.
Source: libvirt virConnectSetKeepAlive, virEventRegisterDefaultImpl; max_client_requests in libvirtd.conf.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import urlsplit

import libvirt

from kvmagent.backoff import Backoff
from kvmagent.hypervisor.libvirterrors import libvirt_errors, translate
from kvmagent.logs import Log, error_fields
from kvmagent.model.errors import AgentError, Code

log = Log(__name__)

# A daemon that answers nothing for KEEPALIVE_INTERVAL_S x (KEEPALIVE_COUNT + 1) is given up, its calls fail.
KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 3, 3
# How long work waits for a connection. An open takes milliseconds where the daemon is well.
_OPEN_WAIT_S = 5.0
# While libvirt is away it is tried at growing intervals, each with jitter: a host has other clients that do so too.
BACKOFF = Backoff(0.1, 5.0)
# libvirt wakes its event loop six times for a call, to set its watches. With a pause the loop sees to many at once, and
# wakes 14 times for a plug instead of 74, each time taking the CPU, and Python's lock, from who makes the call.
_LOOP_PAUSE_S = 0.002
# Connections kept open for the next piece of work: as many as tasks run side by side on a busy host. All but one of
# those that nobody needed for so long are closed: each wakes the agent every KEEPALIVE_INTERVAL_S.
# Observed: 16 of them, and a timer of 0.5 s instead of none, take 0.15 % of a CPU; one takes 0.02 %.
_MOST_IDLE, _UNUSED_S = 16, 10.0

_REASONS = {
    libvirt.VIR_CONNECT_CLOSE_REASON_ERROR: "error",
    libvirt.VIR_CONNECT_CLOSE_REASON_EOF: "the daemon is gone",
    libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE: "the daemon does not answer",
}


class Connection:
    """The agent's connections to one libvirt. Thread-safe."""

    def __init__(
        self,
        uri: str,
        *,
        open_libvirt: Callable[[str], libvirt.virConnect] = libvirt.open,
        unused_s: float = _UNUSED_S,
        open_wait_s: float = _OPEN_WAIT_S,
    ) -> None:
        self._uri = uri
        self._open_wait_s = open_wait_s
        self._unused_s = unused_s
        self._open_libvirt = open_libvirt
        self._changed = threading.Condition()
        # The last one is taken first. The least that there were since the opener looked: so many nobody needed.
        self._idle: list[libvirt.virConnect] = []
        self._least_idle = 0
        # A driver inside this process (test:) keeps its VMs in the connection: there is one, and all work shares it.
        self._shared: libvirt.virConnect | None = None
        self._wanted = 0
        self._lost = False
        self._failure: str | None = None
        self._opening_since: float | None = None
        self._stopping = False
        self._ended = threading.Event()
        self._opener = threading.Thread(target=self._run_opener, name="libvirt-opener", daemon=True)
        self._loop = threading.Thread(target=self._run_loop, name="libvirt-events", daemon=True)

    @property
    def is_privileged(self) -> bool:
        """Whether it leads to a libvirt that may do what its host's root may. Source: libvirt uri.rst, session."""
        return urlsplit(self._uri).path != "/session"

    def start(self) -> None:
        """Start the event loop and try to connect; a libvirt that is down is no reason not to start."""
        libvirt.registerErrorHandler(_log_error, None)
        libvirt.virEventRegisterDefaultImpl()
        # Wakes the loop, so that it sees the stop; it fires when `stop` says so.
        self._timer = libvirt.virEventAddTimeout(-1, lambda _timer, _opaque: None, None)
        self._loop.start()
        try:
            with self.lease():
                pass
        except AgentError as error:
            log.info("the agent starts without libvirt", uri=self._uri, **error_fields(error))

    def stop(self) -> None:
        """Close the connections and end the threads, but for one that a hung daemon holds in an open."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            connections = [*self._idle, *([self._shared] if self._shared is not None else [])]
            self._idle, self._shared = [], None
        for connection in connections:
            close_connection(connection)
        if self._opener.ident is not None:
            self._opener.join(self._open_wait_s)
        self._ended.set()
        if self._loop.ident is not None:
            libvirt.virEventUpdateTimeout(self._timer, 0)
            self._loop.join()
            libvirt.virEventRemoveTimeout(self._timer)

    @contextlib.contextmanager
    def lease(self) -> Iterator[libvirt.virConnect]:
        """Have a connection for a piece of work: nobody else's call can hold it up.

        What of libvirt's errors nobody has put into words leaves it as the agent's all the same.

        Raises:
            AgentError: LIBVIRT_UNAVAILABLE, at once where libvirt is known to be away; STOPPING.
        """
        connection = self._take()
        try:
            with libvirt_errors("asking libvirt"):
                yield connection
        finally:
            self._give_back(connection)

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until libvirt is not known to be away; return whether it is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lost and self._find_trouble() is None, timeout_s)

    def _take(self) -> libvirt.virConnect:
        dead: list[libvirt.virConnect] = []
        with self._changed:
            connection = self._find_alive(dead) or self._await_one(dead)
        for old in dead:
            close_connection(old)
        return connection

    def _await_one(self, dead: list[libvirt.virConnect]) -> libvirt.virConnect:
        """Have the opener open a connection, unless one is given back before."""
        deadline = time.monotonic() + self._open_wait_s
        self._wanted += 1
        self._changed.notify_all()
        if self._opener.ident is None:
            self._opener.start()
        try:
            while (connection := self._find_alive(dead)) is None:
                if self._stopping:
                    raise AgentError(Code.STOPPING, "the libvirt connection is closed")
                if trouble := self._find_trouble():
                    raise AgentError(Code.LIBVIRT_UNAVAILABLE, trouble)
                self._changed.wait(max(0.0, deadline - time.monotonic()))
        finally:
            self._wanted -= 1
        return connection

    def _find_alive(self, dead: list[libvirt.virConnect]) -> libvirt.virConnect | None:
        while self._shared is None and self._idle:
            connection = self._idle.pop()
            self._least_idle = min(self._least_idle, len(self._idle))
            if connection.isAlive():
                return connection
            dead.append(connection)
        return self._shared

    def _find_trouble(self) -> str | None:
        """Return why libvirt cannot be reached; None where that is not known."""
        if self._failure is not None:
            return self._failure
        if self._opening_since is not None and time.monotonic() - self._opening_since >= self._open_wait_s:
            return f"connecting to {self._uri}: no answer in {self._open_wait_s:g} s"
        return None

    def _give_back(self, connection: libvirt.virConnect) -> None:
        with self._changed:
            if connection is self._shared:
                return
            if not self._stopping and len(self._idle) < _MOST_IDLE and connection.isAlive():
                self._idle.append(connection)
                if self._wanted:
                    self._changed.notify_all()
                return
        close_connection(connection)

    # -- the opener's thread

    def _run_opener(self) -> None:
        failures = 0
        while self._await_need(failures):
            try:
                connection, is_shared = self._open()
            except libvirt.libvirtError as error:
                failures += 1
                self._note(translate(error, f"connecting to {self._uri}").message)
                continue
            failures = 0
            with self._changed:
                stopping = self._stopping
                if not stopping and is_shared:
                    self._shared = connection
                elif not stopping:
                    self._idle.append(connection)
            self._note(None)
            if stopping:
                close_connection(connection)

    def _await_need(self, failures: int) -> bool:
        """Wait until a connection is needed, or while libvirt is away for the next try; False at the end.

        Connections that nobody needs are closed meanwhile: here, as a hung daemon may hold up a close.
        """
        while True:
            unused: list[libvirt.virConnect] = []
            with self._changed:
                # What it was busy with has ended. Who needs a connection waits for nothing now.
                self._opening_since = None
                if self._failure is not None:
                    self._changed.wait_for(lambda: self._stopping, BACKOFF.pause_s(failures))
                elif not self._changed.wait_for(self._is_needed, self._unused_s):
                    unused = self._take_unused()
                is_needed = self._failure is not None or self._is_needed()
                # Who needs one waits for a close that hangs no longer than for an open.
                if unused or is_needed:
                    self._opening_since = time.monotonic()
                if is_needed and not unused:
                    return not self._stopping
            for connection in unused:
                close_connection(connection)

    def _is_needed(self) -> bool:
        return self._stopping or self._lost or (self._shared is None and self._wanted > len(self._idle))

    def _take_unused(self) -> list[libvirt.virConnect]:
        """Take out all but one of the connections that nobody needed since the last time."""
        count = max(0, self._least_idle - 1)
        unused, self._idle = self._idle[:count], self._idle[count:]
        self._least_idle = len(self._idle)
        return unused

    def _note(self, failure: str | None) -> None:
        """Note how an open ended."""
        with self._changed:
            if failure is not None and self._failure is None:
                log.warning("libvirt cannot be reached", uri=self._uri, error=failure)
            elif failure is None and (self._failure is not None or self._lost):
                log.info("libvirt is back", uri=self._uri)
            self._failure, self._lost, self._opening_since = failure, False, None
            self._changed.notify_all()

    def _open(self) -> tuple[libvirt.virConnect, bool]:
        """Open a connection; return it and whether its driver is inside this process."""
        connection = self._open_libvirt(self._uri)
        try:
            connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            connection.registerCloseCallback(self._on_close, None)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                close_connection(connection)
                raise
            return connection, True
        log.debug("libvirt connected", uri=self._uri)
        return connection, False

    def _on_close(self, _connection: libvirt.virConnect, reason: int, _opaque: object) -> None:
        """A connection died by itself: find out at once whether libvirt can be reached. Any thread may call this."""
        if reason == libvirt.VIR_CONNECT_CLOSE_REASON_CLIENT:
            return
        with self._changed:
            if not self._lost and self._failure is None:
                log.warning("libvirt connection lost", uri=self._uri, reason=_REASONS.get(reason, str(reason)))
            self._lost = True
            self._changed.notify_all()

    def _run_loop(self) -> None:
        while not self._ended.wait(_LOOP_PAUSE_S):
            libvirt.virEventRunDefaultImpl()


def close_connection(connection: libvirt.virConnect, event_ids: Iterable[int] = ()) -> None:
    """Close a connection; before that its callbacks, each of which would keep it open. On a dead one each may fail.

    Not under a lock: a live one says goodbye to the daemon.
    """
    for end in (
        *(functools.partial(connection.domainEventDeregisterAny, number) for number in event_ids),
        connection.unregisterCloseCallback,
        connection.close,
    ):
        try:
            end()
        except libvirt.libvirtError as error:
            log.debug("closing a libvirt connection", error=str(error))


def _log_error(_context: object, error: tuple[object, ...]) -> None:
    """libvirt's own words on every error: each is raised too, and told by who knows what it means.

    Source: libvirt-python libvirt_virErrorFuncHandler: code, domain, message, level, ...
    """
    log.debug("libvirt error", code=error[0], domain=error[1], error=error[2])
