"""What is so at the moment of a scrape: lanes, delivery, journal, libvirt."""

import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvmagent import __version__
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.journal import Journal
from kvmagent.tasks.lanes import Lanes


class StateMetrics(Collector):
    """What works on tasks, and what is owed, at the moment of a scrape.

    `stalled_s` tells of each part for how long it has made no progress, `is_connected` whether libvirt is not known
    to be away.
    """

    def __init__(
        self,
        lanes: Lanes,
        delivery: Delivery,
        journal: Journal,
        *,
        stalled_s: Callable[[], Mapping[str, float]],
        is_connected: Callable[[], bool],
        max_queued: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lanes = lanes
        self._delivery = delivery
        self._journal = journal
        self._stalled_s = stalled_s
        self._is_connected = is_connected
        self._max_queued = max_queued
        self._clock = clock

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the metrics; takes each part's lock for a moment."""
        yield _gauge(
            "build_info", "1, with the version of the agent.", 1, version=__version__, python=platform.python_version()
        )
        yield _gauge("threads", "Threads of the agent.", threading.active_count())
        yield _gauge("libvirt_up", "1 while libvirt is not known to be away.", self._is_connected())
        running, queued = self._lanes.running(), self._lanes.queued()
        longest = max((seconds for _, seconds in running.values()), default=0.0)
        yield _gauge("tasks_running", "Tasks that are carried out, each in a lane of its own.", len(running))
        yield _gauge("task_running_longest_seconds", "How long the longest of them has run.", longest)
        yield _gauge("tasks_queued", "Tasks that wait for their VM's lane or for a thread.", sum(queued.values()))
        yield _gauge("tasks_queued_limit", "Unfinished tasks above which new ones are refused.", self._max_queued)
        yield _gauge("lanes_waiting", "VMs with tasks that wait.", len(queued))
        yield _gauge("lane_depth_max", "Tasks that wait in the longest lane.", max(queued.values(), default=0))
        backlog = self._delivery.backlog()
        oldest = min((one.oldest_at for one in backlog), default=self._clock())
        failing = sum(one.failures > 0 for one in backlog)
        yield _gauge("callbacks_owed", "Callbacks that are still to be taken.", sum(one.owed for one in backlog))
        yield _gauge("callbacks_owed_oldest_seconds", "Age of the oldest of them.", max(0.0, self._clock() - oldest))
        yield _gauge("callback_destinations_failing", "Servers that are owed callbacks and do not answer.", failing)
        yield _gauge("journal_up", "1 while the journal's last commit succeeded.", self._journal.check() is None)
        stalled = GaugeMetricFamily(
            "kvmagent_stalled_seconds", "For how long a part has had work and made no progress.", labels=["part"]
        )
        for part, seconds in self._stalled_s().items():
            stalled.add_metric([part], seconds)
        yield stalled


def _gauge(name: str, words: str, value: float, **labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"kvmagent_{name}", words, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
