"""libvirt's event loop: it tells of sockets and timers, frees what is removed, and is woken for nothing else."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvmagent.hypervisor.eventloop import EventLoop
from tests.lab.processes import wait_for

READABLE, WRITABLE, HANGUP = 1, 2, 8


class Libvirt:
    """What libvirt would be told, and by which thread; its clock stands still unless it is moved."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.freed: list[tuple[Any, str]] = []
        self.now_s = 100.0
        self.loop = EventLoop(clock=lambda: self.now_s, free=self._free)
        self.rounds = 0

    def _free(self, opaque: Any) -> None:
        self.freed.append((opaque, threading.current_thread().name))

    def on_socket(self, number: int, fd: int, events: int, opaque: Any) -> None:
        self.told.append((opaque, events))

    def on_timer(self, number: int, opaque: Any) -> None:
        self.told.append((opaque, self.now_s))

    def go_round(self) -> list[tuple[Any, ...]]:
        """Let the loop go round once, without sleeping: a timer that is due sees to that."""
        self.told.clear()
        alarm = self.loop.add_timer(0, lambda number, opaque: None, "alarm")
        self.loop.run_once()
        self.loop.remove_timer(alarm)
        return list(self.told)


@pytest.fixture
def libvirt() -> Libvirt:
    return Libvirt()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_socket_is_told_of_until_somebody_waits_for_it_himself(libvirt: Libvirt, pair: Any) -> None:
    ours, theirs = pair
    watch = libvirt.loop.add_handle(ours.fileno(), READABLE, libvirt.on_socket, "one")
    assert libvirt.go_round() == []
    theirs.send(b"x")
    assert libvirt.go_round() == [("one", READABLE)]
    libvirt.loop.update_handle(watch, 0)
    assert libvirt.go_round() == []
    libvirt.loop.update_handle(watch, 0)
    libvirt.loop.update_handle(watch, WRITABLE)
    assert libvirt.go_round() == [("one", WRITABLE)]
    libvirt.loop.update_handle(watch, READABLE | WRITABLE)
    assert libvirt.go_round() == [("one", READABLE | WRITABLE)]


def test_a_hang_up_is_told_and_not_while_somebody_waits_for_the_socket_himself(libvirt: Libvirt, pair: Any) -> None:
    ours, theirs = pair
    watch = libvirt.loop.add_handle(ours.fileno(), 0, libvirt.on_socket, "one")
    theirs.close()
    assert libvirt.go_round() == []
    libvirt.loop.update_handle(watch, READABLE)
    assert libvirt.go_round() == [("one", READABLE | HANGUP)]


def test_what_one_callback_removes_the_next_is_not_told_of(libvirt: Libvirt, pair: Any) -> None:
    """Both sockets are ready in the same round."""
    watches: list[int] = []

    def remove_other(number: int, fd: int, events: int, opaque: Any) -> None:
        libvirt.on_socket(number, fd, events, opaque)
        (other,) = [watch for watch in watches if watch != number]
        libvirt.loop.remove_handle(other)

    add = libvirt.loop.add_handle
    watches += [add(end.fileno(), WRITABLE, remove_other, end.fileno()) for end in pair]
    assert len(libvirt.go_round()) == 1


def test_the_number_of_a_closed_socket_is_watched_anew(libvirt: Libvirt, pair: Any) -> None:
    watch = libvirt.loop.add_handle(pair[0].fileno(), READABLE, libvirt.on_socket, "former")
    libvirt.loop.remove_handle(watch)
    libvirt.loop.add_handle(pair[0].fileno(), WRITABLE, libvirt.on_socket, "new")
    assert libvirt.go_round() == [("new", WRITABLE)]


def test_a_socket_has_one_watch(libvirt: Libvirt, pair: Any) -> None:
    libvirt.loop.add_handle(pair[0].fileno(), READABLE, libvirt.on_socket, "one")
    with pytest.raises(FileExistsError):
        libvirt.loop.add_handle(pair[0].fileno(), READABLE, libvirt.on_socket, "two")
    pair[1].send(b"x")
    assert libvirt.go_round() == [("one", READABLE)]


def test_what_is_not_there_is_neither_changed_nor_removed(libvirt: Libvirt, pair: Any) -> None:
    """Observed: libvirt 9.0 sets the timer -1 of a keep-alive that has just been given up."""
    watch = libvirt.loop.add_handle(pair[0].fileno(), WRITABLE, libvirt.on_socket, "one")
    timer = libvirt.loop.add_timer(0, libvirt.on_timer, "timer")
    assert (libvirt.loop.remove_handle(watch), libvirt.loop.remove_timer(timer)) == (0, 0)
    for number in (watch, timer, -1):
        libvirt.loop.update_handle(number, READABLE)
        libvirt.loop.update_timer(number, 0)
        assert (libvirt.loop.remove_handle(number), libvirt.loop.remove_timer(number)) == (-1, -1)
    assert libvirt.go_round() == []


