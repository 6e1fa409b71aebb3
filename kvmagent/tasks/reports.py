"""Tells the management server what it did not ask for: the events of VMs, in order.

    tell_...(news)  ->  the plugins' reports  ->  one thread  ->  POST sendCommandUrl, header commandpath

A report is worth little once it is old: the server asks for all states every minute. So it is tried a few times and
then dropped with a line in the log, and a server that is away holds up nothing but reports.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from kvmagent.logs import Log
from kvmagent.model.command import Plugin
from kvmagent.model.host import ManagementServer, Progress, Report, VmEvent
from kvmagent.tasks.callbacks import Callbacks, Channel

log = Log(__name__)

_TRIES, _PAUSE_S = 3, 1.0
# More that wait are dropped, the oldest first.
_MOST = 10_000

News = TypeVar("News")


class Reports:
    """Thread-safe. `get_server` returns who is to be told, None while nobody has connected."""

    def __init__(
        self,
        plugins: Iterable[Plugin],
        get_server: Callable[[], ManagementServer | None],
        callbacks: Callbacks,
        *,
        timeout_s: float,
    ) -> None:
        self._plugins = tuple(plugins)
        self._get_server = get_server
        self._callbacks = callbacks
        self._channel: tuple[ManagementServer, Channel] | None = None
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._waiting: deque[Report] = deque(maxlen=_MOST)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def start(self) -> None:
        """Start the thread that sends."""
        self._thread.start()

    def stop(self) -> None:
        """End after what is being sent."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def tell_event(self, event: VmEvent) -> None:
        """Tell what happened to a VM. Only hands over: libvirt's event loop calls this."""
        log.info("vm event", vm=event.name, kind=event.kind, detail=event.detail or None)
        self._put(event, [plugin.report_event for plugin in self._plugins])

    def tell_gap(self, reason: str) -> None:
        """Tell that events may have been missed."""
        self._put(reason, [plugin.report_gap for plugin in self._plugins])

    def tell_progress(self, progress: Progress) -> None:
        """Tell how far a task has come."""
        self._put(progress, [plugin.report_progress for plugin in self._plugins])

    def _put(self, news: News, makers: Iterable[Callable[[News, ManagementServer], tuple[Report, ...]] | None]) -> None:
        server = self._get_server()
        if server is None:
            return
        reports = [report for make in makers if make is not None for report in make(news, server)]
        with self._changed:
            self._waiting.extend(reports)
            self._changed.notify_all()

    def _run(self) -> None:
        while (report := self._take()) is not None:
            self._send(report)
        if self._channel is not None:
            self._channel[1].close()

    def _take(self) -> Report | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping.is_set())
            return None if self._stopping.is_set() else self._waiting.popleft()

    def _send(self, report: Report) -> None:
        error = "nobody has connected"
        for attempt in range(_TRIES):
            server = self._get_server()
            if server is None or (attempt and self._stopping.wait(_PAUSE_S)):
                break
            headers = {"commandpath": report.command_path}
            body = msgspec.json.encode(report.body)
            status, error = self._open(server).post(server.send_command_url, body, headers, self._timeout_s)
            if status == 404 and report.optional:
                log.info("report not known to this server", path=report.command_path, vm=report.body.get("vmUuid"))
                return
            if status is not None and 200 <= status < 300:
                log.info("reported", path=report.command_path, vm=report.body.get("vmUuid"))
                return
        log.warning("report dropped", path=report.command_path, body=report.body, error=error)

    def _open(self, server: ManagementServer) -> Channel:
        """Return the channel to a server, the one that is open where it is the same."""
        if self._channel is None or self._channel[0] != server:
            if self._channel is not None:
                self._channel[1].close()
            self._channel = server, self._callbacks.open(server.send_command_url, server.client)
        return self._channel[1]
