"""Logs the state of everything that works on tasks, for whoever finds out why nothing moves.

dump totals     threads, journal
dump lane       each VM with a task: the running one and since when, how many wait; the longest first
dump callbacks  each destination with undelivered callbacks: how many, since when, when the next try is
dump thread     the name of each thread, by the id that the stacks have
"""

import threading

from kvmagent.logs import Log
from kvmagent.tasks.delivery import Delivery
from kvmagent.tasks.journal import Journal
from kvmagent.tasks.lanes import Lanes

log = Log(__name__, always=True)

# More lines say no more: the longest come first.
_MOST_LINES = 200


def dump_state(lanes: Lanes, delivery: Delivery, journal: Journal) -> None:
    """Write the state to the log. Takes each part's lock for a moment."""
    running, queued, backlog = lanes.running(), lanes.queued(), delivery.backlog()
    log.info(
        "dump totals",
        threads=threading.active_count(),
        running=len(running),
        queued=sum(queued.values()),
        owed=delivery.owed(),
        journal=journal.check() or "well",
        commit_seconds=round(journal.stalled_s(), 1),
    )
    names = sorted(running.keys() | queued.keys(), key=lambda lane: -running[lane][1] if lane in running else 0.0)
    for lane in names[:_MOST_LINES]:
        task, seconds = running.get(lane, (None, 0.0))
        fields = {} if task is None else {**task.log_fields, "seconds": round(seconds, 1)}
        log.info("dump lane", **{"vm": lane, **fields, "queued": queued.get(lane, 0)})
    for one in sorted(backlog, key=lambda one: -one.oldest_s)[:_MOST_LINES]:
        log.info(
            "dump callbacks",
            destination=one.destination,
            owed=one.owed,
            oldest_seconds=round(one.oldest_s),
            failures=one.failures,
            under_way=one.under_way,
            next_in_seconds=one.next_in_s and round(one.next_in_s, 1),
        )
    for thread in threading.enumerate():
        log.info("dump thread", thread=thread.name, id=f"{thread.ident or 0:#018x}")
