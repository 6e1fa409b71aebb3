"""Looks at libvirt once, for a doctor: can it be reached, what is it, and do the guests' agents answer?

On a connection of its own, which is opened and closed here: an agent may run beside it, or none.
"""

import contextlib
import errno
import time
from collections.abc import Iterator

import libvirt
import libvirt_qemu
import msgspec

from kvmagent.hypervisor.domainxml import is_agent_connected, parse_definition
from kvmagent.hypervisor.guestagent import NOT_TEXT, clean
from kvmagent.hypervisor.libvirterrors import libvirt_errors, translate
from kvmagent.model.errors import AgentError, Code

# One guest agent that hangs costs so long; all together no more than the second: the others are then not asked.
_PING_S, _PINGS_S = 2, 20.0
_DENIED = {libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED, libvirt.VIR_ERR_AUTH_UNAVAILABLE}

#: Why a guest says nothing that has no agent, as far as libvirt knows.
NO_CHANNEL, NOT_CONNECTED = "the VM has no guest-agent channel", "no guest agent is connected"

Version = tuple[int, int, int]


class ProbedVm(msgspec.Struct, frozen=True):
    """A running VM: how it is run ("kvm", "qemu"), and why its guest agent says nothing (empty: it answers).

    `boot_bytes` is the memory that it was started with, `plugged_bytes` what its memory devices give beside that.
    """

    name: str
    hypervisor: str
    silence: str
    boot_bytes: int = 0
    plugged_bytes: int = 0


class Probe(msgspec.Struct, frozen=True):
    """What was found. `offers_kvm`: libvirt would run a VM with KVM; `hypervisor` is QEMU's version."""

    libvirt: Version
    hypervisor: Version
    driver: str
    offers_kvm: bool
    running: tuple[ProbedVm, ...]
    vms: int


def probe(uri: str) -> Probe:
    """Return what is found at a URI. May hang as long as libvirt does.

    Raises:
        AgentError: LIBVIRT_UNAVAILABLE, with a remedy for what stands in the way; other libvirt errors.
    """
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    with _open(uri) as connection, libvirt_errors("looking at libvirt"):
        domains = connection.listAllDomains()
        running = [domain for domain in domains if domain.isActive()]
        _check_access(connection)
        return Probe(
            libvirt=_version(connection.getLibVersion()),
            hypervisor=_version(connection.getVersion()),
            driver=connection.getType(),
            offers_kvm="<domain type='kvm'" in connection.getCapabilities(),
            running=tuple(_probe_vms(running)),
            vms=len(domains),
        )


def _check_access(connection: libvirt.virConnect) -> None:
    """Raise where libvirt's access control allows no more than reading, which the other calls here do not show."""
    try:
        connection.getDomainCapabilities()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_ACCESS_DENIED:
            raise


@contextlib.contextmanager
def _open(uri: str) -> Iterator[libvirt.virConnect]:
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        failure = translate(error, f"connecting to {uri}")
        denied = error.get_error_code() in _DENIED or error.get_int1() in (errno.EACCES, errno.EPERM)
        remedy = (
            "Let the user in: usermod -aG libvirt USER, and conf/50-kvmagent.rules in /etc/polkit-1/rules.d."
            if denied
            else "Start it: systemctl start libvirtd (or virtqemud.socket); libvirt.uri in the configuration names it."
        )
        raise AgentError(Code.LIBVIRT_UNAVAILABLE, failure.message, remedy=remedy) from error
    try:
        yield connection
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connection.close()


def _probe_vms(domains: list[libvirt.virDomain]) -> Iterator[ProbedVm]:
    end_at = time.monotonic() + _PINGS_S
    for domain in domains:
        try:
            xml, name = domain.XMLDesc(0), domain.name()
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                continue  # deleted since it was listed
            raise
        live = parse_definition(xml)
        connected = is_agent_connected(xml)
        if connected is None:
            silence = NO_CHANNEL
        elif not connected:
            silence = NOT_CONNECTED
        else:
            silence = _ping(domain) if time.monotonic() < end_at else ""
        yield ProbedVm(
            name=name,
            hypervisor=live.hypervisor,
            silence=silence,
            boot_bytes=live.boot_bytes,
            plugged_bytes=live.memory_bytes - live.boot_bytes,
        )


def _ping(domain: libvirt.virDomain) -> str:
    try:
        libvirt_qemu.qemuAgentCommand(domain, '{"execute": "guest-ping"}', _PING_S, 0)
    except libvirt.libvirtError as error:
        return f"the guest agent does not answer: {clean(error.get_error_message() or '')}"
    except NOT_TEXT:
        return "the guest agent answers with text that is not UTF-8"
    return ""


def _version(number: int) -> Version:
    """libvirt packs a version into one number: 9000000 is 9.0.0."""
    return number // 1000000, number // 1000 % 1000, number % 1000
