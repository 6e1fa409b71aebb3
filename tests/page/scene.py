"""What the page is shown with: VMs in every state that it tells apart, made of the agent's own reply types."""

from __future__ import annotations

from typing import Any

import msgspec

from kvmagent.model.errors import CODES, Code
from kvmagent.model.facts import VmState
from kvmagent.model.host import HostLoad, HostMemory
from kvmagent.model.plans import Plan, PlannedCommand, PlanReply, PlanTarget, Reason, Reserved, Verdict
from kvmagent.model.reply import Blocker, Numbers, Problem
from kvmagent.model.units import format_size
from kvmagent_plugins.vm.requests import Headroom, PluggedOffline, ReadinessReply
from tests.page.stage import NOW

# The agent's remedies, but for those that the pictures show: other words for them are no other look.
REMEDIES = {code: info.remedy for code, info in CODES.items()} | {
    Code.LIBVIRT_UNAVAILABLE: "Check that libvirtd runs and that libvirt.uri is right, then send the command again.",
    Code.CPU_ABOVE_MAXIMUM: "Request no more than the maximum, or raise <vcpu> (and the topology) in the persistent "
    "definition and power the VM off and on.",
    Code.GUEST_CPU_OFFLINE: "Let the guest online new vCPUs by itself: udev rule "
    'SUBSYSTEM=="cpu", ACTION=="add", TEST=="online", ATTR{online}=="0", ATTR{online}="1"; '
    "or start the guest agent (qemu-ga) and run in the guest: echo 1 > /sys/devices/system/cpu/cpuN/online.",
    Code.GUEST_MEMORY_OFFLINE: "Let the guest online new memory by itself: kernel parameter memhp_default_state=online "
    '(it also lasts over a reboot), or udev rule SUBSYSTEM=="memory", ACTION=="add", ATTR{state}=="offline", '
    'ATTR{state}="online"; or start the guest agent (qemu-ga) and run in the guest: '
    "echo online > /sys/devices/system/memory/memoryN/state.",
}
GIB = 2**30
MIB = 2**20


def vm(
    number: int,
    name: str,
    *,
    state: VmState = "running",
    cpus: tuple[int, int | None, int] = (2, 2, 8),
    memory: tuple[int, int | None, int | None] = (4 * GIB, 0, 16 * GIB),
    ballooned: int = 0,
    blockers: tuple[tuple[Code, str], ...] = (),
    warnings: tuple[tuple[Code, str], ...] = (),
    at_maximum: bool = False,
    fell_silent: bool = False,
) -> ReadinessReply:
    """One entry of /vms: `cpus` are plugged, online in the guest, maximum; `memory` is plugged, offline, maximum."""
    (has, online, most), (size, idle, largest) = cpus, memory
    live = state != "shutoff"
    numbers = Numbers(
        cpu_num=has if live else None,
        max_cpu_num=most,
        config_cpu_num=has,
        guest_cpu_num=online if live else None,
        memory_size=size if live else None,
        max_memory_size=largest,
        config_memory_size=size,
        balloon_size=size - ballooned if live else None,
        guest_memory_size=int((size - idle - ballooned) * 0.97) if live and idle is not None else None,
        free_slots=None if largest is None else 14,
    )
    return ReadinessReply(
        success=True,
        error="",
        vm_uuid=f"6f1de2a0-5b7c-4a35-9d0e-{number:012x}",
        name=name,
        state=state,
        outcome="unchanged",
        before=numbers,
        after=numbers,
        ready=not blockers and live and not at_maximum,
        at_maximum=at_maximum,
        guest_fell_silent=fell_silent,
        ready_after_restart=True,
        blockers=[
            Blocker(code=code, message=message, remedy=REMEDIES[code], needs_restart=code is Code.NO_MAX_MEMORY)
            for code, message in blockers
        ],
        warnings=[Problem(code=code, message=message, remedy=REMEDIES[code]) for code, message in warnings],
        headroom=Headroom(
            cpu_num=most - has,
            memory_size=(largest or size) - size,
            slots=14,
            removable_cpu_num=0,
            removable_memory_size=0,
            memory_granularity=128 * MIB,
            memory_methods=["dimm"],
        ),
        plugged_offline=PluggedOffline(
            cpu_num=None if online is None else has - online, memory_size=idle, ballooned=ballooned
        )
        if live
        else None,
    )


