from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from kvmagent_plugins.vm.exactfit import Sums


@given(sizes=st.lists(st.integers(1, 12), max_size=7), amount=st.integers(0, 60))
def test_finds_the_nearest_sums_of_all_subsets(sizes: list[int], amount: int) -> None:
    sums = Sums([size * 128 for size in sizes], 128)
    every = {sum(part) * 128 for n in range(len(sizes) + 1) for part in combinations(sizes, n)}
    best = max(total for total in every if total <= amount * 128)
    assert sums.best_below(amount * 128) == best
    assert sums.next_above(amount * 128) == min((total for total in every if total > amount * 128), default=None)
    picked = sums.pick(best)
    assert len(set(picked)) == len(picked)
    assert sum(sizes[n] * 128 for n in picked) == best


def test_takes_what_was_plugged_last() -> None:
    assert Sums([128, 128, 128], 128).pick(128) == [2]


def test_a_size_that_is_no_multiple_is_never_taken_for_less() -> None:
    sums = Sums([100], 128)
    assert sums.best_below(127) == 0
    assert sums.best_below(128) == 128
