"""A libvirt of the tests: connections, domains and guests with the errors of libvirt 9.0 with QEMU 7.2.

It keeps domains as XML, live and persistent, as libvirt does, so that hypervisor/ runs on it unchanged. What it
models is what tests/contract holds both it and the lab to; nothing else of libvirt is here.
"""

from __future__ import annotations

import base64
import copy
import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import libvirt
from lxml import etree

LIVE, CONFIG = libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG
#: libvirt 12.4's VIR_DOMAIN_VCPU_ASYNC_UNPLUG.
ASYNC_UNPLUG = 1 << 5
KIB, MIB = 1024, 1024 * 1024
#: Where the fake has the one virtio-mem device of a domain.
VIRTIO_MEM_BASE = 1 << 40
#: Where QEMU's q35 puts the first dimm of a guest that has less than 2 GiB.
FIRST_DIMM_BASE = 4 * 1024 * MIB
_UNITS = {"KiB": KIB, "MiB": MIB, "GiB": 1024 * MIB}


def libvirt_error(code: int, domain: int, message: str) -> libvirt.libvirtError:
    """The exception that libvirt-python raises for an error of this code and origin."""
    error = libvirt.libvirtError(message)
    error.err = (code, domain, message, 2, None, None, None, -1, -1)
    return error


def qemu_error(code: int, message: str) -> libvirt.libvirtError:
    """An error of the QEMU driver."""
    return libvirt_error(code, libvirt.VIR_FROM_QEMU, message)


#: What guest-get-osinfo says in Debian 12 (in part).
DEBIAN = {
    "id": "debian",
    "pretty-name": "Debian GNU/Linux 12 (bookworm)",
    "kernel-release": "6.1.0-18-amd64",
    "kernel-version": "#1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1",
}


#: What an agent does while the filesystems are frozen. Source: QEMU qga/main.c, ga_freeze_allowlist.
THAWING = {"guest-ping", "guest-info", "guest-sync", "guest-sync-delimited", "guest-fsfreeze-status"}


