"""The guest agent's commands, through libvirt: what the guest says of its CPUs and memory,
and bringing them online and offline.

What a guest says is a claim of its owner's: it is read into typed, bounded structs, and what does not fit is silence
(GUEST_AGENT_INVALID). No number of the guest's sizes an allocation.

A guest without an agent, or with one that hangs, is normal: it is raised as `GuestSilent`, never waited for longer
than `TIMEOUT_S` a call. A command that the agent refuses is raised as `CommandRefused`.

Source: QEMU docs/interop/qemu-ga-ref; Observed: qemu-ga 7.2.
"""

import base64
import json
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Generic, Literal, TypeVar

import libvirt
import msgspec

from kvmagent.model.errors import AgentError, Code
from kvmagent.model.facts import GuestBlock, GuestOs, GuestVcpu
from kvmagent.model.units import KIB, MIB
from kvmagent.recorder import Recorder, phase

# How long one answer may take. Onlining a chunk of memory blocks is given longer: the guest initialises them.
TIMEOUT_S = 5
ONLINE_TIMEOUT_S = 60
# Blocks onlined by one command, so that a large dimm stays well inside the time limit.
_BLOCKS_AT_ONCE = 64
# The longest answer that is read: room for 65536 memory blocks. libvirt itself stops at 10 MiB.
_LONGEST_ANSWER = 4 * MIB
_MOST_CPUS, _MOST_BLOCKS = 8192, 65536
# The smallest section of any architecture is 1 MiB; what the largest block is, model.machines says of each VM.
_SMALLEST_BLOCK_BYTES = 1 * MIB
# No architecture addresses more.
_ADDRESS_BITS = 52
_LONGEST_WORDS = 300

_FAMILIES: dict[str, Literal["linux", "windows", "freebsd"]] = {"mswindows": "windows", "freebsd": "freebsd"}

_SILENT = {
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: Code.GUEST_AGENT_UNRESPONSIVE,
    libvirt.VIR_ERR_AGENT_UNSYNCED: Code.GUEST_AGENT_UNRESPONSIVE,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: Code.GUEST_AGENT_ABSENT,
    libvirt.VIR_ERR_NO_SUPPORT: Code.GUEST_AGENT_ABSENT,
    libvirt.VIR_ERR_OPERATION_INVALID: Code.VM_NOT_RUNNING,
}
# What libvirt-python raises for an answer that is no UTF-8, or for libvirt's own words about it.
# Observed: libvirt-python 9.0 with an error handler, "returned a result with an exception set".
NOT_TEXT = (UnicodeDecodeError, SystemError)
_MEMINFO = re.compile(r"^(Mem\w+): {1,30}(\d{1,12}) kB$", re.MULTILINE | re.ASCII)


class _Answer(msgspec.Struct, frozen=True, rename="kebab"):
    """A part of an answer: what is not declared is ignored."""


