"""How long to wait before the next try: twice as long after each failure, up to a longest pause, with jitter.

Agents that know nothing of each other fail together when their server is away, and must not come back together.
Each draws its moment from a window; that grows with the pause, and with what it owes: the more each has to send, the
longer whoever takes it needs for all of them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass


def spread() -> float:
    """Return a factor that keeps those who failed together from trying again together."""
    return random.uniform(0.75, 1.25)


def draw(window_s: float) -> float:
    """Return a moment of a window, seconds from its beginning."""
    return random.uniform(0.0, window_s)


@dataclass(frozen=True)
class Backoff:
    """Pauses in seconds. Keeps no count: whoever tries knows how often it failed in a row, and how much it owes.

    `each_s` is by how much the window grows with each thing owed.
    """

    first_s: float
    longest_s: float
    each_s: float = 0.0
    jitter: Callable[[], float] = spread
    draw: Callable[[float], float] = draw

    def pause_s(self, failures: int, *, owed: int = 0) -> float:
        """Return the pause after that many failures in a row, at least one.

        What is owed makes it no more than twice as long.
        """
        doubled: float = min(self.first_s * 2 ** min(failures - 1, 30), self.longest_s)
        return doubled * self.jitter() + self.draw(min(owed * self.each_s, doubled))

    def first_pause_s(self, owed: int, *, most_s: float) -> float:
        """Return the pause before the first try of who has just started, perhaps together with all others."""
        return self.draw(min(owed * self.each_s, most_s))