@dataclass
class FakeGuest:
    """What runs inside a domain: its kernel's CPUs and memory blocks, and its agent.

    `agent` is running, stopped or hung. `refuses` holds agent commands that are blocked in the guest. A guest that
    `sees_nothing` never lists what is plugged. `onlines` is how many CPUs one guest-set-vcpus brings online at most.
    `pinned` memory blocks will not go offline, and those that are `fixed` are told beforehand that they cannot.
    `unplugs` is what it does when a device is to leave: let it go, refuse, not answer, or "slow": a vCPU goes after
    so many `looks` at the number of vCPUs since it was asked for, or refuses if it is one of `kept_cpus`. A virtio-mem
    device comes to `virtio_mem_limit` at most. `broken_cpus` will go neither online nor offline. So many times
    (`late_cpus`) it is asked for its CPUs before it lists a plugged one, and so many times (`late_blocks`) for its
    blocks before it lists those of virtio-mem. It numbers CPUs as they come: `numbers` has
    those of vCPUs that are not its own. `says` is told how many commands were answered before, and the command; what it
    returns, text or bytes, is answered in place of what is so.
    """

    agent: str = "running"
    frozen: bool = False
    online_cpus: dict[int, bool] = field(default_factory=lambda: {0: True})
    blocks: dict[int, bool] = field(default_factory=lambda: {0: True, 1: True})
    block_bytes: int = 128 * MIB
    reserved_bytes: int = 100 * MIB
    auto_online: bool = False
    sees_nothing: bool = False
    balloon_driver: bool = True
    refuses: frozenset[str] = frozenset()
    onlines: int = 64
    available_bytes: int | None = None
    pinned: frozenset[int] = frozenset()
    fixed: frozenset[int] = frozenset()
    fixed_cpus: frozenset[int] = frozenset({0})
    unplugs: str = "lets go"
    looks: int = 2
    kept_cpus: frozenset[int] = frozenset()
    virtio_mem_limit: int = 1 << 60
    broken_cpus: bool = False
    late_cpus: int = 0
    late_blocks: int = 0
    coming: list[int] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    os: dict[str, str] = field(default_factory=lambda: dict(DEBIAN))
    asked: list[str] = field(default_factory=list)
    says: Callable[[int, str], str | bytes | None] = lambda n, command: None

    def answer(self, request: dict[str, Any]) -> Any:
        """The answer of the guest agent to one command."""
        command, arguments = request["execute"], request.get("arguments", {})
        self.asked.append(command)
        if self.frozen and command not in THAWING:
            raise qemu_error(
                libvirt.VIR_ERR_INTERNAL_ERROR,
                f"internal error: unable to execute QEMU agent command '{command}': "
                f"Command {command} has been disabled: the agent is in frozen state",
            )
        if command in self.refuses:
            raise qemu_error(
                libvirt.VIR_ERR_INTERNAL_ERROR,
                f"internal error: unable to execute QEMU agent command '{command}': "
                f"Command {command} has been disabled",
            )
        return getattr(self, "_" + command.replace("-", "_"))(**{k.replace("-", "_"): v for k, v in arguments.items()})

    def plug_cpu(self, vcpu: int) -> None:
        """A vCPU is there; sooner or later the kernel lists it."""
        if not self.sees_nothing:
            self.coming.append(vcpu)
            if not self.late_cpus:
                self._list_coming()

    def unplug_cpu(self, vcpu: int) -> None:
        """A vCPU is gone."""
        self.online_cpus.pop(self.numbers.pop(vcpu, vcpu), None)

    def _list_coming(self) -> None:
        while self.coming:
            number = next(n for n in itertools.count() if n not in self.online_cpus)
            self.numbers[self.coming.pop(0)] = number
            self.online_cpus[number] = self.auto_online

    def _guest_get_vcpus(self) -> Any:
        if self.late_cpus:
            self.late_cpus -= 1
        else:
            self._list_coming()
        listed = sorted(self.online_cpus, reverse=True)
        return [
            {"online": self.online_cpus[n], "can-offline": n not in self.fixed_cpus, "logical-id": n} for n in listed
        ]

    def _guest_set_vcpus(self, vcpus: list[dict[str, Any]]) -> Any:
        if self.broken_cpus:
            raise qemu_error(
                libvirt.VIR_ERR_INTERNAL_ERROR,
                "internal error: unable to execute QEMU agent command 'guest-set-vcpus': failed to write to "
                "/sys/devices/system/cpu/cpu1/online: Input/output error",
            )
        done = vcpus[: self.onlines]
        for cpu in done:
            self.online_cpus[cpu["logical-id"]] = cpu["online"]
        return len(done)

    def _guest_get_memory_blocks(self) -> Any:
        first = VIRTIO_MEM_BASE // self.block_bytes
        is_late = self.late_blocks > 0 and any(n >= first for n in self.blocks)
        self.late_blocks -= is_late
        return [
            {"online": online, "can-offline": n not in self.fixed, "phys-index": n}
            for n, online in self.blocks.items()
            if n < first or not is_late
        ]

    def _guest_get_memory_block_info(self) -> Any:
        return {"size": self.block_bytes}

    def _guest_set_memory_blocks(self, mem_blks: list[dict[str, Any]]) -> Any:
        answers = []
        for block in mem_blks:
            index = block["phys-index"]
            if index in self.pinned and not block["online"]:
                answers.append({"phys-index": index, "response": "operation-failed", "error-code": 16})
            elif index in self.blocks:
                self.blocks[index] = block["online"]
                answers.append({"phys-index": index, "response": "success"})
            else:
                answers.append({"phys-index": index, "response": "not-found", "error-code": 2})
        return answers

    def _guest_file_open(self, path: str, mode: str) -> Any:
        assert (path, mode) == ("/proc/meminfo", "r")
        return 1000

    def _guest_file_read(self, handle: int, count: int) -> Any:
        total = sum(self.blocks.values()) * self.block_bytes - self.reserved_bytes
        available = total if self.available_bytes is None else self.available_bytes
        text = f"MemTotal:  {total // KIB} kB\nMemAvailable:  {available // KIB} kB\nHugePages_Total:  0\n"
        return {"buf-b64": base64.b64encode(text.encode()).decode(), "eof": True}

    def _guest_file_close(self, handle: int) -> Any:
        return {}

    def _guest_fsfreeze_status(self) -> Any:
        return "frozen" if self.frozen else "thawed"

    def _guest_get_osinfo(self) -> Any:
        return self.os

    def _guest_info(self) -> Any:
        names = [name[1:].replace("_", "-") for name in dir(FakeGuest) if name.startswith("_guest_")]
        return {"supported_commands": [{"name": name, "enabled": name not in self.refuses} for name in names]}


