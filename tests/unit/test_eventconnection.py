import itertools
import threading
import time
from typing import Any

import libvirt
import pytest

from kvmagent.hypervisor.eventconnection import EventConnection
from tests.fakes.libvirt import libvirt_error
from tests.lab.processes import wait_for

LIMIT_S = 20


class Wire:
    """A connection that a test can cut."""

    def __init__(self) -> None:
        self.alive = True
        self.closed = False
        self.on_close: Any = None

    def setKeepAlive(self, interval: int, count: int) -> None: ...

    def registerCloseCallback(self, callback: Any, opaque: Any) -> None:
        self.on_close = callback

    def unregisterCloseCallback(self) -> None: ...

    def domainEventDeregisterAny(self, number: int) -> None: ...

    def isAlive(self) -> bool:
        return self.alive

    def close(self) -> int:
        self.closed = True
        return 0

    def cut(self) -> None:
        self.alive = False
        self.on_close(self, libvirt.VIR_CONNECT_CLOSE_REASON_EOF, None)


def test_listens_again_after_a_loss_and_says_that_events_may_be_missing() -> None:
    wires: list[Wire] = []
    refusals = iter([False, True, True, False])
    gaps: list[str] = []
    gap = threading.Event()

    def open_libvirt(_uri: str) -> Any:
        if next(refusals):
            raise libvirt_error(38, 7, "Failed to connect socket")
        wires.append(Wire())
        return wires[-1]

    registered: list[Wire] = []

    def register(wire: Any) -> list[int]:
        registered.append(wire)
        return [1]

    def on_gap(reason: str) -> None:
        gaps.append(reason)
        gap.set()

    events = EventConnection("fake", (register,), on_gap=on_gap, open_libvirt=open_libvirt)
    events.start()
    wait_for(lambda: len(registered) == 1, timeout_s=LIMIT_S, what="the first connection")
    assert not gaps
    wires[0].cut()
    assert gap.wait(LIMIT_S)
    assert registered == wires
    assert wires[0].closed
    events.stop()
    assert wires[1].closed
    assert not [thread for thread in threading.enumerate() if thread.name == "libvirt-watch"]


def test_a_registration_that_fails_is_tried_again_with_pauses_and_told(caplog: pytest.LogCaptureFixture) -> None:
    opened, tries = threading.Event(), []

    def register(_wire: Any) -> list[int]:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise libvirt_error(8, 0, "invalid argument: event callback already tracked")
        return [1]

    events = EventConnection("fake", (register,), on_open=opened.set, open_libvirt=lambda _uri: Wire())  # type: ignore[arg-type,return-value]
    events.start()
    assert opened.wait(LIMIT_S)
    events.stop()
    assert len(tries) == 4
    assert min(later - earlier for earlier, later in itertools.pairwise(tries)) > 0.01
    assert len([one for one in caplog.records if "no events yet" in one.getMessage()]) == 3


def test_a_connection_that_was_lost_is_closed_though_the_daemon_cannot_be_told() -> None:
    """Else each restart of libvirt would leave a connection in the agent's memory."""

    class Dead(Wire):
        def domainEventDeregisterAny(self, number: int) -> None:
            raise libvirt_error(1, 7, "internal error: client socket is closed")

    wire = Dead()
    events = EventConnection("fake", (lambda _connection: [1, 2],), open_libvirt=lambda _uri: wire)  # type: ignore[return-value, arg-type]
    events.start()
    wait_for(lambda: wire.on_close is not None, timeout_s=LIMIT_S, what="the connection")
    events.stop()
    assert wire.closed


def test_a_driver_without_events_is_left_alone() -> None:
    events = EventConnection("test:///default", (lambda _connection: pytest.fail("registered"),))
    events.start()
    wait_for(
        lambda: not [thread for thread in threading.enumerate() if thread.name == "libvirt-watch"],
        timeout_s=LIMIT_S,
        what="the end of its thread",
    )
    events.stop()
