"""Reports events of VMs to the management server without a request, in order for each VM.

    tell_...(news)  ->  the plugins' reports  ->  a few threads  ->  POST sendCommandUrl, header commandpath

An old report is worth little: the server asks for all states every minute. So a report is tried a few times and then
dropped with a line in the log. (A step's `StepReport` is something else: it goes into the task's reply.) If the server
accepts one slowly, only reports about the same VM wait. An exchange has a deadline, and never delays a stop.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from kvmagent.backoff import Backoff
from kvmagent.logs import Log
from kvmagent.model.command import Plugin
from kvmagent.model.host import ManagementServer, Progress, Report, VmEvent
from kvmagent.tasks.callbackclient import CallbackClient, Channel
from kvmagent.tasks.plugincalls import call

log = Log(__name__)

_TRIES, _BACKOFF = 3, Backoff(1.0, 4.0)
# More that wait are dropped, the oldest first.
_MOST = 10_000
_THREADS = 4
# A connection that has had nothing to do for so long is closed: its server may have been replaced.
_IDLE_S = 10.0

News = TypeVar("News")


class Notifications:
    """Thread-safe. `get_server` returns who gets the reports, None while no management server has connected."""

    def __init__(
        self,
        plugins: Iterable[Plugin],
        get_server: Callable[[], ManagementServer | None],
        callbacks: CallbackClient,
        *,
        timeout_s: float,
        idle_s: float = _IDLE_S,
    ) -> None:
        self._plugins = tuple(plugins)
        self._get_server = get_server
        self._callbacks = callbacks
        self.timeout_s = timeout_s
        self._idle_s = idle_s
        self._changed = threading.Condition()
        self._waiting: deque[Report] = deque(maxlen=_MOST)
        # The VMs that a report is under way about.
        self._busy: set[str] = set()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"reports-{number}", daemon=True) for number in range(_THREADS)
        ]

    def start(self) -> None:
        """Start the threads that send."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """End after what is being sent, and leave that where it takes longer."""
        with self._changed:
            self._stopping.set()
            self._changed.notify_all()
        stop_at = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, stop_at - time.monotonic()))

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
        reports = [report for make in makers if make is not None for report in _make(make, news, server)]
        with self._changed:
            self._waiting.extend(reports)
            self._changed.notify_all()

    def _run(self) -> None:
        connection = _Connection(self._callbacks)
        while (report := self._take(connection)) is not None:
            try:
                self._send(report, connection)
            except Exception as error:
                log.failure("report cannot be sent", error, path=report.command_path)
            finally:
                with self._changed:
                    self._busy.discard(_lane(report))
                    self._changed.notify_all()
        connection.close()

    def _take(self, connection: "_Connection") -> Report | None:
        """Return the oldest report whose VM has no report under way; None when the thread is to end."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._find() is not None or self._stopping.is_set(), self._idle_s):
                connection.close()
            report = self._find()
            if self._stopping.is_set() or report is None:
                return None
            self._waiting.remove(report)
            self._busy.add(_lane(report))
            return report

    def _find(self) -> Report | None:
        return next((report for report in self._waiting if _lane(report) not in self._busy), None)

    def _send(self, report: Report, connection: "_Connection") -> None:
        error = "no management server has connected"
        for attempt in range(_TRIES):
            server = self._get_server()
            if server is None or (attempt and self._stopping.wait(_BACKOFF.pause_s(attempt))):
                break
            headers = {"commandpath": report.command_path}
            body = msgspec.json.encode(report.body)
            channel = connection.open(server)
            status, error = channel.post(server.send_command_url, body, headers, self.timeout_s)
            if status == 404 and report.optional:
                log.info("this server does not know the report", path=report.command_path, vm=report.body.get("vmUuid"))
                return
            if status is not None and 200 <= status < 300:
                log.info("reported", path=report.command_path, vm=report.body.get("vmUuid"))
                return
        log.warning("report dropped", path=report.command_path, body=report.body, error=error)


def _make(
    make: Callable[[News, ManagementServer], tuple[Report, ...]], news: News, server: ManagementServer
) -> list[Report]:
    """Return what a plugin makes of it: a fault of its is a line in the log, and no task's or event's end."""
    try:
        reports = list(call(make, news, server))
        for report in reports:
            msgspec.convert(msgspec.to_builtins(report), Report)
    except Exception as error:
        log.failure("report cannot be made", error)
        return []
    return reports


class _Connection:
    """One thread's connection to the server, kept as long as it is the same."""

    def __init__(self, callbacks: CallbackClient) -> None:
        self._callbacks = callbacks
        self._open: tuple[ManagementServer, Channel] | None = None

    def open(self, server: ManagementServer) -> Channel:
        """Return the channel to a server, the one that is open where it is the same."""
        if self._open is None or self._open[0] != server:
            self.close()
            self._open = server, self._callbacks.open(server.send_command_url, server.client)
        return self._open[1]

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _lane(report: Report) -> str:
    """Return what a report is about: a VM, or the host."""
    return str(report.body.get("vmUuid") or report.body.get("resourceUuid") or "")