class FakeDomain:
    """One domain. `fail_next` makes one call fail: {"attachDeviceFlags": error}, or one with its arguments.

    "save" is what libvirt does at the end of a call that changes vCPUs of the persistent definition: by then both are
    changed, that one in its memory alone. "vcpu2" is the plugging of that vCPU.
    """

    def __init__(
        self, xml: str, *, guest: FakeGuest | None = None, running: bool = True, persistent: bool = True
    ) -> None:
        self.config = _normalise(etree.fromstring(xml)) if persistent else None
        self.live = _normalise(etree.fromstring(xml)) if running else None
        self.guest = guest or FakeGuest()
        # What QEMU has and libvirt does not know, as query-memory-devices has it.
        self.unknown: list[dict[str, Any]] = []
        self.paused = False
        self.unusual_state: int | None = None
        self.saved = False
        self.job: dict[str, int] = {"type": libvirt.VIR_DOMAIN_JOB_NONE}
        self.number, self.reason = 1, libvirt.VIR_DOMAIN_RUNNING_BOOTED
        self.calls: list[str] = []
        self.fail_next: dict[str, Exception] = {}
        self.tell: Callable[[int, str], None] = lambda event_id, alias: None
        self.connection: FakeConnection | None = None
        self.leaving: dict[int, int] = {}
        # What the balloon was asked to hold back last.
        self.held_kib: int | None = None
        self._uuid = _root(self).findtext("uuid") or "11111111-2222-3333-4444-555555555555"

    # reads

    def name(self) -> str:
        return str(_root(self).findtext("name"))

    def UUIDString(self) -> str:
        return self._uuid

    def ID(self) -> int:
        return self.number if self.live is not None else -1

    def isPersistent(self) -> bool:
        return self.config is not None

    def hasManagedSaveImage(self, flags: int) -> int:
        return int(self.saved)

    def state(self) -> tuple[int, int]:
        if self.live is None:
            return libvirt.VIR_DOMAIN_SHUTOFF, 0
        if self.unusual_state is not None:
            return self.unusual_state, 0
        return (libvirt.VIR_DOMAIN_PAUSED, 1) if self.paused else (libvirt.VIR_DOMAIN_RUNNING, self.reason)

    def connect(self) -> FakeConnection:
        assert self.connection is not None
        return self.connection

    def info(self) -> list[int]:
        running = self._running()
        sizes = [_size(running.find(name)) // KIB for name in ("memory", "currentMemory")]
        return [self.state()[0], *sizes, int(running.find("vcpu").get("current", running.findtext("vcpu"))), 0]

    def XMLDesc(self, flags: int) -> str:
        self._fail("XMLDesc")
        inactive = flags & libvirt.VIR_DOMAIN_XML_INACTIVE or self.live is None
        root = copy.deepcopy(self.config if inactive else self.live)
        if not flags & libvirt.VIR_DOMAIN_XML_SECURE:
            for graphics in root.iterfind("./devices/graphics"):
                graphics.attrib.pop("passwd", None)
        if not inactive:
            root.set("id", str(self.number))
            for target in root.iterfind("./devices/channel/target"):
                target.set("state", "disconnected" if self.guest.agent == "stopped" else "connected")
        return etree.tostring(root, encoding="unicode")

    def memoryStats(self) -> dict[str, int]:
        # Source: QEMU, get_current_ram_size: virtio-mem is not in it.
        unknown_kib = sum(data["size"] for data in self.unknown if "max-size" not in data) // KIB
        actual_kib = int(self._running().findtext("currentMemory")) + unknown_kib
        return {"actual": actual_kib} if self._has_balloon() else {"rss": 1}

    def jobStats(self, flags: int) -> dict[str, int]:
        return self.job

    def power_cycle(self, *, start: bool = True) -> None:
        """Off, and on again from the persistent definition; each dimm has another place then."""
        self.live = copy.deepcopy(self.config) if start else None
        self.held_kib, self.unusual_state, self.guest.frozen = None, None, False
        self.reason = libvirt.VIR_DOMAIN_RUNNING_BOOTED
        self.number += 1
        base = FIRST_DIMM_BASE + 1024 * MIB
        for device in self.live.iterfind("./devices/memory[@model='dimm']") if start else ():
            device.find("address").set("base", hex(base))
            base += _size(device.find("./target/size"))
        for device in self.live.iterfind("./devices/memory[@model='virtio-mem']") if start else ():
            if device.find("./target/current") is None:
                etree.SubElement(device.find("target"), "current", unit="KiB").text = "0"
            self._follow_request(device)

    # changes

    def setVcpusFlags(self, count: int, flags: int) -> None:
        self._called("setVcpusFlags", f"setVcpusFlags({count}, {flags})")
        for name, root in self._affected(flags):
            maximum = int(root.findtext("vcpu"))
            if count > maximum:
                raise qemu_error(
                    libvirt.VIR_ERR_INVALID_ARG,
                    "invalid argument: requested vcpus is greater than max allowable vcpus for the "
                    f"{name} domain: {count} > {maximum}",
                )
        for name, root in self._affected(flags):
            if name == "live":
                self._set_live_vcpus(root, count, wait=not flags & ASYNC_UNPLUG)
            else:
                hotpluggable = bool(flags & libvirt.VIR_DOMAIN_VCPU_HOTPLUGGABLE)
                for vcpu in _vcpus_to_change(root, count, removable=None):
                    _switch_vcpu(root, vcpu, hotpluggable=hotpluggable)
                self._fail("save")

    def setVcpu(self, vcpus: str, state: int, flags: int) -> None:
        self._called("setVcpu", f"setVcpu({vcpus}, {state}, {flags})")
        ((name, root),) = self._affected(flags)
        if (_listed_vcpus(root)[int(vcpus)].get("enabled") == "yes") == bool(state):
            raise qemu_error(
                libvirt.VIR_ERR_INVALID_ARG, f"invalid argument: vcpu '{vcpus}' is already in requested state"
            )
        _switch_vcpu(root, int(vcpus), hotpluggable=True)
        if name == "live":
            (self.guest.plug_cpu if state else self.guest.unplug_cpu)(int(vcpus))

    def vcpusFlags(self, flags: int) -> int:
        for vcpu in list(self.leaving):
            self.leaving[vcpu] -= 1
            if self.leaving[vcpu] <= 0:
                del self.leaving[vcpu]
                self._let_vcpu_go(self._running(), vcpu)
        root = self._affected(flags)[0][1]
        return int(root.find("vcpu").get("current", root.findtext("vcpu")))

    def detachDeviceAlias(self, alias: str, flags: int) -> None:
        self._called("detachDeviceAlias", f"detachDeviceAlias({alias}, {flags})")
        assert flags == LIVE, "with the config flag libvirt drops the persistent device even where the guest refuses"
        device = next((one for one in self._running().iterfind("./devices/memory") if _alias(one) == alias), None)
        if device is None:
            raise qemu_error(libvirt.VIR_ERR_INTERNAL_ERROR, f"internal error: no device found with alias {alias}")
        if self.guest.unplugs == "refuses":
            self.tell(libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, alias)
        elif self.guest.unplugs == "lets go":
            self.let_go(alias)

    def let_go(self, alias: str) -> None:
        """The guest ejects a dimm, now or late."""
        root = self._running()
        device = next(one for one in root.iterfind("./devices/memory") if _alias(one) == alias)
        first = int(device.find("address").get("base"), 16) // self.guest.block_bytes
        for n in range(_size(device.find("./target/size")) // self.guest.block_bytes):
            self.guest.blocks.pop(first + n, None)
        _remove_device(root, device)
        self.tell(libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, alias)

    def detachDeviceFlags(self, xml: str, flags: int) -> None:
        wanted = etree.fromstring(xml)
        self._called("detachDeviceFlags", f"detachDeviceFlags({flags})")
        assert flags == CONFIG, "libvirt waits 5 s and says yes for a live device that the guest has not let go"
        for device in self._affected(flags)[0][1].iterfind("./devices/memory"):
            if _identity(device) == _identity(wanted):
                _remove_device(self.config, device)
                return
        raise qemu_error(libvirt.VIR_ERR_DEVICE_MISSING, "device not found: matching memory device was not found")

    def updateDeviceFlags(self, xml: str, flags: int) -> None:
        wanted = etree.fromstring(xml)
        requested = _size(wanted.find("./target/requested"))
        self._called("updateDeviceFlags", f"updateDeviceFlags({requested // MIB} MiB, {flags})")
        ((name, root),) = self._affected(flags)
        device = next((one for one in root.iterfind("./devices/memory") if _identity(one) == _identity(wanted)), None)
        if device is None:
            raise qemu_error(
                libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
                f"unsupported configuration: memory '{_alias(wanted)}' not found",
            )
        if requested > _size(device.find("./target/size")):
            raise qemu_error(
                libvirt.VIR_ERR_XML_DETAIL,
                "requested size must be smaller than or equal to @size "
                f"({_size(device.find('./target/size')) // KIB}KiB)",
            )
        device.find("./target/requested").text = str(requested // KIB)
        if name == "live":
            self._follow_request(device)

    def attachDeviceFlags(self, xml: str, flags: int) -> None:
        self._called("attachDeviceFlags", f"attachDeviceFlags({flags})")
        device = etree.fromstring(xml)
        affected = self._affected(flags)
        for _, root in reversed(affected):
            _check_memory_device(root, device)
        for name, root in affected:
            self._attach(root, copy.deepcopy(device), live=name == "live")

    def setMemoryFlags(self, size_kib: int, flags: int) -> None:
        self._called("setMemoryFlags", f"setMemoryFlags({size_kib}, {flags})")
        for name, root in self._affected(flags):
            if name == "live" and not self._has_balloon():
                raise qemu_error(
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    "Requested operation is not valid: Unable to change memory of active domain without the balloon "
                    "device and guest OS balloon driver",
                )
            if size_kib > int(root.findtext("memory")):
                raise qemu_error(
                    libvirt.VIR_ERR_INVALID_ARG, "invalid argument: cannot set memory higher than max memory"
                )
            if name == "live":
                # Source: QEMU, virtio_balloon_to_target: no more than there is, virtio-mem left out.
                self.held_kib = max(0, self._balloon_total_kib() - size_kib)
            if name == "persistent":
                root.find("currentMemory").text = str(size_kib)
            elif self.guest.balloon_driver:
                self.load_balloon_driver()

    def load_balloon_driver(self) -> None:
        """The guest's driver is there, and follows what was asked of it before."""
        self.guest.balloon_driver = True
        if self.held_kib is not None:
            self._running().find("currentMemory").text = str(self._balloon_total_kib() - self.held_kib)

    def balloon_pages(self) -> tuple[int, int]:
        """What the balloon's registers say: pages that were asked for, pages that the guest has given."""
        given = max(0, self._balloon_total_kib() - int(self._running().findtext("currentMemory")))
        return (given if self.held_kib is None else self.held_kib) // 4, given // 4

    def _balloon_total_kib(self) -> int:
        virtio_mem = self._running().iterfind("./devices/memory[@model='virtio-mem']/target/size")
        return int(self._running().findtext("memory")) - sum(map(_size, virtio_mem)) // KIB

    def setSchedulerParametersFlags(self, parameters: dict[str, int], flags: int) -> None:
        self._called("setSchedulerParametersFlags", f"setSchedulerParametersFlags({parameters}, {flags})")
        for _, root in self._affected(flags):
            if root.find("cputune") is None:
                root.append(etree.Element("cputune"))
            for shares in root.findall("./cputune/shares"):
                shares.getparent().remove(shares)
            etree.SubElement(root.find("cputune"), "shares").text = str(parameters["cpu_shares"])

    def isActive(self) -> bool:
        return self.live is not None

    # what the tests' libvirt does inside

    def _attach(self, root: Any, device: Any, *, live: bool) -> None:
        devices = root.findall("./devices/memory")
        if device.get("model") == "virtio-mem":
            self._attach_virtio_mem(root, device, live=live)
            return
        used = {other.find("address").get("slot") for other in devices}
        asked = device.find("address")
        slot = (
            next(str(n) for n in range(len(devices) + 1) if str(n) not in used) if asked is None else asked.get("slot")
        )
        if live and int(slot) in {data["slot"] for data in self.unknown}:
            raise qemu_error(
                libvirt.VIR_ERR_INTERNAL_ERROR,
                f"internal error: unable to execute QEMU command 'device_add': slot {slot} is busy",
            )
        address = etree.SubElement(device, "address", type="dimm", slot=slot) if asked is None else asked
        size = _size(device.find("./target/size"))
        if live:
            ends = [
                int(other.find("address").get("base"), 16) + _size(other.find("./target/size"))
                for other in devices
                if other.get("model") == "dimm"
            ]
            base = max(ends, default=FIRST_DIMM_BASE)
            address.set("base", hex(base))
            if not self.guest.sees_nothing:
                first = base // self.guest.block_bytes
                for n in range(size // self.guest.block_bytes):
                    self.guest.blocks[first + n] = self.guest.auto_online
        root.find("devices").append(device)
        for name in ("memory", "currentMemory"):
            root.find(name).text = str(int(root.findtext(name)) + size // KIB)

    def _attach_virtio_mem(self, root: Any, device: Any, *, live: bool) -> None:
        slot = 9 + len(root.findall("./devices/memory[@model='virtio-mem']"))
        etree.SubElement(device, "address", type="pci", slot=f"{slot:#04x}")
        size = device.find("./target/size")
        root.find("devices").append(device)
        root.find("memory").text = str(int(root.findtext("memory")) + _size(size) // KIB)
        if live:
            etree.SubElement(device.find("target"), "current", unit="KiB").text = "0"
            self._follow_request(device)

    def _follow_request(self, device: Any) -> None:
        """The guest's virtio-mem driver plugs or unplugs what is requested, whole blocks of it behind a fixed place."""
        target = device.find("target")
        current = min(_size(target.find("requested")), self.guest.virtio_mem_limit)
        target.find("current").text = str(current // KIB)
        place = int(device.find("address").get("slot"), 0) - 9
        first = VIRTIO_MEM_BASE * (1 + place) // self.guest.block_bytes
        have = {n for n in self.guest.blocks if n >= first and n - first < VIRTIO_MEM_BASE // self.guest.block_bytes}
        want = {first + n for n in range(-(-current // self.guest.block_bytes))}
        for n in want - have:
            self.guest.blocks[n] = self.guest.auto_online
        for n in have - want:
            del self.guest.blocks[n]
        self.tell(libvirt.VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE, _alias(device))

    def _let_vcpu_go(self, root: Any, vcpu: int) -> None:
        if vcpu in self.guest.kept_cpus:
            self.tell(libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, f"vcpu{vcpu}")
            return
        _switch_vcpu(root, vcpu, hotpluggable=True)
        self.guest.unplug_cpu(vcpu)

    def _set_live_vcpus(self, root: Any, count: int, *, wait: bool) -> None:
        before = int(root.find("vcpu").get("current", root.findtext("vcpu")))
        vcpus = _vcpus_to_change(root, count, removable="yes")
        if count < before and len(vcpus) < before - count:
            raise qemu_error(
                libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
                "unsupported configuration: failed to find appropriate hotpluggable vcpus to reach the desired "
                "target vcpu count",
            )
        for vcpu in vcpus:
            if count > before:
                self._fail(f"vcpu{vcpu}")
                _switch_vcpu(root, vcpu, hotpluggable=True)
                self.guest.plug_cpu(vcpu)
            elif self.guest.unplugs == "lets go":
                self._let_vcpu_go(root, vcpu)
            elif self.guest.unplugs == "refuses":
                raise qemu_error(
                    libvirt.VIR_ERR_OPERATION_FAILED, "operation failed: vcpu unplug request was rejected by guest"
                )
            else:
                if self.guest.unplugs == "slow":
                    self.leaving.setdefault(vcpu, self.guest.looks)
                if wait:
                    raise qemu_error(
                        libvirt.VIR_ERR_OPERATION_TIMEOUT,
                        "Timed out during operation: vcpu unplug request timed out. Unplug result must be manually "
                        "inspected in the domain",
                    )

    def _affected(self, flags: int) -> list[tuple[str, Any]]:
        affected = []
        if flags & LIVE:
            affected.append(("live", self._running()))
        if flags & CONFIG:
            if self.config is None:
                raise qemu_error(
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    "Requested operation is not valid: transient domains do not have any persistent config",
                )
            affected.append(("persistent", self.config))
        return affected

    def _running(self) -> Any:
        if self.live is None:
            raise qemu_error(
                libvirt.VIR_ERR_OPERATION_INVALID, "Requested operation is not valid: domain is not running"
            )
        return self.live

    def _has_balloon(self) -> bool:
        balloon = self._running().find("./devices/memballoon")
        return balloon is not None and balloon.get("model") != "none"

    def _called(self, name: str, call: str) -> None:
        self.calls.append(call)
        self._fail(name, call)

    def _fail(self, *keys: str) -> None:
        for key in keys:
            if key in self.fail_next:
                error = self.fail_next.pop(key)
                if "End of file" in str(error):
                    self.live = None  # QEMU is gone
                raise error


class FakeConnection:
    """A connection to the domains of a test."""

    def __init__(self, *domains: FakeDomain) -> None:
        self.domains = list(domains)
        self.alive = True
        self.lib_version = 9_000_000
        self._ids = itertools.count()
        self.callbacks: dict[int, tuple[int, Callable[..., None]]] = {}
        for domain in domains:
            domain.connection = self
            domain.tell = functools.partial(self._tell, domain)

    def getType(self) -> str:
        return "QEMU"

    def getDomainCapabilities(self, emulator: None, arch: str, machine: str, virt_type: str, flags: int) -> str:
        return f"<domainCapabilities><vcpu max='{288 if 'q35' in machine else 255}'/></domainCapabilities>"

    def getMaxVcpus(self, virt_type: str) -> int:
        return 1024

    def getAllDomainStats(self, stats: int, flags: int) -> list[tuple[FakeDomain, dict[str, int]]]:
        """The running domains, with their states, and in KiB what their balloons leave and what they have in all."""
        running = [domain for domain in self.domains if domain.live is not None]
        return [
            (
                domain,
                {
                    "state.state": domain.state()[0],
                    "state.reason": domain.state()[1],
                    "balloon.current": _size(domain.live.find("currentMemory")) // KIB,
                    "balloon.maximum": _size(domain.live.find("memory")) // KIB,
                    "balloon.rss": _size(domain.live.find("currentMemory")) // KIB // 2,
                },
            )
            for domain in running
        ]

    def domainListGetStats(
        self, domains: list[FakeDomain], stats: int, flags: int
    ) -> list[tuple[FakeDomain, dict[str, int]]]:
        """The states of those of these domains that are there, and persistent where that is wanted."""
        assert stats == libvirt.VIR_DOMAIN_STATS_STATE
        wanted = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_PERSISTENT
        return [
            (domain, dict(zip(("state.state", "state.reason"), domain.state(), strict=True)))
            for domain in domains
            if domain in self.domains and (not flags & wanted or domain.isPersistent())
        ]

    def getLibVersion(self) -> int:
        return self.lib_version

    def isAlive(self) -> bool:
        return self.alive

    def setKeepAlive(self, interval: int, count: int) -> None:
        pass

    def registerCloseCallback(self, callback: Any, opaque: Any) -> None:
        pass

    def unregisterCloseCallback(self) -> None:
        pass

    def close(self) -> int:
        self.alive = False
        return 0

    def domainEventRegisterAny(self, domain: None, event_id: int, callback: Callable[..., None], opaque: None) -> int:
        if any(known == event_id for known, _ in self.callbacks.values()):
            # As libvirt: of libvirt-python, one kind of event is one callback. Observed: libvirt 9.0.
            raise libvirt_error(8, 0, "invalid argument: event callback already tracked")
        callback_id = next(self._ids)
        self.callbacks[callback_id] = (event_id, functools.partial(callback, self))
        return callback_id

    def domainEventDeregisterAny(self, callback_id: int) -> None:
        del self.callbacks[callback_id]

    def defineXMLFlags(self, xml: str, flags: int) -> FakeDomain:
        root = _normalise(etree.fromstring(xml))
        domain = self.lookupByName(root.findtext("name"))
        domain._called("defineXMLFlags", f"defineXMLFlags({flags})")
        topology = root.find("./cpu/topology")
        product = math.prod(int(topology.get(name, "1")) for name in ("sockets", "dies", "cores", "threads"))
        if product != int(root.findtext("vcpu")):
            raise qemu_error(
                libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
                "unsupported configuration: CPU topology doesn't match maximum vcpu count",
            )
        domain.config = root
        for wanted, callback in list(self.callbacks.values()):
            if wanted == libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE:
                callback(domain, libvirt.VIR_DOMAIN_EVENT_DEFINED, libvirt.VIR_DOMAIN_EVENT_DEFINED_UPDATED, None)
        return domain

    def _tell(self, domain: FakeDomain, event_id: int, alias: str) -> None:
        for wanted, callback in list(self.callbacks.values()):
            if wanted == event_id:
                callback(domain, alias, None)

    def listAllDomains(self, flags: int = 0) -> list[FakeDomain]:
        only_active = flags & libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
        return [domain for domain in self.domains if domain.live is not None or not only_active]

    def lookupByName(self, name: str) -> FakeDomain:
        return self._find(lambda domain: domain.name() == name, f"no domain with matching name '{name}'")

    def lookupByUUIDString(self, uuid: str) -> FakeDomain:
        bare = uuid.replace("-", "")
        return self._find(
            lambda domain: domain.UUIDString().replace("-", "") == bare, f"no domain with matching uuid '{uuid}'"
        )

    def _find(self, is_it: Callable[[FakeDomain], bool], words: str) -> FakeDomain:
        for domain in self.domains:
            if is_it(domain):
                return domain
        raise qemu_error(libvirt.VIR_ERR_NO_DOMAIN, f"Domain not found: {words}")


def ask_qemu(domain: FakeDomain, request: str, flags: int) -> str:
    """Stand for libvirt_qemu.qemuMonitorCommand and the few commands that are asked of QEMU."""
    asked = json.loads(request)
    if asked["execute"] == "query-pci":
        region = {"type": "memory", "address": 0xFE800000, "size": 16 * KIB, "bar": 4}
        balloon = {"qdev_id": "balloon0", "id": {"vendor": 0x1AF4, "device": 0x1045}, "regions": [region]}
        bridge = {"qdev_id": "pci.4", "id": {"vendor": 0x1B36, "device": 12}, "regions": []}
        return json.dumps({"return": [{"bus": 0, "devices": [bridge | {"pci_bridge": {"devices": [balloon]}}]}]})
    if asked["execute"] == "human-monitor-command":
        assert asked["arguments"] == {"command-line": "xp /8bx 0xfe802000"}
        held = b"".join(pages.to_bytes(4, "little") for pages in domain.balloon_pages())
        return json.dumps({"return": f"fe802000: {' '.join(f'0x{one:02x}' for one in held)}\r\n"})
    if asked["execute"] == "object-del":
        return json.dumps({"error": {"class": "GenericError", "desc": "object not found"}})
    assert asked == {"execute": "query-memory-devices"}
    devices = [
        {
            "type": "dimm",
            "data": {
                "id": device.find("alias").get("name"),
                "size": _size(device.find("./target/size")),
                "slot": int(device.find("address").get("slot")),
                "addr": int(device.find("address").get("base"), 16),
                "node": 0,
            },
        }
        for device in domain._running().iterfind("./devices/memory[@model='dimm']")
    ]
    return json.dumps(
        {
            "return": [
                *devices,
                *({"type": "virtio-mem" if "max-size" in data else "dimm", "data": data} for data in domain.unknown),
            ]
        }
    )


def send_to_agent(domain: FakeDomain, request: str, timeout_s: int, flags: int) -> str:
    """Stand for libvirt_qemu.qemuAgentCommand; a hung agent's time is up at once."""
    if domain.guest.agent == "stopped":
        raise qemu_error(
            libvirt.VIR_ERR_AGENT_UNRESPONSIVE, "Guest agent is not responding: QEMU guest agent is not connected"
        )
    if domain.guest.agent == "hung":
        raise qemu_error(
            libvirt.VIR_ERR_AGENT_UNRESPONSIVE, "Guest agent is not responding: Guest agent not available for now"
        )
    guest, command = domain.guest, json.loads(request)
    said = guest.says(len(guest.asked), command["execute"])
    if said is not None:
        guest.asked.append(command["execute"])
        try:
            return said.decode() if isinstance(said, bytes) else said
        except UnicodeDecodeError as error:  # as libvirt-python does
            raise SystemError("virDomainQemuAgentCommand returned a result with an exception set") from error
    return json.dumps({"return": guest.answer(command)})


def _check_memory_device(root: Any, device: Any) -> None:
    """Refuse what libvirt 9.0 refuses, with its codes and words."""
    unsupported = libvirt.VIR_ERR_CONFIG_UNSUPPORTED
    maximum = root.find("maxMemory")
    if maximum is None:
        raise qemu_error(
            unsupported,
            "unsupported configuration: cannot use/hotplug a memory device when domain 'maxMemory' is not defined",
        )
    devices = root.findall("./devices/memory")
    if len(devices) >= int(maximum.get("slots")):
        raise qemu_error(
            unsupported,
            f"unsupported configuration: memory device count '{len(devices) + 1}' exceeds slots count "
            f"'{maximum.get('slots')}'",
        )
    size_kib = _size(device.find("./target/size")) // KIB
    if int(root.findtext("memory")) + size_kib > _size(maximum) // KIB:
        raise qemu_error(
            unsupported,
            f"unsupported configuration: Attaching memory device with size '{size_kib}' would exceed domain's "
            f"maxMemory config size '{_size(maximum) // KIB}'",
        )
    cells = root.findall("./cpu/numa/cell")
    node = device.findtext("./target/node")
    if int(node) >= len(cells):
        raise qemu_error(
            libvirt.VIR_ERR_XML_DETAIL,
            f"can't add memory backend for guest node '{node}' as the guest has only '{len(cells)}' NUMA nodes "
            "configured",
        )
    alias = device.find("alias").get("name")
    if any(other.get("name") == alias for other in root.iterfind("./devices/memory/alias")):
        raise qemu_error(unsupported, f"unsupported configuration: non unique alias detected: {alias}")
    if root.find("./features/acpi") is None:
        raise qemu_error(
            libvirt.VIR_ERR_INTERNAL_ERROR,
            "internal error: unable to execute QEMU command 'device_add': memory hotplug is not enabled: missing acpi "
            "device or acpi disabled",
        )
    if size_kib % 2048:
        raise qemu_error(
            libvirt.VIR_ERR_INTERNAL_ERROR,
            "internal error: unable to execute QEMU command 'device_add': backend memory size must be multiple of "
            "0x200000",
        )


def _listed_vcpus(root: Any) -> list[Any]:
    """What libvirt says of each vCPU; it is written once single ones differ."""
    vcpu, listed = root.find("vcpu"), root.find("vcpus")
    if listed is None:
        listed = etree.Element("vcpus")
        vcpu.addnext(listed)
        for n in range(int(vcpu.text)):
            fixed = n < int(vcpu.get("current", vcpu.text))
            etree.SubElement(
                listed, "vcpu", id=str(n), enabled="yes" if fixed else "no", hotpluggable="no" if fixed else "yes"
            )
    return list(listed)


def _vcpus_to_change(root: Any, count: int, *, removable: str | None) -> list[int]:
    """The vCPUs that libvirt plugs or removes to have `count`: the lowest ids that are free, the highest there are."""
    states = {int(one.get("id")): one for one in _listed_vcpus(root)}
    have = [n for n, one in states.items() if one.get("enabled") == "yes"]
    if count >= len(have):
        return [n for n in states if n not in have][: count - len(have)]
    leave = [n for n in reversed(have) if removable in (None, states[n].get("hotpluggable"))]
    return leave[: len(have) - count]


def _switch_vcpu(root: Any, vcpu: int, *, hotpluggable: bool) -> None:
    """Add a vCPU that is not there, or take away one that is."""
    listed = _listed_vcpus(root)
    plug = listed[vcpu].get("enabled") == "no"
    listed[vcpu].set("enabled", "yes" if plug else "no")
    listed[vcpu].set("hotpluggable", "yes" if hotpluggable or not plug else "no")
    root.find("vcpu").set("current", str(sum(one.get("enabled") == "yes" for one in listed)))


def _remove_device(root: Any, device: Any) -> None:
    size_kib = _size(device.find("./target/size")) // KIB
    root.find("devices").remove(device)
    for name in ("memory", "currentMemory"):
        root.find(name).text = str(int(root.findtext(name)) - size_kib)


def _alias(device: Any) -> str:
    alias = device.find("alias")
    return "" if alias is None else str(alias.get("name"))


def _identity(device: Any) -> tuple[Any, ...]:
    """What libvirt matches a memory device by."""
    address = device.find("address")
    values = tuple(sorted(address.items())) if address is not None else ()
    return device.get("model"), _size(device.find("./target/size")), device.findtext("./target/node"), values


def _normalise(root: Any) -> Any:
    """Return the XML as libvirt hands it out: sizes in KiB, and a currentMemory."""
    for path in ("./memory", "./maxMemory", "./currentMemory", "./devices/memory/target/size"):
        for element in root.iterfind(path):
            element.text = str(_size(element) // KIB)
            element.set("unit", "KiB")
    for cell in root.iterfind("./cpu/numa/cell"):
        cell.set("memory", str(int(cell.get("memory")) * _UNITS[cell.get("unit", "KiB")] // KIB))
        cell.set("unit", "KiB")
    if cells := root.findall("./cpu/numa/cell"):  # libvirt overwrites <memory> with their sum and the devices'
        devices = sum(_size(size) for size in root.iterfind("./devices/memory/target/size")) // KIB
        root.find("memory").text = str(sum(int(cell.get("memory")) for cell in cells) + devices)
    if root.find("currentMemory") is None:
        current = etree.Element("currentMemory", unit="KiB")
        current.text = root.findtext("memory")
        root.find("memory").addnext(current)
    return root


def _size(element: Any) -> int:
    return int(element.text) * _UNITS[element.get("unit", "KiB")]


def _root(domain: FakeDomain) -> Any:
    return domain.live if domain.live is not None else domain.config
