"""How long to wait before the next try: twice as long after each failure, up to a longest pause, with jitter."""

import random
from collections.abc import Callable
from dataclasses import dataclass


def spread() -> float:
    """Return a factor that keeps those who failed together from trying again together."""
    return random.uniform(0.75, 1.25)


@dataclass(frozen=True)
class Backoff:
    """Pauses in seconds. Keeps no count: whoever tries knows how often it failed in a row."""

    first_s: float
    longest_s: float
    jitter: Callable[[], float] = spread

    def pause_s(self, failures: int) -> float:
        """Return the pause after so many failures in a row, of which there was one at least."""
        doubled: float = self.first_s * 2 ** min(failures - 1, 30)
        return min(doubled, self.longest_s) * self.jitter()
