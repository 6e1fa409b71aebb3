"""Shares a limited number of connections, threads or bytes among clients, so that none takes all.

Whoever takes places may have as many as are free at that moment, and no more. One alone gets half of all, two get a
third each, and there is always something left for one who has nothing yet.
Source: Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches" (1998).
"""

from collections import Counter
from collections.abc import Hashable


class Shares:
    """`total` places and who has them. Not thread-safe."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken: Counter[Hashable] = Counter()
        self._free = total

    def resize(self, total: int) -> None:
        """Set the number of places; whoever has too many keeps them."""
        self._free += total - self.total
        self.total = total

    @property
    def free(self) -> int:
        """How many places nobody has."""
        return self._free

    def taken(self, holder: Hashable) -> int:
        """Return how many places somebody has."""
        return self._taken[holder]

    def has_room(self, *holders: Hashable, places: int = 1, part: float = 1.0) -> bool:
        """Whether each of these may take so many places; `part` of the free ones is what each may have at most."""
        # The last of these places is taken as one alone would be: by who has fewer than are free.
        most = part * (self._free - places + 1)
        return all(self._taken[holder] + places <= most for holder in holders)

    def take(self, *holders: Hashable, places: int = 1) -> None:
        """Take places, all of them in the name of each holder."""
        self._free -= places
        for holder in holders:
            self._taken[holder] += places

    def leave(self, *holders: Hashable, places: int = 1) -> None:
        """Give places back."""
        self._free += places
        for holder in holders:
            self._taken[holder] -= places
            if not self._taken[holder]:
                del self._taken[holder]