def unread(number: int) -> dict[str, Any]:
    """The entry of a VM that hangs."""
    uuid = f"6f1de2a0-5b7c-4a35-9d0e-{number:012x}"
    return {
        "vmUuid": uuid,
        "success": False,
        "error": f"reading VM {uuid}: no answer in 10 s",
        "errorCode": Code.LIBVIRT_UNAVAILABLE,
        "remedy": REMEDIES[Code.LIBVIRT_UNAVAILABLE],
    }


def task(
    number: int,
    command: str,
    lane: str,
    *,
    state: str = "delivered",
    outcome: str | None = None,
    error: tuple[Code, str] | None = None,
    delivery_error: str | None = None,
    age_s: float = 60.0,
    took_s: float = 0.4,
) -> dict[str, Any]:
    """One entry of /tasks."""
    finished = state not in ("accepted", "running")
    return {
        "taskUuid": f"{number:032x}",
        "command": command,
        "vm": lane,
        "state": state,
        "outcome": outcome,
        "error": error[1] if error else None,
        "errorCode": error[0] if error else None,
        "remedy": REMEDIES[error[0]] if error else None,
        "acceptedAt": NOW - age_s - took_s,
        "startedAt": None if state == "accepted" else NOW - age_s - took_s,
        "finishedAt": NOW - age_s if finished else None,
        "client": "10.0.0.5",
        "delivery": {
            "url": "http://10.0.0.5:8080/done",
            "attempts": 3 if delivery_error else int(finished),
            "error": delivery_error,
        },
    }


# A host whose VMs may have more than they use, and less than there is; and one that was over its budget already.
MEMORY = HostMemory(
    physical=512 * GIB,
    reserve=32 * GIB,
    overcommit=1.0,
    hugepages=0,
    budget=480 * GIB,
    promised=320 * GIB,
    reserved=0,
    resident=200 * GIB,
    over_since=None,
)
OVER = msgspec.structs.replace(MEMORY, promised=600 * GIB, over_since=NOW - 10_000.0)


def health(**changes: Any) -> dict[str, Any]:
    """What /healthz answers."""
    return {
        "ready": True,
        "down": {},
        "version": "1.0.0",
        "host": HostLoad(name="node-17", cpus=64, load=11.4, memory_total=512 * GIB, memory_available=int(143.5 * GIB)),
        "running": [],
        "queued": 0,
        "owedCallbacks": 0,
    } | changes


VMS = [
    vm(1, "web-1", cpus=(2, 2, 8), memory=(4 * GIB, 0, 16 * GIB)),
    vm(
        2,
        "db-7",
        cpus=(6, 4, 8),
        memory=(12 * GIB, 4 * GIB, 32 * GIB),
        warnings=(
            (Code.GUEST_CPU_OFFLINE, "CPUs 4-5 are offline in the guest"),
            (Code.GUEST_MEMORY_OFFLINE, "memory blocks 64-95 (4 GiB) are offline in the guest"),
        ),
    ),
    vm(
        3,
        "build-3",
        cpus=(4, None, 16),
        memory=(8 * GIB, None, 64 * GIB),
        warnings=(
            (
                Code.GUEST_AGENT_DISCONNECTED,
                "hot-plug works, but the guest's use cannot be confirmed: no guest agent is connected",
            ),
        ),
        fell_silent=True,
    ),
    vm(
        4,
        "legacy-erp",
        cpus=(2, 2, 2),
        memory=(2 * GIB, 0, None),
        blockers=(
            (Code.CPU_ABOVE_MAXIMUM, "3 vCPUs requested, the running definition allows at most 2"),
            (Code.NO_NUMA_CELL, "the running definition has no guest NUMA cell"),
            (Code.NO_MAX_MEMORY, "the running definition has no <maxMemory>"),
        ),
    ),
    vm(5, "cache-2", cpus=(8, 8, 32), memory=(24 * GIB, 0, 64 * GIB), ballooned=8 * GIB),
    vm(
        6,
        "web-2",
        cpus=(3, 3, 8),
        memory=(6 * GIB, 0, 16 * GIB),
        warnings=((Code.DRIFT, "cpuNum is 3 in the running VM, 2 in its definition"),),
    ),
    vm(7, "spare", state="shutoff", cpus=(2, None, 8), memory=(4 * GIB, None, 16 * GIB)),
    vm(8, "ml-train", cpus=(96, 96, 128), memory=(192 * GIB, 0, 384 * GIB)),
    unread(9),
]
SILENT = "hot-plug works, but the guest's use cannot be confirmed: "


