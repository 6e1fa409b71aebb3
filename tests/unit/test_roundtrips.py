"""What one command asks of libvirt, pinned down: a look that nobody needs does not come back unseen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import libvirt
import pytest

from kvmagent.hypervisor.budget import Budget
from kvmagent.model.units import GIB, MIB
from tests.fakes.agent import carry_out, format_spec, make_guest, make_node
from tests.fakes.libvirt import FakeConnection, FakeDomain, ask_qemu
from tests.lab.domainxml import GuestSpec

#: What libvirt's client answers by itself.
LOCAL = {"name", "UUIDString", "ID", "connect", "getType", "isAlive"}
LOOK = Counter(domainListGetStats=1, XMLDesc=2)
FIRST_LOOK = Counter(lookupByName=1, jobStats=1, hasManagedSaveImage=1) + LOOK
# Each of them a question to QEMU, which takes as long as ten to libvirt.
ASKED_BALLOON, ASKED_TARGET = Counter(memoryStats=1), Counter(qemuMonitorCommand=2)


class Counting:
    """Counts the calls of fakes that are round trips of a real one; not those that they make of each other."""

    kind: type
    asked: Counter[str]
    _depth = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        kind = type(self).kind
        if name in LOCAL or not callable(getattr(kind, name, None)):
            return found
        return self._counted(name, found)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def counted(*arguments: Any) -> Any:
            self.asked[name] += not Counting._depth
            Counting._depth += 1
            try:
                return call(*arguments)
            finally:
                Counting._depth -= 1

        return counted


class CountedDomain(Counting, FakeDomain):
    kind = libvirt.virDomain

    def __init__(self, *arguments: Any, asked: Counter[str], **options: Any) -> None:
        self.asked = asked
        super().__init__(*arguments, **options)


class CountedConnection(Counting, FakeConnection):
    kind = libvirt.virConnect

    def __init__(self, *domains: FakeDomain, asked: Counter[str]) -> None:
        self.asked = asked
        super().__init__(*domains)


@pytest.mark.parametrize(
    ("command", "wanted", "expected"),
    [
        ("HotPlugCpu", {"cpuNum": 3}, FIRST_LOOK + Counter(setVcpusFlags=1) + LOOK),
        (
            "HotPlugMemory",
            {"memorySize": 1 * GIB, "method": "dimm"},
            FIRST_LOOK + ASKED_BALLOON + ASKED_TARGET + Counter(attachDeviceFlags=1) + LOOK,
        ),
        ("HotPlugCpu", {"cpuNum": 2}, FIRST_LOOK),
        ("HotPlugMemory", {"memorySize": 512 * MIB}, FIRST_LOOK + ASKED_BALLOON + ASKED_TARGET),
        ("HotPlugCpu", {"cpuNum": 3, "dryRun": True}, FIRST_LOOK),
        ("ReadyForHotplug", {}, FIRST_LOOK + ASKED_BALLOON),
    ],
)
def test_a_command_asks_libvirt_what_it_needs_to_know_and_that_once(
    tmp_path: Path, command: str, wanted: dict[str, Any], expected: Counter[str]
) -> None:
    """Its VM is in the budget already, and has been changed by a task before."""
    spec = GuestSpec(name="vm1", vcpus=1, max_vcpus=8, memory_mib=512, agent_channel=False)
    asked: Counter[str] = Counter()
    vm = CountedDomain(format_spec(spec, "qemu"), guest=make_guest(spec), asked=asked)
    budget = Budget(host_root=tmp_path / "host", monotonic=lambda: 0.0)

    def ask(domain: Any, request: str, flags: int) -> str:
        asked["qemuMonitorCommand"] += 1
        return ask_qemu(domain, request, flags)

    node = make_node(tmp_path, connection=CountedConnection(vm, asked=asked), budget=budget, ask=ask)
    node.view_budget()
    assert carry_out(node, "HotPlugCpu", "t1", vmUuid="vm1", cpuNum=2)["outcome"] == "plugged"
    node.release("t1")
    asked.clear()
    reply = carry_out(node, command, "t2", vmUuid="vm1", **wanted)
    assert reply["success"], reply
    assert +asked == expected
    node.release("t2")
    asked.clear()
    node.view_budget()
    assert set(+asked) <= {"getAllDomainStats"}, "what the task has seen last is not read again"
