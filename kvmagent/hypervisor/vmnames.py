"""Names and UUIDs of VMs, as libvirt last reported them. It sends no request."""

import threading

from kvmagent.model.vmname import VmId, dashed_uuid, parse_uuid

# So many VMs no host has; the surplus is of VMs that were deleted.
_MOST = 20000


class VmNames:
    """Thread-safe. A VM that was renamed has its new name from the next observation on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}
        self._uuids: dict[str, str] = {}

    def note(self, vm_uuid: str, name: str) -> None:
        """Take in what was seen."""
        if self._names.get(vm_uuid) == name and self._uuids.get(name) == vm_uuid:
            return
        with self._lock:
            if len(self._names) >= _MOST:
                self._names.clear()
                self._uuids.clear()
            former = self._names.get(vm_uuid)
            if former is not None and self._uuids.get(former) == vm_uuid:
                del self._uuids[former]
            self._names[vm_uuid], self._uuids[name] = name, vm_uuid

    def find(self, vm: str) -> VmId | None:
        """Return the VM of that name or UUID, whichever is looked for first; None where none was seen."""
        bare, dashed = parse_uuid(vm), dashed_uuid(vm)
        with self._lock:
            for vm_uuid in (dashed, self._uuids.get(vm), self._uuids.get(bare or "")):
                if vm_uuid is not None and vm_uuid in self._names:
                    return VmId(vm_uuid, self._names[vm_uuid])
        return None
