"""How long steps recently took on this host, from the journal: the basis of a plan's estimate.

A plan knows its first steps alone. It is compared with tasks of the same command that began with steps of the same
kinds and reached their goal, and these are counted whole.
"""

import itertools
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

from kvmagent.logs import Log, error_fields
from kvmagent.model.errors import AgentError
from kvmagent.model.plans import Took
from kvmagent.model.steps import AnyStep
from kvmagent.tasks.journal import Journal

log = Log(__name__)

# How many of the newest tasks are read, and how few are too few to say anything.
_LATELY, _FEWEST = 500, 3


class StepTimes:
    """Thread-safe. The journal is read again only when a task has ended since."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._results: int | None = None
        # By command: the kinds of a task's steps, and how long all of them took.
        self._tasks: dict[str, list[tuple[tuple[str, ...], float]]] = {}

    def find(self, command: str, steps: Sequence[AnyStep]) -> Took | None:
        """Return how long tasks took that began with such steps; None where fewer than three are known."""
        kinds = _shorten(type(step).__name__ for step in steps)
        with self._lock:
            self._refresh()
            tasks = self._tasks.get(command, [])
        took = [total_ms for known, total_ms in tasks if known[: len(kinds)] == kinds]
        if len(took) < _FEWEST:
            return None
        return Took(median_ms=round(statistics.median(took), 1), worst_ms=round(max(took), 1), tasks=len(took))

    def _refresh(self) -> None:
        results = self._journal.results
        if results == self._results:
            return
        try:
            records = self._journal.recent_steps(limit=_LATELY)
        except AgentError as error:
            log.warning("the times of earlier steps cannot be read", **error_fields(error))
            return
        tasks: dict[str, list[tuple[tuple[str, ...], float]]] = defaultdict(list)
        for (_, command), group in itertools.groupby(records, key=lambda record: (record.task_uuid, record.command)):
            steps = list(group)
            whole = [step.elapsed_ms for step in steps if step.elapsed_ms is not None]
            if len(whole) == len(steps):  # else one was cut off
                tasks[command].append((_shorten(step.kind for step in steps), sum(whole)))
        self._tasks, self._results = tasks, results


def _shorten(kinds: Iterable[str]) -> tuple[str, ...]:
    """Two dimms are attached as one is, twice."""
    return tuple(kind for kind, _ in itertools.groupby(kinds))
