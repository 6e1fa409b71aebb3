"""Golden plans: for each case the goal, the steps and what the caller is told, as a file to read and to review.

After a change that is meant: pytest tests/golden --update-golden, then read the diff.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.agent import MIB, FakeAgent, make_domain, make_guest
from tests.fakes.libvirt import FakeDomain
from tests.lab.domainxml import GuestSpec

PLANS = Path(__file__).parent / "plans"
GIB = 1024 * MIB


@dataclass
class Case:
    """One command on one VM; `arrange` changes the fake domain before it."""

    command: str
    request: dict[str, Any]
    spec: dict[str, Any] = field(default_factory=dict)
    domain: dict[str, Any] = field(default_factory=dict)
    guest: dict[str, Any] = field(default_factory=dict)
    arrange: Callable[[FakeDomain], None] = lambda domain: None


def inflate_balloon(size_mib: int) -> Callable[[FakeDomain], None]:
    def arrange(domain: FakeDomain) -> None:
        for root in (domain.live, domain.config):
            root.find("currentMemory").text = str(size_mib * 1024)

    return arrange


def offline_cpu_1(domain: FakeDomain) -> None:
    domain.guest.online_cpus[1] = False


def pause(domain: FakeDomain) -> None:
    domain.paused = True


ODD_DIMM = (
    "<memory model='dimm'><target><size unit='MiB'>64</size><node>0</node></target><alias name='ua-odd'/></memory>"
)
CPU, MEMORY, READY = "HotPlugCpu", "HotPlugMemory", "ReadyForHotplug"
CASES = {
    "cpu-online": Case(CPU, {"cpuNum": 3}),
    "cpu-unchanged": Case(CPU, {"cpuNum": 1}),
    "cpu-live-only": Case(CPU, {"cpuNum": 2, "affect": "live"}),
    "cpu-config-only": Case(CPU, {"cpuNum": 2, "affect": "config"}),
    "cpu-off-config-only": Case(CPU, {"cpuNum": 2, "affect": "config"}, domain={"running": False}),
    "cpu-transient-live-only": Case(CPU, {"cpuNum": 2, "affect": "live"}, domain={"persistent": False}),
    "cpu-dry-run": Case(CPU, {"cpuNum": 3, "dryRun": True}),
    "cpu-owner-offline": Case(CPU, {"cpuNum": 3}, spec={"vcpus": 2}, arrange=offline_cpu_1),
    "cpu-agent-stopped": Case(CPU, {"cpuNum": 3}, guest={"agent": "stopped"}),
    "cpu-agent-hung": Case(CPU, {"cpuNum": 3}, guest={"agent": "hung"}),
    "cpu-agent-absent": Case(CPU, {"cpuNum": 3}, spec={"agent_channel": False}),
    "cpu-agent-blocks-get": Case(CPU, {"cpuNum": 3}, guest={"refuses": frozenset({"guest-get-vcpus"})}),
    "cpu-agent-blocks-set": Case(CPU, {"cpuNum": 3}, guest={"refuses": frozenset({"guest-set-vcpus"})}),
    "cpu-agent-one-at-a-time": Case(CPU, {"cpuNum": 4}, guest={"onlines": 1}),
    "cpu-guest-sees-nothing": Case(CPU, {"cpuNum": 2, "timeoutSec": 1}, guest={"sees_nothing": True}),
    "cpu-online-not-asked": Case(CPU, {"cpuNum": 2, "guestOnline": False}),
    "cpu-paused": Case(CPU, {"cpuNum": 2}, arrange=pause),
    "cpu-refused-maximum": Case(CPU, {"cpuNum": 5}),
    "cpu-refused-below": Case(CPU, {"cpuNum": 1}, spec={"vcpus": 2}),
    "cpu-refused-off": Case(CPU, {"cpuNum": 2}, domain={"running": False}),
    "cpu-refused-transient": Case(CPU, {"cpuNum": 2}, domain={"persistent": False}),
    "cpu-refused-no-acpi": Case(CPU, {"cpuNum": 2}, spec={"acpi": False}),
    "memory-dimm-online": Case(MEMORY, {"memorySize": 512 * MIB, "method": "dimm"}),
    "memory-dimm-auto-onlined-by-guest": Case(MEMORY, {"memorySize": 512 * MIB}, guest={"auto_online": True}),
    "memory-dimm-rounded": Case(MEMORY, {"memorySize": 300 * MIB}),
    "memory-dimm-several": Case(MEMORY, {"memorySize": 768 * MIB, "dimmSize": 256 * MIB}),
    "memory-dimm-emptiest-node": Case(MEMORY, {"memorySize": 384 * MIB}, spec={"numa_cells": 2, "memory_mib": 257}),
    "memory-dimm-node": Case(MEMORY, {"memorySize": 384 * MIB, "node": 1}, spec={"numa_cells": 2}),
    "memory-dimm-config-only": Case(MEMORY, {"memorySize": 384 * MIB, "affect": "config"}),
    "memory-dimm-live-only": Case(MEMORY, {"memorySize": 384 * MIB, "affect": "live"}),
    "memory-dimm-agent-stopped": Case(MEMORY, {"memorySize": 384 * MIB}, guest={"agent": "stopped"}),
    "memory-dimm-agent-hung": Case(MEMORY, {"memorySize": 384 * MIB}, guest={"agent": "hung"}),
    "memory-dimm-online-not-asked": Case(MEMORY, {"memorySize": 384 * MIB, "guestOnline": False}),
    "memory-dimm-guest-sees-nothing": Case(
        MEMORY, {"memorySize": 384 * MIB, "timeoutSec": 1}, guest={"sees_nothing": True}
    ),
    "memory-dimm-large-blocks": Case(MEMORY, {"memorySize": 1 * GIB}, guest={"block_bytes": 1 * GIB}),
    "memory-unchanged": Case(MEMORY, {"memorySize": 256 * MIB}),
    "memory-balloon": Case(MEMORY, {"memorySize": 256 * MIB, "method": "balloon"}, arrange=inflate_balloon(200)),
    "memory-balloon-no-driver": Case(
        MEMORY,
        {"memorySize": 256 * MIB, "method": "balloon", "timeoutSec": 1},
        guest={"balloon_driver": False},
        arrange=inflate_balloon(200),
    ),
    "memory-auto-balloon-then-dimm": Case(MEMORY, {"memorySize": 512 * MIB}, arrange=inflate_balloon(200)),
    "memory-auto-within-balloon": Case(MEMORY, {"memorySize": 220 * MIB}, arrange=inflate_balloon(200)),
    "memory-refused-strict": Case(MEMORY, {"memorySize": 300 * MIB, "strict": True}),
    "memory-refused-dimm-size": Case(MEMORY, {"memorySize": 512 * MIB, "dimmSize": 100 * MIB}),
    "memory-refused-maximum": Case(MEMORY, {"memorySize": 5 * GIB}),
    "memory-refused-slots": Case(MEMORY, {"memorySize": 1 * GIB, "dimmSize": 128 * MIB}, spec={"slots": 4}),
    "memory-refused-node": Case(MEMORY, {"memorySize": 384 * MIB, "node": 5}),
    "memory-refused-no-max-memory": Case(MEMORY, {"memorySize": 384 * MIB}, spec={"max_memory_mib": None}),
    "memory-refused-no-numa": Case(MEMORY, {"memorySize": 384 * MIB}, spec={"numa_cells": 0, "max_memory_mib": None}),
    "memory-refused-no-acpi": Case(MEMORY, {"memorySize": 384 * MIB}, spec={"acpi": False}),
    "memory-refused-no-balloon": Case(MEMORY, {"memorySize": 256 * MIB, "method": "balloon"}, spec={"balloon": False}),
    "memory-refused-balloon-above": Case(MEMORY, {"memorySize": 512 * MIB, "method": "balloon"}),
    "memory-refused-off": Case(MEMORY, {"memorySize": 384 * MIB}, domain={"running": False}),
    "memory-refused-transient": Case(MEMORY, {"memorySize": 384 * MIB}, domain={"persistent": False}),
    "memory-refused-misaligned-dimm": Case(MEMORY, {"memorySize": 512 * MIB}, spec={"devices_xml": ODD_DIMM}),
    "memory-refused-below": Case(MEMORY, {"memorySize": 128 * MIB}),
    "memory-refused-host": Case(
        MEMORY, {"memorySize": 1024 * 1024 * GIB}, spec={"max_memory_mib": 2 * 1024 * 1024 * 1024}
    ),
    "ready": Case(READY, {}),
    "ready-for-totals": Case(READY, {"cpuNum": 4, "memorySize": 1 * GIB}),
    "ready-not-bare-vm": Case(
        READY,
        {},
        spec={
            "vcpus": 1,
            "max_vcpus": 1,
            "max_memory_mib": None,
            "numa_cells": 0,
            "acpi": False,
            "balloon": False,
            "agent_channel": False,
        },
    ),
    "ready-not-off": Case(READY, {}, domain={"running": False}),
    "ready-not-agent-blocks": Case(READY, {}, guest={"refuses": frozenset({"guest-get-memory-blocks"})}),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_is_the_golden_one(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    spec = GuestSpec(name="vm1", **case.spec)
    domain = make_domain(spec, make_guest(spec, **case.guest), **case.domain)
    case.arrange(domain)
    before = xml_of(domain)
    agent = FakeAgent(tmp_path, domain)
    done = agent.run(case.command, vmUuid="vm1", **case.request)
    agent.stop()
    told = {name: value for name, value in done.reply.items() if name not in ("before", "vmUuid")}
    for timed in told["steps"] + told["stages"]:
        timed.pop("elapsedMs", None)
    if name == "memory-refused-host":  # its message names what the host has free just now
        told.pop("error")
    seen = {"request": case.request, "goal": done.goal, "reply": told, "libvirtCalls": domain.calls}
    if done.reply["outcome"] in ("refused", "unchanged", "planned"):
        assert xml_of(domain) == before
        assert not domain.calls
    golden = PLANS / f"{name}.json"
    if request.config.getoption("--update-golden"):
        golden.write_text(json.dumps(seen, indent=1) + "\n")
    assert seen == json.loads(golden.read_text())


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in PLANS.glob("*.json")} == set(CASES)


def xml_of(domain: FakeDomain) -> tuple[str, str]:
    flags_of_inactive = 2
    return domain.XMLDesc(0), domain.XMLDesc(flags_of_inactive) if domain.config is not None else ""
