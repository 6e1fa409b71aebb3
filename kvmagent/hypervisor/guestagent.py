"""The guest agent's commands, through libvirt: what the guest says of its CPUs and memory,
and bringing them online and offline.

A guest without an agent, or with one that hangs, is normal: it is told as `GuestSilent`, never waited for longer
than `TIMEOUT_S` a call. A command that the agent refuses is told as `CommandRefused`.

Source: QEMU docs/interop/qemu-ga-ref; Observed: qemu-ga 7.2.
"""

import base64
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import libvirt

from kvmagent.meters import Meters, phase
from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import GuestBlock, GuestOs, GuestVcpu
from kvmagent.model.units import KIB

# How long one answer may take. Onlining a chunk of memory blocks is given longer: the guest initialises them.
TIMEOUT_S = 5
ONLINE_TIMEOUT_S = 60
# Blocks onlined by one command, so that a large dimm stays well inside the time limit.
_BLOCKS_AT_ONCE = 64

_FAMILIES: dict[str, Literal["linux", "windows", "freebsd"]] = {"mswindows": "windows", "freebsd": "freebsd"}

_SILENT = {
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: Code.GUEST_AGENT_UNRESPONSIVE,
    libvirt.VIR_ERR_AGENT_UNSYNCED: Code.GUEST_AGENT_UNRESPONSIVE,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: Code.GUEST_AGENT_ABSENT,
    libvirt.VIR_ERR_NO_SUPPORT: Code.GUEST_AGENT_ABSENT,
    libvirt.VIR_ERR_OPERATION_INVALID: Code.VM_NOT_RUNNING,
}


class GuestSilent(AgentError):
    """No agent answers; `code` is one of the GUEST_AGENT codes. Raised by every command."""


class CommandRefused(AgentError):
    """The agent answered, and would not do the command: blocked, unknown, or failed in the guest."""

    def __init__(self, command: str, words: str) -> None:
        super().__init__(Code.GUEST_AGENT_REFUSED, f"{command}: {words}")
        self.command = command
        self.words = words


# Sends one command: (domain, JSON, timeout in seconds, flags) -> JSON. libvirt_qemu.qemuAgentCommand is one.
Send = Callable[[libvirt.virDomain, str, int, int], str]


class GuestAgent:
    """The agent of one running VM. Thread-safe as far as libvirt's domain is; libvirt queues its commands."""

    def __init__(self, domain: libvirt.virDomain, *, send: Send, meters: Meters) -> None:
        self._domain = domain
        self._send = send
        self._meters = meters

    def vcpus(self) -> tuple[GuestVcpu, ...]:
        """Return the CPUs that the guest's kernel lists, by id."""
        listed = self._call("guest-get-vcpus")
        cpus = (
            GuestVcpu(id=cpu["logical-id"], online=cpu["online"], can_offline=cpu.get("can-offline", False))
            for cpu in listed
        )
        return tuple(sorted(cpus, key=lambda cpu: cpu.id))

    def online_vcpus(self, ids: Iterable[int]) -> int:
        """Bring CPUs online and return how many were done: the agent may stop part of the way."""
        wanted = [{"logical-id": number, "online": True} for number in ids]
        return int(self._call("guest-set-vcpus", {"vcpus": wanted}, timeout_s=ONLINE_TIMEOUT_S))

    def offline_vcpus(self, ids: Iterable[int]) -> int:
        """Take CPUs offline and return how many were done."""
        wanted = [{"logical-id": number, "online": False} for number in ids]
        return int(self._call("guest-set-vcpus", {"vcpus": wanted}, timeout_s=ONLINE_TIMEOUT_S))

    def blocks(self) -> tuple[GuestBlock, ...]:
        """Return the memory blocks that the guest's kernel lists, by index."""
        listed = self._call("guest-get-memory-blocks")
        blocks = (
            GuestBlock(index=block["phys-index"], online=block["online"], can_offline=block.get("can-offline", False))
            for block in listed
        )
        return tuple(sorted(blocks, key=lambda block: block.index))

    def block_bytes(self) -> int:
        """Return the size of the guest's memory blocks."""
        return int(self._call("guest-get-memory-block-info")["size"])

    def set_blocks(self, indexes: tuple[int, ...], *, online: bool) -> dict[int, str]:
        """Bring memory blocks online or offline and return those that failed, each with the guest's word for it."""
        failed: dict[int, str] = {}
        for start in range(0, len(indexes), _BLOCKS_AT_ONCE):
            wanted = [{"phys-index": index, "online": online} for index in indexes[start : start + _BLOCKS_AT_ONCE]]
            answers = self._call("guest-set-memory-blocks", {"mem-blks": wanted}, timeout_s=ONLINE_TIMEOUT_S)
            for answer in answers:
                if answer["response"] != "success":
                    errno = f" (errno {answer['error-code']})" if "error-code" in answer else ""
                    failed[answer["phys-index"]] = f"{answer['response']}{errno}"
        return failed

    def meminfo(self) -> dict[str, int]:
        """Return the guest's /proc/meminfo in bytes; empty where the agent may not read files, or it is no Linux."""
        try:
            handle = self._call("guest-file-open", {"path": "/proc/meminfo", "mode": "r"})
        except CommandRefused:
            return {}
        try:
            read = self._call("guest-file-read", {"handle": handle, "count": 4096})
        finally:
            self._call("guest-file-close", {"handle": handle})
        lines = (line.partition(":") for line in base64.b64decode(read["buf-b64"]).decode().splitlines())
        return {name: int(value.split()[0]) * KIB for name, _, value in lines if value.endswith(" kB")}

    def disabled(self) -> frozenset[str]:
        """Return the commands that the agent knows and may not do."""
        known = self._call("guest-info")["supported_commands"]
        return frozenset(command["name"] for command in known if not command["enabled"])

    def os(self) -> GuestOs | None:
        """Return the guest's operating system; None where the agent does not tell.

        Source: QEMU docs/interop/qemu-ga-ref, GuestOSInfo: the id of os-release, "mswindows" for Windows; the kernel's
        release and version are those of uname, and Linux's version alone begins with a number sign.
        """
        try:
            told = self._call("guest-get-osinfo")
        except CommandRefused:
            return None
        release = re.match(r"(\d+)\.(\d+)", told.get("kernel-release", ""))
        name = told.get("pretty-name") or told.get("name") or told.get("id") or "the guest"
        family = _FAMILIES.get(told.get("id", ""))
        if family is None and told.get("kernel-version", "").startswith("#"):
            family = "linux"
        kernel = (int(release.group(1)), int(release.group(2))) if release else None
        return GuestOs(name=name, family=family, kernel=kernel)

    def _call(self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: int = TIMEOUT_S) -> Any:
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        try:
            with phase("guest"):
                answer = self._send(self._domain, json.dumps(request), timeout_s, 0)
        except libvirt.libvirtError as error:
            failure = _translate(command, error)
            self._meters.guest_called(failure.code)
            raise failure from error
        self._meters.guest_called("answered")
        return json.loads(answer)["return"]


def _translate(command: str, error: libvirt.libvirtError) -> AgentError:
    words = error.get_error_message()
    if error.get_error_domain() == libvirt.VIR_FROM_RPC:
        return AgentError(Code.LIBVIRT_UNAVAILABLE, f"{command}: {words}")
    if silence := _SILENT.get(error.get_error_code()):
        return GuestSilent(silence, words)
    return CommandRefused(command, words)
