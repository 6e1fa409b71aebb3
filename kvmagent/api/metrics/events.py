"""Events, counted as they happen, and /metrics as text."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.registry import Collector

from kvmagent.api.metrics.table import METRICS
from kvmagent.api.metrics.vms import VmMetrics
from kvmagent.model.command import ANY_TASK, Command
from kvmagent.model.errors import Code
from kvmagent.model.facts import Facts
from kvmagent.model.host import Query
from kvmagent.model.reply import Outcome
from kvmagent.recorder import Phase, Recorder, measured
from kvmagent.tasks.journal import SETTLED, Task

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds. A plan takes milliseconds, a guest's kernel seconds, a callback to a server that is away hours.
PHASE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
# A disk that is well has a commit within milliseconds.
_COMMIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)


class Metrics(Recorder):
    """Thread-safe. One for each agent; what it counts begins at zero with it."""

    def __init__(self) -> None:
        # A second series for each one, with when it was first counted: Prometheus has no use for it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._vms: VmMetrics | None = None

        def counter(name: str) -> Counter:
            metric = METRICS[name]
            return Counter(metric.name, metric.words, metric.labels, registry=self._registry)

        def histogram(name: str, buckets: tuple[float, ...]) -> Histogram:
            metric = METRICS[name]
            return Histogram(metric.name, metric.words, metric.labels, buckets=buckets, registry=self._registry)

        # Finding the series of some labels takes longer than counting in it.
        self._ended = cache(counter("kvmagent_commands").labels)
        self._errors = cache(counter("kvmagent_command_errors").labels)
        self._refused = cache(counter("kvmagent_requests_refused").labels)
        self._settled = cache(counter("kvmagent_callbacks").labels)
        self._attempts_failed = counter("kvmagent_callback_attempts_failed")
        self._guest_calls = cache(counter("kvmagent_guest_agent_calls").labels)
        self._writes = counter("kvmagent_journal_writes")
        self._phases = cache(histogram("kvmagent_phase_seconds", PHASE_BUCKETS).labels)
        self._commits = histogram("kvmagent_journal_commit_seconds", _COMMIT_BUCKETS)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def declare(self, declared: Iterable[Command | Query]) -> None:
        """Have each counter at 0 for the labels that are known before anything has happened.

        Prometheus sees no increase from nothing to 1: a counter that begins with its first event alerts at the second.
        """
        for one in declared:
            outcomes = get_args(Outcome) if isinstance(one, Command) else ("answered", "refused")
            for outcome in outcomes:
                self._ended(one.name, outcome)
            for code in (*ANY_TASK, *(one.refusals if isinstance(one, Command) else ())):
                self._errors(one.name, code)
        for code in Code:
            self._refused(code)
        for state in SETTLED:
            self._settled(state)
        for result in ("answered", *(code for code in Code if code.startswith("GUEST_AGENT_"))):
            self._guest_calls(result)

    def add(self, collector: Collector) -> None:
        """Include what a collector returns in every scrape."""
        self._registry.register(collector)

    def add_vms(self, vms: VmMetrics) -> None:
        """Include what is known of VMs in every scrape, and pass on what is observed of VMs."""
        self._vms = vms
        self.add(vms)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    @contextmanager
    def timed(self, task: Task, waited_s: float) -> Iterator[None]:
        """Measure the phases of a task that is carried out inside the block, so long after it was accepted.

        A later observation of one is none.
        """
        if task.outcome is not None:
            yield
            return
        with measured("plan") as spent:
            yield
        # A restart lies between the acceptance of a recovered task and now.
        spent["queue"] = spent.get("queue", 0.0) + (0.0 if task.recovered else waited_s)
        for phase, seconds in spent.items():
            self._observe(task.command, phase, seconds)

    def ended(self, command: str, outcome: str, error_code: str | None) -> None:
        self._ended(command, outcome).inc()
        if error_code is not None:
            self._errors(command, error_code).inc()

    def ended_late(self, command: str, error_code: str | None) -> None:
        if error_code is not None:
            self._errors(command, error_code).inc()

    def settled(self, command: str, state: str, seconds: float) -> None:
        self._settled(state).inc()
        if state == "delivered":
            self._observe(command, "callback", seconds)

    def callback_failed(self) -> None:
        self._attempts_failed.inc()

    def refused(self, error_code: str) -> None:
        self._refused(error_code).inc()

    def committed(self, seconds: float, writes: int) -> None:
        if writes:
            self._writes.inc(writes)
            self._commits.observe(seconds)

    def observed(self, facts: Facts) -> None:
        if self._vms is not None:
            self._vms.observed(facts)

    def guest_called(self, result: str) -> None:
        self._guest_calls(result).inc()

    def _observe(self, command: str, phase: Phase, seconds: float) -> None:
        self._phases(command, phase).observe(seconds)
