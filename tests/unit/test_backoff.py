"""Pauses: bounded, longer after each failure, and so spread that who failed together does not come back together."""

from hypothesis import given, settings, strategies

from kvmagent.backoff import Backoff
from tests.fleet.comeback import come_back, make_backoff, most_within

FAILURES = strategies.integers(1, 10_000)
OWED = strategies.integers(0, 100_000)
TIMES = strategies.floats(0.001, 1000.0)


@given(FAILURES, OWED, TIMES, TIMES, TIMES)
def test_a_pause_is_bounded_whatever_failed_and_is_owed(
    failures: int, owed: int, first_s: float, longest_s: float, each_s: float
) -> None:
    pause_s = Backoff(first_s, longest_s, each_s).pause_s(failures, owed=owed)
    doubled = min(first_s * 2 ** min(failures - 1, 30), longest_s)
    assert 0.75 * doubled <= pause_s <= 2.25 * doubled <= 2.25 * longest_s


@given(FAILURES, OWED, OWED, TIMES)
def test_the_window_grows_with_what_is_owed_and_with_the_failures(
    failures: int, owed: int, more: int, each_s: float
) -> None:
    windows: list[float] = []

    def note(window_s: float) -> float:
        windows.append(window_s)
        return 0.0

    backoff = Backoff(0.5, 180.0, each_s, draw=note)
    for count, so_much in ((failures, owed), (failures, owed + more), (failures + 1, owed + more)):
        backoff.pause_s(count, owed=so_much)
    assert windows == sorted(windows)
    assert windows[0] <= owed * each_s


@given(OWED, TIMES, TIMES)
def test_the_first_pause_is_within_its_bounds_and_none_where_nothing_is_owed(
    owed: int, each_s: float, most_s: float
) -> None:
    backoff = Backoff(0.5, 180.0, each_s)
    assert 0.0 <= backoff.first_pause_s(owed, most_s=most_s) <= min(owed * each_s, most_s)
    assert backoff.first_pause_s(0, most_s=most_s) == 0.0


@settings(max_examples=40, deadline=None)
@given(strategies.integers(30, 600), strategies.integers(0, 10_000), strategies.integers())
def test_agents_that_failed_together_do_not_come_back_together(outage_s: int, owed: int, seed: int) -> None:
    """Of a thousand, few come within a hundredth of the outage's length; the last one within a bounded time."""
    backoff = make_backoff(seed)
    moments = come_back(backoff, outage_s, owed, 1000)
    assert most_within(moments, outage_s / 100) <= 150
    assert moments[-1] <= min(2.25 * 180.0, 2.25 * 2 * outage_s)


@settings(max_examples=20, deadline=None)
@given(strategies.integers(60, 600), strategies.integers())
def test_who_owes_much_spreads_further_than_who_owes_nothing(outage_s: int, seed: int) -> None:
    backoff = make_backoff(seed)
    little, much = (most_within(come_back(backoff, outage_s, owed, 1000), outage_s / 50) for owed in (0, 1000))
    assert much < 1.2 * little
