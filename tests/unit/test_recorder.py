"""Phases: each moment of a task counts once, for the innermost phase."""

import threading
import time

from kvmagent.recorder import Phase, measured, phase


def test_the_phases_add_up_to_the_whole_and_the_innermost_counts() -> None:
    started = time.perf_counter()
    with measured("plan") as spent:
        busy(0.01)
        with phase("libvirt"):
            busy(0.02)
            with phase("guest"):
                busy(0.04)
            busy(0.02)
        with phase("libvirt"):
            pass
    whole = time.perf_counter() - started
    assert abs(sum(spent.values()) - whole) < 0.02
    assert spent["plan"] >= 0.01
    assert 0.04 <= spent["libvirt"] <= whole - 0.05
    assert 0.04 <= spent["guest"] <= whole - 0.05


def test_an_error_ends_the_phase_that_it_leaves() -> None:
    with measured("plan") as spent:
        try:
            with phase("guest"):
                raise ValueError
        except ValueError:
            busy(0.01)
    assert spent["plan"] >= 0.01 > spent["guest"]


def test_a_phase_of_another_thread_or_of_none_counts_nowhere() -> None:
    with phase("guest"):
        pass
    with measured("plan") as spent:
        thread = threading.Thread(target=use, args=("guest",))
        thread.start()
        thread.join()
    assert set(spent) == {"plan"}


def test_what_is_measured_twice_begins_anew() -> None:
    with measured("plan") as first:
        use("guest")
    with measured("plan") as second:
        pass
    assert "guest" in first
    assert "guest" not in second


def use(name: Phase) -> None:
    with phase(name):
        pass


def busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