_CpuId = Annotated[int, msgspec.Meta(ge=0, lt=65536)]
_BlockIndex = Annotated[int, msgspec.Meta(ge=0, lt=(1 << _ADDRESS_BITS) // _SMALLEST_BLOCK_BYTES)]
_Words = Annotated[str, msgspec.Meta(max_length=_LONGEST_WORDS, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]


class _Vcpu(_Answer, frozen=True, rename="kebab"):
    logical_id: _CpuId
    online: bool
    can_offline: bool = False


class _Block(_Answer, frozen=True, rename="kebab"):
    phys_index: _BlockIndex
    online: bool
    can_offline: bool = False


class _BlockInfo(_Answer, frozen=True, rename="kebab"):
    size: Annotated[int, msgspec.Meta(ge=_SMALLEST_BLOCK_BYTES, le=1 << _ADDRESS_BITS)]


class _BlockDone(_Answer, frozen=True, rename="kebab"):
    phys_index: _BlockIndex
    response: Literal["success", "not-found", "operation-not-supported", "operation-failed"]
    error_code: Annotated[int, msgspec.Meta(ge=-65536, le=65536)] | None = None


class _FileRead(_Answer, frozen=True, rename="kebab"):
    buf_b64: Annotated[str, msgspec.Meta(max_length=16384)]


class _AgentCommand(_Answer, frozen=True, rename="kebab"):
    name: _Words
    enabled: bool


class _AgentInfo(msgspec.Struct, frozen=True):
    supported_commands: Annotated[tuple[_AgentCommand, ...], msgspec.Meta(max_length=1024)]


class _OsInfo(_Answer, frozen=True, rename="kebab"):
    id: _Words = ""
    name: _Words = ""
    pretty_name: _Words = ""
    kernel_release: _Words = ""
    kernel_version: _Words = ""


T = TypeVar("T")


class _Returned(msgspec.Struct, Generic[T], frozen=True):
    value: T = msgspec.field(name="return")


class _Decoder(Generic[T]):
    """Reads one kind of answer; what does not fit is no answer."""

    def __init__(self, kind: Any) -> None:
        # Made once, before the first thread is there.
        self._decoder: msgspec.json.Decoder[_Returned[T]] = msgspec.json.Decoder(_Returned[kind])

    def decode(self, command: str, text: str) -> T:
        """Return what the guest answered.

        Raises:
            GuestSilent: GUEST_AGENT_INVALID.
        """
        if len(text) > _LONGEST_ANSWER:
            raise invalid(command, f"{len(text)} characters, at most {_LONGEST_ANSWER} are read")
        try:
            return self._decoder.decode(text).value
        # Text that is no UTF-8 is a ValueError, depth a RecursionError.
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise invalid(command, str(error)) from error


_VCPUS = _Decoder[tuple[_Vcpu, ...]](Annotated[tuple[_Vcpu, ...], msgspec.Meta(max_length=_MOST_CPUS)])
_CPUS_DONE = _Decoder[int](Annotated[int, msgspec.Meta(ge=0, le=_MOST_CPUS)])
_BLOCKS = _Decoder[tuple[_Block, ...]](Annotated[tuple[_Block, ...], msgspec.Meta(max_length=_MOST_BLOCKS)])
_BLOCK_INFO = _Decoder[_BlockInfo](_BlockInfo)
_BLOCKS_DONE = _Decoder[tuple[_BlockDone, ...]](
    Annotated[tuple[_BlockDone, ...], msgspec.Meta(max_length=_BLOCKS_AT_ONCE)]
)
_HANDLE = _Decoder[int](Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)])
_FILE_READ = _Decoder[_FileRead](_FileRead)
_FREEZE_STATUS = _Decoder[str](_Words)
_NOTHING = _Decoder[_Answer](_Answer)
_AGENT_INFO = _Decoder[_AgentInfo](_AgentInfo)
_OS_INFO = _Decoder[_OsInfo](_OsInfo)


class GuestSilent(AgentError):
    """No agent answers, or not in a form that can be read; `code` is one of the GUEST_AGENT codes.

    Raised by every command.
    """


def invalid(command: str, why: str) -> GuestSilent:
    """Return the error of an answer that does not fit: nothing of it is believed."""
    return GuestSilent(Code.GUEST_AGENT_INVALID, f"the answer to {command} cannot be used: {clean(why)}")


def clean(words: str) -> str:
    """Return words that a guest may have chosen, fit to be logged and shown: of bounded length, without controls."""
    return "".join(one if one.isprintable() else "?" for one in words[:_LONGEST_WORDS])


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

    def __init__(self, domain: libvirt.virDomain, *, send: Send, recorder: Recorder) -> None:
        self._domain = domain
        self._send = send
        self._recorder = recorder

    def vcpus(self) -> tuple[GuestVcpu, ...]:
        """Return the CPUs that the guest's kernel lists, by id."""
        command = "guest-get-vcpus"
        listed = self._call(_VCPUS, command)
        _check_distinct(command, [cpu.logical_id for cpu in listed])
        cpus = (GuestVcpu(id=cpu.logical_id, online=cpu.online, can_offline=cpu.can_offline) for cpu in listed)
        return tuple(sorted(cpus, key=lambda cpu: cpu.id))

    def online_vcpus(self, ids: Iterable[int]) -> int:
        """Bring CPUs online and return how many were done: the agent may stop part of the way."""
        return self._set_vcpus(ids, online=True)

    def offline_vcpus(self, ids: Iterable[int]) -> int:
        """Take CPUs offline and return how many were done."""
        return self._set_vcpus(ids, online=False)

    def blocks(self) -> tuple[GuestBlock, ...]:
        """Return the memory blocks that the guest's kernel lists, by index."""
        command = "guest-get-memory-blocks"
        listed = self._call(_BLOCKS, command)
        _check_distinct(command, [block.phys_index for block in listed])
        blocks = (
            GuestBlock(index=block.phys_index, online=block.online, can_offline=block.can_offline) for block in listed
        )
        return tuple(sorted(blocks, key=lambda block: block.index))

    def block_bytes(self, memory_bytes: int, most_bytes: int) -> int:
        """Return the size of the guest's memory blocks, `most_bytes` at most.

        `memory_bytes` is what the VM has, which its guest has to list.
        """
        command = "guest-get-memory-block-info"
        size = self._call(_BLOCK_INFO, command).size
        if size & (size - 1):
            raise invalid(command, f"a block size of {size} is no power of two")
        if size > most_bytes:
            raise invalid(command, f"a block size of {size}, which no kernel has in a VM like this")
        if memory_bytes // size > _MOST_BLOCKS:
            raise invalid(command, f"a block size of {size} makes more than {_MOST_BLOCKS} blocks of {memory_bytes}")
        return size

    def set_blocks(self, indexes: tuple[int, ...], *, online: bool) -> dict[int, str]:
        """Bring memory blocks online or offline and return those that failed, each with the guest's word for it."""
        command, failed = "guest-set-memory-blocks", dict[int, str]()
        for start in range(0, len(indexes), _BLOCKS_AT_ONCE):
            asked = indexes[start : start + _BLOCKS_AT_ONCE]
            wanted = [{"phys-index": index, "online": online} for index in asked]
            answers = self._call(_BLOCKS_DONE, command, {"mem-blks": wanted}, timeout_s=ONLINE_TIMEOUT_S)
            if not {answer.phys_index for answer in answers} <= set(asked):
                raise invalid(command, "it has blocks that were not requested")
            for answer in answers:
                if answer.response != "success":
                    errno = "" if answer.error_code is None else f" (errno {answer.error_code})"
                    failed[answer.phys_index] = f"{answer.response}{errno}"
        return failed

    def meminfo(self) -> dict[str, int]:
        """Return the guest's /proc/meminfo in bytes; empty where the agent may not read files, or it is no Linux."""
        command = "guest-file-read"
        try:
            handle = self._call(_HANDLE, "guest-file-open", {"path": "/proc/meminfo", "mode": "r"})
        except CommandRefused:
            return {}
        try:
            read = self._call(_FILE_READ, command, {"handle": handle, "count": 4096})
        finally:
            self._call(_NOTHING, "guest-file-close", {"handle": handle})
        try:
            text = base64.b64decode(read.buf_b64, validate=True).decode()
        except ValueError as error:
            raise invalid(command, str(error)) from error
        return {name: int(kib) * KIB for name, kib in _MEMINFO.findall(text)}

    def disabled(self) -> frozenset[str]:
        """Return the commands that the agent knows and may not do."""
        known = self._call(_AGENT_INFO, "guest-info").supported_commands
        return frozenset(command.name for command in known if not command.enabled)

    def is_frozen(self) -> bool:
        """Return whether the guest's filesystems are frozen, when the agent refuses all but thawing them."""
        try:
            return self._call(_FREEZE_STATUS, "guest-fsfreeze-status") == "frozen"
        except CommandRefused:
            return False

    def os(self) -> GuestOs | None:
        """Return the guest's operating system; None if the agent does not report it.

        Source: QEMU docs/interop/qemu-ga-ref, GuestOSInfo: the id of os-release, "mswindows" for Windows; the kernel's
        release and version are those of uname, and Linux's version alone begins with a number sign.
        """
        try:
            told = self._call(_OS_INFO, "guest-get-osinfo")
        except CommandRefused:
            return None
        release = re.match(r"(\d{1,5})\.(\d{1,5})", told.kernel_release, re.ASCII)
        family = _FAMILIES.get(told.id)
        if family is None and told.kernel_version.startswith("#"):
            family = "linux"
        kernel = (int(release.group(1)), int(release.group(2))) if release else None
        name = clean(told.pretty_name or told.name or told.id or "the guest")
        return GuestOs(name=name, family=family, kernel=kernel)

    def _set_vcpus(self, ids: Iterable[int], *, online: bool) -> int:
        command = "guest-set-vcpus"
        wanted = [{"logical-id": number, "online": online} for number in ids]
        done = self._call(_CPUS_DONE, command, {"vcpus": wanted}, timeout_s=ONLINE_TIMEOUT_S)
        if done > len(wanted):
            raise invalid(command, f"{done} of {len(wanted)} CPUs")
        return done

    def _call(
        self, decoder: _Decoder[T], command: str, arguments: dict[str, Any] | None = None, *, timeout_s: int = TIMEOUT_S
    ) -> T:
        request: dict[str, Any] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        try:
            with phase("guest"):
                text = self._send(self._domain, json.dumps(request), timeout_s, 0)
            answer = decoder.decode(command, text)
        except NOT_TEXT as error:
            self._recorder.guest_called(Code.GUEST_AGENT_INVALID)
            raise invalid(command, "text that is not UTF-8") from error
        except GuestSilent as failure:
            self._recorder.guest_called(failure.code)
            raise
        except libvirt.libvirtError as error:
            translated = _translate(command, error)
            self._recorder.guest_called(translated.code)
            raise translated from error
        self._recorder.guest_called("answered")
        return answer


def _check_distinct(command: str, ids: list[int]) -> None:
    if len(set(ids)) != len(ids):
        raise invalid(command, "one is listed twice")


def _translate(command: str, error: libvirt.libvirtError) -> AgentError:
    words = clean(error.get_error_message() or "")
    if error.get_error_domain() == libvirt.VIR_FROM_RPC:
        return AgentError(Code.LIBVIRT_UNAVAILABLE, f"{command}: {words}")
    if silence := _SILENT.get(error.get_error_code()):
        return GuestSilent(silence, words)
    return CommandRefused(command, words)
