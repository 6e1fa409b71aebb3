"""What libvirt tells of VMs: started, stopped, crashed, paused, resumed, shut down by the guest, rebooted.

Source: libvirt virDomainEventType and its details. Callbacks run on the event loop's thread: they hand over at once
and never call libvirt.
"""

from collections.abc import Callable

import libvirt

from kvmagent.model.host import VmEvent

# By event, and by detail where the detail decides; what is not here changes no state that anybody is told of.
_KINDS: dict[int, dict[int | None, str]] = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: {None: "started"},
    libvirt.VIR_DOMAIN_EVENT_RESUMED: {None: "resumed"},
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: {None: "paused"},
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: {None: "paused"},
    libvirt.VIR_DOMAIN_EVENT_CRASHED: {None: "crashed"},
    libvirt.VIR_DOMAIN_EVENT_STOPPED: {None: "stopped", libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "crashed"},
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: {libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST: "shutdown-by-guest"},
}


class VmEvents:
    """Hands each event on as a VmEvent."""

    def __init__(self, hand_over: Callable[[VmEvent], None]) -> None:
        self._hand_over = hand_over

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
        kinds = _KINDS.get(event, {})
        kind = kinds.get(detail, kinds.get(None))
        if kind is not None:
            self._hand_over(VmEvent(name=domain.name(), uuid=domain.UUIDString(), kind=kind))

    def _on_reboot(self, _connection: object, domain: libvirt.virDomain, _opaque: object) -> None:
        self._hand_over(VmEvent(name=domain.name(), uuid=domain.UUIDString(), kind="rebooted"))
