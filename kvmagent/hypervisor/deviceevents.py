"""What libvirt tells of a VM's devices: removed, removal refused, size changed.

    performer: watch, then call, then wait        the waiter is in place before the call that fires the event
    libvirt's event loop -- callback --> queue    callbacks only enqueue; they never call libvirt

Events are lost with their connection, so whoever waits also looks at the VM itself now and then.
"""

import contextlib
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import libvirt

EventKind = Literal["removed", "removal-failed", "size-changed"]

_KINDS: dict[int, EventKind] = {
    libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: "removed",
    libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED: "removal-failed",
    libvirt.VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE: "size-changed",
}


@dataclass(frozen=True)
class DeviceEvent:
    """One event of a device, by the device's alias."""

    kind: EventKind
    alias: str


@contextlib.contextmanager
def watch_devices(domain: libvirt.virDomain) -> Iterator["queue.SimpleQueue[DeviceEvent]"]:
    """Collect the device events of one VM, from now until the block ends.

    Raises:
        libvirt.libvirtError: when the connection is lost.
    """
    events = queue.SimpleQueue[DeviceEvent]()
    connection = domain.connect()
    with contextlib.ExitStack() as registered:
        for event_id, kind in _KINDS.items():
            callback_id = connection.domainEventRegisterAny(domain, event_id, _callback(kind, events), None)
            registered.callback(_deregister, connection, callback_id)
        yield events


def _callback(kind: EventKind, events: "queue.SimpleQueue[DeviceEvent]") -> Callable[..., None]:
    return lambda _connection, _domain, alias, *_rest: events.put(DeviceEvent(kind, alias))


def _deregister(connection: libvirt.virConnect, callback_id: int) -> None:
    """A connection that is lost has forgotten its callbacks by itself."""
    with contextlib.suppress(libvirt.libvirtError):
        connection.domainEventDeregisterAny(callback_id)
