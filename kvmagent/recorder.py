"""What the parts of the agent report for the metrics: events, and the time of each phase.

    with measured("plan") as spent:      what no other phase claims
        with phase("libvirt"):
            with phase("guest"):         the innermost counts
    spent                                {"plan": 0.001, "libvirt": 0.008, "guest": 0.040}, in seconds

Counts nothing itself and knows no library: api.metrics does. Phases belong to the thread; where nothing is measured
they do nothing.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal

from kvmagent.model.facts import Facts

Phase = Literal["queue", "plan", "journal", "libvirt", "guest", "hook", "callback"]


class Recorder:
    """Takes what happens, on any thread and without delay; this one lets it go."""

    def ended(self, command: str, outcome: str, error_code: str | None) -> None:
        """A task ended, with its outcome and its error, if any."""

    def ended_late(self, command: str, error_code: str | None) -> None:
        """A removal that was pending when its task ended has ended, with its error, if any."""

    def settled(self, command: str, state: str, seconds: float) -> None:
        """A callback was delivered, is gone or given up, so long after its task had finished."""

    def callback_failed(self) -> None:
        """A callback was not taken, and will be sent again."""

    def refused(self, error_code: str) -> None:
        """A request was refused at once."""

    def committed(self, seconds: float, writes: int) -> None:
        """The journal made this many writes in one commit."""

    def guest_called(self, result: str) -> None:
        """A guest agent was asked: "answered", or the error code of why there is no answer."""

    def observed(self, facts: Facts) -> None:
        """A VM was observed."""


class _Stopwatch(threading.local):
    """What this thread measures: the phase that it is in, since when, and what has come together so far."""

    phase: Phase | None = None
    since = 0.0
    spent: dict[Phase, float]

    def turn_to(self, phase: Phase) -> Phase:
        """Go on with another phase and return the one before."""
        assert self.phase is not None
        now = time.perf_counter()
        self.spent[self.phase] = self.spent.get(self.phase, 0.0) + now - self.since
        former, self.phase, self.since = self.phase, phase, now
        return former


_stopwatch = _Stopwatch()


@contextmanager
def measured(first: Phase) -> Iterator[dict[Phase, float]]:
    """Measure what this thread does inside the block, beginning with this phase; the result is whole at the end."""
    watch = _stopwatch
    watch.spent, watch.phase, watch.since = {}, first, time.perf_counter()
    try:
        yield watch.spent
    finally:
        watch.turn_to(first)
        watch.phase = None


class phase:  # reads as a statement
    """`with phase("guest"):` what is inside counts for that phase alone."""

    __slots__ = ("_former", "_name")

    def __init__(self, name: Phase) -> None:
        self._name: Phase = name
        self._former: Phase | None = None

    def __enter__(self) -> None:
        if _stopwatch.phase is not None:
            self._former = _stopwatch.turn_to(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._former is not None:
            _stopwatch.turn_to(self._former)
