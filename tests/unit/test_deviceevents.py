"""libvirt's events reach those who watch the VM, and nobody else."""

import queue

import libvirt
import pytest

from kvmagent.hypervisor.deviceevents import DeviceEvent, DeviceEvents
from tests.fakes.agent import make_domain
from tests.fakes.libvirt import FakeConnection
from tests.lab.domainxml import GuestSpec


@pytest.mark.parametrize(
    ("number", "arguments", "event"),
    [
        (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, ("dimm0",), DeviceEvent("removed", "dimm0")),
        (libvirt.VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE, ("mem0", 1), DeviceEvent("size-changed", "mem0")),
        (libvirt.VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE, (262144,), DeviceEvent("balloon-changed", "")),
    ],
)
def test_an_event_wakes_those_who_watch_its_vm(number: int, arguments: tuple[object, ...], event: DeviceEvent) -> None:
    watched = make_domain(GuestSpec(name="vm1"))
    connection, events = FakeConnection(watched), DeviceEvents()
    events.register(connection)
    (tell,) = [callback for event_id, callback in connection.callbacks.values() if event_id == number]
    with events.watch(watched.UUIDString()) as mine, events.watch("another") as others:
        tell(watched, *arguments, None)
        assert mine.get_nowait() == event
        with pytest.raises(queue.Empty):
            others.get_nowait()


@pytest.mark.parametrize("version", [9_000_000, 12_004_000])
def test_a_removed_vcpu_wakes_where_libvirt_tells_of_it(version: int) -> None:
    """libvirt-python may have been built before libvirt, and libvirtd be older than both."""
    watched = make_domain(GuestSpec(name="vm1"))
    connection, events = FakeConnection(watched), DeviceEvents(vcpu_removed=28)
    connection.lib_version = version
    events.register(connection)
    told = [callback for event_id, callback in connection.callbacks.values() if event_id == 28]
    assert len(told) == (version >= 12_004_000)
    with events.watch(watched.UUIDString()) as mine:
        for tell in told:
            tell(watched, 3, None)
            assert mine.get_nowait() == DeviceEvent("vcpu-removed", "")