def full_host() -> list[ReadinessReply | dict[str, Any]]:
    """The VMs of a host with 200, of which six are in trouble: the others are as VMs of the field are."""
    no_agent = (Code.GUEST_AGENT_DISCONNECTED, f"{SILENT}no guest agent is connected")
    babble = (Code.GUEST_AGENT_INVALID, f"{SILENT}the answer to guest-get-vcpus cannot be used")
    healthy: list[dict[str, Any]] = [
        {},
        {"at_maximum": True, "cpus": (8, 8, 8), "memory": (16 * GIB, 0, 16 * GIB)},
        {"warnings": ((Code.GUEST_AGENT_ABSENT, f"{SILENT}the VM has no guest-agent channel"),), "cpus": (2, None, 8)},
        {"warnings": (no_agent,), "cpus": (2, None, 8), "memory": (4 * GIB, None, 16 * GIB)},
        {"warnings": ((Code.RESTART_REQUIRED, "the persistent definition has something that the running VM lacks"),)},
        {"blockers": ((Code.NO_MAX_MEMORY, "each definition has no <maxMemory>"),), "memory": (2 * GIB, 0, None)},
        {"state": "shutoff", "cpus": (2, None, 8), "memory": (4 * GIB, None, 16 * GIB)},
        {"ballooned": GIB},
    ]
    trouble: list[dict[str, Any]] = [
        {"cpus": (4, 2, 8), "warnings": ((Code.GUEST_CPU_OFFLINE, "CPUs 2-3 are offline in the guest"),)},
        {"memory": (8 * GIB, GIB, 16 * GIB), "warnings": ((Code.GUEST_MEMORY_OFFLINE, "1 GiB is offline"),)},
        {"warnings": (no_agent,), "cpus": (2, None, 8), "fell_silent": True},
        {"warnings": (babble,), "fell_silent": True},
        {"warnings": ((Code.DRIFT, "cpuNum is 3 in the running VM, 2 in its definition"),), "cpus": (3, 3, 8)},
    ]
    vms: list[ReadinessReply | dict[str, Any]] = [unread(200)]
    vms += [vm(n, f"trouble-{n}", **fields) for n, fields in enumerate(trouble, 1)]
    vms += [vm(n, f"vm-{n:03}", **healthy[n % len(healthy)]) for n in range(6, 200)]
    return vms


