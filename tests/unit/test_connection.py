"""Connections to libvirt: given back, replaced, waited for, and never waited for without end."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import libvirt
import pytest

from kvmagent.hypervisor.connection import Connection
from kvmagent.model.errors import AgentError, Code
from tests.fakes.libvirt import FakeConnection, libvirt_error
from tests.lab.processes import wait_for


class Libvirt:
    """A libvirt that can go away, and hang."""

    def __init__(self) -> None:
        self.opened: list[FakeConnection] = []
        self.away = False
        self.hang = threading.Event()
        self.hang.set()

    def open(self, uri: str) -> Any:
        self.hang.wait(20)
        if self.away:
            raise libvirt_error(38, 7, "Failed to connect socket: Connection refused")
        self.opened.append(FakeConnection())
        return self.opened[-1]


@pytest.fixture
def daemon() -> Libvirt:
    return Libvirt()


@pytest.fixture
def connection(daemon: Libvirt) -> Iterator[Connection]:
    made = Connection("fake:///", open_libvirt=daemon.open)
    made.start()
    yield made
    daemon.hang.set()
    made.stop()


def test_a_connection_is_used_again_and_never_by_two_at_once(connection: Connection, daemon: Libvirt) -> None:
    for _ in range(5):
        with connection.lease() as one:
            pass
    assert len(daemon.opened) == 1
    with ExitStack() as held:
        leased = [held.enter_context(connection.lease()) for _ in range(24)]
        assert len({id(one) for one in leased}) == 24
        assert one in leased
    assert sum(opened.alive for opened in daemon.opened) <= 16


def test_connections_that_nobody_needs_are_closed_but_for_one(daemon: Libvirt) -> None:
    made = Connection("fake:///", open_libvirt=daemon.open, unused_s=0.01)
    made.start()
    with made.lease() as used:
        with ExitStack() as held:
            for _ in range(8):
                held.enter_context(made.lease())
        wait_for(lambda: sum(one.alive for one in daemon.opened) == 2, timeout_s=60, what="the others to be closed")
        assert used in [one for one in daemon.opened if one.alive]
    for _ in range(100):
        with ExitStack() as held:
            leased = [held.enter_context(made.lease()) for _ in range(3)]
            assert all(one.isAlive() for one in leased), "none is closed that somebody has"
    wait_for(lambda: sum(one.alive for one in daemon.opened) == 1, timeout_s=60, what="the others to be closed")
    made.stop()


def test_work_is_not_refused_after_connections_that_nobody_needed_were_closed(daemon: Libvirt) -> None:
    made = Connection("fake:///", open_libvirt=daemon.open, unused_s=1.0, open_wait_s=0.2)
    made.start()
    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(made.lease())
    wait_for(lambda: sum(one.alive for one in daemon.opened) == 1, timeout_s=60, what="the others to be closed")
    # Longer than an open may take, shorter than until the next close.
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        assert made.wait_connected(0.0), "nothing hangs"
    with made.lease(), made.lease():
        pass
    made.stop()


def test_a_dead_connection_is_replaced(connection: Connection, daemon: Libvirt) -> None:
    daemon.opened[0].alive = False
    with connection.lease() as one:
        assert one is daemon.opened[1]


def test_while_libvirt_is_away_work_is_refused_at_once_and_goes_on_when_it_is_back(
    connection: Connection, daemon: Libvirt
) -> None:
    daemon.away, daemon.opened[0].alive = True, False
    for _ in range(20):
        began = time.monotonic()
        with pytest.raises(AgentError, match="Connection refused") as caught:
            connection.lease().__enter__()
        assert caught.value.code is Code.LIBVIRT_UNAVAILABLE
        assert time.monotonic() - began < 1.0
    assert not connection.wait_connected(0.05)
    daemon.away = False
    assert connection.wait_connected(10)
    with connection.lease():
        pass


@pytest.mark.slow
def test_an_open_that_hangs_holds_up_nobody_for_long(connection: Connection, daemon: Libvirt) -> None:
    daemon.opened[0].alive = False
    daemon.hang.clear()
    waited = [time_refusal(connection) for _ in range(3)]
    assert waited[0] < 7.0
    assert max(waited[1:]) < 0.5, "the second caller waits no more for what is known to hang"
    daemon.hang.set()
    wait_for(lambda: connection.wait_connected(0), timeout_s=5, what="the open to go on")
    with connection.lease():
        pass


def test_a_close_that_hangs_holds_up_nobody_for_long(daemon: Libvirt) -> None:
    made = Connection("fake:///", open_libvirt=daemon.open, unused_s=0.01)
    made.start()
    goes_on, closing = threading.Event(), threading.Event()

    def hang() -> int:
        closing.set()
        goes_on.wait(60)
        return 0

    with ExitStack() as held:
        for _ in range(3):
            held.enter_context(made.lease())
        for one in daemon.opened:
            one.close = hang  # type: ignore[method-assign]
    assert closing.wait(60), "nobody needs all of them"
    with made.lease():
        used_s = time.thread_time()
        time_refusal(made)
        assert time.thread_time() - used_s < 1.0, "who waits does not spin"
        goes_on.set()
        wait_for(lambda: made.wait_connected(0), timeout_s=60, what="the close to go on")
        with made.lease():
            pass
    made.stop()


def time_refusal(connection: Connection) -> float:
    began = time.monotonic()
    with pytest.raises(AgentError, match="no answer in 5 s"):
        connection.lease().__enter__()
    return time.monotonic() - began


def test_a_driver_inside_the_process_is_shared(tmp_path: Any) -> None:
    made = Connection("test:///default")
    made.start()
    with made.lease() as one, made.lease() as other:
        assert one is other
    made.stop()


def test_no_thread_and_no_connection_is_left_after_stop(daemon: Libvirt) -> None:
    threads = set(threading.enumerate())
    made = Connection("fake:///", open_libvirt=daemon.open)
    made.start()
    made.stop()
    assert not set(threading.enumerate()) - threads
    assert not any(opened.alive for opened in daemon.opened)
    with pytest.raises(AgentError) as caught:
        made.lease().__enter__()
    assert caught.value.code is Code.STOPPING


@pytest.mark.guest
@pytest.mark.slow
class TestRealDaemon:
    """What only a real libvirtd shows."""

    @pytest.fixture
    def real(self, lab: Any) -> Iterator[Connection]:
        made = Connection(lab.uri)
        made.start()
        yield made
        lab.resume()
        made.stop()

    def test_a_killed_daemon_is_found_again_without_being_asked_for(self, lab: Any, real: Connection) -> None:
        with real.lease() as connection:
            lab.kill()
            wait_for(lambda: not connection.isAlive(), timeout_s=10, what="the connection's death")
        assert not real.wait_connected(0)
        lab.start()
        assert real.wait_connected(20)
        with real.lease() as connection:
            assert connection.getLibVersion() > 0

    def test_a_daemon_that_is_killed_is_told_as_away_by_a_call_that_nobody_put_into_words(
        self, lab: Any, real: Connection
    ) -> None:
        def ask_while_it_dies() -> None:
            with real.lease() as connection:
                lab.kill()
                try:
                    connection.getCapabilities()
                finally:
                    lab.start()

        with pytest.raises(AgentError) as caught:
            ask_while_it_dies()
        assert caught.value.code is Code.LIBVIRT_UNAVAILABLE

    def test_a_call_on_a_daemon_that_hangs_ends(self, lab: Any, real: Connection) -> None:
        call = timed(lambda connection: connection.getLibVersion())
        with real.lease() as connection:
            lab.pause()
            error, seconds = call(connection)
        assert error is not None
        assert error.get_error_domain() == libvirt.VIR_FROM_RPC
        assert seconds < 16
        lab.resume()
        assert real.wait_connected(20)

    def test_a_daemon_that_hangs_does_not_hold_up_the_stop(self, lab: Any) -> None:
        made = Connection(lab.uri)
        made.start()
        lab.pause()
        try:
            began = time.monotonic()
            made.stop()
            assert time.monotonic() - began < 20
        finally:
            lab.resume()


def timed(call: Callable[[Any], Any]) -> Callable[[Any], tuple[libvirt.libvirtError | None, float]]:
    def run(connection: Any) -> tuple[libvirt.libvirtError | None, float]:
        began = time.monotonic()
        try:
            call(connection)
        except libvirt.libvirtError as error:
            return error, time.monotonic() - began
        return None, time.monotonic() - began

    return run
