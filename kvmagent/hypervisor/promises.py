"""Reads how much of the host's memory running VMs may use. Waits for no QEMU."""

import libvirt
import msgspec

from kvmagent.hypervisor.definitions import Definitions
from kvmagent.hypervisor.libvirterrors import libvirt_errors, translate
from kvmagent.logs import Log
from kvmagent.model.errors import Code
from kvmagent.model.facts import Definition, Domain
from kvmagent.model.hostbudget import NORMAL_PAGES, Part, Promise, make_promise
from kvmagent.model.units import KIB

log = Log(__name__)

# In place of the sizes that show whether a VM has changed, where they were not read or do not show it: they do not have
# what is requested of a virtio-mem device.
_UNTOLD = (None,)
_ENDED = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)


class ReadVm(msgspec.Struct, frozen=True, gc=False):
    """One run of a VM as it was read: libvirt's number of it, its sizes then, and what they and its definition say."""

    number: int
    sizes: tuple[int | None, ...]
    promise: Promise


def read_vms(
    connection: libvirt.virConnect,
    known: dict[str, ReadVm],
    default_page_bytes: int | None,
    definitions: Definitions,
) -> dict[str, ReadVm | None]:
    """Return every running VM, None for one that ends meanwhile. One of the same run and sizes is as it was `known`.

    Raises:
        AgentError: libvirt's errors.
    """
    with libvirt_errors("reading the VMs' memory"):
        found = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
    uuids = [domain.UUIDString() for domain in found]
    return {
        uuid: _read(domain, known.get(uuid), default_page_bytes, definitions)
        for uuid, domain in zip(uuids, found, strict=True)
    }


def find_vm(
    connection: libvirt.virConnect, uuid: str, default_page_bytes: int | None, definitions: Definitions
) -> ReadVm | None:
    """Return one VM, its definition read; None if it does not run.

    Raises:
        AgentError: libvirt's errors.
    """
    try:
        domain = connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if _is_ended(error):
            return None
        raise translate(error, "reading a VM") from error
    return _read(domain, None, default_page_bytes, definitions) if domain.ID() >= 0 else None


def make_read(domain: Domain, live: Definition, default_page_bytes: int | None) -> ReadVm:
    """Return a running VM as somebody else has read it, in libvirt alone."""
    promise = make_promise(domain.uuid, domain.name, live, default_page_bytes=default_page_bytes)
    return ReadVm(live.domain_id or 0, _UNTOLD, promise)


def _read(
    domain: libvirt.virDomain, known: ReadVm | None, page_bytes: int | None, definitions: Definitions
) -> ReadVm | None:
    """Return a running VM; as it was known if neither run nor sizes have changed. None if it has ended.

    Raises:
        AgentError: libvirt's errors.
    """
    number = domain.ID()
    try:
        _, maximum_kib, current_kib, vcpus, _ = domain.info()
    except libvirt.libvirtError as error:
        if _is_ended(error):
            return None
        raise translate(error, "reading a VM") from error
    sizes = (current_kib, maximum_kib, vcpus)
    if known is not None and (known.number, known.sizes) == (number, sizes) and None not in sizes:
        return known
    uuid, name = domain.UUIDString(), domain.name()
    try:
        live, _ = definitions.read_live(uuid, domain.XMLDesc(0))
        promise = make_promise(uuid, name, live, default_page_bytes=page_bytes)
    except (libvirt.libvirtError, ValueError) as error:
        if _is_ended(error):
            return None
        problem = translate(error, "reading a VM") if isinstance(error, libvirt.libvirtError) else None
        if problem is not None and problem.code is Code.LIBVIRT_UNAVAILABLE:
            raise problem from error
        log.warning("definition of a VM cannot be read, its maximum counts", vm=name, error=str(error))
        # With all that libvirt says it has: it fails the budget of no other.
        part = Part(0, NORMAL_PAGES, frozenset(), maximum_kib * KIB)
        return ReadVm(number, sizes, Promise(uuid, name, (part,), vcpus=vcpus))
    return ReadVm(number, _UNTOLD if live.virtio_mems else sizes, promise)


def _is_ended(error: Exception) -> bool:
    """Return whether it says that the VM has ended since it was listed."""
    return isinstance(error, libvirt.libvirtError) and error.get_error_code() in _ENDED