def test_a_timer_comes_again_and_again_until_it_is_off(libvirt: Libvirt) -> None:
    timer = libvirt.loop.add_timer(500, libvirt.on_timer, "one")
    assert libvirt.go_round() == []
    libvirt.now_s = 100.5
    assert libvirt.go_round() == [("one", 100.5)]
    assert libvirt.go_round() == []
    libvirt.now_s = 101.0
    libvirt.loop.update_timer(timer, 500)
    assert libvirt.go_round() == []
    libvirt.now_s = 101.5
    assert libvirt.go_round() == [("one", 101.5)]
    libvirt.loop.update_timer(timer, -1)
    libvirt.now_s = 1000.0
    assert libvirt.go_round() == []
    libvirt.loop.update_timer(timer, 0)
    assert libvirt.go_round() == libvirt.go_round() == [("one", 1000.0)]
    libvirt.loop.remove_timer(timer)
    assert libvirt.go_round() == []


def test_a_timer_that_another_one_removes_does_not_come(libvirt: Libvirt) -> None:
    timers = [libvirt.loop.add_timer(0, lambda number, opaque: libvirt.loop.remove_timer(timers[1]), "first")]
    timers.append(libvirt.loop.add_timer(0, libvirt.on_timer, "second"))
    assert libvirt.go_round() == []


def test_a_timer_that_is_set_while_it_comes_is_due_as_it_was_set(libvirt: Libvirt) -> None:
    """As a thread may that has an event for it, in any moment."""

    def set_for_now(number: int, opaque: Any) -> None:
        libvirt.on_timer(number, opaque)
        if len(libvirt.told) == 1:
            libvirt.loop.update_timer(number, 0)

    libvirt.loop.add_timer(3000, set_for_now, "one")
    libvirt.now_s = 103.0
    assert libvirt.go_round() == [("one", 103.0)]
    assert libvirt.go_round() == [("one", 103.0)]


@pytest.fixture
def running(libvirt: Libvirt) -> Iterator[Libvirt]:
    """The loop runs on its thread and counts its rounds."""
    loop = libvirt.loop
    run_once = loop.run_once

    def count_round() -> None:
        libvirt.rounds += 1
        run_once()

    loop.run_once = count_round  # type: ignore[method-assign]
    loop.start()
    yield libvirt
    loop.stop()


def test_a_call_of_libvirt_wakes_nobody(running: Libvirt, pair: Any) -> None:
    """As libvirt does for each: it takes its socket, gives it back, and begins its keep-alive's timer anew."""
    loop = running.loop
    watch = loop.add_handle(pair[0].fileno(), READABLE, running.on_socket, "one")
    timer = loop.add_timer(3_600_000, running.on_timer, "keep-alive")
    # Set for a moment before the other one, it is looked at; then the loop sleeps for an hour.
    loop.remove_timer(loop.add_timer(1_000, running.on_timer, "first"))
    wait_for(lambda: [one for one, _ in running.freed] == ["first"], timeout_s=10, what="the loop to go round")
    before = running.rounds
    for _ in range(100):
        loop.update_handle(watch, 0)
        running.now_s += 0.001
        loop.update_timer(timer, 3_600_000)
        loop.update_handle(watch, READABLE)
    # It goes round once more at most: it may have been about to.
    assert running.rounds <= before + 1
    pair[1].send(b"x")
    wait_for(lambda: bool(running.told), timeout_s=10, what="the loop to tell of the socket")
    assert running.told[0] == ("one", READABLE)
    loop.remove_handle(watch)
    loop.remove_timer(timer)


def test_a_timer_that_is_due_earlier_wakes_a_loop_that_sleeps(running: Libvirt) -> None:
    for _ in range(50):
        running.told.clear()
        timer = running.loop.add_timer(0, running.on_timer, "now")
        wait_for(lambda: bool(running.told), timeout_s=10, what="the timer to come")
        running.loop.remove_timer(timer)


def test_what_is_removed_is_freed_by_the_loop_and_all_of_it_before_it_ends(libvirt: Libvirt, pair: Any) -> None:
    """Whoever removes a watch holds libvirt's lock on it: freed there, it would wait for itself."""
    loop = libvirt.loop
    watch = loop.add_handle(pair[0].fileno(), READABLE, libvirt.on_socket, "socket")
    timer = loop.add_timer(-1, libvirt.on_timer, "timer")
    loop.remove_handle(watch)
    assert libvirt.freed == []
    # Its last user may go before the loop has begun to run.
    loop.start()
    loop.start()
    loop.stop()
    loop.remove_timer(timer)
    loop.stop()
    assert libvirt.freed == [("socket", "libvirt-events"), ("timer", "libvirt-events")]
    assert not [thread for thread in threading.enumerate() if thread.name == "libvirt-events"]
