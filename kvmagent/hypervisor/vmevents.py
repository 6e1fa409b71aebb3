"""libvirt's events of VMs: started, shut down and by whom, stopped, crashed, paused, resumed, rebooted; and defined.

Source: libvirt virDomainEventType and its details. Callbacks run on the event loop's thread: they hand over at once
and never call libvirt.
"""

import time
from collections.abc import Callable
from typing import Protocol

import libvirt

from kvmagent.model.host import VmEvent, VmEventKind

# What is not here is nothing that happens to a running VM. A QEMU that was killed is STOPPED, with the detail FAILED
# or CRASHED: only a guest that reported its own panic is CRASHED.
_KINDS: dict[int, VmEventKind] = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "paused",
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: "paused",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
}
_DEFINITIONS = (libvirt.VIR_DOMAIN_EVENT_DEFINED, libvirt.VIR_DOMAIN_EVENT_STARTED)
_SHUTDOWN_BY = {libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST: "guest", libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST: "host"}
# After these the VM lives on, elsewhere or later: that the host ended its QEMU is no shutdown.
_LIVES_ON = (libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED)
# QEMU resets more than once for one reboot of a guest: by keyboard controller, ACPI, and again in the firmware.
# The times between grow where the host is busy. A guest needs longer from one reset to the next that is asked for.
_SAME_REBOOT_S = 10.0


class TakesDefinition(Protocol):
    """Takes the UUID of a VM that was defined (`is_new`) or started."""

    def __call__(self, uuid: str, *, is_new: bool) -> None: ...


class VmEvents:
    """Hands each event on as a VmEvent; one reboot once, however many resets it takes.

    `on_definition` hears of VMs that are defined or started. libvirt takes one callback for each kind of event and
    connection: whoever else wants them has to be told from here. Those that `hear` get each lifecycle event with
    libvirt's own numbers.
    """

    def __init__(
        self,
        hand_over: Callable[[VmEvent], None],
        *,
        on_definition: TakesDefinition | None = None,
        hear: tuple[Callable[[libvirt.virDomain, int, int], None], ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hand_over = hand_over
        self._on_definition = on_definition
        self._hear = hear
        self._clock = clock
        # By UUID, when a reboot was handed over; only those that may still come again. Touched by one thread.
        self._rebooted: dict[str, float] = {}
        # By UUID, shutdowns by the host, until the stop that follows says what they were. Touched by the same thread.
        # Observed: libvirt 11.3 tells of them whenever it ends a QEMU, 9.0 does not.
        self._ended_by_host: dict[str, VmEvent] = {}

    def register(self, connection: libvirt.virConnect) -> list[int]:
        """Have a new connection report; return the ids to deregister before it is closed."""
        register = connection.domainEventRegisterAny
        return [
            register(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None),
            register(None, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, self._on_reboot, None),
        ]

    def _on_lifecycle(
        self, _connection: object, domain: libvirt.virDomain, event: int, detail: int, _opaque: object
    ) -> None:
        for hear in self._hear:
            hear(domain, event, detail)
        if self._on_definition is not None and event in _DEFINITIONS:
            self._on_definition(domain.UUIDString(), is_new=event == libvirt.VIR_DOMAIN_EVENT_DEFINED)
        kind = _KINDS.get(event)
        if kind is None:
            return
        by = _SHUTDOWN_BY.get(detail, "") if kind == "shutdown" else ""
        told = VmEvent(name=domain.name(), uuid=domain.UUIDString(), kind=kind, detail=by)
        if by == "host":
            self._ended_by_host[told.uuid] = told
            return
        if kind in ("started", "stopped"):
            ended = self._ended_by_host.pop(told.uuid, None)
            if ended is not None and kind == "stopped" and detail not in _LIVES_ON:
                self._hand_over(ended)
        self._hand_over(told)

    def _on_reboot(self, _connection: object, domain: libvirt.virDomain, _opaque: object) -> None:
        now, uuid = self._clock(), domain.UUIDString()
        self._rebooted = {vm: at for vm, at in self._rebooted.items() if now - at < _SAME_REBOOT_S}
        if uuid not in self._rebooted:
            self._rebooted[uuid] = now
            self._hand_over(VmEvent(name=domain.name(), uuid=uuid, kind="rebooted"))
