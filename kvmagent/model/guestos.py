"""What a guest's operating system is known to support of hotplug. Nothing is assumed about an unknown one.

    Linux      virtio-mem from 5.8 on, 5.16 advised; on Arm from 5.18 on
    Windows    acknowledges a dimm and does not bring it online by itself; gives up no vCPU and no dimm;
               virtio-mem with the viomem driver; but for Server, at most two sockets, Home one
    FreeBSD    takes no plugged memory

Observed by users: kubevirt 14095, virtio-win 1607, cloud-hypervisor 1799 and 1800. Source: Linux 5.8 drivers/virtio.
"""

from collections.abc import Iterator

from kvmagent.model.errors import Code
from kvmagent.model.facts import GuestOs
from kvmagent.model.reply import Blocker, Problem

_VIRTIO_MEM_FROM, _VIRTIO_MEM_ADVISED, _VIRTIO_MEM_FROM_ON_ARM = (5, 8), (5, 16), (5, 18)
_USE_RESTART = 'Use "affect": "config" and power the VM off and on.'


def check_plugs_memory(os: GuestOs | None) -> Iterator[Blocker]:
    """The guest must be able to take plugged memory of any kind."""
    if os is not None and os.family == "freebsd":
        yield _unable(f"{os.name} takes no memory that is plugged while it runs", _USE_RESTART)


def check_virtio_mem(os: GuestOs | None, arch: str) -> Iterator[Blocker]:
    """The guest must be able to take virtio-mem."""
    yield from check_plugs_memory(os)
    needed = _VIRTIO_MEM_FROM_ON_ARM if arch == "aarch64" else _VIRTIO_MEM_FROM
    if os is not None and os.family == "linux" and os.kernel is not None and os.kernel < needed:
        words = f"{os.name} runs Linux {_words(os.kernel)}, virtio-mem needs {_words(needed)}"
        yield _unable(words, 'Use "method": "dimm".')


def check_gives_up(os: GuestOs | None) -> Iterator[Blocker]:
    """The guest must be able to give up vCPUs and dimms."""
    if os is not None and os.family == "windows":
        yield _unable(f"{os.name} gives up neither vCPUs nor dimms while it runs", _USE_RESTART)


def find_limits(os: GuestOs | None, *, dimm: bool, virtio_mem: bool) -> list[Problem]:
    """Return what may keep the guest from using memory of these kinds, without having to."""
    found = []
    if os is not None and os.family == "windows" and dimm:
        message = f"{os.name} acknowledges a plugged dimm, but may not bring it online by itself"
        remedy = "Check in the guest whether it uses the memory; if it does not, restart the guest."
        found.append(Problem(code=Code.GUEST_OS_LIMITED, message=message, remedy=remedy))
    if os is not None and os.family == "windows" and virtio_mem:
        message = f"{os.name} needs a driver for virtio-mem"
        remedy = "Install the viomem driver of virtio-win in the guest."
        found.append(Problem(code=Code.GUEST_OS_LIMITED, message=message, remedy=remedy))
    old = os is not None and os.kernel is not None and _VIRTIO_MEM_FROM <= os.kernel < _VIRTIO_MEM_ADVISED
    if os is not None and os.kernel is not None and os.family == "linux" and old and virtio_mem:
        message = f"{os.name} runs Linux {_words(os.kernel)}, 5.16 or newer is recommended for virtio-mem"
        remedy = "If virtio-mem does not reach its size, run a newer kernel in the guest."
        found.append(Problem(code=Code.GUEST_OS_LIMITED, message=message, remedy=remedy))
    return found


def find_unknown(os: GuestOs | None) -> list[Problem]:
    """Return that nobody knows whether the guest takes the virtio-mem devices that it is to have."""
    if os is not None and os.family is not None:
        return []
    message = "it is unknown whether the guest supports virtio-mem: it does not report its operating system"
    remedy = (
        "Before the restart, make sure that the guest runs Linux 5.8 or newer, or Windows with the viomem driver of "
        "virtio-win: any other guest can then be given no memory while it runs."
    )
    return [Problem(code=Code.GUEST_OS_LIMITED, message=message, remedy=remedy)]


def find_socket_limits(os: GuestOs | None, sockets: int) -> list[Problem]:
    """Return that the guest's edition uses fewer sockets than it would get. Source: Microsoft, "Windows editions"."""
    if os is None or os.family != "windows" or "server" in os.name.lower():
        return []
    most = 1 if "home" in os.name.lower() else 2
    if sockets <= most:
        return []
    message = f"{os.name} uses at most {most} CPU socket{'' if most == 1 else 's'}, the VM is to have up to {sockets}"
    remedy = "Give the VM a <topology> with more cores in each socket before preparing it."
    return [Problem(code=Code.GUEST_OS_LIMITED, message=message, remedy=remedy)]


def _unable(message: str, remedy: str) -> Blocker:
    return Blocker(code=Code.GUEST_OS_UNABLE, message=message, remedy=remedy, needs_restart=True)


def _words(kernel: tuple[int, ...]) -> str:
    return ".".join(map(str, kernel))