TASKS = [
    task(9, "HotUnplugMemory", "cache-2", state="accepted", age_s=180, took_s=0),
    task(8, "HotPlugMemory", "ml-train", state="running", age_s=0, took_s=14),
    task(
        7,
        "HotPlugCpu",
        "legacy-erp",
        outcome="refused",
        error=(Code.CPU_ABOVE_MAXIMUM, "4 vCPUs requested, the running definition allows at most 2"),
        age_s=240,
        took_s=0.02,
    ),
    task(6, "HotPlugCpuMemory", "db-7", outcome="plugged", age_s=420, took_s=61),
    task(
        5,
        "HotPlugCpu",
        "web-1",
        state="finished",
        outcome="online",
        delivery_error="connection refused",
        age_s=720,
        took_s=0.4,
    ),
    task(4, "HotPlugMemory", "web-2", outcome="online", age_s=3700, took_s=1.2),
    task(3, "ReadyForHotplug", "spare", outcome="unchanged", age_s=9000, took_s=0.1),
]
CHANGES = [
    {
        "taskUuid": f"{n:032x}",
        "vm": "db-7",
        "vmUuid": "6f1de2a0-5b7c-4a35-9d0e-000000000002",
        "command": command,
        "caller": "token:zstack",
        "client": "10.0.0.5",
        "acceptedAt": NOW - age_s,
        "finishedAt": NOW - age_s,
        "outcome": outcome,
        "errorCode": code,
        "asked": asked,
        "before": before,
        "after": after,
    }
    for n, command, age_s, outcome, code, asked, before, after in (
        (3, "HotPlugCpuMemory", 420, "plugged", None, {"cpuNum": 6}, {"cpuNum": 4, "memorySize": 8 * GIB},
         {"cpuNum": 6, "memorySize": 12 * GIB}),
        (2, "HotPlugCpu", 90000, "refused", Code.CPU_ABOVE_MAXIMUM, {"cpuNum": 16}, {"cpuNum": 4}, {"cpuNum": 4}),
        (1, "HotPlugCpu", 900000, "online", None, {"cpuNum": 4}, {"cpuNum": 2}, {"cpuNum": 4}),
    )
]  # fmt: skip
RUNNING = [{"vm": "ml-train", "taskUuid": TASKS[1]["taskUuid"], "command": "HotPlugMemory", "seconds": 14.0}]


def plans(question: dict[str, Any]) -> PlanReply:
    """What each target means to a VM that was started for twice of what it has, and can be prepared for more."""
    numbers = next(one.after for one in VMS if isinstance(one, ReadinessReply) and one.vm_uuid == question["vmUuid"])
    assert numbers is not None
    told = []
    for asked in question["targets"]:
        target = msgspec.convert(asked, PlanTarget)
        most = numbers.max_cpu_num if target.cpu_num else numbers.max_memory_size
        total = target.cpu_num or target.memory_size or 0
        verdict: Verdict = "live" if total <= (most or 0) else "restart" if total <= 4 * (most or 0) else "never"
        code, message = Code.NO_MAX_MEMORY, "the running definition has no <maxMemory>"
        if target.cpu_num:
            code = Code.CPU_ABOVE_MAXIMUM
            message = f"{total} vCPUs requested, the running definition allows at most {most}"
        elif most is not None:
            code, has = Code.MEMORY_ABOVE_MAXIMUM, numbers.memory_size or 0
            message = f"{format_size(has)} and {format_size(total - has)} more requested, "
            message += f"the running definition allows at most {format_size(most)}"
        reason = Reason(code, message, REMEDIES[code])
        prepare = PlannedCommand(command="ReadyForHotplug", path="/vm/hotplug/ready", request={}, steps=[])
        told.append(
            Plan(
                target=target,
                verdict=verdict,
                outcome="online" if verdict == "live" else None,
                cpu_num=target.cpu_num,
                memory_size=target.memory_size,
                reasons=[] if verdict == "live" else [reason],
                commands=[],
                prepare=[prepare] if verdict == "restart" else [],
                reserved=Reserved(0, 0),
                took=None,
            )
        )
    return PlanReply(vm_uuid=question["vmUuid"], name="", state="running", plans=told)


ANSWERS: dict[str, tuple[int, Any]] = {
    "/healthz": (200, health(running=RUNNING, queued=1, owedCallbacks=1)),
    "/vms": (200, {"vms": VMS}),
    "/tasks": (200, {"tasks": TASKS}),
    "/vm/hotplug/plan": (200, plans),
}
