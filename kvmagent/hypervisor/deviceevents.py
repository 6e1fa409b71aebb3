"""libvirt's events of devices: removed, removal refused, size changed, balloon changed, vCPU removed.

    libvirt's event loop -- callback --> queues of those who watch that VM
    performer: watch, then call, then wait        the waiter is in place before the call that fires the event
    refused later than its performer waited       on_refused, which tasks.pendingremovals notes down

Callbacks run on the event loop's thread: they put into queues and never call libvirt. Events are lost with their
connection, so whoever waits also reads the VM itself now and then.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import libvirt

EventKind = Literal["removed", "removal-failed", "size-changed", "balloon-changed", "vcpu-removed"]
# A libvirt-python that was built before libvirt 12.4 cannot report removed vCPUs: whoever waits for one reads the VM.
_VCPU_REMOVED: int | None = getattr(libvirt, "VIR_DOMAIN_EVENT_ID_VCPU_REMOVED", None)
_VCPU_REMOVALS_SINCE = 12_004_000


def has_vcpu_removals(connection: libvirt.virConnect) -> bool:
    """Return whether this libvirt asks for vCPUs back without waiting, and reports each that is removed."""
    return bool(connection.getLibVersion() >= _VCPU_REMOVALS_SINCE)


@dataclass(frozen=True)
class DeviceEvent:
    """One event of a device of a VM, by the device's alias; the balloon and a vCPU that was removed have none."""

    kind: EventKind
    alias: str


class DeviceEvents:
    """Thread-safe. `on_refused` hears of each removal that a guest refused, watched or not: VM's UUID and alias.

    `on_event` hears of each event, watched or not: the VM's UUID.
    `vcpu_removed` is libvirt's number of that event; None where libvirt-python does not know it.
    """

    def __init__(
        self,
        on_refused: Callable[[str, str], None] = lambda _uuid, _alias: None,
        *,
        on_event: Callable[[str], None] = lambda _uuid: None,
        vcpu_removed: int | None = _VCPU_REMOVED,
    ) -> None:
        self._on_refused = on_refused
        self._on_event = on_event
        self._vcpu_removed = vcpu_removed
        self._lock = threading.Lock()
        self._watchers: list[tuple[str, queue.SimpleQueue[DeviceEvent]]] = []

    def register(self, connection: libvirt.virConnect) -> list[int]:
        """Have a new connection report; return the ids to deregister before it is closed."""
        kinds: dict[int, EventKind] = {
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: "removed",
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED: "removal-failed",
            libvirt.VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE: "size-changed",
            libvirt.VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE: "balloon-changed",
        }
        if self._vcpu_removed is not None and has_vcpu_removals(connection):
            kinds[self._vcpu_removed] = "vcpu-removed"
        return [
            connection.domainEventRegisterAny(None, event_id, self._callback(kind), None)
            for event_id, kind in kinds.items()
        ]

    @contextlib.contextmanager
    def watch(self, uuid: str) -> Iterator["queue.SimpleQueue[DeviceEvent]"]:
        """Collect the events of one VM, from now until the block ends."""
        watcher = (uuid, queue.SimpleQueue[DeviceEvent]())
        with self._lock:
            self._watchers.append(watcher)
        try:
            yield watcher[1]
        finally:
            with self._lock:
                self._watchers.remove(watcher)

    def put(self, uuid: str, event: DeviceEvent) -> None:
        """Hand an event to those who watch its VM."""
        self._on_event(uuid)
        with self._lock:
            for watched, events in self._watchers:
                if watched == uuid:
                    events.put(event)
        if event.kind == "removal-failed":
            self._on_refused(uuid, event.alias)

    def _callback(self, kind: EventKind) -> Callable[..., None]:
        def callback(_connection: object, domain: libvirt.virDomain, about: object, *_rest: object) -> None:
            self.put(domain.UUIDString(), DeviceEvent(kind, about if isinstance(about, str) else ""))

        return callback
