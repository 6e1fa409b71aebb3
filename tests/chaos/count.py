"""The count, which the agent has no part in: what was accepted, what was told, and what QEMU and libvirt have.

It knows nothing of how the agent works. A fault is a sentence; the table of figures is printed whatever comes out.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import libvirt
import libvirt_qemu
from lxml import etree

from tests.lab.agent import Reply
from tests.lab.guest import Guest

MIB = 2**20
# A libvirtd that comes back ends a VM whose QEMU it cannot take up again; after one more kill it does not know that.
ENDED_WITH_LIBVIRTD = (libvirt.VIR_DOMAIN_SHUTOFF_DAEMON, libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN)


@dataclass(frozen=True)
class Sent:
    """A task that was accepted: what it asked for, in all."""

    uuid: str
    path: str
    total: int

    @property
    def number(self) -> str:
        """The field of the reply that says what the VM has."""
        return "cpuNum" if self.path.endswith("cpu") else "memorySize"


@dataclass(frozen=True)
class Devices:
    """What a VM has: vCPUs running and persistent, memory in bytes, dimms by alias."""

    cpus: tuple[int, int]
    memory: tuple[int, int]
    dimms: tuple[list[str], list[str]]
    of_qemu: list[str]


def read_devices(guest: Guest) -> Devices:
    """Ask libvirt, and QEMU past it."""
    with guest.domain() as domain:
        live, config = (etree.fromstring(domain.XMLDesc(flags)) for flags in (0, 2))
        asked = libvirt_qemu.qemuMonitorCommand(domain, '{"execute": "query-memory-devices"}', 0)
    return Devices(
        (_cpus(live), _cpus(config)),
        (_memory(live), _memory(config)),
        (_aliases(live), _aliases(config)),
        sorted(device["data"]["id"] for device in json.loads(asked)["return"]),
    )


def read_end(guest: Guest) -> int:
    """Return why a VM is not running, as libvirt has it (virDomainShutoffReason)."""
    with guest.domain() as domain:
        return int(domain.state()[1])


def _cpus(xml: Any) -> int:
    vcpu = xml.find("vcpu")
    return int(vcpu.get("current") or vcpu.text)


def _memory(xml: Any) -> int:
    return int(xml.findtext("memory")) * 1024


def _aliases(xml: Any) -> list[str]:
    return sorted(xml.xpath("devices/memory/alias/@name"))


@dataclass
class Count:
    """Figures and faults of a run; any thread may add to them."""

    accepted: int = 0
    refused: int = 0
    withdrawals: int = 0
    results: int = 0
    copies: int = 0
    vms: int = 0
    cpus: int = 0
    dimms: int = 0
    unknown_to_libvirt: int = 0
    ended_with_libvirtd: int = 0
    most_resident_kib: int = 0
    for_nobody: list[str] = field(default_factory=list)
    still_owed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    done_to: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    #: What the agent itself did not foresee, and told.
    unforeseen: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check_vm(self, guest: Guest, sent: list[Sent], by_task: Mapping[str, list[Any]]) -> None:
        """Hold what was told of one VM's tasks against what the VM has; all of them have been answered."""
        found = read_devices(guest) if guest.is_running() else None
        ended = None if found else read_end(guest)
        with self._lock:
            self.vms += 1
            self._check_results(guest.name, sent, by_task)
            if found:
                self._check_devices(guest.name, sent, by_task, found)
            else:
                self.ended_with_libvirtd += 1
                if ended not in ENDED_WITH_LIBVIRTD:
                    self.fault(f"{guest.name}: has ended: {ended}")

    def check_owed(self, read: Callable[[str], Reply]) -> None:
        """Hold what is for receivers that take nothing against the journal, as the agent tells it."""
        for task_uuid in self.for_nobody:
            task = read(f"/tasks/{task_uuid}")
            if task.status == 200 and task.body["state"] == "finished" and task.body["reply"]:
                self.still_owed += 1
            else:
                self.fault(f"task {task_uuid}, which no receiver took, is {task}")

    def fault(self, text: str) -> None:
        """Note what must not be."""
        self.faults.append(text)

    def _check_results(self, vm: str, sent: list[Sent], by_task: Mapping[str, list[Any]]) -> None:
        for one in sent:
            first, *copies = by_task[one.uuid]
            self.results += 1
            self.copies += len(copies)
            self.outcomes[first.get("errorCode") or first["outcome"]] += 1
            if first.get("errorCode") == "INTERNAL_ERROR":
                self.unforeseen.append(f"{vm}: task {one.uuid}: {first['error']}")
            if any(copy != first for copy in copies):
                self.fault(f"{vm}: task {one.uuid} has two results: {by_task[one.uuid]}")
            if first["success"] and first[one.number] != one.total:
                self.fault(f"{vm}: task {one.uuid} says success and {first[one.number]}, asked was {one.total}")

    def _check_devices(self, vm: str, sent: list[Sent], by_task: Mapping[str, list[Any]], found: Devices) -> None:
        live, config = found.dimms
        self.cpus += found.cpus[0]
        self.dimms += len(live)
        unknown = sorted(set(found.of_qemu) - set(live))
        self.unknown_to_libvirt += len(unknown)
        for aliases in (live, config, found.of_qemu):
            for alias, number in Counter(aliases).items():
                if number > 1:
                    self.fault(f"{vm}: {alias} is there {number} times")
        tasks = {one.uuid for one in sent}
        for alias in {*live, *config, *found.of_qemu}:
            match = re.fullmatch(r"ua-kvmagent-([0-9a-f]+)-\d+", alias)
            if match is None or not any(task.startswith(match[1]) for task in tasks):
                self.fault(f"{vm}: {alias} belongs to no task of it")
        if unknown:
            return  # what libvirt does not know is in no total of libvirt's
        for number, (has, has_config) in (("cpuNum", found.cpus), ("memorySize", found.memory)):
            told = [by_task[one.uuid][0] for one in sent if one.number == number]
            done = [reply for reply in told if reply["success"]]
            # Totals of a client only grow: one that is below what the VM has was carried out after a later one.
            for reply in told:
                if reply.get("errorCode") == "TARGET_BELOW_CURRENT":
                    self.fault(f"{vm}: a task was carried out after a later one: {reply}")
            if done and (has, has_config) != (done[-1][number],) * 2 and done[-1] is told[-1]:
                self.fault(f"{vm}: {number} is {has}, persistent {has_config}; the last task told {done[-1][number]}")

    def table(self, seconds: float, seed: int) -> str:
        """The figures, for people."""
        rows = {
            "seconds": round(seconds),
            "seed": seed,
            "tasks accepted": self.accepted,
            "refused for a while (503), then accepted": self.refused,
            "withdrawals tried": self.withdrawals,
            "results told": self.results,
            "told again, the same": self.copies,
            "accepted for receivers that take nothing": len(self.for_nobody),
            "  results owed to them in the end": self.still_owed,
            **{f"  result {name}": number for name, number in sorted(self.outcomes.items())},
            "VMs counted": self.vms,
            "  their vCPUs, running and persistent": self.cpus,
            "  their dimms, running and persistent": self.dimms,
            "  dimms that QEMU has and libvirt does not know": self.unknown_to_libvirt,
            "  that ended with a killed libvirtd": self.ended_with_libvirtd,
            **{f"done to it: {name}": number for name, number in sorted(self.done_to.items())},
            "most memory that the agent had, MiB": self.most_resident_kib // 1024,
            "faults": len(self.faults),
        }
        return "\n".join([*(f"{name:<60}{value:>12}" for name, value in rows.items()), *self.unforeseen])
