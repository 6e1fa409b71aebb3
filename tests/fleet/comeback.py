"""How agents come back to a server that was away, by the pauses that they make: the same for each run of it."""

from __future__ import annotations

import random
from bisect import bisect_right

from kvmagent.backoff import Backoff
from kvmagent.tasks.delivery import BACKOFF

AGENTS = 2000


def make_backoff(seed: int) -> Backoff:
    """The agent's own pauses, drawn by a seed."""
    chance = random.Random(seed)
    return Backoff(
        BACKOFF.first_s,
        BACKOFF.longest_s,
        BACKOFF.each_s,
        jitter=lambda: chance.uniform(0.75, 1.25),
        draw=lambda window_s: chance.uniform(0.0, window_s),
    )


def come_back(backoff: Backoff, outage_s: float, owed: int, agents: int = AGENTS) -> list[float]:
    """When each of the agents that failed together tries first after the outage, seconds after its end."""
    moments = []
    for _ in range(agents):
        now, failures = 0.0, 0
        while now < outage_s:
            failures += 1
            now += backoff.pause_s(failures, owed=owed)
        moments.append(now - outage_s)
    return sorted(moments)


def most_within(moments: list[float], window_s: float) -> int:
    """The most moments within any window so long."""
    return max(bisect_right(moments, first + window_s) - n for n, first in enumerate(moments))
