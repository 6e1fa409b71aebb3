"""Which devices to remove to come as near as possible to an amount, and never above it."""

from kvmagent.model.units import align_up


class Sums:
    """What subsets of some sizes add up to, in `quantum_bytes`: as many bits as the amount has quanta.

    Sizes that are no multiple count as the next larger one, so that a fit is never above the amount.
    """

    def __init__(self, sizes_bytes: list[int], quantum_bytes: int) -> None:
        self._quantum_bytes = quantum_bytes
        self._sizes = [align_up(size, quantum_bytes) // quantum_bytes for size in sizes_bytes]
        # reached[n] has bit s set where the first n sizes have a subset of sum s.
        self._reached = [1]
        for size in self._sizes:
            self._reached.append(self._reached[-1] | self._reached[-1] << size)

    def best_below(self, amount_bytes: int) -> int:
        """Return the largest sum that is not above the amount; 0 where nothing fits."""
        within = self._reached[-1] & (1 << amount_bytes // self._quantum_bytes + 1) - 1
        return (within.bit_length() - 1) * self._quantum_bytes

    def next_above(self, amount_bytes: int) -> int | None:
        """Return the smallest sum above the amount; None where there is none."""
        shift = amount_bytes // self._quantum_bytes + 1
        above = self._reached[-1] >> shift
        return (shift + (above & -above).bit_length() - 1) * self._quantum_bytes if above else None

    def pick(self, sum_bytes: int) -> list[int]:
        """Return the indexes of a subset of that sum, later sizes first."""
        picked, left = [], sum_bytes // self._quantum_bytes
        for n in range(len(self._sizes), 0, -1):
            size = self._sizes[n - 1]
            # Later devices are taken where they can be, so that what was plugged last leaves first.
            if size <= left and self._reached[n - 1] >> (left - size) & 1:
                picked.append(n - 1)
                left -= size
        return picked
