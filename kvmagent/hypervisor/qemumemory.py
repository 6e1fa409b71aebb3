"""What memory devices QEMU has, past libvirt: one that libvirt does not know is left where libvirtd was killed in an
attach. From then on libvirt takes that device's slot for free, and QEMU refuses it. A little earlier in an attach, QEMU
has only the device's memory, under a name that the next attach of this device needs.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import libvirt
import msgspec

from kvmagent.hypervisor.libvirterrors import translate
from kvmagent.model.errors import Code
from kvmagent.model.facts import Definition, MemoryDevice

# As libvirt_qemu.qemuMonitorCommand: domain, request, flags.
AskQemu = Callable[[Any, str, int], str]
Answered = TypeVar("Answered")

_REQUEST = '{"execute": "query-memory-devices"}'


class _Data(msgspec.Struct, rename="kebab"):
    """Source: QEMU qapi/machine.json, PCDIMMDeviceInfo and VirtioMEMDeviceInfo."""

    id: str = ""
    size: int = 0
    node: int | None = None
    slot: int | None = None
    addr: int | None = None
    memaddr: int | None = None
    max_size: int = 0
    requested_size: int = 0
    block_size: int | None = None


class _Device(msgspec.Struct):
    type: str
    data: _Data


class _Answer(msgspec.Struct):
    returned: list[_Device] = msgspec.field(name="return", default_factory=list)


class _Done(msgspec.Struct):
    error: msgspec.Raw | None = None


# Made here and once, for the reason that model.decoders gives.
_ANSWER = msgspec.json.Decoder(_Answer)
_DONE = msgspec.json.Decoder(_Done)


def ask_devices(domain: libvirt.virDomain, ask: AskQemu) -> tuple[MemoryDevice, ...] | None:
    """Return the memory devices that QEMU has; None where it cannot be asked.

    Raises:
        AgentError: LIBVIRT_UNAVAILABLE.
    """
    return ask_qemu(
        lambda: tuple(map(_read, _ANSWER.decode(ask(domain, _REQUEST, 0)).returned)),
        "asking QEMU for its memory devices",
    )


def remove_backend(domain: libvirt.virDomain, alias: str, ask: AskQemu) -> bool:
    """Remove a device's memory from QEMU; return whether it was there and no device used it, else QEMU refuses.

    Source: libvirt names it `mem` and the alias (qemuDomainAttachMemory); QEMU qapi/qom.json, object-del.

    Raises:
        AgentError: LIBVIRT_UNAVAILABLE.
    """
    request = json.dumps({"execute": "object-del", "arguments": {"id": f"mem{alias}"}})
    answer = ask_qemu(lambda: _DONE.decode(ask(domain, request, 0)), "removing memory that no device uses from QEMU")
    return answer is not None and answer.error is None


def ask_qemu(question: Callable[[], Answered | None], doing: str) -> Answered | None:
    """Return what a question to QEMU's monitor gives; None where it cannot be asked, or answers something else.

    Raises:
        AgentError: LIBVIRT_UNAVAILABLE.
    """
    try:
        return question()
    except libvirt.libvirtError as error:
        failure = translate(error, doing)
        if failure.code is Code.LIBVIRT_UNAVAILABLE:
            raise failure from error
        return None
    except msgspec.MsgspecError:
        return None


def _read(device: _Device) -> MemoryDevice:
    data = device.data
    if device.type == "virtio-mem":
        return MemoryDevice(
            model="virtio-mem",
            size_bytes=data.max_size,
            node=data.node,
            alias=data.id,
            base=data.memaddr,
            requested_bytes=data.requested_size,
            current_bytes=data.size,
            block_bytes=data.block_size,
        )
    return MemoryDevice(
        model=device.type, size_bytes=data.size, node=data.node, alias=data.id, slot=data.slot, base=data.addr
    )


def add_unknown(live: Definition, devices: tuple[MemoryDevice, ...]) -> Definition:
    """Return a running VM's definition with what QEMU has beside it."""
    known = {device.alias for device in live.devices}
    unknown = tuple(msgspec.structs.replace(device, known=False) for device in devices if device.alias not in known)
    return msgspec.structs.replace(
        live,
        devices=live.devices + unknown,
        total_bytes=live.total_bytes + sum(device.size_bytes for device in unknown),
    )
