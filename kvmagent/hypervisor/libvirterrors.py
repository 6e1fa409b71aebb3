"""Translates libvirt's errors into the agent's, by (domain, code); never by message text.

Where libvirt gives one code to several causes, planners check the causes first, and what is left is LIBVIRT_REFUSED
with libvirt's own words.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import libvirt

from kvmagent.model.errors import AgentError, Code

# Codes that mean a lost or impossible connection when they come from the RPC layer: internal error, system error,
# and RPC error. Observed: libvirt 9.0, daemon killed, stopped and absent.
_CONNECTION_LOST = {libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_RPC}

_BY_CODE = {
    libvirt.VIR_ERR_NO_DOMAIN: Code.VM_NOT_FOUND,
    libvirt.VIR_ERR_NO_SUPPORT: Code.NOT_SUPPORTED,
    libvirt.VIR_ERR_OPERATION_TIMEOUT: Code.LIBVIRT_BUSY,
    libvirt.VIR_ERR_NO_CONNECT: Code.LIBVIRT_UNAVAILABLE,
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: Code.GUEST_AGENT_UNRESPONSIVE,
    libvirt.VIR_ERR_AGENT_UNSYNCED: Code.GUEST_AGENT_UNRESPONSIVE,
}

# libvirt's access control driver is on, and knows nothing of the agent.
_ACCESS_REMEDY = (
    "Let the agent's user in: install -m 0644 /usr/share/kvmagent/60-kvmagent-access.rules /etc/polkit-1/rules.d/"
)


@contextmanager
def libvirt_errors(doing: str) -> Iterator[None]:
    """Turn a libvirt error inside the block into an AgentError whose message begins with what was being done."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(error, doing) from error


def translate(error: libvirt.libvirtError, doing: str) -> AgentError:
    """Return the AgentError of a libvirt error."""
    code, domain = error.get_error_code(), error.get_error_domain()
    if domain == libvirt.VIR_FROM_RPC and code in _CONNECTION_LOST:
        meaning = Code.LIBVIRT_UNAVAILABLE
    elif domain == libvirt.VIR_FROM_QEMU and code == libvirt.VIR_ERR_SYSTEM_ERROR:
        meaning = Code.VM_CRASHED
    else:
        meaning = _BY_CODE.get(code, Code.LIBVIRT_REFUSED)
    return AgentError(
        meaning,
        f"{doing}: {error.get_error_message() or error}",
        remedy=_ACCESS_REMEDY if code == libvirt.VIR_ERR_ACCESS_DENIED else None,
        details={"libvirtCode": code, "libvirtDomain": domain},
    )
