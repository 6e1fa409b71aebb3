"""The state at the moment of a scrape: lanes, delivery, journal, libvirt."""

import platform
import threading
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvmagent import __version__
from kvmagent.api.metrics.table import make_gauge
from kvmagent.model.host import HostMemory
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.journal import Journal
from kvmagent.tasks.lanes import Lanes


class StateMetrics(Collector):
    """What works on tasks, and what is undelivered, at the moment of a scrape.

    `stalled_s` returns for each part how long it has made no progress, `is_connected` whether libvirt is not known
    to be away, `certificate_ends` until when the certificate of each section is good, `memory` the host's memory budget
    as it was seen last.
    """

    def __init__(
        self,
        lanes: Lanes,
        delivery: Delivery,
        journal: Journal,
        *,
        stalled_s: Callable[[], Mapping[str, float]],
        is_connected: Callable[[], bool],
        certificate_ends: Callable[[], Mapping[str, float | None]],
        memory: Callable[[], HostMemory | None],
        max_queued: int,
    ) -> None:
        self._lanes = lanes
        self._delivery = delivery
        self._journal = journal
        self._stalled_s = stalled_s
        self._is_connected = is_connected
        self._certificate_ends = certificate_ends
        self._memory = memory
        #: How many tasks may wait in all.
        self.max_queued = max_queued

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the metrics; takes each part's lock for a moment."""
        yield make_gauge("kvmagent_build_info", [((__version__, platform.python_version()), 1)])
        running, queued, backlog = self._lanes.running(), self._lanes.queued(), self._delivery.backlog()
        now = {
            "threads": threading.active_count(),
            "libvirt_up": self._is_connected(),
            "tasks_running": len(running),
            "task_running_longest_seconds": max((seconds for _, seconds in running.values()), default=0.0),
            "tasks_queued": sum(queued.values()),
            "tasks_queued_limit": self.max_queued,
            "lanes_waiting": len(queued),
            "lane_depth_max": max(queued.values(), default=0),
            "callbacks_owed": sum(one.owed for one in backlog),
            "callbacks_owed_oldest_seconds": max((one.oldest_s for one in backlog), default=0.0),
            "callback_destinations_failing": sum(one.failures > 0 for one in backlog),
            "journal_up": self._journal.check() is None,
        }
        for name, value in now.items():
            yield make_gauge(f"kvmagent_{name}", [((), value)])
        if (memory := self._memory()) is not None:
            yield make_gauge("kvmagent_host_memory_budget_bytes", [((), memory.budget)])
            yield make_gauge("kvmagent_host_memory_promised_bytes", [((), memory.promised)])
            yield make_gauge("kvmagent_host_memory_reserved_bytes", [((), memory.reserved)])
            yield make_gauge("kvmagent_host_memory_reserve_bytes", [((), memory.reserve)])
        ends = [((section,), end) for section, end in self._certificate_ends().items() if end is not None]
        yield make_gauge("kvmagent_certificate_end_timestamp_seconds", ends)
        yield make_gauge("kvmagent_stalled_seconds", [((part,), value) for part, value in self._stalled_s().items()])
